"""engine.py for GPUs, on a CPU: what fits is chosen by arithmetic, bf16 sums in fp32, every
combination of precision and ZeRO stage trains, and machines that share no disk are told so.

Run it   python -m pytest tests/test_engine.py
"""
import math
import shutil
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from helpers import slow
from policies import Decision, launch, log_of, run_on_two_ranks, texts
from test_grpo import flags, make_world
from test_sft import TINY

import engine
import grpo
import sft
from checkpoint import load_policy, save_policy
from cli import UserError
from lsm import pick_frames
from model import CONTRACT

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# ---------------------------------------------------------------- what fits

GB = 1e9


@pytest.fixture(scope="module")
def big():
    """Qwen2-VL-2B by its shapes, without a byte of weights, and phrases of Qwen2's length."""
    tiny = load_policy("tiny", contract=dict(CONTRACT, turn_deg=15), texts=texts(),
                       atomic_patterns=[])
    with torch.device("meta"):
        return common.shaped(tiny, "2B")


def walk_unit(name, steps):
    """A loaded unit: steps of one walk, 640x480 frames at the size at which they are seen."""
    decisions = [Decision(texts()[0], tuple((name, k) for k in (
        *pick_frames(t, **CONTRACT["memory"]), t)), [1] * 6) for t in steps]
    return decisions, {key: np.broadcast_to(np.uint8(0), (196, 280, 3))
                       for d in decisions for key in d.frames}


def on_gpus(monkeypatch, policy, gpus, gigabytes=80):
    """An engine that says it is the first of so many GPUs."""
    monkeypatch.setattr(engine, "available_bytes", lambda device: gigabytes * GB)
    for name, value in (("get_world_size", gpus), ("get_rank", 0)):
        monkeypatch.setattr(engine.dist, name, lambda value=value: value)
    monkeypatch.setattr(engine, "all_reduce_max", lambda value, device: value)
    return SimpleNamespace(module=policy, device="cpu", bfloat16_enabled=lambda: True,
                           zero_optimization_stage=lambda: 2)


def auto(**more):
    return SimpleNamespace(device="cuda", micro_tokens=None, **more)


