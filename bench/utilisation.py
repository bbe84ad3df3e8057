"""
How much of the card is used: model FLOP/s and memory of sft.py and grpo.py, from their own logs.

    python bench/utilisation.py --device cuda --shape 2B --flags="--gradient-checkpointing"
    python bench/utilisation.py                              # the same flags on a CPU: a dry run

The count is model.py's: what the method needs with a prompt run once for its group and a frame
once for its batch, forward, backward, sampling and reference, no padding, nothing twice. "peer" is
what a plain product of two matrices reaches on the same machine, measured here (bf16 on a GPU; an
H200 is known to reach 790 TFLOP/s).
"""
import json
import os
import shutil
import statistics

import torch
from common import add_row, clock, make_world, parser, phrase_policy, script


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=8, help="the first two are not counted")
    p.add_argument("--batch-size", type=int, default=16, help="decisions of sft.py per forward")
    p.add_argument("--prompts", type=int, default=4, help="of grpo.py per forward")
    p.add_argument("--flags", default="", help="more flags for both, in one string")
    return p.parse_args(argv)


def matmul_tflops(device):
    """What a plain matrix product reaches here."""
    n = 8192 if device == "cuda" else 1024
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    a @ a
    start = clock(device)
    for _ in range(8):
        a @ a
    return 8 * 2 * n ** 3 / (clock(device) - start) / 1e12


def main(args):
    torch.set_num_threads(args.threads)
    ego, late = make_world(args)
    folder = phrase_policy(args, late)
    common = ["--device", args.device, "--threads", args.threads, "--max-steps", args.steps,
              *args.flags.split()]
    for name, flags in (
            ("sft", ["--model", folder, "--data", ego, "--batch-size", args.batch_size,
                     "--val-every", 1000000, "--val-decisions", 1]),
            ("grpo", ["--init", folder, "--data", late, "--batch-size", args.prompts])):
        out = os.path.join(args.world, "used-" + name)
        shutil.rmtree(out, ignore_errors=True)
        script(name + ".py", "--out", out, *flags, *common)
        with open(os.path.join(out, "log.jsonl")) as f:
            rows = [row for row in map(json.loads, f) if row["step"] > 2]
        memory = max(row["memory_gb"] for row in rows)
        waits = statistics.median(row["wait_s"] / row["seconds"] for row in rows)
        add_row(args, f"utilisation, {name}", [row["tflops"] for row in rows],
                [matmul_tflops(args.device)], "a matrix product", "TFLOP/s", None,
                f"nothing to compare; {memory:.1f} GB, {waits:.0%} of the time waiting for data",
                " ".join(map(str, flags[4:] + common)), higher_is_better=True)


if __name__ == "__main__":
    main(parse_args())
