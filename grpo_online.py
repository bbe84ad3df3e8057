"""
Online GRPO: teach the navigator by letting it walk (multi-turn GRPO, ActiveVLN [1]).

grpo.py never leaves the expert's road. Here G robots walk the same episode in simulators, each to
its own end, and whole walks are compared; what counts is where they stopped:

    R_i  = 1[stopped within r of the goal] (1 - d / r)        "soft success"; others by --reward
    A_i  = (R_i - mean(R)) / (std(R) + eps)                   over the G walks of an episode
    loss = - sum_i sum_t [ min(rho A_i, clip(rho, 1-c, 1+c') A_i) - beta KL ] / all answer tokens

An episode is one conversation (model.py: a dialog), walked with a cache that is kept across turns
and trained in one forward. The ids that were sampled are the ids that are trained on: nothing is
re-tokenised, what the camera saw has no gradient, and vision tokens cannot be sampled. With one
update per batch rho is 1: plain REINFORCE with the group's mean as baseline.

    walk      robots that wait are answered together, whatever turn each is at; whoever ends gives
              its simulator to the next walk at once; a lost simulator's walk begins again
    end       stop, or early: a malformed answer, too many actions or turns, no progress
    compare   groups without success are walked again, up to --rerolls times; groups whose rewards
              all agree are dropped before the backward pass
    learn     meanwhile the simulators load the next batch's scenes

--groups state compares plans instead of walks: at every turn of one walk, G answers are drawn, the
first is walked, and all are played forward in the simulator without a picture:

    R_g  = to_go(before) - to_go(after) + 1[said stop within r] - price . form_g
    to_go = the way's metres, and as many for each turn on it as the robot walks meanwhile
    form  = (motions, tokens, stops) of the plan, less the means of its group

price is the least squares fit of the rewards to the forms in the batch. So to move much or little,
to talk long or short, and to stop, are worth nothing by themselves; it counts where each is done.
(Without it one of them wins soon: a policy that writes the longest plans or the shortest, never
stops or always. What a stop is worth depends on what would have come after.) A malformed answer
has no form: its R is -1.

Run it
    python grpo_online.py --init ckpt/sft_dialog --groups state          # one process, our houses
    deepspeed grpo_online.py --init ckpt/sft_dialog                      # every GPU there is
    deepspeed grpo_online.py --init ckpt/r2r_dialog --sim habitat --sim-python PATH --sims 4

Reads    --init  a checkpoint of sft.py --prompt dialog;  --episodes  and  --scenes
Writes   --out   the run directory that engine.py describes, and for people: rollouts.jsonl (walks,
         what was said at each turn, where from, reward, end) and curves.png
Expect   success slowly up, noisily (with whole walks reward, too; that of plans is on a new scale
         in every batch); entropy down; frac_reward_zero_std is the share of groups that taught
         nothing. end_* tells how walks end: stop should rule. What twenty minutes of one core bring
         in our houses stands in the README, "Learning by walking". Killed? The same command goes
         on: walks are functions of (seed, step, episode, robot). As in evaluate.py, timing decides
         who is answered with whom, and with it only rounding.

Ours, as ActiveVLN's is [2]: 8 episodes x 4 walks, lr 1e-6 constant, weight decay 0.01, clip 0.2 and
0.28, no KL, at most min(2 x expert, cap) actions and 40 turns, 2 rerolls. Unlike it: temperature 1
(1.2), dead groups are dropped (kept), one mean over all tokens (per micro-batch), actions are
counted one by one (it counts merged ones, up to 120), and --patience.

[1] ActiveVLN, https://arxiv.org/abs/2509.12618      [2] https://github.com/arvillion/ActiveVLN
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

import numpy as np
import torch

from cli import Help, UserError, count, run
from engine import (
    Log,
    add_machine_args,
    add_optimizer_args,
    all_reduce_sum,
    cut_jsonl,
    default_dtype,
    finish_run,
    gathered,
    init_distributed,
    is_due,
    load_state,
    make_engine,
    micro_batches,
    open_run,
    pop_flop_counters,
    print_memory_estimate,
    print_start,
    save_state,
    set_learning_rate,
    update_metrics,
)
from evaluate import (
    EPISODES,
    EpisodeState,
    check_context,
    check_episodes,
    choose_robot,
    dialog_agent,
    episode_metrics,
    evenly_spaced,
    is_finite,
    ndtw,
    path_length,
    run_episodes,
)
from grpo import (
    PlanBatch,
    UpdateStats,
    add_objective_args,
    batch_of,
    group_advantages,
    load_reference,
    policy_update,
    reference_logps,
)
from make_data import Dialog, run_jobs
from model import is_dialog, load_policy
from reward import STOP
from world import SimDied, SimError
from world.episodes import (
    VLNCE_RADIUS_M,
    add_episode_args,
    read_episodes,
    read_ground_truth,
    scenes_of,
)
from world.pool import SimPool, scenes_used
from world.robots import (
    add_robot_args,
    add_simulator_args,
    simulator_commands,
    turn_between,
    visible_gpus,
    yaw_deg,
)

# Flags that may change on resume, besides engine.RESUMABLE_FLAGS.
RESUMABLE = {"sims", "sim_python", "sim_command", "sim_timeout", "sim_gpus", "retries",
             "rollouts_every", "val_episodes"}
PANELS = (("success", "val/success"), ("reward",), ("frac_reward_zero_std",), ("entropy",))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--init", default="ckpt/sft_dialog", help="folder of sft.py --prompt dialog: the start")
    add("--episodes", help="folder with <split>/<split>.json.gz and its _gt; default: that of the "
        "data set which the checkpoint names")
    add("--split", default="train")
    add_episode_args(add)
    add("--scenes", help="what scene_id is below; default: <episodes>/scenes if it is there, else "
        "data/scene_datasets")
    add("--out", default="ckpt/online")
    add("--draw", nargs="+", metavar="RUN", help="only draw the learning curves of these run "
        "folders (val/success over CPU minutes) into the picture --out X.png")
    add = p.add_argument_group("simulator").add_argument
    add_simulator_args(add, sims=8)
    add("--success-m", type=float, help="r; default: goals[].radius in the data (R2R: 3.0)")
    add_robot_args(add, "the checkpoint's")
    add = p.add_argument_group("rollout").add_argument
    add("--groups", choices=("episode", "state"), default="episode", help="what is compared: whole "
        "walks of an episode, or plans at each state of one walk")
    add("--group-size", type=count, default=4, help="G, walks per episode, or plans per state")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs")
    add("--action-factor", type=float, default=2.0, help="a walk ends at so many times the actions "
        "of the expert,")
    add("--action-cap", type=count, default=240, help="or at so many, whichever is less")
    add("--turn-cap", type=count, default=40, help="or after so many answers")
    add("--patience", type=int, default=25, help="or after so many actions that brought it no "
        "nearer to the goal than it had been; 0: never")
    add("--rerolls", type=int, default=2, help="times a group without success is walked again; "
        "whole walks only")
    add = p.add_argument_group("objective").add_argument
    add("--reward", default="soft_success", help="of a whole walk: a sum such as "
        "success+0.5*progress, of " + ", ".join(MARKS))
    add_objective_args(add, clip_high=0.28, kl_coef=0.0)
    add("--batch-size", type=count, default=8, help="episodes per batch, over all processes")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add_optimizer_args(p, lr=1e-6, schedule="constant", weight_decay=0.01)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=count, help="overrides --epochs; a step is one batch")
    add("--stop-after", type=count, help="leave after this step of the schedule (resume later)")
    add("--save-every", type=count, default=50)
    add("--val-every", type=count, default=50)
    add("--val-split", default="val_seen", help="walked greedily, if it is there")
    add("--val-episodes", type=int, default=100)
    add_machine_args(p)
    add = p.add_argument_group("logging").add_argument
    add("--rollouts-every", type=count, default=10, help="steps between those in rollouts.jsonl")
    return p.parse_args(argv)


# ---------------------------------------------------------------- what a walk is worth

MARKS = ("success", "soft_success", "progress", "ndtw")


def marks_of(walk, radius, reference):
    """An ended walk -> its marks, each in [0, 1], progress in [-1, 1].

    Metres to the goal at the start d0 and at the end d; reference: the ground truth's locations.
    """
    distances = [state["distance_to_goal"] for state in walk.states]
    path = [state["position"] for state in walk.states]
    stopped, d0, d = walk.end == "stop", distances[0], distances[-1]
    marks = episode_metrics(distances, path_length(path), stopped, radius)
    d = d if is_finite(d) else math.inf                     # no way is known from there: failed
    return {"success": marks["success"],
            "soft_success": 1 - d / radius if marks["success"] else 0.0,
            "progress": max(-1.0, (d0 - d) / d0) if d0 > 0 else float(stopped and d < math.inf),
            "ndtw": ndtw(path, reference) if stopped else 0.0}


def read_reward(text):
    """--reward as {mark: weight}.

    >>> read_reward("success+0.5*progress")
    {'success': 1.0, 'progress': 0.5}
    """
    weights = {}
    for term in text.split("+"):
        found = re.fullmatch(r" *(?:(\d+\.?\d*|\.\d+) *\* *)?(\w+) *", term)
        if not found or found[2] not in MARKS:
            raise UserError(f"--reward {text}: {term!r} is none of {', '.join(MARKS)}, nor a "
                            "number times one of them")
        weights[found[2]] = weights.get(found[2], 0) + float(found[1] or 1)
    return weights


def to_go(state, robot):
    """The way's metres, and as many for each turn on it as the robot walks meanwhile.

    3 m to go, first to the left, then after a metre to the left again, with turns of 30 degrees:
    twice three turns, worth a step of 0.25 m each.
    >>> state = {"distance_to_goal": 3.0, "position": [0, 0, 0], "rotation": [0, 0, 0, 1]}
    >>> robot = {"turn_deg": 30, "forward_m": 0.25}
    >>> to_go(dict(state, way=[[0, 0, 0], [-1, 0, 0], [-1, 0, 2]]), robot)
    4.5
    """
    yaw, turns = yaw_deg(state["rotation"]), 0.0
    for (x, _, z), (next_x, _, next_z) in itertools.pairwise(state["way"]):
        if math.hypot(next_x - x, next_z - z) < robot["forward_m"] / 2:
            continue                                       # no need to face what is underfoot
        way = math.degrees(math.atan2(x - next_x, z - next_z))
        turns, yaw = turns + abs(turn_between(yaw, way)) / robot["turn_deg"], way
    return state["distance_to_goal"] + robot["forward_m"] * round(turns, 9)


def plan_reward(before, after, plan, robot, radius):
    """What a plan is worth at a state: what it leaves less to go, and 1 for a stop that is right.

    plan: action ids, [] if malformed (which costs 1); before, after: what "try" says of where it
    starts and of where it leads. inf or nan where the world does not know a way.
    """
    if not plan:
        return -1.0
    right = plan[-1] == STOP and after["distance_to_goal"] < radius
    return to_go(before, robot) - to_go(after, robot) + right


def forms_of(plans, answers):
    """What a group's plans are like, wherever they are said -> (G, 3): their motions, their tokens,
    whether they stop; each less its mean over the group. Malformed plans have no form: 0.

    >>> forms_of([[1, 1, 0], [1], []], [[7, 8], [7, 8, 9, 10], [8, 8, 8]])
    array([[ 0.5, -1. ,  0.5],
           [-0.5,  1. , -0.5],
           [ 0. ,  0. ,  0. ]])
    """
    good = np.array([len(plan) > 0 for plan in plans])
    forms = np.array([[sum(a != STOP for a in plan), len(answer), STOP in plan]
                      for plan, answer in zip(plans, answers)], float)
    forms[good] -= forms[good].mean(axis=0) if good.any() else 0
    forms[~good] = 0
    return forms


def normal_equations(groups):
    """[(forms (G, F), rewards (G,)), ..] -> M (F, F), v (F,): the price that fits all groups best
    (least squares) solves M @ price = v. Sums over groups, hence also over ranks.

    Here a motion more earns 0.5 (and one answer in two groups does a little better than that):
    >>> first = np.array([[-1], [0], [1]]), np.array([0.5, 1.25, 1.5])
    >>> M, v = normal_equations([first, (np.array([[-1], [1]]), np.array([1.0, 2.0]))])
    >>> M, v, np.linalg.solve(M, v)
    (array([[4]]), array([2.]), array([0.5]))
    """
    return sum(form.T @ form for form, _ in groups), sum(form.T @ some for form, some in groups)


def early_end(walk, expert_actions, args):
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


ENDS = ("stop", "malformed", "actions", "turns", "no_progress", "unreachable", "invalid", "error")
SPOILT = ENDS[-3:]                    # by the world, not by the policy: neither lesson nor score


# ---------------------------------------------------------------- walking


class World:
    """Episodes, their ground truth, and simulators to walk them in."""

    def __init__(self, args, policy, split):
        source = args.episodes or EPISODES.get(policy.nav["dataset"], EPISODES["houses"])
        self.episodes = read_episodes(source, split, args.role, args.languages)
        self.truths = read_ground_truth(source, split, args.role)
        self.scenes = args.scenes or scenes_of(source)
        self.robot = choose_robot(args, args.init, policy.nav, self.episodes[0])
        check_episodes(self.episodes, self.truths, f"{source} ({split})")
        check_context(policy, [e["instruction"]["instruction_text"] for e in self.episodes],
                      self.robot)
        scenes_used(args, self.robot, self.scenes, self.episodes)
        radii = {goal.get("radius") or VLNCE_RADIUS_M for e in self.episodes for goal in e["goals"]}
        if not args.success_m and len(radii) > 1:
            raise UserError("the goals of the data have no common radius: give --success-m")
        self.radius, self.args, self.source = args.success_m or radii.pop(), args, source
        self.cpu_s, self.last_s = 0.0, [0.0] * args.sims   # of all simulators; what each told last

    def open(self):
        args = self.args
        own = ([int(os.environ.get("LOCAL_RANK", 0))] if visible_gpus() and not args.sim_command
               else None)
        self.pool = SimPool(args.sim, self.robot, self.scenes, args.sims,
                            simulator_commands(args), args.sim_timeout, args.sim_gpus or own)
        return self.pool

    def truth(self, episode):
        return self.truths[str(episode["episode_id"])]

    def walk(self, policy, named, group_size=1, temperature=1.0, tally=None):
        """Walk [(name, episode), ..] to their ends -> list of EpisodeState in that order.

        group_size: answers drawn at each turn (--groups state); the first is walked.
        """
        walks = [EpisodeState(episode, episode["instruction"]["instruction_text"], name=name)
                 for name, episode in named]
        agent = dialog_agent(policy, temperature=temperature, seed=self.args.seed,
                             group_size=group_size)
        ended = {}

        def should_stop(walk):
            return early_end(walk, len(self.truth(walk.episode)["actions"]), self.args)

        for walk in run_episodes(self.pool, walks, agent, sims=self.args.sims,
                                 max_actions=sys.maxsize, retries=self.args.retries, render="last",
                                 should_stop=should_stop,
                                 counters=Counter() if tally is None else tally):
            ended[walk.name], walk.dialog_cache = walk, None     # it is not needed any more
        return [ended[walk.name] for walk in walks]

    def preload(self, episodes, walks_each):
        """Let the simulators enter the scenes of the walks that they will be given first."""
        walks = [episode for episode in episodes for _ in range(walks_each)]
        for i in range(self.args.sims):
            self.pool.submit(i, "load", scene_id=walks[i % len(walks)]["scene_id"])

    def preloaded(self):
        """Wait for that. What went wrong will be told again by the walk, which counts."""
        for i, last in enumerate(self.last_s):
            try:
                self.last_s[i] = self.pool.wait(i)["cpu_s"]
            except (SimDied, SimError):
                continue
            self.cpu_s += self.last_s[i] - (last if self.last_s[i] >= last else 0)    # 0: a new one

    def judge_plans(self, walks, policy, tally=None):
        """--groups state: every answer drawn at every turn -> rewards, per walk (turns, G); [] if
        the world could not tell. tally counts such walks ("untried"), and deaths."""
        found, args, failed = {}, self.args, []
        tally = Counter() if tally is None else tally

        def job(walk):
            plans = [[policy.actions(answer) for answer in decision.answers]
                     for decision in walk.decisions]
            poses = [walk.states[one.t]["position"] + walk.states[one.t]["rotation"]
                     for one in walk.decisions]
            tried = [sorted({tuple(a for a in plan if a != STOP) for plan in some} | {()})
                     for some in plans]                    # (): where it stands
            for _ in range(1 + args.retries):
                reply = yield "try", {"episode": walk.episode, "poses": poses, "plans": tried}
                if not isinstance(reply, SimDied):
                    break
                tally["deaths"] += 1
            if isinstance(reply, Exception):
                return failed.append(reply)
            found[walk.name] = []
            for some, those, states in zip(plans, tried, reply["states"]):
                after = dict(zip(those, states))
                rewards = [plan_reward(after[()], after[tuple(a for a in plan if a != STOP)], plan,
                                       self.robot, self.radius) for plan in some]
                found[walk.name].append(rewards if np.isfinite(rewards).all() else [])

        run_jobs(self.pool, args.sims, (job(walk) for walk in walks
                                        if walk.decisions and walk.end not in SPOILT))
        if failed and not found:
            raise UserError(f"no simulator could try the plans of any of {len(failed)} walks; the "
                            f"first said: {failed[0]}")
        tally["untried"] += len(failed)
        return [found.get(walk.name, []) for walk in walks]


def beyond_form(walks, rewards, policy):
    """Rewards (turns, G) per walk -> the same, less what the form of a plan earns by itself in this
    batch, on all ranks together."""
    groups = [[(forms_of([policy.actions(answer) for answer in decision.answers],
                         decision.answers), np.array(some))
               if some else (np.zeros((0, 3)), np.zeros(0))
               for decision, some in zip(walk.decisions, per_turn)]
              for walk, per_turn in zip(walks, rewards)]
    M, v = normal_equations([(np.zeros((1, 3)), np.zeros(1)), *sum(groups, [])])
    sums = np.reshape(all_reduce_sum([*M.flat, *v], policy.device), (4, 3))
    price = np.linalg.lstsq(sums[:3], sums[3], rcond=None)[0]
    return [[(some - forms @ price).round(9).tolist() for forms, some in mine] for mine in groups]


def dialog_of(walk):
    """What was shown and said, as it is trained on -> Dialog with the sampled ids, its frames."""
    keys = tuple((walk.name, k) for k in range(len(walk.decisions)))
    frames = {key: decision.frame for key, decision in zip(keys, walk.decisions)}
    answers = tuple(decision.answers[0] for decision in walk.decisions)
    return Dialog(walk.instruction, keys, answers, (True,) * len(keys)), frames


# ---------------------------------------------------------------- comparing


class Lesson:
    """A walk and what it teaches: advantages of its own answers together, or of each branch."""

    def __init__(self, walk, advantages, branches=None):
        (self.dialog, self.frames), self.branches = dialog_of(walk), branches
        answers = [sum(self.dialog.answers, [])] if branches is None else [
            ids for _, ids in branches]
        self.advantages, self.lengths = advantages, [len(ids) for ids in answers]

    def size(self, policy):
        """Tokens of its row."""
        size, = policy.sizes([self.dialog], self.frames, branches=[self.branches])
        return size


def compare_walks(walks, rewards, args):
    """B * G ended walks, siblings adjacent -> lessons of the groups that differ, and how many of
    the groups do not. Groups that the world, not the policy, has spoilt count as such."""
    lessons, flat = [], 0
    for at in range(0, len(walks), args.group_size):
        group, some = walks[at:at + args.group_size], torch.tensor(rewards[at:at + args.group_size])
        spoilt = any(walk.end in SPOILT for walk in group)
        if spoilt or some.max() - some.min() < 1e-6:
            flat += 1
            continue
        advantages = group_advantages(some, args.group_size, scale_rewards=args.scale_rewards)
        lessons += [Lesson(walk, [a]) for walk, a in zip(group, advantages.tolist())]
    return lessons, flat


def compare_plans(walks, rewards, args):
    """The same for --groups state: one group for each turn of each walk."""
    lessons, flat = [], 0
    for walk, per_turn in zip(walks, rewards):
        branches, advantages = [], []
        for turn, some in enumerate(per_turn):
            some = torch.tensor(some)
            if len(some) == 0 or some.max() - some.min() < 1e-6:
                flat += 1
                continue
            branches += [(turn, ids) for ids in walk.decisions[turn].answers]
            advantages += group_advantages(some, args.group_size,
                                           scale_rewards=args.scale_rewards).tolist()
        lessons += [Lesson(walk, advantages, branches)] if branches else []
    return lessons, flat


def mute(walk, state_groups):
    """A lesson that teaches nothing, of the walk's first turn: for a forward that has no other."""
    dialog, frames = dialog_of(walk)
    lesson = Lesson(walk, [0.0], [(0, dialog.answers[0])] if state_groups else None)
    lesson.dialog = dialog._replace(frames=dialog.frames[:1], answers=dialog.answers[:1])
    lesson.frames = dict(list(frames.items())[:1])
    lesson.lengths = [len(dialog.answers[0])]
    return lesson


