"""Evaluation as a user runs it: models, pictures of others, references and sweeps, with good input and bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexvar import FlexVARPipeline, Guidance, Sampling, Tokenizer, Transformer
from flexvar.checkpoint import Defaults, Model, save
from flexvar.cli import main
from flexvar.data import Shapes, write_pictures
from flexvar.evaluation import DrawnPictures, evaluate, extraction, load_extractor, metrics, open_pictures, scores, stored, sweep
from flexvar.evaluation import npz as npz_files
from flexvar.evaluation.extraction import FeatureStore, extract, joined
from flexvar.evaluation.references import read_reference, write_reference
from flexvar.evaluation.scores import caveats
from flexvar.evaluation.sweep import Trial, best
from flexvar.zoo import sha256

CLASSES = ("pizza", "cat face", "a/b", "d", "e")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FLEXVAR_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, small_transformer: Transformer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    save(Model(small_tokenizer, small_transformer, CLASSES, Defaults(32, 32, 4, Guidance("ramp", 2.0), Sampling(0, 0.95))), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn shapes of 32 x 32 px, 6 of each class in a folder."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    write_pictures(Shapes(views=6), out, count_per_class=6, size=(32, 32), seed=1)
    return out


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(24) % 3)
    return path


def features_of(path: Path) -> extraction.Features:
    pictures, extractor = open_pictures(path), load_extractor("classifier")
    return joined([extractor(batch) for batch in pictures.batches(range(len(pictures)))])


# -- pictures in files --


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_is_read_part_by_part(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "AT_ONCE", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 12, 3), np.uint8)
    write(tmp_path / "x.npz", pixels)
    pictures = open_pictures(tmp_path / "x.npz")
    assert (len(pictures), pictures.size, pictures.labels) == (11, (8, 12), None)
    for part in (range(11), range(3, 9), range(10, 11)):
        batches = list(pictures.batches(part))
        assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), pixels[part.start : part.stop])


def test_a_folder_is_read_class_by_class_in_turn(folder: Path) -> None:
    pictures = open_pictures(folder)
    assert pictures.size == (32, 32)
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert pictures.labels == classes * 6  # in turn, so that every part is balanced
    assert pictures.caveats == []
    (batch,) = pictures.batches(range(len(classes) + 1, len(classes) + 3))
    for pixels, name in zip(batch, classes[1:3], strict=True):
        path = sorted((folder / name).iterdir())[1]
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_what_is_written_is_what_numpy_reads(tmp_path: Path) -> None:
    pixels = torch.arange(5 * 3 * 4 * 6).reshape(5, 3, 4, 6).to(torch.uint8)
    npz_files.write_npz(tmp_path / "x.npz", {"mu": np.arange(3.0)}, 5, (4, 6), pixels.split(2))
    content = np.load(tmp_path / "x.npz")
    assert np.array_equal(content["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    assert content["mu"].tolist() == [0, 1, 2]


def bad_npz(path: Path, what: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    if what == "floats":
        np.savez(path, pixels / 255.0)
    elif what == "not a number":
        np.savez(path, np.full((24, 32, 32, 3), np.nan, np.float32))
    elif what == "grey":
        np.savez(path, pixels[..., 0])
    elif what == "other":
        np.savez(path, weights=pixels)
    elif what == "labels":
        np.savez(path, pixels, np.arange(3))
    elif what == "empty":
        np.savez(path, pixels[:0])
    elif what == "text":
        path.write_text("hello")
    elif what == "flipped, compressed":
        np.savez_compressed(path, pixels // 128)
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :][:40] = bytes(40)
        content[200:240] = bytes(40)
        path.write_bytes(content)
    elif what == "header":
        np.savez(path, pixels)
        path.write_bytes(path.read_bytes().replace(b"'shape': (24,", b"'shape': ((((", 1))
    else:
        np.savez(path, pixels)
        content = path.read_bytes()
        if what == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:  # a flipped byte, which the archive's checksum finds
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("floats", "is float64; pictures must be uint8"),
        ("not a number", "is float32; pictures must be uint8"),
        ("grey", r"has shape \(24, 32, 32\)"),
        ("other", "has no array arr_0, but weights"),
        ("labels", r"arr_1 of .* has shape \(3,\)"),
        ("empty", "N at least 1"),
        ("text", "is no .npz file"),
        ("truncated", "or a truncated one"),
        ("flipped", "is damaged"),
        ("flipped, compressed", "is damaged"),
        ("header", "is damaged"),
    ],
)
def test_a_bad_npz_is_told_in_one_line(what: str, complaint: str, tmp_path: Path, folder: Path, capsys) -> None:
    bad_npz(tmp_path / "bad.npz", what)
    words = ["evaluate", "samples", str(tmp_path / "bad.npz"), "--reference", str(folder), "--extractor", "classifier"]
    assert main([*words, "--out", str(tmp_path / "scores.json")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert re.search(complaint, told[0])
    assert not (tmp_path / "scores.json").exists()


def test_a_folder_of_mixed_sizes_is_refused_and_names_two(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, size in (("a.png", (32, 32)), ("b.png", (40, 32))):
        Image.new("RGB", size).save(mixed / name)
    with pytest.raises(ValueError, match=r"a\.png has 32 x 32 px, b\.png has 32 x 40 px; bring them to one size"):
        open_pictures(mixed)
    assert open_pictures(mixed, (32, 32)).size == (32, 32)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no pictures"):
        open_pictures(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing"):
        open_pictures(tmp_path / "nothing")
    (mixed / "b.png").unlink()
    (mixed / "c.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"c\.png cannot be read \(No such file or directory\)"):
        open_pictures(mixed)


def test_jpeg_and_unbalanced_classes_are_said(tmp_path: Path) -> None:
    for i, name in enumerate(("a/1.jpg", "a/2.png", "b/1.png")):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(path)
    pictures = open_pictures(tmp_path / "own")
    said = "; ".join(caveats(pictures, features_of(tmp_path / "own"), load_extractor("classifier")))
    assert "1 of the pictures were stored as JPEG" in said
    assert "3 pictures instead of 50,000" in said
    assert "unbalanced classes: 1 to 2 pictures of each" in said
    assert "those of classifier, not of the Inception network" in said


def test_copies_are_said(folder: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(folder, twice)
    one = sorted(twice.rglob("*.png"))[0]
    shutil.copy(one, one.with_name("copy.png"))
    found = caveats(open_pictures(twice), features_of(twice), load_extractor("classifier"))
    assert any(caveat.startswith("1 pictures are copies of others") for caveat in found)


# -- references --


def test_a_reference_of_a_folder_is_one_of_adms(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "reference.npz"
    assert main(["evaluate", "reference", str(folder), str(out), "--extractor", "classifier", "--keep", "7"]) == 0
    content = np.load(out)
    features = features_of(folder).pool.double().numpy()
    assert np.allclose(content["mu"], features.mean(0), rtol=1e-6, atol=1e-8)
    assert np.allclose(content["sigma"], np.cov(features, rowvar=False), rtol=1e-6, atol=1e-9)
    assert content["arr_0"].shape == (7, 32, 32, 3)
    assert np.array_equal(content["arr_0"][0], np.asarray(Image.open(sorted(folder.rglob("*.png"))[0])))
    assert main(["evaluate", "reference", str(folder), str(out), "--extractor", "classifier"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    read = read_reference(out, load_extractor("classifier"))
    assert np.array_equal(read.moments[0], content["mu"])
    assert read.pool is not None
    assert read.pool.shape[0] == 7
    assert (read.size, read.spatial) == ((32, 32), None)


def test_pictures_of_a_reference_are_read_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_extractor("classifier")
    first = read_reference(folder, extractor)
    monkeypatch.setattr(stored.FolderPictures, "batches", lambda *_: pytest.fail("read again"))
    second = read_reference(folder, extractor)
    assert torch.equal(first.pool, second.pool)
    assert list((cache / "features").iterdir())


def test_statistics_of_other_packages(folder: Path, tmp_path: Path, npz: Path) -> None:
    features = features_of(folder).pool.double().numpy()
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    extractor = load_extractor("classifier")
    report = evaluate(open_pictures(npz), tmp_path / "fid.npz", extractor, tmp_path / "a.json")
    whole = evaluate(open_pictures(npz), folder, extractor, tmp_path / "b.json")
    assert report.scores["fid"] == pytest.approx(whole.scores["fid"], rel=1e-5)
    assert set(report.scores) == {"fid", "inception_score"}
    assert set(whole.scores) == {"fid", "inception_score", "precision", "recall", "kid", "density", "coverage"}
    np.savez(tmp_path / "short.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="is of 2048 features, classifier gives 112"):
        evaluate(open_pictures(npz), tmp_path / "short.npz", extractor, tmp_path / "c.json")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match="no finite mean and symmetric covariance; copy or write"):
        read_reference(tmp_path / "odd.npz", extractor)
    np.savez(tmp_path / "no.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="is no reference: it holds weights"):
        read_reference(tmp_path / "no.npz", extractor)


def test_stored_moments_that_disagree_with_the_pictures_are_said_and_used(folder: Path, tmp_path: Path) -> None:
    extractor = load_extractor("classifier")
    write_reference(folder, tmp_path / "good.npz", extractor, keep=1000)
    assert read_reference(tmp_path / "good.npz", extractor).caveats == ["the reference was made here and is no published one"]
    content = dict(np.load(tmp_path / "good.npz"))
    del content["extractor"]
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **content)
    assert read_reference(tmp_path / "VIRTUAL_imagenet256_labeled.npz", extractor).caveats == []
    np.savez(tmp_path / "bad.npz", **{**content, "mu": content["mu"] + 3 * content["sigma"].diagonal() ** 0.5})
    reference = read_reference(tmp_path / "bad.npz", extractor)
    by_name, disagree = reference.caveats
    assert "none of ADM's, by its name" in by_name
    assert "disagree with its own pictures" in disagree
    assert np.allclose(reference.moments[0], content["mu"] + 3 * content["sigma"].diagonal() ** 0.5)
    np.savez(tmp_path / "other.npz", **{**content, "extractor": np.array("0" * 64)})
    with pytest.raises(ValueError, match="was made with another extractor than classifier"):
        read_reference(tmp_path / "other.npz", extractor)


def test_another_size_is_refused_before_anything_is_drawn(model: Path, npz: Path, tmp_path: Path, capsys) -> None:
    words = ["evaluate", "model", str(model), "--reference", str(npz), "--extractor", "classifier", "--width", "64", "--height", "32"]
    assert main([*words, "--out", str(tmp_path / "scores.json")]) == 2
    assert "the pictures are 32 x 64 px, those of the reference 32 x 32" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path != npz]


def test_the_order_of_the_classes_does_not_change_the_interval(folder: Path, npz: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.png"))  # class by class; the folder itself is read with the classes in turn
    np.savez(tmp_path / "sorted.npz", np.stack([np.asarray(Image.open(path)) for path in paths]), np.repeat(np.arange(10), 6))
    extractor, intervals = load_extractor("classifier"), []
    for source in (folder, tmp_path / "sorted.npz"):
        report = evaluate(open_pictures(source), npz, extractor, tmp_path / "scores.json", intervals=True, overwrite=True)
        intervals.append(report.intervals["fid"])
    assert intervals[0] == pytest.approx(intervals[1], rel=1e-4)


def test_few_pictures_of_one_class_have_an_interval_and_any_name(folder: Path, npz: Path, tmp_path: Path) -> None:
    one = tmp_path / "set" / "one"
    one.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.rglob("*.png"))[:12]):
        shutil.copy(path, one / f"{number:02d}.png")
    if sys.platform == "linux":  # elsewhere names are text
        os.rename(one / "00.png", os.fsencode(one) + b"/\xff.png")
    report = evaluate(open_pictures(tmp_path / "set"), npz, load_extractor("classifier"), tmp_path / "scores.json", intervals=True)
    low, high = report.intervals["fid"]
    assert low <= report.scores["fid"] <= high


# -- models --


def test_a_model_is_scored_with_all_that_determines_it(model: Path, folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "scores.json"
    words = ["evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "4", "--seed", "3"]
    words += ["--steps", "3", "--guidance-scale", "1.5", "--top-k", "20", "--intervals", "--out", str(out)]
    assert main([*words, "--save-npz", str(tmp_path / "drawn.npz"), "--save-png", str(tmp_path / "png"), "--batch", "7"]) == 0
    printed = capsys.readouterr().out
    for expected in ("FID", "Inception Score", "NOT comparable with published scores", "20 pictures instead of 50,000", "singular"):
        assert expected in printed
    report = json.loads(out.read_text())
    assert report["comparable with published scores"] is False
    samples = report["samples"]
    assert samples["sha256"]["transformer.safetensors"] == sha256(model / "transformer.safetensors")
    assert (samples["schedule"], samples["seeds"], samples["dtype"]) == ("1x1 2x2 8x8", [3, 22], "float32")
    assert "scale=1.5" in samples["guidance"]
    assert "top_k=20" in samples["sampling"]
    assert samples["class counts"] == dict.fromkeys(CLASSES, 4)
    assert report["extractor"]["name"] == "classifier"
    assert {"flexvar", "torch", "numpy", "pillow", "python", "device"} <= set(report["machine"])
    assert report["reference"]["stored moments"] == []
    assert report["method"]["precision and recall k"] == 3
    assert np.array_equal(np.load(tmp_path / "drawn.npz")["arr_1"], np.arange(20) % 5)
    assert report["intervals"]["fid"][0] <= report["scores"]["fid"] <= report["intervals"]["fid"][1]
    assert [path.name for path in tmp_path.glob("*.unfinished")] == []

    pipe = FlexVARPipeline.from_pretrained(model)
    settings = {"num_inference_steps": 3, "guidance_scale": 1.5, "top_k": 20}
    alone = np.stack([np.asarray(pipe(i % 5, seed=3 + i, **settings).images[0]) for i in range(20)])
    drawn = np.load(tmp_path / "drawn.npz")["arr_0"]
    apart = np.abs(drawn.astype(int) - alone)  # convolutions of one picture and of seven may round the last bit of a float differently
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    files = sorted((tmp_path / "png").iterdir())
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), drawn)

    # The pictures that it wrote get the same scores as the model, from the .npz and from the folder.
    for source in (tmp_path / "drawn.npz", tmp_path / "png"):
        again = tmp_path / "again.json"
        assert main(["evaluate", "samples", str(source), "--reference", str(folder), "--extractor", "classifier", "--out", str(again)]) == 0
        scores = json.loads(again.read_text())["scores"]
        assert scores == pytest.approx(report["scores"], rel=1e-4)
        again.unlink()

    assert main(words) == 2
    assert "scores.json exists" in capsys.readouterr().err
    # Independent of our own file handling: the numbers are those of the functions on the features.
    drawn, real = (metrics.moments(features_of(path).pool) for path in (tmp_path / "png", folder))
    assert report["scores"]["fid"] == pytest.approx(metrics.frechet_distance(*drawn, *real), rel=1e-4)


def test_interrupted_work_goes_on(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(extraction, "PIECE", 5)
    words = ["evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "4"]
    assert main([*words, "--out", str(tmp_path / "whole.json")]) == 0
    draw, drawn = DrawnPictures.batches, []

    def interrupted(self: DrawnPictures, part: range):
        drawn.append(part.start)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, part)

    monkeypatch.setattr(DrawnPictures, "batches", interrupted)
    assert main([*words, "--out", str(tmp_path / "parts.json")]) == 130
    assert not (tmp_path / "parts.json").exists()
    assert main([*words, "--out", str(tmp_path / "parts.json"), "--seed", "9"]) == 2
    assert "unfinished work with other settings" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "parts.json")]) == 0
    assert drawn == [0, 5, 10, 10, 15]
    whole, parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts


def test_any_number_of_processes_draws_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "PIECE", 3)
    extractor, results = load_extractor("classifier"), []
    for processes in (1, 2, 3):
        pictures = DrawnPictures(FlexVARPipeline.from_pretrained(model), str(model), 2)
        store = FeatureStore(tmp_path / f"{processes}", len(pictures), pictures.about)
        for rank in range(processes):
            extract(pictures, extractor, store, rank=rank, world=processes)
        results.append(store.read().pool)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.slow
def test_torchrun_gives_the_same_scores(model: Path, folder: Path, tmp_path: Path, cache: Path) -> None:
    words = ["-m", "flexvar", "evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "60"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    runs = {"one": [sys.executable], "two": [sys.executable, *torchrun]}
    for name, run in runs.items():
        subprocess.run([*run, *words, "--out", str(tmp_path / f"{name}.json")], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in runs)
    assert one["samples"] == two["samples"]
    assert one["scores"] == pytest.approx(two["scores"], rel=1e-5)


def test_mistyped_settings_are_told_before_anything_is_drawn(model: Path) -> None:
    with pytest.raises(TypeError, match="top_kk"):
        DrawnPictures(FlexVARPipeline.from_pretrained(model), str(model), 3, top_kk=3)


def test_a_broken_model_is_told(model: Path, folder: Path, tmp_path: Path) -> None:
    pipe = FlexVARPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.tokenizer.after_codes.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="has weights that are not finite"):
        DrawnPictures(pipe, str(model), 3)
    with torch.no_grad():  # finite weights, whose pictures overflow
        pipe.tokenizer.after_codes.bias.fill_(1e38)
    with pytest.raises(ValueError, match="drew numbers that are not finite"):
        evaluate(DrawnPictures(pipe, str(model), 3), folder, load_extractor("classifier"), tmp_path / "scores.json")


def test_a_folder_of_files_that_is_not_empty_is_kept(model: Path, folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "png").mkdir()
    for name in ("000030.png", "mine.png"):
        (tmp_path / "png" / name).touch()
    words = ["evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "2"]
    words += ["--out", str(tmp_path / "scores.json"), "--save-png", str(tmp_path / "png")]
    assert main(words) == 2
    assert "png is not empty" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"mine.png", *(f"{i:06d}.png" for i in range(10))}


def test_what_is_read_is_never_replaced(model: Path, folder: Path, npz: Path, tmp_path: Path, capsys) -> None:
    reference, content = tmp_path / "reference.npz", npz.read_bytes()
    pictures = shutil.copytree(folder / os.listdir(folder)[0], tmp_path / "pictures")
    shutil.copy(npz, reference)
    by = ["--extractor", "classifier", "--overwrite"]
    scored = ["evaluate", "model", str(model), "--per-class", "2", *by]
    for words, told in (
        ([*scored, "--reference", str(reference), "--out", str(reference)], "reference.npz is also what is read"),
        ([*scored, "--reference", str(reference), "--save-npz", str(reference)], "reference.npz is also what is read"),
        ([*scored, "--reference", str(pictures), "--save-png", str(pictures)], "pictures is also what is read"),
        (["evaluate", "samples", str(npz), "--reference", str(folder), "--out", str(npz), *by], "drawn.npz is also what is read"),
        (["evaluate", "reference", str(npz), str(npz), *by], "drawn.npz is also what is read"),
        (["evaluate", "tokenizer", str(model), str(npz), "--out", str(npz), *by], "drawn.npz is also what is read"),
    ):
        out = [] if "--out" in words or words[1] == "reference" else ["--out", str(tmp_path / "scores.json")]
        assert main([*words, *out]) == 2
        assert told in capsys.readouterr().err
    assert reference.read_bytes() == npz.read_bytes() == content
    assert len(list(pictures.iterdir())) == 6


def test_pictures_that_come_class_by_class_are_said(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What the Inception Score's splits hold, in an order of classes that they do not."""
    monkeypatch.setitem(scores.METHOD, "inception score split", 20)
    pictures = open_pictures(folder)
    extractor = load_extractor("classifier")
    features = joined([extractor(batch) for batch in pictures.batches(range(len(pictures)))])
    assert pictures.labels is not None
    told = "come class by class"
    assert not any(told in caveat for caveat in caveats(pictures, features, extractor))
    pictures.labels = sorted(pictures.labels)
    assert any(told in caveat for caveat in caveats(pictures, features, extractor))


