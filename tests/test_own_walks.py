"""Own walks: the labels against the simulator stepped from each pose, the walks against
evaluate.py's, and recordings that are mixed for the trainers."""
import json
import os
import signal
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import SCENE_ID, FakePool, fake_episode
from policies import learn_to_write

import evaluate
import grpo
import make_data
import sft
from activevln.dialog import DIALOG
from checkpoint import load_policy, save_policy
from cli import UserError
from evaluate import EpisodeState
from make_data import VlnEgo, action_chunk
from model import CONTRACT
from tools.own_walks import LabelledLoop, mixed_agent, walk_row
from world.episodes import read_episodes
from world.house_sim import HouseSim
from world.worker import do_label

torch.set_num_threads(1)
MOST = 25                                       # actions of a walk here


@pytest.fixture(scope="module")
def houses(ego):
    """The folder with the episodes of conftest's recording."""
    return os.path.normpath(f"{ego}/../../houses")


@pytest.fixture(scope="module")
def ckpt(ego, tmp_path_factory):
    """A policy that answers in plans, at random when it is sampled."""
    data = VlnEgo(ego)
    contract = dict(CONTRACT, **data.meta["robot"], dataset="houses")
    policy = load_policy("tiny", contract=contract,
                         texts=[e["instruction"] for e in data.episodes])
    learn_to_write(policy, data)
    folder = tmp_path_factory.mktemp("ckpt") / "random"
    folder.mkdir()
    save_policy(policy, str(folder))
    return str(folder)


def flags(houses, ckpt, out, *more):
    return ["--policy", ckpt, "--episodes", houses, "--out", str(out), "--device", "cpu",
            "--max-actions", str(MOST), "--shard-walks", "3", *map(str, more)]


def record(*args):
    argv = flags(*args)
    make_data.main(make_data.parse_args(argv))
    return VlnEgo(f"{args[2]}/train")


@pytest.fixture(scope="module")
def wild(houses, ckpt, tmp_path_factory):
    """Sampled walks in which every third decision is the expert's."""
    out = tmp_path_factory.mktemp("wild")
    return record(houses, ckpt, out, "--temperature", 1, "--expert-share", 0.3, "--sims", 3)


def contents(folder):
    """All files below a folder but its locks -> {relative path: bytes}."""
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            if not name.startswith(".lock"):
                with open(os.path.join(root, name), "rb") as file:
                    found[os.path.relpath(os.path.join(root, name), folder)] = file.read()
    return found


# ---------------------------------------------------------------- labels


def test_labels_are_what_the_expert_does_from_each_pose(wild, houses):
    sim = HouseSim(wild.meta["robot"], f"{houses}/scenes")
    episodes = {e["episode_id"]: e for e in read_episodes(houses, "train")}
    apart = poses = 0
    for row in wild.episodes:
        walk, episode = wild.walks[row["walk_id"]], episodes[row["episode_id"]]
        assert len(walk["poses"]) == len(walk["labels"]) == len(walk["actions"]) <= MOST
        assert walk["actions"][-1] == 0 or len(walk["actions"]) == MOST
        assert 0 not in walk["actions"][:-1] and walk["end"] in ("stop", "max_actions")
        for t, pose in enumerate(walk["poses"]):
            sim.reset(episode)
            sim.set_pose(pose[:3], pose[3:])
            assert np.array_equal(sim.observe(), wild.frame((row["walk_id"], t)))
            if t + 1 < len(walk["poses"]):                      # the action led to the next pose
                sim.act(walk["actions"][t])
                there = np.array(walk["poses"][t + 1])
                assert np.allclose(sim.pose()[:3], there[:3], atol=1e-5)
                assert abs(np.dot(sim.pose()[3:], there[3:])) > 1 - 1e-5    # q and -q are one
                sim.set_pose(pose[:3], pose[3:])
            ahead = []
            while len(ahead) < 6 and 0 not in ahead:
                ahead.append(sim.expert_action())
                if ahead[-1]:
                    sim.act(ahead[-1])
            assert walk["labels"][t] == "".join(map(str, action_chunk(ahead, 0, 6)))
            apart += walk["actions"][t] != ahead[0]
            poses += 1
    assert len(wild.walks) == len(episodes) and 0.1 < apart / poses < 0.9


