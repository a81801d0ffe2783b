"""The house keeps its own rules: imports point down, and no file outgrows its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "pliant"
ROOMS = [
    "functional",
    "core",
    "scores",
    "rules",
    "estimators",
    "execute",
    "cost",
    "losses",
    "tune",
    "train",
    "retrofit",
    "systems",
    "deploy",
    "data",
    "insight",
    "checks",
    "check",
    "reproduce",
    "study",
    "cli",
    "__main__",
    "__init__",
]
"""From the ground up: each may import from those before it."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_point_down(name: str) -> None:
    below = ROOMS[: ROOMS.index(name) + 1]
    for path in ROOT.rglob("*.py"):
        if room(path) == name:
            for module in imported(path):
                if module.startswith("pliant."):
                    assert module.split(".")[1] in below, f"{path.name} imports {module}"


def test_every_room_is_known() -> None:
    assert {room(path) for path in ROOT.rglob("*.py")} <= set(ROOMS)


def test_no_file_outgrows_its_room() -> None:
    for path in ROOT.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        constructor = room(path) == "systems" and path.name != "table.py"  # the catalogue is data
        assert lines <= (150 if constructor else 400), f"{path.relative_to(ROOT)} has {lines} lines"
