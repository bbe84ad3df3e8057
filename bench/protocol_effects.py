"""
What the details of a protocol are worth: one fixed policy, one detail changed at a time.

Changes of the robot (camera angle, turn angle, sliding) walk all episodes again with the policy as
it is: its prompt goes on to name the turns that it was trained with, which is what happens when an
evaluator's robot is not that of the training data. With --sim-command habitat-sim walks some of
the episodes as well. The other changes (step cap, radius, nDTW, what becomes of episodes without a
result) follow from the episodes of the first run. Differences are paired: the same episodes, the
same policy, greedy. Intervals: a bootstrap over scenes.

Run it   python bench/protocol_effects.py --ckpt ckpt/sft --out results/effects
         python bench/protocol_effects.py .. --doc docs/protocol_effects.md       # write the page
         python bench/protocol_effects.py .. --sim-command "$HABITAT -m world.worker"
Writes   --out: a results folder per robot; the same command goes on after a kill
Expect   a table. 1,200 walks of the demo's policy take some 3 minutes of one core, times four
"""
from __future__ import annotations

import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import evaluate  # noqa: E402
from cli import DefaultsFormatter, positive_int, read_json, run_cli, write_text  # noqa: E402
from evaluate import AT_RADIUS, evenly_spaced, known_rows  # noqa: E402
from tools.report import paired_difference  # noqa: E402
from world.episodes import read_ground_truth, scenes_of  # noqa: E402
from world.protocol import format_card  # noqa: E402

CAP = 501                                    # the first run's; the largest cap of docs/protocols
ROBOTS = {"HFOV 79 degrees, not 90": {"hfov_deg": 79}, "turns of 15 degrees, not 30": {
    "turn_deg": 15}, "no sliding along walls": {"sliding": False}}
METRICS = {"success": "SR", "spl": "SPL", "distance_to_goal": "NE (m)", "ndtw": "nDTW"}
LOST = 0.02                                  # share of episodes in the last two rows
PAGE = """# What are we benchmarking?

How much do the details of a protocol change the result of one and the same policy? One policy
of the houses (SFT, tiny, on a CPU), the same episodes, greedy; one detail changed at a time,
and the difference to the first run, with its 95% interval (a bootstrap over houses).
[evaluation.md](evaluation.md) says which published protocol has which detail. The houses are
small and these figures hold for them; on R2R, where walks are longer and rooms are cluttered,
the same details can be worth more or less.

```bash
{command}
```

<!-- protocol-effects -->
{table}
<!-- /protocol-effects -->

The policy's prompt goes on to name turns of 30 degrees where the simulator turns 15: that is
what a mismatch between training data and evaluator does. The row of habitat-sim has the same
robot and the same rules; what differs is how pixels are rendered and how a body slides along a
wall ([habitat.md](habitat.md) has both in numbers). Episodes without a result are not an
effect of the policy at all: their rows show what becomes of the means if 2% of the episodes,
evenly spaced, were lost and then counted.
"""


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    p.add_argument("--ckpt", default="ckpt/sft")
    p.add_argument("--episodes", default="data/houses")
    p.add_argument("--split", default="val_unseen")
    p.add_argument("--limit", type=positive_int, default=1200)
    p.add_argument("--sims", type=positive_int, default=8)
    p.add_argument("--sim-command", metavar="CMD", help="how a habitat-sim is started, as in "
                   "docs/habitat.md: adds its row")
    p.add_argument("--habitat-limit", type=positive_int, default=200, help="episodes of that row, "
                   "evenly spaced")
    p.add_argument("--out", default="results/effects")
    p.add_argument("--doc", metavar="FILE.md", help="also write the page of docs/")
    return p.parse_args(argv)


def walk(args, name: str, changes: dict, *flags) -> dict[str, dict]:
    """Evaluate with a changed robot -> rows by id. evaluate.py refuses a robot that is not the
    checkpoint's, so this replaces the function that chooses it. flags: of evaluate.py, also."""
    chosen, out = evaluate.choose_robot, os.path.join(args.out, name)
    evaluate.choose_robot = lambda *given: {**chosen(*given), **changes}
    try:
        evaluate.main(evaluate.parse_args([
            "--ckpt", args.ckpt, "--episodes", args.episodes, "--split", args.split, "--limit",
            str(args.limit), "--sims", str(args.sims), "--max-actions", str(CAP), "--out", out,
            *flags]))
    finally:
        evaluate.choose_robot = chosen
    return known_rows(out)


# ---------------------------------------------------------------- changes that need no walking


def with_success(row: dict, success: bool) -> dict:
    """The row with another success, and SPL and SDTW that follow from it."""
    if success == row["success"]:
        return row
    longer = max(row["start_distance"], row["path_length"])
    return {**row, "success": float(success), "sdtw": success * row["ndtw"],
            "spl": success * row["start_distance"] / longer if longer else float(success)}


