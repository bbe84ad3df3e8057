"""sft.py: every decision once, only answers count, ranks agree, a kill changes nothing.

Run it   python -m pytest tests/test_sft.py
"""
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from helpers import free_port, kill_when
from policies import (
    hf_logps,
    launch,
    log_of,
    max_difference,
    run_on_two_ranks,
    weights_of,
)

import engine
import sft
from checkpoint import load_policy
from cli import UserError
from make_data import VlnEgo
from model import CONTRACT, Policy

torch.set_num_threads(1)
TINY = ["--model", "tiny", "--batch-size", "16", "--steps-per-walk", "4", "--memory-budget", "3",
        "--lr", "1e-3", "--device", "cpu", "--dtype", "float32"]


def run_sft(ego, out, *flags, check=True):
    return in_process("sft.py", "--data", ego, "--out", out, *TINY, *flags, check=check)


# ---------------------------------------------------------------- order and loss


def test_an_epoch_holds_every_decision_once():
    data = SimpleNamespace(episodes=range(5), steps=lambda i: list(range(3 + 4 * i)))
    units = sft.step_groups(data, 0, 0, 4)
    seen = sorted((e, t) for e, steps in units for t in steps)
    assert seen == [(e, t) for e in range(5) for t in range(3 + 4 * e)]
    assert max(len(steps) for _, steps in units) == 4
    assert sft.step_groups(data, 0, 0, 4) == units != sft.step_groups(data, 0, 1, 4)


def test_order_needs_no_history():
    data = SimpleNamespace(episodes=range(9), steps=lambda i: list(range(8)))
    straight, jumping = (sft.BatchSampler([data], 3, 4, 2) for _ in range(2))
    batches = [straight(step) for step in range(20)]
    assert [jumping(step) for step in (17, 2, 9)] == [batches[17], batches[2], batches[9]]
    with pytest.raises(UserError, match="lower --batch-size"):
        sft.BatchSampler([data], 0, 8, 100)


def test_recordings_are_mixed_in_their_shares():
    """30 groups of four steps in one recording, 12 in the other."""
    long, short = (SimpleNamespace(episodes=range(n), steps=lambda i: list(range(8)))
                   for n in (15, 6))
    alone = [unit[1:] for unit in sft.mixed_groups([long], 0, 0, 4)]
    assert alone == sft.step_groups(long, 0, 0, 4)              # as if nothing could be mixed
    everything = sft.mixed_groups([long, short], 0, 0, 4)
    assert sorted(unit for unit in everything if unit[0] == 0) == sorted((0, *u) for u in alone)
    assert len({*everything}) == len(everything) == 42 and everything != sorted(everything)
    epochs = [sft.mixed_groups([long, short], 0, epoch, 4, shares=[1, 2]) for epoch in (0, 1)]
    for units in epochs:
        assert [unit[0] for unit in units].count(0) == 6 and len({*units}) == 18
    firsts = [{unit for unit in units if unit[0] == 0} for units in epochs]
    assert firsts[0] != firsts[1], "other ones of the larger recording in each epoch"
    sampler = sft.BatchSampler([long, short], 0, 4, 9, shares=[1, 2])
    assert sampler.per_epoch == 2 and sampler(3) == epochs[1][9:18] and sampler(0) == epochs[0][:9]


