"""
Online GRPO: train the policy on its own walks in the simulator (multi-turn GRPO, ActiveVLN [1]).

G robots walk the same episode, each to its own end, and whole walks are compared; the reward is
where they stopped:

    R_i  = 1[stopped within r of the goal] (1 - d / r)        "soft success"; others by --reward
    A_i  = (R_i - mean(R)) / (std(R) + eps)                   over the G walks of an episode
    loss = - sum_i sum_t [ min(rho A_i, clip(rho, 1-c, 1+c') A_i) - beta KL ] / all answer tokens

An episode is one conversation (dialog.py), walked with a cache that is kept across turns and
trained in one forward pass, on the ids that were sampled. Groups without success are walked again,
up to --rerolls times; groups whose rewards all agree are dropped before the backward pass. --groups
state compares the G answers to one frame instead of G walks (docs/activevln.md): one of them is
carried out, the simulator tries the others, and all are trained on as branches of one dialog.

Run it
    python -m activevln.grpo_online --init ckpt/sft_dialog --groups state    # one process
    deepspeed --module activevln.grpo_online --init ckpt/sft_dialog          # every GPU there is

Reads    --init  a checkpoint of sft.py --prompt dialog;  --episodes  and  --scenes
Writes   --out   the run directory that engine.py describes, rollouts.jsonl (walks as text: answers,
         where they were given, reward, end) and curves.png
Expect   success slowly up, noisily; entropy down; frac_reward_zero_std: the share of groups without
         a gradient; end_*: how walks end, mostly by stop. The same command continues a killed run:
         walks are functions of (seed, step, episode, robot), but for rounding, which depends on the
         robots that share a batch.

[1] https://arxiv.org/abs/2509.12618, https://github.com/arvillion/ActiveVLN
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from activevln.dialog import MAX_TURN_TOKENS, Dialog, DialogPolicy
from activevln.released import select_episodes
from cli import (
    DefaultsFormatter,
    UserError,
    non_negative,
    positive_int,
    read_rows,
    run_cli,
    whole_number,
)
from engine import (
    Log,
    add_machine_args,
    add_optimizer_args,
    all_reduce_sum,
    cut_jsonl,
    finish_run,
    gathered,
    init_distributed,
    is_due,
    load_state,
    log_column,
    make_engine,
    micro_batches,
    moving_mean,
    open_run,
    plan_micro_batches,
    pop_flop_counters,
    print_start,
    save_figure,
    save_state,
    set_learning_rate,
    update_metrics,
)
from evaluate import (
    EpisodeState,
    check_context,
    episode_metrics,
    evenly_spaced,
    is_finite,
    ndtw,
    path_length,
    run_episodes,
)
from grpo import (
    PlanBatch,
    add_objective_args,
    batch_of,
    count_steps,
    group_advantages,
    load_init,
    load_reference,
    loss_weights,
    objective_defaults,
    policy_update,
    reference_logps,
    reward_std,
)
from lora import add_lora_args
from make_data import run_jobs
from reward import STOP
from world import SimDied, SimError
from world.episodes import (
    EPISODES,
    add_episode_args,
    check_episodes,
    dataset_of,
    read_episodes,
    read_ground_truth,
    scenes_of,
    success_radius,
)
from world.pool import SimPool, scenes_used
from world.robots import (
    add_robot_args,
    add_simulator_args,
    choose_robot,
    simulator_commands,
    simulator_gpus,
    turn_between,
    yaw_deg,
)

# Flags that may change on resume, besides engine.RESUMABLE_FLAGS.
RESUMABLE = {"sims", "sim_python", "sim_command", "sim_timeout", "sim_gpus", "retries",
             "rollouts_every", "val_episodes"}
PANELS = (("success", "val/success"), ("reward",), ("frac_reward_zero_std",), ("entropy",))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--init", default="ckpt/sft_dialog", help="folder of sft.py --prompt dialog: the start")
    add("--episodes", help="folder with <split>/<split>.json.gz and its _gt; default: that of the "
        "data set which the checkpoint names")
    add("--split", default="train")
    add("--episode-list", metavar="FILE", help="a parquet list of ActiveVLN's: train on its "
        "episodes, in its order, with the lengths of its walks: docs/activevln.md")
    add_episode_args(add)
    add("--scenes", help="what scene_id is below; default: <episodes>/scenes if it is there, else "
        "data/scene_datasets")
    add("--out", default="ckpt/online")
    add("--draw", nargs="+", metavar="RUN", help="only draw the learning curves of these run "
        "folders (val/success over CPU minutes) into the picture --out X.png")
    add = p.add_argument_group("simulator").add_argument
    add_simulator_args(add, sims=8)
    add_robot_args(add, "the checkpoint's")
    add = p.add_argument_group("rollout").add_argument
    add("--groups", choices=("episode", "state"), default="episode", help="what is compared: whole "
        "walks of an episode, or plans at each state of one walk")
    add("--group-size", type=positive_int, default=4, help="G, walks of an episode, or plans")
    add("--temperature", type=non_negative, default=1.0, help="of sampling, and of the log-probs")
    add("--action-factor", type=non_negative, default=2.0, help="a walk ends at so many times the "
        "actions of the expert,")
    add("--action-cap", type=positive_int, default=240, help="or at so many, whichever is less")
    add("--turn-cap", type=positive_int, default=40, help="or after so many answers")
    add("--patience", type=whole_number, default=25, help="or after so many actions since it "
        "was nearest to the goal; 0: never")
    add("--rerolls", type=whole_number, default=2, help="times a group of walks without success "
        "is walked again")
    add = p.add_argument_group("objective").add_argument
    add("--reward", default="soft_success", help="of a whole walk: a sum such as "
        "success+0.5*progress, of " + ", ".join(REWARD_TERMS))
    add_objective_args(add, loss="dapo", clip_high=0.28, kl_coef=0.0)
    add("--batch-size", type=positive_int, default=8, help="episodes per batch, over all processes")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add_lora_args(add)
    add_optimizer_args(p, lr=1e-6, schedule="constant", weight_decay=0.01)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=non_negative, default=1.0)
    add("--max-steps", type=positive_int, help="overrides --epochs; a step is one batch")
    add("--stop-after", type=positive_int,
        help="leave after this step of the schedule (resume later)")
    add("--save-every", type=positive_int, default=50)
    add("--val-every", type=positive_int, default=50)
    add("--val-split", default="val_seen", help="walked greedily, if it is there")
    add("--val-episodes", type=whole_number, default=100)
    add_machine_args(p)
    add = p.add_argument_group("logging").add_argument
    add("--rollouts-every", type=positive_int, default=10,
        help="steps between those in rollouts.jsonl")
    return objective_defaults(p.parse_args(argv))


# ---------------------------------------------------------------- rewards

REWARD_TERMS = ("success", "soft_success", "progress", "ndtw")
TERMINATIONS = ("stop", "malformed", "actions", "turns", "no_progress", "unreachable", "invalid",
                "error")
INVALID_ENDS = TERMINATIONS[-3:]     # not the policy's fault: not trained on, and in no mean


def walk_scores(walk: EpisodeState, radius: float, reference: list) -> dict[str, float]:
    """The REWARD_TERMS of an ended walk, each in [0, 1], progress in [-1, 1].

    d0, d: metres to the goal at the start and at the end; reference: the ground truth's locations.
    """
    distances = [state["distance_to_goal"] for state in walk.states]
    path = [state["position"] for state in walk.states]
    stopped, d0, d = walk.end == "stop", distances[0], distances[-1]
    success = episode_metrics(distances, path_length(path), stopped, radius)["success"]
    d = d if is_finite(d) else math.inf                     # no way is known from there: failed
    return {"success": success, "soft_success": 1 - d / radius if success else 0.0,
            "progress": max(-1.0, (d0 - d) / d0) if d0 > 0 else float(stopped and d < math.inf),
            "ndtw": ndtw(path, reference) if stopped else 0.0}


def read_reward(text: str) -> dict[str, float]:
    """--reward as {term: weight}.

    >>> read_reward("success+0.5*progress")
    {'success': 1.0, 'progress': 0.5}
    """
    weights = {}
    for term in text.split("+"):
        found = re.fullmatch(r" *(?:(\d+\.?\d*|\.\d+) *\* *)?(\w+) *", term)
        if not found or found[2] not in REWARD_TERMS:
            raise UserError(f"--reward {text}: {term!r} is none of {', '.join(REWARD_TERMS)}, nor "
                            "a number times one of them")
        weights[found[2]] = weights.get(found[2], 0) + float(found[1] or 1)
    return weights


def cost_to_goal(state: dict, robot: dict) -> float:
    """Length of the shortest path in metres, plus one step's length for each turn on it.

    3 m to go, first to the left, then after a metre to the left again: twice three turns of 30
    degrees, each counted as a step of 0.25 m.
    >>> state = {"distance_to_goal": 3.0, "position": [0, 0, 0], "rotation": [0, 0, 0, 1]}
    >>> robot = {"turn_deg": 30, "forward_m": 0.25}
    >>> cost_to_goal(dict(state, way=[[0, 0, 0], [-1, 0, 0], [-1, 0, 2]]), robot)
    4.5
    """
    yaw, turns = yaw_deg(state["rotation"]), 0.0
    for (x, _, z), (next_x, _, next_z) in itertools.pairwise(state["way"]):
        if math.hypot(next_x - x, next_z - z) < robot["forward_m"] / 2:
            continue                           # a corner this near needs no turn of its own
        heading = math.degrees(math.atan2(x - next_x, z - next_z))
        turns, yaw = turns + abs(turn_between(yaw, heading)) / robot["turn_deg"], heading
    return state["distance_to_goal"] + robot["forward_m"] * round(turns, 9)


def plan_reward(before: dict, after: dict, plan: list[int], robot: dict, radius: float) -> float:
    """--groups state: the cost that a plan saves, and 1 for a stop within the radius.

    plan: action ids; [] if malformed, whose reward is -1. before, after: the simulator's "try" of
    its start and its end. inf or nan where no way to the goal is known.
    """
    if not plan:
        return -1.0
    right = plan[-1] == STOP and after["distance_to_goal"] < radius
    return cost_to_goal(before, robot) - cost_to_goal(after, robot) + right


def length_features(plans: list, answers: list) -> np.ndarray:
    """(G, 3): each plan's number of motions, number of tokens, and whether it stops, minus the mean
    over the group. Malformed plans: 0.

    >>> length_features([[1, 1, 0], [1], []], [[7, 8], [7, 8, 9, 10], [8, 8, 8]])
    array([[ 0.5, -1. ,  0.5],
           [-0.5,  1. , -0.5],
           [ 0. ,  0. ,  0. ]])
    """
    good = np.array([len(plan) > 0 for plan in plans])
    features = np.array([[sum(a != STOP for a in plan), len(answer), STOP in plan]
                         for plan, answer in zip(plans, answers)], float)
    features[good] -= features[good].mean(axis=0) if good.any() else 0
    features[~good] = 0
    return features


def residual_rewards(walks: list, rewards: list, policy: DialogPolicy) -> list:
    """Rewards (turns, G) per walk, minus their least squares fit to length_features over the batch
    on all ranks: a control variate. Without it the policy soon writes only the longest plans or
    only the shortest, and stops always or never: what such plans gain on average hides where each
    one leads."""
    groups = [[(length_features([policy.actions(answer) for answer in decision.answers],
                                decision.answers), np.array(some))
               if some else (np.zeros((0, 3)), np.zeros(0))             # a turn without rewards
               for decision, some in zip(walk.decisions, per_turn)]
              for walk, per_turn in zip(walks, rewards)]
    # The coefficients solve (sum F^T F) c = sum F^T r: sums over groups, so also over ranks.
    flat = sum(groups, [])
    squares = sum((features.T @ features for features, _ in flat), np.zeros((3, 3)))
    products = sum((features.T @ some for features, some in flat), np.zeros(3))
    sums = np.reshape(all_reduce_sum([*squares.flat, *products], policy.device), (4, 3))
    coefficients = np.linalg.lstsq(sums[:3], sums[3], rcond=None)[0]
    return [[(some - features @ coefficients).round(9).tolist() for features, some in mine]
            for mine in groups]


def early_end(walk: EpisodeState, expert_actions: int, args) -> str | None:
    """Why a walk that has not stopped is over, or None: the dynamic early stopping of [1]."""
    if len(walk.actions) >= min(args.action_factor * expert_actions, args.action_cap):
        return "actions"
    if len(walk.decisions) >= args.turn_cap:
        return "turns"
    distances = [state["distance_to_goal"] for state in walk.states]
    distances = [d if is_finite(d) else math.inf for d in distances]
    if 0 < args.patience <= len(distances) - 1 - int(np.argmin(distances)):
        return "no_progress"
    return None


# ---------------------------------------------------------------- walking


class RolloutEnv:
    """Episodes, their ground truth, and simulators to walk them in."""

    def __init__(self, args, policy: DialogPolicy, split: str):
        source = args.episodes or EPISODES.get(policy.contract["dataset"], EPISODES["houses"])
        self.episodes = read_episodes(source, split, args.role, args.languages)
        self.truths = read_ground_truth(source, split, args.role)
        check_episodes(self.episodes, self.truths, f"{source} ({split})")
        self.scenes = args.scenes or scenes_of(source)
        self.robot = choose_robot(args, args.init, policy.contract, dataset_of(self.episodes[0]))
        if args.episode_list and split == args.split:
            self.episodes, listed = select_episodes(args.episode_list, self.episodes, self.robot,
                                                    f"{source} ({split})")
            self.truths |= {name: {**self.truths[name], "actions": actions}
                            for name, actions in listed.items() if name in self.truths}
        check_context(policy, [e["instruction"]["instruction_text"] for e in self.episodes],
                      self.robot)
        scenes_used(args, self.robot, self.scenes, self.episodes)
        self.radius, self.args, self.source = success_radius(self.episodes), args, source
        self.cpu_s, self.last_s = 0.0, [0.0] * args.sims   # of all simulators; last known of each

    def open(self) -> SimPool:
        args = self.args
        self.pool = SimPool(args.sim, self.robot, self.scenes, args.sims, simulator_commands(args),
                            args.sim_timeout, simulator_gpus(args))
        return self.pool

    def truth(self, episode: dict) -> dict:
        return self.truths[str(episode["episode_id"])]

    def walk(self, policy: DialogPolicy, named: list, group_size: int = 1, temperature: float = 1.0,
             tally: Counter | None = None) -> list[EpisodeState]:
        """Walk [(name, episode), ..] to their ends, in that order.

        group_size: answers sampled at each turn (--groups state); the first is walked.
        """
        walks = [EpisodeState(episode, episode["instruction"]["instruction_text"], name=name)
                 for name, episode in named]
        # The whole distribution: the log-probabilities are of that.
        agent = policy.agent(temperature=temperature, seed=self.args.seed, group_size=group_size,
                             top_p=1.0)
        ended = {}
        for walk in run_episodes(
                self.pool, walks, agent, sims=self.args.sims, max_actions=sys.maxsize,
                retries=self.args.retries, render="last",
                should_stop=lambda walk: early_end(
                    walk, len(self.truth(walk.episode)["actions"]), self.args),
                counters=Counter() if tally is None else tally):
            ended[walk.name], walk.dialog_cache = walk, None            # frees its memory
        return [ended[walk.name] for walk in walks]     # a killed simulator's is another object

    def scores(self, walk: EpisodeState) -> dict[str, float]:
        """walk_scores(); zeros for a walk of INVALID_ENDS."""
        if walk.end in INVALID_ENDS:
            return dict.fromkeys(REWARD_TERMS, 0.0)
        return walk_scores(walk, self.radius, self.truth(walk.episode)["locations"])

    def preload(self, episodes: list, walks_each: int):
        """Load the scenes of the first walks of the next batch, without waiting for it."""
        walks = [episode for episode in episodes for _ in range(walks_each)]
        for i in range(self.args.sims):
            self.pool.submit(i, "load", scene_id=walks[i % len(walks)]["scene_id"])

    def preloaded(self):
        """Wait for preload(), and add up the CPU time. Errors are ignored: a walk in that scene
        reports them again."""
        for i, last in enumerate(self.last_s):
            try:
                self.last_s[i] = self.pool.wait(i)["cpu_s"]
            except (SimDied, SimError):
                continue
            self.cpu_s += self.last_s[i] - (last if self.last_s[i] >= last else 0)  # 0: restarted

    def plan_rewards(self, walks: list, policy: DialogPolicy, tally: Counter | None = None) -> list:
        """--groups state: try every answer of every turn in the simulator -> rewards per walk,
        (turns, G); [] where that failed. tally counts such walks ("unscored"), and deaths."""
        rewards, args, failed = {}, self.args, []
        tally = Counter() if tally is None else tally

        def job(walk):
            plans = [[policy.actions(answer) for answer in decision.answers]
                     for decision in walk.decisions]
            poses = [walk.states[one.t]["position"] + walk.states[one.t]["rotation"]
                     for one in walk.decisions]
            # Per turn, the distinct ways to move, each tried once; (): the pose itself.
            moves = [sorted({without_stop(plan) for plan in some} | {()}) for some in plans]
            for _ in range(1 + args.retries):
                reply = yield "try", {"episode": walk.episode, "poses": poses, "plans": moves}
                if not isinstance(reply, SimDied):
                    break
                tally["deaths"] += 1
            if isinstance(reply, Exception):
                return failed.append(reply)
            rewards[walk.name] = [self._group_rewards(some, dict(zip(tried, states)))
                                  for some, tried, states in zip(plans, moves, reply["states"])]

        run_jobs(self.pool, args.sims, (job(walk) for walk in walks
                                        if walk.decisions and walk.end not in INVALID_ENDS))
        if failed and not rewards:
            raise UserError(f"no simulator could try the plans of any of {len(failed)} walks; the "
                            f"first error: {failed[0]}")
        tally["unscored"] += len(failed)
        return [rewards.get(walk.name, []) for walk in walks]

    def _group_rewards(self, plans: list, after: dict) -> list[float]:
        """Rewards of the G plans at one turn. after: {moves: where they lead}."""
        rewards = [plan_reward(after[()], after[without_stop(plan)], plan, self.robot, self.radius)
                   for plan in plans]
        return rewards if np.isfinite(rewards).all() else []


def without_stop(plan: list[int]) -> tuple:
    return tuple(action for action in plan if action != STOP)


class Rollouts(NamedTuple):
    """A rank's share of a batch, siblings adjacent."""
    walks: list
    scores: list            # walk_scores of each
    rewards: list           # one number per walk; --groups state: (turns, G) per walk


