"""
Closed-loop evaluation against walks worked out by hand, on an open plane that needs no simulator
(helpers.FakePool: it answers in random order, dies and fails on request), and in two real houses.
"""
import doctest
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple

import numpy as np
import pytest
from conftest import ROOT
from helpers import FakePool, evaluate_plane, fake_episode, scored_row, walk_with, write_plane

import evaluate
from cli import UserError, read_rows
from evaluate import (
    EpisodeState,
    dtw,
    episode_metrics,
    ndtw,
    path_length,
    run_episodes,
)
from intervals import wilson
from lsm import pick_frames
from model import CONTRACT
from reward import FORWARD, LEFT, RIGHT, STOP, action_phrases
from world import SimError, houses
from world.pool import SimPool
from world.robots import ROBOTS, choose_robot

PHRASES = action_phrases(30, 0.25)

FakePrompt = namedtuple("FakePrompt", "text frames ids")


class FakePolicy:
    """Answers with six actions that depend on every pixel and word it was given, and on nothing
    else; counts how often it was shown a frame."""

    def __init__(self, stop=0.1, garbage=0.0):
        self.contract = {"memory": {"name": "lsm", "budget": 5, "recent": 3, "short_stride": 1,
                               "long_stride": 3}, "horizon": 6}
        self.phrases, self.encoded, self.prompts, self.batches = PHRASES, 0, [], []
        self.stop, self.garbage = stop, garbage

    def encode_frames(self, frames):
        import torch  # not on top: the children below do without
        self.encoded += len(frames)
        return [torch.tensor(frame[..., 0].astype(np.float32)).view(4, 4) for frame in frames]

    def instruction_prompt(self, instruction, n_history):
        return f"{instruction}: {'<image>' * (n_history + 1)}"

    def agent(self, *args, **kwargs):
        from model import Policy
        return Policy.agent(self, *args, **kwargs)

    def prompt(self, text, features):
        assert text.count("<image>") == len(features)
        self.prompts.append((text, [f.flatten().tolist() for f in features]))
        return FakePrompt(*self.prompts[-1], [7] * 9)

    def generate(self, prompts, temperature=0.0, seeds=None, draft=False, **_):
        self.batches.append(len(prompts))
        texts = []
        for prompt, seed in zip(prompts, seeds or [None] * len(prompts)):
            rng = random.Random(repr(prompt) + (str(seed) if temperature else ""))
            share = (1 - self.stop) / 3
            plan = rng.choices([FORWARD, LEFT, RIGHT, STOP], [share] * 3 + [self.stop], k=6)
            text = ", ".join(PHRASES[a] for a in plan)
            texts.append("I see a wall." if rng.random() < self.garbage else text)
        mask = np.ones((len(texts), 3), dtype=bool)
        return type("Rollout", (), {"texts": texts, "completion_mask": mask})


def rows_with(policy, episodes, sims=3, seed=0, max_actions=60, **kwargs):
    ended = walk_with(policy.agent(**kwargs), episodes, sims, seed,
                      max_actions=max_actions)
    return [evaluate.episode_record(ended[str(e["episode_id"])], [[0, 0, 0], [0, 0, -2]], 1.0, 3.0)
            for e in episodes]


# ---------------------------------------------------------------- metrics


def test_doctests():
    assert doctest.testmod(evaluate).failed == 0


def test_dtw_against_brute_force_and_fastdtw():
    fastdtw = pytest.importorskip("fastdtw").fastdtw
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (1, 5), (6, 1), (7, 4), (30, 45)):
        a, b = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))

        @functools.lru_cache(None)
        def best(i, j, a=a, b=b):
            if i < 0 or j < 0:
                return 0.0 if i == j == -1 else math.inf
            cost = math.dist(a[i], b[j])
            return cost + min(best(i - 1, j), best(i, j - 1), best(i - 1, j - 1))

        assert dtw(a, b) == pytest.approx(best(n - 1, m - 1), rel=1e-12)
        assert fastdtw(a, b, dist=math.dist, radius=100)[0] == pytest.approx(dtw(a, b), rel=1e-9)
        assert fastdtw(a, b, dist=math.dist)[0] >= dtw(a, b) - 1e-9       # VLN-CE's approximation


def test_a_walk_around_a_corner_by_hand():
    # 2 m ahead, 1 m back along the way, then 1.5 m to the side; the goal is at (1.5, 0, -2).
    path = [[0, 0, 0], [0, 0, -2], [0, 0, -2], [0, 0, -1], [1.5, 0, -1]]
    distances = [2.5, 1.5, 1.5, math.hypot(1.5, 1), 1.0]
    assert path_length(path) == 4.5
    metrics = episode_metrics(distances, 4.5, stopped=True, radius=1.0)
    assert metrics == {"success": 0.0, "oracle_success": 0.0, "spl": 0.0}   # d == radius: outside
    metrics = episode_metrics(distances, 4.5, stopped=True, radius=1.01)
    assert metrics["success"] == 1.0 and metrics["spl"] == pytest.approx(2.5 / 4.5)
    # against the reference (0,0,0) (0,0,-2) (1.5,0,-2): the pauses cost nothing, the detour 1 + 1
    reference = [[0, 0, 0], [0, 0, -2], [1.5, 0, -2]]
    assert ndtw(path, reference) == pytest.approx(math.exp(-2 / (3 * 3.0)))
    assert ndtw(path, reference, success_distance=1.0) == pytest.approx(math.exp(-2 / 3))


