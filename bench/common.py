"""
What the benches share: a world to measure in, a policy that can write, a stopwatch, a table.

Every row names what it is compared with, runs both sides in turn on the same weights, prompts,
shapes and threads, and checks first that they compute the same thing: a ratio between different
results means nothing. A row is appended to --results (one JSON object a line; run.sh gathers them):

    {"row", "ours", "peer", "peer_name", "unit", "ratio", "equal", "check", "spread", "setting",
     "versions"}

ours and peer are medians over the repetitions, spread their smallest and largest values.

The policy. Speed depends on how many tokens a plan takes. Qwen2's tokenizer splits a phrase
(8 tokens, 54 a plan); our `tiny` has a token for each (7 a plan). The benches measure the former: a
tiny Qwen2-VL with a tokenizer that splits as Qwen2's does, trained for a minute to write plans, as
every policy after SFT can. `--shape 2B` and `7B` have Qwen2-VL's own sizes, and weights that know
no more than the tiny one's.
"""
from __future__ import annotations

import argparse
import base64
import glob
import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from importlib import metadata, util

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

# TRL and transformers' processor import torchvision, whose wheels are CUDA builds: to a CPU torch
# two operators are missing, which nobody here calls. Declaring them is enough.
if util.find_spec("torchvision") and not torch.version.cuda:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import checkpoint  # noqa: E402
import model  # noqa: E402
from cli import DefaultsFormatter, write_json  # noqa: E402
from engine import learning_rate  # noqa: E402
from make_data import VlnEgo  # noqa: E402
from reward import write_plan  # noqa: E402

FRAME_PX = {"tiny": (84, 84), "2B": (480, 640), "7B": (480, 640)}       # height, width as recorded


def parser(doc, **defaults):
    """The flags that all benches have."""
    p = argparse.ArgumentParser(description=" ".join(doc.split("\n\n")[0].split()),
                                formatter_class=DefaultsFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--shape", choices=tuple(FRAME_PX), default="tiny")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of either side")
    p.add_argument("--repeats", type=int, default=defaults.pop("repeats", 3))
    p.add_argument("--world", default=os.path.join(ROOT, "bench", "world"),
                   help="houses, recordings and policies of the benches; made when missing")
    p.add_argument("--results", help="file to append the row to")
    p.set_defaults(**defaults)
    return p


# ---------------------------------------------------------------- a world and a policy


