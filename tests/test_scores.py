"""gpt4scene/scores.py: hand-worked traps, real questions, coco-caption's own programs.

COCO_PYTHON names an interpreter with pycocoevalcap (pip install pycocoevalcap; java on the PATH):
the n-gram scores, METEOR and the tokenizer are then compared with it.
Run it   COCO_PYTHON=venv_coco/bin/python python -m pytest tests/test_scores.py
"""
import doctest
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, script

from cli import UserError
from gpt4scene import scores
from gpt4scene.scores import make_question, score, text_metrics

SCENE_QA = os.path.join(ROOT, "..", "shared", "data", "scene_qa")
SCANQA = os.path.join(SCENE_QA, "ScanQA_v1.0_val.json")
real = pytest.mark.skipif(not os.path.isdir(SCENE_QA), reason="no real questions beside the repo")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*arguments):
    return scores.main(scores.parse_args([*map(str, arguments)]))


def values(name, rows, files, released=False):
    found = score(name, [make_question(name, row, "row") for row in rows], files, released)
    return {key: metric.value for key, metric in found.metrics.items()}, found.malformed


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch):
    """It takes 16 s to start, where it is found."""
    monkeypatch.setattr(scores, "meteor_lacks", lambda: "java")


def test_doctests():
    assert doctest.testmod(scores).failed == 0


# ---------------------------------------------------------------- real questions


@pytest.fixture(scope="module")
def scanqa():
    with open(SCANQA, encoding="utf-8") as file:
        return json.load(file)


def sqa3d():
    """The official questions and annotations, in the released file's fields."""
    parts = []
    for name in ("questions", "sqa_annotations"):
        path = f"{SCENE_QA}/v1_balanced_{name}_test_scannetv2.first1000.json"
        with open(path, encoding="utf-8") as file:
            parts.append(json.load(file)[name.removeprefix("sqa_")])
    words = [question["question"].lower().split()[0] for question in parts[0]]
    return [{"scene_id": row["scene_id"], "obj_id": 0, "ref_captions": [
        answer["answer"] for answer in row["answers"]], "sqa_type": scores.SQA_TYPES.index(
        word if word in scores.SQA_TYPES else "other")} for word, row in zip(words, parts[1])]


@real
def test_one_annotator_against_the_others_is_what_coco_caption_says(scanqa):
    rows = scanqa[:1000]
    found = text_metrics([row["answers"][0] for row in rows], [row["answers"][1:] for row in rows],
                         [row["scene_id"] for row in rows])
    official = {"BLEU-1": 0.312068, "BLEU-4": 0.089036, "ROUGE-L": 0.382065, "CIDEr": 1.164890}
    assert {name: round(found[name].value, 6) for name in official} == official
    assert all(found[name].ci[0] < found[name].value < found[name].ci[1] for name in official)


@real
def test_a_perfect_model_has_one_and_as_released_less(scanqa):
    rows = [{**row, "pred": row["answers"][0]} for row in scanqa]
    ours, theirs = (values("scanqa", rows, {}, released)[0] for released in (False, True))
    assert all(ours[name] == 1 for name in ("EM", "EM refined", "ROUGE-L"))
    assert ours["BLEU-4"] == pytest.approx(1)
    assert theirs["EM"] == 0.9253475935828877 and theirs["EM refined"] == 0.9285561497326204
    assert [round(theirs[name], 2) for name in ("CIDEr", "ROUGE-L")] == [3.14, 0.96]


@real
def test_sqa3d_by_type_and_the_answer_e():
    rows = sqa3d()
    first = [{**row, "pred": row["ref_captions"][0] + "."} for row in rows]
    perfect, _ = values("sqa3d", first, {})
    assert all(perfect[name] == 1 for name in perfect if name.startswith("EM"))
    e, _ = values("sqa3d", [{**row, "pred": "e"} for row in rows], {})
    assert e["EM"] == 0 and e["EM refined"] > 0.5
    blind = ["yes" if row["sqa_type"] == 1 else "" for row in rows]
    only, _ = values("sqa3d", [{**row, "pred": pred} for row, pred in zip(rows, blind)], {})
    yes = [row["ref_captions"] == ["yes"] for row in rows if row["sqa_type"] == 1]
    assert only["EM, is"] == np.mean(yes) and only["EM"] == sum(yes) / len(rows)
    assert only["EM, what"] == 0


# ---------------------------------------------------------------- coco-caption itself

