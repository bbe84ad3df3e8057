"""
VLN-Ego: let the expert walk, and write down what it saw.

Input is what R2R-VLN-CE and RxR-VLN-CE publish, and houses.py imitates: episodes (an instruction, a
start, a goal) and ground truth (the expert's actions); episodes.py reads them. A simulator replays
the actions; what comes out is all that imitation needs: the frames, the actions, the words.

    time      t = 0        t = 1        t = 2              t = T-1
    frame     v_0          v_1          v_2        ..      v_T-1         the view BEFORE action t
    action    a_0          a_1          a_2        ..      a_T-1 = stop
    label at t = what the expert does from here on: a_t, a_t+1, .. a_t+5, padded with stop

(The released converter of VLN-R1 starts at a_t+1. That is a fault: tests/test_real_data.py shows
it from the pictures. A released JSON is read as it is when asked for; --import-walk keeps released
frames and gives them the right labels.)

Three things differ from the released collection, all to make the data checkable:
  * A walk is stored once. R2R has three instructions to a trajectory, so episodes point at walks.
  * It checks itself. --verify looks over the input before hours are spent. The turn angle is
    asserted, on the ground truth before and on the poses after; a replayed walk must follow the
    ground truth's positions and end at the goal, or it is kept out and counted by reason. How far
    each strayed (drift, at most and at its end) is on record. More than 1% kept out is an error:
    the set-up is wrong then.
  * --noise adds copies in which the expert is now and then pushed off its way and has to recover,
    labelled with what it would do from each very state (DAgger's idea, without a policy).

Run it
    python make_data.py --episodes data/houses --split train --out data/vln_ego [--noise 0.1]
    python make_data.py --verify --episodes data/datasets/R2R_VLNCE_v1-3_preprocessed --split train
    python make_data.py --sim habitat --sim-python ~/habitat/bin/python --sims 8 --out data/r2r \
        --episodes data/datasets/R2R_VLNCE_v1-3_preprocessed [--turn-deg 30]
    python make_data.py --robot r2r --import-walk rgb_images_r2r_train --out data/released
    python make_data.py --out data/vln_ego --split train --export-sharegpt data/sharegpt

Reads    --episodes  {split}.json.gz and {split}_gt.json.gz;  --scenes  what scene_id names
Writes   --out/<split>/  meta.json       robot, counts, action mix, what was skipped, flags
                         walks.jsonl     per walk: actions, poses, scene, shard, labels if noisy
                         episodes.jsonl  per instruction: the words and the walk they belong to
                         frames/0000.zip plain zips of pictures, <walk_id>/<t>.png (any viewer)
                         rows/           the shards' parts of walks.jsonl, for restarts; and
                                         recording.json, the flags that a restart must repeat
Expect   the action mix of R2R: forward 64%, left 17.5%, right 16.7%, stop 1.7%. Kill it at any
         time and start it again: the records and pictures are those of a run that was not
         killed, with any --sims. The files are equal to the byte on one set-up (machine,
         simulator, numpy, Pillow and its codecs); elsewhere encoders differ.

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
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import lsm
from cli import Help, UserError, count, lock_folder, run
from reward import FORWARD, LEFT, RIGHT, STOP, merged_phrases
from world import SimDied
from world.episodes import (
    VLNCE_RADIUS_M,
    add_episode_args,
    check_turn_deg,
    dataset_of,
    find_ground_truth,
    is_point,
    location_steps,
    no_ground_truth,
    paired,
    read_episodes,
    read_ground_truth,
    scenes_of,
    turned,
    verify,
    walked_turn_deg,
    yaw_deg,
)
from world.pool import SimPool, scenes_used
from world.robots import (
    ROBOTS,
    add_robot_args,
    add_simulator_args,
    robot_from_args,
    simulator_commands,
)

VERSION = 1  # of the layout above
FRAME_BYTES = 54e3  # a 640x480 JPEG of quality 90: mean over the released walk's 65 frames
CACHE_BYTES = 256 << 20  # of decoded frames a reader remembers; one stands in ~15 decisions


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Record VLN-Ego: walk the expert, keep what it saw.",
                                formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--episodes", default="data/houses", help="folder with <split>/<split>.json.gz and its _gt")
    add("--split", default="train")
    add_episode_args(add)
    add("--out", default="data/vln_ego", help="the split becomes a folder in here")
    add("--scenes", help="folder that scene_id starts from; default: <episodes>/scenes if it is "
        "there, else data/scene_datasets")
    add("--verify", action="store_true", help="only look whether the input is all there and fits")
    add("--subset", action="store_true", help="with --verify: fewer episodes than the published "
        "split has are meant")
    add("--import-walk", metavar="FOLDER", help="import released walks at or below FOLDER instead")
    add("--export-sharegpt", metavar="DIR", help="write --out/<split> for LLaMA-Factory instead")

    add = p.add_argument_group("data").add_argument
    add("--limit", type=count, help="only the first N episodes")
    add("--expert", choices=("replay", "walk"), help="replay the ground truth's actions, or walk "
        "the simulator's expert anew; default: replay, but walk where --turn-deg is not its angle")
    add("--waypoints", choices=("goal", "reference"), help="what a walking expert heads for; "
        "default: goal, but where it stands in for the ground truth, and for rxr, whose words "
        "describe the bends, the reference path")
    add("--noise", type=float, default=0.0, help="chance per step of a push; above 0 adds copies")
    add("--noise-copies", type=count, default=1, help="copies per walk, if --noise is above 0")
    add("--horizon", type=count, default=6, help="actions per label of noisy copies; the paper's 6")
    add("--max-steps", type=count, default=500, help="the expert gives up here; VLN-CE's 500")
    add("--success-m", type=float, help="a walk must end nearer to the goal than this; default: "
        "goals[].radius in the data (houses 1, R2R 3), 3 if it has none")
    add("--max-drift", type=float, default=0.25,
        help="metres between replay and ground truth; ours: a step. The same simulator has none")
    add("--image-format", choices=("png", "jpg"), help="default: png in houses, else jpg")
    add("--jpeg-quality", type=int, default=90, help="the released set has PIL's 75")
    add("--shard-walks", type=count, default=64, help="walks per zip: the unit of resumption")
    add("--seed", type=int, default=0, help="of the pushes")
    lsm.add_memory_args(add)  # for --export-sharegpt only: VLN-Ego itself holds whole walks

    add = p.add_argument_group("simulator").add_argument
    add_robot_args(add, "that of the episodes' data set")
    add_simulator_args(add, sims=2)
    return p.parse_args(argv)


# ---------------------------------------------------------------- labels


def window(actions, t, n):
    """The label at step t: the next n actions, this one first, padded with STOP.

    >>> window([3, 1, 1, 0], 1, 6)
    [1, 1, 0, 0, 0, 0]
    """
    return (list(actions[t:t + n]) + [STOP] * n)[:n]


def merge_walk(actions, learned, rng, horizon=3, merge=3, chance=0.7, vary=False):
    """A walk cut into the answers of a dialog -> [(t, [(action, n), ..], learned), ..]

    Equal actions are drawn together: the next one joins with probability `chance`, up to `merge` of
    them; `horizon` such actions make an answer, given at step t. The chance is ActiveVLN's, read
    off its 8,000 released episodes. vary: 1 to `horizon` of them, drawn anew for each answer.
    learned: per step, is this what the expert would do? An answer is all of one kind: a push is
    told as it happened, and not learned from.

    >>> merge_walk([1, 1, 1, 1, 2, 0], [True] * 6, np.random.default_rng(0), horizon=2, chance=1)
    [(0, [(1, 3), (1, 1)], True), (4, [(2, 1), (0, 1)], True)]
    """
    turns, t, room = [], 0, 0
    while t < len(actions):
        n, kind = 1, (actions[t], learned[t])
        while (n < merge and t + n < len(actions) and (actions[t + n], learned[t + n]) == kind
               and rng.random() < chance):
            n += 1
        if room == 0 or turns[-1][2] != learned[t]:
            turns.append((t, [], learned[t]))
            room = int(rng.integers(1, horizon + 1)) if vary else horizon
        turns[-1][1].append((actions[t], n))
        t, room = t + n, room - 1
    return turns


# ---------------------------------------------------------------- checking what is recorded


def check_walk(walk, reply, robot, radius, max_drift):
    """Is this recording what the ground truth says? -> (reason to keep it out, detail, drift).

    reason is None for a good walk. drift: metres between the replayed positions and the ground
    truth's, {"drift_m": the largest, "end_drift_m": the last}; {} where the expert walked anew.
    """
    actions, poses = reply["actions"], np.asarray(reply["poses"], dtype=float)  # (T,), (T, 7)
    assert len(reply["frames"]) == len(poses) == len(actions), "one frame and one pose per action"
    for t in np.flatnonzero(np.isin(actions[:-1], (LEFT, RIGHT))):
        angle = turned(yaw_deg(poses[t, 3:]), yaw_deg(poses[t + 1, 3:]))
        if abs(angle - (1 if actions[t] == LEFT else -1) * robot["turn_deg"]) > 0.5:
            raise UserError(f"walk {walk['walk_id']}: action {actions[t]} at step {t} turned the "
                            f"simulator by {angle:.1f} degrees (left is positive), but the robot's "
                            f"turn_deg is {robot['turn_deg']:g}; check --robot and --turn-deg")
    drift = {}
    if walk["actions"]:
        truth = np.asarray(walk["locations"], dtype=float)      # (forward moves + 1, 3)
        steps = location_steps(actions, len(truth))
        if steps is None:
            return ("the ground truth contradicts itself",
                    f"{len(truth)} locations for {actions.count(FORWARD)} forward moves", {})
        apart = np.linalg.norm(poses[steps, :3] - truth, axis=1)
        if not np.isfinite(apart).all():
            return "the ground truth contradicts itself", "a location is not finite", {}
        drift = {"drift_m": round(float(apart.max()), 4), "end_drift_m": round(float(apart[-1]), 4)}
    distance = reply["distance_to_goal"]
    if distance is None or not math.isfinite(distance):
        return "the goal cannot be reached", f"its distance is {distance}", drift
    if distance >= radius:
        return f"ended {radius:g} m or more from the goal", f"{distance:.2f} m", drift
    if drift and drift["drift_m"] > max_drift:
        return "left the ground truth's way", f"by {drift['drift_m']:.2f} m", drift
    return None, "", drift


# ---------------------------------------------------------------- what to record


def settle_expert(args, walks, robot):
    """Settle args.expert and args.waypoints -> does the expert walk because of a --turn-deg?

    R2R turned 15 degrees, and 71% of its turns are a single one: that cannot be replayed by 30. A
    --turn-deg that the ground truth (walks: paired()) does not fit makes the expert walk the same
    way in its turns, along the reference path. (Without the flag such a misfit is a wrong --robot,
    and refused.)
    """
    anew = (args.expert is None and args.turn_deg is not None
            and walked_turn_deg(walks, robot["turn_deg"]) != robot["turn_deg"])
    args.expert = args.expert or ("walk" if anew else "replay")
    args.waypoints = args.waypoints or ("reference" if anew or args.robot == "rxr" else "goal")
    return anew


def choose_expert(args, episodes, robot):
    """settle_expert(), and -> the ground truth to replay, {} if the expert walks."""
    which = args.episodes, args.split, args.role
    truths = {} if args.expert == "walk" else read_ground_truth(*which, optional=True)
    if truths is None:
        raise UserError(f"{no_ground_truth(*which)}, or record with --expert walk, which needs "
                        "none")
    walks = paired(episodes, truths)
    if settle_expert(args, walks, robot):
        print(f"the ground truth turned {walked_turn_deg(walks, robot['turn_deg']):g} degrees: the "
              f"expert walks anew, with turns of {robot['turn_deg']:g}")
    elif args.expert == "replay":
        check_turn_deg(walks, robot["turn_deg"])
    return truths


def told_truths(args, episodes):
    """--verify's look for the ground truth -> (it, or None), facts, problems."""
    which, goals = (args.episodes, args.split, args.role), any(e["goals"] for e in episodes)
    if args.expert == "walk" and find_ground_truth(*which):
        return None, ["the ground truth is not looked at: with --expert walk nothing needs it"], []
    try:
        truths = None if args.expert == "walk" else read_ground_truth(*which, optional=True)
    except UserError as error:
        return None, [], [str(error)]
    if truths is not None or not goals:
        return truths, [], []
    fact = ("no ground truth here; goals are there: SR, NE, SPL can be measured, nDTW cannot, "
            "record with --expert walk")
    return None, [fact], [] if args.expert == "walk" else [
        f"{no_ground_truth(*which)}, or record with --expert walk, which needs none"]


