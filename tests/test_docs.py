"""README.md and docs/: what they name exists, their commands parse, their tables hold every key.

Run it   python -m pytest tests/test_docs.py
"""
import argparse
import contextlib
import doctest
import functools
import glob
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

PAGES = ["README.md", *sorted(f"docs/{name}" for name in os.listdir(os.path.join(ROOT, "docs"))
                               if name.endswith(".md"))]
TEXTS = {}
for page in PAGES:
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        TEXTS[page] = file.read()
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
ROOT_MODULES = sorted(os.path.basename(path)[:-3]
                      for path in glob.glob(os.path.join(ROOT, "*.py")))
MODULES = ROOT_MODULES + sorted(
    f"{folder}.{os.path.basename(path)[:-3]}"
    for folder in ("world", "tools", "activevln", "gpt4scene")
    for path in glob.glob(os.path.join(ROOT, folder, "*.py")) if "__" not in path)
FENCES = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", ALL, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^ *```.*?^ *```$", "", ALL, flags=re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r'python -c "(.*?)"\n', re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)


def script_of(words):
    """Words of a command -> (our module that it runs, its arguments); None if it runs none."""
    for i, word in enumerate(words):
        name = word[:-3] if word.endswith(".py") else word
        runs = word.endswith(".py") or (i and words[i - 1] in ("-m", "--module"))
        if runs and (name in MODULES or word.endswith(".py")):
            return (name, words[i + 1:]) if name in MODULES else None
    return None


def commands():
    """Every command of the docs that runs a script of ours, fenced or in a line of prose."""
    fenced = "".join(text for language, text in FENCES if language == "bash")
    fenced = re.sub(r"\\\n", " ", SNIPPET.sub("", fenced))                # joined where it goes on
    shell = dict(re.findall(r'^(\w+)="(.*)"$', fenced, re.M), seed="0")      # X=".." and the loop's
    for line in fenced.splitlines() + [
            span for span in SPANS if ".py -" in span or " -m " in span]:
        line = re.sub(r"\$\{?(\w+)\}?", lambda found: shell.get(found[1], found[0]), line)
        found = script_of(shlex.split(line.split(" | ")[0], comments=True))
        if found:
            yield pytest.param(*found, id=" ".join([found[0], *found[1]])[:70])


@functools.lru_cache(None)
def flags_of(module):
    """Every flag of a script in full: argparse itself would let an abbreviation pass."""
    seen, original = [], argparse.ArgumentParser.parse_args

    def spy(parser, *args, **kwargs):
        seen.append(parser)
        return original(parser, *args, **kwargs)

    argparse.ArgumentParser.parse_args = spy
    try:
        with contextlib.suppress(SystemExit):               # some must be given something
            importlib.import_module(module).parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = original
    commands = [parser for action in seen[0]._actions if isinstance(action.choices, dict)
                for parser in action.choices.values()]
    return {flag for parser in [seen[0], *commands] for flag in parser._option_string_actions}


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("module, arguments", list(commands()))
def test_commands_parse(module, arguments):
    arguments = [word for word in arguments if word != ".."]             # "and whatever else"
    importlib.import_module(module).parse_args(arguments)
    assert {word for word in arguments if word.startswith("--")} <= flags_of(module)


def test_the_three_commands_of_the_user_are_there_to_the_letter():
    lines = [line for _, text in FENCES for line in text.splitlines()]
    for command in ("deepspeed sft.py --model Qwen2-VL-2B", "deepspeed grpo.py --init ckpt/sft",
                    "python evaluate.py --split val_unseen", "bash demo.sh", "bash test.sh"):
        assert any(line == command or line.startswith(command + "  ") for line in lines), command


def test_every_flag_that_is_named_is_a_flag():
    scripts = [module for module in MODULES
               if hasattr(importlib.import_module(module), "parse_args")]
    known = set().union(*map(flags_of, scripts))
    others = {"--index-url", "--num_gpus", "--master_port", "--nproc_per_node", "--local-dir"}
    for span in SPANS:
        named = set(re.findall(r"(?<![\w-])--[\w-]+", span))
        assert named <= known | others, span


def test_python_snippets_are_python():
    snippet, = (code for _, text in FENCES for code in SNIPPET.findall(text))
    compile(snippet, "README.md", "exec")


