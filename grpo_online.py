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

    R_g  = togo(before) - togo(after) - c * actions + [said stop] (d < r ? 1 - d / r : -w)
    togo = geodesic distance + one step for each turn that is needed to face the way on

c is what an action more gains in this batch, within groups: a plan's length by itself is then worth
nothing. (With a fixed c the policy soon writes the longest or the shortest plans only.)

Run it
    python grpo_online.py --init ckpt/sft_dialog                         # one process, our houses
    deepspeed grpo_online.py --init ckpt/sft_dialog                      # every GPU there is
    deepspeed grpo_online.py --init ckpt/r2r_dialog --sim habitat --sim-python PATH --sims 16

Reads    --init  a checkpoint of sft.py --prompt dialog;  --episodes  and  --scenes
Writes   --out   the run directory that engine.py describes, and for people: rollouts.jsonl (walks,
         what was said at each turn, where from, reward, end) and curves.png
Expect   success and reward slowly up, noisily; entropy down; frac_reward_zero_std is the share of
         groups that taught nothing. end_* tells how walks end: stop should come to rule. Killed?
         The same command goes on: walks are functions of (seed, step, episode, robot). As in
         evaluate.py, timing decides who is answered with whom, and with it only rounding.

Ours, as ActiveVLN's is [2]: 8 episodes x 4 walks, lr 1e-6 constant, weight decay 0.01, clip 0.2 and
0.28, no KL, at most min(2 x expert, cap) actions and 40 turns, 2 rerolls. Unlike it: temperature 1
(1.2), dead groups are dropped (kept), one mean over all tokens (per micro-batch), actions are
counted one by one (it counts merged ones, up to 120), and --patience.

[1] ActiveVLN, https://arxiv.org/abs/2509.12618      [2] https://github.com/arvillion/ActiveVLN
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter

import numpy as np
import torch

import engine as E
from episodes import (
    VLNCE_RADIUS_M,
    add_episode_args,
    check_scenes,
    read_episodes,
    read_ground_truth,
    scenes_of,
    turned,
    yaw_deg,
)
from evaluate import (
    EPISODES,
    Walk,
    check_episodes,
    choose_robot,
    dialog_agent,
    judge,
    ndtw,
    path_length,
    spread,
    walk_episodes,
)
from grpo import batch_of, draw_curves, group_advantages, grpo_loss, load_reference, masked_mean
from make_data import Dialog, drive
from model import is_dialog, load_policy, save_policy
from pool import SimDied, SimError, SimPool, addresses, gpu_list
from reward import STOP, UserError, run
from sim import add_robot_args, visible_gpus


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
        "folders (val/success over CPU minutes) into the picture --out")
    add = p.add_argument_group("simulator").add_argument
    add("--sim", choices=("house", "habitat"), default="house")
    add("--sim-python", metavar="PATH", help="interpreter that has habitat-sim; default: this one")
    add("--sim-gpus", type=gpu_list, metavar="0,1", help="spread habitat over these CUDA indices; "
        "default: a process's own")
    add("--sim-hosts", type=addresses, metavar="HOST:PORT,..",
        help="take the simulators from these `sim.py --serve`, which say where the scenes are")
    add("--sim-key", metavar="FILE", help="the key shared with them; default: $VLN_SIM_KEY")
    add("--sims", type=int, default=8, help="robots walking at once per process, a simulator each")
    add("--sim-timeout", type=float, default=120, help="seconds of silence; then it is dead")
    add("--retries", type=int, default=2, help="times a walk is begun again after its sim died")
    add("--success-m", type=float, help="r; default: goals[].radius in the data (R2R: 3.0)")
    add_robot_args(add, "the checkpoint's")
    add = p.add_argument_group("rollout").add_argument
    add("--groups", choices=("episode", "state"), default="episode", help="what is compared: whole "
        "walks of an episode, or plans at each state of one walk")
    add("--group-size", type=int, default=4, help="G, walks per episode, or plans per state")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs")
    add("--action-factor", type=float, default=2.0, help="a walk ends at so many times the actions "
        "of the expert,")
    add("--action-cap", type=int, default=240, help="or at so many, whichever is less")
    add("--turn-cap", type=int, default=40, help="or after so many answers")
    add("--patience", type=int, default=25, help="or after so many actions that brought it no "
        "nearer to the goal than it had been; 0: never")
    add("--rerolls", type=int, default=2, help="times a group without success is walked again")
    add = p.add_argument_group("objective").add_argument
    add("--reward", default="soft_success", help="of a walk: a sum such as success+0.5*progress, "
        "of " + ", ".join(MARKS))
    add("--stop-penalty", type=float, default=1.0, help="of --groups state: w, of a wrong stop")
    add("--clip-low", type=float, default=0.2, help="c, for more than one update per batch")
    add("--clip-high", type=float, default=0.28, help="c'")
    add("--kl-coef", type=float, default=0.0, help="beta, towards --init; 0 never loads it")
    add("--divide-by-spread", action=argparse.BooleanOptionalAction, default=True,
        help="advantages in standard deviations of their group")
    add("--batch-size", type=int, default=8, help="episodes per batch, over all processes")
    add("--micro-batch", type=int, default=0, help="walks per forward; 0: all of a process's")
    add("--updates-per-batch", type=int, default=1, help="1 is strictly on-policy")
    add("--freeze-vision", action="store_true", help="train the language model only")
    E.add_optimizer_args(p, lr=1e-6, schedule="constant", weight_decay=0.01)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=int, help="overrides --epochs; a step is one batch")
    add("--stop-after", type=int, help="leave after this step of the schedule (resume later)")
    add("--save-every", type=int, default=50)
    add("--val-every", type=int, default=50)
    add("--val-split", default="val_seen", help="walked greedily, if it is there")
    add("--val-episodes", type=int, default=100)
    E.add_machine_args(p)
    add = p.add_argument_group("logging").add_argument
    add("--rollouts-every", type=int, default=10, help="steps between the walks in rollouts.jsonl")
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
    marks = judge(distances, path_length(path), stopped, radius)
    return {"success": marks["success"], "soft_success": marks["success"] * (1 - d / radius),
            "progress": max(-1.0, (d0 - d) / d0) if d0 > 0 else float(stopped),
            "ndtw": ndtw(path, reference) if stopped else 0.0}