def verify_input(args, episodes, scenes, robot):
    """--verify: tell the facts and the problems, and end as an error if there is a problem."""
    whole = [args.robot, args.split, args.role or "guide", args.languages and tuple(args.languages)]
    if args.robot != "rxr":
        whole[2:] = None, None
    truths, notes, problems = told_truths(args, episodes)
    turn_deg, walks = robot["turn_deg"], paired(episodes, truths or {})
    anew = settle_expert(args, walks, robot)
    turn_deg = walked_turn_deg(walks, turn_deg) if anew else turn_deg
    facts, found = verify(episodes, truths, scenes, turn_deg,
                          None if args.limit else tuple(whole), args.subset)
    facts += notes
    planned = []
    if not problems + found and any(e["goals"] for e in episodes):      # none: it is a test split
        planned = plan_walks(episodes, truths or {}, args)[0]
    frames = sum(len(walk["actions"] or ()) for walk in planned)
    if anew:
        facts.append(f"the expert will walk anew, with turns of {robot['turn_deg']:g} degrees")
    elif frames:
        facts.append(f"to record: {frames:,} frames, " + (
            f"some {frames * FRAME_BYTES / 1e9:.1f} GB as JPEG of quality 90; " if args.robot !=
            "houses" else "") + "hours: frames / 3600 / what `sim.py --check` says / --sims")
    print("\n".join([f"{args.episodes}, split {args.split}, robot {args.robot}:", *(
        f"  {fact}" for fact in facts), *(f"! {problem}" for problem in problems + found)]))
    if problems + found:
        raise UserError("; ".join(p.split("\n")[0] for p in problems + found) +
                        ": mend that before recording")
    print("all there")


