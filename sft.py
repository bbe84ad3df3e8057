"""
SFT: teach the navigator by imitation (VLN-R1 [1], stage one).

At every step t of an expert's recorded walk the policy is shown the instruction, the frames that
its memory keeps (lsm.py) and the frame of step t, and is asked for the expert's next six actions,
a_t .. a_{t+5}, as text. The loss is the cross-entropy of the answer's tokens and nothing else:

    L = - sum over decisions, sum_j log p(w_j | w_<j, H_t, v_t, I)   /   number of answer tokens

Several decisions of one walk stand in a batch together (--steps-per-walk): they share its words and
most of its frames, and each is encoded once. The gradient of a batch is exact; what changes is who
is in the batch with whom. 1 gives independent decisions.

--prompt dialog teaches the other way to show the past (ActiveVLN [2]): a whole walk is one
conversation, a frame and then up to three merged actions at each turn, and one forward trains it.
A batch then counts walks. The actions are merged anew in every epoch (make_data.merge_walk).

Run it
    python sft.py --model tiny --data data/vln_ego/train --out ckpt/sft      # a laptop's CPU
    deepspeed sft.py --model Qwen2-VL-2B                                     # every GPU there is
    deepspeed --num_gpus 2 sft.py --model tiny --device cpu                  # two CPU processes
    python sft.py --model Qwen2-VL-2B --data released.json --image-root DIR  # ShareGPT, as released
    deepspeed sft.py --model Qwen2-VL-2B --prompt dialog --out ckpt/sft_dialog  # for grpo_online.py

Reads    --model  a folder, a hub id, Qwen2-VL-2B / -7B, or tiny;  --data  from make_data.py, or a
         ShareGPT JSON;  --val-data  from make_data.py, a split that is not trained on
Writes   --out    the run directory that engine.py describes; its root loads with from_pretrained
Expect   loss near ln(4) per action at once, then a plateau: the words' first turn is learned early,
         what the camera shows much later. val/first is the share of decisions whose next action is
         the expert's (always forward: about 0.64 on R2R), val/plan that of all six. Of a dialog,
         val/right is the share of answer tokens that are the likeliest, the words before them given

[1] VLN-R1, https://arxiv.org/abs/2506.17221 (section 3: SFT; lr 5e-6, cosine, batch 64, one epoch)
[2] ActiveVLN, https://github.com/arvillion/ActiveVLN (its SFT is not released; values are ours)
"""
from __future__ import annotations

import argparse

import numpy as np
import torch

import lsm
from cli import Help, UserError, count, run
from engine import (
    Log,
    accumulate,
    add_machine_args,
    add_optimizer_args,
    all_reduce_sum,
    backward_step,
    check_lengths,
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
    pop_flop_counters,
    prefetch,
    print_memory_estimate,
    print_start,
    save_state,
    set_learning_rate,
    update_metrics,
    walk_lengths,
)
from make_data import open_data
from model import CONTRACTS, NAV, is_dialog, load_policy, resize
from reward import parse_plan, write_plan
from world.robots import ROBOTS


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--model", default="Qwen2-VL-2B", help="folder, hub id, Qwen2-VL-2B, Qwen2-VL-7B or tiny")
    add("--data", default="data/vln_ego/train", help="VLN-Ego folder, or ShareGPT .json or .jsonl")
    add("--image-root", help="folder that a ShareGPT file's picture paths start in; default: "
        "that of the file")
    add("--val-data", help="VLN-Ego folder; default: val_seen beside --data, if it is there")
    add("--out", default="ckpt/sft")
    add = p.add_argument_group("data").add_argument
    add("--prompt", choices=tuple(CONTRACTS), default="window", help="how the past is shown")
    add("--horizon", type=count, help="actions per answer; default: 6, in a dialog 3 merged ones")
    lsm.add_memory_args(add)
    add("--max-pixels", type=count, default=65536, help="a frame is shrunk to at most this")
    add("--steps-per-walk", type=count, default=8, help="decisions of one walk trained together")
    add("--vary-turns", action="store_true", help="a dialog's answers have 1 to --horizon moves, "
        "drawn, not always the most: a policy can then learn when to look sooner")
    add = p.add_argument_group("objective").add_argument
    add("--batch-size", type=count, default=64, help="decisions (of dialogs: walks) per update, "
        "over all processes")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add_optimizer_args(p, lr=5e-6, schedule="cosine", weight_decay=0.0)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=count, help="overrides --epochs")
    add("--stop-after", type=count, help="leave after this step of the schedule (resume later)")
    add("--save-every", type=count, default=500)
    add("--val-every", type=count, default=500)
    add("--val-decisions", type=int, default=256)
    add_machine_args(p)
    return p.parse_args(argv)


