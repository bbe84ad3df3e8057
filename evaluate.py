"""
Closed-loop evaluation: let the policy walk, and measure how well it followed the words.

Each robot stands in a simulator of its own. It looks, the policy writes its next six actions, it
carries out the first --execute of them and looks again, until it says stop or has used up its 500
steps. All robots that stand waiting are answered in one batch while the others walk on. A policy
of dialogs (sft.py --prompt dialog) carries out all that it answers; what it has read and said
stays in its robot's cache, and robots at different turns are answered together.

What is measured, exactly as VLN-CE does [1, 2]; d is the geodesic distance to the goal:
    NE    distance_to_goal   d at the last pose, metres
    TL    path_length        sum of the Euclidean steps, metres
    SR    success            STOP was called, by a readable answer, and d < radius, strictly
    OS    oracle_success     d < radius at any pose, the start included; no STOP needed
    SPL   spl                success * L / max(L, TL), where L is d at the start
    nDTW  ndtw               exp(-DTW(walked, ground truth) / (3 m * points of ground truth)) [3]
    SDTW  sdtw               success * ndtw
An episode whose start has no finite distance to the goal is "unreachable", one whose start or goal
the simulator refuses is "invalid", and a simulator that fails is an "error", which the same command
tries again. All are counted apart, and every episode asked for must have its row. A walk that began
at a finite distance and ended where no way is known has failed: SR, OS and SPL count it, NE cannot.
Without ground truth (the plain R2R_VLNCE_v1-3) there is no nDTW and no SDTW. Where a test split
hides its goals there are no scores, but --submit writes the walks for its server [1, 4].
95% intervals are Wilson's for rates (right at 0 and 1, too) and a bootstrap over scenes for means:
walks in one scene are not independent, and no interval here takes them as such.

Run it
    python evaluate.py --split val_unseen                       # ckpt/grpo if there, else ckpt/sft
    python evaluate.py --split val_unseen --agent oracle        # the expert; or random|forward|stop
    python evaluate.py --split val_unseen --blank-frames        # does it look?
    python evaluate.py --split val_unseen --shuffle-instructions    # does it read?
    torchrun --nproc_per_node 8 evaluate.py --split val_unseen --ckpt ckpt/r2r --sim habitat
    python evaluate.py --split test --ckpt ckpt/r2r --sim habitat --submit r2r_test.json
    python evaluate.py --split test_challenge --ckpt ckpt/rxr --sim habitat --submit rxr.jsonl

Reads    --ckpt  weights and nav.json, the contract to act by;  --episodes  and  --scenes
Writes   --out   run.json         what is measured; a run with other settings is refused
                 episodes.jsonl   one line per episode as it ends, sorted once all have ended
                 results.json     means and intervals (timing.json: how long it took)
                 pictures/        per chosen episode a sheet (.png) and a film (.gif)
                 Two or more such folders: python -m tools.report
         --submit the walks of all episodes, as R2R's or RxR's leaderboard wants them
Expect   oracle near 1, stop and forward near 0, a policy between. Killed? The same command goes on,
         and ends with the same files, to the byte for --agent on one set-up (machine, simulator,
         library versions). With --ckpt, timing decides which robots are answered in one batch,
         and so how sums round (on a GPU they may round differently each time): two plans that
         are equally likely within rounding may swap.

[1] https://github.com/jacobkrantz/VLN-CE habitat_extensions/measures.py
[2] habitat-lab 0.1.7, habitat/tasks/nav/nav.py             [3] https://arxiv.org/abs/1907.05446
[4] ibid. vlnce_baselines/common/base_il_trainer.py (inference) and environments.py (get_info)
[5] Dean & Pagano 2015, Evaluating Confidence Interval Methods for Binomial Proportions in Clustered
    Surveys, Journal of Survey Statistics and Methodology 3(4)
"""
from __future__ import annotations

import argparse
import functools
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from importlib import metadata

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from cli import Help, UserError, count, lock_folder, run, write_json, write_text
from lsm import pick_frames
from reward import FORWARD, LEFT, RIGHT, STOP, parse_control
from world import SimDied, SimError
from world.episodes import (
    LANGUAGES,
    VLNCE_RADIUS_M,
    add_episode_args,
    check_turn_deg,
    dataset_of,
    no_ground_truth,
    paired,
    read_episodes,
    read_ground_truth,
    scenes_of,
)
from world.pool import SimPool, scenes_used
from world.robots import (
    ROBOTS,
    add_robot_args,
    add_simulator_args,
    robot_from_args,
    simulator_commands,
    visible_gpus,
    yaw_of,
)

ANSWER_TOKENS = 64                      # room that check_context() leaves for an answer

