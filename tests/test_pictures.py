"""tools/pictures.py: instructions in scripts that need other fonts, and a page per pose."""
import numpy as np
import pytest
from helpers import FakePool, evaluate_plane, fake_episode, write_plane
from PIL import Image

from cli import read_rows
from evaluate import EpisodeState
from tools import pictures
from world.robots import ROBOTS

HINDI = "सोफे के पास रुकें। Stop."


def drawn(monkeypatch, tmp_path, text, fonts=None):
    """A walk's page with this instruction -> the pixel rows of its text, and the folder. fonts: the
    font files that count as installed."""
    pictures.warn_no_font.cache_clear()
    pictures.font_for.cache_clear()
    if fonts is not None:
        monkeypatch.setattr(pictures, "installed_fonts", lambda: fonts)
    episode = fake_episode("7")
    episode["instruction"] = {"instruction_text": text, "language": "hi-IN"}
    walk = EpisodeState(episode, text, keep_video=True)
    walk.observe({"states": [{"position": [0, 0, 0], "rotation": [0, 0, 0, 1]}],
                  "frame": np.full((56, 56, 3), 90, np.uint8)})
    walk.map, walk.end = FakePool("", {}, "").topdown(0), "stop"
    pictures.save_pictures(walk, {"steps": 1, "end": "stop"}, None, ROBOTS["houses"], 1.0,
                       str(tmp_path / "pictures"))
    pictures.font_for.cache_clear()
    return np.array(Image.open(tmp_path / "pictures/7.png"))[22:48], tmp_path / "pictures"


def test_an_instruction_that_no_font_can_draw_stands_beside_the_picture(
        monkeypatch, tmp_path, capsys):
    note, folder = drawn(monkeypatch, tmp_path, HINDI, fonts=[])
    assert (folder / "7.txt").read_text(encoding="utf-8") == HINDI + "\n"
    assert "apt-get install fonts-noto-core" in capsys.readouterr().err
    expected, _ = drawn(monkeypatch, tmp_path / "note", "[hi-IN instruction: see 7.txt]")
    assert (note == expected).all() and (note < 128).any()
    drawn(monkeypatch, tmp_path / "english", "Stop.", fonts=[])
    assert not (tmp_path / "english/pictures/7.txt").exists() and not capsys.readouterr().err


def test_hindi_is_drawn_with_an_installed_font(monkeypatch, tmp_path, capsys):
    pictures.font_for.cache_clear()
    if pictures.lay_out(HINDI, 1000) is None:
        pytest.skip("no font with Devanagari (apt-get install fonts-noto-core), or no raqm")
    (_, _, piece, font), *_ = pictures.lay_out(HINDI, 1000)[0]
    assert set(map(ord, piece)) <= pictures.characters_of(font.path)
    # shaped: a vowel sign joins its letter, so that both take less room than side by side
    assert font.getlength("सो") < font.getlength("स") + font.getlength("◌ो")
    text, folder = drawn(monkeypatch, tmp_path, HINDI)
    assert (text < 128).any() and not (folder / "7.txt").exists()
    assert not capsys.readouterr().err


def test_a_page_for_each_pose_and_one_for_the_walk(monkeypatch, tmp_path):
    evaluate_plane(monkeypatch, write_plane(tmp_path / "data", n=3), tmp_path / "out", "--pictures",
                   "1")
    folder = tmp_path / "out/pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["0.gif", "0.png"]
    with Image.open(folder / "0.gif") as film:
        assert film.n_frames == 1 + 3                       # the start, and a pose per step
    rows = read_rows(tmp_path / "out/episodes.jsonl")
    walk = EpisodeState(fake_episode("0"), "Stop.")
    assert pictures.page_title(walk, rows[0]) == "success: episode 0, 4 steps, 0.25 m from the goal"
    invalid = {"end": "invalid", "steps": 0}
    assert pictures.page_title(walk, invalid) == "invalid: episode 0, 0 steps"
