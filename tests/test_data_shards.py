"""Shards: every picture of a shard in its order, whoever reads it; damage is passed over and named."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from flexvar.data import Augmentation, HubStream, ImageFolder, PictureSource, ShardSource, TarShards, shuffled

SIZE = (24, 32)
CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def encoded(seed: int, form: str = "png") -> bytes:
    """A picture of noise, 30 x 40."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(content, form)
    return content.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def samples(numbers: range) -> dict[str, bytes]:
    """Sample i has the picture and the class of i."""
    return {name: content for i in numbers for name, content in ((f"{i:04d}.png", encoded(i)), (f"{i:04d}.cls", b"%d" % (i % 2)))}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three shards of 3, 2 and 0 samples."""
    folder = tmp_path / "tars"
    for shard, numbers in enumerate((range(3), range(3, 5), range(0))):
        tar(folder / f"train-{shard:04d}.tar", samples(numbers))
    (folder / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    return folder


@pytest.fixture
def parquets(tmp_path: Path) -> Path:
    """The same pictures in two files of 3 and 2 rows."""
    return parquet(tmp_path / "parquets", [encoded(i) for i in range(5)], [i % 2 for i in range(5)], datasets.ClassLabel(names=CLASSES))


def parquet(folder: Path, contents: list[bytes], labels: list[int] | list[str], kind: object) -> Path:
    columns = datasets.Features({"image": datasets.Image(), "label": kind})
    pictures = [{"bytes": content, "path": None} for content in contents]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=columns)
    folder.mkdir()
    for i in range(2):
        rows.shard(2, i).to_parquet(folder / f"train-{i:05d}-of-00002.parquet")
    return folder


def read(source: ShardSource, shard: int) -> list[tuple[bytes, int]]:
    """The readable pictures of a shard with their labels; augmentation follows from the place."""
    opened = [(sample.open(), sample.label) for sample in source.read(shard)]
    rngs = map(np.random.default_rng, range(len(opened)))
    return [(source.fit(picture, SIZE, rng).tobytes(), label) for rng, (picture, label) in zip(rngs, opened, strict=True) if picture]


def test_pictures_are_those_of_a_folder(tmp_path: Path, tars: Path, parquets: Path) -> None:
    for i in range(3):
        (tmp_path / "folder" / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / CLASSES[i % 2] / f"{i}.png").write_bytes(encoded(i))
    in_order = (0, 2, 1)  # where picture 0, 1, 2 stands in the folder
    for augmentation in (Augmentation(), Augmentation(random=False)):
        folder = ImageFolder(tmp_path / "folder", augment=augmentation.random)
        drawn = [folder.draw(in_order[i], SIZE, np.random.default_rng(i)) for i in range(3)]
        for source in (TarShards(tars, augmentation=augmentation), HubStream(parquets, augmentation=augmentation)):
            assert source.class_names == CLASSES
            assert not isinstance(source, PictureSource)
            assert read(source, 0) == [(pixels.tobytes(), label) for pixels, label in drawn]
            assert [label for _, label in read(source, 1)] == [1, 0]
    assert TarShards(tars).shards == 3
    assert read(TarShards(tars), 2) == []
    assert HubStream(parquets).shards == 2


@pytest.mark.parametrize("pattern", ["", "*.tar", "train-{0000..0002}.tar", "train-{0000,000[12]}.tar", "{train-0002,train*}.tar"])
def test_patterns(tars: Path, pattern: str) -> None:
    names = [path.name for path in TarShards(tars / pattern).files]
    assert sorted(names) == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert (names == sorted(names)) == (not pattern.startswith("{"))


def test_brackets_in_a_name_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tar(tmp_path / "part[1].tar", samples(range(2)))
    assert TarShards(path, CLASSES).files == [path]


def test_class_names_as_windows_writes_them(tars: Path) -> None:
    (tars / "classes.txt").write_bytes("\ufeffcat\r\ndög\r\n\r\n".encode())
    assert TarShards(tars).class_names == ("cat", "dög")


def test_truths_are_labels_of_a_stream(tmp_path: Path) -> None:
    path = parquet(tmp_path / "set", [encoded(i) for i in range(2)], [True, False], datasets.Value("bool"))
    assert [label for shard in range(2) for _, label in read(HubStream(path, class_names=CLASSES), shard)] == [1, 0]


def test_forms_of_pictures_and_labels(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number, form in enumerate(("png", "jpg", "jpeg", "webp", "PNG")):
        label = {"cls": b" 1\n"} if number % 2 else {"json": json.dumps({"label": 1, "caption": "a dog"}).encode()}
        files |= {f"a/{number}.{name}": content for name, content in ({"txt": b"?"} | label).items()}
        files[f"a/{number}.{form}"] = encoded(number, "jpeg" if form == "jpg" else form)
    source = TarShards(tar(tmp_path / "a.tar", files), CLASSES)
    assert [label for _, label in read(source, 0)] == [1] * 5
    assert source.unreadable == source.damaged == []


def test_a_single_class_needs_no_labels(tmp_path: Path) -> None:
    source = TarShards(tar(tmp_path / "a.tar", {"0.png": encoded(0), "1.png": encoded(1)}), ["pizza"])
    assert [label for _, label in read(source, 0)] == [0, 0]


def test_reading_is_lazy(tmp_path: Path, tars: Path) -> None:
    """Nothing is decoded before it is opened, and what comes later in a shard is not looked at."""
    tar(tars / "train-0000.tar", samples(range(1)) | {"1.png": encoded(1), "1.cls": b"7"})
    samples_of_shard = TarShards(tars).read(0)
    first = next(samples_of_shard)
    assert first.label == 0
    assert first.open() is not None
    assert pickle.loads(pickle.dumps(first)).open() == first.open()
    with pytest.raises(ValueError, match=r"train-0000.tar\[1\] has the label 7"):
        next(samples_of_shard)


def test_damaged_pictures_are_passed_over_named_and_warned_about_once(tmp_path: Path) -> None:
    files = samples(range(4))
    files["0000.png"] = files["0000.png"][:200]
    files["0001.png"] = b"no picture"
    del files["0003.png"]
    kind = datasets.ClassLabel(names=CLASSES)
    parquet(tmp_path / "set", [files["0000.png"], files["0001.png"], encoded(2), b""], [0, 1, 0, 1], kind)
    for source, names in (
        (TarShards(tar(tmp_path / "a.tar", files), CLASSES), ["a.tar[0000]", "a.tar[0001]", "a.tar[0003]"]),
        (HubStream(tmp_path / "set"), ["set[0:0]", "set[0:1]", "set[1:1]"]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                left = [picture for shard in range(source.shards) for picture in read(source, shard)]
        assert [label for _, label in left] == [0]
        assert [name.name for name in source.unreadable] == names
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == len(names)
        assert all(name in message and "\n" not in message for name, message in zip(names, messages, strict=True))


@settings(max_examples=60, deadline=None)
@given(kept=st.floats(0, 1))
def test_of_a_truncated_tar_comes_what_can_be_read(tmp_path_factory: pytest.TempPathFactory, kept: float) -> None:
    whole, cut = (tmp_path_factory.mktemp("cut") / name for name in ("whole.tar", "cut.tar"))
    content = tar(whole, samples(range(4))).read_bytes()
    length = int(kept * (len(content) - 1))
    cut.write_bytes(content[:length])
    with tarfile.open(whole) as archive:
        ends = [entry.offset_data + entry.size for entry in archive if entry.name.endswith("cls")]
        closed = archive.offset + 2 * tarfile.BLOCKSIZE  # where the mark of its end ends
    source = TarShards(cut, CLASSES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert read(source, 0) == read(TarShards(whole, CLASSES), 0)[: sum(end <= length for end in ends)]
    assert source.unreadable == []
    warned = [] if length >= closed else [f"{cut} is damaged or cut off: what can be read of it is used"]
    assert [str(warning.message) for warning in caught] == warned
    assert len(source.damaged) == len(warned)


@pytest.mark.parametrize("damaged", [1, 5, 7])
def test_a_damaged_header_is_not_taken_for_the_end(damaged: int, tmp_path: Path) -> None:
    files = {f"{i}.{kind}": content for i in range(8) for kind, content in (("png", encoded(i)), ("cls", b"0"))}
    content = bytearray(tar(tmp_path / "a.tar", files).read_bytes())
    header = content.index(b"%d.cls" % damaged)
    content[header : header + 512] = b"?" * 512
    (tmp_path / "a.tar").write_bytes(content)
    source = TarShards(tmp_path / "a.tar", CLASSES)
    with pytest.warns(UserWarning, match=r"a\.tar is damaged"):
        assert len(read(source, 0)) == damaged


def test_a_compressed_or_doubled_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in ("0.png", "0.cls", "0.png", "1.png", "1.cls"):
            content = encoded(0) if name.endswith("png") else b"1"
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    source = TarShards(tmp_path / "a.tar.gz", CLASSES)
    with pytest.warns(UserWarning, match=r"a\.tar\.gz is damaged"):  # a file that is there twice
        assert [label for _, label in read(source, 0)] == [1, 1]


@pytest.mark.parametrize(("labels", "kind"), [([1, 0, 1], datasets.Value("int64")), (["dog", "cat", "dog"], datasets.Value("string"))])
def test_streams_with_given_class_names(tmp_path: Path, labels: list[int] | list[str], kind: object) -> None:
    path = parquet(tmp_path / "set", [encoded(i) for i in range(3)], labels, kind)
    with pytest.raises(ValueError, match="does not name its classes: give class_names"):
        HubStream(path)
    source = HubStream(path, class_names=CLASSES)
    assert [label for shard in range(2) for _, label in read(source, shard)] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"set\[0:0\] has the label .*: the 1 classes have the labels 0 to 0"):
        read(HubStream(path, class_names=["ant"]), 0)
    assert HubStream(path, label="").class_names == ("set",)
    assert [label for _, label in read(HubStream(path, label=""), 0)] == [0, 0]


def test_a_saved_set_as_a_stream(tmp_path: Path, parquets: Path) -> None:
    rows = datasets.Dataset.from_parquet([str(path) for path in sorted(parquets.iterdir())], cache_dir=tmp_path / "cache")
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    saved, stream = HubStream(tmp_path / "saved"), HubStream(parquets)
    assert saved.shards == 2
    assert [read(saved, i) for i in range(2)] == [read(stream, i) for i in range(2)]


class Whole(IterableDataset[tuple[int, tuple[bytes, int]]]):
    """Every loader worker reads all shards."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[list[tuple[bytes, int]]]:
        return (read(self.source, shard) for shard in range(self.source.shards))