EPISODES = {"houses": "data/houses", "r2r": "data/datasets/R2R_VLNCE_v1-3_preprocessed",
            "rxr": "data/datasets/RxR_VLNCE_v0"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--split", default="val_unseen")
    add_episode_args(add)
    add("--ckpt", help="checkpoint folder; default: ckpt/grpo if it is there, else ckpt/sft")
    add("--episodes", help="folder with <split>/<split>.json.gz and its _gt; default: that of the "
        "data set which the checkpoint names, " + EPISODES["houses"] + " for ours")
    add("--scenes", help="what scene_id is below; default: <episodes>/scenes if it is there, else "
        "data/scene_datasets")
    add("--out", help="default: results/<checkpoint or agent>_<split>")
    add("--submit", metavar="FILE", help="write the walks for the leaderboard: JSON in R2R's form, "
        "JSON lines in RxR's")

    add = p.add_argument_group("simulator").add_argument
    add_simulator_args(add, sims=8)
    add("--witness", action="store_true", help="let habitat-lab walk and judge the same actions, "
        "and refuse a difference above 1e-4; needs --sim habitat")
    add_robot_args(add, "the checkpoint's, and the data set's for a baseline")

    add = p.add_argument_group("objective: who walks, how, and what counts").add_argument
    add("--agent", choices=("policy", "oracle", "random", "forward", "stop"), default="policy")
    add("--execute", type=count, default=3, help="actions of a plan that are walked before the "
        "next (VLN-R1 does not say how many); ours: half, between fresh eyes and speed. Answers "
        "of a dialog are always walked whole")
    add("--malformed", choices=("stop", "forward"), default="stop",
        help="what an unreadable answer makes the robot do; never a random action")
    add("--temperature", type=float, default=0.0,
        help="0: greedy; above: sampled, from seeds that belong to episode and step")
    add("--max-steps", type=count, default=500, help="VLN-CE's; STOP is a step")
    add("--success-m", type=float, help="radius; default: goals[].radius in the data (R2R: 3.0), "
        "3 if it has none. 3 m (or 1 m, if it is 3) is reported beside it")
    add("--forward-steps", type=int, help="of --agent forward; default: the ground truth's mean")
    add("--blank-frames", action="store_true", help="black pictures: does the policy look?")
    add("--shuffle-instructions", action="store_true", help="the words of another "
        "walk, in the same scene where one leads to another goal: does it read?")

    add = p.add_argument_group("schedule").add_argument
    add("--limit", type=count, help="so many episodes, spread evenly over the split")
    add = p.add_argument_group("machine").add_argument
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, else float32")
    add("--threads", type=count, default=1, help="CPU threads per process")
    add("--seed", type=int, default=0)
    add("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    add = p.add_argument_group("logging").add_argument
    add("--pictures", type=how_many, default="none", help="of so many episodes, evenly spread: "
        "none, all, or a number")
    return p.parse_args(argv)


def how_many(text):
    return int({"none": 0, "all": sys.maxsize}.get(text, text))


# ---------------------------------------------------------------- metrics


def path_length(path):
    """TL: sum of Euclidean steps, metres. path (T, 3).

    >>> path_length([[0, 0, 0], [3, 0, 4], [3, 0, 4], [3, 1, 4]])
    6.0
    """
    return float(np.linalg.norm(np.diff(np.asarray(path, dtype=float), axis=0), axis=1).sum())


def is_finite(metres):
    """Is a distance known? Simulators say inf, NaN or None where no way leads to the goal."""
    return metres is not None and math.isfinite(metres)


def judge(distances, length, stopped, radius):
    """SR, OS and SPL. distances: geodesic to the goal at each pose, the start first and finite;
    length: TL. A walk that ends where no way is known has failed; it may have been near before.

    Start 4 m away, walk 5 m, past a point 0.5 m from the goal, and stop 2 m from it:
    >>> judge([4.0, 0.5, 2.0], 5.0, stopped=True, radius=3.0)
    {'success': 1.0, 'oracle_success': 1.0, 'spl': 0.8}
    >>> judge([4.0, 0.5, 2.0], 5.0, stopped=True, radius=2.0)            # strictly less
    {'success': 0.0, 'oracle_success': 1.0, 'spl': 0.0}
    >>> judge([4.0, 0.5, 2.0], 5.0, stopped=False, radius=3.0)           # never said stop
    {'success': 0.0, 'oracle_success': 1.0, 'spl': 0.0}
    >>> judge([4.0, 0.5, math.inf], 5.0, stopped=True, radius=3.0)       # off the known floor
    {'success': 0.0, 'oracle_success': 1.0, 'spl': 0.0}
    """
    success = float(stopped and is_finite(distances[-1]) and distances[-1] < radius)
    longer = max(distances[0], length)
    return {"success": success, "oracle_success": float(min(filter(is_finite, distances)) < radius),
            "spl": success * distances[0] / longer if longer > 0 else success}


def dtw(a, b):
    """Dynamic time warping: the cheapest monotone pairing of two paths, a (n, 3), b (m, 3), metres.

    Exact. VLN-CE approximates it (fastdtw), never from below: its nDTW may be a trifle lower.
    Each point of a on its twin, the last one on b's last two: 0 + 0 + 0 + 2.
    >>> dtw([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]])
    2.0
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    best = [0.0] + [math.inf] * len(b)                   # best[j]: a so far against b[:j]
    for costs in np.linalg.norm(a[:, None] - b[None], axis=2).tolist():
        row = [math.inf]
        for j, cost in enumerate(costs):
            row.append(cost + min(row[j], best[j], best[j + 1]))
        best = row
    return best[-1]


def ndtw(path, reference, success_distance=3.0):
    """exp(-DTW / (points of the reference * success_distance)) [3]. A pose that did not move adds
    no point to the path.

    One metre beside a reference of two points: exp(-2 / 6).
    >>> reference = [[0, 0, 0], [2, 0, 0]]
    >>> round(ndtw([[0, 0, 1], [0, 0, 1], [2, 0, 1]], reference), 4), ndtw(reference, reference)
    (0.7165, 1.0)
    """
    moved = [p for t, p in enumerate(path) if t == 0 or list(p) != list(path[t - 1])]
    return math.exp(-dtw(moved, reference) / (len(reference) * success_distance))


MIN_SCENES = 5       # fewer say too little about how much scenes differ: see cluster_bootstrap()


def wilson(hits, trials, z=1.959964):
    """Wilson's 95% score interval of a rate -> [low, high]; of any number of trials, also of an
    effective one that is not whole. None without trials.

    Unlike a bootstrap it is right where something never or always happened. By hand: 0 of 200 is
    [0, z^2 / (200 + z^2)]; 5 of 10 is .5 -+ z sqrt(.025 + z^2 / 400) / (1 + z^2 / 10).
    >>> wilson(0, 200), wilson(5, 10)
    ([0.0, 0.018845], [0.236593, 0.763407])
    """
    if not trials:
        return None
    rate, spare = min(1.0, hits / trials), z * z / trials      # 1 but for rounding
    centre = (rate + spare / 2) / (1 + spare)
    half = z * math.sqrt(rate * (1 - rate) / trials + spare / trials / 4) / (1 + spare)
    return [round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)]


def design_effect(hits, trials, units):
    """By what factor the variance of a rate exceeds that of independent trials, because trials of
    one unit (a scene) resemble each other; at least 1. hits, trials (n,) numbers, units (n,) names.

    Four scenes of ten episodes that all succeed and four where all fail are worth 7 trials, not 80.
    >>> round(design_effect([10] * 4 + [0] * 4, [10] * 8, range(8)), 3)
    11.429
    """
    group = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    hits, trials = np.bincount(group, hits), np.bincount(group, trials)
    n, rate = trials.sum(), hits.sum() / max(trials.sum(), 1)
    if len(hits) < MIN_SCENES or not 0 < rate < 1:
        return 1.0
    variance = ((hits - rate * trials) ** 2).sum() / n ** 2 * len(hits) / (len(hits) - 1)
    return max(1.0, float(variance / (rate * (1 - rate) / n)))


def rate_interval(hits, trials, units):
    """Wilson's interval with the effective number of trials [5]: trials / design_effect()."""
    n = sum(trials) / design_effect(hits, trials, units)
    return wilson(n * sum(hits) / sum(trials), n) if sum(trials) else None


def sampling_units(rows):
    """What is drawn again to get an interval -> a name per row, and what those are: "scenes", or
    "trajectories" where fewer than MIN_SCENES scenes are there: the interval then holds for these
    scenes only. (Resampling one scene would always draw the same, an interval of no width.)"""
    scenes = [str(row.get("scene_id")) for row in rows]
    if len(set(scenes)) >= MIN_SCENES:
        return scenes, "scenes"
    names = [row.get("trajectory_id", row["episode_id"]) for row in rows]
    return [f"{scene} {name}" for scene, name in zip(scenes, names)], "trajectories"


def cluster_bootstrap(columns, units, resamples=2000, seed=0):
    """{name: values (n,)} -> {name: {"mean", "ci": [2.5%, 97.5%]}}, percentile bootstrap of means.

    Whole units are drawn, n names of what each value belongs to: episodes of one scene, and the
    three instructions of one R2R trajectory, resemble each other, so that drawing episodes would
    promise more than the data hold. Columns are resampled together. A value of None is left out.
    Where all units are alike the interval would have no width, and is None: what was never seen to
    differ may differ.
    >>> cluster_bootstrap({"spl": [0, 1, None], "ne": [2.0] * 3, "x": [None] * 3}, ["a", "b", "b"])
    {'spl': {'mean': 0.5, 'ci': [0.0, 1.0]}, 'ne': {'mean': 2.0, 'ci': None}, 'x': {'mean': None, \
'ci': None}}
    """
    values = np.array([list(column) for column in columns.values()], dtype=float)     # None: nan
    found = {name: {"mean": None, "ci": None} for name in columns}
    if not values.size:
        return found
    group = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    sums, counts = (np.array([np.bincount(group, row) for row in table]).T  # (units, columns)
                    for table in (np.nan_to_num(values), np.isfinite(values)))
    rng, means = np.random.default_rng(seed), []
    for size in [200] * (resamples // 200) + [resamples % 200]:         # 200 at a time: memory
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size).astype(float)
        with np.errstate(invalid="ignore"):               # 0 / 0: none of the units has a value
            means.append(drawn @ sums / (drawn @ counts))
    for name, total, n, column in zip(columns, sums.sum(0), counts.sum(0), np.vstack(means).T):
        if n:
            low, high = np.nanpercentile(column, [2.5, 97.5]).round(6).tolist()
            found[name] = {"mean": round(float(total / n), 6),
                           "ci": [low, high] if low < high else None}
    return found


# ---------------------------------------------------------------- one walk, and the loop


class Walk:
    """One episode under way: where the robot was, what it saw, said and did."""

    def __init__(self, episode, instruction, filmed=False, name=None):
        self.episode, self.instruction, self.filmed = episode, instruction, filmed
        self.name = name or str(episode["episode_id"])      # its own among all that are walked
        self.states = []        # the simulator's, one per pose, the start first
        self.frames = []        # uint8 (H, W, 3) views that the policy has not encoded yet
        self.film = []          # all views, if filmed
        self.features = []      # one (tokens, hidden) tensor per encoded view
        self.actions = []       # carried out so far, STOP included
        self.answers = []       # (t, text, plan) per decision
        self.tokens = 0         # read and written by the policy
        self.turns = []         # of a dialog: (frame, [ids of each answer drawn]) per decision
        self.thread = None      # of a dialog: what the policy remembers of it (model.Thread)
        self.end = self.error = self.map = None
        self.refused = None     # what the simulator said when it did not take the episode

    def again(self):
        """The same walk before its first step: its simulator died."""
        return Walk(self.episode, self.instruction, self.filmed, self.name)

    def see(self, reply):
        """A simulator's answer to "reset" or "step": new poses, and views if asked for."""
        self.states += reply["states"] if "states" in reply else [reply["state"]]
        views = [reply["frame"]] if "frame" in reply else list(reply.get("frames", ()))
        self.frames += views
        self.film += views if self.filmed else []


def walk_episodes(pool, sims, walks, decide, max_steps=500, retries=2, look=True, clock=None,
                  early=lambda walk: None, ready=0.5):
    """Let every walk of the iterable `walks` end, `sims` at a time; yield each as it ends.

    One loop for every agent. A robot is in its simulator, where a request is under way, or it is
    `waiting` to be told what to do. decide(walks) -> a plan (list of actions) for each; None for a
    plan means: ask the simulator's expert. It is called when all robots wait, or the share `ready`
    of them have waited for the others half as long as the last decision took: one decision for all
    is cheaper than two, but while one half is told what to do, the other can simulate. walk.end:
    "stop" (the robot said so), "malformed" (an unreadable answer was taken for stop), "max_steps",
    "unreachable", "invalid" (the simulator refuses its start or its goal) or "error", or whatever
    early(walk) says, if not None, when it is about to be asked. The episode of a simulator that
    died begins again from its start. look: "last" asks for the view after a plan's last step only.
    clock counts the seconds of deciding, and deaths.
    """
    todo, under_way, waiting, ended, deaths = deque(walks), {}, [], [], Counter()
    clock, last_s = Counter() if clock is None else clock, 0.0

    def begin(sim, walk):
        under_way[sim] = walk
        pool.submit(sim, "reset", episode=walk.episode, frame=look or walk.filmed)

    def act(sim, plan):
        walk = under_way[sim]
        plan = plan[:plan.index(STOP) + 1] if STOP in plan else plan
        plan = plan[:max_steps - len(walk.actions)]
        walk.actions += plan
        moves = [action for action in plan if action != STOP]
        if moves:
            pool.submit(sim, "step", actions=moves, frames=walk.filmed or look)
        else:
            arrive(sim)

    def arrive(sim):
        walk = under_way[sim]
        start = walk.states[0]["distance_to_goal"]
        if walk.episode.get("goals") and not is_finite(start):  # later: it may come back
            finish(sim, "unreachable")
        elif walk.actions[-1:] == [STOP]:
            finish(sim, "malformed" if walk.answers and not walk.answers[-1][2] else "stop")
        elif len(walk.actions) >= max_steps:
            finish(sim, "max_steps")
        elif (reason := early(walk)) is not None:
            finish(sim, reason)
        else:
            waiting.append(sim)

    def finish(sim, end, error=None):
        walk = under_way[sim]
        walk.end, walk.error = end, error
        if walk.film and not error:                         # its map, while the scene is loaded
            pool.submit(sim, "topdown")
        else:
            leave(sim)

    def leave(sim):
        ended.append(under_way.pop(sim))
        if todo:
            begin(sim, todo.popleft())

    def hear(sim, reply):
        walk = under_way[sim]
        if walk.end:                                        # that was the map; no map, no picture
            walk.map = None if isinstance(reply, Exception) else reply
            leave(sim)
        elif isinstance(reply, SimDied) and deaths[walk.name] < retries:
            deaths[walk.name] += 1
            clock["deaths"] += 1
            begin(sim, walk.again())
        elif isinstance(reply, SimDied):
            finish(sim, "error", str(reply))
        elif walk.refused:                                  # its scene can be loaded, or it cannot
            finish(sim, "error" if isinstance(reply, SimError) else "invalid", walk.refused)
        elif isinstance(reply, SimError) and not walk.states:       # its start's fault, or why?
            walk.refused = str(reply)
            pool.submit(sim, "load", scene_id=walk.episode["scene_id"])
        elif isinstance(reply, SimError):                   # its goal's fault, and so it would stay
            finish(sim, "invalid", str(reply))
        elif "action" in reply:                             # the expert's
            act(sim, [reply["action"]])
        else:
            walk.see(reply)
            arrive(sim)

    for sim in range(min(sims, len(todo))):
        begin(sim, todo.popleft())
    while under_way:
        # 1. listen, until all robots wait, or half of them and the others take long
        until = math.inf
        while len(waiting) < len(under_way):
            if len(waiting) >= ready * len(under_way):
                until = min(until, time.perf_counter() + last_s / 2)
            news = pool.wait_any(until - time.perf_counter())
            if news is None:
                break
            hear(*news)
        yield from ended
        ended.clear()
        # 2. decide, for all of them at once
        asked, waiting[:], start = sorted(waiting), [], time.perf_counter()
        plans = decide([under_way[sim] for sim in asked]) if asked else []
        last_s = time.perf_counter() - start
        clock["deciding_s"] += last_s
        # 3. act
        for sim, plan in zip(asked, plans):
            metres = under_way[sim].states[-1]["distance_to_goal"]
            if plan is None and not is_finite(metres):      # no expert knows a way: it has failed
                act(sim, [STOP])
            elif plan is None:
                pool.submit(sim, "expert")
            else:
                act(sim, plan)
    yield from ended


# ---------------------------------------------------------------- who decides


def scripted_agent(name, forward_steps, max_steps, seed):
    """The baselines, as decide(walks). All but the oracle know their whole walk at the start."""
    def dice(walk):                                         # its own: company does not matter
        return random.Random(f"{seed} {walk.name}")

    plans = {"oracle": lambda walk: None, "stop": lambda walk: [STOP],
             "forward": lambda walk: [FORWARD] * forward_steps + [STOP],
             "random": lambda walk: dice(walk).choices(      # VLN-CE's shares, not uniform
                 [FORWARD, LEFT, RIGHT, STOP], [0.68, 0.15, 0.15, 0.02], k=max_steps)}
    return lambda walks: [plans[name](walk) for walk in walks]


def policy_agent(policy, window_prompt, execute=3, malformed="stop", blank=False, temperature=0.0,
                 seed=0):
    """The policy, as decide(walks): look, remember, write, read. (The baselines need no torch.)"""
    import torch

    @torch.no_grad()
    def decide(walks):
        # 1. look: a frame is encoded once, all robots' new ones in one call
        new = [(walk, frame) for walk in walks for frame in walk.frames]
        frames = [np.zeros_like(frame) if blank else frame for _, frame in new]
        for (walk, _), feature in zip(new, policy.encode_frames(frames)):
            walk.features.append(feature)
        # 2. remember
        prompts = []
        for walk in walks:
            walk.frames.clear()
            t = len(walk.features) - 1
            past = pick_frames(t, **policy.nav["memory"])
            prompts.append(policy.prompt(window_prompt(walk.instruction, len(past), policy.nav),
                                         [walk.features[i] for i in (*past, t)]))
        # 3. write
        seeds = [random.Random(f"{seed} {walk.name} {len(walk.actions)}").getrandbits(32)
                 for walk in walks] if temperature > 0 else None
        roll = policy.generate(prompts, temperature=temperature, seeds=seeds, draft=True)
        # 4. read
        for walk, prompt, text, mask in zip(walks, prompts, roll.texts, roll.completion_mask):
            walk.tokens += len(prompt.ids) + int(mask.sum())
            walk.answers.append((len(walk.states) - 1, text, parse_control(text, policy.phrases)))
        return [walk.answers[-1][2][:execute] or [STOP if malformed == "stop" else FORWARD]
                for walk in walks]
    return decide


def dialog_agent(policy, malformed="stop", blank=False, temperature=0.0, seed=0, group_size=1):
    """The policy of dialogs, as decide(walks): look, go on with the conversation, read.

    group_size: answers drawn at each turn (grpo_online.py compares them); the first is given.
    """
    import torch

    from model import resize

    @torch.no_grad()
    def decide(walks):
        seen = [resize(walk.frames[-1], policy.nav) for walk in walks]
        features = policy.encode_frames([np.zeros_like(f) if blank else f for f in seen])
        seeds = [random.Random(f"{seed} {walk.name} {len(walk.turns)}").getrandbits(62)
                 for walk in walks] if temperature > 0 else None
        drawn, threads = policy.reply([walk.thread for walk in walks],
                                      [walk.instruction for walk in walks], features, group_size,
                                      temperature, seeds)
        for walk, frame, answers, thread in zip(walks, seen, drawn, threads):
            walk.turns.append((frame, answers))
            walk.frames.clear()
            walk.thread, walk.tokens = thread, thread.kv.shape[2] + len(thread.said)
            walk.answers.append((len(walk.states) - 1, policy.text(answers[0]),
                                 policy.actions(answers[0])))
        return [walk.answers[-1][2] or [STOP if malformed == "stop" else FORWARD]
                for walk in walks]
    return decide


def machine_of(args):
    """--device and --dtype, with their defaults -> (device, dtype); (None, None) for a baseline."""
    if args.agent != "policy":
        return None, None
    import torch
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def load_agent(args, settings, instructions=()):
    """The flags' decide(walks). UserError if one of the instructions is too long for the policy. A
    distribution that is not finite ends the run: what is drawn from it is no answer of the policy.
    """
    if args.agent != "policy":
        return scripted_agent(args.agent, settings["forward_steps"], args.max_steps, args.seed)
    import torch

    from model import is_dialog, load_policy, window_prompt
    torch.set_num_threads(args.threads)
    device, dtype = machine_of(args)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    policy = load_policy(settings["ckpt"], device=device, dtype=dtype).eval()
    check_context(policy, instructions, settings["robot"])
    if is_dialog(policy.nav):
        agent = dialog_agent(policy, args.malformed, args.blank_frames, args.temperature, args.seed)
    else:
        agent = policy_agent(policy, window_prompt, args.execute, args.malformed,
                             args.blank_frames, args.temperature, args.seed)

    def decide(walks):
        plans = agent(walks)
        if policy.nan_logits:
            raise UserError(f"{settings['ckpt']} gives log-probabilities that are not finite: the "
                            "run that wrote it has diverged; train again with a lower --lr, or "
                            "give an earlier checkpoint")
        return plans
    return decide


# ---------------------------------------------------------------- rows and results


def row_of(walk, reference, radius, second):
    """An ended walk -> its line of episodes.jsonl; only a scored walk carries metrics.

    reference: the ground truth's locations; None where there is none, and no nDTW. The metrics of
    the second radius end in e.g. _3m. poses: [x, y, z, heading] from the start on, the
    heading in radians, as VLN-CE has it: yaw about +y, left positive, 0 along -z.
    """
    unreadable = [text for _, text, plan in walk.answers if not plan]
    row = {"episode_id": walk.episode["episode_id"],
           "trajectory_id": walk.episode.get("trajectory_id"),
           "scene_id": walk.episode["scene_id"], "end": walk.end, "steps": len(walk.actions),
           "decisions": len(walk.answers), "malformed": len(unreadable)}
    if walk.end in ("error", "invalid"):
        return {**row, "error": walk.error}
    row |= {"tokens": walk.tokens} if walk.answers else {}
    row["collisions"] = sum(bool(state["collided"]) for state in walk.states[1:])
    row["actions"] = "".join(map(str, walk.actions))
    row["poses"] = [[round(float(v), 6) for v in (*state["position"], yaw_of(state["rotation"]))]
                    for state in walk.states]
    row |= {"unreadable": unreadable[0][:200]} if unreadable else {}
    distances = [state["distance_to_goal"] for state in walk.states]
    if walk.end == "unreachable" or distances[0] is None:       # None: its goal is hidden
        return row
    path = [state["position"] for state in walk.states]
    length, similar = path_length(path), ndtw(path, reference) if reference else None
    row |= {"start_distance": distances[0], "path_length": length,
            "distance_to_goal": distances[-1] if is_finite(distances[-1]) else None}
    row |= {"ndtw": similar} if reference else {}
    for suffix, r in (("", radius), (f"_{second:g}m", second)):
        marks = judge(distances, length, walk.end == "stop", r)
        marks |= {"sdtw": marks["success"] * similar} if reference else {}
        row |= {name + suffix: value for name, value in marks.items()}
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()}


def read_rows(path):
    """-> (rows, how many bytes are whole lines). A line that a kill has torn is left out."""
    with open(path, "rb") as file:
        data = file.read()
    whole = data[:data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder and start again") from None


def known_rows(out):
    """The rows of all ranks, {str(episode_id): row}; of two, the one that is not an error."""
    rows = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "episodes*.jsonl"))):
        for row in read_rows(path)[0]:
            if rows.get(str(row["episode_id"]), {"end": "error"})["end"] == "error":
                rows[str(row["episode_id"])] = row
    return rows


