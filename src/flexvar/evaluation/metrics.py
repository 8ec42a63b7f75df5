"""Scores of drawn pictures, as functions of arrays: Fréchet distance (FID, sFID), Inception Score, precision and recall, density and
coverage, kernel distance (KID).

Features are (N, F), one row a picture, from NumPy or torch; torch's are worked on where they lie. Every function raises ValueError, in
one line, for another shape, too few rows and values that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor

ROWS = 2048
"""How many pictures are worked on at once; distances come in squares of this side, 16 MiB each."""

ROUNDING = 128
"""Squared distances below so many rounding steps of a point's squared norm count as 0; between equal points, 95 have been seen."""

NORMAL_95 = 1.959964  # standard errors on either side


# -- Fréchet distance --


def moments(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and covariance (F, F) of features, float64, divided by N - 1 as in reference files."""
    return _gathered(_matrix(features, "features", 2)).moments()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|² + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^½, in float64; covariances may be singular (Heusel et al. 2017).

    mu: (F,). sigma: (F, F), symmetric. With sigma1 = A Aᵀ and sigma2 = B Bᵀ, the last trace is the sum of the singular values of Aᵀ B,
    which keeps the digits that roots of small eigenvalues lose.
    Raises ValueError for shapes that do not fit and values that are not finite.
    """
    given = [_shared(np.asarray(array, np.float64)) for array in (mu1, sigma1, mu2, sigma2)]
    shapes, width = [tuple(array.shape) for array in given], given[0].numel()
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"means and covariances have shapes {shapes}; give (F,), (F, F), (F,), (F, F) of one extractor")
    if not all(array.isfinite().all() for array in given):
        raise ValueError("a mean or covariance holds values that are not finite; make it again from features without NaN")
    mean1, covariance1, mean2, covariance2 = given
    root = torch.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * root
    return max(0.0, distance.item())


def frechet_interval(features: Array, mu: np.ndarray, sigma: np.ndarray, blocks: int = 20) -> tuple[float, float]:
    """The 95 % interval of the Fréchet distance from features to (mu, sigma), by leaving out one block of pictures after the other.

    Block b is rows b, b + blocks, ...: rows sorted by class make all blocks alike, rows in which the classes come in turn need not. It
    tells how far chance moves the distance at this N; the bias, by which few pictures have a larger distance than many, is still in it.
    Raises ValueError for fewer than 2 blocks.
    """
    if blocks < 2:
        raise ValueError(f"blocks is {blocks}; leaving out one after the other needs at least 2")
    rows = _matrix(features, "features", 2 * blocks)
    everything = _gathered(rows)
    left = (everything.without(_gathered(rows[block::blocks], everything.shift)) for block in range(blocks))
    distances = [frechet_distance(*rest.moments(), mu, sigma) for rest in left]
    distance = frechet_distance(*everything.moments(), mu, sigma)
    reach = student_95(blocks - 1) * math.sqrt((blocks - 1) * np.var(distances))  # the delete-one jackknife
    return max(0.0, distance - reach), distance + reach


def student_95(degrees: int) -> float:
    """How many standard errors a 95 % interval reaches on either side, by so many degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z = NORMAL_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


@dataclass
class RunningMoments:
    """Mean and covariance of features that come batch by batch, in float64; the features themselves are not kept.

    shift: (F,), taken off all rows, which keeps the size of the mean out of the covariance's rounding; the first batch's mean if None.
    """

    shift: Tensor | None = None
    count: int = 0
    first: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))  # (F,), sum of rows
    second: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))  # (F, F), sum of their products

    def add(self, features: Tensor) -> None:
        """Counts in a batch (B, F)."""
        rows = _double(features)
        if self.shift is None:
            self.shift = rows.mean(0)
        if not self.count:
            self.first, self.second = torch.zeros_like(self.shift), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.shift
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second.addmm_(rows.T, rows)

    def without(self, part: RunningMoments) -> RunningMoments:
        """Those of the other rows; `part` has the same shift."""
        return RunningMoments(self.shift, self.count - part.count, self.first - part.first, self.second - part.second)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """As the function `moments` gives them. ValueError for fewer than 2 rows."""
        if self.shift is None or self.count < 2:
            raise ValueError(f"there are {self.count} features; give at least 2")
        sigma = (self.second - torch.outer(self.first, self.first) / self.count) / (self.count - 1)
        return (self.shift + self.first / self.count).cpu().numpy(), sigma.cpu().numpy()


def _gathered(rows: Tensor, shift: Tensor | None = None) -> RunningMoments:
    """One pass, without a float64 copy of all rows."""
    gathered = RunningMoments(shift)
    for part in rows.split(ROWS):
        gathered.add(part)
    return gathered


def _factor(sigma: Tensor) -> Tensor:
    """A (F, r) such that sigma = A Aᵀ: Cholesky's, or by eigenvalues where sigma is singular."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    kept = eigenvalues > eigenvalues[-1] * len(sigma) * torch.finfo(torch.float64).eps  # the others are rounding
    return vectors[:, kept] * eigenvalues[kept].sqrt()