def plan_walks(episodes, truths, args):
    """Which walks to record, and which episode belongs to which. -> (walks, rows of episodes.jsonl)

    A walk is one (scene, trajectory, start, actions). Its id is <scene>-<trajectory>, with .1, .2
    for further ways along the same trajectory, and -n1, -n2 for its noisy copies.
    """
    walks, rows, found, ways = [], [], {}, Counter()
    copies = range(1 + (args.noise_copies if args.noise > 0 else 0))
    via_reference = args.waypoints == "reference"
    for episode in episodes:
        truth = truths.get(str(episode["episode_id"])) if args.expert != "walk" else {}
        if truth is None:
            raise UserError(f"episode {episode['episode_id']} has no ground truth; check that both "
                            "files are of one release, or use --expert walk")
        if via_reference and (args.expert == "walk" or len(copies) > 1) and not episode.get(
                "reference_path"):
            raise UserError(f"{args.episodes}: episode {episode['episode_id']} has no "
                            "'reference_path' to walk along; use --waypoints goal, or copy the "
                            "file again")
        if not episode.get("goals"):
            raise UserError(f"episode {episode['episode_id']} has no goals (R2R's test split hides "
                            "them), so no walk can be checked; choose another --split")
        actions = truth.get("actions")
        key = (episode["scene_id"], episode["trajectory_id"], *episode["start_position"],
               *episode["start_rotation"], *(actions or ()))
        if key not in found:
            scene = os.path.splitext(os.path.basename(episode["scene_id"]))[0]
            name = f"{scene}-{episode['trajectory_id']}"
            way = name + (f".{ways[name]}" if ways[name] else "")
            ways[name] += 1
            found[key] = [way + (f"-n{copy}" if copy else "") for copy in copies]
            walks += [{
                "walk_id": walk_id,
                "episode": {k: v for k, v in episode.items() if k != "instruction"},
                "actions": None if copy else actions,           # None: the expert walks anew
                "locations": None if copy else truth.get("locations"),
                "waypoints": (episode.get("reference_path") or [])[1:] if via_reference else None,
                "noise": args.noise if copy else 0.0,
                "seed": zlib.crc32(f"{args.seed}/{walk_id}".encode()),
            } for copy, walk_id in enumerate(found[key])]
        words = episode["instruction"]
        spoken = {"language": words["language"]} if "language" in words else {}
        rows += [{"episode_id": episode["episode_id"], "walk_id": walk_id, "split": args.split,
                  "instruction": words["instruction_text"], **spoken} for walk_id in found[key]]
    twice = [name for name, n in Counter(walk["walk_id"] for walk in walks).items() if n > 1]
    if twice:
        raise UserError(f"two walks would both be called {twice[0]} (<scene>-<trajectory_id>): "
                        "rename one of the trajectories")
    return walks, rows


