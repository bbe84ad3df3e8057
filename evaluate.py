"""
Closed-loop evaluation: the policy walks in a simulator, and its walks are measured.

Each robot has its own simulator. The policy sees its camera's frame and writes the next six
actions; the robot carries out the first --execute of them. This repeats until STOP, or until
--max-actions. All robots that wait for a plan share one batch, while the other robots walk on.

Metrics, as VLN-CE defines them [1, 2]; d is the geodesic distance to the goal, r the radius:
    NE    distance_to_goal   d at the last pose, metres
    TL    path_length        sum of the Euclidean steps, metres
    SR    success            STOP was called by a readable answer, and d < r
    OS    oracle_success     d < r at any pose, the start included; no STOP needed
    SPL   spl                success * L / max(L, TL), where L is d at the start
    nDTW  ndtw               exp(-DTW(walked, ground truth) / (3 m * points of ground truth)) [3]
    SDTW  sdtw               success * ndtw
Some episodes have no score: "unreachable" (no finite d at the start), "invalid" (the simulator
refuses start or goal) and "error" (the simulator failed; the same command tries again).

Run it   python evaluate.py --split val_unseen                # ckpt/grpo if there, else ckpt/sft
         torchrun --nproc_per_node 8 evaluate.py --split val_unseen --ckpt ckpt/r2r --sim habitat
Writes   --out: run.json (settings), episodes.jsonl (a line per episode), results.json (means and
         95% intervals), protocol.json (what was measured: world/protocol.py), timing.json,
         pictures/ (tools/pictures.py), walks/ and page/ (tools/page.py)
Expect   --agent oracle near 1, stop and forward near 0. The same command continues a killed run.
         With a scripted --agent the files are equal to the byte; with --ckpt the batches depend on
         timing, so nearly equal logits may round to another plan.

[1] https://github.com/jacobkrantz/VLN-CE habitat_extensions/measures.py
[2] habitat-lab 0.1.7, habitat/tasks/nav/nav.py             [3] https://arxiv.org/abs/1907.05446
"""
from __future__ import annotations

