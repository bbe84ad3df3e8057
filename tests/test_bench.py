"""What bench/ claims beside its ratios: both sides compute the same. And the units of its rows.

Run it   python -m pytest tests/test_bench.py       (TRL's part: with the packages of bench/)
"""
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import common
import evaluation
import numpy as np
import passes
import pytest
import recording
import torch
from conftest import ROOT
from policies import Decision, learn_plans, make_prompt, pictures, texts

import checkpoint
import engine
import evaluate
import grpo
from checkpoint import load_policy
from costs import decoder_flops, vision_flops
from lsm import pick_frames
from make_data import VlnEgo
from model import CONTRACT, Policy
from reward import write_plan

torch.set_num_threads(1)

# ---------------------------------------------------------------- the same numbers


def test_a_rollout_that_is_learned_from_is_the_one_that_is_sampled(wordy):
    """sample_with_logps() against generate() and logps() of prompts run apart: all equal."""
    decisions = [Decision(texts()[i], tuple(range(2 + i)), None)
                 for i in range(2)]
    frames = dict(enumerate(pictures(3)))
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))

    def gradients(logps):
        wordy.zero_grad()
        (logps * weight[:, :logps.shape[1]]).sum().backward()
        return torch.cat([p.grad.flatten() for p in wordy.parameters()])

    roll, (logps, *_) = wordy.sample_with_logps(decisions, frames, 3, 0.8, [4, 5])
    with torch.no_grad():
        apart = wordy.generate(wordy.build_prompts(decisions, frames), 3, 0.8, [4, 5])
    assert torch.equal(roll.completion_ids, apart.completion_ids)
    again = wordy(decisions, frames, roll.completion_ids, roll.completion_mask, 3, 0.8)
    torch.testing.assert_close(logps, again, atol=1e-6, rtol=1e-6)
    got, want = gradients(logps), gradients(again)
    assert (got - want).norm() / want.norm() < 1e-6


def test_frames_may_be_given_as_features(wordy):
    decisions = [Decision(texts()[0], (0, 1, 2), None)]
    frames = dict(enumerate(pictures(3)))
    ids, mask = wordy.answers([write_plan([1, 2, 3, 0, 0, 0], wordy.phrases)])
    with torch.no_grad():
        features = dict(zip(frames, wordy.encode_frames(list(frames.values()))))
        assert torch.equal(*(wordy(decisions, seen, ids, mask) for seen in (features, frames)))


def test_an_answer_that_left_the_grammar_is_drafted_again(wordy):
    """Of "B. Move forward ..": nothing inside the slip, and everything from the next letter on."""
    def ids(text):
        return wordy.tokenizer(text)["input_ids"]

    slip = "B. Move forward 25 cm, A. Move forward 25 cm,"
    forward = ids("A. Move forward 25 cm, A. Move forward 25 cm, A")
    certain = ids("A. Move forward 25 cm,")[1:]
    assert wordy.draft(ids("A"), guess=0) == certain
    assert wordy.draft(ids("A")) == forward[1:1 + len(certain) + 8]        # forward again, perhaps
    assert wordy.draft(ids("B. Move")) == [] == wordy.draft(ids("what?"))
    assert wordy.draft(ids(slip + " A"), guess=0) == certain
    stops = ids("D. Stop, D. Stop, D. Stop, D. Stop, D. Stop, D. Stop")
    assert wordy.draft(ids("D")) == stops[1:] + [wordy.end_token]


def test_passes_fall_and_plans_stay(wordy):
    learn_plans(wordy)
    drafted, plain, same = passes.count(wordy, [make_prompt(wordy, pictures(2))])
    assert same and drafted[0] <= 8 < 40 < plain[0]