# -- Inception Score --


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)), averaged over splits of the pictures in their order; from 1 to the number of classes.

    logits: (N, C). As ADM computes it: the last split may be short (Salimans et al. 2016). Softmax and sums are float64.
    Raises ValueError for a split size below 1.
    """
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}; give at least 1, or 5000 as is usual")
    splits = _matrix(logits, "logits", 1).split(split_size)
    return sum(_score_of_split(split) for split in splits) / len(splits)


def _score_of_split(logits: Tensor) -> float:
    """The mean KL is the entropy of the mean prediction less the mean entropy of the predictions."""
    mean, mean_entropy = logits.new_zeros((), dtype=torch.float64), 0.0
    for part in logits.split(ROWS):
        predictions = _double(part).softmax(1)  # (n, C)
        mean = mean + predictions.sum(0) / len(logits)  # (C,)
        mean_entropy += torch.special.entr(predictions).sum().item() / len(logits)
    return math.exp(torch.special.entr(mean).sum().item() - mean_entropy)


# -- neighbours: precision, recall, density, coverage --


def precision_recall(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """The share of samples that lie in the reference's manifold, and the reverse (Kynkäänniemi et al. 2019).

    A set's manifold is a ball around each of its points, which reaches to the k-th nearest other point of that set, surface included.
    Distances are Euclidean, in float64 between float64 features and in float32 between others. A set against itself has 1 and 1.
    """
    reference, samples = _centred(reference, samples)
    reference_radii, sample_radii = _squared_radii(reference, k, "reference features"), _squared_radii(samples, k, "features of samples")
    precise, recalled = (torch.zeros(len(points), dtype=torch.bool, device=points.device) for points in (samples, reference))
    for rows, columns, squared in _distances_between(samples, reference):
        precise[rows] |= (squared <= reference_radii[columns]).any(1)
        recalled[columns] |= (squared <= sample_radii[rows, None]).any(0)
    return precise.sum().item() / len(samples), recalled.sum().item() / len(reference)


def density_coverage(reference: Array, samples: Array, k: int = 5) -> tuple[float, float]:
    """How many of the reference's balls a sample lies in, over k, and the share of these balls that hold a sample (Naeem et al. 2020).

    Balls as in `precision_recall`, but of the reference alone. Outliers weigh less: a wide ball is one of many in density, and samples
    far from all others have none. Density may exceed 1.
    """
    reference, samples = _centred(reference, samples)
    radii = _squared_radii(reference, k, "reference features")
    held, covered = 0, torch.zeros_like(radii, dtype=torch.bool)
    for _, columns, squared in _distances_between(samples, reference):
        inside = squared <= radii[columns]
        held += int(inside.sum())
        covered[columns] |= inside.any(0)
    return held / (k * len(samples)), covered.sum().item() / len(reference)


def _squared_radii(points: Tensor, k: int, name: str) -> Tensor:
    """The squared distance (N,) from each point to its k-th nearest other one; every distance is computed once and serves both ends."""
    if not 1 <= k < len(points):
        raise ValueError(f"k is {k}, and there are {len(points)} {name}; give a k from 1 to one less than their number")
    nearest = points.new_full((len(points), k), torch.inf)  # ascending
    blocks = _blocks(points)
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            squared = _squared_distances(points[rows], points[columns])
            if rows == columns:
                squared.fill_diagonal_(torch.inf)
            else:
                nearest[columns] = _smallest(k, nearest[columns], squared.T)
            nearest[rows] = _smallest(k, nearest[rows], squared)
    return nearest[:, -1]


def _smallest(k: int, one: Tensor, other: Tensor) -> Tensor:
    """The k smallest values of each row of both, ascending."""
    return torch.cat((one, other), 1).topk(k, largest=False).values


def _distances_between(samples: Tensor, reference: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances block by block: which samples, which of the reference, and (samples, reference) of these."""
    for rows in _blocks(samples):
        for columns in _blocks(reference):
            yield rows, columns, _squared_distances(samples[rows], reference[columns])


