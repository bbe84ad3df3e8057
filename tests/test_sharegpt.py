"""ShareGPT records, their pictures, the export and the released walks: read, or refused by name.

Run it   python -m pytest tests/test_sharegpt.py
"""
import copy
import doctest
import io
import json
import os
import shutil

import numpy as np
import pytest
from conftest import in_process
from PIL import Image

import make_data
from cli import UserError, write_lines
from make_data import Shard, VlnEgo, decode
from tools import sharegpt
from tools.sharegpt import ShareGpt, read_record, released_walks

ANSWER = "A. Move forward 25 cm, D. Stop"
WORDS = "Turn left 30 degrees or move forward 25 cm.\nNow: <image>"
CONTRACT = {"turn_deg": 30, "forward_m": 0.25, "horizon": 2}


def record(words=WORDS, answer=ANSWER, images=("images/0.png",), **more):
    return {"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": answer}],
            "images": list(images), **more}


def turns(*pairs, keys=("from", "value")):
    return [dict(zip(keys, pair)) for pair in pairs]


@pytest.fixture
def folder(tmp_path):
    """images/0.png to 2.png, each of its own grey."""
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (56, 56), (k, k, k)).save(tmp_path / "images" / f"{k}.png")
    return tmp_path


def written(folder, records, name="x.json"):
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def policy():
    pytest.importorskip("torch")
    from checkpoint import load_policy
    from model import CONTRACT as CONTRACT
    return load_policy("tiny", dict(CONTRACT, turn_deg=30, horizon=2), texts=["go to the door"])


def test_doctests():
    assert doctest.testmod(sharegpt).failed == 0


# ---------------------------------------------------------------- one record, in the forms in use


SAME = [
    record(images=()) | {"images": "images/0.png"},
    {key: value for key, value in record(image="images/0.png").items() if key != "images"},
    record(image="images/0.png"),
    record(images=[{"path": "images/0.png", "bytes": None}]),
    record(images=["images\\0.png"]),
    record(images=["file://images/0.png"]),
    record(system="", tools="[]", videos=[], audios=None),
    {"messages": turns(("user", WORDS), ("assistant", ANSWER), keys=("role", "content")),
     "images": ["images/0.png"]},
    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": WORDS.removesuffix("<image>"), "image": None},
        {"type": "image"}]}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}],
     "images": ["images/0.png"]},
    {"messages": [{"role": "user", "content": [
        {"text": WORDS.removesuffix("<image>")}, {"type": "image", "image": "images/0.png"}]},
        {"role": "assistant", "content": ANSWER}]},
    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": WORDS.removesuffix("<image>")},
        {"type": "image_url", "image_url": {"url": "images/0.png"}}]},
        {"role": "assistant", "content": ANSWER}]},
]


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_a_record_is_the_same_record(form):
    assert read_record(form) == read_record(record())
    assert read_record(record()) == ("", ((WORDS, ANSWER),), ("images/0.png",))


def test_a_system_text_in_a_column_or_a_turn_is_the_records_system_text():
    column = read_record(record(system="Never stop."))
    turn = record()
    turn["conversations"].insert(0, {"from": "system", "value": "Never stop."})
    assert column.system == "Never stop."
    assert read_record(turn) == column
    assert read_record(turn | {"system": "Never stop."}) == column
    with pytest.raises(ValueError, match="two system texts"):
        read_record(turn | {"system": "Stop."})