def test_evaluation_decides_as_generate_does(ego, tmp_path):
    """One walk's frames through both agents of bench/evaluation.py: the same words."""
    data = VlnEgo(ego)
    contract = dict(CONTRACT, turn_deg=30, memory=dict(CONTRACT["memory"], budget=3))
    policy = load_policy("tiny", contract, texts=[e["instruction"] for e in data.episodes])
    os.makedirs(tmp_path / "ckpt")
    checkpoint.save_policy(policy, str(tmp_path / "ckpt"))
    ours, theirs = evaluation.load_sides(SimpleNamespace(ckpt=str(tmp_path / "ckpt"), device="cpu"))
    agents = (ours.agent(), evaluation.hf_agent(ours, theirs))
    episode = data.episodes[0]
    texts = []
    for agent in agents:
        walk = evaluate.EpisodeState({"episode_id": 0}, episode["instruction"])
        for t in range(4):
            walk.states.append({})
            walk.frames.append(data.frame((episode["walk_id"], t)))
            agent([walk])
        texts.append([decision.text for decision in walk.decisions])
    assert texts[0] == texts[1] and len(texts[0]) == 4
    args = evaluation.parse_args([f"--ckpt={tmp_path}/ckpt", "--limit=2", "--max-actions=6",
                                  f"--episodes={ego}/../../houses", "--repeats=1", "--sims=2",
                                  f"--results={tmp_path}/rows"])
    evaluation.main(args)                                          # and whole walks of them
    row = json.loads((tmp_path / "rows").read_text())
    assert row["equal"] and row["check"].startswith("2 of 2 episodes")
    assert len(pick_frames(3, **contract["memory"])) == 3


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None,
                    reason="needs torchvision, which transformers' processor imports")
def test_questions_of_a_scene_are_the_same_together_and_apart(tmp_path):
    import scenes
    scenes.main(scenes.parse_args([
        f"--world={tmp_path}", f"--results={tmp_path}/rows", "--repeats=1", "--questions=3",
        "--asked=5", "--together=2", "--tokens=3"]))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["peer_name"] for row in rows] == [
        "rows of their own", "HF, padded rows", "HF generate, padded rows"]
    assert all(row["equal"] for row in rows), rows


def test_the_collector_sees_what_is_recorded(ego, tmp_path):
    houses = os.path.join(ego, "..", "..", "houses")
    _, seen = recording.collect(houses, str(tmp_path / "official"), 4)
    data = VlnEgo(ego)
    walks = {e["episode_id"]: e["walk_id"] for e in data.episodes}
    assert len(seen) > 20
    for (name, t), frame in seen.items():
        assert np.array_equal(data.frame((walks[name], t)), frame)


