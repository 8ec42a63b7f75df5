"""3x3 convolutions with a quarter of the products, against torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexvar import Tokenizer, TokenizerConfig
from flexvar.compiled import save_products
from flexvar.tokenizer import winograd
from flexvar.tokenizer.networks import Convolution


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3), inputs=st.integers(1, 9), outputs=st.integers(1, 9), down=st.integers(1, 6), across=st.integers(1, 6),
    piece=st.sampled_from([1, 20, 100, winograd.PIECE]), last=st.booleans(), convolving=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolves_any_map_in_pieces_of_any_size(
    batch: int, inputs: int, outputs: int, down: int, across: int, piece: int, last: bool, convolving: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, 4 * down, 4 * across, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5  # outputs have a size of about 1
    bias = torch.randn(outputs, generator=generator)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with mock.patch.object(winograd, "PIECE", piece), mock.patch.object(winograd, "convolving_pays", return_value=convolving):
        y = winograd.convolve(x, winograd.filter_transform(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("convolving", [False, True])
def test_is_off_by_no_more_than_it_says(convolving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "convolving_pays", lambda: convolving)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(1, 128, 64, 64, generator=generator), torch.randn(128, generator=generator)
    weight = torch.randn(128, 128, 3, 3, generator=generator) / 34
    right = exact(x, weight, bias)
    off, plain = (winograd.convolve(x, winograd.filter_transform(weight), bias) - right), F.conv2d(x, weight, bias, padding=1) - right
    assert off.abs().max() < 1e-4  # of outputs of a size of about 1
    assert off.abs().max() > plain.abs().max()  # or the docstring claims too much


@pytest.mark.parametrize("convolving", [False, True])
def test_a_picture_does_not_depend_on_its_batch(convolving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "convolving_pays", lambda: convolving)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 96, 16, 24, generator=generator), torch.randn(100, generator=generator)
    weight = winograd.filter_transform(torch.randn(100, 96, 3, 3, generator=generator))
    together = winograd.convolve(x, weight, bias)
    assert torch.equal(together, torch.cat([winograd.convolve(one[None], weight, bias) for one in x]))


def test_the_processor_says_how_the_products_are_laid_out(packing: str) -> None:
    values = winograd.values_of(torch.randn(6, 10, 3), 1, 2)
    assert values.shape == (36, 2, 3)
    assert values.is_contiguous() == (packing == "AVX2")  # else all values of a tile are side by side
    weights = torch.randn(36, 4, 3)
    torch.testing.assert_close(winograd.multiply(values, weights), torch.einsum("ptc,poc->pto", values, weights))


def test_a_tokenizer_that_saves_products_paints_and_reads_the_same() -> None:
    torch.manual_seed(0)
    shape = TokenizerConfig(channels=96, multipliers=(1, 1), blocks=1, z_channels=32, norm_groups=8, codebook_size=64, code_width=8)
    tokenizer = Tokenizer(shape).eval()
    codes, picture = torch.randint(64, (2, 4, 8)), torch.randn(1, 3, 16, 8)
    painted, features, saved = tokenizer.decode(codes), tokenizer.features(picture), set(tokenizer.state_dict())
    save_products(tokenizer)
    with mock.patch.object(winograd, "convolve", wraps=winograd.convolve) as convolve:
        again = tokenizer.decode(codes)
        assert convolve.call_count == sum(isinstance(module, Convolution) for module in tokenizer.decoder.modules()) == 12
        assert torch.allclose(tokenizer.features(picture), features, atol=1e-4)
        assert convolve.call_count == 20
        assert torch.allclose(again, painted, atol=1e-4)
        assert not torch.equal(again, painted)  # by other sums
        assert set(tokenizer.state_dict()) == saved

        # Where it learns, its own weights count; so they do for gradients, and for maps that are not of whole tiles.
        convolve.reset_mock()
        assert torch.equal(tokenizer.train().decode(codes), painted)
        with torch.enable_grad():
            tokenizer.eval().decode(codes).sum().backward()
        tokenizer.decode(codes[:, :2, :2])
        assert convolve.call_count == 4  # the last level's alone has whole tiles


@pytest.mark.parametrize(
    ("inputs", "outputs", "pays"), [(95, 128, False), (128, 95, False), (96, 96, True), (256, 256, True), (256, 257, False)]
)
def test_pays_for_weights_that_are_neither_small_nor_large(inputs: int, outputs: int, pays: bool) -> None:
    layer = Convolution(inputs, outputs)
    layer.use_winograd()
    assert (layer.winograd_filters is not None) == pays
    half = layer.to(torch.bfloat16)
    half.use_winograd()
    assert half.winograd_filters is None
