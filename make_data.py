"""
VLN-Ego: let the expert walk, and record what it saw.

The input is what R2R-VLN-CE and RxR-VLN-CE publish, and world/houses.py imitates: episodes and
ground truth (the expert's actions). A simulator replays the actions; the frames, the actions and
the instructions are recorded.

    frame     v_0     v_1     v_2     ..     v_T-1         the view BEFORE action t
    action    a_0     a_1     a_2     ..     a_T-1 = stop
    label at t = what the expert does from there on: a_t, a_t+1, .. a_t+5, padded with stop

(The released converter of VLN-R1 starts at a_t+1. That is a fault: tests/test_real_data.py shows
it from the pictures. tools/sharegpt.py imports released frames and gives them the right labels.)
A walk is stored once (R2R has three instructions to a trajectory), and every walk is checked: its
turns, its positions against the ground truth's, its end. With more than 1% bad walks the set-up is
wrong, and recording ends as an error. --noise adds copies with random perturbations, labelled with
what the expert would do from each state. --policy records what a checkpoint does, labelled by the
expert at every pose (tools/own_walks.py).

Run it   python make_data.py --episodes data/houses --split train --out data/vln_ego [--noise 0.1]
         python make_data.py --sim habitat --sim-python ~/habitat/bin/python --sims 8 \\
             --episodes data/datasets/R2R_VLNCE_v1-3_preprocessed --out data/r2r [--turn-deg 30]
Reads    --episodes  {split}.json.gz and {split}_gt.json.gz;  --scenes  the files scene_id names
Writes   --out/<split>/  meta.json; walks.jsonl (actions, poses, shard; labels of noisy and own
         walks: labels[t] is then the plan at t); episodes.jsonl (instruction, walk_id);
         frames/*.zip of <walk_id>/<t>.png; for restarts rows/ and recording.json (the flags)
Expect   the action mix of R2R: forward 64%, left 17.5%, right 16.7%, stop 1.7%. A killed run goes
         on when started again, and ends with the same records and pictures, with any --sims

[1] VLN-R1, https://arxiv.org/abs/2506.17221   [2] VLN-CE, https://arxiv.org/abs/2004.02857
"""
from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import lsm
from cli import (
    DefaultsFormatter,
    UserError,
    lock_folder,
    non_negative,
    positive_int,
    run_cli,
    whole_number,
    write_json,
    write_lines,
)
from reward import FORWARD, LEFT, RIGHT, STOP
from world import SimDied
from world.episodes import (
    VLNCE_RADIUS_M,
    add_episode_args,
    check_turn_deg,
    dataset_of,
    is_point,
    location_steps,
    no_ground_truth,
    paired,
    read_episodes,
    read_ground_truth,
    scenes_of,
    walked_turn_deg,
)
from world.pool import SimPool, scenes_used
from world.robots import (
    ROBOTS,
    add_robot_args,
    add_simulator_args,
    robot_from_args,
    simulator_commands,
    turn_between,
    yaw_deg,
)

VERSION = 1  # of the layout above
JPEG_QUALITY = 90  # the released set has PIL's 75
FRAME_BYTES = 54e3  # a 640x480 JPEG of that quality: mean over the released walk's 65 frames
CACHE_BYTES = 256 << 20  # of decoded frames a reader remembers; one stands in ~15 decisions


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Record VLN-Ego: walk the expert, keep what it saw.",
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--episodes", default="data/houses", help="folder with <split>/<split>.json.gz and its _gt")
    add("--split", default="train")
    add_episode_args(add)
    add("--episode-list", metavar="FILE", help="a parquet list of ActiveVLN's: only its episodes, "
        "in its order, and its actions instead of the ground truth's: docs/activevln.md")
    add("--out", default="data/vln_ego", help="the split becomes a folder in here")
    add("--scenes", help="folder that scene_id starts from; default: <episodes>/scenes if it is "
        "there, else data/scene_datasets")
    add("--verify", action="store_true", help="only check the input: python -m tools.verify")
    add("--import-walk", metavar="FOLDER", help="import released walks instead: python -m "
        "tools.sharegpt import FOLDER")

    add = p.add_argument_group("data").add_argument
    add("--limit", type=positive_int, help="only the first N episodes; of own walks, N episodes "
        "drawn by --seed")
    add_expert_args(add)
    add("--horizon", type=positive_int, default=6,
        help="actions per label of noisy copies; the paper's 6")
    add("--max-actions", type=positive_int, default=500,
        help="the expert gives up here, and an own walk ends; VLN-CE's 500")
    add("--max-drift", type=non_negative, default=0.25,
        help="metres between replay and ground truth; ours: a step. The same simulator has none")
    add("--image-format", choices=("png", "jpg"), help="default: png in houses, else jpg")
    add("--shard-walks", type=positive_int, default=64,
        help="walks per zip: the unit of resumption")

    add = p.add_argument_group("own walks (tools/own_walks.py)").add_argument
    add("--policy", metavar="CKPT", help="this checkpoint walks; the expert only labels its poses")
    add("--temperature", type=non_negative, default=0.0, help="0: greedy; above: sampled")
    add("--expert-share", type=non_negative, default=0.0, metavar="BETA",
        help="probability that a decision is the expert's instead of the policy's (DAgger's beta)")
    add("--execute", type=positive_int, default=3, help="actions of a decision")
    add("--label-path", choices=("goal", "reference"), help="what the labels head for: the goal, "
        "or the reference path's next point, because that path is what an instruction of R2R or "
        "RxR describes, and the shortest way from a pose may be another; default: reference, in "
        "houses goal (there the two are one)")
    add("--device", help="default: cuda if there is one, else cpu")

    add = p.add_argument_group("simulator").add_argument
    add_robot_args(add, "that of the episodes' data set; of own walks, the checkpoint's")
    add_simulator_args(add, sims=2)
    return p.parse_args(argv)


