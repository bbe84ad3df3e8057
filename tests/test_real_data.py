"""The real thing: R2R-VLN-CE's val_seen, and one walk of the released VLN-Ego with its pictures.

The data is not part of the repository. Where ../shared/data is absent these tests are skipped.
"""
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

import lsm
import make_data
from cli import UserError
from make_data import Expert, VlnEgo, action_chunk
from reward import FORWARD, LEFT, RIGHT, STOP
from tools.sharegpt import ShareGpt
from world.episodes import check_turn_deg, heading_fit, read_episodes, read_ground_truth

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "..", "shared", "data")
R2R = f"{DATA}/r2r_vlnce_v1-3_preprocessed"
EGO = f"{DATA}/vln_ego_sample"
WALK = f"{EGO}/rgb_images_r2r_debug/ep_2849/traj_1871"
pytestmark = pytest.mark.skipif(not os.path.isdir(DATA), reason="no real data beside the repo")

CONTRACT = {"turn_deg": 15, "forward_m": 0.25, "horizon": 6,
       "memory": {"name": "even", "budget": 16, "recent": 8, "short_stride": 1, "long_stride": 4}}


@pytest.fixture(scope="module")
def val_seen():
    return read_episodes(R2R, "val_seen"), read_ground_truth(R2R, "val_seen")


@pytest.fixture(scope="module")
def actions():
    with open(f"{WALK}/action_list.json") as f:
        return json.load(f)


# ---------------------------------------------------------------- R2R val_seen, all of it


def test_every_episode_and_ground_truth_loads(val_seen):
    episodes, truths = val_seen
    assert len(episodes) == len(truths) == 778
    assert all(isinstance(e["episode_id"], int) and str(e["episode_id"]) in truths
               for e in episodes)
    assert len({e["scene_id"] for e in episodes}) == 53
    texts = [e["instruction"]["instruction_text"] for e in episodes]
    assert all(text == " ".join(text.split()) for text in texts)


def test_chunks_are_the_next_six_actions_padded_with_stop(val_seen):
    _, truths = val_seen
    windows = Counter()
    for truth in truths.values():
        actions = truth["actions"]
        for t in range(len(actions)):
            label = action_chunk(actions, t, 6)
            assert label == (actions + [STOP] * 6)[t:t + 6]
            windows[tuple(label)] += 1
    # counted once, by a script of four lines that shares nothing with make_data.py
    assert windows.total() == 46158 and len(windows) == 300
    assert sum(n for w, n in windows.items() if STOP in w) == 4668 == 778 * 6
    assert windows[(STOP,) * 6] == 778 and windows[(FORWARD,) * 6] == 6824
    first = Counter()
    for w, n in windows.items():
        first[w[0]] += n
    assert first == {FORWARD: 30156, LEFT: 7829, RIGHT: 7395, STOP: 778}


def test_three_instructions_share_a_walk(val_seen):
    episodes, truths = val_seen
    args = make_data.parse_args(["--robot", "r2r", "--split", "val_seen"])
    expert = Expert("replay", "goal", new_angle=False)
    walks, rows = make_data.plan_walks(episodes, truths, expert, args)
    assert (len(walks), len(rows)) == (259, 778)
    assert len({w["walk_id"] for w in walks}) == 259
    assert len(make_data.make_shards(walks, 64)) == 5


def test_the_ground_truth_turns_15_degrees(val_seen):
    episodes, truths = val_seen
    walks = [{"episode": e, **truths[str(e["episode_id"])]} for e in episodes]

    def share(deg):
        fits = [heading_fit(w["episode"]["start_rotation"], w["actions"], w["locations"], deg)
                for w in walks]
        return sum(f for f, _ in fits) / sum(n for _, n in fits)
    assert share(15) > 0.98 and share(30) < 0.10
    check_turn_deg(walks, 15)
    with pytest.raises(UserError, match="turns 30 degrees.* --turn-deg 15 or the --robot"):
        check_turn_deg(walks, 30)


