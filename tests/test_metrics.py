"""Every metric is its definition, worked out by brute force in float64, whatever the size of the blocks it is computed in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexvar.evaluation import metrics
from flexvar.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from golden.weights import FOLDER

BLOCKS = [7, 50, 2048]


@pytest.fixture(scope="module")
def arrays() -> Mapping[str, np.ndarray]:
    return dict(np.load(FOLDER / "metrics.npz"))


@pytest.fixture(params=BLOCKS)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pictures are worked on at once."""
    monkeypatch.setattr(metrics, "ROWS", request.param)
    return request.param


def normal(count: int, width: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def covariance(width: int, seed: int, rank: int | None = None) -> np.ndarray:
    """Symmetric, with eigenvalues spread over four orders of magnitude, of which only `rank` are above 0."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.standard_normal((width, width)))[0][:, :rank]
    return axes * 10 ** random.uniform(-2, 2, axes.shape[1]) @ axes.T


# -- golden values --


def test_golden_frechet_distances(arrays: Mapping[str, np.ndarray]) -> None:
    for reference, samples, suffix, name in (("ref", "sample", "", "fid"), ("ref_spatial", "sample_spatial", "_s", "sfid")):
        mu, sigma = moments(arrays[reference])
        assert mu == pytest.approx(arrays["mu" + suffix], rel=1e-9)
        assert np.linalg.norm(sigma - arrays["sigma" + suffix]) < 1e-12 * np.linalg.norm(sigma)
        assert frechet_distance(*moments(arrays[samples]), mu, sigma) == pytest.approx(float(arrays[name]), rel=1e-9)


@pytest.mark.parametrize("split_size", [5000, 90])
def test_golden_inception_scores(arrays: Mapping[str, np.ndarray], split_size: int) -> None:
    expected = float(arrays[f"inception_score_split_{split_size}"])
    assert inception_score(arrays["logits"], split_size) == pytest.approx(expected, rel=1e-9)


def test_golden_precision_and_recall(arrays: Mapping[str, np.ndarray], rows: int) -> None:
    expected = float(arrays["precision"]), float(arrays["recall"])
    assert precision_recall(arrays["ref"], arrays["sample"]) == pytest.approx(expected, rel=1e-9)


# -- Fréchet distance --


def test_moments_far_from_the_origin(rows: int) -> None:
    features = normal(101, 6, 0) * np.float32(0.5) + np.float32(3000)
    mu, sigma = moments(features)
    exact = features.astype(np.float64)
    assert mu.dtype == sigma.dtype == np.float64
    assert mu == pytest.approx(exact.mean(0), rel=1e-12)
    assert np.linalg.norm(sigma - np.cov(exact.T)) < 1e-12 * np.linalg.norm(sigma)


def test_moments_of_one_feature() -> None:
    mu, sigma = moments(np.array([[1.0], [4.0]]))
    assert (mu.tolist(), sigma.tolist()) == ([2.5], [[4.5]])


def test_few_rows_are_in_float64_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def double(part: Tensor) -> Tensor:
        seen.append(len(part))
        return part.double()

    monkeypatch.setattr(metrics, "ROWS", 10)
    monkeypatch.setattr(metrics, "_double", double)
    moments(normal(95, 3, 0))
    frechet_interval(normal(95, 3, 0), np.zeros(3), np.eye(3), blocks=2)
    inception_score(normal(95, 3, 0))
    assert max(seen) == 10


@given(width=st.integers(1, 6), shift=st.floats(-100, 100), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
@settings(deadline=None)
def test_gaussians_of_one_shape(width: int, shift: float, scale: float, seed: int) -> None:
    mu, sigma = normal(1, width, seed, np.float64)[0], covariance(width, seed)
    expected = width * shift**2 + (scale - 1) ** 2 * np.trace(sigma)
    assert frechet_distance(mu + shift, scale**2 * sigma, mu, sigma) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("rank1", "rank2"), [(8, 8), (8, 5), (3, 8), (5, 5), (2, 3), (0, 8), (0, 0)])
def test_the_root_of_two_covariances(rank1: int, rank2: int) -> None:
    sigma1, sigma2, mu = covariance(8, 1, rank1), covariance(8, 2, rank2), np.zeros(8)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    between = np.linalg.eigvalsh(root @ sigma2 @ root)[8 - min(rank1, rank2) :]
    expected = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(between).sum()
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu, sigma2, mu, sigma1) == pytest.approx(expected, rel=1e-9)


def test_covariances_of_one_direction_each() -> None:
    one, other = normal(2, 30, 0, np.float64)
    expected = one @ one + other @ other - 2 * abs(one @ other)
    assert frechet_distance(np.zeros(30), np.outer(one, one), np.zeros(30), np.outer(other, other)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 20, 40])
def test_equal_gaussians_are_not_apart(rank: int) -> None:
    mu, sigma = normal(1, 40, 0)[0], covariance(40, 0, rank)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) <= 1e-12 * np.trace(sigma)


@pytest.mark.parametrize("count", [20, 200])
def test_fewer_pictures_than_features(count: int) -> None:
    """Along the features that all lie in few dimensions, against a rotation of them in which nothing is singular."""
    few, many = normal(count, 5, 0, np.float64) * [1, 2, 3, 4, 5] + 1, normal(300, 5, 1, np.float64)
    axes = np.linalg.qr(normal(40, 40, 2, np.float64))[0][:5]
    expected = frechet_distance(*moments(few), *moments(many))
    assert frechet_distance(*moments(few @ axes), *moments(many @ axes)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6])
def test_the_distance_grows_with_the_square_of_the_scale(scale: float) -> None:
    one, other = normal(60, 9, 0, np.float64), normal(50, 9, 1, np.float64) + 0.2
    expected = scale**2 * frechet_distance(*moments(one), *moments(other))
    assert frechet_distance(*moments(scale * one), *moments(scale * other)) == pytest.approx(expected, rel=1e-9)


def test_the_order_of_pictures_has_no_effect_on_the_distance() -> None:
    features, reference = normal(300, 6, 0), moments(normal(300, 6, 1))
    distance = frechet_distance(*moments(features), *reference)
    assert frechet_distance(*moments(features[::-1]), *reference) == pytest.approx(distance, rel=1e-9)


# -- the interval of the Fréchet distance --


def test_the_interval_is_the_jackknife(rows: int) -> None:
    features, mu, sigma = normal(103, 4, 0) + 5, np.full(4, 4.5), covariance(4, 1)

    def distance(rest: np.ndarray) -> float:
        return frechet_distance(rest.mean(0), np.cov(rest.T), mu, sigma)

    exact = features.astype(np.float64)
    left = [distance(np.delete(exact, slice(block, None, 5), 0)) for block in range(5)]
    error = math.sqrt(4 / 5 * sum((one - np.mean(left)) ** 2 for one in left))
    expected = distance(exact) - 2.7764 * error, distance(exact) + 2.7764 * error  # Student's t of 4 degrees
    assert frechet_interval(features, mu, sigma, blocks=5) == pytest.approx(expected, rel=2e-3)


def test_the_interval_covers_and_narrows() -> None:
    truth = 3 * 0.5**2
    widths = {}
    for count in (100, 1600):
        intervals = [frechet_interval(normal(count, 3, seed) + 0.5, np.zeros(3), np.eye(3)) for seed in range(100)]
        widths[count] = np.mean([high - low for low, high in intervals])
        assert sum(low <= truth <= high for low, high in intervals) >= 85
    assert widths[100] / widths[1600] == pytest.approx(4, rel=0.3)


def test_the_interval_ends_at_zero() -> None:
    low, high = frechet_interval(normal(200, 2, 0), np.zeros(2), np.eye(2))
    assert low == 0 < high


def test_classes_in_order_leave_every_block_balanced() -> None:
    """Ten classes far apart, sorted: the distance hardly moves whichever block is left out."""
    features = normal(1000, 2, 0) + np.repeat(np.arange(10) * 100, 100)[:, None]
    low, high = frechet_interval(features, *moments(features + 1000))
    assert high - low < 0.01 * high


# -- Inception Score --


def test_the_score_by_its_definition(rows: int) -> None:
    logits = normal(53, 8, 0) * 3
    predictions = np.exp(logits.astype(np.float64))
    predictions /= predictions.sum(1, keepdims=True)
    for split_size in (1, 10, 53, 100):
        scores = []
        for start in range(0, 53, split_size):
            split = predictions[start : start + split_size]
            scores.append(math.exp((split * np.log(split / split.mean(0))).sum(1).mean()))
        assert inception_score(logits, split_size) == pytest.approx(np.mean(scores), rel=1e-9)


def test_the_least_and_the_greatest_score() -> None:
    assert inception_score(np.full((30, 7), -3.0)) == pytest.approx(1, abs=1e-12)
    assert inception_score(normal(1, 7, 0).repeat(30, 0)) == pytest.approx(1, abs=1e-12)
    sure = 1e5 * np.eye(7, dtype=np.float32)[np.arange(35) % 7]
    assert inception_score(sure) == pytest.approx(7, rel=1e-12)
    assert inception_score(sure, split_size=1) == pytest.approx(1, abs=1e-12)


@given(shift=st.floats(-1000, 1000), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_the_score_of_shifted_and_shuffled_logits(shift: float, seed: int) -> None:
    logits = normal(40, 5, 0, np.float64)
    shuffled = np.random.default_rng(seed).permutation(logits) + shift
    assert inception_score(shuffled) == pytest.approx(inception_score(logits), rel=1e-9)


# -- precision, recall, density, coverage --


def squared_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return np.square(one[:, None] - other[None]).sum(-1)


def manifold(points: np.ndarray, k: int) -> np.ndarray:
    """Squared radii, by sorting all distances; the nearest is the point itself."""
    return np.sort(squared_distances(points, points), 1)[:, k]


def scores_by_hand(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage."""
    between = squared_distances(samples, reference)
    in_reference, in_samples = between <= manifold(reference, k), between <= manifold(samples, k)[:, None]
    return in_reference.any(1).mean(), in_samples.any(0).mean(), in_reference.sum() / (k * len(samples)), in_reference.any(0).mean()


def scores(reference: np.ndarray | Tensor, samples: np.ndarray | Tensor, k: int) -> tuple[float, float, float, float]:
    return *precision_recall(reference, samples, k), *density_coverage(reference, samples, k)


@pytest.mark.parametrize(("width", "k", "offset"), [(1, 1, 0.0), (3, 3, 1000.0), (8, 5, 1.0), (40, 2, 0.0), (2, 9, 0.0), (2, 60, 0.0)])
def test_neighbours_by_brute_force(rows: int, width: int, k: int, offset: float) -> None:
    reference = normal(83, width, 0) + np.float32(offset)
    samples = normal(61, width, 1) * np.float32(0.7) + np.float32(offset + 0.3)
    found = scores(reference, samples, k)
    assert found == pytest.approx(scores_by_hand(reference, samples, k), rel=1e-12)
    assert 0 < found[0] <= 1


whole_numbers = st.integers(2, 12).flatmap(lambda count: st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=count, max_size=count))


