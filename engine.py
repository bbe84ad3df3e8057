"""
What sft.py, grpo.py and grpo_online.py do around their idea, and do alike: start the processes,
wrap the policy in DeepSpeed, say what happened, and survive a kill -9.

One path for every machine. `python x.py`, `torchrun x.py` and `deepspeed x.py` all end in a
DeepSpeed engine (ZeRO 0-3, set by ds_config.json or --zero-stage) over gloo on CPUs or NCCL on
GPUs; a single process is a world of one.

A run directory (--out):
    args.json                 the flags, as they were;  .lock  held by the run that writes here
    log.jsonl                 one line a step; tb/ holds the same for TensorBoard
    state/step_000200/        weights, optimizer, step: everything that resuming needs
    config.json, model.safetensors, tokenizer.json, nav.json, ...     the policy (model.save_policy)
A state is complete when state/latest names it: that file is replaced in one move, after every rank
has written its part. On resume the log is cut back to the state's step, so the run goes on as if
nothing had happened: the data order and the sampling noise are functions of (seed, step), not of a
generator that would have to be kept. On a CPU, with the same library versions and number of
processes and threads, the weights are equal to the bit; a GPU does not sum in a fixed order.
"""
from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import UserError, count, lock_folder, write_json, write_text
from model import fit_pixels, is_dialog, is_sound

# ---------------------------------------------------------------- pure


def learning_rate(step, total, peak, warmup, schedule):
    """Linear warm-up over the share `warmup` of all steps, then cosine to 0 (or constant).

    step counts from 0; a step's rate is that of its middle, so neither end wastes a step at 0.
    >>> [round(learning_rate(s, 10, 1.0, 0.2, "cosine"), 3) for s in (0, 1, 2, 9)]
    [0.25, 0.75, 0.99, 0.01]
    """
    at = (step + 0.5) / total
    if at < warmup:
        return peak * at / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))


# TFLOP/s of a card in bf16, dense, as its datasheet says; what is reached in practice is less (an
# H200 was measured at 790 on a large matrix product).
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165}


def peak_tflops(card):
    """By the name that CUDA gives a card; None if it is not in the table.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("cpu")
    (989, None)
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)


# ---------------------------------------------------------------- flags that the trainers share


def add_optimizer_args(parser, lr, schedule, weight_decay):
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    add("--schedule", choices=("cosine", "constant"), default=schedule)
    add("--warmup", type=float, default=0.1, help="share of all steps with a rising rate")
    add("--weight-decay", type=float, default=weight_decay)
    add("--beta2", type=float, default=0.999, help="AdamW's memory of squared gradients")
    add("--max-grad-norm", type=float, default=1.0)


def add_machine_args(parser):
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"))
    add("--dtype", default=None, choices=("float32", "bfloat16"),
        help="default: bfloat16 with fp32 master weights on GPUs, float32 on CPUs")
    add("--deepspeed-config", default=os.path.join(os.path.dirname(__file__), "ds_config.json"))
    add("--zero-stage", type=int, choices=range(4), help="overrides the config file's stage")
    add("--micro-tokens", type=int, default=0, help="tokens per forward of a process, about; an "
        "update takes as many forwards as its batch needs. 0: one")
    add("--gradient-checkpointing", action="store_true", help="recompute layers: less memory, 1.3x")
    add("--threads", type=count, default=1, help="CPU threads per process")
    add("--seed", type=int, default=0)
    add("--local_rank", type=int, default=0, help="set by the deepspeed launcher")


# ---------------------------------------------------------------- processes


def start(args):
    """Join (or make) the process group -> rank, world, device. Call once, before any model."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU: install the torch build that suits "
                        "the driver, or give --device cpu")
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                       ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    import deepspeed

    # Without these lines DeepSpeed compiles an extension on the first start (half a minute and a
    # compiler); plain gloo and torch's AdamW need none.
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
    return dist.get_rank(), dist.get_world_size(), device


