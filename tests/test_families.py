"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers' own models and image processor.

Every norm and bias is moved from 1 and 0 first, or one that was forgotten would not show.

Run it   python -m pytest tests/test_families.py
"""
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from PIL import Image
from policies import Decision, launch, log_of, make_prompt, pictures, texts
from test_model import CONTRACT30, PLANS, other_transformers
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import decoding
import model
import qwen
from activevln.dialog import DIALOG, Dialog
from checkpoint import TINY, load_policy, save_policy
from cli import UserError
from reward import write_plan

sys.path.insert(0, os.path.join(ROOT, "bench"))
import common  # noqa: E402, F401  (declares what a torchvision for CUDA lacks here)

torch.set_num_threads(1)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def perturbed(name, contract, **more):
    policy = load_policy(name, contract=contract, texts=texts(), **more)
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        if p.dim() == 1:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return policy


class Plain:
    """A saved policy as transformers loads it: an untouched model, and a PIL image processor."""

    def __init__(self, policy, folder):
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )
        save_policy(policy, str(folder))
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
        self.model = AutoModelForImageTextToText.from_pretrained(str(folder))
        self.image_token, self.banned = policy.image_token, policy.banned

    def pictures(self, frames):
        made = self.processor([Image.fromarray(f) for f in frames], return_tensors="pt")
        return made["pixel_values"].float(), made["image_grid_thw"]

    def inputs(self, ids, frames):
        pixels, grids = self.pictures(frames)
        return dict(input_ids=ids, pixel_values=pixels, image_grid_thw=grids,
                    mm_token_type_ids=(ids == self.image_token).int())

    def logps(self, ids, frames, n):
        """log p of the last n of ids, vision tokens banned."""
        ids = torch.tensor([ids])
        logits = self.model(**self.inputs(ids, frames)).logits[0, -n - 1:-1]
        logps = logits.index_fill(-1, self.banned, -torch.inf).log_softmax(-1)
        return logps.gather(1, ids[0, -n:, None])[:, 0]

    def generate(self, ids, frames, model=None):
        """Greedy, 20 tokens."""
        ids = torch.tensor([ids])
        found = (model or self.model).generate(
            **self.inputs(ids, frames), do_sample=False, max_new_tokens=20,
            suppress_tokens=self.banned.tolist())
        return found[0, ids.shape[1]:]


@pytest.fixture(scope="module", params=list(TINY))
def policy(request):
    return perturbed(request.param, CONTRACT30, atomic_patterns=[])


@pytest.fixture(scope="module")
def plain(policy, tmp_path_factory):
    return Plain(policy, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=list(TINY))
def talker(request):
    return perturbed(request.param, dict(DIALOG, turn_deg=30))


@pytest.fixture(scope="module")
def plain_talker(talker, tmp_path_factory):
    return Plain(talker, tmp_path_factory.mktemp("talker"))


SIZES = pictures(4) + pictures(4, 84, 140, seed=1) + pictures(2, 120, 60, seed=2)
SETS = [pictures(1), pictures(4, seed=1), pictures(2, 84, 112, seed=2), pictures(3, seed=3)]


def gradient(module, loss):
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- pictures and positions


@pytest.mark.parametrize("h,w", [(480, 640), (56, 56), (100, 30), (720, 1280), (224, 224)])
def test_sizes_and_pixels_are_the_processors(policy, plain, h, w):
    from qwen import patchify
    frame, patch = pictures(1, h, w)[0], policy.image_format.patch
    pixels, grid = plain.pictures([frame])
    small = policy.resize(frame)
    assert [1, small.shape[0] // patch, small.shape[1] // patch] == grid[0].tolist()
    ours = patchify(torch.from_numpy(small.copy())[None], policy.image_format)[0]
    both = pixels.view(len(pixels), 3, 2, patch * patch)          # a still frame, twice
    for half in both.unbind(2):
        close(ours.view(len(ours), 3, -1), half)


def test_features_are_the_towers_with_every_level(policy, plain):
    """Ten frames of three sizes in one call; windows of several sizes, and a block without."""
    ours = policy.encode_frames(SIZES)
    pixels, grids = plain.pictures(SIZES)
    out = plain.model.model.visual(pixels, grid_thw=grids)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    assert len(levels) == (3 if policy.image_format.patch == 16 else 1)
    close(torch.cat([f.flatten(0, 1) for f in ours]), torch.cat(levels, dim=-1), atol=3e-5)
    assert [tuple(f.shape[:2]) for f in ours] == [(h // 2, w // 2) for _, h, w in grids.tolist()]


def test_positions_are_the_rope_index(policy, plain):
    frames = pictures(3) + pictures(1, 84, 140)
    prompt = make_prompt(policy, frames)
    inputs = plain.inputs(torch.tensor([prompt.ids]), frames)
    want, _ = plain.model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"],
                                               inputs["image_grid_thw"])
    assert torch.equal(prompt.positions, want[:, 0])


def test_frame_sizes_are_those_of_qwen_vl_utils(policy):
    """Its messages say min_pixels and max_pixels as nav.json does, and an `image` as we do."""
    try:
        import qwen_vl_utils as utils
    except Exception as error:          # without torchvision, or with one for another torch
        pytest.skip(f"qwen-vl-utils does not import ({error})")
    limits = {key: policy.contract[key] for key in ("min_pixels", "max_pixels")}
    for frame in (*SIZES[::4], *pictures(1, 480, 640), *pictures(1, 1000, 90)):
        element = {"type": "image", "image": Image.fromarray(frame), **limits}
        theirs = np.asarray(utils.fetch_image(element, policy.image_format.patch))
        ours = policy.resize(frame)
        assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1


# ---------------------------------------------------------------- log-probabilities


def prompts_and_answers(policy):
    prompts = [make_prompt(policy, f, texts()[i // 2]) for i, f in enumerate(SETS)]
    ids, mask = policy.answers([write_plan(p, policy.phrases) for p in PLANS])
    return prompts, ids, mask


def test_logps_and_gradients_are_transformers(policy, plain):
    """Prompts of different lengths, sizes and words, answers of different lengths, in a batch."""
    prompts, ids, mask = prompts_and_answers(policy)
    ours = policy.logps(prompts, ids, mask)
    theirs = [plain.logps(p.ids + row[m].tolist(), frames, int(m.sum()))
              for p, frames, row, m in zip(prompts, SETS, ids, mask)]
    for got, want, m in zip(ours, theirs, mask):
        close(got[m], want)
        assert (got[~m] == 0).all()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    mine = gradient(policy.model, (ours.sum(1) * weights).sum())
    want = gradient(plain.model, sum(w * t.sum() for w, t in zip(weights, theirs)))
    assert mine.shape == want.shape and relative(mine, want) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_shared_prompt_equals_separate_rows(policy, plain, checkpointing, sampled):
    """One prompt and its G answers as branches of a row; sampled: over a prefill, as GRPO does."""
    decisions = [Decision(texts()[0], (0, 1, 2), None), Decision(texts()[1], (1, 2), None)]
    frames = dict(enumerate(pictures(3)))
    ids, mask = policy.answers([write_plan(p, policy.phrases) for p in PLANS])
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    policy.checkpointing = checkpointing
    prompts = policy.build_prompts(decisions, frames)
    prefill = policy._prefill(prompts) if sampled else None
    shared = policy.logps(prompts, ids, mask, 2, 1.0, prefill)
    got = gradient(policy.model, (shared * weight).sum())
    policy.checkpointing = False
    theirs = [plain.logps(prompts[i // 2].ids + ids[i][mask[i]].tolist(),
                          [frames[k] for k in decisions[i // 2].frames], int(mask[i].sum()))
              for i in range(4)]
    for row, m, want in zip(shared, mask, theirs):
        close(row[m], want)
    want = gradient(plain.model, sum((t * w[m]).sum() for t, w, m in zip(theirs, weight, mask)))
    assert relative(got, want) < 1e-5


def need_inductor():
    if not os.environ.get("SLOW") or not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor compiles for a minute: it needs g++ and SLOW=1")


@pytest.mark.parametrize("name, backend", [*((name, "aot_eager") for name in TINY),
                                           ("tiny-qwen3", "inductor")])
def test_compiled_layers_equal_the_others(name, backend):
    """And what the first batch has compiled serves batches of other lengths and sizes, and layers
    that are run again. aot_eager makes the same graphs without a compiler."""
    from torch._dynamo.backends.registry import lookup_backend
    if backend == "inductor":
        need_inductor()
    policy, made, calls = perturbed(name, CONTRACT30, atomic_patterns=[]), [], []

    def counting(graph, inputs):
        made.append(graph)
        compiled = lookup_backend(backend)(graph, inputs)
        return lambda *args: calls.append(graph) or compiled(*args)

    def run(n):
        calls.clear()
        prompts, ids, mask = prompts_and_answers(policy)
        logps = policy.logps(prompts[:n], ids[:n], mask[:n])
        return logps.detach(), gradient(policy.model, logps.sum()), len(calls)
    want = {n: run(n)[:2] for n in (2, 4, 1, 3)}
    policy.compile_layers(counting)
    for n, policy.checkpointing in [*((n, on) for on in (False, True) for n in (2, 4, 1)),
                                    (3, True), (3, False)]:
        before = len(made)
        logps, grad, n_calls = run(n)
        close(logps, want[n][0])
        assert relative(grad, want[n][1]) < 1e-5
        # Of a decoder layer: two norms, what is before and after attention, MLP; two passes. And
        # the tower's.
        assert n_calls > 2 * 5 * len(policy.lm.layers) * (1 + policy.checkpointing)
    assert len(made) == before < 30


def block_masks_equal_the_others(policy, runs, monkeypatch):
    """flex_attention, as GPUs run long passes under --compile. Uncompiled it does on a CPU what the
    kernel does on a GPU; only a check of the device stands before its backward pass."""
    from torch.nn.attention import flex_attention as flex

    def results():
        numbers = [logps() for logps in runs]
        return [(x.detach(), gradient(policy.model, x.sum())) for x in numbers]
    want, empty = results(), []
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(qwen, "BLOCK", 16)
    monkeypatch.setattr(qwen, "block_attention", lambda: lambda *args, **kwargs: (
        empty.append(kwargs["block_mask"].sparsity()) or flex.flex_attention(*args, **kwargs)))
    monkeypatch.setattr(policy, "block_masks", True)
    for (logps, grad), (want_logps, want_grad) in zip(results(), want):
        close(logps, want_logps)
        assert relative(grad, want_grad) < 1e-5
    assert len(empty) >= 2 * len(policy.lm.layers) and max(empty) > 10, "% of the blocks"


def test_block_masks_of_shared_prompts(policy, monkeypatch):
    def logps(n, group_size):
        prompts, ids, mask = prompts_and_answers(policy)
        return policy.logps(prompts[:n], ids, mask, group_size)
    block_masks_equal_the_others(policy, [lambda: logps(4, 1), lambda: logps(2, 2)], monkeypatch)


def test_block_masks_of_packed_dialogs(talker, monkeypatch):
    dialogs, frames = dialogs_of(talker)
    other = talker._encode(ANSWERS[0]) + [talker.end_token]
    branches = [[(1, other), (1, other)], [(0, other)], []]
    block_masks_equal_the_others(talker, [lambda: talker(dialogs, frames),
                                          lambda: talker(dialogs, frames, branches)], monkeypatch)


@torch.no_grad()
def test_block_masks_compiled(monkeypatch):
    """The kernel itself, forward, as inductor makes it for a CPU: one for all lengths."""
    need_inductor()
    policy = perturbed("tiny", CONTRACT30, atomic_patterns=[])
    prompts = [make_prompt(policy, pictures(n, 84, 140)) for n in (10, 12, 11)]
    ids, mask = policy.answers([write_plan(p, policy.phrases) for p in PLANS[:3]])
    want = [policy.logps(prompts[:n], ids[:n], mask[:n]) for n in (3, 2)]
    compiled, calls = qwen.block_attention(), []
    monkeypatch.setattr(qwen, "block_attention", lambda: lambda *args, **kwargs: (
        calls.append(args[0].shape[2]) or compiled(*args, **kwargs)))
    policy.block_masks = True
    for n, logps in zip((3, 2), want):
        close(policy.logps(prompts[:n], ids[:n], mask[:n]), logps)
    assert len(calls) == 2 * len(policy.lm.layers) and min(calls) >= qwen.BLOCK


def test_answers_of_one_token_need_no_pass_of_their_own(policy):
    prompts = [make_prompt(policy, pictures(2)), make_prompt(policy, pictures(1))]
    ids, mask = torch.full((4, 1), policy.end_token), torch.ones(4, 1, dtype=torch.bool)
    a = policy.logps(prompts, ids, mask, 2)
    close(a, policy.logps(prompts, ids, mask, 2, 1.0, policy._prefill(prompts)))


def parameter_calls(policy, run):
    """The modules with parameters of their own that a pass calls, in order."""
    calls, hooks = [], []
    for name, module in policy.named_modules():
        if list(module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(lambda *_, name=name: calls.append(name)))
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_the_calls_of_modules_do_not_depend_on_the_data(policy):
    """ZeRO-3 makes each a collective, and ranks hold different frames, words and answers."""
    def one():
        policy([Decision(texts()[0], (0,), None)], {0: pictures(1)[0]},
               *policy.answers([write_plan([1] * 6, policy.phrases)]))

    def many():
        decisions = [Decision(texts()[i], tuple(range(i + 2)), None) for i in range(3)]
        policy(decisions, dict(enumerate(SIZES[2:6])),
               *policy.answers([write_plan(p, policy.phrases) for p in PLANS[:3]]))
    calls = parameter_calls(policy, one)
    assert calls == parameter_calls(policy, many) and len(calls) > 70


# ---------------------------------------------------------------- sampling


def test_greedy_is_generate_of_a_plain_and_of_our_own_model(policy, plain):
    prompts = [make_prompt(policy, f) for f in SETS[1:3]]
    ours = policy.generate(prompts, max_new_tokens=20)
    for i, (prompt, frames) in enumerate(zip(prompts, SETS[1:3])):
        got = ours.completion_ids[i][ours.completion_mask[i]]
        want = plain.generate(prompt.ids, frames)
        assert torch.equal(want, plain.generate(prompt.ids, frames, policy.model))
        assert torch.equal(got, want[:len(got)])


def test_drafted_samples_are_the_undrafted(policy):
    prompts = [make_prompt(policy, f) for f in SETS[:2]]
    kwargs = dict(group_size=16, temperature=0.8, seeds=[3, 4], max_new_tokens=40)
    a, b = (policy.generate(prompts, draft=draft, **kwargs) for draft in (True, False))
    assert torch.equal(a.completion_ids, b.completion_ids) and len(set(a.texts)) > 4
    alone = policy.generate(prompts[1:], draft=True, **dict(kwargs, seeds=[4]))
    assert alone.texts == a.texts[16:]


def test_passes_of_a_fixed_shape_write_the_same(policy, monkeypatch):
    """As they run on a GPU, here without its graph: buffers that do not grow are used again, for
    other prompts too, and where they are full the rest is run as ever."""
    prompts = [make_prompt(policy, f) for f in SETS[:3]]
    runs = [dict(prompts=prompts[:2], group_size=4, temperature=0.8, seeds=[3, 4]),
            dict(prompts=prompts[1:], group_size=4, temperature=0.8, seeds=[5, 6]),
            dict(prompts=prompts, draft=False, max_new_tokens=20)]
    want = [policy.generate(**run) for run in runs]
    monkeypatch.setattr(decoding, "ROOM", 64)          # for two passes or so
    monkeypatch.setattr(policy, "fixed_passes", {})
    for run, expected in zip(runs, want):
        got = policy.generate(**run)
        assert torch.equal(got.completion_ids, expected.completion_ids)
        assert got.passes == expected.passes
    assert [n for n, _ in policy.fixed_passes] == [2, 3]
    assert all(passes.graphs for passes in policy.fixed_passes.values())


def test_a_pass_of_a_fixed_shape_never_waits_for_the_device(policy, monkeypatch):
    """A CUDA graph cannot be made of a pass that reads a number back from the device, or whose
    shapes depend on one."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            used.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))
    used, run = [], decoding.FixedPasses._pass

    def watched(self, *inputs):
        with Watch():
            return run(self, *inputs)
    monkeypatch.setattr(decoding.FixedPasses, "_pass", watched)
    monkeypatch.setattr(policy, "fixed_passes", {})
    policy.generate([make_prompt(policy, SETS[0])], 2, 0.8, [1])
    assert "mm" in used or "addmm" in used
    assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero"} & set(used)


