"""What turns pictures into the features that metrics compare: FID's Inception, the small classifier, or a network from a file."""

from __future__ import annotations

import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from flexvar import zoo
from flexvar.checks import warn
from flexvar.evaluation.classifier import BUNDLED, Classifier, load_classifier
from flexvar.evaluation.inception import load_inception
from flexvar.memory import is_out_of_memory
from flexvar.processes import without_tf32
from flexvar.progress import progress
from flexvar.writing import write_whole

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES, MEBIBYTE = 95_628_359, 2**20
PATIENCE = 30  # s without an answer


@dataclass(frozen=True)
class Features:
    """What an extractor gives for B pictures: float32, on the CPU."""

    pool: Tensor  # (B, F)
    spatial: Tensor | None = None  # (B, S); the Inception's alone
    logits: Tensor | None = None  # (B, C); of networks that tell classes


class Exported:
    """A program of torch.export, whose steps name their device: to move it is to rewrite it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        self.program = move_to_device_pass(self.program, device)
        self.run = self.program.module()

    def __call__(self, pictures: Tensor) -> Any:
        return self.run(pictures)


Network = nn.Module | Exported


class Extractor:
    """Turns pictures into features; `load_extractor` makes one, on the CPU.

    name: "inception", "classifier", or a file's name. sha256: of the file with the weights.
    """

    def __init__(self, name: str, file: Path, network: Network, read: Callable[[Any, Tensor], Features]) -> None:
        self.name, self.sha256 = name, zoo.sha256(file)
        self.network, self.read, self.device = network, read, torch.device("cpu")

    @property
    def published(self) -> bool:
        """Whether it is the network behind published scores, as the hash of its weights tells."""
        return self.sha256 == INCEPTION_SHA256

    def to(self, device: torch.device | str) -> Extractor:
        """Moves the network to a device; gives the extractor itself."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.no_grad()
    @without_tf32()
    def __call__(self, pictures: Tensor) -> Features:
        """The features of pictures (B, 3, H, W), uint8. ValueError for other pictures, and for features that are not finite."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"the pictures are {tuple(pictures.shape)} {pictures.dtype}; give (B, 3, H, W) uint8")
        given = vars(self.read(self.network, pictures.to(self.device)))
        parts = {name: part.to("cpu", torch.float32) for name, part in given.items() if part is not None}
        if not all(part.isfinite().all() for part in parts.values()):
            raise ValueError(f"the features of the extractor {self.name} are not finite; its weights are broken, fetch or save them again")
        return Features(**parts)


def load_extractor(name: str | Path = "inception", weights: Path | str | None = None) -> Extractor:
    """The extractor `inception` (weights: a path, else the cache folder or torch-fidelity's address), `classifier` (bundled), or of a file.

    A file is a classifier's .safetensors or what torch.jit.save or torch.export.save wrote: a network that takes pictures (B, 3, H, W),
    uint8, of any B, prepares them by itself and gives one tensor (B, F) of floats. A model's own tokenizer is refused.
    Raises FileNotFoundError, ValueError or, offline, ConnectionError, in one line.
    """
    if name == "inception":
        path = Path(weights) if weights is not None else _cached_inception()
        extractor = Extractor("inception", path, load_inception(path), lambda network, pictures: Features(*network(pictures)))
        if not extractor.published:
            warn(f"{path} is not the usual {INCEPTION_FILE}; do not compare its numbers with published ones")
        return extractor
    if weights is not None:
        raise ValueError(f"the extractor {name} takes no weights beside it, only inception does; leave them out")
    path = Path(str(files("flexvar") / "assets" / BUNDLED)) if name == "classifier" else Path(name)
    if name in zoo.NAMES or path.is_dir() or path.name in zoo.MODEL_FILES:
        raise ValueError(f"{name} is a model, whose own tokenizer flatters what it draws; give inception, classifier or another network")
    if not path.is_file():
        raise FileNotFoundError(f"there is no extractor {name}; give inception, classifier or the path of a network's file")
    name = "classifier" if name == "classifier" else path.name
    if path.suffix == ".safetensors":
        return Extractor(name, path, load_classifier(path), _read_classifier)
    return Extractor(name, path, _load_network(path), partial(_read_network, name))


def _cached_inception() -> Path:
    """The Inception's file in the cache folder, fetched unless it is there."""
    path = zoo.cache_folder() / INCEPTION_FILE
    if not path.is_file():
        try:
            with zoo.one_at_a_time(INCEPTION_FILE):
                if not path.is_file():  # another process may have fetched it
                    write_whole(path, _fetch_inception)
        except ConnectionError:
            raise
        except OSError as error:  # a full disk, or a folder in which nothing may be written
            raise OSError(f"{path} could not be kept ({error}); make room, or name another folder in FLEXVAR_CACHE") from error
    if (seen := zoo.sha256(path)) != INCEPTION_SHA256:
        raise ValueError(f"{path} has sha256 {seen} instead of {INCEPTION_SHA256}; delete it, so that it is fetched again")
    return path


def _fetch_inception(path: Path) -> None:
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=PATIENCE) as answer, path.open("wb") as file:
            for _ in progress(range(0, INCEPTION_BYTES, MEBIBYTE), f"fetching {INCEPTION_FILE}, MiB"):
                file.write(answer.read(MEBIBYTE))
        if (seen := zoo.sha256(path)) != INCEPTION_SHA256:
            raise ConnectionError(f"what came has sha256 {seen}")
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{INCEPTION_URL} could not be fetched ({error}); put that file into {zoo.cache_folder()} or name it with --weights; "
            "--extractor classifier needs none, for numbers that compare among themselves"
        ) from error


def _load_network(path: Path) -> Network:
    """A network that was saved with its code."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.partition("/")[2] for entry in archive.namelist()}
        if "constants.pkl" in entries:
            return torch.jit.load(path, map_location="cpu").eval()
        if "archive_format" in entries:
            return Exported(torch.export.load(path))
    except Exception as error:  # torch raises anything on damaged files
        raise ValueError(f"{path} is damaged, or no file of torch {torch.__version__} ({_last_line(error)}); save it again") from error
    raise ValueError(f"{path} holds no network that runs by itself, or is damaged; save one with torch.jit.save or torch.export.save")


def _read_classifier(classifier: Classifier, pictures: Tensor) -> Features:
    pool = classifier.features(pictures.float() / 127.5 - 1)
    return Features(pool, logits=classifier.head(pool))


def _read_network(name: str, network: Network, pictures: Tensor) -> Features:
    try:
        given = network(pictures)
    except Exception as error:  # a network raises anything
        if is_out_of_memory(error):
            raise
        shape = tuple(pictures.shape)
        raise ValueError(f"{name} does not take pictures {shape} uint8 ({_last_line(error)}); it must prepare them by itself") from error
    if not isinstance(given, Tensor) or given.ndim != 2 or len(given) != len(pictures) or not given.is_floating_point():
        what = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name} gave {what} for {len(pictures)} pictures; it must give one tensor ({len(pictures)}, F) of floats")
    return Features(given)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
