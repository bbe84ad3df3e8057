"""
Robots: body, camera and motion of each data set, the flags that change them, and poses.

The agent is a camera on a stick. It stands on the floor, looks ahead, and can step forward, turn
left and turn right. Conventions are Habitat's: metres; y is up; a rotation is a quaternion x,y,z,w;
the identity looks along -z; yaw is counter-clockwise seen from above, so a left turn adds to it.

Run it   python -m doctest world/robots.py
"""
from __future__ import annotations

import argparse
import math
import os
import re
import shlex

import numpy as np

from cli import UserError, non_negative, positive_int, whole_number

# ---------------------------------------------------------------- robots

# One row per data set. The sources of R2R's and RxR's values:
#   r2r  VLN-CE habitat_extensions/config/vlnce_task.yaml: TURN_ANGLE 15, FORWARD_STEP_SIZE 0.25,
#        HFOV 90, ALLOW_SLIDING True. It names no body: habitat-lab 0.1.7 habitat/config/default.py
#        holds: AGENT_0 HEIGHT 1.5, RADIUS 0.1, camera POSITION [0, 1.25, 0]. 640x480 is that file's
#        frame and the released VLN-R1 walk's; VLN-CE's own agents saw 224x224.
#   rxr  VLN-CE habitat_extensions/config/rxr_vlnce_english_task.yaml: TURN_ANGLE 30, HFOV 79,
#        camera POSITION [0, 0.88, 0], HEIGHT 0.88, RADIUS 0.18, ALLOW_SLIDING False, 640x480; the
#        step of 0.25 is again default.py's, and the challenge's rule (VLN-CE's README).
#   houses  ours: R2R's camera, RxR's turns and radius, small pictures.
ROBOTS = {
    "houses": dict(turn_deg=30, forward_m=0.25, hfov_deg=90, camera_height_m=1.25, radius_m=0.18,
                   height_m=1.5, sliding=True, width=56, height=56),
    "r2r": dict(turn_deg=15, forward_m=0.25, hfov_deg=90, camera_height_m=1.25, radius_m=0.1,
                height_m=1.5, sliding=True, width=640, height=480),
    "rxr": dict(turn_deg=30, forward_m=0.25, hfov_deg=79, camera_height_m=0.88, radius_m=0.18,
                height_m=0.88, sliding=False, width=640, height=480),
}
ROBOT_HELP = {
    "turn_deg": "of one turn", "forward_m": "of one step", "hfov_deg": "across the picture",
    "camera_height_m": "above the floor", "radius_m": "of the body",
    "height_m": "of the body; --sim house ignores it (its walls block any body)",
    "sliding": "along walls", "width": "of a frame, pixels", "height": "of a frame, pixels"}


def add_robot_args(add, default: str) -> None:
    """--robot, which names a row of ROBOTS, and a flag for each value of the row."""
    add("--robot", choices=sorted(ROBOTS), help=f"body and camera; default: {default}")
    for key, value in ROBOTS["houses"].items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {
            "type": int if key in ("width", "height") else float}
        add("--" + key.replace("_", "-"), **kind, help=f"{ROBOT_HELP[key]}; instead of the robot's")


def robot_from_args(args, row: dict) -> dict:
    """A row of ROBOTS, changed by the flags that were given.

    >>> args = argparse.Namespace(turn_deg=15, sliding=None)
    >>> robot_from_args(args, {"turn_deg": 30, "sliding": True})
    {'turn_deg': 15, 'sliding': True}
    """
    robot = {key: value if vars(args)[key] is None else vars(args)[key]
             for key, value in row.items()}
    most = {"turn_deg": 180, "hfov_deg": 179}
    wrong = [key for key, value in robot.items()
             if key != "sliding" and not 0 < value <= most.get(key, 1e4)]
    if wrong:
        raise UserError(f"--{wrong[0].replace('_', '-')} must be above 0 and at most "
                        f"{most.get(wrong[0], 10000)}")
    return robot


def choose_robot(args, ckpt: str | None, contract: dict | None, dataset: str) -> dict:
    """Body and camera: the checkpoint's; else --robot, or that of the episodes' data set.
    UserError if a flag contradicts the checkpoint."""
    name = args.robot or (contract["dataset"] if contract and contract["dataset"] in ROBOTS
                          else dataset)
    robot = robot_from_args(args, ROBOTS[name])
    trained = {key: contract[key] for key in robot if contract and contract.get(key) is not None}
    for key, value in trained.items():
        stated = args.robot or vars(args)[key] is not None
        if stated and abs(value - robot[key]) > 1e-6:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{ckpt} was trained with {key} = {value} and the robot {name!r} has "
                            f"{robot[key]}: leave --robot and {flag} out (or --protocol), since a "
                            "checkpoint brings its own, or take another --ckpt")
    return {**robot, **trained}


