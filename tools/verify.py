"""
Is a downloaded or generated data set complete and consistent?

Reading checks every field (world/episodes.py). This adds: how many episodes the split should have,
whether each has a ground truth that fits it and turns by the robot's angle, whether every scene is
on the disk and sound, and how much there is to record.

Run it   python -m tools.verify --episodes data/datasets/R2R_VLNCE_v1-3_preprocessed --split train
         python make_data.py --verify ..                 # the same, with the flags of a recording
Reads    --episodes, --scenes;  writes nothing
Expect   facts, then "all there"; or a line beginning with ! for each problem, and exit status 2
"""
from __future__ import annotations

import argparse
from collections import Counter
from typing import NamedTuple

from cli import DefaultsFormatter, UserError, positive_int, run_cli
from make_data import FRAME_BYTES, add_expert_args, choose_expert, plan_walks
from world.episodes import (
    add_episode_args,
    damaged_scenes,
    dataset_of,
    find_ground_truth,
    is_point,
    location_steps,
    missing_scenes,
    no_ground_truth,
    paired,
    read_episodes,
    read_ground_truth,
    scenes_of,
    turn_fit,
    walked_turn_deg,
)
from world.robots import ROBOTS, add_robot_args, robot_from_args

# Episodes per (data set, split, role, languages). R2R: VLN-CE's data page,
# https://jacobkrantz.github.io/vlnce/data (61, 53, 11 and 18 scenes). RxR: val_unseen's guide file
# has 11,006 records, 3,669 of them English, as github.com/jzhzhang/NaVid-VLN-CE/issues/58 and
# CoFL's benchmarks/rxr_1600 count it.
ENGLISH = ("en-IN", "en-US")
KNOWN = {("r2r", "train", None, None): 10819, ("r2r", "val_seen", None, None): 778,
         ("r2r", "val_unseen", None, None): 1839, ("r2r", "test", None, None): 3408,
         ("rxr", "val_unseen", "guide", None): 11006, ("rxr", "val_unseen", "guide", ENGLISH): 3669}


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.verify", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    add = p.add_argument_group("files").add_argument
    add("--episodes", default="data/houses", help="folder with <split>/<split>.json.gz and its _gt")
    add("--split", default="train")
    add_episode_args(add)
    add("--scenes", help="folder that scene_id starts from; default: <episodes>/scenes if it is "
        "there, else data/scene_datasets")
    add("--limit", type=positive_int, help="only the first N episodes")
    add("--subset", action="store_true", help="fewer episodes than the published split has are "
        "meant")
    add = p.add_argument_group("recording").add_argument
    add_expert_args(add)
    add_robot_args(add, "that of the episodes' data set")
    return p.parse_args(argv)


class Report(NamedTuple):
    """What was found. The first line of a problem is a whole sentence; further lines are a list."""
    facts: list[str]
    problems: list[str]


def verify(episodes: list[dict], truths: dict | None, scenes: str, turn_deg: float,
           key: tuple | None, subset: bool = False) -> Report:
    """Is everything there and consistent? truths: None for a split that has none. key: into
    KNOWN. subset: fewer episodes than those are meant."""
    report = Report([], [])
    verify_counts(report, episodes, KNOWN.get(key), subset)
    verify_truths(report, episodes, truths, turn_deg)
    verify_scenes(report, episodes, scenes)
    return report


def verify_counts(report: Report, episodes: list[dict], known: int | None, subset: bool):
    """How many episodes there are, against what is known."""
    facts, problems = report
    languages = Counter(str(e["instruction"].get("language")) for e in episodes)
    walked = {(e["scene_id"], e["trajectory_id"]) for e in episodes}
    have = f"{len(episodes):,}"
    facts.append(f"{have} episodes, {len(walked):,} trajectories; " + (
        f"{known:,} episodes are known" if known else "how many there should be is not known here"))
    if set(languages) != {"None"}:
        facts.append("languages: " + ", ".join(f"{k} {n:,}" for k, n in sorted(languages.items())))
    if known and len(episodes) > known:
        problems.append(f"{have} episodes where {known:,} are known: another release?")
    elif known and len(episodes) < known and subset:
        facts.append(f"a subset: {have} of {known:,} known episodes")
    elif known and len(episodes) < known:
        problems.append(f"{have} of {known:,} known episodes: another release, or a subset? If a "
                        "subset is meant, use python -m tools.verify with --subset")


def verify_truths(report: Report, episodes: list[dict], truths: dict | None, turn_deg: float):
    """Does the ground truth fit the episodes and the robot?"""
    facts, problems = report
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
                            f"{best:g}: choose another --robot, or record with --turn-deg "
                            f"{turn_deg:g}: then the expert walks, with these turns")
    wrong = {}
    for episode in episodes:
        problem = contradiction(episode, (truths or {}).get(str(episode["episode_id"])))
        if problem:
            wrong.setdefault(problem, []).append(episode["episode_id"])
    problems.extend(f"{len(names)} episodes have {problem}, the first is {names[0]}"
                    for problem, names in wrong.items())


