"""
GRPO: teach the navigator by comparing its own plans (VLN-R1 [1], stage two).

At one moment of a recorded walk the policy sees an instruction and a few frames, and writes its
next six actions. We sample G such plans, score each against what the expert did next (reward.py),
and make the plans that are better than average more likely:

    A_i  = (r_i - mean(r)) / (std(r) + eps)                    over the G plans of a group
    loss = - mean_i mean_t [ min(rho A_i, clip(rho, 1-c, 1+c') A_i) - beta KL(pi || pi_sft) ]

where rho = pi(w_t) / pi_old(w_t) is the drift since the plans were sampled (--loss: other means).
There is no critic, and no simulator in this loop: the policy walks in evaluate.py. The plans of a
group share their prompt, so its frames and words are run once. Sampling and learning use one
distribution (model.py: the same temperature, the same banned tokens).

Run it   python grpo.py --init ckpt/sft --data data/vln_ego/train --out ckpt/grpo   # one process
         deepspeed grpo.py --init ckpt/sft                                          # every GPU
         deepspeed --num_gpus 2 grpo.py --init ckpt/sft --device cpu --zero-stage 3 # two on a CPU
Reads    --init  a checkpoint of sft.py, whose nav.json defines the prompt;  --data  from
         make_data.py (--policy records own walks), several folders mixed by --shares (the paper:
         10K prompts of R2R, 10K of RxR)
Writes   --out   the run directory described in engine.py, and samples.txt (plans and rewards)
Expect   a loss near 0, because advantages cancel within a group. Watch reward (up; always forward:
         0.64 on R2R), kl (slowly up), frac_reward_zero_std (at 1 nothing is left to compare) and
         stops (near expert_stops); docs/training.md explains the log.

Ours, since the paper does not say: gamma 0.8, c = c' = 0.2, temperature 1, warm-up and cosine, eps,
one epoch, one update per batch (so rho is 1 and the clip is idle). [1]: G 8, lr 1e-6, weight decay
0.01, beta 0.04, the values of Video-R1 (https://github.com/tulerfeng/Video-R1; eps 1e-4, k3).
[1] https://arxiv.org/abs/2506.17221     [2] DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 3-4
[3] DAPO, https://arxiv.org/abs/2503.14476    [4] Dr. GRPO, https://arxiv.org/abs/2503.20783
"""
from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from checkpoint import load_policy
from cli import (
    DefaultsFormatter,
    UserError,
    non_negative,
    positive_int,
    run_cli,
    whole_number,
    write_text,
)
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
from model import Policy, Rollout, TokenStats, window_prompt
from reward import MAX_ANSWER_TOKENS, REWARDS, STOP, Score, score, uniform_reward

RESUMABLE = {"samples_every"}                # may change on resume, besides engine.RESUMABLE_FLAGS
PANELS = (("reward", "val/reward"), ("kl",), ("frac_reward_zero_std",), ("entropy",))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                formatter_class=DefaultsFormatter)
    add = p.add_argument_group("files").add_argument
    add("--init", default="ckpt/sft", help="folder of sft.py: the start, and pi_sft")
    add_data_args(add, "equal")
    add("--out", default="ckpt/grpo")
    add = p.add_argument_group("rollout").add_argument
    add("--prompts", type=positive_int, default=20000,
        help="distinct decisions drawn from all of --data")
    add("--group-size", type=positive_int, default=8, help="G, plans per prompt")
    add("--temperature", type=non_negative, default=1.0, help="of sampling, and of the log-probs")
    add = p.add_argument_group("objective").add_argument
    add("--reward", choices=tuple(REWARDS), default="tdr")
    add("--gamma", type=non_negative, default=0.8, help="of tdr: an action's weight over the last")
    add_objective_args(add, loss="grpo", clip_high=0.2, kl_coef=0.04)
    add("--drop-zero-std-groups", action="store_true",
        help="leave groups out of the loss whose rewards are all equal")
    add("--refill", type=whole_number, default=0, metavar="N", help="sample from other prompts "
        "in place of such groups, up to N times a step (DAPO's dynamic sampling); 0: never")
    add("--batch-size", type=positive_int, default=8, help="prompts per batch, over all processes")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add_lora_args(add)
    add_optimizer_args(p, lr=1e-6, schedule="cosine", weight_decay=0.01)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=non_negative, default=1.0)
    add("--max-steps", type=positive_int, help="overrides --epochs; a step is one batch")
    add("--stop-after", type=positive_int,
        help="leave after this step of the schedule (resume later)")
    add("--save-every", type=positive_int, default=250)
    add("--val-every", type=positive_int, default=250)
    add("--val-decisions", type=whole_number, default=256)
    add("--samples-every", type=positive_int, default=25,
        help="steps between the groups in samples.txt")
    add_machine_args(p)
    return objective_defaults(p.parse_args(argv))


