"""
Questions about one scene: its pictures run once, against separate rows and against Hugging Face.

    python bench/scenes.py

Training: a forward and a backward pass over 8 questions with their answers. Without sharing, the
same code runs each question as a row with its own pictures; the Hugging Face side is a plain loop's
batch, padded to its longest row, through transformers' own model and image processor. Answering: 66
questions, 16 at a time, --tokens each, from pictures to ids; theirs is generate() on left-padded
batches of 16. Greedy, and the weights are random: every answer has all its tokens.

Checked: log-probabilities and gradients of all three, and the answers' ids.
"""
import json
import os

import torch
from common import add_row, clock, in_turn, parser, script, shaped
from peers import load_model, load_processor
from PIL import Image

import checkpoint
from gpt4scene.answer import answer_scene
from gpt4scene.chat import CHAT, ChatPolicy
from make_data import Decision, decode
from model import Policy

PICTURES = {"tiny": (8, 56, 168), "2B": (32, 480, 512), "7B": (32, 480, 512)}


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--questions", type=int, default=8, help="trained together")
    p.add_argument("--asked", type=int, default=66, help="questions that are answered")
    p.add_argument("--together", type=int, default=16, help="answered in one pass")
    p.add_argument("--tokens", type=int, default=8, help="of an answer")
    return p.parse_args(argv)


def make_scene(args):
    """-> a policy's folder, one scene's pictures, and its questions with answers [(q, a), ..]"""
    frames, side, bev = PICTURES[args.shape]
    data, folder = (os.path.join(args.world, f"{name}-{args.shape}") for name in ("scene", "chat"))
    if not os.path.exists(os.path.join(data, "meta.json")):
        script("-m", "gpt4scene.scenes", "--out", data, "--train-scenes", 1, "--val-scenes", 1,
               "--questions", 100, "--proposal-noise", 0, "--jobs", 1, "--frames", frames,
               "--frame-pixels", side, "--bev-pixels", bev)
    with open(os.path.join(data, "val.json")) as file:
        records = json.load(file)
    asked = [(r["conversations"][0]["value"].replace("<image>", ""), r["conversations"][1]["value"])
             for r in records]
    if not os.path.exists(os.path.join(folder, "nav.json")):
        texts = [text for pair in asked for text in pair]
        policy = checkpoint.load_policy("tiny", CHAT, texts=texts)
        if args.shape != "tiny":
            policy = shaped(policy, args.shape)
        os.makedirs(folder, exist_ok=True)
        checkpoint.save_policy(policy, folder)
    pictures = []
    for path in records[0]["images"]:
        with open(os.path.join(data, path), "rb") as file:
            pictures.append(decode(file.read(), path))
    return folder, pictures, asked


class Rows:
    """The Hugging Face side: a row a question, padded, every row with all pictures."""

    def __init__(self, policy, folder, pictures, args):
        self.processor, self.device = load_processor(folder), args.device
        self.model = load_model(folder, args.device, policy.dtype)
        self.pictures = [Image.fromarray(policy.resize(frame)) for frame in pictures]
        self.marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures)
        self.chat, self.end_token = policy._chat, policy.end_token

    def inputs(self, questions, answers, side):
        self.processor.tokenizer.padding_side = side
        texts = [self.chat(self.marks + question) + answer
                 for question, answer in zip(questions, answers)]
        return self.processor(text=texts, images=[self.pictures] * len(texts), padding=True,
                              return_tensors="pt").to(self.device)

    def logps(self, questions, answers, ids, mask):
        """-> (K, C), 0 where masked, as ours."""
        rows = self.inputs(questions, [answer + "<|im_end|>" for answer in answers], "right")
        lengths, found = rows["attention_mask"].sum(dim=1).tolist(), torch.zeros(ids.shape)
        logits = self.model(**rows).logits.float()
        found = found.to(self.device)
        for k, (length, n) in enumerate(zip(lengths, mask.sum(dim=1).tolist())):
            row = logits[k, length - n - 1:length - 1].log_softmax(-1)
            found[k, :n] = row.gather(1, ids[k, :n, None])[:, 0]
        return found

    def answers(self, questions, tokens, together):
        found = []
        for k in range(0, len(questions), together):
            some = questions[k:k + together]
            rows = self.inputs(some, [""] * len(some), "left")
            made = self.model.generate(**rows, do_sample=False, max_new_tokens=tokens)
            for row in made[:, rows["input_ids"].shape[1]:].tolist():
                end = row.index(self.end_token) + 1 if self.end_token in row else tokens
                found.append(row[:end])
        return found