def rollout(env: RolloutEnv, policy: DialogPolicy, episodes: list, step: int, args,
            tally: Counter) -> Rollouts:
    """Walk the episodes, and walk those again that no sibling has solved (--rerolls)."""
    state_groups = args.groups == "state"
    per_episode = 1 if state_groups else args.group_size
    groups, scores = [None] * len(episodes), [None] * len(episodes)
    tally["first_success"], tally["first_scored"] = 0, 0
    todo = range(len(episodes))
    for attempt in range(1 if state_groups else 1 + args.rerolls):
        tally["rerolled"] += len(todo) * (attempt > 0)
        named = [(f"{step}.{attempt}.{episodes[i]['episode_id']}.{g}", episodes[i])
                 for i in todo for g in range(per_episode)]
        walks = env.walk(policy, named, args.group_size if state_groups else 1, args.temperature,
                         tally)
        for n, i in enumerate(todo):
            groups[i] = walks[n * per_episode:(n + 1) * per_episode]
            scores[i] = [env.scores(walk) for walk in groups[i]]
            if attempt == 0:                                # a walk repeated until it succeeds
                tally["first_success"] += sum(score["success"] for score in scores[i])
                tally["first_scored"] += sum(w.end not in INVALID_ENDS for w in groups[i])
        todo = [i for i in todo if not any(score["success"] for score in scores[i])]
        if not todo:
            break
    walks, scores = sum(groups, []), sum(scores, [])
    if state_groups:
        rewards = residual_rewards(walks, env.plan_rewards(walks, policy, tally), policy)
    else:
        weights = read_reward(args.reward)
        rewards = [sum(w * score[key] for key, w in weights.items()) for score in scores]
    return Rollouts(walks, scores, rewards)


