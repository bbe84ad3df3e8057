"""
LoRA and full training of one model: what they hold in memory, and how long a step of GRPO takes.

    python bench/adapters.py            # two steps of each, on a CPU
    python bench/adapters.py --fits     # the arithmetic of the trainers, for whole models on a GPU

The model that is run has Qwen2-VL-2B's widths and vocabulary, Qwen's own tokenizer, random weights
in fp32, and two layers of the language model and two of the tower. Each run is grpo.py itself, in a
process of its own: memory_gb and seconds of its log, and its CPU seconds. --fits adds up
engine.model_bytes() and the activations of one prompt with 17 frames and 8 plans, with
--gradient-checkpointing, on one GPU; what kernels need in passing comes on top.
"""
import json
import os
import resource
import shutil
import sys
from types import SimpleNamespace

import torch
from common import QWEN2, make_world, parser, qwen_tokenizer, script, shaped

import checkpoint
import engine
import lora
from costs import activation_bytes
from make_data import VlnEgo
from model import CONTRACT

PLAN, PROMPT, FRAME = 54, 87, 70                   # tokens; docs/training.md
RUNS = {"full": [], "LoRA 16": ["--lora-rank", 16]}


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--fits", action="store_true", help="only the arithmetic of whole models")
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--tokenizer", default=os.path.expanduser("~/.cache/qwen-vocabulary"),
                   help="folder that keeps the wheel with Qwen's vocabulary")
    return p.parse_args(argv)


def fits(args):
    """GB of each part, for both sizes and both ways to train."""
    engine.init_distributed(SimpleNamespace(device="cpu", threads=args.threads, seed=0))
    tiny = checkpoint.load_policy("tiny", texts=["go"])
    for shape in QWEN2:
        for name in RUNS:
            with torch.device("meta"):
                policy = shaped(tiny, shape)
            if name != "full":
                with torch.device("meta"):
                    lora.add_adapter(policy.model, 16, False, "base", 0)
            fake = SimpleNamespace(zero_optimization_stage=lambda: 2, module=policy,
                                   bfloat16_enabled=lambda: True)
            parts = engine.model_bytes(fake, policy if name == "full" else None)
            tower = 17 * 4 * FRAME * policy.trains_vision
            parts["activations"] = activation_bytes(
                policy.model.config, PROMPT + 17 * FRAME + 8 * PLAN, tower, 8 * PLAN,
                2, checkpointing=True)
            print(f"{shape} {name:8}" + " + ".join(
                f"{part} {size / 1e9:.2f}" for part, size in parts.items())
                + f" = {sum(parts.values()) / 1e9:.1f} GB", flush=True)


def cut_model(args, data):
    """A folder with a model of 2 + 2 layers."""
    folder = os.path.join(args.world, "policy-2B-cut")
    if os.path.exists(os.path.join(folder, "nav.json")):
        return folder
    os.makedirs(args.tokenizer, exist_ok=True)
    tokenizer = qwen_tokenizer(args.tokenizer)
    if tokenizer is None:
        sys.exit("needs Qwen's vocabulary: PyPI does not give dashscope==2.0.2; put its wheel into "
                 f"{args.tokenizer}")
    checkpoint.tiny_tokenizer = lambda *_: tokenizer
    contract = dict(CONTRACT, dataset="houses", turn_deg=data.meta["robot"]["turn_deg"])
    policy = shaped(checkpoint.load_policy("tiny", contract), "2B", layers=2, depth=2,
                    dtype=torch.float32)
    os.makedirs(folder)
    checkpoint.save_policy(policy, folder)
    return folder


def cpu_seconds():
    """Of the processes that have ended, which a busy machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(args):
    if args.fits:
        return fits(args)
    _, late = make_world(args)
    folder = cut_model(args, VlnEgo(late))
    for name, flags in RUNS.items():
        out = os.path.join(args.world, "lora-run")
        shutil.rmtree(out, ignore_errors=True)
        before = cpu_seconds()
        script("grpo.py", "--init", folder, "--data", late, "--out", out, "--device", args.device,
               "--batch-size", 1, "--group-size", 4, "--prompts", 8, "--max-steps", args.steps,
               "--threads", args.threads, "--val-decisions", 0, *flags)
        with open(os.path.join(out, "log.jsonl")) as f:
            rows = [row for row in map(json.loads, f) if row["step"]]
        print(f"{name:8} peak {rows[-1]['memory_gb']:.1f} GB, {cpu_seconds() - before:.0f} CPU "
              "seconds in all, seconds of each step "
              + ", ".join(f"{row['seconds']:.1f}" for row in rows), flush=True)


if __name__ == "__main__":
    main(parse_args())