def on_first_rank(action):
    """Run action() on rank 0. A UserError there ends every rank with the same words: one that went
    on alone would wait for the others for ever."""
    said = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            said = [str(error)]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise UserError(said[0])


def leave_together():
    """The last act of a run: nobody goes while another rank still writes."""
    dist.barrier()


def total(values, device):
    """Sum each of a list of numbers over all ranks (float64, so that counts stay exact)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def ahead(load, steps):
    """For each step of a range -> (step, load(step), seconds that it was waited for).

    load runs in a thread, while the step before is trained on.
    """
    with ThreadPoolExecutor(1) as loader:
        coming = loader.submit(load, steps.start) if steps else None
        for step in steps:
            start = time.monotonic()
            batch = coming.result()
            wait = time.monotonic() - start
            if step + 1 in steps:
                coming = loader.submit(load, step + 1)
            yield step, batch, wait


def work(device, *models):
    """What our policies have computed since this was last asked, over all ranks -> (FLOPs, tokens
    learned from, ranks that drew from a distribution that was not finite). A model may be wrapped,
    or None."""
    policies = [getattr(m, "module", m) for m in models if m is not None]
    done = total([sum(p.flops for p in policies), sum(p.tokens for p in policies),
                  any(p.nan_logits for p in policies)], device)
    for policy in policies:
        policy.flops, policy.tokens, policy.nan_logits = 0, 0, False
    return done


def memory_gb():
    """The most that this process has held: on its GPU, or on a CPU all of it (1e9 bytes)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def tell_memory(engine, reference, activations, rank):
    """Print what a process will hold at least, in GB (1e9 bytes), and whether there is room for it.

    activations: bytes (model.activation_bytes). Weights, gradients and AdamW's two moments, in bf16
    an fp32 master copy besides, are divided among processes as the ZeRO stage says.
    """
    if rank:
        return
    stage, world = engine.zero_optimization_stage(), dist.get_world_size()
    half = engine.bfloat16_enabled()
    def size(p):
        return getattr(p, "ds_numel", p.numel())              # ZeRO-3 has sharded it
    weights = list(engine.module.parameters())
    trained = sum(size(p) for p in weights if p.requires_grad)
    divided = [world if stage >= least else 1 for least in (3, 2, 1)]
    parts = {"weights": sum(map(size, weights)) * (2 if half else 4) / divided[0],
             "gradients": trained * (2 if half else 4) / divided[1],
             "optimizer": trained * (12 if half else 8) / divided[2]}
    if reference is not None:
        parts["reference"] = parts["weights"]
    parts = {name: b / 1e9 for name, b in (parts | {"activations": activations}).items()}
    cuda = torch.cuda.is_initialized()
    room = (torch.cuda.get_device_properties(0).total_memory if cuda else
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world) / 1e9
    need = sum(parts.values())
    print("memory: about " + " + ".join(f"{name} {gb:.2f}" for name, gb in parts.items())
          + f" = {need:.2f} GB of {room:.0f} GB a process has")
    if need > room:
        print("WARNING: that does not fit. Lower --micro-tokens; then --gradient-checkpointing; "
              "then --zero-stage 2 or 3 over more GPUs, or --freeze-vision", file=sys.stderr)


