"""GRPO: its formulas against hand work, enumeration and autograd; its loop on a tiny policy."""
import doctest
import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import kill_when, slow
from PIL import Image
from policies import (
    gradients,
    learn_to_write,
    log_of,
    max_difference,
    relative_difference,
    run_on_two_ranks,
    weights_of,
)

import engine
import grpo
from checkpoint import load_policy, save_policy
from cli import UserError
from grpo import group_advantages, grpo_loss
from make_data import VlnEgo
from model import CONTRACT
from reward import time_decayed_reward, write_plan

torch.set_num_threads(1)


def toy(n=6, c=5, vocabulary=7, seed=0, dtype=torch.float64):
    """A tabular policy: logits (n, c, vocabulary), sampled tokens, a ragged mask."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, vocabulary, generator=g, dtype=dtype).requires_grad_()
    ids = torch.randint(vocabulary, (n, c), generator=g)
    lengths = torch.randint(1, c + 1, (n,), generator=g)
    mask = torch.arange(c)[None] < lengths[:, None]

    def logps(weights=None):
        table = (logits if weights is None else weights).log_softmax(-1)
        return table.gather(-1, ids[..., None])[..., 0] * mask

    return logits, logps, mask


# ---------------------------------------------------------------- advantages


def test_doctests():
    assert doctest.testmod(grpo).failed == 0


def test_group_advantages_by_hand():
    # group 1: mean 2, unbiased std sqrt(2); group 2: all alike
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (math.sqrt(2) + 1e-4)
    assert torch.allclose(group_advantages(rewards, 2), expected)
    three = group_advantages(torch.tensor([0.0, 0.0, 1.0]), 3, eps=0.0)  # mean 1/3, std 1/sqrt(3)
    assert torch.allclose(three, torch.tensor([-1.0, -1.0, 2.0]) / math.sqrt(3))
    with pytest.raises(AssertionError, match="siblings"):
        group_advantages(rewards, 1)


def test_advantages_ignore_scale_and_shift_and_follow_permutations():
    g = torch.Generator().manual_seed(1)
    rewards = torch.rand(5 * 8, generator=g, dtype=torch.float64)
    adv = group_advantages(rewards, 8)
    assert torch.allclose(adv.view(5, 8).mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    shifted = group_advantages(3 * rewards + 2, 8, eps=3e-4)  # eps scales along: exactly the same
    assert torch.allclose(adv, shifted)
    groups, rows = torch.randperm(5, generator=g), torch.randperm(8, generator=g)
    moved = group_advantages(rewards.view(5, 8)[groups].flatten(), 8)
    assert torch.equal(moved, adv.view(5, 8)[groups].flatten())
    within = group_advantages(rewards.view(5, 8)[:, rows].flatten(), 8)
    assert torch.allclose(within, adv.view(5, 8)[:, rows].flatten())


# ---------------------------------------------------------------- the loss


def test_first_step_loss_is_zero_and_its_gradient_is_reinforce():
    logits, logps, mask = toy(n=8)
    adv = group_advantages(torch.rand(8, dtype=torch.float64), 4)
    now = logps()
    loss, stats = grpo_loss(now, now.detach(), now.detach(), adv, mask, 0.2, 0.2, 0.04)
    assert abs(loss.mean().item()) < 1e-12  # advantages cancel within a group
    assert stats["kl"].abs().max() == 0 and stats["clip_frac"].max() == 0
    (grad,) = torch.autograd.grad(loss.mean(), logits)
    # REINFORCE: -A_i grad log pi, averaged over a plan's tokens and then over plans
    reinforce = -(adv[:, None] * logps() / mask.sum(1, keepdim=True)).sum() / 8
    (expected,) = torch.autograd.grad(reinforce, logits)
    assert grad.abs().max() > 0 and torch.allclose(grad, expected, atol=1e-14)


def test_equal_rewards_have_no_gradient_without_kl():
    logits, logps, mask = toy()
    adv = group_advantages(torch.full((6,), 0.7, dtype=torch.float64), 3)
    loss, _ = grpo_loss(logps(), logps().detach(), None, adv, mask, 0.2, 0.2, 0.0)
    (grad,) = torch.autograd.grad(loss.mean(), logits)
    assert grad.abs().max() == 0


def test_kl_is_never_negative_and_unbiased_by_enumeration():
    g = torch.Generator().manual_seed(2)
    p, q = (torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    one = torch.ones(9, 1)
    _, stats = grpo_loss(p[:, None], p[:, None], q[:, None], torch.zeros(9), one, 0.2, 0.2, 0.04)
    assert (stats["kl"] >= 0).all()
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * stats["kl"]).sum(), exact)  # E over p of k3 = KL(p || q)


def test_kl_pulls_towards_the_reference():
    logits, logps, mask = toy()
    with torch.no_grad():
        ref = logps(logits + torch.randn(logits.shape, dtype=torch.float64))
    zero = torch.zeros(6, dtype=torch.float64)
    loss, before = grpo_loss(logps(), logps().detach(), ref, zero, mask, 0.2, 0.2, 1.0)
    assert torch.allclose(loss, before["kl"])  # advantages 0, beta 1: nothing but KL is left
    (grad,) = torch.autograd.grad(loss.mean(), logits)
    closer = logps(logits - 0.1 * grad)
    _, after = grpo_loss(closer, closer.detach(), ref, zero, mask, 0.2, 0.2, 1.0)
    assert after["kl"].mean() < before["kl"].mean()


@pytest.mark.parametrize("adv, ratio, moves", [
    (1.0, 1.5, False), (1.0, 1.1, True), (1.0, 0.5, True),      # good: only its rise is capped
    (-1.0, 0.5, False), (-1.0, 0.9, True), (-1.0, 1.5, True),   # bad: only its fall is capped
])  # fmt: skip
def test_clip(adv, ratio, moves):
    old = torch.zeros(1, 1, dtype=torch.float64)
    logps = torch.full((1, 1), math.log(ratio), dtype=torch.float64).requires_grad_()
    advantages, mask = torch.tensor([adv], dtype=torch.float64), torch.ones(1, 1)
    loss, stats = grpo_loss(logps, old, None, advantages, mask, 0.2, 0.2, 0.0)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert (grad.abs().item() > 0) == moves
    assert stats["clip_frac"].item() == (not moves)  # clip_frac counts tokens that cannot learn
    expected = -min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv)
    assert abs(loss.item() - expected) < 1e-12


def test_every_plan_weighs_the_same_however_long_and_padding_is_not_seen():
    logits, logps, mask = toy(n=4, c=5)
    adv = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    old, ref = logps(logits + 0.3).detach(), logps(logits * 0.9).detach()
    together, stats = grpo_loss(logps(), old, ref, adv, mask, 0.2, 0.2, 0.04)
    for i in range(4):
        n = int(mask[i].sum())
        rows = [x[i : i + 1, :n] for x in (logps(), old, ref, mask)]
        alone, its = grpo_loss(*rows[:3], adv[i : i + 1], rows[3], 0.2, 0.2, 0.04)
        assert torch.allclose(alone[0], together[i])
        assert torch.allclose(its["kl"][0], stats["kl"][i])
    wild = torch.where(mask, 0.0, 1e4)  # whatever stands in the padding, it must not matter
    padded, _ = grpo_loss(logps() + wild, old, ref, adv, mask, 0.2, 0.2, 0.04)
    assert torch.allclose(padded, together)


def test_a_plan_without_tokens_is_zero_not_nan():
    empty = torch.zeros(1, 3)
    loss, stats = grpo_loss(empty, empty, empty, torch.ones(1), empty.bool(), 0.2, 0.2, 0.04)
    assert loss.item() == 0 and stats["kl"].item() == 0


# ---------------------------------------------------------------- losses, against TRL's


def off_policy_batch():
    """Eight ragged plans in groups of four: logps with ratios either side of 1, and a mask."""
    logits, logps, mask = toy(n=8, dtype=torch.float32)
    with torch.no_grad():
        old, ref = logps(logits + 0.4 * logits.sin()), logps(logits * 0.8)
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.2, 0.2, 0.2, 0.8])
    return logits, logps, mask, old, ref, rewards


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_losses_equal_trl(loss, scale, monkeypatch):
    """Ours is split in two micro-batches of three and five plans."""
    pytest.importorskip("trl", reason="TRL is not installed: run this with bench/.venv/bin/python")
    import common  # noqa: F401  (what makes torchvision importable)
    from trl.trainer import grpo_trainer as trl
    monkeypatch.setattr(grpo, "all_reduce_sum", lambda values, device: values)
    logits, logps, mask, old, ref, rewards = off_policy_batch()
    advantages = group_advantages(rewards, 4, scale_rewards=scale,
                                  batch_std=grpo.reward_std(rewards))
    std = {"group": rewards.view(2, 4).std(dim=1).repeat_interleave(4), "batch": rewards.std()}
    expected = rewards - rewards.view(2, 4).mean(dim=1).repeat_interleave(4)
    expected = expected / (std[scale] + 1e-4) if scale in std else expected
    assert torch.allclose(advantages, expected, atol=1e-6)          # TRL's, by its own lines

    class Trainer(trl.GRPOTrainer):
        """Its _compute_loss() on given log-probabilities: the settings that it reads."""

        def __init__(self):
            self.loss_type, self.beta, self.max_completion_length = loss, 0.04, 5
            self.epsilon_low, self.epsilon_high, self.importance_sampling_level = 0.2, 0.28, "token"
            self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
            self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
            self.current_gradient_accumulation_steps = 1
            self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False,
                                        steps_per_generation=1)
            self.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x,
                                               reduce=lambda x, reduction: x)
            self.model, self._metrics = SimpleNamespace(training=True), {"train": Counted()}

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return logps(), torch.zeros(8, 5), None
    theirs = Trainer()._compute_loss(None, {
        "prompt_ids": torch.zeros(8, 1), "prompt_mask": torch.ones(8, 1),
        "completion_ids": torch.zeros(8, 5), "completion_mask": mask.int(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum()})
    theirs_gradient, = torch.autograd.grad(theirs, logits)
    lengths = mask.sum(dim=1).float()
    weights, factor = grpo.loss_weights(lengths, loss, 8, lengths.sum().item(), most=5)
    ours = 0
    for some in (slice(3), slice(3, 8)):
        each, _ = grpo_loss(logps()[some], old[some], ref[some], advantages[some], mask[some],
                            0.2, 0.28, 0.04)
        ours = ours + factor * (each * weights[some]).sum()
    ours_gradient, = torch.autograd.grad(ours, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-7)


class Counted(dict):
    """A trainer's log of lists."""

    def __missing__(self, key):
        return self.setdefault(key, [])