HUMAN, GPT = ("human", WORDS), ("gpt", ANSWER)
BAD = [
    (record(images=["images/0.png"] * 2), "1 <image> in its words and 2 images"),
    (record(words="Who are you?", images=()) | {"images": None}, "no <image> before its first"),
    (record(tools='[{"name": "map"}]'), "'tools'"),
    (record(videos=["a.mp4"]), "'videos'"),
    (record(audios=["a.wav"]), "'audios'"),
    (record(chosen="x"), "'chosen'"),
    (record(words=WORDS + "<video>"), "'value' of turn 0 .human. holds the reserved <video>"),
    (record(words=WORDS + "<|image_pad|>"), "turn 0 .human. holds the reserved <.image_pad"),
    (record(answer=ANSWER + "<|im_end|>"), "turn 1 .gpt. holds the reserved <.im_end"),
    (record(system="<|im_start|>"), "'system' holds the reserved <.im_start"),
    (record(system="<image>"), "<image> in its system text or an answer"),
    (record(answer="<image>" + ANSWER), "<image> in its system text or an answer"),
    (record(answer="  "), "the answer of round 0 is empty"),
    (record(words="\ud800<image>"), "UTF-16"),
    (record(system=5), "'system' is a number, not text"),
    (record(system=False), "'system' is true or false, not text"),
    (record(answer=None), "'value' of turn 1 .gpt. is null, not text"),
    (record(words={"text": WORDS}), "'value' of turn 0 .human. is an object, not text"),
    (record(images=[3]), "picture 0 of 'images' is 3, not the path"),
    (record(images=[None]), "picture 0 of 'images' is null"),
    (record(images=[["images/0.png"]]), "picture 0 of 'images' is \\["),
    (record(images=[{"path": "a.png", "bytes": "aGVsbG8="}]), "picture 0 of 'images' holds 'byt"),
    (record(images=["https://example.org/a.png"]), "download it"),
    (record(images=["data:image/png;base64,AAAA"]), "download it"),
    (record() | {"images": 7}, "'images' is a number, not a list"),
    (record(image="images/1.png"), "pictures twice and differently"),
    (record(messages=turns(HUMAN)), "one list, 'conversations'"),
    ({"instruction": "go", "output": ANSWER}, "one list, .* it has instruction, output"),
    ({"conversations": {"from": "human"}}, "one list, 'conversations'"),
    ({"conversations": ["hello"]}, "turn 0 is text, not an object"),
    ({"conversations": turns((["human"], WORDS))}, "turn 0 has 'from' \\[\"human\"\\]"),
    ({"conversations": turns(("observation", WORDS))}, "turn 0 has 'from' \"observation\""),
    ({"conversations": turns(HUMAN, GPT, HUMAN)}, "the turns user, assistant, user"),
    ({"conversations": turns(GPT, HUMAN)}, "the turns assistant, user"),
    ({"conversations": turns(HUMAN, ("system", "x"), GPT)}, "the turns user, system, assistant"),
    ({"conversations": [dict(zip(("from", "value"), HUMAN), weight=0)]}, "turn 0 has 'weight'"),
    ({"messages": turns(("user", [7]), keys=("role", "content"))}, "part 0 of 'content' of turn 0"),
    ({"messages": turns(("user", [{"type": "video", "video": "a.mp4"}]),
                        keys=("role", "content"))}, "part 0 of .* is .*video"),
    ({"messages": turns(("user", [{"type": "image", "max_pixels": 784}]),
                        keys=("role", "content"))}, "part 0 of .* is .*max_pixels"),
    ({"messages": turns(("user", [{"type": "text", "text": 3}]), keys=("role", "content"))},
     "part 0 of 'content' of turn 0 .user. is a number"),
    (["human", WORDS], "it is a list, not an object"),
    (None, "it is null, not an object"),
]


@pytest.mark.parametrize("value, words", BAD)
def test_a_record_that_cannot_be_used_is_refused_by_number_and_field(folder, value, words):
    with pytest.raises(UserError, match=f"x.json: record 1: .*{words}"):
        ShareGpt(written(folder, [record(), value]))


