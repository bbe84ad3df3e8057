"""
Rollouts per second: robots that walk dialogs with a cache kept across turns, answered as they come,
against the plain way: every turn reads its whole conversation again (the prefix is encoded again,
frames are not), and no robot is answered before all of them wait. Greedy, so that the walks must be
the same; both ways draft, both are batched. It walks the first episodes of a split, each once.

Run it
    python bench/rollouts.py --ckpt ckpt/sft_dialog                     # the houses, on a CPU
    python bench/rollouts.py --ckpt ckpt/r2r_dialog --sim habitat --sim-python PATH --device cuda

Writes   --results  a line {"row", "ours", "peer", "peer_name", "unit", "ratio", "equal", ..}
Expect   a ratio that grows with the length of the walks: the plain way reads T turns T times. The
         part of the time in which the policy does not compute, it waits for simulators.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402
from common import add_row  # noqa: E402

from activevln import grpo_online  # noqa: E402
from activevln.dialog import Dialog, DialogCache, DialogPolicy  # noqa: E402
from cli import DefaultsFormatter, run_cli  # noqa: E402
from evaluate import EpisodeState, run_episodes  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()),
                                formatter_class=DefaultsFormatter)
    p.add_argument("--ckpt", default="ckpt/sft_dialog")
    p.add_argument("--episodes", help="default: those of the checkpoint's data set")
    p.add_argument("--split", default="val_unseen")
    p.add_argument("--scenes")
    p.add_argument("--walks", type=int, default=64)
    p.add_argument("--turns", type=int, default=40, help="at most, of a walk")
    p.add_argument("--sim", choices=("house", "habitat"), default="house")
    p.add_argument("--sim-python", metavar="PATH")
    p.add_argument("--sims", type=int, default=16)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--results", help="file to append the row to, as a line of JSON")
    p.set_defaults(shape="the checkpoint's")
    return p.parse_args(argv)


class Plain:
    """The policy without a kept cache: pending_ids holds the features and answers so far, and each
    turn runs all of them."""

    agent = DialogPolicy.agent

    def __init__(self, policy):
        self.policy, self.contract = policy, policy.contract
        self.encode_frames, self.resize, self.text, self.actions = (
            policy.encode_frames, policy.resize, policy.text, policy.actions)

    def generate_turn(self, caches, instructions, features, group_size, temperature, seeds,
                      top_p=1.0):
        policy, segments, starts, known = self.policy, [], [], []
        for cache, instruction, feature in zip(caches, instructions, features):
            seen, answered = cache.pending_ids if cache else ((), ())
            segment, begins = policy.dialog_tokens(
                Dialog(instruction, (), (*answered, []), ()), [*seen, feature])
            segments.append(segment)
            starts.append(begins[-1].position)
            known.append(((*seen, feature), answered))
        lengths = [len(segment.ids) for segment in segments]
        hidden, cache = policy.decode(segments)
        hidden = hidden[range(len(segments)), [n - 1 for n in lengths]]
        answers, _, _ = policy._decode_loop(hidden, cache, starts, lengths, 1, temperature, seeds,
                                            True, 48, top_p)
        nothing = torch.zeros(1, 1, 0, 1)
        return [[answer] for answer in answers], [
            DialogCache(nothing, (seen, (*answered, answer)), 0)
            for (seen, answered), answer in zip(known, answers)]


def walk_all(env, agent, min_waiting_fraction):
    """-> {name: actions}, walks per second, the share of the time in which the policy computed"""
    args, counters = env.args, Counter()
    walks = [EpisodeState(e, e["instruction"]["instruction_text"])
             for e in env.episodes[:args.walks]]
    start = time.perf_counter()
    ended = {walk.name: walk.actions for walk in run_episodes(
        env.pool, walks, agent, sims=args.sims, render="last", counters=counters,
        min_waiting_fraction=min_waiting_fraction,
        should_stop=lambda walk: "turns" if len(walk.decisions) >= args.turns else None)}
    seconds = time.perf_counter() - start
    return ended, len(ended) / seconds, counters["deciding_s"] / seconds


def main(args):
    torch.set_num_threads(args.threads)
    flags = [f"--init={args.ckpt}", f"--split={args.split}", f"--sim={args.sim}",
             f"--sims={args.sims}", f"--device={args.device}"]
    flags += [f"--{key.replace('_', '-')}={vars(args)[key]}"
              for key in ("episodes", "scenes", "sim_python") if vars(args)[key]]
    policy, env, _ = grpo_online.setup(grpo_online.parse_args(flags), args.device)
    env.args.walks, env.args.turns = args.walks, args.turns
    sides = {"ours": (policy.agent(), 0.5), "plain": (Plain(policy).agent(), 1.0)}
    found = {name: [] for name in sides}
    with env.open(), torch.no_grad():
        walk_all(env, *sides["ours"])                            # scenes are loaded, all is warm
        for _ in range(args.repeats):
            for name, (agent, fraction) in sides.items():
                found[name].append(walk_all(env, agent, fraction))
    equal = all(walks == found["ours"][0][0] for runs in found.values() for walks, _, _ in runs)
    rates = {name: [rate for _, rate, _ in runs] for name, runs in found.items()}
    shares = {name: statistics.median(s for _, _, s in runs) for name, runs in found.items()}
    add_row(args, "rollouts of dialogs", rates["ours"], rates["plain"],
            "no cache across turns, a barrier per turn", "walks/s", equal,
            f"{len(found['ours'][0][0])} greedy walks, action by action",
            f"{args.ckpt}, {args.sims} simulators, {args.threads} thread(s); the policy computes "
            f"{shares['ours']:.0%} of the time, of the plain way {shares['plain']:.0%}",
            higher_is_better=True)


if __name__ == "__main__":
    run_cli(main, parse_args)
