"""
From text to a plan, and from a plan to a reward (VLN-R1 [1], stage two).

The policy answers in words: "A. Move forward 25 cm, C. Turn right 30 degrees, ...", one phrase for
each of its next n = 6 actions. Only this file writes and parses that language, so an answer means
the same in training, in the reward and on the robot. There are two parsers, on purpose:

    strict  (parse_plan)     for the reward: a position holds an exact phrase, or it earns 0.
                             Anything more generous would reward leaving the grammar.
    lenient (parse_control)  for the robot, which must act now: a clear letter is enough, and an
                             unclear position ends the plan. It never picks a random action.

The time-decayed reward (TDR) compares a plan a with what the expert did next, a*:

    R = sum_{k=0}^{n-1} gamma^k [a_k = a*_k]  /  sum_{k=0}^{n-1} gamma^k            in [0, 1]

The next action matters most; the sixth will probably be planned again before it is carried out.
Each position counts by itself, as in the paper. The paper gives no gamma; ours is 0.8: the sixth
position weighs a third of the first. Dividing by the maximum is ours too: it changes no advantage
that is divided by the group's standard deviation, and 1 means "the expert's plan". The paper's
ablation compares uniform (gamma = 1), linear (weights n, n-1, .. 1) and hard (all or nothing). On
R2R (val_seen) a plan of six times "forward" already earns 0.647.

Run it   python -m doctest reward.py -v          # the worked examples below
Imports  the standard library only, in Python 3.9 syntax: a simulator's interpreter loads this file
[1] VLN-R1, https://arxiv.org/abs/2506.17221 (section 3 of the method: TDR, eq. for R_nav)
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Optional

MAX_ANSWER_TOKENS = 96  # a plan of six moves is 54 tokens of Qwen's
STOP, FORWARD, LEFT, RIGHT = 0, 1, 2, 3  # habitat's ids; ground-truth files use the same
RESERVED_TOKENS = ("<image>", "<|")  # an instruction must not hold the markup of frames and turns


# ---------------------------------------------------------------- the language of plans


def action_phrases(turn_deg: float, forward_m: float) -> dict[int, str]:
    """Action id -> its phrase. The phrase states the angle that the simulator turns.

    >>> list(action_phrases(30, 0.25).values())
    ['A. Move forward 25 cm', 'B. Turn left 30 degrees', 'C. Turn right 30 degrees', 'D. Stop']
    >>> action_phrases(15.0, 0.25)[LEFT]                     # R2R turns by 15, RxR by 30
    'B. Turn left 15 degrees'
    """
    return {
        FORWARD: f"A. Move forward {round(forward_m * 100, 3):g} cm",
        LEFT: f"B. Turn left {turn_deg:g} degrees",
        RIGHT: f"C. Turn right {turn_deg:g} degrees",
        STOP: "D. Stop",
    }


def write_plan(actions: Sequence[int], phrases: dict[int, str]) -> str:
    """
    >>> write_plan([RIGHT, FORWARD, STOP], action_phrases(30, 0.25))
    'C. Turn right 30 degrees, A. Move forward 25 cm, D. Stop'
    """
    return ", ".join(phrases[a] for a in actions)


def parse_plan(text: str, phrases: dict[int, str], horizon: int) -> list[int | None]:
    """STRICT: `horizon` positions, an action id where the phrase is exact, None elsewhere.

    Commas separate positions; blanks around one are ignored and nothing else is.
    Missing positions are None; those beyond the horizon are dropped here and counted by `score`.

    >>> phrases = action_phrases(30, 0.25)
    >>> parse_plan("C. Turn right 30 degrees, A. Move forward 25 cm, D. Stop", phrases, 4)
    [3, 1, 0, None]
    >>> parse_plan("C. Turn right 15 degrees, a. move forward 25 cm, D. Stop.", phrases, 3)
    [None, None, None]
    """
    actions = {phrase: action for action, phrase in phrases.items()}
    plan = [actions.get(part.strip(" ")) for part in text.split(",")[:horizon]]
    return plan + [None] * (horizon - len(plan))


def parse_control(text: str, phrases: dict[int, str]) -> list[int]:
    """LENIENT: the leading actions that can be understood, up to and including the first stop.

    A position is understood if it holds a letter alone, a letter and one of . ) : and then anything
    (the letter decides), or the phrase's words without the letter; case and spacing do not matter.
    The first position with none of these ends the plan. [] means that nothing was understood; the
    caller's flag decides what happens then.

    >>> phrases = action_phrases(30, 0.25)
    >>> parse_control("b. turn  LEFT 30 degrees,A, D. Stop, A", phrases)
    [2, 1, 0]
    >>> parse_control("move forward 25 cm, a chair is ahead, A. Move forward 25 cm", phrases)
    [1]
    >>> parse_control("I see a red sofa.", phrases)
    []
    """
    letters = {phrase[0].lower(): action for action, phrase in phrases.items()}
    words = {phrase[3:].lower(): action for action, phrase in phrases.items()}
    actions = []
    for part in text.split(","):
        part = " ".join(part.lower().split())
        lettered = re.match(r"([a-z]) ?(?:$|[.):])", part)
        action = letters.get(lettered.group(1)) if lettered else words.get(part)
        if action is None:
            break
        actions.append(action)
        if action == STOP:  # actions after a stop are never executed
            break
    return actions


# ---------------------------------------------------------------- plan x expert -> reward


Plan = Sequence[Optional[int]]            # action ids; None is a malformed or an unknown action


def weighted_accuracy(plan: Plan, expert_plan: Plan, weights: Sequence[float]) -> float:
    """sum_k w_k [a_k = a*_k] / sum_k w_k over the positions whose expert action is known.

    A None in the plan is malformed and earns 0. A None in the expert's is unknown (a ShareGPT
    answer that is no plan): both sums leave that position out. If no position is known, the result
    is 0.
    """
    plan = list(plan) + [None] * (len(expert_plan) - len(plan))
    known = [(w, a == best) for w, a, best in zip(weights, plan, expert_plan) if best is not None]
    total = sum(w for w, _ in known)
    return sum(w for w, right in known if right) / total if total else 0.0


def time_decayed_reward(plan: Plan, expert_plan: Plan, gamma: float = 0.8) -> float:
    """TDR [1], divided by its maximum: in [0, 1].

    Three positions, the second one wrong, gamma = 1/2: (1 + 0 + 1/4) / (1 + 1/2 + 1/4) = 5/7.

    >>> time_decayed_reward([FORWARD, LEFT, STOP], [FORWARD, RIGHT, STOP], gamma=0.5) == 5 / 7
    True
    >>> forward, left = [FORWARD] * 6, [LEFT] * 6
    >>> round(time_decayed_reward([LEFT] + forward[1:], forward), 3)      # the first one wrong
    0.729
    >>> round(time_decayed_reward(forward[:5] + [LEFT], forward), 3)      # the last one wrong
    0.911
    >>> time_decayed_reward(left, forward), time_decayed_reward(forward, forward)
    (0.0, 1.0)
    >>> time_decayed_reward([FORWARD, LEFT], [FORWARD, None])             # unknown: left out
    1.0
    """
    assert 0 <= gamma <= 1, "gamma is a discount: between 0 (only the next action) and 1 (uniform)"
    return weighted_accuracy(plan, expert_plan, [gamma**k for k in range(len(expert_plan))])


def uniform_reward(plan: Plan, expert_plan: Plan) -> float:
    """Every position weighs the same.

    >>> uniform_reward([FORWARD, LEFT, STOP, STOP], [FORWARD, RIGHT, STOP, STOP])
    0.75
    """
    return weighted_accuracy(plan, expert_plan, [1] * len(expert_plan))


def linear_reward(plan: Plan, expert_plan: Plan) -> float:
    """Weights n, n-1, .. 1. Four positions, the second one wrong: (4 + 2 + 1) / 10.

    >>> linear_reward([FORWARD, LEFT, STOP, STOP], [FORWARD, RIGHT, STOP, STOP])
    0.7
    """
    return weighted_accuracy(plan, expert_plan, range(len(expert_plan), 0, -1))


def hard_reward(plan: Plan, expert_plan: Plan) -> float:
    """1 if every known position is right, else 0. (The paper names "hard" and does not define it.)

    >>> hard_reward([FORWARD, STOP], [FORWARD, STOP]), hard_reward([FORWARD, LEFT], [FORWARD, STOP])
    (1.0, 0.0)
    """
    return float(uniform_reward(plan, expert_plan) == 1.0)


REWARDS = {
    "tdr": time_decayed_reward,
    "uniform": uniform_reward,
    "linear": linear_reward,
    "hard": hard_reward,
}


class Score(NamedTuple):
    reward: float
    plan: list
    expert_plan: list
    first_correct: bool          # is the next action the expert's?
    malformed: int               # positions that are missing, not a phrase, or beyond the horizon


def score(text: str, expert_plan: Plan, phrases: dict[int, str], reward: str = "tdr",
          gamma: float = 0.8) -> Score:
    """Score one answer against the expert's next actions. No text raises an error.

    >>> phrases = action_phrases(30, 0.25)
    >>> score("A. Move forward 25 cm, D. Halt", [FORWARD, STOP], phrases, reward="uniform")
    Score(reward=0.5, plan=[1, None], expert_plan=[1, 0], first_correct=True, malformed=1)
    """
    plan = parse_plan(text, phrases, len(expert_plan))
    extra = max(0, len(text.split(",")) - len(expert_plan))
    kwargs = {"gamma": gamma} if reward == "tdr" else {}
    return Score(REWARDS[reward](plan, expert_plan, **kwargs), plan, list(expert_plan),
                 first_correct=plan[0] is not None and plan[0] == expert_plan[0],
                 malformed=plan.count(None) + extra)