def read_json(path):
    with open(path) as file:
        return json.load(file)


def write_lines(path, rows):
    """JSON, a line each, all or nothing."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


TITLES = {"success": "SR", "spl": "SPL", "oracle_success": "OS", "distance_to_goal": "NE (m)",
          "path_length": "TL (m)", "ndtw": "nDTW", "sdtw": "SDTW", "steps": "steps"}
AT_RADIUS = ("success", "spl", "oracle_success", "sdtw")        # the others know no radius
RATES = ("success", "oracle_success")                   # 0 or 1 per episode; the rest are means


def summarise(rows, radius, second, seed):
    """Rows -> the numbers of results.json. A metric that no row has is {"mean": None, "ci": None}.
    """
    scored = [row for row in rows if "success" in row]
    names = [*TITLES, *(f"{name}_{second:g}m" for name in AT_RADIUS)]
    units, kind = sampling_units(scored)
    metrics = cluster_bootstrap({name: [row.get(name) for row in scored] for name in names}, units,
                                seed=seed)
    for key in [name + end for name in RATES for end in ("", f"_{second:g}m")] if scored else ():
        metrics[key]["ci"] = rate_interval([row[key] for row in scored], [1] * len(scored), units)
    decisions, malformed = ([row[key] for row in rows] for key in ("decisions", "malformed"))
    ends = Counter(row["end"] for row in rows)
    return {"episodes": len(rows), "scored": len(scored), "unreachable": ends["unreachable"],
            "no_way_at_end": sum(row["distance_to_goal"] is None for row in scored),
            "errors": ends["error"], "invalid": ends["invalid"],
            "ends": dict(sorted(ends.items())),
            "decisions": sum(decisions),
            "malformed_share": round(sum(malformed) / max(sum(decisions), 1), 6),
            "malformed_ci": rate_interval(malformed, decisions, sampling_units(rows)[0]),
            "tokens_per_episode": round(sum(row.get("tokens", 0) for row in rows)
                                        / max(len(rows), 1), 1),
            "radius_m": radius, "second_radius_m": second, "metrics": metrics,
            "interval": {"level": 0.95, "rates": "Wilson, effective number of episodes",
                         "means": "bootstrap", "units": kind, "n_units": len(set(units))}}


def table(results):
    """The numbers of results.json for a person."""
    ends = ", ".join(f"{n} {end}" for end, n in results["ends"].items())
    lines = [f"{results['ckpt'] or results['agent']} on {results['split']}: {results['scored']} of "
             f"{results['episodes']} episodes scored, {results['unreachable']} unreachable, "
             f"{results['invalid']} invalid, {results['errors']} errors; ended by: {ends}"]
    if results["decisions"]:
        low, high = results["malformed_ci"]
        lines[0] += (f"; {results['malformed_share']:.1%} [{low:.1%}, {high:.1%}] of "
                     f"{results['decisions']} plans unreadable; "
                     f"{results['tokens_per_episode']:,.0f} tokens an episode")
    if results["no_way_at_end"]:
        lines.append(f"  {results['no_way_at_end']} walks ended where no way to the goal is known: "
                     "failed, and left out of NE")
    if results.get("shuffle_instructions"):
        lines.append(f"  {results['borrowed_in_scene']} of {results['episodes']} instructions "
                     "belong to a walk to another goal in the same scene, the others to one in "
                     "another scene")
    for name, found in results["metrics"].items():
        measured = name.removesuffix(f"_{results['second_radius_m']:g}m")
        radius = results["radius_m" if name == measured else "second_radius_m"]
        at = f"@ {radius:g} m" if measured in AT_RADIUS else ""
        if found["mean"] is not None:
            ci = "[{:.3f}, {:.3f}]".format(*found["ci"]) if found["ci"] else "all alike"
            lines.append(f"  {TITLES[measured]:7}{at:7}{found['mean']:8.3f}   {ci}")
    if results.get("no_ndtw"):
        lines.append(f"  nDTW and SDTW are not measured: {results['no_ndtw']}")
    if results["scored"]:
        lines.append("  95% intervals: " + explain(results["interval"]))
    return "\n".join(lines)


def explain(interval):
    """results.json's "interval" in words."""
    few = "" if interval["units"] == "scenes" else (
        f"; fewer than {MIN_SCENES} scenes, so they hold for these scenes only")
    return (f"Wilson for SR, OS; a bootstrap over {interval['n_units']} {interval['units']} for "
            f"means{few}")


