"""Episode files as they are downloaded: R2R plain and preprocessed, RxR in its two roles and four
languages, test splits that hide their goals; and tools/verify.py, on a real split too.

RxR's files need a download from Google Drive, so the ones here are written by the format that
VLN-CE's loader (habitat_extensions/task.py) reads and its README lays out.
"""
import copy
import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import GLB, NAVMESH
from helpers import write_gz

import evaluate
import make_data
from cli import UserError
from tools import submit, verify
from world.episodes import (
    LANGUAGES,
    check_scenes,
    dataset_of,
    language_list,
    location_steps,
    paired,
    read_episodes,
    read_ground_truth,
    scene_hash,
    scenes_of,
    turn_fit,
    walked_turn_deg,
)
from world.house_sim import HouseSim
from world.robots import ROBOTS
from world.worker import record as record_walk

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = os.path.join(ROOT, "..", "shared", "data", "r2r_vlnce_v1-3_preprocessed")
real = pytest.mark.skipif(not os.path.isdir(REAL), reason="no real data beside the repo")


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
    return verify.main(verify.parse_args(list(map(str, flags))))


def test_a_whole_tree_verifies(rxr, capsys):
    folder, scenes = rxr
    flags = ("--episodes", folder, "--scenes", scenes, "--split")
    verified(*flags, "val_seen")
    printed = capsys.readouterr().out
    for words in ("robot rxr", "12 episodes, 6 trajectories; how many there should be is not known",
                  "languages: en-IN 3, en-US 3, hi-IN 3, te-IN 3", "ground truth for 12 of 12",
                  "turns of 30 degrees fit 100.0%", "scenes: 2 of 2", "a .navmesh", "all there"):
        assert words in printed, printed
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
    def problems():
        report = verify.verify(episodes, truths, ".", 30, key)
        return [problem for problem in report.problems if "scenes" not in problem]
    assert problems() == []
    spoil(episodes, truths)
    (found,) = problems()
    assert re.search(problem, found)
    if key:
        report = verify.verify(episodes, truths, ".", 30, key, subset=True)
        assert "a subset: 11,005 of 11,006 known episodes" in report.facts
        assert len(report.problems) == 1
        report = verify.verify(episodes + episodes[:5], truths, ".", 30, key, subset=True)
        assert "11,010 episodes where 11,006 are known" in report.problems[0]


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


# ---------------------------------------------------------------- replayed, and walked again


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
    assert "ground truth turned 15 degrees: the expert walks" in capsys.readouterr().out
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
    (aside, "drifted from the ground truth", 0.4),
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


# ---------------------------------------------------------------- every field, when it is read


