"""Emoji scenes: every emoji has a name, every scene is whole, and what is missing is said in one line."""

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexvar.data import aliases_of, imagenet_classes
from flexvar.data import emoji as scenes
from flexvar.data.emoji import WELL_KNOWN, EmojiScenes, emoji_aliases, every_emoji, find_font, glyph
from flexvar.data.source import PictureSource


def installed_font() -> Path | None:
    try:
        return find_font()
    except FileNotFoundError:
        return None


FONT = installed_font()
needs_font = pytest.mark.skipif(FONT is None, reason="needs the Debian package fonts-noto-color-emoji")


@needs_font
def test_every_emoji_has_a_name_as_people_type_it() -> None:
    assert FONT is not None
    known = every_emoji(FONT)
    assert len(known) > 1300
    assert known["pizza"] == "🍕"
    assert known["cat face"] == "🐱"
    assert known["red heart"] == "❤️"
    assert known["five o'clock"] == "🕔"
    assert set(WELL_KNOWN) <= set(known)
    assert len({name.lower() for name in known}) == len(known)
    assert not any(character in name for name in known for character in ":_/\\’")
    assert all(len(character.replace("\ufe0f", "")) == 1 for character in known.values())


def test_the_well_known_are_48_different_names() -> None:
    assert len(WELL_KNOWN) == len(set(WELL_KNOWN)) == 48


@needs_font
@settings(max_examples=150, deadline=None)
@given(
    index=st.integers(0, 47),
    size=st.one_of(
        st.tuples(st.integers(16, 150), st.integers(16, 150)),
        st.sampled_from([(64, 64), (64, 192), (128, 64), (200, 40), (97, 97)]),
    ),
    seed=st.integers(0, 2**32),
)
def test_a_scene_has_the_size_asked_for_and_is_never_cut(index: int, size: tuple[int, int], seed: int) -> None:
    source = EmojiScenes(WELL_KNOWN)
    pixels, label = source.draw(index, size, np.random.default_rng(seed))
    again, _ = source.draw(index, size, np.random.default_rng(seed))
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert label == index
    assert np.array_equal(pixels, again)
    background = np.array([colour for colour, _ in scenes.BACKGROUNDS])
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    nearest = np.abs(corners[:, None] - background).max(-1).min(-1)
    assert (nearest <= 2).sum() >= 2  # plain background, up to the faint edge of an emoji in a corner
    assert (np.abs(pixels.astype(int) - corners[nearest.argmin()]).max(-1) > 30).mean() > 0.02


@needs_font
@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 2**32),
)
def test_stamps_lie_inside_the_picture(size: tuple[int, int], seed: int) -> None:
    """Cells cover no more than the picture, and an emoji no more than its cell."""
    height, width = size
    cells = scenes._cells(size, np.random.default_rng(seed))
    for top, left, cell_height, cell_width in cells:
        assert min(top, left) >= 0
        assert top + cell_height <= height + 1e-6
        assert left + cell_width <= width + 1e-6
    assert len(cells) in {1, 4, round(max(size) / min(size))}
    assert FONT is not None
    look = glyph(FONT, "🚗")
    assert look is not None
    stamp = scenes._resized(look, 0.95 * min(size))
    assert max(stamp.shape[:2]) <= max(1, 0.95 * min(size))
    assert scenes.scene(look, size, np.random.default_rng(seed)).shape == (*size, 3)


@needs_font
def test_oblong_pictures_are_mostly_filled_by_a_row() -> None:
    counts = [len(scenes._cells((64, 192), np.random.default_rng(seed))) for seed in range(600)]
    assert set(counts) == {1, 3}
    assert 0.25 < counts.count(1) / 600 < 0.42
    near_square = [len(scenes._cells((64, 64), np.random.default_rng(seed))) for seed in range(100)]
    assert set(near_square) == {1}
    roomy = [len(scenes._cells((96, 128), np.random.default_rng(seed))) for seed in range(600)]
    assert 0.10 < roomy.count(4) / 600 < 0.20