# ---------------------------------------------------------------- what the pictures say

# The camera of the walk: 640x480, focal length 320 pixels (HFOV 90), here at a quarter of the size.
H, W, FOCAL = 120, 160, 80.0
ROWS, COLS = np.mgrid[:H, :W].astype(float)
RAY_X, RAY_Y = (COLS - (W - 1) / 2) / FOCAL, (ROWS - (H - 1) / 2) / FOCAL


def unexplained(before, after, turn_deg):
    """Share of the picture's variance (0 .. 1 and above) that a pure turn does not explain.

    Turn the camera by turn_deg (left positive) about the vertical axis: a pixel's ray (x, y, 1) of
    the new view is (x cos - sin, y, x sin + cos) in the old one. Predict the new picture from the
    old where the two overlap, and take 1 - correlation, which ignores exposure.
    """
    c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    depth = RAY_X * s + c
    cols = (RAY_X * c - s) / depth * FOCAL + (W - 1) / 2
    rows = RAY_Y / depth * FOCAL + (H - 1) / 2
    seen = (cols >= 0) & (cols <= W - 1) & (rows >= 0) & (rows <= H - 1)
    predicted = map_coordinates(before, [rows, cols], order=1, mode="nearest")
    return 1 - np.corrcoef(predicted[seen], after[seen])[0, 1]


def motion(before, after, turn_deg=15):
    """Which action lies between two pictures? A turn explains its picture to within 5%, or it was
    none: then it was a step, whose picture depends on depth and is not predicted here."""
    left, right = (unexplained(before, after, d) for d in (turn_deg, -turn_deg))
    return FORWARD if min(left, right) > 0.05 else LEFT if left < right else RIGHT


@pytest.fixture(scope="module")
def moved():
    """What the robot did between frames t and t+1, read off the pictures alone: 64 actions."""
    grey = []
    for t in range(65):
        with Image.open(f"{WALK}/step_{t}.jpg") as image:
            assert image.size == (640, 480)
            grey.append(np.asarray(image.convert("L").resize((W, H), Image.Resampling.BOX), float))
    return grey, [motion(a, b) for a, b in zip(grey, grey[1:])]


def test_frame_t_is_the_view_before_action_t(moved, actions):
    """So the label at t starts with actions[t]; one that starts with actions[t+1] is late."""
    _, moved = moved
    assert len(actions) == 65 and actions[-1] == STOP
    ours = sum(m == action_chunk(actions, t, 6)[0] for t, m in enumerate(moved))
    late = sum(m == action_chunk(actions, t + 1, 6)[0] for t, m in enumerate(moved))
    assert ours == 64
    assert late == 36, "what chance gives, with long runs of one action"


def test_the_robot_turned_15_degrees_not_30(moved, actions):
    grey, _ = moved
    for t in np.flatnonzero(np.isin(actions, (LEFT, RIGHT))):
        sign = 1 if actions[t] == LEFT else -1
        by = {deg: unexplained(grey[t], grey[t + 1], sign * deg) for deg in (10, 15, 20, 30)}
        assert min(by, key=by.get) == 15 and by[15] < 0.02 < by[30]


def test_released_labels_are_a_step_late(moved, actions):
    _, moved = moved
    released = ShareGpt(f"{EGO}/r2r_16_images_4act_debug.json", f"{EGO}/rgb_images_r2r_debug")
    assert len(released) == 65 and released.meta["robot"] == {"turn_deg": 30.0, "forward_m": 0.25}
    contract = {"turn_deg": 30, "forward_m": 0.25, "horizon": 4}     # the words say 30
    plans = [list(released.decision(i, 0, contract).plan) for i in range(65)]
    assert all(plan == action_chunk(actions, t + 1, 4) for t, plan in enumerate(plans))
    assert sum(plan == action_chunk(actions, t, 4) for t, plan in enumerate(plans)) == 13
    assert sum(m == plan[0] for m, plan in zip(moved, plans)) == 36


