"""Drawn shapes in random colours: labelled pictures that need no download, no font and no licence."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from flexvar.data.source import check_request

OVERSAMPLING = 4  # shapes are drawn this much larger and reduced, which smooths their edges
TILT = 15.0  # degrees; more would turn some shapes into each other


class Shapes:
    """A PictureSource of ten drawn shapes, one a picture, on plain contrasting backgrounds.

    An epoch holds `views` pictures of each class. Picture `index` has label index % number of classes. Raises
    ValueError for views below 1.
    """

    licence = "none needed: drawn by flexvar, free for any use"

    def __init__(self, views: int = 1000) -> None:
        if views < 1:
            raise ValueError(f"views is {views}: an epoch needs at least 1 picture of each class")
        self.views = views
        self.class_names: tuple[str, ...] = tuple(OUTLINES)

    def __len__(self) -> int:
        return len(self.class_names) * self.views

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Picture `index` at `size` = (height, width): uint8 (height, width, 3) RGB, and its label. See PictureSource.

        The shape spans 55 to 90 % of the shorter side, is tilted a little, and is never cut off.
        """
        check_request(index, len(self), size)
        label = index % len(self.class_names)
        height, width = size
        side = max(1, int(min(size) * rng.uniform(0.55, 0.9)))
        mask = _mask(OUTLINES[self.class_names[label]], side, rng.uniform(-TILT, TILT))
        foreground, background = _colours(rng)
        place_x, place_y = rng.random(2)
        picture = Image.new("RGB", (width, height), background)
        picture.paste(foreground, (round(place_x * (width - side)), round(place_y * (height - side))), mask)
        return np.array(picture), label


def _mask(outlines: list[np.ndarray], side: int, degrees: float) -> Image.Image:
    """The shape as a smooth mask, mode L, `side` x `side`: the first outline filled, the others cut out of it."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    large = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING))
    pen = ImageDraw.Draw(large)
    for number, outline in enumerate(outlines):
        points = (outline @ turn + 1) / 2 * (side * OVERSAMPLING - 1)
        pen.polygon([(float(x), float(y)) for x, y in points], fill=0 if number else 255)
    return large.reduce(OVERSAMPLING)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A vivid foreground and a soft background, light or dark, drawn again until the eye tells them apart."""
    while True:
        hue_front, hue_back, dark = rng.random(), rng.random(), rng.random() < 0.25
        front = _rgb(hue_front, rng.uniform(0.6, 0.95), rng.uniform(0.85, 1.0) if dark else rng.uniform(0.55, 0.95))
        back = _rgb(hue_back, 0.5, 0.3) if dark else _rgb(hue_back, rng.uniform(0.0, 0.3), rng.uniform(0.92, 1.0))
        difference = np.subtract(front, back)
        if np.sqrt(difference**2 @ (0.30, 0.59, 0.11)) >= 90:
            return front, back


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _star(points: int, inner: float) -> np.ndarray:
    """A star with its points on the unit circle and the corners between them at radius `inner`."""
    radii = np.tile([1.0, inner], points)
    return _polygon(2 * points) * radii[:, None]


def _polygon(corners: int, turn: float = -90.0) -> np.ndarray:
    """A regular polygon on the unit circle, its first corner at `turn` degrees (-90 is the top)."""
    angles = np.radians(turn + np.arange(corners) * 360 / corners)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 1.5], 1) / 18.6


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """A closed outline from its right half, top to bottom."""
    return np.array(right + [(-x, y) for x, y in reversed(right)])


# Corners (N, 2) as (x, y) within the unit circle, y downwards, so that a tilted shape still fits its square.
_CIRCLE = _polygon(96)
OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [_CIRCLE],
    "square": [_polygon(4, -45.0)],
    "triangle": [_polygon(3)],
    "star": [_star(5, 0.42)],
    "ring": [_CIRCLE, _CIRCLE * 0.55],
    "cross": [
        _mirrored([(0.28, -0.95), (0.28, -0.28), (0.95, -0.28), (0.95, 0.28), (0.28, 0.28), (0.28, 0.95)]),
    ],
    "heart": [_heart()],
    "hexagon": [_polygon(6)],
    "crescent": [_CIRCLE, _CIRCLE * 0.8 + (0.42, -0.12)],
    "arrow": [_mirrored([(0.0, -1.0), (0.75, -0.1), (0.3, -0.1), (0.3, 0.95)])],
}
