"""
What sft.py, grpo.py and activevln/grpo_online.py share around their training step: start the
processes, wrap the policy in DeepSpeed, write the log, and resume after a kill -9.

There is one path for every machine. `python x.py`, `torchrun x.py` and `deepspeed x.py` all end in
a DeepSpeed engine (ZeRO 0-3, set by ds_config.json or --zero-stage) over gloo on CPUs or NCCL on
GPUs; a single process is a world of size one.

A run directory (--out) holds
    args.json                 the flags;  .lock  held by the process that writes here
    log.jsonl                 one line per step; tb/ holds the same for TensorBoard
    state/step_000200/        weights, optimizer, step: everything that resuming needs
    curves.png                the main columns of the log (GRPO)
    config.json, model.safetensors, tokenizer.json, nav.json, ...     the policy (checkpoint.py), or
    adapter_config.json, adapter_model.safetensors, nav.json          its adapter (lora.py)
A state is complete when state/latest names it. That file is replaced in one move, after every rank
has written its part. On resume the log is cut back to the step of the state, so the run continues
as if it had never stopped: data order and sampling noise are functions of (seed, step), not of a
generator whose state would have to be saved. On a CPU, with the same library versions and numbers
of processes and threads, the weights are equal to the bit; a GPU does not sum in a fixed order.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import is_sound, save_policy
from cli import (
    UserError,
    fingerprint,
    hash_samples,
    lock_folder,
    non_negative,
    positive_int,
    read_json,
    read_rows,
    whole_number,
    write_json,
    write_lines,
    write_text,
)
from make_data import open_data

# ---------------------------------------------------------------- pure functions


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """Linear warm-up over the share `warmup` of all steps, then cosine to 0 (or constant).

    step counts from 0. The rate of a step is taken at its middle: no step has a rate of 0.
    >>> [round(learning_rate(s, 10, 1.0, 0.2, "cosine"), 3) for s in (0, 1, 2, 9)]
    [0.25, 0.75, 0.99, 0.01]
    """
    at = (step + 0.5) / total
    if at < warmup:
        return peak * at / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))


# ---------------------------------------------------------------- flags that the trainers share


def add_optimizer_args(parser, lr: float, schedule: str, weight_decay: float) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", type=non_negative, default=lr, help="peak learning rate")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for the matrices of the layers, in fp32 without ZeRO; AdamW for other weights")
    add("--schedule", choices=("cosine", "constant"), default=schedule)
    add("--warmup", type=non_negative, default=0.1, help="share of all steps with a rising rate")
    add("--weight-decay", type=non_negative, default=weight_decay)
    add("--beta2", type=non_negative, default=0.999, help="decay rate of AdamW's second moment")


def token_budget(text: str) -> int | None:
    """The type of --micro-tokens: a whole number, or None for auto (plan_micro_batches)."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number")
    return None if text == "auto" else int(text)


def add_machine_args(parser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"))
    add("--dtype", default=None, choices=("float32", "bfloat16"),
        help="default: bfloat16 with fp32 master weights on GPUs, float32 on CPUs")
    add("--deepspeed-config", default=os.path.join(os.path.dirname(__file__), "ds_config.json"))
    add("--zero-stage", type=int, choices=range(4), help="overrides the config file's stage")
    add("--micro-tokens", type=token_budget, default="auto", help="about how many tokens a process "
        "runs per micro-batch; an update takes as many as its batch needs. auto: as many as fit "
        "the GPU by the printed estimate, and one micro-batch on a CPU; 0: one")
    add("--gradient-checkpointing", action="store_true", help="recompute layers: less memory, 1.3x")
    add("--compile", action="store_true", help="torch.compile the layers: fewer and larger kernels "
        "after a first step of minutes; needs a C++ compiler. Not with ZeRO 3")
    add("--threads", type=positive_int, default=1, help="CPU threads per process")
    add("--seed", type=whole_number, default=0)
    add("--local_rank", type=int, default=0, help="set by the deepspeed launcher")


# ---------------------------------------------------------------- processes


class Process(NamedTuple):
    rank: int
    world_size: int
    device: str


def init_distributed(args) -> Process:
    """Join the process group, or make one of a single process. Call once, before any model."""
    if args.beta2 >= 1:
        raise UserError("--beta2 must be below 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU: install the torch build that suits "
                        "the driver, or give --device cpu")
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                       ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    import deepspeed

    # Otherwise DeepSpeed compiles an extension at its first start, which takes half a minute and a
    # compiler. gloo and torch's AdamW do not need it.
    from deepspeed.ops import __compatible_ops__
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(args.threads)
    device = args.device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo", verbose=False)
        atexit.register(dist.destroy_process_group)    # or a late peer may abort the interpreter
    torch.manual_seed(args.seed)
    return Process(dist.get_rank(), dist.get_world_size(), device)


def on_first_rank(action: Callable[[], None]) -> None:
    """Run action() on rank 0. A UserError there is raised on every rank with the same message:
    otherwise the other ranks would wait forever."""
    message = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            message = [str(error)]
    dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])


