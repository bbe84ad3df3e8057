"""What several test files share."""
import gzip
import json
import math
import os
import random
import signal
import socket
import time

import numpy as np
import pytest
import trimesh
from conftest import GLB
from PIL import Image

import evaluate
from cli import write_json
from evaluate import EpisodeState, run_episodes
from reward import FORWARD, LEFT, RIGHT, STOP
from world import SimDied, SimError
from world.pool import SimPool
from world.robots import ROBOTS

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes a minute: SLOW=1 runs it")


def write_gz(path, data):
    """JSON, gzipped, with NaN as RxR's files hold it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        json.dump(data, f)

def free_port():
    """A port that the kernel gives: tests run side by side."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill_when(process, condition):
    """kill -9 of a running script as soon as condition() holds; it must come before the end."""
    deadline = time.monotonic() + 600                          # a guard, not a measurement
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_gone(pid, within_s=10):
    """Has the process ended? (One that its parent has not waited for is a zombie: state Z.)"""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- a house of two rooms

ROBOT = dict(ROBOTS["houses"], width=24, height=18)
LIGHT = (0.75, 0.8, 0.55, 1.0, 0.9, 0.7)  # of the six faces, in the scene's order
UV = ((2, 1), (0, 2), (0, 1))  # texture axes of x-, y- and z-faces


def write_house(path, boxes):
    """boxes: (role, name, lo, hi, rgb). The format of houses.py, written the short way."""
    noise = np.random.default_rng(0).integers(150, 256, (32, 32), dtype=np.uint8)
    picture = Image.fromarray(np.stack([noise] * 3, axis=-1))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture, name="grey")
    scene = trimesh.Scene()
    for number, (role, name, lo, hi, rgb) in enumerate(boxes):
        points, faces, colours, uv = [], [], [], []
        for face in range(6):
            axis, upper = face // 2, face % 2
            b, c = [a for a in range(3) if a != axis]
            corners = np.array([[lo, hi][upper]] * 4, float)
            corners[:, b] = [lo[b], hi[b], hi[b], lo[b]]
            corners[:, c] = [lo[c], lo[c], hi[c], hi[c]]
            normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])[axis]
            order = [0, 1, 2] if (normal > 0) == bool(upper) else [0, 2, 1]
            faces += [[4 * face + k for k in order], [4 * face + k for k in
                      ([0, 2, 3] if order == [0, 1, 2] else [0, 3, 2])]]
            points.append(corners)
            colours += [[int(v * LIGHT[face]) for v in rgb] + [255]] * 4
            uv.append(corners[:, UV[axis]])
        points, uv = np.concatenate(points), np.concatenate(uv)
        points = points[:, [0, 2, 1]] * [1, -1, 1]  # Z-up
        mesh = trimesh.Trimesh(points, faces, process=False)
        mesh.visual = trimesh.visual.TextureVisuals(uv=uv * [1, -1], material=material)  # it flips
        mesh.visual.vertex_attributes["color"] = np.array(colours, np.uint8)
        label = f"{role}|{name}|{number}"
        scene.add_geometry(mesh, node_name=label, geom_name=label)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    scene.export(path)


