from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import editing, evaluation, precision, speed
from examples import bundle, demo, edit, evaluate, nearest
from omegaconf import OmegaConf
from PIL import Image

from flexvar import zoo
from flexvar.checkpoint import load, save
from flexvar.training.config import read_config
from flexvar.training.settings import TokenizerRun, TransformerRun

SHEETS = ("classes.png", "sizes.png", "steps.png", "scales.png")


@pytest.mark.slow
def test_demo_draws_four_sheets_and_says_where(tmp_path: Path, monkeypatch, capsys) -> None:
    for _ in range(2):  # works again when run twice
        monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "demo")])
        demo.main()
    printed = capsys.readouterr().out
    for name in SHEETS:
        assert str(tmp_path / "demo" / name) in printed
        pixels = np.asarray(Image.open(tmp_path / "demo" / name))
        assert pixels.std() > 10, name
    with Image.open(tmp_path / "demo" / "growing.webp") as film:
        assert film.n_frames > 4


@pytest.mark.slow
def test_the_edits_of_the_readme(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["edit", str(tmp_path / "edits.png"), "frog"])
    edit.main()
    assert np.asarray(Image.open(tmp_path / "edits.png")).std() > 10
    assert len(Path(edit.__file__).read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
def test_samples_beside_the_renderings_nearest_to_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nearest", str(tmp_path / "nearest.png"), "--count", "20"])
    nearest.main()
    assert np.asarray(Image.open(tmp_path / "nearest.png")).std() > 10
    scenes = torch.rand(6, 3, 8, 8) * 1.8 - 1
    positions, distances = nearest.nearest(scenes[[4, 1]] + 0.1, scenes)
    assert positions.tolist() == [4, 1]
    assert torch.all(distances <= 0.1 + 1e-6)


@pytest.mark.slow
def test_completed_pictures_keep_their_class_and_hide_their_seam(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["editing", "--quick", "--side", "64"])
    assert editing.main() == 0
    said = capsys.readouterr().out
    assert "as it is" in said
    assert said.rstrip().endswith("ok")


@pytest.mark.slow
def test_the_bundled_model_is_scored_beside_real_renderings(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FLEXVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path), "--per-class", "2", "--side", "64"])
    evaluate.main()
    real, drawn = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("unseen renderings", "drawn by the model"))
    assert real["fid"] < drawn["fid"]
    assert capsys.readouterr().out.count("NOT comparable with published scores") == 2


@pytest.mark.slow
def test_the_price_of_less_precision_is_small(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--pictures", "48", "--scenes", "24", "--side", "64"])
    assert precision.main() == 0
    exact, *others = (re.findall(r"(\d+\.\d)%", line)[:2] for line in capsys.readouterr().out.splitlines())
    assert exact == ["100.0", "100.0"]
    assert len(others) == 2
    assert all(95 < float(likeliest) < 100 and 88 < float(sampled) < 100 for likeliest, sampled in others)


@pytest.mark.slow
def test_the_timings_can_be_taken_again(monkeypatch, capsys) -> None:
    monkeypatch.setattr("flexvar.rates.SECONDS_A_RATE", 0.0)
    drawing = ["--depth", "1", "--height", "64", "--steps", "3", "--repeats", "1", "--target", "0"]
    for benchmark, words, expected in (
        (evaluation, ["--samples", "300", "--reference", "200", "--dimensions", "8", "--repeats", "1"], "precision and recall"),
        (speed, [*drawing, "--int8", "--compile"], "by FLOP alone reached"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--threads", "1"])
        with torch.no_grad():
            assert benchmark.main() == 0
        assert expected in capsys.readouterr().out


def test_the_bundled_model_keeps_its_promises() -> None:
    folder = zoo.bundled_folder("emoji")
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert sum(sizes) <= 24 * 2**20
    assert max(sizes) <= 16 * 2**20
    model = load(folder)
    assert len(model.class_names) >= 40
    assert {"about", "data", "licence", "machine", "tokenizer", "transformer"} <= model.provenance.keys()


def test_the_bundled_model_was_trained_as_the_configs_say() -> None:
    """By these and nothing else; where its runs lay is all that may differ."""
    provenance = load(zoo.bundled_folder("emoji")).provenance
    chains = {"tokenizer": ("tokenizer", "decoder"), "transformer": ("coarse", "transformer", "large")}
    runs = {}
    for part, names in chains.items():
        runs |= dict(zip(names, [*provenance[f"earlier runs of the {part}"], provenance[part]], strict=True))
    assert set(runs) == {path.stem for path in Path("configs/emoji").glob("*.yaml")}
    for name, run in runs.items():
        kind = TokenizerRun if name in chains["tokenizer"] else TransformerRun
        asked = OmegaConf.to_container(OmegaConf.structured(read_config(kind, f"configs/emoji/{name}.yaml")))
        assert run["trained"]["steps"] == asked["steps"]
        told = run["config"]
        for folder in ("run", "tokenizer", "init_from"):
            assert bool(told.pop(folder, "")) == bool(asked.pop(folder, ""))
        known = told.keys() & asked.keys()  # settings come and go; those that a run did not know are as they were then
        assert {name: told[name] for name in known} == {name: asked[name] for name in known}
        assert len(known) >= 20
    assert runs["coarse"]["config"]["finest"] == 8
    assert runs["decoder"]["config"]["learns"] == "decoder"


def test_bundling_takes_a_tokenizer_of_the_same_codes_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    model = load(zoo.bundled_folder("emoji"))
    painter, other = copy.deepcopy(model.tokenizer), copy.deepcopy(model.tokenizer)
    with torch.no_grad():
        painter.after_codes.weight += 0.25
        other.quantizer.codebook.neg_()
    began = {"trained": {"steps": 7}, "config": {"init_from": "emoji"}}
    for name, tokenizer in (("painter", painter), ("other", other)):
        save(dataclasses.replace(model, tokenizer=tokenizer, transformer=None, provenance={"tokenizer": began}), tmp_path / name)
    words = ["bundle", "emoji", str(tmp_path / "out"), "--tokenizer"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "painter")])
    bundle.main()
    made = load(tmp_path / "out")
    torch.testing.assert_close(made.tokenizer.after_codes.weight, painter.after_codes.weight, rtol=0.01, atol=0.001)
    assert made.provenance["tokenizer"] == began
    assert made.provenance["earlier runs of the tokenizer"] == bundle.runs_of("tokenizer", "emoji")
    assert made.provenance["transformer"] == model.provenance["transformer"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        bundle.main()
    assert "has other codes than emoji; name a tokenizer that began from its own with learns=decoder" in capsys.readouterr().err


def test_bundling_halves_the_weights(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bundle", str(zoo.bundled_folder("emoji")), str(tmp_path / "out")])
    bundle.main()
    again, model = load(tmp_path / "out"), load(zoo.bundled_folder("emoji"))
    assert again.class_names == model.class_names
    for name in ("tokenizer.safetensors", "transformer.safetensors"):
        files = (tmp_path / "out" / name, zoo.bundled_folder("emoji") / name)
        assert files[0].stat().st_size == pytest.approx(files[1].stat().st_size, abs=200)  # but for what stands at their head