@pytest.mark.parametrize("path", ["goal", "reference"])
def test_the_oracles_own_labels_are_its_actions(houses, ckpt, tmp_path, path):
    data = record(houses, ckpt, tmp_path, "--expert-share", 1, "--label-path", path, "--horizon",
                  7, "--execute", 2, "--max-actions", 80)
    for walk in data.walks.values():
        actions = walk["actions"]
        assert walk["end"] == "stop" and walk["distance_to_goal"] < 0.25
        assert walk["labels"] == ["".join(map(str, action_chunk(actions, t, 7)))
                                  for t in range(len(actions))]


def test_labels_follow_a_path_and_leave_out_what_is_behind(house):
    """The robot stands 1 m beyond the first point: the path goes on, it does not go back."""
    episode = {"scene_id": SCENE_ID, "start_position": [-3, 0, -1], "start_rotation": [0, 0, 0, 1],
               "goals": [{"position": [3.2, 0, 0.2]}]}
    way = [[-3, 0, -1.5], [-1, 0, -1.5]]                        # 2 m to the right
    east = [0, -2 ** -0.5, 0, 2 ** -0.5]

    def labels(pose, **flags):
        return do_label(house, episode, [pose], **flags)["labels"]

    ahead, = labels([-2, 0, -1.5, *east], way=way)
    assert ahead == "111100", "1 m to go in steps of 0.25 m"
    before, = labels([-3.5, 0, -1.5, *east], way=way)
    assert before == "111111", "through the first point, which is still to come"
    point, goal = [-2, 0, -1.5], [3.2, 0, 0.2]
    assert labels([-2.8, 0, -0.6, *east])[0][0] == "1", "the goal is straight ahead"
    assert labels([-2.8, 0, -0.6, *east], way=[point, goal])[0][0] == "2", "the point is not"
    both = do_label(house, episode, [[-3, 0, -1.5, *east], [-2, 0, -1.5, *east]], way=way, start=1)
    assert both["labels"] == [ahead] and np.allclose(house.pose()[:3], [-2, 0, -1.5])


class LabellingPool(FakePool):
    """The plane, whose expert knows no way in some episodes."""

    def label(self, i, episode, poses, horizon, way, start):
        if episode["info"].get("no_way"):
            return FakePool.expert(self, i)
        return {"labels": ["1" * horizon] * (len(poses) - start)}


def test_a_walk_that_cannot_be_labelled_is_left_out_with_a_reason():
    episodes = [fake_episode(0), fake_episode(1, no_way=True), fake_episode(2, fails=True),
                fake_episode(3, distance=float("inf")), fake_episode(4, dies=1),
                fake_episode(5, dies=9)]
    walks = deque(EpisodeState(e, "", keep_video=True) for e in episodes)
    loop = LabelledLoop(LabellingPool("house", {}, ""), walks, lambda walks: [[1, 1]] * len(walks),
                        3, max_actions=3)
    rows = {walk.name: walk_row(walk.name, walk, {"turn_deg": 30}) for walk in loop.run()}
    assert rows["0"]["labels"] == rows["4"]["labels"] == ["111111"] * 3
    assert rows["0"]["actions"] == [1, 1, 1] and len(rows["0"]["poses"]) == 3
    assert {name: row["skipped"] for name, row in rows.items() if "skipped" in row} == {
        "1": "a pose has no way to the goal", "2": "the simulator died on it",
        "3": "the goal cannot be reached", "5": "the simulator died on it"}


def test_the_experts_share_is_a_probability_of_a_decision():
    walks = [EpisodeState(fake_episode(i), "") for i in range(2000)]
    for share in (0, 0.25, 1):
        agent = mixed_agent(lambda own: [[2]] * len(own), share, 0)
        plans = agent(walks)
        assert abs(plans.count([]) / 2000 - share) < 0.04
        assert plans.count([]) + plans.count([2]) == 2000
        assert agent(walks[7:9]) == plans[7:9], "also when others are asked"


# ---------------------------------------------------------------- walks


def test_without_the_expert_it_walks_as_evaluate_does(houses, ckpt, tmp_path):
    own = record(houses, ckpt, tmp_path / "own", "--sims", 2, "--execute", 2, "--temperature", 1)
    evaluate.main(evaluate.parse_args([
        "--ckpt", ckpt, "--episodes", houses, "--split", "train", "--out", str(tmp_path / "walks"),
        "--device", "cpu", "--max-actions", str(MOST), "--sims", "3", "--execute", "2",
        "--temperature", "1"]))
    rows = make_data.read_lines(tmp_path / "walks" / "episodes.jsonl")
    assert [(e["episode_id"], "".join(map(str, own.walks[e["walk_id"]]["actions"])))
            for e in own.episodes] == [(row["episode_id"], row["actions"]) for row in rows]
    with open(tmp_path / "walks" / "run.json") as file:
        assert own.meta["args"]["weights"] == json.load(file)["weights"]


