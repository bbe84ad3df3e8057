"""
GRPO: teach the navigator by comparing its own plans (VLN-R1 [1], stage two).

At one moment of a recorded walk the policy sees an instruction and a few frames, and writes down
its next six actions. We let it write G such plans, mark each against what the expert did next
(reward.py), and make the better-than-average ones more likely:

    A_i  = (r_i - mean(r)) / (std(r) + eps)                           over the G siblings
    loss = - mean_i mean_t [ min(rho A_i, clip(rho, 1-c, 1+c) A_i) - beta KL(pi || pi_sft) ]

with rho = pi(w_t) / pi_old(w_t), the drift since the plans were sampled. No critic, and no
simulator in this loop: evaluate.py is where the agent walks. A group shares its prompt, so frames
and words are run once for its G plans; what is sampled and what is differentiated is one
distribution (model.py: same temperature, same banned tokens).

Run it
    python grpo.py --init ckpt/sft --data data/vln_ego/train --out ckpt/grpo    # one process
    deepspeed grpo.py --init ckpt/sft                                           # every GPU there is
    deepspeed --num_gpus 2 grpo.py --init ckpt/sft --device cpu --zero-stage 3  # two CPU processes

Reads    --init  a checkpoint of sft.py, whose nav.json says how to prompt;  --data  from
         make_data.py, several folders in equal shares (the paper: 10K prompts of R2R, 10K of RxR)
Writes   --out   the run directory that engine.py describes, and for people: samples.txt (prompts,
         plans and rewards side by side) and curves.png
Expect   a loss near 0 that means nothing: within a group the advantages cancel. Watch reward (up;
         always forward: 0.64 on R2R), kl (slowly up) and frac_reward_zero_std, the share of groups
         whose G rewards all agree: at 1.0 there is nothing left to compare. entropy falls, and
         stops should stay near expert_stops: a collapse shows there before it shows in the reward.

Ours, as the paper is silent: gamma 0.8, c 0.2, temperature 1, the rate's warm-up and cosine, eps,
one epoch, one update per batch (then rho is 1 and the clip never acts). [3] may be its ancestor.

[1] VLN-R1, https://arxiv.org/abs/2506.17221 (G 8, lr 1e-6, weight decay 0.01, beta 0.04)
[2] DeepSeekMath, where GRPO comes from, https://arxiv.org/abs/2402.03300 (eq. 3, 4)
[3] Video-R1, https://github.com/tulerfeng/Video-R1 (the same six values, eps 1e-4, k3)
"""
from __future__ import annotations

import argparse
import json
import os
import re

import numpy as np
import torch

import engine as E
from cli import Help, UserError, count, run
from make_data import VlnEgo, open_data
from model import is_dialog, load_policy, resize, save_policy, window_prompt
from reward import REWARDS, STOP, score, uniform_reward


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=Help)
    add = p.add_argument_group("files").add_argument
    add("--init", default="ckpt/sft", help="folder of sft.py: where we start, and pi_sft")
    add("--data", nargs="+", default=["data/vln_ego/train"], help="VLN-Ego folders, or ShareGPT "
        ".json or .jsonl")
    add("--image-root", help="folder that a ShareGPT file's picture paths start in; default: "
        "that of the file")
    add("--val-data", help="VLN-Ego folder; default: val_seen beside --data, if it is there")
    add("--out", default="ckpt/grpo")
    add = p.add_argument_group("rollout").add_argument
    add("--prompts", type=count, default=20000, help="distinct decisions drawn from all of --data")
    add("--group-size", type=count, default=8, help="G, plans per prompt")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs")
    add = p.add_argument_group("objective").add_argument
    add("--reward", choices=tuple(REWARDS), default="tdr")
    add("--gamma", type=float, default=0.8, help="of tdr: what the next slot is worth to this one")
    add("--clip-eps", type=float, default=0.2, help="c, the trust region of [2]")
    add("--kl-coef", type=float, default=0.04, help="beta; 0 never loads the reference")
    add("--divide-by-spread", action=argparse.BooleanOptionalAction, default=True,
        help="advantages in standard deviations of their group, as the paper has them")
    add("--drop-flat-groups", action="store_true", help="leave groups out whose rewards all agree")
    add("--batch-size", type=count, default=8, help="prompts per batch, over all processes")
    add("--updates-per-batch", type=count, default=1, help="1 is strictly on-policy")
    add("--freeze-vision", action="store_true", help="train the language model only")
    E.add_optimizer_args(p, lr=1e-6, schedule="cosine", weight_decay=0.01)
    add = p.add_argument_group("schedule").add_argument
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=count, help="overrides --epochs; a step is one batch")
    add("--stop-after", type=count, help="leave after this step of the schedule (resume later)")
    add("--save-every", type=count, default=250)
    add("--val-every", type=count, default=250)
    add("--val-decisions", type=int, default=256)
    add("--samples-every", type=count, default=25, help="steps between the groups in samples.txt")
    E.add_machine_args(p)
    return p.parse_args(argv)


