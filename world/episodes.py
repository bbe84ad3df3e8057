"""
Episodes: an instruction, a start and a goal; read, and checked when they are read.

One reader for three data sets, as they are downloaded (VLN-CE's layout [1]), gzipped or not:

    data/houses/<split>/<split>.json.gz, <split>_gt.json.gz              ours, written by houses.py
    data/datasets/R2R_VLNCE_v1-3_preprocessed/<split>/   the same two names; in test only the first
    data/datasets/R2R_VLNCE_v1-3/<split>/                the same episodes, without tokens or _gt
    data/datasets/RxR_VLNCE_v0/<split>/<split>_<role>.json.gz, <split>_<role>_gt.json.gz
                                       role: guide or follower; in test_challenge only the guide's
                                       first. Both test splits hide their goals.

They differ in ids (ints in R2R, strings in RxR; strings in every _gt), in the language of an RxR
instruction, and in timed_instruction, which holds NaN and is dropped.

The ground truth holds the expert's actions and `locations`, its positions. Measured on all 778 of
R2R's val_seen: location 0 is the start, and each forward move adds one (turns add none), so the
position after the k-th forward move is locations[k]. See location_steps().

read_episodes() and read_ground_truth() check every field that is used later, so that no run stops
at the fourth episode of eleven thousand; check_scenes() does the same for the scenes on the disk.

[1] https://github.com/jacobkrantz/VLN-CE, README "Data" and habitat_extensions/task.py
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import posixpath
import re
import zlib
from collections import Counter

from cli import UserError
from reward import FORWARD, LEFT, RESERVED_TOKENS, RIGHT, STOP
from world.robots import turn_between, yaw_deg

ROLES = ("guide", "follower")                                   # who walked: VLN-CE's task.py
LANGUAGES = ("en-US", "en-IN", "hi-IN", "te-IN")                # ibid.
VLNCE_RADIUS_M = 3.0                    # success, where goals name no radius: VLN-CE's task configs


def add_episode_args(add) -> None:
    """The flags that choose among RxR's files and episodes."""
    add("--role", choices=ROLES, help="RxR: who walked; default: the guide")
    add("--languages", type=language_list, metavar="L,L", help="RxR: only instructions in these, "
        "e.g. en-US,en-IN as VLN-R1 did; default: all of " + ",".join(LANGUAGES))


def language_list(text: str) -> list[str]:
    """
    >>> language_list("en-US,en-IN")
    ['en-IN', 'en-US']
    """
    chosen = sorted(set(text.split(",")))
    if not set(chosen) <= set(LANGUAGES):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of {', '.join(LANGUAGES)}")
    return chosen


# ---------------------------------------------------------------- files

ENDINGS = (".json.gz", ".json")
SPLITS = ("train", "envdrop", "joint_train_envdrop", "val_seen", "val_unseen", "test",
          "test_challenge")
LFS = b"version https://git-lfs"                    # how a git-LFS pointer begins


def split_name(path: str) -> str:
    """
    >>> split_name("x/val_seen_guide.json.gz"), split_name("mine.txt")
    ('val_seen_guide', 'mine')
    """
    name = os.path.basename(path)
    ending = next((e for e in ENDINGS if name.endswith(e)), os.path.splitext(name)[1])
    return name.removesuffix(ending)


def only_file(paths: list[str], fix: str) -> str | None:
    """The one path that is a file; None if there is none, UserError if there are two."""
    found = [path for path in paths if os.path.isfile(path)]
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} could both be meant; {fix}")
    return found[0] if found else None


def check_file_name(path: str, split: str, role: str | None) -> None:
    """UserError if the file that --episodes names is of another split or role than the flags."""
    stem = split_name(path)
    if stem.endswith("_gt"):
        raise UserError(f"--episodes names the ground truth {path}; name the episodes, "
                        f"{stem.removesuffix('_gt')}.json.gz")
    walker = next((r for r in ROLES if stem.endswith("_" + r)), None)
    named = stem.removesuffix(f"_{walker}")
    if named in SPLITS and named != split:
        raise UserError(f"--episodes names {path} and the split is {split!r}; give --split {named}")
    if role and walker and role != walker:
        raise UserError(f"--episodes names {path} and --role {role}; give --role {walker}")


