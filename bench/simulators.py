"""
Frames a second for 1, 2 and 4 simulators, and how much of the simulators' time evaluation hides
behind the model's.

    python bench/simulators.py                                    # our houses, our simulator
    python bench/simulators.py --sim habitat --sim-python PATH    # our houses, habitat-sim

Workers: each records the same walks (`record`: replay the actions, then render every pose once), as
make_data.py does. Compared with one worker; more workers than cores cannot help. With habitat there
is a second peer, the way most VLN code steps: `habitat.Env` with a camera, in one process, which
renders and measures at every step.

Overlap: evaluate.py's own loop and a policy, 16 robots. While the model decides for half of them,
the other half are in their simulators, unless these are so fast that one decision for all is
cheaper (evaluate.EpisodeLoop). Compared with one after the other: the model's seconds of that run,
plus the seconds that the same walks take with plans that are there at once.

Checked on the way: every worker's frames are the first one's, byte for byte; and each of the 16
robots does what it does alone.
"""
import json
import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
from common import FRAME_PX, ROOT, add_row, make_world, parser, phrase_policy

from checkpoint import load_policy
from evaluate import EpisodeState, run_episodes
from world.episodes import read_episodes, read_ground_truth
from world.pool import SimPool
from world.robots import ROBOTS

LAB = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
import habitat
from tools.habitat_check import make_config, make_episode
from habitat.config import default_structured_configs as c
from omegaconf import OmegaConf, open_dict
job, walks = json.loads(sys.stdin.readline()), [json.loads(line) for line in sys.stdin]
dataset = habitat.Dataset()
dataset.episodes = [make_episode(walk["episode"], job["scenes_dir"]) for walk in walks]
of = {episode.episode_id: episode for episode in dataset.episodes}
config, robot = make_config(job, walks), job["robot"]
OmegaConf.set_readonly(config, False)
with open_dict(config):
    config.habitat.simulator.agents.main.sim_sensors = {"rgb": OmegaConf.structured(
        c.HabitatSimRGBSensorConfig(width=robot["width"], height=robot["height"],
                                    hfov=int(robot["hfov_deg"])))}
with habitat.Env(config, dataset) as env:
    for again in range(job["repeats"] + 1):         # the first round compiles and loads
        start, frames = time.perf_counter(), 0
        for walk in walks:
            env.current_episode = of[str(walk["episode"]["episode_id"])]
            env.reset()
            for action in walk["actions"]:
                env.step(action)
            frames += len(walk["actions"]) + 1
        answers.write(json.dumps([frames, time.perf_counter() - start]) + "\\n")
        answers.flush()
