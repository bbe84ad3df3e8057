"""intervals.py against values by hand, all resamples, and coverage on made-up walks."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from intervals import cluster_bootstrap, rate_interval, wilson


def test_wilson_by_hand():
    assert wilson(0, 200) == [0.0, 0.018845] and wilson(200, 200) == [0.981155, 1.0]
    assert wilson(0, 0) is None
    # 121 of 200: centre (.605 + z2/400) / (1 + z2/200), z2 = 3.841459
    spare = 3.841459 / 200
    centre, half = (.605 + spare / 2), math.sqrt(3.841459 * (.605 * .395 / 200 + spare / 800))
    assert wilson(121, 200) == pytest.approx([(centre - half) / (1 + spare),
                                              (centre + half) / (1 + spare)], abs=1e-5)
    assert rate_interval([0] * 200, [1] * 200, range(200)) == [0.0, 0.018845]
    # 40 scenes of 5 equal walks are 40 walks, not 200; of 4 scenes nothing can be said of scenes
    hits = np.repeat(np.arange(40) % 2, 5)
    found = rate_interval(hits, np.ones(200), np.arange(200) // 5)
    assert found == pytest.approx(wilson(20 * 39 / 40, 40 * 39 / 40), abs=1e-4)
    assert rate_interval(hits, np.ones(200), np.arange(200) // 50) == wilson(100, 200)


def test_cluster_bootstrap_against_all_resamples():
    """Three units of unequal size: all 27 equally likely resamples, enumerated."""
    values, units = [1.0, 2.0, 6.0, 3.0, None], ["a", "b", "b", "c", "c"]
    of = {"a": [1.0], "b": [2.0, 6.0], "c": [3.0]}
    means = [np.mean([v for unit in drawn for v in of[unit]])
             for drawn in itertools.product("abc", repeat=3)]
    found = cluster_bootstrap({"x": values}, units, resamples=20_000)["x"]
    assert found["mean"] == 3.0
    assert found["ci"] == pytest.approx(np.percentile(means, [2.5, 97.5], method="inverted_cdf"),
                                        abs=1e-6)
    assert cluster_bootstrap({"x": values}, units) == cluster_bootstrap({"x": values}, units)
    assert cluster_bootstrap({"x": []}, [])["x"] == {"mean": None, "ci": None}
    assert cluster_bootstrap({"x": [0.0] * 9}, range(9))["x"] == {"mean": 0.0, "ci": None}


def test_intervals_of_clustered_walks_cover_and_those_of_single_walks_do_not():
    """40 scenes of 10 walks, whose scene makes most of the difference; 100 such experiments."""
    rng, covered = np.random.default_rng(0), Counter()
    for _ in range(100):
        scenes = np.repeat(np.arange(40), 10)
        level = rng.random(40)[scenes]                               # the true mean is .5
        spl, success = level + rng.normal(0, .2, 400), rng.random(400) < level
        for name, units in (("scenes", scenes), ("walks", np.arange(400))):
            (low, high) = cluster_bootstrap({"x": spl}, units, 200)["x"]["ci"]
            covered[name, "mean"] += low <= .5 <= high
            (low, high) = rate_interval(success, np.ones(400), units)
            covered[name, "rate"] += low <= .5 <= high
    assert covered["scenes", "mean"] >= 89 and covered["scenes", "rate"] >= 89     # 95, but for 3 s
    assert covered["walks", "mean"] <= 70 and covered["walks", "rate"] <= 82