# ---------------------------------------------------------------- reading the released files


def test_released_json_is_read_as_it_is():
    released = ShareGpt(f"{EGO}/r2r_16_images_4act_debug.json", f"{EGO}/rgb_images_r2r_debug")
    assert released.dropped == 3, "VLN-Ego/data/r2r_training_rgb"
    contract = {"turn_deg": 30, "forward_m": 0.25, "horizon": 4}
    for t in range(65):
        d = released.decision(t, 0, contract)
        steps = [int(key.rsplit("_", 1)[1][:-4]) for key in d.frames]
        assert steps == [*lsm.pick_frames(t, "even"), t], "its history is our 'even'"
        assert d.prompt.count("<image>") == len(d.frames) and "doorway.'." in d.prompt
    with open(f"{WALK}/step_64.jpg", "rb") as f:
        assert np.array_equal(released.frame(d.frames[-1]), make_data.decode(f.read(), ""))
    assert not released.decision(0, 0, {**contract, "turn_deg": 15}).plan, "its words are not 15's"
    with pytest.raises(UserError, match="step_0.jpg .* --image-root"):
        ShareGpt(f"{EGO}/r2r_16_images_4act_debug.json")


def test_imported_walk_keeps_the_pictures_and_gets_the_right_labels(tmp_path, actions, capsys):
    flags = ["--robot", "r2r", "--split", "train", "--out", str(tmp_path)]
    make_data.main(make_data.parse_args([*flags, "--import-walk", EGO]))
    assert "1 episodes over 1 walks, 65 frames" in capsys.readouterr().out
    data = VlnEgo(tmp_path / "train")
    assert data.episodes == [{
        "episode_id": "ep_2849", "walk_id": "ep_2849-traj_1871", "split": "train", "instruction":
        "Leave the room, go right and continue to the hallway. Take a left at the end of the "
        "hallway, enter the room and stop in the doorway."}]
    robot = data.meta["robot"]
    assert (robot["turn_deg"], robot["width"], robot["height"]) == (15, 640, 480)
    assert data.steps(0) == list(range(65))
    for t in range(65):
        d = data.decision(0, t, CONTRACT)
        assert d.plan == tuple(action_chunk(actions, t, 6))
        with open(f"{WALK}/step_{t}.jpg", "rb") as f:
            assert data.frame_bytes(d.frames[-1]) == f.read()
    assert data.frame(d.frames[0]).shape == (480, 640, 3)


def test_a_damaged_released_walk_is_named(tmp_path, actions):
    folder = tmp_path / "ep_7" / "traj_8"
    os.makedirs(folder)
    for name in ("action_list.json", "instruction.txt", *(f"step_{t}.jpg" for t in range(65))):
        with open(f"{WALK}/{name}", "rb") as f:
            (folder / name).write_bytes(f.read())
    (folder / "step_5.jpg").write_bytes((folder / "step_5.jpg").read_bytes()[:20000])
    flags = ["--robot", "r2r", "--import-walk", str(tmp_path), "--out"]
    with pytest.raises(UserError, match="ep_7-traj_8: damaged: .*step_5.jpg is truncated"):
        make_data.main(make_data.parse_args([*flags, str(tmp_path / "a")]))
    os.remove(folder / "step_5.jpg")
    with pytest.raises(UserError, match="No such file.*step_5.jpg"):
        make_data.main(make_data.parse_args([*flags, str(tmp_path / "b")]))
    with pytest.raises(UserError, match="say which with --robot"):
        make_data.main(make_data.parse_args(["--import-walk", EGO, "--out", "x"]))
    with pytest.raises(UserError, match="no action_list.json"):
        make_data.main(make_data.parse_args(["--robot", "rxr", "--import-walk",
                                             str(tmp_path / "a" / "train"), "--out", "x"]))
