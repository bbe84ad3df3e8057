"""
tools/report.py on folders written here, tools/bounds.py against walks by hand and by brute force.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import evaluate_plane, scored_row, write_plane

import cli
import evaluate
from cli import UserError, read_rows
from intervals import wilson
from reward import FORWARD, LEFT, STOP
from tools import bounds, report
from world import houses
from world.house_sim import HouseSim
from world.robots import ROBOTS

RUN = {"split": "val", "role": "guide", "languages": None, "limit": None, "data": "d0",
       "robot": {"turn_deg": 30}, "radius_m": 1.0, "second_radius_m": 3.0, "max_actions": 150,
       "seed": 0, "ckpt": "ckpt/a", "weights": "w", "execute": 3, "contract": {"horizon": 6}}


def write_results(folder, values, ended=True, **changes):
    """A results folder of episodes 0.., two to a scene, with this success each; None: an error."""
    folder.mkdir(parents=True)
    settings = {"episodes": len(values), **RUN, **changes}
    rows = [scored_row(i, f"s{i // 2}", success=float(value), spl=float(value))
            if value is not None else {"episode_id": i, "scene_id": f"s{i // 2}", "end": "error",
                                       "error": "it died", "decisions": 0, "malformed": 0}
            for i, value in enumerate(values)]
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        (folder / "results.json").write_text(json.dumps({"versions": {"torch": "2"}}))
    return str(folder)


def call(*argv):
    return report.main(report.parse_args(list(map(str, argv))))


# ---------------------------------------------------------------- like with like


@pytest.mark.parametrize("key, value", [
    ("data", "d1"), ("split", "val_seen"), ("robot", {"turn_deg": 15}), ("radius_m", 3.0),
    ("max_actions", 500), ("role", "follower"), ("languages", ["en-US"]), ("limit", 12),
    ("scenes", "another hash")])
def test_what_was_measured_differently_is_not_compared(tmp_path, key, value):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    b = write_results(tmp_path / "b", [1, 1] * 6, **{key: value})
    for flags in ((), ("--partial",)):
        with pytest.raises(UserError, match=rf"did not measure the same thing \({key}"):
            call(a, b, *flags)
    if key != "split":
        with pytest.raises(UserError, match=rf"did not measure the same thing \({key}"):
            call("--summary", a, b)


def test_a_table_has_one_action_cap_over_its_splits(tmp_path):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    b = write_results(tmp_path / "b", [1, 1] * 6, split="val_seen", data="other", max_actions=500)
    with pytest.raises(UserError, match=r"\(max_actions 150 -> 500\)"):
        call("--summary", a, b)


def test_splits_of_one_table_may_lie_in_other_scenes_and_rows_of_a_split_may_not(tmp_path, capsys):
    here, there = {"count": 3, "sha256": "a" * 16}, {"count": 3, "sha256": "b" * 16}
    a = write_results(tmp_path / "a", [0, 1] * 6, scenes=here)
    b = write_results(tmp_path / "b", [1, 1] * 6, split="val_seen", data="other", scenes=there)
    call("--summary", a, b)
    assert len(capsys.readouterr().out.splitlines()) > 3
    c = write_results(tmp_path / "c", [1, 1] * 6, scenes=there)
    with pytest.raises(UserError, match="did not measure the same thing .scenes"):
        call("--summary", a, b, c)


def test_what_differs_is_named(tmp_path, capsys):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    b = write_results(tmp_path / "b", [1, 1] * 5 + [0, 1], ckpt="ckpt/b", weights="x", execute=6,
                      contract={"horizon": 8}, dtype="bfloat16", source="elsewhere")
    call(a, b)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == ("differs: ckpt ckpt/a -> ckpt/b, execute 3 -> 6, contract.horizon 6 -> "
                       "8, dtype none -> bfloat16")
    assert printed[1].startswith("SR        0.500 ->   0.917   difference +0.417 [+0.")
    assert printed[1].endswith("   12 pairs")
    call(a, write_results(tmp_path / "c", [0, 1] * 6, weights="x"))
    printed = capsys.readouterr().out
    assert "differs: weights\n" in printed and "the same in every scene: no interval" in printed
    call(a, write_results(tmp_path / "d", [0, 1] * 6))
    assert "differs: nothing that is on record\n" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_refused_or_labelled(tmp_path, capsys):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    cases = [(write_results(tmp_path / "b", [1] * 5, ended=False, episodes=12),
              "it has not ended: 5 of 12 episodes have walked"),
             (write_results(tmp_path / "c", [1] * 5, episodes=12), "not ended: 5 of 12"),
             (write_results(tmp_path / "d", [1] * 11 + [None]), "1 episodes have no result")]
    for folder, sentence in cases:
        for argv in ([a, folder], ["--summary", a, folder]):
            with pytest.raises(UserError, match=sentence + ".*--partial"):
                call(*argv)
        call(a, folder, "--partial")
        printed = capsys.readouterr().out
        assert f"PARTIAL {folder}: " in printed and sentence in printed
    assert "1 episodes are scored in one of them only" in printed
    call("--summary", a, cases[0][0], "--partial", "--out", tmp_path / "t.json")
    assert [row["partial"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]] == [
        False, True]
    assert "   partial\n" in capsys.readouterr().out


def test_folders_that_are_no_results_or_given_twice(tmp_path):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    os.symlink(a, tmp_path / "again")
    for second, sentence in ((a, "given twice"), (tmp_path / "again", "given twice"),
                             (tmp_path / "nothing", "holds no results .*evaluate it first")):
        for flags in ((), ("--summary",)):
            with pytest.raises(UserError, match=sentence):
                call(a, second, *flags)
    with pytest.raises(UserError, match="nothing to compare"):
        call(a)
    (tmp_path / "a/run.json").write_text('{"radius_m": 1}')
    with pytest.raises(UserError, match="has no split, data, max_actions"):
        call(a, write_results(tmp_path / "b", [1]))
    with pytest.raises(UserError, match="no scored episode in common"):
        call(tmp_path / "b", write_results(tmp_path / "c", [None]), "--partial")
    with pytest.raises(UserError, match="no scored episode: leave it out"):
        call("--summary", tmp_path / "c", "--partial")


# ---------------------------------------------------------------- numbers


def test_a_paired_difference_is_drawn_by_scenes(tmp_path):
    """What is hard is hard for both; whole scenes gain or do not, so scenes are what counts."""
    rng = np.random.default_rng(2)
    hard = rng.random(400) < 0.5
    gains = np.repeat(rng.random(20) < 0.3, 20) & ~hard
    a = {str(i): scored_row(i, f"s{i // 20}", success=float(h)) for i, h in enumerate(hard)}
    b = {str(i): scored_row(i, f"s{i // 20}", success=float(h or g))
         for i, (h, g) in enumerate(zip(hard, gains))}
    found = report.paired_difference(a, {key: row for key, row in b.items() if int(key) >= 3})
    assert found["episodes"] == 397
    width = np.ptp(found["ci"])
    singly = {key: {**row, "scene_id": key} for key, row in a.items()}
    assert width > 1.8 * np.ptp(report.paired_difference(singly, b)["ci"])
    assert found["ci"][0] < found["difference"] < found["ci"][1]
    b["0"] = {**b["0"], "distance_to_goal": None}                    # ended where no way is known
    assert report.paired_difference(a, b, "distance_to_goal")["episodes"] == 399


def test_several_runs_are_compared_with_their_start(tmp_path, capsys):
    rng = np.random.default_rng(0)
    before = (rng.random(40) < 0.5).astype(float)
    tables = [before] + [np.maximum(before, rng.random(40) < 0.1) for _ in range(2)]
    ckpts = [tmp_path / f"ckpt{i}" for i in range(3)]
    for i, ckpt in enumerate(ckpts):
        ckpt.mkdir()
        (ckpt / "args.json").write_text(json.dumps({"seed": i}))
        (ckpt / "log.jsonl").write_text('{"step": 1, "minutes": 7.125}\n')
    folders = [write_results(tmp_path / str(i), table, ckpt=str(ckpts[i]))
               for i, table in enumerate(tables)]
    out = tmp_path / "new/online.json"
    call(*folders, "--out", out)
    printed = json.loads(out.read_text())
    assert "all together" in capsys.readouterr().out
    for i, (run, table) in enumerate(zip(printed["runs"], tables[1:])):
        assert (run["seed"], run["episodes"], run["minutes"]) == (i + 1, 40, 7.12)
        assert run["diff"] == pytest.approx((table - before).mean())
        assert run["diff_ci"][0] <= run["diff"] <= run["diff_ci"][1]
    assert printed["pooled"]["runs"] == 2 and printed["pooled"]["difference"] == pytest.approx(
        np.mean([run["diff"] for run in printed["runs"]]))
    # of two folders the file is written as well
    call(*folders[:2], "--out", out)
    assert len(json.loads(out.read_text())["runs"]) == 1
    with pytest.raises(UserError, match="give another --out"):
        call(*folders[:2], "--out", out / "below")


def test_one_table_of_real_results(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data")
    for agent in ("stop", "oracle"):
        evaluate_plane(monkeypatch, data, tmp_path / agent, "--agent", agent)
    both = [tmp_path / "stop", tmp_path / "oracle"]
    call(*both)
    printed = capsys.readouterr().out
    assert "difference +1.000 (the same in every scene: no interval)   9 pairs" in printed
    (tmp_path / "minutes.jsonl").write_text("".join(json.dumps(
        {"stage": name, "began": began, "ended": ended}) + "\n" for name, began, ended in (
            ("train", 0, 60), ("walk", 60, 150), ("walk_too", 90, 180), ("later", 300, 360))))
    call("--summary", *both, "--out", tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["minutes"] == {"train": 1, "walk": 1.5, "walk_too": 1.5, "later": 1}
    assert [(r["agent"], r["split"], r["sr"], r["sr_ci"]) for r in written["rows"]] == [
        ("stop", "val", 0.0, wilson(0, 9)), ("oracle", "val", 1.0, wilson(9, 9))]
    assert set(written["rows"][0]) == {
        "agent", "split", "episodes", "partial", "radius_m", "max_actions", "sr", "sr_ci", "spl",
        "os", "ne_m", "tl_m", "ndtw", "sdtw", "steps", "errors", "unscored", "interval"}
    printed = capsys.readouterr().out
    assert "4.0 minutes: train 1.0, walk 1.5, walk_too 1.5, later 1.0" in printed  # two overlap
    assert "oracle  val              9   1.00 [0.70, 1.00]" in printed
    assert "a bootstrap over 9 trajectories for means; fewer than 5 scenes" in printed


def test_a_metric_that_no_row_has_is_a_dash(tmp_path, capsys):
    """A split with goals and without a ground truth has no nDTW and no SDTW."""
    folders = [write_results(tmp_path / name, [0, 1] * 6) for name in "ab"]
    for folder in folders:
        path = os.path.join(folder, "episodes.jsonl")
        rows = [{key: value for key, value in row.items() if "dtw" not in key}
                for row in read_rows(path)]
        cli.write_lines(path, rows)
    call("--summary", *folders)
    assert " 0.00     -     -  " in capsys.readouterr().out
    call(*folders)
    printed = capsys.readouterr().out
    assert "SR" in printed and "nDTW" not in printed


def test_exit_codes_and_a_reader_that_has_gone(tmp_path):
    a = write_results(tmp_path / "a", [0, 1] * 6)
    b = write_results(tmp_path / "b", [0, 1] * 6)
    read, write = os.pipe()
    os.close(read)                                                       # as `| head -0` does
    gone = subprocess.run([sys.executable, "-m", "tools.report", a, b], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert gone.returncode == 1 and gone.stderr == ""
    done = subprocess.run([sys.executable, "-m", "tools.report", a, a], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("report.py: error: ")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- what half the input could reach


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("houses"))
    houses.main(houses.parse_args(["--out", folder, "--train-houses", "1", "--walks-per-house", "1",
                                   "--unseen-houses", "6", "--val-episodes", "24", "--jobs", "1"]))
    return folder


def test_wordings_leave_names_and_synonyms_out():
    same = ["turn left, go into the pink room, then wait at the red sofa.",
            "turn left, enter the brown room and stop by the blue bed."]
    other = ["turn right, go into the pink room, then wait at the red sofa.",
             "turn left, go into the pink room, turn left, then wait at the red sofa.",
             "turn left and wait at the red sofa.", "go straight to the red sofa and stop."]
    assert len({bounds.wording(text) for text in same}) == 1
    assert len({bounds.wording(text) for text in same[:1] + other}) == 5


def test_arrivals_are_those_of_the_simulator(made):
    """Twelve sequences at once, against one after the other by the simulator's own act()."""
    episodes = evaluate.read_episodes(made, "val_unseen")[:6]
    truths = evaluate.read_ground_truth(made, "val_unseen")
    sequences = [truths[str(e["episode_id"])]["actions"] for e in episodes]
    sequences += [[LEFT] * k + [FORWARD] * 14 + [STOP] for k in range(6)]
    sim, arrived = HouseSim(ROBOTS["houses"], f"{made}/scenes"), []
    for n, episode in enumerate(episodes):
        found = bounds.arrivals(sim, episode, sequences, 1.0)
        assert found[n]                                              # its own expert's walk
        for sequence, arrives in zip(sequences, found):
            sim.reset(episode)
            for action in sequence[:-1]:
                sim.act(action)
            assert (sim.geodesic(sim.goals) < 1.0) == arrives
        arrived.append(found)
    assert 6 < np.sum(arrived) < 60


