"""
Write the walks of a test split in the format of R2R's or RxR's leaderboard.

A test split hides its goals: evaluate.py walks it without scores, and the leaderboard's server
computes them. RxR's form is written for RxR's episodes, R2R's (VLN-CE's challenge) for all others.

Run it   python -m tools.submit results/r2r_test --out r2r_test.json
         python -m tools.submit results/rxr_test_challenge --out rxr_test_challenge.jsonl
Reads    run.json and episodes.jsonl of the folder, and the episodes that they name
Writes   --out, if every episode of the split has been walked

VLN-CE: vlnce_baselines/common/base_il_trainer.py (inference), environments.py (get_info)
"""
from __future__ import annotations

import argparse

from cli import DefaultsFormatter, UserError, run_cli, write_json, write_lines
from reward import STOP
from tools.report import read_results, write_out
from world.episodes import LANGUAGES, dataset_of, read_episodes


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.submit", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("folder", metavar="FOLDER", help="results folder of evaluate.py")
    p.add_argument("--out", metavar="FILE", required=True, help="JSON for R2R's leaderboard, JSON "
                   "lines for RxR's")
    return p.parse_args(argv)


def r2r_submission(rows: list[dict]) -> dict[str, list[dict]]:
    """VLN-CE's challenge -> {episode_id: [{"position", "heading", "stop"} ..]}: the start, then a
    record per action. stop is true only where STOP was called by a readable answer.

    >>> row = {"episode_id": 7, "end": "stop", "actions": "10",
    ...        "poses": [[0, 0, 0, 9], [0, 0, -1, 9]]}
    >>> for record in r2r_submission([row])["7"]: print(record)
    {'position': [0, 0, 0], 'heading': 9, 'stop': False}
    {'position': [0, 0, -1], 'heading': 9, 'stop': False}
    {'position': [0, 0, -1], 'heading': 9, 'stop': True}
    """
    walks = {}
    for row in rows:
        records = [{"position": position, "heading": heading, "stop": False}
                   for *position, heading in row["poses"]]
        if row["actions"].endswith(str(STOP)):
            records.append({**records[-1], "stop": row["end"] == "stop"})
        walks[str(row["episode_id"])] = records
    return walks


def rxr_submission(episodes: list[dict], rows: list[dict]) -> list[dict]:
    """RxR-Habitat -> [{"instruction_id", "path"} ..] by instruction_id. A path holds positions; a
    pose that did not move adds none."""
    walks = []
    for episode, row in zip(episodes, rows):
        path = [pose[:3] for pose in row["poses"]]
        walks.append({"instruction_id": int(episode["instruction"]["instruction_id"]),
                      "path": [p for t, p in enumerate(path) if t == 0 or p != path[t - 1]]})
    return sorted(walks, key=lambda walk: walk["instruction_id"])


def read_walks(folder: str) -> tuple[list[dict], list[dict]]:
    """-> episodes, their rows. UserError unless every episode of the split has been walked."""
    results = read_results(folder)
    settings = results.run
    if results.missing:
        raise UserError(f"{folder}: {results.missing}; run its evaluate.py command again")
    if settings["limit"]:
        raise UserError(f"{folder} was walked with --limit {settings['limit']}: a leaderboard "
                        "takes every episode of the split")
    episodes = read_episodes(settings["source"], settings["split"], settings["role"],
                             settings["languages"])
    rows = [results.rows.get(str(e["episode_id"]), {}) for e in episodes]
    lost = [e["episode_id"] for e, row in zip(episodes, rows) if not row.get("poses")]
    if lost:
        raise UserError(f"{folder}: {len(lost)} of {len(rows)} episodes have no walk on record, "
                        f"the first is {lost[0]}; evaluate them again with another --out")
    check_instruction_ids(episodes, settings["source"])
    return episodes, rows


def check_instruction_ids(episodes: list[dict], source: str):
    """UserError if an episode of RxR lacks the id by which the leaderboard knows it."""
    unknown = [e["episode_id"] for e in episodes if "instruction_id" not in e["instruction"]]
    if dataset_of(episodes[0]) == "rxr" and unknown:
        raise UserError(f"episode {unknown[0]} of {source} has no 'instruction_id', by which RxR's "
                        "leaderboard knows it: copy the episodes again")


def main(args):
    episodes, rows = read_walks(args.folder)
    rxr = dataset_of(episodes[0]) == "rxr"
    if rxr:
        write_out(args.out, rxr_submission(episodes, rows), write_lines)
    else:
        write_out(args.out, r2r_submission(rows), write_json)
    spoken = {episode["instruction"].get("language") for episode in episodes}
    print(f"{args.out}: the walks of {len(rows):,} episodes for the leaderboard" + (
        f", in {', '.join(sorted(spoken))}; it takes all of {', '.join(LANGUAGES)} in one file"
        if rxr and spoken != set(LANGUAGES) else ""))


if __name__ == "__main__":
    run_cli(main, parse_args)