# ---------------------------------------------------------------- advantages


class TrainingExample:
    """A walk as it is trained on: its dialog with the sampled ids, and the rows of the loss.

    branches None: one row, the walk's own answers together, with one advantage. With --groups state
    a row for each branch (turn, ids): one of the G answers sampled at that turn, whether it was
    carried out or not, with its own advantage.
    """

    def __init__(self, walk: EpisodeState, advantages: list[float], branches: list | None = None,
                 turns: int | None = None):
        """turns: only so many of the walk's, the first."""
        decisions = walk.decisions[:turns]
        keys = tuple((walk.name, k) for k in range(len(decisions)))
        self.frames = {key: one.frame for key, one in zip(keys, decisions)}
        self.dialog = Dialog(walk.instruction, keys, tuple(one.answers[0] for one in decisions),
                             (True,) * len(keys))
        self.advantages, self.branches = advantages, branches
        self.lengths = [sum(map(len, self.dialog.answers))] if branches is None else [
            len(ids) for _, ids in branches]                # tokens of each row


def zero_std(rewards: torch.Tensor) -> bool:
    """Do the rewards of a group agree, or are they missing? Then it has no gradient."""
    return len(rewards) == 0 or bool(rewards.max() - rewards.min() < 1e-6)


def batch_std(walks: list, rewards: list, args, device: torch.device | str) -> float:
    """What --scale-rewards batch divides by: over the valid walks, or plans, of all ranks."""
    if args.scale_rewards != "batch":
        return 0.0
    known = sum(sum(rewards, []), []) if args.groups == "state" else [
        reward for walk, reward in zip(walks, rewards) if walk.end not in INVALID_ENDS]
    return reward_std(torch.tensor(known, dtype=torch.float32, device=device))