def fields_of(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    for key, inner in (value.items() if isinstance(value, dict) else enumerate(value)
                       if isinstance(value, list) else ()):
        yield from fields_of(inner, (*path, key))


@pytest.mark.parametrize("form", range(len(SAME)))
def test_any_json_type_in_any_field_is_read_or_refused_in_a_sentence(folder, form):
    odd = [None, True, 0, -1.5, "", "x", [], [None], [[]], {}, {"a": [1]}, {"path": 3}]
    refused = 0
    for *path, last in filter(None, fields_of(SAME[form])):
        for value in odd:
            changed = copy.deepcopy(SAME[form])
            place = changed
            for key in path:
                place = place[key]
            place[last] = value
            try:
                data = ShareGpt(written(folder, [record(), changed]))
                assert data.frame(data.decision(1, 0, CONTRACT).frames[0]).shape == (56, 56, 3)
            except UserError as error:
                assert "record 1" in str(error)
                refused += 1
    assert refused > 40


# ---------------------------------------------------------------- a file of records


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_an_array_and_json_lines_are_read_under_either_name(folder, name, bom):
    records = [record(images=[f"images/{k}.png"], id=k) for k in range(3)]
    records[1]["conversations"][0]["value"] += "\u2028"          # a line end for str.splitlines
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n"
    for text in (json.dumps(records), json.dumps(records, indent=1), lines):
        (folder / name).write_text(bom + text, encoding="utf-8", newline="")
        data = make_data.open_data(str(folder / name))
        assert [data.frame(data.decision(i, 0, CONTRACT).frames[0])[0, 0, 0] for i in range(3)] == [
            0, 1, 2]
        assert data.decision(0, 0, CONTRACT).plan == (1, 0)
        assert any("not used: id" in note for note in data.notes)


@pytest.mark.parametrize("text, words", [
    (json.dumps({"data": [record()], "version": 1}), "one object .data, version.*write the list"),
    ("[]", "holds no records"), ("7", "holds a number"), ("", "cannot be read as JSON"),
    (json.dumps([record()])[:-9], "cannot be read as JSON"),
    (json.dumps(record()) + "\n{oops\n", "line 2: "),
    (json.dumps(record()) + "\n\n[1]\n", "record 1 .line 3.: it is a list"),
    ("[" * 100_000, "cannot be read as JSON")])
def test_a_file_that_holds_no_records(folder, text, words):
    (folder / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        ShareGpt(folder / "x.json")


def test_a_file_that_cannot_be_read(folder):
    with pytest.raises(UserError, match="cannot be read as JSON in UTF-8"):
        ShareGpt(folder / "none.json")
    (folder / "x.json").write_text(json.dumps([record()]), encoding="utf-16")
    with pytest.raises(UserError, match="cannot be read as JSON in UTF-8"):
        ShareGpt(folder / "x.json")


# ---------------------------------------------------------------- which file a path names


def test_the_bare_name_is_never_enough(tmp_path, monkeypatch):
    """ep_2/step_0.png is absent and step_0.png lies in the root, in the working directory, too."""
    for name in ("step_0.png", "ep_1/step_0.png"):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    path = written(tmp_path, [record(images=["ep_2/step_0.png"])])
    monkeypatch.chdir(tmp_path)
    for root in (None, tmp_path):
        with pytest.raises(UserError, match="1 of 1 pictures.*ep_2/step_0.png of record 0"):
            ShareGpt(path, root)
    path = written(tmp_path, [record(images=["VLN-Ego/ep_2/step_0.png"])])
    with pytest.raises(UserError, match="ep_2/step_0.png of record 0.*--image-root"):
        ShareGpt(path)                              # the folder of a walk is not left out, either
    path = written(tmp_path, [record(images=["images/step_0.png"])])
    with pytest.raises(UserError, match="images/step_0.png of record 0"):
        ShareGpt(path)


def test_all_records_lose_the_same_leading_folders(folder):
    paths = ["VLN-Ego/rgb/images/0.png", "VLN-Ego/rgb/images/1.png"]
    data = ShareGpt(written(folder, [record(images=[p]) for p in paths]))
    assert data.dropped == 2 and f"pictures below {folder}, 2 leading" in data.notes[0]
    assert [data.frame(p)[0, 0, 0] for p in paths] == [0, 1]
    # record 1 would need another number than record 0
    with pytest.raises(UserError, match="1 of 2 pictures.*images/1.png of record 1"):
        ShareGpt(written(folder, [record(images=["images/0.png"]),
                                  record(images=["rgb/images/1.png"])]))
    with pytest.raises(UserError, match="1 of 2 pictures.*rgb/images/9.png of record 1"):
        ShareGpt(written(folder, [record(images=[p]) for p in (paths[0],
                                                               "VLN-Ego/rgb/images/9.png")]))


def test_the_image_root_decides_alone(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    (other / "images").mkdir()
    Image.new("RGB", (56, 56), (99, 99, 99)).save(other / "images" / "0.png")
    path = written(folder, [record()])
    monkeypatch.chdir(folder)
    assert ShareGpt(path).frame("images/0.png")[0, 0, 0] == 0
    assert ShareGpt(path, other).frame("images/0.png")[0, 0, 0] == 99
    with pytest.raises(UserError, match="1.png of record 0"):     # it lies beside the JSON only
        ShareGpt(written(folder, [record(images=["images/1.png"])]), other)
    with pytest.raises(UserError, match="--image-root .* is not a folder"):
        ShareGpt(path, other / "none")
    absolute = written(folder, [record(images=[str(folder / "images/0.png")])])
    assert ShareGpt(absolute).dropped == 0
    with pytest.raises(UserError, match="not there"):
        ShareGpt(absolute, other / "images")        # below the root, or not at all
    monkeypatch.chdir(other)                        # where images/0.png is another picture
    assert ShareGpt(path).frame("images/0.png")[0, 0, 0] == 0


def test_an_empty_picture_is_found_when_the_file_is_read(folder):
    (folder / "images" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="images/1.png of record 1"):
        ShareGpt(written(folder, [record(images=[f"images/{k}.png"]) for k in range(3)]))


# ---------------------------------------------------------------- pictures


def packed(image, kind="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


RAMP = np.arange(60 * 80, dtype=np.uint8).reshape(60, 80)


def test_deep_grey_is_scaled():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(packed(deep, kind), "x"), np.stack([RAMP] * 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused(dtype):
    with pytest.raises(UserError, match="here .*32-bit values of unknown range"):
        decode(packed(Image.fromarray(RAMP.astype(dtype)), "TIFF"), "here")


@pytest.mark.parametrize("turn, upright", [(3, np.rot90(RAMP, 2)), (6, np.rot90(RAMP, -1)),
                                           (8, np.rot90(RAMP))])
def test_exif_orientation_is_applied(turn, upright):
    exif = Image.Exif()
    exif[0x0112] = turn
    seen = decode(packed(Image.fromarray(RAMP), "PNG", exif=exif), "x")
    assert np.array_equal(seen[..., 0], upright)


def test_what_is_transparent_is_white():
    clear = np.zeros((40, 40, 4), np.uint8)
    clear[:20, :, :] = (10, 20, 30, 255)
    seen = decode(packed(Image.fromarray(clear)), "x")
    assert (seen[:20] == (10, 20, 30)).all() and (seen[20:] == 255).all()
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert (decode(packed(palette), "x") == (200, 100, 50)).all()
    assert (decode(packed(palette, transparency=1), "x") == 255).all()
    grey = Image.fromarray(np.dstack([RAMP, np.full_like(RAMP, 255)]), "LA")
    assert np.array_equal(decode(packed(grey), "x")[..., 1], RAMP)


def test_other_modes():
    assert (decode(packed(Image.new("1", (40, 40), 1)), "x") == 255).all()
    cmyk = decode(packed(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG"), "x")
    assert (abs(cmyk.astype(int) - (255, 0, 0)) < 8).all()


@pytest.mark.parametrize("image, words", [
    (Image.new("1", (16000, 12000)), "too many pixels"),
    (Image.new("1", (10000, 9001)), "10000 x 9001 pixels"),
    (Image.new("1", (6000, 20)), "one side may be at most 200 times the other")])
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_of_a_size_that_no_frame_has(image, words):
    with pytest.raises(UserError, match=f"here .*{words}"):
        decode(packed(image), "here")


def test_damaged_pictures():
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    whole = packed(Image.fromarray(noise))
    for data in (b"", b"hello", whole[:-400], whole[:40], b"GIF89a" + bytes(40)):
        with pytest.raises(UserError, match="here is truncated or not a picture"):
            decode(data, "here")
    film = packed(Image.new("L", (40, 40)), "GIF", save_all=True,
                  append_images=[Image.new("L", (40, 40), 255)])
    with pytest.raises(UserError, match="here holds 2 pictures"):
        decode(film, "here")


def test_a_damaged_picture_is_named_with_its_record(folder):
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])
    data = ShareGpt(written(folder, [record(images=[f"images/{k}.png"]) for k in range(3)]))
    with pytest.raises(UserError, match=r"images/1.png is truncated.*record 1 of .*x.json"):
        data.frame("images/1.png")


# ---------------------------------------------------------------- what is trained


def test_each_answer_of_several_rounds_is_trained_given_what_stands_before(folder, policy):
    later = turns(("human", "again <image>"), ("gpt", "D. Stop"))
    both = record(images=["images/0.png", "images/1.png"], system="You are seven.")
    both["conversations"] += later
    data = ShareGpt(written(folder, [both, record(images=["images/2.png"])]))
    assert [data.steps(i) for i in range(2)] == [[0, 1], [0]]
    first, second = (data.decision(0, t, CONTRACT) for t in (0, 1))
    assert first.frames == ("images/0.png",) and first.before == (("system", "You are seven."),)
    assert second.frames == ("images/0.png", "images/1.png") and second.answer == "D. Stop"
    assert second.plan == (0, None) and first.plan == (1, 0)

    frames = {key: data.frame(key) for key in second.frames}
    prompt, = policy.build_prompts([second], frames)
    chat = policy.tokenizer.apply_chat_template(
        [{"role": "system", "content": "You are seven."}, {"role": "user", "content": WORDS},
         {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "again <image>"}],
        tokenize=False, add_generation_prompt=True)
    shown = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"       # 56 x 56 pixels
    ids = policy.tokenizer(chat.replace("<image>", shown), add_special_tokens=False)["input_ids"]
    assert prompt.ids == ids and "You are seven." in chat


def test_another_system_text_is_another_loss(folder, policy):
    losses = []
    for more in ({}, {"system": "You are a helpful assistant."}, {"system": "Never stop."}):
        data = ShareGpt(written(folder, [record(**more)]))
        decisions, frames = policy.load_batch(data, [(0, (0,))])
        inputs, mask = policy.model_inputs(decisions, frames)
        losses.append(-(policy(*inputs) * mask).sum().item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)      # the template's own system text
    assert abs(losses[2] - losses[0]) > 1e-3


def test_a_record_longer_than_the_context_is_named_before_training(folder, policy, monkeypatch):
    import engine
    monkeypatch.setattr(policy.model.config.text_config, "max_position_embeddings", 4096)
    words = "D. Stop, " * 700 + WORDS               # 6,300 bytes and under 4,096 tokens
    data = ShareGpt(written(folder, [record(), record(words=words)]))
    (_, bound), (_, exact) = data.lengths(policy)
    decision = data.decision(1, 0, policy.contract)
    prompt, = policy.build_prompts([decision], {key: data.frame(key) for key in decision.frames})
    assert exact == len(prompt.ids) + len(policy._encode(ANSWER)) + 1 < 4096 < len(words)
    prompt, = policy.build_prompts([data.decision(0, 0, policy.contract)],
                                   {"images/0.png": data.frame("images/0.png")})
    assert len(prompt.ids) + len(policy._encode(ANSWER)) + 1 <= bound
    engine.check_lengths(policy, data.lengths(policy), "x.json")
    path = written(folder, [record(), record(words="à la porte ! " * 900 + WORDS)])
    with pytest.raises(UserError, match="x.json: record 1 is .* tokens .* context is 4,096"):
        engine.check_lengths(policy, ShareGpt(path).lengths(policy), "x.json")


def test_a_special_token_of_this_tokenizer_is_refused(folder, policy, monkeypatch):
    monkeypatch.setattr(policy, "tokenizer", copy.deepcopy(policy.tokenizer))
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["[OBJ]"]})
    with pytest.raises(UserError, match="record 1 holds .OBJ., a special token"):
        ShareGpt(written(folder, [record(), record(answer="[OBJ] D. Stop")])).lengths(policy)


def test_answers_that_no_plan_can_be_compared_with(folder):
    data = ShareGpt(written(folder, [record(answer="go left"), record()]))
    data.check_plans(CONTRACT)
    with pytest.raises(UserError, match="no answer is a plan .*Turn left 15 degrees"):
        ShareGpt(written(folder, [record(answer="go left")])).check_plans(
            {**CONTRACT, "turn_deg": 15})


def test_the_robot_is_that_of_the_words(folder):
    data = ShareGpt(written(folder, [record(words="turn left . degrees <image>"), record()]))
    assert data.meta["robot"] == {"turn_deg": 30.0, "forward_m": 0.25}


def test_from_the_command_line(folder, tmp_path):
    """Forms mixed in one .jsonl, several rounds, a system text: it trains and says its root. A
    record without its picture ends it at once, with status 2."""
    several = record(images=["images/0.png", "images/1.png"], system="Never stop.")
    several["conversations"] += turns(("user", "<image>"), ("assistant", ANSWER))
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, [several, *SAME])))
    flags = ["--model", "tiny", "--device", "cpu", "--batch-size", 4, "--max-steps", 2]
    done = in_process("sft.py", "--data", folder / "x.jsonl", "--out", tmp_path / "o", *flags)
    assert f"pictures below {folder}, 0 leading folders" in done.stdout
    assert len((tmp_path / "o" / "log.jsonl").read_text().splitlines()) == 2
    os.remove(folder / "images" / "1.png")
    done = in_process("sft.py", "--data", folder / "x.jsonl", "--out", tmp_path / "p", *flags,
                  check=False)
    assert done.returncode == 2 and "images/1.png of record 0" in done.stderr
    assert not os.path.exists(tmp_path / "p" / "args.json")


