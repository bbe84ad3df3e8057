"""tiny trains on the real VLN-Ego walk (640x480), through the released JSON and through our format.

Run it   python -m pytest tests/test_real_training.py      (skipped where ../shared/data is absent)
"""
import json
import os

import numpy as np
import pytest
from conftest import ROOT, in_process
from policies import log_of

from checkpoint import load_policy
from make_data import VlnEgo
from model import CONTRACT
from tools.sharegpt import ShareGpt

SAMPLE = os.path.join(ROOT, "..", "shared", "data", "vln_ego_sample")
FRAMES = os.path.join(SAMPLE, "rgb_images_r2r_debug")
RELEASED = os.path.join(SAMPLE, "r2r_16_images_4act_debug.json")
pytestmark = pytest.mark.skipif(not os.path.exists(RELEASED), reason="no ../shared/data here")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The released walk in our format, with the labels that belong to its frames."""
    out = tmp_path_factory.mktemp("real")
    in_process("make_data.py", "--import-walk", FRAMES, "--robot", "r2r", "--split", "train",
               "--out", out)
    return str(out / "train")


@pytest.mark.parametrize("source", ["released", "ours"])
def test_the_loss_halves_on_the_real_walk(imported, tmp_path, source):
    data = (["--data", RELEASED, "--image-root", FRAMES, "--horizon", 4] if source == "released"
            else ["--data", imported, "--memory-budget", 4])
    in_process("sft.py", "--model", "tiny", *data, "--out", tmp_path, "--device", "cpu", "--dtype",
               "float32", "--batch-size", 2, "--steps-per-walk", 2, "--lr", 3e-3, "--max-steps", 12,
               "--beta2", 0.99)
    losses = [row["loss"] for row in log_of(tmp_path)]
    assert len(losses) == 12
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    contract = json.load(open(tmp_path / "nav.json"))
    # The released words say 30 degrees; the robot turned 15, and our own format says so.
    assert contract["turn_deg"] == (30 if source == "released" else 15)


def test_a_real_frame_is_seventy_tokens_on_both_ways_in(imported):
    for data in (ShareGpt(RELEASED, FRAMES), VlnEgo(imported)):
        contract = dict(CONTRACT, turn_deg=15)
        policy = load_policy("tiny", contract=contract, texts=["go"])
        episode, t = (20, 0) if isinstance(data, ShareGpt) else (0, 20)
        decisions, frames = policy.load_batch(data, [(episode, (t,))])
        prompt, = policy.build_prompts(decisions, frames)
        seen = len(decisions[0].frames)
        assert seen >= 11 and prompt.ids.count(policy.image_token) == 70 * seen
        # 640 x 480 under the demo's pixel budget: 10 x 7 merged patches of 28 px.
        assert {frame.shape for frame in frames.values()} == {(196, 280, 3)}