def make_shards(walks, size):
    """Cut the walks, sorted by scene (loading one is slow), into {"0000": [..size walks..], ..}."""
    walks = sorted(walks, key=lambda w: w["episode"]["scene_id"] or "")     # stable within a scene
    return {f"{k // size:04d}": walks[k:k + size] for k in range(0, len(walks), size)}


# ---------------------------------------------------------------- writing shards


class Shard:
    """A zip of frames and its walks' rows. Both appear whole at commit(), or not at all.

    The zip is renamed last: where a zip exists its rows exist, and that is all a restart asks for.
    Times and rights inside the zip are constants, so that equal pictures make equal files.
    """

    def __init__(self, out, name):
        self.name, self.rows = f"frames/{name}.zip", []
        self.zip_path, self.rows_path = f"{out}/frames/{name}.zip", f"{out}/rows/{name}.jsonl"
        self.zip = zipfile.ZipFile(self.zip_path + ".tmp", "w", zipfile.ZIP_STORED)

    def add(self, row, pictures, suffix):
        """row of walks.jsonl, its frames as encoded bytes in order of time."""
        for t, data in enumerate(pictures):
            entry = zipfile.ZipInfo(f"{row['walk_id']}/{t:04d}.{suffix}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.create_system = 0o644 << 16, 3
            self.zip.writestr(entry, data)
        self.rows.append({**row, "shard": self.name})

    def skip(self, walk_id, reason, detail, drift=()):
        self.rows.append({"walk_id": walk_id, "skipped": reason, "detail": detail, **dict(drift)})

    def commit(self):
        self.zip.close()
        write_lines(self.rows_path, self.rows)
        os.replace(self.zip_path + ".tmp", self.zip_path)


def write_text(path, text):
    """All or nothing: written beside its place, then moved there."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path, check=lambda row: None):
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


def encode(frame, suffix, quality):
    """uint8 (H, W, 3) -> bytes of a png or jpg."""
    buffer = io.BytesIO()
    if suffix == "jpg":
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    else:
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)    # 1.8x as fast, 6% larger
    return buffer.getvalue()


def record_shard(name, walks, args, robot, out, threads):
    """Record one shard. A generator: it yields requests for a simulator and is sent the replies.

    Walks of a shard are walked one after another by one simulator, so the zip's order, and every
    byte of it, does not depend on how many simulators there are or how fast.
    """
    shard = Shard(out, name)
    for walk in walks:
        if not all(is_point(goal["position"]) for goal in walk["episode"]["goals"]):
            shard.skip(walk["walk_id"], "the goal cannot be reached", "its position is not finite")
            continue
        request = {k: walk[k] for k in ("episode", "actions", "noise", "seed", "waypoints")}
        request |= {k: getattr(args, k) for k in ("horizon", "max_steps")}
        for _ in range(1 + args.retries):                       # from its start: nothing is lost
            reply = yield "record", request
            if not isinstance(reply, SimDied):
                break
        if isinstance(reply, Exception):
            shard.skip(walk["walk_id"], "the simulator died on it" if isinstance(reply, SimDied)
                       else "the simulator refused it", str(reply))
            continue
        radius = args.success_m or walk["episode"]["goals"][0].get("radius") or VLNCE_RADIUS_M
        reason, detail, drift = check_walk(walk, reply, robot, radius, args.max_drift)
        if reason:
            shard.skip(walk["walk_id"], reason, detail, drift)
            continue
        row = {"walk_id": walk["walk_id"], "scene_id": walk["episode"]["scene_id"],
               "trajectory_id": walk["episode"]["trajectory_id"],
               "actions": [int(a) for a in reply["actions"]],
               "poses": np.asarray(reply["poses"], dtype=float).round(6).tolist(),
               "distance_to_goal": round(reply["distance_to_goal"], 4), **drift}
        row |= {"labels": list(reply["labels"])} if walk["noise"] else {}
        shard.add(row, threads.map(lambda f: encode(f, args.image_format, args.jpeg_quality),
                                   reply["frames"]), args.image_format)
    shard.commit()


def drive(pool, sims, jobs):
    """Keep every simulator busy: each serves one job (a generator of requests) until it ends."""
    waiting, running = iter(jobs), {}                           # running: simulator -> its job

    def serve(i, reply):
        """Give simulator i's reply to its job, and the next request, of whatever job, to i."""
        while True:
            try:
                if i in running:
                    verb, request = running[i].send(reply)
                else:
                    running[i] = next(waiting)
                    verb, request = next(running[i])
                return pool.submit(i, verb, **request)
            except StopIteration:                               # of the job, or of all jobs
                if running.pop(i, None) is None:
                    return

    for i in range(sims):
        serve(i, None)
    while running:
        serve(*pool.wait_any())


# ---------------------------------------------------------------- reading VLN-Ego


class Decision(NamedTuple):
    """One training example: what the policy is shown, and what the expert did."""
    instruction: str
    frames: tuple           # keys for .frame(), oldest first, the current frame LAST
    plan: tuple             # the expert's next actions; () or None in a slot where they are unknown
    prompt: str = None      # a ShareGPT record's own words, with <image> marks; override ours
    answer: str = None
    before: tuple = ()      # the chat's earlier messages, ((role, text), ..): system text, rounds


class Dialog(NamedTuple):
    """A whole walk as one conversation: at each turn a frame, and the answer given to it."""
    instruction: str
    frames: tuple           # keys for .frame(), one per turn
    answers: tuple          # per turn: its text, or (model.Policy.spell) its token ids
    learned: tuple          # per turn: does the answer count?


MOST_PIXELS = 89_478_485    # Pillow's own limit, at which it warns of a decompression bomb
MOST_ASPECT = 200           # Qwen's image processors refuse longer pictures
# What Pillow raises on damaged files, beside its own SyntaxError and UnidentifiedImageError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
           struct.error, zlib.error)