def write_json(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(data, f)


def good_contents(n=2):
    """Two files of n episodes, each of its own walk -> (episodes, ground truth)"""
    episodes = [{**rxr_episode(i, "en-US"), "trajectory_id": f"t{i}"} for i in range(n)]
    return {"episodes": episodes}, {str(i): walk_at_30(i % 5) for i in range(n)}


def write_tree(folder, split="val_seen", n=2, change=lambda episodes, truths: None, pack=False):
    """n good episodes with ground truth and scenes (plain or gzipped), changed -> their flags."""
    episodes, truths = good_contents(n)
    for scan in ("scan0", "scan1"):
        os.makedirs(f"{folder}/scenes/mp3d/{scan}", exist_ok=True)
        for ending, content in (("glb", GLB), ("navmesh", NAVMESH)):
            with open(f"{folder}/scenes/mp3d/{scan}/{scan}.{ending}", "wb") as f:
                f.write(content)
    change(episodes, truths)
    for name, content in (("guide", episodes), ("guide_gt", truths)):
        path = f"{folder}/{split}/{split}_{name}.json"
        write_gz(path + ".gz", content) if pack else write_json(path, content)
    return ["--episodes", str(folder), "--split", split]


def everything(flags):
    """What all scripts do with the input before a simulator is needed."""
    for more in (["--agent", "oracle"], ["--agent", "forward", "--shuffled-instruction"]):
        evaluation = evaluate.prepare(evaluate.parse_args(flags + more))
    submit.check_instruction_ids(evaluation.episodes, evaluation.settings["source"])
    verified(*flags)
    for more in ([], ["--noise", "0.1"], ["--expert", "walk", "--waypoints", "reference"]):
        args = make_data.parse_args(flags + more)
        episodes = read_episodes(args.episodes, args.split)
        truths, expert = make_data.read_expert(args, episodes, ROBOTS["rxr"], "rxr")
        make_data.plan_walks(episodes, truths, expert, args)


def places(value, path=()):
    """The path to every value in nested JSON; of a list the first item stands for all."""
    yield path
    items = value.items() if isinstance(value, dict) else \
        list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


VALUES = {"null": None, "a number": -3.5, "a count": 2, "a string": "x", "no string": "",
          "a list": [], "a list of null": [None], "a list of strings": ["x", "y", "z"],
          "an object": {}, "NaN": math.nan, "infinity": math.inf, "true": True,
          "a huge number": 10 ** 400, "half a surrogate pair": "\ud800"}
UNUSED = {"info", "timed_instruction", "instruction_tokens", "annotator_id", "edit_distance",
          "forward_steps"}
TAKEN = {"trajectory_id": ("null", "a count", "a string"), "instruction_text": ("a string",),
         "language": ("null", "a string", "no string"), "radius": ("null", "a count"),
         "instruction_id": ("a count",), "position": ("a number", "a count", "NaN", "infinity")}
NUMBER = ("a number", "a count")                            # of any other coordinate


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("which", ["episodes", "ground truth"])
def test_any_value_in_any_field_is_good_or_refused_in_a_sentence(tmp_path, which, name):
    taken, value = set(), VALUES[name]
    good = good_contents()[which != "episodes"]
    assert len(list(places(good))) > 8
    everything(write_tree(tmp_path, pack=True))             # as it is, it is good

    def put(path):
        def change(*files):
            at = files[which != "episodes"]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
        return change

    for path in list(places(good))[1:]:
        try:
            everything(write_tree(tmp_path, change=put(path), pack=True))
        except UserError as error:
            assert "episode" in str(error) or path[-1] == "radius", (path, error)
        else:
            taken.add(path)
    for path in taken:                                      # and all that was taken is of use
        last = path[-2] if type(path[-1]) is int and path[-2] in TAKEN else path[-1]
        assert UNUSED & set(path) or name in TAKEN.get(last, NUMBER if type(last) is int else ()), (
            path, "was taken")


def field(name, value):
    return lambda e, t: e["episodes"][1].update({name: value})


def words(text):
    return lambda e, t: e["episodes"][1]["instruction"].update(instruction_text=text)


def truth(**changes):
    return lambda e, t: t["1"].update(changes)


@pytest.mark.parametrize("change, sentence", [
    (field("instruction", "Go."), "episode 1 .*'instruction' .*an object with"),
    (words(["Go."]), "episode 1 .*'instruction_text' .*a string"),
    (words(" \n"), "episode 1 .*it has no words"),
    (words("\u200b ..."), "episode 1 .*it has no words"),
    (words("go on " * 1001), "episode 1 .*2,002 words, 6,006 letters"),
    (words("x" * 20001), "episode 1 .*1 words, 20,001 letters"),
    (words("see <image> there"), "episode 1 .*it holds <image>"),
    (words("say <|im_end|>"), r"episode 1 .*it holds <\|"),
    (lambda e, t: e["episodes"].__setitem__(1, None), r"episodes\[1\].*is no episode .null."),
    (field("start_position", [None, 0, 0]), "episode 1 .*'start_position' .*finite"),
    (field("start_position", [math.nan, 0, 0]), "episode 1 .*'start_position' .*finite"),
    (field("start_rotation", [0, 0, 0, 0]), "episode 1 .*'start_rotation' .*unit length"),
    (field("start_rotation", [0, 0, 0, 0.9]), "episode 1 .*'start_rotation' .*unit length"),
    (field("start_rotation", [1, 0, 0, 0]), "episode 1 .*'start_rotation' .*upright"),
    (field("episode_id", 0), "val_seen_guide.json has 1 episode ids that are not unique, .* 0"),
    (field("episode_id", "../1"), r"episodes\[1\].*'episode_id' .*without slashes"),
    (field("scene_id", "/mp3d/a.glb"), "episode 1 .*'scene_id' .*not absolute"),
    (field("scene_id", "C:\\mp3d\\a.glb"), "episode 1 .*'scene_id' .*not absolute"),
    (field("scene_id", "mp3d/../../a.glb"), "episode 1 .*'scene_id' .*without '..'"),
    (field("goals", [{"position": [0, 0, 0], "radius": 0}]), "episode 1 .*'goals'.*above 0"),
    (field("goals", [{"position": [0, 0, v]} for v in (0, math.nan)]), "'goals'.*or none"),
    (truth(locations=[[0, math.nan, 0]]), "_gt.json: episode \"1\" .*'locations'.* finite"),
    (truth(actions=[1, 1.0, 0]), "_gt.json: episode \"1\" .*'actions'"),
    (truth(actions=[1, True, 0]), "_gt.json: episode \"1\" .*'actions'"),
    (lambda e, t: t.update({"1": None}), "_gt.json: episode \"1\" is no ground truth .null."),
    (lambda e, t: t.update({"0": None, "1": None}), "2 episodes are at fault"),
    (lambda e, t: e.update(scenes=["a"]), "'scenes' .*must be {scene_id: hash}"),
    (lambda e, t: e.update(scenes={}), "'scenes' lacks mp3d/scan0/scan0.glb of episode 0"),
])
def test_each_script_refuses_before_it_walks(tmp_path, change, sentence):
    """File, episode, field and mend, from evaluate.py, make_data.py and tools/verify.py alike."""
    flags = write_tree(tmp_path, change=change)
    for start in (lambda: evaluate.prepare(evaluate.parse_args(["--agent", "stop", *flags])),
                  lambda: verified(*flags),
                  lambda: make_data.main(make_data.parse_args([*flags, "--out", f"{tmp_path}/o"]))):
        with pytest.raises(UserError, match=sentence):
            start()
    assert not os.path.exists(tmp_path / "o")


def test_a_good_tree_passes_and_odd_but_clear_forms_are_read(tmp_path, capsys):
    everything(write_tree(tmp_path / "good"))

    def change(e, t):
        e["episodes"][0].update(scene_id="data\\scene_datasets\\mp3d\\scan0\\scan0.glb",
                                reference_path=None, trajectory_id=None, info=None)
        e["episodes"][1].update(scene_id="./mp3d//scan1/scan1.glb")
        e["episodes"][1]["goals"][0]["position"] = [math.nan] * 3
    flags = write_tree(tmp_path / "odd", change=change)
    zero, one = read_episodes(tmp_path / "odd", "val_seen")
    assert (zero["scene_id"], one["scene_id"]) == ("mp3d/scan0/scan0.glb", "mp3d/scan1/scan1.glb")
    assert zero["trajectory_id"] == "0" and dataset_of(zero) == "rxr"
    evaluate.prepare(evaluate.parse_args(["--agent", "stop", *flags]))      # it can be scored round
    with pytest.raises(UserError, match="1 episodes have a goal whose position is not finite"):
        verified(*flags)                                                    # and is named
    with pytest.raises(UserError, match="episode 0 has no 'reference_path'.*--waypoints goal"):
        verified(*flags[:2], "--split", "val_seen", "--expert", "walk", "--limit", "1")


def test_two_walks_of_one_name_are_refused(tmp_path):
    """Ids are made of parts: <scene>-<trajectory>, and .1 for a second way."""
    def change(e, t):
        for i, trajectory in enumerate(("7", "7", "7.1")):
            e["episodes"][i].update(trajectory_id=trajectory, scene_id="mp3d/scan0/scan0.glb")
    flags = write_tree(tmp_path, n=3, change=change)
    with pytest.raises(UserError, match="two walks would both be called scan0-7.1"):
        verified(*flags)


# ---------------------------------------------------------------- which file, and how it is packed


@pytest.mark.parametrize("name, pack", [
    ("val_seen/val_seen{}.json.gz", gzip.compress), ("val_seen/val_seen{}.json", bytes),
    ("val_seen{}.json", bytes), ("val_seen/val_seen_guide{}.json", bytes),
    ("val_seen{}.json.gz", bytes),                          # named so, and not packed
    ("val_seen{}.json", lambda data: b"\xef\xbb\xbf" + data),
    ("val_seen{}.json.gz", lambda data: gzip.compress(b"\xef\xbb\xbf" + data)),
    ("my_own{}.json", bytes)])
def test_files_are_read_gzipped_or_not_in_a_folder_or_by_name(tmp_path, name, pack):
    contents = {"": {"episodes": [rxr_episode(1, "en-US")]}, "_gt": {"1": walk_at_30(1)}}
    for part, content in contents.items():
        path = tmp_path / name.format(part)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pack(json.dumps(content).encode()))
    file = str(tmp_path / name.format(""))
    for where in [file] + [str(tmp_path)] * ("my_own" not in name):
        assert [e["episode_id"] for e in read_episodes(where, "val_seen")] == ["1"]
        assert read_ground_truth(where, "val_seen") == contents["_gt"]
    os.makedirs(tmp_path / "scenes")
    assert os.path.samefile(scenes_of(file), tmp_path / "scenes")


