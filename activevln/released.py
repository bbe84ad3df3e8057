"""
What ActiveVLN [1] has released, as it is: checkpoints, prompt, episode lists.

Its checkpoints are Qwen2.5-VL folders without a nav.json. contract() writes one for them
(evaluate.py --nav): the answer grammar, the limits and the sampling of its evaluator are facts and
stand in RELEASED; the words of its prompt are read from its own files. WordedPolicy is the dialog
policy in those words.

Its lists are parquet files: a row is an episode's id and the expert's moves, without pictures or
instructions. make_data.py and activevln.grpo_online take one as --episode-list.

Run it   git clone --depth 1 https://github.com/arvillion/ActiveVLN
         python -m activevln.released ActiveVLN/data/r2r_4000_train.parquet \\
             --evaluator ActiveVLN/eval/vlnce/eval_vlnce.py --out activevln.json
Needs    pyarrow, for the parquet files (pip install pyarrow)

[1] https://github.com/arvillion/ActiveVLN, commit 63984f3; each value of RELEASED is from there
"""
from __future__ import annotations

import argparse
import ast
import os

from activevln.dialog import DIALOG, DialogPolicy, merged_phrases, parse_answer
from cli import DefaultsFormatter, UserError, run_cli, write_json
from model import clean_instruction
from world.episodes import is_walk
from world.robots import ROBOTS

# eval/vlnce/eval_vlnce.py: temperature, top_p, turns; an action that leaves the distance as it is
# counts from the first on, and more than 25 of them are too many; so are more than `actions`
# (EARLY_STOP_STEPS of the task's yaml, here + 1). README.md: max_pixels. min_pixels: Qwen2.5-VL's.
RELEASED = {**DIALOG, "prompt": "dialog-words-1", "max_pixels": 80000,
            "moves": {"forward": "move forward {}cm", "left": "turn left {} degrees",
                      "right": "turn right {} degrees", "stop": "stop"},
            "words": {"system": "", "first": "<image>{instruction}",
                      "later": "<image>{instruction}"},
            "sampling": {"temperature": 0.2, "top_p": 0.8},
            "early_stop": {"same_distance": 26, "actions": 401, "turns": 120}}
ACTIONS_LIMIT = {"r2r": 401, "rxr": 501}


class WordedPolicy(DialogPolicy):
    """A dialog in the words that its contract holds: a system text, and in every turn the
    instruction. Answers are moves of the contract's "moves", separated by commas."""

    default_contract = RELEASED

    def set_contract(self, contract: dict):
        super().set_contract(contract)
        words = contract["words"]
        for key in ("first", "later"):
            if words[key].count("<image>") != 1:
                raise UserError(f"the contract's words {key!r} hold {words[key].count('<image>')} "
                                "<image> placeholders and should hold one: write the contract "
                                "again with activevln.released")
        self.opening = (("system", words["system"]),) if words["system"] else ()

    def instruction_prompt(self, instruction: str, n_history: int = 0) -> str:
        return self.contract["words"]["first"].replace("{instruction}",
                                                       clean_instruction(instruction))

    def later_prompt(self, instruction: str) -> str:
        return self.contract["words"]["later"].replace("{instruction}",
                                                       clean_instruction(instruction))

    def parse(self, text: str) -> list[int]:
        """Strict as parse_answer(), but that white space around a comma does not matter.
        (ActiveVLN's evaluator takes any text that holds a word of an action, and a random action
        where there is none.)"""
        return parse_answer(", ".join(part.strip() for part in text.split(",")), self.merged,
                            self.contract["horizon"])


# ---------------------------------------------------------------- parquet


def read_parquet(path: str) -> list[dict]:
    """The rows of a parquet file. UserError if it is none, or if pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is read with pyarrow, which is not installed: pip install pyarrow"
                        ) from None
    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); copy it "
                        "again (git lfs pull, if it is a pointer)") from None
    if not rows:
        raise UserError(f"{path} has no rows; copy it again")
    return rows


def column(path: str, row: dict, name: str):
    """A value of a row, or of the row's "extra_info". UserError if there is no such column."""
    inner = row.get("extra_info") if isinstance(row.get("extra_info"), dict) else {}
    value = inner.get(name, row.get(name))
    if value is None:
        raise UserError(f"{path} has no column {name!r} (it has {', '.join(sorted({*row, *inner}))}"
                        "); give one of ActiveVLN's lists, such as data/r2r_4000_train.parquet")
    return value


# ---------------------------------------------------------------- episode lists