def find_episodes(path: str, split: str, role: str | None) -> str:
    """A split's file in VLN-CE's layout below the folder `path`, or `path` if that is a file."""
    if os.path.isfile(path):
        check_file_name(path, split, role)
        return path
    stems = [f"{split}_{role}"] if role else [split, f"{split}_guide"]
    tries = [os.path.join(path, below, stem) for stem in stems for below in (split, "")]
    found = only_file([stem + ending for ending in ENDINGS for stem in tries],
                      "give one of them as --episodes, or remove the other")
    if found is None:
        raise UserError(f"no episodes of split {split!r} found: looked for "
                        f"{', '.join(f'{stem}.json.gz' for stem in tries)} (or .json); point "
                        "--episodes at the folder that holds them (`python -m world.houses` makes "
                        "one), or at the file")
    return found


def find_ground_truth(path: str, split: str, role: str | None = None) -> str | None:
    """The file <name>_gt in the folder of the episodes' file -> its path, or None."""
    episodes = find_episodes(path, split, role)
    stem = os.path.join(os.path.dirname(episodes), split_name(episodes) + "_gt")
    return only_file([stem + ending for ending in ENDINGS], "remove one of them")


def no_ground_truth(path: str, split: str, role: str | None = None) -> str:
    """The message for a split without ground truth."""
    episodes = find_episodes(path, split, role)
    return (f"no ground truth of split {split!r} found: looked for "
            f"{split_name(episodes)}_gt.json.gz beside {episodes}; copy it from the same release "
            "(the plain R2R_VLNCE_v1-3 has no ground truth, its _preprocessed twin has)")


def unique_keys(pairs: list[tuple]) -> dict:
    """dict(pairs) for json.loads, which itself keeps the last of equal keys. ValueError instead."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def read_json(path: str):
    """A file of JSON, gzipped or not, with a byte order mark or not. UserError if it is no JSON."""
    packed, data = False, b""
    try:
        with open(path, "rb") as file:
            data = file.read()
        packed = data[:2] == b"\x1f\x8b"
        text = (gzip.decompress(data) if packed else data).decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:  # bad JSON, bad UTF-8
        problem = f"is not {'JSON inside' if packed else 'gzip, and not JSON'} ({error})"
    except RecursionError:
        problem = "is not JSON of episodes (it is nested too deep)"
    except (EOFError, OSError, zlib.error) as error:
        problem = f"is truncated or cannot be read ({error})"
    if data.startswith(LFS):
        raise UserError(f"{path} is a git-LFS pointer, not the file; run git lfs pull")
    raise UserError(f"{path} {problem}; copy it again, or repair it")


# ---------------------------------------------------------------- fields

MAX_WORDS, MAX_LETTERS = 2000, 20000    # of an instruction; R2R's longest (val_seen) has 88 and 479


def is_number(value) -> bool:
    """A finite JSON number, in metres at most a thousand kilometres. (NaN fails comparisons.)"""
    return type(value) in (int, float) and -1e6 < value < 1e6


def is_point(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def is_points(value) -> bool:
    return isinstance(value, list) and all(map(is_point, value))


def is_heading(value) -> bool:
    """A unit quaternion x, y, z, w that turns about +y."""
    return (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
            and abs(math.hypot(*value) - 1) < 1e-3 and abs(value[0]) + abs(value[2]) < 1e-2)


def is_text(value) -> bool:
    """A string that can be encoded as UTF-8: JSON allows halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_name(value) -> bool:
    """An id: short and without slashes, since files and zip entries are named after it."""
    return (type(value) is int or is_text(value)) and len(str(value)) <= 80 and str(value) not in (
        "", ".", "..") and not re.search(r"[/\\\x00-\x1f]", str(value))