LOSSES = ("grpo", "dapo", "dr_grpo")


def add_objective_args(add, loss: str, clip_high: float, kl_coef: float) -> None:
    """The flags of policy_update and group_advantages, for `add = parser.add_argument`."""
    add("--loss", choices=LOSSES, default=loss, help="grpo: mean over a plan's tokens, then over "
        "plans; dapo: over all tokens; dr_grpo: their sum, over plans times the most tokens of one")
    add("--clip-low", type=non_negative, default=0.2, help="c: the ratio's lower bound is 1 - c")
    add("--clip-high", type=non_negative, default=clip_high, help="c': its upper bound is 1 + c'")
    add("--kl-coef", type=non_negative, default=kl_coef, help="beta; 0 never loads the reference")
    add("--scale-rewards", choices=("group", "batch", "none"), help="divide advantages by the "
        "standard deviation of their group's rewards, of the batch's, or not; default: group, with "
        "--loss dr_grpo none")
    add("--updates-per-batch", type=positive_int, default=1, help="1 is strictly on-policy")


def objective_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the --scale-rewards that belongs to their --loss where none is given."""
    args.scale_rewards = args.scale_rewards or ("none" if args.loss == "dr_grpo" else "group")
    return args


# ---------------------------------------------------------------- the algorithm


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-4,
                     scale_rewards: str = "group", batch_std: float = 0.0) -> Tensor:
    """How much better each plan is than its group's mean [2]. rewards (N,) -> (N,).

    scale_rewards "group" divides by the group's standard deviation. With "none", and with "batch",
    which divides by batch_std, a group whose plans differ only in the sixth action weighs less than
    one whose plans differ in the first.

    >>> group_advantages(torch.tensor([1.0, 3.0, 0.7, 0.7]), 2, eps=0.01)      # std of 1, 3: 1.414
    tensor([-0.7021,  0.7021,  0.0000,  0.0000])
    >>> group_advantages(torch.tensor([1.0, 3.0, 0.7, 0.7]), 2, scale_rewards="none")
    tensor([-1.,  1.,  0.,  0.])
    >>> group_advantages(torch.tensor([1.0, 3.0, 0.7, 0.7]), 2, 0, "batch", batch_std=2.0)
    tensor([-0.5000,  0.5000,  0.0000,  0.0000])
    """
    assert group_size > 1, "a group of one has no siblings to compare with"
    groups = rewards.view(-1, group_size)                                          # (B, G)
    # Measured from the first plan, so that equal rewards give exactly 0. A rounding error of 1e-8
    # would matter: AdamW divides by the gradient's own size and would make a full step of it.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(dim=1, keepdim=True)
    scale = {"group": groups.std(dim=1, keepdim=True) + eps, "batch": batch_std + eps,
             "none": 1.0}[scale_rewards]
    return (centred / scale).flatten()


def reward_std(rewards: Tensor) -> float:
    """Standard deviation (n - 1) of the rewards of all ranks; each gives its own (N,)."""
    n, total = all_reduce_sum([len(rewards), rewards.double().sum().item()], rewards.device)
    squares, = all_reduce_sum([(rewards.double() - total / max(n, 1)).square().sum().item()],
                              rewards.device)
    return (squares / max(n - 1, 1)) ** 0.5


def loss_weights(lengths: Tensor, loss: str, plans: float, tokens: float, most: int
                 ) -> tuple[Tensor, float]:
    """What grpo_loss() of each plan, a mean over its tokens, weighs in the loss of the batch ->
    weights (N,), with sum 1 over all plans, and the factor of their sum.

    lengths (N,): tokens of each plan, 0 for one that is left out; plans, tokens: how many are in
    the loss on all ranks; most: the tokens that a plan may have. GRPO [2] gives plans the same
    weight, DAPO [3] tokens. Dr. GRPO [4] gives tokens a weight that does not depend on how many
    there are, so that a longer batch counts for more; TRL's max_completion_length is `most`.

    Plans of 2 and 6 tokens, of at most 8: 1/2 and 1/2; 2/8 and 6/8; and these times 8 / (2 * 8).
    >>> two = torch.tensor([2.0, 6.0])
    >>> [loss_weights(two, loss, plans=2, tokens=8, most=8) for loss in LOSSES[:2]]
    [(tensor([0.5000, 0.5000]), 1.0), (tensor([0.2500, 0.7500]), 1.0)]
    >>> loss_weights(two, "dr_grpo", plans=2, tokens=8, most=8)
    (tensor([0.2500, 0.7500]), 0.5)
    """
    if loss == "grpo":
        return (lengths > 0).float() / max(plans, 1), 1.0
    return lengths / max(tokens, 1), tokens / max(plans * most, 1) if loss == "dr_grpo" else 1.0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over each plan's own tokens: x, mask (N, C) -> (N,). A plan without tokens gives 0."""
    return torch.where(mask.bool(), x, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor,
              completion_mask: Tensor, clip_low: float, clip_high: float, kl_coef: float
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3 of [2], negated, one number per plan -> loss (N,), {"kl": (N,), "clip_frac": (N,)}.

    logps, old_logps, ref_logps, completion_mask (N, C); advantages (N,). ref_logps None: no KL.
    The caller takes the mean over plans, because only it knows their number over all ranks.
    """
    advantages = advantages[:, None]                           # the same for all tokens of a plan
    ratio = torch.where(completion_mask.bool(), logps - old_logps, 0).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)

    log_ratio_ref = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps
    log_ratio_ref = torch.where(completion_mask.bool(), log_ratio_ref, 0)
    kl = log_ratio_ref.exp() - log_ratio_ref - 1               # k3: unbiased, never negative

    loss = -masked_mean(surrogate - kl_coef * kl, completion_mask)
    clipped = (clipped_ratio * advantages < ratio * advantages).float()       # no gradient there
    return loss, {"kl": masked_mean(kl, completion_mask).detach(),
                  "clip_frac": masked_mean(clipped, completion_mask).detach()}


class PlanBatch(NamedTuple):
    """The plans of one micro-batch, as an update needs them."""
    inputs: tuple                        # policy(*inputs) -> log-probs (N, C)
    mask: Tensor                         # (N, C), the sampled tokens
    advantages: Tensor                   # (N,)
    loss_weights: Tensor                 # (N,), with sum 1 over all micro-batches and ranks
    loss_scale: float = 1.0              # and a factor of the whole loss
    sampled: TokenStats | None = None    # with gradient, if sampling has computed it


class UpdateStats(NamedTuple):
    """This rank's share of the means over all plans, weighted as in the loss."""
    loss: float = 0.0
    kl: float = 0.0
    clip_frac: float = 0.0
    entropy: float = 0.0


@torch.no_grad()
def reference_logps(reference, batches: Sequence[PlanBatch]) -> list[Tensor | None]:
    """Log-probs of the plans under pi_sft; None without a reference."""
    return [reference(*batch.inputs) if reference else None for batch in batches]


def policy_update(engine, batches: Sequence[PlanBatch], ref_logps: Sequence[Tensor | None], args
                  ) -> UpdateStats:
    """--updates-per-batch optimizer steps on one batch of plans; the statistics are their mean."""
    # Sums stay on the device until the end: to read a number is to wait for the GPU.
    old_logps, sums = [], torch.zeros(len(UpdateStats._fields), dtype=torch.float64,
                                      device=batches[0].mask.device)
    for update in range(args.updates_per_batch):
        for i, batch in enumerate(accumulate(engine, batches)):
            logps, _, entropy = batch.sampled or engine(*batch.inputs, with_stats=True)
            if update == 0:                      # the weights are still those of the sampling
                old_logps.append(logps.detach())
            loss, stats = grpo_loss(logps, old_logps[i], ref_logps[i], batch.advantages, batch.mask,
                                    args.clip_low, args.clip_high, args.kl_coef)
            loss = batch.loss_scale * (loss * batch.loss_weights).sum()
            backward_step(engine, loss)
            entropy = masked_mean(entropy, batch.mask)
            sums += torch.stack([loss.detach(), *((x * batch.loss_weights).sum() for x in (
                stats["kl"], stats["clip_frac"], entropy))])
    return UpdateStats(*(sums / args.updates_per_batch).tolist())


# ---------------------------------------------------------------- prompts: which, in which order


class PromptIndex(NamedTuple):
    source: int                          # index into --data
    episode: int
    t: int


def draw_prompts(sources: Sequence, n: int, seed: int, shares: Sequence[float] | None = None
                 ) -> list[PromptIndex]:
    """n distinct decisions, by default an equal share from each source.

    sources: data sets with .episodes and .steps(i). A source that has fewer gives all it has; with
    `shares` the others then give fewer, too.
    """
    rng, drawn = np.random.default_rng(seed), []
    every = [[PromptIndex(k, i, t) for i in range(len(data.episodes)) for t in data.steps(i)]
             for k, data in enumerate(sources)]
    if shares:
        n = min(n, *(int(len(some) * sum(shares) / share) for some, share in zip(every, shares)))
    for some, wanted in zip(every, split_by_shares(n, shares or [1] * len(sources))):
        drawn += [some[j] for j in rng.permutation(len(some))[:wanted]]
    return drawn


def batch_of(prompts: Sequence, step: int, per_batch: int, seed: int) -> list:
    """The prompts of one global batch, from (seed, step) alone; each at most once an epoch:
    the last incomplete batch is left out."""
    epoch, at = divmod(step, len(prompts) // per_batch)
    order = np.random.default_rng((seed, epoch)).permutation(len(prompts))
    return [prompts[j] for j in order[at * per_batch:(at + 1) * per_batch]]


def refill_of(prompts: Sequence, batch: Sequence, step: int, attempt: int, seed: int) -> list:
    """Prompts that may stand in for those of a step's batch, one for each, from (seed, step,
    attempt) alone; in one step each only once, if there are that many."""
    own = set(batch)
    others = [prompt for prompt in prompts if prompt not in own]
    order = np.random.default_rng((seed, step, 1)).permutation(len(others))
    start = (attempt - 1) * len(batch)
    return [others[order[(start + j) % len(others)]] for j in range(len(batch))]


def sampling_seeds(seed: int, step: int, n: int) -> list[int]:
    """One seed per prompt of a global batch, so that its plans are the same on any rank."""
    words = np.random.SeedSequence((seed, step)).generate_state(n, np.uint64)
    return [int(word >> np.uint64(1)) for word in words]       # torch's seeds have 63 bits


def load_prompts(sources: Sequence, policy, prompts: Iterable[PromptIndex]) -> tuple[list, dict]:
    """Prompts -> (decisions, {frame key: uint8 (H, W, 3)}). The trainer calls it in a
    loader thread, too."""
    decisions, frames = [], {}
    for k, episode, t in prompts:              # two sources may give their walks the same names
        decision = sources[k].decision(episode, t, policy.contract)
        frames |= {(k, key): policy.resize(sources[k].frame(key)) for key in decision.frames}
        decisions.append(decision._replace(frames=tuple((k, key) for key in decision.frames)))
    return decisions, frames


class PromptBatch(NamedTuple):
    """Prompts that are run together: one, until split_batch merges them."""
    decisions: list
    frames: dict                         # key -> pixels, or features once they are encoded
    seeds: list                          # one per decision


def load_batch(engine, sources: Sequence, prompts: Sequence[PromptIndex], step: int, args,
               attempt: int = 0) -> list[PromptBatch]:
    """This rank's prompts of a step. attempt: of --refill, 0 for the batch itself."""
    drawn = batch_of(prompts, step, args.batch_size, args.seed)
    if attempt:
        drawn = refill_of(prompts, drawn, step, attempt, args.seed)
    seeds = sampling_seeds(args.seed, step, (attempt + 1) * args.batch_size)[-args.batch_size:]
    mine = list(zip(drawn, seeds))[engine.global_rank::engine.world_size]
    return [PromptBatch(*load_prompts(sources, engine.module, [prompt]), [seed])
            for prompt, seed in mine]


def split_batch(prompts: Sequence[PromptBatch], policy, args, budget: int | None = None
                ) -> list[PromptBatch]:
    """Batches of one prompt each -> the micro-batches of an update. budget: tokens of each, by
    default --micro-tokens."""
    def tokens(one):
        return sum(policy.token_counts(one.decisions, one.frames, args.group_size))
    budget = args.micro_tokens if budget is None else budget
    return [PromptBatch(*merge_batches([one[:2] for one in some]), [one.seeds[0] for one in some])
            for some in micro_batches(prompts, tokens, budget, policy.device)]


def plan_micro_tokens(engine, reference, prompts: Sequence[PromptBatch], args) -> int:
    """engine.plan_micro_batches() for the prompts of a batch."""
    policy, group_size = engine.module, args.group_size
    sizes = [n for one in prompts
             for n in policy.token_counts(one.decisions, one.frames, group_size)]
    return plan_micro_batches(engine, reference, args, sizes, lambda budget: max(
        policy.activations(part.decisions, part.frames, group_size)
        for part in split_batch(prompts, policy, args, budget)))


# ---------------------------------------------------------------- the steps of a step


class RolloutBatch(NamedTuple):
    """G plans for each prompt of a micro-batch, those of a group adjacent."""
    decisions: list
    frames: dict
    plans: Rollout
    sampled: TokenStats | None = None


def rollout(engine, batches: Sequence[PromptBatch], args) -> list[RolloutBatch]:
    """Sample --group-size plans per prompt from the current policy."""
    policy = engine.module
    if args.freeze_vision:                     # encode once, for the policy and the reference
        with gathered(engine), torch.no_grad():
            batches = [b._replace(frames=dict(zip(b.frames, policy.encode_frames(
                list(b.frames.values()))))) for b in batches]
    # With one micro-batch and one update, sampling and learning share one pass over the prompts.
    # Not under ZeRO-3: there, ranks that sample plans of unequal length would block each other.
    single_pass = (len(batches) == 1 == args.updates_per_batch and not args.refill
                   and engine.zero_optimization_stage() < 3)
    if single_pass:
        decisions, frames, seeds = batches[0]
        return [RolloutBatch(decisions, frames, *policy.sample_with_logps(
            decisions, frames, args.group_size, args.temperature, seeds))]
    with gathered(engine), torch.no_grad():
        return [RolloutBatch(decisions, frames, policy.generate(
            policy.build_prompts(decisions, frames), args.group_size, args.temperature, seeds))
            for decisions, frames, seeds in batches]


def split_groups(batch: RolloutBatch, group_size: int) -> list[RolloutBatch]:
    """The same plans, one RolloutBatch per prompt."""
    ids, mask, texts, passes = batch.plans
    rows = [slice(at, at + group_size) for at in range(0, len(texts), group_size)]
    return [RolloutBatch([decision], {key: batch.frames[key] for key in decision.frames},
                         Rollout(ids[its], mask[its], texts[its], passes))
            for decision, its in zip(batch.decisions, rows)]


def merge_groups(groups: Sequence[RolloutBatch]) -> RolloutBatch:
    """The inverse of split_groups()."""
    columns = max(group.plans.completion_ids.shape[1] for group in groups)

    def padded(field):
        rows = [getattr(group.plans, field) for group in groups]
        return torch.cat([F.pad(some, (0, columns - some.shape[1])) for some in rows])
    return RolloutBatch(*merge_batches([group[:2] for group in groups]), Rollout(
        padded("completion_ids"), padded("completion_mask"),
        [text for group in groups for text in group.plans.texts], groups[0].plans.passes))


def rollout_groups(engine, prompts: Sequence[PromptBatch], args) -> list[RolloutBatch]:
    """rollout() of any number of prompts -> a RolloutBatch for each."""
    parts = [part for part in split_batch(prompts, engine.module, args) if part.decisions]
    groups = [group for batch in rollout(engine, parts, args)
              for group in split_groups(batch, args.group_size)]
    by_seed = dict(zip((seed for part in parts for seed in part.seeds), groups))
    return [by_seed[prompt.seeds[0]] for prompt in prompts]


def rollout_with_refill(engine, prompts: Sequence[PromptBatch], load_again, args
                        ) -> tuple[list[RolloutBatch], int]:
    """rollout(), and --refill times again from other prompts for those whose plans all earn the
    same (DAPO's dynamic sampling [3]) -> micro-batches, and how many groups this rank drew again.

    load_again(attempt): a stand-in for each of this rank's prompts. All ranks try equally often,
    for rollout() and split_batch() are collective; what is left after the last attempt stays.
    """
    policy, refilled = engine.module, 0
    if not args.refill:
        return rollout(engine, split_batch(prompts, policy, args), args), 0
    groups = rollout_groups(engine, prompts, args)
    for attempt in range(1, args.refill + 1):
        rewards = [[s.reward for s in compute_rewards(g.plans.texts, g.decisions, policy, args)]
                   for g in groups]
        equal = [i for i, some in enumerate(rewards) if min(some) == max(some)]
        if all_reduce_sum([len(equal)], policy.device) == [0]:
            break
        refilled += len(equal)
        others = load_again(attempt) if equal else []
        for i, group in zip(equal, rollout_groups(engine, [others[i] for i in equal], args)):
            groups[i] = group

    def tokens(group):
        return sum(policy.token_counts(group.decisions, group.frames, args.group_size))
    parts = micro_batches(groups, tokens, args.micro_tokens, policy.device)
    return [merge_groups(part) for part in parts], refilled


def compute_rewards(texts: Sequence[str], decisions: Sequence, policy, args) -> list[Score]:
    """Score every plan against the expert's next actions.

    A decision whose expert could not be parsed (a ShareGPT record) gives its whole group 0.
    """
    group_size, scores = len(texts) // len(decisions), []
    for i, text in enumerate(texts):
        expert = list(decisions[i // group_size].plan) or [None] * policy.contract["horizon"]
        scores.append(score(text, expert, policy.phrases, args.reward, args.gamma))
    return scores


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(N,) -> (B,) bool: the groups whose rewards are all equal."""
    groups = rewards.view(-1, group_size)
    return groups.amax(dim=1) == groups.amin(dim=1)


def plan_batches(rollouts: Sequence[RolloutBatch], rewards: Tensor, advantages: Tensor, args
                 ) -> list[PlanBatch]:
    """Rollouts, rewards (N,) and advantages (N,) -> what policy_update needs."""
    lengths = torch.cat([r.plans.completion_mask.sum(dim=1) for r in rollouts]).float()
    if args.drop_zero_std_groups:              # weight 0, since ranks must do equal work
        lengths = lengths * ~zero_std_groups(rewards, args.group_size).repeat_interleave(
            args.group_size)
    plans, tokens = all_reduce_sum([(lengths > 0).sum().item(), lengths.sum().item()],
                                   rewards.device)
    weights, scale = loss_weights(lengths, args.loss, plans, tokens, MAX_ANSWER_TOKENS)
    sizes = [len(r.plans.texts) for r in rollouts]
    return [PlanBatch((r.decisions, r.frames, r.plans.completion_ids, r.plans.completion_mask,
                       args.group_size, args.temperature),
                      r.plans.completion_mask, its_advantages, its_weights, scale, r.sampled)
            for r, its_advantages, its_weights in zip(
                rollouts, advantages.split(sizes), weights.split(sizes))]


def score_sums(scores: Sequence[Score]) -> dict[str, float]:
    """Sums over plans, by the keys of log.jsonl."""
    return {"reward": sum(s.reward for s in scores),
            "first_action_acc": sum(s.first_correct for s in scores),
            "exact_match": sum(None not in s.plan and s.plan == s.expert_plan for s in scores),
            "mean_accuracy": sum(uniform_reward(s.plan, s.expert_plan) for s in scores),
            "malformed": sum(s.malformed for s in scores),
            "stops": sum(s.plan.count(STOP) for s in scores),
            "expert_stops": sum(s.expert_plan.count(STOP) for s in scores)}


def step_metrics(scores: Sequence[Score], rollouts: Sequence[RolloutBatch], rewards: Tensor,
                 update: UpdateStats, refilled: int, args) -> dict[str, float]:
    """The log's line of a step: means over the plans of all ranks, and how many groups --refill
    drew again."""
    sums = score_sums(scores) | {
        "plan_tokens": sum(r.plans.completion_mask.sum().item() for r in rollouts),
        "frac_reward_zero_std": zero_std_groups(rewards, args.group_size).sum().item()
        * args.group_size}
    totals = all_reduce_sum([*sums.values(), *update, refilled], rewards.device)
    n = args.batch_size * args.group_size
    return ({key: total / n for key, total in zip(sums, totals)}
            | dict(zip((*update._fields, "refilled"), totals[len(sums):])))


# ---------------------------------------------------------------- samples.txt


def format_group(decision, texts, scores, advantages, policy) -> str:
    """One prompt, its G plans and their rewards, as text. A malformed plan is quoted in full."""
    letters = {action: phrase[0] for action, phrase in policy.phrases.items()} | {None: "?"}
    words = decision.prompt or window_prompt(decision.instruction, len(decision.frames) - 1,
                                             policy.contract)
    words = "\n".join([*(text for _, text in decision.before), words])
    words = re.sub(r"(<image>\s*)+", lambda m: f"[{m.group().count('<image>')} frames]\n", words)
    lines = [words.strip(), "reward  advantage  plan",
             f"    the expert's:  {' '.join(letters[a] for a in scores[0].expert_plan)}"]
    for text, its, advantage in zip(texts, scores, advantages):
        plan = " ".join(letters[a] for a in its.plan)
        quote = f"   {text!r}" if its.malformed else ""
        lines.append(f"{its.reward:6.3f}  {advantage:+9.2f}  {plan}{quote}")
    return "\n".join(lines) + "\n\n"


def write_samples(path, step, decisions, texts, scores, advantages, policy, args) -> None:
    """Append the first two groups of a batch to samples.txt."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(f"# step {step}\n")
        for i, decision in enumerate(decisions[:2]):
            rows = slice(i * args.group_size, (i + 1) * args.group_size)
            f.write(format_group(decision, texts[rows], scores[rows], advantages[rows], policy))


def cut_samples(path: str, last_step: int) -> None:
    """On resume, remove the blocks of samples.txt after the state's step, as cut_jsonl does."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:      # a kill cuts a letter
            blocks = re.split(r"(?m)^(?=# step \d+$)", f.read())
        kept = [b for b in blocks if b and int(b.split(maxsplit=3)[2]) <= last_step]
    write_text(path, "".join(kept))


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(engine, data, prompts: Sequence[PromptIndex], args) -> dict[str, float]:
    """Greedy plans on held-out decisions against the expert's -> means over all ranks."""
    policy, rank, world_size = engine.module, engine.global_rank, engine.world_size
    scores = []
    with gathered(engine):
        for at in range(8 * rank, len(prompts), 8 * world_size):
            decisions, frames = load_prompts([data], policy, prompts[at:at + 8])
            texts = policy.generate(policy.build_prompts(decisions, frames)).texts
            scores += compute_rewards(texts, decisions, policy, args)
    sums = score_sums(scores)
    return {f"val/{key}": value / len(prompts)
            for key, value in zip(sums, all_reduce_sum(list(sums.values()), policy.device))}


# ---------------------------------------------------------------- the run


def load_init(args, device: str, sft: str) -> Policy:
    """The policy of --init, to be trained. sft: the script and flags that make one."""
    if not os.path.exists(os.path.join(args.init, "nav.json")):
        raise UserError(f"--init {args.init} is not a checkpoint of ours (it has no nav.json); "
                        f"make one with: python {sft} --out {args.init}")
    if args.group_size < 2:
        raise UserError("--group-size must be 2 or more: advantages compare plans of one prompt")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0: at 0 all plans of a prompt are the same")
    check_lora_args(args)
    policy = load_policy(args.init, device=device, dtype=default_dtype(args), seed=args.seed,
                         lora_rank=args.lora_rank, lora_vision=args.lora_vision)
    if "turn_deg" not in policy.contract:
        raise UserError(f"--init {args.init} answers questions ({policy.contract['prompt']}) and "
                        "plans no walks; give a checkpoint of --prompt window or dialog")
    if args.lora_rank and args.kl_coef and lora.is_adapter(args.init):
        lora.load_adapter(policy.model, args.init, lora.START)
    prepare_training(policy, args)
    return policy


def setup(args, device):
    """Data and policy, from the flags."""
    if not 0 <= args.gamma <= 1:
        raise UserError("--gamma must lie between 0 (only the next action counts) and 1 (uniform)")
    sources = open_sources(args)
    policy = load_init(args, device, "sft.py")
    if policy.whole_walks:
        raise UserError(f"--init {args.init} is a dialog policy; train it with "
                        "activevln.grpo_online")
    for path, data in zip(args.data, sources):
        check_recording(policy, data, f"--data {path}")
        if not data.whole_walks:                        # a ShareGPT file may hold no plan at all
            data.check_plans(policy.contract)
        check_lengths(policy, policy.walk_lengths(data) if data.whole_walks
                      else data.lengths(policy, MAX_ANSWER_TOKENS), path)
    return sources, policy


class AdapterReference(NamedTuple):
    """pi_sft as the policy itself with its adapter as it was at the start, or without one: no
    second model in memory."""
    engine: object
    adapter: str | None

    def __call__(self, *inputs) -> Tensor:
        with lora.using_adapter(self.engine.module.model, self.adapter):
            return self.engine(*inputs)


def load_reference(args, engine, device):
    """pi_sft, frozen, called as engine(..) is; None if --kl-coef is 0."""
    if args.kl_coef == 0:
        return None
    if args.lora_rank:
        return AdapterReference(engine, lora.START if lora.is_adapter(args.init) else None)
    reference = load_policy(args.init, device=device, dtype=default_dtype(args))
    reference.requires_grad_(False)
    if args.compile:
        reference.compile_layers()
    if engine.zero_optimization_stage() == 3:                  # sharded, as the policy is
        import deepspeed
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                  "bf16": {"enabled": default_dtype(args) == "bfloat16"}}
        reference, *_ = deepspeed.initialize(model=reference, config=config)
    return reference


def count_steps(args, n: int, found: str, world_size: int) -> int:
    """The steps of a run over n prompts or episodes. found: where these are from, and how many."""
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size} does not split into {world_size} "
                        "processes")
    if n < args.batch_size:
        raise UserError(f"{found} and a batch takes {args.batch_size}; lower --batch-size or give "
                        "more")
    return args.max_steps or max(1, round(args.epochs * (n // args.batch_size)))


def plan_steps(args, sources: Sequence, world_size: int) -> tuple[list[PromptIndex], int]:
    """The prompts of the run, and its steps."""
    prompts = draw_prompts(sources, args.prompts, args.seed, args.shares)
    if args.refill and len(prompts) == args.batch_size:
        raise UserError("--refill draws from prompts outside the batch, and there are none: lower "
                        "--batch-size or raise --prompts")
    return prompts, count_steps(args, len(prompts), f"--data and --prompts give {len(prompts)} "
                                "prompts", world_size)


def main(args):
    rank, world_size, device = init_distributed(args)
    sources, policy = setup(args, device)
    open_run(args, RESUMABLE)
    prompts, steps = plan_steps(args, sources, world_size)

    engine = make_engine(policy, args)
    reference = load_reference(args, engine, device)
    first = load_state(engine, args.out)
    last = min(steps, args.stop_after or steps)
    val = held_out_data(args.val_data, args.data[0], args.image_root)
    if val:
        check_recording(policy, val, "the validation split")
    val_prompts = draw_prompts([val], args.val_decisions, 0) if val else []
    print_start(engine, f"{len(prompts)} prompts, {steps} steps of {args.batch_size} x "
                f"{args.group_size} plans", first, [n for data in sources for n in data.notes])

    def load(step, attempt=0):
        return load_batch(engine, sources, prompts, step, args, attempt)
    args.micro_tokens = plan_micro_tokens(engine, reference, load(first), args)
    log = Log(engine, args.out, first, steps, ("reward", "kl", "frac_reward_zero_std"))
    if rank == 0:
        cut_samples(f"{args.out}/samples.txt", first)
    if val_prompts and first == 0:                             # the SFT policy, before any update
        log(0, **validate(engine, val, val_prompts, args))

    for step, batch, wait_s in prefetch(load, range(first, last)):
        lr = set_learning_rate(engine, step, steps, args)

        # 1. sample G plans per prompt, from the current policy
        rollouts, refilled = rollout_with_refill(engine, batch, partial(load, step), args)
        decisions = [d for r in rollouts for d in r.decisions]
        texts = [text for r in rollouts for text in r.plans.texts]

        # 2. score them against the expert, and compare them within their groups
        scores = compute_rewards(texts, decisions, policy, args)
        rewards = torch.tensor([s.reward for s in scores], device=device)              # (N,)
        advantages = group_advantages(rewards, args.group_size, scale_rewards=args.scale_rewards,
                                      batch_std=reward_std(rewards))

        # 3. make the better ones more likely, near the SFT policy
        batches = plan_batches(rollouts, rewards, advantages, args)
        ref_logps = reference_logps(reference, batches)
        update = policy_update(engine, batches, ref_logps, args)

        # 4. log, validate, checkpoint
        done = step + 1
        metrics = step_metrics(scores, rollouts, rewards, update, refilled, args)
        metrics |= {"lr": lr, "wait_s": wait_s} | update_metrics(engine)
        if val_prompts and is_due(done, args.val_every, steps):
            metrics |= validate(engine, val, val_prompts, args)
        log(done, pop_flop_counters(device, policy, reference), **metrics)
        if rank == 0 and (done == 1 or is_due(done, args.samples_every, steps)):
            write_samples(f"{args.out}/samples.txt", done, decisions, texts, scores,
                          advantages.tolist(), policy, args)
        if is_due(done, args.save_every, last):
            save_state(engine, args.out, done)
    finish_run(engine, log, args.out, "the policy; see curves.png, samples.txt, tb/", PANELS)


if __name__ == "__main__":
    run_cli(main, parse_args)
