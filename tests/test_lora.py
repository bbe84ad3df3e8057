"""LoRA: gradients against peft's own model on separate rows; runs, references, folders, merging.

Run it   python -m pytest tests/test_lora.py
"""
import json
import os
import shutil

import pytest
import torch
from helpers import slow
from policies import (
    Decision,
    hf_logps,
    log_of,
    make_prompt,
    max_difference,
    pictures,
    relative_difference,
    run_on_two_ranks,
    texts,
)
from safetensors.torch import load_file
from test_families import SIZES, Plain, perturbed
from test_grpo import flags, make_world
from test_model import CONTRACT30

import checkpoint
import grpo
import lora
import sft
from checkpoint import TINY, load_policy, save_policy
from cli import UserError, read_json
from model import Policy
from reward import write_plan

torch.set_num_threads(1)
RANK = ["--lora-rank=4"]
VISION = [*RANK, "--lora-vision"]


def adapter_of(folder):
    return load_file(os.path.join(folder, lora.WEIGHTS))


def moved(policy, seed=1):
    """The adapter of a policy, away from its start, where B is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.model.named_parameters():
        if "lora_B.default" in name:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy


def gradients(model, loss, prefix=""):
    model.zero_grad()
    loss.backward()
    return {prefix + name: p.grad.clone() for name, p in model.named_parameters()
            if p.grad is not None}


@pytest.fixture(scope="module", params=list(TINY))
def folders(request, tmp_path_factory):
    """A whole model's folder, one of an adapter on it, and transformers' own model of the first."""
    root = tmp_path_factory.mktemp("lora")
    plain = Plain(perturbed(request.param, CONTRACT30, atomic_patterns=[]), root / "whole")
    adapted = moved(load_policy(str(root / "whole"), lora_rank=4, lora_vision=True))
    save_policy(adapted, str(root / "adapter"))
    return root, plain, adapted


def test_gradients_are_those_of_pefts_own_forward_on_separate_rows(folders):
    """Shared prompt and shared frames, with and without recomputed layers."""
    from peft import PeftModel
    root, plain, policy = folders
    decisions = [Decision(texts()[i], (i, i + 1), None) for i in range(2)]
    frames = dict(enumerate((*pictures(2), SIZES[5])))
    ids, mask = policy.answers([write_plan([1 + i % 3] * (i + 2), policy.phrases)
                                for i in range(6)])
    signs = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.0])
    weights = (signs[:, None] * mask).float()
    peft_model = PeftModel.from_pretrained(plain.model, str(root / "adapter"), is_trainable=True)
    plain.model = peft_model
    prompts = [make_prompt(policy, [frames[k] for k in d.frames], d.instruction)
               for d in decisions]
    rows = [plain.logps(prompts[i // 3].ids + ids[i][mask[i]].tolist(),
                        [frames[k] for k in decisions[i // 3].frames], int(mask[i].sum()))
            for i in range(6)]
    theirs = gradients(peft_model, sum(s * row.sum() for s, row in zip(signs, rows)))
    theirs = {name.removeprefix("base_model.model."): g for name, g in theirs.items()}
    assert len(theirs) == 2 * len(lora.adapted_layers(policy.model)) > 40
    for policy.checkpointing in (False, True):
        ours = gradients(policy.model, (policy(decisions, frames, ids, mask, 3) * weights).sum())
        assert ours.keys() == theirs.keys() and relative_difference(ours, theirs) < 1e-5
    policy.checkpointing = False


def test_adapters_of_the_text_model_alone(folders):
    policy = load_policy(str(folders[0] / "whole"), lora_rank=4)
    names = [name for name, _ in lora.adapted_layers(policy.model)]
    assert len(names) == 7 * 3 and all("language_model.layers" in name for name in names)
    assert not policy.trains_vision and all(
        ("lora_" in name) == p.requires_grad for name, p in policy.model.named_parameters())


def test_a_merged_folder_is_a_whole_model_with_the_same_answers(folders, tmp_path):
    from transformers import AutoModelForImageTextToText
    root, _, policy = folders
    assert sorted(os.listdir(root / "adapter")) == [lora.CONFIG, lora.WEIGHTS, "nav.json"]
    checkpoint.main(checkpoint.parse_args(["--merge", str(root / "adapter"),
                                           "--out", str(tmp_path / "merged")]))
    whole = load_policy(str(tmp_path / "merged"))
    folded = load_policy(str(root / "adapter"))                  # what evaluate.py does
    assert max_difference(dict(whole.model.state_dict()), dict(folded.model.state_dict())) == 0
    assert all(p.requires_grad for p in folded.parameters()) and folded.base is None
    _, report = AutoModelForImageTextToText.from_pretrained(
        str(tmp_path / "merged"), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    frames = pictures(3)
    ids, mask = policy.answers(["A. Move forward 25 cm"])
    with torch.no_grad():
        ours = policy.logps([make_prompt(policy, frames)], ids, mask)
        bare = load_policy(str(root / "whole"))
        before = bare.logps([make_prompt(bare, frames)], ids, mask)
        for other in (whole, folded):
            prompt = make_prompt(other, frames)
            torch.testing.assert_close(other.logps([prompt], ids, mask), ours, atol=2e-5, rtol=0)
            torch.testing.assert_close(hf_logps(other, prompt, frames, ids[0]), ours[0],
                                       atol=2e-5, rtol=0)
        assert (before - ours).abs().max() > 1e-2
        with lora.using_adapter(policy.model, None):             # the reference of GRPO
            torch.testing.assert_close(policy.logps([make_prompt(policy, frames)], ids, mask),
                                       before, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run_sft(world, out, *more):
    sft.main(sft.parse_args([f"--model={world / 'sft'}", f"--data={world / 'vln_ego' / 'train'}",
                             f"--out={out}", "--device=cpu", "--batch-size=8", "--lr=1e-3",
                             "--steps-per-walk=4", "--warmup=0", "--max-steps=4", *RANK, *more]))
    return out


@pytest.fixture(scope="module")
def adapter(world):
    """An adapter that sft.py has trained on the whole model of world/sft."""
    return run_sft(world, world / "lora", "--save-every=2")


def test_sft_trains_the_adapter_alone_and_resumes_to_the_bit(world, adapter):
    before = load_file(str(world / "sft" / "model.safetensors"))
    assert max(w.abs().max() for k, w in adapter_of(adapter).items() if "lora_B" in k) > 1e-4
    config = read_json(str(adapter / lora.CONFIG))
    assert config["base_model_name_or_path"] == str(world / "sft") and config["r"] == 4
    state, = (adapter / "state").glob("step_*")
    size = sum(f.stat().st_size for f in state.iterdir())
    assert size < 0.5 * os.path.getsize(world / "sft" / "model.safetensors")
    assert max_difference(before, load_file(str(world / "sft" / "model.safetensors"))) == 0
    run_sft(world, world / "lora_again", "--save-every=2", "--stop-after=2")
    run_sft(world, world / "lora_again", "--save-every=2")
    assert max_difference(adapter_of(adapter), adapter_of(world / "lora_again")) == 0


def start(world, init, *more):
    return flags(world, world / "unused", *RANK, f"--init={init}", "--max-steps=2", *more)


def test_grpo_on_a_whole_folder_has_the_model_itself_as_its_reference(world, monkeypatch):
    calls, load = [], grpo.load_policy
    monkeypatch.setattr(grpo, "load_policy", lambda *a, **k: calls.append(a) or load(*a, **k))
    out = world / "grpo_lora"
    grpo.main(grpo.parse_args([*start(world, world / "sft"), f"--out={out}"]))
    rows = log_of(out)
    assert len(calls) == 1 and rows[1]["kl"] == 0 < rows[2]["kl"]
    grpo.main(grpo.parse_args([*start(world, world / "sft"), f"--out={out}2", "--stop-after=1"]))
    grpo.main(grpo.parse_args([*start(world, world / "sft"), f"--out={out}2"]))
    assert max_difference(adapter_of(out), adapter_of(f"{out}2")) == 0


def test_grpo_on_an_adapter_goes_on_from_it_and_keeps_it_as_the_reference(world, adapter):
    """After it has learned, the reference still is what the start adapter's folder is, merged."""
    out = world / "grpo_adapter"
    grpo.main(grpo.parse_args([*start(world, adapter), f"--out={out}"]))
    rows = log_of(out)
    assert rows[1]["kl"] < 1e-9 < rows[2]["kl"]
    assert max_difference(adapter_of(out), adapter_of(adapter)) > 1e-4
    assert read_json(str(out / lora.CONFIG))["base_model_name_or_path"] == str(world / "sft")
    args = grpo.parse_args(start(world, adapter))
    policy = moved(grpo.load_init(args, "cpu", ""), seed=3)      # learned since
    merged = load_policy(str(adapter))
    ids, mask = policy.answers(["A. Move forward 25 cm"])
    prompts = [make_prompt(one, pictures(2)) for one in (policy, merged)]
    with torch.no_grad(), lora.using_adapter(policy.model, lora.START):
        reference = policy.logps(prompts[:1], ids, mask)
    torch.testing.assert_close(reference, merged.logps(prompts[1:], ids, mask), atol=2e-5, rtol=0)


