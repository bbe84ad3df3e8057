"""
The tables of docs/evidence.md, recomputed from docs/evidence/*.jsonl.gz by the standard library
alone: nothing of the evaluator is imported, so that it checks what the evaluator wrote.

Each run is compared with the SFT policy that it started from, with GRPO on own walks, or, in an
ablation, with the paper's choice, on the same episodes. Intervals (95%) are of a bootstrap:
`diff_ci` draws houses, each with all its episodes and runs; `both_ci` draws SFT seeds as well, and
for each its seeds of stage two, so that it holds the spread between trainings, too (not of one
run).

Run it   python bench/evidence_table.py            print the table
         python bench/evidence_table.py --out docs/results/evidence.json
Reads    docs/evidence/RUN.jsonl.gz (RUN: row_SFTSEED_SEED, or start_SFTSEED), minutes.json
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from collections import defaultdict

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs",
                      "evidence")
RESAMPLES = 2000
# A table's title, and what its rows are compared with; by the first word of the row's name.
TABLES = {
    "stage": ("stage two, against the SFT policy", "start_{}"),
    "own_high": ("stage two, against GRPO on own walks with the same seeds and rounds", ""),
    "reward": ("rewards, against the time-decayed one", "own_high_{}_{}"),
    "group": ("plans per prompt, against 8", "own_high_{}_{}"),
    "muon": ("stage two after SFT with Muon, against that policy", "muon_start_{}_0"),
    "online": ("GRPO on walks in the simulator, dialogs, against the policy before it",
               "online_start_{}_0"),
    "memory": ("memories, against Long-Short Memory", "memory_lsm_{}_0"),
    "horizon": ("actions per answer, against 6", "horizon_6_{}_0"),
    "transfer": ("transfer, against the policy before it", "transfer_start_{}_0"),
    "kept": ("the transferred policies where they came from", "start_{}"),
}
# The paper's success rate with that choice, in per cent: 7B on R2R-CE val_unseen; transfer: RxR-CE,
# where its SFT on the target had all of the target's data and not a tenth.
PAPER = {
    "reward": {"own_high": 30.2, "reward_linear": 28.3, "reward_uniform": 25.0,
               "reward_hard": 23.8},
    "group": {"own_high": 30.2, "group_4": 26.5, "group_2": 24.7},
    "memory": {"memory_lsm": 24.9, "memory_exponential": 23.8, "memory_even": 22.0,
               "memory_even_half": 20.8},
    "horizon": {"horizon_1": 15.1, "horizon_6": 24.9, "horizon_8": 22.7},
    "transfer": {"transfer_start": 14.9, "transfer_sft": 19.5, "transfer_expert": 22.7},
}
# Rows that go on from another row's policy: its minutes count, too.
EARLIER = {"own2": "own_high", "own3": "own2", "dagger2": "dagger", "dagger_own": "dagger"}
# The rows of two rounds that are compared with two rounds of GRPO on own walks.
TWO_ROUNDS = ("dagger2", "dagger_own")


def read_run(folder: str, name: str) -> dict[str, dict]:
    """{episode id: row} of one run. ValueError if an episode has no score, or two rows."""
    with gzip.open(os.path.join(folder, f"{name}.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    found = {row["episode_id"]: row for row in rows}
    unscored = [row["episode_id"] for row in rows if row["success"] not in (0, 1)]
    if unscored or len(found) < len(rows):
        raise ValueError(f"{name}: {unscored or 'some episodes twice'} cannot be compared")
    return found


def read_tables(folder: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """{title: {row of the table: [(run, the run that it is compared with), ..]}}; a row that others
    are compared with stands in their table, compared with itself."""
    names = sorted(name.removesuffix(".jsonl.gz") for name in os.listdir(folder)
                   if name.endswith(".jsonl.gz"))
    tables = {title: defaultdict(list) for title, _ in TABLES.values()}
    for name in names:
        if name.startswith("start_"):
            continue
        row, sft_seed, seed = name.rsplit("_", 2)
        title, other = TABLES.get(row.partition("_")[0], TABLES["stage"])
        other = other.format(sft_seed, seed)
        if (name, other) not in tables[title][row]:
            tables[title][row].append((name, other))
        rounds = f"{'own2' if row in TWO_ROUNDS else 'own_high'}_{sft_seed}_{seed}"
        if title == TABLES["stage"][0] and rounds in names:
            tables[TABLES["own_high"][0]][row].append((name, rounds))
        reference = other.rsplit("_", 2)[0]
        if reference != "start" and (other, other) not in tables[title][reference]:
            tables[title][reference].append((other, other))
    return {title: rows for title, rows in tables.items() if rows}


def interval(values: list[float]) -> list[float]:
    values = sorted(values)
    return [round(values[int(q * (len(values) - 1) + 0.5)], 4) for q in (0.025, 0.975)]


def bootstrap(runs: dict[str, list[dict[str, list[float]]]], draw_runs: bool, seed: int = 0
              ) -> list[float]:
    """runs: for each SFT seed its runs, {house: differences of its episodes} -> the interval of the
    mean over all."""
    rng = random.Random(seed)
    houses = sorted(next(iter(runs.values()))[0])
    seeds = [[[(sum(run[h]), len(run[h])) for h in houses] for run in some]
             for some in runs.values()]
    found = []
    for _ in range(RESAMPLES):
        some = rng.choices(seeds, k=len(seeds)) if draw_runs else seeds
        some = [run for of_seed in some
                for run in (rng.choices(of_seed, k=len(of_seed)) if draw_runs else of_seed)]
        drawn = rng.choices(range(len(houses)), k=len(houses))
        found.append(sum(run[k][0] for run in some for k in drawn)
                     / sum(run[k][1] for run in some for k in drawn))
    return interval(found)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def minutes_of(run: str, minutes: dict[str, float]) -> float | None:
    """CPU minutes of a run's training after SFT. None: a part was resumed, and not measured, or the
    run has no such training."""
    row, *seeds = run.replace("kept", "transfer").rsplit("_", 2)
    if row.endswith("start"):
        return None
    before = minutes_of("_".join([EARLIER[row], *seeds]), minutes) if row in EARLIER else 0
    trained = minutes.get("_".join([row, *seeds]))
    return None if trained is None or before is None else trained + before


def recording_of(run: str, minutes: dict[str, float]) -> float | None:
    """CPU minutes in which a run's own walks were recorded, those of earlier rounds included."""
    row, *seeds = run.rsplit("_", 2)
    if row in EARLIER:
        earlier = recording_of("_".join([EARLIER[row], *seeds]), minutes)
        found = minutes.get(f"walks_{run}")
        return None if found is None or earlier is None else found + earlier
    kind = row.partition("_")[0]
    if kind in ("sft", "expert"):
        return 0.0
    return minutes.get(f"own{seeds[0]}") if kind in ("own", "dagger", "reward", "group") else None


