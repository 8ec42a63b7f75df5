from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch

from flexvar import FlexVARPipeline, TokenizerConfig, TransformerConfig, zoo
from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.official import read_released, released_name, tokenizer_from_released, transformer_from_released, warn_of_differences
from golden import weights


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder with the golden tokenizer and a transformer of depth 2, as the released files lay them out."""
    folder = tmp_path_factory.mktemp("released")
    torch.save({"model": weights.tokenizer_tensors()}, folder / "FlexVAE.pth")
    tensors = weights.transformer_tensors(2)
    torch.save(tensors | {"attn_bias_for_masking": torch.zeros(1, 1, 591, 591)}, folder / "bare.pth")
    torch.save({"trainer": {"var_wo_ddp": tensors}, "args": {"depth": 2}, "epoch": 3}, folder / "nested.pth")
    return folder


def test_both_layouts_and_any_mask(released: Path) -> None:
    bare, nested = read_released(released / "bare.pth"), read_released(released / "nested.pth")
    assert bare.keys() == nested.keys()
    assert not any("mask" in name or "zero_k" in name for name in bare)
    assert transformer_from_released(bare).config.depth == 2


def test_convert_and_back(released: Path, tmp_path: Path, capsys) -> None:
    files = ["--tokenizer", str(released / "FlexVAE.pth"), "--transformer", str(released / "nested.pth")]
    assert main(["convert", *files, str(tmp_path / "model")]) == 0
    pipe = FlexVARPipeline.from_pretrained(tmp_path / "model")
    assert pipe.class_names[0] == "tench"
    assert pipe.labels_of(["tench", "n01440764", "n15075141"]) == [0, 0, 999]
    assert (pipe.defaults.height, pipe.defaults.guidance.kind, pipe.defaults.sampling.greedy) == (256, "official-ramp", "official")
    assert (pipe.defaults.sampling.top_k, pipe.defaults.sampling.top_p, pipe.transformer.config.positions) == (900, 0.95, "area")
    assert main(["convert", *files, str(tmp_path / "model")]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main(["convert", *files, "--back", "emoji", str(tmp_path / "back")]) == 2
    assert "leave out --tokenizer and --transformer" in capsys.readouterr().err

    assert main(["convert", "--back", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    tokenizer = torch.load(tmp_path / "back" / "FlexVAE.pth", weights_only=True)["model"]
    transformer = torch.load(tmp_path / "back" / "FlexVARd2.pth", weights_only=True)
    expected = weights.transformer_tensors(2)
    assert transformer.keys() == {*expected, "attn_bias_for_masking"}
    assert all(torch.equal(transformer[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(tokenizer[name], tensor) for name, tensor in weights.tokenizer_tensors().items())


def test_what_goes_back_is_float32_whatever_the_model_computes_in(released: Path, tmp_path: Path) -> None:
    pipe = FlexVARPipeline.from_released(released / "FlexVAE.pth", released / "bare.pth").to(torch.bfloat16)
    tokenizer, transformer = pipe.save_released(tmp_path)
    for path, module in ((tokenizer, pipe.tokenizer), (transformer, pipe.transformer)):
        tensors = torch.load(path, weights_only=True)
        tensors = tensors.get("model", tensors)
        assert {(tensor.dtype, tensor.device.type) for tensor in tensors.values()} == {(torch.float32, "cpu")}
        assert all(torch.equal(tensors[released_name(name)].flatten(), own.float().flatten()) for name, own in module.state_dict().items())


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "words"),
    [
        ({"multipliers": (1, 1, 2, 4)}, {}, "multipliers is (1, 1, 2, 4) instead of (1, 1, 2, 2, 4)"),
        ({"channels": 64, "norm_groups": 16}, {}, "channels is 64 instead of 128, norm_groups is 16 instead of 32"),
        ({}, {"width": 256}, "width is 256 instead of 192, heads is 4 instead of 3"),
        ({}, {"mlp_ratio": 2.0}, "mlp_ratio is 2.0 instead of 4.0"),
        ({}, {"table_side": 16}, "table_side is 16 instead of 32"),
        ({"code_width": 8}, {"code_width": 8}, "code_width is 8 instead of 32"),
    ],
)
def test_what_the_released_code_builds_otherwise_goes_back_with_a_word(tokenizer: dict, transformer: dict, words: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        warn_of_differences(TokenizerConfig(**tokenizer), TransformerConfig(3, **transformer))
    assert "\n" not in str(caught[0].message)


def test_what_the_released_code_can_be_told_goes_back() -> None:
    told = {"classes": 7, "codebook_size": 99, "shared_modulation": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_differences(TokenizerConfig(codebook_size=99), TransformerConfig(5, **told))
    with pytest.warns(UserWarning, match="by area only: above 512 px it draws otherwise"):
        warn_of_differences(TokenizerConfig(), TransformerConfig(5, positions="smooth"))


def test_a_model_of_another_shape_goes_back_with_a_word(tmp_path: Path, capsys) -> None:
    assert main(["convert", "--back", "emoji", str(tmp_path / "back")]) == 0
    assert "the released code builds models of its own shape: " in (said := capsys.readouterr().err)
    assert said.count("\n") == 2  # and that it knows positions by area only
    model = load(zoo.bundled_folder("emoji"))
    for ours, path in ((model.tokenizer, "FlexVAE.pth"), (model.transformer, "FlexVARd6.pth")):
        tensors = torch.load(tmp_path / "back" / path, weights_only=True)
        tensors = tensors.get("model", tensors)
        assert all(torch.equal(tensors[released_name(name)].flatten(), tensor.flatten()) for name, tensor in ours.state_dict().items())


def test_a_released_name_is_fetched_converted_once_and_kept(released: Path, tmp_path: Path, monkeypatch) -> None:
    asked, hub = [], tmp_path / "hub"
    hub.mkdir()
    files = {"tokenizer": hub / "FlexVAE.pth", "transformer": hub / "FlexVARd16-epo179.pth"}
    for path, source in zip(files.values(), ("FlexVAE.pth", "bare.pth"), strict=True):
        shutil.copy(released / source, path)

    def stand_in(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, *allow_patterns))
        time.sleep(0.1)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    monkeypatch.setenv("FLEXVAR_CACHE", str(tmp_path))
    with ThreadPoolExecutor() as several:  # as processes of one evaluation do
        for pipe in several.map(FlexVARPipeline.from_pretrained, ["flexvar-d16"] * 3):
            assert pipe.transformer.config.depth == 2
    assert FlexVARPipeline.from_pretrained("flexvar-d16").transformer.config.depth == 2
    assert asked == [("jiaosiyu1999/FlexVAR", "FlexVAE.pth", "FlexVARd16-epo179.pth")]
    seen = json.loads((tmp_path / "flexvar-d16" / "config.json").read_text())["provenance"]["converted from"]
    with pytest.raises(ValueError, match=r"jiaosiyu1999/FlexVAR gave no FlexVARd20-epo249\.pth"):
        FlexVARPipeline.from_pretrained("flexvar-d20")
    assert seen == {part: {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for part, file in files.items()}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder in which not even root can make a file")
def test_a_cache_folder_that_takes_no_files_is_told(monkeypatch) -> None:
    monkeypatch.setenv("FLEXVAR_CACHE", "/proc")
    with pytest.raises(OSError, match=r"the cache folder /proc takes no files \(.*\); name another in FLEXVAR_CACHE"):
        FlexVARPipeline.from_pretrained("flexvar-d16")


def test_a_fetched_file_is_compared_with_what_is_known(tmp_path: Path, monkeypatch) -> None:
    def stand_in(repository: str, allow_patterns: list[str]) -> str:
        for file in allow_patterns:
            (tmp_path / file).write_bytes(file.encode())
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    names = zoo.RELEASED_TOKENIZER, zoo.RELEASED["flexvar-d20"].file
    for file in names:
        monkeypatch.setitem(zoo.SHA256, file, hashlib.sha256(file.encode()).hexdigest())
    assert zoo.fetch_released("flexvar-d20") == tuple(tmp_path / file for file in names)
    monkeypatch.setitem(zoo.SHA256, names[1], "0" * 64)
    with pytest.raises(ValueError, match=f"{names[1]} has sha256 .* instead of 0000.*; delete it") as caught:
        zoo.fetch_released("flexvar-d20")
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (Path("evil-was-here").touch, ())


def truncated(folder: Path) -> Path:
    path = folder / "short.pth"
    torch.save(weights.transformer_tensors(2), path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def malicious(folder: Path) -> Path:
    path = folder / "evil.pth"
    path.write_bytes(pickle.dumps({"model": Evil()}))
    return path


def malicious_zip(folder: Path) -> Path:
    path = folder / "evil-zip.pth"
    torch.save({"model": Evil()}, path)
    return path


def without_tensors(folder: Path) -> Path:
    path = folder / "numbers.pth"
    torch.save({"model": {"a": 1}}, path)
    return path


def sparse(folder: Path) -> Path:
    path = folder / "sparse.pth"
    torch.save({"a.weight": torch.eye(3).to_sparse()}, path)
    return path


def text(folder: Path) -> Path:
    path = folder / "page.pth"
    path.write_text("<html>404</html>")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "is damaged or not a torch file"),
        (malicious, "holds more than tensors"),
        (malicious_zip, "holds more than tensors"),
        (without_tensors, "holds no table of plain tensors"),
        (sparse, "holds no table of plain tensors"),
        (text, "not a torch file"),
        (lambda folder: folder / "nowhere.pth", "there is no file"),
    ],
)
def test_bad_files_are_refused_in_one_line(make: Callable[[Path], Path], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        read_released(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not Path("evil-was-here").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_no_damage_gives_anything_but_one_line(zipped: bool, tmp_path: Path) -> None:
    path, rng = tmp_path / "damaged.pth", Random(0)
    torch.save({"model": {"a.weight": torch.ones(3, 4), "b": torch.ones(5)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    refused = []
    for _ in range(300):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 9)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_released(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(path) in line and "\n" not in line for line in refused)


def released_transformer() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.transformer_tensors(2).items() if "zero_k" not in name}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.weight", (8912,)),
        ("head.weight", (0, 128)),
        ("head.weight", (8912, 127)),
        ("pos_1LC", (1, 680, 128)),
        ("pos_1LC", (1, 128, 1, 1)),
        ("pos_1LC", ()),
        ("blocks.0.attn.scale_mul_1H11", (2,)),
        ("blocks.0.attn.scale_mul_1H11", (1, 0, 1, 1)),
        ("blocks.0.attn.scale_mul_1H11", (1, 3, 1, 1)),
        ("blocks.1.attn.scale_mul_1H11", (1, 3, 1, 1)),
        ("blocks.0.ffn.fc1.weight", (512,)),
        ("blocks.0.ffn.fc1.weight", (0, 128)),
        ("class_emb.weight", (0, 128)),
        ("class_emb.weight", (1, 128)),
        ("class_emb.weight", ()),
        ("word_embed.weight", (128,)),
        ("word_embed.weight", (128, 0)),
    ],
)
def test_a_misshapen_tensor_of_the_transformer_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        transformer_from_released(released_transformer() | {name: torch.zeros(shape)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (128,)),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("encoder.conv_out.weight", (256, 512)),
        ("encoder.conv_out.weight", (0, 512, 3, 3)),
        ("encoder.conv_blocks.1.res.0.conv2.weight", (13, 13, 3, 3)),
        ("encoder.conv_blocks.1.res.0.conv2.weight", (0, 16, 3, 3)),
        ("encoder.conv_blocks.1.res.0.conv2.weight", ()),
        ("quantize.embedding.weight", (8912,)),
        ("quantize.embedding.weight", (0, 32)),
    ],
)
def test_a_misshapen_tensor_of_the_tokenizer_is_named(name: str, shape: tuple[int, ...], released: Path) -> None:
    tensors = read_released(released / "FlexVAE.pth")
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        tokenizer_from_released(tensors | {name: torch.zeros(shape)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "without", ["encoder.conv_blocks.", "encoder.conv_blocks.0.", "encoder.conv_in.weight", "quantize.embedding.weight"]
)
def test_a_missing_tensor_of_the_tokenizer_is_named(without: str, released: Path) -> None:
    tensors = {name: tensor for name, tensor in read_released(released / "FlexVAE.pth").items() if not name.startswith(without)}
    with pytest.raises(ValueError, match=re.escape(without) + r"\S* is missing"):
        tokenizer_from_released(tensors)


@pytest.mark.parametrize("without", ["blocks.", "blocks.0.", "head.weight", "class_emb.weight", "pos_1LC", "word_embed.weight"])
def test_a_missing_tensor_of_the_transformer_is_named(without: str) -> None:
    tensors = {name: tensor for name, tensor in released_transformer().items() if not name.startswith(without)}
    with pytest.raises(ValueError, match=re.escape(without) + r"\S* is missing"):
        transformer_from_released(tensors)


def test_what_does_not_fit_is_named() -> None:
    tensors = released_transformer()
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.fc2\.bias is missing"):
        transformer_from_released({name: tensor for name, tensor in tensors.items() if name != "blocks.1.ffn.fc2.bias"})
    with pytest.raises(ValueError, match="lvl_embed is not a tensor of this model"):
        transformer_from_released(tensors | {"lvl_embed": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"pos_start has shape \(1, 1, 64\) instead of \(1, 1, 128\)"):
        transformer_from_released(tensors | {"pos_start": torch.zeros(1, 1, 64)})


def test_the_wrong_file_for_the_job(released: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer's file given for the transformer's"):
        FlexVARPipeline.from_released(released / "bare.pth", released / "FlexVAE.pth")