def test_grpo_and_sft_equal_trl_and_the_trainer(tmp_path):
    """bench/grpo_step.py and sft_step.py, on a small world; needs bench/requirements.txt."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install -r bench/requirements.txt")
    if "BENCH_PYTHON" not in os.environ:
        pytest.skip("BENCH_PYTHON must name the interpreter that has no TRL (see bench/run.sh)")
    import grpo_step
    import sft_step
    args = grpo_step.parse_args(["--world", str(tmp_path), "--prompts", "1"])
    ego, late = common.make_world(args)
    folder = common.phrase_policy(args, late, steps=60)
    found = grpo_step.check(folder, late, args)
    assert found.pop("same prompt ids") and max(found.values()) < 1e-3, found
    args = sft_step.parse_args(["--world", str(tmp_path), "--batch-size", "8"])
    _, ours = sft_step.our_steps(folder, ego, args, 2)
    _, theirs, _ = sft_step.trainer_steps(folder, ego, args, 2)
    assert ours == pytest.approx(theirs, rel=2e-3)      # they ban nothing: a little is left there


# ---------------------------------------------------------------- the counts


def test_flops_of_the_real_shapes_are_those_of_the_tables():
    """2B and 7B at 1,308 tokens and 14.9 frames of 280 patches: TFLOP, worked out independently."""
    for name, prefill, vision in (("2B", 3.6, 5.5), ("7B", 17.4, 5.6)):
        hidden, layers, heads, kv_heads, mlp, _, _ = common.QWEN2[name]
        text = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp,
                               num_attention_heads=heads, num_key_value_heads=kv_heads)
        tower = SimpleNamespace(depth=32, embed_dim=1280, mlp_ratio=4, hidden_size=hidden,
                                patch_size=14, spatial_merge_size=2)
        assert decoder_flops(text, 1308) / 1e12 == pytest.approx(prefill, rel=0.02)
        assert 14.9 * vision_flops(tower, 280) / 1e12 == pytest.approx(vision, rel=0.02)
        split = decoder_flops(text, 1000) + decoder_flops(text, 308, 1000)
        assert split == pytest.approx(decoder_flops(text, 1308))


def test_a_policy_counts_what_it_computes(wordy):
    """By hand: head, tail and answers; three times where it learns, once where it does not."""
    config, frames = wordy.model.config, pictures(2)
    decision = Decision(texts()[0], (0, 1), None)
    ids, mask = wordy.answers([write_plan([1] * 6, wordy.phrases)])
    prompt = make_prompt(wordy, frames, texts()[0])
    length, answer = len(prompt.ids), int(mask.sum())
    once = (decoder_flops(config.text_config, length + answer - 1)
            + 2 * answer * wordy.model.lm_head.weight.numel()
            + 2 * vision_flops(config.vision_config, 16))
    for grad, times, tokens in ((True, 3, length + answer - 1), (False, 1, 0)):
        wordy.flops = wordy.tokens = 0
        with torch.set_grad_enabled(grad):
            wordy([decision], dict(enumerate(frames)), ids, mask)
        assert wordy.flops == pytest.approx(times * once) and wordy.tokens == tokens


# 2B and 3B models, narrower: 3 E + 12 E^2 weights .. of the text model and of the tower.
NARROW = {
    "tiny": (dict(num_attention_heads=4, num_key_value_heads=1, intermediate_size=1494),
             dict(embed_dim=160, hidden_size=256)),
    "tiny-qwen2.5": (dict(num_attention_heads=4, num_key_value_heads=1, intermediate_size=1376),
                     dict(hidden_size=160, intermediate_size=428, out_hidden_size=256,
                          window_size=112, fullatt_block_indexes=[5])),
    "tiny-qwen3": (dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=768,
                        head_dim=64),
                   dict(hidden_size=160, intermediate_size=640, out_hidden_size=256,
                        deepstack_visual_indexes=[1, 2, 3]))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(NARROW))
def test_activations_are_what_autograd_keeps(name, dtype):
    """On 280x196 pixels, with and without layers that are recomputed."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    tiny = load_policy(name, contract=dict(CONTRACT, turn_deg=30), texts=texts())
    config, (text, vision) = tiny.model.config.to_dict(), NARROW[name]
    config["text_config"].pop("layer_types", None)
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    config["text_config"].update(hidden_size=256, num_hidden_layers=6, **text)
    config["vision_config"].update(depth=6, num_heads=2, **vision)
    policy = Policy(AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(**config), attn_implementation="sdpa", dtype=dtype),
        tiny.tokenizer, tiny.contract, tiny.processor)
    decision = Decision(texts()[0], tuple(range(6)), None)
    frames = dict(enumerate(pictures(6, 196, 280)))
    ids, mask = policy.answers([write_plan([1] * 6, policy.phrases)])
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    for policy.checkpointing in (False, True):
        saved = []                                          # or an address would be used again
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor):
            policy([decision], frames, ids, mask)
        kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
        real = sum(size for address, size in kept.items() if address not in own)
        estimate = policy.activations([decision], frames)
        if policy.checkpointing:                            # and a layer's worth at a time on top
            assert real < estimate
        else:
            assert estimate == pytest.approx(real, rel=0.2)


