"""
Recording, frames a second: make_data.py with two simulators against the official collector's way.

    python bench/recording.py --episodes data/houses

The official collector (VLN-R1's, around VLN-CE) has one environment; at every step it renders one
frame, writes it as a JPEG file of its own and writes the walk's action_list.json and
instruction.txt again. Here it does so in our simulator, on the same walks. make_data.py is timed
whole, its start, its simulator processes, checks and tables included; it writes lossless PNG.

Checked: every frame that make_data.py has recorded is the frame that the collector saw.
"""
import json
import os
import shutil
import time

import numpy as np
from common import ROOT, add_row, in_turn, parser, script
from PIL import Image

import make_data
from reward import STOP
from world.episodes import read_episodes, read_ground_truth
from world.house_sim import HouseSim
from world.robots import ROBOTS


def parse_args(argv=None):
    p = parser(__doc__, repeats=2)
    p.add_argument("--limit", type=int, default=1000, help="walks")
    p.add_argument("--episodes", default=os.path.join(ROOT, "data", "houses"))
    return p.parse_args(argv)


def collect(houses, out, limit):
    """The official way. -> frames per second, {(episode, t): frame}"""
    episodes = read_episodes(houses, "train")[:limit]
    truths = read_ground_truth(houses, "train")
    shutil.rmtree(out, ignore_errors=True)
    sim, seen = HouseSim(ROBOTS["houses"], os.path.join(houses, "scenes")), {}
    start = time.perf_counter()
    for episode in episodes:
        name = episode["episode_id"]
        folder = os.path.join(out, f"ep_{name}", f"traj_{episode['trajectory_id']}")
        os.makedirs(folder)
        sim.reset(episode)
        actions = []
        for t, action in enumerate(truths[str(name)]["actions"]):
            seen[name, t] = sim.observe()
            actions.append(action)
            Image.fromarray(seen[name, t]).save(os.path.join(folder, f"step_{t}.jpg"))
            with open(os.path.join(folder, "action_list.json"), "w") as f:
                json.dump(actions, f)
            with open(os.path.join(folder, "instruction.txt"), "w") as f:
                f.write(episode["instruction"]["instruction_text"])
            if action != STOP:
                sim.act(action)
    return len(seen) / (time.perf_counter() - start), seen


def record(houses, out, limit):
    """Ours. -> frames per second, the recording"""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    script("make_data.py", "--episodes", houses, "--out", out, "--limit", limit, "--sims", 2,
           "--shard-walks", 16)
    seconds = time.perf_counter() - start
    data = make_data.VlnEgo(os.path.join(out, "train"))
    return data.meta["frames"] / seconds, data


def main(args):
    houses = args.episodes
    ours, peer = in_turn(
        [lambda: record(houses, os.path.join(args.world, "recorded"), args.limit),
         lambda: collect(houses, os.path.join(args.world, "collected"), args.limit)], args.repeats)
    data, seen = ours[-1][1], peer[-1][1]
    walk_of = {e["episode_id"]: e["walk_id"] for e in data.episodes}
    same = sum(np.array_equal(data.frame((walk_of[name], t)), frame)
               for (name, t), frame in seen.items() if name in walk_of)
    add_row(args, "recording, 2 simulators", [rate for rate, _ in ours], [rate for rate, _ in peer],
            "one environment, a JPEG file a frame", "frames/s", same == len(seen),
            f"{same} of {len(seen)} frames are the same, bit for bit",
            f"{args.limit} walks, 56x56 pixels", higher_is_better=True)


if __name__ == "__main__":
    main(parse_args())
