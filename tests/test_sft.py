"""sft.py: every decision once, only answers count, ranks agree, a kill changes nothing.

Run it   python -m pytest tests/test_sft.py
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import engine
import sft
from cli import UserError
from make_data import VlnEgo
from model import load_policy

torch.set_num_threads(1)
TINY = ["--model", "tiny", "--batch-size", "16", "--steps-per-walk", "4", "--memory-budget", "3",
        "--lr", "1e-3", "--device", "cpu", "--dtype", "float32"]


def run_sft(ego, out, *flags, launcher=(), check=True, **kwargs):
    command = [sys.executable, *launcher, os.path.join(ROOT, "sft.py"), "--data", ego, "--out",
               str(out), *TINY, *map(str, flags)]
    return subprocess.run(command, check=check, capture_output=True, text=True, cwd=ROOT, **kwargs)


def weights(folder):
    from safetensors.torch import load_file
    return load_file(os.path.join(folder, "model.safetensors"))


def told(folder):
    """The log without its clock."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in engine.CLOCK} for line in f]


# ---------------------------------------------------------------- order and loss


def test_an_epoch_holds_every_decision_once():
    data = SimpleNamespace(episodes=range(5), steps=lambda i: list(range(3 + 4 * i)))
    units = sft.batch_units(data, 0, 0, 4)
    seen = sorted((e, t) for e, steps in units for t in steps)
    assert seen == [(e, t) for e in range(5) for t in range(3 + 4 * e)]
    assert max(len(steps) for _, steps in units) == 4
    assert sft.batch_units(data, 0, 0, 4) == units != sft.batch_units(data, 0, 1, 4)


def test_order_needs_no_history():
    data = SimpleNamespace(episodes=range(9), steps=lambda i: list(range(8)))
    straight, jumping = (sft.Order(data, 3, 4, 2) for _ in range(2))
    batches = [straight(step) for step in range(20)]
    assert [jumping(step) for step in (17, 2, 9)] == [batches[17], batches[2], batches[9]]
    with pytest.raises(UserError, match="lower --batch-size"):
        sft.Order(data, 0, 8, 100)


def test_learning_rate_by_hand():
    rates = [engine.learning_rate(s, 100, 2.0, 0.1, "cosine") for s in range(100)]
    assert rates[4] == pytest.approx(2 * 0.045 / 0.1) and max(rates) < 2.0
    assert rates[54] == pytest.approx(1 + math.cos(math.pi * 0.445 / 0.9))
    assert rates[-1] < 0.001


def test_the_loss_is_the_answers_cross_entropy(ego):
    """Against a plain sum over transformers' logits, one decision at a time."""
    from test_model import hf_logps
    data = VlnEgo(ego)
    policy = load_policy("tiny", texts=[e["instruction"] for e in data.episodes],
                         nav=dict(sft.NAV, turn_deg=30))
    decisions, frames = sft.load_batch(data, policy.nav, [(0, (0, 3)), (1, (2,))])
    ids, mask = sft.answers_of(policy, decisions)
    ours = -policy(decisions, frames, ids, mask).sum() / mask.sum()
    theirs = 0
    for d, row, m in zip(decisions, ids, mask):
        seen = [frames[k] for k in d.frames]
        prompt, = policy.read([d], dict(zip(d.frames, seen)))
        theirs -= hf_logps(policy, prompt, seen, row[m]).sum()
    assert ours.item() == pytest.approx(theirs.item() / mask.sum().item(), rel=1e-5)
    walk = data.walks[data.episodes[0]["walk_id"]]
    assert list(decisions[1].plan) == (walk["actions"][3:9] + [0] * 6)[:6]
    assert decisions[1].frames[-1] == (data.episodes[0]["walk_id"], 3)


# ---------------------------------------------------------------- runs