def read_reward(text):
    """--reward as {mark: weight}.

    >>> read_reward("success+0.5*progress")
    {'success': 1.0, 'progress': 0.5}
    """
    weights = {}
    for term in text.split("+"):
        found = re.fullmatch(r" *(?:([\d.]+) *\* *)?(\w+) *", term)
        if not found or found[2] not in MARKS:
            raise UserError(f"--reward {text}: {term!r} is none of {', '.join(MARKS)}, nor a "
                            "number times one of them")
        weights[found[2]] = float(found[1] or 1)
    return weights


def to_go(state, robot):
    """Metres to the goal, and a step for each turn that is needed to face the way there.

    3 m away and a quarter to the left of the way on, with turns of 30 degrees: 3 + 3 * 0.25.
    >>> state = {"distance_to_goal": 3.0, "position": [0, 0, 0], "rotation": [0, 0, 0, 1]}
    >>> robot = {"turn_deg": 30, "forward_m": 0.25}
    >>> to_go(dict(state, next=[1, 0, 0]), robot), to_go(dict(state, next=[0, 0, -1]), robot)
    (3.75, 3.0)
    """
    (x, _, z), (next_x, _, next_z) = state["position"], state["next"]
    there = math.hypot(next_x - x, next_z - z) < robot["forward_m"]
    way = math.degrees(math.atan2(x - next_x, z - next_z))
    angle = 0 if there else round(abs(turned(yaw_deg(state["rotation"]), way)) / robot["turn_deg"])
    return state["distance_to_goal"] + robot["forward_m"] * angle


def plan_reward(before, after, plan, robot, radius, stop_penalty):
    """What a plan is worth at a state: metres gained, and whether its stop is right.

    plan: action ids, [] if malformed (as bad as a wrong stop); before, after: what "try" says of
    where it starts and of where it leads.
    """
    gained = to_go(before, robot) - to_go(after, robot)
    if plan and plan[-1] != STOP:
        return gained
    d = after["distance_to_goal"]
    return gained + (1 - d / radius if plan and d < radius else -stop_penalty)


def price_of(groups):
    """What one action more gains within groups: the slope of the least squares line through
    [(actions, reward), ..] of each group, all shifted to their group's mean; 0 if none differ.

    >>> price_of([[(1, 2.0), (3, 3.0)], [(2, 7.0), (4, 8.0)], [(5, 1.0)]])
    0.5
    """
    shifted = [np.array(group) - np.mean(group, axis=0) for group in groups if group]
    n, worth = np.concatenate(shifted or [np.zeros((1, 2))]).T
    return float(n @ worth / (n @ n)) if n.any() else 0.0


