"""world/house_sim.py and the expert walks of world/worker.py: pictures, distances and motion, each
against something simpler than itself."""
import math
import os

import numpy as np
import pytest
import trimesh
from helpers import EPISODE, LIGHT, ROBOT, SCENE_ID, two_rooms
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from reward import FORWARD, LEFT, RIGHT, STOP
from world import SimError, house_sim
from world.robots import rotation_of, yaw_of
from world.worker import record


def random_pose(house, rng):
    return house.random_point(rng) + rotation_of(rng.uniform(-math.pi, math.pi))


# ---------------------------------------------------------------- poses and motion


def test_the_identity_looks_along_minus_z_and_left_is_positive_yaw(house):
    house.set_pose([-3, 0, 0], [0, 0, 0, 1])
    house.act(FORWARD)
    assert np.allclose(house.state()["position"], [-3, 0, -0.25])
    for _ in range(3):
        house.act(LEFT)
    assert np.allclose(house.state()["rotation"], [0, math.sqrt(0.5), 0, math.sqrt(0.5)])
    house.act(FORWARD)
    assert np.allclose(house.state()["position"], [-3.25, 0, -0.25])
    house.act(RIGHT)
    assert math.degrees(yaw_of(house.state()["rotation"])) == pytest.approx(60)
    with pytest.raises(ValueError, match="not a motion"):
        house.act(STOP)


def test_sliding_keeps_what_goes_along_the_wall(house):
    beside = [-4 + 0.18 + 0.05, 0, 0]  # 5 cm of room before the west wall
    house.set_pose(beside, rotation_of(math.radians(60)))
    assert house.act(FORWARD)
    x, _, z = house.state()["position"]
    assert (x, z) == pytest.approx((-3.82, -0.25 * math.cos(math.radians(60))), abs=1e-3)

    house.robot = dict(ROBOT, sliding=False)
    house.set_pose(beside, rotation_of(math.radians(60)))
    assert house.act(FORWARD) and house.state()["collided"]
    x, _, z = house.state()["position"]
    assert (x, z) == pytest.approx((-3.82, -0.05 / math.tan(math.radians(60))), abs=1e-3)


@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("stride", [0.25, 3.0])
def test_a_body_never_enters_an_obstacle_nor_tunnels(house, sliding, stride):
    rng = np.random.default_rng(0)
    house.robot = dict(ROBOT, sliding=sliding, forward_m=stride)
    solid = [i for i, r in enumerate(house.scene.roles) if r in ("wall", "object")
             and house.scene.lo[i, 1] < 1.5]
    lo, hi = house.scene.lo[solid][:, [0, 2]] - 0.18, house.scene.hi[solid][:, [0, 2]] + 0.18
    house.set_pose([-3, 0, 0], [0, 0, 0, 1])
    bumps = 0
    for _ in range(1500):
        for action in [LEFT] * rng.integers(0, 12):
            house.act(action)
        before = house.spot
        bumps += house.act(FORWARD)
        assert not ((house.spot > lo + 1e-6) & (house.spot < hi - 1e-6)).all(axis=1).any()
        assert np.isfinite(house.geodesic([[-3, 0, 0]])), "it got out of the house"
        if not sliding:  # a straight way: no point of it is inside anything
            between = before + np.linspace(0, 1, 50)[:, None] * (house.spot - before)
            assert not ((between[:, None] > lo + 1e-6) & (between[:, None] < hi - 1e-6)
                        ).all(axis=2).any()
    assert bumps > 50


# ---------------------------------------------------------------- distances and the expert


def grid_distances(house, goal, cell=0.05):
    """Dijkstra on a grid with 16 neighbours: an upper bound, some 4% long at worst."""
    xs, zs = np.arange(-3.8, 3.81, cell), np.arange(-1.8, 1.81, cell)
    points = np.stack(np.meshgrid(xs, zs, indexing="ij"), axis=-1)
    free = house.free(points)
    index = np.arange(free.size).reshape(free.shape)
    rows, columns, metres = [], [], []
    for i, j in ((1, 0), (0, 1), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1)):
        a = (slice(0, len(xs) - i), slice(max(0, -j), len(zs) - max(0, j)))
        b = (slice(i, len(xs)), slice(max(0, j), len(zs) + min(0, j)))
        ok = free[a] & free[b]
        for part in (0.25, 0.5, 0.75):  # nothing in between either
            ok &= house.free(points[a] + part * (points[b] - points[a]))
        rows.append(index[a][ok]), columns.append(index[b][ok])
        metres.append(np.full(ok.sum(), cell * math.hypot(i, j)))
    graph = coo_matrix((np.concatenate(metres), (np.concatenate(rows), np.concatenate(columns))),
                       shape=(free.size, free.size)).tocsr()
    at = int(abs(points - goal).sum(axis=-1).argmin())
    return points[free], dijkstra(graph, directed=False, indices=at)[free.ravel()], points.reshape(
        -1, 2)[at]


