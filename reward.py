"""
From text to a plan, and from a plan to a reward (VLN-R1, stage two).

The policy answers in words: "A. Move forward 25 cm, C. Turn right 30 degrees, ...", one phrase for
each of its next n = 6 actions. This file is the only place that writes and reads that language, so
that training, the reward and the robot cannot disagree about what an answer means. It reads it in
two ways, on purpose:

    strict  (parse_plan)     for the reward: a slot is a phrase to the letter, or it is worth 0.
                             Generosity here would pay the policy for leaving the grammar.
    lenient (parse_control)  for the robot: it has to do something now, so a clear letter is enough,
                             and what cannot be understood ends the plan. Never a random action.

The time-decayed reward (TDR) compares a plan a with what the expert did next, a*:

    R = sum_{k=0}^{n-1} gamma^k [a_k = a*_k]  /  sum_{k=0}^{n-1} gamma^k            in [0, 1]

The next action matters most; the sixth will probably be planned anew before it is due. A slot
counts by itself: a wrong first action does not take away the second one's worth (as in the paper's
formula). The paper gives no gamma; 0.8 is ours: the sixth slot weighs a third of the first.
Dividing by the maximum is ours too: it changes no advantage (GRPO divides by the group's spread),
and 1 means "the expert's plan". Beside it, as in the paper's ablation: uniform (gamma = 1), linear
(weights n, n-1, .. 1) and hard (all or nothing). A yardstick for reading curves: on R2R a plan of
six times "forward" already earns 0.64; only what rises above that has been learned.

Run it   python -m doctest reward.py -v          # the worked examples below
Imports  the standard library only, in Python 3.9 syntax: a simulator's interpreter loads this file

[1] VLN-R1, https://arxiv.org/abs/2506.17221 (section 3 of the method: TDR, eq. for R_nav)
"""
import re

STOP, FORWARD, LEFT, RIGHT = 0, 1, 2, 3  # habitat's ids; ground-truth files use the same
RESERVED_MARKS = ("<image>", "<|")  # in an instruction they would be read as a picture or a turn


# ---------------------------------------------------------------- the language of plans


def action_phrases(turn_deg, forward_m):
    """Action id -> what the policy writes for it. The words tell the angle that is really turned.

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


def write_plan(actions, phrases):
    """
    >>> write_plan([RIGHT, FORWARD, STOP], action_phrases(30, 0.25))
    'C. Turn right 30 degrees, A. Move forward 25 cm, D. Stop'
    """
    return ", ".join(phrases[a] for a in actions)


def parse_plan(text, phrases, horizon):
    """STRICT: `horizon` slots, an action id where the phrase is written exactly, None elsewhere.

    Slots are what stands between commas; blanks around a slot are forgiven and nothing else.
    Missing slots are None; slots beyond the horizon are dropped here and counted by `score`.

    >>> phrases = action_phrases(30, 0.25)
    >>> parse_plan("C. Turn right 30 degrees, A. Move forward 25 cm, D. Stop", phrases, 4)
    [3, 1, 0, None]
    >>> parse_plan("C. Turn right 15 degrees, a. move forward 25 cm, D. Stop.", phrases, 3)
    [None, None, None]
    """
    actions = {phrase: action for action, phrase in phrases.items()}
    plan = [actions.get(slot.strip(" ")) for slot in text.split(",")[:horizon]]
    return plan + [None] * (horizon - len(plan))


def parse_control(text, phrases):
    """LENIENT: the leading actions that can be understood, up to and including the first stop.

    A slot is understood if it is a letter alone, a letter and one of . ) : and then anything (the
    letter decides), or the phrase's words without the letter; case and spacing do not matter. The
    first slot that is none of these ends the plan. [] means that nothing was understood: what to do
    then is the caller's flag, never a guess made here.

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
    for slot in text.split(","):
        slot = " ".join(slot.lower().split())
        lettered = re.match(r"([a-z]) ?(?:$|[.):])", slot)
        action = letters.get(lettered.group(1)) if lettered else words.get(slot)
        if action is None:
            break
        actions.append(action)
        if action == STOP:  # whatever follows a stop will never be walked
            break
    return actions


# ---------------------------------------------------------------- the language of dialogs


def merged_phrases(turn_deg, forward_m, merge=3):
    """(action, how often) -> what a dialog's answer says for it: 1 to `merge` equal actions in one.

    >>> list(merged_phrases(15, 0.25, 2).values())     # doctest: +NORMALIZE_WHITESPACE
    ['move forward 25 cm', 'move forward 50 cm', 'turn left 15 degrees', 'turn left 30 degrees',
     'turn right 15 degrees', 'turn right 30 degrees', 'stop']
    """
    words = {FORWARD: ("move forward", 100 * forward_m, "cm"), LEFT: ("turn left", turn_deg,
             "degrees"), RIGHT: ("turn right", turn_deg, "degrees")}
    return {**{(action, n): f"{verb} {round(n * size, 3):g} {unit}"
               for action, (verb, size, unit) in words.items() for n in range(1, merge + 1)},
            (STOP, 1): "stop"}