def test_a_pose_that_moved_by_less_than_a_micrometre_adds_no_point_to_the_path():
    """Against a wall; tools.recompute, which knows the recorded places only, agrees."""
    walk = EpisodeState(fake_episode("1"), "Go.")
    places = [[0, 0, 0], [0, 0, -1], *([k * 1e-9, 0, -1] for k in range(1, 20)), [0, 0, -2]]
    walk.states = [{"position": place, "rotation": [0, 0, 0, 1], "collided": False,
                    "distance_to_goal": 2.0 + place[2]} for place in places]
    walk.actions, walk.end = [1] * (len(places) - 1) + [0], "stop"
    row = evaluate.episode_record(walk, [[0, 0, 0], [0, 0, -1], [0, 0, -2]], 1.0, 3.0)
    assert row["ndtw"] == 1.0


def test_oracle_success_counts_the_start_and_spl_is_finite_without_a_step():
    metrics = functools.partial(episode_metrics, stopped=True, radius=1.0)
    assert metrics([0.5, 4.0], 4.0)["oracle_success"] == 1.0
    assert metrics([0.0], 0.0)["spl"] == 1.0                              # 0 / 0 would be nan
    assert metrics([2.0, 0.1], 1.0)["spl"] == 1.0                         # a body has no width
    lost = metrics([4.0, 0.5, math.inf], 5.0)                             # off the known floor
    assert lost == {"success": 0.0, "oracle_success": 1.0, "spl": 0.0}


# ---------------------------------------------------------------- intervals


