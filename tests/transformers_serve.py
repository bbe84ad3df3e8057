"""
`transformers serve`, with a torchvision that does not fit this torch: a launcher for tests.

It wants torchvision for a video processor that no request here uses. PyPI's wheel is built for
CUDA: beside a CPU torch its operators are missing, and so is its picture decoder.

Run it   PYTHONPATH=FOLDER python tests/transformers_serve.py serve MODEL --device cpu --port 8000
         FOLDER holds fastapi, uvicorn, openai and torchvision (pip install --target FOLDER)
"""
import io

import numpy as np
import torch
from PIL import Image

operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision.io  # noqa: E402


def decode_image(data, mode="RGB", **_):
    """A picture's bytes, or a uint8 tensor of them -> uint8 (3, H, W)."""
    content = data if isinstance(data, bytes) else bytes(data.tolist())
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


torchvision.io.decode_image = decode_image

if __name__ == "__main__":
    from transformers.cli.transformers import main
    main()
