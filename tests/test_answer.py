"""gpt4scene/answer.py: a kill loses nothing, any number of ranks goes on, a failing one is named.

Run it   python -m pytest tests/test_answer.py
"""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process
from helpers import kill_when
from policies import hf_inputs, launch
from test_chat import make_scenes

from checkpoint import load_policy, save_policy
from cli import UserError, read_rows, write_json
from gpt4scene import answer, chat, scores
from make_data import decode

FLAGS = ["--device", "cpu", "--max-new-tokens", "6", "--together", "7"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, and a policy that has learned nothing: its answers are long and differ."""
    folder = tmp_path_factory.mktemp("answers")
    make_scenes(folder / "scenes", "--questions", 20)
    texts = [row["prompt"] for row in json.loads((folder / "scenes/scanqa_val.json").read_text())]
    save_policy(load_policy("tiny", chat.CHAT, texts=texts, seed=3), str(folder / "ckpt"))
    return folder


def command(world, out, *flags):
    return ["-m", "gpt4scene.answer", str(world / "scenes"), "--ckpt", str(world / "ckpt"),
            "--out", str(out), *FLAGS, *map(str, flags)]


def answers_of(out):
    return scores.read_lines(sorted(str(path) for path in out.glob("answers*.jsonl")))


@pytest.fixture(scope="module")
def alone(world):
    """One process, undisturbed -> {key: row}"""
    done = in_process(*command(world, world / "alone"))
    assert "all 100 questions are answered" in done.stdout
    return answers_of(world / "alone")


def test_answers_are_those_of_transformers(world, alone):
    """Some questions of one scene, each in a row of its own, by generate()."""
    policy = load_policy(str(world / "ckpt"))
    rows = json.loads((world / "scenes/sqa3d_val.json").read_text())
    images = json.loads((world / "scenes/selected_images_val.json").read_text())
    for i in range(3):
        frames = [decode((world / "scenes" / path).read_bytes(), path)
                  for path in images[rows[i]["scene_id"]]]
        prompt = policy.prompt("<image>" * len(frames) + rows[i]["prompt"],
                               policy.encode_frames(frames))
        ids = torch.tensor(prompt.ids)[None]
        found = policy.model.generate(
            **hf_inputs(policy, ids, frames), attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=6, suppress_tokens=policy.banned.tolist())[0, len(prompt.ids):]
        row = alone[f"sqa3d/{i}"]
        assert row == {"key": f"sqa3d/{i}", "pred": policy.text(found.tolist()), "tokens":
                       len(found), "cut": int(found[-1]) != policy.end_token}


def test_a_server_gives_the_same_answers(world, alone, tmp_path, monkeypatch):
    """One that serves each request by itself, and fails now and then."""
    pytest.importorskip("httpx2", reason="needs httpx2 (requirements.txt)")
    from remote_servers import PolicyServer

    from tools import remote
    monkeypatch.setattr(remote.JsonClient, "first_wait_s", 0.01)
    busy = (503, "busy", [])
    with PolicyServer(world / "ckpt", lambda n, body: busy if n % 9 == 4 else None) as server:
        flags = ["--server", server.url, "--served-model", "it"]
        done = in_process(*command(world, tmp_path / "served", *flags))
        assert "all 100 questions are answered" in done.stdout
        assert len(server.bodies) == 101 + len(range(4, len(server.bodies), 9))
        again = in_process(*command(world, tmp_path / "served"), check=False)
        assert again.returncode == 2 and "served_model" in again.stderr
    assert answers_of(tmp_path / "served") == alone
    with PolicyServer(world / "ckpt", more_tokens=1) as server:
        other = in_process(*command(world, tmp_path / "other", "--server", server.url,
                                    "--served-model", "it"), check=False)
    assert other.returncode == 2 and "prompt tokens and we count" in other.stderr
    with PolicyServer(world / "ckpt", lambda n, body: busy if n > 40 else None) as server:
        flags = ["--server", server.url, "--served-model", "it"]
        ended = in_process(*command(world, tmp_path / "failed", *flags), check=False)
        assert ended.returncode == 2 and "the same command goes on" in ended.stderr
    assert 0 < len(answers_of(tmp_path / "failed")) < 41


def test_two_ranks_share_the_scenes(world, alone, tmp_path, monkeypatch):
    """And a run without a launcher's help, as srun starts it: each rank for itself."""
    done = launch(["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
                  *command(world, tmp_path / "two"))
    assert done.returncode == 0 and "all 100 questions are answered" in done.stdout, done.stderr
    assert answers_of(tmp_path / "two") == alone
    parts = [read_rows(str(tmp_path / f"two/answers.{rank}.jsonl")) for rank in (0, 1)]
    assert sorted(map(len, parts)) == [40, 60]
    ends = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        ends.append(in_process(*command(world, tmp_path / "srun")).stdout.splitlines()[-1])
    assert ends[0].startswith("rank 0 is done; 40 answers of other ranks")
    assert ends[1].startswith("all 100 questions are answered")
    assert answers_of(tmp_path / "srun") == alone


def test_killed_and_resumed_with_other_numbers_of_ranks(world, alone, tmp_path):
    out = tmp_path / "out"
    env = dict(os.environ, RANK="0", WORLD_SIZE="3")
    process = subprocess.Popen([sys.executable, *command(world, out, "--together", 1)], cwd=ROOT,
                               env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = out / "answers.0.jsonl"
    kill_when(process, lambda: path.exists() and path.read_bytes().count(b"\n") >= 5)
    with open(path, "ab") as file:
        file.write(b'{"key": "scanqa/0", "pr')               # as if killed while it wrote
    done = len(answers_of(out))
    assert 5 <= done < 40
    finished = launch(["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
                      *command(world, out, "--together", 1))
    assert finished.returncode == 0, finished.stderr
    assert answers_of(out) == alone
    assert f"answers {100 - done} questions" not in finished.stdout     # two ranks shared them
    again = in_process(*command(world, out))
    assert "answers 0 questions of 0 scenes" in again.stdout and answers_of(out) == alone


def test_the_first_rank_that_fails_is_named(world, tmp_path, monkeypatch):
    data = tmp_path / "scenes"
    shutil.copytree(world / "scenes", data)
    scenes = answer.read_scenes(answer.parse_args([str(data)]))
    with open(scenes[1].pictures[0], "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
    words = ["-m", "gpt4scene.answer", str(data), "--ckpt", str(world / "ckpt"), "--out",
             str(tmp_path / "out"), *FLAGS]
    broken = in_process(*words, check=False)
    assert broken.returncode == 2 and "is no picture that can be read" in broken.stderr
    monkeypatch.setattr(answer, "load_chat_policy", lambda args, scenes: load_policy(args.ckpt))
    monkeypatch.setenv("WORLD_SIZE", "2")
    codes = {}
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        codes[rank] = in_process(*words, check=False)
    assert codes["1"].returncode == 2 and "truncated or not a picture" in codes["1"].stderr
    assert codes["0"].returncode == 2
    assert "40 of 100 answers are missing" in codes["0"].stderr
    assert "rank 1 failed first: the picture" in codes["0"].stderr
    shutil.copy(world / "scenes" / os.path.relpath(scenes[1].pictures[0], data),
                scenes[1].pictures[0])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "all 100" in in_process(*words).stdout and not list(tmp_path.glob("out/failed*"))


def test_control_runs_and_other_settings(world, alone, tmp_path):
    args = answer.parse_args([str(world / "scenes"), "--ckpt", str(world / "ckpt"), *FLAGS])
    scenes = answer.read_scenes(args)
    policy = answer.load_chat_policy(args, scenes)
    others = {scenes[0].name: scenes[1]}
    own, blank, other = (answer.load_pictures(policy, scenes[0], others, kind)
                         for kind in ("own", "blank", "other"))
    assert [frame.shape for frame in own] == [frame.shape for frame in blank]
    assert not any(frame.any() for frame in blank) and np.any(own[0] != other[0])
    for kind in ("blank", "other"):
        in_process(*command(world, tmp_path / kind, "--pictures", kind))
        assert answers_of(tmp_path / kind) != alone
    mixed = in_process(*command(world, world / "alone", "--pictures", "blank"), check=False)
    assert mixed.returncode == 2 and "another measurement (of other pictures)" in mixed.stderr
    done = in_process("-m", "gpt4scene.scores", world / "alone", world / "scenes", "--compare",
                      tmp_path / "blank")
    assert "100" not in done.stderr and "gain" in done.stdout


@pytest.mark.parametrize("change, words", [
    (lambda folder: os.remove(folder / "selected_images_val.json"), "0 files selected_images_"),
    (lambda folder: write_json(str(folder / "selected_images_val.json"), {}), "lists no pictures"),
    (lambda folder: os.remove(folder / "images_3D/u00000.png"), "u00000.png is not there"),
    (lambda folder: write_json(str(folder / "scanqa_val.json"), [{"scene_id": "u00000"}]),
     'record 0 of scanqa has no "prompt"')])
def test_files_that_do_not_fit_are_named(world, tmp_path, change, words):
    shutil.copytree(world / "scenes", tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(UserError, match=words):
        answer.read_scenes(answer.parse_args([str(tmp_path / "copy")]))