# ---------------------------------------------------------------- for the leaderboards


def r2r_submission(rows):
    """VLN-CE's challenge -> {episode_id: [{"position", "heading", "stop"} ..]}: the start, then a
    record per action. stop is true after a STOP only; one read into garbage is not called by it.

    >>> row = {"episode_id": 7, "end": "stop", "actions": "10",
    ...        "poses": [[0, 0, 0, 9], [0, 0, -1, 9]]}
    >>> for record in r2r_submission([row])["7"]: print(record)
    {'position': [0, 0, 0], 'heading': 9, 'stop': False}
    {'position': [0, 0, -1], 'heading': 9, 'stop': False}
    {'position': [0, 0, -1], 'heading': 9, 'stop': True}
    """
    walks = {}
    for row in rows:
        records = [{"position": place, "heading": heading, "stop": False}
                   for *place, heading in row["poses"]]
        if row["actions"].endswith(str(STOP)):
            records.append({**records[-1], "stop": row["end"] == "stop"})
        walks[str(row["episode_id"])] = records
    return walks


def rxr_submission(episodes, rows):
    """RxR-Habitat -> [{"instruction_id", "path"} ..] by instruction_id. A path holds the places; a
    pose that did not move adds none, so turns and bumps leave no trace."""
    walks = []
    for episode, row in zip(episodes, rows):
        path = [pose[:3] for pose in row["poses"]]
        walks.append({"instruction_id": int(episode["instruction"]["instruction_id"]),
                      "path": [p for t, p in enumerate(path) if t == 0 or p != path[t - 1]]})
    return sorted(walks, key=lambda walk: walk["instruction_id"])