import argparse
import glob
import hashlib
import importlib.util
import json
import math
import operator
import os
import random
import re
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
    fingerprint,
    lock_folder,
    non_negative,
    positive_int,
    read_json,
    read_rows,
    run_cli,
    whole_number,
    write_json,
    write_lines,
)
from intervals import (
    cluster_bootstrap,
    describe_intervals,
    rate_interval,
    sampling_units,
)
from reward import FORWARD, LEFT, MAX_ANSWER_TOKENS, RIGHT, STOP
from world import SimDied, SimError
from world.episodes import (
    EPISODES,
    add_episode_args,
    check_episodes,
    check_turn_deg,
    dataset_of,
    no_ground_truth,
    paired,
    read_episodes,
    read_ground_truth,
    scenes_of,
    success_radius,
)
from world.pool import SimPool, scenes_used
from world.protocol import format_card, protocol_flags, protocol_names, write_card
from world.robots import (
    add_robot_args,
    add_simulator_args,
    choose_robot,
    simulator_commands,
    simulator_gpus,
    yaw_of,
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--split", default="val_unseen")
    add("--limit", type=positive_int, help="so many episodes, evenly spaced over the split")
    add_episode_args(add)
    add("--ckpt", help="checkpoint folder; default: ckpt/grpo if it is there, else ckpt/sft")
    add("--nav", metavar="FILE", help="the navigation contract of a --ckpt that another project "
        "trained, as activevln.released writes it; default: nav.json in the folder")
    add("--episodes", help="folder with <split>/<split>.json.gz and its _gt; default: that of the "
        "data set which the checkpoint names, " + EPISODES["houses"] + " for ours")
    add("--scenes", help="what scene_id is below; default: <episodes>/scenes if it is there, else "
        "data/scene_datasets")
    add("--out", help="default: results/<checkpoint or agent>_<split>")
    add("--pictures", type=count_or_all, default="none", help="of so many episodes, evenly "
        "spaced: none, all, or a number")
    add("--page", type=count_or_all, default="none", help="record so many episodes, evenly spaced, "
        "for a player, and write a page to look at: none, all, or a number")
    add = p.add_argument_group("simulator").add_argument
    add("--protocol", choices=protocol_names(), metavar="NAME", help="set what a published "
        "protocol (docs/protocols) states, such as robot and --max-actions; a flag beside it wins")
    add_simulator_args(add, sims=8)
    add_robot_args(add, "the checkpoint's, and the data set's for a baseline")
    add = p.add_argument_group("agent").add_argument
    add("--agent", type=agent_name, default="policy", help=f"{', '.join(AGENTS)}, or FILE.py:"
        "function, a Python function (instruction, frames so far) -> actions: docs/robot.md")
    add("--server", metavar="URL", help="an OpenAI-compatible server that runs the model of --ckpt,"
        " as http://127.0.0.1:8000/v1 (--ckpt gives the contract, the tokenizer and the prompt), or"
        " tools.serve, as http://127.0.0.1:8008: docs/robot.md")
    add("--served-model", metavar="NAME", help="the model's name there")
    add("--server-timeout", type=non_negative, default=120, help="seconds for a request's answer")
    add("--execute", type=positive_int, default=3, help="actions of a plan that are carried out "
        "(VLN-R1 does not say how many): half of them, between fresh frames and speed. Answers of "
        "a dialog are always carried out whole")
    add("--malformed", choices=("stop", "forward"), default="stop",
        help="what an unreadable answer makes the robot do; never a random action")
    add("--temperature", type=non_negative, help="0: greedy; above: sampled, from seeds that "
        "belong to episode and step; default: what the contract says of sampling, else 0")
    add("--max-actions", type=positive_int, default=500, help="of a walk; VLN-CE's; STOP counts")
    add("--blank-frames", action="store_true", help="control run: every frame is black")
    add("--shuffled-instruction", action="store_true", help="control run: each episode gets the "
        "instruction of another walk, in the same scene where one leads to another goal")
    add = p.add_argument_group("machine").add_argument
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, else float32")
    add("--threads", type=positive_int, default=1, help="CPU threads per process")
    add("--seed", type=whole_number, default=0)
    add("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    args = p.parse_args(argv)
    if args.protocol:                                       # as defaults, so that flags win
        p.set_defaults(**protocol_flags(args.protocol))
        args = p.parse_args(argv)
    return args


AGENTS = ("policy", "oracle", "random", "forward", "stop")


def agent_name(text: str) -> str:
    """The type of --agent."""
    if text not in AGENTS and not re.fullmatch(r".+\.py:\w+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(AGENTS)}, and not "
                                         "FILE.py:function")
    return text


def sees(agent: str) -> bool:
    """Does an agent look at frames? The scripted baselines do not."""
    return agent == "policy" or ":" in agent


def count_or_all(text: str) -> int:
    """The type of --pictures and --page."""
    return {"none": 0, "0": 0, "all": sys.maxsize}[text] if text in (
        "none", "0", "all") else positive_int(text)


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

    A walk of 5 m that starts 4 m from the goal, passes it at 0.5 m, and stops 2 m from it:
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
    actions: list[int] = field(default_factory=list)    # given to the robot, STOP included
    decisions: list[DecisionRecord] = field(default_factory=list)
    tokens: int = 0                       # read and written by the policy
    dialog_cache: Any = None              # of a dialog: keys and values of its turns so far
    end: str | None = None                # why it ended: see EpisodeLoop
    error: str | None = None
    refused: str | None = None            # the simulator's reason not to start the episode
    map: dict | None = None               # the simulator's "topdown", if keep_video
    forced_stop: str | None = None        # the contract's limit that called STOP

    def __post_init__(self):
        self.name = self.name or str(self.episode["episode_id"])

    def restarted(self) -> EpisodeState:
        """The same walk before its first step."""
        return EpisodeState(self.episode, self.instruction, self.keep_video, self.name)

    def add_decision(self, text: str, plan: list[int], frame=None, answers=()):
        """Record an answer of the policy, made at the last pose (DecisionRecord)."""
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

    A walk under way is in one of two states: its simulator works on a request, or it is in
    `waiting` for a plan. Each reply of a simulator is handled when it comes (on_reply); the next
    state is another request, `waiting`, or the walk's end:
        reset -> on_pose -> waiting -> decide -> act -> on_pose -> .. -> finish -> release
    Ends are "stop" (the policy called it), "malformed" (an unreadable answer was taken for STOP),
    "max_actions", "unreachable", "invalid", "error", or what should_stop(walk) returns.
    """
    pool: SimPool
    walks: deque[EpisodeState]                  # not started yet
    agent: Callable[[list[EpisodeState]], list[list[int] | None]]    # None: the expert's action
    sims: int
    max_actions: int = 500
    retries: int = 2                            # restarts of a walk whose simulator died
    render: bool | str = True                   # frames: all, none, or "last" of each plan's
    should_stop: Callable[[EpisodeState], str | None] = lambda walk: None
    min_waiting_fraction: float = 0.5
    counters: Counter = field(default_factory=Counter)    # adds "deciding_s", and "deaths"

    running: dict[int, EpisodeState] = field(default_factory=dict)    # by simulator
    waiting: list[int] = field(default_factory=list)                  # their simulators
    ended: list[EpisodeState] = field(default_factory=list)           # not yielded yet
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
        """Handle replies until all robots wait; or until min_waiting_fraction of them have waited
        half as long as the last decision took. One decision for all robots costs less than two for
        half of them each, but during a decision for one half, the other half can simulate."""
        until = math.inf
        while len(self.waiting) < len(self.running):
            if len(self.waiting) >= self.min_waiting_fraction * len(self.running):
                until = min(until, time.perf_counter() + self.last_decision_s / 2)
            arrived = self.pool.wait_any(until - time.perf_counter())
            if arrived is None:
                break
            self.on_reply(*arrived)

    def decide(self):
        """Call the agent once for all waiting robots, in the order of their simulators, so that the
        batch does not depend on which reply came first."""
        sims, self.waiting, start = sorted(self.waiting), [], time.perf_counter()
        plans = self.agent([self.running[sim] for sim in sims]) if sims else []
        self.last_decision_s = time.perf_counter() - start
        self.counters["deciding_s"] += self.last_decision_s
        for sim, plan in zip(sims, plans):
            if plan is not None:
                self.act(sim, plan)
            elif is_finite(self.running[sim].states[-1]["distance_to_goal"]):
                self.pool.submit(sim, "expert")
            else:                                           # the expert knows no path either
                self.act(sim, [STOP])

    def reset(self, sim: int, walk: EpisodeState):
        self.running[sim] = walk
        self.pool.submit(sim, "reset", episode=walk.episode, frame=self.render or walk.keep_video)

    def act(self, sim: int, plan: list[int]):
        """Carry out a plan up to its STOP and to max_actions. STOP is no request to a simulator."""
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
        if walk.end:                                        # finish() has asked for the map
            walk.map = None if isinstance(reply, Exception) else reply
            self.release(sim)
        elif isinstance(reply, SimDied) and self.deaths[walk.name] < self.retries:
            self.deaths[walk.name] += 1
            self.counters["deaths"] += 1
            self.reset(sim, walk.restarted())
        elif isinstance(reply, SimDied):
            self.finish(sim, "error", str(reply))
        elif walk.refused:                                  # the reply is that to "load", below
            self.finish(sim, "error" if failed else "invalid", walk.refused)
        elif failed and not walk.states:                    # is its scene wrong, or its start?
            walk.refused = str(reply)
            self.pool.submit(sim, "load", scene_id=walk.episode["scene_id"])
        elif failed:                                        # its goal is wrong: no retry helps
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
        if walk.episode.get("goals") and not is_finite(start):    # later poses may be off the mesh
            self.finish(sim, "unreachable")
        elif walk.actions[-1:] == [STOP]:
            readable = not walk.decisions or walk.decisions[-1].plan
            self.finish(sim, "stop" if readable else "malformed")
        elif (reason := self.should_stop(walk)) is not None:
            self.finish(sim, reason)
        elif len(walk.actions) >= self.max_actions:
            self.finish(sim, "max_actions")
        else:
            self.waiting.append(sim)

    def finish(self, sim: int, end: str, error: str | None = None):
        walk = self.running[sim]
        walk.end, walk.error = end, error
        if walk.video_frames and not error:                 # the map, while the scene is loaded
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


def forced_stop(limits: dict, max_actions: int) -> Callable[[EpisodeState], str | None]:
    """EpisodeLoop.should_stop of a contract with "early_stop": STOP is called for the robot after
    so many actions in a row that do not change its distance to the goal, after so many actions, or
    after so many answers.

    The first two may be reached within a plan. The walk then ends there, and what the robot did
    after that is taken out of it.
    """
    def should_stop(walk: EpisodeState) -> str | None:
        distances, same, t = [state["distance_to_goal"] for state in walk.states], 0, 0
        reason = None
        while t < len(distances) - 1 and reason is None:
            t += 1
            known = is_finite(distances[t])                 # a test split hides its goals
            same = same + 1 if known and distances[t] == distances[t - 1] else 0
            reason = ("same_distance" if same >= limits["same_distance"] else
                      "actions" if t >= limits["actions"] else None)
        if reason is None and len(walk.decisions) >= limits["turns"]:
            reason = "turns"
        if reason is None or t >= max_actions:                  # no room for a STOP
            return None
        del walk.states[t + 1:], walk.actions[t:], walk.video_frames[t + 1:]
        walk.actions.append(STOP)
        walk.forced_stop = reason
        return "stop"
    return should_stop


# ---------------------------------------------------------------- agents


def scripted_agent(name: str, forward_steps: int | None, max_actions: int, seed: int) -> Callable:
    """The baselines. All but the oracle plan their whole walk at the start."""
    plans = {"oracle": lambda walk: None, "stop": lambda walk: [STOP],
             "forward": lambda walk: [FORWARD] * forward_steps + [STOP],
             # VLN-CE's shares. A generator for each walk: the result does not depend on batches.
             "random": lambda walk: random.Random(f"{seed} {walk.name}").choices(
                 [FORWARD, LEFT, RIGHT, STOP], [0.68, 0.15, 0.15, 0.02], k=max_actions)}
    return lambda walks: [plans[name](walk) for walk in walks]


def python_agent(name: str, blank: bool = False) -> Callable:
    """The agent of --agent FILE.py:function. UserError if there is no such function, or if what it
    returns is not a list of actions.

    function(instruction, frames): frames are all of the walk so far, uint8 (H, W, 3), the current
    one last. It returns the actions to carry out before it is asked again, at least one; STOP ends
    the walk. It is called for one walk after the other, so it must not keep a walk's state.
    """
    path, _, function_name = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("evaluated_agent", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))          # for what it imports
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--agent {name}: {path} does not load ({type(error).__name__}: {error}); "
                        "correct that file") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--agent {name}: {path} defines no function {function_name}; give "
                        "FILE.py:function")

    def plan_of(walk: EpisodeState) -> list[int]:
        frames = [np.zeros_like(frame) if blank else frame for frame in walk.frames]
        plan = function(walk.instruction, frames)
        try:
            actions = [operator.index(action) for action in plan]
        except TypeError:
            actions = []
        if not actions or not set(actions) <= {STOP, FORWARD, LEFT, RIGHT}:
            raise UserError(f"--agent {name} returned {plan!r:.80} in episode {walk.name}, step "
                            f"{len(walk.actions)}: it must return a list of one or more actions, "
                            f"{STOP} stop, {FORWARD} forward, {LEFT} left, {RIGHT} right")
        return actions
    return lambda walks: [plan_of(walk) for walk in walks]


def check_context(policy, instructions: Iterable[str], robot: dict) -> None:
    """UserError if the longest prompt (all remembered frames, or a dialog's first turn) with the
    longest instruction does not fit the model's context."""
    texts = sorted(set(instructions))
    limit = policy.model.config.text_config.max_position_embeddings - MAX_ANSWER_TOKENS
    prompt = policy.longest_prompt(robot["height"], robot["width"])
    lengths = [len(ids) for ids in policy.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest, text = max(zip(lengths, texts), key=lambda pair: pair[0])
    tokens = len(prompt.ids) + longest
    if tokens > limit:
        raise UserError(f"the instruction \"{text[:60]}..\" has {longest} tokens, its prompt "
                        f"{tokens}, and the model's context holds {limit}: shorten or remove it in "
                        "the episode file")


def device_and_dtype(args) -> tuple[str | None, str | None]:
    """The kind of device, and the dtype, of the flags; (None, None) where no model runs here."""
    if args.agent != "policy" or args.server:
        return None, None
    device, dtype = choose_device(args)
    return device.split(":")[0], dtype


def choose_device(args) -> tuple[str, str]:
    """--device and --dtype, or their defaults. UserError if there is no such device."""
    import torch
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used ({str(error).splitlines()[0]}): give "
                        "cpu, or cuda where torch finds a GPU") from None
    return device, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def served_agent(args, settings: dict, instructions: Iterable[str], out: str) -> Any:
    """The agent of --server (tools.remote), after its check, which server.json holds."""
    from checkpoint import load_policy
    from tools.remote import connect
    policy = load_policy(settings["ckpt"], settings["contract"], "meta", replace_contract=True)
    check_context(policy, instructions, settings["robot"])
    agent = connect(args, settings, policy, out)
    write_json(os.path.join(out, "server.json"), agent.check(
        next(iter(instructions)), settings["robot"]["height"], settings["robot"]["width"]))
    return agent


def load_agent(args, settings: dict, instructions: Iterable[str]) -> Callable:
    """The agent of the flags. UserError if an instruction is too long for the policy; later if a
    log-probability is not finite, since then samples mean nothing."""
    if ":" in args.agent:
        return python_agent(args.agent, args.blank_frames)
    if args.agent != "policy":
        return scripted_agent(args.agent, settings["forward_steps"], args.max_actions, args.seed)
    import torch

    from checkpoint import load_policy
    torch.set_num_threads(args.threads)
    device = args.device or settings["device"]
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    policy = load_policy(settings["ckpt"], settings["contract"], device, settings["dtype"],
                         replace_contract=True).eval()
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
    row |= {"forced_stop": walk.forced_stop} if walk.forced_stop else {}
    distances = [state["distance_to_goal"] for state in walk.states]
    if walk.end == "unreachable" or distances[0] is None:       # None: its goal is hidden
        return row
    path = [state["position"] for state in walk.states]
    # From the places as recorded: a body that leans on a wall may move by less than a micrometre,
    # and each such pose would count as a point of the path.
    places = [pose[:3] for pose in row["poses"]]
    length, similarity = path_length(path), ndtw(places, reference) if reference else None
    row |= {"start_distance": distances[0], "path_length": length,
            "oracle_navigation_error": min(filter(is_finite, distances)),
            "distance_to_goal": distances[-1] if is_finite(distances[-1]) else None}
    row |= {"ndtw": similarity} if reference else {}
    for suffix, r in (("", radius), (f"_{second_radius:g}m", second_radius)):
        metrics = episode_metrics(distances, length, walk.end == "stop", r)
        metrics |= {"sdtw": metrics["success"] * similarity} if reference else {}
        row |= {name + suffix: value for name, value in metrics.items()}
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()}


def rows_on_disk(out: str) -> list[dict]:
    """Every row of all ranks. UserError if one is none."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "episodes*.jsonl"))):
        found = read_rows(path)
        for k, row in enumerate(found):
            if not isinstance(row, dict) or not {"episode_id", "end"} <= row.keys():
                raise UserError(f"line {k + 1} of {path} is no row of an episode ({row!r:.60}): "
                                "delete it, and run the same command again")
        rows += found
    return rows


def known_rows(out: str) -> dict[str, dict]:
    """The rows of all ranks, {str(episode_id): row}; of two, the one that is not an error."""
    rows = {}
    for row in rows_on_disk(out):
        if rows.get(str(row["episode_id"]), {"end": "error"})["end"] == "error":
            rows[str(row["episode_id"])] = row
    return rows


def error_counts(out: str) -> Counter:
    """How many rows of each episode are errors: one more after it was walked again in vain."""
    return Counter(str(row["episode_id"]) for row in rows_on_disk(out) if row["end"] == "error")


TITLES = {"success": "SR", "spl": "SPL", "oracle_success": "OS", "distance_to_goal": "NE (m)",
          "path_length": "TL (m)", "ndtw": "nDTW", "sdtw": "SDTW", "steps": "steps"}
AT_RADIUS = ("success", "spl", "oracle_success", "sdtw")        # depend on the radius
RATES = ("success", "oracle_success")                   # 0 or 1 per episode; the rest are means


def summarise(rows: Sequence[dict], radius: float, second_radius: float, seed: int) -> dict:
    """Rows -> results.json's numbers; {"mean": None, "ci": None} for a metric that no row has."""
    scored = [row for row in rows if "success" in row]
    second = f"_{second_radius:g}m"
    names = [*TITLES, *(name + second for name in AT_RADIUS)]
    units, kind = sampling_units(scored)
    metrics = cluster_bootstrap({name: [row.get(name) for row in scored] for name in names}, units,
                                seed=seed)
    for key in [name + end for name in RATES for end in ("", second)] if scored else ():
        metrics[key]["ci"] = rate_interval([row[key] for row in scored], [1] * len(scored), units)
    decisions, malformed = ([row[key] for row in rows] for key in ("decisions", "malformed"))
    tokens = sum(row.get("tokens", 0) for row in rows)
    ends = Counter(row["end"] for row in rows)
    return {"episodes": len(rows), "scored": len(scored), "unreachable": ends["unreachable"],
            "no_way_at_end": sum(row["distance_to_goal"] is None for row in scored),
            "errors": ends["error"], "invalid": ends["invalid"],
            "ends": dict(sorted(ends.items())),
            "forced_stops": dict(sorted(Counter(row["forced_stop"] for row in rows
                                                if "forced_stop" in row).items())),
            "decisions": sum(decisions),
            "malformed_share": round(sum(malformed) / max(sum(decisions), 1), 6),
            "malformed_ci": rate_interval(malformed, decisions, sampling_units(rows)[0]),
            "tokens_per_episode": round(tokens / max(len(rows), 1), 1),
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
    if results["forced_stops"]:
        lines.append("  STOP was called for the robot, by the contract's limits: " + ", ".join(
            f"{n} {reason}" for reason, n in results["forced_stops"].items()))
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


# ---------------------------------------------------------------- what is evaluated


def speaks_dialog(contract: dict | None) -> bool:
    return (contract or {}).get("prompt", "").startswith("dialog")   # policy_class needs torch


def check_server_flags(args):
    """UserError if the flags of a server do not belong together."""
    chat = bool(args.server) and args.server.rstrip("/").endswith("/v1")
    if chat != bool(args.served_model):
        raise UserError("--served-model, the model's name there, belongs to a --server whose "
                        "address ends in /v1; that of tools.serve has none")
    if args.server and args.agent != "policy":
        raise UserError(f"--server runs the policy of --ckpt, and --agent {args.agent} is none: "
                        "leave one of them out")
    address = r"https?://([^/:\[\]]+|\[[^\]]+\])(:\d{1,5})?(/.*)?"          # [..]: IPv6
    if args.server and not re.fullmatch(address, args.server):
        raise UserError(f"--server {args.server} is no address; give one like "
                        "http://127.0.0.1:8000/v1")


def choose_ckpt(args) -> tuple[str | None, dict | None]:
    """-> the checkpoint folder and its contract; (None, None) for a baseline."""
    if args.agent != "policy":
        return None, None
    there = [c for c in ("ckpt/grpo", "ckpt/sft") if os.path.exists(os.path.join(c, "nav.json"))]
    if not args.ckpt and not there:
        raise UserError("no checkpoint in ckpt/grpo or ckpt/sft: train one (python sft.py), name "
                        "one with --ckpt, or walk a baseline with --agent oracle")
    ckpt = os.path.normpath(args.ckpt or there[0])
    if args.nav and not os.path.isdir(ckpt):
        raise UserError(f"--nav belongs to the folder of a model and --ckpt {ckpt} is none: "
                        f"hf download {ckpt} --local-dir models/{os.path.basename(ckpt)}, and name "
                        "that folder")
    contract = read_nav(args.nav or os.path.join(ckpt, "nav.json"))
    if "horizon" not in contract:
        raise UserError(f"{ckpt} answers questions ({contract.get('prompt')}) and drives no robot: "
                        "run gpt4scene.answer with it, or give a checkpoint of --prompt window or "
                        "dialog")
    if not (1 <= args.execute <= contract["horizon"] or speaks_dialog(contract)):
        raise UserError(f"--execute {args.execute} does not fit {ckpt}, which plans "
                        f"{contract['horizon']} actions at a time")
    return ckpt, contract


def read_nav(path: str) -> dict:
    """The contract of --nav, or of a checkpoint, checked."""
    from checkpoint import read_contract
    try:
        with open(path, "rb") as file:
            return read_contract(path, file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a trainer writes it beside the "
                        "weights; for another project's model docs/activevln.md says how to make "
                        "it") from None


def evenly_spaced(items: Sequence, n: int) -> list:
    """n of the items, evenly over all of them.

    >>> evenly_spaced("abcdefgh", 3), evenly_spaced("ab", 3)
    (['a', 'c', 'f'], ['a', 'b'])
    """
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def shuffled_instructions(episodes: list[dict], seed: int, radius: float) -> dict[str, dict]:
    """{str(episode_id): the episode whose instruction it gets}.

    Its goal is another (more than `radius` metres away, or its text would be right) and its text
    is another, of the same language. It is of the same scene where there is one: a text from
    elsewhere names things that are not there, which a policy could notice.
    """
    order, chosen = random.Random(seed).sample(episodes, len(episodes)), {}

    def fits(mine, other, same_scene):
        a, b = mine["instruction"], other["instruction"]
        return ((mine["scene_id"] == other["scene_id"]) == same_scene
                and mine["trajectory_id"] != other["trajectory_id"]
                and a["instruction_text"] != b["instruction_text"]
                and a.get("language") == b.get("language")
                and (not same_scene or all(
                    math.dist(goal["position"], another["position"]) > radius
                    for goal in mine["goals"] for another in other["goals"])))

    for i, mine in enumerate(order):
        found = next((other for same_scene in (True, False)
                      for other in (*order[i + 1:], *order[:i])
                      if fits(mine, other, same_scene)), None)
        if found is None:
            raise UserError("--shuffled-instruction needs walks with different instructions: "
                            f"episode {mine['episode_id']} finds none in its language")
        chosen[str(mine["episode_id"])] = found
    return chosen


def agent_file_hash(agent: str) -> str | None:
    """A hash of the FILE.py of --agent FILE.py:function: another file is another measurement."""
    if ":" not in agent:
        return None
    path = agent.rpartition(":")[0]
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--agent {agent}: cannot read {path} ({error.strerror}); give "
                        "FILE.py:function") from None


def prompt_hash(contract: dict | None) -> str | None:
    """A hash of the prompt's text, with a fixed instruction: a prompt that was edited is another
    one. None without a contract."""
    if not contract:
        return None
    if "words" in contract:
        text = json.dumps(contract["words"], sort_keys=True)
    elif speaks_dialog(contract):
        from activevln.dialog import dialog_prompt
        text = dialog_prompt("x", contract)
    else:
        from model import window_prompt
        text = window_prompt("x", 2, contract)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Evaluation(NamedTuple):
    settings: dict                  # run.json
    episodes: list[dict]            # those that are walked
    truths: dict | None             # ground truth by str(episode_id)
    instructions: dict[str, str]    # by str(episode_id)
    scenes: str                     # folder


def prepare(args) -> Evaluation:
    """Read what the flags name. UserError if it does not fit together."""
    # 1. checkpoint and data
    check_server_flags(args)
    ckpt, contract = choose_ckpt(args)
    if args.temperature is None:
        args.temperature = (contract or {}).get("sampling", {}).get("temperature", 0.0)
    source = args.episodes or EPISODES.get(contract and contract["dataset"], EPISODES["houses"])
    every = read_episodes(source, args.split, args.role, args.languages)
    hidden = not any(episode["goals"] for episode in every)     # a test split: its server scores it
    truths = None if hidden else read_ground_truth(source, args.split, args.role, optional=True)
    episodes = evenly_spaced(every, args.limit or len(every))
    scenes, dataset = args.scenes or scenes_of(source), dataset_of(every[0])
    robot = choose_robot(args, ckpt, contract, dataset)
    check_episodes(every, truths, f"{source} ({args.split})")
    used = scenes_used(args, robot, scenes, episodes)
    walked = paired(episodes, truths or {})
    if args.turn_deg is None and not (contract and contract["dataset"] == dataset):
        check_turn_deg(walked, robot["turn_deg"])               # a flag is meant as it is given
    if args.agent == "oracle" and hidden or args.agent == "forward" and not walked:
        raise UserError(f"{source} ({args.split}) has no ground truth, or hides its goals: there "
                        f"is no --agent {args.agent}; choose another --agent or --split")

    # 2. the settings: a results folder holds rows of one setting only
    radius, (device, dtype) = success_radius(every), device_and_dtype(args)
    data = json.dumps([episodes, [walk["locations"] for walk in walked]])
    forward_steps = [walk["actions"].count(FORWARD) for walk in walked]
    flags = ("split", "role", "languages", "agent", "sim", "execute", "malformed", "temperature",
             "max_actions", "limit", "blank_frames", "shuffled_instruction", "seed")
    settings = {**{key: getattr(args, key) for key in flags}, "ckpt": ckpt,
                "served_model": args.served_model or args.server and "tools.serve",
                "device": device, "dtype": dtype, "weights": ckpt and fingerprint(ckpt),
                "agent_file": agent_file_hash(args.agent), "contract": contract,
                "prompt_sha256": prompt_hash(contract), "robot": robot, "source": source,
                "dataset": dataset,
                "data": hashlib.sha256(data.encode()).hexdigest()[:16], "radius_m": radius,
                "second_radius_m": 1.0 if radius == 3 else 3.0, "scenes": used,
                "forward_steps": round(np.mean(forward_steps)) if walked else None,
                "episodes": len(episodes)}
    if truths is None and not hidden:
        settings["no_ndtw"] = no_ground_truth(source, args.split, args.role)

    # 3. the instruction of each episode: its own, or for the control run another's
    given = {str(episode["episode_id"]): episode for episode in every}
    if args.shuffled_instruction:
        given = shuffled_instructions(every, args.seed, radius)
        settings["instructions_from_same_scene"] = sum(
            given[str(e["episode_id"])]["scene_id"] == e["scene_id"] for e in episodes)
    instructions = {name: e["instruction"]["instruction_text"] for name, e in given.items()}
    return Evaluation(settings, episodes, truths, instructions, scenes)


# ---------------------------------------------------------------- the run, top to bottom


def open_out(out: str, settings: dict):
    """Make the results folder, or go on in one that holds the same measurement."""
    path, rank = os.path.join(out, "run.json"), os.environ.get("RANK", "0")
    lock_folder(out, name=".lock" if rank == "0" else f".lock.{rank}")      # each has its own files
    if not os.path.exists(path):
        write_json(path, settings)
    try:
        held = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder, or give another "
                        "--out") from None
    differ = sorted(key for key in {*settings, *held} if held.get(key) != settings.get(key))
    if differ:
        raise UserError(f"{out} holds another measurement (of other {', '.join(differ)}): give "
                        "another --out, or delete that folder")


def default_out(args, ckpt: str | None) -> str:
    """results/<checkpoint or agent>[_<control run>]_<split>[_limit<n>]"""
    parts = [os.path.basename(ckpt or args.agent).replace(".py:", "_")]
    parts += ["served"] * bool(args.server)
    parts += [name for name in ("blank_frames", "shuffled_instruction") if vars(args)[name]]
    parts += [args.split] + [f"limit{args.limit}"] * bool(args.limit)
    return "results/" + "_".join(parts)


def walk_all(args, evaluation: Evaluation, todo: list[dict], out: str, suffix: str, bar: tqdm):
    """Walk the episodes `todo`; each row is on disk before the next decision."""
    settings, episodes, truths, instructions, scenes = evaluation
    radius, sims = settings["radius_m"], min(args.sims, len(todo))
    names = [str(e["episode_id"]) for e in episodes]
    drawn, recorded = (set(evenly_spaced(names, n)) for n in (args.pictures, args.page))
    if drawn:
        from tools.pictures import save_pictures
    if recorded:
        from tools.page import save_walk
    walk_episodes = run_episodes
    if args.server:
        from tools.remote import run_episodes as walk_episodes  # a robot waits for no other
    walks = (EpisodeState(e, instructions[name], keep_video=name in drawn | recorded)
             for e in todo for name in [str(e["episode_id"])])
    agent = (served_agent(args, settings, instructions.values(), out) if args.server
             else load_agent(args, settings, instructions.values()))
    render = "last" if speaks_dialog(settings["contract"]) else sees(args.agent)
    limits = (settings["contract"] or {}).get("early_stop")
    limits = {"should_stop": forced_stop(limits, args.max_actions)} if limits else {}
    counters, start = Counter(), time.perf_counter()
    with open(os.path.join(out, f"episodes{suffix}.jsonl"), "a") as file, SimPool(
            args.sim, settings["robot"], scenes, sims, simulator_commands(args), args.sim_timeout,
            simulator_gpus(args)) as pool:
        pool.note_versions(out, episodes[0]["scene_id"])
        for walk in walk_episodes(pool, walks, agent, sims=sims, max_actions=args.max_actions,
                                  retries=args.retries, render=render, counters=counters,
                                  **limits):
            reference = truths and truths[walk.name]["locations"]
            row = episode_record(walk, reference, radius, settings["second_radius_m"])
            if walk.map and walk.name in drawn:
                save_pictures(walk, row, reference, settings["robot"], radius,
                              os.path.join(out, "pictures"))
            if walk.map and walk.name in recorded:
                save_walk(walk, reference, settings["robot"], os.path.join(out, "walks"))
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


def write_results(out: str, settings: dict, rows: list[dict], protocol: str | None) -> dict:
    """Write and print the results of all episodes. SystemExit if one ended in an error."""
    results = {**settings, **summarise(rows, settings["radius_m"], settings["second_radius_m"],
                                       settings["seed"]),
               "versions": {name: metadata.version(name) for name in (
                   "numpy", "torch", "transformers")},
               "simulator": read_json(os.path.join(out, "simulator.json"))}
    if settings["served_model"]:
        results["server"] = read_json(os.path.join(out, "server.json"))
    write_lines(os.path.join(out, "episodes.jsonl"), rows)
    write_json(os.path.join(out, "results.json"), results)
    print(format_card(write_card(out, settings, rows, protocol, results["interval"])))
    print(format_results(results))
    first = {row["end"]: row for row in reversed(rows)}             # of each kind of end
    if results["invalid"]:
        print(f"  {results['invalid']} episodes are invalid and will not be walked again, the "
              f"first is {first['invalid']['episode_id']}: {first['invalid']['error']}")
    if results["errors"]:
        kinds = "simulator or server" if settings["served_model"] else "simulator"
        sys.exit(f"evaluate.py: error: {results['errors']} episodes ended in {kinds} errors and "
                 f"have no score (first {first['error']['episode_id']}: {first['error']['error']});"
                 " the same command tries them again")
    return results


def main(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    suffix = "" if world_size == 1 else f".{rank}"

    # 1. what is measured, and which rows are there already
    evaluation = prepare(args)
    settings, episodes = evaluation.settings, evaluation.episodes
    out = args.out or default_out(args, settings["ckpt"])
    open_out(out, settings)
    path = os.path.join(out, f"episodes{suffix}.jsonl")
    if os.path.exists(path):
        write_lines(path, read_rows(path))                  # without a line that a kill cut short
    known, errors = known_rows(out), error_counts(out)
    if rank == 0:
        write_card(out, settings, list(known.values()), args.protocol)
    done = {name for name, row in known.items() if row["end"] != "error"}
    mine = episodes[rank::world_size]
    todo = [e for e in mine if str(e["episode_id"]) not in done]
    print(f"{out}: {settings['ckpt'] or args.agent} walks {len(todo)} episodes of "
          f"{settings['source']} ({args.split}); {len(mine) - len(todo)} of {len(mine)} have "
          f"walked already" + f", rank {rank} of {world_size}" * (world_size > 1), flush=True)

    # 2. walk
    if not todo and (args.page or args.pictures):
        print("nothing is left to walk: --page and --pictures record what is walked in this run; "
              "give another --out to record more")
    if todo:
        with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="walk",
                  mininterval=1 if sys.stderr.isatty() else 30) as bar:
            walk_all(args, evaluation, todo, out, suffix, bar)

    # 3. measure, once every episode has its row: with several ranks, the one that ends last
    rows, names = known_rows(out), [str(e["episode_id"]) for e in episodes]
    own, errors_now = {str(e["episode_id"]) for e in mine}, error_counts(out)
    missing = [name for name in names if name not in rows     # or another rank walks it again:
               or name not in own and rows[name]["end"] == "error"
               and errors_now[name] == errors[name]]
    if missing and own.isdisjoint(missing):
        return print(f"rank {rank} is done; {len(missing)} episodes of other ranks are not")
    if missing:
        sys.exit(f"evaluate.py: error: {len(missing)} of {len(names)} episodes have no row in "
                 f"{out}, the first is {missing[0]}: run the same command again")
    results = write_results(out, settings, [rows[name] for name in names], args.protocol)
    if args.page:
        from tools.page import write_page
        print(f"page: {write_page([out])}")
    return results


if __name__ == "__main__":
    run_cli(main, parse_args)