def share_out(sizes, budget, least=1):
    """Items of these sizes (tokens) -> index lists of about equal sums: as few as keep every sum
    within the budget, but `least`. An item above the budget stands alone; a list may be empty.

    The largest item first, each to the list that has least so far.
    >>> share_out([5, 9, 4, 3], 10), share_out([5, 9, 4, 3], 21), share_out([30, 1], 10)
    ([[1], [0], [2, 3]], [[0, 1, 2, 3]], [[0], [1]])
    >>> share_out([30, 4, 4, 4], 10), share_out([5, 9], 10, least=3)
    ([[0], [1, 3], [2]], [[1], [0], []])
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


def forwards(items, size_of, budget, device):
    """The items of each forward of an update, [[item, ..], ..]; budget 0: of the only one.

    As many on every rank: under ZeRO a forward is a collective, and the others would wait. A rank
    with fewer items than another has forwards gets empty lists.
    """
    if budget == 0:
        return [list(items)]
    sizes = [size_of(item) for item in items]
    most = torch.tensor(len(share_out(sizes, budget)), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [[items[i] for i in part] for part in share_out(sizes, budget, least=int(most))]


def together(batches):
    """[(decisions, frames), ..] -> (all decisions, all frames, every one once)."""
    return ([d for decisions, _ in batches for d in decisions],
            {key: frame for _, frames in batches for key, frame in frames.items()})


def accumulate(engine, parts):
    """Yield the parts of an update in turn; DeepSpeed steps after the last. Their losses must be
    shares of one sum: nothing divides them by the number of parts."""
    for i, part in enumerate(parts):
        engine.set_gradient_accumulation_boundary(i == len(parts) - 1)
        yield part


def default_dtype(args):
    return args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def check_lengths(policy, lengths, source):
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


def walk_lengths(policy, data, vary_turns=False):
    """What is longest in a VLN-Ego folder -> [(name of the episode, tokens with the answer), ..].

    One decision: the longest instruction with as many frames as the memory keeps. A dialog: that
    of the longest instruction and that of the longest walk, as they are merged in the first epoch.
    """
    nav, n = policy.nav, range(len(data.episodes))
    h, w = fit_pixels(nav["height"] or 480, nav["width"] or 640, nav["min_pixels"],
                      nav["max_pixels"])
    wordy = max(n, key=lambda i: len(data.episodes[i]["instruction"]))
    if is_dialog(nav):
        chosen = [wordy, max(n, key=lambda i: len(data.steps(i)))]
        asked = policy.spell([data.dialog(i, nav, 0, vary_turns) for i in chosen])
    else:
        chosen = [wordy]
        asked = [data.decision(wordy, data.steps(wordy)[0], nav)._replace(
            frames=tuple(range(nav["memory"]["budget"] + 1)))]
    frame = torch.empty(h // 28, w // 28, 0)
    sizes = policy.sizes(asked, {key: frame for some in asked for key in some.frames})
    return [(f"episode {data.episodes[i].get('episode_id', i)}", size)
            for i, size in zip(chosen, sizes)]


def make_engine(policy, args):
    """DeepSpeed around the trainable weights; accumulate() says when it steps."""
    import deepspeed
    try:
        with open(args.deepspeed_config) as f:
            config = json.load(f)
        zero = config.setdefault("zero_optimization", {})
        zero.setdefault("stage", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--deepspeed-config {args.deepspeed_config}: {error}; it wants a file "
                        "like ds_config.json") from error
    if args.zero_stage is not None:
        zero["stage"] = args.zero_stage
    if default_dtype(args) == "bfloat16":
        # DeepSpeed's bf16 without ZeRO takes an optimizer step on zeros at its start (Adam's bias
        # correction is off by one ever after); stage 1 does not.
        zero["stage"] = max(1, zero["stage"])
    config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1,
                  gradient_clipping=args.max_grad_norm,
                  bf16={"enabled": default_dtype(args) == "bfloat16"})
    weights = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    return engine


def backward_step(engine, loss):
    """The backward pass of a micro-batch's loss; after the last one (accumulate) the update."""
    engine.backward(loss)
    if engine.is_gradient_accumulation_boundary() and engine.zero_optimization_stage() == 0:
        # Without ZeRO, DeepSpeed clips the gradients and does not keep their norm.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()


def update_metrics(engine):
    """The last update's gradient norm, before clipping, and the updates left out so far: DeepSpeed
    skips one whose gradients are not finite."""
    norm = engine.get_global_grad_norm()                   # None: the config file switches it off
    return ({} if norm is None else {"grad_norm": float(norm)}) | {
        "skipped_steps": engine.skipped_steps}