def collate(lessons, device):
    """-> what to ask the policy for; advantages (R,), mask (R, C): exactly the sampled ids."""
    frames = {key: frame for lesson in lessons for key, frame in lesson.frames.items()}
    branches = [lesson.branches for lesson in lessons]
    lengths = torch.tensor([n for lesson in lessons for n in lesson.lengths], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    advantages = torch.tensor([a for lesson in lessons for a in lesson.advantages], device=device)
    return ([lesson.dialog for lesson in lessons], frames,
            None if branches[0] is None else branches), advantages, mask


# ---------------------------------------------------------------- telling


def tell(walk, episode, marks, reward, advantage, step):
    """A walk for people (rollouts.jsonl). A frame is its scene and pose: it can be drawn again."""
    return {"step": step, "episode_id": episode["episode_id"], "scene_id": episode["scene_id"],
            "instruction": walk.instruction, "end": walk.end, "reward": round(reward, 4),
            "advantage": round(advantage, 4), "marks": {k: round(v, 4) for k, v in marks.items()},
            "turns": [{"t": one.t, "position": walk.states[one.t]["position"],
                       "rotation": walk.states[one.t]["rotation"], "said": one.text}
                      for one in walk.decisions]}


def summary(walks, marks, rewards):
    """Sums over a rank's walks, the keys of log.jsonl, for means()."""
    return {**{key: sum(m[key] for m in marks) for key in MARKS}, "reward": sum(rewards),
            "scored": sum(walk.end not in SPOILT for walk in walks),
            "actions": sum(len(walk.actions) for walk in walks),
            "turns": sum(len(walk.decisions) for walk in walks),
            **{f"end_{end}": sum(walk.end == end for walk in walks) for end in ENDS}}


def means(shares, others, count, device):
    """summary() of each rank -> means over all `count` walks, and others summed over the ranks. The
    world has spoilt some walks: marks and reward are means over the rest, and missing if none is
    left."""
    totals = all_reduce_sum([*shares.values(), *others.values()], device)
    sums = dict(zip(shares, totals))
    scored, judged = sums.pop("scored"), (*MARKS, "reward")
    told = {key: value / (scored if key in judged else count)
            for key, value in sums.items() if scored or key not in judged}
    return told | dict(zip(others, totals[len(shares):]))


def draw_runs(folders, out):
    """log.jsonl of several runs -> one picture: greedy success on the held-out split, and sampled
    success while learning (mean of 20 steps), over the CPU minutes spent."""
    if not out.endswith(".png"):
        raise UserError(f"--out {out}: --draw wants the name of a .png file there")
    runs = {}
    for folder in folders:
        try:
            with open(os.path.join(folder, "log.jsonl")) as f:
                runs[folder] = [json.loads(line) for line in f]
        except OSError as error:
            raise UserError(f"--draw {folder}: no run of ours is there ({error.strerror}: "
                            "log.jsonl)") from error
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharex=True)
    for axis in axes:
        axis.set_prop_cycle(color=plt.colormaps["tab20"].colors)
    for folder, rows in runs.items():
        label = os.path.basename(folder.rstrip("/"))
        points, sampled = (np.array([(r.get("minutes", 0), r[key]) for r in rows
                                     if r.get(key) is not None]).reshape(-1, 2)
                           for key in ("val/success", "success"))
        axes[0].plot(*points.T, "o-", label=label)
        width = max(1, min(20, len(sampled)))
        axes[1].plot(sampled[width - 1:, 0],
                     np.convolve(sampled[:, 1], np.ones(width) / width, "valid"), label=label)
    for axis, title in zip(axes, ("greedy, held-out episodes", "sampled, while learning")):
        axis.set(title=title, xlabel="CPU minutes", ylabel="success")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    figure.savefig(out + ".tmp", format="png", dpi=110)
    os.replace(out + ".tmp", out)
    plt.close(figure)


