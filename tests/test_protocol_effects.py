"""bench/protocol_effects.py: its changes by hand, and the whole of it on the plane."""
import protocol_effects
import pytest
from helpers import FakePool, write_plane

import evaluate
from cli import read_json
from evaluate import ndtw


def row(name, **values):
    return {"episode_id": name, "trajectory_id": name, "scene_id": f"s{name}", "end": "stop",
            "steps": 20, "start_distance": 4.0, "path_length": 5.0, "distance_to_goal": 0.5,
            "ndtw": 0.5, "success": 1.0, "spl": 0.8, "sdtw": 0.5, "oracle_success": 1.0,
            "poses": [[0, 0, -i, 0] for i in range(3)], **values}


def test_changes_by_hand():
    rows = {"0": row(0), "1": row(1, steps=450), "2": row(2, steps=501), "3": row(
        3, distance_to_goal=1.0, success=0.0, spl=0.0, sdtw=0.0)}
    rows |= {str(i): row(i) for i in range(4, 100)}
    truths = {name: {"locations": [[0, 0, -i] for i in range(3)]} for name in rows}
    found = protocol_effects.changed_rows(rows, truths, 1.0)

    def successes(title):
        return [after["success"] for after in found[title].values()][:4]
    assert successes("at most 500 actions, not 501") == [1, 1, 0, 0]
    assert successes("at most 400 actions, not 501") == [1, 0, 0, 0]
    assert successes("success if d <= radius, not <") == [1, 1, 1, 1]
    strict = found["success if d <= radius, not <"]["3"]
    assert (strict["spl"], strict["sdtw"]) == (0.8, 0.5)
    pytest.importorskip("fastdtw")
    assert found["nDTW by fastdtw"]["0"]["ndtw"] == ndtw([[0, 0, -i] for i in range(3)],
                                                         truths["0"]["locations"]) == 1.0
    lost = [name for name, after in found["2% unfinished, counted as failed"].items()
            if after != rows[name]]
    assert lost == ["0", "50"]
    zero = found["2% without a distance, NaN counted as 0"]["50"]
    assert (zero["success"], zero["distance_to_goal"], zero["spl"]) == (0, 0, 0)
    table = protocol_effects.make_table(rows, found).splitlines()
    assert table[2].startswith("| none: the first run, 100 episodes | | 0.990 | 0.792 |")
    assert table[3].startswith("| at most 500 actions, not 501 | 1 | -0.010 [-0.0")
    assert "| 1 | +0.010 [" in table[5] and table[5].endswith("| 0 | 0 |")


def test_the_whole_of_it(monkeypatch, tmp_path, capsys):
    """With the oracle for a policy: its turns are those that the pool makes, whatever the robot."""
    pytest.importorskip("fastdtw")
    parse, robots = evaluate.parse_args, []

    class Pool(FakePool):
        def __init__(self, kind, robot, *others, **more):
            robots.append(robot)
            super().__init__(kind, robot, *others, **more)
    monkeypatch.setattr(evaluate, "SimPool", Pool)
    monkeypatch.setattr(evaluate, "check_turn_deg", lambda *given: None)       # of baselines only
    monkeypatch.setattr(evaluate, "parse_args", lambda argv: parse([*argv, "--agent", "oracle"]))
    args = protocol_effects.parse_args([
        "--episodes", write_plane(tmp_path / "data"), "--split", "val", "--out",
        str(tmp_path / "out"), "--doc", str(tmp_path / "effects.md"), "--sim-command", "habitat",
        "--habitat-limit", "4"])
    monkeypatch.setattr(evaluate, "scenes_used", lambda *given: {"count": 1, "sha256": "0"})
    table = protocol_effects.main(args)
    base, *changed = robots
    assert [{key for key in base if base[key] != robot[key]} for robot in changed] == [
        {"hfov_deg"}, {"turn_deg"}, {"sliding"}, set()]
    assert len(table.splitlines()) == 3 + 4 + 6
    assert "| a fake, not our simulator (4 episodes) | 0 | 0 | 0 | 0 | 0 |" in table
    held = read_json(tmp_path / "out" / "habitat" / "run.json")
    assert (held["sim"], held["episodes"]) == ("habitat", 4)
    assert table in (tmp_path / "effects.md").read_text()
    assert "| HFOV 79 degrees, not 90 | 0 | 0 | 0 | 0 | 0 |" in table
    walked = len(robots)
    assert protocol_effects.main(args) == table and len(robots) == walked       # nothing again
