"""8-bit weights: near the float32 ones, the same in any batch, and told where they cannot be."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from flexvar import FlexVARPipeline, Tokenizer, Transformer
from flexvar.checkpoint import Defaults, Model, save
from flexvar.cli import main
from flexvar.int8 import Int8Linear, to_int8

CLASSES = tuple("abcde")


@pytest.fixture
def model(small_tokenizer: Tokenizer, small_transformer: Transformer) -> Model:
    return Model(copy.deepcopy(small_tokenizer), copy.deepcopy(small_transformer), CLASSES, Defaults(16, 24, 5))


def test_a_layer_is_near_its_original_whatever_the_size_of_its_rows() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40)
    rounded = Int8Linear(layer.weight, layer.bias)
    x = torch.randn(3, 7, 96) * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    exact, found = layer(x) - layer.bias, rounded(x) - layer.bias
    errors = (found - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert (errors < 0.03).all()
    assert (errors > 1e-4).all()  # it is rounded
    assert torch.equal(rounded(torch.zeros(2, 96)), layer.bias.expand(2, -1))


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(24, 32), torch.randn(24))
    rows = torch.randn(50, 32) * torch.logspace(-3, 3, 50)[:, None]
    together = layer(rows)
    assert torch.equal(together[7:8], layer(rows[7:8]))
    assert torch.equal(together[20:31], layer(rows[20:31]))


def test_pictures_are_near_and_the_same_in_any_batch(model: Model) -> None:
    pipe = FlexVARPipeline(model)
    plain = list(pipe.stream(list("abc"), seed=1, top_k=1))
    assert pipe.to_int8().precision == "int8"
    together = list(pipe.stream(list("abc"), seed=1, top_k=1))
    agreement = torch.cat([(one.codes == other.codes).flatten() for one, other in zip(plain[:2], together[:2], strict=True)])
    assert agreement.float().mean() > 0.7
    assert any(not torch.equal(one.codes, other.codes) for one, other in zip(plain, together, strict=True))
    alone = list(pipe.stream("b", seed=2, top_k=1))
    assert all(torch.equal(one.codes[1:2], other.codes) for one, other in zip(together, alone, strict=True))


def test_it_takes_a_quarter_of_the_memory(model: Model) -> None:
    transformer = model.transformer
    before = sum(weight.numel() for block in transformer.layers for name, weight in block.named_parameters() if name.endswith("weight"))
    to_int8(transformer)
    after = sum(weight.numel() for block in transformer.layers for name, weight in block.named_parameters() if name.endswith("weight"))
    width = transformer.config.width
    assert before - after == transformer.config.depth * 12 * width**2  # those of the blocks are no float32 parameters any more


def test_what_8_bit_weights_cannot_do_is_told(model: Model, tmp_path: Path) -> None:
    pipe = FlexVARPipeline(model)
    with pytest.raises(ValueError, match=r"run on CPUs, from float32; this transformer is torch\.bfloat16"):
        pipe.to(torch.bfloat16).to_int8()
    pipe.to(torch.float32).to_int8()
    for wrong in (lambda: pipe.to(torch.float16), lambda: pipe.save_pretrained(tmp_path), lambda: pipe.save_released(tmp_path)):
        with pytest.raises(ValueError, match="stays where it is and is not saved; load it again"):
            wrong()


def test_the_command_draws_with_them(model: Model, tmp_path: Path, capsys) -> None:
    save(model, tmp_path / "model")
    words = ["sample", "a", "--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "int8"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    picture = Image.open(tmp_path / "out" / "a-seed0.png")
    assert picture.text["dtype"] == "int8"
