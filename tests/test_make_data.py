"""Recording, resuming, checking and reading VLN-Ego; mostly over a simulator made of arithmetic."""
import doctest
import gzip
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from conftest import GLB
from helpers import write_gz
from PIL import Image

import lsm
import make_data
from cli import UserError, write_json
from make_data import VlnEgo, action_chunk
from world import SimDied, SimError
from world.episodes import read_episodes, read_ground_truth
from world.house_sim import HouseSim

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTRACT = {"turn_deg": 30, "forward_m": 0.25, "horizon": 6,
       "memory": {"name": "lsm", "budget": 16, "recent": 8, "short_stride": 1, "long_stride": 4}}
WALKS = [[2, 2, 1, 1, 3, 1, 0], [1, 3, 1, 0], [3] * 6 + [1] * 15 + [0], [1, 1, 0], [2, 1, 2, 1, 0]]

# ---------------------------------------------------------------- a world of arithmetic


def dead_reckon(actions, turn_deg=30):
    """Actions from the origin, facing -z -> poses (T, 7) before each action, locations."""
    x = z = yaw = 0.0
    poses, locations = [], [[0.0, 0.0, 0.0]]
    for a in actions:
        half = math.radians(yaw) / 2
        poses.append([x, 0.0, z, 0.0, math.sin(half), 0.0, math.cos(half)])
        yaw += {2: turn_deg, 3: -turn_deg}.get(a, 0)
        if a == 1:
            x -= 0.25 * math.sin(math.radians(yaw))
            z -= 0.25 * math.cos(math.radians(yaw))
            locations.append([x, 0.0, z])
    return poses, locations


def picture(walk_id_number, t):
    """A frame that knows where it was taken: (8, 8, 3), constant."""
    return np.full((8, 8, 3), (walk_id_number, t, 7), dtype=np.uint8)