def test_geodesics_are_those_of_a_fine_grid_and_paths_are_as_long_as_they_say(house):
    points, metres, goal = grid_distances(house, (3.2, 0.2))
    rng = np.random.default_rng(1)
    goal = [goal[0], 0, goal[1]]
    for k in rng.choice(len(points), 150, replace=False):
        house.spot = points[k]
        exact = house.geodesic([goal])
        assert exact >= math.dist(points[k], (goal[0], goal[2])) - 1e-9
        assert exact <= metres[k] + 0.01 and metres[k] <= 1.042 * exact + 0.05
        path = np.array(house.path(goal))
        assert np.allclose(path[0], house.state()["position"]) and np.allclose(path[-1], goal)
        assert np.linalg.norm(np.diff(path, axis=0), axis=1).sum() == pytest.approx(exact)
        for a, b in zip(path, path[1:]):
            assert house.free((a + np.linspace(0, 1, 40)[:, None] * (b - a))[:, [0, 2]]).all()


def test_geodesics_are_symmetric_and_the_nearest_goal_counts(house):
    rng = np.random.default_rng(2)
    for _ in range(30):
        a, b = house.random_point(rng), house.random_point(rng)
        house.set_pose(a, [0, 0, 0, 1])
        there, nearest = house.geodesic([b]), house.geodesic([b, [-3, 0, -1]])
        assert nearest == min(there, house.geodesic([[-3, 0, -1]]))
        house.set_pose(b, [0, 0, 0, 1])
        assert house.geodesic([a]) == pytest.approx(there)


def test_a_goal_without_a_way_is_infinitely_far_and_said_so(scenes):
    house = house_sim.HouseSim(ROBOT, scenes)
    for place in ([30, 0, 0], [-2.1, 0, 0.95]):  # outside of the house; in the middle of the table
        house.reset(dict(EPISODE, goals=[{"position": place}]))
        assert house.state()["distance_to_goal"] == math.inf and house.path(place) == []
        with pytest.raises(SimError, match="no way to the goal"):
            house.expert_action()
    with pytest.raises(SimError, match="two.glb.*inside an obstacle"):
        house.reset(dict(EPISODE, start_position=[-2.1, 0, 0.95]))
    for wrong in ({"start_position": [-3, 1, 0]}, {"goals": [{"position": [3.2, -0.6, 0]}]}):
        with pytest.raises(SimError, match="is not on the floor, where y is 0"):
            house.reset({**EPISODE, **wrong})
    house.reset({key: EPISODE[key] for key in EPISODE if key != "goals"})
    assert house.state()["distance_to_goal"] is None


@pytest.mark.parametrize("turn_deg, sliding", [(30, True), (30, False), (15, True), (15, False)])
def test_the_expert_arrives_by_a_short_way_and_never_dithers(scenes, turn_deg, sliding):
    house = house_sim.HouseSim(dict(ROBOT, turn_deg=turn_deg, sliding=sliding), scenes)
    house.load(SCENE_ID)
    rng = np.random.default_rng(3)
    spl = []
    while len(spl) < 25:
        start, goal = random_pose(house, rng), house.random_point(rng)
        house.reset(dict(EPISODE, start_position=start[:3], start_rotation=start[3:],
                         goals=[{"position": goal}]))
        metres, walked, actions = house.geodesic([goal]), 0.0, ""
        if metres < 1:
            continue
        while not actions.endswith("0"):
            assert len(actions) < 150
            before, action = house.spot, house.expert_action()
            actions += str(action)
            if action != STOP:
                house.act(action)
                walked += math.dist(before, house.spot)
        assert house.geodesic([goal]) < 0.25
        assert "23" not in actions and "32" not in actions
        spl.append(metres / max(walked, metres))
    assert np.mean(spl) >= 0.93