def compare_walks(walks: list, rewards: list, args, std: float = 0.0
                  ) -> tuple[list[TrainingExample], int]:
    """B * G ended walks, siblings adjacent -> examples, and the number of groups without one: those
    whose rewards agree, and those whose simulator failed. std: batch_std()."""
    examples, dropped = [], 0
    for at in range(0, len(walks), args.group_size):
        group, some = walks[at:at + args.group_size], torch.tensor(rewards[at:at + args.group_size])
        if any(walk.end in INVALID_ENDS for walk in group) or zero_std(some):
            dropped += 1
            continue
        advantages = group_advantages(some, args.group_size, scale_rewards=args.scale_rewards,
                                      batch_std=std)
        examples += [TrainingExample(walk, [a]) for walk, a in zip(group, advantages.tolist())]
    return examples, dropped


def compare_plans(walks: list, rewards: list, args, std: float = 0.0
                  ) -> tuple[list[TrainingExample], int]:
    """The same for --groups state: one group for each turn of each walk."""
    examples, dropped = [], 0
    for walk, per_turn in zip(walks, rewards):
        branches, advantages = [], []
        for turn, some in enumerate(map(torch.tensor, per_turn)):
            if zero_std(some):
                dropped += 1
                continue
            branches += [(turn, ids) for ids in walk.decisions[turn].answers]
            advantages += group_advantages(some, args.group_size, batch_std=std,
                                           scale_rewards=args.scale_rewards).tolist()
        examples += [TrainingExample(walk, advantages, branches)] if branches else []
    return examples, dropped


