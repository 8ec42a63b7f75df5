"""What many tests share: the golden values, the golden models, and models small enough to be made anew."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from flexvar import Tokenizer, TokenizerConfig, Transformer, TransformerConfig
from flexvar.official import WITHOUT_MEANING, tokenizer_from_released, transformer_from_released
from golden import weights

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: sums of more threads are other sums
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test does it


@pytest.fixture(params=["AVX2", "AVX512"])
def packing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """As on the processors for which `compile()` lays weights out, whichever this one is; gives what they have."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def golden() -> Mapping[str, np.ndarray]:
    return dict(np.load(weights.FOLDER / "golden.npz"))


@pytest.fixture(scope="session")
def golden_tokenizer() -> Tokenizer:
    tensors = {name: tensor for name, tensor in weights.tokenizer_tensors().items() if not WITHOUT_MEANING.search(name)}
    return tokenizer_from_released(tensors)


@pytest.fixture(scope="session")
def golden_transformer() -> Transformer:
    tensors = {name: tensor for name, tensor in weights.transformer_tensors().items() if not WITHOUT_MEANING.search(name)}
    return transformer_from_released(tensors)


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """Downsampling 4, 48 codes of width 8, random weights."""
    torch.manual_seed(0)
    config = TokenizerConfig(channels=16, multipliers=(1, 2, 2), blocks=1, z_channels=16, norm_groups=8, codebook_size=48, code_width=8)
    return Tokenizer(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small_transformer() -> Transformer:
    """Depth 2 for 5 classes and a 4x4 grid, random weights made strong enough that the classes differ."""
    torch.manual_seed(0)
    config = TransformerConfig(depth=2, width=32, heads=2, classes=5, codebook_size=48, code_width=8, trained_grid=4, positions="smooth")
    transformer = Transformer(config)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return transformer.eval().requires_grad_(False)
