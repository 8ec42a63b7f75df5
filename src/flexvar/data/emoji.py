"""Scenes of emoji, drawn from the Noto Color Emoji font (SIL Open Font License 1.1) at any size."""

import difflib
import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flexvar.data.source import check_request

STRIKE = 109  # the only size that the font's bitmaps have
CELL = (136, 128)  # width and height in pixels of a glyph at that size
VARIATION = "\ufe0f"  # asks for the coloured form of a character; the font needs no asking
SKIN_TONES = ("\U0001f3fb", "\U0001f3fc", "\U0001f3fd", "\U0001f3fe", "\U0001f3ff")
SKIN_TONE_SHARE = 0.3  # of the pictures of a class that has skin tones; yellow stays the majority

FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",  # macOS
    "/Library/Fonts/NotoColorEmoji.ttf",
)

# Soft backgrounds that no one confuses with each other, and how often each is chosen relative to the others.
BACKGROUNDS: tuple[tuple[tuple[int, int, int], float], ...] = (
    ((255, 255, 255), 4.0),  # white
    ((203, 208, 214), 1.0),  # grey
    ((255, 205, 210), 1.0),  # pink
    ((255, 214, 165), 1.0),  # apricot
    ((255, 244, 186), 1.0),  # cream yellow
    ((205, 238, 184), 1.0),  # spring green
    ((165, 226, 208), 1.0),  # mint
    ((186, 222, 251), 1.0),  # sky
    ((120, 172, 226), 1.0),  # blue
    ((216, 200, 246), 1.0),  # lilac
    ((120, 86, 140), 1.0),  # plum
    ((52, 66, 92), 1.0),  # night
)

# Well known and unlike each other: a small model can learn them, and a person knows its samples at a glance.
# fmt: off
WELL_KNOWN: tuple[str, ...] = (
    "smiling face with sunglasses", "enraged face", "pile of poo", "ghost", "alien", "robot",
    "jack-o-lantern", "snowman", "cat face", "dog face", "panda", "frog", "fox", "pig face",
    "penguin", "unicorn", "octopus", "butterfly", "lady beetle", "turtle", "tropical fish",
    "pizza", "hamburger", "red apple", "banana", "watermelon", "strawberry", "cherries", "carrot",
    "doughnut", "birthday cake", "avocado", "red heart", "rocket", "automobile", "sailboat", "guitar",
    "soccer ball", "basketball", "light bulb", "wrapped gift", "umbrella", "crescent moon", "star",
    "rainbow", "cactus", "sunflower", "Christmas tree",
)
# fmt: on


# What people type for the names above, where the `emoji` package does not know it.
ALSO_CALLED: dict[str, str] = {
    "burger": "hamburger", "donut": "doughnut", "ladybug": "lady beetle", "pumpkin": "jack-o-lantern", "moon": "crescent moon",
    "present": "wrapped gift", "football": "soccer ball", "cherry": "cherries", "fish": "tropical fish",
    "smiley": "smiling face with sunglasses",
}  # fmt: skip
RUDE = ("shit", "fu")  # other names that are left out