# ---------------------------------------------------------------- the algorithm, in three functions


def group_advantages(rewards, group_size, eps=1e-4, spread=True):
    """How much better is each plan than its siblings? [2] rewards (N,) -> (N,), in spreads.

    spread False leaves the division out: a group whose plans differ in the sixth slot only then
    weighs as little as the reward says, not as much as one that differs in the first.

    >>> group_advantages(torch.tensor([1.0, 3.0, 0.7, 0.7]), 2, eps=0.01)      # std of 1, 3: 1.414
    tensor([-0.7021,  0.7021,  0.0000,  0.0000])
    >>> group_advantages(torch.tensor([1.0, 3.0, 0.7, 0.7]), 2, spread=False)
    tensor([-1.,  1.,  0.,  0.])
    """
    assert group_size > 1, "a group of one has no siblings to beat"
    groups = rewards.view(-1, group_size)                                          # (B, G)
    # Measured from the first sibling, so that equal rewards are exactly 0. A rounding error of 1e-8
    # would do: AdamW divides by the gradient's own size and would make a full step of it.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(dim=1, keepdim=True)
    scale = groups.std(dim=1, keepdim=True) + eps if spread else 1.0
    return (centred / scale).flatten()


def masked_mean(x, mask):
    """Over each plan's own tokens: x, mask (N, C) -> (N,). A plan without tokens gives 0."""
    return torch.where(mask.bool(), x, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, clip_eps, kl_coef,
              clip_high=None):
    """Eq. 3 of [2], negated, one number per plan -> loss (N,), {"kl": (N,), "clip_frac": (N,)}.

    logps, old_logps, ref_logps, completion_mask (N, C); advantages (N,). ref_logps None: no KL.
    clip_high: the ratio's upper bound is 1 + this instead (grpo_online.py's is the wider one).
    The mean over plans is the caller's, who knows how many there are on all ranks together: so a
    plan weighs the same, however long it is and wherever it is computed.
    """
    advantages = advantages[:, None]                           # one verdict for all of its tokens
    ratio = torch.where(completion_mask.bool(), logps - old_logps, 0).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_high is None else clip_high))
    gain = torch.minimum(ratio * advantages, clipped * advantages)

    gap = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps
    gap = torch.where(completion_mask.bool(), gap, 0)
    kl = gap.exp() - gap - 1                                   # k3: unbiased, never negative

    loss = -masked_mean(gain - kl_coef * kl, completion_mask)
    stuck = (clipped * advantages < ratio * advantages).float()     # the clip won: no gradient
    return loss, {"kl": masked_mean(kl, completion_mask).detach(),
                  "clip_frac": masked_mean(stuck, completion_mask).detach()}


# ---------------------------------------------------------------- which prompts, in which order