def test_the_wrong_file_is_refused_by_name(tmp_path):
    write_tree(tmp_path)
    folder = tmp_path / "val_seen"
    guide, truths = folder / "val_seen_guide.json", folder / "val_seen_guide_gt.json"
    for path, split, role, sentence in (
            (guide, "train", None, "give --split val_seen"),
            (guide, "val_seen", "follower", "give --role guide"),
            (truths, "val_seen", None, "names the ground truth .* name the episodes")):
        with pytest.raises(UserError, match=sentence):
            read_episodes(path, split, role)
    truths.rename(tmp_path / "aside.json")
    assert read_ground_truth(guide, "val_seen", optional=True) is None
    with pytest.raises(UserError, match="looked for val_seen_guide_gt.json.gz beside .*guide.json"):
        read_ground_truth(guide, "val_seen")                # never the episodes as their own truth
    twin = folder / "val_seen_guide.json.gz"
    twin.write_bytes(gzip.compress(guide.read_bytes()))
    with pytest.raises(UserError, match="guide.json.gz and .*guide.json could both be meant"):
        read_episodes(tmp_path, "val_seen")
    assert len(read_episodes(twin, "val_seen")) == 2


@pytest.mark.parametrize("content, sentence", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS .*git lfs pull"),
    (b"[" * 100000, "nested too deep|not JSON"), (b"", "not JSON"),
    (b"\xff\xfe{\x00}\x00", "not JSON"),
    (b'[{"episode_id": 1}]', "no list 'episodes'"), (b'{"episodes": {}}', "no list 'episodes'"),
    (b'{"episodes": [{"episode_id": 1, "episode_id": 2}]}', "'episode_id' is there twice")])
