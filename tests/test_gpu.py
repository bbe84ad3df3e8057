"""What runs on a GPU: every script that takes --device, by its defaults there and by its flags, and
the same numbers as on the CPU in fp32. bench/gpu.py compares with plain transformers.

One process sees the GPU and runs all commands, one after the other: its imports take longest.

Run it   python -m pytest tests/test_gpu.py
"""
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT, in_process
from policies import log_of
from remote_servers import house_argv, learned_checkpoint
from test_scenes import SMALL, make

from checkpoint import load_policy, save_policy
from cli import read_rows
from gpt4scene.chat import CHAT

CHILD = """
import os, sys, json
gpu = os.environ.pop("GPU_OF_TESTS")
sys.path.insert(0, "tests")
import conftest
os.environ.pop("CUDA_VISIBLE_DEVICES")
if gpu != "all":
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
import torch
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)                                # what libraries print is no answer
print(json.dumps(torch.cuda.is_available()), file=answers)
for line in sys.stdin:
    try:
        done = conftest.in_process(*json.loads(line), check=False)
        answer = done.returncode, done.stdout, done.stderr
    except Exception as error:
        answer = 1, "", repr(error)
    print(json.dumps(answer), file=answers)
"""
TRAIN = ["--max-steps=3", "--batch-size=8", "--val-decisions=4", "--save-every=2"]
FP32 = ["--dtype=float32", "--micro-tokens=0"]


@pytest.fixture(scope="module")
def on_gpu():
    """A function that runs a script in the process that sees the GPU -> what it prints."""
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        if not json.loads(child.stdout.readline()):
            child.stdin.close()
            pytest.skip("torch finds no GPU")

        def run(*command):
            child.stdin.write(json.dumps(list(map(str, command))) + "\n")
            child.stdin.flush()
            status, out, err = json.loads(child.stdout.readline())
            assert status == 0, err[-3000:]
            return out
        yield run
        child.stdin.close()


@pytest.fixture(scope="module")
def starts(on_gpu, ego):
    return {prompt: learned_checkpoint(ego, prompt) for prompt in ("window", "dialog")}


def losses(out, key="loss"):
    rows = [row for row in log_of(out) if key in row]
    assert rows and all(math.isfinite(row[key]) for row in rows)
    return [row[key] for row in rows]


def sft_argv(ego, ckpt, out):
    return ["sft.py", "--model", ckpt, "--data", ego, "--out", out, *TRAIN]


def grpo_argv(ego, ckpt, out):
    return ["grpo.py", "--init", ckpt, "--data", ego, "--out", out, *TRAIN, "--group-size=4"]


def online_argv(ego, ckpt, out):
    return ["-m", "activevln.grpo_online", "--init", ckpt, "--episodes",
            os.path.normpath(f"{ego}/../../houses"), "--out", out, "--sims=2", "--batch-size=2",
            "--group-size=3", "--max-steps=2", "--val-episodes=2", "--action-cap=12",
            "--turn-cap=6", "--rerolls=1", "--reward=soft_success+0.5*progress"]


@pytest.mark.parametrize("prompt", ["window", "dialog"])
def test_sft_learns_as_on_a_cpu(on_gpu, ego, starts, tmp_path, prompt):
    on_gpu(*sft_argv(ego, starts[prompt], tmp_path / "gpu"), *FP32)
    in_process(*sft_argv(ego, starts[prompt], tmp_path / "cpu"), *FP32, "--device=cpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_grpo_samples_and_learns_as_on_a_cpu(on_gpu, ego, starts, tmp_path):
    on_gpu(*grpo_argv(ego, starts["window"], tmp_path / "gpu"), *FP32)
    in_process(*grpo_argv(ego, starts["window"], tmp_path / "cpu"), *FP32, "--device=cpu")
    for key in ("reward", "entropy"):
        assert losses(tmp_path / "gpu", key) == pytest.approx(losses(tmp_path / "cpu", key),
                                                              abs=1e-3)


@pytest.mark.parametrize("argv", [sft_argv, grpo_argv, online_argv],
                         ids=["sft", "grpo", "grpo_online"])
@pytest.mark.parametrize("more", [
    [], ["--lora-rank=4", "--lora-vision"], ["--gradient-checkpointing"], ["--zero-stage=1"],
    ["--zero-stage=2"], ["--zero-stage=3"], ["--zero-stage=3", "--gradient-checkpointing"],
    ["--micro-tokens=600"], ["--dtype=float32", "--optimizer=muon"], ["--compile"]],
    ids=lambda more: " ".join(more) or "defaults")
def test_trainers_run_resume_and_walk(on_gpu, ego, starts, tmp_path, argv, more):
    """With bf16, and the fp32 master weights of DeepSpeed, unless a flag says another."""
    start = "dialog" if argv is online_argv else "window"
    command = [*argv(ego, starts[start], tmp_path / "run"), *more]
    on_gpu(*command, "--stop-after=1")
    on_gpu(*command)
    assert len(losses(tmp_path / "run", "lr")) == (2 if argv is online_argv else 3)
    on_gpu("evaluate.py", *house_argv(ego, str(tmp_path / "run"), tmp_path / "walked"))


@pytest.mark.parametrize("prompt", ["window", "dialog"])
def test_walks_are_those_on_a_cpu(on_gpu, ego, starts, tmp_path, prompt):
    for name, run in (("gpu", on_gpu), ("cpu", in_process)):
        run("evaluate.py", *house_argv(ego, starts[prompt], tmp_path / name, "--dtype=float32"))
    gpu, cpu = (read_rows(tmp_path / name / "episodes.jsonl") for name in ("gpu", "cpu"))
    assert [row["actions"] for row in gpu] == [row["actions"] for row in cpu]


def test_own_walks_are_recorded(on_gpu, ego, starts, tmp_path):
    on_gpu("make_data.py", "--policy", starts["window"], "--episodes",
           os.path.normpath(f"{ego}/../../houses"), "--out", tmp_path, "--max-actions", 12,
           "--temperature", 1)
    assert read_rows(tmp_path / "train" / "walks.jsonl")


def test_scenes_are_learned_and_answered_as_on_a_cpu(on_gpu, tmp_path):
    make(tmp_path / "scenes", *SMALL, "--questions", 5)
    texts = [row["prompt"] for row in
             json.loads((tmp_path / "scenes/scanqa_val.json").read_text())]
    (tmp_path / "ckpt").mkdir()
    save_policy(load_policy("tiny", CHAT, texts=texts, seed=3), str(tmp_path / "ckpt"))
    on_gpu("sft.py", "--model", tmp_path / "ckpt", "--data", tmp_path / "scenes" / "train.json",
           "--out", tmp_path / "run", *TRAIN)
    losses(tmp_path / "run")
    for name, run in (("gpu", on_gpu), ("cpu", in_process)):
        run("-m", "gpt4scene.answer", tmp_path / "scenes", "--ckpt", tmp_path / "ckpt",
            "--max-new-tokens", 6, "--dtype", "float32", "--out", tmp_path / name)
    gpu, cpu = (sorted(map(json.dumps, read_rows(next((tmp_path / name).glob("answers*.jsonl")))))
                for name in ("gpu", "cpu"))
    assert gpu == cpu
