from __future__ import annotations

import copy
import dataclasses
import errno
import json
import shutil
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flexvar import Guidance, Sampling, Tokenizer, Transformer, writing
from flexvar.checkpoint import Defaults, Model, load, load_empty, save
from flexvar.compiled import compiled
from flexvar.linear import to_int8


@pytest.fixture
def model(small_tokenizer: Tokenizer, small_transformer: Transformer) -> Model:
    defaults = Defaults(16, 24, 5, Guidance("ramp", 1.5), Sampling(7, 0.5, 0.9, (3, (4, 6))))
    return Model(small_tokenizer, small_transformer, ("a", "b", "c", "d", "é"), defaults, {"trained": {"steps": 3}}, {"e": "é"})


def test_there_and_back(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1  # others may read the weights too
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "tokenizer.safetensors",
        "transformer.safetensors",
    ]
    for name in ("class_names", "defaults", "provenance", "aliases"):
        assert getattr(again, name) == getattr(model, name)
    for ours, theirs in ((model.tokenizer, again.tokenizer), (model.transformer, again.transformer)):
        assert ours is not None
        assert theirs is not None
        assert ours.config == theirs.config
        assert not theirs.training
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    empty = load_empty(tmp_path / "model")
    assert (empty.tokenizer.config, empty.defaults, empty.class_names) == (model.tokenizer.config, model.defaults, model.class_names)
    assert {parameter.device.type for parameter in empty.transformer.parameters()} == {"meta"}