def set_learning_rate(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@contextlib.contextmanager
def gathered(engine):
    """All weights whole on every rank, for sampling; below ZeRO-3 they are already.

    Hooks are taken off meanwhile: with them every forward is a collective, and ranks whose plans
    differ in length would wait for each other for ever (deepspeed#860).
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


def consolidated(engine):
    """The whole state dict on rank 0 (None on the others), whatever the ZeRO stage."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict() if dist.get_rank() == 0 else None


# ---------------------------------------------------------------- disk


# Flags that may change when a run is resumed: they touch no weight.
FREE = {"stop_after", "save_every", "val_every", "val_decisions", "samples_every", "threads",
        "local_rank", "out", "device", "val_data", "deepspeed_config", "micro_tokens",
        "sims", "sim_python", "sim_command", "sim_timeout", "sim_gpus", "retries",
        "rollouts_every", "val_episodes",
        "gradient_checkpointing", "zero_stage", "dtype"}          # the last two: see made_by


def open_run(args):
    """Take --out for this run and write args.json. UserError on every rank if another process
    writes there, if it cannot be written, or if it holds another run."""
    path = os.path.join(args.out, "args.json")

    def take():
        lock_folder(args.out)
        if os.path.exists(os.path.join(args.out, "state", "latest")) and os.path.exists(path):
            with open(path) as f:
                before = json.load(f)
            other = [k for k, v in vars(args).items() if k not in FREE and before.get(k, v) != v]
            if other:
                raise UserError(f"--out {args.out} holds a run with --{other[0].replace('_', '-')} "
                                f"{before[other[0]]}, not {getattr(args, other[0])}; resume it "
                                "with its own flags, or choose another folder, or remove this one")
        write_text(path, json.dumps(vars(args), indent=2, sort_keys=True))
    on_first_rank(take)


def made_by(engine):
    """What DeepSpeed's files depend on and do not say."""
    return {"processes": dist.get_world_size(), "--zero-stage": engine.zero_optimization_stage(),
            "--dtype": "bfloat16" if engine.bfloat16_enabled() else "float32"}


def last_state(out):
    """The folder of the last complete state; None if there is none."""
    try:
        with open(os.path.join(out, "state", "latest")) as f:
            return os.path.join(out, "state", f.read())
    except FileNotFoundError:
        return None


def diverged(out, step, what, lr):
    """The UserError of a run whose numbers are not finite."""
    good = last_state(out)
    good = (f"The last good state is {good}; start again with a lower --lr and another --out, or "
            f"remove {out} (a run goes on with its own flags only)" if good else
            f"No state was saved in {out}; run the same command with a lower --lr")
    return UserError(f"step {step}: {what} (learning rate {lr:g}). {good}")


def broken_weights(engine):
    """How many of the trained tensors are not finite, counted alike on every rank."""
    bad = sum(not is_sound(getattr(p, "ds_tensor", p))              # ZeRO-3: this rank's part of it
              for p in engine.module.parameters() if p.requires_grad)
    return int(total([bad], engine.device)[0])


def save_state(engine, out, step):
    """Write state/step_N, then drop the older one. Killed half-way, the older one still counts.
    UserError, and nothing is written, if the weights are not finite."""
    broken = broken_weights(engine)
    if broken:
        raise diverged(out, step, f"{broken} of the weights' tensors are not finite",
                       engine.optimizer.param_groups[0]["lr"])
    folder, tag = os.path.join(out, "state"), f"step_{step:06d}"
    engine.save_checkpoint(folder, tag=tag, client_state={"step": step}, save_latest=False)
    # Here every rank's part is on the disk (save_checkpoint ends with a barrier). DeepSpeed itself
    # would name the state when rank 0's part is, and leave an empty name if killed while naming it.
    if dist.get_rank() == 0:
        write_json(os.path.join(folder, tag, "made_by.json"), made_by(engine))
        write_text(os.path.join(folder, "latest"), tag)
        for old in os.listdir(folder):
            if old.startswith("step_") and old != tag:
                shutil.rmtree(os.path.join(folder, old))
    dist.barrier()


def load_state(engine, out):
    """Resume from the last complete state -> its step; 0 if there is none."""
    state = last_state(out)
    if state is None:
        return 0
    folder, tag = os.path.split(state)
    with open(os.path.join(state, "made_by.json")) as f:
        then, now = json.load(f), made_by(engine)
    if then != now:
        raise UserError(f"{folder} was written with {then} and would be resumed with {now}; make "
                        "them agree, give another --out, or remove that folder to start again")
    _, client = engine.load_checkpoint(folder, tag=tag)
    if broken_weights(engine):
        raise UserError(f"{state} holds weights that are not finite; remove {folder} to start "
                        "again, with a lower --lr and another --out")
    return client["step"]


# Keys of the log that tell the time, and not what was learned: they differ from run to run.
CLOCK = {"seconds", "wait", "tokens_per_second", "tflops", "peak_share", "memory_gb", "eta_minutes"}


# DeepSpeed skips a bf16 update whose gradients are not finite. One comes and goes; so many in a row
# mean that the weights are lost.
MAX_SKIPPED_STEPS = 20


def finite(value):
    """A number as JSON knows it: None for one that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """One JSON line a step (log.jsonl), the same to TensorBoard, and a progress bar, on rank 0.
    Ends the run, on every rank, at a number that is not finite."""

    def __init__(self, engine, out, step, steps, show):
        self.path, self.show = os.path.join(out, "log.jsonl"), show
        self.out, self.first, self.steps, self.on = out, step, steps, dist.get_rank() == 0
        self.may_skip = MAX_SKIPPED_STEPS if engine.bfloat16_enabled() else 0
        self.skipped, self.skipped_in_a_row = engine.skipped_steps, 0
        if not self.on:
            return
        from torch.utils.tensorboard import SummaryWriter
        kept = []
        if step and os.path.exists(self.path):            # cut back to the state we resume from
            with open(self.path) as f:
                kept = [line for line in f
                        if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(self.path, "".join(kept))
        self.file = open(self.path, "a", buffering=1)
        self.board = SummaryWriter(os.path.join(out, "tb"), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, desc=os.path.basename(out), dynamic_ncols=True,
                        mininterval=1 if sys.stderr.isatty() else 30)
        self.shown = {}
        self.last = self.begun = time.monotonic()

    def __call__(self, step, work=None, **values):
        """values: what every rank knows alike; work: what work() says of this step. UserError if a
        value is not finite."""
        if self.on:
            self.write(step, work, dict(values))
        self.check(step, values, work is not None and work[2] > 0)

    def write(self, step, work, values):
        now = time.monotonic()
        values["seconds"], self.last = now - self.last, now
        if work:
            flops, tokens = (count / values["seconds"] for count in work[:2])
            card = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
            values |= {"tokens_per_second": tokens, "memory_gb": memory_gb(),
                       "tflops": flops / dist.get_world_size() / 1e12,
                       "eta_minutes": (now - self.begun) / (step - self.first)
                       * (self.steps - step) / 60}
            if peak_tflops(card):
                values["peak_share"] = values["tflops"] / peak_tflops(card)
        row = {"step": step, **{key: finite(value) for key, value in values.items()}}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        self.shown.update({k: f"{values[k]:.3g}" for k in self.show if k in values})
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def check(self, step, values, nan_logits=False):
        """End the run at a value that is not finite, unless bf16's skipping may still mend it."""
        before, self.skipped = self.skipped, values.get("skipped_steps", self.skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped > before else 0
        bad = [f"{key} is {value}" for key, value in values.items() if finite(value) is None]
        if nan_logits:
            bad.insert(0, "a log-probability of a sampled token is not finite")
        elif not bad or 0 < self.skipped_in_a_row < self.may_skip:
            return
        what = ", ".join(bad[:3])
        if self.skipped_in_a_row > 1:
            what += f"; DeepSpeed has skipped the last {self.skipped_in_a_row} updates"
        raise diverged(self.out, step, what, values.get("lr", 0.0))

    def close(self):
        if self.on:
            self.bar.close()
            self.board.close()
            self.file.close()