def script(*command):
    """One of the project's scripts, as a user would, in the environment without the peers."""
    python = os.environ.get("BENCH_PYTHON", sys.executable)
    done = subprocess.run([python, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")


def make_world(args):
    """Houses with long walks (level 3, about R2R's 58 steps) and their recordings -> VLN-Ego
    folders: all steps, and only those that see 17 frames."""
    houses = os.path.join(args.world, "houses")
    if not os.path.exists(os.path.join(houses, "train", "train_gt.json.gz")):
        script("-m", "world.houses", "--out", houses, "--level", 3, "--train-houses", 4,
               "--val-episodes", 4, "--unseen-houses", 2, "--jobs", 2)
    height, width = FRAME_PX[args.shape]
    ego = os.path.join(args.world, f"ego{width}x{height}")
    if not os.path.exists(os.path.join(ego, "train", "meta.json")):
        script("make_data.py", "--episodes", houses, "--out", ego, "--height", height,
               "--width", width)
    late = os.path.join(args.world, f"late{width}x{height}", "train")
    if not os.path.exists(os.path.join(late, "meta.json")):
        os.makedirs(late)
        os.symlink(os.path.join(os.path.abspath(ego), "train", "frames"),
                   os.path.join(late, "frames"))
        data = VlnEgo(os.path.join(ego, "train"))
        for walk in data.walks.values():              # a step without a label is not trained on
            plans = [label_text(walk["actions"], t) if t >= 16 else ""
                     for t in range(len(walk["actions"]))]
            walk["labels"] = plans
        for name, rows in (("walks", data.walks.values()), ("episodes", data.episodes)):
            with open(os.path.join(late, name + ".jsonl"), "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        with open(os.path.join(late, "meta.json"), "w") as f:
            json.dump(data.meta, f)
    return os.path.join(ego, "train"), late


def label_text(actions, t):
    from make_data import action_chunk
    return "".join(map(str, action_chunk(actions, t, 6)))


QWEN2 = {   # hidden, layers, heads, kv heads, mlp, vocabulary, tied; both have the same tower
    "2B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}


RANKS = "dashscope/resources/qwen.tiktoken"        # 151,643 lines: a token in base 64, its rank


def last_merge(token, ranks):
    """The two tokens that byte-pair encoding joins last: a token is built from pairs of lower rank,
    the lowest first."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def qwen_tokenizer(folder):
    """Qwen2Tokenizer of the published ranks, which Alibaba's own SDK holds: its wheel is kept in
    `folder`. None if it is not there and PyPI does not give it."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    if not glob.glob(f"{folder}/*.whl"):
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                               "--retries", "0", "--timeout", "5", "-d", folder,
                               "dashscope==2.0.2"], capture_output=True)
        if done.returncode:
            return None
    with zipfile.ZipFile(glob.glob(f"{folder}/*.whl")[0]) as wheel:
        lines = [line.split() for line in wheel.read(RANKS).splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def as_text(token):
        return "".join(letters[b] for b in token)
    merges = [tuple(map(as_text, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Qwen2Tokenizer(vocab={as_text(token): rank for token, rank in ranks.items()},
                               merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": checkpoint.SPECIAL_TOKENS})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = checkpoint.CHAT_TEMPLATE
    return tokenizer


def shaped(policy, shape, layers=None, depth=32, dtype=torch.bfloat16):
    """The tiny policy's tokenizer, and a model of Qwen2-VL's own sizes with random weights.

    layers, depth: only so many of the language model's (None: all) and of the tower's.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    hidden, all_layers, heads, kv_heads, mlp, vocabulary, tied = QWEN2[shape]
    config = policy.model.config.to_dict()
    config["text_config"].pop("layer_types", None)
    config["text_config"].update(
        hidden_size=hidden, num_hidden_layers=layers or all_layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=tied, initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    config["vision_config"].update(depth=depth, embed_dim=1280, num_heads=16, mlp_ratio=4,
                                   hidden_size=hidden, initializer_range=0.02)
    config["tie_word_embeddings"] = tied
    torch.manual_seed(0)
    big = Qwen2VLForConditionalGeneration._from_config(
        Qwen2VLConfig(**config), attn_implementation="sdpa", dtype=dtype)
    big.generation_config = policy.model.generation_config
    return type(policy)(big, policy.tokenizer, policy.contract, policy.processor)


def phrase_policy(args, late, steps=500):
    """A checkpoint folder: 17 frames, phrases split as Qwen2 splits them, able to write plans."""
    folder = os.path.join(args.world, f"policy-{args.shape}")
    if os.path.exists(os.path.join(folder, "nav.json")):
        return folder
    data = VlnEgo(late)
    contract = dict(model.CONTRACT, dataset="houses", turn_deg=data.meta["robot"]["turn_deg"])
    words = [e["instruction"] for e in data.episodes]
    policy = checkpoint.load_policy("tiny", contract, texts=words,
                                    atomic_patterns=[])    # no phrase is a token of its own
    if args.shape != "tiny":
        policy = shaped(policy, args.shape)
    policy.to(args.device)
    policy.banned = policy.banned[:0]                 # peers ban nothing: it must not matter
    rng = np.random.default_rng(0)
    rate = 3e-3 * 128 / policy.model.config.text_config.hidden_size
    optimizer = torch.optim.AdamW(policy.parameters(), rate, weight_decay=0.0)
    units = [(i, t) for i in range(len(data)) for t in data.steps(i)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate, 0.1, "cosine")
        drawn = [units[k] for k in rng.integers(len(units), size=17)]
        decision = data.decision(*drawn[0], contract)      # any plan: only the text counts
        plans = [data.decision(*unit, contract).plan for unit in drawn[1:]]
        ids, mask = policy.answers([write_plan(plan, policy.phrases) for plan in plans])
        logps = policy([decision], {k: data.frame(k) for k in decision.frames}, ids, mask, 16)
        optimizer.zero_grad()
        (-logps.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    os.makedirs(folder)
    checkpoint.save_policy(policy, folder)
    return folder


# ---------------------------------------------------------------- measuring and telling


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(sides, repeats):
    """Call every side once per repetition, one after the other, so that what else the machine does
    falls on all alike. sides: functions -> a list of lists of what they return."""
    found = [[] for _ in sides]
    for _ in range(repeats):
        for side, into in zip(sides, found):
            into.append(side())
    return found


def versions(*names):
    return {name: metadata.version(name) for name in ("torch", "transformers", *names)}


EQUAL = {True: "equal", False: "NOT EQUAL", None: "-"}


def add_row(args, row, ours, peer, peer_name, unit, equal, check, setting, packages=(),
            higher_is_better=False):
    """Print a row and append it to --results. ours, peer: lists of measurements. equal: did both
    sides compute the same? None where there is nothing to compare."""
    a, b = statistics.median(ours), statistics.median(peer)
    equal = None if equal is None else bool(equal)
    ratio = a / b if higher_is_better else b / a
    found = {"row": row, "ours": round(a, 5), "peer": round(b, 5), "peer_name": peer_name,
             "unit": unit, "ratio": round(ratio, 2), "equal": equal, "check": check,
             "spread": {"ours": [round(min(ours), 5), round(max(ours), 5)],
                        "peer": [round(min(peer), 5), round(max(peer), 5)]},
             "setting": setting, "shape": args.shape, "device": (
                 "cpu" if args.device == "cpu" else torch.cuda.get_device_name()),
             "versions": versions(*packages)}
    print(f"{row}\n  ours {a:.4g} [{min(ours):.4g}, {max(ours):.4g}]   {peer_name} {b:.4g} "
          f"[{min(peer):.4g}, {max(peer):.4g}] {unit}   ratio {ratio:.2f}\n"
          f"  {EQUAL[equal]}: {check}\n  {setting}", flush=True)
    if args.results:
        with open(args.results, "a") as f:
            f.write(json.dumps(found) + "\n")
    return found


def gather(rows, path):
    """The rows of a run -> path, and a table for people."""
    with open(rows) as f:
        found = [json.loads(line) for line in f]
    write_json(path, found, indent=1)
    print(f"\n{'':44}{'ours':>9}{'peer':>9}  {'unit':12}{'ratio':>6}")
    for r in found:
        print(f"{r['row']:44}{r['ours']:9.4g}{r['peer']:9.4g}  {r['unit']:12}{r['ratio']:6.2f}  "
              f"{EQUAL[r['equal']]:10}against {r['peer_name']}")
    print(f"{path}: {time.strftime('%Y-%m-%d')}, "
          + ", ".join(f"{k} {v}" for k, v in sorted({k: v for r in found for k, v in
                                                     r['versions'].items()}.items())))


if __name__ == "__main__":
    gather(*sys.argv[1:])