# ---------------------------------------------------------------- VLN-Ego, out to ShareGPT


@pytest.fixture
def ego(tmp_path):
    """A VLN-Ego folder of one walk of four frames and two instructions, written by hand."""
    out = tmp_path / "ego" / "train"
    for name in ("frames", "rows"):
        os.makedirs(out / name)
    shard = Shard(str(out), "0000", "png")
    shard.add({"walk_id": "w", "actions": [1, 2, 1, 0]},
              [packed(Image.new("RGB", (56, 56), (t, 0, 0))) for t in range(4)])
    shard.commit()
    shutil.copy(out / "rows" / "0000.jsonl", out / "walks.jsonl")
    write_lines(str(out / "episodes.jsonl"), [
        {"episode_id": k, "walk_id": "w", "instruction": words, "split": "train"}
        for k, words in enumerate(["go to the door", "leave"])])
    robot = {"turn_deg": 30, "forward_m": 0.25, "hfov_deg": 90, "camera_height_m": 1.25,
             "radius_m": 0.18, "height_m": 1.5, "sliding": True, "width": 56, "height": 56}
    (out / "meta.json").write_text(json.dumps({"dataset": "houses", "robot": robot,
                                               "image_format": "png"}))
    return out


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("file, change, words", [
    ("walks", lambda rows: rows[0].update(actions="1210"), "walks.jsonl, line 1: 'actions'"),
    ("walks", lambda rows: rows[0].update(actions=[1, 2.5, 0]), "line 1: 'actions'"),
    ("walks", lambda rows: rows[0].update(actions=[]), "line 1: 'actions'"),
    ("walks", lambda rows: rows[0].update(labels=["11"]), "line 1: 'labels'"),
    ("walks", lambda rows: rows[0].update(labels=[1, 2, 3, 4]), "line 1: 'labels'"),
    ("walks", lambda rows: rows[0].update(shard="../x.zip"), "line 1: 'shard'"),
    ("walks", lambda rows: rows[0].pop("walk_id"), "line 1: it holds no 'walk_id'"),
    ("walks", lambda rows: rows.append(rows[0]), "a walk_id stands there twice"),
    ("walks", lambda rows: rows.insert(0, 5), "line 1: it holds no 'walk_id'"),
    ("episodes", lambda rows: rows[1].update(walk_id="v"), "episodes.jsonl, line 2: walk 'v'"),
    ("episodes", lambda rows: rows[1].update(walk_id=["w"]), "line 2: it holds no 'walk_id'"),
    ("episodes", lambda rows: rows[1].update(instruction=None), "line 2: the instruction is empty"),
    ("episodes", lambda rows: rows[1].update(instruction="<image>"), "line 2: .*the reserved")])
