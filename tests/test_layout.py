"""The files import each other in one direction (README.md, "Imports go one way").

Run it   python -m pytest tests/test_layout.py
"""
import ast
import os
from graphlib import TopologicalSorter

from conftest import ROOT

FOLDERS = ("", "world", "activevln", "gpt4scene", "tools")


def modules():
    """{module name: path} of every script."""
    found = {}
    for folder in FOLDERS:
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            if name.endswith(".py"):
                module = ".".join(part for part in (folder, name[:-3]) if part)
                found[module.removesuffix(".__init__")] = os.path.join(ROOT, folder, name)
    return found


def imports(path, names):
    """Our modules that a file imports when it is loaded, not those inside its functions."""
    with open(path, encoding="utf-8") as file:
        nodes = ast.parse(file.read()).body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(names)


MODULES = modules()
ARROWS = {name: imports(path, MODULES) for name, path in MODULES.items()}


def test_no_module_imports_itself_through_others():
    graph = {name: found - {name.partition(".")[0]} for name, found in ARROWS.items()}
    assert list(TopologicalSorter(graph).static_order())          # CycleError names the circle


def test_the_root_imports_no_other_system_when_it_is_loaded():
    for name, found in ARROWS.items():
        if "." not in name and name not in FOLDERS:
            above = {other for other in found if other.split(".")[0] in ("activevln", "tools")}
            assert not above, name


def test_the_world_needs_the_command_line_and_the_actions_only():
    for name, found in ARROWS.items():
        if name.split(".")[0] == "world":
            outside = {other for other in found if other.split(".")[0] != "world"}
            assert outside <= {"cli", "reward"}, name


def test_the_foundations_import_nothing_above_them():
    allowed = {"cli": set(), "intervals": set(), "reward": {"cli"}, "lsm": {"cli"}, "costs": set(),
               "qwen": {"costs"}, "decoding": {"costs", "qwen"}, "lora": {"cli"},
               "model": {"cli", "costs", "decoding", "reward", "lsm", "qwen"},
               "checkpoint": {"cli", "lora", "lsm", "model"}}
    for name, others in allowed.items():
        assert ARROWS[name] <= others, name