def submit(path, episodes, rows):
    """Write the leaderboard's file, RxR's if the episodes are. UserError unless all have walked."""
    lost = [row["episode_id"] for row in rows if not row.get("poses")]
    if lost:
        raise UserError(f"{path} was not written: {len(lost)} of {len(rows)} episodes have no walk "
                        f"on record, the first is {lost[0]}; walk again with another --out")
    rxr = dataset_of(episodes[0]) == "rxr"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if rxr:
            write_lines(path, rxr_submission(episodes, rows))
        else:
            write_json(path, r2r_submission(rows))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another --submit") from None
    spoken = {episode["instruction"].get("language") for episode in episodes}
    print(f"{path}: the walks of {len(rows):,} episodes for the leaderboard" + (
        f", in {', '.join(sorted(spoken))}; it takes all of {', '.join(LANGUAGES)} in one file"
        if rxr and spoken != set(LANGUAGES) else ""))


# ---------------------------------------------------------------- the witness

WITNESSED = ("distance_to_goal", "success", "spl")


def testify(rows, episodes, settings, scenes, python):
    """habitat-lab's verdict on every scored walk (witness.py) -> {"walks", "habitat_lab",
    "habitat_sim", "largest_difference": {metric: value}, "without_spl": ids of walks that start at
    their goal, "no_verdict": {id: reason}}. UserError if habitat-lab is missing, its process died,
    or a metric differs from ours by more than 1e-4."""
    walks = [(row, episode) for row, episode in zip(rows, episodes) if "success" in row]
    job = {"robot": settings["robot"], "scenes_dir": os.path.abspath(scenes),
           "radius_m": settings["radius_m"]}
    keys = ("episode_id", "scene_id", "start_position", "start_rotation", "goals")
    # an answer taken for stop is not the robot's own: habitat-lab must not hear it
    lines = [job] + [{"episode": {key: episode[key] for key in keys}, "actions": [
        int(a) for a in row["actions"] if a != str(STOP) or row["end"] == "stop"]}
        for row, episode in walks]
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "witness.py")
    done = subprocess.run([python or sys.executable, here], capture_output=True, text=True,
                          input="".join(json.dumps(line) + "\n" for line in lines))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    if told and "missing" in told[0]:
        raise UserError(f"--witness needs habitat-lab ({told[0]['missing']}): "
                        f"{python or sys.executable} -m pip install habitat-lab")
    theirs = {line["episode_id"]: line for line in told[1:]}
    if done.returncode or len(theirs) < len(walks):
        raise UserError(f"habitat-lab's process ended with {done.returncode} after {len(theirs)} "
                        f"of {len(walks)} walks. Its last words: {done.stderr[-600:].strip()}")
    failed = {name: line["error"] for name, line in theirs.items() if "error" in line}
    worst, wrong, no_spl = dict.fromkeys(WITNESSED, 0.0), [], []
    for row, _ in walks:
        line = theirs[str(row["episode_id"])]
        for name in WITNESSED if "error" not in line else ():
            if line[name] is None:
                no_spl.append(row["episode_id"])
                continue
            apart = difference(row[name], line[name])
            worst[name] = max(worst[name], apart)
            if apart > 1e-4:
                wrong.append(f"episode {row['episode_id']}: {name} is {row[name]} by our count and "
                             f"{line[name]} by habitat-lab's")
    if wrong:
        raise UserError(f"{wrong[0]} ({len(wrong)} such values); neither is a result until one of "
                        "them is explained")
    return {"walks": len(walks) - len(failed), **told[0], "largest_difference": worst,
            "without_spl": no_spl, "no_verdict": failed}


def difference(ours, theirs):
    """|ours - theirs|; 0 where neither knows a distance, inf where only one does."""
    known = is_finite(ours), is_finite(theirs)
    return abs(ours - theirs) if all(known) else math.inf if any(known) else 0.0


# ---------------------------------------------------------------- pictures

BLUE, GREEN, ORANGE, WHITE = (30, 90, 220), (30, 150, 60), (240, 130, 0), (255, 255, 255)


def planned_path(state, plan, robot):
    """Where a plan leads if nothing stands in the way: [[x, y, z], ..], metres, the start included.

    >>> state = {"position": [0, 0, 0], "rotation": [0, 0, 0, 1]}               # it faces -z
    >>> planned_path(state, [LEFT, FORWARD], {"turn_deg": 90, "forward_m": 0.25})[-1]
    [-0.25, 0, -0.0]
    """
    x, y, z = state["position"]
    heading, points = 2 * math.atan2(state["rotation"][1], state["rotation"][3]), [[x, y, z]]
    for action in plan:
        heading += {LEFT: 1, RIGHT: -1}.get(action, 0) * math.radians(robot["turn_deg"])
        if action == FORWARD:
            x -= robot["forward_m"] * math.sin(heading)
            z -= robot["forward_m"] * math.cos(heading)
            points.append([round(x, 6), y, round(z, 6)])
    return points