def test_scale_rewards_follows_the_loss():
    assert grpo.parse_args([]).scale_rewards == "group"
    assert grpo.parse_args(["--loss=dr_grpo"]).scale_rewards == "none"
    assert grpo.parse_args(["--loss=dr_grpo", "--scale-rewards=batch"]).scale_rewards == "batch"


def test_a_bandit_learns():
    """Six positions, four actions, TDR against a fixed expert: sampled reward rises from 1/4."""
    g = torch.Generator().manual_seed(3)
    expert = [2, 1, 1, 3, 0, 0]
    table = torch.zeros(6, 4, requires_grad=True)
    start = torch.zeros(6, 4)
    optimizer = torch.optim.Adam([table], lr=0.1)
    history = []
    for _ in range(60):
        with torch.no_grad():
            plans = torch.multinomial(table.softmax(-1), 8, True, generator=g).T  # (8, 6)
        rewards = torch.tensor([time_decayed_reward(p, expert) for p in plans.tolist()])
        adv = group_advantages(rewards, 8)
        pick = (torch.arange(6), plans)
        ref, mask = start.log_softmax(-1)[pick], torch.ones(8, 6)
        old = table.log_softmax(-1)[pick].detach()
        for _ in range(2):
            now = table.log_softmax(-1)[pick]
            loss, _ = grpo_loss(now, old, ref, adv, mask, 0.2, 0.2, 0.001)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        history.append(rewards.mean().item())
    assert sum(history[:5]) / 5 < 0.5 and sum(history[-5:]) / 5 > 0.85