def test_bfloat16_on_disk_is_float32_when_loaded(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "tokenizer.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load(tmp_path).tokenizer.state_dict().values()} == {torch.float32}


def test_a_tokenizer_alone(model: Model, tmp_path: Path) -> None:
    save(Model(model.tokenizer), tmp_path)
    assert load(tmp_path).transformer is None


def test_a_tokenizer_in_the_place_of_a_model_leaves_nothing_of_it(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    save(Model(model.tokenizer), tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.safetensors"]
    assert load(tmp_path).transformer is None


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_save_that_fails_half_way_leaves_the_old_model(model: Model, tmp_path: Path, monkeypatch, whole: int) -> None:
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    filled = []

    def full(beside: Path, *rest: Any) -> None:
        filled.append(beside)
        if len(filled) > whole:
            raise OSError(errno.ENOSPC, "No space left on device")
        fill(beside, *rest)

    fill = writing._fill
    monkeypatch.setattr(writing, "_fill", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("new", ["config.json", "tokenizer.safetensors", "transformer.safetensors"])
def test_files_of_two_models_are_not_taken_for_one(model: Model, tmp_path: Path, new: str) -> None:
    save(model, tmp_path / "old")
    save(dataclasses.replace(model, tokenizer=changed(model.tokenizer), transformer=changed(model.transformer)), tmp_path / "new")
    shutil.copy(tmp_path / "new" / new, tmp_path / "old")
    with pytest.raises(ValueError, match=r"\.safetensors: this is not the file that was saved with config\.json; .* as a whole$"):
        load(tmp_path / "old")


def changed(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    return network


def test_the_same_weights_are_the_same_file(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "whole")
    save(Model(model.tokenizer), tmp_path / "alone")
    assert (tmp_path / "whole" / "tokenizer.safetensors").read_bytes() == (tmp_path / "alone" / "tokenizer.safetensors").read_bytes()


def test_a_save_over_a_folder_without_digests_that_was_killed_is_noticed(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "new")
    save(model, tmp_path / "old")
    for name in ("tokenizer", "transformer"):
        path = tmp_path / "old" / f"{name}.safetensors"
        save_file(load_file(path), path)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["digests"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    load(tmp_path / "old")
    shutil.copy(tmp_path / "new" / "tokenizer.safetensors", tmp_path / "old")
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors: this is not the file"):
        load(tmp_path / "old")


def test_a_file_where_the_folder_should_be(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear to someone")
    with pytest.raises(OSError, match=r"the folder .*file could not be made \(File exists\); choose another"):
        save(model, tmp_path / "file")


def test_nothing_is_overwritten_unasked(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    with pytest.raises(FileExistsError, match="holds a model already"):
        save(model, tmp_path)
    save(model, tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.safetensors", "transformer.safetensors"])
def test_not_even_one_file_of_a_model_is_overwritten_unasked(model: Model, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("dear to someone")
    with pytest.raises(FileExistsError, match=name):
        save(Model(model.tokenizer), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["dear to someone"]


def test_parts_that_do_not_belong_together_are_not_written(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_names holds 2 names for 5 classes"):
        save(dataclasses.replace(model, class_names=("a", "b")), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save(dataclasses.replace(model, class_names=(), aliases={}), tmp_path / "model")
    assert load(tmp_path / "model").class_names == ()


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("make_faster", [lambda tokenizer, transformer: to_int8(transformer), compiled])
def test_a_model_made_faster_does_not_take_the_place_of_a_good_one(model: Model, tmp_path: Path, make_faster) -> None:
    save(model, tmp_path)
    faster = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer), transformer=copy.deepcopy(model.transformer))
    make_faster(faster.tokenizer, faster.transformer)
    with pytest.raises(ValueError, match=r"made faster \(.*\) stays where it is and is not saved; load it again from its folder$"):
        save(faster, tmp_path, overwrite=True)
    assert load(tmp_path).transformer is not None
    save(Model(faster.tokenizer), tmp_path / "tokenizer")
    saved, before = (load(folder).tokenizer.state_dict() for folder in (tmp_path / "tokenizer", tmp_path))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)


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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", None, "TypeError"),
        ("format", "1", "TypeError"),
        ("tokenizer", None, "AttributeError"),
        ("tokenizer.channels", -1, "channels of the tokenizer is -1; it must be a whole number of at least 1"),
        ("tokenizer.channels", True, "channels of the tokenizer is True"),
        ("tokenizer.blocks", 1.5, "blocks of the tokenizer is 1.5"),
        ("tokenizer.z_channels", "16", "z_channels of the tokenizer is '16'"),
        ("tokenizer.norm_groups", 0, "norm_groups of the tokenizer is 0"),
        ("tokenizer.codebook_size", 0, "codebook_size of the tokenizer is 0"),
        ("tokenizer.codebook_size", 47, "codebook_size is 47 for the tokenizer and 48 for the transformer"),
        ("tokenizer.code_width", None, "code_width of the tokenizer is None"),
        ("tokenizer.code_width", 4, "code_width is 4 for the tokenizer and 8 for the transformer"),
        ("tokenizer.multipliers", [], "multipliers of the tokenizer are ()"),
        ("tokenizer.multipliers", [1, 0], "multipliers of the tokenizer are (1, 0)"),
        ("tokenizer.multipliers", 2, "multipliers of the tokenizer are 2"),
        ("transformer", [], "AttributeError"),
        ("transformer.depth", "2", "depth of the transformer is '2'"),
        ("transformer.width", -32, "width of the transformer is -32"),
        ("transformer.width", 33, "width 33 cannot be shared among 2 heads"),
        ("transformer.heads", -2, "heads of the transformer is -2; it must be a whole number of at least 0"),
        ("transformer.table_side", 1.0, "table_side of the transformer is 1.0"),
        ("transformer.trained_grid", 0, "trained_grid of the transformer is 0"),
        ("transformer.classes", 0, "classes of the transformer is 0"),
        ("transformer.classes", 4, "class_names holds 5 names for 4 classes"),
        ("transformer.mlp_ratio", "4", "mlp_ratio of the transformer is '4'"),
        ("transformer.mlp_ratio", 0, "mlp_ratio of the transformer is 0"),
        ("transformer.positions", "round", "positions of the transformer is 'round'; there are area, smooth"),
        ("transformer.shared_modulation", 1, "shared_modulation of the transformer is 1"),
        ("class_names", None, "class_names is not a list"),
        ("class_names", ["a", 2], "class_names is not a list"),
        ("provenance", None, "provenance is not a table"),
        ("aliases", ["e"], "aliases is not a table"),
        ("aliases", {"e": "f"}, "aliases has 'e' for the class 'f', which does not exist"),
        ("defaults", None, "TypeError"),
        ("defaults.height", "64", "height of the defaults is '64'"),
        ("defaults.width", 0, "width of the defaults is 0"),
        ("defaults.num_inference_steps", 2.5, "num_inference_steps of the defaults is 2.5"),
        ("defaults.depth", 3, "depth"),
        ("defaults.guidance", None, "AttributeError"),
        ("defaults.guidance.kind", "slope", "slope"),
        ("defaults.sampling.top_p", 2, "top_p"),
        ("defaults.sampling.top_k", "7", "top_k|TypeError"),
    ],
)
def test_a_wrong_value_in_config_json_is_named_with_the_file(model: Model, tmp_path: Path, key: str, value: Any, words: str) -> None:
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    *outer, last = key.split(".")
    reduce(getitem, outer, config)[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load(tmp_path)
    assert any(word in str(caught.value) for word in words.split("|"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["format", "tokenizer", "transformer", "class_names", "defaults", "provenance"])
def test_a_key_that_config_json_lacks_is_named(model: Model, tmp_path: Path, key: str) -> None:
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json lacks '{key}'; write the folder again"):
        load(tmp_path)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        load(tmp_path)


def test_a_folder_from_before_there_were_aliases(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["aliases"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).aliases == {}
