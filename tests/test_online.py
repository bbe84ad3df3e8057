"""activevln/: dialogs against transformers' own forward, groups by hand, runs and kill -9.

Run it   python -m pytest tests/test_online.py
"""
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from helpers import kill_when
from policies import (
    gradients,
    hf_inputs,
    log_of,
    max_difference,
    relative_difference,
    run_on_two_ranks,
    weights_of,
)

import sft
from activevln import grpo_online
from activevln.dialog import (
    DIALOG,
    Dialog,
    DialogCache,
    DialogPolicy,
    dialog_prompt,
    merge_walk,
    merged_phrases,
    parse_answer,
)
from checkpoint import load_policy, save_policy
from cli import UserError
from evaluate import EpisodeState
from make_data import VlnEgo
from reward import FORWARD, LEFT, STOP

torch.set_num_threads(1)
CONTRACT30 = dict(DIALOG, turn_deg=30, dataset="houses")


@pytest.fixture(scope="module")
def policy(ego):
    """Tiny, random weights but for this: it has learned what an answer looks like, not which."""
    data = VlnEgo(ego)
    texts = [e["instruction"] for e in data.episodes]
    policy = load_policy("tiny", contract=CONTRACT30, texts=texts)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    moves = list(policy.merged.values())
    rng = np.random.default_rng(0)
    for _ in range(60):
        dialogs, frames = policy.load_batch(data, [(i, 0) for i in range(4)])
        dialogs = policy.tokenize_answers([d._replace(answers=tuple(
            ", ".join(rng.choice(moves[:-1], rng.integers(1, 3)).tolist()
                      + ["stop"] * (rng.random() < 0.05)) for _ in d.answers)) for d in dialogs])
        loss = -policy(dialogs, frames).sum() / sum(len(a) for d in dialogs for a in d.answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@pytest.fixture(scope="module")
def init(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    save_policy(policy, str(folder))
    return str(folder)


def houses_of(ego):
    return os.path.join(os.path.dirname(os.path.dirname(ego)), "houses")


def args_for(ego, init, out="unused", *more):
    """Two episodes of three walks a step, one simulator: nothing depends on timing."""
    return [f"--init={init}", f"--episodes={houses_of(ego)}", f"--out={out}", "--device=cpu",
            "--sims=1", "--batch-size=2", "--group-size=3", "--lr=1e-3", "--max-steps=2",
            "--val-episodes=2", "--rollouts-every=1", "--action-cap=12", "--turn-cap=6",
            "--rerolls=1", *["--reward=soft_success+0.5*progress"] * ("--groups=state" not in more),
            *more]


@pytest.fixture(scope="module")
def env(ego, init):
    args = grpo_online.parse_args(args_for(ego, init, "unused", "--sims=3"))
    _, env, _ = grpo_online.setup(args, "cpu")
    with env.open():
        yield env


@pytest.fixture(scope="module")
def walks(env, policy):
    """Three sampled walks of each of two episodes."""
    named = [(f"{i}.{g}", env.episodes[i]) for i in range(2) for g in range(3)]
    return env.walk(policy, named)


# ---------------------------------------------------------------- the language and the data


def test_the_parser_is_strict():
    merged = merged_phrases(15, 0.25)
    for text in ("", "stop.", "Stop", "turn left 20 degrees", "move forward 25 cm,stop",
                 "stop, move forward 25 cm", "move forward 25 cm, " * 3 + "stop"):
        assert parse_answer(text, merged, 3) == [], text
    assert parse_answer("turn right 45 degrees, stop", merged, 3) == [3, 3, 3, STOP]
    assert all(parse_answer(text, merged, 1) == [action] * n
               for (action, n), text in merged.items())


def test_merging_keeps_the_walk_and_parts_pushes():
    rng = np.random.default_rng(0)
    joined = Counter()
    for _ in range(300):
        actions = [*rng.integers(1, 4, rng.integers(1, 30)).tolist(), STOP]
        learned = (rng.random(len(actions)) < 0.8).tolist()
        vary = bool(rng.random() < 0.5)
        turns = merge_walk(actions, learned, rng, vary=vary)
        flat = [a for _, keys, _ in turns for a, n in keys for _ in range(n)]
        assert flat == actions
        for t, keys, own in turns:
            n = sum(n for _, n in keys)
            assert learned[t:t + n] == [own] * n
            assert len(keys) <= 3
            assert actions[t] == keys[0][0]
        joined.update(n for _, keys, _ in merge_walk([1] * 3, [True] * 3, rng) for _, n in keys)
    assert set(joined) == {1, 2, 3}


def test_a_perturbation_is_in_the_dialog_and_not_in_the_loss(policy, ego):
    data = VlnEgo(ego)
    walk = data.walks[data.episodes[0]["walk_id"]]
    actions = walk["actions"]
    labels = [str(a) + "0" * 5 for a in actions]
    labels[1] = ""                                             # inside a perturbation
    walk["labels"] = labels
    d = policy.dialog(data, 0, seed=3)
    assert d.in_loss.count(False) == 1 and d.frames[d.in_loss.index(False)][1] == 1
    merged = merged_phrases(30, 0.25)
    assert sum((parse_answer(a, merged, 3) for a in d.answers), []) == actions
    assert policy.dialog(data, 0, 3) == d


# ---------------------------------------------------------------- one forward for a whole walk


def hf_walk_logps(policy, dialog, frames):
    """Per turn, the answer's log-probs (C,) by transformers' forward over the whole dialog, its
    text written by the chat template and its positions found by transformers."""
    turns = []
    for answer in dialog.answers:
        turns += [{"role": "user", "content": "\x00"},
                  {"role": "assistant", "content": policy.text(answer)}]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    chat = policy.tokenizer.apply_chat_template(turns, tokenize=False)
    opening = dialog_prompt(dialog.instruction, policy.contract).replace("<image>", picture)
    chat = chat.replace("\x00", opening, 1).replace("\x00", picture)
    chat = chat.replace("<|image_pad|>", "<|image_pad|>" * 4)
    ids = policy.tokenizer(chat, return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = policy.model(**hf_inputs(policy, ids, [frames[k] for k in dialog.frames])).logits[0]
    logits[:, policy.banned] = -math.inf
    logps, ids, at, found = logits.log_softmax(-1), ids[0].tolist(), 0, []
    opener = policy.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for answer in dialog.answers:
        at = next(i for i in range(at, len(ids)) if ids[i:i + len(opener)] == opener) + len(opener)
        assert ids[at:at + len(answer)] == list(answer)
        found.append(logps[range(at - 1, at + len(answer) - 1), list(answer)])
    return found


def test_a_whole_walk_in_one_forward_equals_transformers(policy, ego):
    """Values, and gradients: with only answers in the loss, what the camera saw has none of its
    own. Walks of unequal length share rows."""
    data = VlnEgo(ego)
    dialogs, frames = policy.load_batch(data, [(i, 1) for i in range(5)])
    dialogs = policy.tokenize_answers(dialogs)
    ours = policy(dialogs, frames)
    theirs = [torch.cat(hf_walk_logps(policy, d, frames)) for d in dialogs]
    for row, want in zip(ours, theirs):
        torch.testing.assert_close(row[:len(want)], want, atol=1e-5, rtol=1e-4)
        assert (row[len(want):] == 0).all()
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])         # advantages: the third is dead
    mine = gradients(policy, (weights[:, None] * ours).sum())
    hf = gradients(policy, sum(w * t.sum() for w, t in zip(weights, theirs)))
    assert relative_difference(mine, hf) < 1e-4
    alone = gradients(policy, policy(dialogs[2:3], frames).sum() * 0)
    assert all(g.abs().max() == 0 for g in alone.values())


def test_branches_equal_dialogs_that_went_another_way(policy, ego):
    data = VlnEgo(ego)
    dialogs, frames = policy.load_batch(data, [(i, 1) for i in range(3)])
    dialogs = policy.tokenize_answers(dialogs)
    other = [policy._encode(text) + [policy.end_token] for text in (
        "turn left 60 degrees, move forward 25 cm, stop", "stop", "move forward 75 cm")]
    branches = [[(0, other[0]), (1, other[1]), (1, other[0])], [(2, other[2])], [(1, other[1])]]
    rows = iter(policy(dialogs, frames, branches))
    for dialog, some in zip(dialogs, branches):
        for turn, answer in some:
            went = dialog._replace(answers=(*dialog.answers[:turn], tuple(answer)),
                                   frames=dialog.frames[:turn + 1])
            want = policy([went], frames)[0][-len(answer):]
            torch.testing.assert_close(next(rows)[:len(answer)], want, atol=1e-5, rtol=1e-4)


def test_sft_learns_dialogs_and_resumes(ego, tmp_path):
    flags = ["--model=tiny", "--prompt=dialog", "--vary-turns", f"--data={ego}", "--device=cpu",
             "--batch-size=4", "--lr=2e-3", "--max-steps=12", "--save-every=6",
             "--micro-tokens=500"]
    for out, stop in (("a", 12), ("b", 6), ("b", 12)):
        sft.main(sft.parse_args([*flags, f"--out={tmp_path / out}", f"--stop-after={stop}"]))
    losses = [row["loss"] for row in log_of(tmp_path / "a")]
    assert losses[-1] < 0.8 * losses[0] and max_difference(
        weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0
    contract = json.loads((tmp_path / "a" / "nav.json").read_text())
    assert contract["prompt"] == "dialog-1"
    assert contract["merge"] == 3
    assert "memory" not in contract


# ---------------------------------------------------------------- walking


def hf_greedy(policy, instruction, turns, frame, limit=20):
    """The next answer by transformers: one full forward over everything, for every token."""
    dialog = Dialog(instruction, tuple(range(len(turns) + 1)),
                    (*(tuple(a) for _, (a, *_) in turns), ()), ())
    seen = [f for f, _ in turns] + [frame]
    segment, _ = policy.dialog_tokens(dialog, policy.encode_frames(seen))
    answer = []
    while len(answer) < limit and answer[-1:] != [policy.end_token]:
        row = torch.tensor([segment.ids + answer])
        logits = policy.model(**hf_inputs(policy, row, seen)).logits[0, -1]
        logits[policy.banned] = -math.inf
        answer.append(int(logits.argmax()))
    return answer


def sampled_ids(walk):
    """The ids of all answers drawn, per turn."""
    return [decision.answers for decision in walk.decisions]


@torch.no_grad()
def test_cached_turns_equal_one_full_forward_per_turn(env, policy):
    """Greedy, three robots in company and at different turns, against transformers, and alone."""
    named = [(str(i), env.episodes[i]) for i in range(4)]
    together = env.walk(policy, named, temperature=0.0)
    turns = 0
    for walk, one in zip(together, named):
        for k, decision in enumerate(walk.decisions):
            answer, = decision.answers
            earlier = [(one.frame, one.answers) for one in walk.decisions[:k]]
            assert answer == hf_greedy(policy, walk.instruction, earlier, decision.frame), k
            turns += k > 0
        alone, = env.walk(policy, [one], temperature=0.0)
        assert sampled_ids(alone) == sampled_ids(walk)
        assert alone.actions == walk.actions and alone.end == walk.end
    assert turns > 3


@torch.no_grad()
def test_sampling_is_a_function_of_the_name_and_drafts_change_nothing(env, policy, walks):
    again = env.walk(policy, [(walk.name, walk.episode) for walk in walks[::-1]])[::-1]
    assert list(map(sampled_ids, again)) == list(map(sampled_ids, walks))
    assert len({str(sampled_ids(walk)) for walk in walks[:3]}) > 1
    feature = policy.encode_frames([walks[0].decisions[0].frame])
    plain, drafted = (policy.generate_turn([None] * 9, ["go on"] * 9, feature * 9, 4, 1.3,
                                   list(range(9)), draft)[0] for draft in (False, True))
    assert plain == drafted


def test_dialog_tokens_decode_to_the_executed_actions(policy, walks):
    for walk in walks:
        said = [policy.actions(decision.answers[0]) for decision in walk.decisions]
        assert sum(said, []) == [a for a in walk.actions] or walk.end == "malformed"
        assert [decision.plan for decision in walk.decisions] == said
        moves = sum(a != STOP for a in walk.actions)
        assert len(walk.states) == 1 + moves
        for (ids,) in sampled_ids(walk):
            assert not set(ids) & set(policy.banned.tolist())           # no picture was drawn


def test_the_mask_marks_exactly_the_sampled_ids(policy, walks):
    examples = [grpo_online.TrainingExample(walk, [1.0]) for walk in walks]
    (dialogs, frames, branches, _), mask, *_ = grpo_online.collate(
        examples, "cpu", 1.0, lambda lengths: (lengths, 1.0))
    assert branches is None and mask.sum() == sum(
        len(answers[0]) for walk in walks for answers in sampled_ids(walk))
    logps = policy(dialogs, frames)
    assert torch.equal(mask, logps != 0)
    for dialog, walk in zip(dialogs, walks):
        features = policy.encode_frames([frames[key] for key in dialog.frames])
        (ids, positions, *_), starts = policy.dialog_tokens(dialog, features)
        assert positions.shape == (3, len(ids))
        for (at, _), (answer,) in zip(starts, sampled_ids(walk)):
            assert ids[at:at + len(answer)] == answer
        assert walk.tokens == len(ids)                         # read, and the last word


def test_early_ends():
    args = grpo_online.parse_args(["--action-factor=2", "--action-cap=10", "--turn-cap=3",
                                   "--patience=4"])
    def walk(actions, turns, distances):
        walk = EpisodeState({"episode_id": 1}, "go")
        walk.actions, walk.decisions = [1] * actions, [0] * turns
        walk.states = [{"distance_to_goal": d} for d in distances]
        return walk
    end = grpo_online.early_end
    assert end(walk(7, 1, [3, 2, 1]), 4, args) is None
    assert end(walk(8, 1, [3, 2, 1]), 4, args) == "actions"
    assert end(walk(10, 1, [3, 2, 1]), 40, args) == "actions"
    assert end(walk(2, 3, [3, 2, 1]), 40, args) == "turns"
    assert end(walk(2, 1, [3, 2, 3, 3, 2.5, 2]), 40, args) == "no_progress"
    assert end(walk(2, 1, [3, 2, 3, 3, 2.5]), 40, args) is None
    assert end(walk(2, 1, [3, 2, None, math.nan, 3, math.inf]), 40, args) == "no_progress"


def test_a_killed_simulator_loses_no_episode(ego, init, policy):
    args = grpo_online.parse_args(args_for(ego, init, "unused", "--sims=2"))
    _, env, _ = grpo_online.setup(args, "cpu")
    with env.open() as pool:
        named = [(f"{i}", env.episodes[i]) for i in range(4)]
        want = env.walk(policy, named)
        tally, killed, wait_any = Counter(), [], pool.wait_any
        def wait(*within):
            if len(killed) < 2:
                killed.append(os.kill(pool.workers[len(killed)].process.pid, signal.SIGKILL))
            return wait_any(*within)
        pool.wait_any = wait
        got = env.walk(policy, named, tally=tally)
    assert 1 <= tally["deaths"] <= 2
    assert [w.actions for w in got] == [w.actions for w in want]
    assert [w.end for w in got] == [w.end for w in want]


# ---------------------------------------------------------------- rewards and groups


def ended(distances, end="stop"):
    walk = EpisodeState({"episode_id": 1}, "go")
    walk.states = [{"distance_to_goal": d, "position": [d, 0, 0]} for d in distances]
    walk.end = end
    return walk


def test_scores_by_hand():
    road = [[4, 0, 0], [0, 0, 0]]
    scores = grpo_online.walk_scores(ended([4, 2, 0.25]), 1.0, road)
    assert scores["success"] == 1 and scores["soft_success"] == 0.75
    assert scores["progress"] == 3.75 / 4 and 0 < scores["ndtw"] < 1
    far = grpo_online.walk_scores(ended([4, 9]), 1.0, road)
    assert far["success"] == far["soft_success"] == 0 and far["progress"] == -1
    over = grpo_online.walk_scores(ended([4, 0.25], "actions"), 1.0, road)
    assert over["success"] == over["soft_success"] == over["ndtw"] == 0 < over["progress"]
    for unknown in (None, math.nan, math.inf):               # it stopped where no way is known
        lost = ended([4, 2, 3])
        lost.states[-1]["distance_to_goal"] = unknown
        lost = grpo_online.walk_scores(lost, 1.0, road)
        assert lost["success"] == lost["soft_success"] == 0 and lost["progress"] == -1
    with pytest.raises(UserError, match="--reward"):
        grpo_online.read_reward("success+luck")


def test_a_plan_is_worth_what_it_gains_and_a_right_stop():
    robot = {"turn_deg": 30, "forward_m": 0.25}
    def state(d, yaw=0.0):
        return {"distance_to_goal": d, "position": [0, 0, d], "way": [[0, 0, d], [0, 0, 0]],
                "rotation": [0, math.sin(yaw / 2), 0, math.cos(yaw / 2)]}
    def worth(before, after, plan):
        return grpo_online.plan_reward(before, after, plan, robot, 1.0)
    assert worth(state(3), state(2.5), [1, 1]) == pytest.approx(0.5)        # as the expert would
    assert worth(state(3), state(3), [1, 1]) == pytest.approx(0)            # ran into a wall
    turned = state(3, math.radians(30))
    assert worth(turned, state(3), [LEFT]) == pytest.approx(0.25)
    assert worth(state(3), turned, [LEFT]) == pytest.approx(-0.25)          # and has to turn back
    assert worth(state(0.5), state(0.25), [1, STOP]) == pytest.approx(0.25 + 1)
    assert worth(state(3), state(3), [STOP]) == 0 and worth(state(3), state(3), []) == -1


def test_what_the_expert_does_leaves_one_action_less_to_go(env):
    """Nearly: turns come in 30 degrees, and its steps run a little beside the shortest way."""
    gains = []
    for episode in env.episodes[:6]:
        actions = env.truth(episode)["actions"][:-1]                      # and then it stops
        pose = episode["start_position"] + episode["start_rotation"]
        env.pool.submit(0, "try", episode=episode, poses=[pose],
                          plans=[[actions[:t] for t in range(len(actions) + 1)]])
        states, = env.pool.wait(0)["states"]
        left = np.array([grpo_online.cost_to_goal(s, env.robot) for s in states])
        gains += (-np.diff(left) / env.robot["forward_m"]).tolist()
    assert len(gains) > 60
    assert 0.7 < np.mean(gains) < 1.05
    assert np.percentile(gains, 10) > 0.3


def test_advantages_by_hand_and_zero_std_groups_are_dropped(walks):
    args = grpo_online.parse_args(["--group-size=3"])
    rewards = [0.0, 0.0, 1.0, 0.5, 0.5, 0.5]                   # the second group agrees
    examples, flat = grpo_online.compare_walks(walks, rewards, args)
    assert flat == 1 and [example.dialog.frames[0][0] for example in examples] == [
        "0.0", "0.1", "0.2"]
    want = torch.tensor([-1.0, -1.0, 2.0]) / (3 * (math.sqrt(1 / 3) + 1e-4))
    assert torch.tensor([example.advantages[0] for example in examples]).allclose(want)
    walks[0].end, kept = "error", walks[0].end                 # the simulator's fault
    assert grpo_online.compare_walks(walks, rewards, args) == ([], 2)
    walks[0].end = kept
    bare = grpo_online.parse_args(["--group-size=3", "--scale-rewards=none"])
    examples, _ = grpo_online.compare_walks(walks, rewards, bare)
    assert [example.advantages[0] for example in examples] == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_invalid_walks_are_in_no_mean(walks, monkeypatch):
    monkeypatch.setattr(grpo_online, "all_reduce_sum", lambda values, device: values)
    marks = [dict.fromkeys(grpo_online.REWARD_TERMS, 0.0)] * 3 + [
        dict.fromkeys(grpo_online.REWARD_TERMS, 1.0)] * 3
    ends = [walk.end for walk in walks]
    walks[0].end, walks[1].end = "error", "unreachable"
    told = grpo_online.metric_means(
        grpo_online.metric_sums(walks, marks, [0, 0, 1, 1, 1, 1]), {"kl": 0.5}, 6, "cpu")
    assert told["success"] == 3 / 4
    assert told["reward"] == 1
    assert told["kl"] == 0.5
    assert told["end_error"] == 1 / 6 and "scored" not in told
    for walk in walks:
        walk.end = "error"
    told = grpo_online.metric_means(grpo_online.metric_sums(walks, marks, [0] * 6), {}, 6, "cpu")
    assert "success" not in told and told["end_error"] == 1
    for walk, end in zip(walks, ends):
        walk.end = end


def test_a_dummy_example_is_one_turn_of_zero_advantage(policy, walks):
    for state_groups in (False, True):
        inputs, mask, advantages, *_ = grpo_online.collate(
            [grpo_online.dummy_example(walks[0], state_groups)], "cpu", 1.0,
            lambda lengths: (lengths, 1.0))
        assert policy(*inputs).shape == mask.shape and advantages.tolist() == [0.0]


def test_plans_are_played_from_every_state_of_a_walk(env, policy):
    args = grpo_online.parse_args(["--group-size=4"])
    some = env.walk(policy, [("s0", env.episodes[0]), ("s1", env.episodes[1])], 4)
    rewards = env.plan_rewards(some, policy)
    examples, flat = grpo_online.compare_plans(some, rewards, args)
    assert [len(r) for r in rewards] == [len(walk.decisions) for walk in some]
    for walk, per_turn in zip(some, rewards):
        for decision, marks in zip(walk.decisions, per_turn):
            answers, plan = decision.answers, decision.plan
            assert len(marks) == len(answers) == 4 and policy.actions(answers[0]) == plan
            for answer, mark in zip(answers, marks):           # equal plans, equal worth
                assert answer != answers[0] or mark == marks[0]
    assert flat + sum(len(le.branches) // 4 for le in examples) == sum(map(len, rewards))
    # the walked plan's end is the next turn's place: what was played is what was walked
    walk = max(some, key=lambda walk: len(walk.decisions))
    env.pool.submit(0, "try", episode=walk.episode, plans=[[walk.decisions[0].plan]], poses=[
        walk.states[0]["position"] + walk.states[0]["rotation"]])
    state, = env.pool.wait(0)["states"][0]
    assert state["position"] == pytest.approx(walk.states[walk.decisions[1].t]["position"])


def test_unscored_turns_are_dropped(env, policy, monkeypatch):
    monkeypatch.setattr(grpo_online, "all_reduce_sum", lambda values, device: values)
    args = grpo_online.parse_args(["--group-size=4"])
    names = "kept", "no way", "failed", "died"
    walks = env.walk(policy, [(name, env.episodes[0]) for name in names], 4)
    known, _ = grpo_online.compare_plans(walks[:1], grpo_online.residual_rewards(
        walks[:1], env.plan_rewards(walks[:1], policy), policy), args)

    def broken(pool, sims, jobs):
        for walk, job in zip(asking, jobs):
            _, asked = next(job)
            if walk.name == "failed":
                answer = grpo_online.SimError("no such scene")
            elif walk.name == "died":
                answer = grpo_online.SimDied("killed")
            else:
                env.pool.submit(0, "try", **asked)
                answer = env.pool.wait(0)
                for state in answer["states"][0] if walk.name == "no way" else ():
                    state["distance_to_goal"] = math.inf
            with pytest.raises(StopIteration):
                for _ in range(5):
                    job.send(answer)
    monkeypatch.setattr(grpo_online, "run_jobs", broken)
    tally, asking = Counter(), walks[2:3]
    with pytest.raises(UserError, match="no such scene"):                       # nobody can tell
        env.plan_rewards(asking, policy)
    asking = walks
    rewards = env.plan_rewards(walks, policy, tally)
    assert tally == {"unscored": 2, "deaths": 1 + args.retries}
    assert rewards[1][0] == []
    assert all(rewards[1][1:])
    assert rewards[2] == rewards[3] == []
    examples, flat = grpo_online.compare_plans(
        walks, grpo_online.residual_rewards(walks, rewards, policy), args)
    assert [example.dialog.frames[0][0] for example in examples][:1] == ["kept"] and flat >= 1
    assert all(math.isfinite(a) for example in examples for a in example.advantages)
    assert len(examples[0].branches) == len(known[0].branches)


def test_residual_rewards_are_uncorrelated_with_length_features(env, policy, monkeypatch):
    monkeypatch.setattr(grpo_online, "all_reduce_sum", lambda values, device: values)
    rng, some = np.random.default_rng(0), env.walk(
        policy, [("f0", env.episodes[0]), ("f1", env.episodes[1])], 8)
    for walk in some:                                          # and one is always malformed
        walk.decisions = [one._replace(answers=[*one.answers[:-1], [0] * 40])
                          for one in walk.decisions]
    raw = [[[*rng.normal(size=7), -1.0] for _ in walk.decisions] for walk in some]
    left = grpo_online.residual_rewards(some, raw, policy)
    rows, rest = [], []
    for walk, per_turn, before in zip(some, left, raw):
        for answers, rewards, those in zip(sampled_ids(walk), per_turn, before):
            plans = [policy.actions(answer) for answer in answers]
            good = [i for i, plan in enumerate(plans) if plan]
            assert all(rewards[i] == those[i] for i, plan in enumerate(plans) if not plan)
            form = np.array([[sum(a != STOP for a in plans[i]), len(answers[i]), STOP in plans[i]]
                             for i in good], float)
            rows.append(form - form.mean(axis=0))
            rest.append(np.array(rewards)[good])
            assert rewards != those or not rows[-1].any()
            assert np.mean(rest[-1]) == pytest.approx(np.mean(np.array(those)[good]))    # its level
    assert np.abs(np.concatenate(rows).T @ np.concatenate(rest)).max() < 1e-6
    assert np.abs(np.concatenate(rest)).max() > 1              # and not because nothing is left


# ---------------------------------------------------------------- the loop


def run_online(ego, init, out, *more):
    grpo_online.main(grpo_online.parse_args(args_for(ego, init, out, *more)))
    return out


@pytest.fixture(scope="module")
def plain(ego, init, tmp_path_factory):
    return run_online(ego, init, tmp_path_factory.mktemp("plain") / "out", "--save-every=1")


def test_an_adapter_is_trained_with_the_model_itself_as_its_reference(ego, init, tmp_path):
    flags = ["--lora-rank=4", "--kl-coef=0.05", "--save-every=1", "--val-split=none"]
    out = run_online(ego, init, tmp_path / "lora", *flags)
    log = log_of(out)
    assert [row["step"] for row in log] == [1, 2] and log[0]["kl"] == 0 < log[1]["kl"]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    again = run_online(ego, init, tmp_path / "again", *flags, "--stop-after=1")
    run_online(ego, init, again, *flags)
    ours, theirs = (load_policy(str(folder)).state_dict() for folder in (out, again))
    assert max_difference(ours, theirs) == 0
    assert any((weight != theirs[key]).any() for key, weight in load_policy(init).state_dict()
               .items())


def untimed(folder):
    clocks = ("minutes", "walking_s")
    return [{k: v for k, v in row.items() if k not in clocks} for row in log_of(folder)]


def test_a_run_learns_and_writes_its_files(init, plain):
    log = untimed(plain)
    assert [row["step"] for row in log] == [0, 1, 2] and "val/success" in log[0]
    assert sum(log[1][f"end_{end}"] for end in grpo_online.TERMINATIONS) == pytest.approx(1)
    assert log[1]["kl"] == log[1]["clip_frac"] == 0 and log[1]["tokens"] > 0
    assert max_difference(weights_of(init), weights_of(plain)) > 1e-4
    told = [json.loads(line) for line in open(plain / "rollouts.jsonl")]
    assert len(told) == 12 and {"episode_id", "turns", "reward", "end"} <= set(told[0])
    assert (plain / "curves.png").stat().st_size > 1000
    assert load_policy(str(plain)).contract["prompt"] == "dialog-1"


def test_kill_9_and_resume_gives_the_same_next_update(ego, init, plain, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "activevln.grpo_online",
               *args_for(ego, init, out, "--save-every=1")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    kill_when(child, (out / "state" / "latest").exists)
    assert not (out / "model.safetensors").exists()
    run_online(ego, init, out, "--save-every=1")
    assert max_difference(weights_of(out), weights_of(plain)) == 0
    assert untimed(out) == untimed(plain)
    assert (out / "rollouts.jsonl").read_text() == (plain / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("groups", ["episode", "state"])
def test_a_diverging_run_ends_with_a_sentence(ego, init, tmp_path, groups):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="step 2: a log-probability of a sampled token is not finite"
                       ".*No state was saved"):
        run_online(ego, init, out, "--lr=1e22", f"--groups={groups}", "--val-split=none")
    assert log_of(out)[0]["grad_norm"] > 0
    assert not (out / "model.safetensors").exists() and not (out / "state").exists()


def test_two_ranks_of_unequal_walks_agree_with_one(ego, init, tmp_path):
    more = ["--micro-tokens=500", "--updates-per-batch=2", "--lr=2e-5", "--kl-coef=0.01",
            "--max-steps=1"]
    runs = (("episode", 0), ("episode", 3), ("state", 0))
    for groups in ("episode", "state"):
        run_online(ego, init, tmp_path / groups, *more, f"--groups={groups}")
    run_on_two_ranks(tmp_path, "activevln.grpo_online", [
        args_for(ego, init, tmp_path / f"{groups}{stage}", *more, f"--groups={groups}",
                 f"--zero-stage={stage}") for groups, stage in runs])
    start = weights_of(init)
    for groups, stage in runs:
        one, two = tmp_path / groups, tmp_path / f"{groups}{stage}"
        want, got = weights_of(one), weights_of(two)
        assert max_difference(got, want) < 1e-5, two.name
        moved = relative_difference({k: w - start[k] for k, w in got.items()},
                                    {k: w - start[k] for k, w in want.items()})
        assert moved < 2e-3, (two.name, moved)
        for ours, theirs in zip(untimed(two), untimed(one), strict=True):
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (two.name, key)


def test_the_bench_of_rollouts_walks_the_same_both_ways(ego, init, tmp_path):
    in_process("bench/rollouts.py", "--ckpt", init, "--episodes", houses_of(ego), "--walks", 3,
               "--turns", 8, "--sims", 2, "--repeats", 1, "--results", tmp_path / "rows")
    row = json.loads((tmp_path / "rows").read_text())
    assert row["equal"]
    assert row["ratio"] > 0
    assert row["check"].startswith("3 greedy walks")


def test_state_groups_learn_too(ego, init, tmp_path):
    out = run_online(ego, init, tmp_path / "state", "--groups=state", "--micro-tokens=1",
                     "--max-steps=1")
    row = untimed(out)[-1]
    assert row["groups"] > 2 and max_difference(weights_of(init), weights_of(out)) > 1e-4
    assert any(abs(json.loads(line)["advantage"]) > 1e-3
               for line in (out / "rollouts.jsonl").read_text().splitlines())


@pytest.mark.parametrize("wrong, says", [
    (["--init=nowhere"], "--prompt dialog"),
    (["--group-size=1"], "plans of one prompt"),
    (["--temperature=0"], "--temperature"), (["--reward=fame"], "--reward"),
    (["--batch-size=2000"], "--batch-size"), (["--split=nowhere"], "nowhere"),
    (["--reward=1.2.3*success"], "--reward"),
    (["--action-factor=0"], "--action-factor"),
    (["--groups=state", "--reward=success"], "--reward is of whole walks"),
    (["--draw=nowhere"], "--out"),
    (["--draw=nowhere", "--out=x.png"], "nowhere"),
])  # fmt: skip
def test_user_errors_are_one_sentence(ego, init, tmp_path, wrong, says):
    with pytest.raises(UserError, match=says):
        grpo_online.main(grpo_online.parse_args(args_for(ego, init, tmp_path / "out", *wrong)))


def test_the_agent_of_evaluate_obeys_malformed(policy):
    class Unreadable:
        contract, merged, end_token = policy.contract, policy.merged, policy.end_token
        text, actions, encode_frames = policy.text, policy.actions, policy.encode_frames
        resize = policy.resize
        agent = DialogPolicy.agent
        def generate_turn(self, caches, *_, **__):
            return [[[5, 6]]] * len(caches), [DialogCache(torch.zeros(1, 1, 1, 1), [6], 0)]
    walk = EpisodeState({"episode_id": 1}, "go")
    walk.frames = [np.zeros((56, 56, 3), np.uint8)]
    assert Unreadable().agent()([walk]) == [[STOP]]
    walk.frames = [np.zeros((56, 56, 3), np.uint8)]
    assert Unreadable().agent(malformed="forward")([walk]) == [[FORWARD]]


# ---------------------------------------------------------------- curves


def test_the_curves_of_several_runs_are_drawn(plain, tmp_path):
    grpo_online.main(grpo_online.parse_args(
        ["--draw", str(plain), str(plain), f"--out={tmp_path / 'curves.png'}"]))
    assert (tmp_path / "curves.png").stat().st_size > 1000
