"""
One GRPO step, ours against TRL's GRPOTrainer: roll out, reward, reference, update.

    python bench/grpo_step.py                      # tiny, CPU
    python bench/grpo_step.py --device cuda --shape 2B

Both start from the same folder and get the same prompts (17 frames each), the same reward, G = 8,
beta 0.04, AdamW, fp32 on CPUs and bf16 on GPUs. Ours is grpo.py itself, its log's seconds; theirs
is trainer.train(), the time between two steps. TRL with what suits it here: no gradient
checkpointing (it is on by default), fused log-probs (its default), old log-probs left out (one
update per batch), no logging of texts. Its vLLM path wants a GPU and is not measured.

Checked first, in fp32, on a batch that TRL sampled: prompt ids, rewards' advantages, log-probs of
every sampled token, and the gradient of the loss, against ours.
"""
import json
import os
import shutil

import torch
from common import add_row, clock, in_turn, make_world, parser, phrase_policy, script
from peers import conversation, load_model, load_processor, quiet
from PIL import Image

import grpo
from checkpoint import load_policy
from make_data import VlnEgo
from model import window_prompt
from reward import score


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--prompts", type=int, default=4, help="per step")
    p.add_argument("--steps", type=int, default=3, help="timed steps per repetition")
    return p.parse_args(argv)


def trl_trainer(folder, late, args, steps, callbacks=()):
    """TRL's GRPOTrainer on the prompts that grpo.py would draw."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    data, policy = VlnEgo(late), load_policy(folder)       # only its contract and phrases are used
    drawn = grpo.draw_prompts([data], args.prompts * 16, 0)
    decisions = [data.decision(i, t, policy.contract) for _, i, t in drawn]
    contract = policy.contract
    rows = [{"prompt": conversation(window_prompt(d.instruction, len(d.frames) - 1, contract)),
             "images": [Image.fromarray(data.frame(key)) for key in d.frames],
             "expert": list(d.plan), "number": i} for i, d in enumerate(decisions)]

    def reward(prompts, completions, expert, **_):
        return [score(answer[0]["content"], right, policy.phrases, "tdr", 0.8).reward
                for answer, right in zip(completions, expert)]

    def generator():
        yield from rows

    os.makedirs(os.path.join(args.world, "trl"), exist_ok=True)
    config = GRPOConfig(
        output_dir=os.path.join(args.world, "trl"), max_steps=steps, num_generations=8,
        per_device_train_batch_size=8 * args.prompts, gradient_accumulation_steps=1,
        max_completion_length=96, beta=0.04, temperature=1.0, top_p=1.0, top_k=0,
        epsilon=0.2, loss_type="grpo", scale_rewards="group", num_iterations=1,
        learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=args.device == "cuda", use_cpu=args.device == "cpu",
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        generation_kwargs={"suppress_tokens": policy.banned.tolist()})
    trainer = GRPOTrainer(
        model=load_model(folder, args.device, torch.float32),   # TRL's bf16 is autocast over fp32
        reward_funcs=reward, args=config, processing_class=load_processor(folder),
        train_dataset=datasets.Dataset.from_list(rows), callbacks=list(callbacks))
    trainer.model.generation_config.suppress_tokens = policy.banned.tolist()
    return trainer, decisions, policy


def trl_steps(folder, late, args, steps):
    """Seconds of each step but the first."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        ends = []

        def on_step_end(self, *_, **__):
            self.ends.append(clock(args.device))

    watch = Watch()
    trl_trainer(folder, late, args, steps + 1, [watch])[0].train()
    return [b - a for a, b in zip(watch.ends, watch.ends[1:])]


def our_steps(folder, late, args, steps):
    """The same of grpo.py, run as a user runs it."""
    out = os.path.join(args.world, "grpo")
    shutil.rmtree(out, ignore_errors=True)
    script("grpo.py", "--init", folder, "--data", late, "--out", out, "--device", args.device,
           "--batch-size", args.prompts, "--prompts", 16 * args.prompts, "--max-steps", steps + 1,
           "--threads", args.threads, "--warmup", 0, "--schedule", "constant")
    with open(os.path.join(out, "log.jsonl")) as f:
        return [row["seconds"] for row in map(json.loads, f) if row["step"] > 1]


def check(folder, late, args):
    """One batch of TRL's -> largest differences of what both compute on it."""
    trainer, decisions, policy = trl_trainer(folder, late, args, 1)
    held = {}
    original = trainer._compute_loss

    def spy(model, inputs):
        held.update(inputs)
        loss = original(model, inputs)
        names, weights = zip(*model.named_parameters())
        held["grads"] = dict(zip(names, torch.autograd.grad(loss, weights, retain_graph=True)))
        return loss

    logps_of = trainer._get_per_token_logps_and_entropies

    def recorded_logps(*given, **more):                  # the last call is the policy's
        found = logps_of(*given, **more)
        held["logps"] = found[0].detach()
        return found

    from trl.trainer import grpo_trainer
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch    # rows stay in the reward's order
    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = spy, recorded_logps
    rewarded = []
    reward = trainer.reward_funcs[0]

    def recorded_reward(**kwargs):
        rewarded.append((kwargs["number"], reward(**kwargs)))
        return rewarded[-1][1]

    trainer.reward_funcs[0] = recorded_reward
    trainer.train()

    (numbers, rewards), = rewarded
    groups = [decisions[n] for n in numbers[::8]]
    data = VlnEgo(late)
    frames = {key: data.frame(key) for d in groups for key in d.frames}
    policy.to(args.device)
    prompts = policy.build_prompts(groups, frames)
    same_ids = all(ids[mask.bool()].tolist() == prompts[i // 8].ids for i, (ids, mask) in
                   enumerate(zip(held["prompt_ids"], held["prompt_mask"])))
    advantages = grpo.group_advantages(torch.tensor(rewards, device=args.device), 8)
    mask = held["completion_mask"].bool()
    policy.banned = policy.banned[:0]                 # TRL's log-probs know of no banned ids
    ours = policy.logps(prompts, held["completion_ids"], mask, 8)
    theirs = held["logps"]
    loss, _ = grpo.grpo_loss(ours, ours.detach(), held["ref_per_token_logps"], advantages, mask,
                             0.2, 0.2, 0.04)
    loss.mean().backward()
    grads = {name: p.grad for name, p in policy.model.named_parameters()}
    gap = sum(((grads[k] - g) ** 2).sum() for k, g in held["grads"].items())
    size = sum((g ** 2).sum() for g in held["grads"].values())
    return {"same prompt ids": same_ids,
            "advantages": (advantages - held["advantages"]).abs().max().item(),
            "log-probs": ((ours - theirs) * mask).abs().max().item(),
            "gradient (relative)": (gap / size).sqrt().item()}


def main(args):
    quiet()
    torch.set_num_threads(args.threads)
    _, late = make_world(args)
    folder = phrase_policy(args, late)
    found = check(folder, late, args)
    equal = found.pop("same prompt ids") and max(found.values()) < 1e-3
    ours, peer = in_turn([lambda: our_steps(folder, late, args, 3 * args.steps),
                          lambda: trl_steps(folder, late, args, args.steps)], args.repeats)
    add_row(args, "GRPO step", sum(ours, []), sum(peer, []), "TRL GRPOTrainer", "s", equal,
            "same prompt ids; largest differences: "
            + ", ".join(f"{k} {v:.1e}" for k, v in found.items()),
            f"{args.prompts} prompts of 17 frames, G = 8, {args.threads} thread(s)",
            ["trl", "accelerate"])


if __name__ == "__main__":
    main(parse_args())