@given(one=whole_numbers, other=whole_numbers, k=st.integers(1, 3))
@settings(deadline=None)
def test_ties_and_repeated_points(one: list[tuple[int, int]], other: list[tuple[int, int]], k: int) -> None:
    reference, samples = np.array(one, np.float64), np.array(other, np.float64)
    k = min(k, len(one) - 1, len(other) - 1)
    assert scores(reference, samples, k) == pytest.approx(scores_by_hand(reference, samples, k), rel=1e-12)


def test_the_surface_belongs_to_a_ball() -> None:
    reference = np.array([[0.0], [1.0], [-2.0]])
    assert precision_recall(reference, np.array([[2.0], [2.001], [-5.0], [-4.0]]), k=1)[0] == 0.5


@pytest.mark.parametrize(("width", "repeats"), [(1, 12), (2, 3), (64, 1), (2048, 12)])
def test_a_set_against_itself(width: int, repeats: int, rows: int) -> None:
    """However often its points are repeated, and where rounding is at its worst: long rows of one value."""
    points = np.concatenate((normal(5, width, 0), np.repeat(normal(3, 1, 1), width, 1), normal(2, width, 2) + 30)).repeat(repeats, 0)
    shuffled = np.random.default_rng(0).permutation(points)
    for one, other in ((points, points), (points, shuffled), (shuffled, points[::-1])):
        precision, recall, density, coverage = scores(one, other, 3)
        assert (precision, recall, coverage) == (1, 1, 1)
        assert density >= 1