# ---------------------------------------------------------------- dialogs

ANSWERS = ["turn left 60 degrees, move forward 25 cm", "move forward 75 cm", "stop"]


def dialogs_of(talker):
    dialogs = [Dialog(texts()[i], tuple(range(n)), tuple(ANSWERS[-n:]), (True,) * n)
               for i, n in enumerate((3, 1, 2))]
    return talker.tokenize_answers(dialogs), dict(enumerate(pictures(3)))


def test_packed_dialogs_and_branches_equal_separate_ones(talker, plain_talker):
    """Against transformers, one dialog at a time; branches against dialogs that went that way."""
    dialogs, frames = dialogs_of(talker)
    ours = talker(dialogs, frames)
    want = []
    for row, dialog in zip(ours, dialogs):
        segment, _ = talker.dialog_tokens(dialog, talker.encode_frames(
            [frames[k] for k in dialog.frames]))
        turns = [talker.dialog_tokens(dialog._replace(
            answers=dialog.answers[:k], frames=dialog.frames[:k]), segment.features[:k])[0].ids
            for k in range(1, len(dialog.answers) + 1)]
        want.append(torch.cat([plain_talker.logps(ids, [frames[f] for f in dialog.frames[:k]],
                                                  len(dialog.answers[k - 1]))
                               for k, ids in enumerate(turns, 1)]))
        close(row[:len(want[-1])], want[-1])
    got = gradient(talker.model, ours.sum())
    assert relative(got, gradient(plain_talker.model, sum(w.sum() for w in want))) < 1e-5
    other = talker._encode(ANSWERS[0]) + [talker.end_token]
    branched = talker(dialogs, frames, [[(1, other), (0, other)], [], [(1, other)]])
    for row, (i, turn) in zip(branched, ((0, 1), (0, 0), (2, 1))):
        went = dialogs[i]._replace(answers=(*dialogs[i].answers[:turn], other),
                                   frames=dialogs[i].frames[:turn + 1])
        close(row[:len(other)], talker([went], frames)[0][-len(other):])


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_cached_turns_equal_whole_dialogs(talker, plain_talker, monkeypatch, fixed):
    """Two dialogs at different turns, three answers each: greedy ones as generate() writes them
    over the whole, sampled ones without regard to their company. fixed: passes of a fixed shape."""
    monkeypatch.setattr(talker, "fixed_passes", {} if fixed else None)
    caches, given = [None, None], [[], []]
    features = talker.encode_frames(pictures(4))
    for k in range(2):
        groups, caches = talker.generate_turn(caches, texts()[:2], features[k:k + 2], 3,
                                              max_new_tokens=20)
        for i, group in enumerate(groups):
            assert group[0] == group[1] == group[2]
            dialog = Dialog(texts()[i], (), (*given[i], []), ())
            ids = talker.dialog_tokens(dialog, features[i:i + k + 1])[0].ids
            want = plain_talker.generate(ids, pictures(4)[i:i + k + 1])
            assert group[0] == want[:len(group[0])].tolist()
            given[i].append(group[0])
        sampled = [talker.generate_turn(caches[i:], texts()[i:2], features[2 + i:4], 4, 1.0,
                                        [5, 6][i:])[0][-1] for i in (0, 1)]
        assert sampled[0] == sampled[1]