def test_a_half_turn_goes_left_or_right_by_the_start_and_always_the_same_way(scenes):
    """A goal straight behind is as near by six turns to the left as by six to the right."""
    house, sides = house_sim.HouseSim(ROBOT, scenes), []
    for k in range(40):
        x = round(-3.5 + 0.05 * k, 2)
        episode = {"scene_id": SCENE_ID, "start_position": [x, 0, 0],
                   "start_rotation": rotation_of(math.pi / 2), "goals": [{"position": [3.2, 0, 0]}]}
        episode["goals"][0]["position"] = [min(x + 1.2, -0.4), 0, 0]
        walks = []
        for _ in range(2):
            house.reset(episode)
            walks.append([])
            while len(walks[-1]) < 30 and STOP not in walks[-1]:
                walks[-1].append(house.expert_action())
                if walks[-1][-1] != STOP:
                    house.act(walks[-1][-1])
        assert walks[0] == walks[1]
        turns = [action for action in walks[0] if action in (LEFT, RIGHT)]
        assert len(turns) == 6 and len(set(turns)) == 1        # half a turn, and no dithering
        sides.append(turns[0])
    assert 10 < sides.count(LEFT) < 30


# ---------------------------------------------------------------- pictures


def slow_picture(scene, eye, yaw, width, height, hfov_deg):
    """One ray after another, one box after another, in the words of a textbook."""
    picture = np.zeros((height, width, 3))
    scale = math.tan(math.radians(hfov_deg) / 2)
    for row in range(height):
        for column in range(width):
            right = ((column + 0.5) / width * 2 - 1) * scale
            up = (1 - (row + 0.5) / height * 2) * scale * height / width
            ray = np.array([-math.sin(yaw) + right * math.cos(yaw), up,
                            -math.cos(yaw) - right * math.sin(yaw)])
            nearest = math.inf
            for box, (lo, hi) in enumerate(zip(scene.lo, scene.hi)):
                a, b = (lo - eye) / ray, (hi - eye) / ray
                enter, leave = np.minimum(a, b), np.maximum(a, b)
                if 0 < enter.max() < min(leave.min(), nearest):
                    nearest, axis = enter.max(), int(enter.argmax())
                    face = 8 * box + 2 * axis + int(ray[axis] < 0)
                    point = eye + nearest * ray
                    u, v = point[[2, 0, 0][axis]], point[[1, 2, 1][axis]]
                    texture = scene.textures[scene.face_texture[face]]
                    grey = texture[int(v % 1 * len(texture)), int(u % 1 * len(texture))]
                    picture[row, column] = scene.shade[
                        face * 256 + int(grey):][:1].view(np.uint8)[:3]
    return picture


@pytest.mark.parametrize("hfov_deg", [90, 79])
def test_the_picture_is_that_of_one_ray_per_pixel(house, hfov_deg):
    house.robot = dict(ROBOT, hfov_deg=hfov_deg)
    rng = np.random.default_rng(4)
    poses = [random_pose(house, rng) for _ in range(4)] + [[-3.013, 0, 0.027, 0, 0, 0, 1]]
    views = house.render(poses)
    assert views.shape == (5, 18, 24, 3) and views.dtype == np.uint8
    for pose, view in zip(poses, views):
        slow = slow_picture(house.scene, np.array(pose[:3]) + [0, 1.25, 0], yaw_of(pose[3:]),
                            24, 18, hfov_deg)
        assert (view != slow).any(axis=-1).mean() < 0.006  # a ray on an edge may fall off it
        house.set_pose(pose[:3], pose[3:])
        assert (house.observe() == view).all()


def test_colours_are_vertex_colour_times_texture(house):
    """Facing the south wall squarely: its light is 0.9 (+z face of the north... by hand)."""
    house.set_pose([-1, 0, 0], [0, 1, 0, 0])  # yaw 180: looks along +z, at the -z face of that wall
    middle = house.observe()[8:10, 11:13].reshape(-1, 3).astype(float)
    wall = np.array([int(v * LIGHT[4]) for v in (200, 190, 160)])
    grey = middle[:, :1] / wall[0] * 255
    assert (abs(middle - wall * grey / 255) <= 1.0).all() and (grey >= 149).all()


