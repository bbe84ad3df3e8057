"""
What a GPU makes of the policy, against plain transformers: is it right in bf16, and how fast is it?

    bash bench/gpu.sh                                  # an H100 or H200, all of it in nine minutes
    python bench/gpu.py --shape 2B --device cuda       # one shape
    python bench/gpu.py                                # tiny, on a CPU: a dry run (a test)
    python bench/gpu.py --compile                      # our layers compiled, as sft.py --compile

No data, no checkpoint, no network, no DeepSpeed: weights and pictures are random, both sides share
the same weights, and one process trains with torch's AdamW (`--shape 7B`: gradients only, for its
moments do not fit beside them). A plan is what a trained policy writes: all the work of sampling is
done, and then the drawn tokens are replaced by those of a plan, 54 as with Qwen2's words, so that
drafts are accepted as often as a robot repeats itself. The peer writes as many tokens.

The peer is transformers' own model with sdpa, its pictures prepared before the clock starts: rows
padded on the right and a loss over labels (SFT), generate() and a forward over G rows a prompt
(GRPO), generate() for one robot at a time (decisions).

Checked first, for the three families: log-probabilities of G answers to a shared prompt and the
gradient of all weights, against plain transformers on separate rows; in fp32 they agree, in bf16
our distance from fp32 is no larger than theirs; drafted samples are the undrafted.
"""
from __future__ import annotations

import io
import os
import time
import zipfile
from collections import namedtuple

import numpy as np
import torch
from common import QWEN2, add_row, clock, parser, shaped
from PIL import Image
from utilisation import matmul_tflops

from checkpoint import TINY, load_policy, save_policy
from cli import write_json, write_lines
from grpo import grpo_loss
from lsm import pick_frames
from model import CONTRACT, Policy
from qwen import patchify
from reward import FORWARD, LEFT, RIGHT, STOP, write_plan

Decision = namedtuple("Decision", "instruction frames plan prompt before answer",
                      defaults=(None, (), None))
WORDS = "walk past the brown table turn left at the door and stop beside the blue chair".split()


