"""houses.py: the files are R2R's, the walks are walkable, the words are true, dice are seeded."""
import doctest
import filecmp
import gzip
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import trimesh

import make_data
from cli import UserError
from reward import FORWARD, LEFT, RIGHT, STOP
from world import house_sim as simulator
from world import houses
from world.robots import ROBOTS, rotation_of

R2R = Path(__file__).parents[2] / "shared/data/r2r_vlnce_v1-3_preprocessed/val_seen"
TINY = ["--train-houses", "6", "--walks-per-house", "6", "--unseen-houses", "6",
        "--val-episodes", "24"]


def read(folder, split):
    """-> episodes, ground truths, vocabulary"""
    with gzip.open(Path(folder, split, f"{split}.json.gz")) as file:
        data = json.load(file)
    with gzip.open(Path(folder, split, f"{split}_gt.json.gz")) as file:
        return data["episodes"], json.load(file), data["instruction_vocab"]


def walked(folder, episode, actions):
    """Do these actions. -> metres left, metres walked, poses before each action (T, 7), the sim"""
    sim = simulator.HouseSim(ROBOTS["houses"], os.path.join(folder, "scenes"))
    sim.reset(episode)
    poses = []
    for action in actions:
        poses.append(sim.pose())
        if action == STOP:
            break
        sim.act(action)
    metres = np.hypot(*np.diff(np.array(poses)[:, [0, 2]], axis=0).T).sum()
    return sim.geodesic([goal["position"] for goal in episode["goals"]]), metres, poses, sim


