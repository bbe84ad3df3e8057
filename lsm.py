"""
Long-Short Memory: which past frames does the policy see at step t? (VLN-R1, section 3 of [1])

A walk has tens to hundreds of frames and a prompt has room for about sixteen. What just happened is
needed in detail (am I in the middle of a turn? did I get past that door?), what happened long ago
only in outline (where did I come from?). So the recent past is sampled densely, the rest thinly:

    H_t = {v_{t-d1}, v_{t-2 d1}, .., v_{t-M}}              short part: the last M steps, every d1
        U {v_{t-M-d2}, v_{t-M-2 d2}, .., v_0}              long part: all before that, every d2 > d1

    t = 30, M = 8, d1 = 1, d2 = 4, a budget of 16 (the defaults; # is a frame that is shown):

    step    0         1         2         3
            0123456789012345678901234567890
    shown   #.#...#...#...#...#...########@          @ the current frame, v_t: always shown, and
            '-------- long --------'short-'            not part of the memory

The formula leaves three things open. Our answers:
  * Small t: nothing before frame 0 exists, so the parts are shorter, and at t = 0 empty.
  * The end of the long part: v_0 stands in the formula, so frame 0 is always shown, although the
    steps of d2 seldom land on it. It is where "turn around" and "leave the room" were said.
  * Too long a walk: as written the long part has (t-M)/d2 frames, without bound. Here the long
    stride grows to the smallest whole number at which the long part fits into what the short part
    leaves of the budget: detail fades, but the walk stays covered back to its start.

M, d1 and d2 are not public. M = 8, d1 = 1: half of the paper's budget of 16 for the short part,
every frame of it; at 30 degrees a turn (RxR) that remembers two thirds of a full turn on the spot.
d2 = 4: a metre walked between long frames; it starts to grow at t = 41, two thirds of an R2R walk
(mean 58 actions). Beside it, for the paper's comparison: `even` (what its released converter does)
and `exponential` (no formula was published; ours).

Run it   python -m doctest lsm.py -v
Expect   past frames only (< t), chronological, no doubles, never more than the budget

[1] VLN-R1, https://arxiv.org/abs/2506.17221
"""
import math

from cli import UserError

MEMORIES = ("lsm", "even", "exponential")


def pick_frames(t, name="lsm", budget=16, recent=8, short_stride=1, long_stride=4):
    """Indices of the past frames to show at step t, oldest first; the current frame t not included.

    name is one of MEMORIES, budget the most frames to return, recent is M (in steps), the strides
    are d1 and d2 (in steps); the last three concern "lsm" alone. The keywords are the keys of
    nav["memory"], so that a checkpoint's settings go in as pick_frames(t, **nav["memory"]).

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
    assert name in MEMORIES, f"no memory is called {name!r}; there are {', '.join(MEMORIES)}"
    assert t >= 0, "steps are counted from 0"
    if budget == 0:
        return []
    if name == "even":
        return even(t, budget)
    if name == "exponential":
        return exponential(t, budget)
    return long_short(t, budget, recent, short_stride, long_stride)


def long_short(t, budget, recent, short_stride, long_stride):
    """The formula above. If the budget cannot hold the short part, its nearest frames are kept.

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


def even(t, budget):
    """np.linspace(0, t - 1, min(t, budget), dtype=int), as the released converter writes it.

    In numpy's own arithmetic (one step, multiplied, floored, the end set exactly), because released
    files hold its roundings: 3 * (7 / 3) may or may not be 7, and it must be the same here.

    >>> even(5, 3), even(1, 16), even(0, 16)
    ([0, 2, 4], [0], [])
    """
    n = min(t, budget)
    if n <= 1:
        return [0] * n
    step = (t - 1) / (n - 1)
    return [math.floor(k * step) for k in range(n - 1)] + [t - 1]


def exponential(t, budget):
    """Ages 1 .. t in a geometric row, t^(k/(n-1)), each at least one step older than the last.

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


# ---------------------------------------------------------------- the flags of whoever trains


def add_memory_args(add):
    """The memory's flags, for `add = parser.add_argument_group(..).add_argument`."""
    add("--memory", choices=MEMORIES, default="lsm", help="how past frames are chosen (lsm.py)")
    add("--memory-budget", type=int, default=16, help="the most past frames shown; the paper's 16")
    add("--memory-recent", type=int, default=8, help="M, steps in the short part (not public)")
    add("--short-stride", type=int, default=1, help="d1, within the short part (not public)")
    add("--long-stride", type=int, default=4, help="d2, before it; grows to fit (not public)")


def memory_from_args(args):
    """Parsed flags -> nav["memory"], the dictionary that travels with a checkpoint."""
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
