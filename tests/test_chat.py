"""A scene's questions run together: equal to separate rows and to transformers' own forward and
generate(), in all three families; and sft.py --prompt chat on scenes of ours.

Run it   python -m pytest tests/test_chat.py
"""
import doctest
import json
import shutil

import pytest
import torch
from conftest import in_process, script
from policies import (
    gradients,
    hf_inputs,
    hf_logps,
    log_of,
    max_difference,
    pictures,
    relative_difference,
    run_on_two_ranks,
    weights_of,
)

import sft
from checkpoint import TINY, load_policy
from cli import UserError, write_json
from gpt4scene import chat
from make_data import Decision
from tools.sharegpt import ShareGpt

torch.set_num_threads(1)
QUESTIONS = ["Which objects are these: red things?", "What colour is <OBJ003>?", "How many?",
             "I stand in the pink room facing the red chair. What is on my left?"]
ANSWERS = ["<OBJ001> and <OBJ004>.", "Red.", "Two.", "The blue table."]
SFT = ["--prompt", "chat", "--model", "tiny", "--device", "cpu", "--lr", "1e-3", "--batch-size",
       "16", "--steps-per-walk", "4"]


def make_scenes(folder, *flags):
    script("-m", "gpt4scene.scenes", "--out", folder, "--train-scenes", 6, "--val-scenes", 5,
           "--jobs", 1, "--frames", 2, *flags)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module", params=TINY)
def asked(request):
    """A policy, questions about two scenes in mixed order, and the scenes' pictures."""
    policy = load_policy(request.param, chat.CHAT, texts=QUESTIONS + ANSWERS, seed=1)
    frames = dict(enumerate([*pictures(1, 112, 140), *pictures(3, seed=1), *pictures(1, 90, 60)]))
    shown = [(0, 1, 2), (3, 4), (0, 1, 2), (0, 1, 2)]
    return policy, [Decision("", keys, (), question, answer) for keys, question, answer in
                    zip(shown, QUESTIONS, ANSWERS)], frames


def row_of(policy, d, frames):
    """The prompt of one question as Policy.prompt() makes it, in the template's own words."""
    features = policy.encode_frames([frames[key] for key in d.frames])
    return policy.prompt("<image>" * len(d.frames) + d.prompt, features)


# ---------------------------------------------------------------- exact


def test_questions_of_a_scene_share_its_pictures_exactly(asked):
    """Log-probabilities and gradients: against each question in a row of its own, by Policy's
    own passes, and against transformers' forward."""
    policy, decisions, frames = asked
    ids, mask = policy.answers([d.answer for d in decisions])
    together = policy(decisions, frames, ids, mask)
    rows = torch.cat([super(chat.ChatPolicy, policy).logps(
        [row_of(policy, d, frames)], ids[k:k + 1], mask[k:k + 1])
        for k, d in enumerate(decisions)])
    theirs = [hf_logps(policy, row_of(policy, d, frames), [frames[key] for key in d.frames],
                       ids[k][mask[k]]) for k, d in enumerate(decisions)]
    torch.testing.assert_close(together, rows, atol=1e-5, rtol=1e-5)
    for k, logps in enumerate(theirs):
        torch.testing.assert_close(together[k][mask[k]], logps, atol=1e-5, rtol=1e-5)
    ours, separate, hf = (gradients(policy, loss) for loss in (
        together.sum(), rows.sum(), sum(logps.sum() for logps in theirs)))
    assert relative_difference(ours, separate) < 1e-5 and relative_difference(ours, hf) < 1e-5


def test_pictures_are_run_once_for_all_questions(asked):
    policy, decisions, frames = asked
    counts = policy.token_counts(decisions, frames)
    rows = [policy.token_counts([d], {key: frames[key] for key in d.frames})[0]
            for d in decisions]
    prefix = len(policy.picture_prompt(policy.encode_frames([frames[k] for k in (0, 1, 2)])).ids)
    assert sum(rows) - sum(counts) == 2 * prefix
    ids, mask = policy.answers([d.answer for d in decisions])
    policy.flops = policy.tokens = 0
    policy(decisions, frames, ids, mask)
    assert policy.tokens == sum(counts) - len(decisions)            # last tokens are not run