# ---------------------------------------------------------------- which decisions, in which order


def batch_units(data, seed, epoch, steps_per_walk):
    """Every decision once, in an order made from (seed, epoch) -> list of (episode, (t, ...)).

    A unit is up to steps_per_walk steps of one walk, spread over it; units are shuffled.
    steps_per_walk None: whole walks, as (episode, the seed of its merging).
    """
    rng = np.random.default_rng((seed, epoch))
    units = []
    if steps_per_walk is None:
        merging = int(rng.integers(2 ** 31))
        return [(int(episode), merging) for episode in rng.permutation(len(data.episodes))]
    for episode in range(len(data.episodes)):
        steps = rng.permutation(data.steps(episode))
        units += [(episode, tuple(sorted(steps[i:i + steps_per_walk].tolist())))
                  for i in range(0, len(steps), steps_per_walk)]
    return [units[i] for i in rng.permutation(len(units))]


class Order:
    """step -> the units of that global batch, without history: so resuming is exact."""

    def __init__(self, data, seed, steps_per_walk, per_batch):
        self.make = lambda epoch: batch_units(data, seed, epoch, steps_per_walk)
        self.per_batch, self.epoch, self.units = per_batch, 0, self.make(0)
        self.per_epoch = len(self.units) // per_batch      # a rest too small for a batch is dropped
        if self.per_epoch == 0:
            raise UserError(f"--data has {len(self.units)} groups of steps and a batch takes "
                            f"{per_batch}; lower --batch-size or record more walks")

    def __call__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.units = epoch, self.make(epoch)
        return self.units[at * self.per_batch:(at + 1) * self.per_batch]


def load_batch(data, nav, units, vary_turns=False):
    """Units -> (decisions, {frame key: uint8 (H, W, 3)}): the part that runs in a loader thread."""
    if is_dialog(nav):
        decisions = [data.dialog(episode, nav, seed, vary_turns) for episode, seed in units]
    else:
        decisions = [data.decision(episode, t, nav) for episode, steps in units for t in steps]
    return decisions, {key: resize(data.frame(key), nav) for d in decisions for key in d.frames}


def answers_of(policy, decisions):
    return policy.answers([d.answer or write_plan(d.plan, policy.phrases) for d in decisions])


def question(policy, decisions, frames):
    """What to ask the policy for, policy(*..) -> logps (N, C), and the mask of those that count.
    Dialogs are spelled."""
    if not is_dialog(policy.nav):
        ids, mask = answers_of(policy, decisions)
        return (decisions, frames, ids, mask), mask
    rows = [torch.tensor([own for own, answer in zip(d.in_loss, d.answers) for _ in answer])
            for d in decisions]
    mask = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return (decisions, frames), mask.to(policy.device)


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(policy, data, units, rank, world):
    """Loss on held-out answers, greedy plans against the expert's -> dict of means over ranks."""
    if is_dialog(policy.nav):
        return validate_dialogs(policy, data, units, rank, world)
    sums = np.zeros(5)
    for unit in units[rank::world]:
        decisions, frames = load_batch(data, policy.nav, [unit])
        prompts = policy.read(decisions, frames)
        ids, mask = answers_of(policy, decisions)
        loss = -policy.logps(prompts, ids, mask).sum().item()
        plans = [parse_plan(text, policy.phrases, policy.nav["horizon"])
                 for text in policy.generate(prompts).texts]
        right = [[a == b for a, b in zip(plan, d.plan)] for plan, d in zip(plans, decisions)]
        sums += (loss, mask.sum().item(), len(right), sum(r[0] for r in right if r),
                 sum(all(r) for r in right))
    loss, tokens, n, first, plan = all_reduce_sum(sums.tolist(), policy.device)
    return {"val/loss": loss / tokens, "val/first": first / n, "val/plan": plan / n}


def validate_dialogs(policy, data, units, rank, world):
    """The same for whole walks: loss, and the share of answer tokens that are the likeliest."""
    sums = np.zeros(3)
    for unit in units[rank::world]:
        dialogs, frames = load_batch(data, policy.nav, [unit])
        asked, mask = question(policy, policy.spell(dialogs), frames)
        logps, likeliest = policy(*asked, with_greedy=True)
        sums += (-(logps * mask).sum().item(), mask.sum().item(), (likeliest & mask).sum().item())
    loss, tokens, right = all_reduce_sum(sums.tolist(), policy.device)
    return {"val/loss": loss / tokens, "val/right": right / tokens}


# ---------------------------------------------------------------- the run