def decode(data, where):
    """A picture file -> uint8 (H, W, 3), upright, read-only. `where` names it in the error.

    16-bit grey is scaled to 8 bits. EXIF's orientation is applied. Transparent pixels become
    white, as in qwen-vl-utils and vLLM (LLaMA-Factory drops the alpha channel instead).
    UserError: damaged; several pictures in one file; more than MOST_PIXELS; longer than
    MOST_ASPECT; 32-bit values, of which no file says what white is.
    """
    try:
        image = Image.open(io.BytesIO(data))
        problem = unfit(image)
        if problem is None:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(to_rgb(image))
    except Image.DecompressionBombError as error:
        problem = f"has too many pixels ({error}); make it smaller"
    except DAMAGED as error:
        problem = f"is truncated or not a picture ({error})"
    raise UserError(f"{where} {problem}")


def unfit(image):
    """What the header of an opened PIL image says against using it; None if nothing."""
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


def to_rgb(image):
    """PIL image of any mode that unfit() lets pass -> PIL image of mode RGB."""
    if image.mode.startswith("I"):                  # 16-bit grey, which Pillow 10 calls I in a PNG
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def check_meta(meta):
    """ValueError unless meta.json says all that a reader needs."""
    robot = meta.get("robot") if isinstance(meta, dict) else None
    needed = ("turn_deg", "forward_m", "width", "height")
    if not isinstance(robot, dict) or not all(is_positive(robot.get(key)) for key in needed):
        raise ValueError(f"meta.json: 'robot' must hold {', '.join(needed)}, each above 0")
    if meta.get("image_format") not in ("png", "jpg") or not isinstance(meta.get("dataset"), str):
        raise ValueError("meta.json: 'image_format' must be png or jpg, and 'dataset' text")