@slow
def test_compiled_layers_learn_what_the_others_do(world, adapter, monkeypatch):
    """Sampling, the start adapter as the reference, recomputed layers, ZeRO-2."""
    monkeypatch.setattr(Policy.compile_layers, "__defaults__", ("aot_eager",))
    argv = [*start(world, adapter), "--gradient-checkpointing", "--zero-stage=2", "--lr=1e-3"]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        grpo.main(grpo.parse_args([*argv, f"--out={world / name}", *more]))
    for row, expected in zip(log_of(world / "compiled"), log_of(world / "eager"), strict=True):
        for key in ("loss", "kl", "reward", "grad_norm"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert max_difference(adapter_of(world / "compiled"), adapter_of(world / "eager")) < 1e-5
    assert max_difference(adapter_of(world / "compiled"), adapter_of(adapter)) > 1e-4


def test_two_ranks_agree_with_one_at_zero_0_to_3(world, adapter):
    more = ["--updates-per-batch=2", "--micro-tokens=600", "--lr=2e-5", *VISION,
            "--gradient-checkpointing", "--seed=1"]
    alone = [*start(world, world / "sft", *more), f"--out={world / 'alone'}"]
    grpo.main(grpo.parse_args(alone))
    kept = ["--micro-tokens=600", "--lr=2e-5", "--seed=1"]
    grpo.main(grpo.parse_args([*start(world, adapter, *kept), f"--out={world / 'kept'}"]))
    run_on_two_ranks(world, "grpo", [
        *([*start(world, world / "sft", *more), f"--out={world}/zero{stage}",
           f"--zero-stage={stage}", *stop] for stage in (0, 1, 2, 3)
          for stop in ([["--stop-after=1"], []] if stage > 1 else [[]])),
        [*start(world, adapter, *kept), f"--out={world}/kept3", "--zero-stage=3"]])
    for two, one in (*((f"zero{stage}", "alone") for stage in range(4)), ("kept3", "kept")):
        ours, theirs = adapter_of(world / two), adapter_of(world / one)
        assert max_difference(ours, theirs) < 1e-5, two
        if one == "alone":                                       # there B began at 0
            ours, theirs = ({k: w for k, w in adapter.items() if "lora_B" in k}
                            for adapter in (ours, theirs))
            assert relative_difference(ours, theirs) < 1e-3, two
        for row, expected in zip(log_of(world / two), log_of(world / one), strict=True):
            for key in ("loss", "kl", "reward", "entropy"):
                if key in expected:
                    assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (two, key)


@pytest.mark.parametrize("more, says", [
    (["--lora-vision", "--lora-rank=0"], "--lora-rank"),
    (["--lora-vision", "--freeze-vision"], "choose one"),
    (["--lora-rank=8"], "--lora-rank 4"), (["--lora-vision"], "without the vision tower"),
    (["--lora-rank=-1"], "must be 0"),
])  # fmt: skip
def test_mistakes_are_sentences(world, adapter, tmp_path, more, says):
    with pytest.raises(UserError, match=says):
        grpo.main(grpo.parse_args([*start(world, adapter), f"--out={tmp_path}", *more]))


def test_broken_adapters_are_sentences(world, adapter, tmp_path):
    with pytest.raises(UserError, match="made from scratch"):
        load_policy("tiny", texts=texts(), lora_rank=4)
    for name, change, says in (
            ("no_base", '{"peft_type": "LORA"}', "merge it with peft"),
            ("other_kind", '{"peft_type": "LOHA", "base_model_name_or_path": "x"}', "LOHA"),
            ("no_json", "{", "cannot be read"), ("list", "[]", "no JSON object")):
        folder = tmp_path / name
        shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("state", "tb"))
        (folder / lora.CONFIG).write_text(change)
        with pytest.raises(UserError, match=says):
            load_policy(str(folder))
    folder = tmp_path / "dropout"                           # recomputed layers would draw again
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("state", "tb"))
    config = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps({**config, "lora_dropout": 0.3}))
    model = load_policy(str(folder)).train().model
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    folder = tmp_path / "half"
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("state", "tb"))
    tensors = adapter_of(folder)
    from safetensors.torch import save_file
    save_file(dict(list(tensors.items())[1:]), str(folder / lora.WEIGHTS))
    with pytest.raises(UserError, match="not in both"):
        load_policy(str(folder))
    with pytest.raises(UserError, match="holds no adapter"):
        checkpoint.main(checkpoint.parse_args(["--merge", str(world / "sft"), "--out", "x"]))