class FakePool:
    """SimPool's three methods over dead_reckon. Replies in a random order; dies on request."""
    turn_deg, distance, drift = 30, 0.1, 0.0

    def __init__(self, kind, robot, scenes_dir, sims, commands, timeout_s, *more):
        self.jobs, self.random = {}, random.Random(sims)

    def note_versions(self, folder, scene_id=None):
        write_json(os.path.join(folder, "simulator.json"), {"simulator": "a fake"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, i, request, episode, actions, noise, seed, waypoints, horizon, max_actions):
        assert request == "record" and i not in self.jobs, "one outstanding request per simulator"
        self.jobs[i] = (episode, actions, noise)

    def wait_any(self):
        i = self.random.choice(sorted(self.jobs))
        episode, actions, noise = self.jobs.pop(i)
        number = int(episode["trajectory_id"])
        self.log.append(number)
        if self.deaths.get(number, 0):
            self.deaths[number] -= 1
            return i, SimDied(f"simulator {i} died")
        if number in self.refused:
            return i, SimError("no such navmesh")
        actions = actions or WALKS[number]
        labels = ["".join(map(str, action_chunk(actions, t, 6))) for t in range(len(actions))]
        labels[1] = ""                                          # as if inside a perturbation
        poses = np.asarray(dead_reckon(actions, self.turn_deg)[0])
        poses[:, 0] += self.drift
        frames = np.stack([picture(number, t) for t in range(len(actions))])
        return i, {"frames": frames, "actions": actions, "poses": poses,
                   "labels": labels if noise else None, "distance_to_goal": self.distance}


@pytest.fixture
def pool(monkeypatch):
    """make_data with the fake simulators, reset for each test."""
    fake = type("Fake", (FakePool,), {"deaths": {}, "refused": set(), "log": []})
    monkeypatch.setattr(make_data, "SimPool", fake)
    return fake


@pytest.fixture
def world(tmp_path):
    """Five walks in two scenes, the first with three instructions, the others with one."""
    episodes, truths = [], {}
    for n in [0, 1, 0, 2, 3, 4, 0]:
        scene = f"houses/h{n % 2}/h{n % 2}.glb"
        number = len(episodes) + 1
        episodes.append({
            "episode_id": number, "trajectory_id": n, "scene_id": scene,
            "start_position": [0.0, 0.0, 0.0], "start_rotation": [0.0, 0.0, 0.0, 1.0],
            "goals": [{"position": [0, 0, -1], "radius": 1.0}],
            "reference_path": [[0, 0, 0], [0, 0, -1]], "info": {"geodesic_distance": 1.0},
            "instruction": {"instruction_text": f" Walk {number}\n times. ",
                            "instruction_tokens": [1]}})
        truths[str(number)] = {"actions": WALKS[n], "locations": dead_reckon(WALKS[n])[1],
                               "forward_steps": WALKS[n].count(1)}
        os.makedirs(tmp_path / "scenes" / os.path.dirname(scene), exist_ok=True)
        (tmp_path / "scenes" / scene).write_bytes(GLB)
    write_gz(f"{tmp_path}/train/train.json.gz", {"episodes": episodes, "instruction_vocab": {}})
    write_gz(f"{tmp_path}/train/train_gt.json.gz", truths)
    return tmp_path


def record(world, out, *flags):
    args = make_data.parse_args(["--episodes", str(world), "--out", str(out), "--shard-walks", "2",
                                 *map(str, flags)])
    make_data.main(args)
    return VlnEgo(f"{out}/train")


def tree(folder):
    """All files below a folder -> {relative path: bytes}."""
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as f:
                found[os.path.relpath(os.path.join(root, name), folder)] = f.read()
    return found


# ---------------------------------------------------------------- recording


def test_doctests():
    assert doctest.testmod(make_data).failed == 0


def test_action_chunk():
    assert action_chunk([1, 2, 0], 0, 6) == [1, 2, 0, 0, 0, 0]
    assert action_chunk([1, 2, 3, 1, 2, 3, 1, 0], 0, 6) == [1, 2, 3, 1, 2, 3]
    assert action_chunk([1, 0], 1, 6) == [0] * 6


def test_a_walk_is_stored_once_and_says_what_was_seen(world, pool, capsys):
    data = record(world, world / "out")
    assert sorted(pool.log) == [0, 1, 2, 3, 4], "seven episodes, five walks"
    assert [e["walk_id"] for e in data.episodes] == [
        "h0-0", "h1-1", "h0-0", "h0-2", "h1-3", "h0-4", "h0-0"]
    assert data.episodes[2] == {"episode_id": 3, "walk_id": "h0-0", "split": "train",
                                "instruction": "Walk 3 times."}
    assert list(data.walks) == ["h0-0", "h1-1", "h0-2", "h1-3", "h0-4"], "the episodes' order"
    walk = data.walks["h0-0"]
    assert walk["actions"] == WALKS[0]
    assert len(walk["poses"]) == 7
    assert "labels" not in walk
    meta = data.meta
    assert (meta["episodes"], meta["walks"], meta["frames"]) == (7, 5, sum(map(len, WALKS)))
    assert meta["actions"] == {name: sum(w.count(a) for w in WALKS) for a, name in
                               ((1, "forward"), (2, "left"), (3, "right"), (0, "stop"))}
    assert meta["robot"]["turn_deg"] == 30 and meta["skipped"] == {}
    assert meta["drift_m"] == meta["end_drift_m"] == {"p50": 0, "p90": 0, "p99": 0, "max": 0}
    printed = capsys.readouterr().out
    for words in ("7 episodes over 5 walks, 41 frames", "forward 58.5%", "skipped: 0 of 5",
                  "at most 0.000 m"):
        assert words in printed

    assert data.steps(0) == list(range(7))
    long = next(i for i, e in enumerate(data.episodes) if e["walk_id"] == "h0-2")
    for t in data.steps(long):
        d = data.decision(long, t, CONTRACT)
        assert d.plan == tuple(action_chunk(WALKS[2], t, 6)) and len(d.plan) == 6
        assert [k[1] for k in d.frames] == [*lsm.pick_frames(t, **CONTRACT["memory"]), t]
        assert d.instruction == "Walk 4 times." and d.prompt is None
    for key in d.frames:
        frame = data.frame(key)
        assert frame.dtype == np.uint8 and np.array_equal(frame, picture(2, key[1]))
    with zipfile.ZipFile(f"{world}/out/train/{walk['shard']}") as z:
        assert all(info.compress_type == zipfile.ZIP_STORED and info.date_time[0] == 1980
                   for info in z.infolist())
        assert "h0-0/0006.png" in z.namelist()


def test_files_do_not_depend_on_the_simulators(world, pool):
    record(world, world / "a", "--sims", 1, "--noise", 0.1)
    record(world, world / "b", "--sims", 3, "--noise", 0.1)
    assert tree(world / "a") == tree(world / "b")


def test_noisy_copies_are_labelled_from_the_very_state(world, pool):
    data = record(world, world / "out", "--noise", 0.2)
    assert len(data) == 7 * 2 and len(data.walks) == 5 * 2
    assert [e["walk_id"] for e in data.episodes[:3]] == ["h0-0", "h0-0-n1", "h1-1"]
    assert data.steps(0) == list(range(7))
    assert data.steps(1) == [0, 2, 3, 4, 5, 6], "step 1 was inside a perturbation: no label"
    assert data.decision(1, 2, CONTRACT).plan == (1, 1, 3, 1, 0, 0)
    assert data.decision(1, 2, {**CONTRACT, "horizon": 3}).plan == (1, 1, 3)
    with pytest.raises(UserError, match="--horizon 8"):
        data.decision(1, 2, {**CONTRACT, "horizon": 8})


def test_a_walk_is_begun_again_when_its_simulator_dies(world, pool):
    clean = tree(record(world, world / "a").folder)
    pool.deaths, pool.log = {0: 2, 3: 1}, []
    assert tree(record(world, world / "b").folder) == clean
    assert sorted(pool.log) == [0, 0, 0, 1, 2, 3, 3, 4]


def test_skipped_walks_are_counted_and_more_than_one_percent_is_an_error(world, pool):
    pool.deaths, pool.refused = {0: 99}, {1}
    with pytest.raises(UserError, match="2 of 5 walks were skipped, more than 1%"):
        record(world, world / "out")
    data = VlnEgo(world / "out" / "train")                      # what is good was written
    assert data.meta["skipped"] == {"the simulator died on it": 1, "the simulator refused it": 1}
    assert sorted(data.walks) == ["h0-2", "h0-4", "h1-3"] and len(data) == 3


@pytest.mark.parametrize("what, reason", [
    ({"distance": 1.0}, "ended 1 m or more from the goal"),
    ({"distance": float("inf")}, "the goal cannot be reached"),
    ({"drift": 0.3}, "drifted from the ground truth")])
def test_it_checks_its_labels(world, pool, what, reason):
    for name, value in what.items():
        setattr(pool, name, value)
    with pytest.raises(UserError, match=reason):
        record(world, world / "out")
    assert VlnEgo(world / "out" / "train").meta["skipped"] == {reason: 5}


def test_turn_angle_is_asserted_before_and_after(world, pool):
    with pytest.raises(UserError, match="turns 15 degrees.* turns of 30"):
        record(world, world / "out", "--turn-deg", 15, "--expert", "replay")
    assert pool.log == []
    pool.turn_deg = 15
    with pytest.raises(UserError, match="turned the simulator by 15.0"):
        record(world, world / "out")


def test_resume_after_a_crash_gives_the_same_files(world, pool, monkeypatch):
    whole = tree(record(world, world / "a").folder)
    answer = pool.wait_any

    def crash(self):
        if len(self.log) == 3:
            raise KeyboardInterrupt
        return answer(self)
    pool.log = []
    monkeypatch.setattr(pool, "wait_any", crash)
    with pytest.raises(KeyboardInterrupt):
        record(world, world / "b", "--sims", 1)
    assert os.path.exists(world / "b/train/frames/0000.zip")
    assert not os.path.exists(world / "b/train/meta.json")
    with pytest.raises(UserError, match="not a finished VLN-Ego folder"):
        VlnEgo(world / "b" / "train")
    pool.log = []
    monkeypatch.setattr(pool, "wait_any", answer)
    assert tree(record(world, world / "b").folder) == whole
    assert len(pool.log) == 3, "the first shard's two walks were not walked again"

    with pytest.raises(UserError, match="other settings .see seed in"):
        record(world, world / "b", "--seed", 1)


# ---------------------------------------------------------------- bad input, in a sentence


def test_flags_of_own_walks_need_a_policy(world):
    for flag, value in (("--temperature", "0.5"), ("--expert-share", "0.5"), ("--execute", "1"),
                        ("--label-path", "goal"), ("--device", "cpu")):
        with pytest.raises(UserError, match=f"{flag} is of own walks"):
            make_data.main(make_data.parse_args(["--episodes", str(world), flag, value]))


def test_bad_episode_files(world):
    path = f"{world}/train/train.json.gz"
    with pytest.raises(UserError, match="no episodes of split 'dev'"):
        read_episodes(world, "dev")
    data = gzip.open(path).read()

    def rewritten(change):
        episodes = json.loads(data)
        change(episodes)
        write_gz(path, episodes)
    with open(path, "rb") as f:
        whole = f.read()
    with open(path, "wb") as f:
        f.write(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="train.json.gz is truncated"):
        read_episodes(world, "train")
    with open(path, "wb") as f:
        f.write(b"not gzip")
    with pytest.raises(UserError, match="not gzip"):
        read_episodes(world, "train")
    with gzip.open(path, "wt") as f:
        f.write("{oops")
    with pytest.raises(UserError, match="not JSON"):
        read_episodes(world, "train")
    for field in ("episode_id", "scene_id", "start_position", "start_rotation", "goals"):
        rewritten(lambda d, field=field: d["episodes"][3].pop(field))
        with pytest.raises(UserError, match=f"train.json.gz: episode .* an invalid '{field}'"):
            read_episodes(world, "train")
    rewritten(lambda d: d["episodes"][3]["instruction"].pop("instruction_text"))
    with pytest.raises(UserError, match="'instruction_text'"):
        read_episodes(world, "train")
    path = f"{world}/train/train_gt.json.gz"
    truths = read_ground_truth(world, "train")
    truths["2"]["actions"].pop()
    write_gz(path, truths)
    with pytest.raises(UserError, match='episode "2" has an invalid .actions.'):
        read_ground_truth(world, "train")


def test_missing_scene_and_unwritable_folder(world, pool):
    os.remove(world / "scenes/houses/h1/h1.glb")
    with pytest.raises(UserError, match="1 scenes are missing .* houses/h1/h1.glb.* --scenes"):
        record(world, world / "out")
    (world / "scenes/houses/h1/h1.glb").write_bytes(GLB)
    (world / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        record(world, world / "file")


def test_a_split_without_goals_cannot_be_recorded(world, pool):
    episodes = read_episodes(world, "train")
    for episode in episodes:
        del episode["goals"]
    write_gz(f"{world}/test/test.json.gz", {"episodes": episodes})
    with pytest.raises(UserError, match="episode 1 has no goals"):
        record(world, world / "out", "--split", "test", "--expert", "walk")


def test_exit_status_two(world):
    done = subprocess.run([sys.executable, "make_data.py", "--episodes", str(world),
                           "--split", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("make_data.py: error: no episodes")
    assert "Traceback" not in done.stderr


def test_damaged_recording(world, pool):
    data = record(world, world / "out", "--image-format", "jpg")
    path = f"{data.folder}/{data.walks['h0-0']['shard']}"
    with open(path, "rb") as f:
        whole = f.read()
    with open(path, "wb") as f:
        f.write(whole[:-100])
    with pytest.raises(UserError, match=r"0000.zip, frame 0 of walk h0-0"):
        data.frame(("h0-0", 0))
    with pytest.raises(UserError, match="truncated or not a picture"):
        make_data.decode(pictures_jpg()[:-200], "here")
    os.remove(path)
    with pytest.raises(UserError, match="recorded again"):
        data.frame(("h0-0", 0))
    record(world, world / "out", "--image-format", "jpg")       # as the sentence says
    with open(path, "rb") as f:
        assert f.read() == whole


@pytest.mark.parametrize("change, sentence", [
    (lambda row: row.update(actions=row["actions"][1:] + [0]),
     "line 1: the robot turned( not)? between poses .*: are the actions shifted"),
    (lambda row: row.update(poses=row["poses"][1:] + [[0, 0]]), "'poses' must hold lists of 7")])
def test_a_recording_whose_actions_do_not_fit_its_poses(world, pool, change, sentence):
    """Each frame would be trained with the label of another."""
    data = record(world, world / "out")
    with open(f"{data.folder}/walks.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        change(row)
    with open(f"{data.folder}/walks.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(UserError, match=sentence):
        VlnEgo(data.folder)


def pictures_jpg():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_reader_remembers_recent_frames_only(world, pool, monkeypatch):
    data = record(world, world / "out")
    monkeypatch.setattr(make_data, "CACHE_BYTES", 3 * 56 * 56 * 3)
    data = VlnEgo(data.folder)
    for t in range(20):
        assert np.array_equal(data.frame(("h0-2", t)), picture(2, t))
    assert data.frame(("h0-2", 19)) is data.frame(("h0-2", 19)), "decoded once"
    assert data.frame.cache_info().currsize == 3


# ---------------------------------------------------------------- the real simulator, two houses


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("houses")
    subprocess.run([sys.executable, "-m", "world.houses", "--out", str(folder), "--level", "1",
                    "--train-houses", "2", "--walks-per-house", "12", "--unseen-houses", "1",
                    "--val-episodes", "2", "--jobs", "1"], cwd=ROOT, check=True, timeout=600,
                   capture_output=True)
    return folder


def command(houses, out, *flags):
    return [sys.executable, "make_data.py", "--episodes", str(houses), "--out", str(out),
            "--shard-walks", "2", "--noise", "0.1", *flags]


def begin(houses, out):
    """Start a recording, and wait until one shard is done (of a dozen)."""
    process = subprocess.Popen(command(houses, out), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (os.path.isdir(f"{out}/train/frames")
               and any(f.endswith(".zip") for f in os.listdir(f"{out}/train/frames"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return process


def children(pid):
    """Process ids whose parent is pid, from /proc."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as f:
                if int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                    found.append(int(name))
        except OSError:                                         # it ended meanwhile
            pass
    return found


def test_two_houses_recorded_killed_and_recorded_on(houses, tmp_path):
    done = subprocess.run(command(houses, tmp_path / "a", "--sims", "1"), cwd=ROOT, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "skipped: 0 of" in done.stdout and "at most 0.00" in done.stdout
    whole = tree(tmp_path / "a")

    process = begin(houses, tmp_path / "b")
    process.kill()                                              # SIGKILL: no chance to tidy up
    process.wait()
    assert not os.path.exists(tmp_path / "b/train/meta.json"), "it was killed in mid-run"
    subprocess.run(command(houses, tmp_path / "b"), cwd=ROOT, check=True, timeout=600,
                   stdout=subprocess.DEVNULL)
    assert tree(tmp_path / "b") == whole, "bit for bit, and with two simulators as with one"

    process = begin(houses, tmp_path / "c")
    os.kill(children(process.pid)[0], signal.SIGKILL)           # a simulator; its walk begins again
    assert process.wait(timeout=600) == 0
    assert tree(tmp_path / "c") == whole


def test_frames_and_labels_are_the_simulators(houses, tmp_path):
    """Clean walks: walking the labels shows the frames and ends at the goal. Noisy copies: from
    every recorded pose that has a label, the expert of the simulator walks that label."""
    make_data.main(make_data.parse_args(["--episodes", str(houses), "--out", str(tmp_path),
                                         "--limit", "3", "--sims", "1", "--noise", "0.2"]))
    data = VlnEgo(tmp_path / "train")
    sim = HouseSim(data.meta["robot"], f"{houses}/scenes")
    episodes = {e["episode_id"]: e for e in read_episodes(houses, "train")}
    perturbed = 0
    for i, row in enumerate(data.episodes):
        walk = data.walks[row["walk_id"]]
        sim.reset(episodes[row["episode_id"]])
        perturbed += len(walk["actions"]) - len(data.steps(i))
        for t in data.steps(i):
            d, pose = data.decision(i, t, CONTRACT), walk["poses"][t]
            if "labels" in walk:
                sim.set_pose(pose[:3], pose[3:])
                assert np.array_equal(data.frame(d.frames[-1]), sim.observe())
                for action in d.plan[:d.plan.index(0) + 1 if 0 in d.plan else None]:
                    assert action == sim.expert_action()
                    if action:
                        sim.act(action)
                continue
            assert np.array_equal(data.frame(d.frames[-1]), sim.observe())
            if d.plan[0]:
                sim.act(d.plan[0])
        assert "labels" in walk or sim.state()["distance_to_goal"] < 1.0
    assert perturbed > 0