def two_rooms():
    """8 x 4 m: the blue room (x < 0) and the pink room, a doorway 1 m wide, a sofa and a table."""
    walls = [((-4.1, -4), (-2.1, 2.1)), ((4, 4.1), (-2.1, 2.1)), ((-4.1, 4.1), (-2.1, -2)),
             ((-4.1, 4.1), (2, 2.1)), ((-0.08, 0), (-2, -0.5)), ((-0.08, 0), (0.5, 2)),
             ((0, 0.08), (-2, -0.5)), ((0, 0.08), (0.5, 2))]
    boxes = []
    for room, x0, x1, rgb in (("blue room", -4, 0, (90, 110, 220)), ("pink room", 0, 4, (230, 140,
                                                                                    170))):
        boxes += [("floor", room, (x0, -0.1, -2), (x1, 0, 2), rgb),
                  ("ceiling", room, (x0, 2.5, -2), (x1, 2.6, 2), (240, 240, 240))]
    for (x0, x1), (z0, z1) in walls:
        room = "blue room" if x0 + x1 < 0 else "pink room" if x1 - x0 < 1 else ""
        boxes.append(("wall", room, (x0, 0, z0), (x1, 2.5, z1), (200, 190, 160)))
    boxes += [("wall", "blue room", (-0.08, 2.1, -0.5), (0, 2.5, 0.5), (200, 190, 160)),
              ("wall", "pink room", (0, 2.1, -0.5), (0.08, 2.5, 0.5), (200, 190, 160)),
              ("object", "red sofa", (1.5, 0, -0.6), (2.3, 0.4, 0.9), (220, 30, 30)),
              ("object", "red sofa", (2.1, 0, -0.6), (2.3, 0.9, 0.9), (220, 30, 30)),
              ("object", "green table", (-2.6, 0, 0.6), (-1.6, 0.8, 1.3), (30, 160, 60)),
              ("decor", "", (-3.999, 1.2, -0.5), (-3.95, 1.8, 0.5), (250, 220, 40))]
    return boxes


SCENE_ID = "houses/two/two.glb"
EPISODE = {"episode_id": 7, "scene_id": SCENE_ID, "start_position": [-3, 0, -1],
           "start_rotation": [0, 0, 0, 1], "goals": [{"position": [3.2, 0, 0.2], "radius": 1.0}]}


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
    """SimPool's requests on an endless floor: turns of 30 degrees, steps of 0.25 m, no walls.

    An episode's info may hold "dies": n (its first n replies are deaths), "fails" (its scene gives
    a SimError), "refused" (its start does), "no_way" (its goal does, to the expert), "distance"
    (what state() reports instead of the truth), or "beyond": [metres, what it reports once z is
    further than so many metres from the start].
    """

    def __init__(self, kind, robot, scenes_dir, sims=2, commands=None, timeout_s=120,
                 gpus=None, seed=0):
        self.rng, self.asked, self.episode, self.deaths = random.Random(seed), {}, {}, {}
        self.place = {}

    def note_versions(self, folder, scene_id=None):
        write_json(os.path.join(folder, "simulator.json"), {"simulator": "a fake"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert error[0] or not self.asked, "a request is still under way"

    def submit(self, i, request, **kwargs):
        assert i not in self.asked, "one outstanding request per simulator"
        self.asked[i] = (request, kwargs)

    def wait_any(self, within_s):
        if within_s < math.inf and self.rng.random() < 0.5:
            return None
        i = self.rng.choice(sorted(self.asked))
        request, kwargs = self.asked.pop(i)
        die_in_time()
        return i, getattr(self, request)(i, **kwargs)

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
        rng = random.Random(repr([round(v, 6) for v in self.place[i]]))
        return np.frombuffer(rng.randbytes(16), np.uint8).reshape(4, 4, 1).repeat(3, axis=2)

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


def walk_with(agent, episodes, sims=3, seed=0, **kwargs):
    walks = [EpisodeState(e, e["instruction"]["instruction_text"]) for e in episodes]
    pool = FakePool("house", {}, "", seed=seed)
    ended = {walk.name: walk for walk in run_episodes(pool, walks, agent, sims=sims, **kwargs)}
    assert not pool.asked and list(sorted(ended)) == sorted(str(e["episode_id"]) for e in episodes)
    return ended


# ---------------------------------------------------------------- folders


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


def scored_row(name, scene, trajectory=None, **values):
    metrics = dict.fromkeys([*evaluate.TITLES, "success_3m", "oracle_success_3m", "spl_3m",
                             "sdtw_3m"], 0.0)
    return {"episode_id": name, "trajectory_id": name if trajectory is None else trajectory,
            "scene_id": scene, "end": "stop", "decisions": 0, "malformed": 0, **metrics, **values}
