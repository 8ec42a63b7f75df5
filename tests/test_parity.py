"""Ours is the released model: its golden values, on weights that anyone can re-create."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexvar import Guidance, Sampling, Schedule, Tokenizer, Transformer, TransformerConfig, generate
from flexvar.official import WITHOUT_MEANING, to_released, tokenizer_from_released, transformer_from_released
from flexvar.position import initial_table, resample
from flexvar.sampling import candidates
from golden import weights


def error(ours: torch.Tensor | np.ndarray, golden: np.ndarray) -> float:
    """The error of the whole array over its 2-norm."""
    return float(np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(np.asarray(golden, np.float64)))


@pytest.mark.parametrize("name", ["square", "wide"])
def test_tokenizer(golden, golden_tokenizer: Tokenizer, name: str) -> None:
    image = torch.from_numpy(golden[f"vae_{name}_image"])
    features = golden_tokenizer.features(image)
    assert error(features, golden[f"vae_{name}_latent"]) < 1e-4
    (codes,) = golden_tokenizer.codes(features, [features.shape[-2:]])
    assert np.array_equal(codes, golden[f"vae_{name}_indices"])
    vectors = golden_tokenizer.quantizer.lookup(codes).permute(0, 3, 1, 2)
    assert error(vectors, golden[f"vae_{name}_quant"]) < 1e-4
    assert error(golden_tokenizer.decode(codes), golden[f"vae_{name}_recon"]) < 1e-4


def test_multi_scale_codes_inputs_and_teacher_forcing(golden, golden_tokenizer: Tokenizer, golden_transformer: Transformer) -> None:
    schedule = Schedule.square(golden["ms_schedule"].tolist())
    codes = golden_tokenizer.codes(golden_tokenizer.features(torch.from_numpy(golden["ms_image"]).float()), schedule)
    flat = torch.cat([scale.flatten(1) for scale in codes], 1)
    assert np.array_equal(flat, golden["ms_indices"])
    inputs = golden_tokenizer.inputs(codes, schedule)
    assert error(inputs, golden["ms_inputs"]) < 1e-4

    logits = golden_transformer(torch.from_numpy(golden["tf_label"]).long(), inputs, schedule)
    assert error(logits[0, golden["tf_rows"]], golden["tf_logits_rows"]) < 1e-4
    assert np.array_equal(logits.argmax(-1), golden["tf_argmax"])
    assert error(logits.double().logsumexp(-1), golden["tf_logsumexp"]) < 1e-4
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat.flatten())
    assert abs(loss.item() / golden["tf_loss"][0] - 1) < 1e-4


@pytest.mark.parametrize("name", ["10step", "6step", "13step", "constcfg", pytest.param("512", marks=pytest.mark.slow)])
def test_generation(golden, golden_tokenizer: Tokenizer, golden_transformer: Transformer, name: str) -> None:
    kind = "constant" if name == "constcfg" else "official-ramp"
    steps = list(
        generate(
            golden_tokenizer,
            golden_transformer,
            golden[f"gen_{name}_labels"].tolist(),
            golden[f"gen_{name}_schedule"].tolist(),
            guidance=Guidance(kind, float(golden[f"gen_{name}_cfg"][0])),
            sampling=Sampling(top_k=1),
        )
    )
    assert np.array_equal(torch.cat([step.codes.flatten(1) for step in steps], 1), golden[f"gen_{name}_indices"])
    image = steps[-1].images
    assert error(torch.nn.functional.avg_pool2d(image, 8), golden[f"gen_{name}_image"]) < 1e-4
    assert abs(image.double().std(correction=0).item() / golden[f"gen_{name}_image_std"][0] - 1) < 1e-3


def test_top_k_and_top_p(golden) -> None:
    logits = torch.from_numpy(golden["filter_logits"])
    names = [name for name in golden if name.startswith("filter_k")]
    assert len(names) == 6
    for name in names:
        top_k, top_p = name.removeprefix("filter_k").split("_p")
        probabilities, codes = candidates(logits, int(top_k), float(top_p))
        ours = torch.zeros_like(logits).scatter(-1, codes, probabilities)
        assert error(ours, golden[name]) < 1e-4, name
        assert np.array_equal(ours > 0, golden[name] > 0), name


def test_positions(golden) -> None:
    assert error(initial_table(192, 32)[:, ::5, ::7], golden["pos_init"]) < 1e-4
    table = weights.filled("pos_1LC", (1, 192, 32, 32))[0]
    for n in (1, 5, 13, 16, 32, 48):
        ours = resample(table, (n, n), "area").T.unflatten(1, (n, n))[:8]
        assert error(ours, golden[f"pos_area_{n}"]) < 1e-4, n


@pytest.mark.parametrize("depth", [16, 20, 24, 30])
def test_transformer_manifest(depth: int) -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(depth=depth))
    shapes = {name: tuple(tensor.shape) for name, tensor in to_released(model).items()}
    assert shapes == weights.manifest()[f"FlexVARd{depth}"]


def test_tokenizer_manifest_and_parameter_counts() -> None:
    from flexvar import TokenizerConfig

    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
        counts = [sum(p.numel() for p in Transformer(TransformerConfig(depth=depth)).parameters()) for depth in (16, 20, 24, 30)]
    assert {name: tuple(tensor.shape) for name, tensor in to_released(tokenizer).items()} == weights.manifest()["FlexVAE"]
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 2) == 72.05
    # The published counts hold the zeros of `zero_k_bias`, width x depth of them; ours leave them out.
    zeros = [64 * depth * depth for depth in (16, 20, 24, 30)]
    assert [round((count + zero) / 1e6, 1) for count, zero in zip(counts, zeros, strict=True)] == [315.6, 607.5, 1041.4, 2020.0]


@pytest.mark.parametrize("depth", [2, 4])
def test_there_and_back_is_the_same(depth: int) -> None:
    released = weights.transformer_tensors(depth, salt="other")
    read = {name: tensor for name, tensor in released.items() if not WITHOUT_MEANING.search(name)}
    back = to_released(transformer_from_released(read))
    assert back.keys() == {*released, "attn_bias_for_masking"}
    assert all(torch.equal(back[name], released[name]) for name in released)
    mask = back["attn_bias_for_masking"]
    assert mask.shape == (1, 1, 680, 680)
    assert mask[0, 0, 0, 1] == -torch.inf
    assert mask[0, 0, 679].sum() == 0


def test_tokenizer_there_and_back() -> None:
    released = weights.tokenizer_tensors(salt="other")
    back = to_released(tokenizer_from_released({name: t for name, t in released.items() if not WITHOUT_MEANING.search(name)}))
    assert back.keys() == released.keys()
    assert all(torch.equal(back[name], released[name]) for name in released)