def parse_args(argv=None):
    p = parser(__doc__, repeats=5)
    p.add_argument("--rows", type=int, help="decisions per forward of ours; default: 4, 7B 2")
    p.add_argument("--peer-rows", type=int, help="the same of the peer; default: 2, 7B 1")
    p.add_argument("--prompts", type=int, help="per GRPO step; default: 2, 7B 1")
    p.add_argument("--compile", action="store_true", help="compile our layers; on a GPU also block "
                   "masks for long passes and CUDA graphs for short ones")
    p.add_argument("--write", metavar="DIR", help="measure nothing: write the policy and a "
                   "recording of random pictures there, for sft.py and grpo.py")
    args = p.parse_args(argv)
    usual = {"rows": 4, "peer_rows": 2, "prompts": 2}
    for key, n in usual.items():
        setattr(args, key, getattr(args, key) or (n // 2 if args.shape == "7B" else n))
    small = args.shape == "tiny"                    # a dry run on a CPU: the same path, less of it
    args.group, args.robots, args.steps = (2, 2, 3) if small else (8, 16, 8)
    args.size = (84, 84) if small else (480, 640)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return args


# ---------------------------------------------------------------- what is run


class Scripted(Policy):
    """A policy that samples as any other, and then writes plans of its own rng instead."""

    def _sample(self, hidden, places, temperature, uniforms, lengths, top_p=1.0):
        if not any(lengths):
            self.script = [self._encode(write_plan(random_plan(self.rng), self.phrases))
                           + [self.end_token] for _ in places]
        drawn = super()._sample(hidden, places, temperature, uniforms, lengths)
        return [[answer[min(length + j, len(answer) - 1)] for j in range(len(tokens))]
                for tokens, length, answer in zip(drawn, lengths, self.script)]


def random_plan(rng):
    """Six actions, mostly forward, often repeated."""
    plan = []
    while len(plan) < 6:
        again = plan and (plan[-1] == STOP or rng.random() < 0.7)
        plan.append(plan[-1] if again else int(rng.choice(
            [FORWARD, LEFT, RIGHT, STOP], p=[0.64, 0.16, 0.16, 0.04])))
    return plan


def make_policy(args):
    """A policy of the shape with random weights, and a plain model that shares them."""
    from transformers import AutoModelForImageTextToText
    policy = load_policy("tiny", dict(CONTRACT, turn_deg=15), texts=[" ".join(WORDS)],
                         atomic_patterns=[])
    with torch.device(args.device):
        if args.shape in QWEN2:
            policy = shaped(policy, args.shape)
        policy.to(args.device, args.dtype)
        plain = AutoModelForImageTextToText.from_config(
            plain_config(policy), attn_implementation="sdpa", dtype=args.dtype)
    share_weights(policy, plain)
    policy.__class__, policy.rng = Scripted, np.random.default_rng(0)
    if args.compile:
        policy.compile_layers()
    return policy, plain


def plain_config(policy):
    """The configuration of a policy's model, without the names of our attention functions."""
    from transformers import AutoConfig
    config = policy.model.config.to_dict()
    return AutoConfig.for_model(**config)


def share_weights(policy, plain):
    for name, weight in policy.model.named_parameters():
        place, _, leaf = name.rpartition(".")
        plain.get_submodule(place)._parameters[leaf] = weight
    plain.tie_weights()


def walk(policy, steps, height, width, seed=0):
    """Decisions at steps of one walk of random pictures -> decisions, frames as they are seen."""
    rng = np.random.default_rng(seed)
    decisions = [Decision(" ".join(rng.choice(WORDS, 25)), tuple(
        (seed, k) for k in (*pick_frames(t, **CONTRACT["memory"]), t)), random_plan(rng))
        for t in steps]
    first = decisions[0].instruction
    return ([d._replace(instruction=first) for d in decisions],
            {key: policy.resize(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
             for d in decisions for key in d.frames})


def plain_rows(policy, decisions, frames, answers):
    """Decisions with their answers (lists of ids) -> inputs of a plain model, one padded row each,
    and the number of ids before each answer."""
    prompts = policy.build_prompts(decisions, policy._blank_features(frames))
    rows = [torch.tensor(p.ids + ids) for p, ids in zip(prompts, answers)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    pixels, grids, patch = [], [], policy.image_format.patch
    for frame in (frames[key] for d in decisions for key in d.frames):
        patches = patchify(torch.from_numpy(frame.copy())[None], policy.image_format)[0]
        pixels.append(patches.view(len(patches), 3, 1, -1).expand(-1, 3, 2, -1).flatten(1))
        grids.append([1, frame.shape[0] // patch, frame.shape[1] // patch])
    inputs = dict(input_ids=ids, pixel_values=torch.cat(pixels).to(policy.device),
                  image_grid_thw=torch.tensor(grids, device=policy.device),
                  mm_token_type_ids=(ids == policy.image_token).int(),
                  attention_mask=(torch.arange(ids.shape[1], device=policy.device)
                                  < lengths[:, None]).long())
    return inputs, [len(p.ids) for p in prompts]


def plain_logps(policy, model, inputs, starts, answers):
    """Log-probabilities of the answers, one after the other (X,), vision tokens banned."""
    keep = inputs["input_ids"].shape[1] - min(starts) + 1
    logits = model(**inputs, logits_to_keep=keep).logits
    at = inputs["input_ids"].shape[1] - keep
    found = []
    for row, start, ids in zip(logits, starts, answers):
        own = row[start - at - 1:start - at - 1 + len(ids)].float()
        own = own.index_fill(-1, policy.banned, -torch.inf).log_softmax(-1)
        found.append(own.gather(1, torch.tensor(ids, device=own.device)[:, None])[:, 0])
    return torch.cat(found)


# ---------------------------------------------------------------- is it right?


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def both_sides(policy, plain, decisions, frames, group_size=3):
    """-> (log-probabilities, gradient) of ours and of the peer."""
    rng = np.random.default_rng(1)
    texts = [write_plan(random_plan(rng), policy.phrases) for _ in decisions * group_size]
    ids, mask = policy.answers(texts)
    ours = policy(decisions, frames, ids, mask, group_size)[mask.to(policy.device)]
    answers = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu())]
    rows = [d for d in decisions for _ in range(group_size)]
    theirs = plain_logps(policy, plain, *plain_rows(policy, rows, frames, answers), answers)
    return [(logps.detach(), gradient(model, -logps.mean()))
            for logps, model in ((ours, policy.model), (theirs, plain))]


def same_drafted(policy, decisions, frames):
    with torch.no_grad():
        prompts = policy.build_prompts(decisions, frames)
        a, b = (policy.generate(prompts, 4, 1.0, seeds=[1, 2][:len(prompts)], draft=draft)
                for draft in (True, False))
    return a.texts == b.texts


def check_family(args, name):
    """Differences of a family's tiny model on this device, and whether they are small enough."""
    from transformers import AutoModelForImageTextToText
    policy = load_policy(name, dict(CONTRACT, turn_deg=15), texts=[" ".join(WORDS)],
                         atomic_patterns=[]).to(args.device)
    plain = AutoModelForImageTextToText.from_config(plain_config(policy),
                                                    attn_implementation="sdpa").to(args.device)
    share_weights(policy, plain)
    if args.compile:
        policy.compile_layers()
    some = walk(policy, (1, 3), 56, 84) if args.shape == "tiny" else walk(policy, (3, 20), 168, 224)
    (a, grad_a), (b, grad_b) = both_sides(policy, plain, *some)
    drafted = same_drafted(policy, *some)
    for model in (policy, plain):
        model.to(torch.bfloat16)
    share_weights(policy, plain)
    (half_a, half_grad_a), (half_b, half_grad_b) = both_sides(policy, plain, *some)

    def off(x, y):
        return ((x - y).norm() / y.norm()).item()
    found = {"logps fp32": (a - b).abs().max().item(), "gradient fp32": off(grad_a, grad_b),
             "logps bf16": off(half_a, b), "theirs": off(half_b, b),
             "gradient bf16": off(half_grad_a, grad_b), "theirs ": off(half_grad_b, grad_b)}
    right = (drafted and found["logps fp32"] < 1e-3 and found["gradient fp32"] < 1e-3
             and found["logps bf16"] < 2 * found["theirs"] + 1e-3
             and found["gradient bf16"] < 2 * found["theirs "] + 1e-2)
    print(f"{name}: {'right' if right else 'WRONG'}; drafted as undrafted: {drafted}; "
          + ", ".join(f"{key.strip()} {value:.1e}" for key, value in found.items()), flush=True)
    return right


# ---------------------------------------------------------------- how fast is it?


class Timer:
    """Seconds and peak memory of what is called, after one call that does not count."""

    def __init__(self, args):
        self.args, self.cuda = args, args.device == "cuda"

    def __call__(self, run, repeats=None):
        run()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats or self.args.repeats):
            began = clock(self.args.device)
            run()
            seconds.append(clock(self.args.device) - began)
        return seconds, torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0


def make_step(args, policy):
    """-> optimizer step of both sides. The 7B's is left out: no card of 80 GB holds its moments."""
    if args.shape == "7B":
        return policy.zero_grad
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)

    def step():
        optimizer.step()
        optimizer.zero_grad()
    return step


def row(args, name, n, ours, peer, flops, matmul, what):
    """n things of ours and the peer's a call; ours, peer: (seconds, peak GB) of Timer."""
    (a, a_gb), (b, b_gb) = ours, peer
    tflops = [flops / s / 1e12 for s in a]
    name = f"{name}, {args.shape}" + ", compiled" * args.compile
    add_row(args, name, [n[0] / s for s in a], [n[1] / s for s in b],
            "plain transformers", f"{what}/s", None, "see the checks above",
            f"peak {a_gb:.1f} GB against {b_gb:.1f}; {sorted(tflops)[len(tflops) // 2]:.3g} TFLOP/s"
            f", {sorted(tflops)[len(tflops) // 2] / matmul:.0%} of a matrix product's {matmul:.3g}",
            higher_is_better=True)


def bench_sft(args, policy, plain, timer, matmul):
    """Eight decisions of a walk, in as many forwards as --rows says."""
    decisions, frames = walk(policy, range(0, 6 * args.steps, 6), *args.size)
    step = make_step(args, policy)
    ids, mask = policy.answers([write_plan(d.plan, policy.phrases) for d in decisions])
    parts = []
    for at in range(0, len(decisions), args.rows):
        some = decisions[at:at + args.rows]
        parts.append((some, {k: frames[k] for d in some for k in d.frames},
                      ids[at:at + args.rows], mask[at:at + args.rows]))

    def ours():
        for *inputs, its_mask in parts:
            (-policy(*inputs, its_mask).sum() / mask.sum()).backward()
        step()
    answers = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu())]
    rows = []
    for at in range(0, len(decisions), args.peer_rows):
        some = slice(at, at + args.peer_rows)
        inputs, starts = plain_rows(policy, decisions[some], frames, answers[some])
        labels = inputs["input_ids"].clone()
        for i, (start, answer) in enumerate(zip(starts, answers[some])):
            labels[i, :start] = labels[i, start + len(answer):] = -100
        rows.append({**inputs, "labels": labels})

    def theirs():
        for inputs in rows:
            plain(**inputs).loss.backward()
        step()
    policy.flops = 0
    mine = timer(ours)
    flops = policy.flops / (1 + args.repeats)
    row(args, "SFT", (args.steps,) * 2, mine, timer(theirs), flops, matmul, "samples")


