"""
Recompute the numbers of a results folder from its per-episode file: do they agree?

A second opinion that uses the standard library only. From actions, poses and distances follow an
episode's TL, SR, OS, SPL and SDTW; from these results.json and the card's counts. The distances are
the simulator's, and are not recomputed. Exit status 1 if a number does not agree.

Run it   python -m tools.recompute results/sft_val_unseen
Reads    run.json, episodes.jsonl, results.json, protocol.json; for nDTW --truth, a _gt.json.gz
"""
import argparse
import gzip
import json
import math
import random
from collections import Counter


def parse_args(argv=None):
    p = argparse.ArgumentParser("python -m tools.recompute", description=__doc__.split("\n")[1])
    p.add_argument("folders", nargs="+", metavar="FOLDER")
    p.add_argument("--truth", metavar="FILE", help="ground truth (_gt.json.gz), for nDTW")
    return p.parse_args(argv)


def dtw(a, b):
    best = [0.0] + [math.inf] * len(b)
    for p in a:
        row = [math.inf]
        for j, q in enumerate(b):
            row.append(math.dist(p, q) + min(row[j], best[j], best[j + 1]))
        best = row
    return best[-1]


def episode_numbers(row, run, truth):
    """Of a scored row: (name, recorded, recomputed, tolerance); files have six decimals."""
    yield "steps", row["steps"], len(row["actions"]), 0
    yield "poses", len(row["poses"]), 1 + len(row["actions"].strip("0")), 0
    path, start, end = [p[:3] for p in row["poses"]], row["start_distance"], row["distance_to_goal"]
    length = sum(math.dist(p, q) for p, q in zip(path, path[1:]))
    yield "path_length", row["path_length"], length, 2e-6 * len(path)
    if truth:
        there = truth[str(row["episode_id"])]["locations"]
        moved = [p for i, p in enumerate(path) if not i or p != path[i - 1]]
        yield "ndtw", row["ndtw"], math.exp(-dtw(moved, there) / (3 * len(there))), 1e-5
    for radius in (run["radius_m"], run["second_radius_m"]):
        suffix = "" if radius == run["radius_m"] else f"_{radius:g}m"
        stopped = row["end"] == "stop" and row["actions"].endswith("0")
        success = float(stopped and end is not None and end < radius)
        spl = success * start / max(start, length) if start or length else success
        for name, value in {"success": success, "spl": spl, "sdtw": success * row.get("ndtw", 0),
                            "oracle_success": row["oracle_navigation_error"] < radius}.items():
            yield name + suffix, row.get(name + suffix, value), value, 1e-5    # SDTW may be absent


def interval(rows, hits, trials, rate, z=1.959964, resamples=2000):
    """[(low, tolerance), (high, ..)] of sum(hits) / sum(trials). evaluate.py draws other scenes."""
    few, sums = len({row["scene_id"] for row in rows}) < 5, {}
    for row, hit, trial in zip(rows, hits, trials):
        h, t = sums.get(unit := (row["scene_id"], few and row["trajectory_id"]), (0, 0))
        sums[unit] = h + hit, t + trial
    n, k, mean = sum(trials), len(sums), sum(hits) / sum(trials)
    if rate:
        q = z * z / n
        if k >= 5 and 0 < mean < 1:
            variance = sum((h - mean * t) ** 2 for h, t in sums.values()) / n * k / (k - 1)
            q *= max(1.0, variance / (mean * (1 - mean)))
        half = math.sqrt(mean * (1 - mean) * q + q * q / 4)
        return [((mean + q / 2 + side * half) / (1 + q), 2e-6) for side in (-1, 1)]
    rng, units = random.Random(0), sorted(sums.values())
    draws = (list(zip(*rng.choices(units, k=k))) for _ in range(resamples))
    means = sorted(sum(h) / sum(t) for h, t in draws)
    at = [means[round(q * (resamples - 1))] for q in (.008, .025, .05, .95, .975, .992)]
    return [(at[i], max(at[i + 1] - at[i], at[i] - at[i - 1]) + 2e-6) for i in (1, 4)]


def result_numbers(rows, run, results, card):
    scored, ends = [row for row in rows if "success" in row], Counter(row["end"] for row in rows)
    counts = {"episodes": len({str(r["episode_id"]) for r in rows}), "ends": dict(ends),
              "scored": len(scored), "unreachable": ends["unreachable"], "errors": ends["error"],
              "no_way_at_end": sum(r["distance_to_goal"] is None for r in scored),
              "invalid": ends["invalid"], "decisions": sum(r["decisions"] for r in rows),
              "asked": run["episodes"], "ended": len(scored), "unfinished": ends["error"],
              "failed": ends["invalid"] + ends["unreachable"],
              "tokens_per_episode": round(sum(r.get("tokens", 0) for r in rows) / len(rows), 1)}
    for key, value in counts.items():
        yield key, {**results, **card["episodes"]}[key], value, 0
    names = ["distance_to_goal", "ndtw", "path_length", "steps"]
    for name in ("success", "oracle_success", "spl", "sdtw"):
        names += [name, f"{name}_{run['second_radius_m']:g}m"]
    yield "names of metrics", sorted(results["metrics"]), sorted(names), 0
    found = {name: (values["mean"], values["ci"]) for name, values in results["metrics"].items()}
    found["malformed"] = results["malformed_share"], results["malformed_ci"]
    for name, (mean, ci) in found.items():
        of = rows if name == "malformed" else [r for r in scored if r.get(name) is not None]
        hits, trials = [r[name] for r in of], [r["decisions"] if of is rows else 1 for r in of]
        if sum(trials):
            yield f"mean of {name}", mean, sum(hits) / sum(trials), 2e-6
            ends = interval(of, hits, trials, of is rows or "success" in name)
            for recorded, (value, tolerance) in zip(ci or (mean, mean), ends):
                yield f"interval of {name}", recorded, value, tolerance


def main(args):
    truth, wrong = json.load(gzip.open(args.truth)) if args.truth else None, 0
    for folder in args.folders:
        run, results, card = (json.load(open(f"{folder}/{name}.json"))
                              for name in ("run", "results", "protocol"))
        rows = [json.loads(line) for line in open(f"{folder}/episodes.jsonl")]
        numbers = [(f"{name} of episode {row['episode_id']}", *rest) for row in rows
                   if "success" in row for name, *rest in episode_numbers(row, run, truth)]
        numbers += result_numbers(rows, run, results, card)
        bad = [f"{name}: {a} is recorded, {b} recomputed" for name, a, b, tolerance in numbers
               if a != b and not (tolerance and a is not None and abs(a - b) <= tolerance)]
        wrong += len(bad)
        print(*bad, f"{folder}: {len(numbers)} numbers, {len(bad)} do not agree", sep="\n")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        argparse.ArgumentParser("recompute.py").error(f"{error!r}; is the folder complete?")