# ---------------------------------------------------------------- numbers, disk, refusals


def test_bf16_keeps_the_frequencies_of_positions(policy):
    """.to(bfloat16), and DeepSpeed, round every buffer; angles of far tokens would be wrong."""
    half = load_policy({v: k for k, v in TINY.items()}[policy.model.config.model_type],
                       contract=CONTRACT30, texts=texts(), dtype="bfloat16")
    for (name, a), (_, b) in zip(half.named_buffers(), policy.named_buffers()):
        if "inv_freq" in name:
            assert a.dtype == torch.float32 and torch.equal(a, b), name
    assert half.dtype == half.encode_frames(pictures(1))[0].dtype == torch.bfloat16
    ids, mask = half.answers([write_plan([1] * 6, half.phrases)])
    assert half.logps([make_prompt(half, pictures(2))], ids, mask).isfinite().all()


def test_a_saved_policy_loads_as_it_was(policy, tmp_path):
    save_policy(policy, str(tmp_path))
    again = load_policy(str(tmp_path))
    assert again.image_format == policy.image_format
    prompts, ids, mask = prompts_and_answers(policy)
    with torch.no_grad():
        close(again.logps([make_prompt(again, SETS[2])], ids[:1], mask[:1]),
              policy.logps([make_prompt(policy, SETS[2])], ids[:1], mask[:1]))
    config = (tmp_path / "config.json").read_text()
    assert "navigator" not in config