def draw_map(walk, reference, robot, radius, upto, size):
    """The house from above, size x size pixels around the walk: blue walked, green the ground
    truth and the goal's radius, orange dashed the plan that was last written up to pose `upto`."""
    positions = [state["position"] for state in walk.states]
    goals = [goal["position"] for goal in walk.episode["goals"][:1]]        # none in a test split
    x, _, z = np.array([*positions, *(reference or ()), *goals]).T
    side = max(np.ptp(x), np.ptp(z)) + 3                                        # metres
    left, top = (x.min() + x.max() - side) / 2, (z.min() + z.max() - side) / 2
    image, (x0, z0, x1, z1) = Image.fromarray(np.array(walk.map["image"])), walk.map["bounds"]
    box = [(left - x0) / (x1 - x0), (top - z0) / (z1 - z0),
           (left + side - x0) / (x1 - x0), (top + side - z0) / (z1 - z0)]
    image = image.transform((size, size), Image.Transform.EXTENT, fillcolor=WHITE, data=[
        share * pixels for share, pixels in zip(box, image.size * 2)])
    draw = ImageDraw.Draw(image)

    def pixels(points):
        return [((x - left) * size / side, (z - top) * size / side) for x, _, z in points]

    def circle(point, r, colour, fill=None):
        (x, y), = pixels([point])
        draw.ellipse([x - r, y - r, x + r, y + r], fill, colour, 2)

    draw.line(pixels(reference or positions[:1] * 2), GREEN, 5)
    draw.line(pixels(positions[:upto + 1]), BLUE, 3)
    plans = [(t, plan) for t, _, plan in walk.answers if t <= upto and FORWARD in plan]
    for t, plan in plans[-1:]:
        ahead = np.array(pixels(planned_path(walk.states[t], plan, robot)))
        for a, b in zip(ahead, ahead[1:]):
            draw.line([*a, *(a + 0.6 * (b - a))], ORANGE, 3)
    for goal in goals:
        circle(goal, radius * size / side, GREEN)
        circle(goal, 4, GREEN, GREEN)
    circle(positions[0], 5, BLUE, WHITE)
    circle(positions[upto], 4, BLUE, BLUE)
    return image


@functools.lru_cache(None)
def characters_of(path):
    """The characters that a font file can draw, as a set of code points; {} if it is unreadable."""
    from fontTools.ttLib import TTFont
    try:
        return frozenset(TTFont(path, fontNumber=0, lazy=True).getBestCmap() or ())
    except Exception:                      # fonts are other people's files: any other one will do
        return frozenset()


@functools.lru_cache(None)
def installed_fonts():
    """Font files to try, those with an upright regular face of a wide coverage first."""
    from matplotlib import font_manager, get_data_path
    found = sorted(font_manager.findSystemFonts(), key=lambda path: (
        "regular" not in path.lower(), "noto" not in path.lower(), path))
    return [os.path.join(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), *found]


@functools.lru_cache(None)
def font_for(word, size=13):
    """A font that has all characters of a word, or None. Pillow's own has those of ASCII; Indic
    scripts also need libraqm, which orders and joins their signs."""
    if word.isascii():
        return ImageFont.load_default(size)
    if any("\u0900" <= char <= "\u0dff" for char in word) and not features.check("raqm"):
        return None
    wanted = set(map(ord, word)) - {0x200c, 0x200d}                  # joiners are never drawn
    path = next((path for path in installed_fonts() if wanted <= characters_of(path)), None)
    return path and ImageFont.truetype(path, size)


def lay_out(text, width):
    """A text as [(x, line, piece of a word, font)], in lines of at most `width` pixels, and how
    many lines those are; None if no installed font has the characters of one piece. A word is cut
    where ASCII meets other characters: many fonts of a script have no Latin letters."""
    placed, x, line, space = [], 0, 0, font_for(" ").getlength(" ")
    for word in text.split():
        pieces = re.findall(r"[!-~]+|[^!-~]+", word)
        fonts = list(map(font_for, pieces))
        if None in fonts:
            return None
        lengths = [font.getlength(piece) for font, piece in zip(fonts, pieces)]
        if x and x + sum(lengths) > width:
            x, line = 0, line + 1
        for piece, font, length in zip(pieces, fonts, lengths):
            placed.append((x, line, piece, font))
            x += length
        x += space
    return placed, line + 1


@functools.lru_cache(None)
def say_no_font(language):
    """Once for each language."""
    print(f"pictures: no font that is installed has the characters of the {language} instructions"
          " (or Pillow has no libraqm), so they are written to .txt files beside the pictures; on "
          "Debian and Ubuntu: apt-get install fonts-noto-core", file=sys.stderr, flush=True)


def instruction_lines(walk, width):
    """lay_out() of the instruction, or of a note that it cannot be drawn."""
    found = lay_out(walk.instruction, width)
    if found is None:
        language = walk.episode["instruction"].get("language") or "other"
        say_no_font(language)
        found = lay_out(f"[{language} instruction: see {walk.name}.txt]", width)
    return found


def sheet(walk, title, make_map, views, upto, size=200):
    """One page: title, instruction, the map up to pose `upto`, the views of the poses `views`."""
    font = ImageFont.load_default(13)
    columns = min(4, len(views))
    side = math.ceil(len(views) / columns) * (size + 20)
    width = side + 8 + columns * (size + 6)
    words, lines = instruction_lines(walk, width - 12)
    top = 12 + 18 * (lines + 1)
    page = Image.new("RGB", (width, top + side), WHITE)
    draw = ImageDraw.Draw(page)
    draw.text((6, 17), title, (0, 0, 0), font, anchor="ls")
    for x, line, word, its_font in words:                     # ls: all fonts on one baseline
        draw.text((6 + x, 17 + 18 * (line + 1)), word, (0, 0, 0), its_font, anchor="ls")
    page.paste(make_map(upto, side), (0, top))
    for i, t in enumerate(views):
        x, y = side + 8 + i % columns * (size + 6), top + i // columns * (size + 20)
        view = Image.fromarray(np.array(walk.film[t]))
        smooth = Image.Resampling.NEAREST if view.width < size else Image.Resampling.BICUBIC
        page.paste(view.resize((size, round(size * view.height / view.width)), smooth), (x, y))
        plans = [plan for at, _, plan in walk.answers if at <= t]
        said = " plan " + "".join("DABC"[action] for action in plans[-1]) if plans else ""
        draw.text((x, y + size), f"step {t}{said}", (90, 90, 90), font)
    return page


def draw_walk(walk, row, reference, robot, radius, folder):
    """<folder>/<episode_id>.png, eight views beside the map, and .gif, the walk as a film."""
    if not walk.map:
        return
    os.makedirs(folder, exist_ok=True)
    verdict = ("success" if row["success"] else "failure") if "success" in row else row["end"]
    title = f"{verdict}: episode {walk.name}, {row['steps']} steps"
    if "success" in row:
        metres = row["distance_to_goal"]
        title += ", no way to the goal is known" if metres is None else (
            f", {metres:.2f} m from the goal")

    make_map = functools.partial(draw_map, walk, reference, robot, radius)
    path, last = os.path.join(folder, walk.name), len(walk.film) - 1
    if lay_out(walk.instruction, 1000) is None:
        write_text(path + ".txt", walk.instruction + "\n")
    views = sorted({round(i * last / 7) for i in range(8)})
    sheet(walk, title, make_map, views, last).save(path + ".png")
    film = [sheet(walk, title, make_map, [t], t, size=224) for t in range(last + 1)]
    film[0].save(path + ".gif", save_all=True, append_images=film[1:], duration=150, loop=0)


# ---------------------------------------------------------------- what is evaluated


