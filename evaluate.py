"""
Closed-loop evaluation: the policy walks in a simulator, and its walks are measured.

Each robot has a simulator of its own. It looks, the policy writes its next six actions, it carries
out the first --execute of them and looks again, until it calls STOP or has used --max-actions.
Robots that wait get their plans in one batch, while the other robots walk on.

Metrics, as VLN-CE defines them [1, 2]; d is the geodesic distance to the goal, r the radius:
    NE    distance_to_goal   d at the last pose, metres
    TL    path_length        sum of the Euclidean steps, metres
    SR    success            STOP was called by a readable answer, and d < r
    OS    oracle_success     d < r at any pose, the start included; no STOP needed
    SPL   spl                success * L / max(L, TL), where L is d at the start
    nDTW  ndtw               exp(-DTW(walked, ground truth) / (3 m * points of ground truth)) [3]
    SDTW  sdtw               success * ndtw
Without a score are episodes that are "unreachable" (no finite d at the start), "invalid" (the
simulator refuses start or goal) or an "error" (the simulator failed; the same command tries again).

Run it   python evaluate.py --split val_unseen                # ckpt/grpo if there, else ckpt/sft
         python evaluate.py --split val_unseen --agent oracle      # or random, forward, stop
         torchrun --nproc_per_node 8 evaluate.py --split val_unseen --ckpt ckpt/r2r --sim habitat
Reads    --ckpt (weights, and nav.json to act by), --episodes, --scenes
Writes   --out: run.json (settings), episodes.jsonl (a line per episode), results.json (means and
         95% intervals), timing.json, pictures/ (tools/page.py)
Expect   oracle near 1, stop and forward near 0. A killed run goes on by the same command. On one
         set-up the files are equal to the byte with a scripted --agent; with --ckpt the batches
         depend on timing, so nearly equal logits may round to another plan.

[1] https://github.com/jacobkrantz/VLN-CE habitat_extensions/measures.py
[2] habitat-lab 0.1.7, habitat/tasks/nav/nav.py             [3] https://arxiv.org/abs/1907.05446
[4] Dean & Pagano 2015, Confidence Interval Methods for Binomial Proportions in Clustered Surveys
"""
from __future__ import annotations