def is_scene(value) -> bool:
    """A path below the folder of scenes, after clean_scene()."""
    return (is_text(value) and not re.search(r"^/|^\w:|[\x00-\x1f]", value)
            and value != "." and ".." not in value.split("/"))


def is_goals(value) -> bool:
    """Goals, all of them finite or none: "the nearest" is then defined. Goals that are not finite
    are allowed: they count as never reached."""
    return (isinstance(value, list) and len(value) > 0 and all(map(is_goal, value))
            and len({is_point(goal["position"]) for goal in value}) == 1)


def is_goal(value) -> bool:
    position, radius = (value.get("position"), value.get("radius")) if isinstance(
        value, dict) else (None, None)
    return (isinstance(position, list) and len(position) == 3
            and all(is_number(v) or type(v) is float for v in position)
            and (radius is None or is_number(radius) and radius > 0))


def is_count(value) -> bool:
    return type(value) in (int, str) and re.fullmatch(r"\d{1,18}", str(value), re.ASCII) is not None


def clean_scene(scene_id: str) -> str:
    """
    >>> clean_scene("data\\\\scene_datasets\\\\mp3d\\\\a\\\\a.glb"), clean_scene("./houses//a.glb")
    ('mp3d/a/a.glb', 'houses/a.glb')
    """
    path = scene_id.replace("\\", "/")
    if not path or ".." in path.split("/"):                     # normpath would hide it
        return path
    return posixpath.normpath(path).removeprefix("data/scene_datasets/")


NAME = "a whole number, or a string of at most 80 letters without slashes"
# Fields of an episode: (may it be absent or null?, its test, what is wanted)
FIELDS = {
    "episode_id": (False, is_name, NAME),
    "trajectory_id": (True, is_name, NAME),
    "scene_id": (False, is_scene, "a path below --scenes, not absolute and without '..'"),
    "start_position": (False, is_point, "[x, y, z], finite"),
    "start_rotation": (False, is_heading, "[x, y, z, w], of unit length and upright (x = z = 0)"),
    "goals": (False, is_goals, '[{"position": [x, y, z], "radius": metres above 0}, ..], all of '
                               "them finite or none"),
    "reference_path": (True, is_points, "[[x, y, z], ..], finite"),
    "instruction": (False, lambda v: isinstance(v, dict), 'an object with "instruction_text"'),
}
INSTRUCTION_FIELDS = {"language": (True, is_text, "a string"),
                      "instruction_id": (True, is_count, "a whole number")}
TRUTH_FIELDS = {
    "actions": (False, lambda v: is_walk(v), "1, 2, 3 and one 0 at the end"),
    "locations": (False, lambda v: is_points(v) and v != [], "a list of [x, y, z], finite")}


def short_json(value) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def field_problem(record: dict, fields: dict) -> str | None:
    """The first field that fails its test -> the rest of a sentence, or None."""
    for field, (optional, test, wanted) in fields.items():
        value = record.get(field)
        if not (optional if value is None else test(value)):
            return f"has an invalid {field!r} ({short_json(value)}): it must be {wanted}"
    return None


def text_problem(value) -> str | None:
    """Why this cannot be an instruction, or None."""
    if not isinstance(value, str):
        return "it must be a string"
    if not is_text(value):
        return "it holds half a surrogate pair, which is no Unicode"
    if not any(letter.isalnum() for letter in value):
        return "it has no words"
    if len(value.split()) > MAX_WORDS or len(value) > MAX_LETTERS:
        return f"it has {len(value.split()):,} words, {len(value):,} letters; at most " \
               f"{MAX_WORDS:,} and {MAX_LETTERS:,} are sensible"
    reserved = [word for word in RESERVED_TOKENS if word in value]
    return f"it holds {reserved[0]}, which the prompt reserves" if reserved else None


