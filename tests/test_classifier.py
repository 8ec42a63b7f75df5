"""The judge learns, judges any size, comes back from its file as it was, and knows real renderings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexvar.data import WELL_KNOWN, EmojiScenes, PictureSource, Shapes
from flexvar.data.emoji import find_font
from flexvar.evaluation import Classifier, accuracy_interval, class_accuracy, load_classifier, renderings, train_classifier
from flexvar.evaluation.classifier import BUNDLED, _as_images, _degraded, _jumbled, _training_batch

UNSEEN = 99


class ThreeShapes:
    """The first three of the drawn shapes: circle, square, triangle."""

    def __init__(self) -> None:
        self.shapes = Shapes(views=10)
        self.class_names = self.shapes.class_names[:3]

    def __len__(self) -> int:
        return 30

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        return self.shapes.draw(index % 3, size, rng)


@pytest.fixture(scope="module")
def trained() -> Classifier:
    assert isinstance(ThreeShapes(), PictureSource)
    return train_classifier(ThreeShapes(), steps=60, batch=12, seed=1, size=32)


def needs_font() -> EmojiScenes:
    try:
        find_font()
    except FileNotFoundError:
        pytest.skip("needs the Debian package fonts-noto-color-emoji")
    return EmojiScenes(WELL_KNOWN)


def test_a_few_steps_beat_chance(trained: Classifier) -> None:
    pictures, labels = renderings(ThreeShapes(), 90, (32, 32), UNSEEN)
    assert pictures.shape == (90, 3, 32, 32)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert labels.bincount().tolist() == [30, 30, 30]
    right, total = class_accuracy(trained, pictures, labels)
    assert accuracy_interval(right, total)[0] > 1 / 3


def test_training_depends_on_its_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (train_classifier(ThreeShapes(), steps=2, batch=4, seed=seed, size=32) for seed in (5, 5, 6))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(state, torch.random.get_rng_state())


def test_there_and_back(trained: Classifier, tmp_path: Path) -> None:
    pictures, _ = renderings(ThreeShapes(), 6, (40, 48), UNSEEN)
    trained.save(tmp_path / "judge.safetensors", dtype=torch.float32)
    again = load_classifier(tmp_path / "judge.safetensors")
    assert again.class_names == ("circle", "square", "triangle")
    assert again.size == 32
    assert torch.equal(again(pictures), trained(pictures))
    trained.save(tmp_path / "judge.safetensors")  # in half precision
    assert torch.allclose(load_classifier(tmp_path / "judge.safetensors")(pictures), trained(pictures), atol=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["judge.safetensors"]


def test_files_that_are_no_classifier(tmp_path: Path, trained: Classifier) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no classifier .*train one with"):
        load_classifier(path)
    trained.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_classifier(path)


@pytest.mark.parametrize(("height", "width", "crops"), [(32, 32, 1), (64, 40, 3), (40, 56, 1), (48, 96, 3), (160, 50, 5), (33, 330, 19)])
def test_oblong_pictures_are_judged_by_squares(trained: Classifier, height: int, width: int, crops: int) -> None:
    pictures = torch.rand(2, 3, height, width) * 2 - 1
    assert trained.crops(pictures).shape == (2, crops, 3, 32, 32)
    assert trained.features(pictures).shape == (2, 112)
    logits = trained(pictures)
    assert logits.shape == (2, 3)
    one_by_one = torch.stack([trained(crop[None])[0] for crop in trained.crops(pictures)[0]])
    assert torch.allclose(logits[0], one_by_one.mean(0), atol=1e-5)
    assert torch.allclose(trained(pictures.mT), trained(pictures.mT.contiguous()), atol=1e-6)
    assert trained.crops(pictures.mT).shape == (2, crops, 3, 32, 32)


def test_both_ends_of_an_oblong_picture_are_seen(trained: Classifier) -> None:
    pictures = torch.zeros(1, 3, 32, 96)
    pictures[..., 0], pictures[..., -1] = 0.25, 0.75
    crops = trained.crops(pictures)[0]  # (5, 3, 32, 32)
    assert crops[0, 0, 0, 0] == 0.25
    assert crops[-1, 0, 0, -1] == 0.75


def test_pictures_that_cannot_be_judged(trained: Classifier) -> None:
    for shape in [(1, 3, 31, 64), (3, 64, 64), (1, 1, 64, 64)]:
        with pytest.raises(ValueError, match=r"give \(B, 3, H, W\) with both sides at least 32 px"):
            trained(torch.zeros(shape))
    with pytest.raises(ValueError, match="1 labels were given for 2 pictures"):
        class_accuracy(trained, torch.zeros(2, 3, 32, 32), [0])
    one = ThreeShapes()
    one.class_names = one.class_names[:1]
    with pytest.raises(ValueError, match="single class"):
        train_classifier(one, steps=1, batch=1, seed=0)


def test_what_lies_outside_the_range_is_cut_off(trained: Classifier) -> None:
    pictures = torch.randn(2, 3, 32, 32) * 2
    assert torch.equal(trained(pictures), trained(pictures.clamp(-1, 1)))
    assert trained(pictures.bfloat16()).dtype == torch.float32


def test_wilson_intervals() -> None:
    assert accuracy_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    for end in accuracy_interval(480, 500):  # the shares that lie 1.96 standard errors of their own from what was found
        assert abs(480 / 500 - end) == pytest.approx(1.959964 * (end * (1 - end) / 500) ** 0.5)
    assert accuracy_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert accuracy_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    for right, total in [(1, 0), (-1, 5), (6, 5), (0, 0)]:
        with pytest.raises(ValueError, match="is not a share"):
            accuracy_interval(right, total)


def test_jumbling_moves_blocks_and_changes_none() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 70, 3), dtype=np.uint8)
    moved = _jumbled(pixels, np.random.default_rng(1))
    assert moved.shape == pixels.shape
    assert not np.array_equal(moved, pixels)
    assert np.array_equal(np.sort(moved.reshape(-1, 3), 0), np.sort(pixels.reshape(-1, 3), 0))
    assert np.array_equal(moved[32:], pixels[32:])


def test_degraded_pictures_stay_the_same_picture() -> None:
    pixels, _ = Shapes().draw(0, (48, 48), np.random.default_rng(0))
    differences = [np.abs(_degraded(pixels, np.random.default_rng(seed)).astype(int) - pixels).mean() for seed in range(40)]
    assert max(differences) < 15
    assert 2 < sum(difference == 0 for difference in differences) < 25


def test_what_is_learnt_adds_up_to_one() -> None:
    images, targets = _training_batch(ThreeShapes(), 200, 32, np.random.default_rng(0))
    assert len(images) == 200
    assert torch.allclose(targets.sum(1), torch.ones(200))
    assert 0.1 < (targets.max(1).values < 1).float().mean() < 0.45  # jumbled


def test_the_bundled_one_knows_real_renderings() -> None:
    source, classifier = needs_font(), load_classifier()
    assert classifier.class_names == WELL_KNOWN
    for size, least in [((64, 64), 0.97), ((48, 80), 0.9), ((64, 128), 0.9), ((192, 64), 0.9)]:
        right, total = class_accuracy(classifier, *renderings(source, 144, size, UNSEEN))
        assert right / total >= least, size


def test_the_bundled_one_wants_the_parts_in_their_places() -> None:
    source, classifier = needs_font(), load_classifier()
    pictures, labels = zip(*(source.draw(i, (64, 64), np.random.default_rng((UNSEEN, i))) for i in range(144)), strict=True)
    broken = _as_images([_jumbled(picture, np.random.default_rng(i)) for i, picture in enumerate(pictures)])
    right, total = class_accuracy(classifier, broken, labels)
    assert right / total < 0.25


def test_the_bundled_one_is_small() -> None:
    import flexvar

    assert (Path(flexvar.__file__).parent / "assets" / BUNDLED).stat().st_size <= 2**20