def test_a_shard_is_whole_in_every_loader_worker_and_in_pickled_copies(tars: Path, parquets: Path) -> None:
    for source in (TarShards(tars), HubStream(parquets)):
        expected = [read(source, shard) for shard in range(source.shards)]
        assert [read(pickle.loads(pickle.dumps(source)), shard) for shard in range(source.shards)] == expected
        loaded = [[tuple(item) for item in shard] for shard in DataLoader(Whole(source), batch_size=None, num_workers=2)]
        assert loaded == [shard for shard in expected for _ in range(2)]


@given(count=st.integers(0, 60), buffer=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_shuffled_gives_every_item_once_and_holds_no_more_than_the_buffer(count: int, buffer: int, seed: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < count:
            taken += 1
            yield taken

    result = []
    for given_out, item in enumerate(shuffled(items(), np.random.default_rng(seed), buffer)):
        assert taken - given_out <= buffer
        result.append(item)
    assert sorted(result) == list(range(1, count + 1))
    assert result == list(shuffled(iter(range(1, count + 1)), np.random.default_rng(seed), buffer))
    assert buffer > 1 or result == sorted(result)


def test_a_buffer_as_large_as_the_shard_shuffles_evenly() -> None:
    rng = np.random.default_rng(0)
    first = [next(shuffled(iter(range(4)), rng, 4)) for _ in range(2000)]
    last = [list(shuffled(iter(range(4)), rng, 9))[-1] for _ in range(2000)]
    assert min(np.bincount(first, minlength=4).min(), np.bincount(last, minlength=4).min()) > 430


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, tars: Path, parquets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing").mkdir()
    nameless = tar(tmp_path / "nameless" / "a.tar", samples(range(1)))
    latin, gap = tar(tmp_path / "latin" / "a.tar", samples(range(1))), tar(tmp_path / "gap" / "a.tar", samples(range(1)))
    (latin.parent / "classes.txt").write_bytes("dög\n".encode("latin-1"))
    (gap.parent / "classes.txt").write_text("cat\n\ndog\n", encoding="utf-8")
    unlabelled = tar(tmp_path / "b.tar", {"0.png": encoded(0)})
    strange = tar(tmp_path / "c.tar", {"0.png": encoded(0), "0.json": b'{"label": "cat"}'})
    for error, words, call in (
        (FileNotFoundError, r"no shard .*nothing/\*\.tar", lambda: TarShards(tmp_path / "nothing")),
        (FileNotFoundError, r"no shard .*train-0003\.tar", lambda: TarShards(tars / "train-{0000..0999}.tar")),
        (FileNotFoundError, r"no shard .*missing", lambda: TarShards(tars / "missing-*.tar")),
        (ValueError, r"no names: list them in .*classes\.txt", lambda: TarShards(nameless)),
        (IndexError, r"shard 3 does not exist: this source has 3 shards, 0 to 2", lambda: next(TarShards(tars).read(3))),
        (IndexError, r"shard -1 does not exist", lambda: next(HubStream(parquets).read(-1))),
        (ValueError, r"b\.tar\[0\] has no label: the 2 classes", lambda: next(TarShards(unlabelled, CLASSES).read(0))),
        (ValueError, r"c\.tar\[0\] has the label 'cat': the 2 classes", lambda: next(TarShards(strange, CLASSES).read(0))),
        (ValueError, r"split 'test' of .*parquets cannot be opened: .*'train'", lambda: HubStream(parquets, "test")),
        (ValueError, r"no column 'img': there are image, label", lambda: HubStream(parquets, image="img")),
        (ValueError, r"image and label are both the column 'image'", lambda: HubStream(parquets, label="image")),
        (ValueError, r"classes\.txt is no text in UTF-8", lambda: TarShards(latin)),
        (ValueError, r"line 2 of .*classes\.txt is empty", lambda: TarShards(gap)),
        (ConnectionError, r"nobody/nothing is no folder", lambda: HubStream("nobody/nothing")),
        (ValueError, r"buffer is 0", lambda: next(shuffled(iter([1]), np.random.default_rng(0), 0))),
    ):
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    for package, call in (("webdataset", lambda: TarShards(tars)), ("datasets", lambda: HubStream(parquets))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"need the package {package}: pip install 'flexvar\[data\]'"):
            call()