def test_it_learns_and_a_stop_and_a_kill_change_nothing(ego, tmp_path):
    """24 steps straight; 24 steps with a stop at 9 and a kill -9 after 16: equal weights."""
    run_sft(ego, tmp_path / "a", "--max-steps", 24, "--save-every", 8)
    losses = [line["loss"] for line in told(tmp_path / "a")]
    assert np.mean(losses[-4:]) < 0.6 * losses[0]

    flags = ["--max-steps", 24, "--save-every", 8]
    run_sft(ego, tmp_path / "b", *flags, "--stop-after", 9)
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "sft.py"), "--data", ego, "--out", tmp_path / "b",
         *TINY, *map(str, flags)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    latest = tmp_path / "b" / "state" / "latest"
    deadline = time.monotonic() + 120
    while latest.read_text() != "step_000016":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_sft(ego, tmp_path / "b", *flags)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert told(tmp_path / "a") == told(tmp_path / "b")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_ranks_equal_one(ego, tmp_path, zero):
    """deepspeed --num_gpus 2, each ZeRO stage, against one plain process: fp32, 1e-5."""
    one = tmp_path / "one"
    run_sft(ego, one, "--max-steps", 3, "--zero-stage", 0, "--lr", 1e-4)
    two = tmp_path / "two"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
                "--master_port", str(29600 + zero)]
    run_sft(ego, two, "--max-steps", 3, "--zero-stage", zero, "--lr", 1e-4, launcher=launcher)
    for a, b in zip(told(one), told(two)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=2e-5, rtol=1e-5, msg=k)


def test_micro_batches_are_the_same_update(ego, tmp_path):
    for name, flags in (("whole", []), ("pieces", ["--micro-tokens", 300])):
        run_sft(ego, tmp_path / name, "--max-steps", 2, "--lr", 1e-4, *flags)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-5)


def test_an_update_takes_as_many_forwards_as_its_tokens_need(monkeypatch):
    told = []                                       # what this rank says; another rank needs four
    monkeypatch.setattr(engine.dist, "all_reduce", lambda most, op: (
        told.append(int(most)), most.fill_(max(4, int(most)))))
    items = [("a", 5), ("b", 9), ("c", 4), ("d", 3)]
    parts = engine.forwards(items, lambda item: item[1], 12, "cpu")
    assert told == [2] and len(parts) == 4 and sorted(sum(parts, [])) == items
    monkeypatch.setattr(engine.dist, "all_reduce", lambda most, op: None)
    parts = engine.forwards(items, lambda item: item[1], 12, "cpu")
    assert len(parts) == 2 and max(sum(n for _, n in part) for part in parts) <= 12
    assert engine.forwards(items, lambda item: item[1], 0, "cpu") == [items]


def test_bfloat16_learns_what_float32_learns(ego, tmp_path):
    """What a GPU runs by default, on a CPU: bf16 weights, an fp32 master copy, ZeRO-1."""
    for dtype in ("float32", "bfloat16"):
        run_sft(ego, tmp_path / dtype, "--max-steps", 8, "--dtype", dtype, "--warmup", 0)
    whole, half = ([line["loss"] for line in told(tmp_path / d)] for d in ("float32", "bfloat16"))
    assert half == pytest.approx(whole, rel=0.02) and whole[-1] < 0.95 * whole[0]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags,words", [
    (["--batch-size", "10"], "--batch-size 10 does not split"),
    (["--batch-size", "0"], "--batch-size: '0' is not a whole number above 0"),
    (["--deepspeed-config", "/nowhere.json"], "--deepspeed-config /nowhere.json"),
    pytest.param(["--device", "cuda"], "torch finds no GPU", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    (["--horizon", "20"], "--horizon 20: give 1 to 8"),
    (["--data", "/nowhere/train"], "make_data.py"),
    (["--model", "Qwen2-VL-2B"], "hf download Qwen/Qwen2-VL-2B-Instruct"),
    (["--out", "/proc/nothing"], "--out /proc/nothing: cannot write"),
])
def test_mistakes_are_sentences(ego, tmp_path, flags, words):
    done = run_sft(ego, tmp_path / "x", *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