OFFICIAL = """
import json, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
texts, references = json.load(open(sys.argv[1]))
tokens = [PTBTokenizer().tokenize({i: [{"caption": one} for one in group]
          for i, group in enumerate(groups)}) for groups in ([[t] for t in texts], references)]
found = {"tokens": tokens}
for name, scorer in (("BLEU", Bleu(4)), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
    found[name] = scorer.compute_score(*tokens[::-1])[0]
json.dump(found, open(sys.argv[2], "w"), default=float)
"""
TEXTS = ["It's a two-seater sofa (black); it isn't red.", "sos The table, 1.5 m wide. eos", "",
         "the chair's left leg can't be seen", "sos eos", "A lamp at 10:30 o'clock, i.e. ahead!"]


@pytest.fixture(scope="module")
def coco():
    python = os.environ.get("COCO_PYTHON", "")
    code = "import shutil, pycocoevalcap as p; print(shutil.which('java') and p.__path__[0])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True) if python else None
    if not found or found.returncode or found.stdout.strip() == "None":
        pytest.skip("needs pycocoevalcap and java: set COCO_PYTHON")
    return python, os.path.dirname(found.stdout.strip())


def test_scores_and_tokens_are_those_of_coco_caption(coco, tmp_path):
    texts, references = TEXTS, [[*TEXTS[1:3], text + " It is big."] for text in TEXTS]
    if os.path.isdir(SCENE_QA):
        path = f"{SCENE_QA}/v1_balanced_questions_test_scannetv2.first1000.json"
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)["questions"][:200]
        texts = texts + [row["situation"] for row in rows]
        references = references + [row["alternative_situation"] or ["x"] for row in rows]
    data, out = write(tmp_path / "in.json", [texts, references]), tmp_path / "out.json"
    subprocess.run([coco[0], "-c", OFFICIAL, data, out], check=True, capture_output=True)
    official = json.loads(out.read_text())
    tokens = [[group[str(i)] for i in range(len(texts))] for group in official["tokens"]]
    assert [[scores.tokenize(text)] for text in texts] == tokens[0]
    assert [[*map(scores.tokenize, group)] for group in references] == tokens[1]
    found = text_metrics(texts, references, ["a"] * len(texts))
    ours = [found[name].value for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")]
    assert ours == pytest.approx(official["BLEU"], abs=1e-9)
    for name in ("ROUGE-L", "CIDEr"):
        assert found[name].value == pytest.approx(official[name], abs=1e-9), name


@real
def test_meteor_is_the_java_program_s_aggregate(coco, scanqa, monkeypatch):
    monkeypatch.undo()                                      # the fixture without_meteor
    monkeypatch.setattr(sys, "path", [*sys.path, coco[1]])  # last: only what is missing here
    rows = scanqa[:300]
    found = text_metrics([row["answers"][0] for row in rows], [row["answers"][1:] for row in rows],
                         [row["scene_id"] for row in rows])
    assert round(found["METEOR"].value, 6) == 0.169362


def test_the_table_has_meteor_where_it_can_run(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [*sys.path, coco[1]])
    run("first-reference", write(tmp_path / "scanqa_val.json", ROWS))
    shown = capsys.readouterr().out
    assert re.search(r"METEOR +[01]\.\d+", shown) and "METEOR is blank" not in shown


def test_intervals_draw_whole_scenes():
    """BLEU's, from texts drawn as often as their scenes are."""
    rng, scenes = np.random.default_rng(1), [f"s{i % 7}" for i in range(40)]
    texts = [" ".join(rng.choice(["a", "b", "c"], 5)) for _ in scenes]
    references = [[" ".join(rng.choice(["a", "b", "c"], 4))] for _ in scenes]
    found = text_metrics(texts, references, scenes)["BLEU-2"]
    counts = [*map(scores.bleu_counts, texts, references)]
    drawn = []
    for times in np.random.default_rng(0).multinomial(7, [1 / 7] * 7, 2000):
        rows = [row for row, scene in zip(counts, scenes) for _ in range(times[int(scene[1])])]
        drawn.append(scores.bleu(np.sum(rows, axis=0))[1])
    assert found.ci == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-6)
    assert text_metrics(texts, references, ["one"] * 40)["BLEU-2"].ci is None


# ---------------------------------------------------------------- objects
# Three unit cubes in a row; proposal 0 is cube 1, proposal 1 is cube 0 shifted by 0.4 (IoU 0.43),
# proposal 2 lies elsewhere.

