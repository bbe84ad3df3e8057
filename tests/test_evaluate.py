"""
Closed-loop evaluation against hand-worked walks, on an open plane that needs no simulator, and in
two real houses. The plane (FakePool) answers in random order, dies and fails when it is told to.
"""
import doctest
import functools
import gzip
import itertools
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
from conftest import GLB
from PIL import Image

import evaluate
from cli import UserError, write_json
from evaluate import (
    Walk,
    cluster_bootstrap,
    dtw,
    judge,
    ndtw,
    path_length,
    policy_agent,
    rate_interval,
    walk_episodes,
    wilson,
)
from lsm import pick_frames
from reward import FORWARD, LEFT, RIGHT, STOP, action_phrases
from world import SimDied, SimError, houses
from world.pool import SimPool
from world.robots import ROBOTS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PHRASES = action_phrases(30, 0.25)

# ---------------------------------------------------------------- the plane


class KilledPool(SimPool):
    """The real one, in a process that is killed after a number of replies."""

    def wait_any(self, *within):
        die_in_time()
        return super().wait_any(*within)


def die_in_time(replies=[0]):  # noqa: B006
    replies[0] += 1
    if replies[0] == int(os.environ.get("KILL_AFTER", -1)):
        os.kill(os.getpid(), signal.SIGKILL)