def draw_prompts(sources, n, seed):
    """n distinct decisions, an equal share from each source -> list of (source, episode, t).

    sources: data sets with .episodes and .steps(i). A source that has fewer gives all it has.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for k, data in enumerate(sources):
        every = [(k, i, t) for i in range(len(data.episodes)) for t in data.steps(i)]
        share = n // len(sources) + (k < n % len(sources))
        drawn += [every[j] for j in rng.permutation(len(every))[:share]]
    return drawn


def batch_of(prompts, step, per_batch, seed):
    """The prompts of one global batch, from (seed, step) alone; each once an epoch, shuffled."""
    epoch, at = divmod(step, len(prompts) // per_batch)
    order = np.random.default_rng((seed, epoch)).permutation(len(prompts))
    return [prompts[j] for j in order[at * per_batch:(at + 1) * per_batch]]


def sampling_seeds(seed, step, n):
    """One seed per prompt of a global batch, so that its plans are the same on whichever rank."""
    words = np.random.SeedSequence((seed, step)).generate_state(n, np.uint64)
    return [int(word >> np.uint64(1)) for word in words]       # torch's seeds are 63 bits


def load_batch(sources, nav, units):
    """Units -> (decisions, {frame key: uint8 (H, W, 3)}): the part that runs in a loader thread."""
    decisions, frames = [], {}
    for k, episode, t in units:                # two sources may give their walks the same names
        decision = sources[k].decision(episode, t, nav)
        frames |= {(k, key): resize(sources[k].frame(key), nav) for key in decision.frames}
        decisions.append(decision._replace(frames=tuple((k, key) for key in decision.frames)))
    return decisions, frames


# ---------------------------------------------------------------- judging and telling


def judge(texts, decisions, policy, args):
    """Every plan against its decision's expert -> N marks (reward.score and the expert's plan).

    A decision whose expert could not be read (a ShareGPT record) gives its whole group 0: flat.
    """
    group, marks = len(texts) // len(decisions), []
    for i, text in enumerate(texts):
        expert = list(decisions[i // group].plan) or [None] * policy.nav["horizon"]
        mark = score(text, expert, policy.phrases, args.reward, args.gamma)
        marks.append(mark | {"expert": expert})
    return marks


def summary(marks):
    """Sums over plans, the keys of log.jsonl; the caller divides by the plans of all ranks."""
    return {"reward": sum(m["reward"] for m in marks), "first": sum(m["first"] for m in marks),
            "plan": sum(None not in m["plan"] and m["plan"] == m["expert"] for m in marks),
            "agreement": sum(uniform_reward(m["plan"], m["expert"]) for m in marks),
            "malformed": sum(m["malformed"] for m in marks),
            "stops": sum(m["plan"].count(STOP) for m in marks),
            "expert_stops": sum(m["expert"].count(STOP) for m in marks)}


def show_group(decision, texts, marks, advantages, policy):
    """One prompt, its G plans and their rewards, for people. A malformed plan is quoted in full."""
    letters = {action: phrase[0] for action, phrase in policy.phrases.items()} | {None: "?"}
    words = decision.prompt or window_prompt(decision.instruction, len(decision.frames) - 1,
                                             policy.nav)
    words = "\n".join([*(text for _, text in decision.before), words])
    words = re.sub(r"(<image>\s*)+", lambda m: f"[{m.group().count('<image>')} frames]\n", words)
    lines = [words.strip(), "reward  advantage  plan",
             f"    the expert's:  {' '.join(letters[a] for a in marks[0]['expert'])}"]
    for text, mark, advantage in zip(texts, marks, advantages):
        plan = " ".join(letters[a] for a in mark["plan"])
        quote = f"   {text!r}" if mark["malformed"] else ""
        lines.append(f"{mark['reward']:6.3f}  {advantage:+9.2f}  {plan}{quote}")
    return "\n".join(lines) + "\n\n"


def cut_samples(path, step):
    """On resume, drop the blocks of samples.txt that are younger than the state; so does Log."""
    kept = []
    if os.path.exists(path):
        with open(path) as f:
            blocks = re.split(r"(?m)^(?=# step \d+$)", f.read())
        kept = [b for b in blocks if b and int(b.split(maxsplit=3)[2]) <= step]
    with open(path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


def draw_curves(out, panels=(("reward", "val/reward"), ("kl",), ("frac_reward_zero_std",),
                             ("entropy",))):
    """log.jsonl -> curves.png: by default sampled and held-out reward, KL, flat groups, entropy."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, keys in zip(axes, panels):
        for key in keys:
            points = np.array([(r["step"], r[key]) for r in rows if r.get(key) is not None]
                              ).reshape(-1, 2)
            if key.startswith("val/"):
                axis.plot(*points.T, "o-", color="tab:orange", label=f"{key} (greedy)")
                continue
            width = max(1, len(points) // 20)                  # a moving mean, for the eye
            smooth = np.convolve(points[:, 1], np.ones(width) / width, "valid")
            axis.plot(*points.T, color="tab:blue", alpha=0.25)
            axis.plot(points[width - 1:, 0], smooth, color="tab:blue", label=key)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.savefig(os.path.join(out, "curves.png.tmp"), format="png", dpi=110)
    os.replace(os.path.join(out, "curves.png.tmp"), os.path.join(out, "curves.png"))
    plt.close(figure)


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(policy, data, units, rank, world, args):
    """Greedy plans on held-out decisions against the expert's -> dict of means over ranks."""
    marks = []
    for at in range(8 * rank, len(units), 8 * world):
        decisions, frames = load_batch([data], policy.nav, units[at:at + 8])
        texts = policy.generate(policy.read(decisions, frames)).texts
        marks += judge(texts, decisions, policy, args)
    sums = summary(marks)
    return {f"val/{key}": value / len(units)
            for key, value in zip(sums, E.total(list(sums.values()), policy.device))}


# ---------------------------------------------------------------- the run


def setup(args, device):
    """Data and policy, from the flags."""
    if not os.path.exists(os.path.join(args.init, "nav.json")):
        raise UserError(f"--init {args.init} is not a checkpoint of ours (it has no nav.json); "
                        f"make one with: python sft.py --out {args.init}")
    if args.group_size < 2:
        raise UserError("--group-size must be 2 or more: a lone plan has no siblings to beat")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0: at 0 all siblings are the same plan")
    if not 0 <= args.gamma <= 1:
        raise UserError("--gamma must lie between 0 (only the next action counts) and 1 (uniform)")
    sources = [open_data(path, args.image_root) for path in args.data]
    policy = load_policy(args.init, device=device, dtype=E.default_dtype(args))
    if is_dialog(policy.nav):
        raise UserError(f"--init {args.init} speaks in dialogs; that is for grpo_online.py")
    for path, data in zip(args.data, sources):
        for key, taught in ((key, policy.nav[key]) for key in ("turn_deg", "forward_m")):
            seen = data.meta.get("robot", {}).get(key, taught)
            if abs(seen - taught) > 1e-6:
                raise UserError(f"{args.init} was taught with {key} {taught:g}, and --data {path} "
                                f"was recorded with {seen:g}; give the data it learned from")
        if data.whole_walks:
            lengths = E.walk_lengths(policy, data)
        else:
            data.check_plans(policy.nav)
            lengths = data.lengths(policy, 96)                 # 96: Policy.generate's
        E.check_lengths(policy, lengths, path)
    policy.vision.requires_grad_(not args.freeze_vision)
    policy.checkpointing = args.gradient_checkpointing
    return sources, policy


def load_reference(args, engine, device):
    """pi_sft, frozen, with the call of engine(..); None if nothing pulls towards it."""
    if args.kl_coef == 0:
        return None
    reference = load_policy(args.init, device=device, dtype=E.default_dtype(args))
    reference.requires_grad_(False)
    if engine.zero_optimization_stage() == 3:                  # sharded, as the policy is
        import deepspeed
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                  "bf16": {"enabled": E.default_dtype(args) == "bfloat16"}}
        reference, *_ = deepspeed.initialize(model=reference, config=config)
    return reference


