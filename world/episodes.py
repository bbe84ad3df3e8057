"""
Episodes: what a robot is told, where it starts, where it should arrive; read, and verified.

One reader for three makers, whose files are taken as they are downloaded (VLN-CE's layout [1]):

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

verify() looks at all this before hours are spent (`python make_data.py --verify`).

[1] https://github.com/jacobkrantz/VLN-CE, README "Data" and habitat_extensions/task.py
"""
import argparse
import gzip
import json
import math
import os
import zlib
from collections import Counter

from cli import UserError
from reward import FORWARD, LEFT, RIGHT, STOP

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


# ---------------------------------------------------------------- reading


def read_json_gz(folder, split, role, ending, what):
    """A split's file in VLN-CE's layout (or `folder` itself, if that is a file) -> (path, data)."""
    stems = [f"{split}_{role}"] if role else [split, f"{split}_guide"]
    names = [f"{below}{stem}{ending}.json.gz" for stem in stems for below in (f"{split}/", "")]
    paths = [folder] if os.path.isfile(folder) else [os.path.join(folder, n) for n in names]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"no {what} of split {split!r} found: looked for {', '.join(paths)}; point "
                        "--episodes at the folder that holds them (houses.py makes one)" + (
                            "; the plain R2R_VLNCE_v1-3 has no ground truth, its _preprocessed twin"
                            " has, and --expert walk needs none" if ending else ""))
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            return path, json.load(f)  # RxR's timed_instruction holds NaN; json.load takes it
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is truncated or not gzip ({error}); copy it again") from None
    except ValueError as error:  # bad JSON, bad UTF-8
        raise UserError(f"{path} is not JSON inside ({error}); copy it again") from None


def hides_goals(split):
    """test (R2R) and test_challenge (RxR): only their servers know the goals and the walks."""
    return split.startswith("test")


def read_episodes(path, split, role=None, languages=None):
    """R2R_VLNCE_v1-3 or RxR_VLNCE_v0 episodes, ours included -> list of dicts, as in the file.

    Ids stay what they are (R2R int, RxR str). What changes: white space of instructions is made
    single, since 10,811 of R2R's 10,819 end in a blank; timed_instruction goes; scene_id starts
    below the folder of scenes, as VLN-CE has it; goals are [] where a test split hides them.
    """
    path, data = read_json_gz(path, split, role, "", "episodes")
    episodes = data.get("episodes") if isinstance(data, dict) else None
    if not isinstance(episodes, list) or not episodes:
        raise UserError(f"{path} has no list 'episodes'; is it an R2R_VLNCE or RxR_VLNCE file?")
    sizes = {"episode_id": None, "scene_id": None, "start_position": 3, "start_rotation": 4,
             "instruction": None, **({} if hides_goals(split) else {"goals": None})}
    for i, episode in enumerate(episodes):
        name = f"{path}: episode {episode.get('episode_id', f'number {i}')}"
        for field, size in sizes.items():
            value = episode.get(field)
            if value is None or value == [] or (size and len(value) != size):
                raise UserError(f"{name} has no good {field!r} ({value!r}); repair or remove it")
        instruction = episode["instruction"]
        text = instruction.get("instruction_text")
        if not text or not text.strip():
            raise UserError(f"{name} has no 'instruction_text'; repair or remove it")
        instruction["instruction_text"] = " ".join(text.split())
        instruction.pop("timed_instruction", None)
        episode["scene_id"] = episode["scene_id"].removeprefix("data/scene_datasets/")
        episode["goals"] = episode.get("goals") or []
        if episode.get("trajectory_id") is None:
            episode["trajectory_id"] = episode["episode_id"]
    if languages:
        held = Counter(str(e["instruction"].get("language")) for e in episodes)
        episodes = [e for e in episodes if e["instruction"].get("language") in languages]
        if not episodes:
            raise UserError(f"{path} has no instruction in {', '.join(languages)} (it has "
                            f"{', '.join(sorted(held))}); change --languages, or leave it out")
    return episodes


def read_ground_truth(path, split, role=None):
    """-> {str(episode_id): {"actions": [.., 0], "locations": [[x, y, z]..], "forward_steps": n}}.

    locations: the start and the place after every forward move, so forward_steps + 1 of them.
    """
    path, truths = read_json_gz(path, split, role, "_gt", "ground truth")
    for key, truth in truths.items():
        actions, locations = truth.get("actions") or [], truth.get("locations") or []
        if actions[-1:] != [STOP] or not set(actions[:-1]) <= {FORWARD, LEFT, RIGHT}:
            raise UserError(f"{path}: 'actions' of {key} must be 1, 2, 3 and one 0 at the end; "
                            "repair or remove it")
        if not locations or any(len(place) != 3 for place in locations):
            raise UserError(f"{path}: 'locations' of {key} must be a list of [x, y, z]; repair or "
                            "remove it")
    return truths