class EmojiScenes:
    """A PictureSource of emoji on plain backgrounds: one class an emoji, endlessly many scenes.

    `classes` are names such as "pizza" or "cat face" (see `every_emoji`; None means all of them, about 1,400) or other
    names for them ("heart", see `emoji_aliases`; the class has the name all the same), `font`
    is a NotoColorEmoji.ttf (None means the installed one), and an epoch holds `views` pictures of each class. Picture
    `index` has label index % number of classes.

    Raises FileNotFoundError without the font, ModuleNotFoundError without the `emoji` package, and ValueError for an
    unknown or repeated name and for views below 1.
    """

    licence = "emoji from Noto Color Emoji, (c) Google, SIL Open Font License 1.1"

    def __init__(self, classes: Sequence[str] | None = None, font: Path | None = None, views: int = 1000) -> None:
        if views < 1:
            raise ValueError(f"views is {views}: an epoch needs at least 1 picture of each class")
        if isinstance(classes, str):
            raise ValueError(f"classes is the text {classes!r}: give a list of names, [{classes!r}]")
        self.font = find_font(font)
        self.views = views
        if classes is None:
            self._characters = every_emoji(self.font)
        else:
            self._characters = _characters_of(classes, self.font)
        self.class_names: tuple[str, ...] = tuple(self._characters)

    def __len__(self) -> int:
        return len(self.class_names) * self.views

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Scene `index` at `size` = (height, width): uint8 (height, width, 3) RGB, and its label. See PictureSource."""
        check_request(index, len(self), size)
        label = index % len(self.class_names)
        looks = _looks(self.font, self._characters[self.class_names[label]])
        toned, which = rng.random() < SKIN_TONE_SHARE, rng.integers(len(SKIN_TONES))
        look = looks[1 + which % (len(looks) - 1)] if toned and len(looks) > 1 else looks[0]
        return scene(look, size, rng), label


def find_font(font: Path | None = None) -> Path:
    """The font file: `font` itself, else the path in FLEXVAR_EMOJI_FONT, else the first of FONT_PLACES that exists.

    Raises FileNotFoundError, which says how to get the font.
    """
    asked = font if font is not None else os.environ.get("FLEXVAR_EMOJI_FONT")
    for place in [asked] if asked else FONT_PLACES:
        path = Path(place).expanduser()
        if path.is_file():
            return path
    raise FileNotFoundError(
        (f"no emoji font at {asked}" if asked else "the font NotoColorEmoji.ttf is not installed")
        + ": install the Debian package fonts-noto-color-emoji, or give its path as --font (font=) or in FLEXVAR_EMOJI_FONT"
    )


@lru_cache(maxsize=4)
def every_emoji(font: Path) -> dict[str, str]:
    """English name -> character of every emoji that is one code point and that `font` draws like no other.

    Flags, sequences and skin tones are left out; of emoji with equal bitmaps the first by code point stays. Takes
    some seconds the first time.
    """
    found: dict[str, str] = {}
    seen: set[bytes] = set()
    for name, character in _named_characters().items():
        bitmap = glyph(font, character)
        if bitmap is None or bitmap.tobytes() in seen:
            continue
        seen.add(bitmap.tobytes())
        found[name] = character
    return found


def are_emoji(names: Sequence[str]) -> bool:
    """Whether all of these are names of emoji; False where the `emoji` package, which knows them, is not installed."""
    try:
        return set(names) <= set(_named_characters())
    except ModuleNotFoundError:
        return False


def emoji_aliases(names: Sequence[str]) -> dict[str, str]:
    """Other name -> name, for those of `names` that people also call otherwise ("heart" for "red heart"); none is among the names."""
    package, known = _emoji_package(), _named_characters()
    also = {
        alias.strip(":").replace("_", " "): name
        for name in names
        if name in known
        for alias in package.EMOJI_DATA[known[name]].get("alias", ())
    }
    also |= {alias: name for alias, name in ALSO_CALLED.items() if name in names}
    taken = {*RUDE, *(name.casefold() for name in names)}
    return {alias: name for alias, name in also.items() if alias not in taken}


@lru_cache(maxsize=4096)
def glyph(font: Path, text: str) -> Image.Image | None:
    """The bitmap of one emoji, cut to what is visible: mode RGBa (colours already multiplied by alpha), at most
    136 x 128 px. None where the font does not draw `text`, or draws it as several glyphs.
    """
    typeface = _typeface(font)
    text = text.replace(VARIATION, "")
    if typeface.getbbox(text)[2] > CELL[0]:
        return None  # a skin tone that the text layout at hand (Pillow without Raqm) cannot join to its emoji
    image = Image.new("RGBA", CELL)
    ImageDraw.Draw(image).text((0, 0), text, font=typeface, embedded_color=True)
    visible = image.getbbox()
    if visible is None:
        return None
    # Drawn over transparent black, Pillow leaves colours times alpha in an image that calls itself RGBA: convert()
    # would multiply them a second time, which gives dark edges.
    return Image.frombytes("RGBa", CELL, image.tobytes()).crop(visible)


def scene(look: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One emoji, once or several times, on a plain background: uint8 (height, width, 3) for `size` = (height, width).

    `look` is what `glyph` gives. A near-square picture holds one, large and near the centre (sometimes four, where
    there is room); an oblong one is filled by a row or column, or holds a single one somewhere. Nothing is cut off.
    """
    picture = np.empty((*size, 3), np.uint8)
    picture[:] = _background(look, rng)
    cells = _cells(size, rng)
    share = rng.uniform(0.78, 0.95)  # of the shorter side of a cell
    for top, left, height, width in cells:
        side = min(height, width)
        varied = share if len(cells) == 1 else share * rng.uniform(0.9, 1.0)
        stamp = _resized(look, side * varied)
        free_height, free_width = height - stamp.shape[0], width - stamp.shape[1]
        jitter_y, jitter_x = rng.uniform(-0.04, 0.04, 2) * side
        y = round(top + np.clip(free_height / 2 + jitter_y, 0, free_height))
        x = round(left + np.clip(free_width / 2 + jitter_x, 0, free_width))
        _paste(picture, stamp, y, x)
    return picture


