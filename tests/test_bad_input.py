"""What a user can get wrong, from the command line: a sentence, exit status 2, nothing lost.

Run it   python -m pytest tests/test_bad_input.py
"""
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_process

import cli
import engine
import evaluate
import make_data
import sft
from activevln import grpo_online
from activevln.dialog import DIALOG
from checkpoint import load_policy, save_policy
from cli import UserError, read_rows
from model import CONTRACT
from tools import report
from world import SimError
from world import houses as houses_script
from world.episodes import check_scenes, read_episodes, scene_hash
from world.house_sim import HouseSim
from world.robots import ROBOTS


@pytest.fixture
def houses(ego, tmp_path):
    """A copy of the two houses that a test may spoil."""
    shutil.copytree(os.path.join(ego, "..", "..", "houses"), tmp_path / "houses")
    return tmp_path / "houses"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy of a robot that turns 15 degrees."""
    folder = tmp_path_factory.mktemp("ckpt")
    contract = dict(CONTRACT, dataset="houses", turn_deg=15)
    save_policy(load_policy("tiny", contract=contract, texts=["go"]), str(folder))
    return folder


def refused(*command, words):
    """The script says `words` in a sentence and exits with 2."""
    done = in_process(*command, check=False)
    assert done.returncode == 2, done.stderr
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
    done = in_process("evaluate.py", "--agent", "stop", "--episodes", houses, "--out",
                      tmp_path / "y", "--sims", 1, check=False)
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
    contract = json.loads((checkpoint / "nav.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "babbler")
    (tmp_path / "babbler" / "nav.json").write_text(json.dumps(dict(contract, turn_deg=30)))
    in_process("evaluate.py", "--ckpt", tmp_path / "babbler", "--episodes", houses, "--out",
           tmp_path / "y", "--sims", 1, "--device", "cpu", "--limit", 2)
    results = json.loads((tmp_path / "y" / "results.json").read_text())
    assert results["ends"] == {"malformed": 2} and results["malformed_share"] == 1.0
    assert results["metrics"]["success"]["mean"] == 0


def test_a_run_is_not_resumed_with_other_flags(ego, tmp_path):
    flags = ["--model", "tiny", "--data", ego, "--out", tmp_path / "x", "--batch-size", 8,
             "--max-steps", 1, "--device", "cpu"]
    in_process("sft.py", *flags)
    refused("sft.py", *flags, "--lr", 1e-3, words=["--lr", "another folder"])


@pytest.mark.parametrize("command", [
    ["-m", "world.houses", "--train-houses", 1], ["make_data.py"], ["sft.py", "--model", "tiny"],
    ["evaluate.py", "--agent", "stop"]])
def test_a_folder_that_cannot_be_written(ego, command):
    root = os.path.join(ego, "..", "..")
    data = {"make_data.py": ["--episodes", f"{root}/houses"], "sft.py": ["--data", ego],
            "evaluate.py": ["--episodes", f"{root}/houses"]}.get(command[0], [])
    refused(*command, *data, "--out", "/proc/nothing", words=["/proc/nothing"])


# ---------------------------------------------------------------- scenes are part of a result


def exchange(houses, one, other):
    """Let two houses of a tree change their names."""
    one, other = (houses / "scenes" / "houses" / name / f"{name}.glb" for name in (one, other))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def record(houses, out):
    return make_data.main(make_data.parse_args(["--episodes", str(houses), "--out", str(out),
                                                "--sims", "1"]))


def walk_stop(houses, out, *flags):
    return evaluate.main(evaluate.parse_args(["--agent", "stop", "--episodes", str(houses), "--out",
                                              str(out), "--sims", "1", *flags]))


def test_episode_files_of_houses_carry_their_scenes_hashes(houses):
    data = json.loads(gzip.decompress((houses / "train" / "train.json.gz").read_bytes()))
    assert set(data["scenes"]) == {episode["scene_id"] for episode in data["episodes"]}
    for scene_id, known in data["scenes"].items():
        assert known == scene_hash(str(houses / "scenes" / scene_id))
    assert "scene_sha256" not in data["episodes"][0], "R2R's loaders take no unknown field"


def test_episodes_of_one_world_on_scenes_of_another(houses, tmp_path):
    """An oracle would walk there and be wrong; every script refuses in a sentence."""
    exchange(houses, "u00000", "u00001")
    exchange(houses, "h00000", "h00001")
    sentence = "00000.glb has the hash .*episodes of one world on scenes of another.*--scenes"
    with pytest.raises(UserError, match=sentence):
        walk_stop(houses, tmp_path / "y")
    with pytest.raises(UserError, match=sentence):
        record(houses, tmp_path / "x")
    with pytest.raises(UserError, match="episodes of one world on scenes of another"):
        make_data.main(make_data.parse_args(["--verify", "--episodes", str(houses)]))
    args = grpo_online.parse_args(["--episodes", str(houses)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_online, "check_context", lambda *anything: None)
        with pytest.raises(UserError, match=sentence):
            grpo_online.RolloutEnv(args, SimpleNamespace(
                contract=dict(CONTRACT, dataset="houses", turn_deg=30)), "train")
    assert not os.path.exists(tmp_path / "x") and not os.path.exists(tmp_path / "y")


def test_results_and_recordings_carry_their_scenes_and_go_on_in_no_others(houses, tmp_path):
    """With files that know no hashes (R2R's), what was measured still does."""
    for split in ("train", "val_unseen"):
        path = houses / split / f"{split}.json.gz"
        data = json.loads(gzip.decompress(path.read_bytes()))
        del data["scenes"]
        path.write_bytes(gzip.compress(json.dumps(data).encode()))
    walk_stop(houses, tmp_path / "y")
    record(houses, tmp_path / "x")
    told = check_scenes(read_episodes(str(houses), "val_unseen"), str(houses / "scenes"))
    assert told["count"] == 2
    for name in ("run.json", "results.json"):
        assert json.loads((tmp_path / "y" / name).read_text())["scenes"] == told
    recording = json.loads((tmp_path / "x" / "train" / "recording.json").read_text())
    assert recording["scenes"] == check_scenes(read_episodes(str(houses), "train"),
                                               str(houses / "scenes"))
    walk_stop(houses, tmp_path / "y")                          # the same scenes: it goes on
    exchange(houses, "u00000", "u00001")
    exchange(houses, "h00000", "h00001")
    with pytest.raises(UserError, match="other scenes"):
        walk_stop(houses, tmp_path / "y")
    with pytest.raises(UserError, match="other settings .see scenes"):
        record(houses, tmp_path / "x")


# ---------------------------------------------------------------- without ground truth, or a way


def test_episodes_without_ground_truth_are_scored_without_ndtw(houses, tmp_path, capsys):
    """As the plain R2R_VLNCE_v1-3: NE, SR, OS, SPL and TL need none."""
    walk_stop(houses, tmp_path / "with")
    os.remove(houses / "val_unseen" / "val_unseen_gt.json.gz")
    found = walk_stop(houses, tmp_path / "without")
    assert "nDTW and SDTW are not measured: no ground truth" in capsys.readouterr().out
    whole = json.loads((tmp_path / "with" / "results.json").read_text())
    assert "no_ndtw" not in whole and "no ground truth" in found["no_ndtw"]
    for name, value in whole["metrics"].items():
        blank = name.startswith(("ndtw", "sdtw"))
        assert found["metrics"][name] == ({"mean": None, "ci": None} if blank else value)
    walk_stop(houses, tmp_path / "again")
    capsys.readouterr()
    both = [str(tmp_path / name) for name in ("without", "again")]
    report.main(report.parse_args(both))
    printed = capsys.readouterr().out
    assert "SR        0.000 ->   0.000" in printed and "nDTW" not in printed
    report.main(report.parse_args(["--summary", *both]))
    rows = capsys.readouterr().out.splitlines()[1:3]
    assert [row.split()[-4:] for row in rows] == [["-", "-", "1.0", "0"]] * 2
    with pytest.raises(UserError, match="there is no --agent forward"):
        walk_stop(houses, tmp_path / "z", "--agent", "forward")


def inside_a_thing(houses, episode):
    """A place in the episode's house where no robot can stand."""
    sim = HouseSim(ROBOTS["houses"], str(houses / "scenes"))
    sim.reset(episode)
    for x, y, z in (sim.scene.lo + sim.scene.hi) / 2:
        try:
            sim.set_pose([x, y, z], [0, 0, 0, 1])
        except SimError:
            return [float(x), 0.0, float(z)]
    raise AssertionError("a house without walls")


def test_a_start_in_a_wall_is_named_once_and_not_walked_again(houses, tmp_path, capsys):
    """The simulator refuses it, and always will: counted apart, exit status 0, one row."""
    def in_a_wall(episode):
        if episode["episode_id"] == 1:
            episode["start_position"] = inside_a_thing(houses, episode)
    edit_episodes(houses, "val_unseen", in_a_wall)
    os.remove(houses / "val_unseen" / "val_unseen_gt.json.gz")          # it starts elsewhere
    found = walk_stop(houses, tmp_path / "y")
    assert (found["invalid"], found["errors"], found["scored"]) == (1, 0, 3)
    told = capsys.readouterr().out
    assert "1 invalid, 0 errors" in told
    assert "the first is 1: " in told
    assert "obstacle" in told
    rows = (tmp_path / "y" / "episodes.jsonl").read_bytes()
    walk_stop(houses, tmp_path / "y")
    assert "walks 0 episodes" in capsys.readouterr().out
    assert (tmp_path / "y" / "episodes.jsonl").read_bytes() == rows


def test_an_instruction_longer_than_the_models_context(houses, checkpoint, tmp_path):
    def long_words(episode):
        if episode["episode_id"] == 2:
            episode["instruction"]["instruction_text"] = "go " * 1999
    robot = {"height": 56, "width": 56}
    for contract in (None, dict(DIALOG, dataset="houses", turn_deg=15)):
        policy = load_policy(str(checkpoint), contract, replace_contract=True)
        policy.model.config.text_config.max_position_embeddings = 4096
        evaluate.check_context(policy, ["go straight"], robot)
        with pytest.raises(UserError, match='"go go .* tokens, its prompt .*context holds 4000'):
            evaluate.check_context(policy, ["turn left", "go " * 4000], robot)
    edit_episodes(houses, "val_unseen", long_words)
    config = json.loads((checkpoint / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        if "max_position_embeddings" in part:
            part["max_position_embeddings"] = 2048
    shutil.copytree(checkpoint, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the model's context holds"):
        evaluate.main(evaluate.parse_args([
            "--ckpt", str(tmp_path / "short"), "--episodes", str(houses), "--out",
            str(tmp_path / "y"), "--sims", "1", "--device", "cpu", "--turn-deg", "15"]))
    assert (tmp_path / "y" / "episodes.jsonl").exists() is False


# ---------------------------------------------------------------- a policy that has diverged


def test_a_policy_that_gives_no_numbers_is_not_scored(houses, checkpoint, tmp_path, capsys):
    """Weights that are finite, and log-probabilities that are not: no walk is written."""
    policy = load_policy(str(checkpoint))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1e17)
    policy.contract["turn_deg"] = 30
    (tmp_path / "lost").mkdir()
    save_policy(policy, str(tmp_path / "lost"))
    args = ["--ckpt", str(tmp_path / "lost"), "--episodes", str(houses), "--device", "cpu",
            "--out", str(tmp_path / "y"), "--sims", "1"]
    with pytest.raises(SystemExit) as left:
        cli.run_cli(evaluate.main, lambda: evaluate.parse_args(args))
    assert left.value.code == 2
    assert "log-probabilities that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "y" / "results.json").exists()
    assert read_rows(tmp_path / "y" / "episodes.jsonl") == []


def test_results_are_not_continued_with_another_dtype(houses, checkpoint, tmp_path):
    where = ["--ckpt", str(checkpoint), "--episodes", str(houses), "--device", "cpu"]
    settings = {dtype: evaluate.prepare(evaluate.parse_args([*where, "--dtype", dtype]))[0]
                for dtype in ("float32", "bfloat16")}
    assert settings["float32"]["device"] == "cpu" and settings["float32"]["dtype"] == "float32"
    evaluate.open_out(str(tmp_path / "y"), settings["float32"])
    with pytest.raises(UserError, match="another measurement.*dtype"):
        evaluate.open_out(str(tmp_path / "y"), settings["bfloat16"])


# ---------------------------------------------------------------- one folder, two processes


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path, monkeypatch):
    """Every script asks; a kill -9 frees the folder, and nothing had been written."""
    out = str(tmp_path / "out")
    code = f"import cli, time; cli.lock_folder({out!r}); print('held', flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(houses_script, "plan_work", lambda args: pytest.fail("it went on"))
    run = sft.parse_args(["--out", out, "--device", "cpu"])
    engine.init_distributed(run)
    tries = [lambda: engine.open_run(run), lambda: make_data.open_folder(out, {}, {}),
             lambda: evaluate.open_out(out, {}),
             lambda: houses_script.main(houses_script.parse_args(["--out", out]))]
    for attempt in tries:
        with pytest.raises(UserError, match="is being written by another process"):
            attempt()
    assert os.listdir(out) == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for attempt in tries[:3]:
        attempt()
    with monkeypatch.context() as patch:        # the second rank's own rows, in the same folder
        patch.setenv("RANK", "1")
        evaluate.open_out(out, {})
    assert {".lock", ".lock.1"} < set(os.listdir(out))


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """make(bytes) -> a folder on a disk of that size; skips where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip("needs the right to mount a small disk (root): " + done.stderr.strip())
        return folder
    yield make
    subprocess.run(["umount", "-l", folder], capture_output=True)


def writers(ego):
    """Each script's main, on the two houses; the sizes let the first files through."""
    worlds = os.path.normpath(os.path.join(ego, "..", "..", "houses"))
    return {
        "houses": (houses_script, 60_000, ["--train-houses", "2", "--walks-per-house", "4",
                   "--val-episodes", "4", "--unseen-houses", "2", "--jobs", "1"]),
        "make_data": (make_data, 60_000, ["--episodes", worlds, "--sims", "1"]),
        "evaluate": (evaluate, 20_000, ["--episodes", worlds, "--agent", "oracle", "--sims", "1"]),
        "sft, its state": (sft, 1_000_000, ["--data", ego, "--model", "tiny", "--device", "cpu",
                           "--batch-size", "8", "--max-steps", "1"]),
        "sft, its policy": (sft, 12_500_000, ["--data", ego, "--model", "tiny", "--device", "cpu",
                            "--batch-size", "8", "--max-steps", "1"]),
    }


@pytest.mark.parametrize("name", list(writers("")))
def test_a_full_disk_is_a_sentence(ego, small_disk, name, capsys):
    module, size, flags = writers(ego)[name]
    out = small_disk(size) / "out"
    with pytest.raises(SystemExit) as left:
        cli.run_cli(module.main, lambda: module.parse_args([*flags, "--out", str(out)]))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "error: the disk is full (" in said and "Traceback" not in said
    if name == "sft, its policy":                        # what was complete before is complete now
        assert (out / "state" / "latest").read_text() == "step_000001"


def test_whatever_a_library_says_of_a_full_disk_is_understood():
    full = OSError(28, "No space left on device", "x/y")
    assert cli.disk_full(full) == "No space left on device: x/y"
    outer = RuntimeError("could not write")
    outer.__cause__ = full
    assert cli.disk_full(outer) == cli.disk_full(full)
    for words in ("Error while serializing: I/O error: No space left on device (os error 28)",
                  "[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"):
        assert cli.disk_full(RuntimeError(words)) == words
    assert cli.disk_full(OSError(13, "Permission denied")) is None
    assert cli.disk_full(RuntimeError("shapes cannot be multiplied")) is None