def dataset_of(episode):
    """Whose episode is it? -> a row of sim.ROBOTS."""
    if episode["scene_id"].startswith("houses/"):
        return "houses"
    return "rxr" if "language" in episode["instruction"] else "r2r"


def scenes_of(folder):
    """Where the scenes of that folder's episodes are, unless --scenes says otherwise."""
    own = os.path.join(folder, "scenes")
    return own if os.path.isdir(own) else "data/scene_datasets"


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


# ---------------------------------------------------------------- verifying a tree of data


def missing(episodes, scenes, ending=None):
    """Scenes that are not there (or files beside them, by their ending) -> Counter {file: episodes}
    """
    needed = Counter(e["scene_id"] if ending is None else
                     os.path.splitext(e["scene_id"])[0] + ending for e in episodes)
    return Counter({name: n for name, n in sorted(needed.items())
                    if not os.path.isfile(os.path.join(scenes, name))})


def check_scenes(episodes, scenes):
    lost = missing(episodes, scenes)
    if lost:
        raise UserError(f"{len(lost)} scenes are missing below {scenes} ({lost.total()} episodes "
                        f"are in them), the first is {next(iter(lost))}; give the folder that "
                        "scene_id starts from: --scenes")


def all_finite(numbers):
    return all(math.isfinite(v) for v in numbers)


def bad_numbers(episode, truth):
    """What is wrong with an episode's numbers -> a word for it, or None."""
    places = [episode["start_position"], *(goal["position"] for goal in episode["goals"]),
              *(episode.get("reference_path") or ()), *(truth["locations"] if truth else ())]
    if not all(map(all_finite, places)):
        return "a position that is not finite"
    if not abs(math.hypot(*episode["start_rotation"]) - 1) < 1e-3:
        return "a start_rotation that is not of unit length"
    if truth and location_steps(truth["actions"], len(truth["locations"])) is None:
        return "locations that are not one for the start and one for each forward move"
    return None


def verify(episodes, truths, scenes, turn_deg, key):
    """Is everything there and consistent? -> (facts, problems), sentences for a person.

    truths: None for a split that has none. key: into KNOWN. A problem's first line says it all,
    further lines list what is concerned.
    """
    facts, problems = [], []
    ids = Counter(str(e["episode_id"]) for e in episodes)
    spoken = Counter(e["instruction"].get("language") for e in episodes)
    walked = {(e["scene_id"], e["trajectory_id"]) for e in episodes}

    # 1. the counts
    known = KNOWN.get(key)
    facts.append(f"{len(episodes):,} episodes, {len(walked):,} trajectories; " + (
        f"{known:,} episodes are known" if known else "how many there should be is not known here"))
    if set(spoken) != {None}:
        facts.append("languages: " + ", ".join(f"{k} {n:,}" for k, n in sorted(spoken.items())))
    if known and known != len(episodes):
        problems.append(f"{len(episodes):,} episodes where {known:,} are known: another release?")
    twice = [name for name, n in ids.items() if n > 1]
    if twice:
        problems.append(f"{len(twice)} episode ids are not unique, the first is {twice[0]}")

    # 2. the ground truth, and the numbers
    if truths is None:
        facts.append("no goals and no ground truth, as in every test split: only its server scores")
    else:
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
    wrong = {}
    for episode in episodes:
        what = bad_numbers(episode, (truths or {}).get(str(episode["episode_id"])))
        if what:
            wrong.setdefault(what, []).append(episode["episode_id"])
    problems += [f"{len(names)} episodes have {what}, the first is {names[0]}"
                 for what, names in wrong.items()]

    # 3. the scenes, and what Matterport3D's archive has beside them
    needed = {e["scene_id"] for e in episodes}
    lost = missing(episodes, scenes)
    facts.append(f"scenes: {len(needed) - len(lost)} of {len(needed)} below {scenes}")
    if lost:
        problems.append("\n    ".join([
            f"{len(lost)} scenes are missing below {scenes}, {lost.total():,} episodes need them",
            *(f"{name}: {n:,} episodes" for name, n in lost.items())]))
    here = [e for e in episodes if e["scene_id"] not in lost and e["scene_id"].startswith("mp3d/")]
    bare = missing(here, scenes, ".navmesh")
    if bare:
        problems.append("\n    ".join([
            f"{len(bare)} scenes have no .navmesh beside their .glb, {bare.total():,} episodes need"
            " them: download Matterport3D's habitat task data", *bare]))
    elif here:
        facts.append("a .navmesh beside every .glb")
    return facts, problems
