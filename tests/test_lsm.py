import argparse
import doctest
import random

import numpy as np
import pytest

import lsm
from cli import UserError
from lsm import MEMORIES, even, pick_frames


def random_settings(rng):
    return {"budget": rng.randrange(0, 24), "recent": rng.randrange(0, 30),
            "short_stride": rng.randrange(1, 5), "long_stride": rng.randrange(1, 12)}


def test_doctests_and_the_picture():
    assert doctest.testmod(lsm).failed == 0
    picture = next(line.split()[1] for line in lsm.__doc__.splitlines() if "shown   #" in line)
    drawn = [i for i, char in enumerate(picture) if char == "#"]
    assert drawn == pick_frames(30)
    assert picture[30] == "@"
    assert len(picture) == 31


@pytest.mark.parametrize("name", MEMORIES)
def test_past_only_chronological_unique_within_budget(name):
    rng = random.Random(0)
    for t in [*range(80), 499, 5000]:
        for _ in range(20):
            settings = random_settings(rng)
            frames = pick_frames(t, name, **settings)
            assert frames == sorted(set(frames)) and len(frames) <= settings["budget"]
            assert all(0 <= i < t for i in frames) and all(type(i) is int for i in frames)


@pytest.mark.parametrize("name", MEMORIES)
def test_short_walks_are_shown_whole_and_long_ones_from_the_start(name):
    for t in range(9):
        assert pick_frames(t, name) == list(range(t))
    for t in range(1, 600):
        frames = pick_frames(t, name)
        assert frames[0] == 0 and frames[-1] == t - 1


def test_lsm_is_the_papers_formula_where_it_fits():
    rng = random.Random(1)
    for _ in range(500):
        d1, d2, t = rng.randrange(1, 4), rng.randrange(1, 9), rng.randrange(200)
        m = d1 * rng.randrange(1, 6)
        short = {t - k * d1 for k in range(1, m // d1 + 1)}
        long = {t - m - k * d2 for k in range(1, 300)} | ({0} if t > m else set())
        formula = sorted(i for i in short | long if i >= 0)
        assert pick_frames(t, "lsm", 1000, m, d1, d2) == formula


def test_over_budget_the_smallest_longer_stride_is_taken():
    rng = random.Random(2)
    for _ in range(500):
        settings, t = random_settings(rng), rng.randrange(400)
        frames = pick_frames(t, **settings)
        short = pick_frames(min(t, settings["recent"]), **settings)  # a walk with no long part
        span = t - settings["recent"]
        room = settings["budget"] - len(short)
        if span <= 0 or room <= 0:
            continue
        fits = [d for d in range(settings["long_stride"], 500) if len(range(span, 0, -d)) <= room]
        assert frames == [0, *sorted(range(span - fits[0], 0, -fits[0]))] + [
            i + span for i in short
        ]


def test_even_is_numpys_linspace():
    for t in [*range(300), 500, 1013, 4999]:
        for budget in [1, 2, 3, 8, 15, 16, 17, 50]:
            assert even(t, budget) == np.linspace(0, t - 1, min(t, budget), dtype=int).tolist()


def test_exponential_ages_grow():
    for t in [17, 40, 200, 500]:
        frames = pick_frames(t, "exponential")
        gaps = np.diff(frames)
        assert len(frames) == 16 and (gaps[:-1] >= gaps[1:] - 1).all()  # -1: rounding


def test_flags_give_the_dictionary_that_picks():
    parser = argparse.ArgumentParser()
    lsm.add_memory_args(parser.add_argument)
    memory = lsm.memory_from_args(parser.parse_args([]))
    assert list(memory) == ["name", "budget", "recent", "short_stride", "long_stride"]
    assert pick_frames(60, **memory) == pick_frames(60)
    for wrong in ["--short-stride=0", "--long-stride=-1", "--memory-budget=-1"]:
        with pytest.raises(UserError):
            lsm.memory_from_args(parser.parse_args([wrong]))