def test_greedy_answers_are_those_of_separate_rows_and_of_generate(asked):
    """In groups or all together, one picture prefix for all."""
    policy, decisions, frames = asked
    mine = [d for d in decisions if d.frames == (0, 1, 2)]
    shown = [frames[key] for key in (0, 1, 2)]
    prompt = policy.picture_prompt(policy.encode_frames(shown))
    cache = policy.run_pictures([chat.ScenePrefix(prompt, [])])
    before = [key.clone() for key in cache.keys]
    questions = [d.prompt for d in mine]
    together = policy.answer(prompt, cache, questions, 9)
    assert together == [policy.answer(prompt, cache, [q], 9)[0] for q in questions]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys)), "the cache is left as it is"
    for d, answer in zip(mine, together):
        row = row_of(policy, d, frames)
        rollout = super(chat.ChatPolicy, policy).generate([row], draft=False, max_new_tokens=9)
        assert rollout.completion_ids[0].tolist() == answer
        ids = torch.tensor(row.ids)[None]
        generated = policy.model.generate(
            **hf_inputs(policy, ids, shown), attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=9, suppress_tokens=policy.banned.tolist())[0, len(row.ids):]
        assert generated.tolist() == answer


def test_an_answer_ends_with_its_end_token_or_at_the_limit():
    policy = load_policy("tiny", chat.CHAT, texts=QUESTIONS + ANSWERS)
    frames = {0: pictures(1)[0]}
    decisions = [Decision("", (0,), (), q, a) for q, a in zip(QUESTIONS, ANSWERS)]
    ids, mask = policy.answers(ANSWERS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(60):                                     # learned by heart
        optimizer.zero_grad()
        (-policy(decisions, frames, ids, mask).sum() / mask.sum()).backward()
        optimizer.step()
    (_, tokens), (right, n) = policy.validate(decisions, frames)
    assert (tokens, right, n) == (int(mask.sum()), 4, 4)
    prompt = policy.picture_prompt(policy.encode_frames(list(frames.values())))
    cache = policy.run_pictures([chat.ScenePrefix(prompt, [])])
    whole = policy.answer(prompt, cache, QUESTIONS)
    assert [policy.text(answer) for answer in whole] == ANSWERS
    assert all(answer[-1] == policy.end_token for answer in whole)
    cut = policy.answer(prompt, cache, QUESTIONS, 2)
    assert cut == [answer[:2] for answer in whole]


# ---------------------------------------------------------------- data


def record(question, images=("a.png",), answer="Red.", **more):
    marks = "<image>" * len(images)
    return {"conversations": [{"from": "human", "value": marks + question},
                              {"from": "gpt", "value": answer}], "images": list(images), **more}


def open_records(tmp_path, *records):
    from PIL import Image
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 60)).save(tmp_path / name)
    write_json(str(tmp_path / "x.json"), list(records))
    return chat.ChatPolicy.arrange(ShareGpt(tmp_path / "x.json"))


def test_records_with_equal_pictures_are_one_episode(tmp_path):
    data = open_records(
        tmp_path, record("\nOne?"), record("Two?", ["a.png", "b.png"]), record("Three?"),
        record("Four?", system="You see."), record("Five?", ["b.png", "a.png"]))
    assert [[data.decision(i, t, {}).prompt for t in data.steps(i)] for i in range(len(data))] == [
        ["One?", "Three?"], ["Two?"], ["Four?"], ["Five?"]]
    assert data.decision(2, 0, {}).before == (("system", "You see."),)
    units = sft.step_groups(data, 0, 0, 2)
    assert sorted(units) == [(0, (0, 1)), (1, (0,)), (2, (0,)), (3, (0,))]


@pytest.mark.parametrize("wrong", [
    {"conversations": [{"from": "human", "value": "What is <image>?"},
                       {"from": "gpt", "value": "Red."}], "images": ["a.png"]},
    {"conversations": [{"from": who, "value": text} for who, text in (
        ("human", "<image>A?"), ("gpt", "B."), ("human", "C?"), ("gpt", "D."))],
     "images": ["a.png"]}, record("\n")])
