"""
grpo.py with another reward, for one row of bench/evidence.py: each plan is walked in the house
simulator from the pose of its prompt, and is paid what `activevln.grpo_online --groups state` pays:
the cost that it saves (metres of the shortest path, and 0.25 m for each turn on it), and 1 for a
stop within the radius. The expert's labels are not used. The sampling, the advantages and the
update are grpo.py's own.

Run it   python bench/simulator_reward.py --data evidence/own0/train --init evidence/ckpt/sft0 \
             --out evidence/ckpt/own_simulator_0_0 ..      # the flags of grpo.py, but --reward
Reads    --data (own walks: their poses), evidence/houses (their goals and scenes)
Writes   what grpo.py writes
"""
from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import grpo
from activevln.grpo_online import plan_reward, without_stop
from cli import run_cli
from reward import STOP, Score
from world.episodes import read_episodes, success_radius
from world.house_sim import HouseSim
from world.worker import do_try

HOUSES = "evidence/houses"


class SimulatorReward:
    """Called as grpo.compute_rewards is."""

    def __init__(self, sources):
        self.sources = sources
        self.robot = sources[0].meta["robot"]
        self.sim = HouseSim(self.robot, os.path.join(HOUSES, "scenes"))
        episodes = {str(e["episode_id"]): e for e in read_episodes(HOUSES, "train")}
        self.radius_m = success_radius(list(episodes.values()))
        self.episodes = [{row["walk_id"]: episodes[str(row["episode_id"])]
                          for row in data.episodes} for data in sources]

    def __call__(self, texts, decisions, policy, args) -> list[Score]:
        """texts: G of each decision, adjacent -> scores, whose reward is the simulator's."""
        scores, size, paid = self.expert_scores(texts, decisions, policy, args), args.group_size, []
        for i, decision in enumerate(decisions):
            source, (walk_id, t) = decision.frames[-1]
            pose = self.sources[source].walks[walk_id]["poses"][t]
            plans = [until_stop(one.plan) for one in scores[i * size:(i + 1) * size]]
            moves = sorted({without_stop(plan) for plan in plans} | {()})
            states, = do_try(self.sim, self.episodes[source][walk_id], [pose], [moves])["states"]
            after = dict(zip(moves, states))
            paid += [plan_reward(after[()], after[without_stop(plan)], plan, self.robot,
                                 self.radius_m) for plan in plans]
        return [one._replace(reward=reward) for one, reward in zip(scores, paid)]

    expert_scores = staticmethod(grpo.compute_rewards)


def until_stop(plan: list) -> list[int]:
    """A plan's actions up to its first STOP; [] if a position is malformed."""
    if None in plan:
        return []
    return plan[:plan.index(STOP) + 1] if STOP in plan else plan


def main(args):
    open_all = grpo.setup

    def setup(args, device):
        sources, policy = open_all(args, device)
        grpo.compute_rewards = SimulatorReward(sources)
        return sources, policy
    grpo.setup = setup
    grpo.main(args)


if __name__ == "__main__":
    run_cli(main, grpo.parse_args)