def dummy_example(walk: EpisodeState, state_groups: bool, turns: int | None = 1,
                  answers: int | None = 1) -> TrainingExample:
    """A walk's first turn with advantage 0, so that every rank runs the same number of forwards.
    turns, answers: so many turns, with so many of their answers; None: all."""
    branches = [(turn, ids) for turn, one in enumerate(walk.decisions[:turns])
                for ids in one.answers[:answers]] if state_groups else None
    return TrainingExample(walk, [0.0] * len(branches or [0]), branches, turns)


def collate(examples: list[TrainingExample], device: torch.device | str, temperature: float,
            weights_of: Callable, in_loss: bool = True) -> PlanBatch:
    """Examples -> one forward pass, R rows of log-probabilities. weights_of: loss_weights() as a
    function of the rows' lengths; in_loss False: a dummy, of weight 0."""
    frames = {key: frame for example in examples for key, frame in example.frames.items()}
    branches = [example.branches for example in examples]
    lengths = torch.tensor([n for example in examples for n in example.lengths], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]      # (R, C)
    advantages = torch.tensor([a for example in examples for a in example.advantages],
                              device=device)
    return PlanBatch(([example.dialog for example in examples], frames,
                      None if branches[0] is None else branches, temperature),
                     mask, advantages, *weights_of(lengths * in_loss))