def test_another_batch_goes_on(model: Path, tmp_path: Path) -> None:
    """It changes speed and memory alone, and a smaller one is what someone tries who ran out of memory."""
    pipe = FlexVARPipeline.from_pretrained(model)
    for batch in (7, 3):
        pictures = DrawnPictures(pipe, str(model), 2, batch=batch, num_inference_steps=2)
        assert FeatureStore(tmp_path / "store", len(pictures), pictures.about).fresh == (batch == 7)


def test_a_drawn_seed_is_said(model: Path) -> None:
    pictures = DrawnPictures(FlexVARPipeline.from_pretrained(model), str(model), 2, seed=None, num_inference_steps=2)
    first, last = json.loads(json.dumps(pictures.about))["seeds"]
    assert last == first + 9


def test_scores_do_not_depend_on_the_default_device_or_dtype(folder: Path, npz: Path, tmp_path: Path) -> None:
    """Of a user's program, which may have set either, and TF32 with them."""
    plain = evaluate(open_pictures(npz), folder, load_extractor("classifier"), tmp_path / "plain.json", intervals=True)
    torch.set_default_dtype(torch.float16)
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.device("meta"):
            other = evaluate(open_pictures(npz), folder, load_extractor("classifier"), tmp_path / "other.json", intervals=True)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_default_dtype(torch.float32)
    assert plain is not None
    assert other is not None
    assert plain.scores == other.scores
    assert plain.intervals == other.intervals