def clean_episode(episode, hidden: bool) -> str | None:
    """Check one episode, and change it in place as read_episodes() describes. -> what is wrong with
    it, or None. hidden: its split may hide the goals."""
    if not isinstance(episode, dict):
        return f"is no episode ({short_json(episode)}): it must be an object"
    if isinstance(episode.get("scene_id"), str):
        episode["scene_id"] = clean_scene(episode["scene_id"])
    hidden = hidden and episode.get("goals") in (None, [])
    problem = field_problem(episode, {field: test for field, test in FIELDS.items()
                                      if field != "goals" or not hidden})
    problem = problem or field_problem(episode["instruction"], INSTRUCTION_FIELDS)
    if problem:
        return problem
    instruction = episode["instruction"]
    text = instruction.get("instruction_text")
    problem = text_problem(text)
    if problem:
        return f"has an invalid 'instruction_text' ({short_json(text)}): {problem}"
    episode.pop("scene_sha256", None)                           # add_scene_hashes() sets it
    instruction["instruction_text"] = " ".join(text.split())
    instruction.pop("timed_instruction", None)
    for field in INSTRUCTION_FIELDS:
        if instruction.get(field) is None:                      # null is like absent
            instruction.pop(field, None)
    episode["goals"] = episode.get("goals") or []
    if episode.get("trajectory_id") is None:
        episode["trajectory_id"] = episode["episode_id"]
    return None


# ---------------------------------------------------------------- reading


def raise_first(found: list[str]) -> None:
    """UserError with the first problem and how many there are, if there is any."""
    if found:
        more = f" ({len(found)} episodes are at fault)" if len(found) > 1 else ""
        raise UserError(f"{found[0]}; repair or remove it{more}")


def read_episodes(path: str, split: str, role: str | None = None,
                  languages: list[str] | None = None) -> list[dict]:
    """R2R_VLNCE_v1-3 or RxR_VLNCE_v0 episodes, ours included -> list of dicts, as in the file.

    Every field that is used later is checked here: UserError names file, episode and field.
    Changes: runs of white space in instructions become one blank (10,811 of R2R's 10,819 end in a
    blank); timed_instruction is removed; scene_id is a path below the folder of scenes, with
    slashes; goals are [] where a test split hides them. If the file has hashes of its scenes
    (houses.py), they become the episodes' scene_sha256.
    """
    path = find_episodes(path, split, role)
    data = read_json(path)
    episodes = data.get("episodes") if isinstance(data, dict) else None
    if not isinstance(episodes, list) or not episodes:
        raise UserError(f"{path} has no list 'episodes'; is it an R2R_VLNCE or RxR_VLNCE file?")
    found = []
    for i, episode in enumerate(episodes):
        problem = clean_episode(episode, hidden=split.startswith("test"))
        if problem:
            name = episode.get("episode_id") if isinstance(episode, dict) else None
            found.append(f"{path}: episode {name if is_name(name) else 'without id'} "
                         f"(episodes[{i}]) {problem}")
    raise_first(found)
    twice = [name for name, n in Counter(str(e["episode_id"]) for e in episodes).items() if n > 1]
    if twice:
        raise UserError(f"{path} has {len(twice)} episode ids that are not unique, the first is "
                        f"{twice[0]}; give every episode its own episode_id")
    add_scene_hashes(path, data.get("scenes"), episodes)
    if languages:
        held = Counter(str(e["instruction"].get("language")) for e in episodes)
        episodes = [e for e in episodes if e["instruction"].get("language") in languages]
        if not episodes:
            raise UserError(f"{path} has no instruction in {', '.join(languages)} (it has "
                            f"{', '.join(sorted(held))}); change --languages, or leave it out")
    return episodes


def add_scene_hashes(path: str, scenes, episodes: list[dict]) -> None:
    """Copy the file's "scenes" {scene_id: hash}, if it has them, into its episodes."""
    if scenes is None:
        return
    if not isinstance(scenes, dict) or not all(isinstance(v, str) for v in scenes.values()):
        raise UserError(f"{path}: 'scenes' ({short_json(scenes)}) must be {{scene_id: hash}}, as "
                        "world/houses.py writes it; repair or remove it")
    for episode in episodes:
        if episode["scene_id"] not in scenes:
            raise UserError(f"{path}: 'scenes' lacks {episode['scene_id']} of episode "
                            f"{episode['episode_id']}; make the data again with `python -m "
                            "world.houses`")
        episode["scene_sha256"] = scenes[episode["scene_id"]]


