"""What a user can get wrong, from the command line: a sentence, exit status 2, nothing lost.

Run it   python -m pytest tests/test_bad_input.py
"""
import gzip
import json
import os
import shutil

import pytest
from conftest import script

from model import NAV, load_policy, save_policy


@pytest.fixture
def houses(ego, tmp_path):
    """A copy of the two houses that a test may spoil."""
    shutil.copytree(os.path.join(ego, "..", "..", "houses"), tmp_path / "houses")
    return tmp_path / "houses"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy of a robot that turns 15 degrees."""
    folder = tmp_path_factory.mktemp("ckpt")
    save_policy(load_policy("tiny", nav=dict(NAV, dataset="houses", turn_deg=15), texts=["go"]),
                str(folder))
    return folder


def refused(*command, words):
    """The script says `words` in a sentence and exits with 2."""
    done = script(*command, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def edit_episodes(houses, split, change):
    path = houses / split / f"{split}.json.gz"
    data = json.loads(gzip.decompress(path.read_bytes()))
    for episode in data["episodes"]:
        change(episode)
    path.write_bytes(gzip.compress(json.dumps(data).encode()))


def test_a_missing_scene(houses, tmp_path):
    shutil.rmtree(houses / "scenes" / "houses")
    refused("make_data.py", "--episodes", houses, "--out", tmp_path / "x", words=[".glb"])
    refused("evaluate.py", "--agent", "oracle", "--episodes", houses, "--out", tmp_path / "y",
            words=[".glb"])


def test_a_truncated_episode_file(houses, tmp_path):
    path = houses / "val_unseen" / "val_unseen.json.gz"
    path.write_bytes(path.read_bytes()[:-40])
    refused("evaluate.py", "--agent", "stop", "--episodes", houses, "--out", tmp_path / "y",
            words=["val_unseen.json.gz"])


def test_a_goal_that_cannot_be_reached(houses, tmp_path):
    """Recording refuses it; walking counts it apart and never as a score."""
    def wall_in(episode):
        episode["goals"][0]["position"] = [500.0, 0.0, 500.0]
    for split in ("train", "val_unseen"):
        edit_episodes(houses, split, wall_in)
    refused("make_data.py", "--episodes", houses, "--out", tmp_path / "x", words=["1%"])
    done = script("evaluate.py", "--agent", "stop", "--episodes", houses, "--out", tmp_path / "y",
                  "--sims", 1, check=False)
    results = json.loads((tmp_path / "y" / "results.json").read_text())
    assert results["scored"] == 0 and results["unreachable"] == 4, done.stderr
    assert results["metrics"]["success"]["mean"] is None


def test_a_checkpoint_of_another_turn_angle(houses, checkpoint, tmp_path):
    refused("evaluate.py", "--ckpt", checkpoint, "--episodes", houses, "--out", tmp_path / "y",
            "--device", "cpu", "--turn-deg", 30, words=["turn_deg", "15", "30"])


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_a_damaged_frame_store(ego, tmp_path, spoil):
    shutil.copytree(ego, tmp_path / "train")
    store = next((tmp_path / "train" / "frames").iterdir())
    if spoil == "truncate":
        store.write_bytes(store.read_bytes()[:-100])
    else:
        store.unlink()
    refused("sft.py", "--model", "tiny", "--data", tmp_path / "train", "--out", tmp_path / "x",
            "--batch-size", 8, "--max-steps", 1, "--device", "cpu", words=[store.name])


def test_an_answer_of_garbage_is_counted_not_guessed(houses, checkpoint, tmp_path):
    """An untrained policy babbles: every plan is unreadable, ends its walk, and is reported."""
    nav = json.loads((checkpoint / "nav.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "babbler")
    (tmp_path / "babbler" / "nav.json").write_text(json.dumps(dict(nav, turn_deg=30)))
    script("evaluate.py", "--ckpt", tmp_path / "babbler", "--episodes", houses, "--out",
           tmp_path / "y", "--sims", 1, "--device", "cpu", "--limit", 2)
    results = json.loads((tmp_path / "y" / "results.json").read_text())
    assert results["ends"] == {"malformed": 2} and results["malformed_share"] == 1.0
    assert results["metrics"]["success"]["mean"] == 0


def test_a_run_is_not_resumed_with_other_flags(ego, tmp_path):
    flags = ["--model", "tiny", "--data", ego, "--out", tmp_path / "x", "--batch-size", 8,
             "--max-steps", 1, "--device", "cpu"]
    script("sft.py", *flags)
    refused("sft.py", *flags, "--lr", 1e-3, words=["--lr", "another folder"])


@pytest.mark.parametrize("command", [
    ["-m", "world.houses", "--train-houses", 1], ["make_data.py"], ["sft.py", "--model", "tiny"],
    ["evaluate.py", "--agent", "stop"]])
def test_a_folder_that_cannot_be_written(ego, command):
    root = os.path.join(ego, "..", "..")
    data = {"make_data.py": ["--episodes", f"{root}/houses"], "sft.py": ["--data", ego],
            "evaluate.py": ["--episodes", f"{root}/houses"]}.get(command[0], [])
    refused(*command, *data, "--out", "/proc/nothing", words=["/proc/nothing"])
