"""Reproduce: run a system's claims on real data and write down what was measured, held or not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pliant.core.errors import PliantError
from pliant.core.files import atomic


@dataclass(frozen=True)
class Claim:
    """One claim: what is said, what was measured, the bound, and whether it held.

    Args:
        claim: in a sentence.
        measured: the figure, with its unit, as it shall be printed.
        bound: what it had to be, as it shall be printed.
        held: whether it was.
        values: the raw figures by seed or setting.
        note: what was tried where it failed, or where the bound is thought wrong and why.
    """

    claim: str
    measured: str
    bound: str
    held: bool
    values: Sequence[float] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """What was measured beside the claims, for the documentation to show.

    Args:
        title: what it shows, in a sentence.
        columns: their names; the first names the rows.
        rows: numbers as measured, words as they are.
        plot: the columns that stand across and up in its picture; None draws none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    plot: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        wrong = [len(row) for row in self.rows if len(row) != len(self.columns)]
        unknown = [name for name in self.plot or () if name not in self.columns]
        if wrong or unknown:
            raise PliantError(
                got=f"rows of {wrong} cells" if wrong else f"a plot of {unknown}",
                expected=f"{len(self.columns)} cells, and columns of the table: " + ", ".join(self.columns),
                do=f"mend the table {self.title!r}",
            )


@dataclass(frozen=True)
class Lab:
    """What a file in evidence/ is given: where the data is, and whom to tell.

    Args:
        root: folder of the data sets; None means ``$PLIANT_DATA``.
        progress: called with what is being done, how much of it is done, and how much there is.
    """

    root: Path | None
    progress: Callable[[str, int, int], None]


def versions() -> dict[str, str]:
    """Versions that a figure depends on.

    >>> sorted(versions())[:2]
    ['machine', 'pliant']
    """
    found = {"machine": platform.machine(), "python": platform.python_version()}
    for name in ("pliant", "torch", "torchvision", "timm", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """The commit of the checkout that holds ``folder``, marked where files differ from it; None outside of one."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` whole or not at all."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _declared(id: str, folder: Path) -> ModuleType:
    path = folder / f"{id}.py"
    known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if not path.is_file():
        raise PliantError(
            got=f"no {path}", expected="one of " + (", ".join(known) or "(no evidence files there)"),
            do="run in a source checkout, or name its evidence folder with --evidence",
            site=None,
        )  # fmt: skip
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))  # evidence files share _common.py beside them
    try:
        return importlib.import_module(id)
    finally:
        sys.path[:] = before


def reproduce(id: str, *, folder: Path, root: Path | None, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the claims of ``folder/ID.py`` and write ``folder/results/ID.json``.

    The file declares ``DATA`` (the name of the data and its limits), ``SEEDS``, and ``run(lab)``, which returns claims, and
    tables among them.

    Args:
        id: of the system.
        folder: the evidence folder.
        root: folder of the data sets.
        progress: told what is being done.

    Returns:
        What was written.

    Raises:
        PliantError: where there is no such file.
    """
    module = _declared(id, folder)
    at, start = commit(folder), time.perf_counter()
    found: list[Claim | Table] = module.run(Lab(root, progress))
    result = {
        "id": id, "data": module.DATA, "claims": [asdict(c) for c in found if isinstance(c, Claim)],
        "tables": [asdict(t) for t in found if isinstance(t, Table)], "seeds": list(module.SEEDS),
        "seconds": round(time.perf_counter() - start, 1), "versions": versions(), "commit": at,
    }  # fmt: skip
    write_json(folder / "results" / f"{id}.json", result)
    return result