def all_reduce_sum(values: Sequence[float], device: str) -> list[float]:
    """Sum each number of a list over all ranks (float64, so that counts stay exact)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(value: float, device: str) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def prefetch(load: Callable, steps: range) -> Iterator[tuple]:
    """For each step yield (step, load(step), seconds spent waiting for it).

    load(step + 1) runs in a thread while step is trained on.
    """
    with ThreadPoolExecutor(1) as loader:
        pending = loader.submit(load, steps.start) if steps else None
        for step in steps:
            started = time.monotonic()
            batch = pending.result()
            wait_s = time.monotonic() - started
            if step + 1 in steps:
                pending = loader.submit(load, step + 1)
            yield step, batch, wait_s


class Counters(NamedTuple):
    """Work of one step, summed over all ranks."""
    flops: float
    tokens: float
    nan_ranks: float        # ranks that sampled from a distribution that was not finite


def pop_flop_counters(device: str, *models) -> Counters:
    """Read the counters of our policies and set them to zero. A model may be wrapped, or None, or a
    grpo.AdapterReference, which counts in the policy."""
    policies = [getattr(m, "module", m) for m in models if isinstance(m, torch.nn.Module)]
    counters = Counters(*all_reduce_sum(
        [sum(p.flops for p in policies), sum(p.tokens for p in policies),
         any(p.nan_logits for p in policies)], device))
    for policy in policies:
        policy.flops, policy.tokens, policy.nan_logits = 0, 0, False
    return counters


def memory_gb() -> float:
    """Peak memory of this process in units of 1e9 bytes: on its GPU, or in all on a CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count_weights(engine, trained_only: bool = False) -> int:
    return sum(getattr(p, "ds_numel", p.numel())           # the whole tensor, if ZeRO-3 shards it
               for p in engine.module.parameters() if p.requires_grad or not trained_only)