def add_expert_args(add) -> None:
    """How the expert walks: also for tools/verify.py, which plans the same walks."""
    add("--expert", choices=("replay", "walk"), help="replay the ground truth's actions, or let "
        "the simulator's expert walk; default: replay, but walk where --turn-deg is not the ground "
        "truth's angle")
    add("--waypoints", choices=("goal", "reference"), help="what a walking expert heads for; "
        "default: goal, but where it replaces the ground truth, and for rxr, whose instructions "
        "describe the bends, the reference path")
    add("--noise", type=non_negative, default=0.0, help="chance per step of a perturbation; above "
        "0, each walk gets a noisy copy")
    add("--seed", type=whole_number, default=0, help="of what is drawn at random")


# ---------------------------------------------------------------- labels


def action_chunk(actions: list[int], t: int, n: int) -> list[int]:
    """The label at step t: the next n actions, this one first, padded with STOP.

    >>> action_chunk([3, 1, 1, 0], 1, 6)
    [1, 1, 0, 0, 0, 0]
    """
    return (list(actions[t:t + n]) + [STOP] * n)[:n]


# ---------------------------------------------------------------- checking what is recorded


class WalkCheck(NamedTuple):
    """reason: why a walk is kept out, None for a good one. drift: metres between the replayed
    positions and the ground truth's, {"drift_m": the largest, "end_drift_m": the last}; {} where
    there was nothing to replay."""
    reason: str | None = None
    detail: str = ""
    drift: dict = {}


def check_turns(walk_id: str, actions: list[int], poses: np.ndarray, turn_deg: float) -> None:
    """UserError if a turn was not the robot's: then the whole recording would be wrong."""
    for t in np.flatnonzero(np.isin(actions[:-1], (LEFT, RIGHT))):
        angle = turn_between(yaw_deg(poses[t, 3:]), yaw_deg(poses[t + 1, 3:]))
        if abs(angle - (1 if actions[t] == LEFT else -1) * turn_deg) > 0.5:
            raise UserError(f"walk {walk_id}: action {actions[t]} at step {t} turned the simulator "
                            f"by {angle:.1f} degrees (left is positive), but the robot's turn_deg "
                            f"is {turn_deg:g}; check --robot and --turn-deg")


def check_walk(walk: dict, reply: dict, robot: dict, radius: float, max_drift: float) -> WalkCheck:
    """Is this recording what the ground truth says, and does it end at the goal?"""
    actions, poses = reply["actions"], np.asarray(reply["poses"], dtype=float)  # (T,), (T, 7)
    assert len(reply["frames"]) == len(poses) == len(actions), "one frame and one pose per action"
    check_turns(walk["walk_id"], actions, poses, robot["turn_deg"])
    drift = {}
    if walk["locations"]:
        truth = np.asarray(walk["locations"], dtype=float)      # (forward moves + 1, 3)
        steps = location_steps(actions, len(truth))
        if steps is None:
            return WalkCheck("the ground truth contradicts itself", f"{len(truth)} locations for "
                             f"{actions.count(FORWARD)} forward moves")
        apart = np.linalg.norm(poses[steps, :3] - truth, axis=1)
        drift = {"drift_m": round(float(apart.max()), 4), "end_drift_m": round(float(apart[-1]), 4)}
    distance = reply["distance_to_goal"]
    if distance is None or not math.isfinite(distance):
        return WalkCheck("the goal cannot be reached", f"its distance is {distance}", drift)
    if distance >= radius:
        return WalkCheck(f"ended {radius:g} m or more from the goal", f"{distance:.2f} m", drift)
    if drift and not drift["drift_m"] <= max_drift:
        return WalkCheck("drifted from the ground truth", f"by {drift['drift_m']:.2f} m", drift)
    return WalkCheck(drift=drift)


# ---------------------------------------------------------------- what to record


class Expert(NamedTuple):
    """How the walks of a recording come about."""
    mode: str               # "replay" the ground truth, or "walk": the simulator's expert
    waypoints: str          # what it heads for when it walks: "goal" or "reference" (path)
    new_angle: bool         # it walks because --turn-deg is not the ground truth's angle