def test_a_damaged_line_of_vln_ego_is_named(ego, file, change, words):
    VlnEgo(ego)
    edit(ego / f"{file}.jsonl", change)
    with pytest.raises(UserError, match=f"is damaged .*{words}"):
        VlnEgo(ego)


@pytest.mark.parametrize("meta", [
    [], {}, {"robot": {"turn_deg": "30"}}, {"robot": {"turn_deg": 30, "forward_m": 0.25,
     "width": 0, "height": 56}, "image_format": "png", "dataset": ""}])
def test_a_meta_json_of_wrong_types(ego, meta):
    (ego / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="is damaged .meta.json: 'robot'"):
        VlnEgo(ego)


def test_frames_that_are_missing_are_found_when_the_folder_is_read(ego):
    store = ego / "frames" / "0000.zip"
    store.write_bytes(store.read_bytes()[:-100])
    with pytest.raises(UserError, match="0000.zip is missing or truncated"):
        VlnEgo(ego)


def command(*words):
    sharegpt.main(sharegpt.parse_args(list(map(str, words))))


def export(ego, folder, *flags):
    command("export", ego, "--out", folder, "--memory-budget", 2, *flags)


def test_sharegpt_there_and_back(ego, tmp_path, policy):
    export(ego, tmp_path / "share")
    data, read = VlnEgo(ego), ShareGpt(tmp_path / "share" / "vln_ego.json")
    contract = json.loads((tmp_path / "share" / "nav.json").read_text())
    assert read.meta["robot"] == {"turn_deg": 30.0, "forward_m": 0.25}
    pairs = [(i, t) for i in range(len(data)) for t in data.steps(i)]
    assert len(read) == len(pairs) == 8
    for k, (i, t) in enumerate(pairs):
        ours, theirs = data.decision(i, t, contract), read.decision(k, 0, contract)
        assert theirs.plan == ours.plan and ours.instruction in theirs.prompt
        for mine, other in zip(ours.frames, theirs.frames):
            with open(read.find(other), "rb") as file:
                assert file.read() == data.frame_bytes(mine)
        assert np.array_equal(read.frame(theirs.frames[-1]), data.frame(ours.frames[-1]))
    with open(tmp_path / "share" / "dataset_info.json") as file:
        assert json.load(file)["vln_ego"]["file_name"] == "vln_ego.json"


