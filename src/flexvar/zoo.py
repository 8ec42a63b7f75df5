"""Names of models, and where their weights lie: facts, apart from code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock

from flexvar.writing import make_folder

BUNDLED = ("emoji",)
RELEASED_REPOSITORY = "jiaosiyu1999/FlexVAR"
RELEASED_TOKENIZER = "FlexVAE.pth"
MODEL_FILES = ["config.json", "tokenizer.safetensors", "transformer.safetensors"]


@dataclass(frozen=True)
class Released:
    """A checkpoint that the authors released (MIT licence), and the scores they published for it on ImageNet 256."""

    file: str
    parameters: str
    fid: float  # 50,000 pictures, 10 steps
    inception_score: float


RELEASED = {
    "flexvar-d16": Released("FlexVARd16-epo179.pth", "316 M", 3.05, 291.3),
    "flexvar-d20": Released("FlexVARd20-epo249.pth", "608 M", 2.41, 299.3),
    "flexvar-d24": Released("FlexVARd24-epo349.pth", "1041 M", 2.21, 299.1),
}

NAMES = (*BUNDLED, *RELEASED)

SHA256: dict[str, str] = {}
"""Of released files, by name. None is known yet: a converted model's provenance says what was seen, for whoever can compare it."""


def bundled_folder(name: str) -> Path:
    """The folder of a model that comes with the package."""
    return Path(str(files("flexvar") / "assets" / name))


def cache_folder() -> Path:
    """Where converted models are kept: FLEXVAR_CACHE, or `flexvar` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLEXVAR_CACHE") or Path(home) / "flexvar")


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Of all processes of this machine: one makes what the cache folder lacks while the others wait, and then find it there.

    Raises OSError, in one line, for a cache folder in which nothing can be made.
    """
    make_folder(cache_folder())
    lock = cache_folder() / f".{name}.lock"
    try:
        lock.touch()
    except OSError as error:
        raise OSError(f"the cache folder {cache_folder()} takes no files ({error.strerror}); name another in FLEXVAR_CACHE") from error
    with WeakFileLock(lock):
        yield


def fetch_released(name: str) -> tuple[Path, Path]:
    """The released files of tokenizer and transformer, downloaded unless the Hub's cache has them.

    Raises ValueError for a file whose sha256 is known and another.
    """
    wanted = [RELEASED_TOKENIZER, RELEASED[name].file]
    folder = _fetched(RELEASED_REPOSITORY, wanted)
    for file in wanted:
        if not (folder / file).is_file():
            raise ValueError(f"{RELEASED_REPOSITORY} gave no {file}; go online, or convert the files from where you have them")
        if file in SHA256 and (seen := sha256(folder / file)) != SHA256[file]:
            path = (folder / file).resolve()
            raise ValueError(f"{path} has sha256 {seen} instead of {SHA256[file]}; delete it, so that it is fetched again")
    return folder / RELEASED_TOKENIZER, folder / RELEASED[name].file


def fetch_folder(repository: str) -> Path:
    """The folder of a model on the Hub, downloaded unless the Hub's cache has it."""
    return _fetched(repository, MODEL_FILES)


def upload_folder(folder: Path | str, repository: str, *, private: bool = False) -> str:
    """Uploads a folder to the Hub, into a repository that is made unless it is there; gives its address.

    Raises ConnectionError, in one line, where the Hub cannot be reached or does not let us.
    """
    try:
        huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder))
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository; give owner/name") from error
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConnectionError(f"{repository} could not be uploaded ({reason}); go online, and log in with `hf auth login`") from error


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetched(repository: str, files: list[str]) -> Path:
    """The folder with files of a repository, or one line that says why there is none.

    A snapshot even where two files are wanted: asked for one file, the Hub's client tries for half a minute when it is offline.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{repository!r} is no model: not a bundled or released name ({', '.join(NAMES)}), not a folder, not open to you on the Hub"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repository} is no folder here, not in the Hub's cache and cannot be reached; "
            f"correct the name, go online once, or give a folder or one of {', '.join(BUNDLED)}"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConnectionError(f"{repository} could not be fetched ({reason}); go online, or give a folder") from error
    except OSError as error:  # a full disk, or a folder in which nothing may be written
        raise OSError(f"{repository} could not be kept ({error}); see to the Hub's cache folder, or name another in HF_HOME") from error