def test_the_plan_shows_walls_doors_and_furniture_where_they_are(house):
    image, (x0, z0, x1, z1) = house.topdown()
    assert image.shape == (round((z1 - z0) / 0.02), round((x1 - x0) / 0.02), 3)

    def at(x, z):
        return image[int((z - z0) / 0.02), int((x - x0) / 0.02)].tolist()

    assert at(-4.05, 0) == at(0.04, 1) == [70, 70, 70]
    assert at(0.04, 0) != [70, 70, 70] and at(2, 0)[0] > 2 * at(2, 0)[1]


# ---------------------------------------------------------------- the reader


def test_the_reader_gives_back_the_boxes(house):
    for k, (role, name, lo, hi, rgb) in enumerate(two_rooms()):
        assert (house.scene.roles[k], house.scene.names[k]) == (role, name)
        assert np.allclose([house.scene.lo[k], house.scene.hi[k]], [lo, hi], atol=1e-6)
        for face in range(6):
            white = house.scene.shade[(8 * k + face) * 256 + 255:][:1].view(np.uint8)[:3]
            assert white.tolist() == [int(v * LIGHT[face]) for v in rgb]


def test_a_damaged_scene_is_refused_in_a_sentence(scenes, tmp_path):
    data = open(os.path.join(scenes, SCENE_ID), "rb").read()
    house = house_sim.HouseSim(ROBOT, str(tmp_path))
    triangle = trimesh.Scene(trimesh.creation.icosphere(1))
    for name, content, sentence in (
            ("missing", None, "no such scene"), ("half", data[:len(data) // 2], "truncated"),
            ("head", data[:10], "truncated"), ("text", b"hello, I am a scene", "not a .glb"),
            ("json", data[:20] + b"}" + data[21:], "JSON part is damaged"),
            ("ball", triangle.export(file_type="glb"), "not a house of houses.py")):
        if content is not None:
            (tmp_path / f"{name}.glb").write_bytes(content)
        with pytest.raises(SimError, match=f"{name}.glb.*{sentence}"):
            house.reset(dict(EPISODE, scene_id=f"{name}.glb"))


# ---------------------------------------------------------------- recording


def test_a_recorded_walk_is_what_was_seen_and_done(house):
    walk = record(house, EPISODE)
    assert walk["actions"][-1] == STOP and STOP not in walk["actions"][:-1]
    assert len(walk["frames"]) == len(walk["poses"]) == len(walk["actions"])
    assert walk["labels"] is None and walk["distance_to_goal"] < 0.25
    house.reset(EPISODE)
    for frame, action in zip(walk["frames"], walk["actions"]):
        assert (house.observe() == frame).all()  # the view BEFORE the action
        if action != STOP:
            house.act(action)
    again = record(house, EPISODE, actions=walk["actions"])
    assert (again["frames"] == walk["frames"]).all() and again["poses"] == walk["poses"]
    with pytest.raises(SimError, match="stop midway"):
        record(house, EPISODE, actions=[1, 0, 1, 0])
    with pytest.raises(SimError, match="did not stop within 5"):
        record(house, EPISODE, max_actions=5)


def test_the_walk_goes_by_the_waypoints(house):
    way = [[-3, 0, 1.5], [3.2, 0, 0.2]]
    poses = np.array(record(house, EPISODE, waypoints=way)["poses"])[:, :3]
    assert np.linalg.norm(poses - way[0], axis=1).min() < 0.25
    assert np.linalg.norm(poses[-1] - way[1]) < 0.25


def test_labels_of_a_perturbed_walk_are_what_the_expert_would_do_there(house):
    walk = record(house, EPISODE, noise=0.15, seed=5)
    assert walk == walk | record(house, EPISODE, noise=0.15, seed=5) | {
        "frames": walk["frames"]}
    assert 3 < walk["labels"].count("") < len(walk["labels"]) / 2
    for pose, label in zip(walk["poses"], walk["labels"]):
        house.set_pose(pose[:3], pose[3:])
        plan = ""
        while label and len(plan) < 6:
            action = STOP if plan.endswith("0") else house.expert_action()
            plan += str(action)
            if action != STOP:
                house.act(action)
        assert plan == label
