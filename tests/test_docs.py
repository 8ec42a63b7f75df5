"""What the documents say is so: their Python runs, their commands parse, their names and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from flexvar import zoo
from flexvar.cli import main, parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md")), ROOT / "THIRD_PARTY.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), {})
    if page == ROOT / "README.md":
        assert (tmp_path / "pizza.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    commands = re.findall(r"^ {4}flexvar (.+?)(?:  +#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands:
        parser().parse_args(shlex.split(command))
    assert commands or page != ROOT / "README.md"


def test_every_name_on_the_paper_page_exists() -> None:
    names = re.findall(r"`(flexvar\.[\w.]+)`", (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"))
    assert len(names) > 30
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[cut:]:
            found = getattr(found, part)


def test_the_zoo_table_is_the_zoo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, facts in zoo.RELEASED.items():
        assert f"| `{name}` | {facts.parameters} | {facts.fid} | {facts.inception_score} |" in readme
    assert all(f"| `{name}` |" in readme for name in zoo.BUNDLED)


def test_the_tree_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [path for path in (ROOT / "src" / "flexvar").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    for room in rooms:
        name = room.name if room.is_file() else f"{room.name}/"
        assert name.startswith("__") or name in readme, name


@pytest.mark.slow
def test_training_your_own_goes_from_pictures_to_samples(tmp_path: Path, monkeypatch, capsys) -> None:
    """Every command of the page, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = (ROOT / "examples" / "train_your_own.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^ {4}flexvar (.+)$", page, re.MULTILINE)]
    assert {command[0] for command in commands} == {"data", "train", "cache", "sample"}
    for command in commands:
        shortened = ["steps=6", "batch=8", "save_every=3"] if command[0] == "train" else []
        shortened += ["views=1"] if command[0] == "cache" else []
        assert main([*command, *shortened]) == 0, command
    assert (tmp_path / "out" / "own" / "grid.png").is_file()
    for run in ("own-tokenizer", "own-coarse", "own-transformer"):
        assert list((tmp_path / "runs" / run / "sheets").glob("*.png"))
