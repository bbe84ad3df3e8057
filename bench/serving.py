"""
Decisions per second of robots that ask tools/serve.py, against the same walks in one process; and
where the time of a decision goes. Greedy: the walks must be the same, action by action.

Run it
    python bench/serving.py --ckpt ckpt/sft                             # the houses, on a CPU
    python bench/serving.py --ckpt ckpt/r2r --sim habitat --sim-python PATH --device cuda

Writes   --results  a line {"row", "ours", "peer", "peer_name", "unit", "ratio", "equal", ..}
Expect   a ratio near 1: the policy works in another process than the client, which encodes PNG
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import add_row  # noqa: E402

import evaluate  # noqa: E402
from cli import DefaultsFormatter, run_cli  # noqa: E402
from evaluate import EpisodeState  # noqa: E402
from tools import remote  # noqa: E402
from world.pool import SimPool  # noqa: E402
from world.robots import simulator_commands, simulator_gpus  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()),
                                formatter_class=DefaultsFormatter)
    p.add_argument("--ckpt", default="ckpt/sft")
    p.add_argument("--episodes", help="default: those of the checkpoint's data set")
    p.add_argument("--split", default="val_unseen")
    p.add_argument("--walks", type=int, default=64)
    p.add_argument("--max-actions", type=int, default=60)
    p.add_argument("--sim", choices=("house", "habitat"), default="house")
    p.add_argument("--sim-python", metavar="PATH")
    p.add_argument("--sims", type=int, default=16)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--port", type=int, default=8018)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--results", help="file to append the row to, as a line of JSON")
    p.set_defaults(shape="the checkpoint's")
    return p.parse_args(argv)


class TimedPolicy(remote.RobotPolicy):
    """Notes the milliseconds of each decision, by part."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parts = {"request and reply": [], "decode": [], "wait": [], "model": []}

    async def answer(self, body):
        start = time.perf_counter()
        answer = await super().answer(body)
        parts = answer["ms"]
        self.parts["request and reply"].append(
            1000 * (time.perf_counter() - start) - sum(parts.values()))
        for name, milliseconds in parts.items():
            self.parts[name].append(milliseconds)
        return answer

    def medians(self):
        return ", ".join(f"{name} {statistics.median(values):.1f}"
                         for name, values in self.parts.items())


def start_server(args, url):
    """python -m tools.serve with the flags of this run; waits until it answers."""
    process = subprocess.Popen([sys.executable, "-m", "tools.serve", "--ckpt", args.ckpt, "--port",
                                str(args.port), "--device", args.device, "--threads",
                                str(args.threads)], cwd=ROOT)
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/health", timeout=5).close()
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    process.kill()
    sys.exit("bench/serving.py: error: tools.serve does not answer")


def walk(run, pool, evaluation, agent, sims, max_actions):
    """-> {name: actions}, decisions per second"""
    dialog = evaluate.speaks_dialog(evaluation.settings["contract"])
    walks = [EpisodeState(e, evaluation.instructions[str(e["episode_id"])])
             for e in evaluation.episodes]
    start = time.perf_counter()
    ended = {w.name: w for w in run(pool, walks, agent, sims=sims, max_actions=max_actions,
                                    render="last" if dialog else True, counters=Counter())}
    decisions = sum(len(w.decisions) for w in ended.values())
    return ({name: w.actions for name, w in ended.items()},
            decisions / (time.perf_counter() - start))


def main(args):
    url = f"http://127.0.0.1:{args.port}"
    flags = [f"--{key.replace('_', '-')}={vars(args)[key]}" for key in (
        "ckpt", "episodes", "split", "sim", "sim_python", "sims", "device", "threads", "max_actions"
        ) if vars(args)[key]]
    there = evaluate.parse_args([*flags, f"--limit={args.walks}", f"--server={url}"])
    here = evaluate.parse_args([*flags, f"--limit={args.walks}"])
    evaluation = evaluate.prepare(here)
    settings = evaluation.settings
    local = evaluate.load_agent(here, settings, evaluation.instructions.values())
    process, found, parts = start_server(args, url), {"here": [], "there": []}, {}
    try:
        with SimPool(args.sim, settings["robot"], evaluation.scenes, args.sims,
                     simulator_commands(here), here.sim_timeout, simulator_gpus(here)) as pool:
            walk(evaluate.run_episodes, pool, evaluation, local, args.sims, 9)     # all is warm
            for sims in [args.sims] * args.repeats + [1]:
                found["here"].append(walk(evaluate.run_episodes, pool, evaluation, local, sims,
                                          args.max_actions))
                agent = TimedPolicy(remote.JsonClient(url), {
                    key: settings[key] for key in remote.SERVED}, there.blank_frames)
                agent.check()
                found["there"].append(walk(remote.run_episodes, pool, evaluation, agent, sims,
                                           args.max_actions))
                parts[sims] = agent.medians()
    finally:
        process.kill()
        process.wait()
    rates = {name: [rate for _, rate in runs[:args.repeats]] for name, runs in found.items()}
    equal = all(a == b for (a, _), (b, _) in zip(found["here"], found["there"]))
    add_row(args, f"tools.serve, {args.sims} robots", rates["there"], rates["here"],
            "evaluate.py in one process", "decisions/s", equal,
            f"{len(evaluation.episodes)} greedy walks, action by action",
            f"{args.ckpt}, {args.threads} thread(s); ms of a decision (medians): "
            + "; ".join(f"{sims} robot(s): {text}" for sims, text in parts.items()),
            higher_is_better=True)


if __name__ == "__main__":
    run_cli(main, parse_args)
