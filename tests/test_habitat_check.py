"""tools/habitat_check.py with a fake habitat-lab; tests/test_habitat.py uses the real one."""
import json
import math
import sys

import pytest
from conftest import GLB
from helpers import evaluate_plane, fake_episode, walk_with, write_plane

import cli
import evaluate
from cli import UserError, read_rows
from reward import FORWARD, STOP
from tools import habitat_check
from world.robots import ROBOTS

FAKE_HABITAT = {
    "habitat_sim.py": "__version__ = '0'",
    "omegaconf.py": """
class OmegaConf:
    create = structured = staticmethod(lambda content: content)
""",
    "habitat/config/default.py": "patch_config = lambda config: config",
    "habitat/config/default_structured_configs.py": """
class Record(dict):
    def __init__(self, **fields):
        super().__init__(fields)
        self.__dict__ = self

def __getattr__(name):
    return Record
""",
    "habitat/tasks/nav/nav.py": """
class NavigationGoal:
    def __init__(self, position):
        self.position = position
""",
    "habitat/tasks/vln/vln.py": """
InstructionData = dict
class VLNEpisode:
    def __init__(self, **fields):
        self.__dict__.update(fields)
""",
    "habitat/__init__.py": '''
import math, types
__version__ = "fake"
class Dataset:
    pass
class Env:
    """Forward only. Measures as habitat-lab's: SPL divides by the distance at the start or walked.
    """
    def __init__(self, config, dataset):
        self.measures = config["habitat"].task.measurements
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def reset(self):
        if "broken" in self.current_episode.scene_id:
            raise RuntimeError("no such scene")
        self.z, self.walked, self.stopped = 0.0, 0.0, False
        self.start = self.distance()
        self.update()
    def distance(self):
        return abs(self.current_episode.goals[0].position[2] - self.z)
    def step(self, action):
        self.stopped = action == 0
        self.z, self.walked = self.z - .25 * (action == 1), self.walked + .25 * (action == 1)
        self.update()
    def update(self):
        near = self.distance() < self.measures["success"].success_distance
        success = float(self.stopped and near)
        self.found = {"distance_to_goal": self.distance(), "success": success}
        if "spl" in self.measures:
            self.found["spl"] = success * (self.start / max(self.start, self.walked))
    def get_metrics(self):
        return self.found
    @property
    def sim(self):
        return types.SimpleNamespace(get_agent_state=lambda: types.SimpleNamespace(
            position=[0, 0, self.z]))
''',
}


