"""
Passes through the decoder for one plan: drafted by the grammar, against token by token.

    python bench/passes.py                        # a policy with Qwen2-sized words
    python bench/passes.py --ckpt ckpt/sft        # a checkpoint of yours

Greedy, one prompt at a time. A checkpoint of `tiny` has one token for a phrase, nothing to draft:
the row to look at is that of a policy that splits phrases, as every Qwen2-VL does.

Checked: the same random numbers give the same tokens with and without drafts, at temperature 1,
eight plans for a prompt. That is one distribution, token for token.
"""
import torch
from common import add_row, make_world, parser, phrase_policy

import grpo
from checkpoint import load_policy
from make_data import VlnEgo


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--ckpt", help="checkpoint folder; default: one with Qwen2-sized words")
    p.add_argument("--prompts", type=int, default=32)
    return p.parse_args(argv)


def count(policy, prompts):
    """-> passes per greedy plan (drafted, plain), seconds apart; are samples the same?"""
    greedy = [[policy.generate([p], draft=draft) for p in prompts] for draft in (True, False)]
    same = all(torch.equal(a.completion_ids, b.completion_ids) for a, b in zip(*greedy))
    for at in range(0, len(prompts), 4):
        some = prompts[at:at + 4]
        a, b = (policy.generate(some, 8, 1.0, seeds=list(range(at, at + len(some))), draft=draft)
                for draft in (True, False))
        same &= torch.equal(a.completion_ids, b.completion_ids)
    return *([roll.passes + 1 for roll in side] for side in greedy), same


@torch.no_grad()
def main(args):
    torch.set_num_threads(args.threads)
    _, late = make_world(args)
    policy = load_policy(args.ckpt or phrase_policy(args, late), device=args.device).eval()
    data = VlnEgo(late)
    units = grpo.draw_prompts([data], args.prompts, 1)
    prompts = policy.build_prompts(*grpo.load_prompts([data], policy, units))
    drafted, plain, same = count(policy, prompts)
    what = args.ckpt or "phrases split as by Qwen2"
    add_row(args, f"decoding, {what}", drafted, plain, "token by token", "passes", same,
            f"{args.prompts} greedy plans and {8 * args.prompts} sampled ones are the same, token "
            "for token", "the prompt's own pass included; median over prompts")


if __name__ == "__main__":
    main(parse_args())