def parse_answer(text, merged, horizon):
    """A dialog's answer -> the actions it stands for, one by one; [] unless all of it is right.

    merged: merged_phrases(..); at most `horizon` of them, and nothing after a stop. There is one
    reader of dialogs and it is strict: what trains is what walks.

    >>> merged = merged_phrases(30, 0.25)
    >>> parse_answer("move forward 75 cm, turn left 30 degrees, stop", merged, 3)
    [1, 1, 1, 2, 0]
    >>> parse_answer("move forward 80 cm", merged, 3), parse_answer("stop, stop", merged, 3)
    ([], [])
    """
    read, slots = {phrase: key for key, phrase in merged.items()}, text.split(", ")
    keys = [read.get(slot) for slot in slots]
    if None in keys or len(keys) > horizon or (STOP, 1) in keys[:-1]:
        return []
    return [action for action, n in keys for _ in range(n)]


# ---------------------------------------------------------------- plan x expert -> reward


def agreement(plan, expert, weights):
    """sum_k w_k [a_k = a*_k] / sum_k w_k over the slots whose expert action is known.

    plan and expert are action ids or None: a None in the plan is malformed and earns 0; a None in
    the expert is unknown (recordings after a stumble) and the slot is left out above and below the
    line. With no known slot at all nothing can be judged and the reward is 0.0 for every plan.
    """
    plan = list(plan) + [None] * (len(expert) - len(plan))
    known = [(w, a == best) for w, a, best in zip(weights, plan, expert) if best is not None]
    total = sum(w for w, _ in known)
    return sum(w for w, right in known if right) / total if total else 0.0


def time_decayed_reward(plan, expert, gamma=0.8):
    """TDR [1], divided by its maximum: in [0, 1].

    Three slots, the second one wrong, gamma = 1/2: (1 + 0 + 1/4) / (1 + 1/2 + 1/4) = 5/7.

    >>> time_decayed_reward([FORWARD, LEFT, STOP], [FORWARD, RIGHT, STOP], gamma=0.5) == 5 / 7
    True
    >>> forward, left = [FORWARD] * 6, [LEFT] * 6
    >>> round(time_decayed_reward([LEFT] + forward[1:], forward), 3)      # the first slot wrong
    0.729
    >>> round(time_decayed_reward(forward[:5] + [LEFT], forward), 3)      # the last slot wrong
    0.911
    >>> time_decayed_reward(left, forward), time_decayed_reward(forward, forward)
    (0.0, 1.0)
    >>> time_decayed_reward([FORWARD, LEFT], [FORWARD, None])             # unknown: left out
    1.0
    """
    assert 0 <= gamma <= 1, "gamma is a discount: between 0 (only the next action) and 1 (uniform)"
    return agreement(plan, expert, [gamma**k for k in range(len(expert))])


def uniform_reward(plan, expert):
    """Every slot weighs the same.

    >>> uniform_reward([FORWARD, LEFT, STOP, STOP], [FORWARD, RIGHT, STOP, STOP])
    0.75
    """
    return agreement(plan, expert, [1] * len(expert))


def linear_reward(plan, expert):
    """Weights n, n-1, .. 1. Four slots, the second one wrong: (4 + 2 + 1) / 10.

    >>> linear_reward([FORWARD, LEFT, STOP, STOP], [FORWARD, RIGHT, STOP, STOP])
    0.7
    """
    return agreement(plan, expert, range(len(expert), 0, -1))


def hard_reward(plan, expert):
    """1 if every known slot is right, else 0. (The paper names "hard" without defining it: ours.)

    >>> hard_reward([FORWARD, STOP], [FORWARD, STOP]), hard_reward([FORWARD, LEFT], [FORWARD, STOP])
    (1.0, 0.0)
    """
    return float(uniform_reward(plan, expert) == 1.0)


REWARDS = {
    "tdr": time_decayed_reward,
    "uniform": uniform_reward,
    "linear": linear_reward,
    "hard": hard_reward,
}


def score(text, expert, phrases, reward="tdr", gamma=0.8):
    """Mark one answer against the expert's next actions; any text at all is marked, none raises.

    -> {"reward": in [0, 1], "plan": parsed slots, "first": first action right?, "malformed": n}
    where malformed counts slots that are missing, not a phrase, or beyond the horizon.

    >>> phrases = action_phrases(30, 0.25)
    >>> score("A. Move forward 25 cm, D. Halt", [FORWARD, STOP], phrases, reward="uniform")
    {'reward': 0.5, 'plan': [1, None], 'first': True, 'malformed': 1}
    """
    plan = parse_plan(text, phrases, len(expert))
    extra = max(0, len(text.split(",")) - len(expert))
    knobs = {"gamma": gamma} if reward == "tdr" else {}
    return {
        "reward": REWARDS[reward](plan, expert, **knobs),
        "plan": plan,
        "first": plan[0] is not None and plan[0] == expert[0],
        "malformed": plan.count(None) + extra,
    }