def measure(folder: str, row: str, pairs: list[tuple[str, str]], minutes: dict,
            metric: str = "success") -> dict:
    """One row of the table over its runs."""
    by_house, before, after, spl, steps = defaultdict(list), [], [], [], []
    for run, start in pairs:
        a, b = read_run(folder, start), read_run(folder, run)
        if a.keys() != b.keys():
            raise ValueError(f"{run} and {start} walked different episodes")
        houses = defaultdict(list)
        for key in a:
            houses[a[key]["scene_id"]].append(b[key][metric] - a[key][metric])
        by_house[run.rsplit("_", 2)[1]].append(houses)
        before.append(mean(one[metric] for one in a.values()))
        after.append(mean(one[metric] for one in b.values()))
        spl.append(mean(one["spl"] for one in b.values()))
        steps.append(mean(one["steps"] for one in b.values()))
    each = [round(y - x, 4) for x, y in zip(before, after)]
    trained, recorded = ([x for x in (of(run, minutes) for run, _ in pairs) if x is not None]
                         for of in (minutes_of, recording_of))
    return {"name": row, "compared": any(run != other for run, other in pairs),
            "runs": len(pairs), "run_names": [run for run, _ in pairs],
            "episodes": len(a), "houses": len(houses),
            "sr_before": round(mean(before), 4), "sr_after": round(mean(after), 4),
            "sr_before_of_runs": [round(x, 4) for x in before],
            "diff": round(mean(each), 4), "diff_ci": bootstrap(by_house, draw_runs=False),
            "both_ci": bootstrap(by_house, draw_runs=True) if len(pairs) > 1 else None,
            "diff_of_runs": each,
            "spl_after": round(mean(spl), 4), "steps_after": round(mean(steps), 2),
            "minutes": round(mean(trained), 2) if trained else None,
            "minutes_recording": round(mean(recorded), 2) if recorded else None}


def print_table(title: str, rows: list[dict], metric: str = "SR"):
    """Sorted by the difference; a row that the others are compared with has none."""
    paper = any(row["paper_sr"] for row in rows)
    print(f"{title}\n{'row':18s} runs  {metric} ref. {metric:>5s}    difference, over houses     "
          f"over houses and runs   SPL  actions  minutes  recording{'  paper' * paper}")
    for r in sorted(rows, key=lambda r: -r["diff"]):
        apart = both = ""
        minutes, recording, theirs = ("-" if x is None else f"{x:.1f}" for x in (
            r["minutes"], r["minutes_recording"], r["paper_sr"]))
        if r["compared"]:
            apart = "{:+.3f} [{:+.3f}, {:+.3f}]".format(r["diff"], *r["diff_ci"])
            both = "[{:+.3f}, {:+.3f}]".format(*r["both_ci"]) if r["both_ci"] else "one run"
        print(f"{r['name']:18s} {r['runs']:4d}  {r['sr_before']:7.3f}  {r['sr_after']:.3f}  "
              f"{apart:>27s}     {both:>16s}  {r['spl_after']:.3f}  {r['steps_after']:7.1f}  "
              f"{minutes:>7s}  {recording:>9s}{f'  {theirs:>5s}' * paper}")
    print()


def main(args):
    with open(os.path.join(args.folder, "minutes.json")) as file:
        minutes = json.load(file)
    found = []
    for title, table in read_tables(args.folder).items():
        paper = next((PAPER[key] for key in PAPER if TABLES[key][0] == title), {})
        rows = [dict(measure(args.folder, row, pairs, minutes), table=title,
                     paper_sr=paper.get(row))
                for row, pairs in table.items()]
        print_table(title, rows)
        found += rows
        if title == TABLES["memory"][0]:                 # there and back: did it walk both ways?
            rows = [dict(measure(args.folder, row, pairs, minutes, "sdtw"), paper_sr=None)
                    for row, pairs in table.items()]
            print_table(f"{title}, SDTW", rows, "SDTW")
    if args.out:
        os.makedirs(os.path.dirname(args.out), exist_ok=True)
        with open(args.out, "w") as file:
            json.dump({"rows": found}, file, indent=1)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Recompute the tables of docs/evidence.md.")
    p.add_argument("--folder", default=FOLDER)
    p.add_argument("--out", metavar="FILE.json")
    main(p.parse_args())
