"""
A second opinion: walk an evaluated walk again in habitat-lab's own environment, and let it judge.

evaluate.py computes its metrics itself, from poses and geodesic distances that sim.py asked
habitat-sim for. Whether that is what the field means by NE, SR and SPL should not be a matter of
trust. So the actions of every walk go through `habitat.Env` with the VLN task once more, and its
measures DistanceToGoal, Success and SPL are put beside ours: `python evaluate.py --witness` starts
this file in the interpreter that has habitat-lab and refuses results that differ by more than 1e-4.
Nothing here is shared with sim.py or evaluate.py, or the witness would repeat their mistakes.

Not witnessed: nDTW, SDTW, OS and TL, for which habitat-lab has no measure (tests/test_evaluate.py
holds the first against fastdtw), and what the policy would have done: its actions are taken as
they are. There is no camera, so a walk takes milliseconds, and nothing needs a GPU.

An episode that starts at its goal has no SPL there: habitat-lab divides 0 by 0. It is walked again
without that measure, and its "spl" is null. Any other exception costs its own episode only.

Run it   python evaluate.py --ckpt ckpt/sft --split val_unseen --sim habitat --sim-python PATH \\
             --witness
Reads    stdin: one JSON line with the robot, the scenes folder and the radius, then one line per
         walk: {"episode": {...}, "actions": [1, 2, ..., 0]}
Writes   stdout: one JSON line with versions, or {"missing": why} if a package is; then one per
         walk: {"episode_id", "distance_to_goal", "success", "spl", "position"}, or {"episode_id",
         "error"}
Imports  habitat-lab (and habitat-sim with it), in Python 3.9 syntax
"""
import json
import os
import sys


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr, not among the answers
    os.environ.setdefault("MAGNUM_LOG", "quiet")
    os.environ.setdefault("HABITAT_SIM_LOG", "quiet")
    job = json.loads(sys.stdin.readline())
    walks = [json.loads(line) for line in sys.stdin]

    def tell(**line):
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        import habitat
        import habitat_sim
    except ImportError as error:
        return tell(missing=str(error))
    tell(habitat_lab=habitat.__version__, habitat_sim=habitat_sim.__version__)
    scenes = {}
    for walk in walks:
        scenes.setdefault(walk["episode"]["scene_id"], []).append(walk)
    for some in scenes.values():  # without a camera, habitat-lab crashes on a change of scene
        found = walk_all(habitat, job, some, MEASURES)
        again = [walk for walk, line in zip(some, found) if line.get("error") == ZERO]
        for walk, line in zip(again, walk_all(habitat, job, again, MEASURES[:2])):
            found[some.index(walk)] = dict({"spl": None}, **line)
        for line in found:
            tell(**line)


def walk_all(habitat, job, walks, measures):
    """Walks of one scene -> a line of the output each, in their order; [] for none."""
    if not walks:
        return []
    lines = []
    try:
        dataset = habitat.Dataset()
        dataset.episodes = [make_episode(walk["episode"], job["scenes_dir"]) for walk in walks]
        of = {episode.episode_id: episode for episode in dataset.episodes}  # it shuffles the list
        with habitat.Env(make_config(job, walks, measures), dataset) as env:
            for walk in walks:
                name = str(walk["episode"]["episode_id"])
                try:
                    lines.append(walk_one(env, of[name], walk["actions"], measures))
                except Exception as error:  # a verdict on the others is still wanted
                    lines.append({"episode_id": name, "error": describe(error)})
    except Exception as error:  # the scene does not load: none of its walks has a verdict
        lines += [{"episode_id": str(walk["episode"]["episode_id"]), "error": describe(error)}
                  for walk in walks[len(lines):]]
    return lines


def walk_one(env, episode, actions, measures):
    """One walk in habitat-lab's environment -> its line of the output."""
    env.current_episode = episode
    env.reset()
    for action in actions:  # their ids: the order of make_config's actions
        env.step(action)
    found = env.get_metrics()
    return dict({key: float(found[key]) for key in measures}, episode_id=episode.episode_id,
                position=[float(v) for v in env.sim.get_agent_state().position])


def describe(error):
    if isinstance(error, ZeroDivisionError):
        return ZERO
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


ZERO = "division by zero"
MEASURES = ("distance_to_goal", "success", "spl")


def make_episode(episode, scenes_dir):
    """An episode of R2R_VLNCE or RxR_VLNCE -> habitat-lab's own. Its words do not matter here."""
    from habitat.tasks.nav.nav import NavigationGoal
    from habitat.tasks.vln.vln import InstructionData, VLNEpisode

    return VLNEpisode(
        episode_id=str(episode["episode_id"]), scene_dataset_config="default",
        scene_id=os.path.join(scenes_dir, episode["scene_id"]),
        start_position=episode["start_position"], start_rotation=episode["start_rotation"],
        goals=[NavigationGoal(position=goal["position"]) for goal in episode["goals"]],
        reference_path=[], instruction=InstructionData(instruction_text=""), trajectory_id=0)


def make_config(job, walks, measures=MEASURES):
    """The VLN task as habitat-lab configures it, without its YAML: robot, actions, measures."""
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
    room = max(len(walk["actions"]) for walk in walks) + 1
    config = c.HabitatConfig(simulator=simulator, task=task, dataset=c.DatasetConfig(
        type="R2RVLN-v1"), environment=c.EnvironmentConfig(max_episode_steps=room))
    return patch_config(OmegaConf.create({"habitat": OmegaConf.structured(config)}))


if __name__ == "__main__":
    main()