CHILD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import helpers, make_data
from tools import own_walks
own_walks.SimPool = helpers.KilledPool
make_data.main(make_data.parse_args({argv!r}))
"""


def test_kill_9_and_the_same_command_give_the_same_bytes(houses, ckpt, wild, tmp_path):
    argv = flags(houses, ckpt, tmp_path, "--temperature", 1, "--expert-share", 0.3, "--sims", 3)
    code = CHILD.format(root=ROOT, tests=os.path.join(ROOT, "tests"), argv=argv)
    whole = contents(wild.folder)
    shards = [name for name in whole if name.endswith(".zip")]
    for replies in (45, 1000000):
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                               cwd=ROOT, env={**os.environ, "KILL_AFTER": str(replies)})
        there = contents(tmp_path / "train")
        if replies == 45:
            assert child.returncode == -signal.SIGKILL, child.stderr
            assert 0 < sum(name in there for name in shards) < len(shards) == 3
    assert child.returncode == 0 and "1 of them there already" in child.stdout, child.stderr
    assert there == whole


def test_a_limit_is_drawn_by_the_seed(houses, ckpt, tmp_path):
    ids = [[e["episode_id"] for e in record(houses, ckpt, tmp_path / str(seed), "--limit", 3,
                                            "--max-actions", 2, "--seed", seed).episodes]
           for seed in (0, 1)]
    assert ids[0] != ids[1] and all(len(set(some)) == 3 and some == sorted(some) for some in ids)


# ---------------------------------------------------------------- training


def test_trainers_read_the_labels_and_mix_recordings(wild, ego, ckpt, tmp_path):
    contract = dict(CONTRACT, horizon=4)
    for i, row in enumerate(wild.episodes):
        walk = wild.walks[row["walk_id"]]
        assert wild.steps(i) == list(range(len(walk["actions"])))
        assert all(wild.decision(i, t, contract).plan == tuple(map(int, walk["labels"][t][:4]))
                   for t in wild.steps(i))
    common = ["--data", wild.folder, ego, "--shares", "3", "1", "--val-data", wild.folder,
              "--val-decisions", "8", "--device", "cpu"]
    grpo.main(grpo.parse_args([*common, "--init", ckpt, "--out", str(tmp_path / "grpo"),
                               "--prompts", "16", "--batch-size", "8", "--group-size", "2"]))
    sft.main(sft.parse_args([*common, "--model", ckpt, "--out", str(tmp_path / "sft"),
                             "--batch-size", "8", "--steps-per-walk", "2", "--max-steps", "2"]))
    for name, key in (("grpo", "val/first_action_acc"), ("sft", "val/first_action_acc")):
        with open(tmp_path / name / "log.jsonl") as file:
            assert 0 <= [json.loads(line) for line in file][-1][key] <= 1


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("more, words", [
    (["--noise", 0.1], "leave them out with --policy"), (["--expert-share", 1.5], "0 to 1"),
    (["--horizon", 3], "give --horizon 6"), (["--execute", 7], "--execute 7 does not fit"),
    (["--turn-deg", 15], "was trained with turn_deg")])
def test_mistakes_are_sentences(houses, ckpt, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        record(houses, ckpt, tmp_path, *more)


def test_a_dialog_checkpoint_is_refused(houses, ckpt, tmp_path):
    with open(f"{ckpt}/nav.json") as file:
        contract = json.load(file)
    dialog = {key: DIALOG[key] for key in ("prompt", "horizon", "merge")}
    (tmp_path / "nav.json").write_text(json.dumps(contract | dialog))
    with pytest.raises(UserError, match="is a dialog policy"):
        record(houses, str(tmp_path), tmp_path / "out")


def test_another_policy_does_not_go_on(houses, ckpt, tmp_path):
    record(houses, ckpt, tmp_path, "--limit", 1, "--max-actions", 2)
    with pytest.raises(UserError, match="other settings .see temperature in"):
        record(houses, ckpt, tmp_path, "--limit", 1, "--max-actions", 2, "--temperature", 1)