@pytest.fixture
def fake_habitat(tmp_path, monkeypatch):
    """A `habitat` on PYTHONPATH that measures as habitat-lab does, 0 / 0 included."""
    for name, text in FAKE_HABITAT.items():
        path = tmp_path / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(tmp_path / "fake").parents[:-1]:
            (tmp_path / "fake" / folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


def check_walks(walks):
    """[(goal's z, actions, scene)] -> their rows, and their comparison, to be called."""
    episodes = [{**fake_episode(i, (0, 0, z)), "scene_id": scene}
                for i, (z, _, scene) in enumerate(walks)]
    ended = walk_with(lambda some: [list(walks[int(w.name)][1]) for w in some], episodes)
    rows = [evaluate.episode_record(ended[str(i)], [[0, 0, 0]], 1.0, 3.0)
            for i in range(len(walks))]
    settings, pairs = {"robot": ROBOTS["houses"], "radius_m": 1.0}, list(zip(rows, episodes))
    return rows, lambda: habitat_check.compare(
        pairs, habitat_check.ask_worker(pairs, settings, "", sys.executable)[1])


def test_habitat_lab_divides_by_zero_for_one_walk_and_measures_the_others(fake_habitat):
    rows, check = check_walks([(-2, [FORWARD] * 8 + [STOP], "a"), (0, [STOP], "a"),
                               (0, [FORWARD] * 6 + [STOP], "a"), (-1, [FORWARD, STOP], "b")])
    found = check()
    assert found["walks"] == 4 and found["not_compared"] == {}
    assert found["without_spl"] == [1, 2]                       # both start at their goal
    assert max(found["largest_difference"].values()) < 1e-6
    rows[1]["distance_to_goal"] = 0.5                           # the other metrics are compared
    with pytest.raises(UserError, match="episode 1: distance_to_goal is 0.5 in our row and 0.0"):
        check()


def test_a_walk_that_habitat_lab_cannot_walk_costs_no_other_its_comparison(fake_habitat):
    rows, check = check_walks([(-2, [FORWARD] * 8 + [STOP], "broken"), (-2, [STOP], "a")])
    found = check()
    assert found["walks"] == 1 and found["not_compared"] == {"0": "RuntimeError: no such scene"}
    rows[1]["spl"] = 0.5
    with pytest.raises(UserError, match="episode 1: spl is 0.5 in our row and 0.0"):
        check()


def test_a_missing_package_is_named_where_it_is_missing_and_only_there(fake_habitat, tmp_path):
    _, check = check_walks([(-2, [STOP], "a")])
    (tmp_path / "fake/habitat/__init__.py").write_text("import os; os._exit(7)")
    with pytest.raises(UserError, match="process ended with 7 after 0 of 1 walks") as error:
        check()
    assert "pip install" not in str(error.value)
    (tmp_path / "fake/habitat/__init__.py").write_text("import magnum_that_is_not_here")
    with pytest.raises(UserError, match="needs habitat-lab .No module named 'magnum_that.*pip"):
        check()


def test_difference():
    assert habitat_check.difference(1.5, 1.0) == 0.5
    assert habitat_check.difference(None, math.inf) == 0 and habitat_check.difference(
        math.nan, 1.0) == math.inf


# ---------------------------------------------------------------- the command


def check_folder(folder, *flags):
    return habitat_check.main(habitat_check.parse_args([str(folder), *flags]))


def test_the_command_writes_its_file_before_it_fails(fake_habitat, monkeypatch, tmp_path, capsys):
    """Walks straight on, as the fake habitat-lab can; one scene of it does not load."""
    data = write_plane(tmp_path / "data", **{"5": {"scene_id": "houses/h/broken.glb"}})
    (tmp_path / "data/scenes/houses/h/broken.glb").write_bytes(GLB)
    flags = "--agent", "forward", "--sim", "habitat"
    evaluate_plane(monkeypatch, data, tmp_path / "out", *flags)
    # only these two have their goals straight ahead
    rows = [row for row in read_rows(tmp_path / "out/episodes.jsonl")
            if row["episode_id"] in (0, 5)]
    cli.write_lines(tmp_path / "out/episodes.jsonl", rows)
    with pytest.raises(SystemExit, match="could not walk 1 of 2 walks .first 5: RuntimeError: no"):
        check_folder(tmp_path / "out")
    found = json.loads((tmp_path / "out/habitat_lab.json").read_text())
    assert found["walks"] == 1 and found["habitat_lab"] == "fake"
    assert list(found["not_compared"]) == ["5"]
    assert "walked 1 of 2 walks; largest differences: distance" in capsys.readouterr().out


def test_results_that_cannot_be_compared_are_refused(monkeypatch, tmp_path):
    data = write_plane(tmp_path / "data", n=2)
    evaluate_plane(monkeypatch, data, tmp_path / "house")
    for folder, sentence in ((tmp_path / "house", "--sim house .*needs --sim habitat"),
                             (tmp_path / "nothing", "holds no results")):
        with pytest.raises(UserError, match=sentence):
            check_folder(folder)
    evaluate_plane(monkeypatch, data, tmp_path / "habitat", "--sim", "habitat")
    with pytest.raises(UserError, match="--sim-python nowhere is not there"):
        check_folder(tmp_path / "habitat", "--sim-python", "nowhere")
    (tmp_path / "habitat/results.json").unlink()
    with pytest.raises(UserError, match="has not ended"):
        check_folder(tmp_path / "habitat")
