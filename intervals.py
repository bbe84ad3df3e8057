"""
95% intervals of means and rates over episodes that resemble each other within a scene.

Rates (SR, OS) get Wilson's interval with an effective number of episodes; means and differences get
a bootstrap that draws whole scenes. A bootstrap of a rate has no width where all episodes agree;
intervals that take episodes for independent are too narrow (tests/test_intervals.py counts both).

Run it   python -m doctest intervals.py
Reads    nothing
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MIN_SCENES = 5       # with fewer, their differences are not known well enough to resample them


def wilson(hits: float, trials: float, z: float = 1.959964) -> list[float] | None:
    """Wilson's 95% score interval of a rate -> [low, high]; None without trials.

    Unlike a bootstrap it has a width where all trials agree. trials may be fractional.
    >>> wilson(0, 200), wilson(5, 10)                   # by hand: [0, z^2 / (200 + z^2)]
    ([0.0, 0.018845], [0.236593, 0.763407])
    """
    if not trials:
        return None
    rate, spare = min(1.0, hits / trials), z * z / trials      # above 1 by rounding only
    centre = (rate + spare / 2) / (1 + spare)
    half = z * math.sqrt(rate * (1 - rate) / trials + spare / trials / 4) / (1 + spare)
    return [round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)]


def design_effect(hits: Sequence, trials: Sequence, units: Sequence) -> float:
    """The factor by which the variance of a rate exceeds that of independent trials, because trials
    of one unit (a scene) resemble each other; at least 1. hits, trials (n,), units (n,) names.

    Four scenes of ten episodes that all succeed and four where all fail are worth 7 trials, not 80.
    >>> round(design_effect([10] * 4 + [0] * 4, [10] * 8, range(8)), 3)
    11.429
    """
    group = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    hits, trials = np.bincount(group, hits), np.bincount(group, trials)
    n, rate = trials.sum(), hits.sum() / max(trials.sum(), 1)
    if len(hits) < MIN_SCENES or not 0 < rate < 1:
        return 1.0
    variance = ((hits - rate * trials) ** 2).sum() / n ** 2 * len(hits) / (len(hits) - 1)
    return max(1.0, float(variance / (rate * (1 - rate) / n)))


def rate_interval(hits: Sequence, trials: Sequence, units: Sequence) -> list[float] | None:
    """Wilson's interval with the effective number of trials, trials / design_effect(): Dean &
    Pagano 2015, Confidence Interval Methods for Binomial Proportions in Clustered Surveys."""
    n = sum(trials) / design_effect(hits, trials, units)
    return wilson(n * sum(hits) / sum(trials), n) if sum(trials) else None


def sampling_units(rows: Sequence[dict]) -> tuple[list[str], str]:
    """What a bootstrap draws -> the unit of each row, and "scenes"; with fewer than MIN_SCENES
    scenes "trajectories": the interval then holds for these scenes only."""
    scenes = [str(row.get("scene_id")) for row in rows]
    if len(set(scenes)) >= MIN_SCENES:
        return scenes, "scenes"
    names = [row.get("trajectory_id", row["episode_id"]) for row in rows]
    return [f"{scene} {name}" for scene, name in zip(scenes, names)], "trajectories"


def cluster_bootstrap(columns: dict[str, Sequence], units: Sequence, resamples: int = 2000,
                      seed: int = 0) -> dict[str, dict]:
    """{name: values (n,)} -> {name: {"mean", "ci": [2.5%, 97.5%]}}, percentile bootstrap of means.

    Whole units are drawn, since episodes of one scene resemble each other. All columns use the same
    draws. None values are left out; "ci" is None where all units are alike.
    >>> cluster_bootstrap({"spl": [0, 1, None], "ne": [2.0] * 3}, ["a", "b", "b"])
    {'spl': {'mean': 0.5, 'ci': [0.0, 1.0]}, 'ne': {'mean': 2.0, 'ci': None}}
    """
    values = np.array([list(column) for column in columns.values()], dtype=float)     # None: nan
    found = {name: {"mean": None, "ci": None} for name in columns}
    if not values.size:
        return found
    group = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    sums, counts = (np.array([np.bincount(group, row) for row in table]).T  # (units, columns)
                    for table in (np.nan_to_num(values), np.isfinite(values)))
    rng, means = np.random.default_rng(seed), []
    for size in [200] * (resamples // 200) + [resamples % 200]:         # 200 at a time: memory
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size).astype(float)
        with np.errstate(invalid="ignore"):               # 0 / 0: none of the units has a value
            means.append(drawn @ sums / (drawn @ counts))
    for name, total, n, column in zip(columns, sums.sum(0), counts.sum(0), np.vstack(means).T):
        if n:
            low, high = np.nanpercentile(column, [2.5, 97.5]).round(6).tolist()
            found[name] = {"mean": round(float(total / n), 6),
                           "ci": [low, high] if low < high else None}
    return found


def describe_intervals(interval: dict) -> str:
    """results.json's "interval" in words."""
    few = "" if interval["units"] == "scenes" else (
        f"; fewer than {MIN_SCENES} scenes, so they hold for these scenes only")
    return (f"Wilson for SR, OS; a bootstrap over {interval['n_units']} {interval['units']} for "
            f"means{few}")
