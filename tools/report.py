"""
Compare results folders of evaluate.py episode by episode, or print them as one table.

Two folders are comparable only with the same episodes, scenes, robot, radius and --max-actions;
others are refused. Other differences, such as the checkpoint or the decoding, are printed. A run
that has not ended is refused, since its first episodes are not a fair sample; --partial accepts
and labels it.

Intervals (95%) are computed from the rows by intervals.py: Wilson's for rates, a
bootstrap over scenes for means, paired differences and the pooled gain of several runs. Runs on one
episode are not independent, nor are episodes in one scene: a scene is drawn with all its episodes,
and an episode with all its runs.

Run it   python -m tools.report results/sft_val_unseen results/grpo_val_unseen
         python -m tools.report results/sft_val_unseen results/seed?_val_unseen --out gain.json
         python -m tools.report --summary results/*_val_unseen --bounds --out table.json
Reads    run.json and episodes*.jsonl of each folder (and whether results.json is there); for a
         gain's seed and minutes args.json and log.jsonl of its checkpoint; minutes.jsonl in
         the folder of --out; for --bounds the episodes
Writes   --out, if given
"""
from __future__ import annotations

import argparse
import os
from typing import NamedTuple

import numpy as np

from cli import DefaultsFormatter, UserError, read_json, read_rows, run_cli, write_json
from evaluate import TITLES, known_rows, summarise
from intervals import cluster_bootstrap, describe_intervals, sampling_units

# What must agree, as must every key that begins with "scene": each decides which episodes are
# walked or what counts as success.
SAME = ("data", "split", "role", "languages", "limit", "robot", "radius_m", "max_actions")
# These follow from other keys, or do not matter where `data` agrees.
DERIVED = ("second_radius_m", "episodes", "weights", "source")


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.report", formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="results folders: the baseline, "
                   "then one or more to compare with it, such as seeds; with --summary, the rows")
    p.add_argument("--summary", action="store_true", help="print one table instead of comparing")
    p.add_argument("--bounds", action="store_true", help="with --summary of houses: also the "
                   "SR that half of the input could reach (tools/bounds.py)")
    p.add_argument("--partial", action="store_true", help="take runs that have not ended, or have "
                   "unresolved errors, and label them")
    p.add_argument("--out", metavar="FILE.json", help="also write the numbers")
    return p.parse_args(argv)


# ---------------------------------------------------------------- reading, and what may be compared


class Results(NamedTuple):
    folder: str
    run: dict       # run.json
    rows: dict      # {str(episode_id): row}
    missing: str    # what is missing, "" if nothing is


