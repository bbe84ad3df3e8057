"""
Episodes: what a robot is told, where it starts, where it should arrive; read, and verified.

One reader for three makers, whose files are taken as they are downloaded (VLN-CE's layout [1]),
gzipped or not:

    data/houses/<split>/<split>.json.gz, <split>_gt.json.gz              ours, written by houses.py
    data/datasets/R2R_VLNCE_v1-3_preprocessed/<split>/   the same two names; in test only the first
    data/datasets/R2R_VLNCE_v1-3/<split>/                the same episodes, without tokens or _gt
    data/datasets/RxR_VLNCE_v0/<split>/<split>_<role>.json.gz, <split>_<role>_gt.json.gz
                                       role: guide or follower; in test_challenge only the guide's
                                       first. Both test splits hide their goals.

What differs between them: ids (ints in R2R, strings in RxR; strings in every _gt), the language of
an RxR instruction, and timed_instruction, which holds NaN and is left behind. RxR has no
vocabulary; nobody here needs one.

The ground truth says what the expert did, and `locations`, where it was. Measured on all 778 of
R2R's val_seen: location 0 is the start, and each forward move adds one (turns add none), so the
place after the k-th forward move is locations[k]. location_steps() says it in code.

read_episodes() and read_ground_truth() check every field that is used later, so that nothing ends
at the fourth episode of eleven thousand; check_scenes() does the same for the scenes on the disk.
verify() looks at all of it before hours are spent (`python make_data.py --verify`).

[1] https://github.com/jacobkrantz/VLN-CE, README "Data" and habitat_extensions/task.py
"""
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
from reward import FORWARD, LEFT, RESERVED_MARKS, RIGHT, STOP

ROLES = ("guide", "follower")                                   # who walked: VLN-CE's task.py
LANGUAGES = ("en-US", "en-IN", "hi-IN", "te-IN")                # ibid.
VLNCE_RADIUS_M = 3.0                    # success, where goals name no radius: VLN-CE's task configs

# Episodes per (data set, split, role, languages). R2R: VLN-CE's data page,
# https://jacobkrantz.github.io/vlnce/data (61, 53, 11 and 18 scenes). RxR: val_unseen's guide file
# has 11,006 records, 3,669 of them English, as github.com/jzhzhang/NaVid-VLN-CE/issues/58 and
# CoFL's benchmarks/rxr_1600 count it. What is not here is reported, not asserted.
ENGLISH = ("en-IN", "en-US")
KNOWN = {("r2r", "train", None, None): 10819, ("r2r", "val_seen", None, None): 778,
         ("r2r", "val_unseen", None, None): 1839, ("r2r", "test", None, None): 3408,
         ("rxr", "val_unseen", "guide", None): 11006, ("rxr", "val_unseen", "guide", ENGLISH): 3669}


def add_episode_args(add):
    """The flags that choose among RxR's files and episodes."""
    add("--role", choices=ROLES, help="RxR: whose walks; default: the guide's")
    add("--languages", type=language_list, metavar="L,L", help="RxR: only instructions in these, "
        "e.g. en-US,en-IN as VLN-R1 did; default: all of " + ",".join(LANGUAGES))


def language_list(text):
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
SPLITS = ("train", "val_seen", "val_unseen", "test", "test_challenge")
LFS = b"version https://git-lfs"                    # how a git-LFS pointer begins


def split_name(path):
    """
    >>> split_name("x/val_seen_guide.json.gz"), split_name("mine.txt")
    ('val_seen_guide', 'mine')
    """
    name = os.path.basename(path)
    ending = next((e for e in ENDINGS if name.endswith(e)), os.path.splitext(name)[1])
    return name.removesuffix(ending)