def test_the_contract_of_what_another_tool_trained_on_the_export(ego, tmp_path, policy):
    import evaluate
    from checkpoint import load_policy, save_policy
    share, ckpt = tmp_path / "share", tmp_path / "ckpt"
    export(ego, share, "--horizon", "4")
    save_policy(policy, str(ckpt))
    os.remove(ckpt / "nav.json")                    # as another trainer leaves it
    args = evaluate.parse_args(["--ckpt", str(ckpt), "--device", "cpu"])
    with pytest.raises(UserError, match="nav.json"):
        evaluate.choose_ckpt(args)
    command("contract", share, "--ckpt", ckpt)
    folder, contract = evaluate.choose_ckpt(args)
    assert [contract[key] for key in ("horizon", "turn_deg", "dataset", "width")] == [
        4, 30, "houses", 56]
    assert contract["memory"]["budget"] == 2 and load_policy(folder).contract == contract
    command("contract", share, "--ckpt", ckpt)     # once more changes nothing
    with pytest.raises(UserError, match="is there and differs"):
        command("contract", share, "--ckpt", ckpt, "--max-pixels", 9000)
    os.remove(ckpt / "nav.json")
    command("contract", share, "--ckpt", ckpt, "--max-pixels", 9000)
    assert load_policy(str(ckpt)).contract == {**contract, "max_pixels": 9000}


