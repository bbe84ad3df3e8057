"""
Score answers to questions about 3-D scenes: ScanQA, SQA3D, Scan2Cap, ScanRefer, Multi3DRefer.

Two readings of the same answers are computed; where they differ, both are printed:
  ours         an answer and its references are cleaned alike; an answer without an object's number
               is wrong, and counted as malformed; an object named twice counts once; a number that
               no proposal has is a claim, so it is wrong where no object fits
  as released  what the evaluator of GPT4Scene [1] computes, faults included (docs/gpt4scene.md)

Refined EM is a substring test, which "e" passes on half of SQA3D: read EM beside it. BLEU, ROUGE-L
and CIDEr-D equal coco-caption [2] to six digits. METEOR is its Java program, run where `java` and
pycocoevalcap are found. Intervals (95%) are a bootstrap over scenes; CIDEr keeps the document
frequencies of the whole set in each draw.

Run it   python -m gpt4scene.scores results/run data/scenes
         python -m gpt4scene.scores outputs/qwenvl_scanqa                 # of released infer.py
         python -m gpt4scene.scores first-reference ScanQA_v1.0_val.json  # a perfect model
Reads    answers: JSON lines {"key": "scanqa/17", "pred": "Brown.", "cut": false}, the key being the
         benchmark and the position in its annotation file; or predictions_chunk_*.json;
         annotations, known by their names: scanqa*, sqa3d*, scan2cap*, scanrefer*, multi3dref*
         (lists of questions), *corpus*, *lookup* and *attributes* (boxes, .json or .pt)
Writes   --out   results.json and table.txt

[1] github.com/Qi-Zhangyang/GPT4Scene-and-VLN-R1, evaluate/   [2] github.com/tylin/coco-caption
"""
from __future__ import annotations

import argparse
import functools
import glob
import importlib.util
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from cli import DefaultsFormatter, UserError, read_rows, run_cli, write_json, write_text
from intervals import MIN_SCENES, cluster_bootstrap
from world.episodes import read_json

NEEDS = {"scanqa": (), "sqa3d": (), "scan2cap": ("truth", "proposals", "corpus"),
         "scanrefer": ("truth", "proposals", "lookup"), "multi3dref": ("truth", "proposals")}
SQA_TYPES = ("what", "is", "how", "can", "which", "other")         # by a question's first word
# Zero, single or multiple targets, with or without distractors.
EVAL_TYPES = ("zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt")
THRESHOLDS = (0.25, 0.5)                                           # of IoU


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m gpt4scene.scores",
                                formatter_class=DefaultsFormatter,
                                description=__doc__.split("\n")[1])
    p.add_argument("answers", metavar="ANSWERS", help="a file or a folder of answers; or, to see "
                   "what a score is worth: first-reference (of each question), constant:TEXT, "
                   "constants:META (gpt4scene.scenes' meta.json: the best one of each template)")
    p.add_argument("annotations", nargs="*", metavar="ANNOTATIONS", help="annotation files, or "
                   "folders of them; released predictions hold their questions themselves")
    p.add_argument("--as-released", action="store_true", help="put the released evaluator's scores "
                   "first, with their intervals, and ours beside them")
    p.add_argument("--compare", metavar="ANSWERS", help="also print what is gained over these "
                   "answers, paired, with intervals over scenes")
    p.add_argument("--out", metavar="FOLDER", help="default: ANSWERS, if that is a folder")
    return p.parse_args(argv)


# ---------------------------------------------------------------- text

WORDS = {"letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right",
         "behine": "behind", "tv": "TV", "chai": "chair", "wasing": "washing",
         "waslked": "walked", "oclock": "o'clock", "none": "zero", "23": "twenty-three"}