def test_a_record_that_is_no_question_behind_its_pictures_is_named(tmp_path, wrong):
    with pytest.raises(UserError, match=r"x\.json: record 1 is not one question behind"):
        open_records(tmp_path, record("One?"), wrong)


def test_doctests():
    assert doctest.testmod(chat).failed == 0


@pytest.mark.parametrize("size", [(60, 60), (500, 300), (512, 290), (968, 1296), (3000, 100)])
@pytest.mark.parametrize("side", [300, 500, 512])
def test_what_has_been_resized_is_left_alone(size, side):
    contract = dict(chat.CHAT, longest_side=side)
    once = chat.seen_size(*size, contract, 28)
    assert chat.seen_size(*once, contract, 28) == once
    assert max(once) <= max(side + 14, 60) and once[0] % 28 == once[1] % 28 == 0


# ---------------------------------------------------------------- sft.py


def test_sft_trains_validates_and_refuses(scenes, ego, tmp_path):
    out = tmp_path / "ckpt"
    done = in_process("sft.py", *SFT, "--data", scenes / "train.json", "--out", out,
                      "--max-steps", 6, "--val-decisions", 24)
    rows = log_of(out)
    assert rows[-1]["loss"] < rows[0]["loss"] and "val/exact_match" in rows[-1], done.stdout
    contract = json.loads((out / "nav.json").read_text())
    assert contract == dict(chat.CHAT, dataset="train.json")
    policy = load_policy(str(out))
    assert isinstance(policy, chat.ChatPolicy)
    for word in ("<OBJ003>", "Red", " chair"):              # tiny knows the answers' words
        assert len(policy.tokenizer(word)["input_ids"]) == 1, word
    for command, message in (
            (["evaluate.py", "--ckpt", out, "--split", "val_seen"], "drives no robot"),
            (["grpo.py", "--init", out, "--data", ego, "--out", tmp_path / "g", "--device", "cpu"],
             "answers questions (chat-1) and plans no walks"),
            (["sft.py", *SFT, "--data", ego, "--out", tmp_path / "e"], "needs questions"),
            (["sft.py", *SFT, "--data", scenes / "train.json", "--val-data", ego, "--out",
              tmp_path / "v", "--max-steps", 1], "needs questions")):
        failed = in_process(*command, check=False)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr


def test_a_record_too_long_for_the_model_is_named(scenes):
    args = sft.parse_args([*SFT, "--data", str(scenes / "train.json"), "--out", "x"])
    sources, policy = sft.setup(args, "cpu")
    data = sources[0]
    d, (name, bound) = data.decision(0, 0, {}), data.lengths(policy)[0]
    frames = policy.load_frames(data, [d])
    exact = max(policy.token_counts([data.decision(0, t, {})], frames)[0] for t in data.steps(0))
    assert exact <= bound < 32768 and name.startswith("record ")
    policy.model.config.text_config.max_position_embeddings = 100
    with pytest.raises(UserError, match=r"record \d+ is .* tokens long with its pictures"):
        sft.check_lengths(policy, data.lengths(policy), "train.json")


def test_two_ranks_and_micro_batches_learn_the_same_weights(scenes, tmp_path):
    common = [*SFT, "--data", str(scenes / "train.json"), "--dtype", "float32", "--max-steps", "2",
              "--val-decisions", "0"]
    in_process("sft.py", *common, "--out", tmp_path / "one")
    in_process("sft.py", *common, "--out", tmp_path / "micro", "--micro-tokens", "300",
               "--gradient-checkpointing")
    run_on_two_ranks(tmp_path, "sft", [[*common, "--out", str(tmp_path / "two"),
                                        "--zero-stage", stage] for stage in ("3",)])
    whole = weights_of(tmp_path / "one")
    assert max_difference(whole, weights_of(tmp_path / "micro")) < 1e-4
    assert max_difference(whole, weights_of(tmp_path / "two")) < 1e-4
    shutil.rmtree(tmp_path / "two")