def test_the_example_of_an_agent_walks(tmp_path):
    code, = (text for language, text in FENCES if language == "python" and "straight_on" in text)
    (tmp_path / "corridor.py").write_text(code)
    from evaluate import EpisodeState, python_agent
    agent = python_agent(f"{tmp_path}/corridor.py:straight_on")
    walk = EpisodeState({}, "Go.", name="1")
    views, found = np.random.default_rng(0).integers(0, 256, (41, 4, 4, 3), dtype=np.uint8), []
    views[3] = views[2]
    for frame in views:
        walk.frames.append(frame)
        found += agent([walk])[0]
    assert found == [1, 1, 1, 2] + [1] * 36 + [0]


# ---------------------------------------------------------------- files and names


def test_the_file_list_is_complete_and_every_file_is_there():
    table = README.split("<!-- file-list -->")[1].split("<!-- /file-list -->")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(set(listed)) == len(listed)
    for name in listed:
        assert os.path.exists(os.path.join(ROOT, name)), name
    assert {name[:-3] for name in listed if name.endswith(".py")} == set(ROOT_MODULES)
    scripts = glob.glob(os.path.join(ROOT, "*.sh"))
    assert {name for name in listed if name.endswith(".sh")} == set(map(os.path.basename, scripts))


def test_links_and_files_that_are_named_exist():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), link)), (page, link)
    named = [span for span in SPANS if re.fullmatch(r"([a-z]+/)?\w+\.py|LICENSE|tests/", span)]
    assert "tests/test_real_data.py" in named
    for path in named:
        assert path == "x.py" or os.path.exists(os.path.join(ROOT, path)), path


def test_the_contract_is_the_one_that_is_written():
    from model import CONTRACT
    shown, = (json.loads(text) for language, text in FENCES if language == "json")
    assert shown == {**CONTRACT, "dataset": "r2r"}


def test_every_logged_key_has_its_line():
    table = TEXTS["docs/training.md"].split("| key | meaning |")[1].split("\n\n")[0]
    told = {key for line in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", line)}
    source = ""
    for name in ("model", "activevln/dialog", "sft", "grpo", "activevln/grpo_online", "engine"):
        with open(os.path.join(ROOT, name + ".py"), encoding="utf-8") as file:
            source += file.read()
    assert all(f'"{key}"' in source or f"/{key}" in source for key in told - {"end_"})
    assert "end_" in source
    import engine
    import grpo
    from activevln import grpo_online
    logged = {key for key in grpo_online.metric_sums([], [], []) if not key.startswith("end_")} | {
        "groups", "rerolled", "deaths", "minutes", "walking_s", "loss", "kl", "clip_frac",
        "entropy", "plan_tokens", "frac_reward_zero_std", "lr", "tokens", "grad_norm",
        "skipped_steps"}
    logged |= set(grpo.score_sums([])) | engine.TIMING_KEYS
    assert logged <= told


# ---------------------------------------------------------------- nothing half done


def test_nothing_is_left_to_fill_in():
    paths = PAGES + [module.replace(".", "/") + ".py" for module in MODULES]
    paths += ["demo.sh", "test.sh", "setup.sh"]
    for path in paths:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            text = file.read()
        assert not re.search(r"TO BE FILLED|\bTODO\b|\bFIXME\b|\bXXX\b", text), path


def test_the_output_of_the_demo_is_a_table():
    shown = README.split("<!-- demo-output -->")[1].split("<!-- /demo-output -->")[0]
    for word in ("stop", "random", "forward", "sft", "grpo", "oracle", "val_seen", "val_unseen"):
        assert word in shown, word


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_the_evidence_is_what_the_episodes_give(tmp_path):
    """The tables and docs/results/evidence.json, recomputed from the per-episode files."""
    out = tmp_path / "results" / "evidence.json"
    printed = subprocess.run([sys.executable, "bench/evidence_table.py", "--out", str(out)],
                             cwd=ROOT, check=True, capture_output=True, text=True).stdout
    table = TEXTS["docs/evidence.md"].split("<!-- evidence-table -->")[1].split("<!--")[0]
    assert table.strip().strip("`").strip() == printed.strip()
    with open(os.path.join(ROOT, "docs", "results", "evidence.json")) as recorded:
        assert json.load(recorded) == json.loads(out.read_text())