def test_a_file_that_is_no_episodes(tmp_path, content, sentence):
    (tmp_path / "val_seen.json").write_bytes(content)
    with pytest.raises(UserError, match="val_seen.json.*(" + sentence + ")"):
        read_episodes(tmp_path, "val_seen")


def test_equal_keys_of_the_ground_truth_are_refused(tmp_path):
    write_tree(tmp_path)
    path = tmp_path / "val_seen" / "val_seen_guide_gt.json"
    text = json.dumps(walk_at_30(1))
    path.write_text(f'{{"0": {text}, "0": {text}, "1": {text}}}')
    with pytest.raises(UserError, match="_gt.json .*the key '0' is there twice"):
        read_ground_truth(tmp_path, "val_seen")


# ---------------------------------------------------------------- scenes on the disk


@pytest.mark.parametrize("ending, content, fault", [
    ("glb", b"", "is empty"), ("navmesh", b"", "is empty"),
    ("glb", b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
    ("navmesh", b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
    ("glb", b"<html>not found</html>", "is not glTF"), ("glb", b"glTF", "is not glTF"),
    ("glb", GLB[:8] + b"\x99\x01\x00\x00", "is truncated .12 of 409 bytes"),
    ("navmesh", b"<html>", "is not a navmesh")])
def test_a_file_that_is_no_scene_is_named(tmp_path, ending, content, fault):
    flags = write_tree(tmp_path)
    (tmp_path / f"scenes/mp3d/scan1/scan1.{ending}").write_bytes(content)
    sentence = f"scan1.{ending}.* {fault}"
    with pytest.raises(UserError, match="1 files below .*" + sentence):
        verified(*flags)
    with pytest.raises(UserError, match=sentence + ".*--scenes"):
        evaluate.prepare(evaluate.parse_args(["--agent", "stop", *flags]))
    with pytest.raises(UserError, match=sentence + ".*--scenes"):
        make_data.main(make_data.parse_args([*flags, "--out", f"{tmp_path}/o"]))


def test_a_navmesh_of_either_byte_order_and_one_hash_of_all_scenes(tmp_path):
    flags = write_tree(tmp_path)
    episodes, scenes = read_episodes(tmp_path, "val_seen"), tmp_path / "scenes"
    whole = check_scenes(episodes, scenes)
    assert whole["count"] == 2 and whole == check_scenes(episodes[::-1], scenes)
    assert whole["sha256"] != check_scenes(episodes[:1], scenes)["sha256"]
    (scenes / "mp3d/scan0/scan0.navmesh").write_bytes(b"MSET")
    verified(*flags)
    changed = check_scenes(episodes, scenes)
    assert changed["sha256"] != whole["sha256"], "distances are the navmesh's"
    (scenes / "mp3d/scan0/scan0.navmesh").unlink()
    (scenes / "mp3d/scan0/scan0.glb").write_bytes(GLB + b"1")
    assert check_scenes(episodes, scenes)["sha256"] not in (changed["sha256"], whole["sha256"])


def test_the_hash_of_a_large_scene_reads_its_size_and_its_ends(tmp_path):
    path, hashes = tmp_path / "x.glb", set()
    for size, at in ((9 << 20, None), ((9 << 20) + 1, None), (9 << 20, 5), (9 << 20, -5)):
        data = bytearray(size)
        if at:
            data[at] = 1
        path.write_bytes(data)
        hashes.add(scene_hash(path))
    assert len(hashes) == 4
    path.write_bytes(b"glTF")
    assert scene_hash(path) == hashlib.sha256(b"glTF").hexdigest()[:16]


# ---------------------------------------------------------------- --verify: what is not whole


def test_what_can_be_measured_on_plain_episodes(tmp_path, capsys):
    """Goals without ground truth are no test split."""
    flags = write_tree(tmp_path)
    os.remove(tmp_path / "val_seen/val_seen_guide_gt.json")
    with pytest.raises(UserError, match="no ground truth of split 'val_seen'.*--expert walk"):
        verified(*flags)
    printed = capsys.readouterr().out
    assert "goals are there: SR, NE, SPL can be measured, nDTW cannot" in printed
    assert "test split" not in printed
    with pytest.raises(UserError, match="no ground truth of split 'val_seen'.*--expert walk"):
        make_data.main(make_data.parse_args([*flags, "--out", f"{tmp_path}/o"]))
    verified(*flags, "--expert", "walk")
    printed = capsys.readouterr().out
    assert "nDTW cannot" in printed and printed.endswith("all there\n")


def test_a_subset_of_a_known_split_is_meant_or_not(tmp_path, capsys):
    flags = write_tree(tmp_path, "val_unseen")
    with pytest.raises(UserError, match="2 of 11,006 known episodes: .*--subset"):
        verified(*flags)
    verified(*flags, "--subset")
    assert "a subset: 2 of 11,006 known episodes" in capsys.readouterr().out
    verified(*flags, "--limit", "1")
    with pytest.raises(UserError, match="2 of 11,006 known episodes"):
        make_data.main(make_data.parse_args([*flags, "--verify"]))