def speaks_dialog(nav):
    return (nav or {}).get("prompt", "").startswith("dialog")      # model.is_dialog needs torch


def choose_ckpt(args):
    """-> the checkpoint folder and its contract; (None, None) for a baseline."""
    if args.agent != "policy":
        return None, None
    there = [c for c in ("ckpt/grpo", "ckpt/sft") if os.path.exists(os.path.join(c, "nav.json"))]
    if not args.ckpt and not there:
        raise UserError("no checkpoint in ckpt/grpo or ckpt/sft: train one (python sft.py), name "
                        "one with --ckpt, or walk a baseline with --agent oracle")
    ckpt = os.path.normpath(args.ckpt or there[0])
    try:
        nav = read_json(os.path.join(ckpt, "nav.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{ckpt} has no readable nav.json ({error}): --ckpt must name a folder "
                        "written by one of the trainers") from None
    if not (1 <= args.execute <= nav["horizon"] or speaks_dialog(nav)):
        raise UserError(f"--execute {args.execute} does not fit {ckpt}, which plans "
                        f"{nav['horizon']} actions at a time")
    return ckpt, nav


def choose_robot(args, ckpt, nav, episode):
    """Body and camera: what the checkpoint learned in; else --robot, or the episodes' data set.

    UserError if a flag contradicts the checkpoint.
    """
    name = args.robot or (nav["dataset"] if nav and nav["dataset"] in ROBOTS
                          else dataset_of(episode))
    robot = robot_from_args(args, ROBOTS[name])
    taught = {key: nav[key] for key in robot if nav and nav.get(key) is not None}
    for key, value in taught.items():
        stated = args.robot or vars(args)[key] is not None
        if stated and abs(value - robot[key]) > 1e-6:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{ckpt} was trained with {key} = {value} and the robot {name!r} has "
                            f"{robot[key]}: leave --robot and {flag} out, since a checkpoint brings"
                            " its own, or take another --ckpt")
    return {**robot, **taught}


def check_episodes(episodes, truths, source):
    """What the metrics need must be there before anything walks, or none of it: else UserError.

    truths: None where the split has none. (read_episodes() has checked everything else.)
    """
    hidden = not any(episode["goals"] for episode in episodes)
    for episode in episodes:
        if not hidden and not episode["goals"]:
            raise UserError(f"episode {episode['episode_id']} of {source} has no goal, and others "
                            "have one: copy the episodes again, or take it out")
        if truths is not None and str(episode["episode_id"]) not in truths:
            raise UserError(f"episode {episode['episode_id']} of {source} has no ground truth to "
                            "measure by: copy the _gt.json.gz of the same release")


def check_context(policy, instructions, robot):
    """UserError if the longest prompt of an instruction does not fit the model's context.

    The longest: with as many remembered frames as there can be; of a dialog, its first turn.
    """
    import torch

    from model import fit_pixels, is_dialog, window_prompt
    nav, texts = policy.nav, sorted(set(instructions))
    limit = policy.model.config.text_config.max_position_embeddings - ANSWER_TOKENS
    rows, columns = (side // 28 for side in fit_pixels(
        robot["height"], robot["width"], nav["min_pixels"], nav["max_pixels"]))
    frame = torch.empty(rows, columns, 0)
    if is_dialog(nav):
        prompt = policy.turn("x", frame)
    else:
        past = max(len(pick_frames(t, **nav["memory"])) for t in range(500))
        prompt = policy.prompt(window_prompt("x", past, nav), [frame] * (past + 1))
    words = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(range(len(texts)), key=lambda i: len(words[i]))
    tokens = len(prompt.ids) + len(words[longest])
    if tokens > limit:
        raise UserError(f"the instruction \"{texts[longest][:60]}..\" has {len(words[longest])} "
                        f"tokens, its prompt {tokens}, and the model's context holds {limit}: "
                        "shorten or remove it in the episode file")


def spread(items, n):
    """n of the items, evenly over all of them.

    >>> spread("abcdefgh", 3), spread("ab", 3)
    (['a', 'c', 'f'], ['a', 'b'])
    """
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def other_words(episodes, seed, radius):
    """For each episode the instruction of another walk -> {str(episode_id): text}, and the set of
    those ids whose text is of a walk in the same scene.

    The other walk leads to another goal (more than `radius` metres away, or the words would be
    right) and has other words, of the same language. It is of the same scene where there is one:
    words from elsewhere name things that are not there, which a policy could notice.
    """
    ring = random.Random(seed).sample(episodes, len(episodes))
    scenes, borrowed, near = {}, {}, set()
    for episode in ring:
        scenes.setdefault(episode["scene_id"], []).append(episode)

    def fits(mine, other):
        words, theirs = mine["instruction"], other["instruction"]
        return (mine["trajectory_id"] != other["trajectory_id"]
                and words["instruction_text"] != theirs["instruction_text"]
                and words.get("language") == theirs.get("language")
                and (mine["scene_id"] != other["scene_id"] or all(
                    math.dist(a["position"], b["position"]) > radius
                    for a in mine["goals"] for b in other["goals"])))

    for place, mine in enumerate(ring):
        here = scenes[mine["scene_id"]]
        at = here.index(mine)
        found = next((o for o in (*here[at + 1:], *here[:at], *ring[place + 1:], *ring[:place])
                      if fits(mine, o)), None)
        if found is None:
            raise UserError("--shuffle-instructions needs walks with different instructions: "
                            f"episode {mine['episode_id']} finds none in its language")
        borrowed[str(mine["episode_id"])] = found["instruction"]["instruction_text"]
        if found["scene_id"] == mine["scene_id"]:
            near.add(str(mine["episode_id"]))
    return borrowed, near


def fingerprint(folder):
    """A name for a checkpoint's weights, from 64 samples of every file: else the rows of an old
    ckpt/sft would be taken for those of a retrained one."""
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            for k in range(64):
                file.seek(size * k // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def open_out(out, settings):
    """Make the results folder, or go on in one that holds the same measurement."""
    path, rank = os.path.join(out, "run.json"), os.environ.get("RANK", "0")
    lock_folder(out, name=".lock" if rank == "0" else f".lock.{rank}")      # each has its own files
    try:
        if not os.path.exists(path):
            write_json(path, settings)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): give another --out") from None
    held = read_json(path)
    differ = sorted(key for key in {*settings, *held} if held.get(key) != settings.get(key))
    if differ:
        raise UserError(f"{out} holds another measurement (of other {', '.join(differ)}): give "
                        "another --out, or delete that folder")


# ---------------------------------------------------------------- the run, top to bottom


