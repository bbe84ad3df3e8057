"""GPT4Scene's data: what the pictures show is what the questions ask.

The oracle below answers every question from the bird's-eye view alone (marks, colours, walls, all
read back from the pixels) and the proposals' labels; it shares no code with the questions.

Run it   python -m pytest tests/test_scenes.py
"""
import doctest
import filecmp
import functools
import json
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image

from cli import UserError, write_json
from gpt4scene import scenes, scores
from gpt4scene.chat import CHAT, picture_tokens
from tools.sharegpt import ShareGpt
from world.houses import PAINTS, WALLS, build_house

DATA = os.path.join(ROOT, "..", "shared", "data", "scene_qa")
SMALL = ["--train-scenes", "4", "--val-scenes", "8", "--jobs", "1"]
real_data = pytest.mark.skipif(not os.path.isdir(DATA), reason="no real questions beside the repo")


def make(out, *flags):
    scenes.main(scenes.parse_args(["--out", str(out), *map(str, flags)]))
    return out


@functools.lru_cache(None)
def load(folder, name):
    with open(os.path.join(folder, f"{name}.json"), encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Scenes whose proposals are exact: then each question can be answered."""
    flags = [*SMALL, "--proposal-noise", 0, "--questions", 60]
    folder = make(tmp_path_factory.mktemp("exact"), *flags)
    make(folder.parent / "bare", *flags, "--no-marks", "--frames", 0)
    return folder


def test_doctests():
    assert doctest.testmod(scenes).failed == 0


# ---------------------------------------------------------------- the oracle


def hue(pixel):
    """The paint whose direction in RGB is the pixel's: shading keeps it."""
    unit = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in PAINTS.items()}
    return max(unit, key=lambda name: unit[name] @ pixel / max(1, np.linalg.norm(pixel)))


def hues(image):
    """The paint of each pixel of a picture, "" where it is too pale to be one: (h, w)"""
    strong = image.max(axis=2) > 3.0 * np.maximum(image.min(axis=2), 1)     # no wall is
    return np.array([[hue(pixel) if one else "" for pixel, one in zip(*rows)]
                     for rows in zip(image, strong)])