def choose_expert(args, walks: list[dict], robot: dict, dataset: str) -> Expert:
    """The flags, completed by what the ground truth (walks: paired()) allows.

    R2R turned 15 degrees, and 71% of its turns are a single one: that cannot be replayed by 30. A
    --turn-deg that the ground truth does not fit makes the expert walk the same way in its turns,
    along the reference path. (Without the flag such a misfit is a wrong --robot, and refused.)
    """
    new_angle = (args.expert is None and args.turn_deg is not None
                 and walked_turn_deg(walks, robot["turn_deg"]) != robot["turn_deg"])
    along_reference = new_angle or dataset == "rxr"
    return Expert(args.expert or ("walk" if new_angle else "replay"),
                  args.waypoints or ("reference" if along_reference else "goal"), new_angle)


def read_expert(args, episodes: list[dict], robot: dict, dataset: str, listed: dict | None = None
                ) -> tuple[dict, Expert]:
    """-> the ground truth ({} if --expert walk needs none), checked for turns; how to walk.
    listed: {str(episode_id): actions} of --episode-list, which replace the ground truth's."""
    which = args.episodes, args.split, args.role
    truths = {} if args.expert == "walk" else read_ground_truth(*which, optional=True)
    if listed and args.expert != "walk":        # other actions do not lead to its locations
        truths = {name: truth if (truth := (truths or {}).get(name, {})).get("actions") == actions
                  else {"actions": actions} for name, actions in listed.items()}
    if truths is None:
        raise UserError(f"{no_ground_truth(*which)}, or record with --expert walk, which needs "
                        "none")
    walks = [walk for walk in paired(episodes, truths) if "locations" in walk]
    expert = choose_expert(args, walks, robot, dataset)
    if expert.new_angle:
        print(f"the ground truth turned {walked_turn_deg(walks, robot['turn_deg']):g} degrees: the "
              f"expert walks, with turns of {robot['turn_deg']:g}")
    elif expert.mode == "replay":
        check_turn_deg(walks, robot["turn_deg"])
    return truths, expert


def plan_walks(episodes: list[dict], truths: dict, expert: Expert, args) -> tuple[list, list]:
    """Which walks to record, and which episode belongs to which. -> (walks, rows of episodes.jsonl)

    A walk is one (scene, trajectory, start, actions). Its id is <scene>-<trajectory>, with .1, .2
    for further ways along the same trajectory, and -n1 for its noisy copy.
    """
    walks, rows, found, ways = [], [], {}, Counter()
    for episode in episodes:
        truth = {} if expert.mode == "walk" else truths.get(str(episode["episode_id"]))
        check_plan(episode, truth, expert, args)
        actions = truth.get("actions")
        key = (episode["scene_id"], episode["trajectory_id"], *episode["start_position"],
               *episode["start_rotation"], *(actions or ()))
        if key not in found:
            scene = os.path.splitext(os.path.basename(episode["scene_id"]))[0]
            name = f"{scene}-{episode['trajectory_id']}"
            way = name + (f".{ways[name]}" if ways[name] else "")
            ways[name] += 1
            found[key] = [way, way + "-n1"] if args.noise > 0 else [way]
            walks += [{
                "walk_id": walk_id,
                "episode": {k: v for k, v in episode.items() if k != "instruction"},
                "actions": None if noisy else actions,          # None: the expert walks
                "locations": None if noisy else truth.get("locations"),
                "waypoints": (episode.get("reference_path") or [])[1:]
                if expert.waypoints == "reference" else None,
                "noise": args.noise if noisy else 0.0,
                "seed": zlib.crc32(f"{args.seed}/{walk_id}".encode()),
            } for noisy, walk_id in enumerate(found[key])]
        text = episode["instruction"]
        language = {"language": text["language"]} if "language" in text else {}
        rows += [{"episode_id": episode["episode_id"], "walk_id": walk_id, "split": args.split,
                  "instruction": text["instruction_text"], **language} for walk_id in found[key]]
    twice = [name for name, n in Counter(walk["walk_id"] for walk in walks).items() if n > 1]
    if twice:
        raise UserError(f"two walks would both be called {twice[0]} (<scene>-<trajectory_id>): "
                        "rename one of the trajectories")
    return walks, rows


def check_plan(episode: dict, truth: dict | None, expert: Expert, args) -> None:
    """UserError if an episode lacks what its recording needs."""
    name = f"episode {episode['episode_id']}"
    if truth is None:
        raise UserError(f"{name} has no ground truth; check that both files are of one release, or "
                        "use --expert walk")
    walks = expert.mode == "walk" or args.noise > 0
    if walks and expert.waypoints == "reference" and not episode.get("reference_path"):
        raise UserError(f"{args.episodes}: {name} has no 'reference_path' to walk along; use "
                        "--waypoints goal, or copy the file again")
    if not episode.get("goals"):
        raise UserError(f"{name} has no goals (R2R's test split hides them), so no walk can be "
                        "checked; choose another --split")


