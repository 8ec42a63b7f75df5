from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexvar import Guidance, Sampling, Tokenizer, Transformer
from flexvar.checkpoint import Defaults, Model, load, load_configs, save


@pytest.fixture
def model(small_tokenizer: Tokenizer, small_transformer: Transformer) -> Model:
    defaults = Defaults(16, 24, 5, Guidance("ramp", 1.5), Sampling(7, 0.5, 0.9, (3, (4, 6))))
    return Model(small_tokenizer, small_transformer, ("a", "b", "c", "d", "é"), defaults, {"trained": {"steps": 3}})


def test_there_and_back(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1  # others may read the weights too
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "tokenizer.safetensors",
        "transformer.safetensors",
    ]
    assert (again.class_names, again.defaults, again.provenance) == (model.class_names, model.defaults, model.provenance)
    for ours, theirs in ((model.tokenizer, again.tokenizer), (model.transformer, again.transformer)):
        assert ours is not None
        assert theirs is not None
        assert ours.config == theirs.config
        assert not theirs.training
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert load_configs(tmp_path / "model") == (model.tokenizer.config, model.transformer.config)


def test_bfloat16_on_disk_is_float32_when_loaded(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "tokenizer.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load(tmp_path).tokenizer.state_dict().values()} == {torch.float32}


def test_a_tokenizer_alone(model: Model, tmp_path: Path) -> None:
    save(Model(model.tokenizer), tmp_path)
    assert load(tmp_path).transformer is None
    with pytest.raises(ValueError, match="tokenizer only"):
        load_configs(tmp_path)


def test_nothing_is_overwritten_unasked(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    with pytest.raises(FileExistsError, match="holds a model already"):
        save(model, tmp_path)
    save(model, tmp_path, overwrite=True)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": 1, "tok')


def newer_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))


def unknown_setting(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformer"]["dept"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def truncate_weights(folder: Path) -> None:
    path = folder / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def remove_weights(folder: Path) -> None:
    (folder / "tokenizer.safetensors").unlink()


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "transformer.safetensors")
    tensors["stray"] = tensors.pop("start")
    save_file(tensors, folder / "transformer.safetensors")


def misshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "transformer.safetensors")
    tensors["head.bias"] = tensors["head.bias"][:-1].clone()
    save_file(tensors, folder / "transformer.safetensors")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage_config, ["config.json cannot be read"]),
        (newer_format, ["format 99", "update flexvar"]),
        (unknown_setting, ["dept"]),
        (truncate_weights, ["transformer.safetensors is damaged"]),
        (remove_weights, ["tokenizer.safetensors is missing"]),
        (rename_tensor, ["start is missing", "stray is not a tensor of this model"]),
        (misshape_tensor, ["head.bias has shape (47,) instead of (48,)"]),
    ],
)
def test_damage_is_named_in_one_line(model: Model, tmp_path: Path, harm, words: list[str]) -> None:
    save(model, tmp_path)
    harm(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        load(tmp_path)