def check_file_name(path, split, role):
    """A file that --episodes names must not be of another split or role than the flags say."""
    stem = split_name(path)
    if stem.endswith("_gt"):
        raise UserError(f"--episodes names the ground truth {path}; name the episodes beside it, "
                        f"{stem.removesuffix('_gt')}.json.gz")
    walker = next((r for r in ROLES if stem.endswith("_" + r)), None)
    named = stem.removesuffix(f"_{walker}")
    if named in SPLITS and named != split:
        raise UserError(f"--episodes names {path} and the split is {split!r}; give --split {named}")
    if role and walker and role != walker:
        raise UserError(f"--episodes names {path} and --role {role}; give --role {walker}")


def find_episodes(path, split, role):
    """A split's file in VLN-CE's layout below the folder `path`, or `path` if that is a file."""
    if os.path.isfile(path):
        check_file_name(path, split, role)
        return path
    stems = [f"{split}_{role}"] if role else [split, f"{split}_guide"]
    tries = [os.path.join(path, below, stem + ending) for ending in ENDINGS for stem in stems
             for below in (split, "")]
    found = [name for name in tries if os.path.isfile(name)]
    if not found:
        raise UserError(f"no episodes of split {split!r} found: looked for "
                        f"{', '.join(tries[:len(tries) // 2])} (or .json); point --episodes at the "
                        "folder that holds them (houses.py makes one), or at the file")
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} could both be meant; give one of them as "
                        "--episodes, or remove the other")
    return found[0]


def find_ground_truth(path, split, role=None):
    """The file <name>_gt beside the episodes' file -> its path, or None."""
    episodes = find_episodes(path, split, role)
    stem = os.path.join(os.path.dirname(episodes), split_name(episodes) + "_gt")
    found = [stem + ending for ending in ENDINGS if os.path.isfile(stem + ending)]
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} could both be meant; remove one of them")
    return found[0] if found else None


def no_ground_truth(path, split, role=None):
    """The sentence for a split without the file that find_ground_truth() looks for."""
    episodes = find_episodes(path, split, role)
    return (f"no ground truth of split {split!r} found: looked for "
            f"{split_name(episodes)}_gt.json.gz beside {episodes}; copy it from the same release "
            "(the plain R2R_VLNCE_v1-3 has no ground truth, its _preprocessed twin has)")


def unique_keys(pairs):
    """dict(pairs), for json.loads, which would silently keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def read_json(path):
    """A file of JSON, gzipped or not, with a byte order mark or not. UserError if it is neither."""
    packed, mend = False, "copy it again, or repair it"
    try:
        with open(path, "rb") as file:
            data = file.read()
        packed = data[:2] == b"\x1f\x8b"
        text = (gzip.decompress(data) if packed else data).decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:  # bad JSON, bad UTF-8
        if data.startswith(LFS):
            raise UserError(f"{path} is a git-LFS pointer, not the file; run git lfs pull"
                            ) from None
        what = "not JSON inside" if packed else "not gzip, and not JSON"
        raise UserError(f"{path} is {what} ({error}); {mend}") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON of episodes (it is nested too deep); {mend}") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is truncated or cannot be read ({error}); {mend}") from None


# ---------------------------------------------------------------- what a field must be

MAX_WORDS, MAX_LETTERS = 2000, 20000    # of an instruction; R2R's longest (val_seen) has 88 and 479


def is_number(value):
    """A finite JSON number, in metres at most a thousand kilometres. (NaN fails comparisons.)"""
    return type(value) in (int, float) and -1e6 < value < 1e6


def is_point(value):
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def is_points(value):
    return isinstance(value, list) and all(map(is_point, value))


def is_heading(value):
    """A rotation about +y, x y z w. One written w x y z, or not of unit length, is none."""
    return (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
            and abs(math.hypot(*value) - 1) < 1e-3 and abs(value[0]) + abs(value[2]) < 1e-2)


def is_text(value):
    """A string that can be written as UTF-8: JSON allows halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_name(value):
    """An id. Files and zip entries are named after it, so it is short and has no slashes."""
    return (type(value) is int or is_text(value)) and len(str(value)) <= 80 and str(value) not in (
        "", ".", "..") and not re.search(r"[/\\\x00-\x1f]", str(value))