def check_walk_row(row):
    """ValueError unless a row of walks.jsonl can be used."""
    if not isinstance(row, dict) or not isinstance(row.get("walk_id"), str):
        raise ValueError("it holds no 'walk_id'")
    actions, labels, shard = row.get("actions"), row.get("labels", ()), row.get("shard")
    if not isinstance(shard, str) or not re.fullmatch(r"frames/[^/]+\.zip", shard):
        raise ValueError(f"'shard' must name a zip in frames/, not {shard!r}")
    if not isinstance(actions, list) or not actions or not all(
            type(a) is int and a in (STOP, FORWARD, LEFT, RIGHT) for a in actions):
        raise ValueError("'actions' must be a list of 0, 1, 2 and 3")
    if labels != () and not (isinstance(labels, list) and len(labels) == len(actions) and all(
            isinstance(label, str) and set(label) <= set("0123") for label in labels)):
        raise ValueError("'labels' must hold one text of the digits 0 to 3 for each action")


def check_episode_row(row, walks):
    """ValueError unless a row of episodes.jsonl can be used."""
    if not isinstance(row, dict) or not isinstance(row.get("walk_id"), str):
        raise ValueError("it holds no 'walk_id'")
    if row["walk_id"] not in walks:
        raise ValueError(f"walk {row['walk_id']!r} is not in walks.jsonl")
    check_instruction(row.get("instruction"))


def check_instruction(words):
    """ValueError unless words can stand in a prompt (model.words_of)."""
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"the instruction is empty or no text ({words!r})")
    if "<image>" in words or "<|" in words:
        raise ValueError(f"the instruction {words!r} holds a reserved mark (<image> or <|)")


def open_data(path, image_root=None):
    """What the trainers read: a VLN-Ego folder, or by its name a ShareGPT file."""
    if str(path).lower().endswith((".json", ".jsonl")):
        from tools.sharegpt import ShareGpt  # the root imports its tools only when asked
        return ShareGpt(path, image_root)
    return VlnEgo(path)