def contradiction(episode: dict, truth: dict | None) -> str | None:
    """What does not fit, though every field by itself is valid; or None."""
    if not all(is_point(goal["position"]) for goal in episode["goals"]):
        return "a goal whose position is not finite (it cannot be reached)"
    if truth and location_steps(truth["actions"], len(truth["locations"])) is None:
        return "locations that are not one for the start and one for each forward move"
    return None


def verify_scenes(report: Report, episodes: list[dict], scenes: str):
    """Are the scenes there and sound, and the navmeshes that Matterport3D's archive has?"""
    def add(sentence, lines):
        report.problems.append("\n    ".join([sentence, *lines]))

    needed = {e["scene_id"] for e in episodes}
    lost, faults = missing_scenes(episodes, scenes), damaged_scenes(episodes, scenes)
    report.facts.append(f"scenes: {len(needed) - len(lost)} of {len(needed)} below {scenes}")
    if lost:
        add(f"{len(lost)} scenes are missing below {scenes}, {sum(lost.values()):,} episodes need "
            "them", [f"{name}: {n:,} episodes" for name, n in lost.items()])
    if faults:
        lines = [f"{name} {fault}" for name, fault in faults.items()]
        add(f"{len(faults)} files below {scenes} are damaged, the first is {lines[0]}", lines)
    here = [e for e in episodes if e["scene_id"] not in lost and e["scene_id"].startswith("mp3d/")]
    bare = missing_scenes(here, scenes, navmeshes=True)
    if bare:
        add(f"{len(bare)} scenes have no .navmesh beside their .glb, {sum(bare.values()):,} "
            "episodes need them: download Matterport3D's habitat task data", bare)
    elif here:
        report.facts.append("a .navmesh beside every .glb")


# ---------------------------------------------------------------- the command


def find_truths(report: Report, args, episodes: list[dict]) -> dict | None:
    """The ground truth, or None; reports when there is none."""
    facts, problems = report
    which, walk = (args.episodes, args.split, args.role), args.expert == "walk"
    try:
        if walk and find_ground_truth(*which):
            facts.append("the ground truth is not read: --expert walk does not need it")
            return None
        truths = None if walk else read_ground_truth(*which, optional=True)
    except UserError as error:
        problems.append(str(error))
        return None
    if truths is None and any(e["goals"] for e in episodes):
        facts.append("no ground truth here; goals are there: SR, NE, SPL can be measured, nDTW "
                     "cannot, record with --expert walk")
        if not walk:
            problems.append(f"{no_ground_truth(*which)}, or record with --expert walk, which needs "
                            "none")
    return truths


def known_key(args, dataset: str) -> tuple | None:
    """The key into KNOWN of what the flags ask for; None if they ask for a part."""
    if args.limit:
        return None
    if dataset != "rxr":
        return dataset, args.split, None, None
    return dataset, args.split, args.role or "guide", args.languages and tuple(args.languages)


def main(args):
    """Print the facts and the problems; UserError if there is a problem."""
    episodes = read_episodes(args.episodes, args.split, args.role, args.languages)[:args.limit]
    dataset, scenes = dataset_of(episodes[0]), args.scenes or scenes_of(args.episodes)
    robot = robot_from_args(args, ROBOTS[args.robot or dataset])
    found = Report([], [])
    truths = find_truths(found, args, episodes)
    expert = choose_expert(args, paired(episodes, truths or {}), robot, dataset)
    turn_deg = robot["turn_deg"]
    if expert.new_angle:
        turn_deg = walked_turn_deg(paired(episodes, truths or {}), turn_deg)
    subset = getattr(args, "subset", False)                     # make_data.py --verify has no such
    report = verify(episodes, truths, scenes, turn_deg, known_key(args, dataset), subset)
    report = Report(report.facts + found.facts, found.problems + report.problems)

    frames = 0
    if not report.problems and any(e["goals"] for e in episodes):       # none: it is a test split
        planned, _ = plan_walks(episodes, truths or {}, expert, args)
        frames = sum(len(walk["actions"] or ()) for walk in planned)
    if expert.new_angle:
        report.facts.append(f"the expert will walk, with turns of {robot['turn_deg']:g} degrees")
    elif frames:
        size = "" if dataset == "houses" else (
            f"some {frames * FRAME_BYTES / 1e9:.1f} GB as JPEG of quality 90; ")
        report.facts.append(f"to record: {frames:,} frames, {size}hours: frames / 3600 / "
                            "frames_per_s of `python -m world.check` / --sims")
    print("\n".join([f"{args.episodes}, split {args.split}, robot {dataset}:", *(
        f"  {fact}" for fact in report.facts), *(f"! {problem}" for problem in report.problems)]))
    if report.problems:
        raise UserError("; ".join(p.split("\n")[0] for p in report.problems) +
                        ": repair that before recording")
    print("all there")


if __name__ == "__main__":
    run_cli(main, parse_args)