def test_results_say_how_their_intervals_were_made():
    rows = [scored_row(i, f"s{i % 50}", spl=i % 2) for i in range(200)]
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert found["metrics"]["success"] == {"mean": 0.0, "ci": [0.0, 0.018845]}
    assert found["interval"]["units"] == "scenes" and found["interval"]["n_units"] == 50
    # one scene: drawing it again would always give the same mean
    rows = [scored_row(i, "s", i // 3, spl=(i // 3) % 2) for i in range(60)]
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert found["interval"]["units"] == "trajectories" and found["interval"]["n_units"] == 20
    low, high = found["metrics"]["spl"]["ci"]
    assert low < 0.35 and high > 0.65                                # 20 trajectories, not 60 walks
    printed = evaluate.format_results({"ckpt": None, "agent": "x", "split": "val", **found})
    assert "fewer than 5 scenes, so they hold for these scenes only" in printed
    # unreadable plans are a rate as well
    rows = [scored_row(i, f"s{i}", decisions=10, malformed=0) for i in range(20)]
    assert evaluate.summarise(rows, 1.0, 3.0, 0)["malformed_ci"] == wilson(0, 200)


# ---------------------------------------------------------------- the loop


def test_batched_is_one_by_one():
    episodes = [fake_episode(i) for i in range(12)]
    alone, together = FakePolicy(), FakePolicy()
    rows = rows_with(alone, episodes, sims=1)
    assert rows == rows_with(together, episodes, sims=5, seed=7)
    assert set(alone.batches) == {1} and max(together.batches) > 2
    assert len({row["actions"] for row in rows}) > 6                     # not all the same walk
    sampled = rows_with(FakePolicy(), episodes, sims=1, temperature=1.0, seed=3)
    assert sampled == rows_with(FakePolicy(), episodes, sims=4, temperature=1.0, seed=3) != rows


def test_batched_is_one_by_one_with_the_real_policy():
    from checkpoint import load_policy
    from model import CONTRACT
    contract = {**CONTRACT, "turn_deg": 30, "memory": {"name": "even", "budget": 3}}
    policy = load_policy("tiny", contract, texts=["Walk to place number 1."]).eval()
    policy.generate = functools.partial(policy.generate, max_new_tokens=12)

    def answers(sims, seed, temperature):
        agent = policy.agent(3, "forward", temperature=temperature)
        ended = walk_with(agent, [fake_episode(i) for i in range(5)], sims, seed, max_actions=7)
        return {name: (walk.actions, [decision.text for decision in walk.decisions])
                for name, walk in ended.items()}

    for temperature in (0.0, 1.0):                          # untrained: it babbles, but repeatably
        alone = answers(1, 0, temperature)
        assert alone == answers(3, 5, temperature)
        assert len({text for _, texts in alone.values() for text in texts}) > 1


def test_every_frame_is_encoded_once_and_the_memory_is_lsm():
    policy = FakePolicy(stop=0.0)
    episode = fake_episode(5)
    walk = walk_with(policy.agent(execute=2), [episode], max_actions=21)["5"]
    assert len(walk.actions) == 21
    assert walk.end == "max_actions"
    assert not walk.video_frames
    assert len(walk.states) == 22 and policy.encoded == 21      # the last view is not needed
    seen, at = [], 0
    for (_, shown), decision in zip(policy.prompts, walk.decisions):
        t, plan = decision.t, decision.plan
        assert t == at
        seen += [None] * (t + 1 - len(seen))
        seen[t] = shown[-1]
        for i, frame in zip(pick_frames(t, **policy.contract["memory"]), shown):
            assert seen[i] in (None, frame)
            seen[i] = frame
        at += 2
        assert walk.actions[t:t + 2] == plan[:2][:21 - t]
    past = pick_frames(20, **policy.contract["memory"])
    assert policy.prompts[-1][0].count("<image>") == len(past) + 1 == 6


def answering(*texts):
    """A policy that says these things, one after the other, then stops."""
    policy, left = FakePolicy(), list(texts)
    policy.generate = lambda prompts, **_: type("Rollout", (), {
        "completion_mask": np.ones((len(prompts), 3), dtype=bool),
        "texts": [left.pop(0) if left else "D. Stop" for _ in prompts]})
    return policy


def test_execute_stop_and_malformed():
    ahead, turn = PHRASES[FORWARD], PHRASES[LEFT]
    plan = ", ".join([ahead, ahead, turn, ahead, ahead, ahead])
    episode = fake_episode(0, goal=(0, 0, -0.5))

    def row(policy, **kwargs):
        return rows_with(policy, [episode], **kwargs)[0]

    assert row(answering(plan), execute=3)["actions"] == "1120"
    assert row(answering(plan), execute=6)["actions"] == "1121110"
    # a stop within reach of --execute is carried out, one beyond it is not
    late = ", ".join([ahead, ahead, "D. Stop", ahead])
    assert row(answering(late, ahead), execute=3) == row(answering(late), execute=3)
    assert row(answering(late, turn), execute=2)["actions"] == "1120"
    good = row(answering(late), execute=3)
    assert (good["actions"], good["end"], good["success"], good["steps"]) == ("110", "stop", 1.0, 3)
    # garbage: stop or forward, by flag, and counted
    bad = row(answering("I see a sofa."))
    assert (bad["actions"], bad["end"], bad["malformed"]) == ("0", "malformed", 1)
    assert bad["unreadable"] == "I see a sofa." and bad["distance_to_goal"] < 1
    assert (bad["success"], bad["oracle_success"]) == (0.0, 1.0)          # garbage is no success
    bad = row(answering("I see a sofa.", ahead), malformed="forward")
    assert (bad["actions"], bad["end"], bad["malformed"], bad["decisions"]) == ("110", "stop", 1, 3)


def test_max_actions_count_the_stop():
    episode = fake_episode(0, goal=(0, 0, -0.5))
    two = ", ".join([PHRASES[FORWARD]] * 2)
    assert rows_with(answering(two), [episode], max_actions=3)[0]["success"] == 1.0
    late = rows_with(answering(two), [episode], max_actions=2)[0]
    assert (late["end"], late["success"], late["oracle_success"]) == ("max_actions", 0.0, 1.0)


def test_dead_and_failing_simulators_are_never_scored():
    episodes = [fake_episode(0), fake_episode(1, dies=2), fake_episode(2, dies=3),
                fake_episode(3, fails=True), fake_episode(4)]
    well = rows_with(FakePolicy(), [fake_episode(i) for i in range(5)], sims=2)
    rows = rows_with(FakePolicy(), episodes, sims=2)
    assert [rows[i] for i in (0, 1, 4)] == [well[i] for i in (0, 1, 4)]   # 1: begun again, equal
    assert [row["end"] for row in rows[2:4]] == ["error", "error"]
    assert "died" in rows[2]["error"] and "h.glb is broken" in rows[3]["error"]
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert (found["episodes"], found["scored"], found["errors"]) == (5, 3, 2)


def test_a_start_or_a_goal_that_the_simulator_refuses_is_invalid():
    """It would be refused again; a scene that cannot be loaded, or a death, may be mended."""
    episodes = [fake_episode(0), fake_episode(1, refused=True), fake_episode(2, no_way=True),
                fake_episode(3, fails=True), fake_episode(4, dies=9)]
    oracle = evaluate.scripted_agent("oracle", None, 500, 0)
    ended = {walk.name: walk for walk in run_episodes(
        FakePool(None, None, None), [EpisodeState(e, "") for e in episodes], oracle, sims=2)}
    assert [ended[str(i)].end for i in range(5)] == ["stop", "invalid", "invalid", "error", "error"]
    assert "inside an obstacle" in ended["1"].error and "no way" in ended["2"].error
    assert "is broken" in ended["3"].error and "died" in ended["4"].error
    rows = [evaluate.episode_record(ended[str(i)], None, 1.0, 3.0) for i in range(5)]
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert (found["scored"], found["invalid"], found["errors"]) == (1, 2, 2)
    assert found["metrics"]["ndtw"] == {"mean": None, "ci": None} and "ndtw" not in rows[0]
    assert rows[0]["success"] == 1.0 and "success" not in rows[1]


def test_only_error_rows_are_walked_again(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data", n=3, **{
        "1": {"info": {"no_way": True}}, "2": {"info": {"fails": True}}})
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
            evaluate_plane(monkeypatch, data, tmp_path / "out")
        printed = capsys.readouterr().out
        assert "1 episodes are invalid" in printed
        assert "the first is 1: no way to the goal" in printed
    assert "walks 1 episodes" in printed and "2 of 3 have walked already" in printed


@pytest.mark.parametrize("distance", [math.inf, math.nan, None])
def test_distances_that_are_not_finite_are_counted_apart(distance):
    episodes = [fake_episode(0, goal=(0, 0, -0.1)), fake_episode(1, distance=distance)]
    ended = walk_with(lambda walks: [[STOP] for _ in walks], episodes)
    rows = [evaluate.episode_record(ended[n], [[0, 0, 0]], 1.0, 3.0) for n in ("0", "1")]
    assert rows[1]["end"] == "unreachable" and "success" not in rows[1]
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert (found["unreachable"], found["scored"]) == (1, 1)
    assert found["metrics"]["success"]["mean"] == 1.0
    assert found["metrics"]["distance_to_goal"]["mean"] == pytest.approx(0.1)
    json.dumps([rows, found], allow_nan=False)


@pytest.mark.parametrize("unknown", [math.inf, math.nan, None])
def test_a_walk_that_ends_where_no_way_is_known_has_failed(unknown):
    """Two walk past the goal and off the known floor; the second comes back to it."""
    out, back = [FORWARD] * 9, [LEFT] * 6 + [FORWARD] * 5
    plans = {"0": [*out, STOP], "1": [*out, *back, STOP], "2": [STOP]}
    episodes = [fake_episode(i, goal=(0, 0, -1), beyond=[1.5, unknown]) for i in range(3)]
    ended = walk_with(lambda walks: [plans[walk.name][len(walk.actions):][:3] for walk in walks],
                      episodes)
    rows = [evaluate.episode_record(ended[str(i)], [[0, 0, 0], [0, 0, -1]], 1.0, 3.0)
            for i in range(3)]
    assert [row["end"] for row in rows] == ["stop"] * 3
    assert [row["success"] for row in rows] == [0.0, 1.0, 0.0]        # the last: d is not < 1
    assert [row["oracle_success"] for row in rows] == [1.0, 1.0, 0.0]
    assert rows[0]["distance_to_goal"] is None and rows[0]["spl"] == rows[0]["sdtw"] == 0
    assert 0 < rows[0]["ndtw"] < 1 and rows[1]["distance_to_goal"] == 0.0
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert (found["scored"], found["unreachable"], found["no_way_at_end"]) == (3, 0, 1)
    assert found["metrics"]["success"]["mean"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["metrics"]["distance_to_goal"]["mean"] == 0.5        # of the two that have one
    printed = evaluate.format_results({"ckpt": "x", "split": "val", **found})
    assert "1 walks ended where no path" in printed
    json.dumps([rows, found], allow_nan=False)
    # the expert of such a place knows nothing: it stops, and that is no simulator's error
    wander = walk_with(lambda walks: [out[:7] if not w.actions else None for w in walks],
                       episodes[:1])["0"]
    assert wander.end == "stop" and wander.actions == [*out[:7], STOP]


def test_shuffled_instructions_are_of_another_goal_in_the_same_scene():
    """Scenes a and b with two goals each, 5 m apart; c with one goal, reached by all its walks."""
    episodes = []
    for i in range(18):
        scene, x = "aabbcc"[i % 6], 5.0 * (i % 2) * (i % 6 < 4)
        episodes.append({**fake_episode(i, goal=(x, 0, 0)), "scene_id": scene,
                         "trajectory_id": i % 6})
    episodes[0]["goals"][0]["position"][1] = 0.1
    by_id = {i: e for i, e in enumerate(episodes)}
    chosen = evaluate.shuffled_instructions(episodes, 0, radius=3.0)
    for i, mine in by_id.items():
        other = chosen[str(i)]
        assert other["trajectory_id"] != mine["trajectory_id"]
        same = other["scene_id"] == mine["scene_id"]
        assert same == (mine["scene_id"] != "c")
        assert not same or other["goals"][0]["position"][0] != mine["goals"][0]["position"][0]
    assert chosen == evaluate.shuffled_instructions(episodes, 0, radius=3.0)
    assert chosen != evaluate.shuffled_instructions(episodes, 1, radius=3.0)
    with pytest.raises(UserError, match="different instructions"):
        evaluate.shuffled_instructions([e for e in episodes if e["trajectory_id"] == 0], 0, 3.0)
    # Hindi is no control for English
    for i, episode in by_id.items():
        episode["instruction"]["language"] = ("hi-IN", "en-US")[i // 9]
    chosen = evaluate.shuffled_instructions(episodes, 0, 3.0)
    assert all(chosen[str(i)]["episode_id"] // 9 == i // 9 for i in by_id)


def test_results_say_where_the_shuffled_instructions_are_from(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data")                # one scene, nine goals around the start
    found = evaluate_plane(monkeypatch, data, tmp_path / "out", "--shuffled-instruction")
    assert found["instructions_from_same_scene"] == 9
    assert "9 of 9 instructions belong to a walk to another goal" in capsys.readouterr().out


def test_blank_frames_are_black():
    policy = FakePolicy()
    rows_with(policy, [fake_episode(0)], blank=True)
    assert policy.prompts and not any(sum(map(sum, frames)) for _, frames in policy.prompts)


# ---------------------------------------------------------------- the script


def contents(folder, names=("episodes.jsonl", "results.json", "run.json")):
    return {name: (folder / name).read_bytes() for name in names}


def test_results_of_the_baselines_by_hand(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data")
    found = evaluate_plane(monkeypatch, data, tmp_path / "oracle", "--pictures", "2")
    assert found["metrics"]["success"] == {"mean": 1.0, "ci": wilson(9, 9)}
    assert found["metrics"]["spl"]["mean"] > 0.99 and found["ends"] == {"stop": 9}
    assert (found["radius_m"], found["second_radius_m"], found["episodes"]) == (1.0, 3.0, 9)
    assert "SR     @ 1 m     1.000   [0.701, 1.000]" in capsys.readouterr().out
    pictures = sorted(os.listdir(tmp_path / "oracle" / "pictures"))
    assert pictures == ["0.gif", "0.png", "4.gif", "4.png"]

    # stop: never within 1 m (goals are 1 to 2 m away), always within 3 m, stands at the start
    found = evaluate_plane(monkeypatch, data, tmp_path / "stop", "--agent", "stop", "--sims", "2")
    mean = {name: value["mean"] for name, value in found["metrics"].items()}
    assert (mean["success"], mean["success_3m"], mean["path_length"], mean["steps"]) == (0, 1, 0, 1)
    away = [0.25 * (4 + i % 5) for i in range(9)]
    assert mean["distance_to_goal"] == pytest.approx(np.mean(away), abs=1e-6)
    # forward: the mean of the ground truth, 5.78 -> 6 steps; the first goal is 1 m straight ahead
    evaluate_plane(monkeypatch, data, tmp_path / "forward", "--agent", "forward")
    rows = read_rows(tmp_path / "forward" / "episodes.jsonl")
    assert {row["actions"] for row in rows} == {"1111110"}
    assert rows[0]["distance_to_goal"] == pytest.approx(0.5)
    assert rows[0]["spl"] == pytest.approx(1 / 1.5, abs=1e-6)
    # random: by episode, not by order
    evaluate_plane(monkeypatch, data, tmp_path / "random", "--agent", "random")
    evaluate_plane(monkeypatch, data, tmp_path / "random1", "--agent", "random", "--sims", "1")
    assert contents(tmp_path / "random") == contents(tmp_path / "random1")
    rows = read_rows(tmp_path / "random" / "episodes.jsonl")
    shares = np.array([[row["actions"].count(a) for a in "123"] for row in rows]).sum(axis=0)
    assert shares[0] > 2 * shares[1] and len({row["actions"] for row in rows}) == 9


def test_limit_is_spread_and_ranks_agree_with_one(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")
    evaluate_plane(monkeypatch, data, tmp_path / "one", "--limit", "4")
    rows = read_rows(tmp_path / "one" / "episodes.jsonl")
    assert [row["episode_id"] for row in rows] == [0, 2, 4, 6]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "two" / "results.json").exists()
        monkeypatch.setenv("RANK", rank)
        evaluate_plane(monkeypatch, data, tmp_path / "two", "--limit", "4")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_error_rows_fail_the_run_and_are_tried_again(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data", n=3)
    evaluate_plane(monkeypatch, data, tmp_path / "well")
    broken = FakePool.reset
    monkeypatch.setattr(FakePool, "reset", lambda self, i, episode, frame=True:
                        SimError("h.glb is broken") if episode["episode_id"] == 1
                        else broken(self, i, episode, frame))
    monkeypatch.setattr(FakePool, "load", lambda self, i, scene_id: SimError("h.glb is broken"))
    with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
        evaluate_plane(monkeypatch, data, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["errors"], found["scored"]) == (1, 2)
    monkeypatch.setattr(FakePool, "reset", broken)
    evaluate_plane(monkeypatch, data, tmp_path / "out")
    assert contents(tmp_path / "well") == contents(tmp_path / "out")


def test_a_rank_without_work_leaves_errors_to_the_rank_that_walks_them_again(monkeypatch, tmp_path,
                                                                             capsys):
    data = write_plane(tmp_path / "data", n=2, **{"0": {"info": {"fails": True}}})
    monkeypatch.setenv("WORLD_SIZE", "2")

    def rank(number):
        monkeypatch.setenv("RANK", str(number))
        evaluate_plane(monkeypatch, data, tmp_path / "out")

    rank(0)
    for _ in range(2):                                      # rank 0 may be about to walk it again
        rank(1)
        assert "rank 1 is done; 1 episodes of other ranks are not" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
        rank(0)
    counts = evaluate.error_counts
    calls = iter([Counter()])                               # it failed after rank 1 had begun
    monkeypatch.setattr(evaluate, "error_counts", lambda out: next(calls, counts(out)))
    with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
        rank(1)


def vlnce_heading(rotation):
    """VLN-CE's, derived again: where -z of the camera goes under the inverse rotation, an angle in
    the plane of (-z, x)."""
    x, y, z, w = rotation
    q, (vx, vy, vz) = np.array([-x, -y, -z]), (0.0, 0.0, -1.0)           # the inverse, and -z
    v = np.array([vx, vy, vz])
    turned = v + 2 * w * np.cross(q, v) + 2 * np.cross(q, np.cross(q, v))
    return math.atan2(turned[0], -turned[2])


def test_heading_is_vln_ces():
    for yaw in np.linspace(-3.1, 3.1, 63):
        for sign in (1, -1):                                # q and -q are one rotation
            rotation = [0.0, sign * math.sin(yaw / 2), 0.0, sign * math.cos(yaw / 2)]
            assert evaluate.yaw_of(rotation) == pytest.approx(vlnce_heading(rotation), abs=1e-12)
    assert vlnce_heading([0, 0.5, 0, math.sqrt(0.75)]) == pytest.approx(math.pi / 3)  # left: +


def test_the_checkpoint_brings_the_robot_that_its_data_were_seen_by(ego, tmp_path):
    """meta.json -> nav.json -> the simulator: frame size, body and sliding included."""
    import sft  # brings torch: not on top
    shutil.copytree(ego, tmp_path / "train")
    meta = json.loads((tmp_path / "train/meta.json").read_text())
    meta["robot"] |= {"width": 112, "height": 84, "sliding": False, "radius_m": 0.15}
    (tmp_path / "train/meta.json").write_text(json.dumps(meta))
    args = sft.parse_args(["--model", "tiny", "--data", str(tmp_path / "train")])
    contract = sft.setup(args, "cpu")[1].contract
    assert choose_robot(evaluate.parse_args([]), "x", contract, "houses") == meta["robot"]
    with pytest.raises(UserError, match="radius_m = 0.15 and the robot 'houses' has 0.18"):
        choose_robot(evaluate.parse_args(["--robot", "houses"]), "x", contract, "houses")
    with pytest.raises(UserError, match="width = 112 and .* has 56: leave --robot and --width out"):
        choose_robot(evaluate.parse_args(["--width", "56"]), "x", contract, "houses")
    same = evaluate.parse_args(["--width", "112", "--no-sliding"])
    assert choose_robot(same, "x", contract, "houses") == meta["robot"]
    # an older contract has no frame size: the data set's, or what a flag says
    unknown = ("width", "height", "sliding")
    old = {key: value for key, value in contract.items() if key not in unknown}
    found = choose_robot(evaluate.parse_args(["--width", "64"]), "x", old, "houses")
    assert (found["width"], found["height"], found["sliding"]) == (64, 56, True)


CHILD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import evaluate, helpers
from cli import run_cli
evaluate.SimPool = helpers.{pool}
run_cli(evaluate.main, lambda: evaluate.parse_args({argv!r}))
"""


def child(argv, pool="FakePool", kill_after=-1):
    code = CHILD.format(root=ROOT, tests=os.path.join(ROOT, "tests"), pool=pool, argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "KILL_AFTER": str(kill_after)}, timeout=600)


def test_kill_minus_9_and_resume_is_bit_for_bit(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")
    evaluate_plane(monkeypatch, data, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    argv = ["--split", "val", "--episodes", data, "--out", str(out), "--agent", "oracle",
            "--sims", "3"]
    assert child(argv, kill_after=120).returncode == -signal.SIGKILL
    rows = read_rows(out / "episodes.jsonl")
    assert 0 < len(rows) < 9 and not (out / "results.json").exists()
    with open(out / "episodes.jsonl", "a") as file:
        file.write('{"episode_id": 8, "end": "st')                     # as if cut while writing
    done = child(argv)
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} of 9 have walked already" in done.stdout
    assert contents(tmp_path / "undisturbed") == contents(out)


# ---------------------------------------------------------------- somebody else's function


def test_a_python_function_sees_all_frames_and_walks(monkeypatch, tmp_path):
    """Its plans have one and two actions in turn, so that frames of a plan are counted as well."""
    data, code = write_plane(tmp_path / "data"), tmp_path / "mine.py"
    (tmp_path / "beside.py").write_text("LAST = 6\n")
    code.write_text(
        "import numpy as np, beside\n"
        "def walk(instruction, frames):\n"
        "    assert instruction.startswith('Walk to place number')\n"
        "    assert all(f.shape == (4, 4, 3) and f.dtype == np.uint8 for f in frames)\n"
        "    blank = not any(f.any() for f in frames)\n"
        "    if len(frames) > beside.LAST: return [np.int64(3 if blank else 2), 0, 1]\n"
        "    return [1] if len(frames) % 3 else (1, 2)\n")
    agent = f"{code}:walk"
    evaluate_plane(monkeypatch, data, tmp_path / "one", "--sims", "1", "--agent", agent)
    for row in read_rows(tmp_path / "one" / "episodes.jsonl"):
        assert (row["actions"], row["end"], row["decisions"]) == ("1112112" + "20", "stop", 0)
    evaluate_plane(monkeypatch, data, tmp_path / "many", "--sims", "5", "--agent", agent)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    evaluate_plane(monkeypatch, data, tmp_path / "blank", "--blank-frames", "--agent", agent)
    assert read_rows(tmp_path / "blank" / "episodes.jsonl")[0]["actions"] == "1112112" + "30"
    code.write_text("def walk(instruction, frames): return [0]\n")
    with pytest.raises(UserError, match="holds another measurement \\(of other agent_file\\)"):
        evaluate_plane(monkeypatch, data, tmp_path / "one", "--agent", agent)
    args = evaluate.parse_args(["--agent", "dir/mine.py:walk"])
    assert evaluate.default_out(args, None) == "results/mine_walk_val_unseen"


@pytest.mark.parametrize("code, sentence", [
    (None, "cannot read .*mine.py .No such file"),
    ("def other(instruction, frames): return [0]", "defines no function walk"),
    ("walk = 3", "defines no function walk"),
    ("def walk(instruction, frames) return", "does not load .SyntaxError"),
    ("import nothing_of_that_name", "does not load .ModuleNotFoundError"),
    ("def walk(instruction, frames): return []", r"returned \[\] in episode \d, step 0: "),
    ("def walk(instruction, frames): return [1, 4]", "returned .1, 4."),
    ("def walk(instruction, frames): return [0.5]", "returned .0.5."),
    ("def walk(instruction, frames): return 1", "returned 1 in"),
    ("def walk(instruction, frames): return 'stop'", "returned 'stop' in"),
    ("def walk(instruction, frames): pass", "returned None in")])
def test_a_function_that_is_none_or_answers_something_else(monkeypatch, tmp_path, code, sentence):
    if code is not None:
        (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=sentence):
        evaluate_plane(monkeypatch, write_plane(tmp_path / "data", n=2), tmp_path / "out",
                       "--agent", f"{tmp_path}/mine.py:walk")


@pytest.mark.parametrize("flags", ["--temperature -1", "--temperature nan", "--pictures -3",
                                   "--server-timeout inf"])
def test_numbers_that_mean_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as status:
        evaluate.parse_args(flags.split())
    assert status.value.code == 2 and "is not a" in capsys.readouterr().err


def test_an_agent_that_is_no_name_and_no_function_is_refused(capsys):
    for text in ("orakel", "mine.py", "mine.py:", "mine:walk"):
        with pytest.raises(SystemExit):
            evaluate.parse_args(["--agent", text])
        assert "is none of policy, oracle" in capsys.readouterr().err


# ---------------------------------------------------------------- in real houses


@pytest.fixture(scope="module")
def two_houses(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("houses"))
    houses.main(houses.parse_args(["--out", folder, "--train-houses", "1", "--walks-per-house", "1",
                                   "--unseen-houses", "2", "--val-episodes", "6", "--jobs", "1"]))
    return folder


def test_the_oracle_arrives_and_survives_kill_minus_9(two_houses, tmp_path, monkeypatch):
    def argv(name):
        return ["--episodes", two_houses, "--agent", "oracle", "--sims", "2", "--out",
                str(tmp_path / name), "--pictures", "1"]

    found = evaluate.main(evaluate.parse_args(argv("undisturbed")))
    mean = {name: value["mean"] for name, value in found["metrics"].items()}
    assert found["episodes"] == found["scored"] == 6 and found["split"] == "val_unseen"
    assert mean["success"] == 1.0
    assert mean["spl"] > 0.9
    assert mean["distance_to_goal"] < 0.25
    assert mean["ndtw"] > 0.9
    assert mean["sdtw"] == mean["ndtw"]
    assert found["radius_m"] == 1.0
    assert len(os.listdir(tmp_path / "undisturbed" / "pictures")) == 2

    assert child(argv("killed"), "KilledPool", kill_after=200).returncode == -signal.SIGKILL
    rows = read_rows(tmp_path / "killed" / "episodes.jsonl")
    assert 0 < len(rows) < 6
    evaluate.main(evaluate.parse_args(argv("killed")))
    assert contents(tmp_path / "undisturbed") == contents(tmp_path / "killed")

    # the ground truth's own actions, replayed, are as good as the expert's: it is the expert's walk
    truths = evaluate.read_ground_truth(two_houses, "val_unseen")
    for row in read_rows(tmp_path / "undisturbed" / "episodes.jsonl"):
        assert row["actions"] == "".join(map(str, truths[str(row["episode_id"])]["actions"]))
    assert mean["ndtw"] == 1.0


def test_a_simulator_killed_amid_a_walk_changes_nothing(two_houses):
    """The real pool: worker 0 is killed twice; its episode begins again and ends the same."""
    episodes = evaluate.read_episodes(two_houses, "val_unseen")

    def rows(kills):
        with SimPool("house", ROBOTS["houses"], f"{two_houses}/scenes", sims=2) as pool:
            replies, wait_any, counters = [], pool.wait_any, Counter()

            def killing(*within):
                replies.append(1)
                if len(replies) in kills:
                    pool.workers[0].process.kill()
                return wait_any(*within)

            pool.wait_any = killing
            walks = [EpisodeState(e, e["instruction"]["instruction_text"]) for e in episodes]
            ended = run_episodes(pool, walks, lambda walks: [None] * len(walks), sims=2,
                                 render=False, counters=counters)
            found = {w.name: evaluate.episode_record(w, [[0, 0, 0]], 1.0, 3.0) for w in ended}
            return found, counters["deaths"]

    (rows_killed, deaths), (rows_well, no_deaths) = rows({20, 90}), rows(set())
    assert rows_killed == rows_well
    assert (deaths, no_deaths) == (2, 0)


# ---------------------------------------------------------------- bad input, a sentence each


def test_exit_codes(tmp_path):
    data = write_plane(tmp_path / "data", n=2)
    (tmp_path / "file").write_text("not a folder")
    argv = ["--split", "val", "--episodes", data, "--agent", "stop", "--out"]
    done = child([*argv, str(tmp_path / "file" / "results")])
    assert done.returncode == 2
    assert "cannot write there" in done.stderr
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr
    assert child([*argv, str(tmp_path / "out")]).returncode == 0


def checkpoint(folder, **changes):
    os.makedirs(folder)
    contract = {**CONTRACT, "dataset": "houses", "turn_deg": 30, **changes}
    (folder / "nav.json").write_text(json.dumps(contract))
    return str(folder)


def test_what_does_not_belong_together_is_refused(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")

    def refused(sentence, *flags, episodes=data):
        with pytest.raises(UserError, match=sentence):
            evaluate_plane(monkeypatch, episodes, tmp_path / "out", *flags)

    policy = ("--agent", "policy", "--ckpt")
    refused("nav.json cannot be read", *policy, str(tmp_path))
    for name, change, sentence in (
            ("text", {"horizon": "6"}, "horizon is '6'"), ("dataset", {"dataset": None}, "dataset"),
            ("memory", {"memory": {**CONTRACT["memory"], "name": "foo"}}, "memory is"),
            ("budget", {"memory": {**CONTRACT["memory"], "budget": 2.5}}, "memory is")):
        refused(sentence, *policy, checkpoint(tmp_path / name, **change))
    (tmp_path / "text" / "nav.json").write_text("[]")
    refused("holds no JSON object", *policy, str(tmp_path / "text"))
    refused("--device gpu cannot be used", *policy, checkpoint(tmp_path / "gpu"), "--device", "gpu")
    refused("trained with turn_deg = 15 and the robot 'houses' has 30", *policy,
            checkpoint(tmp_path / "c15", turn_deg=15), "--robot", "houses")
    refused("camera_height_m = 0.88 .* leave --robot and --camera-height-m out", *policy,
            checkpoint(tmp_path / "high", camera_height_m=0.88), "--camera-height-m", "1.25")
    refused("sliding = False and the robot 'houses' has True", *policy,
            checkpoint(tmp_path / "dry", sliding=False), "--sliding")
    refused("robot turns 15 degrees, but the ground truth was walked with turns of 30", *policy,
            checkpoint(tmp_path / "r2r", dataset="r2r", turn_deg=15))     # of another data set
    refused("--execute 7 does not fit", "--execute", "7", *policy, checkpoint(tmp_path / "good"))
    refused("robot turns 15 degrees, but the ground truth was walked with turns of 30",
            "--robot", "r2r")
    refused("1 scenes are missing below .* give the folder", "--scenes", str(tmp_path))
    refused("episode 77 .*has no ground truth", episodes=write_plane(
        tmp_path / "d2", **{"1": {"episode_id": 77}}))
    refused("ground truth starts 3.0 m from the start of episode 1 of .* copy both of one release",
            episodes=write_plane(tmp_path / "d4", **{"1": {"start_position": [0, 3, 0]}}))
    refused("walks where the robot does not face .only 13% of its moves", episodes=write_plane(
        tmp_path / "d5", **{str(i): {"start_rotation": [0, 1, 0, 0]} for i in range(8)}))
    refused("no common radius", episodes=write_plane(
        tmp_path / "d3", **{"1": {"goals": [{"position": [0, 0, 0], "radius": 2.0}]}}))
    evaluate_plane(monkeypatch, data, tmp_path / "out")
    refused("holds another measurement \\(of other seed\\)", "--seed", "1")
    (tmp_path / "out" / "run.json").write_text("{")
    refused("run.json is damaged")
    monkeypatch.chdir(tmp_path)
    refused("train one", "--agent", "policy")
    checkpoint(tmp_path / "ckpt" / "sft")
    args = evaluate.parse_args([])
    assert evaluate.choose_ckpt(args)[0] == "ckpt/sft" and args.split == "val_unseen"
    checkpoint(tmp_path / "ckpt" / "grpo")
    assert evaluate.choose_ckpt(args)[0] == "ckpt/grpo"


def test_a_retrained_checkpoint_has_another_fingerprint(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 256, 3_000_000, dtype=np.uint8)
    (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
    before = evaluate.fingerprint(tmp_path)
    assert before == evaluate.fingerprint(tmp_path)
    weights[1_000_000:] += 1                                             # the rest is frozen
    (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
    assert before != evaluate.fingerprint(tmp_path)
