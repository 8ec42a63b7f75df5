"""Drawn shapes, and writing any drawn source as class folders."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexvar.data.images import ImageFolder
from flexvar.data.shapes import OUTLINES, Shapes
from flexvar.data.source import PictureSource, write_pictures


@settings(max_examples=100, deadline=None)
@given(
    index=st.integers(0, 999),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    seed=st.integers(0, 2**32),
)
def test_every_size_is_exact_and_the_same_state_gives_the_same_picture(index: int, size: tuple[int, int], seed: int) -> None:
    source = Shapes(views=100)
    pixels, label = source.draw(index, size, np.random.default_rng(seed))
    again, _ = source.draw(index, size, np.random.default_rng(seed))
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert label == index % 10
    assert np.array_equal(pixels, again)
    pixels[:] = 0  # a source hands out arrays that may be written to


def test_names_length_and_protocol() -> None:
    source = Shapes(views=7)
    assert isinstance(source, PictureSource)
    assert len(source) == 70
    assert len(set(source.class_names)) == 10
    with pytest.raises(ValueError, match="views is 0"):
        Shapes(views=0)
    with pytest.raises(IndexError, match="picture 70 does not exist"):
        source.draw(70, (8, 8), np.random.default_rng(0))


@pytest.mark.parametrize("name", OUTLINES)
def test_no_shape_is_cut_off_however_it_is_tilted(name: str) -> None:
    assert np.linalg.norm(OUTLINES[name][0], axis=1).max() <= 1 + 1e-9


@pytest.mark.parametrize("label", range(10))
def test_a_shape_is_large_and_stands_out(label: int) -> None:
    for seed in range(20):
        pixels, _ = Shapes().draw(label, (65, 97), np.random.default_rng(seed))
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        front, back = colours[np.argsort(counts)[-2:]].astype(int)
        assert counts.max() < 0.97 * 65 * 97
        assert np.abs(front - back).max() > 60


def test_write_pictures_gives_folders_that_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes"
    assert write_pictures(Shapes(), out, count_per_class=3, size=(17, 33), seed=5) == 30
    source = ImageFolder(out, augment=False)
    assert source.class_names == tuple(sorted(OUTLINES))
    assert len(source) == 30
    expected, _ = Shapes().draw(3, (17, 33), np.random.default_rng((5, 3, 2)))
    assert np.array_equal(np.asarray(Image.open(out / "star" / "0002.png")), expected)
    assert "seed 5" in (out / "README.txt").read_text()
    assert not list(out.rglob("*.partial"))
    capsys.readouterr()


def test_the_first_pictures_do_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    write_pictures(Shapes(), tmp_path / "few", count_per_class=1, size=(16, 16), seed=0)
    write_pictures(Shapes(views=1), tmp_path / "more", count_per_class=2, size=(16, 16), seed=0)
    first, again = ((tmp_path / name / "heart" / "0000.png").read_bytes() for name in ("few", "more"))
    assert first == again


def test_write_pictures_refuses_to_mix_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_pictures(Shapes(), tmp_path, count_per_class=1, size=(8, 8), seed=0)
    write_pictures(Shapes(), tmp_path, count_per_class=1, size=(8, 8), seed=0, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(FileExistsError, match="is a file"):
        write_pictures(Shapes(), tmp_path / "mine.txt", count_per_class=1, size=(8, 8), seed=0)
    with pytest.raises(ValueError, match="count_per_class is 0"):
        write_pictures(Shapes(), tmp_path / "new", count_per_class=0, size=(8, 8), seed=0)
    assert not (tmp_path / "new").exists()
    write_pictures(Shapes(), tmp_path / "two", count_per_class=2, size=(8, 8), seed=0)
    with pytest.raises(ValueError, match="only drawn sources"):
        write_pictures(ImageFolder(tmp_path / "two"), tmp_path / "new", count_per_class=1, size=(8, 8), seed=0)