def _blocks(points: Tensor) -> list[slice]:
    return [slice(start, min(start + ROWS, len(points))) for start in range(0, len(points), ROWS)]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m) of points (n, F) and (m, F); exactly 0 between equal points, which rounding would tell apart."""
    norms = x.square().sum(1, keepdim=True)  # (n, 1)
    squared = torch.addmm(norms + y.square().sum(1), x, y.T, alpha=-2)  # (n, m)
    return squared.masked_fill_(squared < ROUNDING * torch.finfo(x.dtype).eps * norms, 0)


def _centred(reference: Array, samples: Array) -> tuple[Tensor, Tensor]:
    """Both sets on the reference's device, less the reference's mean: shorter vectors leave less to cancel in distances."""
    one, other = _pair(reference, samples, 1)
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    one, other = one.to(dtype), other.to(dtype)
    shift = one.mean(0).bfloat16().to(dtype)  # of few binary digits: subtracting it from features of few digits is exact
    return one - shift, other - shift


# -- kernel distance --


def kernel_distance(reference: Array, samples: Array, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID and its standard error: the unbiased squared MMD under the kernel (x·y / F + 1)³, in float64, over random subsets of both sets.

    size: of a subset, at most that of the smaller set. The estimate has no bias at any size, and may be below 0. The error is of the mean
    over subsets alone: it is 0 where each subset is the whole of both sets (Bińkowski et al. 2018).
    Raises ValueError for fewer than 2 subsets, or pictures in one.
    """
    if subsets < 2 or size < 2:
        raise ValueError(f"subsets is {subsets} and their size {size}; both must be at least 2")
    one, other = _pair(reference, samples, 2)
    size = min(size, len(one), len(other))
    random = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (_double(rows[random.choice(len(rows), size, replace=False)]) for rows in (one, other))
        estimates.append((_mean_of_others(_kernel(x, x)) + _mean_of_others(_kernel(y, y)) - 2 * _kernel(x, y).mean()).item())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(subsets))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(kernel: Tensor) -> Tensor:
    """The mean (n, n) without the diagonal, where each point meets itself."""
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


# -- what is given --


def _matrix(given: Array, name: str, least: int) -> Tensor:
    """What was given as a tensor of two axes on its own device, or ValueError."""
    if isinstance(given, np.ndarray):
        given = _shared(given)
    rows = given.detach()
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"{name} have shape {tuple(rows.shape)}; give (N, F), one row a picture")
    if len(rows) < least:
        raise ValueError(f"there are {len(rows)} {name}; give at least {least}")
    if not all(part.isfinite().all() for part in rows.split(ROWS)):
        raise ValueError(f"{name} hold values that are not finite; find the pictures or the extractor that NaN comes from")
    return rows


def _pair(reference: Array, samples: Array, least: int) -> tuple[Tensor, Tensor]:
    """Both sets on the reference's device, of one width."""
    one, other = _matrix(reference, "reference features", least), _matrix(samples, "features of samples", least)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"the reference has {one.shape[1]} features a picture and the samples {other.shape[1]}; use one extractor")
    return one, other.to(one.device)


def _shared(array: np.ndarray) -> Tensor:
    """The same memory as a tensor; a copy where torch could not share it, of an array that is mapped from a file or reversed."""
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _double(rows: Tensor) -> Tensor:
    """float64 on the same device, or on the CPU where the device has none."""
    return rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
