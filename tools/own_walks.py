"""
Own walks: the policy walks, and the expert says at every pose what it would have done there.

Imitation learns where the expert walks. Where the policy itself walks it has left that way by its
own mistakes, and there it is right less often: these are the decisions that stage two should see,
and this is how DAgger [1] collects them. The folder is VLN-Ego as make_data.py writes it: `actions`
are what the policy did, `labels` what the expert would do next from the same pose, and what a
trainer reads is the labels. A walk ends when the policy calls STOP (that pose is labelled, too) or
after --max-actions actions; the pose after the last of these is left out. One in which a pose has
no way to the goal is left out and counted.

Run it   python make_data.py --policy ckpt/sft --sims 8 --limit 1500 --out data/own     # greedy
         python make_data.py --policy ckpt/sft --temperature 1 --expert-share 0.5 --out data/mixed
Reads    --policy  a checkpoint of sft.py, grpo.py;  --episodes, --scenes  as make_data.py does
Writes   --out/<split>/  what make_data.py writes; the checkpoint's hash is in meta.json (args)
Expect   walks as long as those of evaluate.py, and fewer actions that the expert agrees with than
         in the expert's recording. A killed run goes on when started again

[1] https://arxiv.org/abs/1011.0686
"""
from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from cli import UserError, fingerprint, read_json
from evaluate import (
    EpisodeLoop,
    EpisodeState,
    choose_ckpt,
    device_and_dtype,
    load_agent,
)
from make_data import (
    Shard,
    check_turns,
    encode,
    input_crc32,
    make_shards,
    open_folder,
    read_lines,
    write_tables,
)
from world.episodes import dataset_of, read_episodes, scenes_of
from world.pool import SimPool, scenes_used
from world.robots import choose_robot, simulator_commands, simulator_gpus

# Flags that a restart must repeat, beside those of the robot and the checkpoint.
FLAGS = ("split", "role", "languages", "sim", "temperature", "expert_share", "execute",
         "label_path", "horizon", "max_actions", "seed", "shard_walks")


@dataclass(eq=False)
class LabelledLoop(EpisodeLoop):
    """evaluate.py's loop. An empty plan of the agent asks for the expert's, and a walk's last
    request asks for its labels: walk.map becomes {"labels": [a text of digits per state]}."""
    execute: int = 3                            # actions of a decision of the expert
    horizon: int = 6                            # actions of a label
    label_path: str = "goal"

    def ask_labels(self, sim: int, horizon: int, start: int):
        """Ask for the labels of a walk's poses from number `start` on."""
        walk = self.running[sim]
        way = walk.episode["reference_path"][1:] if self.label_path == "reference" else None
        self.pool.submit(sim, "label", episode=walk.episode, horizon=horizon, start=start, way=way,
                         poses=[state["position"] + state["rotation"] for state in walk.states])

    def act(self, sim: int, plan: list[int]):
        if plan:
            super().act(sim, plan)
        else:
            self.ask_labels(sim, self.execute, len(self.running[sim].states) - 1)

    def on_reply(self, sim: int, reply: dict | Exception):
        walk = self.running[sim]
        if walk.end and isinstance(reply, Exception):       # while it was labelled
            walk.end = None
        if walk.end is None and isinstance(reply, dict) and "labels" in reply:
            self.act(sim, [int(digit) for digit in reply["labels"][0]])
        else:
            super().on_reply(sim, reply)

    def finish(self, sim: int, end: str, error: str | None = None):
        walk = self.running[sim]
        walk.end, walk.error = end, error
        if error or end == "unreachable":
            self.release(sim)
        else:
            self.ask_labels(sim, self.horizon, 0)


def mixed_agent(agent: Callable, expert_share: float, seed: int) -> Callable:
    """The agent, but with that probability a decision is left to the expert: []."""
    def is_experts(walk):
        name = f"{seed} expert {walk.name} {len(walk.actions)}"
        return random.Random(name).random() < expert_share

    def decide(walks):
        own = [walk for walk in walks if not is_experts(walk)]
        plans = dict(zip([walk.name for walk in own], agent(own) if own else []))
        return [plans.get(walk.name, []) for walk in walks]
    return decide