def test_a_contract_for_a_folder_that_is_no_model(ego, tmp_path):
    share, ckpt = tmp_path / "share", tmp_path / "ckpt"
    export(ego, share)
    ckpt.mkdir()
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        command("contract", share, "--ckpt", ckpt)
    (ckpt / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter alone"):
        command("contract", share, "--ckpt", ckpt)
    (ckpt / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        command("contract", share, "--ckpt", ckpt)
    with pytest.raises(UserError, match="nav.json holds no JSON object"):
        command("contract", tmp_path, "--ckpt", ckpt)
    (share / "nav.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="not a contract .*horizon"):
        command("contract", share, "--ckpt", ckpt)
    assert not (ckpt / "nav.json").exists()


# ---------------------------------------------------------------- the released walks


def walk(folder, words="go to the door", actions=(1, 2, 0), grey=0):
    os.makedirs(folder)
    (folder / "instruction.txt").write_text(words, encoding="utf-8")
    (folder / "action_list.json").write_text(json.dumps(actions))
    for t in range(3):
        Image.new("RGB", (56, 56), (grey, t, 0)).save(folder / f"step_{t}.jpg", quality=100)
    return folder


def imported(folder, out):
    command("import", folder, "--robot", "r2r", "--out", out)
    return VlnEgo(out / "train")


def test_walks_of_one_name_in_two_collections_stay_two_walks(tmp_path):
    walk(tmp_path / "in" / "part1" / "ep_1" / "traj_1", "red words", grey=200)
    walk(tmp_path / "in" / "part2" / "ep_1" / "traj_1", "green words", (3, 1, 0), grey=100)
    data = imported(tmp_path / "in", tmp_path / "out")
    assert [e["episode_id"] for e in data.episodes] == ["part1-ep_1", "part2-ep_1"]
    assert [e["instruction"] for e in data.episodes] == ["red words", "green words"]
    assert [walk["actions"] for walk in data.walks.values()] == [[1, 2, 0], [3, 1, 0]]
    for episode, grey in zip(data.episodes, (200, 100)):
        assert abs(int(data.frame((episode["walk_id"], 0))[0, 0, 0]) - grey) < 5


def test_ids_are_as_short_as_they_can_be_and_never_twice(tmp_path):
    walk(tmp_path / "a" / "ep_1" / "traj_1")
    walk(tmp_path / "a" / "ep_1" / "traj_2")
    walks, rows = released_walks(tmp_path, "train")
    assert [w["walk_id"] for w in walks] == ["ep_1-traj_1", "ep_1-traj_2"]
    assert len({row["episode_id"] for row in rows}) == 2, "two walks of one ep_ folder"
    walk(tmp_path / "b" / "ep_1" / "traj_2")
    walks, rows = released_walks(tmp_path, "train")
    assert [w["walk_id"] for w in walks] == ["a-ep_1-traj_1", "a-ep_1-traj_2", "b-ep_1-traj_2"]
    walk(tmp_path / "a-b" / "c")
    walk(tmp_path / "a" / "b-c")
    with pytest.raises(UserError, match="two folders would both be the walk"):
        sharegpt.name_walks(["/a-b/c", "/a/b-c"])


def test_links_are_followed_and_no_walk_is_taken_twice(tmp_path):
    walk(tmp_path / "store" / "ep_2" / "traj_1")
    walk(tmp_path / "in" / "ep_1" / "traj_1")
    os.symlink(tmp_path / "store" / "ep_2", tmp_path / "in" / "ep_2")
    os.symlink(tmp_path / "in" / "ep_1", tmp_path / "in" / "again")       # the same walk
    os.symlink(tmp_path / "in", tmp_path / "in" / "ep_1" / "up")          # a circle
    walks, _ = released_walks(tmp_path / "in", "train")
    assert [w["walk_id"] for w in walks] == ["ep_1-traj_1", "ep_2-traj_1"]
    os.symlink(tmp_path / "in", tmp_path / "link")
    walks, _ = released_walks(tmp_path / "link", "train")
    assert [w["walk_id"] for w in walks] == ["ep_1-traj_1", "ep_2-traj_1"]
    os.symlink(tmp_path / "nowhere", tmp_path / "in" / "ep_3")
    with pytest.raises(UserError, match="ep_3 is a symbolic link to nothing"):
        released_walks(tmp_path / "in", "train")


@pytest.mark.parametrize("name, text, reason", [
    ("action_list.json", '{"actions": [1, 2, 0]}', "must be a list of 1, 2, 3 and a last 0"),
    ("action_list.json", "[1, 2.0, 0]", "must be a list"),
    ("action_list.json", "[[1], 2, 0]", "must be a list"),
    ("action_list.json", '["1", "2", "0"]', "must be a list"),
    ("action_list.json", '"120"', "must be a list"),
    ("action_list.json", "[]", "must be a list"),
    ("action_list.json", "[1, 0, 0]", "must be a list"),
    ("action_list.json", "null", "must be a list"),
    ("action_list.json", "[1, 2", "action_list.json .*Expecting"),
    ("action_list.json", None, "No such file"),
    ("instruction.txt", "\ufeff \n", "instruction.txt: the instruction is empty"),
    ("instruction.txt", "go <image>", "the reserved"),
    ("instruction.txt", None, "No such file"),
    ("step_1.jpg", "", "step_1.jpg is truncated or not a picture"),
    ("step_1.jpg", None, "No such file")])
def test_a_damaged_walk_is_left_out_by_name(tmp_path, name, text, reason):
    folder = walk(tmp_path / "in" / "ep_1" / "traj_1")
    walk(tmp_path / "in" / "ep_2" / "traj_1")
    os.remove(folder / name)
    if text is not None:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"1 of 2 walks .*ep_1-traj_1: damaged: .*{reason}"):
        imported(tmp_path / "in", tmp_path / "out")
    data = VlnEgo(tmp_path / "out" / "train")       # the good one is there
    assert [e["walk_id"] for e in data.episodes] == ["ep_2-traj_1"]


def test_a_bom_is_no_word(tmp_path):
    folder = walk(tmp_path / "in" / "ep_1" / "traj_1", "\ufeffgo to\r\n the door\n")
    (folder / "action_list.json").write_text("\ufeff[1, 2, 0]", encoding="utf-8")
    data = imported(tmp_path / "in", tmp_path / "out")
    assert data.episodes[0]["instruction"] == "go to the door"


def test_nothing_to_import(tmp_path):
    with pytest.raises(UserError, match="no action_list.json at or below"):
        released_walks(tmp_path, "train")
    with pytest.raises(UserError, match="none cannot be read"):
        released_walks(tmp_path / "none", "train")