def find_marks(image, scale=1):
    """{number: (row, column) of its patch} of the marks 0..9 in a picture."""
    found = {}
    for number in range(10):
        pattern = scenes.mark_pattern(number, scale)
        windows = np.lib.stride_tricks.sliding_window_view(image.min(axis=2), pattern.shape)
        for hit in np.argwhere((windows == pattern).all(axis=(2, 3))):
            found[number] = tuple(hit - (14 - np.array(pattern.shape)) // 2)
            assert not np.any(np.array(found[number]) % 14)
    return found


@functools.lru_cache(None)
def see(folder, scene):
    """A scene's things, from its bird's-eye view, with marks (their numbers and colours) and
    without (rooms and positions), and the proposals' labels -> {mark: dict}"""
    image, bare = (np.asarray(Image.open(f"{folder}/{path}images_3D/{scene}.png"))
                   for path in ("", "../bare/"))
    labels, things = load(folder, "attributes_val")["proposals"][scene]["objects"], {}
    walls = {name: np.argwhere((bare == rgb).all(axis=2)) for name, rgb in WALLS.items()}
    rooms = {f"{name} room": (at.min(axis=0), at.max(axis=0))
             for name, at in walls.items() if len(at)}
    paints = hues(bare)
    for mark, (top, left) in find_marks(image, 2).items():
        colour, = {*hues(image[top:top + 14, left:left + 14]).flat} - {""}
        at = np.argwhere(paints == colour)                  # no other thing of the house has it
        middle = (at.min(axis=0) + at.max(axis=0)) / 2
        room, = (name for name, (lo, hi) in rooms.items() if (lo <= middle).all()
                 and (middle <= hi).all())
        things[f"<OBJ{mark:03d}>"] = {
            "kind": labels[mark], "colour": colour, "name": f"{colour} {labels[mark]}",
            "room": room, "at": complex(*(middle * (-1, 1))[::-1]),         # east, north
            "middle": complex(*(sum(rooms[room]) / 2 * (-1, 1))[::-1])}
    return things


NUMBER = ["zero", "one", "two", "three", "four", "five", "six"]


def pick(things, **wanted):
    return [mark for mark, thing in things.items()
            if all(thing[key] == value for key, value in wanted.items())]


def named(things, text):
    """Marks of "red chair", "chair", "chair in the pink room", "red thing", "thing nearest to .."
    """
    near = re.fullmatch(r"thing nearest to the (.+)", text)
    if near:
        one, = named(things, near[1])
        others = set(pick(things, room=things[one]["room"])) - {one}
        return [min(others, key=lambda mark: abs(things[mark]["at"] - things[one]["at"]))]
    text, _, room = text.partition(" in the ")
    words = text.split()
    wanted = {"colour": words[0]} if words[0] in PAINTS else {}
    wanted |= {"kind": words[-1]} if words[-1] != "thing" else {}
    return pick(things, **wanted, **({"room": room} if room else {}))


def look(things, situation):
    """{mark: side} of the other things of the room, from its middle, facing one of them."""
    room, name = re.match(r"I am in the middle of the (.+) facing the (.+?)\.", situation).groups()
    front, = named(things, name)
    middle = things[front]["middle"]
    ahead = things[front]["at"] - middle
    turn = {mark: np.degrees(np.angle((things[mark]["at"] - middle) / ahead))
            for mark in pick(things, room=room) if mark != front}
    return {mark: "in front of me" if abs(deg) < 45 else "behind me" if abs(deg) > 135 else
            "on my left" if deg > 0 else "on my right" for mark, deg in turn.items()}


def answer_situated(things, prompt):
    sides = look(things, prompt)
    question = prompt.partition(". ")[2]
    name = re.search(r"the (\w+ \w+)", question)
    side = sides[named(things, name[1])[0]] if name else None
    where = re.search(r"(on my \w+|behind me|in front of me)\?", question)
    there = [mark for mark in sides if where and sides[mark] == where[1]]
    if question.startswith("What"):
        return "the " + things[there[0]]["name"]
    if question.startswith("How many"):
        return NUMBER[len(there)]
    if question.startswith("Is"):
        return "yes" if side == where[1] else "no"
    if question.startswith("Can"):
        return "yes" if side == "on my " + question.split()[-1][:-1] else "no"
    return side.split()[-1] if question.startswith("Which") else side


def answer(things, benchmark, prompt):
    """The oracle: one answer to any question."""
    if benchmark == "sqa3d":
        return answer_situated(things, prompt)
    if benchmark == "scan2cap":
        thing = things[re.search(r"<OBJ\d+>", prompt)[0]]
        return thing["name"], thing["room"]
    found = re.search(r"(?:: (?:the )?|is (?:the )?|many )(.+?)(?: are there)?\?",
                      prompt.replace(" is this:", ":"))
    text = found[1]
    if benchmark == "scanrefer":
        return named(things, text)[0] + "."
    if benchmark == "multi3dref":
        words = re.sub(r"(\w)s\b", r"\1", text) if " or " not in text else text
        both = re.fullmatch(r"(\w+) or (\w+) things", text)
        marks = [*named(things, f"{both[1]} thing"), *named(things, f"{both[2]} thing")] if both \
            else named(things, words)
        return sorted(marks)
    if prompt.startswith("What colour"):
        return things[named(things, text)[0]]["colour"]
    if prompt.startswith("How many"):
        words = text.replace("things are", "thing").removesuffix("s")
        return NUMBER[len(named(things, words))]
    if prompt.startswith("In which"):
        return things[named(things, text)[0]]["room"]
    if prompt.startswith("What is nearest"):
        name = prompt[len("What is nearest to the "):-1]
        return "the " + things[named(things, f"thing nearest to the {name}")[0]]["name"]
    return "the " + things[pick(things, colour=text)[0]]["kind"]


def test_every_question_can_be_answered_from_the_birds_eye_view(exact):
    asked = Counter()
    for benchmark in scenes.NEEDS:
        for row in load(exact, f"{benchmark}_val"):
            said = answer(see(exact, row["scene_id"]), benchmark, row["prompt"])
            right = row["ref_captions"]
            if benchmark == "scan2cap":
                assert all(part in text for part in said for text in right), row
            elif benchmark == "multi3dref":
                best = load(exact, "attributes_val")["proposals"][row["scene_id"]]["locs"]
                truth = load(exact, "attributes_val")["truth"][row["scene_id"]]["locs"]
                marks = [f"<OBJ{best.index(truth[k]):03d}>" for k in right]
                assert said == sorted(marks), (row, said)
            else:
                assert said in right, (row, said)
            asked[benchmark, row["template"]] += 1
    assert len(asked) == 5 + 1 + 1 + 5 + 4 + 6, asked


# ---------------------------------------------------------------- pictures and files


def test_a_frame_marks_what_it_shows_and_nothing_else(tmp_path):
    """Against the same frames without marks: a mark's patch shows its thing's colour, and what
    fills 2% of a frame has its mark, unless another took the patch."""
    seen = missed = 0
    for k in range(4):
        house = build_house(np.random.default_rng(k), 1)
        marks = [*range(len(house.things))][::-1]
        colours = [thing.name.split()[0] for thing in house.things]
        marked, bare = (scenes.draw_frames(np.random.default_rng(k), house, which, 8, 56)
                        for which in (marks, [None] * len(marks)))
        for picture, before in zip(marked, bare):
            found = find_marks(picture)
            names = hues(before)
            for number, (top, left) in found.items():
                assert colours[marks.index(number)] in names[top:top + 14, left:left + 14]
            big = {marks[colours.index(c)] for c in colours if (names == c).mean() > 0.02}
            seen, missed = seen + len(big), missed + len(big - set(found))
    assert seen > 20 and missed <= 0.1 * seen


def test_files_do_not_depend_on_jobs_and_ablations_ask_the_same(exact, tmp_path):
    again = make(tmp_path / "again", *SMALL[:4], "--jobs", 2, "--proposal-noise", 0,
                 "--questions", 60)
    names = [os.path.relpath(os.path.join(folder, name), exact)
             for folder, _, files in os.walk(exact) for name in files]
    assert filecmp.cmpfiles(exact, again, names, shallow=False)[0] == names
    bare = make(tmp_path / "bare", *SMALL, "--proposal-noise", 0, "--questions", 60, "--no-marks",
                "--no-bev", "--frames", 2)
    assert load(bare, "scanrefer_val") == load(exact, "scanrefer_val")
    assert load(bare, "selected_images_val")["u00003"] == [
        "images_2D/u00003/0.png", "images_2D/u00003/1.png"]
    data = ShareGpt(str(bare / "train.json"))
    assert len(data) == load(bare, "meta")["splits"]["train"]["records"] == 240
    assert {len(record.images) for record in data.records} == {2}
    assert all(record.rounds[0][0].startswith("<image><image>") for record in data.records)


def test_a_dense_course_in_one_room_lists_every_mark(tmp_path):
    write_json(tmp_path / "scan2cap_val.json", ["of an earlier run"])
    make(tmp_path, *SMALL, "--rooms", 1, "--questions", 1, "--bev-pixels", 112)
    assert not os.path.exists(tmp_path / "scan2cap_val.json")
    rows = load(tmp_path, "dense_val")
    assert len(rows) == 2 * 8
    for by_mark, by_colour in zip(rows[::2], rows[1::2]):
        picture = np.asarray(Image.open(tmp_path / by_mark["images"][0]))
        seen = [(f"{mark:03d}", {*hues(picture[top:top + 14, left:left + 14]).flat} - {""})
                for mark, (top, left) in sorted(find_marks(picture, 2).items())]
        pairs = re.findall(r"<OBJ(\d+)> (\w+)", by_mark["conversations"][1]["value"])
        assert [(mark, {colour}) for mark, colour in pairs] == seen
        found = re.findall(r"(\w+) <OBJ(\d+)>", by_colour["conversations"][1]["value"])
        assert found == sorted((colour, mark) for mark, colour in pairs)
    with pytest.raises(UserError, match="--frames 0 shows nothing"):
        make(tmp_path, "--frames", 0, "--no-bev")
    with pytest.raises(UserError, match="--rooms 3: houses of --level 1 have 1 to 2 rooms"):
        make(tmp_path, "--rooms", 3)


def test_proposals_fail_the_gates_now_and_then():
    boxes = [scenes.propose(np.random.default_rng(k), build_house(np.random.default_rng(k), 1), 1.0)
             for k in range(300)]
    iou = np.concatenate([found.iou for found, _ in boxes])
    assert 0.04 < (iou < 0.5).mean() < 0.12 and 0.02 < (iou < 0.25).mean() < 0.06
    assert 0.01 < np.mean([mark is None for _, marks in boxes for mark in marks]) < 0.03


def test_best_constants_of_three_questions():
    asked = [scenes.text_question("scanqa", "colour", prompt, *answers) for prompt, answers in
             (("a?", ["red"]), ("b?", ["blue", "it is blue"]), ("c?", ["red"]))]
    assert scenes.best_constants(asked, asked[1:2]) == {"scanqa/colour": {
        "questions": 3, "constant": "red", "accuracy": 0.6667, "by_text": 1.0, "answerable": 1.0}}


def test_best_constants_are_scored_like_answers(exact):
    """Acc of ScanRefer's constants is what meta.json counted, for boxes are exact here."""
    rows, meta = load(exact, "scanrefer_val"), load(exact, "meta")["constants"]
    word = f"constants:{exact}/meta.json"
    files = scores.read_annotations([str(exact)])
    answers = scores.read_answers(word, files)
    assert set(answers) == set(scores.NEEDS)
    hits = sum(meta[name]["accuracy"] * meta[name]["questions"]
               for name in meta if name.startswith("scanrefer/"))
    found = scores.score("scanrefer", answers["scanrefer"], files, False).metrics["Acc@0.5"].value
    assert found == pytest.approx(hits / len(rows), abs=1e-3)
    with pytest.raises(UserError, match="names no meta.json"):
        scores.read_answers(f"constants:{exact}/attributes_val.json", files)


# ---------------------------------------------------------------- real annotations


def write_pictures(folder, names, frames=4):
    for scene in names:
        os.makedirs(f"{folder}/images_2D/{scene}")
        os.makedirs(f"{folder}/images_3D", exist_ok=True)
        Image.new("RGB", (49, 51)).save(f"{folder}/images_3D/{scene}.jpg")
        for k in range(frames):
            Image.new("RGB", (64, 48)).save(f"{folder}/images_2D/{scene}/{k * 10}.jpg")
    return folder


@real_data
def test_scanqa_and_sqa3d_convert(tmp_path, capsys):
    scanqa = f"{DATA}/ScanQA_v1.0_val.json"
    sqa3d = [f"{DATA}/v1_balanced_{name}_test_scannetv2.first1000.json"
             for name in ("questions", "sqa_annotations")]
    with open(scanqa) as a, open(sqa3d[0]) as b, open(sqa3d[1]) as c:
        official, situated = json.load(a), json.load(b)["questions"]
        right = {row["question_id"]: row["answers"][0]["answer"] for row in
                 json.load(c)["annotations"]}
    images = write_pictures(tmp_path / "images", {r["scene_id"] for r in official + situated})
    flags = ["--images", images, "--frames", 2, "--scanqa", scanqa, "--sqa3d", *sqa3d]
    out = make(tmp_path / "out", *flags)
    rows = {row["qid"]: row for row in load(out, "scanqa_val")}
    assert len(rows) == len(official) == 4675
    for row in official:
        made = rows[row["question_id"]]
        assert made["ref_captions"] == row["answers"] and made["prompt"].startswith(row["question"])
    rows = load(out, "sqa3d_val")
    by_id = {row["question_id"]: row for row in situated}
    assert len(rows) == 1000 and {row["sqa_type"] for row in rows} == set(range(6))
    for row in rows:
        one = by_id[row["qid"]]
        situations = [one["situation"], *one["alternative_situation"]]
        assert row["prompt"] in [f"{text} {one['question']}{scenes.SHORT_ANSWER}"
                                 for text in situations]
        assert row["ref_captions"] == [right[row["qid"]]]
    assert load(make(tmp_path / "again", *flags), "sqa3d_val") == rows
    assert load(out, "selected_images_val")["scene0011_00"] == [
        "../images/images_3D/scene0011_00.jpg", *(f"../images/images_2D/scene0011_00/{k}.jpg"
                                                  for k in (0, 30))]
    assert load(out, "val")[0]["conversations"][1]["value"] == "Dark brown."
    scenes.main(scenes.parse_args(["--check", str(out)]))
    assert re.search(r"val\.json +[\d,]+ +1\d\d .* 3\.\.3 ", capsys.readouterr().out)


def test_objects_become_the_marks_of_their_best_proposals(tmp_path):
    """Objects 0, 1, 2; proposals 1, 0 and none fit them."""
    box = torch.tensor([[0, 0, 0, 1, 1, 1], [5, 0, 0, 1, 1, 1], [9, 0, 0, 1, 1, 1.0]])
    for name, locs, labels in (("truth", box, ["chair", "chair", "bed"]),
                               ("proposals", box[[1, 0]], ["chair", "chair"])):
        torch.save({"s_00": {"objects": labels, "locs": locs}}, tmp_path / f"{name}.pt")
    refer = [{"scene_id": "s_00", "object_id": str(k), "object_name": "x", "ann_id": "0",
              "description": f"It is thing {k}. "} for k in (0, 2, 0)]
    multi = [{"scene_id": "s_00", "object_ids": ids, "description": "them", "eval_type": kind,
              "ann_id": 0} for ids, kind in (([0, 1], "mt"), ([], "zt_wo_d"), ([2], "st_w_d"))]
    write_json(tmp_path / "refer.json", refer)
    write_json(tmp_path / "multi.json", multi)
    flags = ["--images", write_pictures(tmp_path / "images", ["s_00"]), "--scanrefer",
             tmp_path / "refer.json", "--scan2cap", tmp_path / "refer.json", "--multi3dref",
             tmp_path / "multi.json", "--truth", tmp_path / "truth.pt", "--proposals",
             tmp_path / "proposals.pt"]
    out = make(tmp_path / "out", *flags)
    assert [r["conversations"][1]["value"] for r in load(out, "val")] == [
        "It is thing 0.", "It is thing 0.", "<OBJ001>.", "<OBJ001>.",
        "Yes. <OBJ000> and <OBJ001>.", "No."]
    assert load(out, "scan2cap_val_corpus") == {"s_00|0": ["sos It is thing 0. eos"] * 2,
                                                "s_00|2": ["sos It is thing 2. eos"]}
    assert [row["ref_captions"] for row in load(out, "multi3dref_val")] == [[0, 1], [], [2]]
    assert load(out, "unique_multiple_lookup") == {"s_00": {"0": 1, "1": 1, "2": 0}}
    for change, words in (({"object_id": "7"}, "refer.json: object 7 of s_00 has no box"),
                          ({"description": 3}, "record 0: 'description' is missing or of another"),
                          ({"scene_id": "t_00"}, "object 0 of t_00 has no box")):
        write_json(tmp_path / "refer.json", [{**refer[0], **change}])
        with pytest.raises(UserError, match=words):
            make(out, *flags)
    with pytest.raises(UserError, match="--images belongs to real scenes"):
        make(tmp_path / "no", "--images", tmp_path)
    with pytest.raises(UserError, match="name their .pt files with --truth"):
        make(out, *flags[:4])
    torch.save({"s_00": print}, tmp_path / "truth.pt")
    with pytest.raises(UserError, match="truth.pt holds no boxes"):
        make(out, *flags[:2], *flags[6:])


# ---------------------------------------------------------------- the check


def test_tokens_of_a_picture(tmp_path):
    for size, tokens in (((640, 480), 252), ((1296, 968), 252), ((490, 512), 324)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        assert picture_tokens(str(tmp_path / "x.png"), CHAT, 28) == tokens


def test_the_check_ends_at_the_first_fault(exact, tmp_path):
    shutil.copytree(exact, tmp_path / "copy")
    folder = tmp_path / "copy"
    done = script("-m", "gpt4scene.scenes", "--check", folder, folder / "val.json")
    assert done.stdout.count("9..9") == 3
    with pytest.raises(UserError, match=r"train.json: record \d+ has up to .* --context 150"):
        make(folder, "--check", folder, "--context", 150)
    (folder / "images_3D/h00002.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="h00002.png is no picture that can be read"):
        make(folder, "--check", folder)
    os.remove(folder / "images_3D/h00002.png")
    done = script("-m", "gpt4scene.scenes", "--check", folder, check=False)
    assert done.returncode == 2 and "h00002.png of record" in done.stderr
    with pytest.raises(UserError, match="holds no selected_images_"):
        make(folder, "--check", tmp_path)