def early_end(walk, expert_actions, args):
    """Why a walk that has not stopped is over, or None: the dynamic early stopping of [1]."""
    if len(walk.actions) >= min(args.action_factor * expert_actions, args.action_cap):
        return "actions"
    if len(walk.turns) >= args.turn_cap:
        return "turns"
    distances = [state["distance_to_goal"] for state in walk.states]
    if 0 < args.patience <= len(distances) - 1 - int(np.argmin(distances)):
        return "no_progress"
    return None


ENDS = ("stop", "malformed", "actions", "turns", "no_progress", "unreachable", "error")


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
        if not args.sim_hosts:                             # else its server is asked, in open()
            check_scenes(self.episodes, self.scenes)
        radii = {goal.get("radius") or VLNCE_RADIUS_M for e in self.episodes for goal in e["goals"]}
        if not args.success_m and len(radii) > 1:
            raise UserError("the goals of the data have no common radius: give --success-m")
        self.radius, self.args, self.source = args.success_m or radii.pop(), args, source
        self.cpu_s = [0.0] * args.sims                     # of each simulator, as it told us last

    def open(self):
        args = self.args
        own = [int(os.environ["LOCAL_RANK"])] if visible_gpus() and not args.sim_hosts else None
        self.pool = SimPool(args.sim, self.robot, self.scenes, args.sims, args.sim_python,
                            args.sim_timeout, args.sim_gpus or own, args.sim_hosts, args.sim_key)
        if args.sim_hosts:
            self.pool.require({episode["scene_id"] for episode in self.episodes})
        return self.pool

    def truth(self, episode):
        return self.truths[str(episode["episode_id"])]

    def walk(self, policy, named, group_size=1, temperature=1.0, tally=None):
        """Walk [(name, episode), ..] to their ends -> list of Walk in that order.

        group_size: answers drawn at each turn (--groups state); the first is walked.
        """
        walks = [Walk(episode, episode["instruction"]["instruction_text"], name=name)
                 for name, episode in named]
        decide = dialog_agent(policy, temperature=temperature, seed=self.args.seed,
                              group_size=group_size)
        ended = {}
        for walk in walk_episodes(
                self.pool, self.args.sims, walks, decide, sys.maxsize, self.args.retries, "last",
                tally, lambda walk: early_end(walk, len(self.truth(walk.episode)["actions"]),
                                              self.args)):
            ended[walk.name], walk.thread = walk, None     # its cache is not needed any more
        return [ended[walk.name] for walk in walks]

    def preload(self, episodes):
        """Let the simulators enter the scenes of the walks that they will be given first."""
        for i, episode in enumerate(episodes[:self.args.sims]):
            self.pool.submit(i, "load", scene_id=episode["scene_id"])

    def preloaded(self, episodes):
        """Wait for that. What went wrong will be told again by the walk, which counts."""
        for i in range(min(len(episodes), self.args.sims)):
            try:
                self.cpu_s[i] = self.pool.wait(i)["cpu_s"]
            except (SimDied, SimError):
                pass

    def judge_plans(self, walks, policy):
        """--groups state: every answer drawn at every turn -> rewards, per walk (turns, G)."""
        found, args = {}, self.args

        def job(walk):
            plans = [[policy.actions(answer) for answer in answers] for _, answers in walk.turns]
            poses = [walk.states[t]["position"] + walk.states[t]["rotation"]
                     for t, _, _ in walk.answers]
            tried = [sorted({tuple(a for a in plan if a != STOP) for plan in some} | {()})
                     for some in plans]                    # (): where it stands
            for _ in range(1 + args.retries):
                reply = yield "try", {"episode": walk.episode, "poses": poses, "plans": tried}
                if not isinstance(reply, SimDied):
                    break
            if isinstance(reply, Exception):
                raise reply
            found[walk.name] = []
            for some, those, states in zip(plans, tried, reply["states"]):
                after = dict(zip(those, states))
                found[walk.name].append([(plan, plan_reward(
                    after[()], after[tuple(a for a in plan if a != STOP)], plan, self.robot,
                    self.radius, args.stop_penalty)) for plan in some])

        drive(self.pool, args.sims, (job(walk) for walk in walks if walk.turns))
        price = price_of([[(len(plan), worth) for plan, worth in group if plan and STOP not in plan]
                          for turns in found.values() for group in turns])
        return [[[worth - price * sum(action != STOP for action in plan) for plan, worth in group]
                 for group in found.get(walk.name, [])] for walk in walks]


