"""8-bit weights: near the float32 ones, the same in any batch, and told where they cannot be. Packed ones: the same up to rounding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flexvar import FlexVARPipeline, Tokenizer, Transformer, TransformerConfig, linear
from flexvar.checkpoint import Defaults, Model, save
from flexvar.cli import main
from flexvar.counting import bytes_of
from flexvar.linear import (
    Int8Linear,
    IntegerProduct,
    PackedLinear,
    by_floats,
    by_integers,
    can_pack,
    gelu_in_place,
    integer_product,
    pack,
    to_int8,
)

CLASSES = tuple("abcde")
HALF = torch.backends.cpu.get_cpu_capability() == "AVX512"


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
    weights, before = transformer.config.depth * 12 * transformer.config.width**2, bytes_of(transformer.blocks)
    to_int8(transformer)
    assert 0.9 * 3 * weights < before - bytes_of(transformer.blocks) <= 3 * weights  # each row has a scale too


def test_they_take_bfloat16_and_give_it_back() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 24)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    product = Int8Linear(layer.weight.bfloat16(), layer.bias.bfloat16())(x)
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.float(), layer(x.float()), atol=0.05)


@pytest.mark.parametrize("multiply", [by_integers, by_floats])
@pytest.mark.parametrize("columns", [8, 1024, 4104])
def test_sums_are_exact(multiply: IntegerProduct, columns: int) -> None:
    torch.manual_seed(0)
    rows, weight = (torch.randint(-127, 128, (n, columns), dtype=torch.int8) for n in (3, 16))
    rows[0], weight[:8] = 127, -127  # the largest sums that there are
    assert torch.equal(multiply(rows, weight), (rows.long() @ weight.long().T).int())


def _slow(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return by_floats(rows, weight)


@pytest.mark.parametrize("integers", [_slow, lambda rows, weight: by_floats(rows, weight) + 1], ids=["slow", "overflowing"])
def test_a_processor_that_is_bad_at_integers_multiplies_floats(integers: IntegerProduct, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "by_integers", integers)
    assert integer_product.__wrapped__(16, 8, "cpu") is by_floats
    assert integer_product.__wrapped__(16, 8, "cuda") is integers


def test_a_processor_that_is_good_at_integers_multiplies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "by_floats", _slow)
    monkeypatch.setattr(linear, "by_integers", by_floats)
    assert integer_product.__wrapped__(16, 8, "cpu") is by_floats  # what stands for the fast product of integers


def test_sides_that_cuda_does_not_take_are_told() -> None:
    config = TransformerConfig(depth=1, width=20, heads=2, classes=2, codebook_size=8, code_width=4, trained_grid=2)
    with pytest.raises(ValueError, match="need sides that are multiples of 8, and one is 60 x 20; draw without them"):
        to_int8(Transformer(config))


def test_other_devices_are_told(model: Model) -> None:
    with pytest.raises(ValueError, match="run on CPUs and CUDA, and this transformer is on meta; move it"):
        to_int8(model.transformer.to("meta"))


def test_what_8_bit_weights_cannot_do_is_told(model: Model, tmp_path: Path) -> None:
    for pipe in (FlexVARPipeline(model).to_int8(), FlexVARPipeline(model)):
        assert pipe.precision == "int8"
        for wrong in (lambda: pipe.to("cpu"), lambda: pipe.save_pretrained(tmp_path), lambda: pipe.save_released(tmp_path)):  # noqa: B023
            with pytest.raises(ValueError, match=r"made faster \(of 8-bit weights\) stays where it is and is not saved; load it again"):
                wrong()


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_a_packed_layer_gives_the_same(gelu: bool) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 40), torch.randn(2, 70, 96) * 3
    expected = F.gelu(layer(x), approximate="tanh") if gelu else layer(x)
    assert torch.allclose(PackedLinear(layer.weight, layer.bias, gelu=gelu)(x), expected, atol=1e-5)


@pytest.mark.usefixtures("packing")
@torch.no_grad()
def test_a_packed_layer_gives_the_same_within_a_callers_autocast() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 96), torch.randn(40), torch.randn(7, 96).bfloat16()
    packed = PackedLinear(weight, bias)
    expected = packed(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), expected)


@pytest.mark.skipif(not HALF, reason="needs a processor with AVX-512")
@torch.no_grad()
def test_a_packed_layer_in_bfloat16_gives_the_same() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 40).bfloat16(), torch.randn(2, 70, 96).bfloat16() * 3
    found = PackedLinear(layer.weight, layer.bias, gelu=True)(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), F.gelu(layer.float()(x.float()), approximate="tanh"), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("processor", "packed"), [("DEFAULT", []), ("AVX2", ["float32"]), ("AVX512", ["float32", "bfloat16"])])
def test_which_layers_are_packed(processor: str, packed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    monkeypatch.setattr(linear, "_packing_works", lambda dtype: True)
    assert [name for name in ("float32", "bfloat16", "float16") if can_pack(torch.device("cpu"), getattr(torch, name))] == packed
    assert not can_pack(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("found", [AttributeError("no such operation"), RuntimeError("other arguments"), [torch.zeros(8, 8)]])
def test_layers_are_not_packed_by_a_torch_that_does_it_otherwise(found, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    linear._packing_works.cache_clear()
    with mock.patch.object(PackedLinear, "forward", side_effect=found):
        pipe = FlexVARPipeline(model).compile()  # the tokenizer alone
    linear._packing_works.cache_clear()
    assert not any(isinstance(module, PackedLinear) for module in pipe.transformer.modules())
    assert can_pack(torch.device("cpu"), torch.float32)


def test_bfloat16_is_not_packed_where_onednn_does_without() -> None:
    code = "import torch; from flexvar.linear import can_pack; print(can_pack(torch.device('cpu'), torch.bfloat16))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize("int8", [False, True])
def test_which_layers_of_a_model_are_packed(model: Model, int8: bool, packing: str) -> None:
    transformer = model.transformer
    if int8:
        to_int8(transformer)
    pack(transformer)
    plain = {name.split(".")[-1] for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert plain == {"code_projection", *({"modulation", "final_modulation", "head"} if packing == "AVX2" else ())}
    assert any(isinstance(module, Int8Linear) for module in transformer.modules()) == int8
    assert (transformer.dtype, transformer.device.type) == (torch.float32, "cpu")


def test_the_gelu_in_place_is_torchs() -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randn(130, 24) * 4, torch.tensor([[-1e30, -100.0, -0.0, 0.0, 100.0, 1e30] * 4])))
    expected = F.gelu(x, approximate="tanh")
    found = gelu_in_place(x)
    assert found is x
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_command_draws_with_them(model: Model, tmp_path: Path, capsys) -> None:
    save(model, tmp_path / "model")
    words = ["sample", "a", "--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "int8", "--compile"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    picture = Image.open(tmp_path / "out" / "a-seed0.png")
    assert picture.text["dtype"] == "int8"
