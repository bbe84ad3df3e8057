"""
SFT samples a second, ours against Hugging Face's Trainer: several steps of one walk in a batch, and
independent samples.

    python bench/sft_step.py --steps-per-walk 8
    python bench/sft_step.py --steps-per-walk 1

Both start from the same folder and get the same samples in the same batches, the same AdamW,
clipping and rate, fp32 on CPUs and bf16 on GPUs. Ours is sft.py itself, its log's seconds; theirs
is trainer.train(), the time between two steps, one row a sample, right-padded to the longest of
its batch. The Trainer with what suits it here: processor and decoding in a worker process (ours:
in a thread), no gradient checkpointing, sdpa attention, PyTorch's AdamW, decoded frames remembered
by its data set as by ours.

Checked on the way: the loss of every step. Equal losses over several updates mean equal gradients.
"""
import json
import os
import shutil

import torch
from common import add_row, clock, in_turn, make_world, parser, phrase_policy, script
from peers import conversation, load_model, load_processor, quiet
from PIL import Image

import sft
from checkpoint import load_policy
from make_data import VlnEgo
from model import window_prompt
from reward import write_plan


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--batch-size", type=int, default=16, help="decisions per step")
    p.add_argument("--steps-per-walk", type=int, default=8)
    p.add_argument("--steps", type=int, default=5, help="timed steps per repetition")
    p.add_argument("--lr", type=float, default=1e-4)
    return p.parse_args(argv)


class Samples(torch.utils.data.Dataset):
    """The decisions of sft.py's batches, in its order, as rows for the Trainer."""

    def __init__(self, ego, folder, args, steps):
        self.data, self.policy = VlnEgo(ego), load_policy(folder)       # its contract, its words
        self.processor = load_processor(folder)
        order = sft.BatchSampler([self.data], 0, args.steps_per_walk,
                                 args.batch_size // args.steps_per_walk)
        self.units, self.batches = [], []       # a walk's last group may be smaller than the others
        for step in range(steps):
            mine = [(i, t) for _, i, ts in order(step) for t in ts]
            self.batches.append(range(len(self.units), len(self.units) + len(mine)))
            self.units += mine

    def __len__(self):
        return len(self.units)

    def __getitem__(self, k):
        d = self.data.decision(*self.units[k], self.policy.contract)
        words = window_prompt(d.instruction, len(d.frames) - 1, self.policy.contract)
        text = self.processor.apply_chat_template(conversation(words), add_generation_prompt=True)
        answer = write_plan(d.plan, self.policy.phrases) + "<|im_end|>"
        images = [Image.fromarray(self.data.frame(key)) for key in d.frames]
        row = self.processor(text=[text + answer], images=images, return_tensors="pt")
        row = {"input_ids": row["input_ids"][0], "pixel_values": row["pixel_values"],
               "image_grid_thw": row["image_grid_thw"],
               "mm_token_type_ids": row["mm_token_type_ids"][0]}
        n = len(self.processor.tokenizer(answer)["input_ids"])
        row["labels"] = row["input_ids"].clone()
        row["labels"][:-n] = -100
        return row


def collate(rows):
    """One row a sample, padded on the right."""
    def pad(key, value):
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True,
                                               padding_value=value)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", -100),
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "mm_token_type_ids": pad("mm_token_type_ids", 0),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
            "image_grid_thw": torch.cat([row["image_grid_thw"] for row in rows])}


def trainer_steps(folder, ego, args, steps):
    """-> samples per second of each step but the first, losses of all."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    samples, ends, losses = Samples(ego, folder, args, steps + 1), [], []

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                samples, batch_sampler=samples.batches, collate_fn=collate, num_workers=1,
                pin_memory=args.device == "cuda")

        def compute_loss(self, *given, **more):
            loss = super().compute_loss(*given, **more)
            losses.append(loss.item())
            return loss

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(clock(args.device))

    config = TrainingArguments(
        output_dir=os.path.join(args.world, "trainer"), max_steps=steps + 1,
        per_device_train_batch_size=args.batch_size, learning_rate=args.lr, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.999, max_grad_norm=1.0, lr_scheduler_type="constant",
        optim="adamw_torch_fused" if args.device == "cuda" else "adamw_torch",
        bf16=args.device == "cuda", use_cpu=args.device == "cpu", remove_unused_columns=False,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0)
    InOrder(model=load_model(folder, args.device, torch.float32), args=config,
            callbacks=[Watch()], train_dataset=samples).train()
    sizes = [len(batch) for batch in samples.batches]
    return [n / (b - a) for n, a, b in zip(sizes[1:], ends, ends[1:])], losses, sizes


def our_steps(folder, ego, args, steps):
    """The same of sft.py, run as a user runs it."""
    out = os.path.join(args.world, "sft")
    shutil.rmtree(out, ignore_errors=True)
    script("sft.py", "--model", folder, "--data", ego, "--out", out, "--device", args.device,
           "--batch-size", args.batch_size, "--steps-per-walk", args.steps_per_walk,
           "--max-steps", steps + 1, "--threads", args.threads, "--lr", args.lr, "--warmup", 0,
           "--schedule", "constant", "--val-every", 1000000, "--val-decisions", 1)
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = list(map(json.loads, f))
    return [row["seconds"] for row in rows[1:]], [row["loss"] for row in rows]


def main(args):
    quiet()
    torch.set_num_threads(args.threads)
    ego, late = make_world(args)
    folder = phrase_policy(args, late)
    ours, peer = in_turn([lambda: our_steps(folder, ego, args, args.steps),
                          lambda: trainer_steps(folder, ego, args, args.steps)], args.repeats)
    gap = max(abs(a - b) / b for a, b in zip(ours[0][1], peer[0][1]))
    sizes = peer[0][2][1:]
    rates = [[n / s for seconds, _ in ours for n, s in zip(sizes, seconds)],
             [rate for side in peer for rate in side[0]]]
    many = args.steps_per_walk > 1
    add_row(args, f"SFT, {args.steps_per_walk} steps of a walk together" if many else
            "SFT, independent samples", *rates, "HF Trainer", "samples/s", gap < 2e-4,
            f"losses of {len(ours[0][1])} steps, largest relative difference {gap:.1e}",
            f"batches of {args.batch_size}, up to 17 frames, {args.threads} thread(s)",
            ["accelerate"], higher_is_better=True)


if __name__ == "__main__":
    main(parse_args())
