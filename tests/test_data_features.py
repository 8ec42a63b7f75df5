"""The feature cache: the same views as online, bit for bit; continued, never mixed; damage is found and named."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexvar.data.features import CacheSettings, CacheWriter, FeatureCache, FixedViews, verify
from flexvar.data.images import ImageFolder
from flexvar.data.shapes import Shapes
from flexvar.data.source import PictureSource, write_pictures

SIZES = ((8, 12), (8, 8))
SETTINGS = CacheSettings(
    tokenizer_sha256="ab" * 32,
    class_names=Shapes().class_names,
    sizes=SIZES,
    downsample=4,
    code_width=3,
    views=4,
    seed=5,
    pictures=10,
    pictures_per_shard=4,
    provenance={"kind": "shapes", "resize": (1.0, 1.5)},
)
VIEWS = FixedViews(Shapes(views=1), SETTINGS.seed, SETTINGS.views)


def features(picture: np.ndarray) -> np.ndarray:
    """A stand-in for a tokenizer: each cell's mean colour (3, h, w), which tells pictures and views apart."""
    height, width, _ = picture.shape
    return picture.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3)).transpose(2, 0, 1).astype(np.float16)


def shard_of(writer: CacheWriter, shard: int) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """What belongs into a shard: labels, and features by size."""
    pictures, views = writer.pictures_of(shard), range(SETTINGS.views)
    labels = np.array([VIEWS.view(index, 0, SIZES[0])[1] for index in pictures])
    return labels, {size: np.array([[features(VIEWS.view(i, v, size)[0]) for v in views] for i in pictures]) for size in SIZES}


def write(folder: Path, count: int | None = None) -> list[int]:
    """Writes what is missing of a cache, at most `count` shards; gives their numbers."""
    writer = CacheWriter(folder, SETTINGS)
    shards = writer.missing()[:count]
    for shard in shards:
        writer.write(shard, *shard_of(writer, shard))
    return shards


def holds_all(folder: Path) -> bool:
    """Whether every view of every picture reads as it was made."""
    cache = FeatureCache(folder)
    for index, size, seed in ((index, size, seed) for index in range(10) for size in SIZES for seed in range(12)):
        picture, label = VIEWS.draw(index, size, np.random.default_rng(seed))
        cached, cached_label = cache.draw(index, size, np.random.default_rng(seed))
        if cached.tobytes() != features(picture).tobytes() or cached_label != label:
            return False
    return True


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache that no test changes."""
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished cache to damage."""
    write(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_cache_reads_bit_for_bit_what_is_drawn_online(written: Path) -> None:
    assert sorted(os.listdir(written)) == ["cache.json", *(f"features-0000{shard}.safetensors" for shard in range(3))]
    assert holds_all(written)
    assert verify(written) == []
    cache = FeatureCache(written)
    assert isinstance(cache, PictureSource)
    assert (len(cache), cache.class_names) == (10, Shapes().class_names)
    assert cache.labels.tolist() == list(range(10))
    drawn, label = cache.draw(7, (8, 12), np.random.default_rng(0))
    assert (drawn.shape, drawn.dtype, label) == ((3, 2, 3), np.float16, 7)
    drawn[:] = 0  # a source hands out arrays that may be written to
    assert holds_all(written)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 9), size=st.sampled_from(SIZES), seed=st.integers(0, 2**32))
def test_both_take_the_same_numbers_of_the_random_stream(written: Path, index: int, size: tuple[int, int], seed: int) -> None:
    online, cached = np.random.default_rng(seed), np.random.default_rng(seed)
    VIEWS.draw(index, size, online)
    FeatureCache(written).draw(index, size, cached)
    assert online.bit_generator.state == cached.bit_generator.state


