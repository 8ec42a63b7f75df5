"""The one judge of class accuracy: a small network that is trained in minutes on real renderings and never sees what a model draws."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flexvar.data import PictureSource
from flexvar.evaluation.metrics import NORMAL_95
from flexvar.weights import fill
from flexvar.writing import write_whole

BUNDLED = "emoji-classifier.safetensors"
SMALLEST = 32  # px
UNSEEN_SEED = 1_000_003  # of renderings to measure on: no training uses it
WIDTHS, KERNELS = (32, 64, 96, 128, 112), (5, 3, 3, 3, 3)  # of the layers, each of which halves the resolution; the last sees 65 px
PICTURES_AT_ONCE = 64
JUMBLED_SHARE = 0.25
LEARNING_RATE, WEIGHT_DECAY, WARM_UP_STEPS = 2e-3, 0.01, 50


class Classifier(nn.Module):
    """Tells the class of pictures of any size from 32 x 32 px.

    class_names: what its logits stand for. size: the side in pixels to which every square crop is resized. Pictures are (B, 3, H, W) in
    [-1, 1]; what lies outside is cut off, as in a picture that is saved. Raises ValueError for other shapes and smaller pictures.
    """

    def __init__(self, class_names: Sequence[str], size: int = 64) -> None:
        super().__init__()
        if not class_names or size < SMALLEST:
            raise ValueError(f"a classifier of {len(class_names)} classes at {size} px cannot be; give at least 1 class and {SMALLEST} px")
        self.class_names, self.size = tuple(class_names), size
        layers: list[nn.Module] = []
        for inside, outside, kernel in zip((3, *WIDTHS), WIDTHS, KERNELS, strict=False):
            layers += [nn.Conv2d(inside, outside, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, outside), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], len(self.class_names))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes). The head is linear: averaging the features of crops is averaging their logits."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F), averaged over the picture, and over the crops of an oblong one."""
        crops = self.crops(images)  # (B, n, 3, size, size)
        maps = self.body(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])  # (B, n, F, size/32, size/32)
        return maps.mean((1, 3, 4))  # (B, F)

    def crops(self, images: Tensor) -> Tensor:
        """Squares (B, n, 3, size, size) along the longer side, each overlapping the next by half: 1 at the centre of a near-square picture,
        3 of one that is twice as long as wide, 5 of one three times as long.
        Raises ValueError for other tensors, and for pictures that are too small.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < SMALLEST:
            raise ValueError(f"the pictures are {tuple(images.shape)}; give (B, 3, H, W) with both sides at least {SMALLEST} px")
        images = images.to(self.head.weight).clamp(-1, 1)
        short, long = sorted(images.shape[-2:])
        count = 2 * round(long / short) - 1
        starts = [(long - short) // 2] if count == 1 else [round(i * (long - short) / (count - 1)) for i in range(count)]
        side = -1 if images.shape[-1] == long else -2
        crops = torch.stack([images.narrow(side, start, short) for start in starts], 1)  # (B, n, 3, short, short)
        if short == self.size:
            return crops
        resized = F.interpolate(crops.flatten(0, 1), (self.size, self.size), mode="bilinear", antialias=True)
        return resized.unflatten(0, crops.shape[:2])

    def save(self, path: Path | str, dtype: torch.dtype = torch.float16) -> None:
        """Writes one safetensors file that holds the class names too; it appears when it is complete."""
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"class_names": json.dumps(self.class_names), "size": str(self.size)}
        write_whole(Path(path), lambda beside: save_file(tensors, beside, metadata))


def load_classifier(path: Path | str | None = None) -> Classifier:
    """Reads a classifier onto the CPU in float32, in evaluation mode; without a path the bundled one of the emoji model.

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing, damaged or not a classifier's.
    """
    path = Path(str(files("flexvar") / "assets" / BUNDLED)) if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no classifier {path}; train one with `python -m benchmarks.emoji_classifier {path}`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            classifier = Classifier(json.loads(metadata["class_names"]), int(metadata["size"]))
        return fill(classifier, tensors)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or train it again") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a classifier ({error}); train one with `python -m benchmarks.emoji_classifier`") from error


def train_classifier(source: PictureSource, *, steps: int, batch: int, seed: int, size: int = 64) -> Classifier:
    """A classifier of the source's classes, in evaluation mode; on a CPU the same at every run with the same number of threads.

    Each step draws `batch` new pictures of one size: half to 1.75 times `size`, sometimes two or three times as long as wide, so that a
    crop with half an emoji or none learns to say little. Shows a bar on a terminal. Raises ValueError for a size below 32 or one class.
    """
    if len(source.class_names) < 2:
        raise ValueError("the source has a single class; a classifier needs two to tell apart")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(source.class_names, size).train()
    optimiser = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    for step in tqdm(range(steps), unit="step", disable=None):
        images, targets = _training_batch(source, batch, size, np.random.default_rng((seed, step)))
        loss = F.cross_entropy(classifier(images), targets)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return classifier.eval().requires_grad_(False)


def renderings(source: PictureSource, count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W) in [-1, 1] and labels (N,): the first `count` of a source at `size` = (height, width).

    Balanced over the classes of a drawn source. Picture i depends on (seed, i) alone, so that another seed than in training gives pictures
    that training has not seen.
    """
    drawn = [source.draw(i % len(source), size, np.random.default_rng((seed, i))) for i in range(count)]
    return _as_images([pixels for pixels, _ in drawn]), torch.tensor([label for _, label in drawn])


