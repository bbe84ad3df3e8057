"""
habitat-sim with the methods of HouseSim: Matterport3D scenes, or the same houses.

Written against habitat-sim 0.3.3 and 0.3.4, which differ without sliding (RxR's robot):
docs/habitat.md describes the difference.

Imports  habitat_sim, numpy and pillow, in Python 3.9 syntax: its interpreter loads this file
"""
from __future__ import annotations

import glob
import json
import math
import os
import sys
import tempfile

import numpy as np

from cli import UserError
from reward import FORWARD, LEFT, RIGHT, STOP
from world import SimError
from world.robots import visible_gpus

HABITAT_MISSING = """habitat_sim does not import in {python} ({error}). Install it with
  conda create -n habitat -c conda-forge -c aihabitat python=3.9 habitat-sim=0.3.3 headless pillow
and pass --sim-python <that environment>/bin/python (`conda env list` shows where it is)"""


def build_of(habitat_sim) -> str:
    """Which build of habitat-sim this is. __version__ is 0.3.3 on its main branch and for its tag
    v0.3.4 as well, though they step differently without sliding."""
    name = os.path.join(sys.prefix, "conda-meta", "habitat-sim-*.json")
    for path in sorted(glob.glob(name)):
        with open(path, encoding="utf-8") as file:
            package = json.load(file)
        return f"conda {package.get('version')} {package.get('build')}"
    module = os.path.dirname(habitat_sim.__file__)
    found = glob.glob(os.path.join(module, "**", "habitat_sim_bindings*.so"), recursive=True)
    size = f", bindings of {os.path.getsize(found[0]):,} bytes" if found else ""
    return f"from source{size}, Python {sys.version_info[0]}.{sys.version_info[1]}"