def test_fixed_views_are_that_many_and_do_not_depend_on_the_stream() -> None:
    assert isinstance(VIEWS, PictureSource)
    assert (len(VIEWS), VIEWS.class_names) == (10, Shapes().class_names)
    drawn = {VIEWS.draw(3, (16, 16), np.random.default_rng(seed))[0].tobytes() for seed in range(60)}
    views = [VIEWS.view(3, view, (16, 16))[0] for view in range(4)]
    assert drawn == {view.tobytes() for view in views}
    assert len(drawn) == 4
    expected, label = Shapes(views=1).draw(3, (16, 16), np.random.default_rng((5, 3, 2)))
    assert np.array_equal(views[2], expected)
    assert label == 3


def test_fixed_views_refuse_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="views is 0"):
        FixedViews(Shapes(), seed=0, views=0)
    with pytest.raises(ValueError, match="seed -1"):
        FixedViews(Shapes(), seed=-1, views=1)
    with pytest.raises(IndexError, match="view 4 does not exist"):
        VIEWS.view(0, 4, (8, 8))
    with pytest.raises(IndexError, match="picture 10 does not exist"):
        VIEWS.draw(10, (8, 8), np.random.default_rng(0))


def test_a_cache_names_what_could_not_be_read(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, SETTINGS)
    for shard, names in enumerate((["b.png", "a.png"], (), {"b.png", "data[7]"})):
        writer.write(shard, *shard_of(writer, shard), names)
    assert FeatureCache(tmp_path).unreadable == [Path("a.png"), Path("b.png"), Path("data[7]")]
    assert verify(tmp_path) == []


def test_fixed_views_tell_what_the_source_could_not_read(tmp_path: Path) -> None:
    assert VIEWS.unreadable == []
    write_pictures(Shapes(), tmp_path, count_per_class=1, size=(8, 8), seed=0)
    broken = tmp_path / "ring" / "0000.png"
    broken.write_bytes(b"not a picture")
    source = FixedViews(ImageFolder(tmp_path), seed=0, views=2)
    with pytest.warns(UserWarning, match="skipped a picture"):
        labels = [source.draw(index, (8, 8), np.random.default_rng(0))[1] for index in range(10)]
    assert source.unreadable == [broken]
    assert source.class_names.index("ring") not in labels