def available_bytes(device: str) -> float:
    """Memory that this process may fill: on a GPU what other processes leave of it; on a CPU its
    share of the machine's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / dist.get_world_size()


def model_bytes(engine, reference) -> dict[str, float]:
    """What a process holds all the time, in bytes by part. Weights, gradients and AdamW's two
    moments are divided among the processes according to the ZeRO stage; with bf16 weights there are
    an fp32 master copy and fp32 sums of gradients (make_engine)."""
    stage, world_size = engine.zero_optimization_stage(), dist.get_world_size()
    half, trained = engine.bfloat16_enabled(), count_weights(engine, trained_only=True)
    by_stage = [world_size if stage >= least else 1 for least in (1, 2, 3)]
    weights = count_weights(engine) * (2 if half else 4) / by_stage[2]
    # ZeRO-1 keeps the bf16 gradients of a micro-batch beside their sums; from stage 2 on a bucket.
    gradients = trained * (6 if half and stage == 1 else 4)
    return {"weights": weights, "gradients": gradients / by_stage[1],
            "optimizer": trained * (12 if half else 8) / by_stage[0],
            **({"reference": weights} if isinstance(reference, torch.nn.Module) else {})}


# The share of a GPU that is planned for. The rest is for DeepSpeed's buckets, for what kernels need
# in passing, and for gaps between tensors of different sizes.
PLANNED_SHARE = 0.9


def plan_micro_batches(engine, reference, args, sizes: Sequence[int],
                       activations: Callable[[int], float]) -> int:
    """Print the least memory that a process will hold, in GB (1e9 bytes), warn if it is more than
    there is, and return the token budget of a micro-batch: --micro-tokens, or if that is auto what
    fits. All ranks call this and get the same.

    sizes: tokens of each example of this rank's first batch; activations(budget): bytes that the
    largest of its micro-batches under a budget keeps for the backward pass.
    """
    parts, available = model_bytes(engine, reference), available_bytes(args.device)
    budget, auto = args.micro_tokens, args.micro_tokens is None
    if auto and args.device == "cuda":
        free = PLANNED_SHARE * available - sum(parts.values())
        budget = fit_token_budget(sizes, activations, -all_reduce_max(-free, engine.device),
                                  engine.device)
    budget = budget or 0
    parts["activations"] = all_reduce_max(activations(budget), engine.device)
    needed = sum(parts.values())
    if dist.get_rank() == 0:
        print("memory: about " + " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
              + f" = {needed / 1e9:.2f} GB of {available / 1e9:.0f} GB a process has; "
              + (f"micro-batches of up to {budget:,} tokens" if budget else "one micro-batch")
              + " (--micro-tokens auto)" * auto)
        if needed > available:
            print("WARNING: that does not fit. Lower --micro-tokens, unless it is auto; then "
                  "--gradient-checkpointing; then --lora-rank, --zero-stage 2 or 3 over more GPUs, "
                  "or --freeze-vision", file=sys.stderr)
    return budget


def fit_token_budget(sizes: Sequence[int], activations: Callable[[int], float], free: float,
                     device: str) -> int:
    """The budget under which the largest micro-batch of all ranks keeps at most `free` bytes; or,
    if even one example is too large, the size of the largest. For the rest see plan_micro_batches.
    """
    whole, least = (int(all_reduce_max(n, device)) for n in (sum(sizes), max(sizes, default=0)))
    budget = whole
    while (kept := all_reduce_max(activations(budget), device)) > free and budget > least:
        budget = max(least, budget * 4 // 5)
    # Other batches may be larger than the first. If all of it fits, as much more does.
    return int(budget * free / kept) if budget == whole and kept <= free else budget


# ---------------------------------------------------------------- micro-batches


def balance_by_tokens(sizes: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """Partition items of these sizes (tokens) into index lists with about equal sums: as few lists
    as keep every sum within the budget, but at least `least`. An item above the budget stands
    alone; a list may be empty.

    Greedy: the largest item first, each to the list with the smallest sum so far.
    >>> balance_by_tokens([5, 9, 4, 3], 10), balance_by_tokens([5, 9, 4, 3], 21)
    ([[1], [0], [2, 3]], [[0, 1, 2, 3]])
    >>> balance_by_tokens([30, 1], 10), balance_by_tokens([30, 4, 4, 4], 10)
    ([[0], [1]], [[0], [1, 3], [2]])
    >>> balance_by_tokens([5, 9], 10, least=3)
    [[1], [0], []]
    """
    for n in range(least, max(least, len(sizes)) + 1):
        parts, sums = [[] for _ in range(n)], [0] * n
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            lightest = sums.index(min(sums))
            parts[lightest].append(i)
            sums[lightest] += sizes[i]
        if all(total <= budget or len(part) == 1 for part, total in zip(parts, sums)):
            break
    return [sorted(part) for part in parts]


def micro_batches(items: Sequence, size_of: Callable, budget: int, device: str) -> list[list]:
    """Split the items of an update into micro-batches of about `budget` tokens; budget 0: one.

    Every rank gets the same number: under ZeRO a forward pass is a collective operation, and a rank
    with fewer would block the others. A rank with too few items gets empty lists.
    """
    if budget == 0:
        return [list(items)]
    sizes = [size_of(item) for item in items]
    most = int(all_reduce_max(len(balance_by_tokens(sizes, budget)), device))
    return [[items[i] for i in part] for part in balance_by_tokens(sizes, budget, least=most)]


def merge_batches(batches: Sequence[tuple[list, dict]]) -> tuple[list, dict]:
    """[(decisions, frames), ..] -> (all decisions, all frames without duplicates)."""
    return ([d for decisions, _ in batches for d in decisions],
            {key: frame for _, frames in batches for key, frame in frames.items()})


def accumulate(engine, parts: Sequence) -> Iterator:
    """Yield the micro-batches of an update in turn; DeepSpeed steps after the last. Their losses
    must be shares of one sum: nothing divides them by the number of micro-batches."""
    for i, part in enumerate(parts):
        engine.set_gradient_accumulation_boundary(i == len(parts) - 1)
        yield part


# ---------------------------------------------------------------- data


def held_out_data(val_data: str | None, data: str, image_root: str | None = None):
    """--val-data; by default what stands beside --data, if it exists: the folder val_seen, or for
    a file val.json."""
    beside = "val.json" if os.path.isfile(data) else "val_seen"
    path = val_data or os.path.join(os.path.dirname(data.rstrip("/")), beside)
    there = os.path.isfile(path) or os.path.exists(os.path.join(path, "meta.json"))
    return open_data(path, image_root) if val_data or there else None


def check_recording(policy, data, path: str) -> None:
    """UserError if a recording is of another robot than the policy's, or if its labels hold fewer
    actions than the policy plans."""
    for key in ("turn_deg", "forward_m"):
        trained = policy.contract[key]
        recorded = data.meta.get("robot", {}).get(key, trained)
        if abs(recorded - trained) > 1e-6:
            raise UserError(f"the policy has {key} {trained:g}, and {path} was recorded with "
                            f"{recorded:g}; give the data of its robot")
    if data.whole_walks and not policy.whole_walks:
        data.check_plans(policy.contract)


def check_lengths(policy, lengths: Sequence[tuple[str, int]], source: str) -> None:
    """UserError if a sequence does not fit the model's context.

    lengths: [(name of a record or an episode, its tokens with pictures and answer), ..] or upper
    bounds of them; source: the file or folder they are from.
    """
    context = policy.model.config.text_config.max_position_embeddings
    name, longest = max(lengths, key=lambda item: item[1])
    if longest > context:
        raise UserError(f"{source}: {name} is {longest:,} tokens long with its pictures, and the "
                        f"model's context is {context:,}; lower --max-pixels or the number of "
                        "pictures, or remove it")


# ---------------------------------------------------------------- DeepSpeed


def default_dtype(args) -> str:
    return args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def prepare_training(policy, args) -> None:
    """Which weights are trained, and what the backward pass keeps, from the flags."""
    if not policy.base:
        policy.vision.requires_grad_(not args.freeze_vision)
    policy.checkpointing = args.gradient_checkpointing


def check_compile(zero_stage: int) -> None:
    """UserError if --compile cannot work."""
    if zero_stage == 3:
        raise UserError("--compile does not work with ZeRO stage 3, which gathers each module's "
                        "weights from outside the compiled code: give --zero-stage 2, or leave it "
                        "out")
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler) and not shutil.which("clang++"):
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler}: install g++ "
                        "or clang++, or leave it out")


class Muon(torch.optim.AdamW):
    """Muon [1] for the groups with `muon`, AdamW for the others, as one optimizer for DeepSpeed.

    A matrix moves along its momentum with all singular values brought near 1, so that also the rare
    directions of a small batch are learned; the step is as long as AdamW's (RMS 0.2 of lr [2]), so
    that one learning rate serves both. torch.optim.Muon computes in bf16, which some CPUs emulate:
    twenty times as slow there.

    [1] https://kellerjordan.github.io/posts/muon  [2] https://arxiv.org/abs/2502.16982, section 2.2
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if not group["muon"] or p.grad is None:
                    continue
                if not self.state[p]:                  # `step`: AdamW looks for it in every state
                    self.state[p] = {"momentum": torch.zeros_like(p), "step": torch.zeros(())}
                mean = self.state[p]["momentum"]
                mean.lerp_(p.grad, 0.05)
                update = orthogonalize(p.grad.lerp(mean, 0.95))                        # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
                p.grad = None                                          # not for AdamW's step below
        return super().step(closure)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (m, n) with the same singular vectors and singular values of about 0.7 to 1.2, by
    five of the Newton-Schulz iterations of [1] above."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizer(policy, args, zero_stage: int) -> torch.optim.Optimizer:
    """The optimizer of --optimizer. Weight decay is for matrices only; embeddings, which a batch
    uses a few rows of, are AdamW's. UserError if the matrices would be cut up among processes."""
    muon = args.optimizer == "muon"
    if muon and (zero_stage or default_dtype(args) == "bfloat16"):
        raise UserError("--optimizer muon needs whole matrices in fp32: give --zero-stage 0 "
                        "--dtype float32, or leave it out")
    groups = [{"params": [], "weight_decay": args.weight_decay, "muon": True},
              {"params": [], "weight_decay": args.weight_decay, "muon": False},
              {"params": [], "weight_decay": 0.0, "muon": False}]
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        hidden = muon and p.dim() == 2 and "embed" not in name and "lm_head" not in name
        groups[0 if hidden else 1 if p.dim() > 1 else 2]["params"].append(p)
    groups = [group for group in groups if group["params"]]       # an adapter has matrices only
    optimizer = Muon if muon else torch.optim.AdamW
    return optimizer(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)


