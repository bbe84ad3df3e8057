"""
Compare our metrics with habitat-lab's own: walk every scored walk again in its environment.

evaluate.py computes NE, SR and SPL itself, from poses and geodesic distances of habitat-sim. Here
`habitat.Env` takes the actions of each walk, and its measures DistanceToGoal, Success and SPL are
compared with ours. A difference above 1e-4 is an error. habitat-lab has no nDTW, SDTW, OS and TL
(tests/test_evaluate.py compares DTW with fastdtw).

The command reads the results folder and starts itself as a worker (--worker) in the interpreter
that has habitat-lab. The worker shares no code with evaluate.py or world/habitat_sim.py, so that a
mistake there is found. It uses no camera and no GPU.

Run it   python -m tools.habitat_check results/r2r_val_unseen --scenes data/scene_datasets \\
             --sim-python $HABITAT
Reads    run.json and episodes*.jsonl of the folder, and the episodes; the worker reads from stdin a
         JSON line with robot, scenes and radius, then {"episode", "actions"} per walk
Writes   habitat_lab.json in the folder: versions, the largest difference of each metric, walks
         without an SPL (they start at their goal: habitat-lab divides 0 by 0) or that habitat-lab
         could not walk; the worker writes a JSON line with versions, then one per walk
Imports  the worker: habitat-lab and the standard library, Python 3.9 syntax
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys

from cli import DefaultsFormatter, UserError, read_json, run_cli, write_json

MEASURES = ("distance_to_goal", "success", "spl")
TOLERANCE = 1e-4
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.habitat_check",
                                formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("folder", metavar="FOLDER", nargs="?", help="results of evaluate.py --sim "
                   "habitat")
    p.add_argument("--scenes", metavar="DIR", help="folder that scene_id starts from; default: "
                   "<episodes>/scenes if it is there, else data/scene_datasets")
    p.add_argument("--sim-python", metavar="PATH", default=sys.executable,
                   help="interpreter that has habitat-lab")
    p.add_argument("--worker", action="store_true", help="be the worker (started by this command)")
    return p.parse_args(argv)


# ---------------------------------------------------------------- the command


def read_walks(folder: str, settings: dict) -> list[tuple[dict, dict]]:
    """-> [(row, episode)] of the scored walks. UserError if habitat-lab cannot walk them."""
    from evaluate import known_rows
    from world.episodes import read_episodes
    if settings["sim"] != "habitat" or settings["robot"]["turn_deg"] % 1:
        raise UserError(f"{folder} was walked with --sim {settings['sim']} and turns of "
                        f"{settings['robot']['turn_deg']:g} degrees: the comparison needs --sim "
                        "habitat and whole degrees (habitat-lab knows no others)")
    if not os.path.exists(os.path.join(folder, "results.json")):
        raise UserError(f"{folder}: it has not ended; run its evaluate.py command again")
    episodes = read_episodes(settings["source"], settings["split"], settings["role"],
                             settings["languages"])
    rows = known_rows(folder)
    walks = [(rows[name], episode) for episode in episodes
             if "success" in rows.get(name := str(episode["episode_id"]), ())]
    if not walks:
        raise UserError(f"{folder} has no scored walk: choose a split whose goals are known")
    return walks


def ask_worker(walks: list[tuple[dict, dict]], settings: dict, scenes: str,
               python: str) -> tuple[dict, dict[str, dict]]:
    """-> versions, and habitat-lab's line of each walk. UserError if it is missing or died."""
    from reward import STOP
    job = {"robot": settings["robot"], "scenes_dir": os.path.abspath(scenes),
           "radius_m": settings["radius_m"]}
    keys = ("episode_id", "scene_id", "start_position", "start_rotation", "goals")
    # the STOP of an unreadable answer was not called, so habitat-lab must not get it
    lines = [job] + [{"episode": {key: episode[key] for key in keys}, "actions": [
        int(a) for a in row["actions"] if a != str(STOP) or row["end"] == "stop"]}
        for row, episode in walks]
    if not shutil.which(python):
        raise UserError(f"--sim-python {python} is not there: name the interpreter that has "
                        "habitat-lab")
    done = subprocess.run([python, "-m", "tools.habitat_check", "--worker"], cwd=ROOT,
                          input="".join(json.dumps(line) + "\n" for line in lines),
                          capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if answers and "missing" in answers[0]:
        raise UserError(f"this needs habitat-lab ({answers[0]['missing']}): {python} -m pip "
                        "install habitat-lab")
    theirs = {line["episode_id"]: line for line in answers[1:]}
    if done.returncode or len(theirs) < len(walks):
        raise UserError(f"habitat-lab's process ended with {done.returncode} after {len(theirs)} "
                        f"of {len(walks)} walks. Its last output: {done.stderr[-600:].strip()}")
    return answers[0], theirs


def compare(walks: list[tuple[dict, dict]], theirs: dict[str, dict]) -> dict:
    """Our rows and habitat-lab's lines -> the numbers of habitat_lab.json. UserError if a metric
    differs by more than TOLERANCE."""
    largest, wrong, without_spl = dict.fromkeys(MEASURES, 0.0), [], []
    for row, _ in walks:
        line = theirs[str(row["episode_id"])]
        for name in MEASURES if "error" not in line else ():
            if line[name] is None:
                without_spl.append(row["episode_id"])
                continue
            gap = difference(row[name], line[name])
            largest[name] = max(largest[name], gap)
            if gap > TOLERANCE:
                wrong.append(f"episode {row['episode_id']}: {name} is {row[name]} in our row and "
                             f"{line[name]} in habitat-lab")
    if wrong:
        raise UserError(f"{wrong[0]} ({len(wrong)} such values); neither is a result until one of "
                        "them is explained")
    failed = {name: line["error"] for name, line in theirs.items() if "error" in line}
    return {"walks": len(walks) - len(failed), "largest_difference": largest,
            "without_spl": without_spl, "not_compared": failed}


def difference(ours: float | None, theirs: float | None) -> float:
    """|ours - theirs|; 0 where both distances are unknown, inf where only one is."""
    known = [metres is not None and math.isfinite(metres) for metres in (ours, theirs)]
    return abs(ours - theirs) if all(known) else math.inf if any(known) else 0.0


def main(args):
    if args.worker:
        return work()
    from world.episodes import scenes_of
    if not args.folder:
        raise UserError("name a results folder of evaluate.py")
    try:
        settings = read_json(os.path.join(args.folder, "run.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{args.folder} holds no results ({error}): evaluate it first") from None
    walks = read_walks(args.folder, settings)
    versions, theirs = ask_worker(walks, settings, args.scenes or scenes_of(settings["source"]),
                                  args.sim_python)
    found = {**versions, **compare(walks, theirs)}
    write_json(os.path.join(args.folder, "habitat_lab.json"), found)
    gaps = [f"{name} {gap:.1e}" for name, gap in found["largest_difference"].items()]
    print(f"habitat-lab {found['habitat_lab']} walked {found['walks']} of {len(walks)} walks; "
          f"largest differences: {', '.join(gaps)}")
    if found["without_spl"]:
        print(f"SPL not compared for {len(found['without_spl'])} walks that start at their goal, "
              "where habitat-lab's is 0 / 0")
    if found["not_compared"]:
        name, reason = next(iter(found["not_compared"].items()))
        sys.exit(f"habitat_check.py: error: habitat-lab could not walk "
                 f"{len(found['not_compared'])} of {len(walks)} walks (first {name}: {reason})")
    return found


# ---------------------------------------------------------------- the worker

ZERO = "division by zero"


def work() -> None:
    """stdin -> stdout, as the module's header describes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr, not between the answers
    os.environ.setdefault("MAGNUM_LOG", "quiet")
    os.environ.setdefault("HABITAT_SIM_LOG", "quiet")
    job = json.loads(sys.stdin.readline())
    walks = [json.loads(line) for line in sys.stdin]

    def answer(**line):
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        import habitat
        import habitat_sim
    except ImportError as error:
        return answer(missing=str(error))
    answer(habitat_lab=habitat.__version__, habitat_sim=habitat_sim.__version__)
    scenes = {}
    for walk in walks:
        scenes.setdefault(walk["episode"]["scene_id"], []).append(walk)
    for group in scenes.values():  # without a camera, habitat-lab crashes on a change of scene
        found = walk_all(habitat, job, group, MEASURES)
        again = [walk for walk, line in zip(group, found) if line.get("error") == ZERO]
        for walk, line in zip(again, walk_all(habitat, job, again, MEASURES[:2])):
            found[group.index(walk)] = dict({"spl": None}, **line)
        for line in found:
            answer(**line)


def walk_all(habitat, job: dict, walks: list[dict], measures: tuple[str, ...]) -> list[dict]:
    """Walks of one scene -> a line of the output for each, in their order. After an exception the
    line holds the error; if the scene does not load, all lines do."""
    if not walks:
        return []
    lines = []
    try:
        dataset = habitat.Dataset()
        dataset.episodes = [make_episode(walk["episode"], job["scenes_dir"]) for walk in walks]
        by_id = {episode.episode_id: episode for episode in dataset.episodes}  # it is shuffled
        with habitat.Env(make_config(job, walks, measures), dataset) as env:
            for walk in walks:
                name = str(walk["episode"]["episode_id"])
                try:
                    lines.append(walk_one(env, by_id[name], walk["actions"], measures))
                except Exception as error:
                    lines.append({"episode_id": name, "error": describe(error)})
    except Exception as error:
        lines += [{"episode_id": str(walk["episode"]["episode_id"]), "error": describe(error)}
                  for walk in walks[len(lines):]]
    return lines


def walk_one(env, episode, actions: list[int], measures: tuple[str, ...]) -> dict:
    """One walk in habitat-lab's environment -> its line of the output."""
    env.current_episode = episode
    env.reset()
    for action in actions:  # their ids: the order of make_config's actions
        env.step(action)
    found = env.get_metrics()
    return dict({key: float(found[key]) for key in measures}, episode_id=episode.episode_id,
                position=[float(v) for v in env.sim.get_agent_state().position])


def describe(error: Exception) -> str:
    if isinstance(error, ZeroDivisionError):
        return ZERO
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def make_episode(episode: dict, scenes_dir: str):
    """An episode of R2R_VLNCE or RxR_VLNCE -> habitat-lab's own, without its instruction."""
    from habitat.tasks.nav.nav import NavigationGoal
    from habitat.tasks.vln.vln import InstructionData, VLNEpisode

    return VLNEpisode(
        episode_id=str(episode["episode_id"]), scene_dataset_config="default",
        scene_id=os.path.join(scenes_dir, episode["scene_id"]),
        start_position=episode["start_position"], start_rotation=episode["start_rotation"],
        goals=[NavigationGoal(position=goal["position"]) for goal in episode["goals"]],
        reference_path=[], instruction=InstructionData(instruction_text=""), trajectory_id=0)


def make_config(job: dict, walks: list[dict], measures: tuple[str, ...] = MEASURES):
    """The configuration of habitat-lab's VLN task: robot, actions, measures."""
    from habitat.config import default_structured_configs as c
    from habitat.config.default import patch_config
    from omegaconf import OmegaConf

    robot, order = job["robot"], ("stop", "move_forward", "turn_left", "turn_right")
    actions = dict(zip(order, (c.StopActionConfig(), c.MoveForwardActionConfig(),
                               c.TurnLeftActionConfig(), c.TurnRightActionConfig())))
    simulator = c.SimulatorConfig(
        type="Sim-v0", turn_angle=int(robot["turn_deg"]), forward_step_size=robot["forward_m"],
        agents={"main": c.AgentConfig(height=robot["height_m"], radius=robot["radius_m"])},
        habitat_sim_v0=c.HabitatSimV0Config(allow_sliding=robot["sliding"], enable_physics=False,
                                            gpu_device_id=-1))
    known = {"distance_to_goal": c.DistanceToGoalMeasurementConfig(),
             "success": c.SuccessMeasurementConfig(success_distance=job["radius_m"]),
             "spl": c.SPLMeasurementConfig()}
    task = c.TaskConfig(type="VLN-v0", actions=actions,
                        measurements={name: known[name] for name in measures})
    longest = max(len(walk["actions"]) for walk in walks) + 1
    config = c.HabitatConfig(simulator=simulator, task=task, dataset=c.DatasetConfig(
        type="R2RVLN-v1"), environment=c.EnvironmentConfig(max_episode_steps=longest))
    return patch_config(OmegaConf.create({"habitat": OmegaConf.structured(config)}))


if __name__ == "__main__":
    run_cli(main, parse_args)
