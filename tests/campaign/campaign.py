"""
Is an episode ever lost, or scored twice? Evaluations that are killed, again and again.

    same    equal per-episode files over 1, 4 and 16 robots, and 1 and 2 processes
    kills   kill -9 at random moments of simulators, of evaluate.py and of tools.serve
    hour    evaluations in a loop, one simulator killed every 20 s: rows, memory, file descriptors
    wrong   known ways to a wrong number: what answers each (injections.py)

The houses and the policy (tiny, trained for a few steps on a CPU) are made in --out. Every file of
episodes is compared, byte for byte, with that of one undisturbed run on one robot. Moments and
targets of the kills follow from --seed and are printed.

Run it   python tests/campaign/campaign.py same kills wrong
         python tests/campaign/campaign.py hour --minutes 60
Writes   --out: houses, checkpoint, results folders, hour.csv
Expect   exit status 0, or 1 if one of the checks failed. docs/reliability.md holds what it printed
"""
from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from conftest import ROOT, script  # noqa: E402
from helpers import free_port, is_gone  # noqa: E402
from remote_servers import house_argv, learned_checkpoint, serve_process  # noqa: E402

import evaluate  # noqa: E402
from cli import DefaultsFormatter, UserError, positive_int, read_json, read_rows  # noqa: E402

TARGETS = ("simulator", "evaluate.py", "server")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    p.add_argument("parts", nargs="+", choices=("same", "kills", "hour", "wrong"))
    p.add_argument("--out", default="results/campaign")
    p.add_argument("--episodes", type=positive_int, default=48)
    p.add_argument("--robots", type=positive_int, nargs="+", default=[1, 4, 16])
    p.add_argument("--kills", type=positive_int, default=20, help="of each kind of target")
    p.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    p.add_argument("--minutes", type=float, default=60, help="of the part hour")
    p.add_argument("--every-s", type=float, default=20, help="seconds between its kills")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


class Campaign:
    """Houses, a policy, and the undisturbed run on one robot that all others must equal."""

    def __init__(self, args):
        self.args, self.failed = args, 0
        self.out, ego = os.path.abspath(args.out), os.path.join(os.path.abspath(args.out), "ego")
        houses = os.path.join(self.out, "houses")
        if not os.path.exists(os.path.join(ego, "train", "meta.json")):
            script("-m", "world.houses", "--out", houses, "--train-houses", 4, "--walks-per-house",
                   8, "--val-episodes", args.episodes, "--unseen-houses", 8, "--jobs", 1)
            script("make_data.py", "--episodes", houses, "--out", ego, "--sims", 1)
        self.ego = os.path.join(ego, "train")
        self.ckpt = os.path.join(ego, "learned_window")
        if not os.path.exists(os.path.join(self.ckpt, "nav.json")):
            learned_checkpoint(self.ego, "window")
        self.reference = self.folder("reference")
        self.evaluate("reference", "--sims", 1)
        self.seconds = read_json(os.path.join(self.reference, "timing.json"))["seconds"]
        with open(os.path.join(self.reference, "episodes.jsonl"), "rb") as file:
            self.expected = file.read()
        rows = read_rows(os.path.join(self.reference, "episodes.jsonl"))
        print(f"{len(rows)} episodes, {sum(row['steps'] for row in rows)} steps, "
              f"{sum(row['decisions'] for row in rows)} decisions of the policy, ended by "
              f"{dict(Counter(row['end'] for row in rows))}")

    def folder(self, name: str) -> str:
        """An empty results folder, but for its locks, which stay open as long as this process."""
        out = os.path.join(self.out, "results", name)
        for path in glob.glob(os.path.join(glob.escape(out), "*")):
            os.remove(path)
        return out

    def argv(self, name: str, *flags) -> list[str]:
        return house_argv(self.ego, self.ckpt, os.path.join(self.out, "results", name),
                          *map(str, flags))

    def evaluate(self, name: str, *flags):
        """evaluate.py in this process, silent."""
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), \
                contextlib.redirect_stderr(null):
            return evaluate.main(evaluate.parse_args(self.argv(name, *flags)))

    def differing(self, name: str, expected: bytes | None = None) -> int:
        """How many lines of a run's file of episodes are not those expected; all must be there."""
        with open(os.path.join(self.out, "results", name, "episodes.jsonl"), "rb") as file:
            rows, known = file.read().splitlines(), (expected or self.expected).splitlines()
        return sum(a != b for a, b in zip(rows, known)) + abs(len(rows) - len(known))

    def check(self, good: bool) -> str:
        self.failed += not good
        return "" if good else "  FAILED"


# ---------------------------------------------------------------- same