def _cells(size: tuple[int, int], rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Where the copies stand: (top, left, height, width) of each one's share of the picture, in pixels."""
    height, width = size
    short, long = min(size), max(size)
    chance, position = rng.random(2)
    if long < 1.5 * short:
        if short >= 96 and chance < 0.15:
            return [(y * height / 2, x * width / 2, height / 2, width / 2) for y in (0, 1) for x in (0, 1)]
        return [(0, 0, height, width)]
    if chance < 1 / 3:
        start = position * (long - short)
        return [(0, start, short, short) if width > height else (start, 0, short, short)]
    copies = round(long / short)
    if width > height:
        return [(0, i * width / copies, height, width / copies) for i in range(copies)]
    return [(i * height / copies, 0, height / copies, width) for i in range(copies)]


def _background(look: Image.Image, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour of the palette; those in which this emoji would drown are passed over, though never over half."""
    pixels = np.asarray(look, np.float32).reshape(-1, 4)
    mean = pixels[:, :3].sum(0) / (pixels[:, 3].sum() / 255)
    colours, weights = (np.array(column) for column in zip(*BACKGROUNDS, strict=True))
    distances = np.sqrt((colours - mean) ** 2 @ (0.30, 0.59, 0.11))  # as the eye weighs red, green and blue
    weights = np.where(distances >= min(60, np.median(distances)), weights, 0)
    return BACKGROUNDS[int(rng.choice(len(BACKGROUNDS), p=weights / weights.sum()))][0]


def _resized(look: Image.Image, side: float) -> np.ndarray:
    """The emoji with its longer side at `side` px: float32 (height, width, 4), 0 to 255, colours times alpha.

    Small glyphs ("small blue diamond") stay somewhat smaller than the large ones they would be mistaken for. Colours
    are averaged after multiplication with alpha, so the edges get no dark halo.
    """
    scale = side / max(*look.size, 0.7 * CELL[1])
    shape = max(1, int(look.width * scale)), max(1, int(look.height * scale))
    return np.asarray(look.resize(shape, Image.Resampling.LANCZOS, reducing_gap=3.0), np.float32)


def _paste(picture: np.ndarray, stamp: np.ndarray, top: int, left: int) -> None:
    """Lay a stamp of `_resized` over the picture, in place."""
    region = picture[top : top + stamp.shape[0], left : left + stamp.shape[1]]
    region[:] = np.clip(stamp[..., :3] + region * (1 - stamp[..., 3:] / 255) + 0.5, 0, 255)


def _looks(font: Path, character: str) -> list[Image.Image]:
    """The bitmaps of one class: the plain emoji, then its skin tones where it has any."""
    plain = character.replace(VARIATION, "")
    toned = [plain + tone for tone in SKIN_TONES if plain + tone in _emoji_package().EMOJI_DATA]
    return [bitmap for bitmap in (glyph(font, text) for text in [character, *toned]) if bitmap is not None]


def _characters_of(names: Sequence[str], font: Path) -> dict[str, str]:
    """Name -> character for the emoji asked for by name, by another name or in another case, in their order."""
    known = _named_characters()
    called = {**emoji_aliases(list(known)), **{name: name for name in known}}
    called = {other.casefold(): name for other, name in called.items()}
    found: dict[str, str] = {}
    for asked in names:
        name = called.get(asked.casefold(), asked)
        if name not in known or glyph(font, known[name]) is None:
            near = ", ".join(repr(other) for other in difflib.get_close_matches(asked.casefold(), called, 3))
            raise ValueError(f"no emoji is called {asked!r}: " + (f"try {near}" if near else "flexvar.data.every_emoji() names them all"))
        if name in found:
            raise ValueError(f"classes name the emoji {name!r} twice: name each once")
        found[name] = known[name]
    if not found:
        raise ValueError("classes is empty: name at least one emoji, or none at all for every one of the font")
    return found


@lru_cache(maxsize=1)
def _named_characters() -> dict[str, str]:
    """Name -> character of all emoji of one code point, by code point, whether a font draws them or not."""
    package = _emoji_package()
    found: dict[str, str] = {}
    for character in sorted(package.EMOJI_DATA):
        entry = package.EMOJI_DATA[character]
        if len(character.replace(VARIATION, "")) == 1 and entry["status"] == package.STATUS["fully_qualified"]:
            found[unicodedata.normalize("NFC", entry["en"].strip(":").replace("_", " ").replace("’", "'"))] = character
    return found


def _emoji_package() -> ModuleType:
    try:
        import emoji
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the names of emoji need a package: pip install 'flexvar[emoji]'") from None
    return emoji


@lru_cache(maxsize=4)
def _typeface(font: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(font), STRIKE)
    except OSError:
        raise ValueError(f"{font} has no bitmaps of {STRIKE} px: give a NotoColorEmoji.ttf as --font (font=)") from None