def make_engine(policy, args):
    """Wrap the policy in DeepSpeed; accumulate() decides after which micro-batch it steps."""
    import deepspeed
    try:
        config = read_json(args.deepspeed_config)
        zero = config.setdefault("zero_optimization", {})
        zero.setdefault("stage", 0)
        config.setdefault("gradient_clipping", 1.0)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--deepspeed-config {args.deepspeed_config}: {error}; give a file "
                        "such as ds_config.json") from error
    if args.zero_stage is not None:
        zero["stage"] = args.zero_stage
    if args.compile:
        check_compile(zero["stage"])
        policy.compile_layers()
    if default_dtype(args) == "bfloat16":
        # Without ZeRO, DeepSpeed's bf16 optimizer starts with a step on zeros, after which Adam's
        # bias correction is off by one. Stages 1 and 2 do not, and 2 needs less memory: gradients
        # are summed over micro-batches in fp32, since bf16 would lose 0.9% of 64 of them.
        zero["stage"] = zero["stage"] or 2
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1,
                  bf16={"enabled": default_dtype(args) == "bfloat16"})
    optimizer = make_optimizer(policy, args, zero["stage"])
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    return engine


def backward_step(engine, loss: torch.Tensor) -> None:
    """Backward pass of one micro-batch; after the last one (accumulate) also the optimizer step.

    loss: this rank's share of a sum over all ranks. DeepSpeed averages gradients over the ranks.
    """
    engine.backward(loss * dist.get_world_size())
    if engine.is_gradient_accumulation_boundary() and engine.zero_optimization_stage() == 0:
        # Without ZeRO, DeepSpeed clips the gradients but does not keep their norm.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()