class HabitatSim:
    """habitat-sim 0.3.x with one agent and one colour camera, which renders only on request.

    gpu: a CUDA index (default: 0 if there is one, else -1 = without CUDA). habitat ABORTS the whole
    process on an index that does not exist, so the index is checked before.
    """

    def __init__(self, robot: dict, scenes_dir: str, gpu: int | None = None):
        for log in ("MAGNUM_LOG", "HABITAT_SIM_LOG"):  # a hundred lines per simulator otherwise
            os.environ.setdefault(log, "quiet")
        try:
            import habitat_sim
            import magnum
        except ImportError as error:
            raise UserError(HABITAT_MISSING.format(python=sys.executable, error=error)) from None
        cards = visible_gpus()  # a build without CUDA renders on them, too, by EGL
        if gpu is not None and gpu >= cards:
            raise UserError(f"GPU {gpu} was asked for, but this machine shows {cards} to CUDA: "
                            "name another with --sim-gpus, or leave it out")
        self.version = f"habitat-sim {habitat_sim.__version__} ({build_of(habitat_sim)})"
        self.gpu = gpu if gpu is not None else (0 if cards else -1)
        self.habitat, self.magnum, self.sim, self.file = habitat_sim, magnum, None, None
        self.robot, self.scenes_dir = robot, scenes_dir
        self.goals, self.collided, self.no_semantics = [], False, None

    def load(self, scene_id: str) -> None:
        path = os.path.join(self.scenes_dir, scene_id)
        if path == self.file:
            return
        if not os.path.exists(path):
            raise SimError(f"{path}: no such scene; see --scenes, and docs/habitat.md")
        habitat, robot = self.habitat, self.robot
        backend = habitat.SimulatorConfiguration()
        backend.scene_id, backend.gpu_device_id = path, self.gpu
        backend.allow_sliding, backend.enable_physics = robot["sliding"], False
        backend.load_semantic_mesh, backend.random_seed = False, 0
        camera = habitat.CameraSensorSpec()
        camera.uuid, camera.sensor_type = "rgb", habitat.SensorType.COLOR
        camera.resolution = [robot["height"], robot["width"]]
        camera.hfov = float(robot["hfov_deg"])
        camera.position = self.magnum.Vector3(0, robot["camera_height_m"], 0)  # a list: TypeError
        names = {FORWARD: ("move_forward", "forward_m"), LEFT: ("turn_left", "turn_deg"),
                 RIGHT: ("turn_right", "turn_deg")}
        agent = habitat.agent.AgentConfiguration(
            height=robot["height_m"], radius=robot["radius_m"], sensor_specifications=[camera],
            action_space={key: habitat.agent.ActionSpec(name, habitat.agent.ActuationSpec(
                amount=float(robot[amount]))) for key, (name, amount) in names.items()})
        config = habitat.Configuration(backend, [agent])
        self.leave_semantics_out(config, path)
        self.file = None  # if habitat raises below, no scene is loaded
        try:
            if self.sim is None:
                self.sim = habitat.Simulator(config)
            else:
                self.sim.reconfigure(config)
        except (AssertionError, RuntimeError) as error:
            self.sim = None  # its state after a failure is undefined
            raise SimError(f"{path}: habitat-sim cannot load this scene ({str(error).strip()}); "
                           "copy it again") from None
        self.agent, self.follower = self.sim.get_agent(0), None
        self.load_navmesh(path)
        self.file = path

    def leave_semantics_out(self, config, path: str) -> None:
        """A scene without a semantic description gets an empty one. Otherwise habitat-sim looks for
        <scene>.scn and prints an error at every load that the file "exists but failed to load"; its
        log level "quiet" keeps errors. Scenes of Matterport3D have their own .house file."""
        stem, folder = os.path.splitext(path)[0], os.path.dirname(path)
        if any(map(os.path.exists, (stem + ".house", stem + ".scn", stem + "_semantic.txt",
                                    os.path.join(folder, "info_semantic.json")))):
            return
        if self.no_semantics is None:
            self.no_semantics = tempfile.NamedTemporaryFile("w", suffix=".json")
            self.no_semantics.write('{"objects": []}')
            self.no_semantics.flush()
        mediator = self.sim.metadata_mediator if self.sim else (
            self.habitat.metadata.MetadataMediator(config.sim_cfg))
        stages = mediator.stage_template_manager
        stage = stages.create_template(path, True)
        stage.house_filename = self.no_semantics.name
        stages.register_template(stage, path)
        config.metadata_mediator = mediator

    def load_navmesh(self, path: str) -> None:
        """The scene's own .navmesh if it was made for a body like this one, else a new one. This is
        what habitat-sim did when R2R-CE and RxR-CE were made (R2R's robot is the default body, for
        which the files are; RxR's is not), written out because later versions differ. SimError if
        a file is damaged, or missing where distances are to be those of the published mesh."""
        finder, body = self.sim.pathfinder, self.habitat.NavMeshSettings()
        body.set_defaults()
        ordinary = body.agent_radius, body.agent_height
        body.agent_radius, body.agent_height = self.robot["radius_m"], self.robot["height_m"]
        file, self.navmesh = os.path.splitext(path)[0] + ".navmesh", "the scene's file"
        wanted = np.allclose(ordinary, (body.agent_radius, body.agent_height), atol=1e-4)
        if os.path.exists(file):
            if not finder.load_nav_mesh(file):
                raise SimError(f"{file}: habitat-sim cannot load it; copy it again")
        elif wanted and f"{os.sep}mp3d{os.sep}" in path:
            raise SimError(f"{file} is missing, and a new one would give other distances than the "
                           "published: extract the whole of Matterport3D's `habitat` task")
        stored = finder.nav_mesh_settings if finder.is_loaded else None
        if stored is None or abs(stored.agent_radius - body.agent_radius) > 1e-4 or abs(
                stored.agent_height - body.agent_height) > 1e-4:
            self.sim.recompute_navmesh(finder, body)
            self.navmesh = "computed"
        if not finder.is_loaded:  # the agent would walk through walls, with only a warning
            raise SimError(f"{path}: it has no navmesh, and none could be computed")

    def reset(self, episode: dict) -> None:
        self.load(episode["scene_id"])
        self.goals = [goal["position"] for goal in episode.get("goals") or []]
        self.set_pose(episode["start_position"], episode["start_rotation"])

    def set_pose(self, position, rotation) -> None:
        rotation = np.asarray(rotation, np.float64)
        state = self.habitat.AgentState()
        state.position = np.asarray(position, np.float32)
        state.rotation = rotation / np.linalg.norm(rotation)  # not of unit length: ValueError
        self.agent.set_state(state)
        self.collided = False
        if self.follower is not None:
            self.follower.reset()  # it keeps its last moves

    def act(self, action: int) -> bool:
        """agent.act, because sim.step would render, and asserts on STOP."""
        if action not in (FORWARD, LEFT, RIGHT):
            raise ValueError(f"{action!r} is not a motion: 1 forward, 2 left, 3 right")
        self.collided = bool(self.agent.act(action))
        return self.collided

    def pose(self) -> list[float]:
        state = self.agent.get_state()
        q = state.rotation
        return [float(v) for v in (*state.position, q.x, q.y, q.z, q.w)]

    def state(self) -> dict:
        pose = self.pose()
        return {"position": pose[:3], "rotation": pose[3:], "collided": self.collided,
                "distance_to_goal": self.geodesic(self.goals) if self.goals else None}

    def observe(self) -> np.ndarray:
        return np.ascontiguousarray(self.sim.get_sensor_observations()["rgb"][..., :3])

    def render(self, poses) -> np.ndarray:
        here, views = self.pose(), []
        for pose in poses:
            self.set_pose(pose[:3], pose[3:])
            views.append(self.observe())
        self.set_pose(here[:3], here[3:])
        return np.stack(views)

    def geodesic(self, goals: list) -> float:
        way = self.habitat.MultiGoalShortestPath()
        way.requested_start = self.agent.get_state().position
        way.requested_ends = [np.asarray(goal, np.float32) for goal in goals]
        found = self.sim.pathfinder.find_path(way)
        metres = float(way.geodesic_distance) if found else math.inf
        return metres if math.isfinite(metres) else math.inf

    def path(self, goal: list[float]) -> list:
        way = self.habitat.ShortestPath()
        way.requested_start = self.agent.get_state().position
        way.requested_end = np.asarray(goal, np.float32)
        return [[float(v) for v in p] for p in way.points] if self.sim.pathfinder.find_path(
            way) else []

    def expert_action(self, goal: list[float] | None = None) -> int:
        if goal is None:
            goal = min(self.goals, key=lambda goal: self.geodesic([goal]))
        if self.follower is None:
            self.follower = self.sim.make_greedy_follower(
                0, 0.75 * self.robot["forward_m"], stop_key=STOP, forward_key=FORWARD,
                left_key=LEFT, right_key=RIGHT)
        try:
            return int(self.follower.next_action_along(np.asarray(goal, np.float32)))
        except self.habitat.errors.GreedyFollowerError:
            if self.geodesic([goal]) <= self.robot["forward_m"]:
                return STOP  # no action gets it any closer
            raise SimError(f"{self.file}: habitat's follower finds no way to {list(goal)}"
                           ) from None

    def topdown(self) -> tuple[np.ndarray, list[float]]:
        finder = self.sim.pathfinder
        lo, hi = finder.get_bounds()
        plan = finder.get_topdown_view(0.02, float(self.agent.get_state().position[1]))  # m / pixel
        image = np.where(np.asarray(plan)[..., None], np.uint8(225), np.uint8(90)).repeat(3, axis=2)
        return image, [float(v) for v in (lo[0], lo[2], hi[0], hi[2])]

    def random_point(self, rng) -> list[float]:
        self.sim.pathfinder.seed(int(rng.integers(1 << 30)))
        return [float(v) for v in self.sim.pathfinder.get_random_navigable_point()]

    def info(self) -> dict:
        finder = self.sim.pathfinder
        return {"habitat_sim": self.habitat.__version__, "gpu_device": self.sim.gpu_device,
                "cuda_build": self.habitat.cuda_enabled,
                "navmesh": self.navmesh, "navmesh_m2": round(float(finder.navigable_area), 1),
                "no_sliding": self.stepping()}

    def stepping(self, places: int = 8, tries: int = 1000) -> str:
        """How this habitat-sim steps without sliding (RxR's robot), measured at some walls.

        A body walks head-on into a wall and then steps straight away from it. With the code of
        v0.3.3 it always moves; with that of v0.3.4 a wall that is touched at the start of a step
        counts as hit, and the body stays at most of them (docs/habitat.md).
        """
        finder, tried, held = self.sim.pathfinder, 0, 0
        for _ in range(tries):
            point = finder.get_random_navigable_point()
            wall = finder.closest_obstacle_surface_point(point, 2.0)
            away = np.array([point[0] - wall.hit_pos[0], 0, point[2] - wall.hit_pos[2]])
            if not 0.3 < wall.hit_dist < 2.0 or np.linalg.norm(away) < 0.2:
                continue
            away *= 0.25 / np.linalg.norm(away)
            start = finder.snap_point(wall.hit_pos + 0.4 * away)
            at_wall = finder.try_step_no_sliding(start, start - away)
            if math.dist(at_wall, start) > 0.2:
                continue  # no wall was hit
            tried += 1
            held += math.dist(finder.try_step_no_sliding(at_wall, at_wall + away), at_wall) < 0.01
            if tried == places:
                break
        like = "no wall was found" if not tried else "as in v0.3.4" if held > 1 else "as in v0.3.3"
        return f"{like}: {held} of {tried} steps away from a wall do not move"