def is_scene(value):
    """A path below the folder of scenes; clean_scene() has made it one with slashes."""
    return (is_text(value) and not re.search(r"^/|^\w:|[\x00-\x1f]", value)
            and value != "." and ".." not in value.split("/"))


def clean_scene(scene_id):
    """
    >>> clean_scene("data\\\\scene_datasets\\\\mp3d\\\\a\\\\a.glb"), clean_scene("./houses//a.glb")
    ('mp3d/a/a.glb', 'houses/a.glb')
    """
    path = scene_id.replace("\\", "/")
    if not path or ".." in path.split("/"):                     # normpath would hide it
        return path
    return posixpath.normpath(path).removeprefix("data/scene_datasets/")


def is_goal(value):
    """A position that is not finite is allowed: such a goal cannot be reached, and is counted."""
    if not isinstance(value, dict) or not isinstance(value.get("position"), list):
        return False
    radius = value.get("radius")
    return (len(value["position"]) == 3 and (radius is None or is_number(radius) and radius > 0)
            and all(is_number(v) or type(v) is float for v in value["position"]))


def is_goals(value):
    """Goals, all of them finite or none: the nearest of finite and others is not defined."""
    return (isinstance(value, list) and len(value) > 0 and all(map(is_goal, value))
            and len({is_point(goal["position"]) for goal in value}) == 1)


def text_problem(value):
    """Why this cannot be an instruction -> words, or None."""
    if not isinstance(value, str):
        return "it must be a string"
    if not is_text(value):
        return "it holds half a surrogate pair, which is no Unicode"
    if not any(letter.isalnum() for letter in value):
        return "it has no words"
    if len(value.split()) > MAX_WORDS or len(value) > MAX_LETTERS:
        return f"it has {len(value.split()):,} words, {len(value):,} letters; at most " \
               f"{MAX_WORDS:,} and {MAX_LETTERS:,} are sensible"
    marks = [mark for mark in RESERVED_MARKS if mark in value]
    return f"it holds {marks[0]}, a mark of the prompt's own" if marks else None


