"""
One simulator as a command: requests on standard input, answers on standard output.

    python -m world.worker                                  # what SimPool starts by default
    ssh gpu-box 'cd vln-r1 && python -m world.worker'       # the same on another machine

A worker first writes the line MAGIC, so that a banner before it is noticed, and a greeting with the
hash of its code. Then both sides send messages: two sizes, a JSON header, and the bytes of arrays.
Nothing is unpickled, and sizes, types and shapes are checked before they are used. A worker handles
one request at a time and ends when its standard input closes, even while it is busy.

Imports  numpy and pillow, in Python 3.9 syntax: the simulator's interpreter loads this file
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import queue
import re
import struct
import sys
import threading
import time
import traceback

try:
    import numpy as np
    from PIL import __version__ as pillow_version
except ImportError as missing:  # --sim-python may name any Python
    sys.exit(f"{sys.executable}: {missing}; a simulator needs numpy and pillow there")

from cli import UserError
from reward import FORWARD, RIGHT, STOP
from world import SimError
from world.episodes import check_scenes
from world.habitat_sim import HabitatSim
from world.house_sim import HouseSim
from world.robots import rotation_of

SIMULATORS = {"house": HouseSim, "habitat": HabitatSim}

# ---------------------------------------------------------------- messages

MAGIC = b"vln-worker 2\n"
SIZES = struct.Struct("<IQ")  # bytes of JSON, bytes of arrays after it
# at most so many bytes of JSON and of arrays; a recorded walk of 500 640x480 frames has 0.5e9
LIMITS = (1 << 24, 1 << 32)


class ProtocolError(Exception):
    """The bytes are no message of this protocol. The connection cannot be used any further."""


def encode(message: dict) -> bytes:
    """A dict whose top-level values may be arrays -> bytes."""
    arrays = {k: np.ascontiguousarray(v) for k, v in message.items() if isinstance(v, np.ndarray)}
    header = {k: v for k, v in message.items() if k not in arrays}
    header["arrays"] = [[k, a.dtype.str, a.shape] for k, a in arrays.items()]
    text = json.dumps(header).encode()
    body = [a.tobytes() for a in arrays.values()]
    return b"".join([SIZES.pack(len(text), sum(map(len, body))), text, *body])


def decode(data) -> tuple[dict | None, int]:
    """The first message in some bytes and its size, or (None, 0) if it is not complete yet.
    ProtocolError as soon as it is clear that no message begins here.

    >>> decode(encode({"request": "step", "frames": np.zeros((1, 2))}))[0]
    {'request': 'step', 'frames': array([[0., 0.]])}
    """
    if len(data) < SIZES.size:
        return None, 0
    head, body = SIZES.unpack_from(data)
    if head > LIMITS[0] or body > LIMITS[1]:
        raise ProtocolError(f"a message of {head} + {body} bytes; at most {LIMITS[0]} + "
                            f"{LIMITS[1]}; it begins with {bytes(data[:60])!r}")
    end = SIZES.size + head + body
    if len(data) < end:
        return None, 0
    try:
        message, at = json.loads(bytes(data[SIZES.size:SIZES.size + head])), SIZES.size + head
        for key, dtype, shape in message.pop("arrays"):
            count = math.prod(shape)
            if not re.fullmatch("[<>|][biuf][1248]", dtype) or key in message or len(shape) > 8 \
                    or not all(type(n) is int and 0 <= n <= LIMITS[1] for n in shape) \
                    or at + count * int(dtype[2]) > end:
                raise ValueError(f"array {key!r} of type {dtype!r} and shape {shape}")
            message[key] = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
            at += message[key].nbytes
        if at != end:
            raise ValueError(f"{end - at} bytes that belong to no array")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        raise ProtocolError(f"not a message of this protocol ({text[:200]!r})") from None
    return message, end


def code_hash() -> str:
    """A hash of the sources that a worker runs. It must be the same on both sides."""
    root, digest = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), hashlib.sha256()
    for name in ("cli.py", "reward.py", "world/__init__.py", "world/episodes.py",
                 "world/habitat_sim.py", "world/house_sim.py", "world/robots.py",
                 "world/worker.py"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- requests


def do_reset(sim, episode: dict, frame: bool = True) -> dict:
    """-> {"frame" (H, W, 3), "state"}"""
    sim.reset(episode)
    return dict({"frame": sim.observe()} if frame else {}, state=sim.state())


def do_step(sim, actions: list[int], frames=True) -> dict:
    """Some motions (no STOP) -> {"frames" (n, H, W, 3): the view after each, "states": [n]};
    frames "last": the view after the last of them only; False: none."""
    states, poses = [], []
    for action in actions:
        sim.act(action)
        states.append(sim.state())
        poses.append(states[-1]["position"] + states[-1]["rotation"])
    poses = poses[-1:] if frames == "last" else poses
    return dict({"frames": sim.render(poses)} if frames else {}, states=states)


def do_load(sim, scene_id: str) -> dict:
    """Load a scene ahead of its walks -> {"cpu_s": CPU seconds of this process so far}"""
    sim.load(scene_id)
    return {"cpu_s": time.process_time()}


def do_try(sim, episode: dict, poses: list, plans: list) -> dict:
    """From each pose, walk each of its plans (motions, no STOP) without rendering -> {"states": for
    each pose and plan the state at its end, with "way", the shortest path from there}"""
    sim.reset(episode)
    goal, ends = min(sim.goals, key=lambda goal: sim.geodesic([goal])), []
    for pose, some in zip(poses, plans):
        ends.append([])
        for plan in some:
            sim.set_pose(pose[:3], pose[3:])
            for action in plan:
                sim.act(action)
            ends[-1].append(dict(sim.state(), way=sim.path(goal)))
    return {"states": ends}


def do_label(sim, episode: dict, poses: list, horizon: int = 6, way=None, start: int = 0) -> dict:
    """What the expert would do at the poses of a walk, in their order -> {"labels": for each pose
    from number `start` on the expert's actions up to STOP, as `horizon` digits, padded with STOP}

    way: points that it heads for one after another; None: the goal that is nearest to the pose. A
    point of the way is behind the robot once the next one is as near to the robot as to the point.
    The robot stands at the last pose afterwards. SimError if a pose has no way.
    """
    sim.reset(episode)
    expert, known, labels, leg = Expert(sim, way or [None]), {}, [], 0

    def decide(pose, leg):
        """The expert's action at a pose, the pose after it, and its leg: computed once, since the
        labels of one walk overlap."""
        key = (leg, *(round(v, 6) for v in pose))
        if key not in known:
            sim.set_pose(pose[:3], pose[3:])
            expert.leg = leg
            expert.pass_points()
            action = expert.action()
            if action != STOP:
                sim.act(action)
            known[key] = action, sim.pose(), expert.leg
        return known[key]

    for t, here in enumerate(poses):
        action, here, leg = decide(here, leg)
        ahead, its_leg = [action], leg
        while t >= start and len(ahead) < horizon and ahead[-1] != STOP:
            action, here, its_leg = decide(here, its_leg)
            ahead.append(action)
        labels.append("".join(map(str, ahead)).ljust(horizon, str(STOP)))
    sim.set_pose(poses[-1][:3], poses[-1][3:])
    return {"labels": labels[start:]}


def do_check(sim, scene_id: str) -> dict:
    """Render at some places and walk from one to another. -> facts for world/check.py"""
    rng, clock = np.random.default_rng(0), [time.perf_counter()]

    def lap():
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    sim.load(scene_id)
    load_s = lap()
    places = [sim.random_point(rng) for _ in range(40)]
    turned = [rotation_of(yaw) for yaw in rng.uniform(-math.pi, math.pi, len(places))]
    sim.set_pose(places[0], turned[0])
    sim.observe()  # the first picture may compile shaders
    first_picture_s = lap()
    views = sim.render([p + q for p, q in zip(places, turned)])
    render_s = lap()
    goal, metres = far_goal(sim, places, turned)
    actions, action = 0, None
    while actions < 500 and action != STOP:
        action = sim.expert_action(goal)
        if action != STOP:
            sim.act(action)
            actions += 1
    walk_s = lap()
    return dict(sim.info(), python=platform.python_version(), numpy=np.__version__, scene=scene_id,
                load_s=round(load_s, 2), first_picture_s=round(first_picture_s, 2),
                frames_per_s=round(len(views) / render_s), size=list(views.shape[1:]),
                mean_grey=round(float(views.mean()), 1), goal_m=round(metres, 2), actions=actions,
                ended_m=round(sim.geodesic([goal]), 2),
                expert_ms=round(1e3 * walk_s / (actions + 1), 2))


def far_goal(sim, places: list, rotations: list) -> tuple[list, float]:
    """Move to the first place from which another is more than 2 m away. -> that one, metres"""
    goal, metres = places[0], 0.0
    for start, rotation in zip(places, rotations):  # the first may be on top of a table
        sim.set_pose(start, rotation)
        goal = max((p for p in places if sim.geodesic([p]) < math.inf), default=start,
                   key=lambda p: sim.geodesic([p]))
        metres = sim.geodesic([goal])
        if metres > 2:
            break
    return goal, metres


def record(sim, episode: dict, actions=None, noise=0.0, seed=0, horizon=6, max_actions=500,
           waypoints=None) -> dict:
    """Walk a whole episode; frame t is the view BEFORE actions[t].

    actions: replayed. None: the expert walks along the waypoints (default: the nearest goal), and
    with probability `noise` per step 1 to 4 random motions replace its own (a perturbation).
    -> {"frames" (T, H, W, 3), "actions" [..., 0], "poses" [[x, y, z, qx, qy, qz, qw] ...],
        "labels": see label_walk(); None without noise, "distance_to_goal": at the end}
    SimError if the expert does not stop within max_actions actions.
    """
    sim.reset(episode)
    if actions is None:
        way = waypoints or [min(sim.goals, key=lambda goal: sim.geodesic([goal]))]
        actions, poses, labels = expert_walk(sim, way, noise, seed, horizon, max_actions)
    else:
        actions, labels = list(actions), None
        actions += [] if actions[-1:] == [STOP] else [STOP]
        poses = [sim.pose()]
        for action in actions[:-1]:
            if action == STOP:
                raise SimError(f"episode {episode.get('episode_id')}: its actions stop midway")
            sim.act(action)
            poses.append(sim.pose())
    end = sim.state()["distance_to_goal"]
    return {"frames": sim.render(poses), "actions": actions, "poses": poses, "labels": labels,
            "distance_to_goal": end}


class Expert:
    """The simulator's expert along some points. leg: the index of the point that it walks to."""

    def __init__(self, sim, way: list):
        self.sim, self.way, self.leg = sim, way, 0

    def action(self) -> int:
        action = self.sim.expert_action(self.way[self.leg])
        while action == STOP and self.leg < len(self.way) - 1:  # on to the next point
            self.leg += 1
            action = self.sim.expert_action(self.way[self.leg])
        return action

    def pass_points(self) -> None:
        """Leave out the points that are behind the robot, though it has not stood on them."""
        while self.leg < len(self.way) - 1 and self.sim.geodesic([self.way[self.leg + 1]]) <= (
                math.dist(self.way[self.leg], self.way[self.leg + 1])):
            self.leg += 1

    def rollout(self, horizon: int) -> list[int]:
        """Its next actions from here, at most `horizon`. The simulator's pose is restored."""
        here, leg, ahead = self.sim.pose(), self.leg, []
        while len(ahead) < horizon and STOP not in ahead:
            ahead.append(self.action())
            if ahead[-1] != STOP:
                self.sim.act(ahead[-1])
        self.sim.set_pose(here[:3], here[3:])
        self.leg = leg
        return ahead


def expert_walk(sim, way, noise, seed, horizon, max_actions):
    """The expert's walk along the points of `way`; see record(). -> actions, poses, labels"""
    rng, expert = np.random.default_rng(seed), Expert(sim, way)
    actions, poses, perturbation = [], [], []
    plans = {}  # first step of a perturbation -> the expert's plan there; None inside of it
    while STOP not in actions[-1:]:
        if len(actions) == max_actions:
            raise SimError(f"the expert did not stop within {max_actions} actions")
        poses.append(sim.pose())
        if perturbation:
            plans[len(actions)] = None
            action = perturbation.pop()
        else:
            action = expert.action()
            if action != STOP and rng.random() < noise:
                plans[len(actions)] = expert.rollout(horizon)
                perturbation = rng.integers(FORWARD, RIGHT + 1, rng.integers(1, 5)).tolist()
                action = perturbation.pop()
        actions.append(int(action))
        if action != STOP:
            sim.act(action)
    return actions, poses, label_walk(actions, plans, horizon) if noise else None


def label_walk(actions: list[int], plans: dict, horizon: int) -> list[str]:
    """For each step the expert's next actions from there, as `horizon` digits; "" inside a
    perturbation, which has no label. plans: see expert_walk().

    The expert is deterministic: up to the next perturbation its actions are those of the walk, and
    there its plan was recorded. So one pass from the end gives all labels.
    >>> label_walk([1, 3, 1, 0], {1: [2, 0]}, 4)
    ['1200', '2000', '1000', '0000']
    """
    labels, after = [], ""
    for t in reversed(range(len(actions))):
        plan = plans.get(t, actions[t:t + 1])
        after = "" if plan is None else ("".join(map(str, plan)) + after * (t not in plans)
                                         )[:horizon].ljust(horizon, str(STOP))
        labels.append(after)
    return labels[::-1]


REQUESTS = {
    "reset": do_reset,
    "step": do_step,
    "try": do_try,
    "load": do_load,
    "label": do_label,
    "record": record,
    "check": do_check,
    "expert": lambda sim, goal=None: {"action": sim.expert_action(goal)},
    "stepping": lambda sim: {"no_sliding": sim.stepping()},
    "topdown": lambda sim: dict(zip(("image", "bounds"), sim.topdown())),
    "check_scenes": lambda sim, episodes: check_scenes(episodes, sim.scenes_dir),
}

# ---------------------------------------------------------------- the process


def write_all(fd: int, data: bytes) -> None:
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(fd, view[at:])


def read_requests(fd: int, requests: queue.Queue) -> None:
    """Put every message into the queue; end the process when the input closes. This runs in its own
    thread, so that a closed input ends the worker even while it is busy."""
    data = bytearray()
    while True:
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            os._exit(0)
        data += chunk
        try:
            message, used = decode(data)
            while used:
                del data[:used]
                requests.put(message)
                message, used = decode(data)
        except ProtocolError as error:
            print(f"simulator: {error}", file=sys.stderr, flush=True)
            os._exit(3)


def answer(sim, request: dict, scenes_dir: str | None) -> tuple:
    """One request -> the simulator (made by "start") and the answer, a dict."""
    name = request.pop("request", None)
    try:
        if name == "start":
            where = scenes_dir or request["scenes"]
            sim = SIMULATORS[request["kind"]](request["robot"], where, request["gpu"])
            return sim, {"simulator": sim.version}
        return sim, REQUESTS[name](sim, **request)
    except (SimError, UserError) as error:
        return sim, {"error": type(error).__name__, "text": str(error)}
    except Exception:
        return sim, {"error": "bug", "text": traceback.format_exc()}


def serve(scenes_dir: str | None = None) -> None:
    """Answer requests until standard input closes."""
    ins, out = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints goes to stderr, not between the answers
    requests, sim = queue.Queue(2), None
    threading.Thread(target=read_requests, args=(ins, requests), daemon=True).start()
    greeting = {"code": code_hash(), "pid": os.getpid(), "python": platform.python_version(),
                "numpy": np.__version__, "pillow": pillow_version, "host": platform.node()}
    try:
        write_all(out, MAGIC + encode(greeting))
        while True:
            sim, reply = answer(sim, requests.get(), scenes_dir)
            write_all(out, encode(reply))
    except OSError:  # the pipe is closed
        os._exit(0)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="One simulator on standard input and output, for "
                                "SimPool: see --sim-command of the scripts that walk.")
    p.add_argument("--scenes", help="folder that scene_id starts from on this machine; default: "
                   "the caller's --scenes")
    return p.parse_args(argv)


if __name__ == "__main__":
    serve(parse_args().scenes)
