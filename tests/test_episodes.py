"""Episode files as they are downloaded: R2R plain and preprocessed, RxR in its two roles and four
languages, test splits that hide their goals; and `make_data.py --verify`, on a real split too.

RxR's files need a download from Google Drive, so the ones here are written by the format that
VLN-CE's loader (habitat_extensions/task.py) reads and its README lays out.
"""
import copy
import gzip
import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import GLB, NAVMESH

import make_data
from cli import UserError
from world.episodes import (
    LANGUAGES,
    dataset_of,
    language_list,
    location_steps,
    paired,
    read_episodes,
    read_ground_truth,
    turn_fit,
    verify,
    walked_turn_deg,
)
from world.house_sim import HouseSim
from world.robots import ROBOTS
from world.worker import record as record_walk

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = os.path.join(ROOT, "..", "shared", "data", "r2r_vlnce_v1-3_preprocessed")
real = pytest.mark.skipif(not os.path.isdir(REAL), reason="no real data beside the repo")


def write_gz(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        json.dump(data, f)                                      # writes NaN, as RxR's files hold it


def walk_at_30(turns):
    """[2, 2, 1, 1, 0] and the like: left turns of 30 degrees, two steps of 0.25 m, stop."""
    yaw = math.radians(30 * turns)
    ahead = [[-0.25 * k * math.sin(yaw), 0.0, -0.25 * k * math.cos(yaw)] for k in range(3)]
    return {"actions": [2] * turns + [1, 1, 0], "locations": ahead, "forward_steps": 2}


def rxr_episode(number, language, hidden=False):
    """One RxR_VLNCE_v0 episode, with every field that VLN-CE's loader knows."""
    episode = {
        "episode_id": str(number), "trajectory_id": str(number // 4),
        "scene_id": f"mp3d/scan{number % 2}/scan{number % 2}.glb",
        "start_position": [0.0, 0.0, 0.0], "start_rotation": [0.0, 0.0, 0.0, 1.0],
        "info": {"geodesic_distance": 0.5},
        "goals": [{"position": walk_at_30(number % 5)["locations"][-1], "radius": 3.0}],
        "reference_path": walk_at_30(number % 5)["locations"][::2],
        "instruction": {
            "instruction_text": f" Episode {number}:\nstop there.",
            "instruction_id": str(900 - number), "language": language, "annotator_id": "7",
            "edit_distance": 0.25,
            "timed_instruction": [{"word": "Stop", "start_time": math.nan, "end_time": 0.5}],
            "instruction_tokens": ["stop", "there"]}}
    if hidden:
        episode.update(goals=None, reference_path=None, info=None)
    return episode


@pytest.fixture
def rxr(tmp_path):
    """data/datasets/RxR_VLNCE_v0 as VLN-CE's README draws it, 12 guide and 4 follower episodes."""
    folder, scenes = tmp_path / "RxR_VLNCE_v0", tmp_path / "scene_datasets"
    guide = [rxr_episode(i, LANGUAGES[i % 4]) for i in range(12)]
    follower = [rxr_episode(i, LANGUAGES[i % 4]) for i in range(100, 104)]
    for role, episodes in (("guide", guide), ("follower", follower)):
        write_gz(f"{folder}/val_seen/val_seen_{role}.json.gz", {"episodes": episodes})
        write_gz(f"{folder}/val_seen/val_seen_{role}_gt.json.gz",
                 {e["episode_id"]: walk_at_30(int(e["episode_id"]) % 5) for e in episodes})
    write_gz(f"{folder}/test_challenge/test_challenge_guide.json.gz",
             {"episodes": [rxr_episode(i, LANGUAGES[i % 4], hidden=True) for i in range(8)]})
    for scan in ("scan0", "scan1"):
        os.makedirs(scenes / "mp3d" / scan)
        for ending, content in (("glb", GLB), ("navmesh", NAVMESH)):
            (scenes / "mp3d" / scan / f"{scan}.{ending}").write_bytes(content)
    return folder, scenes


# ---------------------------------------------------------------- reading


def test_rxr_roles_languages_and_what_is_left_behind(rxr):
    folder, _ = rxr
    guide = read_episodes(folder, "val_seen")
    assert [e["episode_id"] for e in guide] == [str(i) for i in range(12)], "the guide's"
    assert guide == read_episodes(folder, "val_seen", "guide")
    words = guide[1]["instruction"]
    assert words["instruction_text"] == "Episode 1: stop there." and words["language"] == "en-IN"
    assert "timed_instruction" not in words and words["instruction_id"] == "899"
    json.dumps(guide, allow_nan=False)                          # it can travel: no NaN is left
    follower = read_episodes(folder, "val_seen", "follower")
    assert [e["episode_id"] for e in follower] == ["100", "101", "102", "103"]
    assert set(read_ground_truth(folder, "val_seen", "follower")) == {"100", "101", "102", "103"}
    english = read_episodes(folder, "val_seen", languages=language_list("en-US,en-IN"))
    assert [e["episode_id"] for e in english] == ["0", "1", "4", "5", "8", "9"]
    assert {dataset_of(e) for e in guide + follower} == {"rxr"}


def test_a_test_split_has_no_goals(rxr):
    episodes = read_episodes(rxr[0], "test_challenge")
    assert len(episodes) == 8 and all(e["goals"] == [] for e in episodes)
    with pytest.raises(UserError, match="no ground truth of split 'test_challenge'"):
        read_ground_truth(rxr[0], "test_challenge")


def test_wrong_roles_and_languages_are_refused_in_a_sentence(rxr, tmp_path, capsys):
    with pytest.raises(UserError, match="no episodes .*test_challenge_follower.json.gz"):
        read_episodes(rxr[0], "test_challenge", "follower")
    write_gz(f"{tmp_path}/one/one_guide.json.gz", {"episodes": [rxr_episode(1, "te-IN")]})
    with pytest.raises(UserError, match="no instruction in hi-IN .it has te-IN.* --languages"):
        read_episodes(tmp_path, "one", languages=["hi-IN"])
    with pytest.raises(SystemExit):
        make_data.parse_args(["--languages", "english"])
    assert "'english' is not made of en-US, en-IN, hi-IN, te-IN" in capsys.readouterr().err


def test_plain_r2r_has_neither_tokens_nor_ground_truth(tmp_path):
    episode = rxr_episode(3, "en-US")
    episode.update(episode_id=3, trajectory_id=8, scene_id="data/scene_datasets/mp3d/a/a.glb",
                   instruction={"instruction_text": "Go.  "})
    write_gz(f"{tmp_path}/train/train.json.gz", {"episodes": [episode], "instruction_vocab": {}})
    (read,) = read_episodes(tmp_path, "train")
    assert read["scene_id"] == "mp3d/a/a.glb" and dataset_of(read) == "r2r"
    assert read["instruction"] == {"instruction_text": "Go."}
    with pytest.raises(UserError, match="plain R2R_VLNCE_v1-3 has no ground truth, its _prep"):
        read_ground_truth(tmp_path, "train")
    assert read_ground_truth(tmp_path, "train", optional=True) is None
    with pytest.raises(UserError, match="no instruction in en-US"):
        read_episodes(tmp_path, "train", languages=["en-US"])


# ---------------------------------------------------------------- the alignment, and the turns


def test_locations_of_either_kind_give_the_same_turn_angle():
    """A location per forward move (R2R's, below), or a pose before every action."""
    walks = [{"episode": rxr_episode(i, "en-US"), **walk_at_30(i % 5)} for i in range(5)]
    assert turn_fit(walks, 30) == 1.0 and walked_turn_deg(walks, 15) == 30
    for walk in walks:
        steps = location_steps(walk["actions"], 3)
        per_action = [walk["locations"][sum(step <= t for step in steps) - 1]
                      for t in range(len(walk["actions"]))]
        walk["locations"] = per_action
        assert location_steps(walk["actions"], len(per_action)) in (
            list(range(len(per_action))), steps)
    assert turn_fit(walks, 30) == 1.0 and walked_turn_deg(walks, 15) == 30


@real
def test_the_real_locations_are_the_start_and_one_per_forward_move():
    """Index k is the place after the k-th forward move: so say the lengths and the distances."""
    episodes, truths = (f(REAL, "val_seen") for f in (read_episodes, read_ground_truth))
    for walk in paired(episodes, truths):
        actions, places = walk["actions"], walk["locations"]
        assert len(places) == actions.count(1) + 1 == walk["forward_steps"] + 1
        assert math.dist(places[0], walk["episode"]["start_position"]) < 0.01
        assert len(location_steps(actions, len(places))) == len(places)
        assert math.dist(places[-1], walk["episode"]["goals"][0]["position"]) <= 0.5
        assert all(math.hypot(b[0] - a[0], b[2] - a[2]) < 0.29  # 0.25, and sliding
                   for a, b in zip(places, places[1:]))


# ---------------------------------------------------------------- --verify


def verified(*flags):
    return make_data.main(make_data.parse_args(["--verify", *map(str, flags)]))


def test_a_whole_tree_verifies(rxr, capsys):
    folder, scenes = rxr
    flags = ("--episodes", folder, "--scenes", scenes, "--split")
    verified(*flags, "val_seen")
    told = capsys.readouterr().out
    for words in ("robot rxr", "12 episodes, 6 trajectories; how many there should be is not known",
                  "languages: en-IN 3, en-US 3, hi-IN 3, te-IN 3", "ground truth for 12 of 12",
                  "turns of 30 degrees fit 100.0%", "scenes: 2 of 2", "a .navmesh", "all there"):
        assert words in told, told
    verified(*flags, "val_seen", "--role", "follower", "--languages", "te-IN")
    assert "1 episodes, 1 traj" in capsys.readouterr().out
    verified(*flags, "test_challenge")
    assert "only its server scores" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, problem", [
    (lambda e, t: t.pop("3"), "1 episodes have no ground truth, the first is 3"),
    (lambda e, t: e[2]["goals"][0].update(position=[0, math.nan, 0]), "position is not finite"),
    (lambda e, t: t["4"]["locations"].append([0, 0, 0]), "one for the start and one for each"),
    (lambda e, t: e.pop(), "11,005 of 11,006 known episodes: .* --subset"),
])
def test_each_problem_is_named(spoil, problem):
    episodes = [rxr_episode(i, "en-US") for i in range(6)]
    truths = {e["episode_id"]: walk_at_30(int(e["episode_id"]) % 5) for e in episodes}
    key = None
    if "known" in problem:
        episodes, key = [copy.copy(episodes[0]) for _ in range(11006)], ("rxr", "val_unseen",
                                                                        "guide", None)
        for i, episode in enumerate(episodes):
            episode["episode_id"] = str(i)
        truths = {str(i): walk_at_30(0) for i in range(11006)}
    for episode in episodes:
        episode["scene_id"] = "houses/here.glb"
    assert [p for p in verify(episodes, truths, ".", 30, key)[1] if "scenes" not in p] == []
    spoil(episodes, truths)
    (found,) = [p for p in verify(episodes, truths, ".", 30, key)[1] if "scenes" not in p]
    assert re.search(problem, found)
    if key:
        facts, problems = verify(episodes, truths, ".", 30, key, subset=True)
        assert "a subset: 11,005 of 11,006 known episodes" in facts and len(problems) == 1
        _, problems = verify(episodes + episodes[:5], truths, ".", 30, key, subset=True)
        assert "11,010 episodes where 11,006 are known" in problems[0]


