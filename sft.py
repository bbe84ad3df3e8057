"""
SFT: teach the navigator by imitation (VLN-R1 [1], stage one).

At every step t of an expert's recorded walk the policy is shown the instruction, the frames that
its memory keeps (lsm.py) and the frame of step t, and is asked for the expert's next six actions,
a_t .. a_{t+5}, as text. The loss is the cross-entropy of the answer's tokens and nothing else:

    L = - sum over decisions, sum_j log p(w_j | w_<j, H_t, v_t, I)   /   number of answer tokens

A batch holds several decisions of each walk (--steps-per-walk; 1: independent decisions), for they
share its instruction and most of its frames, and each is encoded once.

--prompt dialog trains ActiveVLN's policy (activevln/dialog.py): a whole walk is one conversation,
and one forward pass trains it. A batch then counts walks. --prompt chat trains GPT4Scene's, which
answers questions about a scene (gpt4scene/chat.py): its pictures are run once for --steps-per-walk
questions.

Run it
    python sft.py --model tiny --data data/vln_ego/train --out ckpt/sft      # a laptop's CPU
    deepspeed sft.py --model Qwen2-VL-2B                                     # every GPU there is
    deepspeed --num_gpus 2 sft.py --model tiny --device cpu                  # two CPU processes
    python sft.py --model Qwen2-VL-2B --data released.json --image-root DIR  # ShareGPT, as released

Reads    --model  a folder, a hub id, or a name: Qwen3-VL-4B, tiny;  --data  from make_data.py, or a
         ShareGPT JSON, several mixed by --shares;  --val-data  a split that is not trained on
Writes   --out    the run directory that engine.py describes; its root loads with from_pretrained
Expect   loss near ln(4) per action at once, then a plateau: what the instruction says of the first
         turn is learned early, what the frames show much later. val/first_action_acc is the share
         of decisions whose next action is the expert's (always forward: about 0.64 on R2R),
         val/exact_match that of all six. Of a dialog, val/right is the share of answer tokens that
         are the likeliest

[1] VLN-R1, https://arxiv.org/abs/2506.17221 (section 3: SFT; lr 5e-6, cosine, batch 64, one epoch)
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

import lsm
from checkpoint import load_policy
from cli import DefaultsFormatter, UserError, non_negative, positive_int, run_cli, whole_number
from engine import (
    Log,
    accumulate,
    add_machine_args,
    add_optimizer_args,
    all_reduce_sum,
    backward_step,
    check_lengths,
    check_recording,
    default_dtype,
    finish_run,
    gathered,
    held_out_data,
    init_distributed,
    is_due,
    load_state,
    make_engine,
    merge_batches,
    micro_batches,
    open_run,
    plan_micro_batches,
    pop_flop_counters,
    prefetch,
    prepare_training,
    print_start,
    save_state,
    set_learning_rate,
    update_metrics,
)
from lora import add_lora_args, check_lora_args
from make_data import add_data_args, open_sources, split_by_shares
from model import POLICIES, Policy, policy_class
from world.robots import ROBOTS


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--model", default="Qwen2-VL-2B", help="folder, hub id, tiny, tiny-qwen2.5, "
        "tiny-qwen3, or a name of docs/training.md: Qwen2-VL-2B, Qwen2.5-VL-3B, Qwen3-VL-4B ..")
    add_data_args(add, "every decision of all of them once an epoch")
    add("--out", default="ckpt/sft")
    add = p.add_argument_group("data").add_argument
    add("--prompt", choices=sorted({name.split("-")[0] for name in POLICIES}),
        default="window", help="how the past is shown")
    add("--horizon", type=positive_int, help="actions per answer; default: 6, in a dialog 3 moves")
    lsm.add_memory_args(add)
    add("--max-pixels", type=positive_int, help="a frame is shrunk to at most this; default: "
        "65,536; in a chat the model's own limit")
    add("--longest-side", type=positive_int, help="pixels of a picture's longest side in a chat; "
        "default: 512")
    add("--steps-per-walk", type=positive_int, default=8,
        help="decisions of one walk, or questions of one scene, trained together")
    add("--vary-turns", action="store_true", help="a dialog's answers have 1 to --horizon moves, "
        "drawn at random, not always the most: a policy can then learn when to look sooner")
    add = p.add_argument_group("objective").add_argument
    add("--batch-size", type=positive_int, default=64,
        help="decisions (of dialogs: walks) per update, "
        "over all processes")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add_lora_args(add)
    add_optimizer_args(p, lr=5e-6, schedule="cosine", weight_decay=0.0)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=non_negative, default=1.0)
    add("--max-steps", type=positive_int, help="overrides --epochs")
    add("--stop-after", type=positive_int,
        help="leave after this step of the schedule (resume later)")
    add("--save-every", type=positive_int, default=500)
    add("--val-every", type=positive_int, default=500)
    add("--val-decisions", type=whole_number, default=256)
    add_machine_args(p)
    return p.parse_args(argv)


# ---------------------------------------------------------------- which decisions, in which order


def step_groups(data, seed: int, epoch: int, steps_per_walk: int | None) -> list[tuple]:
    """Every decision once, in an order made from (seed, epoch): the units [(episode, (t, ..)), ..]

    A unit is up to steps_per_walk steps of one walk, spread over it; units are shuffled.
    steps_per_walk None: whole walks, as (episode, the seed of its merging).
    """
    rng = np.random.default_rng((seed, epoch))
    if steps_per_walk is None:
        merging = int(rng.integers(2 ** 31))
        return [(int(episode), merging) for episode in rng.permutation(len(data.episodes))]
    units = []
    for episode in range(len(data.episodes)):
        steps = rng.permutation(data.steps(episode))
        units += [(episode, tuple(sorted(steps[i:i + steps_per_walk].tolist())))
                  for i in range(0, len(steps), steps_per_walk)]
    return [units[i] for i in rng.permutation(len(units))]


def mixed_groups(sources: Sequence, seed: int, epoch: int, steps_per_walk: int | None,
                 shares: Sequence[float] | None = None) -> list[tuple]:
    """step_groups() of every source, shuffled together: [(source, *unit), ..]

    shares: units of the sources in that proportion, as many as there are without one twice; of a
    source that has more, other units in each epoch.
    """
    groups = [step_groups(data, seed, epoch, steps_per_walk) for data in sources]
    if shares:
        n = min(len(units) * sum(shares) / share for units, share in zip(groups, shares))
        groups = [units[:count] for units, count in zip(groups, split_by_shares(int(n), shares))]
    mixed = [(k, *unit) for k, units in enumerate(groups) for unit in units]
    if len(sources) == 1:
        return mixed                                            # in its own random order
    return [mixed[i] for i in np.random.default_rng((seed, epoch, 1)).permutation(len(mixed))]


class BatchSampler:
    """step -> the units of that global batch, a function of the step alone: resuming is exact."""

    def __init__(self, sources: Sequence, seed: int, steps_per_walk: int | None, per_batch: int,
                 shares: Sequence[float] | None = None):
        self.make = lambda epoch: mixed_groups(sources, seed, epoch, steps_per_walk, shares)
        self.per_batch, self.epoch, self.units = per_batch, 0, self.make(0)
        self.per_epoch = len(self.units) // per_batch      # a rest too small for a batch is dropped
        if self.per_epoch == 0:
            raise UserError(f"--data has {len(self.units)} groups of steps and a batch takes "
                            f"{per_batch}; lower --batch-size or record more walks")

    def __call__(self, step: int) -> list[tuple]:
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.units = epoch, self.make(epoch)
        return self.units[at * self.per_batch:(at + 1) * self.per_batch]


def load_unit(sources: Sequence, policy: Policy, unit: tuple, vary_turns: bool = False
              ) -> tuple[list, dict]:
    """(source, *unit) -> examples, {frame key: uint8 (H, W, 3)}. The trainer calls it in a loader
    thread, too."""
    k = unit[0]                                # two sources may give their walks the same names
    examples, frames = policy.load_batch(sources[k], [unit[1:]], vary_turns)
    return ([e._replace(frames=tuple((k, key) for key in e.frames)) for e in examples],
            {(k, key): frame for key, frame in frames.items()})


# ---------------------------------------------------------------- the run


@torch.no_grad()
def validate(policy: Policy, data, units: list, rank: int, world_size: int) -> dict[str, float]:
    """Means over the held-out units of all ranks: Policy.validate() says of what."""
    sums = np.zeros((len(policy.val_metrics), 2))                       # of values, their number
    for unit in units[rank::world_size]:
        sums += policy.validate(*policy.load_batch(data, [unit]))
    sums = np.reshape(all_reduce_sum(sums.flatten().tolist(), policy.device), sums.shape)
    return {f"val/{key}": value / n for key, (value, n) in zip(policy.val_metrics, sums.tolist())
            if n}


MEMORY_FLAGS = ("memory", "memory_budget", "memory_recent", "short_stride", "long_stride")
# Flags that say nothing about a prompt: a run that took them would not be what they ask for.
FLAGS_OF_OTHERS = {"window": ("vary_turns", "longest_side"),
                   "dialog": (*MEMORY_FLAGS, "steps_per_walk", "longest_side"),
                   "chat": (*MEMORY_FLAGS, "horizon", "vary_turns")}


def check_prompt_flags(args) -> None:
    """UserError at a flag of another --prompt."""
    default = parse_args([])
    for flag in FLAGS_OF_OTHERS[args.prompt]:
        if getattr(args, flag) != getattr(default, flag):
            raise UserError(f"--{flag.replace('_', '-')} says nothing about --prompt "
                            f"{args.prompt}: leave it out")


def make_contract(args, kind: type[Policy], sources: list) -> dict:
    """What the checkpoint will be for, from the flags and the data. UserError if they differ."""
    default = kind.default_contract
    contract = dict(default, dataset=sources[0].meta.get("dataset", ""),
                    max_pixels=args.max_pixels or default["max_pixels"])
    if "turn_deg" not in default:                               # no robot
        return dict(contract, longest_side=args.longest_side or default["longest_side"])
    contract["horizon"] = args.horizon or default["horizon"]
    if not 1 <= contract["horizon"] <= kind.max_horizon:
        raise UserError(f"--horizon {args.horizon}: give 1 to 8 actions per answer, 1 to 3 in a "
                        "dialog")
    robot = {}                                      # a ShareGPT file may state a part of it
    for path, data in zip(args.data, sources):
        stated = data.meta.get("robot", {})
        other = [key for key, value in stated.items()
                 if key in ROBOTS["r2r"] and value != robot.get(key, value)]
        if other:
            raise UserError(f"--data {path} was recorded with another {other[0]} than "
                            f"{args.data[0]}: a policy has one robot; record again with its flags")
        robot = stated | robot
    if "memory" in contract:
        contract["memory"] = lsm.memory_from_args(args)
    contract.update({k: robot.get(k) for k in ROBOTS["r2r"]     # a JSON does not name its camera
                     if k in robot or k not in ("turn_deg", "forward_m")})
    return contract


def setup(args, device: str):
    """Data, contract and policy, from the flags."""
    check_lora_args(args)
    check_prompt_flags(args)
    kind = policy_class(args.prompt)
    sources = [kind.arrange(data) for data in open_sources(args)]
    contract = make_contract(args, kind, sources)
    policy = load_policy(args.model, contract, device, default_dtype(args), seed=args.seed,
                         texts=kind.texts(sources), replace_contract=True,
                         lora_rank=args.lora_rank, lora_vision=args.lora_vision)
    for path, data in zip(args.data, sources):
        if data.whole_walks and not policy.whole_walks:
            data.check_plans(contract)
        check_lengths(policy, policy.walk_lengths(data, args.vary_turns) if data.whole_walks
                      else data.lengths(policy), path)
    prepare_training(policy, args)
    return sources, policy


class MicroBatch(NamedTuple):
    """What one forward pass trains on."""
    examples: list
    frames: dict
    in_loss: bool = True                # False: this rank has none left, another has


def cut_unit(policy: Policy, examples: list, frames: dict, budget: int) -> list[MicroBatch]:
    """The examples of a unit in as few runs of neighbours, which share most frames, as a token
    budget of a micro-batch allows; each with its frames."""
    sizes = policy.token_counts(examples, frames) if budget else [0]
    n = min(len(examples), math.ceil(sum(sizes) / budget)) if budget else 1
    pieces = ([examples[i] for i in some] for some in np.array_split(range(len(examples)), n))
    return [MicroBatch(some, {key: frames[key] for e in some for key in e.frames})
            for some in pieces]


def forward_batches(policy: Policy, batch: list, budget: int) -> list[MicroBatch]:
    """Loaded units [(examples, frames), ..] -> the micro-batches of an update."""
    pieces = [piece for examples, frames in batch
              for piece in cut_unit(policy, policy.tokenize_answers(examples), frames, budget)]
    parts = micro_batches(pieces, lambda piece: sum(policy.token_counts(*piece[:2])), budget,
                          policy.device)
    return [MicroBatch(*merge_batches([piece[:2] for piece in some or pieces[:1]]), bool(some))
            for some in parts]


def plan_micro_tokens(engine, policy: Policy, batch: list, args) -> int:
    """engine.plan_micro_batches() for a batch of loaded units."""
    sizes = [n for examples, frames in batch
             for n in policy.token_counts(policy.tokenize_answers(examples), frames)]
    return plan_micro_batches(engine, None, args, sizes, lambda budget: max(
        policy.activations(*part[:2]) for part in forward_batches(policy, batch, budget)))


def update(engine, policy: Policy, batch: list, args) -> dict[str, float]:
    """One update of the weights. Every answer token of the batch counts the same, on whichever
    rank it stands."""
    inputs = []
    for examples, frames, in_loss in forward_batches(policy, batch, args.micro_tokens):
        model_inputs, mask = policy.model_inputs(examples, frames)
        inputs.append((model_inputs, mask * in_loss))
    tokens, = all_reduce_sum([sum(mask.sum() for _, mask in inputs)], policy.device)
    losses = 0.0                        # stays on the device: reading it would wait for the GPU
    for model_inputs, mask in accumulate(engine, inputs):
        loss = -(engine(*model_inputs) * mask).sum() / tokens
        backward_step(engine, loss)
        losses += loss.detach()
    loss, = all_reduce_sum([losses], policy.device)
    return {"loss": loss, "tokens": tokens} | update_metrics(engine)


def main(args):
    rank, world_size, device = init_distributed(args)
    sources, policy = setup(args, device)
    open_run(args)

    whole_walks = all(data.whole_walks for data in sources)
    per_walk = args.steps_per_walk if whole_walks and not policy.whole_walks else 1
    if args.batch_size % (per_walk * world_size):
        raise UserError(f"--batch-size {args.batch_size} does not split into {world_size} processes"
                        f" x --steps-per-walk {per_walk}; change one of them")
    steps_per_walk = None if policy.whole_walks else per_walk
    sampler = BatchSampler(sources, args.seed, steps_per_walk, args.batch_size // per_walk,
                           args.shares)
    steps = args.max_steps or max(1, round(args.epochs * sampler.per_epoch))
    val = held_out_data(args.val_data, args.data[0], args.image_root)
    val = val and policy.arrange(val)
    if val and "turn_deg" in policy.contract:
        check_recording(policy, val, "the validation split")
    val_units = step_groups(val, 0, 0, steps_per_walk and 8) if val and args.val_decisions else []
    sizes = [8 if policy.whole_walks else len(steps) for _, steps in val_units]   # of a dialog: 8
    val_units = val_units[:np.searchsorted(np.cumsum(sizes), args.val_decisions) + 1]

    engine = make_engine(policy, args)
    first = load_state(engine, args.out)
    print_start(engine, f"{sum(len(data.episodes) for data in sources)} episodes, "
                f"{sampler.per_epoch} batches of {args.batch_size} an epoch, {steps} steps", first,
                [note for data in sources for note in data.notes])

    def load(step):
        return [load_unit(sources, policy, unit, args.vary_turns)
                for unit in sampler(step)[rank::world_size]]
    args.micro_tokens = plan_micro_tokens(engine, policy, load(first), args)
    log = Log(engine, args.out, first, steps,
              ("loss", *(f"val/{key}" for key in policy.val_metrics[1:])))
    last = min(steps, args.stop_after or steps)
    for step, batch, wait_s in prefetch(load, range(first, last)):
        # 1. imitate
        lr = set_learning_rate(engine, step, steps, args)
        metrics = update(engine, policy, batch, args) | {"lr": lr, "wait_s": wait_s}
        # 2. validate, log, checkpoint
        done = step + 1
        if val_units and is_due(done, args.val_every, steps):
            with gathered(engine):
                metrics.update(validate(policy, val, val_units, rank, world_size))
        log(done, pop_flop_counters(device, policy), **metrics)
        if is_due(done, args.save_every, last):
            save_state(engine, args.out, done)
    finish_run(engine, log, args.out, "log.jsonl, tb/, and the policy for grpo.py and evaluate.py")


if __name__ == "__main__":
    run_cli(main, parse_args)