def make_micro_batches(policy: DialogPolicy, walks: list, examples: list, weights_of: Callable,
                       args, budget: int) -> list[PlanBatch]:
    """Examples -> micro-batches; dummies where this rank has fewer than another. budget: of tokens
    in a micro-batch."""
    walked = [walk for walk in walks if walk.decisions]
    if not walked:
        raise UserError(f"no simulator could walk any of {len(walks)} walks; the first ended with "
                        f"{walks[0].error or walks[0].end}")
    dummy = dummy_example(min(walked, key=lambda walk: len(walk.decisions)), args.groups == "state")
    parts = micro_batches(examples, lambda one: token_count(policy, one), budget, policy.device)
    return [collate(some or [dummy], policy.device, args.temperature, weights_of, bool(some))
            for some in parts]


def token_count(policy: DialogPolicy, one: TrainingExample) -> int:
    return policy.token_counts([one.dialog], one.frames, branches=[one.branches])[0]


def plan_micro_tokens(run: Run, walks: list, weights_of: Callable) -> int:
    """engine.plan_micro_batches() for the walks of a batch, as if all were learned from."""
    policy, args = run.policy, run.args
    examples = [dummy_example(walk, args.groups == "state", None, None)
                for walk in walks if walk.decisions]
    sizes = [token_count(policy, one) for one in examples]
    return plan_micro_batches(run.engine, run.reference, args, sizes, lambda budget: max(
        policy.activations(*batch.inputs[:2], branches=batch.inputs[2])
        for batch in make_micro_batches(policy, walks, examples, weights_of, args, budget)))


# ---------------------------------------------------------------- logging


def metric_sums(walks: list, scores: list, rewards: list) -> dict[str, float]:
    """Sums over a rank's walks, by the keys of log.jsonl, for metric_means()."""
    return {**{key: sum(score[key] for score in scores) for key in REWARD_TERMS},
            "reward": sum(rewards),
            "scored": sum(walk.end not in INVALID_ENDS for walk in walks),
            "actions": sum(len(walk.actions) for walk in walks),
            "turns": sum(len(walk.decisions) for walk in walks),
            **{f"end_{end}": sum(walk.end == end for walk in walks) for end in TERMINATIONS}}


def metric_means(sums: dict, others: dict, n_walks: int, device: torch.device | str
                 ) -> dict[str, float]:
    """metric_sums() of each rank -> means over all n_walks, and others summed over the ranks.
    Scores and rewards are means over the valid walks, and missing if there are none."""
    totals = all_reduce_sum([*sums.values(), *others.values()], device)
    over_all = dict(zip(sums, totals))
    scored, of_valid = over_all.pop("scored"), (*REWARD_TERMS, "reward")
    means = {key: value / (scored if key in of_valid else n_walks)
             for key, value in over_all.items() if scored or key not in of_valid}
    return means | dict(zip(others, totals[len(sums):]))


def write_rollouts(path: str, rollouts: Rollouts, examples: list[TrainingExample], step: int,
                   stride: int) -> None:
    """Append a batch to rollouts.jsonl. A frame is its scene and pose: it can be rendered again.

    rollouts.rewards: one number per walk. stride: every stride-th row of an example is an answer
    that was carried out (--groups state: the first of each G), and their mean advantage is written.
    """
    advantages = {example.dialog.frames[0][0]: float(np.mean(example.advantages[::stride]))
                  for example in examples}
    with open(path, "a") as f:
        for walk, scores, reward in zip(*rollouts):
            row = {"step": step, "episode_id": walk.episode["episode_id"],
                   "scene_id": walk.episode["scene_id"], "instruction": walk.instruction,
                   "end": walk.end, "reward": round(reward, 4),
                   "advantage": round(advantages.get(walk.name, 0.0), 4),
                   "scores": {key: round(score, 4) for key, score in scores.items()},
                   "turns": [{"t": one.t, "position": walk.states[one.t]["position"],
                              "rotation": walk.states[one.t]["rotation"], "answer": one.text}
                             for one in walk.decisions]}
            f.write(json.dumps(row) + "\n")


