"""Imports go down the floors, files stay readable, and none is called something that says nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "flexvar"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("checks", "products"),
    (
        *("schedule", "position", "attention", "kv_cache", "sampling", "weights"),
        *("writing", "progress", "sheet", "arguments", "processes"),
    ),
    ("tokenizer", "transformer", "data", "labels", "fused_sampling"),
    ("generation", "linear"),
    ("editing", "checkpoint", "official", "zoo", "counting", "rates"),
    ("models", "settings", "accounting"),
    ("memory", "measuring"),
    ("compiled",),
    ("pipeline",),
    ("evaluation",),
    ("training", "app"),
    ("cli",),
)
"""Every file or folder of the package, from the ground up; `__init__` and `__main__` are the doors and stand outside."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py" and path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "flexvar":
                rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("flexvar.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    assert own in FLOOR_OF, f"{own} has no floor; give it one in {__file__}"
    for other in imported_rooms(path) - {own}:
        assert other in FLOOR_OF, f"{path} imports {other}, which has no floor"
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{own} (floor {FLOOR_OF[own]}) imports {other} (floor {FLOOR_OF[other]})"


def test_there_is_something_to_test() -> None:
    assert len(FILES) > 20
    assert imported_rooms(PACKAGE / "generation.py") == {"arguments", "checks", "sampling", "schedule", "tokenizer", "transformer"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_readable_and_named(path: Path) -> None:
    assert path.stem not in {"utils", "util", "misc", "helpers", "common"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 380


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_say_what_they_raise(path: Path) -> None:
    silent: list[str] = []

    def look(within: ast.AST) -> None:
        for node in ast.iter_child_nodes(within):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                look(node)
            elif isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and "Error" not in doc:
                silent.extend(node.name for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc is not None)

    look(ast.parse(path.read_text(encoding="utf-8")))
    assert silent == []
