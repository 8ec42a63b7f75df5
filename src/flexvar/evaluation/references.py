"""What pictures are compared with: ADM's .npz, the statistics of other packages, or a folder; and writing ADM's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexvar.evaluation.extraction import FeatureStore, extract
from flexvar.evaluation.extractors import Extractor, Features
from flexvar.evaluation.metrics import RunningMoments, frechet_distance, moments
from flexvar.evaluation.npz import PICTURES, array_names, open_npz, read_array, write_npz
from flexvar.evaluation.stored import PictureSet, chosen, open_pictures
from flexvar.schedule import Size
from flexvar.writing import check_writable, make_folder
from flexvar.zoo import cache_folder, sha256

Moments = tuple[np.ndarray, np.ndarray]

EXTRACTOR = "extractor"  # our own array: the sha256 of what made the moments
TOO_FEW = "{} holds a single picture; a reference needs at least 2, and 10,000 to mean something"
PUBLISHED = (
    *(f"VIRTUAL_imagenet{name}.npz" for name in ("64_labeled", "128_labeled", "256_labeled", "512")),
    *(f"VIRTUAL_lsun_{name}256.npz" for name in ("bedroom", "cat", "horse")),
)
"""ADM's own references by name; their hashes were not to be had where this was written."""

SHIFTED = 3.0  # times what chance allows, see `_disagreement`; 1 is expected


@dataclass(frozen=True)
class Reference:
    """What pictures are compared with."""

    name: str
    sha256: str
    moments: Moments  # mu (F,), sigma (F, F) of the pool features, float64
    spatial: Moments | None = None
    pool: Tensor | None = None  # (N, F), of the pictures; None where only moments are known
    size: Size | None = None  # (height, width) of the pictures
    stored: tuple[str, ...] = ()  # which moments were read from the file ("pool", "spatial"), not made of its pictures
    caveats: list[str] = field(default_factory=list)  # what keeps scores against it from being compared with published ones


def read_reference(path: Path | str, extractor: Extractor) -> Reference:
    """Reads a reference, and makes the features of its pictures, which are kept in the cache folder for the next time.

    path: an .npz of ADM's (mu, sigma, mu_s, sigma_s, arr_0), of pytorch-fid or clean-fid (mu, sigma), or of pictures alone (arr_0);
    or a folder of pictures. Stored moments are used where there are some, as ADM does; a caveat says so when the pictures beside them
    disagree. A folder's features are held in memory, some 16 KiB a picture of the Inception's; of a large one, make a file
    with `write_reference`. Raises FileNotFoundError or ValueError, in one line, for what is missing, damaged or made by another extractor.
    """
    path = Path(path)
    stored, names = _stored_moments(path, extractor) if path.is_file() else ({}, [])
    if names and PICTURES not in names:
        if "pool" not in stored:
            raise ValueError(f"{path} is no reference: it holds {', '.join(names)}, but neither mu and sigma nor {PICTURES}")
        caveats = ["the reference has moments alone, and nothing tells which extractor made them"]
        return Reference(path.name, sha256(path), stored["pool"], stored.get("spatial"), stored=tuple(stored), caveats=caveats)
    pictures = open_pictures(path)
    check_widths(path.name, stored, extractor, pictures.size)
    features = _cached(pictures, extractor).read()
    if len(features.pool) < 2 and "pool" not in stored:
        raise ValueError(TOO_FEW.format(path))
    made = moments_of(features) if len(features.pool) > 1 else {}
    caveats = list(pictures.caveats)
    if "pool" not in stored or EXTRACTOR in names:
        caveats.append("the reference was made here and is no published one")
    else:
        if path.name not in PUBLISHED:
            caveats.append("the reference is none of ADM's, by its name; scores compare with others against the same file alone")
        if made:
            caveats += _disagreement(stored["pool"], made["pool"], len(pictures))
    used = {**made, **stored}
    return Reference(
        name=path.name,
        sha256=pictures.about["sha256"],
        moments=used["pool"],
        spatial=used.get("spatial"),
        pool=features.pool,
        size=pictures.size,
        stored=tuple(stored),
        caveats=caveats,
    )


def check_widths(name: str, moments: dict[str, Moments], extractor: Extractor, size: Size) -> None:
    """Raises ValueError where moments ("pool", "spatial") have another width than the features of pictures of a size."""
    blank = extractor(torch.zeros(1, 3, *size, dtype=torch.uint8, device="cpu"))
    for kind, (mu, _) in moments.items():
        features = getattr(blank, kind)
        if features is not None and features.shape[1] != len(mu):
            raise ValueError(
                f"{name} is of {len(mu)} features, {extractor.name} gives {features.shape[1]}; take the extractor that made it"
            )