def test_pictures_that_are_all_the_same() -> None:
    same = np.full((20, 300), 0.1, np.float32)
    assert scores(same, same[:9], 3) == (1, 1, 20 / 3, 1)
    assert scores(same, same[:9] + 1, 3) == (0, 0, 0, 0)
    assert scores(normal(20, 300, 0), same[:9], 3)[1] == 0


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.37, 1e6]), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=20)
def test_order_scale_and_place_have_no_effect(seed: int, scale: float, shift: float) -> None:
    random = np.random.default_rng(seed)
    sets = normal(40, 4, 0, np.float64), normal(50, 4, 1, np.float64)
    reference, samples = (scale * (random.permutation(points) + shift) for points in sets)
    assert scores(reference, samples, 3) == pytest.approx(scores(*sets, 3), rel=1e-12)


def test_each_is_the_other_the_other_way_round() -> None:
    one, other = normal(70, 5, 0), normal(60, 5, 1) * 0.6
    assert precision_recall(one, other) == precision_recall(other, one)[::-1]
    precision, recall = precision_recall(one, other)
    assert precision > recall + 0.2, "samples too near the mean are precise and miss much"


def test_a_collapsed_set_and_one_that_is_elsewhere() -> None:
    reference = normal(100, 4, 0)
    assert scores(reference, reference + 1000, 3) == (0, 0, 0, 0)
    precision, recall, _, coverage = scores(reference, reference[:1].repeat(30, 0), 3)
    assert precision == 1
    assert recall == 0.01
    assert coverage < 0.1


