"""The same numbers as recorded: moving code must not change a result.

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
RECORDED = {'sft': [[5.954, 14.71],
         [3.349, 6.869],
         [2.648, 4.569],
         [1.74, 3.097],
         [1.335, 2.314],
         [1.31, 2.382],
         [1.305, 1.704],
         [1.558, 1.997],
         [1.002, 1.048],
         [1.148, 1.566],
         [1.098, 1.196],
         [1.054, 1.291]],
 'dialog': [[6.827, 12.24],
            [4.736, 6.441],
            [3.451, 4.573],
            [3.771, 6.978],
            [2.729, 2.959],
            [2.176, 1.749],
            [2.109, 1.633],
            [2.107, 1.973],
            [1.902, 1.403],
            [1.853, 1.749],
            [1.682, 1.363],
            [1.642, 1.192],
            [1.768, 1.234],
            [1.674, 3.084],
            [1.602, 1.277],
            [1.581, 1.611],
            [1.548, 1.365],
            [1.492, 1.938],
            [1.515, 1.417],
            [1.466, 1.263],
            [1.68, 1.556],
            [1.393, 1.354],
            [1.641, 1.656],
            [1.633, 1.522]],
 'grpo': [[-2.98e-08, 2.272, 0.5077, 0.0, 5.875],
          [0.0003342, 5.843, 0.5049, 0.008356, 5.875]],
 'online': [[0.04029, 2.427, -0.0258, 0.0, 26.0]],
 'walks': [['113111111111111111111111', 'max_actions', 1.786, 0.0],
           ['13111111120', 'malformed', 3.714, 0.0],
           ['11111111111111110', 'stop', 1.169, 0.0],
           ['111111111111110', 'stop', 4.266, 0.0]]}


def rounded(row, keys):
    return [float(f"{row[k]:.4g}") if isinstance(row[k], float) else row[k] for k in keys]


def run_scripts(ego, out):
    """Folders sft, dialog, grpo, online and walks, written as by a user."""
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


def numbers_of(out):
    """{name: its rows, each the values of KEYS[name]}, from the folders of run_scripts()."""
    found = {name: log_of(out / name) for name in KEYS if name != "walks"}
    lines = (out / "walks" / "episodes.jsonl").read_text().splitlines()
    found["walks"] = sorted(map(json.loads, lines), key=lambda row: str(row["episode_id"]))
    return {name: [rounded(row, KEYS[name]) for row in rows if KEYS[name][0] in row]
            for name, rows in found.items()}


@pytest.fixture(scope="module")
def computed(ego, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded")
    run_scripts(ego, out)
    return numbers_of(out)


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
        run_scripts(make_ego(Path(folder)), Path(folder))
        print("RECORDED =", pprint.pformat(numbers_of(Path(folder)), width=88, sort_dicts=False))