def bench_grpo(args, policy, plain, timer, matmul):
    """Prompts of 17 frames with eight plans each; the weights are their own reference."""
    made = [walk(policy, [40], *args.size, seed) for seed in range(args.prompts)]
    decisions = [d for some, _ in made for d in some]
    frames = {key: frame for _, some in made for key, frame in some.items()}
    step, rng = make_step(args, policy), np.random.default_rng(0)
    advantages = torch.from_numpy(rng.normal(size=args.prompts * args.group)).float()
    advantages = advantages.to(policy.device)

    def ours():
        roll, stats = policy.sample_with_logps(decisions, frames, args.group, 1.0,
                                               list(range(args.prompts)))
        with torch.no_grad():
            reference = policy(decisions, frames, roll.completion_ids, roll.completion_mask,
                               args.group)
        loss, _ = grpo_loss(stats.logps, stats.logps.detach(), reference, advantages,
                            roll.completion_mask.to(policy.device), 0.2, 0.2, 0.04)
        loss.mean().backward()
        step()
    n = len(policy.answers([write_plan([1] * 6, policy.phrases)])[0][0])
    rows = [d for d in decisions for _ in range(args.group)]
    inputs, _ = plain_rows(policy, rows, frames, [[] for _ in rows])     # prompts of one length

    def theirs():
        with torch.no_grad():
            ids = plain.generate(**inputs, do_sample=True, min_new_tokens=n, max_new_tokens=n,
                                 suppress_tokens=policy.banned.tolist())
        for at in range(0, len(rows), args.peer_rows):
            some = slice(at, at + args.peer_rows)
            answers = ids[some, -n:].tolist()
            given = plain_rows(policy, rows[some], frames, answers)
            with torch.no_grad():
                reference = plain_logps(policy, plain, *given, answers)
            logps = plain_logps(policy, plain, *given, answers)
            shape = (len(answers), n)
            loss, _ = grpo_loss(logps.view(shape), logps.detach().view(shape),
                                reference.view(shape), advantages[some],
                                torch.ones(shape, device=logps.device), 0.2, 0.2, 0.04)
            (loss.sum() / len(rows)).backward()
        step()
    policy.flops = 0
    mine = timer(ours)
    flops = policy.flops / (1 + args.repeats)
    row(args, "GRPO", (args.prompts,) * 2, mine, timer(theirs, 1), flops, matmul, "prompts")


