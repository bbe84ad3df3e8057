"""
The peers, set up as well as we know: TRL's GRPOTrainer and Hugging Face's Trainer on Qwen2-VL.

They read the same checkpoint folder through transformers' own processor. Two things are added to
it: a chat template that puts images where our prompt has them (so that both sides see the same
ids, which the benches assert), and an importable torchvision (common.py).
"""
from __future__ import annotations

import os

from common import ROOT  # noqa: F401  (puts the project on the path)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def load_processor(folder):
    """Qwen2VLProcessor of a checkpoint folder of ours."""
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Qwen2VLProcessor(images, AutoTokenizer.from_pretrained(folder), Qwen2VLVideoProcessor(),
                            chat_template=CHAT_TEMPLATE)


def conversation(words):
    """Our prompt (with <image> placeholders) -> the messages for the template above."""
    pieces = words.split("<image>")
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return [{"role": "user", "content": [c for c in content if c.get("text") != ""]}]


def load_model(folder, device, dtype):
    from transformers import Qwen2VLForConditionalGeneration
    return Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa").to(device)


def quiet():
    """The peers' progress bars and advice, off."""
    import datasets
    import transformers
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