def names_in_sight(sim):
    """Names of the boxes that the picture at the simulator's pose shows."""
    x, y, z = sim.pose()[:3]
    rays = simulator.camera_rays(np.array([sim.yaw]), sim.robot["width"], sim.robot["height"],
                                 sim.robot["hfov_deg"])
    origin = np.array([[x, y + sim.robot["camera_height_m"], z]])
    code, _ = simulator.cast(sim.scene, origin, rays)
    return {sim.scene.names[box] for box in np.unique(code >> 2) if box < len(sim.scene.names)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set of level 1."""
    out = str(tmp_path_factory.mktemp("houses"))
    houses.main(houses.parse_args(["--out", out, "--jobs", "1", *TINY]))
    return out


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """A few walks of level 3."""
    out = str(tmp_path_factory.mktemp("houses3"))
    houses.main(houses.parse_args([
        "--out", out, "--jobs", "1", "--level", "3", "--train-houses", "2", "--walks-per-house",
        "4", "--unseen-houses", "1", "--val-episodes", "2"]))
    return out


def test_doctests():
    assert doctest.testmod(houses).failed == 0


def test_the_same_seed_gives_the_same_bytes_whatever_the_jobs_and_interruptions(made, tmp_path):
    again = str(tmp_path)
    args = houses.parse_args(["--out", again, "--jobs", "2", *TINY])
    houses.main(args)
    names = sorted(str(p.relative_to(made)) for p in Path(made).rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(again)) for p in tmp_path.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(made, again, names, shallow=False)[0] == names

    # one house lost, another half done: only these two are made again, and nothing differs
    untouched = tmp_path / "scenes/houses/h00000/h00000.glb"
    os.utime(untouched, (1, 1))
    (tmp_path / "walks/h00001.json").unlink()
    (tmp_path / "scenes/houses/h00002/h00002.glb").unlink()
    houses.main(args)
    assert filecmp.cmpfiles(made, again, names, shallow=False)[0] == names
    assert untouched.stat().st_mtime == 1


def test_another_seed_or_split_is_another_house(made, tmp_path):
    files = [Path(made, "scenes/houses", n, n + ".glb") for n in ("h00000", "h00001", "u00000")]
    task = houses.plan_work(houses.parse_args(["--out", str(tmp_path), "--seed", "1", *TINY]))[0]
    houses.make_house({**task, "walks": {"train": 1}})
    files.append(tmp_path / "scenes/houses/h00000/h00000.glb")
    assert len({path.read_bytes() for path in files}) == 4


def test_a_kill_between_a_scene_and_its_walks_leaves_no_walks_of_another_scene(tmp_path,
                                                                               monkeypatch):
    def task(seed):
        flags = ["--out", str(tmp_path), "--seed", str(seed), *TINY]
        return {**houses.plan_work(houses.parse_args(flags))[0], "walks": {"train": 1}}

    write = houses.write_file

    def killed(path, content):
        if path.endswith(".json"):
            raise KeyboardInterrupt
        write(path, content)

    scene = tmp_path / "scenes/houses/h00000/h00000.glb"
    walks = houses.make_house(task(1))
    content = scene.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(houses, "write_file", killed)
        houses.make_house(task(2))
    assert scene.read_bytes() != content
    assert houses.make_house(task(1)) == walks and scene.read_bytes() == content


def shape_of(value):
    """The keys of nested dicts and the types at their ends."""
    if isinstance(value, dict):
        return {key: shape_of(v) for key, v in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


@pytest.mark.skipif(not R2R.exists(), reason="needs the real R2R_VLNCE v1-3 files")
def test_the_schema_is_r2rs(made):
    real, real_truths, real_vocab = read(R2R.parent, "val_seen")
    ours, our_truths, our_vocab = read(made, "val_unseen")
    theirs, mine = shape_of(real[0]), shape_of(ours[0])
    assert theirs.pop("info").items() <= mine.pop("info").items()  # extras only there
    assert list(mine) == list(theirs) and mine == theirs
    assert shape_of(next(iter(our_truths.values()))) == shape_of(next(iter(real_truths.values())))
    assert list(our_truths) == [str(episode["episode_id"]) for episode in ours]
    assert list(our_vocab) == list(real_vocab)
    assert our_vocab["word_list"][:2] == real_vocab["word_list"][:2]
    # our tokenizer is theirs: word by word the tokens of real sentences
    words = [houses.words_of(e["instruction"]["instruction_text"]) for e in real[:100]]
    tokens = [[t for t in e["instruction"]["instruction_tokens"] if t] for e in real[:100]]
    same = [[real_vocab["stoi"].get(w, 1) for w in ws] == ts for ws, ts in zip(words, tokens)]
    assert np.mean(same) > 0.8  # real people write "t.v.", "12'" and "bedroom/office"


def test_ids_tokens_and_goals(made):
    for split in houses.SPLITS:
        episodes, _, vocab = read(made, split)
        assert [e["episode_id"] for e in episodes] == list(range(1, len(episodes) + 1))
        assert vocab["num_vocab"] == len(vocab["itos"]) == len(vocab["stoi"]) <= 70
        for episode in episodes:
            tokens = episode["instruction"]["instruction_tokens"]
            assert len(tokens) == 200 and vocab["UNK_INDEX"] not in tokens
            text = " ".join(vocab["itos"][t] for t in tokens if t)
            assert text == episode["instruction"]["instruction_text"].replace(",", "").replace(
                ".", " .")
            assert [goal["radius"] for goal in episode["goals"]] == [1.0]
    scenes = {split: {e["scene_id"] for e in read(made, split)[0]} for split in houses.SPLITS}
    assert scenes["val_seen"] <= scenes["train"]
    assert not scenes["val_unseen"] & scenes["train"]


@pytest.mark.parametrize("level", [1, 3])
def test_the_experts_walk_arrives_and_is_short(made, hard, level):
    folder = made if level == 1 else hard
    near, far = houses.LEVELS[level]["metres"]
    spl = []
    for split in houses.SPLITS:
        episodes, truths, _ = read(folder, split)
        for episode in episodes:
            truth = truths[str(episode["episode_id"])]
            shortest = episode["info"]["geodesic_distance"]
            left, metres, poses, _ = walked(folder, episode, truth["actions"])
            assert left < 0.25 and near <= shortest <= far
            assert truth["actions"].index(STOP) == len(truth["actions"]) - 1
            assert truth["forward_steps"] == truth["actions"].count(FORWARD)
            stood = [poses[0]] + [poses[t + 1] for t, a in enumerate(truth["actions"])
                                  if a == FORWARD]
            assert np.allclose(truth["locations"], np.array(stood)[:, :3], atol=1e-9)
            path = np.array(episode["reference_path"])[:, [0, 2]]
            assert np.hypot(*np.diff(path, axis=0).T).sum() == pytest.approx(shortest, abs=1e-6)
            spl.append(shortest / max(shortest, metres))
    assert np.mean(spl) >= 0.93


def test_without_pictures_or_instructions_no_policy_arrives(made):
    episodes, truths, _ = read(made, "train")
    more, more_truths, _ = read(made, "val_unseen")
    pairs = [(e, truths[str(e["episode_id"])]) for e in episodes]
    pairs += [(e, more_truths[str(e["episode_id"])]) for e in more]
    usual = round(np.mean([truth["forward_steps"] for _, truth in pairs]))
    rng = np.random.default_rng(0)
    fixed = {
        "stop": lambda: [STOP],
        "forward": lambda: [FORWARD] * usual + [STOP],
        "random": lambda: rng.choice(4, 100, p=(0.02, 0.68, 0.15, 0.15)).tolist() + [STOP],
    }
    for name, actions in fixed.items():
        success = np.mean([walked(made, episode, actions())[0] <= 1.0 for episode, _ in pairs])
        assert success <= (0 if name == "stop" else 0.15), name  # 60 walks; over 1000: .04


@pytest.mark.parametrize("level", [1, 3])
def test_the_words_are_true(made, hard, level):
    """Read the sentence with nothing but its text, and hold it against the body and the scene."""
    folder = made if level == 1 else hard
    doors = set()
    for split in houses.SPLITS:
        episodes, truths, _ = read(folder, split)
        for episode in episodes:
            actions = truths[str(episode["episode_id"])]["actions"]
            text = episode["instruction"]["instruction_text"]
            _, _, poses, sim = walked(folder, episode, actions)
            scene = sim.scene
            # 1. the goal: named once, last, one thing in the house, within reach, and before us
            goal = episode["info"]["goal"]
            assert re.search(rf"the {goal}(\.| and stop\.)$", text) and text.count(goal) == 1
            boxes = [i for i, name in enumerate(scene.names) if name == goal]
            lo, hi = scene.lo[boxes].min(axis=0)[[0, 2]], scene.hi[boxes].max(axis=0)[[0, 2]]
            point = np.array(episode["goals"][0]["position"])[[0, 2]]
            assert np.linalg.norm(point - np.clip(point, lo, hi)) == pytest.approx(0.5, abs=1e-3)
            assert (hi - lo < 2.5).all()
            assert goal in names_in_sight(sim)
            # 2. the doors: the rooms that were entered, in order, and no others
            crossed = []
            for x, _, z, *_ in poses:
                (here,) = {name for role, name, low, high in zip(
                    scene.roles, scene.names, scene.lo, scene.hi)
                    if role == "floor" and low[0] <= x < high[0] and low[2] <= z < high[2]}
                crossed += [here] if crossed[-1:] != [here] else []
            names = {n for role, n in zip(scene.roles, scene.names) if role == "floor"}
            told = re.findall("|".join(sorted(names, key=len, reverse=True)), text)
            assert told == crossed[1:] and crossed == episode["info"]["rooms"]
            doors.add(len(told))
            # 3. the first turn, before the first step
            before = actions[:actions.index(FORWARD)]
            turn = 30 * (before.count(LEFT) - before.count(RIGHT))
            opening = re.match(r"turn (slightly |a bit |around to the |back to the )?(\w+)", text)
            if abs(turn) >= 45 or (level > 1 and turn):
                size, side = opening.groups()
                assert side == ("left" if turn > 0 else "right")
                sizes = {None: (60, 120), "slightly ": (30, 30), "a bit ": (30, 30)}
                least, most = sizes.get(size, (150, 180))
                assert level == 1 or least <= abs(turn) <= most
            else:
                assert opening is None
    assert doors == {0, 1} if level == 1 else max(doors) >= 2


def place_of(scene, name):
    """(2,) the middle of a thing's footprint."""
    boxes = [i for i, its in enumerate(scene.names) if its == name]
    return (scene.lo[boxes].min(axis=0) + scene.hi[boxes].max(axis=0))[[0, 2]] / 2


def room_of(scene, point):
    (name,) = {name for role, name, low, high in zip(scene.roles, scene.names, scene.lo, scene.hi)
               if role == "floor" and low[0] <= point[0] < high[0] and low[2] <= point[1] < high[2]}
    return name


def test_level_4_goes_to_another_room_and_back(tmp_path):
    """Held against the scene, for the ground truth and for a noisy expert's recording."""
    folder = str(tmp_path / "houses")
    houses.main(houses.parse_args([
        "--out", folder, "--jobs", "1", "--level", "4", "--train-houses", "2", "--walks-per-house",
        "3", "--unseen-houses", "1", "--val-episodes", "2"]))
    make_data.main(make_data.parse_args([
        "--episodes", folder, "--split", "train", "--noise", "0.3", "--waypoints", "reference",
        "--out", str(tmp_path / "recorded")]))
    recorded = [json.loads(line) for line in open(tmp_path / "recorded/train/walks.jsonl")]
    assert len(recorded) == 12                                       # 6, and with noise
    episodes, truths, _ = read(folder, "train")
    for episode in episodes:
        info, text = episode["info"], episode["instruction"]["instruction_text"]
        visited, goal = info["via"], info["goal"]
        left, _, poses, sim = walked(folder, episode, truths[str(episode["episode_id"])]["actions"])
        walks = [np.array(poses)] + [np.array(row["poses"]) for row in recorded
                                     if row["trajectory_id"] == episode["trajectory_id"]]
        assert left < 0.25 and len(walks) == 3
        start = room_of(sim.scene, np.array(episode["start_position"])[[0, 2]])
        for walk in walks:
            spots = walk[:, [0, 2]]
            near = np.linalg.norm(spots - place_of(sim.scene, visited), axis=1)
            turn = int(near.argmin())
            assert near[turn] < 1.8 and room_of(sim.scene, spots[turn]) != start
            assert room_of(sim.scene, spots[-1]) == start
            assert np.linalg.norm(spots[-1] - place_of(sim.scene, goal)) < 1.8
        kind = goal.split()[1]
        assert re.search(rf"the {visited}\. .* the {kind}\.$", text) and start not in text
        same = {n for n, role in zip(sim.scene.names, sim.scene.roles)
                if n.endswith(f" {kind}") and room_of(sim.scene, place_of(sim.scene, n)) == start}
        assert same == {goal}
        assert info["geodesic_distance"] >= 1.5


def test_things_are_unique_and_at_level_1_so_are_their_colours():
    for level in (1, 2, 3):
        for seed in range(40):
            house = houses.build_house(np.random.default_rng(seed), level)
            names = [thing.name for thing in house.things]
            assert len(set(names)) == len(names) >= 3 * len(house.rooms)
            colours = [name.split()[0] for name in names]
            assert level > 1 or len(set(colours)) == len(colours)
            walls = [room.wall for room in house.rooms]
            assert len(set(walls)) == len(walls) == len(house.doors) + 1
            few, many = houses.LEVELS[level]["rooms"]
            assert few <= len(walls) <= many


def test_colours_stay_apart_in_every_light():
    def shades(colours, darker):
        return {name: np.concatenate([np.outer(houses.LIGHT, rgb) * d for d in darker])
                for name, rgb in colours.items()}

    def gap(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1).min()

    parts = {shade for boxes in houses.FURNITURE.values() for *_, shade in boxes}
    walls, things = shades(houses.WALLS, [1.0]), shades(houses.PAINTS, parts)
    assert min(gap(w, t) for w in walls.values() for t in things.values()) > 45
    assert min(gap(a, b) for n, a in things.items() for m, b in things.items() if n != m) > 25
    assert not set(houses.WALLS) & set(houses.PAINTS)


def test_the_scene_file_gives_the_boxes_back(tmp_path):
    for level in (1, 3):
        house = houses.build_house(np.random.default_rng(5), level)
        path = str(tmp_path / f"{level}.glb")
        houses.write_glb(path, house.boxes)
        assert level > 1 or os.path.getsize(path) < 60_000
        scene = simulator.load_scene(path, 0)
        assert scene.roles == [box.role for box in house.boxes]
        assert scene.names == [box.name for box in house.boxes]
        assert (scene.lo == np.float32([box.lo for box in house.boxes])).all()
        assert (scene.hi == np.float32([box.hi for box in house.boxes])).all()
        # and an independent reader sees closed boxes, facing outwards, with colour and texture
        loaded = trimesh.load(path)
        grey = houses.textures()
        for box, node in zip(house.boxes, sorted(loaded.graph.nodes_geometry,
                                                 key=lambda n: int(n.split("|")[2]))):
            mesh = loaded.geometry[loaded.graph[node][1]]
            assert mesh.volume == pytest.approx(np.prod(np.subtract(box.hi, box.lo)), rel=1e-4)
            lit = np.outer(houses.LIGHT, box.colour).round().repeat(4, axis=0)
            assert (mesh.visual.vertex_attributes["color"][:, :3] == lit).all()
            picture = mesh.visual.material.baseColorTexture
            assert (np.asarray(picture)[..., 0] == grey[box.texture]).all()


def test_the_picture_has_the_colours_that_were_painted(tmp_path):
    """One red box in a white room, straight ahead: its front in the middle, lit from +z."""
    red, white = houses.PAINTS["red"], houses.WALLS["white"]
    houses.write_glb(str(tmp_path / "x.glb"), [
        houses.Box("floor", "white room", [-3, -0.1, -3], [3, 0, 3], houses.FLOORS[0], "tiles"),
        houses.Box("wall", "white room", [-6, 0, -3.1], [6, 2.5, -3], white, "wallpaper"),
        houses.Box("object", "red table", [-0.5, 0, -2], [0.5, 2, -1], red, "cloth")])
    sim = simulator.HouseSim(ROBOTS["houses"], str(tmp_path))
    sim.reset({"scene_id": "x.glb", "start_position": [0, 0, 1], "start_rotation": [0, 0, 0, 1]})
    frame = sim.observe().astype(int)
    cloth = houses.textures()["cloth"].astype(int)
    expect = np.round(np.array(red) * houses.LIGHT[5])
    low, high = expect * cloth.min() // 255 - 1, expect * cloth.max() // 255 + 1
    assert (low <= frame[28, 28]).all() and (frame[28, 28] <= high).all()
    wall = frame[28, 2] / np.array(white)
    assert np.ptp(wall) < 0.02 and 0.75 < wall.mean() < 0.91


def test_no_picture_is_one_blank_colour(made):
    episodes, truths, _ = read(made, "train")
    spread = []
    for episode in episodes:
        *_, poses, sim = walked(made, episode, truths[str(episode["episode_id"])]["actions"])
        frames = sim.render(poses).reshape(len(poses), -1, 3)
        spread += np.ptp(frames.astype(int), axis=1).max(axis=1).tolist()
    assert min(spread) >= 10  # grey levels between the darkest and the brightest pixel


def test_one_way_to_walk_in_and_no_nook_to_get_stuck(tmp_path):
    """Every room can be reached from every other, and every thing has a place in front of it."""
    for seed in range(10):
        house = houses.build_house(np.random.default_rng(seed), 2)
        houses.write_glb(str(tmp_path / f"{seed}.glb"), house.boxes)
        sim = simulator.HouseSim(ROBOTS["houses"], str(tmp_path))
        door = house.doors[0]
        start = [door.at, 0, door.centre] if door.axis == 0 else [door.centre, 0, door.at]
        sim.reset({"scene_id": f"{seed}.glb", "start_position": start,
                   "start_rotation": rotation_of(0)})
        for thing in house.things:
            fronts = houses.in_front_of(sim, house, thing)
            assert len(fronts) and math.isfinite(max(sim.geodesic([[x, 0, z]]) for x, z in fronts))


def test_mistakes_are_told_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*choose another folder"):
        houses.main(houses.parse_args(["--out", str(tmp_path / "file/below"), "--jobs", "1"]))
    with pytest.raises(SystemExit):
        houses.parse_args(["--out", str(tmp_path), "--train-houses", "0"])
    assert "--train-houses: '0' is not a whole number above 0" in capsys.readouterr().err