# ---------------------------------------------------------------- the run


def setup(args, device):
    """Policy and world, from the flags."""
    if not os.path.exists(os.path.join(args.init, "nav.json")):
        raise UserError(f"--init {args.init} is not a checkpoint of ours (it has no nav.json); "
                        f"make one with: python sft.py --prompt dialog --out {args.init}")
    if args.group_size < 2:
        raise UserError("--group-size must be 2 or more: a lone walk has no siblings to beat")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0: at 0 all siblings are the same walk")
    read_reward(args.reward)
    policy = load_policy(args.init, device=device, dtype=default_dtype(args))
    if not is_dialog(policy.nav):
        raise UserError(f"--init {args.init} speaks {policy.nav['prompt']!r}, one prompt for each "
                        "decision; here a walk is one dialog: sft.py --prompt dialog makes such")
    policy.vision.requires_grad_(not args.freeze_vision)
    policy.checkpointing = args.gradient_checkpointing
    world = World(args, policy, args.split)
    found = any(os.path.exists(f"{world.source}/{args.val_split}/{args.val_split}{end}.json.gz")
                for end in ("", "_guide"))
    return policy, world, World(args, policy, args.val_split) if found else None


def rollout(world, policy, episodes, step, args, tally):
    """Walk a rank's share of a batch -> (walks, marks, rewards), siblings adjacent.

    The rewards of --groups state are lists, (turns, G) per walk.
    """
    weights, state_groups = read_reward(args.reward), args.groups == "state"
    per_episode = 1 if state_groups else args.group_size
    groups = [None] * len(episodes)
    todo = range(len(episodes))
    for attempt in range(1 if state_groups else 1 + args.rerolls):
        tally["rerolled"] += len(todo) * (attempt > 0)
        named = [(f"{step}.{attempt}.{episodes[i]['episode_id']}.{g}", episodes[i])
                 for i in todo for g in range(per_episode)]
        walks = world.walk(policy, named, args.group_size if state_groups else 1,
                           args.temperature, tally)
        for n, i in enumerate(todo):
            groups[i] = walks[n * per_episode:(n + 1) * per_episode]
        nothing = dict.fromkeys(MARKS, 0.0)
        marks = [[nothing if walk.end in SPOILT else
                  marks_of(walk, world.radius, world.truth(walk.episode)["locations"])
                  for walk in group] for group in groups]
        todo = [i for i in todo if not any(m["success"] for m in marks[i])]
        if not todo:
            break
    walks, marks = sum(groups, []), sum(marks, [])
    if state_groups:
        return walks, marks, beyond_form(
            walks, world.judge_plans(walks, policy, tally), policy)
    return walks, marks, [sum(w * m[key] for key, w in weights.items()) for m in marks]