def with_robot(ego, folder, **changes):
    """A copy of a recording that says another robot made it."""
    shutil.copytree(ego, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["robot"].update(changes)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_recordings_of_other_robots_are_not_mixed(ego, tmp_path):
    other = with_robot(ego, tmp_path / "other", camera_height_m=0.5)
    args = ["--data", ego, str(other), "--out", str(tmp_path / "out"), *TINY]
    with pytest.raises(UserError, match="another camera_height_m than"):
        sft.setup(sft.parse_args(args), "cpu")
    with pytest.raises(UserError, match="--shares needs a number above 0 for each of the 2"):
        sft.setup(sft.parse_args([*args, "--shares", "1"]), "cpu")


def test_a_source_that_states_no_angle_does_not_decide_it(ego, tmp_path):
    data = VlnEgo(ego)
    silent = SimpleNamespace(meta={"dataset": "x"})
    robot = {**data.meta["robot"], "turn_deg": 30, "hfov_deg": 79}
    rxr = SimpleNamespace(meta={"dataset": "x", "robot": robot})
    args = sft.parse_args(["--data", "a", "b"])
    for sources in ([silent, rxr], [rxr, silent]):
        contract = sft.make_contract(args, Policy, sources)
        assert (contract["turn_deg"], contract["hfov_deg"]) == (30, 79)


def test_data_that_changed_are_not_gone_on_with(ego, tmp_path):
    data = tmp_path / "train"
    shutil.copytree(ego, data)
    flags = ["--max-steps", "4", "--save-every", "1"]
    run_sft(data, tmp_path / "out", *flags, "--stop-after", "1")
    with open(data / "episodes.jsonl", "a") as file:
        file.write((data / "episodes.jsonl").read_text().splitlines()[0] + "\n")
    done = run_sft(data, tmp_path / "out", *flags, check=False)
    assert done.returncode == 2 and "train has changed since the run in --out" in done.stderr


def test_what_is_unknown_is_neither_right_nor_wrong(ego):
    """A ShareGPT answer that is no plan, one of which an action is no phrase, and a plan."""
    policy = load_policy("tiny", CONTRACT, "cpu", "float32", texts=["go"])
    units = sft.step_groups(VlnEgo(ego), 0, 0, 3)
    decisions, frames = policy.load_batch(VlnEgo(ego), units[:1])
    plans = [(), (None, 1, 1, 1, 1, 1), tuple([1] * 6)]
    decisions = [d._replace(plan=plan, answer="x") for d, plan in zip(decisions, plans)]
    policy.generate = lambda prompts: SimpleNamespace(texts=["garbage"] * 3)
    _, first, exact = policy.validate(decisions, frames)
    assert first == (0, 1) and exact == (0, 1)


def test_validation_takes_as_many_decisions_as_it_is_told(ego, monkeypatch, tmp_path):
    val = tmp_path / "val_seen"
    shutil.copytree(ego, val)
    seen = []
    monkeypatch.setattr(sft, "validate", lambda policy, data, units, *_: seen.append(
        sum(len(steps) for _, steps in units)) or {})
    args = ["--data", str(ego), "--val-data", str(val), "--out", str(tmp_path / "out"), *TINY,
            "--max-steps", "1", "--val-decisions", "30"]
    sft.main(sft.parse_args(args))
    assert 30 <= seen[0] < 30 + 8


def test_a_split_of_another_robot_is_not_validated_on(ego, tmp_path):
    val = with_robot(ego, tmp_path / "val_seen", turn_deg=45)
    done = run_sft(ego, tmp_path / "out", "--val-data", val, check=False)
    assert done.returncode == 2 and "the validation split was recorded with 45" in done.stderr
    (val / "episodes.jsonl").write_text("")
    done = run_sft(val, tmp_path / "out2", check=False)
    assert done.returncode == 2 and "holds no episodes" in done.stderr


def test_learning_rate_by_hand():
    rates = [engine.learning_rate(s, 100, 2.0, 0.1, "cosine") for s in range(100)]
    assert rates[4] == pytest.approx(2 * 0.045 / 0.1) and max(rates) < 2.0
    assert rates[54] == pytest.approx(1 + math.cos(math.pi * 0.445 / 0.9))
    assert rates[-1] < 0.001


def test_the_loss_is_the_answers_cross_entropy(ego):
    """Against a plain sum over transformers' logits, one decision at a time."""
    data = VlnEgo(ego)
    policy = load_policy("tiny", texts=[e["instruction"] for e in data.episodes],
                         contract=dict(CONTRACT, turn_deg=30))
    decisions, frames = policy.load_batch(data, [(0, (0, 3)), (1, (2,))])
    ids, mask = policy.tokenize_targets(decisions)
    ours = -policy(decisions, frames, ids, mask).sum() / mask.sum()
    theirs = 0
    for d, row, m in zip(decisions, ids, mask):
        seen = [frames[k] for k in d.frames]
        prompt, = policy.build_prompts([d], dict(zip(d.frames, seen)))
        theirs -= hf_logps(policy, prompt, seen, row[m]).sum()
    assert ours.item() == pytest.approx(theirs.item() / mask.sum().item(), rel=1e-5)
    walk = data.walks[data.episodes[0]["walk_id"]]
    assert list(decisions[1].plan) == (walk["actions"][3:9] + [0] * 6)[:6]
    assert decisions[1].frames[-1] == (data.episodes[0]["walk_id"], 3)


# ---------------------------------------------------------------- runs


def test_it_learns_and_a_kill_and_a_stop_change_nothing(ego, tmp_path):
    """12 steps straight; 12 steps with a kill -9 after 4 and a stop at 9: equal weights."""
    flags = ["--max-steps", 12, "--save-every", 4]
    run_sft(ego, tmp_path / "a", *flags)
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert np.mean(losses[-4:]) < 0.6 * losses[0]

    out = tmp_path / "b"
    process = subprocess.Popen(
        [sys.executable, "sft.py", "--data", ego, "--out", out, *TINY, *map(str, flags)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when(process, (out / "state" / "latest").exists)
    assert not (out / "model.safetensors").exists()
    run_sft(ego, out, *flags, "--stop-after", 9)
    run_sft(ego, out, *flags)
    assert max_difference(weights_of(tmp_path / "a"), weights_of(out)) == 0
    assert log_of(tmp_path / "a") == log_of(out)


def test_muon_moves_as_torchs_does():
    """Three steps of torch.optim.Muon, which iterates in bf16, on three shapes; AdamW beside it."""
    torch.manual_seed(0)
    shapes = (48, 16), (16, 48), (16, 16), (16,)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    first = engine.Muon([{"params": ours[:3], "muon": True}, {"params": ours[3:], "muon": False}],
                        lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    others = (torch.optim.Muon(theirs[:3], lr=0.01, weight_decay=0.1,
                               adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(theirs[3:], lr=0.01, weight_decay=0.1, betas=(0.9, 0.99)))
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for one in (first, *others):
            one.step()
    for a, b, start in zip(ours[:3], theirs, before):
        assert (a - b).norm() < 0.02 * (b - start).norm()
    assert torch.equal(ours[3], theirs[3])


def test_muon_resumes_to_the_bit_and_is_the_same_on_two_ranks(ego, tmp_path):
    flags = ["--optimizer", "muon", "--max-steps", 4]
    run_sft(ego, tmp_path / "a", *flags)
    run_sft(ego, tmp_path / "b", *flags, "--stop-after", 2)
    run_sft(ego, tmp_path / "b", *flags)
    assert max_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0
    run_on_two_ranks(tmp_path, "sft", [["--data", str(ego), "--out", str(tmp_path / "c"), *TINY,
                                        *map(str, flags)]])
    assert max_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "c")) < 1e-5
    done = run_sft(ego, tmp_path / "d", *flags, "--zero-stage", 2, check=False)
    assert done.returncode == 2 and "give --zero-stage 0 --dtype float32" in done.stderr


def test_two_ranks_equal_one(ego, tmp_path):
    """Each ZeRO stage on two processes, against one plain process: fp32, 1e-5."""
    def argv(name, zero):
        return ["--data", ego, "--out", str(tmp_path / name), *TINY, "--max-steps", "3", "--lr",
                "1e-4", "--zero-stage", str(zero)]

    sft.main(sft.parse_args(argv("one", 0)))
    one, stages = weights_of(tmp_path / "one"), {f"zero{zero}": zero for zero in (0, 2, 3)}
    run_on_two_ranks(tmp_path, "sft", [argv(*stage) for stage in stages.items()])
    for stage in stages:
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / stage), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), (stage, a["step"])
            assert 0 < a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), (stage, a["step"])
        two = weights_of(tmp_path / stage)
        assert one.keys() == two.keys()
        for k in one:
            torch.testing.assert_close(one[k], two[k], atol=2e-5, rtol=1e-5, msg=f"{stage}: {k}")


