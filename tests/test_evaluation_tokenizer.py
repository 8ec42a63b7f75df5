"""`flexvar evaluate tokenizer`: its numbers against others that are computed here, what it says of them, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flexvar import FlexVARPipeline, Tokenizer
from flexvar.checkpoint import Defaults, Model, load, save
from flexvar.cli import main
from flexvar.data import Shapes, write_pictures
from flexvar.evaluation.classifier import load_classifier
from flexvar.evaluation.lpips import LPIPS, load_lpips
from flexvar.evaluation.metrics import frechet_distance, moments
from flexvar.evaluation.quality import psnr
from flexvar.evaluation.reconstruction import rebuilt_by_scale
from flexvar.evaluation.tokenizers import RunningMoments, evaluate_tokenizer, size_of
from flexvar.models import model_folder
from flexvar.schedule import Schedule
from flexvar.zoo import sha256

COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of 64 x 72 px in ten class folders, one of which lies deeper."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert write_pictures(Shapes(views=2), folder, count_per_class=2, size=(64, 72), seed=0) == COUNT
    (folder / "deeper").mkdir()
    shutil.move(folder / "star", folder / "deeper" / "star")
    return folder


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> str:
    """A folder with a tokenizer alone, which is untrained."""
    folder = tmp_path_factory.mktemp("models") / "small"
    save(Model(small_tokenizer, defaults=Defaults(32, 32, 4)), folder)
    return str(folder)


def evaluated(out: Path, *words: object) -> dict[str, Any]:
    assert main(["evaluate", "tokenizer", *map(str, words), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def rows(table: str) -> dict[str, list[str]]:
    """The rows of the first size's table by their codes, as cells; under "" the titles."""
    first, *lines = table.split("\n\n")[0].splitlines()[1:]
    return {"": first.split()} | {"x".join(line.split()[:3:2]): line.split()[6:] for line in lines}


def dealt(folder: Path) -> list[Path]:
    """Its pictures in the order in which they are read: the classes in turn."""
    return sorted(folder.rglob("*.png"), key=lambda path: (path.name, path.relative_to(folder).parts[0]))


def test_two_sizes_of_the_bundled_model(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "scores.json"
    report = evaluated(out, "emoji", folder, "--sizes", "64", "40x72", "--extractor", "classifier", "--batch", "7")
    printed = capsys.readouterr()
    square, oblong = report["sizes"]
    assert (square["height"], square["width"], oblong["height"], oblong["width"]) == (64, 64, 40, 72)
    model = load(model_folder("emoji"))
    factor = model.tokenizer.config.downsample
    for size in report["sizes"]:
        grid = size["height"] // factor, size["width"] // factor
        schedule = Schedule.for_grid(*grid, model.defaults.num_inference_steps, model.transformer.config.trained_grid)
        assert [tuple(scale["codes"]) for scale in size["scales"]] == list(schedule)
        for scale in size["scales"]:
            assert ("rfid" in scale) == (min(scale["codes"]) * factor >= 32)
            assert "lpips" not in scale
            assert 1 <= scale["perplexity"] <= scale["use"] * 1024 + 1e-6
            assert scale["use"] <= size["use of all scales"] <= 1
    # The last scale is what the pipeline's own reconstruction gives.
    pipe = FlexVARPipeline.from_pretrained("emoji")
    pictures = [Image.open(path) for path in dealt(folder)]
    for height, width, figures in ((64, 64, square["scales"][-1]), (40, 72, oblong["scales"][-1])):
        decibels, distances = [], []
        for picture in pictures:
            rebuilt = pipe.reconstruct(picture, height=height, width=width, output_type="np").images[0]
            difference = rebuilt - fitted_by_hand(picture, height, width)
            decibels.append(-10 * math.log10(np.square(difference).mean()))
            distances.append(2 * np.abs(difference).mean())
        assert figures["psnr"] == pytest.approx(np.mean(decibels), abs=1e-3)
        assert figures["l1"] == pytest.approx(np.mean(distances), rel=1e-4)
    # The report says what determines it, and what it may not be compared with.
    assert report["tokenizer"]["sha256"] == sha256(model_folder("emoji") / "tokenizer.safetensors")
    assert report["pictures"] | {"sha256": ""} == {"pictures": "shapes", "sha256": "", "count": COUNT, "pictures at a time": 7}
    assert report["extractor"]["name"] == "classifier"
    assert {"flexvar", "torch", "python"} <= set(report["machine"])
    assert report["lpips"] is None
    assert len(report["caveats"]) == 2
    assert "NOT comparable" in printed.out
    assert "20 pictures instead of 50,000" in printed.out
    table = rows(printed.out)
    assert table[""] == ["codes", "pixels", "rFID", "PSNR", "SSIM", "L1", "in", "use", "perplexity"]
    assert table["1x1"][0] == "-"
    assert table["16x16"][:2] == [f"{square['scales'][-1]['rfid']:.3f}", f"{square['scales'][-1]['psnr']:.2f}"]
    assert "40 x 72 px" in printed.out
    assert printed.out.endswith(f"{out}\n")
    assert "64 x 64 px, 7 pictures at a time: 3 of 3" in printed.err


def fitted_by_hand(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """A picture resized to cover height x width and cropped at the centre, in [0, 1]."""
    scale = max(height / picture.height, width / picture.width)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    box = (left, top, picture.width - left, picture.height - top)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0), np.float32) / 255


