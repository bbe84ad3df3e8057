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

Run it   python evaluate.py --ckpt ckpt/sft --split val_unseen --sim habitat --sim-python PATH \\
             --witness
Reads    stdin: one JSON line with the robot, the scenes folder and the radius, then one line per
         walk: {"episode": {...}, "actions": [1, 2, ..., 0]}
Writes   stdout: one JSON line with versions, then one per walk: {"episode_id",
         "distance_to_goal", "success", "spl", "position"} or {"episode_id", "error"}
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

    import habitat
    import habitat_sim

    def tell(**line):
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    tell(habitat_lab=habitat.__version__, habitat_sim=habitat_sim.__version__)
    scenes = {}
    for walk in walks:
        scenes.setdefault(walk["episode"]["scene_id"], []).append(walk)
    for walks in scenes.values():  # without a camera, habitat-lab crashes on a change of scene
        dataset = habitat.Dataset()
        dataset.episodes = [make_episode(walk["episode"], job["scenes_dir"]) for walk in walks]
        of = {episode.episode_id: episode for episode in dataset.episodes}  # it shuffles the list
        with habitat.Env(make_config(job, walks), dataset) as env:
            for walk in walks:
                name = str(walk["episode"]["episode_id"])
                env.current_episode = of[name]
                env.reset()
                for action in walk["actions"]:  # their ids: the order of make_config's actions
                    env.step(action)
                found = env.get_metrics()
                tell(episode_id=name, **{key: float(found[key]) for key in MEASURES},
                     position=[float(v) for v in env.sim.get_agent_state().position])


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


def make_config(job, walks):
    """The VLN task as habitat-lab configures it, without its YAML: robot, actions, measures."""
    from habitat.config import default_structured_configs as c
    from habitat.config.default import patch_config
    from omegaconf import OmegaConf

    robot, order = job["robot"], ("stop", "move_forward", "turn_left", "turn_right")
    actions = dict(zip(order, (c.StopActionConfig(), c.MoveForwardActionConfig(),
                               c.TurnLeftActionConfig(), c.TurnRightActionConfig())))
    if robot["turn_deg"] != int(robot["turn_deg"]):
        raise SystemExit("habitat-lab's turn_angle is a whole number of degrees, and this robot "
                         f"turns {robot['turn_deg']}: --witness cannot follow it")
    simulator = c.SimulatorConfig(
        type="Sim-v0", turn_angle=int(robot["turn_deg"]), forward_step_size=robot["forward_m"],
        agents={"main": c.AgentConfig(height=robot["height_m"], radius=robot["radius_m"])},
        habitat_sim_v0=c.HabitatSimV0Config(allow_sliding=robot["sliding"], enable_physics=False,
                                            gpu_device_id=-1))
    task = c.TaskConfig(
        type="VLN-v0", actions=actions, measurements={
            "distance_to_goal": c.DistanceToGoalMeasurementConfig(),
            "success": c.SuccessMeasurementConfig(success_distance=job["radius_m"]),
            "spl": c.SPLMeasurementConfig()})
    room = max(len(walk["actions"]) for walk in walks) + 1
    config = c.HabitatConfig(simulator=simulator, task=task, dataset=c.DatasetConfig(
        type="R2RVLN-v1"), environment=c.EnvironmentConfig(max_episode_steps=room))
    return patch_config(OmegaConf.create({"habitat": OmegaConf.structured(config)}))


if __name__ == "__main__":
    main()