def test_processes_that_share_no_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="all processes must share the folder"):
        FeatureStore(tmp_path / "elsewhere", 3, {}, begin=False)


def test_pieces_that_belong_to_nothing_are_not_taken(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of clearing up leaves pieces without what they are of."""
    pictures, extractor = DrawnPictures(FlexVARPipeline.from_pretrained(model), str(model), 2), load_extractor("classifier")
    extract(pictures, extractor, FeatureStore(tmp_path / "store", len(pictures), {"seed": 1}))
    (tmp_path / "store" / "about.json").unlink()
    assert FeatureStore(tmp_path / "store", len(pictures), {"seed": 2}).missing()


def test_so_many_of_a_folder_are_of_all_its_classes(folder: Path) -> None:
    pictures = open_pictures(folder)
    for count in (10, 20, 30):
        places = stored.chosen(pictures, count)
        assert places == sorted(set(places))
        assert set(Counter(pictures.labels[place] for place in places).values()) == {count // 10}
    assert stored.chosen(pictures, 1000) == list(range(60))


@pytest.mark.parametrize("out", ["folder", "file/scores.json", ""])
def test_what_could_not_be_written_is_told_first(out: str, model: Path, folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(DrawnPictures, "batches", lambda *_: pytest.fail("drawn in vain"))
    words = ["evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--overwrite"]
    assert main([*words, "--out", str(tmp_path / out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pictures_stay_where_the_reference_is_missing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.png").touch()
    words = ["evaluate", "model", str(model), "--reference", "nope", "--extractor", "classifier", "--overwrite"]
    assert main([*words, "--save-png", str(tmp_path), "--out", str(tmp_path / "scores.json")]) == 2
    assert (tmp_path / "000000.png").exists()


def test_a_damaged_piece_is_told(folder: Path, cache: Path) -> None:
    read_reference(folder, load_extractor("classifier"))
    piece = next((cache / "features").rglob("piece-*"))
    piece.write_bytes(piece.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"piece-00000.* is damaged .*; delete it and run the command again"):
        read_reference(folder, load_extractor("classifier"))


def test_a_picture_turned_by_its_exif_tag_has_the_size_that_is_seen(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 32))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (32, 40)).save(tmp_path / "b.png")
    pictures = open_pictures(tmp_path)
    assert pictures.size == (40, 32)
    assert next(pictures.batches(range(2))).shape == (2, 3, 40, 32)


def test_too_few_pictures(npz: Path, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", np.load(npz)["arr_0"][:4])
    with pytest.raises(ValueError, match="4 pictures are too few"):
        evaluate(open_pictures(tmp_path / "few.npz"), folder, load_extractor("classifier"), tmp_path / "scores.json")
    np.savez(tmp_path / "one.npz", np.load(npz)["arr_0"][:1])
    with pytest.raises(ValueError, match="a single picture"):
        read_reference(tmp_path / "one.npz", load_extractor("classifier"))


def test_what_was_interrupted_does_not_let_another_file_be_overwritten(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = DrawnPictures(FlexVARPipeline.from_pretrained(str(model)), str(model), 2, num_inference_steps=2, batch=10**6)
    assert pictures.batch == 250  # no more are drawn together
    extractor, kept = load_extractor("classifier"), {"overwrite": False}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexvar.evaluation.runner.score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(pictures, folder, extractor, tmp_path / "scores.json", npz=tmp_path / "drawn.npz", **kept)
    precious = tmp_path / "precious.npz"
    precious.write_bytes(b"keep me")
    with pytest.raises(FileExistsError, match="unfinished work with other settings \\(pictures kept"):
        evaluate(pictures, folder, extractor, tmp_path / "scores.json", npz=precious, **kept)
    assert precious.read_bytes() == b"keep me"
    evaluate(pictures, folder, extractor, tmp_path / "scores.json", npz=tmp_path / "drawn.npz", **kept)
    assert (tmp_path / "drawn.npz").exists()


# -- sweeps --


def test_a_sweep_that_could_not_be_plotted_does_not_begin(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("flexvar.evaluation.sweep.find_spec", lambda name: None)
    assert main(["evaluate", "sweep", str(model), "--reference", str(tmp_path), "--out", str(tmp_path / "sweep")]) == 2
    assert "the plot needs matplotlib; install it with `pip install 'flexvar[plots]'`" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_scores_the_grid_and_goes_on(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    words = ["evaluate", "sweep", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "4"]
    words += ["--steps", "2", "4", "--guidance-scale", "1", "3", "--out", str(tmp_path / "sweep")]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert table.count("steps 2, guidance 1.0") >= 1
    assert "lowest FID: steps" in table
    assert len(list((tmp_path / "sweep").glob("*.trial.json"))) == 4
    assert Image.open(tmp_path / "sweep" / "plot.png").size == (900, 600)
    alone = tmp_path / "alone.json"
    point = ["evaluate", "model", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "4"]
    assert main([*point, "--steps", "4", "--guidance-scale", "3", "--out", str(alone)]) == 0
    trial = json.loads((tmp_path / "sweep" / "steps-4-guidance-3.0.trial.json").read_text())
    assert trial["fid"] == pytest.approx(json.loads(alone.read_text())["scores"]["fid"], rel=1e-6)
    scored = []
    evaluate_ = sweep.evaluate
    monkeypatch.setattr(sweep, "evaluate", lambda *given, **named: (scored.append(given), evaluate_(*given, **named))[1])
    assert main(words) == 0
    assert not scored
    other = tmp_path / "other"
    write_pictures(Shapes(views=6), other, count_per_class=6, size=(32, 32), seed=2)
    changed = [str(other) if word == str(folder) else word for word in words]
    assert main(changed) == 2
    assert "is of another model, reference or settings" in capsys.readouterr().err
    (tmp_path / "sweep" / "steps-3.trial.json").write_text("of an earlier grid")
    assert main([*changed, "--overwrite"]) == 0
    assert len(scored) == 4
    assert len(list((tmp_path / "sweep").glob("*.trial.json"))) == 4


def test_a_sweep_overwrites_nothing_of_others(model: Path, folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "table.txt").write_text("mine")
    words = ["evaluate", "sweep", str(model), "--reference", str(folder), "--extractor", "classifier", "--per-class", "4", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'table.txt'} exists" in capsys.readouterr().err
    assert (tmp_path / "table.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["table.txt"]


def test_the_best_trial_and_the_fastest_of_its_equals() -> None:
    trials = [
        Trial({"num_inference_steps": steps}, steps, fid, (fid - 0.5, fid + 0.5), seconds, {})
        for steps, fid, seconds in ((4, 5.0, 1.0), (6, 3.4, 1.5), (8, 3.2, 2.0), (10, 3.0, 2.5))
    ]
    lowest, fastest = best(trials)
    assert (lowest.settings["num_inference_steps"], fastest.settings["num_inference_steps"]) == (10, 6)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing is to be swept"),
        (["--steps", "1"], "1 steps are too few"),
        (["--top-p", "2"], "top_p"),
        (["--steps", "4", "--schedule", "1,2,4"], "give one of the two"),
    ],
)
def test_a_wrong_sweep_is_told(words: list[str], complaint: str, model: Path, folder: Path, tmp_path: Path, capsys) -> None:
    start = ["evaluate", "sweep", str(model), "--reference", str(folder), "--extractor", "classifier", "--out", str(tmp_path / "sweep")]
    assert main([*start, *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