def write_reference(
    folder: Path | str, out: Path, extractor: Extractor, *, size: Size | None = None, keep: int = 10_000, overwrite: bool = False
) -> int:
    """Writes what a folder of pictures (or an .npz of them) is as a reference of ADM's layout; gives the number of pictures.

    The moments are those of all pictures; `keep` of them, evenly spread over the classes, go into the file for precision and recall.
    size: (height, width) to which the pictures are resized and cropped. Raises ValueError for too few pictures.
    """
    check_writable(out, overwrite=overwrite, read=[folder])
    if keep < 1:
        raise ValueError(f"{keep} pictures are to be kept; keep at least 1")
    pictures = open_pictures(folder, size)
    pool, spatial = RunningMoments(), RunningMoments()
    for piece in _cached(pictures, extractor).pieces():  # those of ImageNet would not fit into memory together
        pool.add(piece.pool)
        if piece.spatial is not None:
            spatial.add(piece.spatial)
    if pool.count < 2:
        raise ValueError(TOO_FEW.format(folder))
    kept = chosen(pictures, keep)
    arrays = dict(zip(("mu", "sigma"), pool.moments(), strict=True)) | {EXTRACTOR: np.array(extractor.sha256)}
    if spatial.count:
        arrays |= dict(zip(("mu_s", "sigma_s"), spatial.moments(), strict=True))
    make_folder(out.parent)
    single = (batch for place in kept for batch in pictures.batches(range(place, place + 1)))
    write_npz(out, arrays, len(kept), pictures.size, single)
    return len(pictures)


def moments_of(features: Features) -> dict[str, Moments]:
    """The moments of pool features ("pool") and, where there are some, of spatial ones ("spatial")."""
    spatial = {} if features.spatial is None else {"spatial": moments(features.spatial)}
    return {"pool": moments(features.pool), **spatial}


def _cached(pictures: PictureSet, extractor: Extractor) -> FeatureStore:
    """The features of pictures, in the cache folder, where those that were made before still lie."""
    digest = pictures.about["sha256"]
    key = f"{digest[:16]}-{extractor.sha256[:16]}" + "".join(f"-{side}" for side in pictures.size)
    about = {"pictures": digest, "extractor": extractor.sha256}
    store = FeatureStore(cache_folder() / "features" / key, len(pictures), about, overwrite=True)
    extract(pictures, extractor, store)
    return store


def _stored_moments(path: Path, extractor: Extractor) -> tuple[dict[str, Moments], list[str]]:
    """The moments in an .npz, and the names of all its arrays. ValueError where they are damaged or made by another extractor."""
    with open_npz(path) as archive:
        names = array_names(archive)
        stored = {}
        for kind, suffix in (("pool", ""), ("spatial", "_s")):
            if f"mu{suffix}" in names and f"sigma{suffix}" in names:
                mu, sigma = (read_array(archive, name + suffix, path) for name in ("mu", "sigma"))
                if not _are_moments(mu, sigma):
                    shapes = f"mu{suffix} {mu.shape} and sigma{suffix} {sigma.shape} of {path}"
                    raise ValueError(f"{shapes} are no finite mean and symmetric covariance; copy or write the file again")
                stored[kind] = mu.astype(np.float64), sigma.astype(np.float64)
        maker = str(read_array(archive, EXTRACTOR, path)) if EXTRACTOR in names else None
    if maker not in (None, extractor.sha256):
        raise ValueError(f"{path} was made with another extractor than {extractor.name} (sha256 {maker}); take that one, or write it anew")
    return stored, names


def _are_moments(mu: np.ndarray, sigma: np.ndarray) -> bool:
    """Whether these are real, finite, of fitting shapes, and sigma symmetric with no variance below 0."""
    if not {mu.dtype.kind, sigma.dtype.kind} <= set("fiu") or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        return False
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return False
    return bool(np.abs(sigma - sigma.T).max() <= 1e-3 * np.abs(sigma).max() and np.diag(sigma).min() >= 0)


def _disagreement(stored: Moments, made: Moments, count: int) -> list[str]:
    """A caveat where the pictures of a reference do not look like a sample of those that its stored moments come from; else nothing.

    The mean of `count` such pictures has the variance sigma / count: the squared shift of the means over it is 1 on average. Other
    pictures, another extractor or another way of resizing shift them by far more.
    """
    variance = np.diag(stored[1])
    spread = variance > 1e-12
    shift = float(np.mean(count * (stored[0] - made[0])[spread] ** 2 / variance[spread])) if spread.any() else 0.0
    if shift <= SHIFTED:
        return []
    return [
        f"the stored moments of the reference disagree with its own pictures (means shifted by {shift:.1f} times what chance allows, "
        f"Fréchet distance {frechet_distance(*stored, *made):.3g}); the stored ones are used"
    ]
