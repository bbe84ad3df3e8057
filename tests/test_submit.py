"""tools/submit.py: the files of both leaderboards, of walks worked out by hand."""
import gzip
import json
import math
import os

import numpy as np
import pytest
from conftest import GLB
from helpers import FakePool, fake_episode

import cli
import evaluate
from cli import UserError, read_rows
from reward import FORWARD, LEFT, RIGHT, STOP
from tools import submit
from world import SimError


def write_test_split(folder, split, n=5, rxr=False):
    """Episodes with hidden goals, no ground truth: R2R's test, RxR's test_challenge."""
    episodes = []
    for i in range(n):
        episode = {**fake_episode(str(i) if rxr else i), "scene_id": "mp3d/h/h.glb"}
        del episode["goals"]
        if rxr:
            episode["goals"] = None
            episode["instruction"] |= {
                "instruction_id": str(70 - i), "timed_instruction": [{"start_time": math.nan}],
                "language": ("en-US", "en-IN", "hi-IN", "te-IN")[i % 4]}
        episodes.append(episode)
    os.makedirs(folder / split)
    name = f"{split}_guide" if rxr else split
    with gzip.open(folder / split / f"{name}.json.gz", "wt") as file:
        json.dump({"episodes": episodes}, file)
    os.makedirs(folder / "scenes" / "mp3d" / "h")
    (folder / "scenes" / "mp3d" / "h" / "h.glb").write_bytes(GLB)
    return ["--split", split, "--episodes", str(folder), "--scenes", str(folder / "scenes")]


def walked(monkeypatch, where, out, *flags, plan=(LEFT, LEFT, FORWARD, RIGHT, STOP)):
    """Every robot walks `plan` -> what evaluate.py returned."""
    monkeypatch.setattr(evaluate, "SimPool", FakePool)
    monkeypatch.setattr(evaluate, "load_agent", lambda args, settings, words: (
        lambda walks: [list(plan) for _ in walks]))
    return evaluate.main(evaluate.parse_args([*where, "--agent", "random", "--out", str(out),
                                              *flags]))


def write_file(folder, out):
    submit.main(submit.parse_args([str(folder), "--out", str(out)]))


# Every walk of these tests, by hand: two turns of 30 degrees to the left, a step, one back, stop.
STEP = [-0.25 * math.sin(math.pi / 3), 0.0, -0.125]
BY_HAND = [([0, 0, 0], 0, False), ([0, 0, 0], math.pi / 6, False), ([0, 0, 0], math.pi / 3, False),
           (STEP, math.pi / 3, False), (STEP, math.pi / 6, False), (STEP, math.pi / 6, True)]


def test_the_r2r_leaderboard_file(monkeypatch, tmp_path, capsys):
    where = write_test_split(tmp_path / "r2r", "test")
    found = walked(monkeypatch, where, tmp_path / "out", "--turn-deg", "30", "--pictures", "1")
    assert found["scored"] == 0
    assert found["episodes"] == 5
    assert found["ends"] == {"stop": 5}
    assert all(value == {"mean": None, "ci": None} for value in found["metrics"].values())
    printed = capsys.readouterr().out
    assert "0 of 5 episodes scored" in printed
    assert "nan" not in printed
    assert "SR" not in printed
    assert os.path.exists(tmp_path / "out/pictures/0.png")
    write_file(tmp_path / "out", tmp_path / "x/r2r.json")
    assert "the walks of 5 episodes" in capsys.readouterr().out
    walks = json.loads((tmp_path / "x/r2r.json").read_text())
    assert set(walks) == {"0", "1", "2", "3", "4"} and isinstance(walks, dict)
    for records in walks.values():                          # the schema, written out
        assert isinstance(records, list)
        for record in records:
            assert set(record) == {"position", "heading", "stop"}
            assert len(record["position"]) == 3 and isinstance(record["stop"], bool)
            assert all(math.isfinite(v) for v in (*record["position"], record["heading"]))
        assert len(records) == len(BY_HAND)
        for record, (place, heading, stop) in zip(records, BY_HAND):
            assert record["position"] == pytest.approx(place, abs=1e-6)
            assert record["heading"] == pytest.approx(heading, abs=1e-6) and record["stop"] is stop