def read_list(path: str, robot: dict) -> dict[str, list[int]]:
    """A list -> {str(episode_id): the expert's actions, one by one}, in the list's order; an id
    that comes again is left out. robot: its turn and step say what a move is in actions."""
    moves = {text: [action] * n for (action, n), text in merged_phrases(
        robot["turn_deg"], robot["forward_m"], DIALOG["merge"], RELEASED["moves"]).items()}
    found = {}
    for i, row in enumerate(read_parquet(path)):
        name = str(column(path, row, "episode_id"))
        texts = column(path, row, "gt_actions")
        unknown = [text for text in texts if text not in moves]
        if unknown:
            raise UserError(f"{path}, row {i}, episode {name}: {unknown[0]!r} is no move of a "
                            f"robot that turns {robot['turn_deg']:g} degrees ({', '.join(moves)}); "
                            "give the --robot of the list (ActiveVLN's: r2r, for RxR as well)")
        actions = [action for text in texts for action in moves[text]]
        if not is_walk(actions):
            raise UserError(f"{path}, row {i}, episode {name}: its moves must end with the only "
                            "'stop'; repair or remove that row")
        found.setdefault(name, actions)
    return found


def select_episodes(path: str, episodes: list[dict], robot: dict, source: str
                    ) -> tuple[list[dict], dict[str, list[int]]]:
    """--episode-list -> the episodes that it names, in its order, and read_list().
    source: where the episodes are from, for the UserError if the list names others."""
    walks, by_name = read_list(path, robot), {str(e["episode_id"]): e for e in episodes}
    unknown = [name for name in walks if name not in by_name]
    if unknown:
        raise UserError(f"{path} names {len(unknown)} episodes that {source} does not have, the "
                        f"first is {unknown[0]}: give the --episodes, --split, --role and "
                        "--languages that the list was made from")
    print(f"{path}: {len(walks)} of the {len(episodes)} episodes of {source}, in its order",
          flush=True)
    return [by_name[name] for name in walks], walks


# ---------------------------------------------------------------- the contract


def evaluator_words(path: str) -> dict[str, list[str]]:
    """The strings that a Python file assigns to a name, or chooses from by an if, {name: strings}.
    The file is parsed and not run."""
    try:
        with open(path, encoding="utf-8") as file:
            nodes = list(ast.walk(ast.parse(file.read())))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--evaluator {path} cannot be read as Python ({error}); give "
                        "eval/vlnce/eval_vlnce.py of ActiveVLN") from None
    found = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            parts = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            if all(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in parts):
                found.setdefault(node.targets[0].id, [p.value for p in parts])
    return found


def make_contract(list_path: str, evaluator: str) -> dict:
    """The contract of ActiveVLN's checkpoints. UserError if its files do not hold the words."""
    row = read_parquet(list_path)[0]
    dataset, messages = (column(list_path, row, name) for name in ("data_source", "prompt"))
    if dataset not in ACTIONS_LIMIT or [m.get("role") for m in messages] != ["system"]:
        raise UserError(f"{list_path}: its first row is of {dataset!r} and should be of r2r or rxr,"
                        " with a prompt of one system message; give one of ActiveVLN's lists")
    system, found = messages[0]["content"], evaluator_words(evaluator)
    labels, *turns = (found.get(name, []) for name in ("s", "first_turn_user_prompt",
                                                       "normal_user_prompt"))
    if [len(labels), *map(len, turns)] != [2, 1, 1] or any("{}" not in t for t, in turns):
        raise UserError(f"--evaluator {evaluator} does not assign the words of a turn (s, "
                        "first_turn_user_prompt, normal_user_prompt); give eval/vlnce/"
                        "eval_vlnce.py of ActiveVLN, commit 63984f3")
    # R2R's instructions end in a blank, which read_episodes() takes off.
    instruction = "{instruction} " if dataset == "r2r" else "{instruction}"
    words = {key: label + "<image>" + turn.replace("{}", instruction)
             for key, label, (turn,) in zip(("first", "later"), labels, turns)}
    contract = {**RELEASED, **ROBOTS["r2r"], "dataset": dataset,
                "words": {"system": system, **words},
                "early_stop": {**RELEASED["early_stop"], "actions": ACTIONS_LIMIT[dataset]}}
    lacking = [text for text in merged_phrases(
        contract["turn_deg"], contract["forward_m"], contract["merge"], contract["moves"]).values()
        if text not in system]
    if lacking:
        raise UserError(f"{list_path}: its system message does not name the move {lacking[0]!r}: "
                        "it is of another version or robot, which this code does not know")
    return contract


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Write the navigation contract of ActiveVLN's "
                                "checkpoints.", formatter_class=DefaultsFormatter)
    p.add_argument("list", help="one of its parquet files: it holds the system message")
    p.add_argument("--evaluator", required=True, metavar="FILE", help="its eval/vlnce/"
                   "eval_vlnce.py: it holds the words of a turn. It is read, not run")
    p.add_argument("--out", default="activevln.json", help="for evaluate.py --nav; as nav.json in "
                   "the checkpoint's folder it serves the trainers and tools.serve, too")
    return p.parse_args(argv)


def main(args):
    contract = make_contract(args.list, args.evaluator)
    if os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a folder; name a file")
    write_json(args.out, contract)
    print(f"wrote {args.out}: {contract['dataset']}, turns of {contract['turn_deg']:g} degrees, at "
          f"most {contract['horizon']} moves an answer, frames of at most "
          f"{contract['max_pixels']:,} pixels")


if __name__ == "__main__":
    run_cli(main, parse_args)