def held(gpus, weights, reference=False):
    """bf16 weights (twice with a reference) on each GPU; fp32 sums of gradients, master weights and
    two moments on the GPUs together."""
    return weights * ((4 if reference else 2) + (4 + 12) / gpus)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_sft_of_the_2b_starts_in_80_gb(big, monkeypatch, capsys, gpus):
    deep = on_gpus(monkeypatch, big, gpus)
    batch = [walk_unit(i, range(i, 48, 6)) for i in range(8 // gpus)]  # 64 decisions over all GPUs
    weights = sum(p.numel() for p in big.parameters())
    assert weights == 2_208_985_600
    budget = sft.plan_micro_tokens(deep, big, batch, auto())
    said = capsys.readouterr()
    assert f"micro-batches of up to {budget:,} tokens (--micro-tokens auto)" in said.out
    assert "80 GB a process has" in said.out and not said.err
    parts = sft.forward_batches(big, batch, budget)
    kept = max(big.activations(*part[:2]) for part in parts)
    assert 60 * GB < held(gpus, weights) + kept < 80 * GB              # it fits, and fills the card
    assert sorted(id(e) for part in parts for e in part.examples) == sorted(
        id(e) for examples, _ in batch for e in examples)
    sft.plan_micro_tokens(deep, big, batch, SimpleNamespace(device="cuda", micro_tokens=0))
    assert ("does not fit" in capsys.readouterr().err) == (gpus < 8)   # all of the batch at once


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_grpo_of_the_2b_starts_in_80_gb(big, monkeypatch, capsys, gpus):
    deep = on_gpus(monkeypatch, big, gpus)
    prompts = [grpo.PromptBatch(*walk_unit(i, [50]), [i]) for i in range(8 // gpus)]
    args = auto(group_size=8)
    args.micro_tokens = grpo.plan_micro_tokens(deep, big, prompts, args)
    assert not capsys.readouterr().err
    kept = max(big.activations(*part[:2], 8) for part in grpo.split_batch(prompts, big, args))
    weights = sum(p.numel() for p in big.parameters())
    assert held(gpus, weights, reference=True) + kept < 80 * GB


def test_auto_is_one_micro_batch_on_a_cpu_and_warns_where_nothing_fits(big, monkeypatch, capsys):
    deep, batch = on_gpus(monkeypatch, big, 1), [walk_unit(0, range(0, 50, 6))]
    args = sft.parse_args(["--device", "cpu"])
    assert args.micro_tokens is None
    assert sft.plan_micro_tokens(deep, big, batch, args) == 0
    assert "one micro-batch (--micro-tokens auto)" in capsys.readouterr().out
    on_gpus(monkeypatch, big, 1, gigabytes=24)
    budget = sft.plan_micro_tokens(deep, big, batch, auto())
    assert budget == max(big.token_counts(*batch[0])) and "fit" in capsys.readouterr().err
    # More than the first batch would fit: other batches may be as much larger.
    on_gpus(monkeypatch, big, 1, gigabytes=2000)
    assert 20 < sft.plan_micro_tokens(deep, big, batch, auto()) / sum(
        big.token_counts(*batch[0])) < 40
    with pytest.raises(SystemExit):
        sft.parse_args(["--micro-tokens", "most"])


def test_a_rank_without_examples_runs_one_that_does_not_count(big, monkeypatch):
    batch = [walk_unit(0, [0, 9, 20])]
    monkeypatch.setattr(engine, "all_reduce_max", lambda value, device: max(5, value))
    parts = sft.forward_batches(big, batch, 1)
    assert [part.in_loss for part in parts].count(True) == 3 and len(parts) == 5
    assert all(len(part.examples) == 1 for part in parts)
    assert all(set(part.frames) == set(part.examples[0].frames) for part in parts)


# ---------------------------------------------------------------- bf16


class Total(torch.nn.Module):
    """Weights whose gradients are all equal to a given number."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(50, 7, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16))

    def forward(self, gradient):
        return sum(p.float().sum() for p in (self.matrix, self.bias)) * gradient


def test_what_compile_cannot_do_is_a_sentence(monkeypatch):
    if shutil.which("g++"):
        engine.check_compile(2)
    with pytest.raises(UserError, match="ZeRO stage 3"):
        engine.check_compile(3)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="C.. compiler"):
        engine.check_compile(0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_micro_batches_are_summed_in_fp32(tmp_path, stage):
    """64 equal gradients, each of which bf16 holds exactly; their sum in bf16 is off by 1.8%."""
    args = sft.parse_args([*TINY, "--dtype", "bfloat16", "--zero-stage", str(stage)])
    engine.init_distributed(args)
    deep, half = engine.make_engine(Total(), args), torch.zeros((), dtype=torch.bfloat16)
    assert deep.zero_optimization_stage() == (stage or 2)
    for _ in engine.accumulate(deep, range(64)):
        engine.backward_step(deep, deep(1.2890625))
        half += 1.2890625
    exact = 64 * (1.2890625)
    assert abs(half.item() / exact - 1) > 0.015
    assert engine.update_metrics(deep)["grad_norm"] == pytest.approx(exact * math.sqrt(357))


def untied(world, folder):
    """world's policy with a vocabulary of its own for the output, as the 7B has."""
    policy = load_policy(str(world / "sft"))
    policy.model.config.tie_word_embeddings = policy.model.config.text_config.tie_word_embeddings \
        = False
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    folder.mkdir()
    save_policy(policy, str(folder))
    assert load_policy(str(folder)).model.lm_head.weight is not policy.lm.embed_tokens.weight
    return folder


@slow
def test_bf16_with_untied_weights_learns_what_fp32_learns(world, tmp_path):
    """SFT on two ranks at stages 2 and 3, a decision at a time: what a GPU runs, on a CPU."""
    def argv(name, *more):
        return [f"--model={folder}", f"--data={world / 'vln_ego' / 'train'}",
                f"--out={tmp_path / name}", "--device=cpu", "--batch-size=8", "--steps-per-walk=4",
                "--max-steps=2", "--warmup=0", "--lr=1e-3", "--val-decisions=1", *more]
    folder = untied(world, tmp_path / "untied")
    sft.main(sft.parse_args(argv("whole")))
    kinds = {"two": [], "three": ["--zero-stage=3"],
             "recomputed": ["--zero-stage=3", "--gradient-checkpointing"]}
    run_on_two_ranks(tmp_path, "sft", [argv(name, "--dtype=bfloat16", "--micro-tokens=1", *more)
                                       for name, more in kinds.items()])
    whole = log_of(tmp_path / "whole")
    for name in kinds:
        for a, b in zip(whole, log_of(tmp_path / name), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=0.02), (name, a["step"])
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.05), (name, a["step"])
            assert b["skipped_steps"] == 0
        trained = load_policy(str(tmp_path / name)).model
        assert (trained.lm_head.weight - trained.get_input_embeddings().weight).abs().max() > 1e-4


def test_bf16_grpo_samples_and_learns_in_one_pass(world, tmp_path):
    """At stages 1 and 2, on two ranks: the first step's gradient is that of fp32."""
    def argv(name, *more):
        return flags(world, tmp_path / name, "--max-steps=1", *more)
    grpo.main(grpo.parse_args(argv("whole")))
    run_on_two_ranks(tmp_path, "grpo", [argv(f"zero{stage}", "--dtype=bfloat16",
                                             f"--zero-stage={stage}") for stage in (1, 2)])
    first = log_of(tmp_path / "whole")[1]
    for stage in (1, 2):
        row = log_of(tmp_path / f"zero{stage}")[1]
        assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=0.05), stage
        assert row["reward"] == pytest.approx(first["reward"]) and row["kl"] < 1e-4


# ---------------------------------------------------------------- several machines

DRIVER = """
import os, sys
os.chdir(os.path.join({folder!r}, os.environ["RANK"]))
import cli, sft
cli.run_cli(sft.main, lambda: sft.parse_args({argv!r}))
"""


def test_machines_without_a_shared_folder_are_told_so(world, tmp_path):
    """Two ranks with a disk each."""
    argv = ["--model=tiny", f"--data={world / 'vln_ego' / 'train'}", "--out=run", "--device=cpu",
            "--batch-size=8", "--steps-per-walk=4", "--max-steps=1"]
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / "driver.py").write_text(DRIVER.format(argv=argv, folder=str(tmp_path)))
    done = launch(["torch.distributed.run", "--nnodes=1", "--nproc_per_node=2", "--standalone"],
                  tmp_path / "driver.py")
    assert done.returncode and "run/args.json is not there on every machine" in done.stderr