def test_a_walk_that_never_stops_has_no_stop_in_the_file(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "r2r", "test")
    walked(monkeypatch, where, tmp_path / "out", "--turn-deg", "30", "--max-actions", "4",
           plan=[FORWARD])
    write_file(tmp_path / "out", tmp_path / "r2r.json")
    for records in json.loads((tmp_path / "r2r.json").read_text()).values():
        assert len(records) == 5 and not any(record["stop"] for record in records)


def test_the_rxr_leaderboard_file(monkeypatch, tmp_path, capsys):
    where = write_test_split(tmp_path / "rxr", "test_challenge", rxr=True)
    walked(monkeypatch, where, tmp_path / "out")
    write_file(tmp_path / "out", tmp_path / "rxr.jsonl")
    assert "5 episodes for the leaderboard\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "rxr.jsonl").read_text().splitlines()]
    assert [line["instruction_id"] for line in lines] == [66, 67, 68, 69, 70], "ints, in order"
    for line in lines:                                      # the schema, written out
        assert set(line) == {"instruction_id", "path"}
        assert np.allclose(line["path"], [[0, 0, 0], STEP], atol=1e-6), "turns add no place"
    walked(monkeypatch, where, tmp_path / "en", "--languages", "en-US,en-IN")
    write_file(tmp_path / "en", tmp_path / "en.jsonl")
    assert "in en-IN, en-US; it takes all of" in capsys.readouterr().out
    assert len((tmp_path / "en.jsonl").read_text().splitlines()) == 3


def test_a_submission_is_whole_or_not_written(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "r2r", "test")
    file, out = tmp_path / "r2r.json", tmp_path / "out"
    walked(monkeypatch, where, tmp_path / "few", "--turn-deg", "30", "--limit", "2")
    with pytest.raises(UserError, match="--limit 2: a leaderboard takes every episode"):
        write_file(tmp_path / "few", file)
    with pytest.raises(UserError, match="holds no results"):
        write_file(tmp_path / "nothing", file)
    broken = FakePool.reset
    monkeypatch.setattr(FakePool, "reset", lambda self, i, episode, frame=True:
                        SimError("h.glb is broken") if episode["episode_id"] == 1
                        else broken(self, i, episode, frame))
    monkeypatch.setattr(FakePool, "load", lambda self, i, scene_id: SimError("h.glb is broken"))
    with pytest.raises(SystemExit, match="1 episodes ended in simulator errors"):
        walked(monkeypatch, where, out, "--turn-deg", "30")
    with pytest.raises(UserError, match="1 episodes have no result, because a simulator failed"):
        write_file(out, file)
    rows = read_rows(out / "episodes.jsonl")
    cli.write_lines(out / "episodes.jsonl", [{**row, "end": "invalid"} if row["end"] == "error"
                                                  else row for row in rows])
    with pytest.raises(UserError, match="1 of 5 episodes have no walk on record, the first is 1"):
        write_file(out, file)
    os.remove(out / "results.json")
    with pytest.raises(UserError, match="it has not ended: 5 of 5"):
        write_file(out, file)
    assert not file.exists()


def test_rxrs_leaderboard_needs_instruction_ids(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "rxr", "test_challenge", rxr=True)
    walked(monkeypatch, where, tmp_path / "out")
    path = tmp_path / "rxr/test_challenge/test_challenge_guide.json.gz"
    data = json.loads(gzip.decompress(path.read_bytes()))
    del data["episodes"][2]["instruction"]["instruction_id"]
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    with pytest.raises(UserError, match="episode 2 of .*has no 'instruction_id'"):
        write_file(tmp_path / "out", tmp_path / "rxr.jsonl")


def test_baselines_that_need_a_goal_or_a_ground_truth_are_refused(monkeypatch, tmp_path):
    where = write_test_split(tmp_path / "r2r", "test")
    for agent in ("oracle", "forward"):
        with pytest.raises(UserError, match=f"hides its goals: there is no --agent {agent}"):
            walked(monkeypatch, where, tmp_path / "out", "--turn-deg", "30", "--agent", agent)