# ---------------------------------------------------------------- flags of every script that walks


def gpu_list(text: str) -> list[int]:
    """
    >>> gpu_list("0,1")
    [0, 1]
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of CUDA indices such as 0,1")
    return [int(part) for part in text.split(",")]


def add_simulator_args(add, sims: int | None = 8) -> None:
    """The simulator's flags. sims: the default of --sims; None: a script that starts only one."""
    add("--sim", choices=("house", "habitat"), default="house", help="which simulator")
    add("--sim-python", metavar="PATH", help="interpreter that has habitat-sim; default: this one")
    add("--sim-command", metavar="CMD", action="append", help="how a simulator is started, e.g. "
        "'ssh gpu-box cd vln-r1 && conda run --no-capture-output -n habitat python -m "
        "world.worker'; --scenes is then a folder there. Given several times: used in turn. "
        "default: PYTHON -m world.worker")
    add("--sim-gpus", type=gpu_list, metavar="0,1", help="spread habitat over these CUDA indices; "
        "default: 0 if CUDA shows one, else none")
    if sims:
        add("--sims", type=positive_int, default=sims, help="simulator processes")
        add("--sim-timeout", type=non_negative, default=300, help="seconds without an answer after "
            "which a simulator is killed and started again")
        add("--retries", type=whole_number, default=2, help="times a walk begins again after its "
            "simulator died")


def simulator_commands(args) -> list[list[str]] | None:
    """The flags -> argv lists for SimPool; None: this interpreter, on this machine."""
    if args.sim_command and args.sim_python:
        raise UserError("--sim-python and --sim-command both name how to start a simulator: give "
                        "one of them")
    if args.sim_python:
        return [[args.sim_python, "-m", "world.worker"]]
    return [shlex.split(command) for command in args.sim_command or ()] or None


def simulator_gpus(args) -> list[int] | None:
    """--sim-gpus; by default each rank of several uses its own GPU, if this machine has any."""
    if not args.sim_gpus and not args.sim_command and "LOCAL_RANK" in os.environ and visible_gpus():
        return [int(os.environ["LOCAL_RANK"])]
    return args.sim_gpus


def visible_gpus() -> int:
    """The number of CUDA indices, without loading CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([c for c in chosen.split(",") if c.strip() not in ("", "-1")])
    cards = "/proc/driver/nvidia/gpus"
    return len(os.listdir(cards)) if os.path.isdir(cards) else 0


# ---------------------------------------------------------------- poses


def yaw_of(rotation: list[float]) -> float:
    """Yaw in radians, left positive, of a quaternion x,y,z,w that turns about +y.

    >>> yaw_of([0, 0, 0, 1])                                  # the identity looks along -z
    0.0
    >>> round(math.degrees(yaw_of([0, math.sin(math.pi / 12), 0, math.cos(math.pi / 12)])), 6)
    30.0
    """
    _, y, _, w = rotation
    return wrap(2 * math.atan2(y, w))


def yaw_deg(rotation: list[float]) -> float:
    """yaw_of() in degrees, in [-360, 360].

    >>> round(yaw_deg([0, 0.5, 0, 0.75 ** 0.5]), 6)
    60.0
    """
    return math.degrees(2 * math.atan2(rotation[1], rotation[3]))


def turn_between(before: float, after: float) -> float:
    """The smallest turn from one heading to another, degrees in [-180, 180): left is positive.

    >>> turn_between(170, -170)
    20
    """
    return (after - before + 180) % 360 - 180


def rotation_of(yaw: float) -> list[float]:
    """The inverse of yaw_of, with w >= 0: [x, y, z, w]."""
    yaw = wrap(yaw)
    return [0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2)]


def wrap(angle: float) -> float:
    """Into (-pi, pi].

    >>> wrap(3 * math.pi) == math.pi and wrap(-math.pi) == math.pi
    True
    """
    return math.pi - (math.pi - angle) % (2 * math.pi)


def heading(yaw) -> np.ndarray:
    """The unit vector (x, z) in which a yaw looks.

    >>> [round(float(c), 6) + 0.0 for c in heading(math.pi / 2)]      # a left turn away from -z
    [-1.0, 0.0]
    """
    return np.stack([-np.sin(yaw), -np.cos(yaw)], axis=-1)