def test_the_log_tells_the_clock(ego, tmp_path):
    import sft
    out = tmp_path / "out"
    sft.main(sft.parse_args(["--model", "tiny", "--data", ego, "--out", str(out), "--device", "cpu",
                             "--batch-size", "8", "--max-steps", "2", "--val-decisions", "8"]))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert engine.TIMING_KEYS - set(rows[1]) == {"peak_share"}          # a CPU has none
    assert rows[1]["eta_minutes"] == 0 and 0 <= rows[1]["wait_s"] < rows[1]["seconds"]
    assert rows[1]["tflops"] > 0 and rows[1]["tokens_per_second"] > 0


# ---------------------------------------------------------------- the table


def test_rows_become_a_table(tmp_path, capsys):
    args = SimpleNamespace(device="cpu", shape="tiny", results=str(tmp_path / "rows"))
    common.add_row(args, "a row", [2.0, 1.0, 3.0], [8.0], "a peer", "s", True, "checked", "here")
    common.add_row(args, "rates", [6.0], [2.0], "a peer", "frames/s", True, "checked", "here",
                higher_is_better=True)
    common.gather(args.results, str(tmp_path / "results.json"))
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(r["ours"], r["ratio"], r["spread"]["ours"]) for r in rows] == [
        (2.0, 4.0, [1.0, 3.0]), (6.0, 3.0, [6.0, 6.0])]
    assert {"row", "ours", "peer", "peer_name", "unit", "ratio", "equal", "check", "spread",
            "versions"} <= rows[0].keys()
    assert "4.00  equal     against a peer" in capsys.readouterr().out


def test_every_bench_is_run_and_parses():
    with open(os.path.join(ROOT, "bench", "run.sh"), encoding="utf-8") as f:
        script = f.read()
    for name in ("grpo_step", "sft_step", "scenes", "evaluation", "passes", "recording",
                 "simulators", "rollouts", "utilisation"):
        assert f"bench/{name}.py" in script
        if name == "rollouts":                     # a dialog policy names its own data
            continue
        if name.endswith("_step") and importlib.util.find_spec("trl") is None:
            continue
        args = importlib.import_module(name).parse_args(["--device", "cuda", "--shape", "2B"])
        assert args.device == "cuda" and args.repeats >= 2
    assert grpo.parse_args([]).group_size == 8                    # the benches' G is the default


# ---------------------------------------------------------------- bench/gpu.sh


def test_the_gpu_bench_runs_dry_and_needs_no_deepspeed(tmp_path):
    """On a CPU: what it would do on a GPU, without the packages that a lent machine lacks."""
    for name in ("deepspeed", "trimesh"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on that machine')")
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--device", "cpu", "--shape", "tiny"], cwd=ROOT, timeout=900,
        capture_output=True, text=True, env=dict(
            os.environ, OUT=str(tmp_path), PYTHON=sys.executable, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    rows = json.loads((tmp_path / "results_gpu.json").read_text())
    assert [r["row"] for r in rows] == ["families checked", "SFT, tiny", "GRPO, tiny",
                                        "decisions, tiny"]
    assert rows[0]["equal"] and all(r["ours"] > 0 and r["peer"] > 0 for r in rows)
    refused = subprocess.run(["bash", "bench/gpu.sh", "--shapes", "2B"], cwd=ROOT, check=False)
    assert refused.returncode == 2


def test_the_gpu_bench_writes_a_world_to_train_in(tmp_path):
    import gpu
    gpu.main(gpu.parse_args(["--write", str(tmp_path)]))
    policy, data = load_policy(str(tmp_path / "policy")), VlnEgo(str(tmp_path / "train"))
    assert policy.contract["turn_deg"] == data.meta["robot"]["turn_deg"]
    decision = data.decision(1, 45, policy.contract)
    assert len(decision.frames) == 17
    frame = data.frame(decision.frames[0])
    assert np.array_equal(policy.resize(frame), frame)         # recorded as it is seen