NAME = "a whole number, or a string of at most 80 letters without slashes"
FIELDS = {      # field: may it be absent or null?, what is good, in words
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
SPOKEN = {      # the same of an instruction
    "language": (True, is_text, "a string"),
    "instruction_id": (True, lambda v: re.fullmatch(r"\d{1,18}", str(v), re.ASCII) is not None
                       and type(v) in (int, str), "a whole number"),
}


def shown(value):
    """The value for an error message, cut short."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def bad_field(record, fields):
    """The first field that is not what it must be -> a sentence's rest, or None."""
    for field, (optional, good, words) in fields.items():
        value = record.get(field)
        if value is None and optional or value is not None and good(value):
            continue
        return f"has no good {field!r} ({shown(value)}): it must be {words}"
    return None


def clean_episode(episode, hidden):
    """Check one episode and bring it into the form that read_episodes() describes, in place.

    -> what is wrong with it, or None. hidden: its split may hide the goals.
    """
    if not isinstance(episode, dict):
        return f"is no episode ({shown(episode)}): it must be an object"
    if isinstance(episode.get("scene_id"), str):
        episode["scene_id"] = clean_scene(episode["scene_id"])
    fields = dict(FIELDS)
    if hidden and episode.get("goals") in (None, []):
        del fields["goals"]
    problem = bad_field(episode, fields) or bad_field(episode["instruction"], SPOKEN)
    if problem:
        return problem
    words = episode["instruction"]
    problem = text_problem(words.get("instruction_text"))
    if problem:
        return f"has no good 'instruction_text' ({shown(words.get('instruction_text'))}): {problem}"
    episode.pop("scene_sha256", None)                           # add_scene_hashes() sets it
    words["instruction_text"] = " ".join(words["instruction_text"].split())
    words.pop("timed_instruction", None)
    for field in SPOKEN:                                        # null is like absent
        if words.get(field) is None:
            words.pop(field, None)
    episode["goals"] = episode.get("goals") or []
    if episode.get("trajectory_id") is None:
        episode["trajectory_id"] = episode["episode_id"]
    return None


def named(where, name, record):
    """'<file>: episode 7 (episodes[6])', as far as the record says."""
    known = isinstance(record, dict) and is_name(record.get("episode_id"))
    return f"{where}: episode {record['episode_id'] if known else 'without id'} ({name})"


def refuse(found):
    """UserError with the first of the problems [(whose, problem), ..], and how many there are."""
    if found:
        more = f" ({len(found)} episodes are at fault)" if len(found) > 1 else ""
        raise UserError(f"{found[0][0]} {found[0][1]}; repair or remove it{more}")


# ---------------------------------------------------------------- reading


def hides_goals(split):
    """test (R2R) and test_challenge (RxR): only their servers know the goals and the walks."""
    return split.startswith("test")


def read_episodes(path, split, role=None, languages=None):
    """R2R_VLNCE_v1-3 or RxR_VLNCE_v0 episodes, ours included -> list of dicts, as in the file.

    Every field that is used later is checked here: UserError names file, episode and field.
    Ids stay what they are (R2R int, RxR str). What changes: white space of instructions is made
    single, since 10,811 of R2R's 10,819 end in a blank; timed_instruction goes; scene_id starts
    below the folder of scenes, as VLN-CE has it, with slashes; goals are [] where a test split
    hides them. Where the file knows its scenes (houses.py), scene_sha256 is scene_hash()'s.
    """
    path = find_episodes(path, split, role)
    data = read_json(path)
    episodes = data.get("episodes") if isinstance(data, dict) else None
    if not isinstance(episodes, list) or not episodes:
        raise UserError(f"{path} has no list 'episodes'; is it an R2R_VLNCE or RxR_VLNCE file?")
    found = []
    for i, episode in enumerate(episodes):
        problem = clean_episode(episode, hides_goals(split))
        if problem:
            found.append((named(path, f"episodes[{i}]", episode), problem))
    refuse(found)
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


def add_scene_hashes(path, scenes, episodes):
    """Put the file's "scenes" {scene_id: hash}, if it has them, to its episodes."""
    if scenes is None:
        return
    if not isinstance(scenes, dict) or not all(isinstance(v, str) for v in scenes.values()):
        raise UserError(f"{path}: 'scenes' ({shown(scenes)}) must be {{scene_id: hash}}, as "
                        "houses.py writes it; repair or remove it")
    for episode in episodes:
        if episode["scene_id"] not in scenes:
            raise UserError(f"{path}: 'scenes' lacks {episode['scene_id']} of episode "
                            f"{episode['episode_id']}; make the data again with houses.py")
        episode["scene_sha256"] = scenes[episode["scene_id"]]


def truth_problem(truth):
    """What is wrong with an episode's ground truth -> a sentence's rest, or None."""
    if not isinstance(truth, dict):
        return f"is no ground truth ({shown(truth)}): it must be an object"
    actions, locations = truth.get("actions"), truth.get("locations")
    if not (isinstance(actions, list) and all(type(action) is int for action in actions)
            and actions[-1:] == [STOP] and set(actions[:-1]) <= {FORWARD, LEFT, RIGHT}):
        return "has no good 'actions': they must be 1, 2, 3 and one 0 at the end"
    if not locations or not is_points(locations):
        return "has no good 'locations': they must be a list of [x, y, z], finite"
    return None


def read_ground_truth(path, split, role=None, optional=False):
    """-> {str(episode_id): {"actions": [.., 0], "locations": [[x, y, z]..], "forward_steps": n}}.

    locations: the start and the place after every forward move, so forward_steps + 1 of them.
    Checked like the episodes. Without a file: UserError, or None if it is optional.
    """
    found = find_ground_truth(path, split, role)
    if found is None and optional:
        return None
    if found is None:
        raise UserError(no_ground_truth(path, split, role))
    truths = read_json(found)
    if not isinstance(truths, dict):
        raise UserError(f"{found} holds no ground truth ({shown(truths)}): it must be an object "
                        "{episode_id: {\"actions\", \"locations\"}}; copy it again")
    refuse([(f"{found}: episode {shown(key)}", problem) for key, truth in truths.items()
            if (problem := truth_problem(truth))])
    return truths


def dataset_of(episode):
    """Whose episode is it? -> a row of sim.ROBOTS."""
    if episode["scene_id"].startswith("houses/"):
        return "houses"
    return "rxr" if "language" in episode["instruction"] else "r2r"


def scenes_of(path):
    """Where the scenes of these --episodes (folder or file) are, unless --scenes says otherwise."""
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    own = [os.path.join(folder, "scenes")]
    own += [os.path.join(folder, "..", "scenes")] if folder != path else []
    return next((where for where in own if os.path.isdir(where)), "data/scene_datasets")


def paired(episodes, truths):
    """-> [{"episode", "actions", "locations", ..}] of the episodes that have a ground truth."""
    return [{"episode": e, **truths[str(e["episode_id"])]} for e in episodes
            if str(e["episode_id"]) in truths]


# ---------------------------------------------------------------- does the ground truth fit?


def location_steps(actions, n):
    """Which poses are the n locations of a ground truth, if pose t is that before actions[t]?

    The first, and that after every forward move; or, a pose per action, all. None: neither fits.

    >>> location_steps([2, 1, 3, 1, 0], 3), location_steps([2, 1, 3, 1, 0], 5)
    ([0, 2, 4], [0, 1, 2, 3, 4])
    >>> location_steps([2, 1, 3, 1, 0], 4)
    """
    moved = [0] + [t + 1 for t, action in enumerate(actions) if action == FORWARD]
    return moved if n == len(moved) else list(range(n)) if n == len(actions) else None


def yaw_deg(rotation):
    """Heading of a quaternion (x, y, z, w) about +y in degrees: left is positive, 0 looks along -z.

    >>> round(yaw_deg([0, 0.5, 0, 0.75 ** 0.5]), 6)
    60.0
    """
    return math.degrees(2 * math.atan2(rotation[1], rotation[3]))


def turned(before, after):
    """Degrees from one heading to another, the short way round, in [-180, 180).

    >>> turned(170, -170)
    20
    """
    return (after - before + 180) % 360 - 180


def heading_fit(rotation, actions, locations, turn_deg):
    """If every turn is turn_deg, do forward moves go where the robot faces? -> (fitting, moves).

    Within 5 degrees. Moves of less than 0.1 m over ground (walls, stairs) have no direction and are
    left out. On R2R's val_seen 98.5% fit at 15 degrees and 6% at 30.

    >>> heading_fit([0, 0, 0, 1], [2, 1, 0], [[0, 0, 0], [-0.25, 0, 0]], turn_deg=90)
    (1, 1)
    """
    heading, fitting, moves, here = yaw_deg(rotation), 0, 0, locations[0]
    place = dict(zip(location_steps(actions, len(locations)) or (), locations))
    for t, action in enumerate(actions):
        here = place[t] if t in place else here                 # a turn does not move it
        heading += {LEFT: turn_deg, RIGHT: -turn_deg}.get(action, 0)
        if action == FORWARD and t + 1 in place:
            (x0, _, z0), (x1, _, z1) = here, place[t + 1]
            if math.hypot(x1 - x0, z1 - z0) > 0.1:
                went = math.degrees(math.atan2(x0 - x1, z0 - z1))
                fitting += abs(turned(heading, went)) < 5
                moves += 1
    return fitting, moves


def turn_fit(walks, turn_deg):
    """Share of the forward moves of paired() walks that fit turns of turn_deg; None without any."""
    fits = [heading_fit(w["episode"]["start_rotation"], w["actions"], w["locations"], turn_deg)
            for w in walks]
    moves = sum(n for _, n in fits)
    return sum(f for f, _ in fits) / moves if moves else None


def walked_turn_deg(walks, turn_deg):
    """By how much did the ground truth turn? -> turn_deg if that fits, else the likeliest angle.

    walks: paired(); 200 are enough. Sliding along walls costs the right angle a few percent, a
    wrong one fits a few percent: 80% divides them.
    """
    walks = [walk for walk in walks if walk["actions"]][:200]
    fit = turn_fit(walks, turn_deg)
    if fit is None or fit >= 0.8:
        return turn_deg
    return max((10, 15, 22.5, 30, 45, 90), key=lambda deg: turn_fit(walks, deg))


def check_turn_deg(walks, turn_deg):
    """Assert the robot's turn angle on the ground truth, before hours are spent on replaying it."""
    best = walked_turn_deg(walks, turn_deg)
    if best != turn_deg:
        raise UserError(
            f"the robot turns {turn_deg:g} degrees, but the ground truth was walked with turns of "
            f"{best:g} ({turn_fit(walks, best):.0%} of its moves fit that, "
            f"{turn_fit(walks, turn_deg):.0%} fit {turn_deg:g}); use --turn-deg {best:g} or the "
            "--robot of these episodes")


# ---------------------------------------------------------------- scenes on the disk

WHOLE_BYTES, PART_BYTES = 8 << 20, 1 << 20


def scene_hash(path):
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


def file_fault(path):
    """What the first bytes of a scene or a navmesh say is wrong with it -> words, or None."""
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


def navmesh_of(scene_id):
    return os.path.splitext(scene_id)[0] + ".navmesh"


def missing(episodes, scenes, beside=False):
    """Scenes, or the navmeshes beside them, that are not there -> Counter {file: episodes}"""
    needed = Counter(navmesh_of(e["scene_id"]) if beside else e["scene_id"] for e in episodes)
    return Counter({name: n for name, n in sorted(needed.items())
                    if not os.path.isfile(os.path.join(scenes, name))})


def damaged(episodes, scenes):
    """Scenes and navmeshes that are there and are not what they should be -> {file: words}.

    An episode with scene_sha256 was made in a scene of exactly that content.
    """
    made_in = {e["scene_id"]: e.get("scene_sha256") for e in episodes}
    found = {}
    for scene_id, known in sorted(made_in.items()):
        for name in (scene_id, navmesh_of(scene_id)):
            path = os.path.join(scenes, name)
            fault = file_fault(path) if os.path.isfile(path) else None
            if not fault and name == scene_id and known and scene_hash(path) != known:
                fault = (f"is another scene ({scene_hash(path)}) than the one that the episodes "
                         f"were made in ({known}): episodes of one world on scenes of another")
            if fault:
                found[name] = fault
    return found


def check_scenes(episodes, scenes):
    """UserError unless all scenes are there and sound -> {"count", "sha256"}: how many they are,
    and one hash of all of them and their navmeshes, by which results tell worlds apart."""
    lost = missing(episodes, scenes)
    if lost:
        raise UserError(f"{len(lost)} scenes are missing below {scenes} ({lost.total()} episodes "
                        f"are in them), the first is {next(iter(lost))}; give the folder that "
                        "scene_id starts from: --scenes")
    faults = damaged(episodes, scenes)
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


# ---------------------------------------------------------------- verifying a tree of data


def contradiction(episode, truth):
    """What does not fit, though every field is well-formed -> words for it, or None."""
    if not all(is_point(goal["position"]) for goal in episode["goals"]):
        return "a goal whose position is not finite (it cannot be reached)"
    if truth and location_steps(truth["actions"], len(truth["locations"])) is None:
        return "locations that are not one for the start and one for each forward move"
    return None


def verify(episodes, truths, scenes, turn_deg, key, subset=False):
    """Is everything there and consistent? -> (facts, problems), sentences for a person.

    truths: None for a split that has none. key: into KNOWN. subset: fewer than those are meant. A
    problem's first line says it all, further lines list what is concerned.
    """
    facts, problems = [], []
    for look in (verify_counts(episodes, KNOWN.get(key), subset),
                 verify_truths(episodes, truths, turn_deg), verify_scenes(episodes, scenes)):
        facts += look[0]
        problems += look[1]
    return facts, problems


def verify_counts(episodes, known, subset):
    """How many episodes there are, against what is known -> (facts, problems)."""
    spoken = Counter(str(e["instruction"].get("language")) for e in episodes)
    walked = {(e["scene_id"], e["trajectory_id"]) for e in episodes}
    have = f"{len(episodes):,}"
    facts = [f"{have} episodes, {len(walked):,} trajectories; " + (
        f"{known:,} episodes are known" if known else "how many there should be is not known here")]
    if set(spoken) != {"None"}:
        facts.append("languages: " + ", ".join(f"{k} {n:,}" for k, n in sorted(spoken.items())))
    if not known or known == len(episodes):
        return facts, []
    if len(episodes) > known:
        return facts, [f"{have} episodes where {known:,} are known: another release?"]
    if subset:
        return [*facts, f"a subset: {have} of {known:,} known episodes"], []
    return facts, [f"{have} of {known:,} known episodes: another release, or a subset? If a subset "
                   "is meant, say so with --subset"]


def verify_truths(episodes, truths, turn_deg):
    """Does the ground truth fit the episodes and the robot? -> (facts, problems)."""
    facts, problems, wrong = [], [], {}
    if truths is None and not any(e["goals"] for e in episodes):
        facts.append("no goals and no ground truth, as in every test split: only its server scores")
    if truths is not None:
        ids = [str(e["episode_id"]) for e in episodes]
        lost = [name for name in ids if name not in truths]
        facts.append(f"ground truth for {len(ids) - len(lost):,} of {len(ids):,}")
        if lost:
            problems.append(f"{len(lost)} episodes have no ground truth, the first is {lost[0]}")
        walks = paired(episodes, truths)
        fit, best = turn_fit(walks, turn_deg), walked_turn_deg(walks, turn_deg)
        if fit is not None:
            facts.append(f"turns of {turn_deg:g} degrees fit {fit:.1%} of the forward moves")
        if best != turn_deg:
            problems.append(f"the robot turns {turn_deg:g} degrees, but the ground truth turned "
                            f"{best:g}: choose another --robot, or record with an explicit "
                            f"--turn-deg {turn_deg:g}, which walks the expert anew")
    for episode in episodes:
        what = contradiction(episode, (truths or {}).get(str(episode["episode_id"])))
        if what:
            wrong.setdefault(what, []).append(episode["episode_id"])
    return facts, problems + [f"{len(names)} episodes have {what}, the first is {names[0]}"
                              for what, names in wrong.items()]


def verify_scenes(episodes, scenes):
    """Are the scenes there and sound, and what Matterport3D's archive has beside them?
    -> (facts, problems)."""
    problems, needed = [], {e["scene_id"] for e in episodes}
    lost, faults = missing(episodes, scenes), damaged(episodes, scenes)
    facts = [f"scenes: {len(needed) - len(lost)} of {len(needed)} below {scenes}"]
    if lost:
        problems.append("\n    ".join([
            f"{len(lost)} scenes are missing below {scenes}, {lost.total():,} episodes need them",
            *(f"{name}: {n:,} episodes" for name, n in lost.items())]))
    if faults:
        first = next(iter(faults))
        problems.append("\n    ".join([
            f"{len(faults)} files below {scenes} are damaged, the first is {first}, which "
            f"{faults[first]}", *(f"{name} {fault}" for name, fault in faults.items())]))
    here = [e for e in episodes if e["scene_id"] not in lost and e["scene_id"].startswith("mp3d/")]
    bare = missing(here, scenes, beside=True)
    if bare:
        problems.append("\n    ".join([
            f"{len(bare)} scenes have no .navmesh beside their .glb, {bare.total():,} episodes need"
            " them: download Matterport3D's habitat task data", *bare]))
    elif here:
        facts.append("a .navmesh beside every .glb")
    return facts, problems