class Robot:
    """What Policy.agent() reads of a walk."""

    def __init__(self, name, instruction):
        self.name, self.instruction = name, instruction
        self.features, self.frames, self.actions, self.tokens = [], [], [], 0

    def add_decision(self, text, plan):
        self.actions += plan


def bench_decisions(args, policy, plain, timer, matmul):
    """16 robots, three new frames a decision, memories full; greedy."""
    rng, agent = np.random.default_rng(0), policy.agent()
    robots = [Robot(str(i), " ".join(rng.choice(WORDS, 25))) for i in range(args.robots)]
    pictures = rng.integers(0, 256, (3 * args.robots, *args.size, 3), dtype=np.uint8)

    def ours():
        for i, robot in enumerate(robots):
            robot.frames = list(pictures[3 * i:3 * i + 3])
        agent(robots)
    for _ in range(2 * args.steps - 1):
        ours()
    decisions, frames = walk(policy, [40], *args.size)
    inputs, _ = plain_rows(policy, decisions, frames, [[]])
    n = len(policy.answers([write_plan([1] * 6, policy.phrases)])[0][0])

    def theirs():
        with torch.no_grad():
            plain.generate(**inputs, do_sample=False, min_new_tokens=n, max_new_tokens=n)
    policy.flops = 0
    mine = timer(ours)
    flops = policy.flops / (1 + args.repeats)
    row(args, "decisions", (args.robots, 1), mine, timer(theirs), flops, matmul, "decisions")