def dialog_of(walk):
    """What was shown and said, as it is trained on -> Dialog with the sampled ids, its frames."""
    keys = tuple((walk.name, k) for k in range(len(walk.turns)))
    frames = {key: frame for key, (frame, _) in zip(keys, walk.turns)}
    answers = tuple(answers[0] for _, answers in walk.turns)
    return Dialog(walk.instruction, keys, answers, (True,) * len(keys)), frames


# ---------------------------------------------------------------- comparing


class Lesson:
    """A walk and what it teaches: advantages of its own answers together, or of each branch."""

    def __init__(self, walk, advantages, branches=None):
        (self.dialog, self.frames), self.branches = dialog_of(walk), branches
        answers = [sum(self.dialog.answers, [])] if branches is None else [
            ids for _, ids in branches]
        self.advantages, self.lengths = advantages, [len(ids) for ids in answers]


def compare_walks(walks, rewards, args):
    """B * G ended walks, siblings adjacent -> lessons of the groups that differ, and how many of
    the groups do not. Groups that the world, not the policy, has spoilt count as such."""
    lessons, flat = [], 0
    for at in range(0, len(walks), args.group_size):
        group, some = walks[at:at + args.group_size], torch.tensor(rewards[at:at + args.group_size])
        spoilt = any(walk.end in ("error", "unreachable") for walk in group)
        if spoilt or some.max() - some.min() < 1e-6:
            flat += 1
            continue
        advantages = group_advantages(some, args.group_size, spread=args.divide_by_spread)
        lessons += [Lesson(walk, [a]) for walk, a in zip(group, advantages.tolist())]
    return lessons, flat


def compare_plans(walks, rewards, args):
    """The same for --groups state: one group for each turn of each walk."""
    lessons, flat = [], 0
    for walk, per_turn in zip(walks, rewards):
        branches, advantages = [], []
        for turn, some in enumerate(per_turn):
            some = torch.tensor(some)
            if some.max() - some.min() < 1e-6:
                flat += 1
                continue
            branches += [(turn, ids) for ids in walk.turns[turn][1]]
            advantages += group_advantages(some, args.group_size,
                                           spread=args.divide_by_spread).tolist()
        lessons += [Lesson(walk, advantages, branches)] if branches else []
    return lessons, flat


def share_out(lessons, spare, parts):
    """Lessons -> `parts` lists of about equal length; a part without one gets `spare`, whose
    advantages are 0. Every rank makes as many forwards, whatever its walks were like: under ZeRO
    each is a collective, and the others would wait."""
    lessons = sorted(lessons, key=lambda lesson: -sum(map(len, lesson.dialog.answers)))
    return [lessons[i::parts] or [spare] for i in range(parts)]


def mute(walk, state_groups):
    """A lesson that teaches nothing, of the walk's first turn."""
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
            "turns": [{"t": t, "position": walk.states[t]["position"],
                       "rotation": walk.states[t]["rotation"], "said": text}
                      for t, text, _ in walk.answers]}


