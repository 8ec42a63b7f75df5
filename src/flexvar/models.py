"""Models by their names, and from and to the files that the authors released."""

from __future__ import annotations

from pathlib import Path

import torch

from flexvar import zoo
from flexvar.checkpoint import Defaults, Model, save
from flexvar.checks import shown
from flexvar.data import aliases_of, imagenet_classes
from flexvar.official import read_released, to_released, tokenizer_from_released, transformer_from_released, warn_of_differences
from flexvar.writing import make_folder, write_together


def model_folder(name: str | Path) -> Path:
    """The folder of a model by its name (see `FlexVARPipeline.from_pretrained`); fetches and converts what is not here yet.

    Raises FileNotFoundError, ValueError or ConnectionError, in one line, where there is none.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"a model is {shown(name)}; give its name or folder")
    if name in zoo.BUNDLED:
        return zoo.bundled_folder(str(name))
    if name in zoo.RELEASED:
        folder = zoo.cache_folder() / str(name)
        config = folder / "config.json"
        if not config.is_file():
            with zoo.one_at_a_time(folder.name):
                if not config.is_file():  # another process may have made it
                    save(released_model(*zoo.fetch_released(str(name))), folder, overwrite=True)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"there is no model folder {name}; bundled and released models are {', '.join(zoo.NAMES)}")
    return zoo.fetch_folder(str(name))


def released_model(tokenizer: str | Path, transformer: str | Path) -> Model:
    """A model from released .pth files of the tokenizer and the transformer; it draws as the released evaluation does.

    Raises ValueError for files that are damaged or do not belong together.
    """
    files = {"tokenizer": Path(tokenizer), "transformer": Path(transformer)}
    drawing = transformer_from_released(read_released(files["transformer"]))
    painting = tokenizer_from_released(read_released(files["tokenizer"]))
    if (drawing.config.codebook_size, drawing.config.code_width) != (painting.config.codebook_size, painting.config.code_width):
        raise ValueError(f"{tokenizer} and {transformer} do not belong together: they have different codebooks")
    classes = drawing.config.classes
    names = tuple(name for _, name in imagenet_classes()) if classes == 1000 else tuple(f"class {i}" for i in range(classes))
    side = drawing.config.trained_grid * painting.config.downsample
    seen = {part: {"file": path.name, "sha256": zoo.sha256(path)} for part, path in files.items()}
    provenance = {"converted from": seen, "licence": "MIT (the authors of FlexVAR)"}
    return Model(painting, drawing, names, Defaults(side, side), provenance, aliases_of(names))


def write_released(model: Model, folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Writes the two .pth files that the released code loads; gives their paths, tokenizer first.

    Warns where the released code has to be changed to load them. Raises ValueError for a model without a transformer or with one made
    faster, and FileExistsError where a file is there and `overwrite` is not set.
    """
    tokenizer, transformer, folder = model.tokenizer, model.transformer, Path(folder)
    if transformer is None:
        raise ValueError("this model has no transformer yet; train one on its tokenizer first")
    transformer.refuse_made_faster()
    warn_of_differences(tokenizer.config, transformer.config)
    files = folder / zoo.RELEASED_TOKENIZER, folder / f"FlexVARd{transformer.config.depth}.pth"
    for path in files:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another folder, or allow it with overwrite=True (--overwrite)")
    make_folder(folder)
    write_together(
        {
            files[0]: lambda beside: torch.save({"model": to_released(tokenizer)}, beside),
            files[1]: lambda beside: torch.save(to_released(transformer), beside),
        }
    )
    return files