def same(campaign: Campaign):
    """The oracle's and the policy's episodes do not depend on how many robots walk them."""
    print("\nagent   robots  processes  sha256 of episodes.jsonl  episodes that differ")
    for agent in ("oracle", "policy"):
        first = None
        for processes in (1, 2):
            for robots in campaign.args.robots:
                name = f"{agent}_{robots}_{processes}"
                out = campaign.folder(name)
                argv = campaign.argv(name, "--sims", robots, "--agent", agent)
                ranks = [subprocess.Popen(
                    [sys.executable, "evaluate.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, env={**os.environ, "RANK": str(rank), "WORLD_SIZE":
                                                    str(processes)}) for rank in range(processes)]
                status = [rank.wait(timeout=1200) for rank in ranks]
                with open(os.path.join(out, "episodes.jsonl"), "rb") as file:
                    rows = file.read()
                first = first or (rows if agent == "oracle" else campaign.expected)
                differ = campaign.differing(name, first)
                print(f"{agent:7} {robots:6}  {processes:9}  "
                      f"{hashlib.sha256(rows).hexdigest()[:16]:24}  {differ}"
                      + campaign.check(differ == 0 and not any(status)), flush=True)


# ---------------------------------------------------------------- kills


def simulators(pid: int) -> list[int]:
    """The processes of a script's simulators."""
    found = []
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = file.read().split()
        for child in children:
            with open(f"/proc/{child}/cmdline") as file:
                found += [int(child)] if "world.worker" in file.read() else []
    return found