@needs_font
@pytest.mark.parametrize("side", [20, 50, 117, 200])
def test_edges_have_no_dark_halo(side: int) -> None:
    """Over white, no pixel of the all-yellow star is darker than the star's own colours."""
    assert FONT is not None
    look = glyph(FONT, "⭐")
    assert look is not None
    pixels = np.asarray(look)
    picture = np.full((200, 200, 3), 255, np.uint8)
    scenes._paste(picture, scenes._resized(look, side), 0, 0)
    assert picture[..., 0].min() >= pixels[pixels[..., 3] == 255][:, 0].min() - 4


@needs_font
def test_skin_tones_are_further_looks_of_the_same_class() -> None:
    source = EmojiScenes(["waving hand", "pizza"], views=1)
    assert FONT is not None
    assert len(scenes._looks(FONT, "🍕")) == 1
    assert len(scenes._looks(FONT, "👋")) in {1, 6}  # 1 where Pillow has no Raqm
    assert source.draw(0, (64, 64), np.random.default_rng(0))[1] == 0


def test_other_names_are_what_people_type() -> None:
    also = emoji_aliases(WELL_KNOWN)
    assert {alias: also[alias] for alias in ("heart", "cat", "car", "donut", "robot face")} == {
        "heart": "red heart", "cat": "cat face", "car": "automobile", "donut": "doughnut", "robot face": "robot",
    }  # fmt: skip
    assert not set(also) & set(WELL_KNOWN)
    assert "cat" not in emoji_aliases(["cat", "cat face", "no emoji"])  # where it is a class of its own


def test_classes_get_the_other_names_that_belong_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert aliases_of(WELL_KNOWN) == emoji_aliases(WELL_KNOWN)
    assert aliases_of([name for _, name in imagenet_classes()]) == dict(imagenet_classes())
    assert aliases_of(["tench", "mine"]) == {"n01440764": "tench"}
    assert aliases_of(["mine", "yours"]) == {}

    def without() -> None:
        raise ModuleNotFoundError("No module named 'emoji'")

    monkeypatch.setattr(scenes, "_named_characters", without)
    assert aliases_of(["pizza", "tench"])["n01440764"] == "tench"


@needs_font
def test_names_labels_and_errors() -> None:
    source = EmojiScenes(["pizza", "cat face"], views=3)
    assert isinstance(source, PictureSource)
    assert source.class_names == ("pizza", "cat face")
    assert len(source) == 6
    assert [source.draw(i, (16, 16), np.random.default_rng(0))[1] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert pickle.loads(pickle.dumps(source)).class_names == source.class_names  # worker processes need this
    with pytest.raises(ValueError, match=r"no emoji is called 'piza': try 'pizza'"):
        EmojiScenes(["piza"])
    assert EmojiScenes(["heart", "CAR", "Christmas Tree"]).class_names == ("red heart", "automobile", "Christmas tree")
    with pytest.raises(ValueError, match="classes name the emoji 'red heart' twice"):
        EmojiScenes(["heart", "red heart"])
    with pytest.raises(ValueError, match="classes is empty"):
        EmojiScenes([])
    with pytest.raises(ValueError, match="give a list of names"):
        EmojiScenes("pizza")
    with pytest.raises(ValueError, match="views is 0"):
        EmojiScenes(["pizza"], views=0)
    with pytest.raises(IndexError, match="picture 6 does not exist"):
        source.draw(6, (16, 16), np.random.default_rng(0))


def test_a_missing_font_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scenes, "FONT_PLACES", (str(tmp_path / "none.ttf"),))
    monkeypatch.delenv("FLEXVAR_EMOJI_FONT", raising=False)
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji, or give its path as --font"):
        EmojiScenes(["pizza"])
    with pytest.raises(FileNotFoundError, match=r"no emoji font at .*mine\.ttf"):
        EmojiScenes(["pizza"], font=tmp_path / "mine.ttf")
    (tmp_path / "other.ttf").write_text("no font")
    monkeypatch.setenv("FLEXVAR_EMOJI_FONT", str(tmp_path / "other.ttf"))
    assert find_font() == tmp_path / "other.ttf"
    with pytest.raises(ValueError, match=r"give a NotoColorEmoji\.ttf as --font"):
        EmojiScenes(["pizza"])


def test_a_missing_emoji_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_emoji(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "emoji":
            raise ModuleNotFoundError("No module named 'emoji'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_emoji)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flexvar\[emoji\]'"):
        scenes._emoji_package()