# ---------------------------------------------------------------- the loop, on a tiny policy

WORDS = "go to the red sofa, turn left at the door and stop in front of the blue chair".split()


def make_world(folder):
    """A VLN-Ego folder of random walks, and a checkpoint of a tiny policy that can write."""
    rng = np.random.default_rng(0)
    data = folder / "vln_ego" / "train"
    (data / "frames").mkdir(parents=True)
    walks, episodes = [], []
    with zipfile.ZipFile(data / "frames" / "0.zip", "w") as z:
        for i in range(6):
            actions = [*rng.integers(1, 4, rng.integers(5, 12)).tolist(), 0]
            walks.append({"walk_id": f"w{i}", "actions": actions, "shard": "frames/0.zip"})
            words = " ".join(rng.choice(WORDS, 4 + 3 * i))
            episodes.append({"episode_id": i, "walk_id": f"w{i}", "instruction": words})
            for t in range(len(actions)):
                picture = io.BytesIO()
                noise = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                Image.fromarray(noise).save(picture, "png")
                z.writestr(f"w{i}/{t:04d}.png", picture.getvalue())
    robot = {"turn_deg": 30, "forward_m": 0.25, "hfov_deg": 90, "camera_height_m": 1.25,
             "width": 56, "height": 56}
    meta = {"version": 1, "dataset": "houses", "robot": robot, "image_format": "png"}
    (data / "meta.json").write_text(json.dumps(meta))
    for name, rows in (("walks", walks), ("episodes", episodes)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.copytree(data, folder / "vln_ego" / "val_seen")
    contract = dict(CONTRACT, turn_deg=30, dataset="houses")
    policy = load_policy("tiny", contract=contract, texts=[e["instruction"] for e in episodes])
    learn_to_write(policy, VlnEgo(data))
    (folder / "sft").mkdir()
    save_policy(policy, str(folder / "sft"))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def policy(world):
    return load_policy(str(world / "sft"))


def flags(world, out, *more):
    """Four prompts of four plans a step; a rate at which three steps move the weights visibly."""
    return [f"--init={world / 'sft'}", f"--data={world / 'vln_ego' / 'train'}", f"--out={out}",
            "--device=cpu", "--batch-size=4", "--group-size=4", "--lr=1e-3", "--max-steps=3",
            "--warmup=0", "--val-decisions=4", "--samples-every=2", *more]


def group_of_four(policy, world, n=2, seed=5):
    """n decisions, their frames, and four sampled plans for each."""
    data = VlnEgo(world / "vln_ego" / "train")
    units = grpo.draw_prompts([data], n, seed)
    decisions, frames = grpo.load_prompts([data], policy, units)
    with torch.no_grad():
        prompts = policy.build_prompts(decisions, frames)
        roll = policy.generate(prompts, 4, 1.0, seeds=list(range(n)))
    return decisions, frames, roll


def test_shared_prompt_equals_separate_rows(policy, world):
    """One prefix and G suffixes, against G rows that each hold the prompt: loss, gradients."""
    decisions, frames, roll = group_of_four(policy, world)
    adv = group_advantages(torch.rand(8, generator=torch.Generator().manual_seed(0)), 4)
    ref = torch.randn(roll.completion_mask.shape, generator=torch.Generator().manual_seed(1)) - 3

    def loss_of(logps):
        old = logps.detach() + 0.1 * ref.sin()               # off-policy: ratios either side of 1
        return grpo_loss(logps, old, ref, adv, roll.completion_mask, 0.2, 0.2, 0.04)[0].mean()

    ids, mask = roll.completion_ids, roll.completion_mask
    shared = policy(decisions, frames, ids, mask, 4, 0.7)
    rows = [policy([decisions[i // 4]], frames, ids[i:i + 1], mask[i:i + 1], 1, 0.7)
            for i in range(8)]
    separate = torch.cat(rows)
    assert torch.allclose(shared, separate, rtol=1e-5, atol=1e-5)
    one, many = loss_of(shared), loss_of(separate)
    assert abs(one.item() - many.item()) <= 1e-5 * abs(many.item())
    assert relative_difference(gradients(policy, one), gradients(policy, many)) < 1e-5


def test_first_gradient_of_the_policy_is_reinforce(policy, world):
    decisions, frames, roll = group_of_four(policy, world)
    mask, args = roll.completion_mask, grpo.parse_args([])
    scores = grpo.compute_rewards(roll.texts, decisions, policy, args)
    adv = group_advantages(torch.tensor([s.reward for s in scores]), 4)
    logps = policy(decisions, frames, roll.completion_ids, mask, 4)
    loss, stats = grpo_loss(logps, logps.detach(), logps.detach(), adv, mask, 0.2, 0.2, 0.04)
    assert abs(loss.mean().item()) < 1e-6 and stats["kl"].max() == 0
    ours = gradients(policy, loss.mean())
    logps = policy(decisions, frames, roll.completion_ids, mask, 4)
    reinforce = -(adv * logps.sum(1) / mask.sum(1)).mean()     # masked logps are 0
    theirs = gradients(policy, reinforce)
    assert max(g.abs().max() for g in theirs.values()) > 1e-4
    assert relative_difference(ours, theirs) < 1e-5


def test_scores_of_a_group_and_their_text(policy, world):
    decisions, _, _ = group_of_four(policy, world, n=1)
    phrases, expert = policy.phrases, list(decisions[0].plan)
    texts = [write_plan(expert, phrases), "A. Move, forward", "", write_plan([1] * 6, phrases)]
    scores = grpo.compute_rewards(texts, decisions, policy, grpo.parse_args([]))
    sums = grpo.score_sums(scores)
    assert scores[0].reward == 1.0
    assert sums["exact_match"] == 1
    assert sums["malformed"] == 12
    assert sums["expert_stops"] == 4 * expert.count(0) and sums["stops"] == expert.count(0)
    shown = grpo.format_group(decisions[0], texts, scores, [1.5, -0.5, -0.5, -0.5], policy)
    assert decisions[0].instruction in shown and "'A. Move, forward'" in shown
    assert " 1.000      +1.50  " + " ".join("DABC"[a] for a in expert) in shown
    unread = decisions[0]._replace(plan=())                    # a ShareGPT answer of garbage
    scores = grpo.compute_rewards(texts, [unread], policy, grpo.parse_args([]))
    assert grpo.score_sums(scores)["exact_match"] == 0
    assert [s.reward for s in scores] == [0, 0, 0, 0]


def test_prompts_and_seeds_are_functions_of_the_seed_and_the_step(world):
    data = VlnEgo(world / "vln_ego" / "train")
    prompts = grpo.draw_prompts([data, data], 21, seed=3)
    assert len(set(prompts)) == 21 and [p[0] for p in prompts].count(0) == 11
    assert prompts == grpo.draw_prompts([data, data], 21, seed=3)
    shared = grpo.draw_prompts([data, data], 20, 3, shares=[3, 1])
    assert len(set(shared)) == 20 and [p[0] for p in shared].count(0) == 15
    few = SimpleNamespace(episodes=data.episodes[:1], steps=lambda i: range(4))
    short = grpo.draw_prompts([data, few], 20, 3, shares=[2, 1])        # 4 of `few`, and no more
    assert [p[0] for p in short] == [0] * 8 + [1] * 4
    epoch = [u for step in range(5) for u in grpo.batch_of(prompts, step, 4, seed=0)]
    assert len(set(epoch)) == 20                               # each at most once an epoch
    assert grpo.batch_of(prompts, 7, 4, 0) == grpo.batch_of(prompts, 7, 4, 0)
    assert grpo.batch_of(prompts, 5, 4, 0) != grpo.batch_of(prompts, 0, 4, 0)   # another order
    seeds = [s for step in range(50) for s in grpo.sampling_seeds(0, step, 8)]
    assert len(set(seeds)) == 400 and all(0 <= s < 2 ** 63 for s in seeds)


def test_refill_draws_from_other_prompts_and_groups_keep_their_plans(policy, world):
    prompts = list(range(30))
    batch = grpo.batch_of(prompts, 3, 8, seed=0)
    first, second = (grpo.refill_of(prompts, batch, 3, attempt, 0) for attempt in (1, 2))
    assert len({*batch, *first, *second}) == 24                  # none twice
    assert first == grpo.refill_of(prompts, batch, 3, 1, 0)
    decisions, frames, roll = group_of_four(policy, world, n=3)
    both = grpo.RolloutBatch(decisions, frames, roll)
    groups = grpo.split_groups(both, 4)
    again = grpo.merge_groups([groups[2], groups[0]])
    assert again.decisions == [decisions[2], decisions[0]]
    assert again.plans.texts == roll.texts[8:] + roll.texts[:4]
    assert torch.equal(again.plans.completion_mask,
                       torch.cat((roll.completion_mask[8:], roll.completion_mask[:4])))
    short = groups[0]._replace(plans=groups[0].plans._replace(
        completion_ids=groups[0].plans.completion_ids[:, :2],
        completion_mask=groups[0].plans.completion_mask[:, :2]))
    mask = grpo.merge_groups([short, groups[2]]).plans.completion_mask
    assert mask.shape == roll.completion_mask[:8].shape and not mask[:4, 2:].any()


@slow
def test_refill_is_the_same_when_resumed_and_on_two_ranks(world):
    more = ["--refill=2", "--reward=uniform", "--group-size=2", "--loss=dapo", "--kl-coef=0",
            "--scale-rewards=batch", "--lr=2e-5", "--save-every=1", "--max-steps=2"]
    grpo.main(grpo.parse_args(flags(world, world / "refill", *more)))
    bare = flags(world, world / "no_refill", *more, "--refill=0", "--max-steps=1")
    grpo.main(grpo.parse_args(bare))
    rows, (_, row) = log_of(world / "refill"), log_of(world / "no_refill")
    equal = 4 * row["frac_reward_zero_std"]
    assert equal <= rows[1]["refilled"] <= 2 * equal and equal > 0 == row["refilled"]
    assert rows[1]["frac_reward_zero_std"] < row["frac_reward_zero_std"]
    again = flags(world, world / "refill_again", *more)
    grpo.main(grpo.parse_args([*again, "--stop-after=1"]))
    grpo.main(grpo.parse_args(again))
    assert max_difference(weights_of(world / "refill"), weights_of(world / "refill_again")) == 0
    run_on_two_ranks(world, "grpo", [flags(world, world / "refill3", *more, "--zero-stage=3",
                                           "--micro-tokens=600")])
    for ours, theirs in zip(log_of(world / "refill3"), rows, strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


@pytest.fixture(scope="module")
def plain(world):
    """An undisturbed run on one process, which saves as the disturbed one will."""
    out = world / "plain"
    grpo.main(grpo.parse_args(flags(world, out, "--save-every=1")))
    return out


def test_a_run_learns_and_writes_its_files(world, plain):
    log = log_of(plain)
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert "val/reward" in log[0] and "val/reward" in log[3]
    assert log[1]["kl"] < 1e-9
    assert abs(log[1]["loss"]) < 1e-6
    assert log[1]["clip_frac"] == 0
    assert log[3]["kl"] > 0                                    # it has left the SFT policy
    assert 0 <= log[1]["frac_reward_zero_std"] <= 1 and log[1]["plan_tokens"] > 1
    assert max_difference(weights_of(world / "sft"), weights_of(plain)) > 1e-4
    samples = (plain / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("# step")] == [
        "# step 1", "# step 2", "# step 3"]
    assert (plain / "curves.png").stat().st_size > 1000
    assert load_policy(str(plain)).contract["turn_deg"] == 30


def test_kill_9_and_resume_is_the_undisturbed_run(world, plain):
    out = world / "killed"
    command = [sys.executable, grpo.__file__, *flags(world, out, "--save-every=1")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when(child, (out / "state" / "latest").exists)        # the first state is complete
    assert not (out / "model.safetensors").exists()
    with open(out / "log.jsonl", "a") as f:                    # after the state: cut on resume
        f.write('{"step": 3, "reward": 9}\n{"step": 4, "rew')
    with open(out / "samples.txt", "a") as f:
        f.write("# step 3\nhalf a bl")
    grpo.main(grpo.parse_args(flags(world, out, "--save-every=1")))
    assert max_difference(weights_of(out), weights_of(plain)) == 0
    assert log_of(out) == log_of(plain)
    assert (out / "samples.txt").read_text() == (plain / "samples.txt").read_text()


def test_two_ranks_agree_with_one_at_zero_0_2_3(world):
    # With this seed, rank 0's two prompts share a walk and rank 1's do not; plans differ in length.
    # Ranks that make unequal numbers of module calls for that wait for ever under ZeRO-3.
    data = VlnEgo(world / "vln_ego" / "train")
    first, second, third, fourth = grpo.batch_of(grpo.draw_prompts([data], 20000, 1), 0, 4, 1)
    assert first[1] == third[1] and second[1] != fourth[1]
    more = ["--updates-per-batch=2", "--micro-tokens=600", "--max-steps=2", "--seed=1", "--lr=2e-5"]
    grpo.main(grpo.parse_args(flags(world, world / "alone", *more)))
    # In pieces of one prompt the rollouts are run apart from the learning; in one piece, with it.
    grpo.main(grpo.parse_args(flags(world, world / "alone_once", *more, "--updates-per-batch=1",
                                    "--micro-tokens=1")))
    run_on_two_ranks(world, "grpo", [
        *(flags(world, world / f"zero{stage}", *more, f"--zero-stage={stage}")
          for stage in (0, 2, 3)),
        flags(world, world / "once2", *more, "--zero-stage=2", "--updates-per-batch=1",
              "--micro-tokens=0")])
    for two, one in (("zero0", "alone"), ("zero2", "alone"), ("zero3", "alone"),
                     ("once2", "alone_once")):
        theirs, start = weights_of(world / one), weights_of(world / "sft")
        assert max_difference(weights_of(world / two), theirs) < 1e-5, two
        moved = relative_difference({k: w - start[k] for k, w in weights_of(world / two).items()},
                         {k: w - start[k] for k, w in theirs.items()})
        assert moved < 1e-3, (two, moved)                      # and not because nothing moved
        for ours, theirs in zip(log_of(world / two), log_of(world / one), strict=True):
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (two, key)


def test_a_diverging_run_ends_with_a_sentence(world, tmp_path):
    """Its first update leaves weights from which no plan can be drawn; none of them is saved."""
    out = tmp_path / "out"
    more = ["--lr=1e22", "--drop-zero-std-groups", "--kl-coef=0"]
    with pytest.raises(UserError, match="step 2: a log-probability of a sampled token is not finite"
                       ".*No state was saved"):
        grpo.main(grpo.parse_args(flags(world, out, *more)))
    rows = log_of(out)
    assert rows[1]["grad_norm"] > 0 and rows[1]["skipped_steps"] == 0
    assert not (out / "model.safetensors").exists() and not (out / "state").exists()


def test_a_skipped_step_leaves_a_gap_in_the_curves(tmp_path):
    rows = [{"step": s, "reward": None if s == 2 else 0.5, "kl": 0.0} for s in range(1, 5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine.draw_curves(str(tmp_path), (("reward",), ("kl",), ("not logged yet",)))
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong, says", [
    (["--init=nowhere"], "sft.py"), (["--group-size=1"], "plans of one prompt"),
    (["--temperature=0"], "--temperature"), (["--gamma=2"], "--gamma"),
    (["--prompts=2"], "--batch-size"), (["--out=/dev/null/x"], "--out"),
    (["--data=nowhere"], "nowhere"),
])  # fmt: skip
def test_mistakes_are_sentences(world, tmp_path, wrong, says):
    with pytest.raises(UserError, match=says):
        grpo.main(grpo.parse_args([*flags(world, tmp_path / "out"), *wrong]))


def test_samples_that_a_kill_cut_within_a_letter_are_read(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_bytes("# step 1\nआगे\n# step 2\nआ".encode()[:-1])
    grpo.cut_samples(str(path), 1)
    assert path.read_text(encoding="utf-8") == "# step 1\nआगे\n"


def test_another_turn_angle_is_refused(world, tmp_path):
    other = tmp_path / "fifteen"
    shutil.copytree(world / "vln_ego" / "train", other)
    meta = json.loads((other / "meta.json").read_text())
    meta["robot"]["turn_deg"] = 15
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="turn_deg 30.*15"):
        grpo.main(grpo.parse_args([*flags(world, tmp_path / "out"), f"--data={other}"]))


def test_no_kl_never_loads_the_reference_and_zero_std_groups_can_be_dropped(world, monkeypatch):
    calls = []
    load = grpo.load_policy
    monkeypatch.setattr(grpo, "load_policy", lambda *a, **k: calls.append(a) or load(*a, **k))
    out = world / "dropped"
    grpo.main(grpo.parse_args(flags(world, out, "--kl-coef=0", "--drop-zero-std-groups",
                                    "--max-steps=1", "--freeze-vision", "--reward=hard")))
    assert len(calls) == 1
    before, after = weights_of(world / "sft"), weights_of(out)
    assert all(torch.equal(before[k], after[k]) for k in before if "visual" in k)

    def only_zero_std(rewards, group_size, **_):                # advantage 1 there, 0 elsewhere
        groups = rewards.view(-1, group_size)
        return (groups.amax(1) == groups.amin(1)).float().repeat_interleave(group_size)
    monkeypatch.setattr(grpo, "group_advantages", only_zero_std)
    for drop in ([], ["--drop-zero-std-groups"]):
        out = world / f"zero_std{len(drop)}"
        grpo.main(grpo.parse_args(flags(world, out, "--kl-coef=0", "--max-steps=1",
                                        "--reward=hard", *drop)))
        row = log_of(out)[-1]
        assert row["frac_reward_zero_std"] > 0
        assert row["loss"] == pytest.approx(0 if drop else -row["frac_reward_zero_std"], abs=1e-6)
