"""qwen.py and model.py against transformers' own processor, positions, logits and generate().

Run it   python -m pytest tests/test_model.py
"""
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import Counter

import pytest
import torch
from policies import (
    Decision,
    hf_inputs,
    hf_logps,
    learn_plans,
    make_prompt,
    pictures,
    pixel_values,
    texts,
)

from checkpoint import TINY, load_policy, save_policy
from cli import UserError
from model import CONTRACT, Policy, window_prompt
from qwen import PatchProjection, fit_pixels
from reward import write_plan

torch.set_num_threads(1)
CONTRACT30 = dict(CONTRACT, turn_deg=30)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", contract=CONTRACT30, texts=texts())


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("h,w", [(480, 640), (56, 56), (100, 30), (720, 1280), (224, 224)])
def test_pixels_equal_the_pil_image_processor(policy, h, w):
    backend = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    from PIL import Image
    frames = pictures(2, h, w)
    contract = policy.contract
    want = backend.Qwen2VLImageProcessorPil(
        size={"shortest_edge": contract["min_pixels"], "longest_edge": contract["max_pixels"]})(
        [Image.fromarray(f) for f in frames], return_tensors="pt")
    pixels, grids = pixel_values(frames, policy)
    assert torch.equal(grids, want["image_grid_thw"])
    torch.testing.assert_close(pixels, want["pixel_values"].float(), atol=1e-5, rtol=0)


def test_a_real_frame_costs_seventy_tokens():
    h, w = fit_pixels(480, 640, CONTRACT["min_pixels"], CONTRACT["max_pixels"], 28)
    assert h // 28 * (w // 28) == 70