WORDS |= {str(n): word for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty".split())}


def clean_answer(text: str) -> str:
    """LEO's and the released evaluator's cleaning of an answer, step by step, oddities included.

    >>> clean_answer(" On the  TV."), clean_answer("2 chairs"), clean_answer("let of a bed")
    ('on TV', 'two chairs', 'left of bed')
    >>> clean_answer("façade"), clean_answer("21"), clean_answer("no. 1"), clean_answer("mat2")
    ('faade', '21', 'no one', 'mat')
    """
    text = re.sub(" {2,}", " ", re.sub("^ +| +$", "", text.lower()))
    text = re.sub(r"[^a-z0-9,'\s\-:]+", "", text)
    text = re.sub(r"\w+", lambda found: WORDS.get(found[0], found[0]), text)
    text = re.sub(r"\bo' +clock\b", "o'clock", text)
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):                  # one after the other: "a the x" is "x"
        text = re.sub(rf"\b{article} ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def clean_prediction(text: str) -> str:
    """clean_answer() after one full stop is taken off: "brown ." keeps no blank at its end."""
    return clean_answer(text.removesuffix(".") if len(text) > 1 else text)


def match_answer(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact and refined match. Refined: without blanks, one is a part of the other.

    >>> match_answer("e", ["one"]), match_answer("brown", ["brown"]), match_answer("", [""])
    ((0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
    >>> match_answer(clean_answer("2"), ["2"])          # why both sides must be cleaned
    (0.0, 0.0)
    """
    if not answer or answer in references:
        return (float(bool(answer)),) * 2
    short, *others = ("".join(text.split()) for text in (answer, *references))
    return 0.0, float(any(short in other or other in short for other in others))


# Stanford's PTB tokenizer, as far as such texts need it. Its names for brackets stay, because
# coco-caption drops "-LRB-" only after it has become "-lrb-".
TOKEN = re.compile(r"""
    <[^<>\s]+>                                                        # <obj012>
  | (?:[a-z]\.){2,}  |  (?:mr|mrs|dr|st|vs|etc|no|ft)\.(?=\s+\S)      # abbreviations keep the stop
  | \bcan(?=not\b)  |  \b(?:gon|wan)(?=na\b)  |  \bgot(?=ta\b)
  | [a-z]+(?=n't\b)  |  n't\b  |  '(?:s|m|d|re|ve|ll)\b  |  \bo'clock\b
  | \d+(?:[.,:/]\d+)+(?!\w)  |  \w+(?:[-/.@&]\w+)*
  | [?!]+  |  [^\s\w]""", re.VERBOSE)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset("'`.?!,:-;\"")


@functools.lru_cache(maxsize=100_000)
def tokenize(text: str) -> str:
    """Tokens in lower case, separated by blanks, without punctuation marks.

    >>> tokenize("It's a two-seater (black), isn't it?  1.5 m, no. 2 of the U.S.")
    "it 's a two-seater -lrb- black -rrb- is n't it 1.5 m no. 2 of the u.s."
    """
    found = TOKEN.findall(text.lower().replace("\u2019", "'"))
    return " ".join(BRACKETS.get(token, token) for token in found if token not in DROPPED)


# ---------------------------------------------------------------- n-gram scores of tokenized texts


@functools.lru_cache(maxsize=100_000)
def ngrams(text: str) -> Counter:
    """Counts of the 1- to 4-grams."""
    words = text.split()
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu_counts(text: str, references: Sequence[str]) -> list[int]:
    """What BLEU sums: clipped matches and n-grams for n = 1..4, length, closest reference length.

    >>> bleu_counts("the the chair", ["the chair", "the red chair by the wall"])
    [3, 1, 0, 0, 3, 2, 1, 0, 3, 2]
    """
    most, length, correct = Counter(), len(text.split()), [0] * 4
    for reference in references:
        most |= ngrams(reference)
    for gram, count in ngrams(text).items():
        correct[len(gram) - 1] += min(count, most[gram])
    lengths = (len(reference.split()) for reference in references)
    closest = min((abs(other - length), other) for other in lengths)[1]
    return [*correct, *(max(0, length - n) for n in range(4)), length, closest]


def bleu(totals: np.ndarray) -> np.ndarray:
    """Sums of bleu_counts() (.., 10) -> BLEU-1..4 (.., 4), with coco-caption's tiny constants.

    >>> bleu(np.array([3, 1, 0, 0, 3, 2, 1, 0, 3, 2])).round(4).tolist()
    [1.0, 0.7071, 0.0, 0.0]
    """
    precision = (totals[..., :4] + 1e-15) / (totals[..., 4:8] + 1e-9)
    ratio = (totals[..., 8:9] + 1e-15) / (totals[..., 9:] + 1e-9)
    penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.cumprod(precision, axis=-1) ** (1 / np.arange(1, 5)) * penalty


def rouge_l(text: str, references: Sequence[str], beta: float = 1.2) -> float:
    """F of the longest common subsequence. The best precision and the best recall may come from
    two references: neither of these is the answer, and yet the score is 1.

    >>> rouge_l("red chair", ["chair", "a big red chair"]), rouge_l("bed", ["chair"])
    (1.0, 0.0)
    """
    words, precision, recall = text.split(" "), 0.0, 0.0
    for reference in references:
        others = reference.split(" ")
        row = [0] * (len(others) + 1)                       # of the table of common lengths
        for word in words:
            above, row = row, [0]
            for i, other in enumerate(others):
                row.append(above[i] + 1 if word == other else max(row[i], above[i + 1]))
        precision = max(precision, row[-1] / len(words))
        recall = max(recall, row[-1] / len(others))
    both = recall + beta ** 2 * precision
    return (1 + beta ** 2) * precision * recall / both if both else 0.0


class Vector(NamedTuple):
    """A text's tf-idf."""
    weights: dict           # {n-gram: weight}
    norms: list[float]      # for n = 1..4
    length: int             # in bigrams, as coco-caption has it


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D per item: clipped tf-idf cosine, mean over n = 1..4 and references, a Gaussian
    penalty of the length difference (sigma 6), times 10.

    The references of this set give the document frequencies, so a single item has the score 0, and
    the score of a set is not the mean of its parts'.
    >>> cider(["a red chair"], [["a red chair"]])
    [0.0]
    >>> [round(x, 6) for x in cider(["a red chair on it", "bed"], [["a red chair on it"], ["bed"]])]
    [10.0, 2.5]
    """
    frequency = Counter(gram for refs in references for gram in set().union(*map(ngrams, refs)))

    def vector(text: str) -> Vector:
        weights, squares, bigrams = {}, [0.0] * 4, 0
        for gram, count in ngrams(text).items():
            weights[gram] = count * math.log(len(texts) / max(1, frequency[gram]))
            squares[len(gram) - 1] += weights[gram] ** 2
            bigrams += count * (len(gram) == 2)
        return Vector(weights, [math.sqrt(square) for square in squares], bigrams)

    def similarity(a: Vector, b: Vector) -> float:
        dots = [0.0] * 4
        for gram, weight in a.weights.items():
            other = b.weights.get(gram, 0.0)
            dots[len(gram) - 1] += min(weight, other) * other
        cosines = [dot / (x * y) for dot, x, y in zip(dots, a.norms, b.norms) if x and y]
        return sum(cosines) / 4 * math.exp(-(a.length - b.length) ** 2 / (2 * 6 ** 2))

    scores = []
    for text, refs in zip(texts, references):
        answer = vector(text)
        scores.append(10 * sum(similarity(answer, vector(ref)) for ref in refs) / len(refs))
    return scores


def meteor_lacks() -> str:
    """What METEOR needs and is not here; "" if it can run."""
    found = {"java": shutil.which("java"),
             "pycocoevalcap": importlib.util.find_spec("pycocoevalcap")}
    return " and ".join(name for name, where in found.items() if not where)


@functools.lru_cache(maxsize=8)         # it starts in 16 s, and both readings may have one text
def meteor(texts: tuple[str], references: tuple[tuple[str]]) -> float | None:
    """METEOR 1.5's own aggregate, which is not the mean over items; None where it cannot run."""
    if meteor_lacks():
        return None
    from pycocoevalcap.meteor.meteor import Meteor
    try:
        return Meteor().compute_score(dict(enumerate(references)),
                                      {i: [text] for i, text in enumerate(texts)})[0]
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR's Java program failed ({error}): it needs 2 GB of memory; free "
                        "some, or take java off the PATH to leave METEOR out") from None


# ---------------------------------------------------------------- scores with intervals


class Metric(NamedTuple):
    value: float | None                 # None: no item has a value, or it cannot be computed here
    ci: list[float] | None = None
    rows: list | None = None            # per item, if the value is their mean; None: left out
    scenes: Sequence[str] = ()          # of the rows


def means(columns: dict[str, Sequence], scenes: Sequence[str], groups: Sequence[str] = (),
          order: Sequence[str] = ()) -> dict[str, Metric]:
    """{name: a value per item} -> {name: its mean}, and {"name, group": its mean in the group}."""
    columns = columns | {
        f"{name}, {group}": [value if group == own else None for value, own in zip(column, groups)]
        for group in order for name, column in columns.items()}
    found = cluster_bootstrap(columns, scenes) if len(set(scenes)) >= MIN_SCENES else {}
    metrics = {}
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        metrics[name] = Metric(float(np.mean(values)) if values else None,
                               found.get(name, {}).get("ci"), column, scenes)
    return metrics


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]], scenes: Sequence[str],
                 at: str = "") -> dict[str, Metric]:
    """Texts (n,) and their references (n, some), not tokenized yet -> {name + at: Metric}."""
    texts = tuple(map(tokenize, texts))
    references = tuple(tuple(map(tokenize, refs)) for refs in references)
    pairs = list(zip(texts, references))
    counts = np.array([bleu_counts(*pair) for pair in pairs])
    group = np.unique(scenes, return_inverse=True)[1]
    sums = np.stack([np.bincount(group, column) for column in counts.T], axis=1)    # per scene
    metrics = {f"BLEU-{n + 1}{at}": Metric(float(bleu(sums.sum(0))[n])) for n in range(4)}
    if len(sums) >= MIN_SCENES:
        share = np.full(len(sums), 1 / len(sums))
        draws = bleu(np.random.default_rng(0).multinomial(len(sums), share, 2000) @ sums)
        limits = np.percentile(draws, [2.5, 97.5], axis=0).T.round(6).tolist()
        metrics = {name: metric._replace(ci=ci if ci[0] < ci[1] else None)
                   for (name, metric), ci in zip(metrics.items(), limits)}
    return metrics | {f"METEOR{at}": Metric(meteor(texts, references))} | means(
        {f"ROUGE-L{at}": [rouge_l(*pair) for pair in pairs],
         f"CIDEr{at}": cider(texts, references)}, scenes)


# ---------------------------------------------------------------- boxes


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Axis-aligned boxes (n, 6), (m, 6): centre, size -> (n, m). A box has slightly less than 1
    with itself, as in the released code; an empty box has 0.

    >>> box_iou(np.array([[0, 0, 0, 2, 2, 2.0]]), np.array([[1, 0, 0, 2, 2, 2.0]])).round(4)
    array([[0.3333]])
    """
    a, b = a[:, None], b[None]
    low = np.maximum(a[..., :3] - a[..., 3:] / 2, b[..., :3] - b[..., 3:] / 2)
    high = np.minimum(a[..., :3] + a[..., 3:] / 2, b[..., :3] + b[..., 3:] / 2)
    common = np.maximum(high - low, 0).prod(-1)
    return common / (a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - common + 1e-8)


def f1(overlaps: np.ndarray, threshold: float) -> float:
    """IoU of predicted and true boxes (p, t) -> 2 hits / (p + t). The pairs maximise the sum of
    IoU, so another pairing may have more hits: that is the benchmark's definition.

    >>> f1(np.array([[0.8], [0.8]]), 0.5)                   # one object, named twice
    0.6666666666666666
    """
    square = np.zeros((max(overlaps.shape),) * 2, np.float32)
    square[:overlaps.shape[0], :overlaps.shape[1]] = overlaps
    hits = (square[linear_sum_assignment(-square)] >= threshold).sum()
    return float(2 * hits / sum(overlaps.shape))


def object_ids(text: str) -> list[int]:
    """The objects that an answer names, with three digits each.

    >>> object_ids("Yes. <OBJ001>, <OBJ012>, and <OBJ2>.")
    [1, 12]
    """
    return [int(number) for number in re.findall(r"<OBJ(\d{3})>", text)]


# ---------------------------------------------------------------- annotations


def read_attributes(path: str) -> dict[str, dict]:
    """{"truth" or "proposals": {scene: {"locs": (n, 6), "objects": labels}}}. A file holds both,
    or as released one of the two, scannet_val_attributes.pt the truth."""
    try:
        if path.endswith(".pt"):
            import torch
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = read_json(path)
        if "truth" not in content:
            truth = os.path.basename(path).startswith("scannet_val_")
            content = {"truth" if truth else "proposals": content}
        found = {name: {scene: {**entry, "locs": np.asarray(entry["locs"], float).reshape(-1, 6)}
                       for scene, entry in scenes.items()} for name, scenes in content.items()}
        bad = [scene for scenes in found.values() for scene, entry in scenes.items()
               if not np.isfinite(entry["locs"]).all()]
        if bad:
            raise UserError(f"{path}: the locs of {bad[0]} are not all finite: make the file again")
        return found
    except UserError:
        raise
    except Exception as error:                              # torch.load has many of its own
        raise UserError(f"{path} holds no boxes {{scene: {{\"locs\": (n, 6)}}}} "
                        f"({type(error).__name__}): make the file again") from None


def role_of(path: str) -> str | None:
    """What an annotation file is, by its name."""
    name = os.path.basename(path).lower()
    roles = [word for word in ("lookup", "corpus", "attributes") if word in name]
    roles += [benchmark for benchmark in NEEDS if name.startswith(benchmark)]
    return roles[0] if roles and name.endswith((".json", ".pt")) else None


def read_annotations(paths: Iterable[str]) -> dict[str, Any]:
    """Files, and folders of them -> {benchmark: records; "corpus", "lookup": the file's content;
    "truth", "proposals": {scene: {"locs"}}}. A folder's files for training are left out."""
    files, found = [], {}
    for path in paths:
        inside = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
        inside = [file for file in inside if role_of(file) and "train" not in file[len(path):]]
        files += inside if os.path.isdir(path) else [path]
    for path in files:
        role = role_of(path)
        if not role:
            raise UserError(f"{path} is no annotation file by its name: it must begin with "
                            f"{', '.join(NEEDS)}, or hold corpus, lookup or attributes")
        parts = read_attributes(path) if role == "attributes" else {role: read_json(path)}
        for name, content in parts.items():
            if name in found:
                raise UserError(f"{path} is a second file of {name}: name only one")
            if not is_shaped(name, content):
                raise UserError(f"{path} is not shaped like a {name} file: name another one")
            found[name] = content
    return found


def is_shaped(name: str, content) -> bool:
    """Records; or {scene: boxes}, {scene: {object: 0 or 1}}, {"scene|object": captions}."""
    if name in NEEDS:
        return isinstance(content, list) and all(isinstance(row, dict) for row in content)
    values = content.values() if isinstance(content, dict) else [None]
    if name == "corpus":
        return all(isinstance(texts, list) and texts and all(isinstance(text, str)
                   for text in texts) for texts in values)
    return all(isinstance(value, dict) for value in values)


def boxes_of(files: dict, name: str, scene: str, numbers: Sequence[int] | None = None):
    """A scene's "truth" or "proposals" (n, 6): all, or those of some numbers."""
    boxes = files[name].get(scene, {}).get("locs")
    if boxes is None or not all(0 <= one < len(boxes) for one in numbers or ()):
        raise UserError(f"the attributes have no {name} {numbers or ''} in {scene}: give the file "
                        "that belongs to the annotations")
    return boxes if numbers is None else boxes[numbers]


# ---------------------------------------------------------------- answers


class Question(NamedTuple):
    """A question with its answer."""
    scene: str
    pred: str               # the answer
    references: list        # texts; multi3dref: numbers of the true objects
    target: int             # scan2cap, scanrefer: number of the true object
    proposal: int           # scan2cap: number of the proposal that was to be described
    kind: int | str         # sqa3d: index in SQA_TYPES; multi3dref: one of EVAL_TYPES
    cut: bool               # the answer reached the limit of tokens


def make_question(benchmark: str, row: dict, where: str) -> Question:
    """A record of an annotation file with its answer in "pred", or of the released predictions."""
    try:
        target = row.get("gt_id", row.get("obj_id"))
        if benchmark not in ("scan2cap", "scanrefer"):
            target = target or 0
        q = Question(row["scene_id"], row["pred"], row.get("ref_captions", row.get("answers", [])),
                     int(target), int(row["pred_id"] if benchmark == "scan2cap" else 0),
                     row.get("sqa_type", row.get("eval_type", row.get("type_info", 0))),
                     bool(row.get("cut")))
        several = benchmark == "multi3dref"
        right = {"scene_id": isinstance(q.scene, str), "pred": isinstance(q.pred, str),
                 "ref_captions": isinstance(q.references, list)
                 and all(type(one) is (int if several else str) for one in q.references)
                 and (len(q.references) > 0 or benchmark not in ("scanqa", "sqa3d")),
                 "sqa_type": benchmark != "sqa3d" or q.kind in range(len(SQA_TYPES)),
                 "eval_type": not several or q.kind in EVAL_TYPES
                 and q.kind.startswith("zt") == (not q.references)}
        wrong = [field for field, good in right.items() if not good]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = [f"fields ({type(error).__name__}: {error})"]
    if wrong:
        raise UserError(f"{where} has unusable {wrong[0]}: make the file again")
    return q


def read_lines(paths: Iterable[str]) -> dict[str, dict]:
    """Our answers, {key: row}. A last line without its end, cut short by a kill, is left out."""
    found = {}
    for path in paths:
        for row in read_rows(path):
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise UserError(f"{path} has a line without a \"key\" ({row!r:.60}): delete it, "
                                "and run gpt4scene.answer again")
            if found.setdefault(row["key"], row) is not row:
                raise UserError(f"{path} answers {row['key']} again: delete one of the two lines")
    return found


def join(path: str, answers: dict[str, dict], files: dict) -> dict[str, dict[str, dict]]:
    """Our answers with the records at their positions. A benchmark without an answer is left out;
    one with some answers is refused, since its first questions are no fair sample."""
    found = {}
    for name in [name for name in NEEDS if name in files]:
        rows = {f"{name}/{i}": row for i, row in enumerate(files[name])}
        missing = [key for key in rows if key not in answers]
        if missing and len(missing) < len(rows):
            raise UserError(f"{path} lacks {len(missing)} of {len(rows)} answers, first "
                            f"{missing[0]}: run gpt4scene.answer again, it goes on")
        if not missing:
            found[name] = {key: {**row, "pred": answers[key].get("pred"),
                                 "cut": answers.pop(key).get("cut")} for key, row in rows.items()}
    if answers:
        raise UserError(f"{path} answers {next(iter(answers))}, which the ANNOTATIONS do not ask: "
                        "give the files that were answered")
    return found


def read_released(paths: Sequence[str], files: dict) -> dict[str, dict[str, dict]]:
    """<model>_<benchmark>/predictions_chunk_<i>.json, which hold the questions themselves."""
    found = {}
    for path in paths:
        folder, rows = os.path.basename(os.path.dirname(os.path.abspath(path))), read_json(path)
        name = next((name for name in NEEDS if folder.endswith("_" + name)), None)
        if not name or not isinstance(rows, list):
            raise UserError(f"{path} must be a list in a folder <model>_<benchmark>, as released "
                            f"infer.py writes it; the benchmarks are {', '.join(NEEDS)}")
        found.setdefault(name, {}).update({f"{path}, record {i}": row
                                           for i, row in enumerate(rows)})
    for name, rows in found.items():
        if len(rows) != len(files.get(name, rows)):
            raise UserError(f"{os.path.dirname(paths[0])} holds {len(rows)} of {len(files[name])} "
                            f"answers to {name}: give all chunks, or infer the rest first")
    return found


def constant_answers(word: str, files: dict) -> dict[str, dict]:
    """Answers that need no model, as read_lines() gives them: first-reference of each question that
    has texts as references, constant:TEXT, or constants:META, a constant for each template."""
    names, constants = [name for name in NEEDS if name in files], {}
    if word == "first-reference":
        names = [name for name in names if name in ("scanqa", "sqa3d", "scan2cap")]
    if word.startswith("constants:"):
        try:
            constants = {template: row["constant"].replace("<obj", "<OBJ") for template, row in
                     read_json(word.removeprefix("constants:"))["constants"].items()}
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{word} names no meta.json of gpt4scene.scenes: name one") from None

    def answer(name: str, row: dict) -> str | None:
        if word == "first-reference":
            return (row.get("ref_captions") or row.get("answers") or [None])[0]
        if word.startswith("constants:"):
            return constants.get(f"{name}/{row.get('template')}", "")
        return word.removeprefix("constant:")
    return {f"{name}/{i}": {"pred": answer(name, row)}
            for name in names for i, row in enumerate(files[name])}


def chunk_order(path: str) -> list:
    """Sorts chunks by their number: as text, 10 stands before 2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def read_answers(path: str, files: dict) -> dict[str, list[Question]]:
    """A file or a folder of answers, or one of the words that constant_answers() knows."""
    inside = os.path.join(glob.escape(path), "**", "")
    ours, theirs = (sorted(glob.glob(inside + name, recursive=True), key=chunk_order)
                    for name in ("answers*.jsonl", "predictions_chunk_*.json"))
    paths = ours or theirs or [path] * os.path.isfile(path)
    if path == "first-reference" or path.startswith(("constant:", "constants:")):
        found = join(path, constant_answers(path, files), files)
    elif not paths:
        raise UserError(f"{path} holds no answers*.jsonl and no predictions_chunk_*.json: name a "
                        "folder that does, or one such file")
    elif paths[0].endswith(".jsonl"):
        found = join(path, read_lines(paths), files)
    else:
        found = read_released(paths, files)
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        raise UserError(f"{path} answers no question: name its annotation files after it")
    for name in found:
        lacks = [role for role in NEEDS[name] if role not in files]
        if lacks:
            raise UserError(f"{name} needs {' and '.join(lacks)} among the ANNOTATIONS: add files "
                            "named *attributes* (truth, proposals), *corpus* or *lookup*")
    return {name: [make_question(name, row, where) for where, row in rows.items()]
            for name, rows in found.items()}


# ---------------------------------------------------------------- the five scores


class Scores(NamedTuple):
    metrics: dict[str, Metric]
    malformed: int = 0                  # answers that cannot be read as objects


def score_text(questions: list[Question], clean: Callable, by_type: bool) -> Scores:
    """ScanQA, SQA3D. clean: of references; as released it is clean_answer() for SQA3D, and
    nothing for ScanQA, where therefore "two" does not match "2"."""
    scenes = [q.scene for q in questions]
    answers = [clean_prediction(q.pred) for q in questions]
    references = [[*map(clean, q.references)] for q in questions]
    exact, refined = zip(*map(match_answer, answers, references))
    types = ([SQA_TYPES[q.kind] for q in questions], SQA_TYPES) if by_type else ()
    return Scores(means({"EM": exact, "EM refined": refined}, scenes, *types)
                  | text_metrics(answers, references, scenes))


def score_scan2cap(questions: list[Question], files: dict, released: bool) -> Scores:
    """A caption for each object of the corpus, between the marks sos and eos. An object without a
    proposal of enough IoU, or without an answer, has "sos eos", which still earns ROUGE-L and
    METEOR. As released, the marks are added to answers that have them already."""
    corpus, metrics = files["corpus"], {}
    scenes = [key.split("|")[0] for key in corpus]
    for threshold in THRESHOLDS:
        captions = dict.fromkeys(corpus, "")
        for q in questions:
            key = f"{q.scene}|{q.target}"
            if key not in corpus:
                raise UserError(f"the Scan2Cap corpus has no {key}: give the corpus file that "
                                "belongs to the annotations")
            overlap = box_iou(boxes_of(files, "proposals", q.scene, [q.proposal]),
                              boxes_of(files, "truth", q.scene, [q.target]))[0, 0]
            text = q.pred if released else re.sub(r"^\s*sos\b|\beos\s*$", "", q.pred)
            captions[key] = text if overlap >= threshold else ""
        metrics |= text_metrics([f"sos {text} eos" for text in captions.values()],
                                corpus.values(), scenes, f"@{threshold}")
    return Scores(metrics)


def score_scanrefer(questions: list[Question], files: dict, released: bool) -> Scores:
    """Acc@IoU. unique, 0 in the lookup: the scene's only described object of its class."""
    overlaps, groups, malformed = [], [], 0
    for q in questions:
        boxes, ids = boxes_of(files, "proposals", q.scene), object_ids(q.pred)
        if released:                                        # the first that exists, else number 0
            ids = [i for i in ids if i < len(boxes)] or [0]
        readable = bool(ids) and ids[0] < len(boxes)
        malformed += not readable
        truth = boxes_of(files, "truth", q.scene, [q.target])
        overlaps.append(box_iou(boxes[ids[:1]], truth)[0, 0] if readable else 0.0)
        number = files["lookup"].get(q.scene, {}).get(str(q.target))
        if number not in (0, 1):
            raise UserError(f"the lookup has no 0 or 1 for object {q.target} of {q.scene}: give "
                            "the file that belongs to the annotations")
        groups.append(("unique", "multiple")[number])
    columns = {f"Acc@{threshold}": [float(one >= threshold) for one in overlaps]
               for threshold in THRESHOLDS}
    scenes = [q.scene for q in questions]
    return Scores(means(columns, scenes, groups, ("unique", "multiple")), malformed)


def score_multi3dref(questions: list[Question], files: dict, released: bool) -> Scores:
    """F1@IoU. As released, numbers that do not exist are dropped, which makes "Yes. <OBJ999>."
    right where no object fits, and so does an answer that says only "Yes."."""
    columns, malformed = {f"F1@{threshold}": [] for threshold in THRESHOLDS}, 0
    for q in questions:
        boxes, truth = (boxes_of(files, *one) for one in
                        (("proposals", q.scene), ("truth", q.scene, q.references)))
        ids = object_ids(q.pred) if released else sorted(set(object_ids(q.pred)))
        known = [i for i in ids if i < len(boxes)]
        ids = known if released else ids
        says_none = not ids and (released or bool(re.match(r"\s*no\b", q.pred, re.I)))
        malformed += not ids and not says_none
        overlaps = np.zeros((len(ids), len(truth)))         # sorted: what exists stands first
        overlaps[:len(known)] = box_iou(boxes[known], truth)
        for threshold, column in zip(THRESHOLDS, columns.values()):
            column.append(f1(overlaps, threshold) if q.references else float(says_none))
    return Scores(means(columns, [q.scene for q in questions], [q.kind for q in questions],
                        EVAL_TYPES), malformed)


def score(name: str, questions: list[Question], files: dict, released: bool) -> Scores:
    if name == "scanqa":
        return score_text(questions, str if released else clean_prediction, False)
    if name == "sqa3d":
        return score_text(questions, clean_answer if released else clean_prediction, True)
    scorers = {"scan2cap": score_scan2cap, "scanrefer": score_scanrefer,
               "multi3dref": score_multi3dref}
    return scorers[name](questions, files, released)


# ---------------------------------------------------------------- the run


def number(value: float | None, ci: list[float] | None = None, sign: str = "") -> str:
    text = "-" if value is None else f"{value:{sign}.4f}"
    return text + (f" [{ci[0]:{sign}.4f}, {ci[1]:{sign}.4f}]" if ci else "")


def gain_over(before: Metric, after: Metric) -> Metric:
    """The mean of the paired differences."""
    return means({"gain": [None if None in pair else pair[1] - pair[0]
                           for pair in zip(before.rows, after.rows)]}, after.scenes)["gain"]


def report(name: str, questions: list[Question], files: dict, released: bool,
           others: list[Question] | None) -> tuple[dict, list[str]]:
    """A benchmark's part of results.json, and its lines of the table."""
    asked, asked_others = ([(q.scene, q.references, q.target) for q in some]
                           for some in (questions, others or questions))
    if asked != asked_others:
        raise UserError(f"--compare needs answers to the same questions of {name}, in the same "
                        "order: give two runs on one file")
    ours, theirs = (score(name, questions, files, reading) for reading in (False, True))
    first, second = (theirs, ours) if released else (ours, theirs)
    before = score(name, others, files, released).metrics if others else {}
    found = {"questions": len(questions), "scenes": len({q.scene for q in questions}),
             "malformed": ours.malformed, "cut": sum(q.cut for q in questions), "metrics": {}}
    lines = [f"{name}: " + ", ".join(f"{found[key]} {key}" for key in [*found][:4])]
    for metric, (value, ci, rows, _) in first.metrics.items():
        other = second.metrics[metric].value
        row = {"ours": ours.metrics[metric].value, "as_released": theirs.metrics[metric].value,
               "ci": ci}
        line = f"  {metric:22}{number(value, ci):26}"
        if value != other and (None in (value, other) or abs(value - other) > 1e-9):
            line += f"{'ours' if released else 'as released'} {number(other)}"
        if before and rows:
            gain = gain_over(before[metric], first.metrics[metric])
            row |= {"gain": gain.value, "gain_ci": gain.ci}
            line += f"  gain {number(gain.value, gain.ci, '+')}"
        found["metrics"][metric] = row
        lines.append(line.rstrip())
    return found, lines


def main(args):
    files = read_annotations(args.annotations)
    answers = read_answers(args.answers, files)
    others = read_answers(args.compare, files) if args.compare else {}
    lacks = meteor_lacks()
    reading = "as released" if args.as_released else "our reading"
    lines = [f"{args.answers}, {reading} [95%, over scenes]"]
    results = {"answers": args.answers, "compared": args.compare, "as_released": args.as_released,
               "meteor_lacks": lacks, "benchmarks": {}}
    for name, questions in answers.items():
        results["benchmarks"][name], rows = report(name, questions, files, args.as_released,
                                                   others.get(name))
        lines += rows
    if lacks and set(answers) & {"scanqa", "sqa3d", "scan2cap"}:
        lines.append(f"METEOR is blank: it needs {lacks}, not found here")
    print("\n".join(lines))
    out = args.out or args.answers
    if args.out or os.path.isdir(out):
        try:
            os.makedirs(out, exist_ok=True)
            write_json(os.path.join(out, "results.json"), results)
            write_text(os.path.join(out, "table.txt"), "\n".join(lines) + "\n")
        except OSError as error:
            raise UserError(f"cannot write in {out} ({error.strerror}): give --out") from None


if __name__ == "__main__":
    run_cli(main, parse_args)