def draw_runs(folders: list[str], out: str) -> None:
    """log.jsonl of several runs -> one picture: greedy success on the held-out split, and that
    of sampled first attempts while learning (mean of 20 steps), over the CPU minutes spent."""
    if not out.endswith(".png"):
        raise UserError(f"--out {out}: --draw wants the name of a .png file there")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3), layout="constrained")
    greedy, sampled = figure.subplots(1, 2, sharex=True)
    greedy.set_title("greedy, held-out episodes")
    sampled.set_title("sampled, first attempts, while learning")
    for axis in (greedy, sampled):
        axis.set(xlabel="CPU minutes", ylabel="success")
        axis.set_prop_cycle(color=colormaps["tab20"].colors)
    for folder in folders:
        try:
            rows = read_rows(os.path.join(folder, "log.jsonl"))
        except OSError as error:
            raise UserError(f"--draw {folder}: no run of ours is there ({error.strerror}: "
                            "log.jsonl)") from error
        label = os.path.basename(folder.rstrip("/"))
        greedy.plot(*log_column(rows, "val/success", "minutes").T, "o-", label=label)
        first = any("first_success" in row for row in rows)         # not in older logs
        points = log_column(rows, "first_success" if first else "success", "minutes")
        sampled.plot(*moving_mean(points, max(1, min(20, len(points)))), label=label)
    sampled.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    save_figure(figure, out)


# ---------------------------------------------------------------- the run