def altered(policy, folder, change):
    save_policy(policy, str(folder))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("change,words", [
    (lambda c: c.update(model_type="qwen3_5"), "is a qwen3_5; this project drives"),
    (lambda c: c.update(model_type="llava"), "is a llava"),
    (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window is True"),
    (lambda c: c["text_config"].update(layer_types=["full_attention", "linear_attention"]),
     r"layer_types\[1\] is 'linear_attention'"),
    (lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[1, 1, 1]), "mrope_section"),
])
def test_what_packed_rows_cannot_do_is_refused(policy, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        load_policy(altered(policy, tmp_path, change))


def test_a_folder_without_its_pictures_settings_is_refused(policy, tmp_path):
    save_policy(policy, str(tmp_path))
    os.remove(tmp_path / "preprocessor_config.json")
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        load_policy(str(tmp_path))


def test_two_ranks_at_zero_3_equal_one(ego, tmp_path):
    """Deepstack and the learned position grid are modules that ZeRO-3 must gather, too."""
    flags = ["sft.py", "--data", ego, "--model", "tiny-qwen3", "--device", "cpu", "--dtype",
             "float32", "--batch-size", 16, "--steps-per-walk", 4, "--memory-budget", 3, "--lr",
             1e-4, "--max-steps", 3]
    in_process(*flags, "--out", tmp_path / "one")
    done = launch(["torch.distributed.run", "--standalone", "--nproc_per_node=2"], *flags, "--out",
                  tmp_path / "two", "--zero-stage", 3, "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert 0 < a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]


# ---------------------------------------------------------------- Qwen's real vocabulary

@pytest.fixture(scope="module")
def real_tokenizer(pytestconfig):
    """common.qwen_tokenizer(), kept by pytest."""
    tokenizer = common.qwen_tokenizer(str(pytestconfig.cache.mkdir("qwen-vocabulary")))
    return tokenizer or pytest.skip("needs Qwen's vocabulary: dashscope==2.0.2 is not to be had "
                                    "from PyPI")


def test_plans_and_moves_cost_what_the_docs_say(real_tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint, "tiny_tokenizer", lambda *_: real_tokenizer)
    policy = load_policy("tiny", contract=CONTRACT30)
    assert [real_tokenizer.convert_tokens_to_ids(mark) for mark in (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
        "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")] == [
            *range(151643, 151646), *range(151652, 151657)]

    def count(text):
        return len(policy._encode(text))
    assert [count(policy.phrases[a]) for a in (1, 2, 3)] == [8, 8, 8]
    plan = write_plan([1, 2, 3, 1, 2, 3], policy.phrases)
    assert count(plan) + 1 == 54
    assert policy.text(policy._encode(plan) + [policy.end_token]) == plan
    talker = load_policy("tiny", contract=dict(DIALOG, turn_deg=30))
    moves = ", ".join(["move forward 75 cm", "turn left 30 degrees", "turn right 90 degrees"])
    assert len(talker._encode(moves)) + 1 == 21

    frames = pictures(3)
    prompt = make_prompt(policy, frames)
    parts = []
    for words in model.window_prompt(texts()[0], 2, policy.contract).split("<image>"):
        parts += [{"type": "text", "text": words}, {"type": "image"}]
    chat = real_tokenizer.apply_chat_template([{"role": "user", "content": parts[:-1]}],
                                              tokenize=False, add_generation_prompt=True)
    chat = chat.replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert real_tokenizer(chat)["input_ids"] == prompt.ids

    ids = policy._encode(plan) + [policy.end_token]
    assert ids[1:8] == policy.draft(ids[:1])[:7], "one letter, and the rest of the phrase is forced"
    passes, written = 0, []
    while written != ids:                       # as _decode_loop would, if these tokens were drawn
        draft = policy.draft(written)
        right = next((k for k, (a, b) in enumerate(zip(draft, ids[len(written):])) if a != b),
                     len(draft))
        written, passes = ids[:len(written) + right + 1], passes + 1
    assert passes <= 8
    prompts = [prompt, make_prompt(policy, pictures(1))]
    a, b = (policy.generate(prompts, 2, 1.0, [1, 2], draft, 12) for draft in (True, False))
    assert torch.equal(a.completion_ids, b.completion_ids)


@pytest.mark.skipif("NESTED" in os.environ, reason="is the run that this test starts")
def test_all_this_holds_on_the_oldest_transformers(pytestconfig):
    path = other_transformers("5.17.0", pytestconfig.cache)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__], cwd=ROOT, capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=path, NESTED="1"))
    assert done.returncode == 0, done.stdout[-3000:]
