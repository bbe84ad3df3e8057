"""The same numbers as recorded: whoever moves code sees at once whether a result has changed.

From one seed, in the two tiny houses of `ego`, the scripts train, reinforce and evaluate a tiny
policy; losses, rewards, gradient norms and the walks are compared with RECORDED. Floats may differ
by a thousandth, for another CPU rounds differently; walks must be equal.

After a deliberate change, print the new numbers and copy them here:

    python tests/test_recorded.py
"""
import json
import os
import pprint
import tempfile
from pathlib import Path

import pytest
from conftest import in_process, make_ego
from policies import log_of

KEYS = {"sft": ("loss", "grad_norm"), "dialog": ("loss", "grad_norm"),
        "grpo": ("loss", "grad_norm", "reward", "kl", "plan_tokens"),
        "online": ("loss", "grad_norm", "reward", "kl", "tokens"),
        "walks": ("actions", "end", "distance_to_goal", "spl")}
RECORDED = {}


def rounded(row, keys):
    return [float(f"{row[k]:.4g}") if isinstance(row[k], float) else row[k] for k in keys]


def compute(ego, out):
    """Run the scripts as a user would -> {name: rows of KEYS[name]}."""
    houses, cpu = os.path.join(ego, "..", "..", "houses"), ["--device", "cpu", "--lr"]
    learn = ["sft.py", "--model", "tiny", "--data", ego, "--warmup", 0, *cpu, 3e-3]
    in_process(*learn, "--out", out / "sft", "--max-steps", 12, "--batch-size", 16,
               "--steps-per-walk", 4, "--memory-budget", 3)
    in_process(*learn, "--out", out / "dialog", "--max-steps", 24, "--batch-size", 4, "--prompt",
               "dialog")
    in_process("grpo.py", "--init", out / "sft", "--data", ego, "--out", out / "grpo", *cpu,
               1e-4, "--max-steps", 2, "--batch-size", 2, "--group-size", 4)
    in_process("-m", "activevln.grpo_online", "--init", out / "dialog", "--episodes", houses,
               "--out", out / "online", *cpu, 1e-4, "--max-steps", 1, "--batch-size", 2,
               "--group-size", 3, "--sims", 1, "--action-cap", 12, "--turn-cap", 6, "--val-split",
               "none", "--temperature", 0.5, "--reward", "soft_success+0.5*progress")
    in_process("evaluate.py", "--ckpt", out / "sft", "--episodes", houses, "--out", out / "walks",
               "--sims", 1, "--device", "cpu", "--limit", 4, "--max-actions", 24)
    found = {name: log_of(out / name) for name in KEYS if name != "walks"}
    lines = (out / "walks" / "episodes.jsonl").read_text().splitlines()
    found["walks"] = sorted(map(json.loads, lines), key=lambda row: str(row["episode_id"]))
    return {name: [rounded(row, KEYS[name]) for row in rows if KEYS[name][0] in row]
            for name, rows in found.items()}


@pytest.fixture(scope="module")
def computed(ego, tmp_path_factory):
    return compute(ego, tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("name", KEYS)
def test_numbers_are_those_recorded(computed, name):
    found, recorded = computed[name], RECORDED[name]
    assert len(found) == len(recorded)
    for index, rows in enumerate(zip(found, recorded)):
        for key, now, before in zip(KEYS[name], *rows, strict=True):
            expected = (pytest.approx(before, rel=1e-3, abs=1e-5) if isinstance(before, float)
                        else before)
            assert now == expected, f"{name}, row {index}: {key}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        numbers = compute(make_ego(Path(folder)), Path(folder))
    print("RECORDED = " + pprint.pformat(numbers, width=100, sort_dicts=False))