def test_a_wrong_robot_and_a_missing_navmesh(rxr, capsys):
    folder, scenes = rxr
    flags = ("--episodes", folder, "--scenes", scenes, "--split", "val_seen")
    with pytest.raises(UserError, match="robot turns 15 degrees, but the ground truth turned 30"):
        verified(*flags, "--robot", "r2r")
    os.remove(scenes / "mp3d/scan1/scan1.navmesh")
    with pytest.raises(UserError, match="1 scenes have no .navmesh beside their .glb, 6 episodes"):
        verified(*flags)
    os.remove(scenes / "mp3d/scan1/scan1.glb")
    with pytest.raises(UserError, match="1 scenes are missing below .*, 6 episodes need them"):
        verified(*flags)
    assert "    mp3d/scan1/scan1.glb: 6 episodes" in capsys.readouterr().out
    os.remove(folder / "val_seen/val_seen_guide_gt.json.gz")
    with pytest.raises(UserError, match="no ground truth of split 'val_seen' found.*; 1 scenes"):
        verified(*flags)


@real
def test_verify_on_the_real_val_seen(tmp_path):
    def command():
        return subprocess.run(
            [sys.executable, "make_data.py", "--verify", "--split", "val_seen", "--episodes", REAL,
             "--scenes", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    done = command()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "53 scenes are missing below" in done.stderr and "778 episodes need them" in done.stderr
    listed = [line.split() for line in done.stdout.splitlines() if line.startswith("    mp3d/")]
    assert len(listed) == 53 and sum(int(words[1]) for words in listed) == 778
    for words in ("778 episodes, 259 trajectories; 778 episodes are known", "robot r2r",
                  "ground truth for 778 of 778", "turns of 15 degrees fit 98.5%",
                  "scenes: 0 of 53"):
        assert words in done.stdout, done.stdout

    for scene, *_ in listed:                                    # a stand-in folder
        path = tmp_path / scene[:-1]
        os.makedirs(path.parent)
        path.write_bytes(GLB)
        path.with_suffix(".navmesh").write_bytes(NAVMESH)
    done = command()
    assert done.returncode == 0, done.stderr
    assert "scenes: 53 of 53" in done.stdout and done.stdout.endswith("all there\n")
    path.unlink()
    done = command()
    assert done.returncode == 2 and "1 scenes are missing" in done.stderr


# ---------------------------------------------------------------- replayed, and walked anew


@pytest.fixture(scope="module")
def houses_at_15(tmp_path_factory):
    """One house whose ground truth was walked by a robot that turns 15 degrees, as R2R's was."""
    folder = tmp_path_factory.mktemp("houses15")
    subprocess.run([sys.executable, "-m", "world.houses", "--out", str(folder),
                    "--train-houses", "1", "--walks-per-house", "6", "--unseen-houses", "1",
                    "--val-episodes", "1", "--jobs", "1"],
                   cwd=ROOT, check=True, capture_output=True)
    sim, truths = HouseSim(dict(ROBOTS["houses"], turn_deg=15), f"{folder}/scenes"), {}
    for episode in read_episodes(folder, "train"):
        walked = record_walk(sim, episode)
        moved = [0] + [t + 1 for t, a in enumerate(walked["actions"]) if a == 1]
        truths[str(episode["episode_id"])] = {
            "actions": walked["actions"], "forward_steps": len(moved) - 1,
            "locations": [walked["poses"][t][:3] for t in moved]}
    write_gz(f"{folder}/train/train_gt.json.gz", truths)
    return folder


def record(folder, out, *flags):
    make_data.main(make_data.parse_args(["--episodes", str(folder), "--out", str(out), "--sims",
                                         "1", *map(str, flags)]))
    return make_data.VlnEgo(f"{out}/train")


def test_a_stated_turn_angle_walks_the_expert_anew(houses_at_15, tmp_path, capsys):
    with pytest.raises(UserError, match="robot turns 30 degrees.* walked with turns of 15"):
        record(houses_at_15, tmp_path / "no")                   # not stated: a wrong --robot?
    replayed = record(houses_at_15, tmp_path / "15", "--turn-deg", 15)
    assert replayed.meta["args"]["expert"] == "replay"
    assert replayed.meta["drift_m"]["max"] == 0 == replayed.meta["end_drift_m"]["max"]
    capsys.readouterr()
    anew = record(houses_at_15, tmp_path / "30", "--turn-deg", 30)
    assert "ground truth turned 15 degrees: the expert walks anew" in capsys.readouterr().out
    assert (anew.meta["args"]["expert"], anew.meta["args"]["waypoints"]) == ("walk", "reference")
    assert anew.meta["robot"]["turn_deg"] == 30 and anew.meta["drift_m"] is None
    references = {e["trajectory_id"]: e["reference_path"]
                  for e in read_episodes(houses_at_15, "train")}
    assert len(anew.walks) == len(replayed.walks) >= 3
    for walk in anew.walks.values():
        yaws = [2 * math.degrees(math.atan2(p[4], p[6])) for p in walk["poses"]]
        turns = {round(abs((b - a + 180) % 360 - 180)) for a, b, action in zip(
            yaws, yaws[1:], walk["actions"]) if action != 1}
        assert turns <= {30} and walk["distance_to_goal"] < 1
        for place in references[walk["trajectory_id"]]:         # it came by every waypoint
            assert min(math.dist(place, pose[:3]) for pose in walk["poses"]) < 0.3
    assert any(walk["actions"] != replayed.walks[i]["actions"] for i, walk in anew.walks.items())


def spoiled(houses, out, change):
    """A copy of the tree whose ground truth of the first episode is changed -> the folder."""
    episodes, truths = read_episodes(houses, "train"), read_ground_truth(houses, "train")
    change(truths[str(episodes[0]["episode_id"])])
    write_gz(f"{out}/train/train.json.gz", {"episodes": episodes})
    write_gz(f"{out}/train/train_gt.json.gz", truths)
    os.symlink(f"{houses}/scenes", f"{out}/scenes")
    return out


def aside(truth):
    truth["locations"][len(truth["locations"]) // 2][0] += 0.4


def cut_short(truth):
    truth["actions"] = truth["actions"][:3] + [0]
    truth["locations"] = truth["locations"][:truth["actions"].count(1) + 1]


def turned_about(truth):
    truth["actions"][:0] = [2] * 12


@pytest.mark.parametrize("change, reason, drift", [
    (aside, "left the ground truth's way", 0.4),
    (cut_short, "ended 1 m or more from the goal", 0.0),
    (turned_about, "ended 1 m or more from the goal", None),
    (lambda truth: truth["locations"].pop(), "the ground truth contradicts itself", None)])
def test_tampered_ground_truth_is_kept_out_by_the_right_reason(houses_at_15, tmp_path, change,
                                                               reason, drift):
    tree = spoiled(houses_at_15, tmp_path / "tree", change)
    with pytest.raises(UserError, match="walks were skipped.*" + reason):
        record(tree, tmp_path / "out", "--turn-deg", 15)
    data = make_data.VlnEgo(tmp_path / "out" / "train")
    assert data.meta["skipped"] == {reason: 1}
    assert all(walk["drift_m"] == walk["end_drift_m"] == 0 for walk in data.walks.values())
    if drift is not None:                                       # those kept out are in the account
        assert data.meta["drift_m"]["max"] == pytest.approx(drift, abs=1e-4)
        assert data.meta["end_drift_m"]["max"] == 0
