"""
Is a downloaded or generated data set all there, and does it fit together? Before hours are spent.

Reading checks every field (world/episodes.py). This adds what only the whole shows: how many
episodes the split should have, whether each has a ground truth that fits it and turns by the
robot's angle, whether every scene is on the disk and sound, and how much there is to record.

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
# CoFL's benchmarks/rxr_1600 count it. A split that is not here is reported, not asserted.
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
    """Sentences for a person. The first line of a problem is complete; further lines are a list."""
    facts: list
    problems: list


def verify(episodes: list[dict], truths: dict | None, scenes: str, turn_deg: float,
           key: tuple | None, subset: bool = False) -> Report:
    """Is everything there and consistent? truths: None for a split that has none. key: into
    KNOWN. subset: fewer episodes than those are meant."""
    parts = (verify_counts(episodes, KNOWN.get(key), subset),
             verify_truths(episodes, truths, turn_deg), verify_scenes(episodes, scenes))
    return Report(*(sum(lists, []) for lists in zip(*parts)))


def verify_counts(episodes: list[dict], known: int | None, subset: bool) -> Report:
    """How many episodes there are, against what is known."""
    languages = Counter(str(e["instruction"].get("language")) for e in episodes)
    walked = {(e["scene_id"], e["trajectory_id"]) for e in episodes}
    have = f"{len(episodes):,}"
    facts = [f"{have} episodes, {len(walked):,} trajectories; " + (
        f"{known:,} episodes are known" if known else "how many there should be is not known here")]
    if set(languages) != {"None"}:
        facts.append("languages: " + ", ".join(f"{k} {n:,}" for k, n in sorted(languages.items())))
    if not known or known == len(episodes):
        return Report(facts, [])
    if len(episodes) > known:
        return Report(facts, [f"{have} episodes where {known:,} are known: another release?"])
    if subset:
        return Report([*facts, f"a subset: {have} of {known:,} known episodes"], [])
    return Report(facts, [f"{have} of {known:,} known episodes: another release, or a subset? If a "
                          "subset is meant, use python -m tools.verify with --subset"])


def verify_truths(episodes: list[dict], truths: dict | None, turn_deg: float) -> Report:
    """Does the ground truth fit the episodes and the robot?"""
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
                            f"--turn-deg {turn_deg:g}: then the expert walks, with these turns")
    for episode in episodes:
        what = contradiction(episode, (truths or {}).get(str(episode["episode_id"])))
        if what:
            wrong.setdefault(what, []).append(episode["episode_id"])
    return Report(facts, problems + [f"{len(names)} episodes have {what}, the first is {names[0]}"
                                     for what, names in wrong.items()])


def contradiction(episode: dict, truth: dict | None) -> str | None:
    """What does not fit, though every field is well-formed -> words for it, or None."""
    if not all(is_point(goal["position"]) for goal in episode["goals"]):
        return "a goal whose position is not finite (it cannot be reached)"
    if truth and location_steps(truth["actions"], len(truth["locations"])) is None:
        return "locations that are not one for the start and one for each forward move"
    return None


def verify_scenes(episodes: list[dict], scenes: str) -> Report:
    """Are the scenes there and sound, and the navmeshes that Matterport3D's archive has?"""
    problems, needed = [], {e["scene_id"] for e in episodes}
    lost, faults = missing_scenes(episodes, scenes), damaged_scenes(episodes, scenes)
    facts = [f"scenes: {len(needed) - len(lost)} of {len(needed)} below {scenes}"]
    if lost:
        problems.append("\n    ".join([
            f"{len(lost)} scenes are missing below {scenes}, {sum(lost.values()):,} episodes need "
            "them",
            *(f"{name}: {n:,} episodes" for name, n in lost.items())]))
    if faults:
        first = next(iter(faults))
        problems.append("\n    ".join([
            f"{len(faults)} files below {scenes} are damaged, the first is {first}, which "
            f"{faults[first]}", *(f"{name} {fault}" for name, fault in faults.items())]))
    here = [e for e in episodes if e["scene_id"] not in lost and e["scene_id"].startswith("mp3d/")]
    bare = missing_scenes(here, scenes, navmeshes=True)
    if bare:
        problems.append("\n    ".join([
            f"{len(bare)} scenes have no .navmesh beside their .glb, {sum(bare.values()):,} "
            "episodes need them: download Matterport3D's habitat task data", *bare]))
    elif here:
        facts.append("a .navmesh beside every .glb")
    return Report(facts, problems)


# ---------------------------------------------------------------- the command


def find_truths(args, episodes: list[dict]) -> tuple[dict | None, Report]:
    """The ground truth, or None, and what there is to report about it."""
    which, goals = (args.episodes, args.split, args.role), any(e["goals"] for e in episodes)
    if args.expert == "walk" and find_ground_truth(*which):
        return None, Report(["the ground truth is not read: --expert walk does not need it"], [])
    try:
        truths = None if args.expert == "walk" else read_ground_truth(*which, optional=True)
    except UserError as error:
        return None, Report([], [str(error)])
    if truths is not None or not goals:
        return truths, Report([], [])
    fact = ("no ground truth here; goals are there: SR, NE, SPL can be measured, nDTW cannot, "
            "record with --expert walk")
    return None, Report([fact], [] if args.expert == "walk" else [
        f"{no_ground_truth(*which)}, or record with --expert walk, which needs none"])


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
    dataset = args.robot or dataset_of(episodes[0])
    robot, scenes = robot_from_args(args, ROBOTS[dataset]), args.scenes or scenes_of(args.episodes)
    truths, notes = find_truths(args, episodes)
    walks = paired(episodes, truths or {})
    expert = choose_expert(args, walks, robot, dataset)
    turn_deg = walked_turn_deg(walks, robot["turn_deg"]) if expert.new_angle else robot["turn_deg"]
    subset = getattr(args, "subset", False)                     # make_data.py --verify has no such
    report = verify(episodes, truths, scenes, turn_deg, known_key(args, dataset), subset)
    report = Report(report.facts + notes.facts, notes.problems + report.problems)

    frames = 0
    if not report.problems and any(e["goals"] for e in episodes):       # none: it is a test split
        planned, _ = plan_walks(episodes, truths or {}, expert, args)
        frames = sum(len(walk["actions"] or ()) for walk in planned)
    if expert.new_angle:
        report.facts.append(f"the expert will walk, with turns of {robot['turn_deg']:g} degrees")
    elif frames:
        report.facts.append(f"to record: {frames:,} frames, " + (
            f"some {frames * FRAME_BYTES / 1e9:.1f} GB as JPEG of quality 90; " if dataset !=
            "houses" else "") + "hours: frames / 3600 / frames_per_s of `python -m world.check` / "
            "--sims")
    print("\n".join([f"{args.episodes}, split {args.split}, robot {dataset}:", *(
        f"  {fact}" for fact in report.facts), *(f"! {problem}" for problem in report.problems)]))
    if report.problems:
        raise UserError("; ".join(p.split("\n")[0] for p in report.problems) +
                        ": mend that before recording")
    print("all there")


if __name__ == "__main__":
    run_cli(main, parse_args)