def test_rfid_is_the_distance_of_saved_pictures(folder: Path, tmp_path: Path) -> None:
    """Of the pictures that a scale decodes from those that it should, both as a PNG would hold them."""
    report = evaluated(tmp_path / "scores.json", "emoji", folder, "--sizes", 64, "--schedule", "1,12,16", "--extractor", "classifier")
    originals = [np.asarray(Image.open(path))[:, 4:68] for path in dealt(folder)]  # 64 x 72 cropped to 64 x 64
    images = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2) / 127.5 - 1
    made = list(rebuilt_by_scale(load(model_folder("emoji")).tokenizer, images, Schedule.square([1, 12, 16])))
    for scale, (codes, rebuilt, target) in zip(report["sizes"][0]["scales"][1:], made[1:], strict=True):
        features = [load_classifier().features(((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1) for x in (rebuilt, target)]
        assert scale["rfid"] == pytest.approx(frechet_distance(*moments(features[0]), *moments(features[1])), rel=1e-3)
        assert scale["psnr"] == pytest.approx(psnr(rebuilt, target).mean().item(), rel=1e-5)
        used, counts = np.unique(codes.numpy(), return_counts=True)
        assert scale["use"] == pytest.approx(len(used) / 1024)
        shares = counts / counts.sum()
        assert scale["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert report["sizes"][0]["use of all scales"] == pytest.approx(len(np.unique(np.concatenate([c.flatten() for c, *_ in made]))) / 1024)


def test_an_npz_a_tokenizer_alone_and_the_batch(small_model: str, folder: Path, tmp_path: Path) -> None:
    """The same pictures from a folder or an .npz, in batches of any size, give the same figures."""
    pixels = [np.asarray(Image.open(path))[:, 4:68] for path in dealt(folder)]
    np.savez(tmp_path / "shapes.npz", arr_0=np.stack(pixels))
    words = ["--extractor", "none", "--steps", "3"]
    one = evaluated(tmp_path / "one.json", small_model, tmp_path / "shapes.npz", *words)
    other = evaluated(tmp_path / "other.json", small_model, folder, "--sizes", "64", "--batch", "9", *words)
    assert one["pictures"]["sha256"] == sha256(tmp_path / "shapes.npz")
    assert one["extractor"] is None
    assert one["caveats"] == []
    assert len(one["sizes"][0]["scales"]) == 3
    for mine, theirs in zip(one["sizes"][0]["scales"], other["sizes"][0]["scales"], strict=True):
        assert mine.pop("codes") == theirs.pop("codes")
        assert mine == pytest.approx(theirs, rel=1e-4)
        assert set(mine) == {"psnr", "ssim", "l1", "use", "perplexity"}


def test_some_of_the_pictures(small_model: str, folder: Path, tmp_path: Path, capsys) -> None:
    """Evenly chosen, at the model's own size; as if the others were not there."""
    some = tmp_path / "some"
    some.mkdir()
    by_class = sorted(folder.rglob("*.png"))
    for number, path in enumerate(sorted((by_class[place] for place in (0, 6, 13)), key=dealt(folder).index)):
        shutil.copy(path, some / f"{number}.png")
    one = evaluated(tmp_path / "one.json", small_model, folder, "--count", "3", "--extractor", "none")
    assert "rFID" not in capsys.readouterr().out
    other = evaluated(tmp_path / "other.json", small_model, some, "--count", "50", "--extractor", "none")
    assert one["pictures"]["count"] == other["pictures"]["count"] == 3
    assert (one["sizes"][0]["height"], one["sizes"][0]["width"]) == (32, 32)
    assert one["sizes"] == other["sizes"]


def test_lpips_of_scales_that_are_large_enough(small_model: str, folder: Path, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    network = LPIPS()
    linear = {f"lin{i}.model.1.weight": weights.detach()[None, :, None, None] for i, weights in enumerate(network.linear)}
    files = tmp_path / "vgg.safetensors", tmp_path / "linear.safetensors"
    save_file({name: tensor for name, tensor in network.state_dict().items() if name.startswith("features.")}, files[0])
    save_file(linear, files[1])
    words = ["--lpips-vgg", files[0], "--lpips-linear", files[1], "--schedule", "2,4", "--count", "2", "--extractor", "none"]
    report = evaluated(tmp_path / "scores.json", small_model, folder, *words)
    assert report["lpips"] == {"vgg sha256": sha256(files[0]), "linear sha256": sha256(files[1])}
    small, large = report["sizes"][0]["scales"]
    assert "lpips" not in small  # 8 px
    paths = sorted(folder.rglob("*.png"))
    images = torch.stack([torch.tensor(fitted_by_hand(Image.open(path), 16, 16)).permute(2, 0, 1) for path in (paths[0], paths[10])])
    ((_, rebuilt, target),) = rebuilt_by_scale(load(small_model).tokenizer, images * 2 - 1, Schedule.square([4]))
    assert large["lpips"] == pytest.approx(load_lpips(*files)(rebuilt.clamp(-1, 1), target).mean().item(), rel=1e-3)
    table = rows(capsys.readouterr().out)
    assert table["2x2"][3] == "-"
    assert table["4x4"][3] == f"{large['lpips']:.4f}"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["emoji", "{tmp}/nowhere"], "there is no"),
        (["emoji", "{tmp}"], "no pictures"),
        (["nobody/nothing/at/all", "{folder}"], "no model folder"),
        (["emoji", "{folder}", "--sizes", "64", "62x64"], "nearest height is 60 or 64"),
        (["emoji", "{folder}", "--sizes", "big"], "is not a size"),
        (["emoji", "{folder}", "--schedule", "1,4", "--sizes", "64"], "height is 64, but the schedule ends at 16 px"),
        (["emoji", "{folder}", "--schedule", "1,4", "--steps", "3"], "the schedule has 2"),
        (["emoji", "{folder}", "--steps", "1"], "at least 2"),
        (["emoji", "{folder}", "--count", "0"], "count is 0"),
        (["emoji", "{folder}", "--batch", "0"], "batch is 0"),
        (["emoji", "{folder}", "--count", "1"], "a single picture"),
        (["emoji", "{folder}", "--lpips-vgg", "vgg.pth"], "give both --lpips-vgg and --lpips-linear"),
        (["emoji", "{folder}", "--lpips-vgg", "vgg.pth", "--lpips-linear", "vgg.pth"], "no file vgg.pth"),
        (["emoji", "{folder}", "--device", "abacus"], "no device"),
        (["emoji", "{tmp}/of.npz", "--sizes", "64"], "only those of a folder can be resized"),
        (["emoji", "{tmp}/of.npz"], "nearest height is 28 or 32"),
        (["emoji", "{tmp}/floats.npz"], "float"),
    ],
)
def test_what_cannot_be_measured(words: Sequence[str], complaint: str, folder: Path, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "of.npz", arr_0=np.zeros((2, 30, 32, 3), np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.full((2, 32, 32, 3), np.nan, np.float32))
    out = tmp_path / "scores.json"
    named = [word.format(tmp=tmp_path, folder=folder) for word in words]
    assert main(["evaluate", "tokenizer", "--extractor", "classifier", "--out", str(out), *named]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_weights_that_are_not_finite(small_model: str, folder: Path, tmp_path: Path, capsys) -> None:
    """Not even where every picture that they rebuild is: codes of NaN are codes."""
    for name in ("before_codes.bias", "decoder.conv_out.weight"):
        broken = tmp_path / name
        shutil.copytree(small_model, broken)
        tensors = load_file(broken / "tokenizer.safetensors")
        assert name in tensors, sorted(tensors)
        tensors[name].view(-1)[0] = math.nan
        save_file(tensors, broken / "tokenizer.safetensors")
        assert main(["evaluate", "tokenizer", str(broken), str(folder), "--extractor", "none"]) == 2
        assert "not finite" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(small_model: str, folder: Path, tmp_path: Path, capsys) -> None:
    out, words = tmp_path / "scores.json", [small_model, folder, "--count", "1", "--extractor", "none"]
    evaluated(out, *words)
    before = out.read_bytes()
    assert main(["evaluate", "tokenizer", *map(str, words), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    evaluated(out, *words, "--overwrite")
    assert out.read_bytes() == before  # the same again


def test_moments_batch_by_batch() -> None:
    """As those of all features at once, though their mean is a million times their spread."""
    features = 1e3 + 1e-3 * torch.randn(101, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    running = RunningMoments()
    for part in features.split(10):
        running.add(part)
    for one, other in zip(running.moments(), moments(features), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), ("384x512", (384, 512)), ("8X16", (8, 16))])
def test_sizes_as_typed(text: str, size: tuple[int, int]) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "64,96", "-8", "6.4", "1x2x3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        size_of(text)


def test_finite_weights_whose_pictures_are_not(small_tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save(Model(small_tokenizer, defaults=Defaults(16, 16, 4)), model)
    tensors = load_file(model / "tokenizer.safetensors")
    tensors["after_codes.weight"] *= 1e38
    save_file(tensors, model / "tokenizer.safetensors")
    with pytest.raises(ValueError, match="pictures that are not finite"):
        evaluate_tokenizer(model, folder, count=2)
