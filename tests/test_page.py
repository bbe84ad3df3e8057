"""tools/page.py: what is written, and the page in a headless Chromium."""
import base64
import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from helpers import evaluate_plane, fake_episode, write_plane
from PIL import Image

from cli import UserError, read_json
from evaluate import EpisodeState
from tools import page
from world.robots import ROBOTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Nine episodes walked by the oracle (all recorded) and at random (five of them recorded)."""
    base = tmp_path_factory.mktemp("page")
    quoted = {"instruction": {"instruction_text": "Stop at </script> or \"<b>\" & 'ü'."}}
    data = write_plane(base / "data", **{"0": quoted, "3": {"info": {"refused": True}}})
    with pytest.MonkeyPatch.context() as patch:
        for agent, n in (("oracle", "all"), ("random", "5")):
            evaluate_plane(patch, data, base / agent, "--agent", agent, "--page", n,
                           "--max-actions", "14")
    return base


# ---------------------------------------------------------------- what is written


def test_a_page_is_one_folder_and_asks_for_nothing_else(folders):
    text = (folders / "oracle/page/index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|//cdn", text) and "</script> or" not in text
    names = {str(i) for i in range(9)} - {"3"}
    assert {path.name for path in (folders / "oracle/page/data/a").iterdir()} == {
        name + end for name in names for end in (".js", "_map.webp", "_frames.webp")}
    assert len(list((folders / "random/page/data/a").iterdir())) == 3 * len(
        [name for name in ("0", "1", "3", "5", "7") if name != "3"])


def made_walk(frames):
    """A walk straight ahead that saw these frames."""
    walk = EpisodeState(fake_episode("7"), "Stop.", keep_video=True)
    for t, frame in enumerate(frames):
        walk.observe({"state": {"position": [0, 0, -0.1 * t], "rotation": [0, 0, 0, 1],
                                "distance_to_goal": 2 - 0.1 * t}, "frame": frame})
        if t % 3 == 0:
            walk.add_decision("A. Move forward 25 cm, D. Stop", [1, 0])
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    walk.map = {"image": noise, "bounds": [-5, -5, 5, 5]}              # no map is harder to shrink
    return walk


def test_frames_and_plans_stand_in_their_order(tmp_path):
    walk = made_walk([np.full((300, 400, 3), 20 * t, np.uint8) for t in range(12)])
    page.save_walk(walk, [[0, 0, 0], [0, 0, -2]], ROBOTS["houses"], str(tmp_path))
    held = read_json(tmp_path / "7.json")
    width, height, columns = held["frame"]
    sheet = np.asarray(Image.open(tmp_path / "7_frames.webp").convert("L"), float)
    assert (width, height, columns) == (192, 144, 10) and sheet.shape == (288, 1920)
    for t in range(12):
        x, y = t % columns * width, t // columns * height
        assert abs(sheet[y + 20:y + 120, x + 20:x + 170].mean() - 20 * t) < 3
    assert held["decisions"][2] == [6, "A. Move forward 25 cm, D. Stop", [1, 0],
                                    [[0.0, -0.6], [0.0, -0.85]]]
    assert held["distances"][:3] == [2.0, 1.9, 1.8] and held["goals"] == [[0.0, -2.0]]
    left, top, side = held["map"]
    assert left == pytest.approx(-side / 2) and (top, side) == (pytest.approx(-3.5), 5)


def test_a_walk_of_thousands_of_steps_fits_webp(tmp_path):
    walk = made_walk([np.full((48, 8, 3), t % 200, np.uint8) for t in range(3413)])
    page.save_walk(walk, None, ROBOTS["houses"], str(tmp_path))
    width, height, columns = read_json(tmp_path / "7.json")["frame"]
    sheet = np.asarray(Image.open(tmp_path / "7_frames.webp").convert("L"), float)
    assert sheet.shape[0] <= 16383 and columns * width == sheet.shape[1] and columns > 10
    for t in (0, 11, 3412):
        x, y = t % columns * width, t // columns * height
        assert abs(sheet[y + 10:y + 38, x + 2:x + 6].mean() - t % 200) < 12


def test_a_hundred_walks_take_less_than_20_megabytes(tmp_path):
    """A walk with 60 frames of a real camera; R2R's expert takes 56 actions on average."""
    paths = sorted(glob.glob(os.path.join(ROOT, "../shared/data/vln_ego_sample/**/*.jpg"),
                             recursive=True))[:60]
    if len(paths) < 60:
        pytest.skip("no released walk beside the repository")
    walk = made_walk([np.asarray(Image.open(path)) for path in paths])
    assert walk.video_frames[0].shape == (480, 640, 3)
    page.save_walk(walk, None, ROBOTS["r2r"], str(tmp_path))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200_000


def test_two_runs_are_shown_with_their_paired_difference(folders, tmp_path):
    path = page.write_page([str(folders / "oracle"), str(folders / "random")], str(tmp_path))
    text = open(path, encoding="utf-8").read()
    table = json.loads(re.search(r"TABLE = (\[.*?\]);\n", text).group(1))
    assert table[0][0] == "SR @ 1 m" and table[0][1].startswith("1.000 [")
    assert table[0][3].startswith("-1.000 ")
    assert (tmp_path / "data/b/0.js").exists() and not (tmp_path / "data/b/2.js").exists()


