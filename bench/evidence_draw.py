"""
The curves of docs/evidence.md: what a second stage has gained, over its CPU minutes of training.
A line goes through the rounds of one method; a point is the mean over the SFT policies, each with
the first seed of stage two, and a bar reaches from the lowest of them to the highest.

Run it   python bench/evidence_draw.py --out docs/evidence.png
Reads    docs/results/evidence.json (bench/evidence_table.py --out)
"""
from __future__ import annotations

import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs",
                       "results", "evidence.json")
LINES = {
    "GRPO on own walks, three rounds": ("own_high", "own2", "own3"),
    "DAgger, two rounds": ("dagger", "dagger2"),
    "DAgger, then GRPO on its own walks": ("dagger", "dagger_own"),
    "more SFT on the expert's walks": ("sft",),
    "GRPO on the expert's walks": ("expert",),
}


def gains(row: dict) -> list[float]:
    return [gain for name, gain in zip(row["run_names"], row["diff_of_runs"])
            if name.endswith("_0")]


def main(args):
    with open(args.results) as file:
        rows = {row["name"]: row for row in json.load(file)["rows"]
                if row["table"].endswith("the SFT policy")}
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.axhline(0, color="0.8", linewidth=1)
    for label, names in LINES.items():
        found = [rows[name] for name in names if name in rows]
        minutes = [0, *(row["minutes"] for row in found)]
        each = [[0], *map(gains, found)]
        means = [sum(some) / len(some) for some in each]
        axes.errorbar(minutes, means, marker="o", capsize=3, label=label,
                      yerr=[[mean - min(some) for mean, some in zip(means, each)],
                            [max(some) - mean for mean, some in zip(means, each)]])
    axes.set(xlabel="CPU minutes of stage two (recording and evaluation not counted)",
             ylabel="success rate, difference to SFT")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Draw the curves of docs/evidence.md.")
    p.add_argument("--results", default=RESULTS)
    p.add_argument("--out", required=True, metavar="FILE.png")
    main(p.parse_args())