import argparse
import glob
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cli import (
    DefaultsFormatter,
    UserError,
    lock_folder,
    positive_int,
    run_cli,
    write_json,
    write_lines,
)
from reward import FORWARD, LEFT, MAX_ANSWER_TOKENS, RIGHT, STOP
from world import SimDied, SimError
from world.episodes import (
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

EPISODES = {"houses": "data/houses", "r2r": "data/datasets/R2R_VLNCE_v1-3_preprocessed",
            "rxr": "data/datasets/RxR_VLNCE_v0"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--split", default="val_unseen")
    add_episode_args(add)
    add("--ckpt", help="checkpoint folder; default: ckpt/grpo if it is there, else ckpt/sft")
    add("--episodes", help="folder with <split>/<split>.json.gz and its _gt; default: that of the "
        "data set which the checkpoint names, " + EPISODES["houses"] + " for ours")
    add("--scenes", help="what scene_id is below; default: <episodes>/scenes if it is there, else "
        "data/scene_datasets")
    add("--out", help="default: results/<checkpoint or agent>_<split>")
    add = p.add_argument_group("simulator").add_argument
    add_simulator_args(add, sims=8)
    add_robot_args(add, "the checkpoint's, and the data set's for a baseline")
    add = p.add_argument_group("agent").add_argument
    add("--agent", choices=("policy", "oracle", "random", "forward", "stop"), default="policy")
    add("--execute", type=positive_int, default=3,
        help="actions of a plan that are carried out before "
        "the next (VLN-R1 does not say how many); ours: half, between fresh frames and speed. "
        "Answers of a dialog are always carried out whole")
    add("--malformed", choices=("stop", "forward"), default="stop",
        help="what an unreadable answer makes the robot do; never a random action")
    add("--temperature", type=float, default=0.0,
        help="0: greedy; above: sampled, from seeds that belong to episode and step")
    add("--max-actions", type=positive_int, default=500, help="of a walk; VLN-CE's; STOP counts")
    add("--blank-frames", action="store_true", help="control run: every frame is black")
    add("--shuffled-instruction", action="store_true", help="control run: each episode gets the "
        "instruction of another walk, in the same scene where one leads to another goal")
    add = p.add_argument_group("schedule").add_argument
    add("--limit", type=positive_int, help="so many episodes, spread evenly over the split")
    add = p.add_argument_group("machine").add_argument
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, else float32")
    add("--threads", type=positive_int, default=1, help="CPU threads per process")
    add("--seed", type=int, default=0)
    add("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    add = p.add_argument_group("logging").add_argument
    add("--pictures", type=count_or_all, default="none", help="of so many episodes, evenly "
        "spread: none, all, or a number")
    return p.parse_args(argv)


def count_or_all(text: str) -> int:
    return int({"none": 0, "all": sys.maxsize}.get(text, text))


# ---------------------------------------------------------------- metrics


def path_length(path: Sequence) -> float:
    """TL: sum of Euclidean steps, metres. path (T, 3).

    >>> path_length([[0, 0, 0], [3, 0, 4], [3, 0, 4], [3, 1, 4]])
    6.0
    """
    return float(np.linalg.norm(np.diff(np.asarray(path, dtype=float), axis=0), axis=1).sum())


def is_finite(metres: float | None) -> bool:
    """Is a distance known? Simulators answer inf, NaN or None where no path leads to the goal."""
    return metres is not None and math.isfinite(metres)


def episode_metrics(distances: Sequence, length: float, stopped: bool, radius: float) -> dict:
    """SR, OS and SPL. distances: geodesic to the goal at each pose, the start first and finite;
    length: TL. A walk that ends where no path is known has failed; OS may still be 1.

    Start 4 m away, walk 5 m, past a point 0.5 m from the goal, and stop 2 m from it:
    >>> episode_metrics([4.0, 0.5, 2.0], 5.0, stopped=True, radius=3.0)
    {'success': 1.0, 'oracle_success': 1.0, 'spl': 0.8}
    >>> episode_metrics([4.0, 0.5, 2.0], 5.0, stopped=True, radius=2.0)          # strictly less
    {'success': 0.0, 'oracle_success': 1.0, 'spl': 0.0}
    >>> episode_metrics([4.0, 0.5, 2.0], 5.0, stopped=False, radius=3.0)         # no STOP
    {'success': 0.0, 'oracle_success': 1.0, 'spl': 0.0}
    """
    success = float(stopped and is_finite(distances[-1]) and distances[-1] < radius)
    longer = max(distances[0], length)
    return {"success": success, "oracle_success": float(min(filter(is_finite, distances)) < radius),
            "spl": success * distances[0] / longer if longer > 0 else success}


def dtw(a: Sequence, b: Sequence) -> float:
    """Dynamic time warping: the cheapest monotone pairing of two paths, a (n, 3), b (m, 3), metres.

    Exact. VLN-CE approximates it (fastdtw), never from below: its nDTW may be slightly lower.
    Each point of a is paired with its equal, the last one also with b's last: 0 + 0 + 0 + 2.
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


def ndtw(path: Sequence, reference: Sequence, success_distance: float = 3.0) -> float:
    """exp(-DTW / (points of the reference * success_distance)) [3]. A pose that did not move adds
    no point to the path.

    One metre beside a reference of two points: exp(-2 / 6).
    >>> reference = [[0, 0, 0], [2, 0, 0]]
    >>> round(ndtw([[0, 0, 1], [0, 0, 1], [2, 0, 1]], reference), 4), ndtw(reference, reference)
    (0.7165, 1.0)
    """
    moved = [p for t, p in enumerate(path) if t == 0 or list(p) != list(path[t - 1])]
    return math.exp(-dtw(moved, reference) / (len(reference) * success_distance))


# ---------------------------------------------------------------- intervals

MIN_SCENES = 5       # with fewer, their differences are not known well enough to resample them


def wilson(hits: float, trials: float, z: float = 1.959964) -> list[float] | None:
    """Wilson's 95% score interval of a rate -> [low, high]; None without trials.

    Unlike a bootstrap it has a width where all trials agree. trials may be fractional.
    >>> wilson(0, 200), wilson(5, 10)                   # by hand: [0, z^2 / (200 + z^2)]
    ([0.0, 0.018845], [0.236593, 0.763407])
    """
    if not trials:
        return None
    rate, spare = min(1.0, hits / trials), z * z / trials      # above 1 by rounding only
    centre = (rate + spare / 2) / (1 + spare)
    half = z * math.sqrt(rate * (1 - rate) / trials + spare / trials / 4) / (1 + spare)
    return [round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)]


def design_effect(hits: Sequence, trials: Sequence, units: Sequence) -> float:
    """The factor by which the variance of a rate exceeds that of independent trials, because trials
    of one unit (a scene) resemble each other; at least 1. hits, trials (n,), units (n,) names.

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


def rate_interval(hits: Sequence, trials: Sequence, units: Sequence) -> list[float] | None:
    """Wilson's interval with the effective number of trials [4]: trials / design_effect()."""
    n = sum(trials) / design_effect(hits, trials, units)
    return wilson(n * sum(hits) / sum(trials), n) if sum(trials) else None


def sampling_units(rows: Sequence[dict]) -> tuple[list[str], str]:
    """What a bootstrap draws -> the unit of each row, and "scenes"; or "trajectories" where fewer
    than MIN_SCENES scenes are there: the interval then holds for these scenes only."""
    scenes = [str(row.get("scene_id")) for row in rows]
    if len(set(scenes)) >= MIN_SCENES:
        return scenes, "scenes"
    names = [row.get("trajectory_id", row["episode_id"]) for row in rows]
    return [f"{scene} {name}" for scene, name in zip(scenes, names)], "trajectories"


def cluster_bootstrap(columns: dict[str, Sequence], units: Sequence, resamples: int = 2000,
                      seed: int = 0) -> dict[str, dict]:
    """{name: values (n,)} -> {name: {"mean", "ci": [2.5%, 97.5%]}}, percentile bootstrap of means.

    Whole units are drawn, since episodes of one scene resemble each other. All columns use the same
    draws. None values are left out; "ci" is None where all units are alike.
    >>> cluster_bootstrap({"spl": [0, 1, None], "ne": [2.0] * 3}, ["a", "b", "b"])
    {'spl': {'mean': 0.5, 'ci': [0.0, 1.0]}, 'ne': {'mean': 2.0, 'ci': None}}
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


# ---------------------------------------------------------------- one episode, and the loop


class DecisionRecord(NamedTuple):
    """One answer of the policy."""
    t: int                                # the pose it was made at: states[t]
    text: str
    plan: list[int]                       # the actions that it says; [] if it is unreadable
    frame: np.ndarray | None = None       # of a dialog: what was shown
    answers: Sequence[list[int]] = ()     # of a dialog: ids of all answers drawn; the first is text


@dataclass(eq=False)
class EpisodeState:
    """One episode under way (a walk): where the robot was, what it saw, wrote and did."""
    episode: dict
    instruction: str
    keep_video: bool = False
    name: str = ""                        # its own among all walks; default: the episode's id
    states: list[dict] = field(default_factory=list)    # the simulator's, the start's first
    frames: list = field(default_factory=list)          # uint8 (H, W, 3), not encoded yet
    video_frames: list = field(default_factory=list)    # all frames, if keep_video
    features: list = field(default_factory=list)        # (tokens, hidden) per encoded frame
    actions: list[int] = field(default_factory=list)    # carried out so far, STOP included
    decisions: list[DecisionRecord] = field(default_factory=list)
    tokens: int = 0                       # read and written by the policy
    dialog_cache: Any = None              # of a dialog: keys and values of its turns so far
    end: str | None = None                # why it ended: see EpisodeLoop
    error: str | None = None
    refused: str | None = None            # the simulator's reason not to start the episode
    map: dict | None = None               # the simulator's "topdown", if keep_video

    def __post_init__(self):
        self.name = self.name or str(self.episode["episode_id"])

    def restarted(self) -> EpisodeState:
        """The same walk before its first step."""
        return EpisodeState(self.episode, self.instruction, self.keep_video, self.name)

    def add_decision(self, text: str, plan: list[int], frame=None, answers=()):
        """An answer of the policy. Of a dialog also what was shown, and the ids of all answers
        that were sampled, the given one first."""
        self.decisions.append(DecisionRecord(len(self.states) - 1, text, plan, frame, answers))
        self.frames.clear()

    def observe(self, reply: dict):
        """Take the answer to "reset" or "step": new poses, and frames if they were asked for."""
        self.states += reply["states"] if "states" in reply else [reply["state"]]
        frames = [reply["frame"]] if "frame" in reply else list(reply.get("frames", ()))
        self.frames += frames
        self.video_frames += frames if self.keep_video else []


@dataclass(eq=False)
class EpisodeLoop:
    """Walk all episodes, `sims` at a time: the one loop of every agent.

    A walk is in one of two places: its simulator works on a request, or it is in `waiting` for a
    plan. Each answer of a simulator is handled as it comes (on_reply), and leads to the next
    request, to `waiting`, or to the walk's end: "stop" (the robot called it), "malformed" (an
    unreadable answer was taken for STOP), "max_actions", "unreachable", "invalid", "error", or what
    should_stop(walk) returns before a decision.
    """
    pool: SimPool
    walks: deque[EpisodeState]                  # not started yet
    agent: Callable[[list[EpisodeState]], list[list[int] | None]]    # None: ask for the expert's
    sims: int
    max_actions: int = 500
    retries: int = 2                            # restarts of a walk whose simulator died
    render: bool | str = True                   # frames: all, none, or "last" of each plan's
    should_stop: Callable[[EpisodeState], str | None] = lambda walk: None
    min_waiting_fraction: float = 0.5
    counters: Counter = field(default_factory=Counter)    # adds "deciding_s", and "deaths"

    running: dict[int, EpisodeState] = field(default_factory=dict)    # by simulator
    waiting: list[int] = field(default_factory=list)                  # their simulators
    ended: list[EpisodeState] = field(default_factory=list)           # not handed out yet
    deaths: Counter = field(default_factory=Counter)                  # by walk
    last_decision_s: float = 0.0

    def run(self) -> Iterator[EpisodeState]:
        for sim in range(min(self.sims, len(self.walks))):
            self.reset(sim, self.walks.popleft())
        while self.running:
            self.listen()
            yield from self.ended
            self.ended.clear()
            self.decide()
        yield from self.ended

    def listen(self):
        """Handle answers until all robots wait; or until min_waiting_fraction of them have waited
        half as long as the last decision took. One decision for all costs less than two, but while
        one half gets its plans, the other half can simulate."""
        until = math.inf
        while len(self.waiting) < len(self.running):
            if len(self.waiting) >= self.min_waiting_fraction * len(self.running):
                until = min(until, time.perf_counter() + self.last_decision_s / 2)
            arrived = self.pool.wait_any(until - time.perf_counter())
            if arrived is None:
                break
            self.on_reply(*arrived)

    def decide(self):
        """One call of the agent for all waiting robots, in the order of their simulators: the
        batch does not depend on which of them came first."""
        sims, self.waiting, start = sorted(self.waiting), [], time.perf_counter()
        plans = self.agent([self.running[sim] for sim in sims]) if sims else []
        self.last_decision_s = time.perf_counter() - start
        self.counters["deciding_s"] += self.last_decision_s
        for sim, plan in zip(sims, plans):
            if plan is not None:
                self.act(sim, plan)
            elif is_finite(self.running[sim].states[-1]["distance_to_goal"]):
                self.pool.submit(sim, "expert")
            else:                                           # no expert knows a path: it has failed
                self.act(sim, [STOP])

    def reset(self, sim: int, walk: EpisodeState):
        self.running[sim] = walk
        self.pool.submit(sim, "reset", episode=walk.episode, frame=self.render or walk.keep_video)

    def act(self, sim: int, plan: list[int]):
        """Carry out a plan up to its STOP and to max_actions. STOP is no request: it ends."""
        walk = self.running[sim]
        plan = plan[:plan.index(STOP) + 1] if STOP in plan else plan
        plan = plan[:self.max_actions - len(walk.actions)]
        walk.actions += plan
        moves = [action for action in plan if action != STOP]
        if moves:
            self.pool.submit(sim, "step", actions=moves, frames=walk.keep_video or self.render)
        else:
            self.on_pose(sim)

    def on_reply(self, sim: int, reply: dict | Exception):
        walk = self.running[sim]
        failed = isinstance(reply, SimError)
        if walk.end:                                        # the map of finish(); or no picture
            walk.map = None if isinstance(reply, Exception) else reply
            self.release(sim)
        elif isinstance(reply, SimDied) and self.deaths[walk.name] < self.retries:
            self.deaths[walk.name] += 1
            self.counters["deaths"] += 1
            self.reset(sim, walk.restarted())
        elif isinstance(reply, SimDied):
            self.finish(sim, "error", str(reply))
        elif walk.refused:                                  # does its scene load, at least?
            self.finish(sim, "error" if failed else "invalid", walk.refused)
        elif failed and not walk.states:                    # the fault of its start, or its scene?
            walk.refused = str(reply)
            self.pool.submit(sim, "load", scene_id=walk.episode["scene_id"])
        elif failed:                                        # the fault of its goal: no retry helps
            self.finish(sim, "invalid", str(reply))
        elif "action" in reply:                             # the expert's
            self.act(sim, [reply["action"]])
        else:
            walk.observe(reply)
            self.on_pose(sim)

    def on_pose(self, sim: int):
        """A plan is carried out, or the start is reached: end the walk, or let it wait."""
        walk = self.running[sim]
        start = walk.states[0]["distance_to_goal"]
        if walk.episode.get("goals") and not is_finite(start):    # later on: it may come back
            self.finish(sim, "unreachable")
        elif walk.actions[-1:] == [STOP]:
            readable = not walk.decisions or walk.decisions[-1].plan
            self.finish(sim, "stop" if readable else "malformed")
        elif len(walk.actions) >= self.max_actions:
            self.finish(sim, "max_actions")
        elif (reason := self.should_stop(walk)) is not None:
            self.finish(sim, reason)
        else:
            self.waiting.append(sim)

    def finish(self, sim: int, end: str, error: str | None = None):
        walk = self.running[sim]
        walk.end, walk.error = end, error
        if walk.video_frames and not error:                 # its map, while the scene is loaded
            self.pool.submit(sim, "topdown")
        else:
            self.release(sim)

    def release(self, sim: int):
        """The simulator is free for the next walk."""
        self.ended.append(self.running.pop(sim))
        if self.walks:
            self.reset(sim, self.walks.popleft())


def run_episodes(pool: SimPool, walks: Iterable[EpisodeState], agent: Callable,
                 **options) -> Iterator[EpisodeState]:
    """Yield each walk as it ends. options: the fields of EpisodeLoop, such as sims=8."""
    return EpisodeLoop(pool, deque(walks), agent, **options).run()


# ---------------------------------------------------------------- agents


def scripted_agent(name: str, forward_steps: int | None, max_actions: int, seed: int) -> Callable:
    """The baselines. All but the oracle know their whole walk at the start."""
    def rng(walk):                                          # its own: batches do not matter
        return random.Random(f"{seed} {walk.name}")

    plans = {"oracle": lambda walk: None, "stop": lambda walk: [STOP],
             "forward": lambda walk: [FORWARD] * forward_steps + [STOP],
             "random": lambda walk: rng(walk).choices(       # VLN-CE's shares, not uniform
                 [FORWARD, LEFT, RIGHT, STOP], [0.68, 0.15, 0.15, 0.02], k=max_actions)}
    return lambda walks: [plans[name](walk) for walk in walks]


def device_and_dtype(args) -> tuple[str | None, str | None]:
    """--device and --dtype, with their defaults; (None, None) for a baseline."""
    if args.agent != "policy":
        return None, None
    import torch
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def load_agent(args, settings: dict, instructions: Iterable[str] = ()) -> Callable:
    """The agent of the flags. UserError if an instruction is too long for the policy, or if its
    log-probabilities are not finite: then what it samples is no answer."""
    if args.agent != "policy":
        return scripted_agent(args.agent, settings["forward_steps"], args.max_actions, args.seed)
    import torch

    from model import load_policy
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype(args)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    policy = load_policy(settings["ckpt"], device=device, dtype=dtype).eval()
    check_context(policy, instructions, settings["robot"])
    agent = policy.agent(execute=args.execute, malformed=args.malformed, blank=args.blank_frames,
                         temperature=args.temperature, seed=args.seed)

    def checked_agent(walks):
        plans = agent(walks)
        if policy.nan_logits:
            raise UserError(f"{settings['ckpt']} gives log-probabilities that are not finite: the "
                            "run that wrote it has diverged; train again with a lower --lr, or "
                            "give an earlier checkpoint")
        return plans
    return checked_agent


# ---------------------------------------------------------------- records and results


def episode_record(walk: EpisodeState, reference: list | None, radius: float,
                   second_radius: float) -> dict:
    """An ended walk -> its line of episodes.jsonl; only a scored walk carries metrics.

    reference: the ground truth's locations; None where there is none, and then no nDTW. The metrics
    of the second radius end in e.g. _3m. poses: [x, y, z, heading] from the start on, the heading
    in radians, as in VLN-CE: yaw about +y, left positive, 0 along -z.
    """
    unreadable = [decision.text for decision in walk.decisions if not decision.plan]
    row = {"episode_id": walk.episode["episode_id"],
           "trajectory_id": walk.episode.get("trajectory_id"),
           "scene_id": walk.episode["scene_id"], "end": walk.end, "steps": len(walk.actions),
           "decisions": len(walk.decisions), "malformed": len(unreadable)}
    if walk.end in ("error", "invalid"):
        return {**row, "error": walk.error}
    row |= {"tokens": walk.tokens} if walk.decisions else {}
    row["collisions"] = sum(bool(state["collided"]) for state in walk.states[1:])
    row["actions"] = "".join(map(str, walk.actions))
    row["poses"] = [[round(float(v), 6) for v in (*state["position"], yaw_of(state["rotation"]))]
                    for state in walk.states]
    row |= {"unreadable": unreadable[0][:200]} if unreadable else {}
    distances = [state["distance_to_goal"] for state in walk.states]
    if walk.end == "unreachable" or distances[0] is None:       # None: its goal is hidden
        return row
    path = [state["position"] for state in walk.states]
    length, similarity = path_length(path), ndtw(path, reference) if reference else None
    row |= {"start_distance": distances[0], "path_length": length,
            "distance_to_goal": distances[-1] if is_finite(distances[-1]) else None}
    row |= {"ndtw": similarity} if reference else {}
    for suffix, r in (("", radius), (f"_{second_radius:g}m", second_radius)):
        metrics = episode_metrics(distances, length, walk.end == "stop", r)
        metrics |= {"sdtw": metrics["success"] * similarity} if reference else {}
        row |= {name + suffix: value for name, value in metrics.items()}
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()}


def read_rows(path: str) -> tuple[list[dict], int]:
    """-> rows, and how many bytes are whole lines. A last line cut short by a kill is left out."""
    with open(path, "rb") as file:
        data = file.read()
    whole = data[:data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder and start again") from None


def known_rows(out: str) -> dict[str, dict]:
    """The rows of all ranks, {str(episode_id): row}; of two, the one that is not an error."""
    rows = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "episodes*.jsonl"))):
        for row in read_rows(path)[0]:
            if rows.get(str(row["episode_id"]), {"end": "error"})["end"] == "error":
                rows[str(row["episode_id"])] = row
    return rows


def read_json(path: str) -> Any:
    with open(path) as file:
        return json.load(file)


TITLES = {"success": "SR", "spl": "SPL", "oracle_success": "OS", "distance_to_goal": "NE (m)",
          "path_length": "TL (m)", "ndtw": "nDTW", "sdtw": "SDTW", "steps": "steps"}
AT_RADIUS = ("success", "spl", "oracle_success", "sdtw")        # the others know no radius
RATES = ("success", "oracle_success")                   # 0 or 1 per episode; the rest are means


def summarise(rows: Sequence[dict], radius: float, second_radius: float, seed: int) -> dict:
    """Rows -> the numbers of results.json. A metric that no row has is {"mean": None, "ci": None}.
    """
    scored = [row for row in rows if "success" in row]
    second = f"_{second_radius:g}m"
    names = [*TITLES, *(name + second for name in AT_RADIUS)]
    units, kind = sampling_units(scored)
    metrics = cluster_bootstrap({name: [row.get(name) for row in scored] for name in names}, units,
                                seed=seed)
    for key in [name + end for name in RATES for end in ("", second)] if scored else ():
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
            "radius_m": radius, "second_radius_m": second_radius, "metrics": metrics,
            "interval": {"level": 0.95, "rates": "Wilson, effective number of episodes",
                         "means": "bootstrap", "units": kind, "n_units": len(set(units))}}


def format_results(results: dict) -> str:
    """The numbers of results.json for the screen."""
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
        lines.append(f"  {results['no_way_at_end']} walks ended where no path to the goal is known:"
                     " failed, and left out of NE")
    if results.get("shuffled_instruction"):
        lines.append(f"  {results['instructions_from_same_scene']} of {results['episodes']} "
                     "instructions belong to a walk to another goal in the same scene, the others "
                     "to one in another scene")
    for name, found in results["metrics"].items():
        metric = name.removesuffix(f"_{results['second_radius_m']:g}m")
        radius = results["radius_m" if name == metric else "second_radius_m"]
        at = f"@ {radius:g} m" if metric in AT_RADIUS else ""
        if found["mean"] is not None:
            ci = "[{:.3f}, {:.3f}]".format(*found["ci"]) if found["ci"] else "all alike"
            lines.append(f"  {TITLES[metric]:7}{at:7}{found['mean']:8.3f}   {ci}")
    if results.get("no_ndtw"):
        lines.append(f"  nDTW and SDTW are not measured: {results['no_ndtw']}")
    if results["scored"]:
        lines.append("  95% intervals: " + describe_intervals(results["interval"]))
    return "\n".join(lines)


def describe_intervals(interval: dict) -> str:
    """results.json's "interval" in words."""
    few = "" if interval["units"] == "scenes" else (
        f"; fewer than {MIN_SCENES} scenes, so they hold for these scenes only")
    return (f"Wilson for SR, OS; a bootstrap over {interval['n_units']} {interval['units']} for "
            f"means{few}")


# ---------------------------------------------------------------- what is evaluated


def speaks_dialog(contract: dict | None) -> bool:
    return (contract or {}).get("prompt", "").startswith("dialog")   # policy_class needs torch


def choose_ckpt(args) -> tuple[str | None, dict | None]:
    """-> the checkpoint folder and its contract; (None, None) for a baseline."""
    if args.agent != "policy":
        return None, None
    there = [c for c in ("ckpt/grpo", "ckpt/sft") if os.path.exists(os.path.join(c, "nav.json"))]
    if not args.ckpt and not there:
        raise UserError("no checkpoint in ckpt/grpo or ckpt/sft: train one (python sft.py), name "
                        "one with --ckpt, or walk a baseline with --agent oracle")
    ckpt = os.path.normpath(args.ckpt or there[0])
    try:
        contract = read_json(os.path.join(ckpt, "nav.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{ckpt} has no readable nav.json ({error}): --ckpt must name a folder "
                        "written by one of the trainers") from None
    if not (1 <= args.execute <= contract["horizon"] or speaks_dialog(contract)):
        raise UserError(f"--execute {args.execute} does not fit {ckpt}, which plans "
                        f"{contract['horizon']} actions at a time")
    return ckpt, contract


def choose_robot(args, ckpt: str | None, contract: dict | None, episode: dict) -> dict:
    """Body and camera: the checkpoint's; else --robot, or that of the episodes' data set.
    UserError if a flag contradicts the checkpoint."""
    name = args.robot or (contract["dataset"] if contract and contract["dataset"] in ROBOTS
                          else dataset_of(episode))
    robot = robot_from_args(args, ROBOTS[name])
    trained = {key: contract[key] for key in robot if contract and contract.get(key) is not None}
    for key, value in trained.items():
        stated = args.robot or vars(args)[key] is not None
        if stated and abs(value - robot[key]) > 1e-6:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{ckpt} was trained with {key} = {value} and the robot {name!r} has "
                            f"{robot[key]}: leave --robot and {flag} out, since a checkpoint brings"
                            " its own, or take another --ckpt")
    return {**robot, **trained}


def check_episodes(episodes: list[dict], truths: dict | None, source: str):
    """UserError unless all episodes have what the metrics need. truths: None where the split has
    none. (read_episodes() has checked everything else.)"""
    hidden = not any(episode["goals"] for episode in episodes)
    for episode in episodes:
        if not hidden and not episode["goals"]:
            raise UserError(f"episode {episode['episode_id']} of {source} has no goal, and others "
                            "have one: copy the episodes again, or take it out")
        if truths is not None and str(episode["episode_id"]) not in truths:
            raise UserError(f"episode {episode['episode_id']} of {source} has no ground truth to "
                            "measure by: copy the _gt.json.gz of the same release")


def check_context(policy, instructions: Iterable[str], robot: dict):
    """UserError if the longest prompt of an instruction does not fit the model's context.

    The longest: with as many remembered frames as there can be; of a dialog, its first turn.
    """
    texts = sorted(set(instructions))
    limit = policy.model.config.text_config.max_position_embeddings - MAX_ANSWER_TOKENS
    prompt = policy.longest_prompt(robot["height"], robot["width"])
    ids = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(range(len(texts)), key=lambda i: len(ids[i]))
    tokens = len(prompt.ids) + len(ids[longest])
    if tokens > limit:
        raise UserError(f"the instruction \"{texts[longest][:60]}..\" has {len(ids[longest])} "
                        f"tokens, its prompt {tokens}, and the model's context holds {limit}: "
                        "shorten or remove it in the episode file")


def success_radius(episodes: list[dict]) -> float:
    """The success radius that all goals name, VLN-CE's where they name none."""
    radii = {goal.get("radius") or VLNCE_RADIUS_M for e in episodes for goal in e["goals"]}
    if len(radii) > 1:
        raise UserError("the goals of the data have no common radius: evaluate them in parts")
    return radii.pop() if radii else VLNCE_RADIUS_M


def evenly_spaced(items: Sequence, n: int) -> list:
    """n of the items, evenly over all of them.

    >>> evenly_spaced("abcdefgh", 3), evenly_spaced("ab", 3)
    (['a', 'c', 'f'], ['a', 'b'])
    """
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def shuffled_instructions(episodes: list[dict], seed: int,
                          radius: float) -> tuple[dict[str, str], set[str]]:
    """For each episode the instruction of another walk -> {str(episode_id): text}, and the ids of
    those whose text is of a walk in the same scene.

    The other walk leads to another goal (more than `radius` metres away, or its text would be
    right) and has another text, of the same language. It is of the same scene where there is one:
    a text from elsewhere names things that are not there, which a policy could notice.
    """
    order = random.Random(seed).sample(episodes, len(episodes))
    scenes, texts, same_scene = {}, {}, set()
    for episode in order:
        scenes.setdefault(episode["scene_id"], []).append(episode)

    def fits(mine, other):
        a, b = mine["instruction"], other["instruction"]
        return (mine["trajectory_id"] != other["trajectory_id"]
                and a["instruction_text"] != b["instruction_text"]
                and a.get("language") == b.get("language")
                and (mine["scene_id"] != other["scene_id"] or all(
                    math.dist(goal["position"], another["position"]) > radius
                    for goal in mine["goals"] for another in other["goals"])))

    for at, mine in enumerate(order):
        here = scenes[mine["scene_id"]]
        k = here.index(mine)
        found = next((other for other in (*here[k + 1:], *here[:k], *order[at + 1:], *order[:at])
                      if fits(mine, other)), None)
        if found is None:
            raise UserError("--shuffled-instruction needs walks with different instructions: "
                            f"episode {mine['episode_id']} finds none in its language")
        texts[str(mine["episode_id"])] = found["instruction"]["instruction_text"]
        if found["scene_id"] == mine["scene_id"]:
            same_scene.add(str(mine["episode_id"]))
    return texts, same_scene


def fingerprint(folder: str) -> str:
    """A hash of 64 samples of each file of weights: a retrained checkpoint is another one."""
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            for k in range(64):
                file.seek(size * k // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


class Evaluation(NamedTuple):
    settings: dict                  # run.json
    episodes: list[dict]            # those that are walked
    truths: dict | None             # ground truth by str(episode_id)
    instructions: dict[str, str]    # by str(episode_id)
    scenes: str                     # folder


def prepare(args) -> Evaluation:
    """Read what the flags name. UserError if it does not fit together."""
    ckpt, contract = choose_ckpt(args)
    dataset = contract["dataset"] if contract else "houses"
    source = args.episodes or EPISODES.get(dataset, EPISODES["houses"])
    every = read_episodes(source, args.split, args.role, args.languages)
    hidden = not any(episode["goals"] for episode in every)     # a test split: its server scores it
    truths = None if hidden else read_ground_truth(source, args.split, args.role, optional=True)
    episodes = evenly_spaced(every, args.limit or len(every))
    scenes = args.scenes or scenes_of(source)
    robot = choose_robot(args, ckpt, contract, every[0])
    check_episodes(every, truths, f"{source} ({args.split})")
    used = scenes_used(args, robot, scenes, episodes)
    walked = paired(episodes, truths or {})
    if args.turn_deg is None and not (contract and contract["dataset"] == dataset_of(every[0])):
        check_turn_deg(walked, robot["turn_deg"])               # a flag is meant as it is given
    forward_steps = [walk["actions"].count(FORWARD) for walk in walked]
    if args.agent == "oracle" and hidden or args.agent == "forward" and not walked:
        raise UserError(f"{source} ({args.split}) has no ground truth, or hides its goals: there "
                        f"is no --agent {args.agent}; choose another --agent or --split")
    radius, same_scene = success_radius(every), set()
    instructions = {str(e["episode_id"]): e["instruction"]["instruction_text"] for e in every}
    if args.shuffled_instruction:
        instructions, same_scene = shuffled_instructions(every, args.seed, radius)
    data = json.dumps([episodes, [walk["locations"] for walk in walked]])
    flags = ("split", "role", "languages", "agent", "sim", "execute", "malformed", "temperature",
             "max_actions", "limit", "blank_frames", "shuffled_instruction", "seed")
    device, dtype = device_and_dtype(args)
    settings = {**{key: getattr(args, key) for key in flags}, "ckpt": ckpt,
                "device": device and device.split(":")[0], "dtype": dtype,
                "weights": ckpt and fingerprint(ckpt), "contract": contract, "robot": robot,
                "source": source,
                "data": hashlib.sha256(data.encode()).hexdigest()[:16], "radius_m": radius,
                "second_radius_m": 1.0 if radius == 3 else 3.0, "scenes": used,
                "forward_steps": round(np.mean(forward_steps)) if walked else None,
                "episodes": len(episodes)}
    if args.shuffled_instruction:
        settings["instructions_from_same_scene"] = sum(
            str(e["episode_id"]) in same_scene for e in episodes)
    if truths is None and not hidden:
        settings["no_ndtw"] = no_ground_truth(source, args.split, args.role)
    return Evaluation(settings, episodes, truths, instructions, scenes)


# ---------------------------------------------------------------- the run, top to bottom


def open_out(out: str, settings: dict):
    """Make the results folder, or go on in one that holds the same measurement."""
    path, rank = os.path.join(out, "run.json"), os.environ.get("RANK", "0")
    lock_folder(out, name=".lock" if rank == "0" else f".lock.{rank}")      # each has its own files
    if not os.path.exists(path):
        write_json(path, settings)
    held = read_json(path)
    differ = sorted(key for key in {*settings, *held} if held.get(key) != settings.get(key))
    if differ:
        raise UserError(f"{out} holds another measurement (of other {', '.join(differ)}): give "
                        "another --out, or delete that folder")


def default_out(args, ckpt: str | None) -> str:
    parts = ["results/" + (os.path.basename(ckpt) if ckpt else args.agent)]
    parts += ["blank_frames"] * args.blank_frames
    parts += ["shuffled_instruction"] * args.shuffled_instruction + [args.split]
    return "_".join(parts + [f"limit{args.limit}"] * bool(args.limit))


def walk_all(args, evaluation: Evaluation, todo: list[dict], out: str, suffix: str, bar: tqdm):
    """Walk the episodes `todo`; each row is on disk before the next decision."""
    settings, episodes, truths, instructions, scenes = evaluation
    names = [str(episode["episode_id"]) for episode in episodes]
    with_pictures = set(evenly_spaced(names, args.pictures))
    if with_pictures:
        from tools.page import save_pictures
    walks = (EpisodeState(e, instructions[name], keep_video=name in with_pictures)
             for e in todo for name in [str(e["episode_id"])])
    agent = load_agent(args, settings, instructions.values())
    sims, counters, start = min(args.sims, len(todo)), Counter(), time.perf_counter()
    gpus = args.sim_gpus
    if not gpus and not args.sim_command and "LOCAL_RANK" in os.environ and visible_gpus():
        gpus = [int(os.environ["LOCAL_RANK"])]
    render = args.agent == "policy" and ("last" if speaks_dialog(settings["contract"]) else True)
    radius = settings["radius_m"]
    with open(os.path.join(out, f"episodes{suffix}.jsonl"), "a") as file, SimPool(
            args.sim, settings["robot"], scenes, sims, simulator_commands(args), args.sim_timeout,
            gpus) as pool:
        pool.note_versions(out, evaluation.episodes[0]["scene_id"])
        for walk in run_episodes(pool, walks, agent, sims=sims, max_actions=args.max_actions,
                                 retries=args.retries, render=render, counters=counters):
            reference = truths and truths[walk.name]["locations"]
            row = episode_record(walk, reference, radius, settings["second_radius_m"])
            if walk.map:
                save_pictures(walk, row, reference, settings["robot"], radius,
                              os.path.join(out, "pictures"))
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            counters.update(walks=1, steps=row["steps"], scored="success" in row,
                            success=row.get("success", 0))
            if counters["scored"]:
                bar.set_postfix(SR=f"{counters['success'] / counters['scored']:.2f}", refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    write_json(os.path.join(out, f"timing{suffix}.json"),
               {"seconds": seconds, "sims": sims, **counters})
    print(f"{counters['walks']} walks in {seconds:.1f} s, {counters['walks'] / seconds:.1f} a "
          f"second in {sims} simulators", flush=True)


def write_results(out: str, settings: dict, rows: list[dict]) -> dict:
    """Rows of all episodes -> results.json, and the same for the screen."""
    versions = {name: metadata.version(name) for name in ("numpy", "torch", "transformers")}
    results = {**settings, **summarise(rows, settings["radius_m"], settings["second_radius_m"],
                                       settings["seed"]), "versions": versions}
    results["simulator"] = read_json(os.path.join(out, "simulator.json"))
    write_lines(os.path.join(out, "episodes.jsonl"), rows)
    write_json(os.path.join(out, "results.json"), results)
    print(format_results(results))
    first = {row["end"]: row for row in reversed(rows)}             # of each kind of end
    if results["invalid"]:
        print(f"  {results['invalid']} episodes are invalid and will not be walked again, the "
              f"first is {first['invalid']['episode_id']}: {first['invalid']['error']}")
    if results["errors"]:
        sys.exit(f"evaluate.py: error: {results['errors']} episodes ended in simulator errors and "
                 f"have no score (first {first['error']['episode_id']}: {first['error']['error']});"
                 " the same command tries them again")
    return results


def main(args):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    suffix = "" if ranks == 1 else f".{rank}"

    # 1. what is measured, and which rows are there already
    evaluation = prepare(args)
    settings, episodes = evaluation.settings, evaluation.episodes
    out = args.out or default_out(args, settings["ckpt"])
    open_out(out, settings)
    path = os.path.join(out, f"episodes{suffix}.jsonl")
    if os.path.exists(path):
        os.truncate(path, read_rows(path)[1])               # a line that a kill has cut short
    done = {name for name, row in known_rows(out).items() if row["end"] != "error"}
    mine = episodes[rank::ranks]
    todo = [e for e in mine if str(e["episode_id"]) not in done]
    print(f"{out}: {settings['ckpt'] or args.agent} walks {len(todo)} episodes of "
          f"{settings['source']} ({args.split}); {len(mine) - len(todo)} of {len(mine)} have "
          f"walked already" + f", rank {rank} of {ranks}" * (ranks > 1), flush=True)

    # 2. walk
    if todo:
        with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="walk",
                  mininterval=1 if sys.stderr.isatty() else 30) as bar:
            walk_all(args, evaluation, todo, out, suffix, bar)

    # 3. measure, once every episode has its row: with several ranks, the one that ends last
    rows, names = known_rows(out), [str(e["episode_id"]) for e in episodes]
    missing = [name for name in names if name not in rows]
    if missing and not any(str(e["episode_id"]) in missing for e in mine):
        return print(f"rank {rank} is done; {len(missing)} episodes of other ranks are not")
    if missing:
        sys.exit(f"evaluate.py: error: {len(missing)} of {len(names)} episodes have no row in "
                 f"{out}, the first is {missing[0]}: run the same command again")
    return write_results(out, settings, [rows[name] for name in names])


if __name__ == "__main__":
    run_cli(main, parse_args)