def make_shards(walks: list[dict], size: int) -> dict[str, list[dict]]:
    """Cut the walks, sorted by scene (loading one is slow), into {"0000": [..size walks..], ..}."""
    walks = sorted(walks, key=lambda w: w["episode"]["scene_id"] or "")     # stable within a scene
    return {f"{k // size:04d}": walks[k:k + size] for k in range(0, len(walks), size)}


# ---------------------------------------------------------------- writing shards


class Shard:
    """A zip of frames and its walks' rows. Both appear whole at commit(), or not at all.

    The zip is renamed last: where a zip exists its rows exist, and that is all a restart asks for.
    Times and rights inside the zip are constants, so that equal pictures make equal files.
    """

    def __init__(self, out: str, name: str, suffix: str):
        self.name, self.suffix, self.rows = f"frames/{name}.zip", suffix, []
        self.zip_path, self.rows_path = f"{out}/frames/{name}.zip", f"{out}/rows/{name}.jsonl"
        self.zip = zipfile.ZipFile(self.zip_path + ".tmp", "w", zipfile.ZIP_STORED)

    def add(self, row: dict, pictures: Iterable[bytes]) -> None:
        """row of walks.jsonl, its frames as encoded bytes in order of time."""
        for t, data in enumerate(pictures):
            entry = zipfile.ZipInfo(f"{row['walk_id']}/{t:04d}.{self.suffix}",
                                    (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.create_system = 0o644 << 16, 3
            self.zip.writestr(entry, data)
        self.rows.append({**row, "shard": self.name})

    def skip(self, walk_id: str, reason: str, detail: str, drift: dict | None = None) -> None:
        self.rows.append({"walk_id": walk_id, "skipped": reason, "detail": detail, **(drift or {})})

    def commit(self) -> None:
        self.zip.close()
        write_lines(self.rows_path, self.rows)
        os.replace(self.zip_path + ".tmp", self.zip_path)


def read_lines(path: str, check: Callable = lambda row: None) -> list[dict]:
    """A .jsonl file -> its rows. ValueError, naming the line, if one is damaged or check(row)
    raises ValueError."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                rows.append(json.loads(line))
                check(rows[-1])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{os.path.basename(path)}, line {n}: {error}") from None
    return rows


def encode(frame: np.ndarray, suffix: str) -> bytes:
    """uint8 (H, W, 3) -> bytes of a png or jpg."""
    buffer = io.BytesIO()
    if suffix == "jpg":
        Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)    # 1.8x as fast, 6% larger
    return buffer.getvalue()


def record_shard(shard: Shard, walks: list[dict], args, robot: dict, threads):
    """Record one shard. A generator: it yields requests for a simulator and is sent the replies.

    Walks of a shard are walked one after another by one simulator, so the zip's order, and every
    byte of it, does not depend on how many simulators there are or how fast.
    """
    for walk in walks:
        walk_id, goals = walk["walk_id"], walk["episode"]["goals"]
        if not all(is_point(goal["position"]) for goal in goals):
            shard.skip(walk_id, "the goal cannot be reached", "its position is not finite")
            continue
        request = {k: walk[k] for k in ("episode", "actions", "noise", "seed", "waypoints")}
        request |= {"horizon": args.horizon, "max_actions": args.max_actions}
        for _ in range(1 + args.retries):                       # from its start: nothing is lost
            reply = yield "record", request
            if not isinstance(reply, SimDied):
                break
        if isinstance(reply, Exception):
            shard.skip(walk_id, "the simulator died on it" if isinstance(reply, SimDied)
                       else "the simulator refused it", str(reply))
            continue
        radius = goals[0].get("radius") or VLNCE_RADIUS_M
        check = check_walk(walk, reply, robot, radius, args.max_drift)
        if check.reason:
            shard.skip(walk_id, check.reason, check.detail, check.drift)
            continue
        row = {"walk_id": walk_id, "scene_id": walk["episode"]["scene_id"],
               "trajectory_id": walk["episode"]["trajectory_id"],
               "actions": [int(a) for a in reply["actions"]],
               "poses": np.asarray(reply["poses"], dtype=float).round(6).tolist(),
               "distance_to_goal": round(reply["distance_to_goal"], 4), **check.drift}
        row |= {"labels": list(reply["labels"])} if walk["noise"] else {}
        shard.add(row, threads.map(lambda f: encode(f, shard.suffix), reply["frames"]))
    shard.commit()


def run_jobs(pool: SimPool, sims: int, jobs: Iterable) -> None:
    """Keep every simulator busy: each serves one job (a generator of requests) until it ends."""
    waiting, running = iter(jobs), {}                           # running: simulator -> its job

    def advance(i, reply):
        """Give simulator i's reply to its job, and the next request, of whichever job, to i."""
        while True:
            try:
                if i in running:
                    request, arguments = running[i].send(reply)
                else:
                    running[i] = next(waiting)
                    request, arguments = next(running[i])
                return pool.submit(i, request, **arguments)
            except StopIteration:                               # of the job, or of all jobs
                if running.pop(i, None) is None:
                    return

    for i in range(sims):
        advance(i, None)
    while running:
        advance(*pool.wait_any())


# ---------------------------------------------------------------- reading VLN-Ego


class Decision(NamedTuple):
    """One training example: what the policy is shown, and what the expert did."""
    instruction: str
    frames: tuple           # keys for .frame(), oldest first, the current frame LAST
    plan: tuple             # the expert's next actions; () or None in a slot where they are unknown
    prompt: str | None = None       # a ShareGPT record's own text, with <image>; instead of ours
    answer: str | None = None
    before: tuple = ()      # the chat's earlier messages, ((role, text), ..): system text, rounds


MOST_PIXELS = 89_478_485    # Pillow's own limit, at which it warns of a decompression bomb
MOST_ASPECT = 200           # Qwen's image processors refuse longer pictures
# What Pillow raises on damaged files, beside its own SyntaxError and UnidentifiedImageError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
           struct.error, zlib.error)


def decode(data: bytes, where: str) -> np.ndarray:
    """A picture file -> uint8 (H, W, 3), upright, read-only. `where` names it in the error.

    16-bit grey is scaled to 8 bits. EXIF's orientation is applied. Transparent pixels become
    white, as in qwen-vl-utils and vLLM (LLaMA-Factory drops the alpha channel instead).
    UserError: damaged; several pictures in one file; more than MOST_PIXELS; longer than
    MOST_ASPECT; 32-bit values, of which no file says what white is.
    """
    try:
        image = Image.open(io.BytesIO(data))
        problem = picture_problem(image)
        if problem is None:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(to_rgb(image))
    except Image.DecompressionBombError as error:
        problem = f"has too many pixels ({error}); make it smaller"
    except DAMAGED as error:
        problem = f"is truncated or not a picture ({error})"
    raise UserError(f"{where} {problem}")


def picture_problem(image: Image.Image) -> str | None:
    """Why an opened PIL image cannot be used, from its header; None if it can."""
    (w, h), frames = image.size, getattr(image, "n_frames", 1)
    if w * h > MOST_PIXELS:
        return f"has {w} x {h} pixels, and the limit is {MOST_PIXELS:,}; make it smaller"
    if max(w, h) > MOST_ASPECT * min(w, h):
        return (f"has {w} x {h} pixels; one side may be at most {MOST_ASPECT} times the other, "
                "as in Qwen's image processors; cut it")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return "has 32-bit values of unknown range; save it with 8 bits"
    if frames > 1 and image.format != "MPO":          # MPO: a JPEG with a second view behind it
        return f"holds {frames} pictures in one file; save the one that is meant"
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode that picture_problem() allows, as RGB."""
    if image.mode.startswith("I"):                  # 16-bit grey, which Pillow 10 calls I in a PNG
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def require(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)


def check_meta(meta) -> None:
    """ValueError unless meta.json says all that a reader needs."""
    robot = meta.get("robot") if isinstance(meta, dict) else None
    needed = ("turn_deg", "forward_m", "width", "height")
    require(isinstance(robot, dict) and all(type(robot.get(key)) in (int, float)
                                            and 0 < robot[key] < math.inf for key in needed),
            f"meta.json: 'robot' must hold {', '.join(needed)}, each above 0")
    require(meta.get("image_format") in ("png", "jpg") and isinstance(meta.get("dataset"), str),
            "meta.json: 'image_format' must be png or jpg, and 'dataset' text")


def check_walk_row(row) -> None:
    """ValueError unless a row of walks.jsonl can be used."""
    require(isinstance(row, dict) and isinstance(row.get("walk_id"), str), "it holds no 'walk_id'")
    actions, labels, shard = row.get("actions"), row.get("labels", ()), row.get("shard")
    require(isinstance(shard, str) and re.fullmatch(r"frames/[^/]+\.zip", shard) is not None,
            f"'shard' must name a zip in frames/, not {shard!r}")
    require(isinstance(actions, list) and actions != [] and all(
        type(a) is int and a in (STOP, FORWARD, LEFT, RIGHT) for a in actions),
        "'actions' must be a list of 0, 1, 2 and 3")
    require(labels == () or (isinstance(labels, list) and len(labels) == len(actions) and all(
        isinstance(label, str) and set(label) <= set("0123") for label in labels)),
        "'labels' must hold one text of the digits 0 to 3 for each action")
    poses = row.get("poses", [])
    require(isinstance(poses, list) and all(isinstance(p, list) and len(p) == 7 and all(
        type(v) in (int, float) for v in p) for p in poses), "'poses' must hold lists of 7 numbers")
    for t, (action, a, b) in enumerate(zip(actions, poses, poses[1:])):     # x, y, z, qx, qy, ..
        turned = abs(a[4] * b[4] + a[6] * b[6]) < 1 - 1e-5
        require(turned == (action in (LEFT, RIGHT)),
                f"the robot turned{'' if turned else ' not'} between poses {t} and {t + 1}, and "
                f"action {t} is {action}: are the actions shifted?")


def check_episode_row(row, walks: dict) -> None:
    """ValueError unless a row of episodes.jsonl can be used."""
    require(isinstance(row, dict) and isinstance(row.get("walk_id"), str), "it holds no 'walk_id'")
    require(row["walk_id"] in walks, f"walk {row['walk_id']!r} is not in walks.jsonl")
    check_instruction(row.get("instruction"))


def check_instruction(text) -> None:
    """ValueError unless the text can stand in a prompt."""
    require(isinstance(text, str) and text.strip() != "",
            f"the instruction is empty or no text ({text!r})")
    require("<image>" not in text and "<|" not in text,
            f"the instruction {text!r} holds the reserved <image> or <|")


def add_data_args(add, shares: str) -> None:
    """--data and what belongs to it, for both trainers. shares: what --shares is by default."""
    add("--data", nargs="+", default=["data/vln_ego/train"], help="VLN-Ego folders, or ShareGPT "
        ".json or .jsonl")
    add("--shares", nargs="+", type=non_negative, metavar="SHARE", help="in which proportion "
        f"several --data are mixed; default: {shares}")
    add("--image-root", help="folder that a ShareGPT file's picture paths start in; default: "
        "that of the file")
    add("--val-data", help="a split that is not trained on, of the same kind; default: the folder "
        "val_seen, or the file val.json, beside --data, if it is there")


def open_data(path: str, image_root: str | None = None):
    """A VLN-Ego folder, or, by the name's ending, a ShareGPT file. -> VlnEgo or ShareGpt"""
    if str(path).lower().endswith((".json", ".jsonl")):
        from tools.sharegpt import ShareGpt  # the root imports its tools only when asked
        data = ShareGpt(path, image_root)
    else:
        data = VlnEgo(path)
    if len(data) == 0:
        raise UserError(f"{path} holds no episodes: record it again, or give another")
    return data


def open_sources(args) -> list:
    """All of --data, opened. UserError if --shares does not fit them."""
    if args.shares and (len(args.shares) != len(args.data) or min(args.shares) <= 0):
        raise UserError(f"--shares needs a number above 0 for each of the {len(args.data)} --data")
    return [open_data(path, args.image_root) for path in args.data]


def split_by_shares(n: int, shares: Sequence[float]) -> list[int]:
    """n things in these proportions; what rounding leaves over goes to the first ones.

    >>> split_by_shares(20, [1, 1, 1]), split_by_shares(8, [3, 1])
    ([7, 7, 6], [6, 2])
    """
    counts = [int(n * share / sum(shares)) for share in shares]
    return [count + (k < n - sum(counts)) for k, count in enumerate(counts)]


class VlnEgo:
    """A recorded split, as data: episode i, step t -> Decision; key -> frame. Zips are opened when
    their first frame is read."""

    whole_walks = True      # dialogs and several steps of a walk at once need them
    notes = ()              # what a trainer prints about its data

    def __init__(self, folder: str):
        self.folder = str(folder)
        try:
            with open(f"{folder}/meta.json", encoding="utf-8") as f:
                self.meta = json.load(f)
            check_meta(self.meta)
            walks = read_lines(f"{folder}/walks.jsonl", check_walk_row)
            self.walks = {walk["walk_id"]: walk for walk in walks}
            if len(self.walks) < len(walks):
                raise ValueError("walks.jsonl: a walk_id stands there twice")
            self.episodes = read_lines(f"{folder}/episodes.jsonl",
                                       lambda row: check_episode_row(row, self.walks))
        except OSError as error:
            raise UserError(f"{folder} is not a finished VLN-Ego folder ({error}); make it, or end "
                            "its making, with make_data.py --out") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder}: a file of it is damaged ({error}); run make_data.py again "
                            "with its old flags: that writes the tables again") from None
        for shard in dict.fromkeys(walk["shard"] for walk in self.walks.values()):
            if not zipfile.is_zipfile(f"{folder}/{shard}"):      # reads the end of the file only
                raise UserError(f"{folder}/{shard} is missing or truncated; delete it and run "
                                "make_data.py with its old flags: only it is recorded again")
        self.zips, robot = {}, self.meta["robot"]
        self.frame = lru_cache(CACHE_BYTES // (robot["width"] * robot["height"] * 3))(self.read)

    def __len__(self) -> int:
        return len(self.episodes)

    def steps(self, i: int) -> list[int]:
        """Steps of episode i that are training targets: those within a perturbation (label "") are
        none."""
        walk = self.walks[self.episodes[i]["walk_id"]]
        return [t for t, label in enumerate(walk.get("labels", walk["actions"])) if label != ""]

    def decision(self, i: int, t: int, contract: dict) -> Decision:
        """Episode i at step t, with the horizon and the memory of the contract (model.CONTRACT)."""
        episode = self.episodes[i]
        walk, horizon = self.walks[episode["walk_id"]], contract["horizon"]
        plan = action_chunk(walk["actions"], t, horizon)
        if "labels" in walk:
            plan = [int(digit) for digit in walk["labels"][t][:horizon]]
            if len(plan) < horizon:                     # in the loader's thread: see check_plans
                raise UserError(f"the labels in {self.folder} hold {len(plan)} actions and the "
                                f"policy plans {horizon}: record again with --horizon {horizon}")
        shown = [*lsm.pick_frames(t, **contract["memory"]), t]
        return Decision(episode["instruction"], tuple((walk["walk_id"], s) for s in shown),
                        tuple(plan))

    def check_plans(self, contract: dict) -> None:
        """UserError if the labels hold fewer actions than the policy plans: all are of one length.
        """
        labelled = (i for i, e in enumerate(self.episodes) if "labels" in self.walks[e["walk_id"]])
        for i in islice(labelled, 1):
            self.decision(i, self.steps(i)[0], contract)

    def read(self, key: tuple) -> np.ndarray:
        """key (walk_id, t) -> uint8 (H, W, 3). Use .frame(key), which remembers recent ones."""
        return decode(self.frame_bytes(key), f"frame {key[1]} of walk {key[0]} in {self.folder}")

    def frame_bytes(self, key: tuple) -> bytes:
        """The picture file itself, unchanged."""
        walk_id, t = key
        path = f"{self.folder}/{self.walks[walk_id]['shard']}"
        try:
            if path not in self.zips:
                self.zips[path] = zipfile.ZipFile(path)
            return self.zips[path].read(f"{walk_id}/{t:04d}.{self.meta['image_format']}")
        except (OSError, zipfile.BadZipFile, KeyError, EOFError) as error:
            raise UserError(f"{path}, frame {t} of walk {walk_id}: {error}; delete that zip and "
                            "run make_data.py with its old flags: only it is recorded again"
                            ) from None


# ---------------------------------------------------------------- the run, top to bottom


def open_folder(out: str, settings: dict, shards: dict) -> list[str]:
    """Make the folder, or go on in one that was begun with the same flags on the same input.
    -> the names of the shards that are still to be recorded"""
    lock_folder(out)
    try:
        for folder in ("frames", "rows"):
            os.makedirs(f"{out}/{folder}", exist_ok=True)
        if not os.path.exists(f"{out}/recording.json"):
            write_json(f"{out}/recording.json", settings, indent=1)
        with open(f"{out}/recording.json", encoding="utf-8") as f:
            begun = json.load(f)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}); give another --out") from None
    other = [k for k in settings if begun.get(k) != settings[k]]
    if other:
        raise UserError(f"{out} was begun with other settings (see {', '.join(other)} in its "
                        "recording.json); give another --out, or delete that folder")
    todo = [name for name in shards if not (os.path.exists(f"{out}/frames/{name}.zip")
                                            and os.path.exists(f"{out}/rows/{name}.jsonl"))]
    print(f"{out}: {sum(map(len, shards.values())):,} walks in {len(shards)} shards, "
          f"{len(shards) - len(todo)} of them there already", flush=True)
    return todo