CUBES = np.array([[x, 0, 0, 1, 1, 1] for x in (0.0, 3.0, 6.0)])
SHIFTED = CUBES[[1, 0, 0]] + [[0] * 6, [0.4] + [0] * 5, [9] + [0] * 5]
FILES = {"truth": {"a": {"locs": CUBES}}, "proposals": {"a": {"locs": SHIFTED}},
         "lookup": {"a": {"0": 0, "1": 1, "2": 1}},
         "corpus": {"a|0": ["sos a red cube eos"], "a|1": ["sos a blue cube eos"],
                    "b|4": ["sos a bed by the wall eos"]}}


@pytest.mark.parametrize("pred, target, ours, theirs, malformed", [
    ("<OBJ000>.", 1, (1, 1), (1, 1), 0),
    ("<OBJ001>.", 0, (1, 0), (1, 0), 0),                    # IoU 0.43
    ("I do not know.", 1, (0, 0), (1, 1), 1),               # theirs: object 0
    ("<OBJ2>", 1, (0, 0), (1, 1), 1),
    ("<OBJ999> or <OBJ000>", 1, (0, 0), (1, 1), 1),         # theirs: the first that exists
    ("<OBJ002> or <OBJ000>", 1, (0, 0), (0, 0), 0)])
def test_scanrefer(pred, target, ours, theirs, malformed):
    row = {"scene_id": "a", "pred": pred, "obj_id": target}
    for released, expected in ((False, ours), (True, theirs)):
        found, unread = values("scanrefer", [row], FILES, released)
        group, other = ("unique", "multiple")[::-1 if target else 1]
        assert (found["Acc@0.25"], found["Acc@0.5"]) == expected
        assert (found[f"Acc@0.25, {group}"], found[f"Acc@0.5, {group}"]) == expected
        assert found[f"Acc@0.5, {other}"] is None           # theirs divides by zero
        assert released or unread == malformed


@pytest.mark.parametrize("pred, truth, ours, theirs, malformed", [
    ("No.", [], 1, 1, 0),
    ("Yes.", [], 0, 1, 1), ("Yes. <OBJ999>.", [], 0, 1, 0), ("Yes. <OBJ000>.", [], 0, 0, 0),
    ("Yes. <OBJ000>.", [1], 1, 1, 0), ("No.", [1], 0, 0, 0),
    ("Yes. <OBJ000> and <OBJ000>.", [1], 1, 2 / 3, 0),      # theirs: counted twice
    ("Yes. <OBJ000> and <OBJ999>.", [1], 2 / 3, 1, 0),
    ("Yes. <OBJ000> and <OBJ001>.", [0, 1], 1, 1, 0),
    ("Yes. <OBJ001>, <OBJ000>, and <OBJ002>.", [0, 1, 2], 2 / 3, 2 / 3, 0)])
def test_multi3dref(pred, truth, ours, theirs, malformed):
    kind = "zt_wo_d" if not truth else "mt" if len(truth) > 1 else "st_w_d"
    row = {"scene_id": "a", "pred": pred, "ref_captions": truth, "eval_type": kind}
    for released, expected in ((False, ours), (True, theirs)):
        found, unread = values("multi3dref", [row], FILES, released)
        assert found["F1@0.25"] == found[f"F1@0.25, {kind}"] == pytest.approx(expected)
        assert released or unread == malformed


def test_scan2cap_is_gated_and_counts_every_object_of_the_corpus():
    rows = [{"scene_id": "a", "obj_id": 0, "pred_id": 1, "pred": "a red cube"},       # IoU 0.43
            {"scene_id": "a", "obj_id": 1, "pred_id": 0, "pred": "sos a blue cube eos"}]
    ours, theirs = (values("scan2cap", rows, FILES, released)[0] for released in (False, True))
    empty = scores.rouge_l("sos eos", ["sos a red cube eos"])
    missing = scores.rouge_l("sos eos", ["sos a bed by the wall eos"])
    assert ours["ROUGE-L@0.25"] == pytest.approx((1 + 1 + missing) / 3)
    assert ours["ROUGE-L@0.5"] == pytest.approx((empty + 1 + missing) / 3)
    twice = scores.rouge_l("sos sos a blue cube eos eos", ["sos a blue cube eos"])
    assert theirs["ROUGE-L@0.25"] == pytest.approx((1 + twice + missing) / 3)


# ---------------------------------------------------------------- files