# ---------------------------------------------------------------- what is written


def walk_row(walk_id: str, walk: EpisodeState, robot: dict) -> dict:
    """An ended walk -> its row of walks.jsonl; with "skipped" and "detail" if it is left out."""
    reason = {"unreachable": "the goal cannot be reached", "error": "the simulator died on it",
              "invalid": "a pose has no way to the goal" if walk.states else
              "the simulator refused it"}.get(walk.end)
    if reason:
        return {"walk_id": walk_id, "skipped": reason, "detail": walk.error or "from the start"}
    states = walk.states[:len(walk.actions)]    # after --max-actions one more pose was reached
    poses = np.array([state["position"] + state["rotation"] for state in states])
    check_turns(walk_id, walk.actions, poses, robot["turn_deg"])
    return {"walk_id": walk_id, "scene_id": walk.episode["scene_id"],
            "trajectory_id": walk.episode["trajectory_id"], "actions": walk.actions,
            "poses": poses.round(6).tolist(), "end": walk.end,
            "distance_to_goal": round(walk.states[-1]["distance_to_goal"], 4),
            "labels": walk.map["labels"][:len(states)]}


def write_walks(ended: Iterable[EpisodeState], out: str, shards: dict, robot: dict, suffix: str
                ) -> None:
    """Write each shard when its last walk has ended, in its own order: no byte of it depends on
    which walk ended first. shards: those that are still to be written."""
    place = {str(walk["episode"]["episode_id"]): (name, walk["walk_id"])
             for name, walks in shards.items() for walk in walks}
    held = {name: {} for name in shards}                # shard -> walk_id -> row, pictures
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for walk in ended:
            name, walk_id = place[walk.name]
            row = walk_row(walk_id, walk, robot)
            frames = walk.video_frames[:len(row.get("actions", ()))]
            held[name][walk_id] = row, list(threads.map(lambda f: encode(f, suffix), frames))
            if len(held[name]) < len(shards[name]):
                continue
            shard, rows = Shard(out, name, suffix), held.pop(name)
            for row, pictures in (rows[each["walk_id"]] for each in shards[name]):
                if "skipped" in row:
                    shard.skip(row["walk_id"], row["skipped"], row["detail"])
                else:
                    shard.add(row, pictures)
            shard.commit()


# ---------------------------------------------------------------- the run, top to bottom


def plan_walks(args) -> tuple[list[dict], list[dict]]:
    """The episodes that are walked, --limit of them drawn by --seed -> walks, rows of
    episodes.jsonl. UserError if one lacks what its labels need."""
    episodes = read_episodes(args.episodes, args.split, args.role, args.languages)
    if args.limit and args.limit < len(episodes):
        drawn = random.Random(args.seed).sample(range(len(episodes)), args.limit)
        episodes = [episodes[i] for i in sorted(drawn)]
    walks, rows = [], []
    for episode in episodes:
        name, text = episode["episode_id"], episode["instruction"]
        if not episode.get("goals"):
            raise UserError(f"episode {name} has no goals (R2R's test split hides them), so no "
                            "pose can be labelled; choose another --split")
        if args.label_path == "reference" and not episode.get("reference_path"):
            raise UserError(f"{args.episodes}: episode {name} has no 'reference_path'; use "
                            "--label-path goal, or copy the file again")
        scene = os.path.splitext(os.path.basename(episode["scene_id"]))[0]
        walks.append({"walk_id": f"{scene}-e{name}", "episode": episode, "actions": None})
        language = {"language": text["language"]} if "language" in text else {}
        rows.append({"episode_id": name, "walk_id": walks[-1]["walk_id"], "split": args.split,
                     "instruction": text["instruction_text"], **language})
    return walks, rows