class VlnEgo:
    """A recorded split, as data: episode i, step t -> Decision; key -> frame.

    Opens nothing until a frame is asked for, and anew in a child process (pickled, it is its
    folder's name; forked, it would otherwise share file positions with its parent).
    """

    whole_walks = True      # dialogs and several steps of a walk at once need them
    notes = ()              # what a trainer prints about its data

    def __init__(self, folder):
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
                            "with its old flags: the tables are made anew") from None
        for shard in dict.fromkeys(walk["shard"] for walk in self.walks.values()):
            if not zipfile.is_zipfile(f"{folder}/{shard}"):      # reads the end of the file only
                raise UserError(f"{folder}/{shard} is missing or truncated; delete it and run "
                                "make_data.py with its old flags: only it is made anew")
        self.zips, robot = {}, self.meta["robot"]
        self.frame = lru_cache(CACHE_BYTES // (robot["width"] * robot["height"] * 3))(self.read)

    def __reduce__(self):
        return VlnEgo, (self.folder,)

    def __len__(self):
        return len(self.episodes)

    def steps(self, i):
        """Steps of episode i that are training targets: all, less those amid a push (no label)."""
        walk = self.walks[self.episodes[i]["walk_id"]]
        return [t for t, label in enumerate(walk.get("labels", walk["actions"])) if label != ""]

    def decision(self, i, t, nav):
        """Episode i at step t, with the horizon and the memory of the contract nav (model.NAV)."""
        episode = self.episodes[i]
        walk, horizon = self.walks[episode["walk_id"]], nav["horizon"]
        plan = window(walk["actions"], t, horizon)
        if "labels" in walk:
            plan = [int(digit) for digit in walk["labels"][t][:horizon]]
            if len(plan) < horizon:
                raise UserError(f"the labels in {self.folder} hold {len(plan)} actions and the "
                                f"policy plans {horizon}: record again with --horizon {horizon}")
        shown = [*lsm.pick_frames(t, **nav["memory"]), t]
        return Decision(episode["instruction"], tuple((walk["walk_id"], s) for s in shown),
                        tuple(plan))

    def dialog(self, i, nav, seed, vary=False):
        """Episode i as a Dialog, its actions merged by (seed, i): another seed, other turns."""
        episode = self.episodes[i]
        walk, merged = self.walks[episode["walk_id"]], merged_phrases(
            nav["turn_deg"], nav["forward_m"], nav["merge"])
        learned = [str(action) == label[:1] for action, label in
                   zip(walk["actions"], walk.get("labels", map(str, walk["actions"])))]
        turns = merge_walk(walk["actions"], learned, np.random.default_rng((seed, i)),
                           nav["horizon"], nav["merge"], vary=vary)
        return Dialog(episode["instruction"], tuple((walk["walk_id"], t) for t, _, _ in turns),
                      tuple(", ".join(merged[key] for key in keys) for _, keys, _ in turns),
                      tuple(own for _, _, own in turns))

    def read(self, key):
        """key (walk_id, t) -> uint8 (H, W, 3). Ask for .frame(key), which remembers recent ones."""
        return decode(self.frame_bytes(key), f"frame {key[1]} of walk {key[0]} in {self.folder}")

    def frame_bytes(self, key):
        """The picture file itself, unchanged."""
        (walk_id, t), process = key, os.getpid()
        path = f"{self.folder}/{self.walks[walk_id]['shard']}"
        try:
            if (process, path) not in self.zips:
                self.zips[process, path] = zipfile.ZipFile(path)
            name = f"{walk_id}/{t:04d}.{self.meta['image_format']}"
            return self.zips[process, path].read(name)
        except (OSError, zipfile.BadZipFile, KeyError, EOFError) as error:
            raise UserError(f"{path}, frame {t} of walk {walk_id}: {error}; delete that zip and "
                            "run make_data.py with its old flags: only it is made anew") from None


# ---------------------------------------------------------------- the run, top to bottom


def open_folder(out, settings):
    """Make the folder, or go on in one that was begun with the same flags on the same input."""
    lock_folder(out)
    try:
        for folder in ("frames", "rows"):
            os.makedirs(f"{out}/{folder}", exist_ok=True)
        if not os.path.exists(f"{out}/recording.json"):
            write_text(f"{out}/recording.json", json.dumps(settings, indent=1) + "\n")
        with open(f"{out}/recording.json", encoding="utf-8") as f:
            begun = json.load(f)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}); give another --out") from None
    other = [k for k in settings if begun.get(k) != settings[k]]
    if other:
        raise UserError(f"{out} was begun with other settings (see {', '.join(other)} in its "
                        "recording.json); give another --out, or delete that folder")


