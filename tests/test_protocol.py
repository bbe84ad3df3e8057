"""world/protocol.py: what the published protocols state, and the card of a results folder."""
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT
from helpers import evaluate_plane, write_plane

import evaluate
from cli import UserError, read_json
from world import protocol
from world.protocol import closest, departures, measured_values, read_protocol
from world.robots import ROBOTS

NAMES = protocol.protocol_names()
SETTINGS = {"agent": "policy", "dataset": "r2r", "role": None, "languages": None, "limit": None,
            "episodes": 1839, "robot": ROBOTS["r2r"], "max_actions": 500, "radius_m": 3.0,
            "malformed": "stop", "temperature": 0.0}


# ---------------------------------------------------------------- the published protocols


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_protocol_has_its_file_and_commit(name):
    held = read_json(os.path.join(protocol.FOLDER, name + ".json"))
    for source in held["sources"].values():
        if name == "houses":
            assert os.path.exists(os.path.join(ROOT, source))
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}:[\w/.-]+", source)
    assert {source for _, source in held["values"].values()} == set(held["sources"])
    assert set(held["values"]) <= set(measured_values(SETTINGS, "habitat-sim 0.1.7"))


def test_our_robots_are_those_of_the_protocols():
    """Where a protocol names a data set's own robot. VLN-CE's agents saw smaller frames."""
    for name, row in (("houses", "houses"), ("vlnr1_r2r", "r2r"), ("vlnce_rxr", "rxr"),
                      ("vlnr1_rxr", "rxr"), ("activevln_r2r", "r2r")):
        assert {key: read_protocol(name)[key] for key in ROBOTS[row]} == ROBOTS[row], name


def test_known_differences_between_the_protocols():
    """Those that docs and issues of these projects talk about."""
    stated = {name: read_protocol(name) for name in NAMES}
    assert {name for name in NAMES if stated[name]["hfov_deg"] == 79} == {
        "streamvln_r2r", "janusvln_r2r", "internnav_r2r", "internnav_rxr", "vlnce_rxr", "vlnr1_rxr"}
    assert departures(stated["streamvln_r2r"], stated["internnav_r2r"]) == {
        "max_actions": [500, 501], "ne_unknown": ["in the mean", "left out"]}
    assert departures(stated["streamvln_r2r"], stated["janusvln_r2r"]) == {
        "max_actions": [500, 401], "at_cap": ["fail", "stop"]}
    robot = {key: stated["activevln_rxr"][key] for key in ROBOTS["r2r"]}
    assert robot == ROBOTS["r2r"] and stated["internnav_rxr"]["turn_deg"] == 15


def test_the_closest_protocol_and_its_departures():
    found = closest(measured_values(SETTINGS, "habitat-sim 0.1.7 (headless)"))
    assert (found["name"], found["departures"], found["asked_for"]) == ("vlnr1_r2r", {}, False)
    assert {"max_actions", "malformed"} <= set(found["not_stated"])
    there = {**SETTINGS, "robot": {**ROBOTS["r2r"], "hfov_deg": 79}, "max_actions": 501}
    found = closest(measured_values(there, "habitat-sim 0.2.4"))
    assert (found["name"], found["departures"]) == ("internnav_r2r", {})
    found = closest(measured_values({**there, "limit": 100, "episodes": 100}, None), "vlnce_r2r")
    assert found["departures"] == {
        "episodes": ["all", 100], "hfov_deg": [90, 79], "max_actions": [500, 501],
        "width": [224, 640], "height": [224, 480], "ndtw": ["fastdtw", "exact"]}
    # of a baseline, neither answers nor decoding are compared
    measured = measured_values({**SETTINGS, "agent": "oracle"}, None)
    assert not {"malformed", "temperature"} & set(departures(read_protocol("activevln_r2r"),
                                                             measured))


# ---------------------------------------------------------------- --protocol


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_sets_all_that_is_a_flag(name):
    args, stated = evaluate.parse_args(["--protocol", name]), read_protocol(name)
    for key in protocol.FLAGS:
        if key in stated and stated[key] != "random":
            assert getattr(args, key) == stated[key], key
    assert args.sim == ("house" if name == "houses" else "habitat")