# -- kernel distance --


def test_the_kernel_distance_of_whole_sets() -> None:
    reference, samples = normal(40, 6, 0), normal(30, 6, 1) + 0.3
    x, y = normal(30, 6, 2).astype(np.float64), samples.astype(np.float64)

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one @ other.T / 6 + 1) ** 3

    others = ~np.eye(30, dtype=bool)
    expected = kernel(x, x)[others].mean() + kernel(y, y)[others].mean() - 2 * kernel(x, y).mean()
    found, error = kernel_distance(x.astype(np.float32), samples)
    assert found == pytest.approx(expected, rel=1e-9)
    assert error == pytest.approx(0, abs=1e-12)
    assert kernel_distance(reference, samples)[1] > 0, "subsets of the larger set differ"


def test_the_kernel_distance_is_seeded_and_unbiased() -> None:
    reference, samples = normal(600, 8, 0), normal(500, 8, 1)
    found = kernel_distance(reference, samples, subsets=50, size=100, seed=3)
    assert found == kernel_distance(reference, samples, subsets=50, size=100, seed=3)
    assert found != kernel_distance(reference, samples, subsets=50, size=100, seed=4)
    same = [kernel_distance(normal(60, 3, seed), normal(60, 3, seed + 1000), subsets=2)[0] for seed in range(200)]
    assert min(same) < 0
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(200)


def test_the_kernel_distance_and_its_error() -> None:
    reference = normal(2000, 8, 0)
    distances = [kernel_distance(reference, normal(2000, 8, 1) + shift, size=200)[0] for shift in (0, 0.1, 0.5)]
    assert distances == sorted(distances)
    few, many = (kernel_distance(reference, reference + 1, subsets, 50)[1] for subsets in (25, 400))
    assert few / many == pytest.approx(4, rel=0.5)


# -- what is given --

OF_TWO_SETS: dict[str, Callable[..., Any]] = {"precision": precision_recall, "density": density_coverage, "kernel": kernel_distance}
OF_ONE_SET: dict[str, Callable[..., Any]] = {
    "moments": moments,
    "interval": lambda features: frechet_interval(features, np.zeros(3), np.eye(3)),
    "score": inception_score,
}
EVERY: dict[str, Callable[..., Any]] = OF_ONE_SET | {
    name: lambda features, metric=metric: metric(features, features) for name, metric in OF_TWO_SETS.items()
}


def flat(result: Any) -> list[float]:
    return np.concatenate([np.ravel(part) for part in (result if isinstance(result, tuple) else (result,))]).tolist()