def main(args):
    rank, world, device = E.start(args)
    sources, policy = setup(args, device)
    E.open_run(args)

    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not split into {world} processes")
    prompts = draw_prompts(sources, args.prompts, args.seed)
    if len(prompts) < args.batch_size:
        raise UserError(f"--data and --prompts give {len(prompts)} prompts and a batch takes "
                        f"{args.batch_size}; lower --batch-size or record more walks")
    steps = args.max_steps or max(1, round(args.epochs * (len(prompts) // args.batch_size)))

    weights = sum(p.numel() for p in policy.parameters())          # ZeRO-3 will shard them away
    engine = E.make_engine(policy, args)
    reference = load_reference(args, engine, device)
    first = E.load_state(engine, args.out)
    val_path = args.val_data or os.path.join(os.path.dirname(args.data[0].rstrip("/")), "val_seen")
    val = (VlnEgo(val_path) if args.val_data or os.path.exists(os.path.join(val_path, "meta.json"))
           else None)
    val_units = draw_prompts([val], args.val_decisions, 0) if val else []
    if rank == 0:
        for note in (note for data in sources for note in data.notes):
            print(note)
        print(f"{len(prompts)} prompts, {steps} steps of {args.batch_size} x {args.group_size} "
              f"plans, {weights:,} weights on "
              f"{world} x {device}" + (f"; resuming at step {first}" if first else ""))

    def load(step):
        units = batch_of(prompts, step, args.batch_size, args.seed)[rank::world]
        return [load_batch(sources, policy.nav, [unit]) for unit in units]
    def forwards(units, seeds):
        """Prompts -> what each forward is given, [(decisions, frames, seeds), ..]"""
        return [(*E.together([unit for unit, _ in some]), [seed for _, seed in some])
                for some in E.forwards(list(zip(units, seeds)), lambda item: sum(policy.sizes(
                    *item[0], args.group_size)), args.micro_tokens, device)]
    E.tell_memory(engine, reference, max(policy.activations(decisions, frames, args.group_size)
                  for decisions, frames, _ in forwards(load(first), range(args.batch_size))), rank)
    log = E.Log(engine, args.out, first, steps, ("reward", "kl", "frac_reward_zero_std"))
    if rank == 0:
        cut_samples(f"{args.out}/samples.txt", first)
    if val_units and first == 0:                               # where the SFT policy stands
        with E.gathered(engine):
            log(0, **validate(policy, val, val_units, rank, world, args))
    last = min(steps, args.stop_after or steps)
    for step, batch, wait in E.ahead(load, range(first, last)):
        lr = E.learning_rate(step, steps, args.lr, args.warmup, args.schedule)
        E.set_learning_rate(engine, lr)

        # 1. imagine: G plans per prompt, from the policy as it stands
        seeds = sampling_seeds(args.seed, step, args.batch_size)[rank::world]
        batch = forwards(batch, seeds)
        # With one forward per update, sampling and learning run the prompts only once (not under
        # ZeRO-3, where ranks that sample plans of unequal length may not learn meanwhile).
        once = (len(batch) == 1 == args.updates_per_batch
                and engine.zero_optimization_stage() < 3)
        if args.freeze_vision:                   # one pass through the tower serves both models
            with E.gathered(engine), torch.no_grad():
                batch = [(decisions, dict(zip(frames, policy.encode_frames(list(frames.values())))),
                          seeds) for decisions, frames, seeds in batch]
        if once:
            decisions, frames, seeds = batch[0]
            roll, drawn_logps = policy.imagine(decisions, frames, args.group_size,
                                               args.temperature, seeds)
            rolls = [roll]
        else:
            with E.gathered(engine), torch.no_grad():
                rolls = [policy.generate(policy.read(decisions, frames), args.group_size,
                                         args.temperature, seeds)
                         for decisions, frames, seeds in batch]

        # 2. judge: text in, one number per plan out; neither model nor gradient is involved
        decisions = [d for some, _, _ in batch for d in some]
        texts = [text for roll in rolls for text in roll.texts]
        marks = judge(texts, decisions, policy, args)
        rewards = torch.tensor([m["reward"] for m in marks], device=device)            # (N,)
        advantages = group_advantages(rewards, args.group_size, spread=args.divide_by_spread)
        groups = rewards.view(-1, args.group_size)
        flat = groups.amax(dim=1) == groups.amin(dim=1)                                # (B,)
        votes = torch.ones_like(rewards)
        if args.drop_flat_groups:                # run all the same: ranks must do equal work
            votes = (~flat).float().repeat_interleave(args.group_size)
        all_votes, = E.total([votes.sum().item()], device)

        # 3. remember what the SFT model thinks of these plans
        calls = [(*part[:2], roll.completion_ids, roll.completion_mask, args.group_size,
                  args.temperature) for part, roll in zip(batch, rolls)]
        with torch.no_grad():
            ref_logps = [reference(*call) if reference else None for call in calls]

        # 4. learn
        ends = np.cumsum([0] + [len(roll.texts) for roll in rolls])
        old_logps, sums = [], np.zeros(4)
        for update in range(args.updates_per_batch):
            for i, (call, roll) in enumerate(E.accumulate(engine, list(zip(calls, rolls)))):
                rows, mask = slice(ends[i], ends[i + 1]), roll.completion_mask
                logps = drawn_logps if once else engine(*call)
                if update == 0:                  # no weight has moved since these were sampled
                    old_logps.append(logps.detach())
                loss, stats = grpo_loss(logps, old_logps[i], ref_logps[i], advantages[rows], mask,
                                        args.clip_eps, args.kl_coef)
                loss = (loss * votes[rows]).sum() / max(all_votes, 1)
                E.backward_step(engine, loss * world)          # DeepSpeed averages over ranks
                sums += [x.sum().item() for x in (loss, stats["kl"], stats["clip_frac"],
                                                  -masked_mean(logps, mask))]

        # 5. tell, check, keep
        done, n = step + 1, args.batch_size * args.group_size
        loss, kl, clip_frac, entropy = sums / args.updates_per_batch
        told = summary(marks) | {
            "loss": loss * n, "kl": kl, "clip_frac": clip_frac, "entropy": entropy,
            "plan_tokens": sum(roll.completion_mask.sum().item() for roll in rolls),
            "frac_reward_zero_std": flat.sum().item() * args.group_size}
        told = {k: v / n for k, v in zip(told, E.total(list(told.values()), device))}
        told |= {"lr": lr, "wait": wait} | E.update_metrics(engine)
        if val_units and (done % args.val_every == 0 or done == steps):
            with E.gathered(engine):
                told.update(validate(policy, val, val_units, rank, world, args))
        log(done, E.work(device, policy, reference), **told)
        if rank == 0 and (done == 1 or done % args.samples_every == 0 or done == steps):
            with open(f"{args.out}/samples.txt", "a") as f:
                f.write(f"# step {done}\n")
                for i in range(min(2, len(decisions))):
                    rows = slice(i * args.group_size, (i + 1) * args.group_size)
                    f.write(show_group(decisions[i], texts[rows], marks[rows],
                                       advantages[rows].tolist(), policy))
        if done % args.save_every == 0 or done == last:
            E.save_state(engine, args.out, done)
    log.close()
    weights = E.consolidated(engine)
    if rank == 0:
        save_policy(policy, args.out, weights)
        draw_curves(args.out)
        print(f"wrote {args.out} (the policy for evaluate.py; see curves.png, samples.txt, tb/)")
    E.leave_together()


if __name__ == "__main__":
    run(main, parse_args)
