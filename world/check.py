"""
Is this machine ready? Load a scene, render, walk, and print the facts.

Run it   python -m world.check --scenes data/houses/scenes
         python -m world.check --sim habitat --robot r2r --scenes data/scene_datasets --sim-python P
Expect   a table that ends with "ready"; or an error with a possible fix, and exit status 2
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile

from cli import DefaultsFormatter, UserError, run_cli
from world import SimDied, SimError
from world.pool import SimPool
from world.robots import ROBOTS, add_simulator_args, simulator_commands


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--scenes", default="data/houses/scenes", help="folder that scene_id starts from")
    add("--scene", help="scene id; default: the first .glb below --scenes")
    add = p.add_argument_group("simulator").add_argument
    add("--robot", choices=sorted(ROBOTS), default="houses", help="body and camera")
    add_simulator_args(add, sims=None)
    return p.parse_args(argv)


# (what habitat-sim prints on stderr, usually before it aborts the process; a possible fix)
ADVICE = (
    ("windowless context|EGL", "OpenGL without a screen needs the driver's EGL: on a GPU machine "
     "the libraries of its driver (in a container NVIDIA_DRIVER_CAPABILITIES=all), on any other "
     "Mesa's (apt install libegl1 libgl1-mesa-dri), and habitat-sim's *headless* build"),
    ("CUDA|GPU", "name another GPU with --sim-gpus (CUDA_VISIBLE_DEVICES renumbers them)"))


def check(args, scene: str) -> None:
    """Let one simulator load a scene, render and walk, and print the facts. UserError, with a
    possible fix, if something is wrong."""
    os.environ.setdefault("MAGNUM_LOG", "default")  # it names the OpenGL device
    with captured_stderr() as captured:
        try:
            with SimPool(args.sim, ROBOTS[args.robot], args.scenes, 1, simulator_commands(args),
                         gpus=args.sim_gpus, timeout_s=300) as pool:
                pool.submit(0, "check", scene_id=scene)
                facts, wrong = pool.wait(0), None
        except (SimError, SimDied, UserError) as error:
            facts, wrong = None, str(error)
    if wrong:
        print(*captured[0].splitlines()[-20:], sep="\n", file=sys.stderr)
        helps = [text for pattern, text in ADVICE if re.search(pattern, captured[0])][:1]
        raise UserError(". What may help: ".join([wrong.rstrip("."), *helps]))
    device = re.search("Renderer: (.*)", captured[0])
    for key, value in {**facts, **({"gl_device": device[1]} if device else {})}.items():
        print(f"{key:>16}  {value}")
    if facts["mean_grey"] < 2:
        raise UserError("the pictures are black. What may help: " + ADVICE[0][1])
    if facts.get("no_sliding", "").startswith("as in v0.3.4") and not ROBOTS[args.robot]["sliding"]:
        print("in this habitat-sim a body that touches a wall stays there, unlike in 0.3.3: the "
              "results of this robot differ between the two (docs/habitat.md)")
    if facts.get("navmesh") == "computed":
        print("the scene has no .navmesh for this body, so one was computed")
    if not facts["actions"]:
        raise UserError("no two places of this scene are 2 m apart: choose another --scene, or see "
                        "the navmesh")
    if not facts["ended_m"] <= max(ROBOTS[args.robot]["forward_m"], 0.25):
        raise UserError(f"the expert stopped {facts['ended_m']} m from its goal: see the navmesh")
    print("ready")


@contextlib.contextmanager
def captured_stderr():
    """Yields a list; at the end it holds what this process and its children wrote to stderr."""
    captured, stderr = [], os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            captured.append(file.read())


def first_scene(scenes_dir: str) -> str:
    """The first .glb below a folder, as a scene id."""
    for folder, folders, files in os.walk(scenes_dir):
        folders.sort()
        scenes = sorted(name for name in files if name.endswith(".glb"))
        if scenes:
            return os.path.relpath(os.path.join(folder, scenes[0]), scenes_dir)
    raise UserError(f"--scenes {scenes_dir}: no .glb in there; `python -m world.houses` makes some")


def main(args):
    if args.sim_command and not args.scene:
        raise UserError("--sim-command may run on another machine, so no scene can be looked up "
                        "here: name one with --scene")
    check(args, args.scene or first_scene(args.scenes))


if __name__ == "__main__":
    run_cli(main, parse_args)
