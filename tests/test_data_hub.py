"""Hugging Face data sets: the same pictures as from a folder, however they are stored, and nothing that needs the network."""

from __future__ import annotations

import io
import logging
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.data import Augmentation, HubPictures, ImageFolder, PictureSource
from flexvar.data.hub import stored_picture
from training_runs import tokenizer_config, transformer_config

SIZE = (24, 32)
CLASSES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def png(seed: int) -> bytes:
    """A picture of noise, 30 x 40."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def table(contents: list[bytes | None], labels: Any = None, kind: Any = None) -> datasets.Dataset:
    """Pictures with labels as ClassLabel, or as another kind of column."""
    columns = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=CLASSES)}
    pictures = [content and {"bytes": content, "path": None} for content in contents]
    labels = [i % 2 for i in range(len(contents))] if labels is None else labels
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=datasets.Features(columns))


def parquet(folder: Path, rows: datasets.Dataset, files: int = 1, split: str = "train") -> Path:
    """Rows as parquet files, named as the Hub names them."""
    folder.mkdir(exist_ok=True)
    for i in range(files):
        rows.shard(files, i).to_parquet(folder / f"{split}-{i:05d}-of-{files:05d}.parquet")
    return folder


def drawn(source: PictureSource) -> list[tuple[bytes, int]]:
    """Every picture, each with its own random state."""
    pictures = [source.draw(i, SIZE, np.random.default_rng(i)) for i in range(len(source))]
    return [(pixels.tobytes(), label) for pixels, label in pictures]


def test_pictures_are_those_of_a_folder_however_they_are_stored(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "folder" / CLASSES[i // 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / CLASSES[i // 3] / f"{i}.png").write_bytes(png(i))
    rows = table([png(i) for i in range(6)], [0, 0, 0, 1, 1, 1])
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    for augmentation in (Augmentation(), Augmentation(flip=False, resize=(1.5, 2.0)), Augmentation(random=False)):
        folder = ImageFolder(tmp_path / "folder", augmentation.flip, augmentation.resize, augmentation.random)
        for path in (parquet(tmp_path / "parquet", rows, files=2), tmp_path / "saved", tmp_path / "splits", tmp_path / "folder"):
            source = HubPictures(path, augmentation=augmentation)
            assert isinstance(source, PictureSource)
            assert source.class_names == folder.class_names == ("cat", "dog")
            assert drawn(source) == drawn(folder), path
    assert len(HubPictures(tmp_path / "splits", "test")) == 1


@pytest.mark.parametrize(
    ("labels", "kind", "names", "expected"),
    [
        ([1, 0, 1], datasets.ClassLabel(names=["cat", "dog", "never"]), ("cat", "dog", "never"), [1, 0, 1]),
        ([2, 0, 1], datasets.Value("int32"), ("0", "1", "2"), [2, 0, 1]),
        ([30, -4, 30], datasets.Value("int64"), ("-4", "30"), [1, 0, 1]),
        (["dog", "ant", "dog"], datasets.Value("string"), ("ant", "dog"), [1, 0, 1]),
        ([True, False, True], datasets.Value("bool"), ("False", "True"), [1, 0, 1]),
    ],
)
def test_every_kind_of_label(tmp_path: Path, labels: list[Any], kind: Any, names: tuple[str, ...], expected: list[int]) -> None:
    source = HubPictures(parquet(tmp_path / "set", table([png(i) for i in range(3)], labels, kind)))
    assert source.class_names == names
    assert [label for _, label in drawn(source)] == expected


def test_no_label_column_means_one_class_with_the_name_of_the_set(tmp_path: Path) -> None:
    rows = table([png(0), png(1)]).rename_columns({"image": "photo"}).remove_columns("label")
    source = HubPictures(parquet(tmp_path / "pets", rows), image="photo", label="")
    assert source.class_names == ("pets",)
    assert [label for _, label in drawn(source)] == [0, 0]


def test_pictures_stored_as_plain_bytes_or_beside_a_path(tmp_path: Path) -> None:
    expected = drawn(HubPictures(parquet(tmp_path / "image", table([png(0)]))))
    for number, stored in enumerate((png(0), {"bytes": png(0), "path": "0.png"})):
        rows = datasets.Dataset.from_dict({"image": [stored], "label": [0]})
        assert drawn(HubPictures(parquet(tmp_path / str(number), rows))) == expected


def test_pictures_stored_as_paths_or_addresses(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    expected = np.asarray(Image.open(io.BytesIO(png(0))))
    for path in (tmp_path / "0.png", f"file://{tmp_path}/0.png"):
        assert np.array_equal(stored_picture({"bytes": None, "path": str(path)}, Path("set[0]")), expected)
    with pytest.raises(OSError, match="missing"):
        stored_picture({"bytes": None, "path": str(tmp_path / "missing.png")}, Path("set[0]"))


def test_other_columns_are_never_decoded(tmp_path: Path) -> None:
    rows = table([png(0)]).add_column("mask", [{"bytes": b"damaged", "path": None}])
    assert len(drawn(HubPictures(parquet(tmp_path / "set", rows.cast_column("mask", datasets.Image()))))) == 1


def test_a_damaged_picture_is_skipped_named_and_warned_about_once(tmp_path: Path) -> None:
    path = parquet(tmp_path / "set", table([png(0)[:200], b"no picture", png(2), png(3)], [0, 0, 1, 0]))
    source = HubPictures(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pixels, label = source.draw(0, SIZE, np.random.default_rng(5))
    good, good_label = source.draw(2, SIZE, np.random.default_rng(5))
    assert np.array_equal(pixels, good)
    assert label == good_label == 1
    assert [name.name for name in source.unreadable] == ["set[0]", "set[1]"]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert all(str(name) in message and "\n" not in message for name, message in zip(source.unreadable, messages, strict=True))


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    path = parquet(tmp_path / "set", table([b"no", None]))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 2 pictures"):
        HubPictures(path).draw(1, SIZE, np.random.default_rng(0))


class Drawn(Dataset[tuple[bytes, int]]):
    """Draws in loader workers."""

    def __init__(self, source: HubPictures) -> None:
        self.source = source

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        pixels, label = self.source.draw(index, SIZE, np.random.default_rng(index))
        return pixels.tobytes(), label


@pytest.mark.parametrize(("kind", "workers"), [("hub", 0), ("hub", 1), ("hub-stream", 1)])
def test_both_stages_are_trained_on_them(kind: str, workers: int, tmp_path: Path, capsys) -> None:
    stored = parquet(tmp_path / "stored", table([png(i) for i in range(12)]), files=2)
    words = [f"data={{kind: {kind}, path: {stored}}}", f"workers={workers}", "steps=2"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0, capsys.readouterr().err
    config = str(transformer_config(tmp_path, tmp_path / "tokenizer" / "model"))
    assert main(["train", "transformer", config, *words]) == 0, capsys.readouterr().err
    assert load(tmp_path / "transformer" / "model").class_names == tuple(CLASSES)


def test_loader_workers_and_pickled_copies_draw_the_same(tmp_path: Path) -> None:
    source = HubPictures(parquet(tmp_path / "set", table([png(i) for i in range(5)]), files=2))
    assert drawn(pickle.loads(pickle.dumps(source))) == drawn(source)
    loader = DataLoader(Drawn(source), batch_size=None, sampler=range(5), num_workers=2)
    assert [tuple(item) for item in loader] == drawn(source)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table([png(0), png(1)])
    good = parquet(tmp_path / "good", rows)
    rows.save_to_disk(tmp_path / "saved")
    parquet(tmp_path / "empty", rows.select([]))
    parquet(tmp_path / "unlabelled", table([png(0), png(1)], [1, -1]))
    parquet(tmp_path / "fractions", table([png(0)], [0.5], datasets.Value("float32")))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"no parquet" * 50)
    cases: list[tuple[type[Exception], str, tuple[str | Path, ...]]] = [
        (ValueError, r"split 'validation' of .*good cannot be opened: .*'train'", (good, "validation")),
        (ValueError, r"split 'validation' of .*saved cannot be opened: there are train", (tmp_path / "saved", "validation")),
        (ValueError, r"good has no column 'img': there are image, label", (good, "train", "img")),
        (ValueError, r"good has no column 'class': there are image, label", (good, "train", "image", "class")),
        (ValueError, r"column 'label' of .*good holds .*ClassLabel.*, not pictures", (good, "train", "label", "")),
        (ValueError, r"column 'label' of .*fractions holds .*float32.*: labels are", (tmp_path / "fractions",)),
        (ValueError, r"1 of 2 pictures in .*unlabelled have no 'label'", (tmp_path / "unlabelled",)),
        (ValueError, r"split 'train' of .*empty", (tmp_path / "empty",)),
        (ValueError, r"nothing doesn't contain any data files", (tmp_path / "nothing",)),
        (ValueError, r"damaged cannot be opened: .*not a parquet file", (tmp_path / "damaged",)),
        (ConnectionError, r"nobody/nothing is no folder, and the Hub is out of reach", ("nobody/nothing",)),
        (IndexError, r"picture 2 does not exist", ()),
    ]
    for error, words, arguments in cases:
        with pytest.raises(error, match=words) as caught:
            HubPictures(*arguments) if arguments else HubPictures(good).draw(2, SIZE, np.random.default_rng(0))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the package datasets: pip install 'flexvar\[data\]'"):
        HubPictures(good)


def test_the_tries_of_the_hubs_client_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = logging.getLogger("huggingface_hub.utils")
    heard = []

    def out_of_reach(*_: object, **__: object) -> None:
        heard.append(told.isEnabledFor(logging.WARNING))
        raise ConnectionError("it is offline")

    before = told.isEnabledFor(logging.WARNING)
    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    with pytest.raises(ConnectionError, match="it is offline"):
        HubPictures("nobody/nothing")
    assert heard == [False]
    assert told.isEnabledFor(logging.WARNING) == before