def test_micro_batches_are_the_same_update(ego, tmp_path):
    for name, flags in (("whole", []), ("pieces", ["--micro-tokens", 300])):
        run_sft(ego, tmp_path / name, "--max-steps", 2, "--lr", 1e-4, *flags)
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces")
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-5)


def test_an_update_takes_as_many_forwards_as_its_tokens_need(monkeypatch):
    told = []                                       # what this rank says; another rank needs four
    monkeypatch.setattr(engine.dist, "all_reduce", lambda most, op: (
        told.append(int(most)), most.fill_(max(4, int(most)))))
    items = [("a", 5), ("b", 9), ("c", 4), ("d", 3)]
    parts = engine.micro_batches(items, lambda item: item[1], 12, "cpu")
    assert told == [2]
    assert len(parts) == 4
    assert sorted(sum(parts, [])) == items
    monkeypatch.setattr(engine.dist, "all_reduce", lambda most, op: None)
    parts = engine.micro_batches(items, lambda item: item[1], 12, "cpu")
    assert len(parts) == 2 and max(sum(n for _, n in part) for part in parts) <= 12
    assert engine.micro_batches(items, lambda item: item[1], 0, "cpu") == [items]


def test_bfloat16_learns_what_float32_learns(ego, tmp_path):
    """What a GPU runs by default, on a CPU: bf16 weights, an fp32 master copy, ZeRO-1."""
    for dtype in ("float32", "bfloat16"):
        run_sft(ego, tmp_path / dtype, "--max-steps", 8, "--dtype", dtype, "--warmup", 0)
    whole, half = ([line["loss"] for line in log_of(tmp_path / d)] for d in ("float32", "bfloat16"))
    assert half == pytest.approx(whole, rel=0.02) and whole[-1] < 0.95 * whole[0]