ROWS = [{"scene_id": f"s{i}", "ref_captions": ["2"] if i % 2 else ["brown", "dark brown"]}
        for i in range(6)]
ANSWERS = ["Brown.", "Two.", "Red.", "two", "brown", "2"]
LINES = [json.dumps({"key": f"scanqa/{i}", "pred": pred, "tokens": 3, "cut": i == 4}) + "\n"
         for i, pred in enumerate(ANSWERS)]


def results(folder):
    return json.loads((folder / "results.json").read_text())["benchmarks"]["scanqa"]


def test_our_files_and_the_released_ones_give_the_same(tmp_path, capsys):
    annotations = write(tmp_path / "data" / "scanqa_val.json", ROWS)
    write(tmp_path / "data" / "scanqa_train.json", "[")     # not read
    write(tmp_path / "run" / "answers.0of2.jsonl", "".join(LINES[3:]))
    write(tmp_path / "run" / "answers.1of2.jsonl", "".join(LINES[:3]) + '{"key": "sca')
    for i, part in enumerate((slice(0, 2), slice(2, 6))):
        write(tmp_path / "theirs" / "qwenvl_scanqa" / f"predictions_chunk_{i}.json",
              [{**row, "qid": 0, "gt_id": 0, "pred_id": 0, "type_info": 0, "pred": pred}
               for row, pred in zip(ROWS[part], ANSWERS[part])])
    run(tmp_path / "run", tmp_path / "data")
    first = results(tmp_path / "run")
    assert (tmp_path / "run" / "table.txt").read_text() == capsys.readouterr().out
    run(tmp_path / "theirs", annotations, "--as-released", "--out", tmp_path / "out")
    second = results(tmp_path / "out")
    em = first["metrics"]["EM"]
    assert (em["ours"], em["as_released"]) == (5 / 6, 2 / 6)
    assert first["cut"] == 1 and second["cut"] == 0
    for name, row in first["metrics"].items():
        assert {**row, "ci": 0} == {**second["metrics"][name], "ci": 0}
    shown = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert any(re.match(r" EM 0.3333 \[.*\] ours 0.8333$", line) for line in shown)


def test_a_paired_comparison(tmp_path, capsys):
    annotations = write(tmp_path / "scanqa_val.json", ROWS)
    run("first-reference", annotations, "--compare", "constant:brown", "--out", tmp_path)
    em = results(tmp_path)["metrics"]["EM"]
    assert em["gain"] == 0.5 and em["gain_ci"][0] < 0.5
    assert "gain +0.5000 [+" in capsys.readouterr().out
    # Scan2Cap has a row for each object of the corpus, also for one that nothing was asked about.
    files = {**FILES, "corpus": {f"{s}|{o}": ["sos x eos"] for s in "abcdef" for o in (0, 1)}}
    row = {"scene_id": "a", "obj_id": 0, "pred_id": 1}
    worse, better = ([scores.make_question("scan2cap", {**row, "pred": pred}, "")]
                     for pred in ("y", "x"))
    found, _ = scores.report("scan2cap", better, files, False, worse)
    assert found["metrics"]["ROUGE-L@0.25"]["gain"] > 0


def test_chunks_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "q_scanqa"
    for i in range(11):
        write(folder / f"predictions_chunk_{i}.json",
              [{**ROWS[0], "scene_id": f"s{i}", "pred": ""}])
    assert [q.scene for q in scores.read_answers(str(folder), {})["scanqa"]] == [
        f"s{i}" for i in range(11)]


def test_answers_to_other_questions_are_not_compared(tmp_path):
    for run_name, rows in (("one", ROWS), ("other", ROWS[::-1])):
        write(tmp_path / run_name / "q_scanqa" / "predictions_chunk_0.json",
              [{**row, "pred": "x"} for row in rows])
    with pytest.raises(UserError, match="in the same order"):
        run(tmp_path / "one", write(tmp_path / "scanqa.json", ROWS), "--compare",
            tmp_path / "other")


MULTI = {"scene_id": "a", "ref_captions": [1], "eval_type": "zt_w_d"}
BOXES = {name: {"a": {"locs": FILES[name]["a"]["locs"].tolist()}}
         for name in ("truth", "proposals")}