@torch.no_grad()
def validate(val, policy, n, rank, ranks):
    """Greedy walks of a held-out split -> the means over all ranks of the marks of those that the
    world has not spoilt, and how many those are."""
    mine = evenly_spaced(val.episodes, n)[rank::ranks]
    walks = val.walk(policy, [(f"val.{i}", episode) for i, episode in enumerate(mine)],
                     temperature=0.0)
    good = [walk for walk in walks if walk.end not in SPOILT]
    marks = [marks_of(w, val.radius, val.truth(w.episode)["locations"]) for w in good]
    sums = all_reduce_sum([len(good), *(sum(m[key] for m in marks) for key in MARKS)],
                          policy.device)
    means = {f"val/{key}": value / sums[0] for key, value in zip(MARKS, sums[1:]) if sums[0]}
    return means | {"val/scored": sums[0]}


def main(args):
    if args.draw:
        return draw_runs(args.draw, args.out)
    rank, ranks, device = init_distributed(args)
    policy, world, val = setup(args, device)
    open_run(args, RESUMABLE)

    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size} does not split into {ranks} processes")
    state_groups = args.groups == "state"
    per_rank = args.batch_size // ranks * (1 if state_groups else args.group_size)       # walks
    n = len(world.episodes)
    if n < args.batch_size:
        raise UserError(f"{world.source} has {n} episodes and a batch takes {args.batch_size}; "
                        "lower --batch-size or give more")
    steps = args.max_steps or max(1, round(args.epochs * (n // args.batch_size)))
    def batch(step):
        return [world.episodes[i] for i in batch_of(range(n), step, args.batch_size, args.seed)
                ][rank::ranks]

    engine = make_engine(policy, args)
    reference = load_reference(args, engine, device)
    first = load_state(engine, args.out)
    print_start(engine, f"{n} episodes, {steps} steps of {args.batch_size} x {args.group_size} "
                f"{'plans at each turn' if state_groups else 'walks'}", first)
    if rank == 0:
        cut_jsonl(f"{args.out}/rollouts.jsonl", first)
    spent = [row.get("minutes", 0) for row in cut_jsonl(f"{args.out}/log.jsonl", first)
             ] if rank == 0 and first else []
    log = Log(engine, args.out, first, steps, ("reward", "success", "val/success"))

    last = min(steps, args.stop_after or steps)
    walks_each = 1 if state_groups else args.group_size
    with world.open() as pool:
        if val:
            val.pool = pool
        if val and first == 0:                                 # where the SFT policy stands
            with gathered(engine):
                log(0, **validate(val, policy, args.val_episodes, rank, ranks))
        world.preload(batch(first), walks_each)
        world.preloaded()
        for step in range(first, last):
            lr = set_learning_rate(engine, step, steps, args)
            episodes, tally, began = batch(step), Counter(), time.perf_counter()

            # 1. walk, and mark what came of it
            with gathered(engine), torch.no_grad():
                walks, marks, rewards = rollout(world, policy, episodes, step, args, tally)
            walking = time.perf_counter() - began
            # while we learn; and each tells what it has used, hence also after the last step
            world.preload(batch(step + 1) if step + 1 < last else episodes, walks_each)

            # 2. compare: advantages within groups; groups that agree are gone before the backward
            lessons, flat = (compare_plans if state_groups else compare_walks)(walks, rewards, args)
            there = [walk for walk in walks if walk.decisions]
            if not there:
                raise UserError(f"no simulator could walk any of {len(walks)} walks; the first "
                                f"ended with {walks[0].error or walks[0].end}")
            spare = mute(min(there, key=lambda walk: len(walk.decisions)), state_groups)
            parts = [(collate(some or [spare], device), bool(some)) for some in micro_batches(
                lessons, lambda lesson: lesson.size(policy), args.micro_tokens, device)]
            tokens, = all_reduce_sum([sum(sum(lesson.lengths) for lesson in lessons)], device)

            # 3. learn
            if step == first:
                print_memory_estimate(engine, reference, max(policy.activations(
                    dialogs, frames, branches=branches)
                    for ((dialogs, frames, branches), *_), _ in parts))
            batches = [PlanBatch((*inputs, args.temperature), mask, advantages,
                                 mask.sum(dim=1) * counts / max(tokens, 1))   # a token, a vote
                       for (inputs, advantages, mask), counts in parts]
            update = UpdateStats()
            if tokens:
                update = policy_update(engine, batches, reference_logps(reference, batches), args)
            world.preloaded()

            # 4. tell, check, keep
            done = step + 1
            worth = [float(np.mean(sum(r, []) or 0)) for r in rewards] if state_groups else rewards
            groups = sum(map(len, rewards)) if state_groups else len(episodes)
            clock = time.process_time() + world.cpu_s
            others = update._asdict() | {
                "frac_reward_zero_std": flat, "groups": groups, "rerolled": tally["rerolled"],
                "deaths": tally["deaths"], "untried": tally["untried"], "minutes": clock / 60,
                "walking_s": walking / ranks}
            told = means(summary(walks, marks, worth), others, per_rank * ranks, device)
            told |= {"tokens": tokens, "lr": lr} | (update_metrics(engine) if tokens else {})
            told["frac_reward_zero_std"] /= max(told["groups"], 1)
            told["minutes"] += max(spent, default=0)
            if val and is_due(done, args.val_every, steps):
                with gathered(engine):
                    told.update(validate(val, policy, args.val_episodes, rank, ranks))
            log(done, pop_flop_counters(device, policy, reference), **told)
            if rank == 0 and (done == 1 or is_due(done, args.rollouts_every, steps)):
                own = args.group_size if state_groups else 1       # answers that were walked by
                shown = {lesson.dialog.frames[0][0]: float(np.mean(lesson.advantages[::own]))
                         for lesson in lessons}
                with open(f"{args.out}/rollouts.jsonl", "a") as f:
                    f.writelines(json.dumps(tell(
                        walk, walk.episode, m, r, shown.get(walk.name, 0.0), done)) + "\n"
                        for walk, m, r in zip(walks, marks, worth))
            if is_due(done, args.save_every, last):
                save_state(engine, args.out, done)
    finish_run(engine, log, args.out, "the policy for evaluate.py; see curves.png, "
               "rollouts.jsonl, tb/", PANELS)


if __name__ == "__main__":
    run(main, parse_args)