def write_world(folder, policy, n_walks=2, steps=50):
    """policy/, a checkpoint, and train/, a VLN-Ego folder of random pictures and actions."""
    data, rng = os.path.join(folder, "train"), np.random.default_rng(0)
    os.makedirs(os.path.join(data, "frames"))
    os.makedirs(os.path.join(folder, "policy"))
    save_policy(policy, os.path.join(folder, "policy"))
    walks, episodes, (height, width) = [], [], policy.fit_pixels(480, 640)
    with zipfile.ZipFile(os.path.join(data, "frames", "0.zip"), "w") as z:
        for i in range(n_walks):
            actions = [*rng.integers(1, 4, steps).tolist(), STOP]
            walks.append({"walk_id": f"w{i}", "actions": actions, "shard": "frames/0.zip"})
            episodes.append({"episode_id": i, "walk_id": f"w{i}",
                             "instruction": " ".join(rng.choice(WORDS, 25))})
            for t in range(len(actions)):
                picture = io.BytesIO()
                noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(picture, "png")
                z.writestr(f"w{i}/{t:04d}.png", picture.getvalue())
    contract = policy.contract
    robot = {key: contract[key] for key in ("turn_deg", "forward_m", "hfov_deg")}
    write_json(os.path.join(data, "meta.json"), {
        "version": 1, "dataset": "", "image_format": "png",
        "robot": {**robot, "camera_height_m": contract["camera_height_m"], "width": width,
                  "height": height}})
    for name, rows in (("walks", walks), ("episodes", episodes)):
        write_lines(os.path.join(data, f"{name}.jsonl"), rows)


def main(args):
    if args.write:
        return write_world(args.write, make_policy(args)[0])
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.shape in ("tiny", "2B"):                      # once for all shapes
        names = list(TINY)[:1] if args.compile else TINY         # a family compiles for minutes
        right = [check_family(args, name) for name in names]
        add_row(args, "families checked" + ", compiled" * args.compile, [sum(right)], [len(right)],
                "plain transformers", "", all(right),
                "log-probabilities and gradients in fp32 and bf16, drafted samples",
                ", ".join(names), higher_is_better=True)
    matmul = matmul_tflops(args.device)
    policy, plain = make_policy(args)
    print(f"{args.shape}: {sum(p.numel() for p in policy.parameters()):,} weights, "
          f"{time.perf_counter() - began:.0f} s so far", flush=True)
    timer = Timer(args)
    for bench in (bench_sft, bench_grpo, bench_decisions):
        bench(args, policy, plain, timer, matmul)
        policy.zero_grad()
    print(f"{args.shape} done in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(parse_args())
