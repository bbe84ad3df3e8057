import doctest
import random
import subprocess
import sys
from pathlib import Path

import reward
from reward import FORWARD, LEFT, RIGHT, STOP, action_phrases, parse_control, parse_plan, score

PHRASES = action_phrases(30, 0.25)
EXPERT = [LEFT, FORWARD, FORWARD, RIGHT, STOP, STOP]


def garbage(rng):
    """Texts from soup to near misses: letters, unicode, and real answers with something broken."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(chr(rng.randrange(rng.choice([128, 0xD800]))) for _ in range(60))
    if kind == 1:
        return "".join(rng.choice("ABCDabcd.,:) \n\t\x00,,") for _ in range(rng.randrange(40)))
    text = reward.write_plan([rng.randrange(4) for _ in range(rng.randrange(9))], PHRASES)
    if kind == 2 and text:
        i = rng.randrange(len(text))
        text = text[:i] + rng.choice(["", ",", "\n", "é", "🙂"]) + text[i + rng.randrange(3) :]
    return text + rng.choice(["", ".", ",", "<|im_end|>", ", " * 500])


def test_doctests():
    assert doctest.testmod(reward).failed == 0


def test_no_text_raises_and_every_reward_stays_in_bounds():
    rng = random.Random(0)
    for _ in range(3000):
        text = garbage(rng)
        expert = [rng.choice([None, 0, 1, 2, 3]) for _ in range(6)]
        for name in reward.REWARDS:
            scored = score(text, expert, PHRASES, reward=name)
            assert 0.0 <= scored.reward <= 1.0 and len(scored.plan) == 6
            assert 0 <= scored.malformed <= 6 + text.count(",") + 1
        control = parse_control(text, PHRASES)
        assert STOP not in control[:-1] and all(a in PHRASES for a in control)


def test_what_is_written_is_read():
    rng = random.Random(1)
    for _ in range(200):
        plan = [rng.randrange(4) for _ in range(6)]
        text = reward.write_plan(plan, PHRASES)
        assert parse_plan(text, PHRASES, 6) == plan
        cut = plan.index(STOP) + 1 if STOP in plan else 6
        assert parse_control(text, PHRASES) == plan[:cut]
        scored = score(text, plan, PHRASES)
        assert scored == (1.0, plan, plan, True, 0)


def test_strict_positions():
    good = PHRASES[FORWARD]
    near_misses = [good[:-1], good + ".", good.lower(), good + "\n", good + " please", good[3:]]
    for bad in [*near_misses, "A", "", good + " " + good, "B. Turn left 15 degrees"]:
        assert parse_plan(bad, PHRASES, 1) == [None], bad
        assert score(bad, [FORWARD], PHRASES).reward == 0.0
    assert parse_plan(f" {good} ,{good}", PHRASES, 2) == [FORWARD, FORWARD]


def test_missing_and_extra_positions_are_counted():
    text = reward.write_plan(EXPERT, PHRASES)
    empty = score("", EXPERT, PHRASES)
    assert empty == (0.0, [None] * 6, EXPERT, False, 6)
    assert score(reward.write_plan(EXPERT[:4], PHRASES), EXPERT, PHRASES).malformed == 2
    long = score(text + ", D. Stop, nonsense", EXPERT, PHRASES)
    assert long == (1.0, EXPERT, EXPERT, True, 2)


def test_rewards_by_hand():
    plan = [LEFT, FORWARD, LEFT, RIGHT, None, STOP]  # positions 2 and 4 wrong
    weights = [0.8**k for k in range(6)]
    tdr = (weights[0] + weights[1] + weights[3] + weights[5]) / sum(weights)
    assert abs(reward.time_decayed_reward(plan, EXPERT) - tdr) < 1e-12
    assert reward.uniform_reward(plan, EXPERT) == 4 / 6
    assert reward.linear_reward(plan, EXPERT) == (6 + 5 + 3 + 1) / 21
    assert reward.hard_reward(plan, EXPERT) == 0.0
    assert abs(reward.time_decayed_reward(plan, EXPERT, gamma=1.0) - 4 / 6) < 1e-12
    assert reward.time_decayed_reward(plan, EXPERT, gamma=0.0) == 1.0  # only the next action
    for name, reward_of in reward.REWARDS.items():
        assert reward_of(EXPERT, EXPERT) == 1.0 and reward_of([None] * 6, EXPERT) == 0.0, name
        assert reward_of(plan, [None] * 6) == 0.0, name  # nothing known: nothing earned


def test_an_unknown_label_is_neither_right_nor_wrong():
    expert = [LEFT, None, FORWARD]
    assert reward.uniform_reward([LEFT, RIGHT, FORWARD], expert) == 1.0
    assert reward.uniform_reward([LEFT, None, STOP], expert) == 0.5
    assert reward.hard_reward([LEFT, STOP, FORWARD], expert) == 1.0
    assert not score("nonsense", [None, LEFT], PHRASES).first_correct  # None == None does not count


def test_an_earlier_position_never_weighs_less():
    for name in ["tdr", "uniform", "linear"]:
        plans = [EXPERT[:k] + [None] + EXPERT[k + 1 :] for k in range(6)]  # position k wrong
        earned = [reward.REWARDS[name](plan, EXPERT) for plan in plans]
        assert earned == sorted(earned), name


def test_control_parses_clear_letters_and_words():
    read = {
        "A": [FORWARD], "a)": [FORWARD], "B: left": [LEFT], " c . turn right": [RIGHT],
        "TURN RIGHT 30 DEGREES, stop": [RIGHT, STOP], "D. Stop, A, A": [STOP], "E. Fly": [],
        "A chair": [], "": [], ",A": [], "A. Move forward 25 cm, ???, D. Stop": [FORWARD],
        "B. Turn left 90 degrees": [LEFT],  # the letter decides
    }
    for text, actions in read.items():
        assert parse_control(text, PHRASES) == actions, text


def test_phrases_state_the_robots_numbers():
    assert action_phrases(22.5, 0.3)[RIGHT] == "C. Turn right 22.5 degrees"
    assert action_phrases(15, 0.29)[FORWARD] == "A. Move forward 29 cm"


def test_a_user_error_is_a_sentence_and_exit_2():
    code = ("from cli import UserError, run_cli\n"
            "def main(args): raise UserError('no house at data/x; run world.houses first')\n"
            "run_cli(main, lambda: None)")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("error: no house at data/x; run world.houses first\n")
    assert "Traceback" not in done.stderr