def input_crc32(walks: list[dict]) -> int:
    """One number for all that is to be recorded: a restart with other input is refused."""
    return zlib.crc32(json.dumps(
        [[walk["walk_id"], walk["episode"], walk["actions"]] for walk in walks]).encode())


def quantiles(values: list[float]) -> dict | None:
    """
    >>> quantiles([0.0, 0.0, 1.0]), quantiles([])
    ({'p50': 0.0, 'p90': 0.8, 'p99': 0.98, 'max': 1.0}, None)
    """
    return {name: round(float(np.percentile(values, q)), 4) for name, q in (
        ("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))} if values else None


def write_tables(out: str, walks: list[dict], shards: dict, episodes: list[dict],
                 meta: dict) -> None:
    """Put the shards' rows together in the walks' order, write meta.json last, print a summary.
    UserError if more than 1% of the walks were kept out."""
    rows = {}
    for name in shards:
        rows.update((row["walk_id"], row) for row in read_lines(f"{out}/rows/{name}.jsonl"))
    rows = {walk["walk_id"]: rows[walk["walk_id"]] for walk in walks}
    kept = [row for row in rows.values() if "skipped" not in row]
    lost = [row for row in rows.values() if "skipped" in row]
    episodes = [episode for episode in episodes if "skipped" not in rows[episode["walk_id"]]]
    count = Counter(a for row in kept for a in row["actions"])
    drift = {key: quantiles([row[key] for row in rows.values() if key in row])
             for key in ("drift_m", "end_drift_m")}             # those kept out included
    meta = {"version": VERSION, "generator": f"make_data.py {VERSION}", **meta,
            "episodes": len(episodes), "walks": len(kept), "frames": count.total(),
            "actions": {"forward": count[FORWARD], "left": count[LEFT], "right": count[RIGHT],
                        "stop": count[STOP]},
            **drift, "skipped": dict(sorted(Counter(row["skipped"] for row in lost).items()))}
    write_lines(f"{out}/walks.jsonl", kept)
    write_lines(f"{out}/episodes.jsonl", episodes)
    write_json(f"{out}/meta.json", meta, indent=1)
    print_summary(out, meta, shards, len(rows))
    if len(lost) > 0.01 * len(rows):
        first = f"{lost[0]['walk_id']}: {lost[0]['skipped']}: {lost[0]['detail']}"
        raise UserError(f"{len(lost)} of {len(rows)} walks were skipped, more than 1%; the first "
                        f"is {first}; what is good is in {out}; fix the cause, delete that folder "
                        "and record again")


def print_summary(out: str, meta: dict, shards: dict, planned: int) -> None:
    size = sum(os.path.getsize(f"{out}/frames/{name}.zip") for name in shards)
    print(f"{out}: {meta['episodes']:,} episodes over {meta['walks']:,} walks, "
          f"{meta['frames']:,} frames, {size / 1e6:,.1f} MB in {len(shards)} zips")
    print("actions: " + ", ".join(f"{name} {n / max(meta['frames'], 1):.1%}"
                                  for name, n in meta["actions"].items()))
    for key, where in (("drift_m", "on the way"), ("end_drift_m", "at the end")):
        if meta[key]:
            print(f"drift from the ground truth {where}: at most {meta[key]['max']:.3f} m; " +
                  ", ".join(f"{k} {meta[key][k]:.3f}" for k in ("p50", "p90", "p99")))
    print(f"skipped: {planned - meta['walks']} of {planned:,} walks" +
          "".join(f"; {reason}: {n}" for reason, n in meta["skipped"].items()))


# Flags that a restart must repeat, beside those of the robot and the expert.
RECORDING_FLAGS = ("split", "role", "languages", "sim", "noise", "horizon", "max_actions", "seed",
                   "max_drift", "shard_walks")


def main(args):
    if args.verify and args.episode_list:
        raise UserError("--verify checks a split and its ground truth; a recording of "
                        "--episode-list checks its own actions: leave --verify out")
    if args.verify:
        from tools import verify  # the root imports its tools only when asked
        return verify.main(args)
    if args.import_walk:
        from tools import sharegpt
        return sharegpt.import_walks(args.import_walk, args)
    if args.policy and args.episode_list:
        raise UserError("--episode-list holds the expert's walks and --policy records its own: "
                        "leave one of them out")
    if args.policy:
        from tools import own_walks
        return own_walks.main(args)
    default = parse_args([])
    ignored = [flag for flag in ("temperature", "expert_share", "execute", "label_path", "device")
               if getattr(args, flag) != getattr(default, flag)]
    if ignored:
        raise UserError(f"--{ignored[0].replace('_', '-')} is of own walks: give --policy with it")
    if not 0 <= args.noise < 1:
        raise UserError("--noise is a chance per step: 0 or more, and below 1")

    # 1. read and check
    episodes, listed = read_episodes(args.episodes, args.split, args.role, args.languages), None
    dataset, scenes = dataset_of(episodes[0]), args.scenes or scenes_of(args.episodes)
    robot = robot_from_args(args, ROBOTS[args.robot or dataset])
    if args.episode_list:
        from activevln.released import select_episodes  # the root imports it only when asked
        episodes, listed = select_episodes(args.episode_list, episodes, robot,
                                           f"{args.episodes} ({args.split})")
    episodes = episodes[:args.limit]
    truths, expert = read_expert(args, episodes, robot, dataset, listed)

    # 2. plan
    walks, rows = plan_walks(episodes, truths, expert, args)
    shards, out = make_shards(walks, args.shard_walks), f"{args.out}/{args.split}"
    suffix = args.image_format or ("png" if dataset == "houses" else "jpg")
    settings = {**{k: getattr(args, k) for k in RECORDING_FLAGS}, "expert": expert.mode,
                "waypoints": expert.waypoints, "image_format": suffix,
                "input_crc32": input_crc32(walks),
                "scenes": scenes_used(args, robot, scenes, episodes)}
    todo = open_folder(out, {**settings, "robot": robot}, shards)

    # 3. record
    if todo:
        sims = min(args.sims, len(todo))
        with ThreadPoolExecutor(os.cpu_count()) as threads, \
                SimPool(args.sim, robot, scenes, sims, simulator_commands(args),
                        args.sim_timeout, args.sim_gpus) as pool:
            pool.note_versions(out, walks[0]["episode"]["scene_id"])
            run_jobs(pool, sims, (record_shard(Shard(out, name, suffix), shards[name], args, robot,
                                               threads) for name in todo))

    # 4. write one table out of many
    with open(f"{out}/simulator.json", encoding="utf-8") as file:
        simulator = json.load(file)
    write_tables(out, walks, shards, rows, {
        "dataset": dataset, "split": args.split, "robot": robot, "image_format": suffix,
        "args": settings, "simulator": simulator})


if __name__ == "__main__":
    run_cli(main, parse_args)