def is_walk(actions) -> bool:
    """Whole numbers: 1, 2, 3, and one 0 at the end."""
    return (isinstance(actions, list) and all(type(action) is int for action in actions)
            and actions[-1:] == [STOP] and set(actions[:-1]) <= {FORWARD, LEFT, RIGHT})


def read_ground_truth(path: str, split: str, role: str | None = None,
                      optional: bool = False) -> dict | None:
    """-> {str(episode_id): {"actions": [.., 0], "locations": [[x, y, z]..], "forward_steps": n}}.

    locations: the start and the position after every forward move, forward_steps + 1 in all.
    Every field is checked. If there is no file: UserError, or None if it is optional.
    """
    found = find_ground_truth(path, split, role)
    if found is None and optional:
        return None
    if found is None:
        raise UserError(no_ground_truth(path, split, role))
    truths = read_json(found)
    if not isinstance(truths, dict):
        raise UserError(f"{found} holds no ground truth ({short_json(truths)}): it must be an "
                        "object {episode_id: {\"actions\", \"locations\"}}; copy it again")
    problems = {name: field_problem(truth, TRUTH_FIELDS) if isinstance(truth, dict) else
                f"is no ground truth ({short_json(truth)}): it must be an object"
                for name, truth in truths.items()}
    raise_first([f"{found}: episode {short_json(name)} {problem}"
                 for name, problem in problems.items() if problem])
    return truths


def dataset_of(episode: dict) -> str:
    """Which data set is this episode from? -> a key of robots.ROBOTS."""
    if episode["scene_id"].startswith("houses/"):
        return "houses"
    return "rxr" if "language" in episode["instruction"] else "r2r"


def scenes_of(path: str) -> str:
    """The default of --scenes for these --episodes, a folder or a file."""
    folders = [os.path.join(path, "scenes")]
    if os.path.isfile(path):
        folders = [os.path.join(os.path.dirname(path), up, "scenes") for up in ("", "..")]
    return next((where for where in folders if os.path.isdir(where)), "data/scene_datasets")


def paired(episodes: list[dict], truths: dict) -> list[dict]:
    """-> [{"episode", "actions", "locations", ..}] of the episodes that have a ground truth."""
    return [{"episode": e, **truths[str(e["episode_id"])]} for e in episodes
            if str(e["episode_id"]) in truths]


# ---------------------------------------------------------------- does the ground truth fit?


def location_steps(actions: list[int], n: int) -> list[int] | None:
    """Which poses are the n locations of a ground truth? Pose t is the one before actions[t].

    The first and those after forward moves, or one per action. None if n fits neither.

    >>> location_steps([2, 1, 3, 1, 0], 3), location_steps([2, 1, 3, 1, 0], 5)
    ([0, 2, 4], [0, 1, 2, 3, 4])
    >>> location_steps([2, 1, 3, 1, 0], 4)
    """
    moved = [0] + [t + 1 for t, action in enumerate(actions) if action == FORWARD]
    return moved if n == len(moved) else list(range(n)) if n == len(actions) else None


def heading_fit(rotation: list[float], actions: list[int], locations: list[list[float]],
                turn_deg: float) -> tuple[int, int]:
    """If every turn is turn_deg, do forward moves go where the robot faces, within 5 degrees?
    -> (how many do, how many moves). Moves of less than 0.1 m over ground (walls, stairs) have no
    direction and are left out. On R2R's val_seen 98.5% fit at 15 degrees and 6% at 30.

    >>> heading_fit([0, 0, 0, 1], [2, 1, 0], [[0, 0, 0], [-0.25, 0, 0]], turn_deg=90)
    (1, 1)
    """
    heading, fitting, moves, here = yaw_deg(rotation), 0, 0, locations[0]
    place = dict(zip(location_steps(actions, len(locations)) or (), locations))
    for t, action in enumerate(actions):
        here = place.get(t, here)                               # a turn has no location
        heading += {LEFT: turn_deg, RIGHT: -turn_deg}.get(action, 0)
        if action == FORWARD and t + 1 in place:
            (x0, _, z0), (x1, _, z1) = here, place[t + 1]
            if math.hypot(x1 - x0, z1 - z0) > 0.1:
                went = math.degrees(math.atan2(x0 - x1, z0 - z1))
                fitting += abs(turn_between(heading, went)) < 5
                moves += 1
    return fitting, moves


