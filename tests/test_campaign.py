"""tests/campaign in its short form: two houses, a few kills, and every known way to a wrong number.

Run it   python -m pytest tests/test_campaign.py
"""
import os
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "tests", "campaign"))
pytest.importorskip("httpx2", reason="needs httpx2 (requirements.txt)")
import campaign as script  # noqa: E402
import injections  # noqa: E402


@pytest.fixture(scope="module")
def campaign(ego):
    root = os.path.dirname(os.path.dirname(ego))                # holds houses and ego
    args = script.parse_args(["kills", "hour", "--kills", "1", "--minutes", "0.05", "--every-s",
                              "0.5", "--targets", "simulator", "--out", root])
    return script.Campaign(args)


def test_killed_simulators_cost_no_episode(campaign, capsys):
    script.kills(campaign)
    printed = capsys.readouterr().out
    assert "1 kills in " in printed and " 0 episodes lost, scored twice or different" in printed
    assert campaign.failed == 0


def test_evaluations_in_a_loop_lose_nothing(campaign, capsys):
    script.hour(campaign)
    printed = capsys.readouterr().out
    assert " 0 episodes lost or different, 0 scored twice\n" in printed
    assert "slopes an hour after the first sixth: RSS " in printed         # too short to hold them


def test_what_is_different_is_noticed(campaign):
    assert campaign.differing("reference") == 0
    lines = campaign.expected.splitlines(keepends=True)
    for other in (lines[1:], lines + lines[:1], [b"{}\n", *lines[1:]]):
        assert campaign.differing("reference", b"".join(other)) > 0


def test_every_known_way_to_a_wrong_number_is_refused_or_named(ego, tmp_path, capsys, campaign):
    assert injections.main(ego, str(tmp_path)) == 0, capsys.readouterr().out
    assert len(injections.INJECTIONS) >= 20