def test_a_cache_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    assert write(tmp_path, count=1) == [0]
    first = (tmp_path / "features-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="2 of 3 shards are missing; run the same `flexvar cache` command again"):
        FeatureCache(tmp_path)
    (complaint,) = verify(tmp_path)
    assert complaint.startswith(f"{tmp_path} is unfinished: 2 of 3 shards are missing; run")
    assert write(tmp_path) == [1, 2]
    assert write(tmp_path) == []
    assert (tmp_path / "features-00000.safetensors").stat().st_mtime_ns == first
    assert holds_all(tmp_path)


def test_a_process_killed_in_the_middle_of_a_shard_leaves_none(tmp_path: Path) -> None:
    write(tmp_path, count=1)
    script = f"""
        import os, pathlib, signal
        from flexvar.data import features

        def kill(tensors, path, metadata):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        features.save_file = kill
        settings = features.CacheSettings.read({str(tmp_path)!r})
        values = {{size: features.np.zeros((4, 4, 3, size[0] // 4, size[1] // 4), "float16") for size in settings.sizes}}
        features.CacheWriter({str(tmp_path)!r}, settings).write(1, features.np.zeros(4, "int64"), values)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".features-00001.*.unfinished"))) == 1
    assert write(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".*"))
    assert holds_all(tmp_path)


def test_several_writers_share_the_shards(tmp_path: Path) -> None:
    writers = [CacheWriter(tmp_path, SETTINGS) for _ in range(3)]
    for shard in (2, 0, 1):
        writers[shard].write(shard, *shard_of(writers[shard], shard))
    assert [writer.missing() for writer in writers] == [[], [], []]
    assert holds_all(tmp_path)


def test_other_settings_are_refused_and_named(folder: Path) -> None:
    for changes, named in (
        ({"views": 5}, "views is 4, not 5"),
        ({"tokenizer_sha256": "cd"}, "tokenizer_sha256 is 'ab.*', not 'cd'"),
        ({"sizes": SIZES[::-1]}, "sizes is"),
        ({"provenance": {"kind": "shapes"}}, "provenance is"),
    ):
        other = dataclasses.replace(SETTINGS, **changes)
        with pytest.raises(FileExistsError, match=f"other settings \\({named}.*\\): choose another folder, or .*--overwrite"):
            CacheWriter(folder, other)
    assert holds_all(folder)
    other = dataclasses.replace(SETTINGS, views=5)
    assert CacheWriter(folder, other, overwrite=True).missing() == [0, 1, 2]
    assert CacheSettings.read(folder) == dataclasses.replace(other, provenance={"kind": "shapes", "resize": [1.0, 1.5]})
    assert os.listdir(folder) == ["cache.json"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty"):
        CacheWriter(tmp_path, SETTINGS)
    with pytest.raises(FileExistsError, match="is a file"):
        CacheWriter(mine, SETTINGS, overwrite=True)
    CacheWriter(tmp_path, SETTINGS, overwrite=True)
    assert mine.read_text() == "keep me"


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), truncate=st.booleans())
def test_damage_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, written: Path, place: float, change: int, truncate: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for path in written.iterdir():
        (folder / path.name).hardlink_to(path)
    shard = folder / "features-00001.safetensors"
    data = bytearray(shard.read_bytes())
    byte = int(place * len(data))
    data[byte] ^= change
    shard.unlink()
    shard.write_bytes(data[:byte] if truncate else data)
    complaints = verify(folder)
    if complaints:
        assert len(complaints) == 1
        assert complaints[0].startswith(f"{shard} is damaged (")
        assert "\n" not in complaints[0]
    else:  # a space of the header's padding became another white space: nothing is lost
        assert not truncate
        assert holds_all(folder)
    if truncate:
        with pytest.raises(ValueError, match=r"00001\.safetensors is damaged .* delete it and run the same `flexvar cache` command"):
            FeatureCache(folder)


def test_damaged_names_are_found(written: Path, tmp_path: Path) -> None:
    """Those of pictures that could not be read stand in a shard's header, whose other texts are checked by what they must be."""
    shard = shutil.copytree(written, tmp_path / "damaged") / "features-00001.safetensors"
    data = shard.read_bytes()
    place = data.index(b'"unreadable":"[') + len(b'"unreadable":"[')
    shard.write_bytes(data[:place] + b"}" + data[place + 1 :])
    complaint = f"{shard} is damaged (unreadable is not what was written); delete it and run the same `flexvar cache` command again"
    assert verify(shard.parent)[0].startswith(complaint)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        FeatureCache(shard.parent)


def test_a_damaged_shard_is_written_again(folder: Path) -> None:
    shard = folder / "features-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7] + bytes(7))
    assert len(verify(folder)) == 1
    shard.unlink()
    assert write(folder) == [2]
    assert verify(folder) == []
    assert holds_all(folder)


def test_a_shard_of_another_cache_is_refused(folder: Path) -> None:
    (folder / "features-00002.safetensors").write_bytes((folder / "features-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"00002\.safetensors is damaged \(its tensors are not those that cache\.json tells of\)"):
        FeatureCache(folder)
    assert len(verify(folder)) == 1


def test_only_cached_sizes_and_pictures_are_drawn(written: Path) -> None:
    cache = FeatureCache(written)
    for size in ((12, 8), (16, 16), (2, 3)):
        with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]} is not cached: .* holds 8x12, 8x8"):
            cache.draw(0, size, np.random.default_rng(0))
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"picture {index} does not exist"):
            cache.draw(index, (8, 8), np.random.default_rng(0))