def read_results(folder: str) -> Results:
    """A results folder -> Results. UserError if it is not one."""
    try:
        settings, rows = read_json(os.path.join(folder, "run.json")), known_rows(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no results ({error}): evaluate it first") from None
    ended = os.path.exists(os.path.join(folder, "results.json"))
    lacks = [key for key in ("split", "data", "radius_m", "max_actions") if key not in settings]
    if lacks:
        raise UserError(f"{folder}/run.json has no {', '.join(lacks)}: evaluate it again")
    asked = settings.get("episodes")
    errors = sum(row["end"] == "error" for row in rows.values())
    missing = []
    if not ended or len(rows) < (asked or 0):
        of = f" of {asked}" if asked else ""
        missing.append(f"it has not ended: {len(rows)}{of} episodes have walked")
    if errors:
        missing.append(f"{errors} episodes have no result, because a simulator failed")
    return Results(folder, settings, rows, ", and ".join(missing))


def read_all(folders: list[str], partial: bool) -> list[Results]:
    """Results folders -> [Results]. UserError if one is incomplete, unless `partial`: then it is
    only printed."""
    seen = {}
    for folder in folders:
        place = os.path.realpath(folder)
        if place in seen:
            raise UserError(f"{folder} is given twice (as {seen[place]}): name each folder once")
        seen[place] = folder
    every = [read_results(folder) for folder in folders]
    for folder, *_, missing in every:
        if missing and not partial:
            raise UserError(f"{folder}: {missing}; run its evaluate.py command again, or give "
                            "--partial to use what is there")
        if missing:
            print(f"PARTIAL {folder}: {missing}")
    return every


def check_same(a: Results, b: Results, keys=SAME):
    """UserError unless two Results measured the same thing (or agree in `keys`, if given)."""
    scenes = sorted(key for key in {*a.run, *b.run} if key.startswith("scene"))
    keys = (*keys, *scenes) if keys is SAME else keys
    differ = [key for key in keys if a.run.get(key) != b.run.get(key)]
    if differ:
        texts = ", ".join(pair_of(key, a.run.get(key), b.run.get(key)) for key in differ)
        raise UserError(f"{a.folder} and {b.folder} did not measure the same thing ({texts}): "
                        "evaluate both on the same data with the same flags")


def pair_of(key: str, before, after) -> str:
    """`key before -> after`, or the key alone where the values are long."""
    texts = ["none" if value is None else str(value) for value in (before, after)]
    return f"{key} {texts[0]} -> {texts[1]}" if max(map(len, texts)) <= 32 else key


def flat(settings: dict, prefix: str = "") -> dict:
    """{"contract": {"horizon": 6}} -> {"contract.horizon": 6}"""
    found = {}
    for key, value in settings.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        found |= inner
    return found


def differences(a: Results, b: Results) -> list[str]:
    """The other settings in which two comparable Results differ: short texts."""
    texts = []
    before, after = ({key: value for key, value in flat(results.run).items()
                      if key.split(".")[0] not in (*SAME, *DERIVED)} for results in (a, b))
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            texts.append(pair_of(key, before.get(key), after.get(key)))
    if a.run.get("ckpt") == b.run.get("ckpt") and a.run.get("weights") != b.run.get("weights"):
        texts.append("weights")
    versions = [read_json(path).get("versions", {}) if os.path.exists(path) else {} for path in
                (os.path.join(results.folder, "results.json") for results in (a, b))]
    return texts + [pair_of(key, versions[0].get(key), versions[1].get(key))
                    for key in dict.fromkeys([*versions[0], *versions[1]])
                    if versions[0].get(key) != versions[1].get(key)]


# ---------------------------------------------------------------- comparing


def paired_difference(before: dict, after: dict, metric: str = "success",
                      seed: int = 0) -> dict:
    """The mean difference of a metric on the episodes that both runs have scored, with its
    interval. before, after: rows by id. Pairing removes the variance between episodes.
    >>> a = {str(i): {"episode_id": i, "scene_id": i, "success": 0.0} for i in range(6)}
    >>> b = {str(i): {"episode_id": i, "scene_id": i, "success": 1.0} for i in range(1, 6)}
    >>> paired_difference(a, b)
    {'episodes': 5, 'a': 0.0, 'b': 1.0, 'difference': 1.0, 'ci': None}
    """
    keys = [key for key, row in before.items() if key in after
            and None not in (row.get(metric), after[key].get(metric))]
    a, b = ([rows[key][metric] for key in keys] for rows in (before, after))
    found = cluster_bootstrap({"a": a, "b": b, "difference": np.subtract(b, a)},
                              sampling_units([before[key] for key in keys])[0], seed=seed)
    return {"episodes": len(keys), **{name: found[name]["mean"] for name in found},
            "ci": found["difference"]["ci"]}


def pooled_gain(before: dict, afters: list[dict], seed: int = 0) -> dict:
    """The gain in success of several runs: for each episode the mean difference over runs.

    >>> a = {str(i): {"episode_id": i, "scene_id": i, "success": 0.0} for i in range(6)}
    >>> b = {key: {**row, "success": 1.0} for key, row in a.items()}
    >>> pooled_gain(a, [a, b])
    {'episodes': 6, 'runs': 2, 'difference': 0.5, 'ci': None}
    """
    keys = [key for key in before if all("success" in rows.get(key, ()) for rows in
                                         (before, *afters))]
    gains = [np.mean([rows[key]["success"] for rows in afters]) - before[key]["success"]
             for key in keys]
    units = sampling_units([before[key] for key in keys])[0]
    found = cluster_bootstrap({"gain": gains}, units, seed=seed)["gain"]
    return {"episodes": len(keys), "runs": len(afters), "difference": found["mean"],
            "ci": found["ci"]}


def run_gain(before: Results, after: Results, metrics: dict) -> dict:
    """One run's part of the written file, with the seed and CPU minutes of its training."""
    ckpt, seed, minutes = after.run.get("ckpt") or "", None, None
    if os.path.exists(os.path.join(ckpt, "args.json")):
        log = os.path.join(ckpt, "log.jsonl")
        seed = read_json(os.path.join(ckpt, "args.json")).get("seed")
        rows = read_rows(log) if os.path.exists(log) else []
        minutes = rows[-1].get("minutes") if rows else None
    sr = metrics["success"]
    return {"ckpt": ckpt, "seed": seed, "sr_before": sr["a"], "sr_after": sr["b"],
            "episodes": sr["episodes"], "diff": sr["difference"], "diff_ci": sr["ci"],
            "minutes": minutes and round(minutes, 2), "folder": after.folder,
            "differs": differences(before, after), "metrics": metrics}


def compare(folders: list[str], out: str | None = None, partial: bool = False):
    """Print the differences of each further folder to the first, and of all together.
    out: a file for {"before", "runs", "pooled"}."""
    if len(folders) < 2:
        raise UserError("one folder is nothing to compare: name the baseline, then the others")
    before, *afters = read_all(folders, partial)
    for after in afters:
        check_same(before, after)
    gains = []
    for after in afters:
        metrics = {name: paired_difference(before.rows, after.rows, name) for name in TITLES}
        if not metrics["success"]["episodes"]:
            raise UserError(f"{before.folder} and {after.folder} have no scored episode in common")
        gains.append(run_gain(before, after, metrics))
        print_gain(before, after, gains[-1], len(afters) > 1)
    pooled = pooled_gain(before.rows, [after.rows for after in afters])
    if not pooled["episodes"]:
        raise UserError("no episode is scored in all of these folders: name two at a time")
    if len(afters) > 1:
        print(f"SR, all together: {pooled['difference']:+.3f} {bracket(pooled['ci'])}   "
              f"{pooled['episodes']} episodes x {pooled['runs']} runs")
    if out:
        write_out(out, {"before": before.folder, "runs": gains, "pooled": pooled})


def bracket(ci: list[float] | None) -> str:
    return "[{:+.3f}, {:+.3f}]".format(*ci) if ci else "(the same in every scene: no interval)"


def print_gain(before: Results, after: Results, gain: dict, named: bool):
    """Print one comparison: a line of other differences, then a line per metric."""
    if named:
        print(f"{after.folder} against {before.folder}")
    differs = gain["differs"]
    more = f" and {len(differs) - 8} more" if len(differs) > 8 else ""
    print("differs: " + (", ".join(differs[:8]) or "nothing that is on record") + more)
    for metric, found in gain["metrics"].items():
        if not found["episodes"]:
            continue                                       # no ground truth, no nDTW
        print(f"{TITLES[metric]:7}{found['a']:8.3f} -> {found['b']:7.3f}   difference "
              f"{found['difference']:+.3f} {bracket(found['ci'])}   {found['episodes']} pairs")
    unpaired = len({*before.rows, *after.rows}) - gain["episodes"]
    if unpaired:
        print(f"{unpaired} episodes are scored in one of them only, or in none, and left out")


# ---------------------------------------------------------------- one table

COLUMNS = {"sr": "success", "spl": "spl", "os": "oracle_success", "ne_m": "distance_to_goal",
           "tl_m": "path_length", "ndtw": "ndtw", "sdtw": "sdtw", "steps": "steps"}


def print_summary(folders: list[str], out: str | None = None, partial: bool = False,
                  bounds: bool = False):
    """Print results folders as the rows of one table; out: a file for {"minutes", "rows"}, and
    {"bounds"}."""
    every = read_all(folders, partial)
    first = {}                                             # of each split
    for results in every:
        check_same(every[0], results, ("max_actions", "radius_m"))
        check_same(first.setdefault(results.run["split"], results), results)
    rows, intervals = [], {}
    for results in every:
        found = summarise(list(results.rows.values()), results.run["radius_m"],
                          results.run["second_radius_m"], results.run.get("seed", 0))
        if not found["scored"]:
            raise UserError(f"{results.folder} has no scored episode: leave it out of the table")
        intervals[describe_intervals(found["interval"])] = None
        rows.append(table_row(results, found))
    print_rows(rows)
    print("95% intervals: " + ", or ".join(intervals))
    table = {"rows": rows}
    if bounds:
        from tools.bounds import bounds_of, print_bounds
        keys = ("source", "split", "limit", "robot", "radius_m", "max_actions")
        table["bounds"] = [bounds_of(*(one.run[key] for key in keys)) for one in first.values()]
        print_bounds(table["bounds"])
    if out:
        table["minutes"] = stage_minutes(os.path.dirname(out))
        write_out(out, table)


def table_row(results: Results, found: dict) -> dict:
    """Results and their summarise() -> the row of the written table."""
    split, metrics = results.run["split"], found["metrics"]
    return {"agent": os.path.basename(results.folder.rstrip("/")).removesuffix(f"_{split}"),
            "split": split, "episodes": found["scored"], "partial": bool(results.missing),
            "radius_m": found["radius_m"], "max_actions": results.run["max_actions"],
            "sr_ci": metrics["success"]["ci"],
            **{key: metrics[name]["mean"] for key, name in COLUMNS.items()},
            "unscored": found["episodes"] - found["scored"], "errors": found["errors"],
            "interval": found["interval"]}


def print_rows(rows: list[dict]):
    """Print the table. `-` where a metric has no value."""
    width = max(6, *(len(r["agent"]) for r in rows)) + 2
    print(f"{'agent':{width}}{'split':12}{'walks':>6}  {'SR':>5} {'[95%]':14}{'SPL':>5} {'OS':>5} "
          f"{'NE m':>5} {'TL m':>5} {'nDTW':>5} {'SDTW':>5} {'steps':>5} {'unscored':>9}   "
          f"SR, SPL, OS at {rows[0]['radius_m']:g} m; at most {rows[0]['max_actions']} actions")
    for r in rows:
        ci = "[{:.2f}, {:.2f}]".format(*r["sr_ci"])
        values = " ".join(f"{'-':>5}" if r[key] is None else f"{r[key]:5.2f}"
                          for key in ("spl", "os", "ne_m", "tl_m", "ndtw", "sdtw"))
        print(f"{r['agent']:{width}}{r['split']:12}{r['episodes']:6}  {r['sr']:5.2f} {ci:14}"
              f"{values} {r['steps']:5.1f} {r['unscored']:9}" + "   partial" * r["partial"])


def stage_minutes(folder: str) -> dict[str, float]:
    """minutes.jsonl of a script such as demo.sh -> {stage: minutes}; also printed."""
    path = os.path.join(folder, "minutes.jsonl")
    if not os.path.exists(path):
        return {}
    stages = read_rows(path)
    minutes = {one["stage"]: round((one["ended"] - one["began"]) / 60, 2) for one in stages}
    seconds, until = 0, 0                              # stages may run at the same time
    for began, ended in sorted((one["began"], one["ended"]) for one in stages):
        seconds += max(0, ended - max(began, until))
        until = max(until, ended)
    print(f"{seconds / 60:.1f} minutes: "
          + ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items()))
    return minutes


def write_out(path: str, content, write=write_json):
    """Write --out atomically, and make its folder."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(path, content)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another --out") from None


def main(args):
    if args.summary:
        return print_summary(args.folders, args.out, args.partial, args.bounds)
    if args.bounds:
        raise UserError("--bounds belongs to --summary")
    return compare(args.folders, args.out, args.partial)


if __name__ == "__main__":
    run_cli(main, parse_args)