@pytest.mark.parametrize("name", EVERY)
def test_arrays_of_every_kind(name: str) -> None:
    metric, features = EVERY[name], normal(60, 3, 0)
    before = features.copy()
    expected = flat(metric(features))
    fixed = features.copy()
    fixed.setflags(write=False)
    reversed_twice = features[::-1].copy()[::-1]
    others = (torch.from_numpy(features), torch.from_numpy(features).requires_grad_(), fixed, reversed_twice, np.asfortranarray(features))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in others:
            assert flat(metric(other)) == pytest.approx(expected, rel=1e-12)
        assert flat(metric(features.astype(np.float64))) == pytest.approx(expected, rel=1e-12)
    half = features.astype(np.float16)
    assert flat(metric(half)) == pytest.approx(flat(metric(half.astype(np.float32))), rel=1e-12)
    assert np.array_equal(features, before)


def test_fixed_moments_are_taken_without_a_warning() -> None:
    mu, sigma = moments(normal(60, 3, 0))
    expected = frechet_distance(mu, sigma, mu + 1, sigma)
    for array in (mu, sigma):
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(mu, sigma, mu + 1, sigma.T) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_values_that_are_not_finite(name: str, broken: float) -> None:
    features = normal(60, 3, 0)
    features[41, 1] = broken
    with pytest.raises(ValueError, match=r"(features|logits) hold values that are not finite; find the pictures or the extractor"):
        EVERY[name](features)


@pytest.mark.parametrize("name", EVERY)
def test_arrays_of_another_shape(name: str) -> None:
    for shape in ((60,), (60, 3, 1), (60, 0), ()):
        with pytest.raises(ValueError, match=r"(features|logits) have shape .*; give \(N, F\), one row a picture"):
            EVERY[name](np.zeros(shape))


@pytest.mark.parametrize(("name", "least"), list(zip(EVERY, (2, 40, 1, 1, 1, 2), strict=True)))
def test_too_few_rows(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=rf"there are {least - 1} .*; give at least {least}"):
        EVERY[name](np.zeros((least - 1, 3)))


@pytest.mark.parametrize("name", OF_TWO_SETS)
def test_sets_of_two_extractors(name: str) -> None:
    with pytest.raises(ValueError, match="the reference has 3 features a picture and the samples 4; use one extractor"):
        OF_TWO_SETS[name](normal(9, 3, 0), normal(9, 4, 0))


@pytest.mark.parametrize("k", [0, -1, 9, 10])
def test_more_neighbours_than_points(k: int) -> None:
    few, many = normal(9, 3, 0), normal(20, 3, 1)
    for metric, arguments, name in (
        (precision_recall, (few, many), "reference features"),
        (precision_recall, (many, few), "features of samples"),
        (density_coverage, (few, many), "reference features"),
    ):
        with pytest.raises(ValueError, match=rf"k is {k}, and there are \d+ .*; give a k from 1 to one less than their number") as caught:
            metric(*arguments, k=k)
        assert k < 1 or f"9 {name}" in str(caught.value)
    assert density_coverage(many, few, k=8)[1] > 0, "the samples' own neighbours play no part"


def test_numbers_that_cannot_be() -> None:
    features = normal(60, 3, 0)
    with pytest.raises(ValueError, match="split_size is 0; give at least 1"):
        inception_score(features, 0)
    with pytest.raises(ValueError, match="blocks is 1; leaving out one after the other needs at least 2"):
        frechet_interval(features, np.zeros(3), np.eye(3), blocks=1)
    with pytest.raises(ValueError, match="subsets is 1 and their size 1000; both must be at least 2"):
        kernel_distance(features, features, subsets=1)
    with pytest.raises(ValueError, match="subsets is 100 and their size 1; both must be at least 2"):
        kernel_distance(features, features, size=1)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3,), (3, 3), (4,), (4, 4)],
        [(3,), (3, 4), (3,), (3, 3)],
        [(3, 1), (3, 3), (3, 1), (3, 3)],
        [(3,), (3, 3), (3,), (3,)],
        [(), (), (), ()],
    ],
)
def test_moments_that_do_not_fit(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"means and covariances have shapes .*; give \(F,\), \(F, F\), \(F,\), \(F, F\) of one extractor"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("which", range(4))
def test_moments_that_are_not_finite(which: int) -> None:
    arrays = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
    arrays[which] = np.full_like(arrays[which], math.nan)
    with pytest.raises(ValueError, match="a mean or covariance holds values that are not finite; make it again"):
        frechet_distance(*arrays)
    if which > 1:
        with pytest.raises(ValueError, match="a mean or covariance holds values that are not finite"):
            frechet_interval(normal(60, 3, 0), arrays[2], arrays[3])