def quantiles(values):
    """
    >>> quantiles([0.0, 0.0, 1.0]), quantiles([])
    ({'p50': 0.0, 'p90': 0.8, 'p99': 0.98, 'max': 1.0}, None)
    """
    return {name: round(float(np.percentile(values, q)), 4) for name, q in (
        ("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))} if values else None


def finish(out, order, shards, episodes, meta):
    """Put the shards' rows together in the episodes' order, write meta.json last, and tell."""
    rows = {}
    for name in shards:
        rows.update((row["walk_id"], row) for row in read_lines(f"{out}/rows/{name}.jsonl"))
    walks = [rows[walk_id] for walk_id in order if "skipped" not in rows[walk_id]]
    lost = [rows[walk_id] for walk_id in order if "skipped" in rows[walk_id]]
    episodes = [episode for episode in episodes if "skipped" not in rows[episode["walk_id"]]]
    count = Counter(a for walk in walks for a in walk["actions"])
    frames, skipped = count.total(), Counter(row["skipped"] for row in lost)
    mix = {"forward": count[FORWARD], "left": count[LEFT], "right": count[RIGHT],
           "stop": count[STOP]}
    drift = {key: quantiles([row[key] for row in rows.values() if key in row])
             for key in ("drift_m", "end_drift_m")}             # those kept out included
    write_lines(f"{out}/walks.jsonl", walks)
    write_lines(f"{out}/episodes.jsonl", episodes)
    write_text(f"{out}/meta.json", json.dumps({
        "version": VERSION, "generator": f"make_data.py {VERSION}", **meta,
        "episodes": len(episodes), "walks": len(walks), "frames": frames, "actions": mix,
        **drift, "skipped": dict(sorted(skipped.items()))}, indent=1) + "\n")

    size = sum(os.path.getsize(f"{out}/frames/{name}.zip") for name in shards)
    print(f"{out}: {len(episodes):,} episodes over {len(walks):,} walks, {frames:,} frames, "
          f"{size / 1e6:,.1f} MB in {len(shards)} zips")
    print("actions: " + ", ".join(f"{k} {n / max(frames, 1):.1%}" for k, n in mix.items()))
    for key, where in (("drift_m", "on the way"), ("end_drift_m", "at the end")):
        if drift[key]:
            print(f"drift from the ground truth {where}: at most {drift[key]['max']:.3f} m; " +
                  ", ".join(f"{k} {drift[key][k]:.3f}" for k in ("p50", "p90", "p99")))
    print(f"skipped: {len(lost)} of {len(order):,} walks" +
          "".join(f"; {reason}: {n}" for reason, n in sorted(skipped.items())))
    if len(lost) > 0.01 * len(order):
        first = f"{lost[0]['walk_id']}: {lost[0]['skipped']}: {lost[0]['detail']}"
        raise UserError(f"{len(lost)} of {len(order)} walks were skipped, more than 1%; the first "
                        f"is {first}; what is good is in {out}; mend the cause, delete that folder "
                        "and record again")


def main(args):
    out = f"{args.out}/{args.split}"

    # 1. another format out of a recording that is there
    if args.export_sharegpt:
        from model import NAV, fit_pixels
        from tools.sharegpt import export_sharegpt
        data = VlnEgo(out)
        nav = {**NAV, **data.meta["robot"], "horizon": args.horizon,
               "dataset": data.meta["dataset"], "memory": lsm.memory_from_args(args)}
        n = export_sharegpt(data, args.export_sharegpt, nav)
        seen = fit_pixels(nav["height"], nav["width"], nav["min_pixels"], nav["max_pixels"])
        print(f"{args.export_sharegpt}/vln_ego.json: {n:,} records of {len(data):,} episodes; for "
              f"LLaMA-Factory: template qwen2_vl, image_max_pixels {math.prod(seen)}; give "
              "what it trains its nav.json with python -m tools.sharegpt")
        return

    # 2. what there is to do, and whether the flags fit it
    if not 0 <= args.noise < 1:
        raise UserError("--noise is a chance per step: 0 or more, and below 1")
    if args.subset and not args.verify:
        raise UserError("--subset says what --verify should expect: give both, or leave it out")
    if args.import_walk:
        if args.robot in (None, "houses"):
            raise UserError("released walks are R2R's or RxR's: say which with --robot r2r or rxr")
        from tools.sharegpt import import_shard, released_walks
        walks, rows = released_walks(args.import_walk, args.split)
        robot, flags = robot_from_args(args, ROBOTS[args.robot]), ("split", "shard_walks")
        args.image_format = "jpg"
    else:
        episodes = read_episodes(args.episodes, args.split, args.role, args.languages)[:args.limit]
        args.robot = args.robot or dataset_of(episodes[0])
        robot = robot_from_args(args, ROBOTS[args.robot])
        scenes = args.scenes or scenes_of(args.episodes)
        if args.verify:
            return verify_input(args, episodes, scenes, robot)
        truths = choose_expert(args, episodes, robot)
        walks, rows = plan_walks(episodes, truths, args)
        used = scenes_used(args, robot, scenes, episodes)
        args.image_format = args.image_format or ("png" if args.robot == "houses" else "jpg")
        flags = ("split", "role", "languages", "sim", "expert", "waypoints", "noise",
                 "noise_copies", "horizon", "max_steps", "seed", "success_m", "max_drift",
                 "image_format", "jpeg_quality", "shard_walks")
    shards = make_shards(walks, args.shard_walks)
    settings = {k: getattr(args, k) for k in flags}
    settings["input_crc32"] = zlib.crc32(json.dumps(
        [[walk["walk_id"], walk["episode"], walk["actions"]] for walk in walks]).encode())
    if not args.import_walk:
        settings["scenes"] = used
    open_folder(out, {**settings, "robot": robot})
    todo = [name for name in shards if not (os.path.exists(f"{out}/frames/{name}.zip")
                                            and os.path.exists(f"{out}/rows/{name}.jsonl"))]
    print(f"{out}: {len(walks):,} walks in {len(shards)} shards, {len(shards) - len(todo)} of them "
          "there already", flush=True)

    # 3. walk, or copy
    if args.import_walk:
        for name in todo:
            import_shard(name, shards[name], out)
    elif todo:
        sims = min(args.sims, len(todo))
        with ThreadPoolExecutor(os.cpu_count()) as threads, \
                SimPool(args.sim, robot, scenes, sims, simulator_commands(args),
                        args.sim_timeout, args.sim_gpus) as pool:
            pool.note_versions(out)
            drive(pool, sims, (record_shard(name, shards[name], args, robot, out, threads)
                               for name in todo))

    # 4. one table out of many, and the account
    simulator = {}
    if not args.import_walk:
        with open(f"{out}/simulator.json", encoding="utf-8") as file:
            simulator = {"simulator": json.load(file)}
    finish(out, [walk["walk_id"] for walk in walks], shards, rows, {
        "dataset": args.robot, "split": args.split, "robot": robot,
        "image_format": args.image_format, "args": settings, **simulator})


if __name__ == "__main__":
    run(main, parse_args)