def update_metrics(engine) -> dict:
    """Gradient norm of the last update, before clipping, and the number of updates that DeepSpeed
    has skipped so far because their gradients were not finite."""
    norm = engine.get_global_grad_norm()                   # None: the config file switches it off
    return ({} if norm is None else {"grad_norm": float(norm)}) | {
        "skipped_steps": engine.skipped_steps}


def set_learning_rate(engine, step: int, steps: int, args) -> float:
    """Set and return the learning rate of a step."""
    lr = learning_rate(step, steps, args.lr, args.warmup, args.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


@contextlib.contextmanager
def gathered(engine):
    """Inside this context every rank holds all weights, for sampling. Below ZeRO-3 it always does.

    DeepSpeed's hooks are removed meanwhile: with them every forward pass is a collective operation,
    and ranks with plans of different lengths would block each other (deepspeed#860).
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        hooks = engine.optimizer.parameter_offload
        for hook in hooks.forward_hooks + hooks.backward_hooks:
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        yield
        hooks._register_deepspeed_module(hooks.module)


def consolidated(engine) -> dict | None:
    """The whole state dict on rank 0 (None on the others), at any ZeRO stage; of a policy with an
    adapter at least that."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=engine.module.base is not None)
    return engine.module.state_dict() if dist.get_rank() == 0 else None


# ---------------------------------------------------------------- disk


# Flags that may change when a run is resumed, because they do not affect the weights. A trainer
# adds its own. zero_stage and dtype are checked by load_state (parallel_layout).
RESUMABLE_FLAGS = {
    "stop_after", "save_every", "val_every", "val_data", "val_decisions", "out", "device",
    "threads", "local_rank", "deepspeed_config", "micro_tokens", "gradient_checkpointing",
    "compile", "zero_stage", "dtype"}


def input_hashes(args) -> dict[str, str]:
    """{path: a hash} of the weights and the data that a run begins with."""
    weights = getattr(args, "init", None) or getattr(args, "model", None) or ""
    found = {weights: fingerprint(weights)} if os.path.isdir(weights) else {}
    for path in getattr(args, "data", None) or ():
        tables = [path, *(os.path.join(path, name) for name in ("walks.jsonl", "episodes.jsonl"))]
        found[path] = hash_samples(filter(os.path.isfile, tables))
    return found


def open_run(args, resumable: Sequence[str] = ()) -> None:
    """Lock --out for this run and write args.json. UserError on every rank if another process
    writes there, if it is not writable, or if it holds a run with other flags, weights or data.

    resumable: the trainer's own flags that may change on resume.
    """
    path = os.path.join(args.out, "args.json")
    free = RESUMABLE_FLAGS | set(resumable)

    def lock_and_check():
        lock_folder(args.out)
        if last_state(args.out) and os.path.exists(path):
            before = read_json(path)
            changed = [name for name, hashed in before.get("inputs", {}).items()
                       if inputs.get(name, hashed) != hashed]
            if changed:
                raise UserError(f"{changed[0]} has changed since the run in --out {args.out} began "
                                "with it; choose another folder, or remove this one")
            other = [k for k, v in vars(args).items() if k not in free and before.get(k, v) != v]
            if other:
                raise UserError(f"--out {args.out} holds a run with --{other[0].replace('_', '-')} "
                                f"{before[other[0]]}, not {getattr(args, other[0])}; resume it "
                                "with its own flags, or choose another folder, or remove this one")
        write_json(path, dict(sorted(vars(args).items()), inputs=inputs))
    inputs = input_hashes(args)
    on_first_rank(lock_and_check)
    check_shared(path)


def check_shared(path: str) -> None:
    """UserError on every rank unless all of them see a file or folder that rank 0 has."""
    if all_reduce_max(not os.path.exists(path), "cuda" if dist.get_backend() == "nccl" else "cpu"):
        raise UserError(f"{path} is not there on every machine: a run of several needs an --out "
                        "that they share (a network disk)")


def parallel_layout(engine) -> dict:
    """The settings that DeepSpeed's files depend on without recording them."""
    return {"processes": dist.get_world_size(), "--zero-stage": engine.zero_optimization_stage(),
            "--dtype": "bfloat16" if engine.bfloat16_enabled() else "float32"}


def last_state(out: str) -> str | None:
    """The folder of the last complete state; None if there is none."""
    try:
        with open(os.path.join(out, "state", "latest")) as f:
            return os.path.join(out, "state", f.read())
    except FileNotFoundError:
        return None


def diverged(out: str, step: int, reason: str, lr: float) -> UserError:
    """The error of a run whose numbers are not finite."""
    good = last_state(out)
    good = (f"The last good state is {good}; start again with a lower --lr and another --out, or "
            f"remove {out} (a run is resumed with its own flags only)" if good else
            f"No state was saved in {out}; run the same command with a lower --lr")
    return UserError(f"step {step}: {reason} (learning rate {lr:g}). {good}")


def broken_weights(engine) -> int:
    """The number of trained tensors that are not finite, the same on every rank."""
    bad = sum(not is_sound(getattr(p, "ds_tensor", p))              # ZeRO-3: this rank's part of it
              for p in engine.module.parameters() if p.requires_grad)
    return int(all_reduce_sum([bad], engine.device)[0])


def save_state(engine, out: str, step: int) -> None:
    """Write state/step_N, then remove the older one. If killed half-way, the older one still
    counts. UserError, and nothing is written, if the weights are not finite."""
    broken = broken_weights(engine)
    if broken:
        raise diverged(out, step, f"{broken} of the weights' tensors are not finite",
                       engine.optimizer.param_groups[0]["lr"])
    folder, tag = os.path.join(out, "state"), f"step_{step:06d}"
    engine.save_checkpoint(folder, tag=tag, client_state={"step": step}, save_latest=False,
                           exclude_frozen_parameters=engine.module.base is not None)
    # save_checkpoint ends with a barrier, so every rank's part is on the disk now. DeepSpeed itself
    # would write `latest` after rank 0's part only, and leave it empty if killed while writing.
    if dist.get_rank() == 0:
        write_json(os.path.join(folder, tag, "made_by.json"), parallel_layout(engine))
        write_text(os.path.join(folder, "latest"), tag)
        for old in os.listdir(folder):
            if old.startswith("step_") and old != tag:
                shutil.rmtree(os.path.join(folder, old))
    dist.barrier()


def load_state(engine, out: str) -> int:
    """Load the last complete state and return its step; 0 if there is none."""
    found = [last_state(out)]
    dist.broadcast_object_list(found, src=0)           # ranks that disagree would wait for ever
    state, = found
    if state is None:
        return 0
    check_shared(state)
    folder, tag = os.path.split(state)
    then, now = read_json(os.path.join(state, "made_by.json")), parallel_layout(engine)
    if then != now:
        raise UserError(f"{folder} was written with {then} and would be resumed with {now}; make "
                        "them agree, give another --out, or remove that folder to start again")
    _, client = engine.load_checkpoint(folder, tag=tag,
                                       load_module_strict=engine.module.base is None)
    if broken_weights(engine):
        raise UserError(f"{state} holds weights that are not finite; remove {folder} to start "
                        "again, with a lower --lr and another --out")
    return client["step"]


def is_due(step: int, every: int, end: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens at this one."""
    return step % every == 0 or step == end


def print_start(engine, batches: str, first_step: int, notes: Sequence[str] = ()) -> None:
    """Print the size of a run. batches: its data and batch size; notes: warnings about the data."""
    if dist.get_rank() == 0:
        for note in notes:
            print(note)
        resuming = f"; resuming at step {first_step}" if first_step else ""
        print(f"{batches}, {count_weights(engine):,} weights on {dist.get_world_size()} x "
              f"{engine.device}{resuming}")


def finish_run(engine, log: Log, out: str, message: str, panels: Sequence[tuple] = ()) -> None:
    """Close the log, save the policy, draw curves.png of these panels, and wait for rank 0."""
    log.close()
    weights = consolidated(engine)
    if dist.get_rank() == 0:
        save_policy(engine.module, out, weights)
        if panels:
            draw_curves(out, panels)
        print(f"wrote {out} ({message})")
    dist.barrier()                                       # rank 0 is still writing


# ---------------------------------------------------------------- log


# Keys of the log that measure time and hardware, and differ from run to run.
TIMING_KEYS = {"seconds", "wait_s", "tokens_per_second", "tflops", "peak_share", "memory_gb",
               "eta_minutes"}

# TFLOP/s of a card in bf16, dense, by its datasheet. In practice less is reached: an H200 was
# measured at 790 on a large matrix product.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165}

# DeepSpeed skips a bf16 update with gradients that are not finite. A single one is harmless; so
# many in a row mean that the weights are lost.
MAX_SKIPPED_STEPS = 20


def cut_jsonl(path: str, last_step: int) -> list[dict]:
    """On resume, remove the rows after the state's step, and a half-written one -> the rest."""
    if not os.path.exists(path):
        return []
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    write_lines(path, kept)
    return kept


class Log:
    """One JSON line per step (log.jsonl), the same for TensorBoard, and a progress bar, on rank 0.
    It ends the run, on every rank, at a number that is not finite."""

    def __init__(self, engine, out: str, step: int, steps: int, progress_keys: Sequence[str]):
        self.out, self.progress_keys = out, progress_keys
        self.first_step, self.steps, self.is_writer = step, steps, dist.get_rank() == 0
        self.max_skipped = MAX_SKIPPED_STEPS if engine.bfloat16_enabled() else 0
        self.skipped, self.skipped_in_a_row = engine.skipped_steps, 0
        if not self.is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter
        path = os.path.join(out, "log.jsonl")
        if step:
            cut_jsonl(path, step)
        self.file = open(path, "a" if step else "w", buffering=1)
        self.board = SummaryWriter(os.path.join(out, "tb"), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, desc=os.path.basename(out), dynamic_ncols=True,
                        mininterval=1 if sys.stderr.isatty() else 30)
        self.postfix = {}
        self.last = self.started = time.monotonic()

    def __call__(self, step: int, counters: Counters | None = None, **values: float) -> None:
        """values: metrics, the same on every rank. UserError if one is not finite."""
        if self.is_writer:
            self.write(step, counters, dict(values))
        self.check(step, values, nan_logits=counters is not None and counters.nan_ranks > 0)

    def write(self, step: int, counters: Counters | None, values: dict) -> None:
        now = time.monotonic()
        values["seconds"], self.last = now - self.last, now
        if counters:
            seconds = values["seconds"]
            card = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
            values |= {"tokens_per_second": counters.tokens / seconds, "memory_gb": memory_gb(),
                       "tflops": counters.flops / seconds / dist.get_world_size() / 1e12,
                       "eta_minutes": (now - self.started) / (step - self.first_step)
                       * (self.steps - step) / 60}
            peaks = [peak for name, peak in PEAK_TFLOPS.items() if name in card]
            if peaks:
                values["peak_share"] = values["tflops"] / peaks[0]
        row = {"step": step, **{key: value if math.isfinite(value) else None
                                for key, value in values.items()}}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        self.postfix.update({k: f"{values[k]:.3g}" for k in self.progress_keys if k in values})
        self.bar.set_postfix(self.postfix, refresh=False)
        self.bar.update(step - self.bar.n)

    def check(self, step: int, values: dict, nan_logits: bool = False) -> None:
        """End the run at a value that is not finite. With bf16 a few skipped updates are allowed:
        DeepSpeed leaves the weights as they were."""
        before, self.skipped = self.skipped, values.get("skipped_steps", self.skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped > before else 0
        bad = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
        if nan_logits:
            bad.insert(0, "a log-probability of a sampled token is not finite")
        elif not bad or 0 < self.skipped_in_a_row < self.max_skipped:
            return
        reason = ", ".join(bad[:3])
        if self.skipped_in_a_row > 1:
            reason += f"; DeepSpeed has skipped the last {self.skipped_in_a_row} updates"
        raise diverged(self.out, step, reason, values.get("lr", 0.0))

    def close(self) -> None:
        if self.is_writer:
            self.bar.close()
            self.board.close()
            self.file.close()


def log_column(rows: Sequence[dict], key: str, x: str = "step") -> np.ndarray:
    """Rows of log.jsonl -> (n, 2): x and the value of `key`, of the rows that have one."""
    return np.array([(row.get(x, 0), row[key]) for row in rows if row.get(key) is not None],
                    dtype=float).reshape(-1, 2)


def moving_mean(points: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 2) -> x, and the mean of y over the last `width` points."""
    sums = np.cumsum(np.concatenate([[0.0], points[:, 1]]))
    return points[width - 1:, 0], (sums[width:] - sums[:-width]) / width


def save_figure(figure, path: str) -> None:
    """Write a picture in one move."""
    figure.savefig(path + ".tmp", format="png", dpi=110)
    os.replace(path + ".tmp", path)


def draw_curves(out: str, panels: Sequence[tuple]) -> None:
    """log.jsonl -> curves.png with one panel for each tuple of keys; val/ keys are greedy."""
    from matplotlib.figure import Figure
    rows = read_rows(os.path.join(out, "log.jsonl"))
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, keys in zip(figure.subplots(1, len(panels)), panels):
        for key in keys:
            points = log_column(rows, key)
            if key.startswith("val/"):
                axis.plot(*points.T, "o-", color="tab:orange", label=f"{key} (greedy)")
                continue
            axis.plot(*points.T, color="tab:blue", alpha=0.25)
            axis.plot(*moving_mean(points, max(1, len(points) // 20)), color="tab:blue", label=key)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    save_figure(figure, os.path.join(out, "curves.png"))