def test_a_cache_travels_to_worker_processes_while_it_is_open(written: Path) -> None:
    cache = FeatureCache(written)
    before, _ = cache.draw(9, (8, 8), np.random.default_rng(1))
    after, label = pickle.loads(pickle.dumps(cache)).draw(9, (8, 8), np.random.default_rng(1))
    assert np.array_equal(before, after)
    assert label == 9


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, SETTINGS)
    labels, values = shard_of(writer, 0)
    infinite = values[(8, 8)].copy()
    infinite[-1, -1, -1, -1, -1] = np.inf

    def refused(message: str, labels: np.ndarray = labels, values: dict[tuple[int, int], np.ndarray] = values, shard: int = 0) -> None:
        with pytest.raises((ValueError, IndexError), match=message):
            writer.write(shard, labels, values)

    refused(r"features of \[\(8, 8\)\] for a cache of \[\(8, 12\), \(8, 8\)\]", values={(8, 8): values[(8, 8)]})
    refused("give each of its sizes", values={**values, (4, 4): values[(8, 8)]})
    refused(r"8x12 of shard 0: float32 \(4, 4, 3, 2, 3\) must be float16", values={**values, (8, 12): values[(8, 12)].astype(np.float32)})
    refused(r"8x8 of shard 0: float16 \(4, 4, 3, 2, 3\) must be float16 \(4, 4, 3, 2, 2\)", values={**values, (8, 8): values[(8, 12)]})
    refused("8x8 of shard 0: some features are not finite", values={**values, (8, 8): infinite})
    refused(r"labels of shard 0: int64 \(3,\) must be int64 \(4,\)", labels=labels[:3])
    refused("labels of shard 0: int32", labels=labels.astype(np.int32))
    refused("run from 0 to 10; the classes are 0 to 9", labels=np.array([0, 1, 2, 10]))
    refused("run from -1 to 3", labels=np.array([-1, 1, 2, 3]))
    refused(r"labels of shard 2: int64 \(4,\) must be int64 \(2,\)", shard=2)
    refused("shard 3 does not exist: this cache has 3, 0 to 2", shard=3)
    assert writer.missing() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["cache.json"]


@settings(max_examples=100, deadline=None)
@given(pictures=st.integers(1, 500), per_shard=st.integers(1, 60))
def test_every_picture_stands_in_one_shard(pictures: int, per_shard: int) -> None:
    cut = dataclasses.replace(SETTINGS, pictures=pictures, pictures_per_shard=per_shard)
    assert [index for shard in range(cut.shards) for index in cut.pictures_of(shard)] == list(range(pictures))
    assert all(cut.pictures_of(shard) for shard in range(cut.shards))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 0}, "views of the cache is 0"),
        ({"pictures": 2.0}, "pictures of the cache is 2.0"),
        ({"seed": -1}, "seed of the cache is -1"),
        ({"sizes": ((8, 10),)}, "width 10 is not a multiple of 4 px"),
        ({"sizes": ()}, "at least one"),
        ({"sizes": ((8, 8), (8, 8))}, "different"),
        ({"class_names": ()}, "at least one"),
        ({"tokenizer_sha256": None}, "must be texts"),
        ({"provenance": {"path": Path("pictures")}}, "provenance cannot be written as JSON"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_cache_json_missing_or_damaged_is_one_line(tmp_path: Path, folder: Path) -> None:
    for read in (FeatureCache, verify):
        with pytest.raises(FileNotFoundError, match=r"is not a feature cache: it holds no cache\.json"):
            read(tmp_path)
    path = folder / "cache.json"
    good = json.loads(path.read_text())
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({**good, "format": 2}), "update flexvar"),
        (json.dumps({**good, "views": "4"}), "views of the cache is '4'"),
        (json.dumps({**good, "extra": 1}), "cannot be read"),
        (json.dumps({name: value for name, value in good.items() if name != "pictures"}), "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            FeatureCache(folder)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=message):
            CacheWriter(folder, SETTINGS)
    assert CacheWriter(folder, SETTINGS, overwrite=True).missing() == [0, 1, 2]