"""


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--sim", choices=("house", "habitat"), default="house")
    p.add_argument("--sim-python", metavar="PATH", help="interpreter that has habitat-sim")
    p.add_argument("--walks", type=int, default=16, help="walks that each worker records")
    p.add_argument("--robots", type=int, default=16, help="robots of the overlap row")
    return p.parse_args(argv)


def record_all(pool, sims, jobs):
    """Every simulator records all jobs -> (frames a second of all together, each one's frames)"""
    start, frames = time.perf_counter(), [[] for _ in range(sims)]
    left = [list(jobs) for _ in range(sims)]
    for i in range(sims):
        pool.submit(i, "record", **left[i].pop(0))
    busy = sims
    while busy:
        i, reply = pool.wait_any()
        frames[i].append(reply["frames"])
        if left[i]:
            pool.submit(i, "record", **left[i].pop(0))
        else:
            busy -= 1
    rate = sum(len(f) for mine in frames for f in mine) / (time.perf_counter() - start)
    return rate, [np.concatenate(mine) for mine in frames]


def workers(args, robot, scenes, jobs):
    rates, equal, first = {}, True, None
    for sims in (1, 2, 4):
        with SimPool(args.sim, robot, scenes, sims, args.sim_python and [
                [args.sim_python, "-m", "world.worker"]]) as pool:
            record_all(pool, sims, jobs[:1])                            # load, compile
            found = [record_all(pool, sims, jobs) for _ in range(args.repeats)]
        rates[sims] = [rate for rate, _ in found]
        first = found[0][1][0] if first is None else first
        equal &= all(np.array_equal(first, mine) for _, frames in found for mine in frames)
    shape = f"{robot['width']}x{robot['height']}, {len(first)} frames each"
    for sims in (2, 4):
        add_row(args, f"frames/s, {sims} {args.sim} workers", rates[sims], rates[1], "one worker",
                "frames/s", equal, "every worker renders the same bytes", shape, ("numpy",), True)
    return rates


def lab(args, robot, scenes, jobs, rates):
    """habitat.Env, stepping with a camera: what it does in one process."""
    lines = [{"robot": robot, "scenes_dir": scenes, "radius_m": 3.0, "repeats": args.repeats}]
    lines += [{"episode": job["episode"], "actions": job["actions"]} for job in jobs]
    done = subprocess.run([args.sim_python or sys.executable, "-c", LAB, ROOT], check=True,
                          input="".join(json.dumps(line) + "\n" for line in lines), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = [json.loads(line) for line in done.stdout.splitlines()][1:]
    add_row(args, "frames/s, one habitat worker", rates[1], [n / s for n, s in found],
            "habitat.Env.step with a camera", "frames/s", None,
            "the same walks; tests/test_habitat.py compares what is seen and measured",
            f"{robot['width']}x{robot['height']}", ("numpy",), True)


def overlap(args, robot, scenes, episodes):
    """evaluate.py's loop with a policy, and the same walks with plans that are there at once."""
    policy = load_policy(phrase_policy(args, make_world(args)[1]), device=args.device).eval()
    plans = {}                                                   # by walk and actions so far

    def walk_all(agent, sims):
        counters = Counter()
        walks = [EpisodeState(e, e["instruction"]["instruction_text"]) for e in episodes]
        with SimPool(args.sim, robot, scenes, sims, args.sim_python and [
                [args.sim_python, "-m", "world.worker"]]) as pool:
            for i in range(sims):                                     # load, compile
                pool.submit(i, "reset", episode=episodes[0])
            for i in range(sims):
                pool.wait(i)
            start = time.perf_counter()
            ended = list(run_episodes(pool, walks, agent, sims=sims, max_actions=60,
                                      counters=counters))
            return time.perf_counter() - start, counters["deciding_s"], {
                walk.name: walk.actions for walk in ended}

    def recording_agent(walks):
        answers = decide(walks)
        for walk, plan in zip(walks, answers):
            plans[walk.name, len(walk.actions)] = plan
        return answers

    def replaying_agent(walks):
        return [plans[walk.name, len(walk.actions)] for walk in walks]

    decide = policy.agent()
    alone = walk_all(recording_agent, 1)[2]
    together, apart, equal = [], [], True
    for _ in range(args.repeats):
        seconds, model_s, walked = walk_all(recording_agent, args.robots)
        simulators_s, _, again = walk_all(replaying_agent, args.robots)
        together.append(seconds)
        apart.append(model_s + simulators_s)
        equal &= walked == again == alone
    add_row(args, f"evaluation, {args.robots} {args.sim} robots", together, apart,
            "model and simulators one after the other", "s", equal,
            "every robot does what it does alone", f"{len(episodes)} walks of at most 60 actions")


def main(args):
    make_world(args)
    houses = os.path.join(args.world, "houses")
    height, width = FRAME_PX[args.shape]
    robot = dict(ROBOTS["houses"], height=height, width=width)
    scenes = os.path.join(houses, "scenes")
    episodes, truths = read_episodes(houses, "train"), read_ground_truth(houses, "train")
    jobs = [{"episode": e, "actions": truths[str(e["episode_id"])]["actions"]}
            for e in episodes[:args.walks]]
    rates = workers(args, robot, scenes, jobs)
    if args.sim == "habitat":
        lab(args, robot, scenes, jobs, rates)
    overlap(args, robot, scenes, episodes[:2 * args.robots])


if __name__ == "__main__":
    main(parse_args())
