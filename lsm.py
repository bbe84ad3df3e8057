"""
Long-Short Memory: which past frames the policy sees at step t (VLN-R1, section 3 of [1]).

A walk has tens to hundreds of frames and a prompt has room for about sixteen. The recent past is
needed in detail (am I in the middle of a turn?), the distant past only in outline (where did I come
from?). So the recent past is sampled densely and the rest sparsely:

    H_t = {v_{t-d1}, v_{t-2 d1}, .., v_{t-M}}              short part: the last M steps, every d1
        U {v_{t-M-d2}, v_{t-M-2 d2}, .., v_0}              long part: all before that, every d2 > d1

    t = 30, M = 8, d1 = 1, d2 = 4, a budget of 16 (the defaults; # is a frame that is shown):

    step    0         1         2         3
            0123456789012345678901234567890
    shown   #.#...#...#...#...#...########@          @ the current frame, v_t: always shown, and
            '-------- long --------'short-'            not part of the memory

Where the formula leaves a choice:
  * Small t: no frame exists before frame 0, so the parts are shorter, and empty at t = 0.
  * v_0 is shown where the long part is not empty, although steps of d2 seldom end on it.
  * The formula's long part has (t-M)/d2 frames, without bound. Here the long stride grows to the
    smallest whole number with which the long part fits into the rest of the budget.

M, d1 and d2 are not public. M = 8, d1 = 1: half of the paper's budget of 16, every frame; at 30
degrees a turn (RxR) that covers two thirds of a full turn. d2 = 4: a metre between long frames; it
grows from t = 41 on (mean R2R walk: 58 actions). To compare: `even` (the paper's released
converter) and `exponential` (no formula was published; ours).

Run it   python -m doctest lsm.py -v
[1] VLN-R1, https://arxiv.org/abs/2506.17221
"""
from __future__ import annotations

import math

from cli import UserError

MEMORIES = ("lsm", "even", "exponential")


def pick_frames(t: int, name: str = "lsm", budget: int = 16, recent: int = 8,
                short_stride: int = 1, long_stride: int = 4) -> list[int]:
    """Indices of the past frames to show at step t, oldest first, without the current frame t:
    at most `budget`, no index twice.

    name: one of MEMORIES; recent: M; strides: d1 and d2, all in steps and for "lsm" only. The
    keywords are the keys of a contract's memory: pick_frames(t, **contract["memory"]).

    >>> pick_frames(30)
    [0, 2, 6, 10, 14, 18, 22, 23, 24, 25, 26, 27, 28, 29]
    >>> pick_frames(0), pick_frames(3)
    ([], [0, 1, 2])
    >>> pick_frames(60)                                     # the long stride has grown from 4 to 7
    [0, 3, 10, 17, 24, 31, 38, 45, 52, 53, 54, 55, 56, 57, 58, 59]
    >>> pick_frames(60, "even")
    [0, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59]
    >>> pick_frames(60, "exponential")
    [0, 14, 25, 34, 40, 45, 48, 51, 52, 53, 54, 55, 56, 57, 58, 59]
    """
    assert name in MEMORIES, f"unknown memory {name!r}; known: {', '.join(MEMORIES)}"
    assert t >= 0, "steps are counted from 0"
    if budget == 0:
        return []
    if name == "even":
        return even(t, budget)
    if name == "exponential":
        return exponential(t, budget)
    return long_short(t, budget, recent, short_stride, long_stride)


def long_short(t: int, budget: int, recent: int, short_stride: int, long_stride: int) -> list[int]:
    """The formula above. If the budget cannot hold the short part, its latest frames are kept.

    >>> long_short(12, budget=16, recent=6, short_stride=2, long_stride=3)   # 10, 8, 6 and 3, 0
    [0, 3, 6, 8, 10]
    >>> long_short(100, budget=4, recent=8, short_stride=1, long_stride=4)
    [96, 97, 98, 99]
    """
    short = [t - k for k in range(short_stride, min(recent, t) + 1, short_stride)][:budget]
    span, room = t - recent, budget - len(short)
    if span <= 0 or room == 0:
        return short[::-1]
    # span-d, span-2d, .. > 0, and 0 itself: ceil(span / d) frames; the smallest d that fits room
    stride = max(long_stride, math.ceil(span / room))
    long = [*range(span - stride, 0, -stride), 0]
    return long[::-1] + short[::-1]


def even(t: int, budget: int) -> list[int]:
    """np.linspace(0, t - 1, min(t, budget), dtype=int), as in the released converter.

    The arithmetic is numpy's (one step, multiplied, floored, the end set exactly), because the
    released files hold its rounding: 3 * (7 / 3) may be 7 or less.

    >>> even(5, 3), even(1, 16), even(0, 16)
    ([0, 2, 4], [0], [])
    """
    n = min(t, budget)
    if n <= 1:
        return [0] * n
    step = (t - 1) / (n - 1)
    return [math.floor(k * step) for k in range(n - 1)] + [t - 1]


def exponential(t: int, budget: int) -> list[int]:
    """Ages 1 .. t in geometric progression, t^(k/(n-1)), each at least one step more than the last.

    >>> exponential(100, 5)                                   # ages 1, 3, 10, 32, 100
    [0, 68, 90, 97, 99]
    >>> exponential(4, 16)
    [0, 1, 2, 3]
    """
    n = min(t, budget)
    ages = []
    for k in range(n):
        age = round(t ** (k / max(n - 1, 1)))
        ages.append(max(age, ages[-1] + 1) if ages else 1)
    return [t - age for age in reversed(ages)]


# ---------------------------------------------------------------- flags


def add_memory_args(add) -> None:
    """The memory's flags, for `add = parser.add_argument_group(..).add_argument`."""
    add("--memory", choices=MEMORIES, default="lsm", help="how past frames are chosen (lsm.py)")
    add("--memory-budget", type=int, default=16, help="the most past frames shown; the paper's 16")
    add("--memory-recent", type=int, default=8, help="M, steps in the short part (not public)")
    add("--short-stride", type=int, default=1, help="d1, within the short part (not public)")
    add("--long-stride", type=int, default=4, help="d2, before it; grows to fit (not public)")


def memory_from_args(args) -> dict:
    """Parsed flags -> contract["memory"], which is saved with a checkpoint."""
    if args.memory_budget < 0 or args.memory_recent < 0:
        raise UserError("--memory-budget and --memory-recent count frames: give 0 or more")
    if args.short_stride < 1 or args.long_stride < 1:
        raise UserError("--short-stride and --long-stride are steps between frames: give 1 or more")
    return {
        "name": args.memory,
        "budget": args.memory_budget,
        "recent": args.memory_recent,
        "short_stride": args.short_stride,
        "long_stride": args.long_stride,
    }