class Disturbed:
    """One evaluation that is killed at some moments, and begun again until it ends."""

    def __init__(self, campaign: Campaign, target: str, number: int, moments: list[float]):
        self.campaign, self.target, self.moments = campaign, target, moments
        self.name, self.runs, self.again = f"killed_{target}_{number}", 0, set()
        self.out, self.rng = campaign.folder(self.name), random.Random(f"{target} {number}")
        self.timing = os.path.join(self.out, "timing.json")
        self.port, self.server, self.said = free_port(), None, []

    def run(self):
        flags = ["--sims", 3]
        if self.target == "server":
            self.server = serve_process(self.campaign.ckpt, self.port)
            flags += ["--server", f"http://127.0.0.1:{self.port}"]
        try:
            while self.run_once(flags) != 0:
                assert self.runs < 50, "it does not end"
        finally:
            if self.server:
                self.server.kill()
                self.server.wait()
        walks = read_json(self.timing)["walks"] if os.path.exists(self.timing) else 0
        return self.known + walks == len(self.campaign.expected.splitlines())

    def run_once(self, flags: list) -> int:
        """The same command once -> its exit status."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.timing)                              # of a run killed at its end
        self.known, self.runs = len(self.finished()), self.runs + 1
        process = subprocess.Popen([sys.executable, "evaluate.py", *self.campaign.argv(
            self.name, *flags)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not simulators(process.pid):
            time.sleep(0.02)
        while self.moments:
            try:
                process.wait(self.moments[0])
                break
            except subprocess.TimeoutExpired:
                self.kill(process, self.moments.pop(0))
        status = process.wait(timeout=1200)
        self.again |= {row["episode_id"] for row in self.rows() if row["end"] == "error"}
        return status

    def kill(self, process, after_s: float):
        """kill -9 of the target; a server is started again at once."""
        alive = simulators(process.pid)
        if self.target == "simulator":
            if not alive:
                return self.moments.insert(0, after_s)          # between death and new start
            os.kill(self.rng.choice(alive), signal.SIGKILL)
        elif self.target == "evaluate.py":
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert all(map(is_gone, alive)), "its simulators are still there"
        else:
            self.server.kill()
            self.server.wait()
            self.server = serve_process(self.campaign.ckpt, self.port)
        self.said.append(f"{after_s:.2f} s ({len(self.finished())} rows)")

    def rows(self) -> list[dict]:
        path = os.path.join(self.out, "episodes.jsonl")
        return read_rows(path) if os.path.exists(path) else []

    def finished(self) -> list[dict]:
        """The rows with a result. No episode may have two."""
        rows = [row for row in self.rows() if row["end"] != "error"]
        assert len({row["episode_id"] for row in rows}) == len(rows), "an episode is there twice"
        return rows


def kills(campaign: Campaign):
    """--kills of each target. A run takes at most five; each moment counts from the first simulator
    of that start, or from the kill before it."""
    rng = random.Random(campaign.args.seed)
    print(f"\nkill -9 of ..  at (seed {campaign.args.seed})")
    for target in campaign.args.targets:
        moments = [rng.uniform(0, campaign.seconds / 2) for _ in range(campaign.args.kills)]
        runs = lost = again = number = 0
        while moments:
            now, moments = moments[:5], moments[5:]
            walk = Disturbed(campaign, target, number, now)
            once, number = walk.run(), number + 1
            moments = [after / 2 for after in now] + moments    # the run was too short for these
            differ = campaign.differing(walk.name)
            print(f"{target:12}  {', '.join(walk.said)}" + campaign.check(once and not differ),
                  flush=True)
            runs, lost, again = runs + walk.runs, lost + differ, again + len(walk.again)
        print(f"{target:12}  {campaign.args.kills} kills in {number} evaluations, {runs} starts: "
              f"{again} episodes without a result were walked again by the same command; {lost} "
              "episodes lost, scored twice or different")


# ---------------------------------------------------------------- hour


class Sample(NamedTuple):
    """Of this process, between two evaluations."""
    minutes: float
    rss_mb: float
    descriptors: int
    threads: int


def sample(start: float) -> Sample:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return Sample((time.monotonic() - start) / 60, pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20,
                  len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def kill_simulators(args, done: threading.Event, killed: list):
    """Every args.every_s seconds, at most as often as that fits into the hour: on a machine that is
    so slow that none lives long enough, the last evaluation ends without being disturbed."""
    rng = random.Random(args.seed)
    while len(killed) < 60 * args.minutes // args.every_s and not done.wait(args.every_s):
        while not done.is_set() and not (alive := simulators(os.getpid())):
            time.sleep(0.01)
        with contextlib.suppress(OSError, IndexError):
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed.append(time.monotonic())


def hour(campaign: Campaign):
    """All evaluations in this one process, so that what one leaves behind adds up."""
    args, start, done, killed = campaign.args, time.monotonic(), threading.Event(), []
    threading.Thread(target=kill_simulators, args=(args, done, killed), daemon=True).start()
    samples, counts = [], Counter()
    while time.monotonic() - start < 60 * args.minutes:
        out = campaign.folder("hour")
        while True:
            try:
                campaign.evaluate("hour", "--sims", 3)
                break
            except (UserError, SystemExit):                     # at its start, or thrice
                counts["starts again"] += 1
        timing = read_json(os.path.join(out, "timing.json"))
        counts.update(evaluations=1, episodes=len(campaign.expected.splitlines()),
                      deaths=timing.get("deaths", 0), differ=campaign.differing("hour"))
        counts["twice"] += max(0, timing["walks"] - len(campaign.expected.splitlines()))
        samples.append(sample(start))
    done.set()
    with open(os.path.join(campaign.out, "hour.csv"), "w") as file:
        file.write(",".join(Sample._fields) + "\n")
        file.writelines(",".join(f"{v:.2f}" for v in row) + "\n" for row in samples)
    print_hour(campaign, samples, counts, len(killed))


def print_hour(campaign: Campaign, samples: list[Sample], counts: Counter, killed: int):
    shown = [samples[i * (len(samples) - 1) // 6] for i in range(7)]
    print("\nminutes  RSS (MB)  descriptors  threads")
    for row in shown:
        print(f"{row.minutes:7.1f}  {row.rss_mb:8.1f}  {row.descriptors:11}  {row.threads:7}")
    later = np.array(samples[len(samples) // 6:])               # after the allocator has warmed up
    slopes = [np.polyfit(later[:, 0] / 60, later[:, i], 1)[0] if len(later) > 2 else 0.0
              for i in (1, 2)]
    flat = later[0, 2] == later[-1, 2] and abs(slopes[0]) < 0.05 * later[0, 1]
    print(f"{counts['evaluations']} evaluations, {counts['episodes']} episodes, {killed} kills "
          f"({counts['deaths']} amid a walk, {counts['starts again']} ended a run, which went on "
          f"by the same command): {counts['differ']} episodes lost or different, {counts['twice']} "
          f"scored twice{campaign.check(not counts['differ'] and not counts['twice'])}")
    print(f"slopes an hour after the first sixth: RSS {slopes[0]:+.1f} MB, descriptors "
          f"{slopes[1]:+.2f}" + campaign.check(flat))


def main(args) -> int:
    campaign = Campaign(args)
    for part in args.parts:
        if part == "wrong":
            import injections
            campaign.failed += injections.main(campaign.ego, os.path.join(campaign.out, "wrong"))
        else:
            {"same": same, "kills": kills, "hour": hour}[part](campaign)
    print(f"\n{campaign.failed} checks failed" if campaign.failed else "\nall checks passed")
    return campaign.failed


if __name__ == "__main__":
    sys.exit(min(1, main(parse_args())))
