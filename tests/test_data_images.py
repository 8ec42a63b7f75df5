"""Folders of pictures: any file as a person sees it, any size, and damage that stops nothing."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexvar.data.given import pictures_of
from flexvar.data.images import ImageFolder, _Names, imagenet_classes, open_picture, pictures_below, upright_rgb
from flexvar.data.source import PictureSource


def save(path: Path, colour: object = (200, 30, 30), size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def gradient(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards, so that a pixel tells where it came from."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("b two", (0, 255, 0)), ("a one", (255, 0, 0)), ("n01440764", (0, 0, 255))):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", colour)
    (tmp_path / "README.txt").write_text("not a picture")
    return tmp_path


def test_class_folders_are_sorted_and_imagenet_names_are_spoken(folder: Path) -> None:
    source = ImageFolder(folder)
    assert isinstance(source, PictureSource)
    assert source.class_names == ("a one", "b two", "tench")
    assert len(source) == 9
    for index in range(9):
        pixels, label = source.draw(index, (16, 16), np.random.default_rng(index))
        assert label == index // 3
        assert tuple(pixels[8, 8]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)][label]


def test_a_listing_is_small_and_knows_any_name(tmp_path: Path) -> None:
    names = ["é/ü.png", "a\nb.png", "x" * 200 + ".png", "n/日本.png", *(f"n0144/{n:08d}.JPEG" for n in range(1000))]
    listing = _Names(iter(names))
    assert [listing[place] for place in range(len(names))] == names
    assert len(pickle.dumps(listing)) < 40 * len(names)  # a path alone takes some 300 bytes


def test_a_folder_of_pictures_is_one_class(tmp_path: Path) -> None:
    for name in ("one.JPG", "two.jpeg", "three.webp", "four.bmp", "five.png"):
        save(tmp_path / "cats" / name)
    source = ImageFolder(tmp_path / "cats")
    assert source.class_names == ("cats",)
    assert len(source) == 5
    assert {source.draw(i, (8, 8), np.random.default_rng(0))[1] for i in range(5)} == {0}


def test_pictures_in_deeper_folders_belong_to_the_class(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "indoors" / "old" / "1.png")
    save(tmp_path / "dog" / "1.png")
    assert ImageFolder(tmp_path).class_names == ("cat", "dog")
    assert len(ImageFolder(tmp_path)) == 2


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b" / "1.png")
    save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "aside").symlink_to(tmp_path / "elsewhere")
    found = pictures_below(tmp_path / "a")
    assert [path.relative_to(tmp_path / "a").as_posix() for path in found] == ["aside/2.png", "b/1.png"]


@settings(max_examples=60, deadline=None)
@given(
    given_size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32),
    augment=st.booleans(),
)
def test_every_size_is_exact_and_the_same_state_gives_the_same_picture(
    tmp_path_factory: pytest.TempPathFactory,
    given_size: tuple[int, int],
    size: tuple[int, int],
    seed: int,
    augment: bool,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    gradient(*given_size).save(folder / "a.png")
    source = ImageFolder(folder, augment=augment)
    pixels, _ = source.draw(0, size, np.random.default_rng(seed))
    again, _ = source.draw(0, size, np.random.default_rng(seed))
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, again)
    pixels[:] = 0  # a source hands out arrays that may be written to


def test_without_augmentation_the_centre_is_cut_out(tmp_path: Path) -> None:
    gradient(50, 100).save(tmp_path / "a.png")
    source = ImageFolder(tmp_path, augment=False)
    first, _ = source.draw(0, (50, 50), np.random.default_rng(0))
    other, _ = source.draw(0, (50, 50), np.random.default_rng(1))
    assert np.array_equal(first, other)
    assert np.array_equal(first, np.asarray(gradient(50, 100))[:, 25:75])


def test_augmentation_crops_and_flips_and_can_be_switched_off(tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "a.png")

    def flipped(source: ImageFolder) -> list[bool]:
        drawn = [source.draw(0, (32, 32), np.random.default_rng(seed))[0].astype(int) for seed in range(200)]
        return [bool(pixels[0, 0, 0] > pixels[0, -1, 0]) for pixels in drawn]

    assert 70 < sum(flipped(ImageFolder(tmp_path))) < 130
    assert sum(flipped(ImageFolder(tmp_path, flip=False))) == 0

    def span(resize: float) -> int:
        source = ImageFolder(tmp_path, flip=False, resize=(resize, resize))
        return int(np.ptp(source.draw(0, (32, 32), np.random.default_rng(0))[0][0, :, 0].astype(int)))

    assert span(1.0) > 240
    assert 110 < span(2.0) < 140  # twice as large, half as much of the picture


def test_a_damaged_file_is_skipped_named_and_warned_about_once(folder: Path) -> None:
    broken = folder / "a one" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    text = folder / "a one" / "1.png"
    text.write_text("this is no picture")
    source = ImageFolder(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pixels, label = source.draw(0, (16, 16), np.random.default_rng(5))
    good, good_label = source.draw(2, (16, 16), np.random.default_rng(5))
    assert np.array_equal(pixels, good)
    assert label == good_label == 0
    assert source.unreadable == [broken, text]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert str(broken) in messages[0]
    assert str(text) in messages[1]
    assert all("\n" not in message for message in messages)


def test_want_of_memory_is_not_taken_for_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    source = ImageFolder(folder)
    with monkeypatch.context() as patch:
        patch.setattr("flexvar.data.images.upright_rgb", no_room)
        with pytest.raises(MemoryError, match=r"not enough memory to read .*0\.png; free some, or read with fewer processes"):
            source.draw(0, (16, 16), np.random.default_rng(5))
    assert source.unreadable == []
    source.draw(0, (16, 16), np.random.default_rng(5))


def test_the_next_readable_picture_may_lie_past_the_end(folder: Path) -> None:
    (folder / "n01440764" / "2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped a picture"):
        _, label = ImageFolder(folder).draw(8, (8, 8), np.random.default_rng(0))
    assert label == 0


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 1 pictures"):
        ImageFolder(tmp_path).draw(0, (8, 8), np.random.default_rng(0))


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        ImageFolder(tmp_path)
    save(tmp_path / "full" / "1.png")
    with pytest.raises(ValueError, match=r"class folder .*empty has no pictures"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").rmdir()
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"move loose\.png"):
        ImageFolder(tmp_path)


def test_wrong_arguments_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="factors of at least 1"):
        ImageFolder(folder, resize=(0.5, 1.0))
    with pytest.raises(IndexError, match="picture 9 does not exist"):
        ImageFolder(folder).draw(9, (8, 8), np.random.default_rng(0))
    with pytest.raises(ValueError, match="has no pixels"):
        ImageFolder(folder).draw(0, (8, 0), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
    ],
)
def test_every_kind_of_png_looks_as_a_person_expects(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    picture = open_picture(save(tmp_path / "a.png", colour, mode=mode))
    assert picture.mode == "RGB"
    assert picture.getpixel((3, 3)) == expected


def test_palette_transparency_and_cmyk(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_picture(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)
    save(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK")
    red, green, blue = open_picture(tmp_path / "cmyk.jpg").getpixel((0, 0))  # type: ignore[misc]
    assert red > 240
    assert green < 15
    assert blue < 15


def test_sixteen_bits_keep_their_transparency(tmp_path: Path) -> None:
    values = np.full((4, 4), 32896, np.uint16)
    values[:2] = 500
    Image.fromarray(values).save(tmp_path / "a.png", transparency=500)
    assert [open_picture(tmp_path / "a.png").getpixel((0, y)) for y in (0, 3)] == [(255, 255, 255), (128, 128, 128)]
    column = pictures_of(tmp_path / "a.png")[0, :, :, 0]  # (4, 4): channels, rows
    assert column[3].tolist() == [0, 0, 1, 1]
    assert column[0, 3].item() == pytest.approx(128 / 255)


def test_modes_that_do_not_say_their_range_or_convert_to_nothing() -> None:
    with pytest.raises(ValueError, match="the picture holds whole numbers up to 200 in 32 bits; convert it to mode L"):
        upright_rgb(Image.fromarray(np.full((4, 4), 200, np.int32)))
    with pytest.raises(ValueError, match="the picture holds whole numbers up to 70000 in 32 bits"):
        upright_rgb(Image.fromarray(np.full((4, 4), 70000, np.int32)))
    with pytest.raises(ValueError, match=r"the picture holds floats of unknown range \(mode F\); convert it to mode L"):
        upright_rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    assert upright_rgb(Image.fromarray(np.full((4, 4), 32896, np.int32))).getpixel((0, 0)) == (128, 128, 128)
    assert upright_rgb(Image.new("LA", (4, 4), (0, 0)).convert("La")).getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    gradient(20, 40).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (20, 40)


def test_open_picture_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    gradient(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    for name, error, words in (
        ("text.png", ValueError, "is not an image"),
        ("cut.jpg", ValueError, "cannot be read"),
        ("none.png", FileNotFoundError, "there is no picture"),
    ):
        with pytest.raises(error, match=words) as caught:
            open_picture(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_imagenet_has_a_thousand_different_names() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert classes[0] == ("n01440764", "tench")
    assert classes[207] == ("n02099601", "golden retriever")
    assert classes[-1][1] == "toilet tissue"
    assert len({folder for folder, _ in classes}) == 1000
    assert len({name.lower() for _, name in classes}) == 1000
    assert all(name == name.strip() and "," not in name for _, name in classes)
    assert [folder for folder, _ in classes] == sorted(folder for folder, _ in classes)