def test_what_cannot_be_shown_is_refused(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="name at most two"):
        page.write_page(["a", "b", "c"])
    with pytest.raises(UserError, match="holds no results"):
        page.write_page([str(tmp_path)])
    other = write_plane(tmp_path / "other", n=3)
    evaluate_plane(monkeypatch, other, tmp_path / "third")
    with pytest.raises(UserError, match="did not measure the same thing"):
        page.write_page([str(folders / "oracle"), str(tmp_path / "third")])
    os.remove(tmp_path / "third/results.json")
    with pytest.raises(UserError, match=r"has no results.json: run its evaluate.py command"):
        page.write_page([str(tmp_path / "third")])


# ---------------------------------------------------------------- in a browser


class Browser:
    """A headless Chromium and its debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, folder):
        read_end, self.write = os.pipe()
        self.read, write_end = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read_end} 4>&{write_end}', "bash", CHROMIUM,
             "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1050",
             "--remote-debugging-pipe", f"--user-data-dir={folder}",
             "--no-first-run", "--disable-background-networking", "about:blank"],
            pass_fds=(read_end, write_end), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.ids, self.events, self.buffer, self.session = itertools.count(1), [], b"", None
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.read, 1 << 16)
            assert piece, "Chromium has ended"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        message = {"id": next(self.ids), "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == message["id"]:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, code):
        """The value of a JavaScript expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True,
                          returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys):
        for key in keys:
            code = {" ": "Space"}.get(key, key)
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code)

    def wait_for(self, code):
        assert self.run(f"new Promise((yes, no) => {{ const end = Date.now() + 30000, look = () =>"
                        f" ({code}) ? yes(true) : Date.now() > end ? yes(false)"
                        f" : setTimeout(look, 20); look(); }})"), code

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def problems(self):
        """Console messages, exceptions, failed requests, and requests that are not of files."""
        bad = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
               "Network.loadingFailed")
        return [event for event in self.events if event.get("method") in bad or (
            event.get("method") == "Network.requestWillBeSent"
            and not event["params"]["request"]["url"].startswith(("file:", "data:")))]


@contextlib.contextmanager
def browser(folder):
    it = Browser(folder)
    try:
        yield it
    finally:
        it.process.kill()
        it.process.wait()
        os.close(it.read)
        os.close(it.write)


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium (apt-get install chromium)")
IDS = "[...document.querySelectorAll('#rows tr')].map(row => row.dataset.id).join(' ')"


@needs_chromium
def test_sorting_filters_and_keys_in_a_browser(folders, tmp_path):
    with browser(tmp_path / "profile") as it:
        it.open(folders / "oracle/page/index.html")
        it.wait_for("walks['a 0'] && walks['a 0'].framesImage.complete")
        assert it.run("document.querySelectorAll('#cards pre').length") == 1
        assert it.run(IDS) == "0 1 2 3 4 5 6 7 8"
        # sorting: by steps, then the other way round; what has no value stays last
        steps = "document.querySelectorAll('#head th')[7]"
        it.run(f"{steps}.click()")
        rising = it.run("[...document.querySelectorAll('#rows tr')].map(row => "
                        "+row.cells[7].textContent)")
        assert rising == sorted(rising) and it.run(f"{steps}.ariaSort") == "ascending"
        it.run(f"{steps}.click()")
        assert it.run(f"{steps}.ariaSort") == "descending"
        it.run("document.querySelectorAll('#head th')[6].click()")           # nDTW
        assert it.run(IDS).split()[-1] == "3"
        # filters
        for code, shown in (("$('result').value = 'no score'", "3"),
                            ("$('result').value = 'all'; $('end').value = 'invalid'", "3"),
                            ("$('end').value = 'all'; $('nearest').value = 99", ""),
                            ("$('nearest').value = ''; $('search').value = '7'", "7")):
            it.run(f"{code}; list()")
            assert it.run(IDS) == shown, code
        it.run("$('search').value = ''; sortBy([null, 'id'])")
        # keys: steps of the walk, and the next episode
        it.press("ArrowRight", "ArrowRight")
        assert it.run("state.t") == 2 and it.run("$('slider').value") == "2"
        it.press("End")
        assert it.run("state.t") == it.run("walks['a 0'].poses.length - 1")
        assert "then: stop" in it.run("document.querySelector('.status').textContent")
        it.press("Home", "ArrowLeft")
        assert it.run("state.t") == 0
        assert "then: move forward" in it.run("document.querySelector('.status').textContent")
        assert it.run("document.querySelector('.instruction').textContent") == (
            "Stop at </script> or \"<b>\" & 'ü'.")
        it.press("ArrowDown", "ArrowDown")
        it.wait_for("walks['a 2']")
        assert it.run("document.querySelector('tr.chosen').dataset.id") == "2"
        it.press(" ")
        it.wait_for("state.t === last() && !state.timer")                    # it has played
        it.press("ArrowDown")                                                # 3: without a player
        assert not it.run("document.querySelector('.body').checkVisibility()")
        assert it.problems() == []


@needs_chromium
def test_two_runs_side_by_side_in_a_browser(folders, tmp_path):
    path = page.write_page([str(folders / "oracle"), str(folders / "random")],
                           str(tmp_path / "page"))
    with browser(tmp_path / "profile") as it:
        it.open(path)
        it.wait_for("walks['a 0'] && walks['b 0']")
        assert it.run("document.querySelectorAll('.player .map').length") == 2
        lengths = it.run("KEYS.map(key => walks[key + ' 0'].poses.length)")
        assert it.run("last()") == max(lengths) - 1
        it.press("End")                              # the shorter walk stays at its end
        shown = it.run("[...document.querySelectorAll('.status')].map(e => e.textContent)")
        for text, length in zip(shown, lengths):
            assert text.startswith(f"step {length - 1} of {length - 1},")
        it.run("$('result').value = 'only a'; list()")
        assert len(it.run(IDS).split()) == 8
        assert it.problems() == []