class Run(NamedTuple):
    """What the steps of a run have in common."""
    args: argparse.Namespace
    rank: int
    world_size: int
    policy: DialogPolicy
    engine: object          # DeepSpeed's, around the policy
    reference: object       # the policy of --init, frozen; None without --kl-coef
    env: RolloutEnv
    val: RolloutEnv | None

    @property
    def walks_each(self) -> int:
        """Walks per episode of a batch."""
        return 1 if self.args.groups == "state" else self.args.group_size

    def episodes(self, step: int) -> list[dict]:
        """This rank's of a batch."""
        args, n = self.args, len(self.env.episodes)
        chosen = batch_of(range(n), step, args.batch_size, args.seed)
        if args.episode_list:                               # in its order
            at = step % (n // args.batch_size) * args.batch_size
            chosen = range(at, at + args.batch_size)
        return [self.env.episodes[i] for i in chosen][self.rank::self.world_size]


def setup(args, device: str) -> tuple[DialogPolicy, RolloutEnv, RolloutEnv | None]:
    """Policy and environments (training and, if it is there, validation), from the flags."""
    read_reward(args.reward)
    if args.groups == "state" and args.reward != parse_args([]).reward:
        raise UserError("--reward is of whole walks: leave it out with --groups state, which "
                        "rewards a plan by the cost that it saves")
    if args.action_factor == 0:
        raise UserError("--action-factor must be above 0: a walk has so many times the actions of "
                        "the expert")
    policy = load_init(args, device, "sft.py --prompt dialog")
    if not policy.whole_walks:
        raise UserError(f"--init {args.init} was trained on {policy.contract['prompt']!r} prompts,"
                        " one for each decision; here a walk is one dialog: sft.py --prompt dialog")
    env = RolloutEnv(args, policy, args.split)
    found = any(os.path.exists(f"{env.source}/{args.val_split}/{args.val_split}{end}.json.gz")
                for end in ("", "_guide"))
    return policy, env, RolloutEnv(args, policy, args.val_split) if found else None


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Greedy walks of the held-out split -> means over all ranks of the scores of valid walks, and
    how many those are. {} without such a split."""
    if run.val is None:
        return {}
    with gathered(run.engine):
        mine = evenly_spaced(run.val.episodes, run.args.val_episodes)[run.rank::run.world_size]
        walks = run.val.walk(run.policy, [(f"val.{i}", episode) for i, episode in enumerate(mine)],
                             temperature=0.0)
    valid = [run.val.scores(walk) for walk in walks if walk.end not in INVALID_ENDS]
    sums = all_reduce_sum([len(valid), *(sum(scores[key] for scores in valid)
                                         for key in REWARD_TERMS)], run.policy.device)
    means = {f"val/{key}": value / sums[0] for key, value in zip(REWARD_TERMS, sums[1:]) if sums[0]}
    return means | {"val/scored": sums[0]}


def train_step(run: Run, step: int, next_episodes: list, first_step: bool
               ) -> tuple[dict, Rollouts, list[TrainingExample]]:
    """One batch: walk, compare, update -> metrics, and what they were made from."""
    args, policy, tally, began = run.args, run.policy, Counter(), time.perf_counter()
    state_groups, device = args.groups == "state", run.policy.device
    # 1. rollout
    with gathered(run.engine), torch.no_grad():
        rollouts = rollout(run.env, policy, run.episodes(step), step, args, tally)
    walking_s = time.perf_counter() - began
    run.env.preload(next_episodes, run.walks_each)      # during the update; reports CPU time, too

    # 2. advantages within groups
    compare = compare_plans if state_groups else compare_walks
    examples, dropped = compare(rollouts.walks, rollouts.rewards, args, batch_std(
        rollouts.walks, rollouts.rewards, args, device))
    rows = [length for example in examples for length in example.lengths]
    plans, tokens = all_reduce_sum([len(rows), sum(rows)], device)
    weights_of = partial(loss_weights, loss=args.loss, plans=plans, tokens=tokens, most=
                         MAX_TURN_TOKENS * (1 if state_groups else args.turn_cap))
    if first_step:
        args.micro_tokens = plan_micro_tokens(run, rollouts.walks, weights_of)
    batches = make_micro_batches(policy, rollouts.walks, examples, weights_of, args,
                                 args.micro_tokens)

    # 3. policy update
    update = {}                                         # nothing to compare: no update, no numbers
    if tokens:
        update = policy_update(run.engine, batches, reference_logps(run.reference, batches),
                               args)._asdict()
    run.env.preloaded()

    # 4. metrics
    walk_rewards = [float(np.mean(sum(r, []) or 0)) for r in rollouts.rewards
                    ] if state_groups else rollouts.rewards
    groups = sum(map(len, rollouts.rewards)) if state_groups else len(run.episodes(step))
    others = update | {
        "frac_reward_zero_std": dropped, "groups": groups,
        **{key: tally[key] for key in ("first_success", "first_scored", "rerolled", "deaths",
                                       "unscored")},
        "minutes": (time.process_time() + run.env.cpu_s) / 60,
        "walking_s": walking_s / run.world_size}
    metrics = metric_means(metric_sums(rollouts.walks, rollouts.scores, walk_rewards), others,
                           len(rollouts.walks) * run.world_size, device)
    metrics["frac_reward_zero_std"] /= max(metrics["groups"], 1)
    if first_scored := metrics.pop("first_scored"):
        metrics["first_success"] /= first_scored
    metrics |= {"tokens": tokens} | (update_metrics(run.engine) if tokens else {})
    return metrics, rollouts._replace(rewards=walk_rewards), examples


def resume(run: Run, steps: int) -> tuple[int, float]:
    """Load the last state -> the step to go on from, the CPU minutes spent so far."""
    args, first, minutes = run.args, load_state(run.engine, run.args.out), 0
    print_start(run.engine, f"{len(run.env.episodes)} episodes, {steps} steps of "
                f"{args.batch_size} x {args.group_size} "
                f"{'plans at each turn' if args.groups == 'state' else 'walks'}", first)
    if run.rank == 0:
        cut_jsonl(f"{args.out}/rollouts.jsonl", first)
        rows = cut_jsonl(f"{args.out}/log.jsonl", first) if first else []
        minutes = max((row.get("minutes", 0) for row in rows), default=0)
    return first, minutes


def main(args):
    if args.draw:
        return draw_runs(args.draw, args.out)
    rank, world_size, device = init_distributed(args)
    policy, env, val = setup(args, device)
    open_run(args, RESUMABLE)
    n = len(env.episodes)
    steps = count_steps(args, n, f"{env.source} has {n} episodes", world_size)
    engine = make_engine(policy, args)
    run = Run(args, rank, world_size, policy, engine, load_reference(args, engine, device), env,
              val)
    first, minutes = resume(run, steps)
    log = Log(engine, args.out, first, steps, ("reward", "success", "val/success"))
    last = min(steps, args.stop_after or steps)
    with env.open() as pool:
        if val:
            val.pool = pool
            if first == 0:                                     # the policy of --init
                log(0, **validate(run))
        env.preload(run.episodes(first), run.walks_each)
        env.preloaded()
        for step in range(first, last):
            lr = set_learning_rate(engine, step, steps, args)
            upcoming = run.episodes(step + 1 if step + 1 < last else step)
            metrics, rollouts, examples = train_step(run, step, upcoming, step == first)
            # validate, log, checkpoint
            done = step + 1
            metrics |= {"lr": lr, "minutes": metrics["minutes"] + minutes}
            if is_due(done, args.val_every, steps):
                metrics |= validate(run)
            log(done, pop_flop_counters(device, policy, run.reference), **metrics)
            if rank == 0 and (done == 1 or is_due(done, args.rollouts_every, steps)):
                write_rollouts(f"{args.out}/rollouts.jsonl", rollouts, examples, done,
                               args.group_size // run.walks_each)
            if is_due(done, args.save_every, last):
                save_state(engine, args.out, done)
    finish_run(engine, log, args.out, "the policy for evaluate.py; see curves.png, "
               "rollouts.jsonl, tb/", PANELS)


if __name__ == "__main__":
    run_cli(main, parse_args)