def test_a_flag_beside_it_wins_and_becomes_a_departure(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data")
    evaluate_plane(monkeypatch, data, tmp_path / "out", "--protocol", "streamvln_r2r", "--turn-deg",
                   "30", "--max-actions", "12", "--sim", "house")
    card = read_json(tmp_path / "out/protocol.json")
    assert card["robot"] == {**ROBOTS["r2r"], "hfov_deg": 79, "turn_deg": 30}
    held = card["protocol"]
    assert held["name"] == "streamvln_r2r" and held["asked_for"]
    assert held["departures"]["turn_deg"] == [15, 30]
    assert held["departures"]["max_actions"] == [500, 12]
    assert "protocol streamvln_r2r, departures: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--protocol", "nobody"])


# ---------------------------------------------------------------- the card of a folder


def test_the_card_counts_what_became_of_the_episodes(monkeypatch, tmp_path, capsys):
    data = write_plane(tmp_path / "data", n=9, **{
        "1": {"info": {"refused": True}}, "2": {"info": {"distance": float("inf")}},
        "4": {"info": {"dies": 99}}})
    with pytest.raises(SystemExit):
        evaluate_plane(monkeypatch, data, tmp_path / "out", "--max-actions", "9")
    card = read_json(tmp_path / "out/protocol.json")
    assert card["episodes"] == {"asked": 9, "ended": 6, "failed": 2, "unfinished": 1}
    assert card["protocol"]["departures"] == {"simulator": ["house_sim 2", "a fake"],
                                              "max_actions": [500, 9]}
    results = read_json(tmp_path / "out/results.json")
    assert card["rules"]["interval"] == results["interval"]
    shown = capsys.readouterr().out.splitlines()
    above = shown[:next(i for i, line in enumerate(shown) if line.startswith("oracle on val"))]
    assert [line.split()[0] for line in above[-4:]] == ["data", "robot", "policy", "rules"]
    assert "9 episodes asked for: 6 ended, 2 failed, 1 unfinished" in above[-4]
    assert "unreadable" not in above[-1]                    # the oracle writes no answers
    sha = subprocess.run(["sha256sum", f"{data}/val/val.json.gz"], capture_output=True, text=True)
    assert card["data"]["sha256"] == sha.stdout.split()[0]


def test_a_folder_that_two_commits_walked_names_both(monkeypatch, tmp_path):
    data, out = write_plane(tmp_path / "data"), tmp_path / "out"
    for commit, names in (("a" * 40, ["a" * 40]), ("a" * 40, ["a" * 40]),
                          ("b" * 40 + "+", ["a" * 40, "b" * 40 + "+"])):
        monkeypatch.setattr(protocol, "code_commit", lambda commit=commit: commit)
        evaluate_plane(monkeypatch, data, out)
        card = read_json(out / "protocol.json")
        assert card["code"] == names
    assert "code aaaaaaaaaa, bbbbbbbbbb+" in protocol.format_card(card)
    (out / "protocol.json").write_text("{")
    with pytest.raises(UserError, match=r"protocol.json is damaged .* delete it"):
        evaluate_plane(monkeypatch, data, out)


def test_the_commit_is_gits(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    monkeypatch.setattr(protocol, "ROOT", str(tmp_path))
    assert protocol.code_commit() is None
    (tmp_path / "a.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:40]
    assert protocol.code_commit() == head
    (tmp_path / "a.py").write_text("2\n")
    assert protocol.code_commit() == head + "+"


def test_an_edited_prompt_is_another_measurement(monkeypatch, tmp_path):
    import model
    from activevln import dialog
    contract = {**model.CONTRACT, "dataset": "r2r"}
    spoken = {**contract, **dialog.DIALOG}
    hashes = [evaluate.prompt_hash(one) for one in (contract, spoken)]
    assert len(set(hashes)) == 2 and evaluate.prompt_hash(None) is None
    evaluate.open_out(str(tmp_path), {"prompt_sha256": hashes[0]})
    monkeypatch.setattr(model, "window_prompt", lambda *given: "Where to?")
    with pytest.raises(UserError, match=r"holds another measurement \(of other prompt_sha256\)"):
        evaluate.open_out(str(tmp_path), {"prompt_sha256": evaluate.prompt_hash(contract)})
    assert json.loads((tmp_path / "run.json").read_text()) == {"prompt_sha256": hashes[0]}
