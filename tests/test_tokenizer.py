from __future__ import annotations

import resource
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexvar import Schedule, Tokenizer, TokenizerConfig
from flexvar.tokenizer.quantizer import Quantizer


@pytest.mark.parametrize(("height", "width"), [(16, 16), (4, 32), (20, 12)])
def test_any_multiple(small_tokenizer: Tokenizer, height: int, width: int) -> None:
    features = small_tokenizer.features(torch.rand(2, 3, height, width) * 2 - 1)
    assert features.shape == (2, 8, height // 4, width // 4)
    codes = small_tokenizer.codes(features, [1, (height // 4, width // 4)] if min(height, width) > 3 else [1])
    assert codes[0].shape == (2, 1, 1)
    assert codes[0].dtype == torch.int64
    assert small_tokenizer.decode(codes[1]).shape == (2, 3, height, width)


def test_other_sizes_are_refused(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="height 18 is not a multiple of 4 px; the nearest height is 16 or 20"):
        small_tokenizer.features(torch.zeros(1, 3, 18, 16))


def test_averaging_commutes_with_the_1x1_convolution(small_tokenizer: Tokenizer) -> None:
    encoded = small_tokenizer.encoder(torch.rand(1, 3, 32, 32))
    first = small_tokenizer.before_codes(F.adaptive_avg_pool2d(encoded, (3, 5)))
    second = F.adaptive_avg_pool2d(small_tokenizer.before_codes(encoded), (3, 5))
    assert torch.allclose(first, second, atol=1e-5)


def test_lift_is_what_training_and_sampling_share(small_tokenizer: Tokenizer) -> None:
    schedule = Schedule.of([1, (2, 3), (4, 6)])
    codes = small_tokenizer.codes(torch.randn(2, 8, 4, 6), schedule)
    inputs = small_tokenizer.inputs(codes, schedule)
    assert inputs.shape == (2, schedule.tokens - 1, 8)
    assert torch.equal(inputs[:, 6:], small_tokenizer.lift(codes[1], (4, 6)).flatten(2).mT)
    same = small_tokenizer.lift(codes[1], (2, 3))
    assert torch.allclose(same.norm(dim=1), torch.ones(2, 2, 3), atol=1e-5)
    assert small_tokenizer.inputs(codes[:1], [1]).shape == (2, 0, 8)


def test_nearest_is_the_brute_force_answer() -> None:
    quantizer = Quantizer(40, 6)
    quantizer.codebook.data.mul_(torch.rand(40, 1) + 0.5)  # lengths must not matter
    features = torch.randn(3, 4, 5, 6)
    distances = (F.normalize(features, dim=-1)[..., None, :] - F.normalize(quantizer.codebook, dim=-1)).norm(dim=-1)
    assert torch.equal(quantizer.nearest(features), distances.argmin(-1))


@pytest.mark.slow
def test_a_million_tokens_in_bounded_memory() -> None:
    quantizer = Quantizer(8912, 32)
    features = torch.randn(1_000_000, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    codes = quantizer.nearest(features)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert codes.shape == (1_000_000,)
    assert torch.equal(codes[-5:], quantizer.nearest(features[-5:]))
    assert grown < 600 * 2**20, f"{grown / 2**20:.0f} MiB more in {time.perf_counter() - began:.0f} s"


def test_attention_takes_the_kernel_that_holds_no_scores(small_tokenizer: Tokenizer) -> None:
    pictures = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel):  # no other is allowed
            features = small_tokenizer.features(pictures)
            found.append((features, small_tokenizer.decode_vectors(features)))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_groups_shrink_with_the_channels() -> None:
    tokenizer = Tokenizer(TokenizerConfig(channels=12, multipliers=(1, 2), blocks=1, z_channels=12, codebook_size=8, code_width=4))
    assert tokenizer.config.downsample == 2
    assert tokenizer.decoder.norm_out.num_groups == 4
    assert tokenizer.decode(torch.zeros(1, 3, 3, dtype=torch.int64)).shape == (1, 3, 6, 6)


@pytest.mark.parametrize("images", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_what_is_no_batch_of_pictures_is_named(images: torch.Tensor, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"give floats \(B, 3, H, W\) from -1 to 1"):
        small_tokenizer.features(images)