def separate_logps(policy, pictures, asked, ids, mask):
    """Each question as a row, its pictures encoded for it: Policy's own passes."""
    features = policy.encode_frames(pictures * len(asked))
    n = len(pictures)
    prompts = [policy.prompt("<image>" * n + question, features[k * n:(k + 1) * n])
               for k, (question, _) in enumerate(asked)]
    return Policy.logps(policy, prompts, ids, mask)


def timed_gradient(args, model, logps_of):
    """Forward and backward -> seconds, log-probabilities, all gradients in one vector."""
    model.zero_grad()
    start = clock(args.device)
    logps = logps_of()
    (-logps.sum()).backward()
    seconds = clock(args.device) - start
    grads = {name.removeprefix("model."): p.grad.flatten() for name, p in model.named_parameters()}
    return seconds, logps.detach(), torch.cat([grads[name] for name in sorted(grads)])


def train_rows(args, policy, peer, pictures, asked):
    questions, answers = zip(*asked[:args.questions])
    ids, mask = policy.answers(list(answers))
    frames = dict(enumerate(pictures))
    decisions = [Decision("", tuple(frames), (), q, a) for q, a in asked[:args.questions]]
    sides = [lambda: timed_gradient(args, policy.model, lambda: policy(
                 decisions, frames, ids, mask)),
             lambda: timed_gradient(args, policy.model, lambda: separate_logps(
                 policy, pictures, asked[:args.questions], ids, mask)),
             lambda: timed_gradient(args, peer.model, lambda: peer.logps(
                 questions, answers, ids, mask))]
    ours, apart, theirs = in_turn(sides, args.repeats)
    tokens = len(policy.picture_prompt(policy.encode_frames(pictures)).ids)
    for other, name in ((apart, "rows of their own"), (theirs, "HF, padded rows")):
        gaps = [float((ours[0][1] - other[0][1]).abs().max()),
                float((ours[0][2] - other[0][2]).norm() / other[0][2].norm())]
        add_row(args, f"training, {args.questions} questions of a scene", [s for s, *_ in ours],
                [s for s, *_ in other], name, "s",
                max(gaps) < (1e-4 if args.device == "cpu" else 0.05),
                f"largest difference of log-probs {gaps[0]:.1e}, of gradients (relative) "
                f"{gaps[1]:.1e}", f"{len(pictures)} pictures, {tokens} tokens before the question, "
                f"{args.threads} thread(s)")


def answer_row(args, policy, peer, pictures, asked):
    policy.contract["max_new_tokens"] = args.tokens
    questions = {str(k): question for k, (question, _) in enumerate(asked[:args.asked])}

    def ours():
        start, texts = clock(args.device), []
        for rows in answer_scene(policy, pictures, questions, args.together):
            texts += [row["pred"] for row in rows]
        return clock(args.device) - start, texts

    def theirs():
        start = clock(args.device)
        found = peer.answers(list(questions.values()), args.tokens, args.together)
        return clock(args.device) - start, [policy.text(ids) for ids in found]
    mine, other = in_turn([ours, theirs], args.repeats)
    same = sum(a == b for a, b in zip(mine[0][1], other[0][1]))
    add_row(args, f"answering {len(questions)} questions of a scene", [s for s, _ in mine],
            [s for s, _ in other], "HF generate, padded rows", "s", same == len(questions),
            f"{same} of {len(questions)} answers are the same", f"{len(pictures)} pictures, "
            f"{args.tokens} tokens an answer, {args.together} at a time, {args.threads} thread(s)")


def main(args):
    torch.set_num_threads(args.threads)
    folder, pictures, asked = make_scene(args)
    policy = checkpoint.load_policy(folder, device=args.device, dtype="float32" if args.device ==
                                    "cpu" else "bfloat16")
    assert isinstance(policy, ChatPolicy)
    policy.banned = policy.banned[:0]                   # the peers ban nothing
    peer = Rows(policy, folder, pictures, args)
    train_rows(args, policy, peer, pictures, asked)
    with torch.no_grad():
        answer_row(args, policy, peer, pictures, asked)


if __name__ == "__main__":
    main(parse_args())
