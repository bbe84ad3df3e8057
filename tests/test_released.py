"""
activevln/released.py: ActiveVLN's prompt, checkpoints and lists, on made-up files of its columns.

Run it   python -m pytest tests/test_released.py          # some need pyarrow
"""
import gzip
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import in_process, script
from helpers import fake_episode, walk_with

import evaluate
from activevln import grpo_online, released
from activevln.dialog import Dialog, merged_phrases
from activevln.released import RELEASED, WordedPolicy
from checkpoint import load_policy, save_policy
from cli import UserError, read_json, read_rows, write_json
from decoding import nucleus
from evaluate import EpisodeState, forced_stop
from make_data import VlnEgo, read_lines
from reward import FORWARD, LEFT, RIGHT, STOP
from world.robots import ROBOTS

WORDS = {"system": "Walk as you are asked.", "first": "At first: <image>Task: {instruction} Now?",
         "later": "And then: <image>Task: {instruction} Now?"}
CONTRACT = {**RELEASED, **ROBOTS["houses"], "dataset": "houses", "words": WORDS}


@pytest.fixture(scope="module")
def policy(ego):
    texts = [episode["instruction"] for episode in VlnEgo(ego).episodes]
    return load_policy("tiny-qwen2.5", contract=CONTRACT, texts=texts).eval()


@pytest.fixture(scope="module")
def theirs(policy, tmp_path_factory):
    """A checkpoint as another project leaves it, without nav.json, and its contract's file."""
    folder = tmp_path_factory.mktemp("theirs")
    save_policy(policy, str(folder / "model"))
    os.rename(folder / "model" / "nav.json", folder / "activevln.json")
    return folder / "model", folder / "activevln.json"


def houses_of(ego):
    return os.path.join(os.path.dirname(os.path.dirname(ego)), "houses")


def walk_houses(ego, ckpt, out, *flags):
    return evaluate.main(evaluate.parse_args([
        "--episodes", houses_of(ego), "--split", "val_unseen", "--ckpt", str(ckpt), "--sims", "2",
        "--max-actions", "30", "--out", str(out), *map(str, flags)]))


# ---------------------------------------------------------------- prompt and grammar