class FakePool:
    """SimPool's verbs on an endless floor: turns of 30 degrees, steps of 0.25 m, no walls.

    An episode's info may hold "dies": n (its first n replies are deaths), "fails" (its scene gives
    a SimError), "refused" (its start does), "no_way" (its goal does, to the expert), "distance"
    (what state() reports instead of the truth), or "beyond": [metres, what it reports once z is
    further than so many metres from the start].
    """

    def __init__(self, kind, robot, scenes_dir, sims=2, commands=None, timeout_s=120,
                 gpus=None, seed=0):
        self.dice, self.asked, self.episode, self.deaths = random.Random(seed), {}, {}, {}
        self.place = {}

    def note_versions(self, folder):
        write_json(os.path.join(folder, "simulator.json"), {"simulator": "a fake"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert error[0] or not self.asked, "someone left with a request under way"

    def submit(self, i, verb, **kwargs):
        assert i not in self.asked, "one outstanding request per simulator"
        self.asked[i] = (verb, kwargs)

    def wait_any(self, within_s):
        if within_s < math.inf and self.dice.random() < 0.5:
            return None
        i = self.dice.choice(sorted(self.asked))
        verb, kwargs = self.asked.pop(i)
        die_in_time()
        return i, getattr(self, verb)(i, **kwargs)

    def reset(self, i, episode, frame=True):
        info, name = episode["info"], episode["episode_id"]
        self.episode[i] = episode
        if info.get("fails"):
            return SimError(f"{episode['scene_id']} is broken")
        if info.get("refused"):
            return SimError("the pose is inside an obstacle")
        if self.deaths.get(name, 0) < info.get("dies", 0):
            self.deaths[name] = self.deaths.get(name, 0) + 1
            return SimDied(f"simulator {i} died")
        self.place[i] = [*episode["start_position"], 0]
        return {**({"frame": self.view(i)} if frame else {}), "state": self.state(i)}

    def load(self, i, scene_id):
        fails = self.episode[i]["info"].get("fails")
        return SimError(f"{scene_id} is broken") if fails else {"cpu_s": 0.0}

    def step(self, i, actions, frames=True):
        assert actions and STOP not in actions
        views, states = [], []
        for action in actions:
            x, y, z, turns = self.place[i]
            turns += {LEFT: 1, RIGHT: -1}.get(action, 0)
            if action == FORWARD:
                x -= 0.25 * math.sin(turns * math.pi / 6)
                z -= 0.25 * math.cos(turns * math.pi / 6)
            self.place[i] = [x, y, z, turns]
            views.append(self.view(i))
            states.append(self.state(i))
        return {**({"frames": np.array(views)} if frames else {}), "states": states}

    def expert(self, i, goal=None):
        if self.episode[i]["info"].get("no_way"):
            return SimError("no way to the goal")
        (gx, _, gz), (x, _, z, turns) = self.episode[i]["goals"][0]["position"], self.place[i]
        if math.hypot(gx - x, gz - z) < 0.3:
            return {"action": STOP}
        off = math.atan2(x - gx, z - gz) - turns * math.pi / 6
        off = (off + math.pi) % (2 * math.pi) - math.pi
        turn = LEFT if off > 0 else RIGHT
        return {"action": FORWARD if abs(off) <= math.pi / 12 + 1e-9 else turn}

    def topdown(self, i):
        return {"image": np.full((100, 200, 3), 230, np.uint8), "bounds": [-10, -5, 10, 5]}

    def view(self, i):
        """A picture that tells where the robot stands: 16 hashed bytes of its pose, as 4x4 grey."""
        dice = random.Random(repr([round(v, 6) for v in self.place[i]]))
        return np.frombuffer(dice.randbytes(16), np.uint8).reshape(4, 4, 1).repeat(3, axis=2)

    def state(self, i):
        x, y, z, turns = self.place[i]
        yaw, info = turns * math.pi / 6, self.episode[i]["info"]
        metres = [math.hypot(g["position"][0] - x, g["position"][2] - z)
                  for g in self.episode[i]["goals"]]
        if abs(z) > info.get("beyond", [math.inf])[0]:
            metres = [info["beyond"][1]]
        return {"position": [x, y, z], "rotation": [0, math.sin(yaw / 2), 0, math.cos(yaw / 2)],
                "collided": False,
                "distance_to_goal": info.get("distance", metres[0] if metres else None)}


def fake_episode(name, goal=(0, 0, -2), **info):
    return {"episode_id": name, "trajectory_id": f"t{name}", "scene_id": "houses/h/h.glb",
            "start_position": [0, 0, 0], "start_rotation": [0, 0, 0, 1], "info": info,
            "goals": [{"position": list(goal), "radius": 1.0}],
            "instruction": {"instruction_text": f"Walk to place number {name}."}}


FakePrompt = namedtuple("FakePrompt", "text frames ids")


class FakePolicy:
    """Answers with six actions that depend on every pixel and word it was given, and on nothing
    else; counts how often it was shown a frame."""

    def __init__(self, stop=0.1, garbage=0.0):
        self.nav = {"memory": {"name": "lsm", "budget": 5, "recent": 3, "short_stride": 1,
                               "long_stride": 3}, "horizon": 6}
        self.phrases, self.encoded, self.prompts, self.batches = PHRASES, 0, [], []
        self.stop, self.garbage = stop, garbage

    def encode_frames(self, frames):
        import torch  # not on top: the children below do without
        self.encoded += len(frames)
        return [torch.tensor(frame[..., 0].astype(np.float32)).view(4, 4) for frame in frames]

    def prompt(self, text, features):
        assert text.count("<image>") == len(features)
        self.prompts.append((text, [f.flatten().tolist() for f in features]))
        return FakePrompt(*self.prompts[-1], [7] * 9)

    def generate(self, prompts, temperature=0.0, seeds=None, draft=False, **_):
        self.batches.append(len(prompts))
        texts = []
        for prompt, seed in zip(prompts, seeds or [None] * len(prompts)):
            dice = random.Random(repr(prompt) + (str(seed) if temperature else ""))
            share = (1 - self.stop) / 3
            plan = dice.choices([FORWARD, LEFT, RIGHT, STOP], [share] * 3 + [self.stop], k=6)
            text = ", ".join(PHRASES[a] for a in plan)
            texts.append("I see a wall." if dice.random() < self.garbage else text)
        mask = np.ones((len(texts), 3), dtype=bool)
        return type("Rollout", (), {"texts": texts, "completion_mask": mask})


def fake_prompt(instruction, n_history, nav):
    return f"{instruction}: {'<image>' * (n_history + 1)}"


def walk_with(decide, episodes, sims=3, seed=0, **kwargs):
    walks = [Walk(e, e["instruction"]["instruction_text"]) for e in episodes]
    pool = FakePool("house", {}, "", seed=seed)
    ended = {walk.name: walk for walk in walk_episodes(pool, sims, walks, decide, **kwargs)}
    assert not pool.asked and list(sorted(ended)) == sorted(str(e["episode_id"]) for e in episodes)
    return ended


def rows_with(policy, episodes, sims=3, seed=0, max_steps=60, **kwargs):
    ended = walk_with(policy_agent(policy, fake_prompt, **kwargs), episodes, sims, seed,
                      max_steps=max_steps)
    return [evaluate.row_of(ended[str(e["episode_id"])], [[0, 0, 0], [0, 0, -2]], 1.0, 3.0)
            for e in episodes]


# ---------------------------------------------------------------- metrics


def test_doctests():
    assert doctest.testmod(evaluate).failed == 0


def test_dtw_against_brute_force_and_fastdtw():
    fastdtw = pytest.importorskip("fastdtw").fastdtw
    dice = np.random.default_rng(0)
    for n, m in ((1, 1), (1, 5), (6, 1), (7, 4), (30, 45)):
        a, b = dice.normal(size=(n, 3)), dice.normal(size=(m, 3))

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
    marks = judge(distances, 4.5, stopped=True, radius=1.0)
    assert marks == {"success": 0.0, "oracle_success": 0.0, "spl": 0.0}   # d == radius: outside
    marks = judge(distances, 4.5, stopped=True, radius=1.01)
    assert marks["success"] == 1.0 and marks["spl"] == pytest.approx(2.5 / 4.5)
    # against the reference (0,0,0) (0,0,-2) (1.5,0,-2): the pauses cost nothing, the detour 1 + 1
    reference = [[0, 0, 0], [0, 0, -2], [1.5, 0, -2]]
    assert ndtw(path, reference) == pytest.approx(math.exp(-2 / (3 * 3.0)))
    assert ndtw(path, reference, success_distance=1.0) == pytest.approx(math.exp(-2 / 3))


def test_oracle_success_sees_the_start_and_spl_survives_standing_still():
    assert judge([0.5, 4.0], 4.0, stopped=True, radius=1.0)["oracle_success"] == 1.0
    assert judge([0.0], 0.0, stopped=True, radius=1.0)["spl"] == 1.0      # 0 / 0 would be nan
    assert judge([2.0, 0.1], 1.0, stopped=True, radius=1.0)["spl"] == 1.0  # a body has no width


# ---------------------------------------------------------------- intervals


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


def scored_row(name, scene, trajectory=None, **values):
    metrics = dict.fromkeys([*evaluate.TITLES, "success_3m", "oracle_success_3m", "spl_3m",
                             "sdtw_3m"], 0.0)
    return {"episode_id": name, "trajectory_id": name if trajectory is None else trajectory,
            "scene_id": scene, "end": "stop", "decisions": 0, "malformed": 0, **metrics, **values}


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
    told = evaluate.table({"ckpt": None, "agent": "x", "split": "val", **found})
    assert "fewer than 5 scenes, so they hold for these scenes only" in told
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
    from model import NAV, load_policy, window_prompt
    nav = {**NAV, "turn_deg": 30, "memory": {"name": "even", "budget": 3}}
    policy = load_policy("tiny", nav, texts=["Walk to place number 1."]).eval()
    policy.generate = functools.partial(policy.generate, max_new_tokens=12)

    def answers(sims, seed, temperature):
        decide = policy_agent(policy, window_prompt, 3, "forward", temperature=temperature)
        ended = walk_with(decide, [fake_episode(i) for i in range(5)], sims, seed, max_steps=7)
        return {name: (walk.actions, [text for _, text, _ in walk.answers])
                for name, walk in ended.items()}

    for temperature in (0.0, 1.0):                          # untrained: it babbles, but repeatably
        alone = answers(1, 0, temperature)
        assert alone == answers(3, 5, temperature)
        assert len({text for _, texts in alone.values() for text in texts}) > 1


def test_every_frame_is_encoded_once_and_the_memory_is_lsm():
    policy = FakePolicy(stop=0.0)
    episode = fake_episode(5)
    walk = walk_with(policy_agent(policy, fake_prompt, execute=2), [episode], max_steps=21)["5"]
    assert len(walk.actions) == 21 and walk.end == "max_steps" and not walk.film
    assert len(walk.states) == 22 and policy.encoded == 21      # the last view is not needed
    seen, at = [], 0
    for (_, shown), (t, _, plan) in zip(policy.prompts, walk.answers):
        assert t == at
        seen += [None] * (t + 1 - len(seen))
        seen[t] = shown[-1]
        for i, frame in zip(pick_frames(t, **policy.nav["memory"]), shown):
            assert seen[i] in (None, frame)
            seen[i] = frame
        at += 2
        assert walk.actions[t:t + 2] == plan[:2][:21 - t]
    past = pick_frames(20, **policy.nav["memory"])
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


def test_max_steps_count_the_stop():
    episode = fake_episode(0, goal=(0, 0, -0.5))
    two = ", ".join([PHRASES[FORWARD]] * 2)
    assert rows_with(answering(two), [episode], max_steps=3)[0]["success"] == 1.0
    late = rows_with(answering(two), [episode], max_steps=2)[0]
    assert (late["end"], late["success"], late["oracle_success"]) == ("max_steps", 0.0, 1.0)


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
    ended = {walk.name: walk for walk in walk_episodes(
        FakePool(None, None, None), 2, [Walk(e, "") for e in episodes], oracle)}
    assert [ended[str(i)].end for i in range(5)] == ["stop", "invalid", "invalid", "error", "error"]
    assert "inside an obstacle" in ended["1"].error and "no way" in ended["2"].error
    assert "is broken" in ended["3"].error and "died" in ended["4"].error
    rows = [evaluate.row_of(ended[str(i)], None, 1.0, 3.0) for i in range(5)]
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
        told = capsys.readouterr().out
        assert "1 episodes are invalid" in told and "the first is 1: no way to the goal" in told
    assert "walks 1 episodes" in told and "2 of 3 have walked already" in told


@pytest.mark.parametrize("distance", [math.inf, math.nan, None])
def test_distances_that_are_not_finite_are_counted_apart(distance):
    episodes = [fake_episode(0, goal=(0, 0, -0.1)), fake_episode(1, distance=distance)]
    ended = walk_with(lambda walks: [[STOP] for _ in walks], episodes)
    rows = [evaluate.row_of(ended[n], [[0, 0, 0]], 1.0, 3.0) for n in ("0", "1")]
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
    rows = [evaluate.row_of(ended[str(i)], [[0, 0, 0], [0, 0, -1]], 1.0, 3.0) for i in range(3)]
    assert [row["end"] for row in rows] == ["stop"] * 3
    assert [row["success"] for row in rows] == [0.0, 1.0, 0.0]        # the last: d is not < 1
    assert [row["oracle_success"] for row in rows] == [1.0, 1.0, 0.0]
    assert rows[0]["distance_to_goal"] is None and rows[0]["spl"] == rows[0]["sdtw"] == 0
    assert 0 < rows[0]["ndtw"] < 1 and rows[1]["distance_to_goal"] == 0.0
    found = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert (found["scored"], found["unreachable"], found["no_way_at_end"]) == (3, 0, 1)
    assert found["metrics"]["success"]["mean"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["metrics"]["distance_to_goal"]["mean"] == 0.5        # of the two that have one
    assert "1 walks ended where no way" in evaluate.table({"ckpt": "x", "split": "val", **found})
    json.dumps([rows, found], allow_nan=False)
    # the expert of such a place knows nothing: it stops, and that is no simulator's error
    wander = walk_with(lambda walks: [out[:7] if not w.actions else None for w in walks],
                       episodes[:1])["0"]
    assert wander.end == "stop" and wander.actions == [*out[:7], STOP]


def test_other_words_are_of_another_goal_in_the_same_scene():
    """Scenes a and b with two goals each, 5 m apart; c with one goal, reached by all its walks."""
    episodes = []
    for i in range(18):
        scene, x = "aabbcc"[i % 6], 5.0 * (i % 2) * (i % 6 < 4)
        episodes.append({**fake_episode(i, goal=(x, 0, 0)), "scene_id": scene,
                         "trajectory_id": i % 6})
    episodes[0]["goals"][0]["position"][1] = 0.1
    by_id = {i: e for i, e in enumerate(episodes)}
    words, near = evaluate.other_words(episodes, 0, radius=3.0)
    for i, mine in by_id.items():
        other = by_id[int(words[str(i)].split()[-1].strip("."))]
        assert other["trajectory_id"] != mine["trajectory_id"]
        same = other["scene_id"] == mine["scene_id"]
        assert same == (mine["scene_id"] != "c") == (str(i) in near)
        assert not same or other["goals"][0]["position"][0] != mine["goals"][0]["position"][0]
    assert (words, near) == evaluate.other_words(episodes, 0, radius=3.0)
    assert words != evaluate.other_words(episodes, 1, radius=3.0)[0]
    with pytest.raises(UserError, match="different instructions"):
        evaluate.other_words([e for e in episodes if e["trajectory_id"] == 0], 0, 3.0)
    # Hindi is no control for English
    for i, episode in by_id.items():
        episode["instruction"]["language"] = ("hi-IN", "en-US")[i // 9]
    words, _ = evaluate.other_words(episodes, 0, 3.0)
    assert all(int(words[str(i)].split()[-1].strip(".")) // 9 == i // 9 for i in by_id)


def test_results_say_where_the_shuffled_instructions_are_from(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data")                # one scene, nine goals around the start
    found = evaluate_plane(monkeypatch, data, tmp_path / "out", "--shuffle-instructions")
    assert found["borrowed_in_scene"] == 9
    assert "9 of 9 instructions belong to a walk to another goal" in capsys.readouterr().out


def test_blank_frames_are_black():
    policy = FakePolicy()
    rows_with(policy, [fake_episode(0)], blank=True)
    assert policy.prompts and not any(sum(map(sum, frames)) for _, frames in policy.prompts)


# ---------------------------------------------------------------- the script


def write_plane(folder, n=9, **changes):
    """Episodes 0..n-1 of split val on the plane, with a ground truth that walks there."""
    episodes, truths = [], {}
    for i in range(n):
        steps = 4 + i % 5
        away, yaw = 0.25 * steps, i * math.pi / 6
        goal = (-away * math.sin(yaw), 0, -away * math.cos(yaw))
        episodes.append({**fake_episode(i, goal), **changes.get(str(i), {})})
        actions = [LEFT] * i + [FORWARD] * steps + [STOP]
        truths[str(i)] = {"actions": actions, "forward_steps": steps,
                          "locations": [[goal[0] * k / steps, 0, goal[2] * k / steps]
                                        for k in range(steps + 1)]}
    os.makedirs(folder / "val", exist_ok=True)
    os.makedirs(folder / "scenes" / "houses" / "h", exist_ok=True)
    (folder / "scenes" / "houses" / "h" / "h.glb").write_bytes(GLB)
    for name, content in (("val", {"episodes": episodes}), ("val_gt", truths)):
        with gzip.open(folder / "val" / f"{name}.json.gz", "wt") as file:
            json.dump(content, file)
    return str(folder)


def evaluate_plane(monkeypatch, data, out, *flags):
    monkeypatch.setattr(evaluate, "SimPool", FakePool)
    return evaluate.main(evaluate.parse_args(
        ["--split", "val", "--episodes", data, "--out", str(out), "--agent", "oracle", *flags]))


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
    rows, _ = evaluate.read_rows(tmp_path / "forward" / "episodes.jsonl")
    assert {row["actions"] for row in rows} == {"1111110"}
    assert rows[0]["distance_to_goal"] == pytest.approx(0.5)
    assert rows[0]["spl"] == pytest.approx(1 / 1.5, abs=1e-6)
    # random: by episode, not by order
    evaluate_plane(monkeypatch, data, tmp_path / "random", "--agent", "random")
    evaluate_plane(monkeypatch, data, tmp_path / "random1", "--agent", "random", "--sims", "1")
    assert contents(tmp_path / "random") == contents(tmp_path / "random1")
    rows, _ = evaluate.read_rows(tmp_path / "random" / "episodes.jsonl")
    shares = np.array([[row["actions"].count(a) for a in "123"] for row in rows]).sum(axis=0)
    assert shares[0] > 2 * shares[1] and len({row["actions"] for row in rows}) == 9


def test_limit_is_spread_and_ranks_agree_with_one(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")
    evaluate_plane(monkeypatch, data, tmp_path / "one", "--limit", "4")
    rows, _ = evaluate.read_rows(tmp_path / "one" / "episodes.jsonl")
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


# ---------------------------------------------------------------- test splits, leaderboards


def write_test_split(folder, split, n=5, rxr=False):
    """Episodes with hidden goals, no ground truth: R2R's test, RxR's test_challenge."""
    episodes = []
    for i in range(n):
        episode = {**fake_episode(str(i) if rxr else i), "scene_id": "mp3d/h/h.glb"}
        del episode["goals"]
        if rxr:
            episode["goals"] = None
            episode["instruction"] |= {
                "instruction_id": str(70 - i), "timed_instruction": [{"start_time": math.nan}],
                "language": ("en-US", "en-IN", "hi-IN", "te-IN")[i % 4]}
        episodes.append(episode)
    os.makedirs(folder / split)
    name = f"{split}_guide" if rxr else split
    with gzip.open(folder / split / f"{name}.json.gz", "wt") as file:
        json.dump({"episodes": episodes}, file)
    os.makedirs(folder / "scenes" / "mp3d" / "h")
    (folder / "scenes" / "mp3d" / "h" / "h.glb").write_bytes(GLB)
    return ["--split", split, "--episodes", str(folder), "--scenes", str(folder / "scenes")]


def submitted(monkeypatch, where, out, *flags, plan=(LEFT, LEFT, FORWARD, RIGHT, STOP)):
    """Every robot walks `plan` -> what evaluate.py returned."""
    monkeypatch.setattr(evaluate, "SimPool", FakePool)
    monkeypatch.setattr(evaluate, "load_agent", lambda args, settings, words: (
        lambda walks: [list(plan) for _ in walks]))
    return evaluate.main(evaluate.parse_args([*where, "--agent", "random", "--out", str(out),
                                              *flags]))


def vlnce_heading(rotation):
    """VLN-CE's, derived anew: where the camera's -z goes under the inverse rotation, as an angle in
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


# Every walk of these tests, by hand: two turns of 30 degrees to the left, a step, one back, stop.
STEP = [-0.25 * math.sin(math.pi / 3), 0.0, -0.125]
BY_HAND = [([0, 0, 0], 0, False), ([0, 0, 0], math.pi / 6, False), ([0, 0, 0], math.pi / 3, False),
           (STEP, math.pi / 3, False), (STEP, math.pi / 6, False), (STEP, math.pi / 6, True)]


def test_the_r2r_leaderboard_file(monkeypatch, tmp_path, capsys):
    where = write_test_split(tmp_path / "r2r", "test")
    found = submitted(monkeypatch, where, tmp_path / "out", "--turn-deg", "30", "--pictures", "1",
                      "--submit", str(tmp_path / "x/r2r.json"))
    assert found["scored"] == 0 and found["episodes"] == 5 and found["ends"] == {"stop": 5}
    assert all(value == {"mean": None, "ci": None} for value in found["metrics"].values())
    told = capsys.readouterr().out
    assert "0 of 5 episodes scored" in told and "nan" not in told and "SR" not in told
    assert os.path.exists(tmp_path / "out/pictures/0.png")
    walks = json.loads((tmp_path / "x/r2r.json").read_text())
    assert set(walks) == {"0", "1", "2", "3", "4"} and isinstance(walks, dict)
    for records in walks.values():                          # the schema, written out
        assert isinstance(records, list)
        for record in records:
            assert set(record) == {"position", "heading", "stop"}
            assert len(record["position"]) == 3 and isinstance(record["stop"], bool)
            assert all(math.isfinite(v) for v in (*record["position"], record["heading"]))
        assert len(records) == len(BY_HAND)
        for record, (place, heading, stop) in zip(records, BY_HAND):
            assert record["position"] == pytest.approx(place, abs=1e-6)
            assert record["heading"] == pytest.approx(heading, abs=1e-6) and record["stop"] is stop


def test_a_walk_that_never_stops_says_so(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "r2r", "test")
    submitted(monkeypatch, where, tmp_path / "out", "--submit", str(tmp_path / "r2r.json"),
              "--turn-deg", "30", "--max-steps", "4", plan=[FORWARD])
    for records in json.loads((tmp_path / "r2r.json").read_text()).values():
        assert len(records) == 5 and not any(record["stop"] for record in records)


def test_the_rxr_leaderboard_file(monkeypatch, tmp_path, capsys):
    where = write_test_split(tmp_path / "rxr", "test_challenge", rxr=True)
    submitted(monkeypatch, where, tmp_path / "out", "--submit", str(tmp_path / "rxr.jsonl"))
    assert "5 episodes for the leaderboard\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "rxr.jsonl").read_text().splitlines()]
    assert [line["instruction_id"] for line in lines] == [66, 67, 68, 69, 70], "ints, in order"
    for line in lines:                                      # the schema, written out
        assert set(line) == {"instruction_id", "path"}
        assert np.allclose(line["path"], [[0, 0, 0], STEP], atol=1e-6), "turns add no place"
    submitted(monkeypatch, where, tmp_path / "en", "--submit", str(tmp_path / "en.jsonl"),
              "--languages", "en-US,en-IN")
    assert "in en-IN, en-US; it takes all of" in capsys.readouterr().out
    assert len((tmp_path / "en.jsonl").read_text().splitlines()) == 3


def test_a_submission_is_whole_or_not_written(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "r2r", "test")
    file = tmp_path / "r2r.json"
    flags = ("--turn-deg", "30", "--submit", str(file))
    with pytest.raises(UserError, match="every episode of the split: leave --limit out"):
        submitted(monkeypatch, where, tmp_path / "out", *flags, "--limit", "2")
    broken = FakePool.reset
    monkeypatch.setattr(FakePool, "reset", lambda self, i, episode, frame=True:
                        SimError("h.glb is broken") if episode["episode_id"] == 1
                        else broken(self, i, episode, frame))
    monkeypatch.setattr(FakePool, "load", lambda self, i, scene_id: SimError("h.glb is broken"))
    with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
        submitted(monkeypatch, where, tmp_path / "out", *flags)
    assert not file.exists()
    with pytest.raises(UserError, match="not written: 1 of 2 .* no walk on record, the first is 8"):
        evaluate.submit(str(file), [fake_episode(7), fake_episode(8)], [
            {"episode_id": 7, "poses": [[0, 0, 0, 0]]}, {"episode_id": 8, "end": "error"}])
    for agent, sentence in (("oracle", "hides its goals"), ("forward", "needs --forward-steps")):
        with pytest.raises(UserError, match=sentence):
            submitted(monkeypatch, where, tmp_path / "other", "--turn-deg", "30", "--agent", agent)


def test_the_checkpoint_brings_the_robot_that_its_data_were_seen_by(ego, tmp_path):
    """meta.json -> nav.json -> the simulator: frame size, body and sliding included."""
    import sft  # brings torch: not on top
    shutil.copytree(ego, tmp_path / "train")
    meta = json.loads((tmp_path / "train/meta.json").read_text())
    meta["robot"] |= {"width": 112, "height": 84, "sliding": False, "radius_m": 0.15}
    (tmp_path / "train/meta.json").write_text(json.dumps(meta))
    args = sft.parse_args(["--model", "tiny", "--data", str(tmp_path / "train")])
    nav = sft.setup(args, 1, "cpu")[1].nav
    episode = fake_episode(0)
    assert evaluate.choose_robot(evaluate.parse_args([]), "x", nav, episode) == meta["robot"]
    with pytest.raises(UserError, match="radius_m = 0.15 and the robot 'houses' has 0.18"):
        evaluate.choose_robot(evaluate.parse_args(["--robot", "houses"]), "x", nav, episode)
    with pytest.raises(UserError, match="width = 112 and .* has 56: leave --robot and --width out"):
        evaluate.choose_robot(evaluate.parse_args(["--width", "56"]), "x", nav, episode)
    same = evaluate.parse_args(["--width", "112", "--no-sliding"])
    assert evaluate.choose_robot(same, "x", nav, episode) == meta["robot"]
    # an older contract has no frame size: the data set's, or what a flag says
    old = {key: value for key, value in nav.items() if key not in ("width", "height", "sliding")}
    found = evaluate.choose_robot(evaluate.parse_args(["--width", "64"]), "x", old, episode)
    assert (found["width"], found["height"], found["sliding"]) == (64, 56, True)


CHILD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import evaluate, test_evaluate
from cli import run
evaluate.SimPool = test_evaluate.{pool}
run(evaluate.main, lambda: evaluate.parse_args({argv!r}))
"""


def child(argv, pool="FakePool", kill_after=-1):
    code = CHILD.format(root=ROOT, tests=os.path.join(ROOT, "tests"), pool=pool, argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "KILL_AFTER": str(kill_after)}, timeout=120)


def test_kill_minus_9_and_resume_is_bit_for_bit(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")
    evaluate_plane(monkeypatch, data, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    argv = ["--split", "val", "--episodes", data, "--out", str(out), "--agent", "oracle",
            "--sims", "3"]
    assert child(argv, kill_after=120).returncode == -signal.SIGKILL
    rows, whole = evaluate.read_rows(out / "episodes.jsonl")
    assert 0 < len(rows) < 9 and not (out / "results.json").exists()
    with open(out / "episodes.jsonl", "a") as file:
        file.write('{"episode_id": 8, "end": "st')                     # as if cut while writing
    done = child(argv)
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} of 9 have walked already" in done.stdout
    assert contents(tmp_path / "undisturbed") == contents(out)


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
    assert mean["success"] == 1.0 and mean["spl"] > 0.9 and mean["distance_to_goal"] < 0.25
    assert mean["ndtw"] > 0.9 and mean["sdtw"] == mean["ndtw"] and found["radius_m"] == 1.0
    assert len(os.listdir(tmp_path / "undisturbed" / "pictures")) == 2

    assert child(argv("killed"), "KilledPool", kill_after=200).returncode == -signal.SIGKILL
    rows, _ = evaluate.read_rows(tmp_path / "killed" / "episodes.jsonl")
    assert 0 < len(rows) < 6
    evaluate.main(evaluate.parse_args(argv("killed")))
    assert contents(tmp_path / "undisturbed") == contents(tmp_path / "killed")

    # the ground truth's own actions, replayed, are as good as the expert's: it is the expert's walk
    truths = evaluate.read_ground_truth(two_houses, "val_unseen")
    for row in evaluate.read_rows(tmp_path / "undisturbed" / "episodes.jsonl")[0]:
        assert row["actions"] == "".join(map(str, truths[str(row["episode_id"])]["actions"]))
    assert mean["ndtw"] == 1.0


def test_a_simulator_killed_amid_a_walk_changes_nothing(two_houses):
    """The real pool: worker 0 is killed twice; its episode begins again and ends the same."""
    episodes = evaluate.read_episodes(two_houses, "val_unseen")

    def rows(kills):
        with SimPool("house", ROBOTS["houses"], f"{two_houses}/scenes", sims=2) as pool:
            replies, wait_any = [], pool.wait_any

            def killing(*within):
                replies.append(1)
                if len(replies) in kills:
                    pool.workers[0].process.kill()
                return wait_any(*within)

            pool.wait_any = killing
            walks = [Walk(e, e["instruction"]["instruction_text"]) for e in episodes]
            ended = walk_episodes(pool, 2, walks, lambda walks: [None] * len(walks), look=False)
            return {w.name: evaluate.row_of(w, [[0, 0, 0]], 1.0, 3.0) for w in ended}, len(replies)

    (rows_killed, replies_killed), (rows_well, replies_well) = rows({20, 90}), rows(set())
    assert rows_killed == rows_well and replies_killed > replies_well + 2


# ---------------------------------------------------------------- bad input, a sentence each


def test_exit_codes(tmp_path):
    data = write_plane(tmp_path / "data", n=2)
    (tmp_path / "file").write_text("not a folder")
    argv = ["--split", "val", "--episodes", data, "--agent", "stop", "--out"]
    said = child([*argv, str(tmp_path / "file" / "results")])
    assert said.returncode == 2 and "cannot write to" in said.stderr and "--out" in said.stderr
    assert "Traceback" not in said.stderr
    assert child([*argv, str(tmp_path / "out")]).returncode == 0


def checkpoint(folder, **changes):
    os.makedirs(folder)
    nav = {"dataset": "houses", "turn_deg": 30, "forward_m": 0.25, "hfov_deg": 90,
           "camera_height_m": 1.25, "horizon": 6, **changes}
    (folder / "nav.json").write_text(json.dumps(nav))
    return str(folder)


def test_what_does_not_belong_together_is_refused(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data")

    def refused(sentence, *flags, episodes=data):
        with pytest.raises(UserError, match=sentence):
            evaluate_plane(monkeypatch, episodes, tmp_path / "out", *flags)

    policy = ("--agent", "policy", "--ckpt")
    refused("no readable nav.json", *policy, str(tmp_path))
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
    refused("no common radius", episodes=write_plane(
        tmp_path / "d3", **{"1": {"goals": [{"position": [0, 0, 0], "radius": 2.0}]}}))
    evaluate_plane(monkeypatch, data, tmp_path / "out")
    refused("holds another measurement \\(of other seed\\)", "--seed", "1")
    monkeypatch.chdir(tmp_path)
    refused("train one", "--agent", "policy")
    checkpoint(tmp_path / "ckpt" / "sft")
    args = evaluate.parse_args([])
    assert evaluate.choose_ckpt(args)[0] == "ckpt/sft" and args.split == "val_unseen"
    checkpoint(tmp_path / "ckpt" / "grpo")
    assert evaluate.choose_ckpt(args)[0] == "ckpt/grpo"


def test_a_retrained_checkpoint_has_another_fingerprint(tmp_path):
    dice = np.random.default_rng(0)
    weights = dice.integers(0, 256, 3_000_000, dtype=np.uint8)
    (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
    before = evaluate.fingerprint(tmp_path)
    assert before == evaluate.fingerprint(tmp_path)
    weights[1_000_000:] += 1                                             # the rest is frozen
    (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
    assert before != evaluate.fingerprint(tmp_path)


# ---------------------------------------------------------------- beside habitat-lab

FAKE_HABITAT = {
    "habitat_sim.py": "__version__ = '0'",
    "omegaconf.py": """
class OmegaConf:
    create = structured = staticmethod(lambda content: content)
""",
    "habitat/config/default.py": "patch_config = lambda config: config",
    "habitat/config/default_structured_configs.py": """
class Record(dict):
    def __init__(self, **fields):
        super().__init__(fields)
        self.__dict__ = self

def __getattr__(name):
    return Record
""",
    "habitat/tasks/nav/nav.py": """
class NavigationGoal:
    def __init__(self, position):
        self.position = position
""",
    "habitat/tasks/vln/vln.py": """
InstructionData = dict
class VLNEpisode:
    def __init__(self, **fields):
        self.__dict__.update(fields)
""",
    "habitat/__init__.py": '''
import math, types
__version__ = "fake"
class Dataset:
    pass
class Env:
    """Forward only. Measures as habitat-lab's: SPL divides by the distance at the start or walked.
    """
    def __init__(self, config, dataset):
        self.measures = config["habitat"].task.measurements
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def reset(self):
        if "broken" in self.current_episode.scene_id:
            raise RuntimeError("no such scene")
        self.z, self.walked, self.stopped = 0.0, 0.0, False
        self.start = self.distance()
        self.update()
    def distance(self):
        return abs(self.current_episode.goals[0].position[2] - self.z)
    def step(self, action):
        self.stopped = action == 0
        self.z, self.walked = self.z - .25 * (action == 1), self.walked + .25 * (action == 1)
        self.update()
    def update(self):
        near = self.distance() < self.measures["success"].success_distance
        success = float(self.stopped and near)
        self.found = {"distance_to_goal": self.distance(), "success": success}
        if "spl" in self.measures:
            self.found["spl"] = success * (self.start / max(self.start, self.walked))
    def get_metrics(self):
        return self.found
    @property
    def sim(self):
        return types.SimpleNamespace(get_agent_state=lambda: types.SimpleNamespace(
            position=[0, 0, self.z]))
''',
}


@pytest.fixture
def fake_habitat(tmp_path, monkeypatch):
    """A `habitat` on PYTHONPATH that measures as habitat-lab does, 0 / 0 included."""
    for name, text in FAKE_HABITAT.items():
        path = tmp_path / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(tmp_path / "fake").parents[:-1]:
            (tmp_path / "fake" / folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


def witnessed(walks):
    """[(goal's z, actions, scene)] -> their rows, and testify() of them, to be called."""
    episodes = [{**fake_episode(i, (0, 0, z)), "scene_id": scene}
                for i, (z, _, scene) in enumerate(walks)]
    ended = walk_with(lambda some: [list(walks[int(w.name)][1]) for w in some], episodes)
    rows = [evaluate.row_of(ended[str(i)], [[0, 0, 0]], 1.0, 3.0) for i in range(len(walks))]
    settings = {"robot": ROBOTS["houses"], "radius_m": 1.0}
    return rows, lambda: evaluate.testify(rows, episodes, settings, "", None)


def test_habitat_lab_divides_by_zero_for_one_walk_and_judges_the_others(fake_habitat):
    rows, judge_them = witnessed([(-2, [FORWARD] * 8 + [STOP], "a"), (0, [STOP], "a"),
                                  (0, [FORWARD] * 6 + [STOP], "a"), (-1, [FORWARD, STOP], "b")])
    found = judge_them()
    assert found["walks"] == 4 and found["no_verdict"] == {}
    assert found["without_spl"] == [1, 2]                       # both start at their goal
    assert max(found["largest_difference"].values()) < 1e-6
    rows[1]["distance_to_goal"] = 0.5                           # still compared in all the rest
    with pytest.raises(UserError, match="episode 1: distance_to_goal is 0.5 by our count and 0.0"):
        judge_them()


def test_a_walk_without_a_verdict_costs_no_other_its_own(fake_habitat):
    rows, judge_them = witnessed([(-2, [FORWARD] * 8 + [STOP], "broken"), (-2, [STOP], "a")])
    found = judge_them()
    assert found["walks"] == 1 and found["no_verdict"] == {"0": "RuntimeError: no such scene"}
    rows[1]["spl"] = 0.5
    with pytest.raises(UserError, match="episode 1: spl is 0.5 by our count and 0.0"):
        judge_them()


def test_a_missing_package_is_named_where_it_is_missing_and_only_there(fake_habitat, tmp_path):
    _, judge_them = witnessed([(-2, [STOP], "a")])
    (tmp_path / "fake/habitat/__init__.py").write_text("import os; os._exit(7)")
    with pytest.raises(UserError, match="process ended with 7 after 0 of 1 walks") as said:
        judge_them()
    assert "pip install" not in str(said.value)
    (tmp_path / "fake/habitat/__init__.py").write_text("import magnum_that_is_not_here")
    with pytest.raises(UserError, match="needs habitat-lab .No module named 'magnum_that.*pip"):
        judge_them()


def test_verdicts_are_written_before_the_run_complains_of_missing_ones(monkeypatch, tmp_path):
    verdicts = {"walks": 8, "habitat_lab": "0", "largest_difference": {"spl": 0.0},
                "without_spl": [3], "no_verdict": {"5": "RuntimeError: no such scene"}}
    monkeypatch.setattr(evaluate, "testify", lambda *_: verdicts)
    with pytest.raises(SystemExit, match="no verdict on 1 .first 5: RuntimeError: no such scene"):
        evaluate_plane(monkeypatch, write_plane(tmp_path / "data"), tmp_path / "out", "--sim",
                       "habitat", "--witness")
    assert json.loads((tmp_path / "out/results.json").read_text())["witness"] == verdicts


# ---------------------------------------------------------------- pictures

HINDI = "सोफे के पास रुकें। Stop."


def drawn(monkeypatch, tmp_path, text, fonts=None):
    """A walk's sheet with this instruction -> its title's and text's rows as an array, the folder.
    fonts: the font files that are said to be installed."""
    evaluate.say_no_font.cache_clear()
    evaluate.font_for.cache_clear()
    if fonts is not None:
        monkeypatch.setattr(evaluate, "installed_fonts", lambda: fonts)
    episode = fake_episode("7")
    episode["instruction"] = {"instruction_text": text, "language": "hi-IN"}
    walk = Walk(episode, text, filmed=True)
    walk.see({"states": [{"position": [0, 0, 0], "rotation": [0, 0, 0, 1]}],
              "frame": np.full((56, 56, 3), 90, np.uint8)})
    walk.map, walk.end = FakePool("", {}, "").topdown(0), "stop"
    evaluate.draw_walk(walk, {"steps": 1, "end": "stop"}, None, ROBOTS["houses"], 1.0,
                       str(tmp_path / "pictures"))
    evaluate.font_for.cache_clear()
    return np.array(Image.open(tmp_path / "pictures/7.png"))[22:48], tmp_path / "pictures"


def test_an_instruction_that_no_font_can_draw_stands_beside_the_picture(
        monkeypatch, tmp_path, capsys):
    note, folder = drawn(monkeypatch, tmp_path, HINDI, fonts=[])
    assert (folder / "7.txt").read_text(encoding="utf-8") == HINDI + "\n"
    assert "apt-get install fonts-noto-core" in capsys.readouterr().err
    said, _ = drawn(monkeypatch, tmp_path / "note", "[hi-IN instruction: see 7.txt]")
    assert (note == said).all() and (note < 128).any()
    drawn(monkeypatch, tmp_path / "english", "Stop.", fonts=[])
    assert not (tmp_path / "english/pictures/7.txt").exists() and not capsys.readouterr().err


def test_hindi_is_drawn_with_an_installed_font(monkeypatch, tmp_path, capsys):
    evaluate.font_for.cache_clear()
    if evaluate.lay_out(HINDI, 1000) is None:
        pytest.skip("no font with Devanagari (apt-get install fonts-noto-core), or no raqm")
    words, _ = evaluate.lay_out(HINDI, 1000)
    font = words[0][3]
    assert set(map(ord, words[0][2])) <= evaluate.characters_of(font.path)
    # shaped: a vowel sign joins its letter, so that both take less room than side by side
    assert font.getlength("सो") < font.getlength("स") + font.getlength("◌ो")
    text, folder = drawn(monkeypatch, tmp_path, HINDI)
    assert (text < 128).any() and not (folder / "7.txt").exists()
    assert not capsys.readouterr().err