def turn_fit(walks: list[dict], turn_deg: float) -> float | None:
    """Share of forward moves of paired() walks that fit turns of turn_deg; None without moves."""
    fits = [heading_fit(w["episode"]["start_rotation"], w["actions"], w["locations"], turn_deg)
            for w in walks]
    moves = sum(n for _, n in fits)
    return sum(f for f, _ in fits) / moves if moves else None


def walked_turn_deg(walks: list[dict], turn_deg: float) -> float:
    """The turn angle of the ground truth: turn_deg if that fits, else the one that fits best.

    walks: paired(); the first 200 are used. The right angle fits all moves but a few percent
    (sliding along walls), a wrong one only a few percent, so the threshold is 80%.
    """
    walks = [walk for walk in walks if walk["actions"]][:200]
    fit = turn_fit(walks, turn_deg)
    if fit is None or fit >= 0.8:
        return turn_deg
    return max((10, 15, 22.5, 30, 45, 90), key=lambda deg: turn_fit(walks, deg))


def check_turn_deg(walks: list[dict], turn_deg: float) -> None:
    """UserError if the ground truth was walked with another turn angle than the robot's."""
    best = walked_turn_deg(walks, turn_deg)
    if best != turn_deg:
        raise UserError(
            f"the robot turns {turn_deg:g} degrees, but the ground truth was walked with turns of "
            f"{best:g} ({turn_fit(walks, best):.0%} of its moves fit that, "
            f"{turn_fit(walks, turn_deg):.0%} fit {turn_deg:g}); use --turn-deg {best:g} or the "
            "--robot of these episodes")


# ---------------------------------------------------------------- scenes on the disk

WHOLE_BYTES, PART_BYTES = 8 << 20, 1 << 20


