"""Weights that anyone can re-create from the names of the released tensors (see tests/golden/README.md)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def manifest() -> dict[str, dict[str, tuple[int, ...]]]:
    """For each released model, the names and shapes of its tensors."""
    lists = json.loads((FOLDER / "manifest.json").read_text())
    return {model: {name: tuple(shape) for name, shape in rows} for model, rows in lists.items()}


def filled(name: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """The golden tensor of this name and shape."""
    n = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith(("zero_k_bias", "codebook_used")):
        n = np.zeros(shape, np.float32)
    elif "scale_mul" in name:
        n = np.float32(math.log(4)) + np.float32(0.1) * n
    elif name == "pos_1LC":
        n = 2 * n
    elif name.endswith("word_embed.weight"):
        n = 4 * n / np.float32(math.sqrt(shape[1]))
    elif name.endswith(("class_emb.weight", "embedding.weight")):
        pass
    elif len(shape) <= 1:
        n = 1 + np.float32(0.1) * n if name.endswith(".weight") else np.float32(0.1) * n
    else:
        n = n / np.float32(math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy(np.asarray(n, np.float32))


def tokenizer_tensors(salt: str = "") -> dict[str, Tensor]:
    """The released tokenizer's tensors."""
    return {name: filled(name, shape, salt) for name, shape in manifest()["FlexVAE"].items()}


def transformer_tensors(depth: int = 3, salt: str = "") -> dict[str, Tensor]:
    """A small transformer's tensors under the released names: shapes as d16's, with another depth, width and number of heads."""
    width, tensors = 64 * depth, {}
    for name, shape in manifest()["FlexVARd16"].items():
        if name.startswith("blocks.") and int(name.split(".")[1]) >= depth:
            continue
        scaled = tuple(
            {1024: width, 2048: 2 * width, 3072: 3 * width, 4096: 4 * width, 6144: 6 * width, 16: depth}.get(n, n) for n in shape
        )
        if name != "attn_bias_for_masking":
            tensors[name] = filled(name, scaled, salt)
    return tensors