def cut_lines(path, step):
    """On resume, drop the lines that are younger than the state. -> the rows that stay"""
    rows = []
    if os.path.exists(path):
        with open(path) as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
        rows = [row for row in rows if row["step"] <= step]
        with open(path + ".tmp", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(path + ".tmp", path)
    return rows


def summary(walks, marks, rewards):
    """Sums over walks, the keys of log.jsonl; the caller divides by the walks of all ranks."""
    return {**{key: sum(m[key] for m in marks) for key in MARKS}, "reward": sum(rewards),
            "actions": sum(len(walk.actions) for walk in walks),
            "turns": sum(len(walk.turns) for walk in walks),
            **{f"end_{end}": sum(walk.end == end for walk in walks) for end in ENDS}}


def draw_runs(folders, out):
    """log.jsonl of several runs -> one picture: greedy success on the held-out split, and sampled
    success while learning (mean of 20 steps), over the CPU minutes spent."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharex=True)
    for folder in folders:
        with open(os.path.join(folder, "log.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        label = os.path.basename(folder.rstrip("/"))
        points = [(r.get("minutes", 0), r["val/success"]) for r in rows if "val/success" in r]
        axes[0].plot(*zip(*points), "o-", label=label)
        sampled = np.array([(r["minutes"], r["success"]) for r in rows if "success" in r])
        width = min(20, len(sampled))
        axes[1].plot(sampled[width - 1:, 0],
                     np.convolve(sampled[:, 1], np.ones(width) / width, "valid"), label=label)
    for axis, title in zip(axes, ("greedy, held-out episodes", "sampled, while learning")):
        axis.set(title=title, xlabel="CPU minutes", ylabel="success")
        axis.legend(fontsize=8)
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
    policy = load_policy(args.init, device=device, dtype=E.default_dtype(args))
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
        marks = [[nothing if walk.end in ("error", "unreachable") else
                  marks_of(walk, world.radius, world.truth(walk.episode)["locations"])
                  for walk in group] for group in groups]
        todo = [i for i in todo if not any(m["success"] for m in marks[i])]
        if not todo:
            break
    walks, marks = sum(groups, []), sum(marks, [])
    if state_groups:
        return walks, marks, world.judge_plans(walks, policy)
    return walks, marks, [sum(w * m[key] for key, w in weights.items()) for m in marks]


@torch.no_grad()
def validate(val, policy, n, rank, ranks):
    """Greedy walks of a held-out split -> the means of their marks over all ranks."""
    mine = spread(val.episodes, n)[rank::ranks]
    walks = val.walk(policy, [(f"val.{i}", episode) for i, episode in enumerate(mine)],
                     temperature=0.0)
    good = [walk for walk in walks if walk.end not in ("error", "unreachable")]
    marks = [marks_of(w, val.radius, val.truth(w.episode)["locations"]) for w in good]
    sums = E.total([len(good)] + [sum(m[key] for m in marks) for key in MARKS], policy.device)
    return {f"val/{key}": value / max(sums[0], 1) for key, value in zip(MARKS, sums[1:])}


def learn(engine, reference, parts, lessons, tokens, ranks, args):
    """The updates of one batch -> loss, kl, clip_frac, entropy: this rank's parts of the means over
    all `tokens`. parts: from collate, of which only as many as there are lessons count."""
    with torch.no_grad():
        ref_logps = [reference(*asked, args.temperature) if reference else None
                     for asked, _, _ in parts]
    old_logps, sums = [], np.zeros(4)
    for update in range(args.updates_per_batch if tokens else 0):
        for i, (asked, advantages, mask) in enumerate(parts):
            logps = engine(*asked, args.temperature)
            if update == 0:                      # no weight has moved since these were sampled
                old_logps.append(logps.detach())
            loss, stats = grpo_loss(logps, old_logps[i], ref_logps[i], advantages, mask,
                                    args.clip_low, args.kl_coef, args.clip_high)
            votes = mask.sum(dim=1) * (lessons > i) / tokens                  # one token, one vote
            loss = (loss * votes).sum()
            engine.backward(loss * ranks * len(parts))             # DeepSpeed averages over both
            engine.step()
            sums += [loss.item(), *((x * votes).sum().item() for x in (
                stats["kl"], stats["clip_frac"], -masked_mean(logps, mask)))]
    return sums / args.updates_per_batch


def main(args):
    if args.draw:
        return draw_runs(args.draw, args.out)
    rank, ranks, device = E.start(args)
    policy, world, val = setup(args, device)
    E.open_run(args, rank)

    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size} does not split into {ranks} processes")
    state_groups = args.groups == "state"
    per_rank = args.batch_size // ranks * (1 if state_groups else args.group_size)       # walks
    micro_steps = math.ceil(per_rank / (args.micro_batch or per_rank))
    n = len(world.episodes)
    if n < args.batch_size:
        raise UserError(f"{world.source} has {n} episodes and a batch takes {args.batch_size}; "
                        "lower --batch-size or give more")
    steps = args.max_steps or max(1, round(args.epochs * (n // args.batch_size)))
    def batch(step):
        return [world.episodes[i] for i in batch_of(range(n), step, args.batch_size, args.seed)
                ][rank::ranks]

    weights = sum(p.numel() for p in policy.parameters())          # ZeRO-3 will shard them away
    engine = E.make_engine(policy, args, micro_steps)
    reference = load_reference(args, engine, device)
    first = E.load_state(engine, args.out)
    if rank == 0:
        print(f"{n} episodes, {steps} steps of {args.batch_size} x {args.group_size} "
              f"{'plans at each turn' if state_groups else 'walks'}, {weights:,} weights on "
              f"{ranks} x {device}" + (f"; resuming at step {first}" if first else ""))
        cut_lines(f"{args.out}/rollouts.jsonl", first)
    spent = [row.get("minutes", 0) for row in cut_lines(f"{args.out}/log.jsonl", first)
             ] if rank == 0 and first else []
    log = E.Log(args.out, rank, first, steps, ("reward", "success", "val/success"))

    last = min(steps, args.stop_after or steps)
    with world.open() as pool:
        if val:
            val.pool = pool
        if val and first == 0:                                 # where the SFT policy stands
            with E.gathered(engine):
                log(0, **validate(val, policy, args.val_episodes, rank, ranks))
        world.preload(batch(first))
        for step in range(first, last):
            lr = E.learning_rate(step, steps, args.lr, args.warmup, args.schedule)
            E.set_learning_rate(engine, lr)
            episodes, tally, began = batch(step), Counter(), time.perf_counter()
            world.preloaded(episodes)

            # 1. walk, and mark what came of it
            with E.gathered(engine), torch.no_grad():
                walks, marks, rewards = rollout(world, policy, episodes, step, args, tally)
            walking = time.perf_counter() - began
            if step + 1 < last:
                world.preload(batch(step + 1))                 # while we learn

            # 2. compare: advantages within groups; groups that agree are gone before the backward
            lessons, flat = (compare_plans if state_groups else compare_walks)(walks, rewards, args)
            there = [walk for walk in walks if walk.turns]
            if not there:
                raise UserError(f"no simulator could walk any of {len(walks)} walks; the first "
                                f"ended with {walks[0].error or walks[0].end}")
            parts = [collate(part, device) for part in share_out(
                lessons, mute(min(there, key=lambda walk: len(walk.turns)), state_groups),
                micro_steps)]
            tokens, = E.total([sum(sum(lesson.lengths) for lesson in lessons)], device)

            # 3. learn
            sums = learn(engine, reference, parts, len(lessons), tokens, ranks, args)

            # 4. tell, check, keep
            done, count = step + 1, per_rank * ranks
            worth = [float(np.mean(r)) if state_groups and r else r or 0.0 for r in rewards]
            groups = sum(map(len, rewards)) if state_groups else len(episodes)
            clock = time.process_time() + sum(world.cpu_s)
            shares = summary(walks, marks, worth)
            others = dict(zip(("loss", "kl", "clip_frac", "entropy"), sums)) | {
                "frac_reward_zero_std": flat, "groups": groups, "rerolled": tally["rerolled"],
                "deaths": tally["deaths"], "minutes": clock / 60, "walking_s": walking / ranks}
            totals = E.total([*shares.values(), *others.values()], device)
            told = {key: value / count for key, value in zip(shares, totals)}
            told |= dict(zip(others, totals[len(shares):])) | {"tokens": tokens, "lr": lr}
            told["frac_reward_zero_std"] /= max(told["groups"], 1)
            told["minutes"] += max(spent, default=0)
            if val and (done % args.val_every == 0 or done == steps):
                if done < last:
                    world.preloaded(batch(done))
                with E.gathered(engine):
                    told.update(validate(val, policy, args.val_episodes, rank, ranks))
                if done < last:
                    world.preload(batch(done))
            log(done, **told)
            if rank == 0 and (done == 1 or done % args.rollouts_every == 0 or done == steps):
                shown = {lesson.dialog.frames[0][0]: float(np.mean(lesson.advantages))
                         for lesson in lessons}
                with open(f"{args.out}/rollouts.jsonl", "a") as f:
                    f.writelines(json.dumps(tell(
                        walk, walk.episode, m, r, shown.get(walk.name, 0.0), done)) + "\n"
                        for walk, m, r in zip(walks, marks, worth))
            if done % args.save_every == 0 or done == last:
                E.save_state(engine, args.out, done)
    log.close()
    weights = E.consolidated(engine)
    if rank == 0:
        save_policy(policy, args.out, weights)
        draw_curves(args.out, (("success", "val/success"), ("reward",), ("frac_reward_zero_std",),
                               ("entropy",)))
        print(f"wrote {args.out} (the policy for evaluate.py; see curves.png, rollouts.jsonl, tb/)")
    E.leave_together()


if __name__ == "__main__":
    run(main, parse_args)