def test_features_equal_transformers_and_ignore_company(policy):
    frames = pictures(3) + pictures(2, 84, 112)
    ours = policy.encode_frames(frames)
    pixels, grids = pixel_values(frames, policy)
    theirs = policy.model.model.get_image_features(pixels, grids, return_dict=True).pooler_output
    for a, b, grid in zip(ours, theirs, grids):
        assert a.shape[:2] == (grid[1] // 2, grid[2] // 2)
        torch.testing.assert_close(a.flatten(0, 1), b, atol=1e-5, rtol=1e-4)
    alone = policy.encode_frames(frames[4:])[0]
    torch.testing.assert_close(alone, ours[4], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- tokens and positions


def test_prompt_equals_the_chat_template_and_rope_index(policy):
    frames = pictures(3) + pictures(1, 84, 140)
    prompt = make_prompt(policy, frames)
    text = window_prompt(texts()[0], 3, policy.contract)
    chat = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    for f in prompt.features:
        n = f.shape[0] * f.shape[1]
        chat = chat.replace("<image>", f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>", 1)
    assert prompt.ids == policy.tokenizer(chat)["input_ids"]
    ids = torch.tensor([prompt.ids])
    inputs = hf_inputs(policy, ids, frames)
    want, _ = policy.model.model.get_rope_index(ids, inputs["mm_token_type_ids"],
                                                inputs["image_grid_thw"])
    assert torch.equal(prompt.positions, want[:, 0])


def test_an_action_phrase_is_one_token_of_tiny(policy):
    ids = policy._encode(write_plan([1, 2, 3, 0, 0, 0], policy.phrases))
    assert len(ids) == 6
    assert policy.tokenizer.decode(ids) == write_plan([1, 2, 3, 0, 0, 0], policy.phrases)


@pytest.mark.parametrize("text", ["go <image> left", "go <|im_end|> left"])
def test_reserved_marks_in_an_instruction_are_refused(text):
    with pytest.raises(UserError, match="reserved"):
        window_prompt(text, 0, CONTRACT30)


def test_placeholders_and_frames_must_agree(policy):
    with pytest.raises(UserError, match="2 <image> placeholders for 1 frames"):
        policy.prompt("<image><image>", policy.encode_frames(pictures(1)))


# ---------------------------------------------------------------- log-probabilities


PLANS = ([1, 2, 3, 0, 0, 0], [1] * 6, [2, 0], [3, 3, 1, 1])


def test_logps_equal_transformers(policy):
    """Prompts of different lengths, sizes and words, answers of different lengths, in one batch."""
    sets = [pictures(1), pictures(4, seed=1), pictures(2, 84, 112, seed=2), pictures(3, seed=3)]
    prompts = [make_prompt(policy, f, texts()[i // 2]) for i, f in enumerate(sets)]
    ids, mask = policy.answers([write_plan(p, policy.phrases) for p in PLANS])
    ours = policy.logps(prompts, ids, mask)
    for prompt, frames, row, m, got in zip(prompts, sets, ids, mask, ours):
        torch.testing.assert_close(got[m], hf_logps(policy, prompt, frames, row[m]),
                                   atol=1e-5, rtol=1e-5)
        assert (got[~m] == 0).all()


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_prompt_equals_separate_rows(policy, checkpointing):
    """One prefix and G suffixes, words shared between prompts: same loss, same gradient."""
    decisions = [Decision(texts()[0], (0, 1, 2), None), Decision(texts()[0], (1, 2), None)]
    frames = dict(enumerate(pictures(3)))
    answers = [write_plan(p, policy.phrases) for p in PLANS]
    ids, mask = policy.answers(answers)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    policy.checkpointing = checkpointing
    shared = policy(decisions, frames, ids, mask, group_size=2)
    got = gradients(policy, (shared * weight).sum())
    policy.checkpointing = False

    loss, rows = 0, []
    for i in range(4):
        d = decisions[i // 2]
        rows.append(policy([d], {k: frames[k] for k in d.frames}, ids[i:i + 1], mask[i:i + 1])[0])
        loss = loss + (rows[-1] * weight[i]).sum()
    want = gradients(policy, loss)
    torch.testing.assert_close(shared, torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert (got - want).norm() / want.norm() < 1e-5


def test_banned_tokens_have_no_probability(policy):
    prompt = make_prompt(policy, pictures(2))
    ids = torch.arange(len(policy.tokenizer))[:, None]
    logps = policy.logps([prompt], ids, torch.ones_like(ids, dtype=torch.bool),
                         group_size=len(ids))[:, 0]
    assert torch.isinf(logps[policy.banned]).all()
    assert abs(logps.exp().sum().item() - 1) < 1e-4


# ---------------------------------------------------------------- sampling


def test_greedy_equals_transformers_generate(wordy):
    sets = [pictures(2), pictures(4, seed=5)]
    prompts = [make_prompt(wordy, f) for f in sets]
    ours = wordy.generate(prompts, max_new_tokens=20)
    for i, (prompt, frames) in enumerate(zip(prompts, sets)):
        ids = torch.tensor([prompt.ids])
        want = wordy.model.generate(**hf_inputs(wordy, ids, frames), do_sample=False,
                                    max_new_tokens=20, suppress_tokens=wordy.banned.tolist())
        got = ours.completion_ids[i][ours.completion_mask[i]]
        assert torch.equal(got, want[0, ids.shape[1]:][:len(got)])


def test_drafting_changes_the_passes_and_nothing_else(wordy):
    """The same uniform numbers give the same tokens: drafted and plain are one distribution."""
    prompts = [make_prompt(wordy, pictures(2)), make_prompt(wordy, pictures(3, seed=4))]
    kwargs = dict(group_size=16, temperature=1.0, seeds=[3, 4], max_new_tokens=70)
    wild = [wordy.generate(prompts, draft=d, **kwargs) for d in (True, False)]
    assert torch.equal(wild[0].completion_ids, wild[1].completion_ids)
    learn_plans(wordy)
    tame = [wordy.generate(prompts, draft=d, **kwargs) for d in (True, False)]
    assert torch.equal(tame[0].completion_ids, tame[1].completion_ids)
    assert tame[0].texts == tame[1].texts
    greedy = [wordy.generate(prompts[:1], draft=d, max_new_tokens=70) for d in (True, False)]
    assert greedy[0].texts == greedy[1].texts
    assert greedy[0].passes <= 8 < 40 < greedy[1].passes, "54 token-by-token passes become 7"


def test_samples_follow_the_log_probabilities(policy):
    """Chi-square of 4,000 drafted samples against the exact distribution of the first token."""
    prompt = make_prompt(policy, pictures(2))
    n = 4000
    rollout = policy.generate([prompt], group_size=n, temperature=1.3, seeds=[0], max_new_tokens=1)
    vocabulary = torch.arange(len(policy.tokenizer))[:, None]
    p = policy.logps([prompt], vocabulary, torch.ones_like(vocabulary, dtype=torch.bool),
                     group_size=len(vocabulary), temperature=1.3)[:, 0].exp()
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(p)).double()
    big = p * n >= 5
    observed = torch.cat((counts[big], counts[~big].sum()[None]))
    expected = torch.cat((p[big], p[~big].sum()[None])).double().detach() * n
    chi2 = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = int(big.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    assert not set(rollout.completion_ids.flatten().tolist()) & set(policy.banned.tolist())


def test_a_sample_does_not_depend_on_its_batch(policy):
    prompts = [make_prompt(policy, pictures(n, seed=n), texts()[n]) for n in (1, 2, 3)]
    together = policy.generate(prompts, group_size=2, temperature=1.0, seeds=[7, 8, 9])
    for i, prompt in enumerate(prompts):
        alone = policy.generate([prompt], group_size=2, temperature=1.0, seeds=[7 + i])
        assert alone.texts == together.texts[2 * i:2 * i + 2]


def test_sampled_tokens_have_the_log_probabilities_they_were_drawn_with(policy):
    """generate()'s cached pass and logps()' training pass are one distribution."""
    prompt = make_prompt(policy, pictures(3))
    rollout = policy.generate([prompt], group_size=4, temperature=0.7, seeds=[1], max_new_tokens=9)
    a = policy.logps([prompt], rollout.completion_ids, rollout.completion_mask, 4, 0.7)
    b = torch.cat([policy.logps([prompt], i[None], m[None], 1, 0.7) for i, m in
                   zip(rollout.completion_ids, rollout.completion_mask)])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_whole_distribution(policy):
    """Against the sum over all tokens that could stand at the first and at the second place."""
    prompt = make_prompt(policy, pictures(2))
    ids = torch.tensor([[5, 9, 7]])
    logps, likeliest, entropy = policy.logps([prompt], ids, torch.ones(1, 3, dtype=torch.bool),
                                             temperature=1.3, with_stats=True)
    v = len(policy.tokenizer)
    all_second = torch.stack((torch.full((v,), 5), torch.arange(v)), dim=1)
    for place, vocabulary in enumerate((torch.arange(v)[:, None], all_second)):
        table = policy.logps([prompt], vocabulary, torch.ones_like(vocabulary, dtype=torch.bool),
                             v, temperature=1.3)[:, place].detach()
        allowed = table.isfinite()                              # the banned ids are not
        expected = -(table[allowed].exp() * table[allowed]).sum()
        assert entropy[0, place].item() == pytest.approx(expected.item(), rel=1e-5)
        assert likeliest[0, place] == (table.argmax() == ids[0, place])
    assert torch.equal(logps, policy.logps([prompt], ids, torch.ones(1, 3, dtype=torch.bool),
                                           temperature=1.3)) and not entropy.requires_grad


# ---------------------------------------------------------------- disk


def test_a_saved_policy_is_a_hugging_face_folder(policy, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    save_policy(policy, str(tmp_path))
    again = load_policy(str(tmp_path))
    assert again.contract == policy.contract
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name
    prompt = make_prompt(policy, pictures(2))
    assert make_prompt(again, pictures(2)).ids == prompt.ids
    theirs = AutoModelForImageTextToText.from_pretrained(str(tmp_path))
    ids = torch.tensor([prompt.ids])
    inputs = hf_inputs(policy, ids, pictures(2))
    torch.testing.assert_close(theirs(**inputs).logits, policy.model(**inputs).logits)
    tokens = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "A. Move forward 25 cm, D. Stop, go to the sofa"
    assert tokens(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert json.load(open(os.path.join(tmp_path, "nav.json")))["turn_deg"] == 30
    assert not os.path.exists(tmp_path / ".saving")


def test_another_prompt_version_is_refused(policy, tmp_path):
    save_policy(policy, str(tmp_path))
    (tmp_path / "nav.json").write_text(json.dumps(dict(policy.contract, prompt="window-0")))
    with pytest.raises(UserError, match="prompt is 'window-0' and this code supports 'window-1'"):
        load_policy(str(tmp_path))


def test_tiny_is_deterministic():
    a, b = (load_policy("tiny", contract=CONTRACT30, texts=texts(), seed=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert Counter(map(type, a.modules()))[PatchProjection] == 1
    assert isinstance(a, Policy)


def test_all_of_a_policy_lies_on_the_device_that_was_asked_for(policy, tmp_path):
    """Ids that the policy may not write are a buffer of ours, outside transformers' model."""
    save_policy(policy, str(tmp_path))
    elsewhere = load_policy(str(tmp_path), device="meta")
    assert {x.device.type for x in [*elsewhere.parameters(), *elsewhere.buffers()]} == {"meta"}
    assert "banned" in dict(elsewhere.named_buffers())


def test_a_missing_model_is_an_error_of_one_sentence():
    with pytest.raises(UserError, match="hf download Qwen/Qwen2-VL-2B-Instruct"):
        load_policy("Qwen2-VL-2B")


# ---------------------------------------------------------------- folders that are not whole


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_policy(policy, str(folder))
    return folder


def copy_of(saved, folder, tensors=None, **changes):
    """A copy of a saved policy: tensors, a function that changes the state dict in place; other
    names, a JSON file's (without its end), with a function that changes its content in place."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(saved, folder)
    if tensors:
        state = load_file(folder / "model.safetensors")
        tensors(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, change in changes.items():
        content = json.loads((folder / f"{name}.json").read_text())
        change(content)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def refused(folder, *words):
    with pytest.raises(UserError) as told:
        load_policy(folder)
    for word in (folder, *words):
        assert word in str(told.value)


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize("change,words", [
    (lambda s: s.pop(NORM), ["lack", "layers.1.post_attention_layernorm"]),
    (lambda s: [s.pop(k) for k in list(s) if "visual.blocks.1" in k], ["lack", "and 9 more"]),
    (lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(64)}),
     ["hold", "q_norm"]),
    (lambda s: s.update({NORM: torch.ones(64)}), ["post_attention_layernorm", "(64,)", "(128,)"]),
    (lambda s: s.update({"model.embed_tokens.weight": s["model.embed_tokens.weight"][:-8]}),
     ["embed_tokens.weight", "by config.json (vocab_size"]),
    (lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}),
     ["tie_word_embeddings", "lm_head.weight of its own"]),
    (lambda s: s[NORM].fill_(torch.nan), ["layers.1.post_attention_layernorm", "not finite"]),
    (lambda s: s["visual.merger.ln_q.bias"].view(-1)[3:4].fill_(torch.inf), ["ln_q.bias", "--lr"]),
])
def test_weights_that_are_not_whole_are_refused(saved, tmp_path, change, words):
    refused(copy_of(saved, tmp_path / "x", tensors=change), *words)


def both(change):
    """A change of text_config, as far as files have one."""
    return lambda config: change(config["text_config"])


@pytest.mark.parametrize("change,words", [
    (lambda c: c.update(tie_word_embeddings=False) or c["text_config"].update(
        tie_word_embeddings=False), ["lack lm_head.weight", "tie_word_embeddings is false"]),
    (both(lambda t: t.update(vocab_size=5000)), ["embed_tokens.weight", "(5000, 128)"]),
    (both(lambda t: t["rope_scaling"].update(type="yarn", rope_type="yarn", factor=4.0)),
     ["rope_scaling", "'yarn'"]),
    (both(lambda t: t.pop("rope_scaling") and t["rope_parameters"].update(
        rope_type="linear", factor=2.0)), ["rope_scaling", "'linear'"]),
    (both(lambda t: t["rope_scaling"].update(mrope_section=[8, 8, 8])), ["mrope_section", "32"]),
    (both(lambda t: t.update(use_sliding_window=True, sliding_window=8)), ["use_sliding_window"]),
    (both(lambda t: t.update(layer_types=["full_attention", "linear_attention", "full_attention"])),
     ["layer_types[1]", "linear_attention"]),
    (both(lambda t: t.update(head_dim=32)), ["head_dim is 32"]),
    (both(lambda t: t.update(num_attention_heads=3)), ["num_attention_heads 3"]),
    (both(lambda t: t.update(attention_dropout=0.1)), ["attention_dropout"]),
    (both(lambda t: t.update(attention_bias=False)), ["attention_bias"]),
    (lambda c: c.update(quantization_config={"quant_method": "awq"}), ["quantization_config"]),
    (lambda c: c.update(model_type="qwen3_5"), ["is a qwen3_5"]),
    (lambda c: c.update(image_token_id=7), ["image_token_id 7"]),
    (lambda c: c["vision_config"].update(patch_size=16), ["patch_embed", "(64, 3, 2, 16, 16)"]),
    (lambda c: c["vision_config"].update(spatial_merge_size=4), ["merger.mlp.0", "(1024,)"]),
    (lambda c: c["vision_config"].update(hidden_size=64), ["merger.mlp.2", "(64,)"]),
    (lambda c: c["vision_config"].update(temporal_patch_size=4), ["temporal_patch_size is 4"]),
])
def test_a_configuration_that_needs_another_forward_pass_is_refused(saved, tmp_path, change, words):
    refused(copy_of(saved, tmp_path / "x", config=change), *words)


@pytest.mark.parametrize("tied", [True, False])
def test_the_published_form_of_a_config_loads(policy, saved, tmp_path, tied):
    """Qwen2-VL's own config.json is flat and in the words of transformers 4; the 7B is untied."""
    def flatten(config):
        text = config.pop("text_config")
        for key in ("rope_parameters", "layer_types", "model_type", "dtype"):
            text.pop(key, None)
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
        config.update(text, sliding_window=32768, max_window_layers=28, tie_word_embeddings=tied)
        vision = config["vision_config"]
        for key in ("rope_parameters", "hidden_act", "model_type", "in_channels"):
            vision.pop(key)
        vision.update(in_chans=3, spatial_patch_size=14)

    def head(state):
        if not tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(1).contiguous()
    loaded = load_policy(copy_of(saved, tmp_path / "x", tensors=head, config=flatten))
    frames, (ids, _) = pictures(2), policy.answers(["A. Move forward 25 cm"])
    prompt = make_prompt(loaded, frames)
    with torch.no_grad():
        ours = loaded.logps([prompt], ids, torch.ones_like(ids, dtype=torch.bool))[0]
        before = policy.logps([make_prompt(policy, frames)], ids,
                              torch.ones_like(ids, dtype=torch.bool))[0]
    torch.testing.assert_close(ours, hf_logps(loaded, prompt, frames, ids[0]), atol=2e-5, rtol=0)
    assert torch.allclose(ours, before, atol=1e-5) == tied
    (tmp_path / "again").mkdir()
    save_policy(loaded, str(tmp_path / "again"))
    again = load_policy(str(tmp_path / "again"))
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)


def test_settings_that_transformers_modules_carry_out_are_obeyed(policy, saved, tmp_path):
    """Activations, norms and the tower's rotation are the library's own modules: any value, and the
    same answer."""
    def other(config):
        config["text_config"].update(hidden_act="gelu", rms_norm_eps=0.1)
        config["vision_config"].update(hidden_act="silu")
        config["vision_config"]["rope_parameters"].update(rope_theta=100.0)
    changed = load_policy(copy_of(saved, tmp_path / "x", config=other))
    frames = pictures(2)
    prompt = make_prompt(changed, frames)
    ids, mask = changed.answers(["A. Move forward 25 cm"])
    ours = changed.logps([prompt], ids, mask)[0]
    torch.testing.assert_close(ours, hf_logps(changed, prompt, frames, ids[0]), atol=2e-5, rtol=0)
    with torch.no_grad():
        assert (policy.logps([make_prompt(policy, frames)], ids, mask)[0] - ours).abs().max() > 1e-3


@pytest.mark.parametrize("base", [False, True])
def test_an_adapter_is_not_taken_for_a_model(saved, tmp_path, base):
    folder = copy_of(saved, tmp_path / "x") if base else str(tmp_path)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        f.write('{"peft_type": "LORA"}')
    refused(folder, "LoRA adapter", "merge")


def rename_token(path, mark):
    path.write_text(path.read_text().replace(mark, "<|other|>"))


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|im_end|>"])
def test_a_tokenizer_without_a_mark_is_refused(saved, tmp_path, mark):
    folder = copy_of(saved, tmp_path / "x")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        rename_token(tmp_path / "x" / name, mark)
    refused(folder, mark, "copy the tokenizer's files")


def test_a_tokenizer_of_more_words_than_the_weights_is_refused(saved, tmp_path):
    def one_more(tokenizer):
        added = tokenizer["added_tokens"]
        added.append(dict(added[-1], id=2000, content="<x>"))
    folder = copy_of(saved, tmp_path / "x", tokenizer=one_more)
    refused(folder, "the weights embed")


@pytest.mark.parametrize("template", [None, "{{ messages[0]['words'] }}",
                                      "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_chat_template_that_loses_the_words_is_refused(saved, tmp_path, template):
    folder = copy_of(saved, tmp_path / "x")
    os.remove(tmp_path / "x" / "chat_template.jinja")
    if template:
        (tmp_path / "x" / "chat_template.jinja").write_text(template)
    refused(folder, "chat template")


@pytest.mark.parametrize("content,words", [
    ("{", ["is not JSON"]), ("[]", ["holds no JSON object"]),
    ({"horizon": None}, ["horizon is None"]), ({"turn_deg": "15"}, ["turn_deg is '15'"]),
    ({"max_pixels": True}, ["max_pixels"]), ({"memory": {"name": "lsm"}}, ["memory"])])
def test_a_contract_that_is_not_whole_is_refused(saved, tmp_path, content, words):
    folder = copy_of(saved, tmp_path / "x")
    (tmp_path / "x" / "nav.json").write_text(
        content if isinstance(content, str) else json.dumps(dict(CONTRACT30, **content)))
    refused(folder, "nav.json", *words)


# ---------------------------------------------------------------- folders that others open


def test_what_was_loaded_is_what_is_saved(saved, tmp_path):
    """The picture's mean and std, the generation settings and the tokenizer's files go through."""
    def other(processor):
        processor.update(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.5, 1.0])
    folder = copy_of(saved, tmp_path / "x", preprocessor_config=other, generation_config=lambda g: (
        g.update(temperature=0.01, top_k=1, do_sample=True, repetition_penalty=1.05)))
    tokenizer = (tmp_path / "x" / "tokenizer.json").read_bytes()
    loaded = load_policy(folder)
    save_policy(loaded, str(tmp_path / "again"))
    again = tmp_path / "again"
    processor = json.loads((again / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5, 0.5, 0.5] and processor["max_pixels"] == 65536
    settings = json.loads((again / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.05 and settings["temperature"] == 0.01
    assert (again / "tokenizer.json").read_bytes() == tokenizer
    frame = pictures(1)[0]
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    want = Qwen2VLImageProcessorPil.from_pretrained(str(again))([frame], return_tensors="pt")
    theirs = loaded.model.model.get_image_features(
        want["pixel_values"], want["image_grid_thw"], return_dict=True).pooler_output[0]
    torch.testing.assert_close(loaded.encode_frames([frame])[0].flatten(0, 1), theirs,
                               atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change,words", [
    ({"do_rescale": False}, "do_rescale is False"), ({"image_std": [1, 1]}, "image_std"),
    ({"image_std": [1, 0, 1]}, "a 0"), ({"image_mean": ["a", 1, 1]}, "image_mean"),
    ({"patch_size": 16}, "patch_size is 16")])
def test_pictures_that_we_would_prepare_otherwise_are_refused(saved, tmp_path, change, words):
    folder = copy_of(saved, tmp_path / "x", preprocessor_config=lambda p: p.update(change))
    with pytest.raises(UserError, match=words):
        load_policy(folder)


def test_files_follow_the_umask(policy, tmp_path):
    before = os.umask(0o027)
    try:
        save_policy(policy, str(tmp_path))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o640}


def test_the_chat_template_takes_lists_of_parts(policy):
    """What a server is sent (words and pictures, in order) gives the ids that we train on."""
    frames = pictures(2)
    prompt = make_prompt(policy, frames)
    text = window_prompt(texts()[0], 1, policy.contract)
    parts = []
    for words in text.split("<image>"):
        parts += [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": "x"}}]
    parts[1]["type"] = "image"

    def render(content):
        return policy.tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                                    tokenize=False, add_generation_prompt=True)
    chat = render(parts[:-1])
    assert chat == render(text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"))
    rows = [f.shape[0] * f.shape[1] for f in policy.encode_frames(frames)]
    for n in rows:                             # a processor writes one mark for each feature
        chat = chat.replace("<|image_pad|>", "<mark>" * n, 1)
    ids = policy.tokenizer(chat.replace("<mark>", "<|image_pad|>"))["input_ids"]
    assert ids == prompt.ids


OTHERS = """
import json, sys, torch, transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer
folder, inputs, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
asked = torch.load(inputs)
if transformers.__version__ < "5":
    asked.pop("mm_token_type_ids")
tokenizer = AutoTokenizer.from_pretrained(folder)
text = asked.pop("text")
with torch.no_grad():
    torch.save({"logits": model(**asked).logits, "ids": tokenizer(text)["input_ids"],
                "penalty": model.generation_config.repetition_penalty}, out)
"""


# What transformers 4 needs that is not here already, or here in another version.
WITH_VERSION_4 = ("tokenizers==0.22.1", "huggingface_hub==0.36.0", "requests", "urllib3", "idna",
                  "certifi", "charset_normalizer")


def other_transformers(version, cache):
    """A folder for PYTHONPATH with that version: $TRANSFORMERS_4573 (say), or pip's, kept in
    pytest's cache; skips the test where neither is to be had."""
    variable = "TRANSFORMERS_" + version.replace(".", "")
    if variable in os.environ:
        return os.environ[variable]
    folder = cache.mkdir(f"transformers-{version}")
    if not (folder / "done").exists():
        packages = [f"transformers=={version}", *WITH_VERSION_4] if version < "5" else []
        done = packages and subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "0",
             "--timeout", "5", "--upgrade", "--target", folder, *packages], capture_output=True)
        if not packages or done.returncode:
            pytest.skip(f"needs transformers {version}: set {variable} to a folder made with "
                        f"pip install --target FOLDER transformers=={version}")
        (folder / "done").touch()
    return str(folder)


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("version", ["4.57.3", "5.17.0"])
def test_other_versions_of_transformers_compute_the_same(tmp_path, name, version, pytestconfig):
    path = other_transformers(version, pytestconfig.cache)
    tiny = load_policy(name, contract=CONTRACT30, texts=texts())
    save_policy(tiny, str(tmp_path / "from"))
    loaded = load_policy(copy_of(
        tmp_path / "from", tmp_path / "x",
        generation_config=lambda g: g.update(repetition_penalty=1.05),
        tokenizer_config=lambda t: t.update(tokenizer_class="TokenizersBackend",
                                            extra_special_tokens=["<|im_start|>"])))
    save_policy(loaded, str(tmp_path / "saved"))
    frames = pictures(2) + pictures(1, 84, 112)
    prompt = make_prompt(loaded, frames)
    text = loaded.tokenizer.decode(prompt.ids) + "A. Move forward 25 cm, go to the sofa"
    inputs = hf_inputs(loaded, torch.tensor([prompt.ids]), frames)
    torch.save({**inputs, "text": text}, tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", OTHERS, tmp_path / "saved", tmp_path / "inputs.pt",
                           tmp_path / "out.pt"], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=path))
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        ours = loaded.model(**inputs).logits
    torch.testing.assert_close(theirs["logits"], ours, atol=1e-5, rtol=0)
    assert theirs["ids"] == loaded.tokenizer(text)["input_ids"]
    assert theirs["penalty"] == 1.05