def test_the_prompt_is_what_a_server_makes_of_the_messages(policy):
    """A dialog's ids are the chat template over content lists, as the released evaluator sends."""
    features = [torch.zeros(2, 2, 128)] * 3
    answers = ("turn left 30 degrees, move forward 25cm", "move forward 75cm", "stop")
    dialog, = policy.tokenize_answers([Dialog("Go to the red sofa.", (0, 1, 2), answers,
                                              (True,) * 3)])
    messages = [{"role": "system", "content": [{"type": "text", "text": WORDS["system"]}]}]
    for label, answer in zip(("At first: ", "And then: ", "And then: "), answers):
        messages += [{"role": "user", "content": [
            {"type": "text", "text": label}, {"type": "image"},
            {"type": "text", "text": "Task: Go to the red sofa. Now?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    chat = policy.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    chat = chat.replace("<|image_pad|>", "<|image_pad|>" * 4)
    segment, _ = policy.dialog_tokens(dialog, features)
    assert segment.ids == policy.tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert "You are a helpful assistant" not in chat


def test_the_parser_is_strict_and_knows_their_words(policy):
    for text, plan in (("move forward 75cm, turn left 60 degrees", [1, 1, 1, 2, 2]), ("stop", [0]),
                       ("turn right 30 degrees,stop", [3, 0]), (" move forward 25cm ", [1])):
        assert policy.parse(text) == plan, text
    for text in ("", "move forward 25 cm", "Stop", "move forward 100cm", "turn left 45 degrees",
                 "stop, stop", "I should stop", "move forward 25cm, " * 3 + "stop",
                 "move forward 25cm,", "forward"):
        assert policy.parse(text) == [], text
    r2r = merged_phrases(15, 0.25, 3, RELEASED["moves"])
    assert list(r2r.values())[2:5] == ["move forward 75cm", "turn left 15 degrees",
                                       "turn left 30 degrees"]


def test_a_frame_is_88_tokens_of_theirs(policy):
    sizes = WordedPolicy.fit_pixels(policy, 480, 640)
    assert sizes == (224, 308) and sizes[0] * sizes[1] // 28 ** 2 == 88


def test_nucleus_keeps_the_likeliest_that_have_the_mass():
    rng = np.random.default_rng(0)
    for top_p in (0.05, 0.5, 0.8, 0.999):
        rows = rng.dirichlet(np.full(9, 0.3), size=5)
        for row, kept in zip(rows, nucleus(torch.tensor(rows), top_p).numpy()):
            order, mass, wanted = np.argsort(-row), 0.0, np.zeros(9)
            for i in order:
                if mass < top_p:
                    wanted[i], mass = row[i], mass + row[i]
            assert np.array_equal(kept, wanted)


def test_answers_are_drawn_from_the_nucleus(policy):
    """With a tiny top_p a sample at any temperature is the likeliest token."""
    frame = policy.encode_frames([np.full((56, 56, 3), 90, np.uint8)])
    ask = [None], ["Go."], frame
    with torch.no_grad():
        greedy = policy.generate_turn(*ask)[0]
        assert policy.generate_turn(*ask, 1, 2.0, [5], top_p=1e-9)[0] == greedy
        assert policy.generate_turn(*ask, 1, 2.0, [5])[0] != greedy


# ---------------------------------------------------------------- early stops


def walk_at(distances, decisions=1):
    walk = EpisodeState(fake_episode(1), "Go.")
    walk.states = [{"distance_to_goal": d} for d in distances]
    walk.actions = [LEFT] * (len(distances) - 1)
    for _ in range(decisions):
        walk.add_decision("turn left", [LEFT])
    return walk


def test_limits_call_stop_where_they_were_reached():
    limits = {"same_distance": 3, "actions": 10, "turns": 5}
    for distances, decisions, reason, steps in (
            ([2, 2, 2, 2, 1], 1, "same_distance", 3), ([3, 2, 2, 2, 2], 1, "same_distance", 4),
            (range(20, 0, -1), 1, "actions", 10), ([2, 2, 1], 5, "turns", 2),
            ([2, 2, 2, 1, 1, 1], 4, None, None),
            ([None] * 9, 4, None, None), ([math.inf] * 9, 4, None, None)):      # no known distance
        walk = walk_at(list(distances), decisions)
        before = list(walk.actions)
        assert forced_stop(limits, 50)(walk) == (reason and "stop")
        assert walk.forced_stop == reason
        assert walk.actions == (before[:steps] + [STOP] if reason else before)
        assert len(walk.states) == len(walk.actions) + (reason is None)
    assert forced_stop(limits, 10)(walk_at(list(range(20, 9, -1)))) is None     # no room for STOP


def test_a_forced_stop_counts_as_a_stop_and_is_named():
    """26 turns in place, then STOP: a success where the goal is near, as in their evaluator."""
    def turning(walks):
        for walk in walks:
            walk.add_decision("turn left 90 degrees", [LEFT] * 3)
        return [[LEFT] * 3 for _ in walks]

    near, far = fake_episode(1, goal=(0, 0, -0.5)), fake_episode(2)
    walks = walk_with(turning, [near, far], should_stop=forced_stop(RELEASED["early_stop"], 500))
    rows = [evaluate.episode_record(walks[name], None, 1.0, 3.0) for name in ("1", "2")]
    assert [row["success"] for row in rows] == [1, 0]
    for row in rows:
        assert row["actions"] == "2" * 26 + "0" and row["steps"] == 27 == len(row["poses"])
        assert (row["end"], row["forced_stop"]) == ("stop", "same_distance")
    results = evaluate.summarise(rows, 1.0, 3.0, 0)
    assert results["forced_stops"] == {"same_distance": 2}


# ---------------------------------------------------------------- walks


def test_random_weights_walk_with_their_contract(ego, theirs, tmp_path, capsys):
    model, nav = theirs
    with pytest.raises(UserError, match="nav.json cannot be read .* docs/activevln.md"):
        walk_houses(ego, model, tmp_path / "no")
    found = walk_houses(ego, model, tmp_path / "out", "--nav", nav, "--malformed", "forward",
                        "--max-actions", 4)
    rows = read_rows(tmp_path / "out" / "episodes.jsonl")
    assert len(rows) == found["episodes"] and {row["end"] for row in rows} <= {
        "stop", "malformed", "max_actions"}
    malformed, decisions = (sum(row[key] for row in rows) for key in ("malformed", "decisions"))
    assert malformed > 0 and decisions > len(rows)
    assert found["malformed_share"] == pytest.approx(malformed / decisions, abs=1e-6)
    card = read_json(str(tmp_path / "out" / "protocol.json"))
    assert (card["policy"]["temperature"], card["policy"]["top_p"]) == (0.2, 0.8)
    assert card["rules"]["early_stop"] == RELEASED["early_stop"]
    assert "temperature 0.2" in capsys.readouterr().out
    assert "0 do not agree" in script("-m", "tools.recompute", tmp_path / "out").stdout
    with pytest.raises(UserError, match="holds another measurement .*prompt_sha256"):
        changed = {**CONTRACT, "words": {**WORDS, "system": "Walk."}}
        write_json(str(tmp_path / "other.json"), changed)
        walk_houses(ego, model, tmp_path / "out", "--nav", tmp_path / "other.json", "--malformed",
                    "forward", "--max-actions", 4)


def test_a_served_model_walks_as_this_process_does(ego, tmp_path):
    pytest.importorskip("httpx2", reason="needs httpx2 (requirements.txt)")
    from remote_servers import PolicyServer, learned_checkpoint
    ckpt = learned_checkpoint(ego, "dialog-words-1", words=json.dumps(WORDS))
    nav = tmp_path / "activevln.json"
    nav.write_bytes(open(f"{ckpt}/nav.json", "rb").read())
    flags = "--temperature", "0", "--nav", nav
    walk_houses(ego, ckpt, tmp_path / "here", *flags)
    with PolicyServer(ckpt) as server:
        walk_houses(ego, ckpt, tmp_path / "there", *flags, "--server", server.url,
                    "--served-model", "it")
    rows = read_rows(tmp_path / "here" / "episodes.jsonl")
    assert rows == read_rows(tmp_path / "there" / "episodes.jsonl")
    assert sum(row["decisions"] for row in rows) > 8
    assert set("".join(row["actions"] for row in rows)) > set("12")
    body = max(server.bodies, key=lambda body: len(body["messages"]))
    assert [m["role"] for m in body["messages"][:4]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == WORDS["system"]
    assert [part.get("text") for part in body["messages"][3]["content"]] == [
        "And then: ", None, body["messages"][1]["content"][2]["text"]]
    assert body["top_p"] == 0.8 and body["temperature"] == 0.0


def test_what_a_contract_is_refused_for(ego, theirs, tmp_path):
    model, nav = theirs

    def refused(sentence, nav, ckpt=model):
        with pytest.raises(UserError, match=sentence):
            walk_houses(ego, ckpt, tmp_path / "no", "--nav", nav)

    def changed(**values):
        write_json(str(tmp_path / "nav.json"), {**CONTRACT, **values})
        return tmp_path / "nav.json"

    refused("cannot be read .*docs/activevln.md", tmp_path / "absent.json")
    refused("belongs to the folder of a model .*hf download A/B --local-dir", nav, "A/B")
    refused("words is .* and should be like", changed(words={"system": ""}))
    refused("early_stop is ", changed(early_stop={"actions": None}))
    refused("hold 0 <image> placeholders", changed(words={**WORDS, "later": "Now?"}))


# ---------------------------------------------------------------- their files


EVALUATOR = '''
import nothing_that_is_installed
first_turn_user_prompt = ("Task: {}" "Go on?")
normal_user_prompt = ("Task: {}"
    "And now?")
def act(conversations):
    s = "Start:" if len(conversations) == 1 else "Then:"
'''


def compact(actions, robot=ROBOTS["houses"]):
    """Actions -> moves as the lists write them; equal neighbours are merged, three at most."""
    unit = {FORWARD: ("move forward {:g}cm", 100 * robot["forward_m"]),
            LEFT: ("turn left {:g} degrees", robot["turn_deg"]),
            RIGHT: ("turn right {:g} degrees", robot["turn_deg"])}
    moves, t = [], 0
    while actions[t] != STOP:
        n = next(k for k in (3, 2, 1) if actions[t:t + k] == [actions[t]] * k)
        text, size = unit[actions[t]]
        moves, t = moves + [text.format(n * size)], t + n
    return moves + ["stop"]


def write_list(path, walks, dataset="r2r", system="", flat=False, **changes):
    """A parquet file with the columns of ActiveVLN's lists. walks: [(episode_id, moves), ..]"""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    rows = [{"data_source": dataset, "prompt": [{"content": system, "role": "system"}],
             "ability": "vln", "env_name": "vlnce",
             "extra_info": {"episode_id": name, "gt_actions": moves, "split": "train"}, **changes}
            for name, moves in walks]
    rows = [row["extra_info"] for row in rows] if flat else rows
    parquet.write_table(pyarrow.Table.from_pylist(rows), str(path))
    return path


def named_moves(turn=15):
    return merged_phrases(turn, 0.25, 3, RELEASED["moves"]).values()


def test_the_contract_is_written_from_their_files(tmp_path):
    (tmp_path / "eval.py").write_text(EVALUATOR)
    system = "Choose from " + ", ".join(named_moves())
    source = write_list(tmp_path / "list.parquet", [(7, ["stop"])], system=system)
    made = ("-m", "activevln.released", source, "--evaluator", tmp_path / "eval.py", "--out",
            tmp_path / "activevln.json")
    assert "turns of 15 degrees" in in_process(*made[:1], "activevln/released", *made[2:]).stdout
    contract = evaluate.read_nav(str(tmp_path / "activevln.json"))
    assert contract["words"] == {
        "system": system, "first": "Start:<image>Task: {instruction} Go on?",
        "later": "Then:<image>Task: {instruction} And now?"}
    assert contract["max_pixels"] == 80000 and contract["dataset"] == "r2r"
    assert {key: contract[key] for key in ROBOTS["r2r"]} == ROBOTS["r2r"]
    rxr = released.make_contract(str(write_list(tmp_path / "rxr.parquet", [(7, ["stop"])], "rxr",
                                                system)), str(tmp_path / "eval.py"))
    assert rxr["words"]["first"] == "Start:<image>Task: {instruction}Go on?"
    assert rxr["early_stop"]["actions"] == 501 and rxr["turn_deg"] == 15


def test_what_their_files_are_refused_for(tmp_path, monkeypatch):
    source = write_list(tmp_path / "list.parquet", [(7, ["stop"])], system="Choose from stop")
    (tmp_path / "eval.py").write_text(EVALUATOR)
    (tmp_path / "other.py").write_text("s = 'x'")
    (tmp_path / "text.parquet").write_text("version https://git-lfs")

    def refused(sentence, call, *arguments):
        with pytest.raises(UserError, match=sentence):
            call(*map(str, arguments))

    refused("does not name the move 'move forward 25cm'", released.make_contract, source,
            tmp_path / "eval.py")
    refused("does not assign the words of a turn", released.make_contract, source,
            tmp_path / "other.py")
    refused("cannot be read as Python", released.make_contract, source, source)
    refused("cannot be read as parquet .*git lfs pull", released.read_parquet,
            tmp_path / "text.parquet")
    refused("cannot be read as parquet", released.read_parquet, tmp_path / "absent.parquet")

    def refused_list(sentence, walks, **changes):
        path = write_list(tmp_path / "bad.parquet", walks, **changes)
        with pytest.raises(UserError, match=sentence):
            released.read_list(str(path), ROBOTS["r2r"])

    refused_list("no column 'episode_id' .it has .*ability", [(7, ["stop"])], extra_info={"a": 1})
    refused_list("row 1, episode 8: 'A' is no move of a robot that turns 15", [
        (7, ["stop"]), (8, ["A", "stop"])])
    refused_list("'turn left 60 degrees' is no move .*--robot", [
        (7, ["turn left 60 degrees", "stop"])])
    refused_list("must end with the only 'stop'", [(7, ["move forward 25cm"])])
    refused_list("must end with the only 'stop'", [(7, ["stop", "stop"])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("is read with pyarrow, which is not installed: pip install pyarrow",
            released.read_parquet, source)


def train_split(ego):
    """-> the episodes of the houses' training split, and their ground truth."""
    folder = f"{houses_of(ego)}/train/train"
    episodes, truths = (json.load(gzip.open(f"{folder}{end}.json.gz")) for end in ("", "_gt"))
    return episodes["episodes"], truths


def test_a_list_is_recorded_in_its_order_with_its_actions(ego, tmp_path):
    episodes, truths = train_split(ego)
    names = [e["episode_id"] for e in episodes][-4:][::-1]
    actions = {name: truths[str(name)]["actions"] for name in names}
    around = names[1]                                   # it begins with a turn there and back
    actions[around] = [LEFT, RIGHT, *actions[around]]
    source = write_list(tmp_path / "list.parquet", [(n, compact(actions[n])) for n in names + names[
        :1]], flat=True)
    said = in_process("make_data.py", "--episodes", houses_of(ego), "--out", tmp_path / "out",
                      "--episode-list", source, "--sims", 1).stdout
    assert f"list.parquet: 4 of the {len(episodes)} episodes" in said
    rows = read_lines(f"{tmp_path}/out/train/episodes.jsonl")
    assert [row["episode_id"] for row in rows] == names
    walks = {w["walk_id"]: w for w in read_lines(f"{tmp_path}/out/train/walks.jsonl")}
    for row in rows:
        assert walks[row["walk_id"]]["actions"] == actions[row["episode_id"]]
        assert ("drift_m" in walks[row["walk_id"]]) == (row["episode_id"] != around)

    def refused(sentence, *flags):
        done = in_process("make_data.py", "--episodes", houses_of(ego), "--out", tmp_path / "no",
                          "--episode-list", source, *flags, check=False)
        assert done.returncode == 2 and sentence in " ".join(done.stderr.split()), done.stderr

    refused("names 4 episodes that", "--split", "val_seen")
    refused("is no move of a robot that turns 15 degrees", "--turn-deg", 15)
    refused("leave one of them out", "--policy", "ckpt/x")


def online_args(ego, init, *more):
    return [f"--init={init}", f"--episodes={houses_of(ego)}", "--device=cpu", "--sims=1",
            "--batch-size=2", "--group-size=2", "--action-cap=12", "--turn-cap=4", "--rerolls=0",
            "--max-steps=1", "--val-episodes=1", *map(str, more)]


@pytest.fixture(scope="module")
def init(policy, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("init"))
    save_policy(policy, folder)
    return folder


def test_a_list_chooses_and_orders_the_episodes_of_grpo(ego, init, tmp_path):
    episodes, truths = train_split(ego)
    names = [e["episode_id"] for e in episodes][::-1][:5]
    source = write_list(tmp_path / "list.parquet", [
        (n, compact([LEFT, RIGHT, *truths[str(n)]["actions"]])) for n in names])
    args = grpo_online.parse_args(online_args(ego, init, "--episode-list", source))
    policy, env, val = grpo_online.setup(args, "cpu")
    assert [e["episode_id"] for e in env.episodes] == names
    assert len(val.episodes) == 4
    for name in names:
        truth = env.truth({"episode_id": name})
        assert truth["actions"] == [LEFT, RIGHT, *truths[str(name)]["actions"]]
        assert truth["locations"] == truths[str(name)]["locations"]
    run = grpo_online.Run(args, 0, 1, policy, None, None, env, val)
    assert [e["episode_id"] for step in range(3) for e in run.episodes(step)] == [
        *names[:4], *names[:2]]
    ranks = [grpo_online.Run(args, rank, 2, policy, None, None, env, val).episodes(1)
             for rank in (0, 1)]
    assert [[e["episode_id"] for e in some] for some in ranks] == [names[2:3], names[3:4]]


def test_grpo_trains_a_released_policy_in_its_own_words(ego, init, tmp_path):
    out = tmp_path / "out"
    script("-m", "activevln.grpo_online", *online_args(ego, init, f"--out={out}"))
    assert read_json(str(out / "nav.json")) == CONTRACT
    assert read_rows(str(out / "log.jsonl"))[-1]["step"] == 1


# ---------------------------------------------------------------- EnvDrop


def test_envdrop_files_are_read(ego, init, tmp_path):
    """VLN-CE's augmentation: split envdrop, with tokens, without ids of trajectories or paths."""
    truths = train_split(ego)[1]
    data = json.load(gzip.open(f"{houses_of(ego)}/train/train.json.gz"))
    for episode in data["episodes"]:
        episode["instruction"]["instruction_tokens"] = [5, 6, 7] + [0] * 197
        del episode["trajectory_id"], episode["reference_path"]
    os.makedirs(tmp_path / "r2r" / "envdrop")
    os.symlink(f"{houses_of(ego)}/scenes", tmp_path / "r2r" / "scenes")
    for end, content in (("", data), ("_gt", truths)):
        with gzip.open(tmp_path / "r2r" / "envdrop" / f"envdrop{end}.json.gz", "wt") as file:
            json.dump(content, file)
    in_process("make_data.py", "--episodes", tmp_path / "r2r", "--split", "envdrop", "--limit", 3,
               "--out", tmp_path / "out", "--sims", 1)
    recorded = VlnEgo(f"{tmp_path}/out/envdrop")
    assert [len(recorded.steps(i)) for i in range(3)] == [
        len(truths[str(e["episode_id"])]["actions"]) for e in data["episodes"][:3]]
    args = grpo_online.parse_args([*online_args(ego, init), f"--episodes={tmp_path}/r2r",
                                   "--split=envdrop"])
    _, env, val = grpo_online.setup(args, "cpu")
    assert len(env.episodes) == len(data["episodes"]) and val is None
    done = in_process("make_data.py", "--episodes", tmp_path / "r2r/envdrop/envdrop.json.gz",
                      "--split", "train", "--out", tmp_path / "no", check=False)
    assert done.returncode == 2 and "give --split envdrop" in done.stderr