def walk_shards(args, out: str, shards: dict, settings: dict, scenes: str, suffix: str) -> None:
    """Walk and write these shards."""
    episodes = [walk["episode"] for walks in shards.values() for walk in walks]
    texts = [episode["instruction"]["instruction_text"] for episode in episodes]
    agent = mixed_agent(load_agent(args, settings, texts), args.expert_share, args.seed)
    walks = deque(EpisodeState(*pair, keep_video=True) for pair in zip(episodes, texts))
    sims = min(args.sims, len(walks))
    with SimPool(args.sim, settings["robot"], scenes, sims, simulator_commands(args),
                 args.sim_timeout, simulator_gpus(args)) as pool:
        pool.note_versions(out, episodes[0]["scene_id"])
        loop = LabelledLoop(pool, walks, agent, sims, args.max_actions, args.retries,
                            execute=args.execute, horizon=args.horizon,
                            label_path=settings["label_path"])
        ended = tqdm(loop.run(), total=len(walks), unit="walk",
                     mininterval=1 if sys.stderr.isatty() else 30)
        write_walks(ended, out, shards, settings["robot"], suffix)


def print_agreement(out: str) -> None:
    """How the walks ended, and how often the policy did what the expert would have done."""
    ends, agreed, actions = Counter(), 0, 0
    for row in read_lines(f"{out}/walks.jsonl"):
        ends[row["end"]] += 1
        agreed += sum(str(a) == label[0] for a, label in zip(row["actions"], row["labels"]))
        actions += len(row["actions"])
    print(f"the expert agrees with {agreed / max(actions, 1):.1%} of the actions; ended by: " +
          ", ".join(f"{n} {end}" for end, n in sorted(ends.items())))


def check_flags(args, contract: dict) -> None:
    if args.noise or args.expert or args.waypoints:
        raise UserError("--noise, --expert and --waypoints are of the expert's own walks: leave "
                        "them out with --policy (--label-path says what the labels head for)")
    if contract["prompt"].startswith("dialog"):
        raise UserError(f"{args.policy} is a dialog policy, whose answers hold other actions "
                        "than a label does: --policy needs a checkpoint of --prompt window; "
                        "activevln.grpo_online trains dialogs on their own walks")
    if args.horizon < contract["horizon"]:
        raise UserError(f"{args.policy} plans {contract['horizon']} actions and a label would "
                        f"hold {args.horizon}: give --horizon {contract['horizon']}")
    if not (0 <= args.expert_share <= 1 and args.temperature >= 0):
        raise UserError("--expert-share is a probability, 0 to 1, and --temperature 0 or more")


def main(args):
    # 1. read and check
    args = argparse.Namespace(**vars(args) | {          # what evaluate.py has as flags of its own
        "agent": "policy", "ckpt": args.policy, "nav": None, "server": None, "malformed": "stop",
        "blank_frames": False, "dtype": None, "threads": 1})
    ckpt, contract = choose_ckpt(args)
    check_flags(args, contract)
    first = read_episodes(args.episodes, args.split, args.role, args.languages)[0]
    dataset = dataset_of(first)
    robot = choose_robot(args, ckpt, contract, dataset)
    scenes = args.scenes or scenes_of(args.episodes)
    args.label_path = args.label_path or ("goal" if dataset == "houses" else "reference")

    # 2. plan
    walks, rows = plan_walks(args)
    shards, out = make_shards(walks, args.shard_walks), f"{args.out}/{args.split}"
    suffix = args.image_format or ("png" if dataset == "houses" else "jpg")
    device, dtype = device_and_dtype(args)
    settings = {**{k: getattr(args, k) for k in FLAGS}, "ckpt": ckpt,
                "weights": fingerprint(ckpt), "device": device, "dtype": dtype,
                "image_format": suffix,
                "input_crc32": input_crc32(walks),
                "scenes": scenes_used(args, robot, scenes, [w["episode"] for w in walks])}
    todo = open_folder(out, {**settings, "robot": robot}, shards)

    # 3. walk
    if todo:
        walk_shards(args, out, {name: shards[name] for name in todo},
                    {**settings, "robot": robot, "contract": contract}, scenes, suffix)

    # 4. write one table out of many
    write_tables(out, walks, shards, rows, {
        "dataset": dataset, "split": args.split, "robot": robot, "image_format": suffix,
        "args": settings, "simulator": read_json(f"{out}/simulator.json")})
    print_agreement(out)