def prepare(args):
    """Read the flags' files and refuse what does not belong together -> settings, and the rest."""
    ckpt, nav = choose_ckpt(args)
    source = args.episodes or EPISODES.get(nav["dataset"] if nav else "houses", EPISODES["houses"])
    every = read_episodes(source, args.split, args.role, args.languages)
    hidden = not any(episode["goals"] for episode in every)     # only the split's server can score
    truths = None if hidden else read_ground_truth(source, args.split, args.role, optional=True)
    episodes = spread(every, args.limit or len(every))
    scenes = args.scenes or scenes_of(source)
    robot = choose_robot(args, ckpt, nav, every[0])
    if args.witness and (hidden or args.sim != "habitat" or args.sim_command
                         or robot["turn_deg"] % 1
                         or not shutil.which(args.sim_python or sys.executable)):
        raise UserError("--witness compares scores with habitat-lab's: it needs --sim habitat, a "
                        "--sim-python that is there, the scenes on this machine, a split with "
                        "goals, and turns of whole degrees (habitat-lab knows no others)")
    check_episodes(every, truths, f"{source} ({args.split})")
    used = scenes_used(args, robot, scenes, episodes)
    if args.turn_deg is None and not (nav and nav["dataset"] == dataset_of(every[0])):
        check_turn_deg(paired(episodes, truths or {}), robot["turn_deg"])   # else it is meant so
    if args.submit and args.limit:
        raise UserError("--submit needs every episode of the split: leave --limit out")
    unknown = [e["episode_id"] for e in every if "instruction_id" not in e["instruction"]]
    if args.submit and dataset_of(every[0]) == "rxr" and unknown:
        raise UserError(f"episode {unknown[0]} of {source} ({args.split}) has no 'instruction_id', "
                        "by which RxR's leaderboard knows it: copy the episodes again")
    if args.agent == "oracle" and hidden:
        raise UserError(f"{source} ({args.split}) hides its goals, so there is no expert to walk "
                        "there: choose another --agent or --split")
    radii = {goal.get("radius") or VLNCE_RADIUS_M for episode in every for goal in episode["goals"]}
    if not args.success_m and len(radii) > 1:
        raise UserError("the goals of the data have no common radius: give --success-m")
    radius = args.success_m or (radii.pop() if radii else VLNCE_RADIUS_M)
    words, near = other_words(every, args.seed, radius) if args.shuffle_instructions else (
        {str(e["episode_id"]): e["instruction"]["instruction_text"] for e in every}, ())
    walked = paired(episodes, truths or {})
    forwards = [walk["actions"].count(FORWARD) for walk in walked]
    forward_steps = args.forward_steps or (round(np.mean(forwards)) if forwards else None)
    if args.agent == "forward" and forward_steps is None:
        raise UserError("--agent forward needs --forward-steps where there is no ground truth")
    data = json.dumps([episodes, [walk["locations"] for walk in walked]])
    flags = ("split", "role", "languages", "agent", "sim", "execute", "malformed", "temperature",
             "max_steps", "limit", "blank_frames", "shuffle_instructions", "seed")
    device, dtype = machine_of(args)
    settings = {**{key: getattr(args, key) for key in flags}, "ckpt": ckpt,
                "device": device and device.split(":")[0], "dtype": dtype,
                "weights": ckpt and fingerprint(ckpt), "nav": nav, "robot": robot, "source": source,
                "data": hashlib.sha256(data.encode()).hexdigest()[:16], "radius_m": radius,
                "second_radius_m": 1.0 if radius == 3 else 3.0,
                "forward_steps": forward_steps, "scenes": used}
    if args.shuffle_instructions:
        settings["borrowed_in_scene"] = sum(str(e["episode_id"]) in near for e in episodes)
    if truths is None and not hidden:
        settings["no_ndtw"] = no_ground_truth(source, args.split, args.role)
    return settings, episodes, truths, words, scenes


def main(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    # 1. what is measured, and which rows are there already
    settings, episodes, truths, words, scenes = prepare(args)
    settings["episodes"] = len(episodes)
    robot, radius, second = (settings[key] for key in ("robot", "radius_m", "second_radius_m"))
    label = os.path.basename(settings["ckpt"]) if settings["ckpt"] else args.agent
    out = args.out or "_".join(["results/" + label] + ["blank_frames"] * args.blank_frames +
                               ["shuffled_instruction"] * args.shuffle_instructions + [args.split] +
                               [f"limit{args.limit}"] * bool(args.limit))
    open_out(out, settings)
    path = os.path.join(out, "episodes.jsonl" if world == 1 else f"episodes.{rank}.jsonl")
    if os.path.exists(path):
        os.truncate(path, read_rows(path)[1])               # the line that a kill has torn
    names = [str(episode["episode_id"]) for episode in episodes]
    done = {name for name, row in known_rows(out).items() if row["end"] != "error"}
    mine = range(rank, len(episodes), world)
    todo = [i for i in mine if names[i] not in done]
    print(f"{out}: {settings['ckpt'] or args.agent} walks {len(todo)} episodes of "
          f"{settings['source']} ({args.split}); {len(mine) - len(todo)} of {len(mine)} have "
          f"walked already" + f", rank {rank} of {world}" * (world > 1), flush=True)

    # 2. walk; rows are on disk before the next decision
    if todo:
        filmed = set(spread(names, args.pictures))
        walks = (Walk(episodes[i], words[names[i]], names[i] in filmed) for i in todo)
        decide = load_agent(args, settings, words.values())
        sims, tally, start = min(args.sims, len(todo)), Counter(), time.perf_counter()
        gpus = args.sim_gpus
        if not gpus and not args.sim_command and "LOCAL_RANK" in os.environ and visible_gpus():
            gpus = [int(os.environ["LOCAL_RANK"])]
        look = args.agent == "policy" and ("last" if speaks_dialog(settings["nav"]) else True)
        with open(path, "a") as file, SimPool(
                args.sim, robot, scenes, sims, simulator_commands(args), args.sim_timeout,
                gpus) as pool, \
                tqdm(total=len(mine), initial=len(mine) - len(todo), unit="walk",
                     mininterval=1 if sys.stderr.isatty() else 30) as bar:
            pool.note_versions(out)
            for walk in walk_episodes(pool, sims, walks, decide, args.max_steps, args.retries,
                                      look, tally):
                reference = truths and truths[walk.name]["locations"]
                row = row_of(walk, reference, radius, second)
                draw_walk(walk, row, reference, robot, radius, os.path.join(out, "pictures"))
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                tally.update(walks=1, steps=row["steps"], scored="success" in row,
                             success=row.get("success", 0))
                if tally["scored"]:
                    bar.set_postfix(SR=f"{tally['success'] / tally['scored']:.2f}", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        write_json(os.path.join(out, "timing.json" if world == 1 else f"timing.{rank}.json"), {
            "seconds": seconds, "sims": sims, **tally})
        print(f"{tally['walks']} walks in {seconds:.1f} s, {tally['walks'] / seconds:.1f} a second "
              f"in {sims} simulators", flush=True)

    # 3. judge, once every episode has its row: with several ranks, the one that ends last
    rows = known_rows(out)
    missing = [name for name in names if name not in rows]
    if missing and not any(names[i] in missing for i in mine):
        return print(f"rank {rank} is done; {len(missing)} episodes of other ranks are not")
    if missing:
        sys.exit(f"evaluate.py: error: {len(missing)} of {len(names)} episodes have no row in "
                 f"{out}, the first is {missing[0]}: run the same command again")
    rows = [rows[name] for name in names]
    versions = {name: metadata.version(name) for name in ("numpy", "torch", "transformers")}
    results = {**settings, **summarise(rows, radius, second, args.seed), "versions": versions}
    results["simulator"] = read_json(os.path.join(out, "simulator.json"))
    if args.witness:
        results["witness"] = testify(rows, episodes, settings, scenes, args.sim_python)
    write_lines(os.path.join(out, "episodes.jsonl"), rows)
    write_json(os.path.join(out, "results.json"), results)
    print(table(results))
    if results["invalid"]:
        first = next(row for row in rows if row["end"] == "invalid")
        print(f"  {results['invalid']} episodes are invalid and will not be walked again, the "
              f"first is {first['episode_id']}: {first['error']}")
    if args.witness:
        found = results["witness"]
        worst = [f"{TITLES[name]} {v:.1e}" for name, v in found["largest_difference"].items()]
        print(f"  habitat-lab {found['habitat_lab']} walked {found['walks']} of them too; largest "
              f"differences: {', '.join(worst)}")
        if found["without_spl"]:
            print(f"  SPL not compared for {len(found['without_spl'])} walks that start at their "
                  "goal, where habitat-lab's is 0 / 0")
        if found["no_verdict"]:
            name, reason = next(iter(found["no_verdict"].items()))
            sys.exit(f"evaluate.py: error: habitat-lab confirms {found['walks']} walks and has no "
                     f"verdict on {len(found['no_verdict'])} (first {name}: {reason})")
    if args.submit and not results["errors"]:
        submit(args.submit, episodes, rows)
    if results["errors"]:
        first = next(row for row in rows if row["end"] == "error")
        sys.exit(f"evaluate.py: error: {results['errors']} episodes ended in simulator errors and "
                 f"have no score (first {first['episode_id']}: {first['error']}); the same command "
                 "tries them again")
    return results


if __name__ == "__main__":
    run(main, parse_args)