def test_the_likely_goals_hold_the_real_one_and_the_bounds_are_shares(made, capsys):
    sim = HouseSim(ROBOTS["houses"], f"{made}/scenes")
    for episode in evaluate.read_episodes(made, "val_unseen"):
        sim.reset(episode)
        goals = {name: goal for name, goal, _ in bounds.likely_goals(
            sim, bounds.read_house(sim.scene), episode)}
        x, _, z = episode["goals"][0]["position"]
        assert np.allclose(goals[episode["info"]["goal"]], (x, z), atol=0.1)
        share, n = bounds.pictures_only(sim, episode, 1.0)
        assert n == len(goals) and 1 / n <= share <= 1
        assert bounds.pictures_only(sim, episode, 100.0)[0] == 1.0    # everywhere is near enough
    found = bounds.main(bounds.parse_args(["--episodes", made]))
    printed = capsys.readouterr().out
    assert "words_only" in printed and "pictures_only" in printed
    for name in ("words_only", "pictures_only"):
        low, high = found[name]["ci"]
        assert 0 < low <= found[name]["mean"] <= high <= 1
    # what the expert's own walks reach is no less than what going straight on does
    few = bounds.bounds_of(made, "val_unseen", None, ROBOTS["houses"], 1.0, 2)
    assert few["words_only"]["mean"] == 0.0                           # two actions lead nowhere


def test_bounds_stand_below_the_table(made, tmp_path, capsys):
    out = tmp_path / "oracle_val_unseen"
    evaluate.main(evaluate.parse_args(["--episodes", made, "--agent", "oracle", "--sims", "1",
                                       "--limit", "6", "--out", str(out)]))
    capsys.readouterr()
    call("--summary", out, "--bounds", "--out", tmp_path / "table.json")
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("oracle  val_unseen       6   1.00")
    assert printed[4].startswith("words_only     val_unseen       6  ")
    assert printed[5].startswith("pictures_only  val_unseen       6  ")
    written = json.loads((tmp_path / "table.json").read_text())["bounds"]
    assert [found["split"] for found in written] == ["val_unseen"] and written[0]["episodes"] == 6
    with pytest.raises(UserError, match="--bounds belongs to --summary"):
        call(out, "--bounds")