@torch.no_grad()
def class_accuracy(classifier: Classifier, pictures: Tensor, labels: Sequence[int] | Tensor) -> tuple[int, int]:
    """How many of the pictures (N, 3, H, W) in [-1, 1] are given their class, and N. labels: (N,), in the classifier's own order.

    Raises ValueError for another number of labels.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) != len(pictures):
        raise ValueError(f"{len(labels)} labels were given for {len(pictures)} pictures; give one a picture")
    right = 0
    for part, asked in zip(pictures.split(PICTURES_AT_ONCE), labels.split(PICTURES_AT_ONCE), strict=True):
        given = classifier(part.to(classifier.head.weight.device)).argmax(1)
        right += int((given.cpu() == asked.cpu()).sum())
    return right, len(labels)


def accuracy_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of the share right / total: (low, high) in [0, 1]. ValueError unless 0 <= right <= total and total > 0."""
    if not 0 <= right <= total or not total:
        raise ValueError(f"{right} of {total} is not a share; give 0 <= right <= total and a total above 0")
    z = NORMAL_95
    centre = (right + z * z / 2) / (total + z * z)
    reach = z / (total + z * z) * math.sqrt(right * (total - right) / total + z * z / 4)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _as_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, H, W) in [-1, 1] from uint8 pictures (H, W, 3) of one size."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _training_batch(source: PictureSource, batch: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) of one shape, and the probabilities (B, classes) to learn for them.

    A share of the pictures is jumbled and has any class but its own: without them, colours and textures alone tell the classes apart, and
    the right parts in the wrong places pass for the whole.
    """
    shape, classes = _training_shape(size, rng), len(source.class_names)
    pictures, targets = [], torch.zeros(batch, classes)
    for target, index in zip(targets, rng.integers(len(source), size=batch), strict=True):
        pixels, label = source.draw(int(index), shape, rng)
        if rng.random() < JUMBLED_SHARE:
            pixels = _jumbled(pixels, rng)
            target.fill_(1 / (classes - 1))[label] = 0
        else:
            target[label] = 1
        pictures.append(_degraded(pixels, rng))
    return _as_images(pictures), targets


def _training_shape(size: int, rng: np.random.Generator) -> tuple[int, int]:
    """(height, width): square and near `size`, one in five oblong."""
    if rng.random() < 0.2:
        short, times = max(SMALLEST, 3 * size // 4), int(rng.integers(2, 4))
        return (short, short * times) if rng.random() < 0.5 else (short * times, short)
    side = int(rng.integers(max(SMALLEST, size // 2), 7 * size // 4))
    return side, side


def _jumbled(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture (H, W, 3) cut into 4 x 4 or 8 x 8 blocks of each square, which change places."""
    height, width = pixels.shape[:2]
    block = min(height, width) // int(rng.choice((4, 8)))
    rows, columns = height // block, width // block
    inside = pixels[: rows * block, : columns * block].reshape(rows, block, columns, block, 3).swapaxes(1, 2)
    shuffled = rng.permutation(inside.reshape(-1, block, block, 3)).reshape(inside.shape)
    result = pixels.copy()
    result[: rows * block, : columns * block] = shuffled.swapaxes(1, 2).reshape(rows * block, columns * block, 3)
    return result


def _degraded(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture (H, W, 3) as a decoder might paint it: softer, with block and ringing errors, with noise; one in four stays as it is.

    A decoder is softer than the renderer whatever class it paints. A judge that has only seen crisp edges takes that softness for a sign
    and would measure the tokenizer instead of the class. It stays mild: what people do not recognise should not count as right.
    """
    if rng.random() < 0.25:
        return pixels
    picture = Image.fromarray(pixels)
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.3) * min(picture.size) / 64))
    if rng.random() < 0.5:
        written = BytesIO()
        picture.save(written, "JPEG", quality=int(rng.integers(15, 80)))
        picture = Image.open(written)
    softened = np.asarray(picture, np.float32)
    if rng.random() < 0.5:
        softened = softened + rng.normal(0, rng.uniform(0, 12), softened.shape).astype(np.float32)
    return np.clip(softened + 0.5, 0, 255).astype(np.uint8)
