"""A run's folder: one run at a time, on data that is what it was, and a log that any reader of JSON takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.training import run_folder
from flexvar.training.pictures import open_source
from flexvar.training.run_folder import RunFolder
from flexvar.training.settings import DataConfig
from flexvar.training.transformer import TransformerWorkshop
from training_runs import newest_state, tokenizer_config, transformer_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert main(["train", "tokenizer", str(tokenizer_config(folder))]) == 0
    return folder / "tokenizer" / "model"


def pictures(folder: Path, *classes: str, count: int = 2) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng((len(name), i)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_one_run_at_a_time(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.3)
    config = tokenizer_config(tmp_path)
    with RunFolder(tmp_path / "tokenizer", 2).alone():
        assert main(["train", "tokenizer", str(config)]) == 2
        assert "another training is writing into" in capsys.readouterr().err
        assert list((tmp_path / "tokenizer").iterdir()) == []
    assert main(["train", "tokenizer", str(config)]) == 0


def test_a_run_goes_on_with_the_classes_that_it_had(tokenizer: Path, tmp_path: Path, capsys) -> None:
    data = pictures(tmp_path / "data", "ant", "cat")
    words = ["train", "transformer", str(transformer_config(tmp_path, tokenizer)), "data.kind=folder", f"data.path={data}"]
    assert main([*words, "steps=2"]) == 0
    (data / "ant").rename(data / "bee")
    assert main(words) == 2
    assert "class 0 of" in (error := capsys.readouterr().err)
    assert "was 'ant', and is 'bee' in the data; give it the data that it had, or another run= folder with init_from=" in error
    (data / "bee").rename(data / "ant")
    pictures(data, "dog")
    assert main(words) == 2
    assert "class 2 of" in (error := capsys.readouterr().err)
    assert "was 'no class', and is 'dog' in the data" in error
    for path in (data / "dog").iterdir():
        path.unlink()
    (data / "dog").rmdir()
    pictures(data, "ant", count=3)
    assert main(words) == 0
    assert "the data holds 5 pictures, not 4 as before" in capsys.readouterr().out
    assert newest_state(tmp_path / "transformer")["pictures"] == 5


def test_a_finished_model_knows_other_names(tokenizer: Path, tmp_path: Path, capsys) -> None:
    data = pictures(tmp_path / "data", "n01440764", "n01443537")
    words = ["data.kind=folder", f"data.path={data}", "steps=2"]
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), *words]) == 0
    model = load(tmp_path / "transformer" / "model")
    assert (model.class_names, dict(model.aliases)) == (("tench", "goldfish"), {"n01440764": "tench", "n01443537": "goldfish"})


@pytest.mark.parametrize("dear", ["model", "best", "log.jsonl", "config.yaml"])
def test_what_is_no_run_is_left_alone(dear: str, tmp_path: Path, capsys) -> None:
    """Models of others, runs whose checkpoints were removed, and the config itself."""
    config = tokenizer_config(tmp_path, 1)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / dear).write_text("dear")
    assert main(["train", "tokenizer", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'tokenizer' / dear} is there, but no checkpoints to go on from; choose another run= folder" in error
    assert [path.name for path in (tmp_path / "tokenizer").iterdir()] == [dear]


def test_a_run_whose_checkpoints_were_removed_is_left_alone(tmp_path: Path, capsys) -> None:
    """One that was killed before its first checkpoint has an empty folder of them too, but a shorter log."""
    config = tokenizer_config(tmp_path)
    assert main(["train", "tokenizer", str(config)]) == 0
    for path in (tmp_path / "tokenizer" / "checkpoints").iterdir():
        path.unlink()
    before = (tmp_path / "tokenizer" / "model" / "config.json").read_bytes()
    assert main(["train", "tokenizer", str(config)]) == 2
    assert "but no checkpoints to go on from" in capsys.readouterr().err
    assert (tmp_path / "tokenizer" / "model" / "config.json").read_bytes() == before
    assert main(["train", "tokenizer", str(config), "save_every=4", "steps=5"]) == 0  # as if killed at the first one, of step 4


def test_the_log_of_a_finished_run_is_made_whole(tmp_path: Path) -> None:
    config = tokenizer_config(tmp_path, 2)
    assert main(["train", "tokenizer", str(config)]) == 0
    log = tmp_path / "tokenizer" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 2, "scores": {"fi')
    folder = RunFolder(tmp_path / "tokenizer", 2)
    assert not folder.has("scores", 2)
    assert main(["train", "tokenizer", str(config)]) == 0
    assert log.read_text() == whole


def test_a_run_of_another_kind_of_network_is_told(tokenizer: Path, tmp_path: Path, capsys) -> None:
    run = tokenizer.parent
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), f"run={run}"]) == 2
    assert f"{run} is a run of another kind of network; choose another run= folder" in capsys.readouterr().err


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 2)
    folder.report({"step": 1, "loss": math.nan, "measured": {"psnr": math.inf, "l1": 0.5}})
    assert json.loads(folder.log.read_text()) == {"step": 1, "loss": None, "measured": {"psnr": None, "l1": 0.5}}


def test_checkpoints_are_sorted_by_their_steps(tmp_path: Path) -> None:
    """Not by the digits of their names, which have seven for as long as they can."""
    folder = RunFolder(tmp_path, keep=2)
    folder.checkpoints.mkdir()
    for step in (9_999_000, 10_000_000, 10_000_500):
        folder.write_checkpoint(step, {"step": step}, None)
    assert folder.read(folder.newest())["step"] == 10_000_500
    assert len(list(folder.checkpoints.iterdir())) == 2
    assert (folder.checkpoints / "step-10000000.pt").exists()


def test_a_sheet_that_cannot_be_drawn_costs_nothing_else(tokenizer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """It is no full disk either; the same command finds the run finished."""

    def sheet(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformerWorkshop, "sheet", sheet)
    config = str(transformer_config(tmp_path, tokenizer))
    assert main(["train", "transformer", config, "sheet_every=100"]) == 2
    error = capsys.readouterr().err
    assert "not enough memory for 4 pictures in accumulate=1 parts: take more, smaller sizes" in error
    assert "make room" not in error
    assert newest_state(tmp_path / "transformer")["step"] == 4
    assert main(["train", "transformer", config, "sheet_every=100"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 2)
    folder.log.mkdir()
    with pytest.raises(OSError, match=r"log\.jsonl could not be written \(Is a directory\); make room, and the same command goes on"):
        folder.report({"step": 1})


def test_more_steps_do_not_bring_features_back_in_the_place_of_codes(tmp_path: Path, capsys) -> None:
    words = ["train", "tokenizer", str(tokenizer_config(tmp_path)), "continuous=0.5"]
    assert main(words) == 0
    assert main([*words, "steps=20", "save_every=20"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "tokenizer" / "log.jsonl").read_text().splitlines()]
    decoded_codes = {line["step"]: line["commitment"] > 0 for line in lines if "commitment" in line}
    assert decoded_codes == {step: step > 2 for step in range(1, 21)}


def test_a_held_out_folder_of_features_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data\.held_out is .*, which is no feature cache as data\.path is; .* or set data\.held_out="
    ):
        open_source(DataConfig(kind="features", path="cache", held_out=str(tmp_path)), 0, held_out=True)


@pytest.mark.parametrize(
    ("word", "complaint"), [("tokenizer=nowhere", "nowhere"), ("sizes=[[30,30]]", "sizes holds [30, 30]: height 30 is not")]
)
def test_a_refused_run_leaves_no_folder(word: str, complaint: str, tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), word]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "transformer").exists()