def capped(row: dict, cap: int) -> dict:
    """A walk that needs more actions than the cap fails. Its NE and nDTW, which would be those at
    the cap, are left out."""
    return with_success(row, False) | {"distance_to_goal": None, "ndtw": None} if (
        row["steps"] > cap) else row


def fast_ndtw(row: dict, reference: list, within: float = 3.0) -> float:
    """nDTW with fastdtw, VLN-CE's approximation."""
    from fastdtw import fastdtw
    path = [pose[:3] for pose in row["poses"]]
    moved = [p for t, p in enumerate(path) if t == 0 or p != path[t - 1]]
    cost = fastdtw(moved, reference, dist=lambda a, b: float(np.linalg.norm(np.subtract(a, b))))[0]
    return round(float(np.exp(-cost / (len(reference) * within))), 6)          # as in a row


def changed_rows(rows: dict[str, dict], truths: dict, radius: float) -> dict[str, dict]:
    """{change: rows by id} of all changes that follow from the rows of the first run."""
    def every(change):
        return {name: change(row) for name, row in rows.items()}
    lost = set(evenly_spaced(list(rows), round(LOST * len(rows))))
    failed = {"success": 0.0, "spl": 0.0, "sdtw": 0.0}
    return {
        "at most 500 actions, not 501": every(lambda row: capped(row, 500)),
        "at most 400 actions, not 501": every(lambda row: capped(row, 400)),
        "success if d <= radius, not <": every(lambda row: with_success(
            row, row["end"] == "stop" and row["distance_to_goal"] is not None
            and row["distance_to_goal"] <= radius)),
        "nDTW by fastdtw": {name: {**row, "ndtw": fast_ndtw(row, truths[name]["locations"])}
                            for name, row in rows.items()},
        f"{LOST:.0%} unfinished, counted as failed": {
            name: {**row, **failed} if name in lost else row for name, row in rows.items()},
        f"{LOST:.0%} without a distance, NaN counted as 0": {
            name: {**row, **failed, "distance_to_goal": 0.0} if name in lost else row
            for name, row in rows.items()}}


# ---------------------------------------------------------------- the table


def cell(before: dict, after: dict, metric: str) -> str:
    """+0.010 [+0.005, +0.015], or what was not changed."""
    both = [name for name in before if name in after
            and None not in (before[name].get(metric), after[name].get(metric))]
    if all(before[name][metric] == after[name][metric] for name in both):
        return "0"
    found = paired_difference(before, after, metric)
    low, high = found["ci"] or (found["difference"],) * 2
    return f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def make_table(rows: dict[str, dict], changes: dict[str, dict]) -> str:
    """The table in Markdown. An episode counts as changed if a metric of its row is another."""
    keys = [*METRICS, *AT_RADIUS]
    means = [np.mean([row[key] for row in rows.values() if row.get(key) is not None])
             for key in METRICS]
    lines = [f"| change | episodes changed | {' | '.join(METRICS.values())} |",
             "|---|---|" + "---|" * len(METRICS),
             f"| none: the first run, {len(rows):,} episodes | | "
             + " | ".join(f"{mean:.3f}" for mean in means) + " |"]
    for title, after in changes.items():
        number = sum(any(rows[name].get(key) != after[name].get(key) for key in keys)
                     for name in rows if name in after)
        cells = [cell(rows, after, metric) for metric in METRICS]
        lines.append(f"| {title} | {number:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def command_of(args) -> str:
    """The command that writes the page."""
    flags = ["--ckpt", args.ckpt, "--episodes", args.episodes, "--limit", str(args.limit)]
    if args.sim_command:
        flags += ["--sim-command", '"$HABITAT -m world.worker"']
    return " ".join(["python bench/protocol_effects.py", *flags, "--doc", args.doc])


def main(args):
    base = walk(args, "base", {})
    rows = {name: row for name, row in base.items() if "success" in row}
    changes = {title: walk(args, "_".join(change), change) for title, change in ROBOTS.items()}
    if args.sim_command:
        found = walk(args, "habitat", {}, "--sim", "habitat", "--sim-command", args.sim_command,
                     "--scenes", os.path.abspath(scenes_of(args.episodes)), "--sims", "2",
                     "--limit", str(args.habitat_limit))
        name = read_json(os.path.join(args.out, "habitat", "simulator.json"))["simulator"]
        changes[f"{name}, not our simulator ({len(found):,} episodes)"] = found
    run = read_json(os.path.join(args.out, "base", "run.json"))
    truths = read_ground_truth(args.episodes, args.split, run["role"])
    changes |= changed_rows(rows, truths, run["radius_m"])
    table = make_table(rows, changes)
    print(table)
    if args.doc:
        card = format_card(read_json(os.path.join(args.out, "base", "protocol.json")))
        write_text(args.doc, PAGE.format(table=f"{table}\n\n```\n{card}\n```",
                                         command=command_of(args)))
    return table


if __name__ == "__main__":
    run_cli(main, parse_args)