def setup(args, world, device):
    """Data, contract and policy, from the flags."""
    contract = CONTRACTS[args.prompt]
    horizon = args.horizon or contract["horizon"]
    if not 1 <= horizon <= (8 if contract is NAV else 3):    # model.py lists all plans there are
        raise UserError(f"--horizon {horizon}: give 1 to 8 actions per answer, 1 to 3 in a dialog")
    data = open_data(args.data, args.image_root)
    if is_dialog(contract) and not data.whole_walks:
        raise UserError(f"--prompt dialog needs whole walks and {args.data} holds single answers; "
                        "give a VLN-Ego folder (make_data.py --import-walk reads released walks)")
    robot = data.meta.get("robot", {})
    nav = dict(contract, dataset=data.meta.get("dataset", ""), horizon=horizon,
               max_pixels=args.max_pixels)
    if contract is NAV:
        nav["memory"] = lsm.memory_from_args(args)
    nav.update({k: robot.get(k) for k in ROBOTS["r2r"]          # a JSON does not tell its camera
                if k in robot or k not in ("turn_deg", "forward_m")})
    policy = load_policy(args.model, nav, device, default_dtype(args), seed=args.seed,
                         texts=[e["instruction"].replace("<image>", "") for e in data.episodes])
    policy.promise(nav)                    # an older contract is replaced by what is taught now
    check_lengths(policy, walk_lengths(policy, data, args.vary_turns) if data.whole_walks
                    else data.lengths(policy), args.data)
    policy.vision.requires_grad_(not args.freeze_vision)
    policy.checkpointing = args.gradient_checkpointing
    return data, policy


def main(args):
    rank, world, device = init_distributed(args)
    data, policy = setup(args, world, device)
    open_run(args)

    dialogs = is_dialog(policy.nav)
    per_walk = 1 if dialogs or not data.whole_walks else args.steps_per_walk
    if args.batch_size % (per_walk * world):
        raise UserError(f"--batch-size {args.batch_size} does not split into {world} processes x "
                        f"--steps-per-walk {per_walk}; change one of them")
    order = Order(data, args.seed, None if dialogs else per_walk, args.batch_size // per_walk)
    steps = args.max_steps or max(1, round(args.epochs * order.per_epoch))

    engine = make_engine(policy, args)
    first = load_state(engine, args.out)
    val = held_out_data(args.val_data, args.data)
    val_units = batch_units(val, 0, 0, None if dialogs else 8) if val else []
    val_units = val_units[:-(-args.val_decisions // 8)]              # a walk counts as 8 decisions
    print_start(engine, f"{len(data.episodes)} episodes, {order.per_epoch} batches of "
                f"{args.batch_size} an epoch, {steps} steps", first, data.notes)

    def load(step):
        return [load_batch(data, policy.nav, [unit], args.vary_turns)
                for unit in order(step)[rank::world]]
    def forwards(units):
        """Units -> what each forward is given, [(decisions, frames), ..]"""
        if dialogs:
            units = [(policy.spell(some), frames) for some, frames in units]
        return [merge_batches(some) for some in micro_batches(
            units, lambda unit: sum(policy.sizes(*unit)), args.micro_tokens, device)]
    print_memory_estimate(engine, None, max(
        policy.activations(*part) for part in forwards(load(first))))
    log = Log(engine, args.out, first, steps, ("loss", "val/first", "val/plan", "val/right"))
    last = min(steps, args.stop_after or steps)
    for step, batch, wait_s in prefetch(load, range(first, last)):
        lr = set_learning_rate(engine, step, steps, args)

        # 1. one token is one vote, on whichever rank it stands
        questions = [question(policy, *part) for part in forwards(batch)]
        tokens, = all_reduce_sum([sum(mask.sum().item() for _, mask in questions)], device)

        # 2. imitate
        losses = 0.0
        for asked, mask in accumulate(engine, questions):
            loss = -(engine(*asked) * mask).sum() / tokens
            backward_step(engine, loss)
            losses += loss.item()

        # 3. tell, check, keep
        done = step + 1
        told = {"loss": all_reduce_sum([losses], device)[0], "lr": lr, "tokens": tokens,
                "wait_s": wait_s}
        told |= update_metrics(engine)
        if val_units and is_due(done, args.val_every, steps):
            with gathered(engine):
                told.update(validate(policy, val, val_units, rank, world))
        log(done, pop_flop_counters(device, policy), **told)
        if is_due(done, args.save_every, last):
            save_state(engine, args.out, done)
    finish_run(engine, log, args.out, "log.jsonl, tb/, and the policy for grpo.py and evaluate.py")


if __name__ == "__main__":
    run(main, parse_args)