@pytest.mark.parametrize("files, arguments, words", [
    ({}, "nothing", "nothing holds no answers"),
    ({"a.jsonl": "".join(LINES)}, "a.jsonl", "do not ask"),
    ({"a.jsonl": ""}, "a.jsonl", "answers no question"),
    ({"a.jsonl": "{}\n"}, "a.jsonl", 'without a "key"'),
    ({"a.jsonl": "?\n"}, "a.jsonl", "is damaged"),
    ({"a.jsonl": LINES[0] * 2}, "a.jsonl", "answers scanqa/0 again"),
    ({"a.jsonl": "".join(LINES[1:]), "scanqa.json": ROWS}, "a.jsonl scanqa.json",
     "lacks 1 of 6 answers, first scanqa/0"),
    ({"a.jsonl": LINES[0].replace('"Brown."', "2"), "scanqa.json": ROWS[:1]}, "a.jsonl scanqa.json",
     "scanqa/0 has unusable pred"),
    ({"scanqa.json": [{"scene_id": "a"}]}, "constant:x scanqa.json", "unusable ref_captions"),
    ({"sqa3d.json": [{**ROWS[0], "sqa_type": 6}]}, "constant:x sqa3d.json", "unusable sqa_type"),
    ({"scanqa.json": [{"ref_captions": ["x"]}]}, "constant:x scanqa.json", "scene_id"),
    ({"scanqa.json": {}}, "constant:x scanqa.json", "not shaped like a scanqa file"),
    ({"scanqa.json": "["}, "constant:x scanqa.json", "scanqa.json is"),
    ({"x.json": []}, "constant:x x.json", "no annotation file by its name"),
    ({"scanqa.json": ROWS, "scanqa2.json": ROWS}, "constant:x scanqa.json scanqa2.json", "second"),
    ({"predictions_chunk_0.json": []}, "predictions_chunk_0.json", "<model>_<benchmark>"),
    ({"q_scanqa/predictions_chunk_0.json": [1]}, "q_scanqa", "record 0 has unusable fields"),
    ({"q_scanqa/predictions_chunk_0.json": [{**ROWS[0], "pred": "x"}], "scanqa.json": ROWS},
     "q_scanqa scanqa.json", "holds 1 of 6 answers"),
    ({"scanrefer.json": [{"scene_id": "a", "obj_id": 0}]}, "constant:x scanrefer.json",
     "needs truth and proposals and lookup"),
    ({"scanrefer.json": [{"scene_id": "a"}], "attributes.json": BOXES, "a_lookup.json": {}},
     "constant:x scanrefer.json attributes.json a_lookup.json", "unusable fields"),
    ({"scan2cap.json": [{"scene_id": "a", "obj_id": 0}], "attributes.json": BOXES,
      "a_corpus.json": {}}, "constant:x scan2cap.json attributes.json a_corpus.json", "pred_id"),
    ({"scanqa.json": [{"scene_id": "a", "ref_captions": "brown"}]}, "constant:x scanqa.json",
     "unusable ref_captions"),
    ({"attributes.json": {"truth": {"a": {"locs": [[float("nan")] * 6]}}}},
     "constant:x attributes.json", "not all finite"),
    ({"multi3dref.json": [MULTI], "attributes.json": BOXES}, "constant:x multi3dref.json "
     "attributes.json", "eval_type"),
    ({"multi3dref.json": [{**MULTI, "eval_type": "mt", "ref_captions": [7]}], "attributes.json":
      BOXES}, "constant:x multi3dref.json attributes.json", r"no truth \[7\] in a"),
    ({"attributes.json": {"truth": {"a": {"locs": [1]}}}}, "constant:x attributes.json",
     "holds no boxes"),
    ({"a_attributes.pt": "x"}, "constant:x a_attributes.pt", "holds no boxes")])
def test_malformed_input_is_a_sentence(tmp_path, monkeypatch, files, arguments, words):
    for name, content in files.items():
        write(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        run(*arguments.split())


def test_the_command_ends_with_2(tmp_path):
    done = script("-m", "gpt4scene.scores", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("scores.py: error: ")


def test_released_boxes_are_tensors(tmp_path):
    import torch
    torch.save({"a": {"objects": ["x"], "locs": torch.tensor(CUBES)}},
               tmp_path / "scannet_val_attributes.pt")
    torch.save({"a": {"locs": torch.tensor(CUBES)}},
               tmp_path / "scannet_mask3d_val_attributes.pt")
    found = scores.read_annotations([str(tmp_path)])
    assert sorted(found) == ["proposals", "truth"]
    assert np.array_equal(found["truth"]["a"]["locs"], CUBES)