# ---------------------------------------------------------------- numbers that are not finite


def strict(folder):
    """The log, by a reader that knows no NaN."""
    def refuse(name):
        raise AssertionError(f"{name} in log.jsonl")
    return [json.loads(line, parse_constant=refuse)
            for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_diverging_run_ends_and_keeps_its_last_good_state(ego, tmp_path):
    out, flags = tmp_path / "x", ["--max-steps", 6, "--save-every", 1, "--warmup", 0]
    run_sft(ego, out, *flags, "--stop-after", 2)
    rows = strict(out)
    assert all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in rows)
    good, before = weights_of(out), json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps(dict(before, lr=1e22)))      # let it go on with that
    done = run_sft(ego, out, *flags, "--lr", 1e22, check=False)
    assert done.returncode == 2
    said, = [line for line in done.stderr.splitlines() if " error: " in line]
    for words in ("step 3: ", "weights' tensors are not finite", "(learning rate ", "lower --lr",
                  "state/step_000002"):
        assert words in said
    assert (out / "state" / "latest").read_text() == "step_000002"
    assert max_difference(good, weights_of(out)) == 0                      # nor the policy

    fresh = tmp_path / "y"                           # the sentence's advice where no state is
    done = run_sft(ego, fresh, *flags[:2], "--save-every", 5, "--lr", 1e22, check=False)
    assert done.returncode == 2
    said, = [line for line in done.stderr.splitlines() if " error: " in line]
    assert "step 2: loss is nan" in said and "No state was saved" in said
    assert strict(fresh)[-1]["loss"] is None
    run_sft(ego, fresh, "--max-steps", 1)


def test_a_diverging_run_ends_on_every_rank_of_deepspeeds_launcher(ego, tmp_path):
    done = launch(["deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"],
                  "sft.py", "--data", ego, "--out", tmp_path / "x", *TINY, "--max-steps", 4,
                  "--zero-stage", 2, "--lr", 1e22)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (done.stdout + done.stderr).count("sft.py: error: step 2: loss is") == 2, done.stderr


def tiny_engine(tmp_path, *flags):
    args = sft.parse_args([*TINY, "--out", str(tmp_path), *flags])
    engine.init_distributed(args)
    policy = load_policy("tiny", dtype=engine.default_dtype(args), texts=["go to the sofa"])
    return policy, engine.make_engine(policy, args)


def test_a_state_is_written_and_read_with_finite_weights_only(tmp_path, monkeypatch):
    policy, deep = tiny_engine(tmp_path)
    engine.save_state(deep, str(tmp_path), 1)
    with torch.no_grad():
        next(policy.parameters())[0] = math.nan
    with pytest.raises(UserError, match="1 of the weights' tensors are not finite.*step_000001"):
        engine.save_state(deep, str(tmp_path), 2)
    assert sorted(os.listdir(tmp_path / "state")) == ["latest", "step_000001"]
    with monkeypatch.context() as patch:             # as an older version of this code wrote it
        patch.setattr(engine, "broken_weights", lambda deep: 0)
        engine.save_state(deep, str(tmp_path), 3)
    with pytest.raises(UserError, match="state/step_000003 holds weights that are not finite"):
        engine.load_state(deep, str(tmp_path))