def scene_hash(path: str) -> str:
    """16 hex digits of SHA-256: of the content, or, above 8 MiB, of the size in ASCII, the first
    and the last MiB. (Matterport3D's 90 scenes are 15 GB; reading all of it takes minutes.)"""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(b"%d" % size + file.read(PART_BYTES))
            file.seek(size - PART_BYTES)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def file_fault(path: str) -> str | None:
    """What is wrong with a scene or a navmesh, by its size and first bytes; None if nothing is."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not head:
        return "is empty"
    if head.startswith(LFS):
        return "is a git-LFS pointer, not the file (run git lfs pull)"
    if path.endswith(".glb"):
        length = int.from_bytes(head[8:12], "little")           # header: magic, version, length
        if head[:4] != b"glTF" or len(head) < 12:
            return f"is not glTF (it begins with {head[:4]!r})"
        return f"is truncated ({size:,} of {length:,} bytes)" if size < length else None
    if path.endswith(".navmesh") and head[:4] not in (b"TESM", b"MSET"):    # either byte order
        return f"is not a navmesh (it begins with {head[:4]!r})"
    return None


def navmesh_of(scene_id: str) -> str:
    return os.path.splitext(scene_id)[0] + ".navmesh"


def missing_scenes(episodes: list[dict], scenes: str, navmeshes: bool = False) -> Counter:
    """Scenes, or their navmeshes, that do not exist -> {file: number of episodes}"""
    needed = Counter(navmesh_of(e["scene_id"]) if navmeshes else e["scene_id"] for e in episodes)
    return Counter({name: n for name, n in sorted(needed.items())
                    if not os.path.isfile(os.path.join(scenes, name))})


def damaged_scenes(episodes: list[dict], scenes: str) -> dict[str, str]:
    """Scenes and navmeshes that exist but are damaged, or differ from an episode's scene_sha256 ->
    {file: what is wrong}"""
    made_in = {e["scene_id"]: e.get("scene_sha256") for e in episodes}
    found = {}
    for scene_id, known in sorted(made_in.items()):
        for name in (scene_id, navmesh_of(scene_id)):
            path = os.path.join(scenes, name)
            fault = file_fault(path) if os.path.isfile(path) else None
            if not fault and name == scene_id and known and scene_hash(path) != known:
                fault = (f"has the hash {scene_hash(path)}, but the episodes were made in a scene "
                         f"with {known}: episodes of one world on scenes of another")
            if fault:
                found[name] = fault
    return found


def check_scenes(episodes: list[dict], scenes: str) -> dict:
    """UserError unless all scenes exist and are sound -> {"count", "sha256"}: the number of scenes,
    and one hash of all of them and their navmeshes, which results record."""
    lost = missing_scenes(episodes, scenes)
    if lost:
        raise UserError(f"{len(lost)} scenes are missing below {scenes} ({sum(lost.values())} "
                        f"episodes are in them), the first is {next(iter(lost))}; give the folder "
                        "that scene_id starts from: --scenes")
    faults = damaged_scenes(episodes, scenes)
    for name, fault in faults.items():
        more = f" ({len(faults)} files are at fault)" if len(faults) > 1 else ""
        raise UserError(f"{os.path.join(scenes, name)} {fault}; copy it again, or give the folder "
                        f"of these episodes' scenes: --scenes{more}")
    names = sorted({e["scene_id"] for e in episodes})
    digest = hashlib.sha256()
    for name in [*names, *map(navmesh_of, names)]:
        path = os.path.join(scenes, name)
        if os.path.isfile(path):
            digest.update(f"{name} {scene_hash(path)}\n".encode())
    return {"count": len(names), "sha256": digest.hexdigest()[:16]}


# ---------------------------------------------------------------- what a measurement needs

EPISODES = {"houses": "data/houses", "r2r": "data/datasets/R2R_VLNCE_v1-3_preprocessed",
            "rxr": "data/datasets/RxR_VLNCE_v0"}        # where each data set is looked for


def check_episodes(episodes: list[dict], truths: dict | None, source: str) -> None:
    """UserError unless all episodes have what the metrics need. truths: None where the split has
    none. (read_episodes() has checked everything else.)"""
    hidden = not any(episode["goals"] for episode in episodes)
    for episode in episodes:
        if not hidden and not episode["goals"]:
            raise UserError(f"episode {episode['episode_id']} of {source} has no goal, and others "
                            "have one: copy the episodes again, or take it out")
        if truths is not None and str(episode["episode_id"]) not in truths:
            raise UserError(f"episode {episode['episode_id']} of {source} has no ground truth to "
                            "measure by: copy the _gt.json.gz of the same release")
        truth = (truths or {}).get(str(episode["episode_id"]))
        apart = math.dist(truth["locations"][0], episode["start_position"]) if truth else 0
        if apart > 1:
            raise UserError(f"the ground truth starts {apart:.1f} m from the start of episode "
                            f"{episode['episode_id']} of {source}: it is another split's, or one "
                            "of the two has its axes in another order; copy both of one release")
    walks = paired(episodes, truths or {})
    fit = turn_fit(walks[:200], walked_turn_deg(walks, 30))
    if fit is not None and fit < 0.5:
        raise UserError(f"the ground truth of {source} walks where the robot does not face (only "
                        f"{fit:.0%} of its moves fit any turn angle): start_rotation is mirrored, "
                        "or has another order or zero; copy both of one release")


def success_radius(episodes: list[dict]) -> float:
    """The success radius that all goals name, VLN-CE's where they name none."""
    radii = {goal.get("radius") or VLNCE_RADIUS_M for e in episodes for goal in e["goals"]}
    if len(radii) > 1:
        raise UserError("the goals of the data have no common radius: evaluate them in parts")
    return radii.pop() if radii else VLNCE_RADIUS_M