def test_a_bfloat16_update_that_overflows_is_skipped_and_counted(tmp_path):
    policy, deep = tiny_engine(tmp_path, "--dtype", "bfloat16")
    before = [p.clone() for p in policy.parameters()]
    skipped = []
    for scale in (math.inf, 1.0):
        loss = sum((p.float() ** 2).sum() for p in policy.parameters() if p.requires_grad) * scale
        for _ in engine.accumulate(deep, [0]):
            engine.backward_step(deep, loss)
        skipped.append(engine.update_metrics(deep))
        same = all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
        assert same == (scale == math.inf)
    assert [m["skipped_steps"] for m in skipped] == [1, 1]
    assert math.isinf(skipped[0]["grad_norm"]) and 0 < skipped[1]["grad_norm"] < math.inf


def test_bfloat16_may_skip_some_updates_in_a_row_and_float32_none(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.dist, "get_rank", lambda: 1)                # writes nothing

    def log(half):
        return engine.Log(SimpleNamespace(bfloat16_enabled=lambda: half, skipped_steps=7),
                          str(tmp_path), 0, 99, ())
    patient, bad = log(True), dict(loss=1.0, lr=0.1, grad_norm=math.inf)
    for step in range(1, 20):
        patient(step, skipped_steps=7 + step, **bad)
    patient(20, skipped_steps=26, **dict(bad, grad_norm=1.0))              # it came and went
    for step in range(21, 40):
        patient(step, skipped_steps=6 + step, **bad)
    with pytest.raises(UserError, match="step 40: grad_norm is inf.*skipped the last 20 updates"):
        patient(40, skipped_steps=46, **bad)
    with pytest.raises(UserError, match="step 1: grad_norm is inf"):
        log(False)(1, skipped_steps=8, **bad)
    with pytest.raises(UserError, match="reward is nan"):
        log(True)(1, reward=math.nan, lr=0.1, skipped_steps=7)
    with pytest.raises(UserError, match="a log-probability of a sampled token is not finite"):
        log(True)(1, engine.Counters(1.0, 1.0, 1.0), reward=0.5, lr=0.1, skipped_steps=8)


def test_lengths_are_checked_before_training(ego, tmp_path):
    data, args = VlnEgo(ego), ["--data", ego, "--out", str(tmp_path), *TINY]
    sft.setup(sft.parse_args(args), "cpu")
    longest = max(data.episodes, key=lambda e: len(e["instruction"]))
    shutil.copytree(ego, tmp_path / "long")
    rows = [dict(row, instruction="go on " * 30_000) if row is longest else row
            for row in data.episodes]
    (tmp_path / "long" / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args[1] = str(tmp_path / "long")
    dialog = [*args[:4], "--model", "tiny", "--device", "cpu", "--prompt", "dialog"]
    for argv in (args, dialog):
        with pytest.raises(UserError, match=f"episode {longest['episode_id']} is .* tokens long"):
            sft.setup(sft.parse_args(argv), "cpu")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags,words", [
    (["--batch-size", "10"], "--batch-size 10 does not split"),
    (["--batch-size", "0"], "--batch-size: '0' is not a whole number above 0"),
    (["--deepspeed-config", "/nowhere.json"], "--deepspeed-config /nowhere.json"),
    (["--device", "cuda"], "torch finds no GPU"),                   # conftest.py hides it
    (["--horizon", "20"], "--horizon 20: give 1 to 8"),
    (["--vary-turns"], "--vary-turns says nothing about --prompt window"),
    (["--prompt", "dialog", "--memory-budget", "0"], "says nothing about --prompt dialog"),
    (["--prompt", "chat", "--horizon", "6"], "says nothing about --prompt chat"),
    (["--data", "/nowhere/train"], "make_data.py"),
    (["--model", "Qwen2-VL-2B"], "hf download Qwen/Qwen2-VL-2B-Instruct"),
    (["--beta2", "1"], "--beta2 must be below 1"), (["--seed", "-1"], "'-1' is not a whole number"),
    (["--out", "/proc/nothing"], "--out /proc/nothing: cannot write"),
])
def test_mistakes_are_sentences(ego, tmp_path, flags, words):
    done = run_sft(ego, tmp_path / "x", *flags, check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
