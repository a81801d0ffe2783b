"""Reading files without trust: each fault names the file, what was found, what was expected and what to do."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.core.errors import PliantError
from pliant.core.files import atomic

if TYPE_CHECKING:
    import numpy as np

VAL_SHARE, VAL_MOST = 10, 5000
FRESH = "delete the file and put a fresh copy in its place"


@dataclass(frozen=True)
class Parts:
    """Raw training, validation and test parts, each (inputs, labels), and how many training cases the files hold."""

    train: tuple[Any, Any]
    val: tuple[Any, Any]
    test: tuple[Any, Any]
    held: int


def require(module: str) -> Any:
    """Import a module of the extra `data`, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PliantError(
            got=f"no module {module.split('.')[0]!r}",
            expected="the extra 'data' to be installed",
            do="run: pip install 'pliant[data]'",
        ) from error


def find(folder: Path, *names: str) -> Path:
    """The first of the names that is there, plain or with .gz; an error names them all."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise PliantError(
        got=f"no file {' or '.join(names)} in {folder}",
        expected="the whole data set",
        do="put the missing file beside the others, or delete the folder and fetch the data set anew",
    )


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise PliantError(
            got=f"{path}, which cannot be read to its end ({type(error).__name__}: {error})",
            expected="a whole file",
            do=FRESH,
        ) from error


def read_text(path: Path) -> str:
    """The content of a UTF-8 file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PliantError(
            got=f"{path}, byte {error.start} of which is no UTF-8", expected="UTF-8 text", do=FRESH
        ) from error


def read_rows(path: Path, fields: int) -> list[list[str]]:
    """The lines of a tab-divided file, each with so many fields."""
    lines = read_text(path).split("\n")
    if lines[-1] != "":
        raise PliantError(got=f"{path}, whose last line has no end", expected="a whole file", do=FRESH)
    rows = [line.rstrip("\r").split("\t") for line in lines[:-1]]
    for number, row in enumerate(rows, 1):
        if len(row) != fields:
            raise PliantError(
                got=f"{len(row)} fields in line {number} of {path}",
                expected=f"{fields} fields divided by tabs",
                do=FRESH,
            )
    return rows


def read_npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file; no pickles, no NaN."""
    np = require("numpy")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as packed:
            arrays = {key: packed[key] for key in keys}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise PliantError(
            got=f"{path}, which cannot be read ({type(error).__name__}: {error})",
            expected=f"an .npz file with the arrays {', '.join(keys)}",
            do=FRESH,
        ) from error
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PliantError(got=f"NaN or infinite values in {key!r} of {path}", expected="finite values", do=FRESH)
    return arrays


def check_ragged(path: Path, values: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> None:
    """Case i is values[offsets[i]:offsets[i + 1]], and has a label."""
    good = offsets.ndim == 1 and labels.ndim == 1 and len(offsets) == len(labels) + 1
    if not good or offsets[0] != 0 or offsets[-1] != len(values) or (offsets[1:] < offsets[:-1]).any():
        raise PliantError(
            got=f"{len(labels)} labels, {len(offsets)} offsets and {len(values)} values in {path}",
            expected="one label per case and rising offsets from 0 to the number of values",
            do=FRESH,
        )


def check_counts(path: Path, inputs: int, labels: int) -> None:
    """As many labels as inputs."""
    if inputs != labels:
        raise PliantError(got=f"{labels} labels for {inputs} inputs in {path}", expected="one label each", do=FRESH)


def label_of(word: str, path: Path, number: int) -> int:
    """A label written as text, with its place in the file in case it is none."""
    if not word.isascii() or not word.isdigit():
        raise PliantError(got=f"label {word!r} in line {number} of {path}", expected="a whole number", do=FRESH)
    return int(word)


def fixed_order(keys: Sequence[str]) -> list[int]:
    """A shuffled order which depends on the keys alone, the same on every machine and in every version."""
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(keys[i].encode()).digest())


def cut(cases: int, limit: int | None, path: Path) -> tuple[range, range]:
    """Row numbers of the training and the validation part: the last tenth is held out, at most 5,000 rows."""
    held_out = min(VAL_MOST, max(1, cases // VAL_SHARE))
    return range(capped(cases - held_out, limit, path)), range(max(0, cases - held_out), cases)


def capped(cases: int, limit: int | None, path: Path) -> int:
    """How many training cases to use."""
    if cases < 1 or (limit is not None and limit > cases):
        raise PliantError(
            got=f"{max(cases, 0)} training cases in {path}" + ("" if limit is None else f" and limit={limit}"),
            expected="at least 1 training case" if limit is None else f"at least {limit} training cases",
            do="check the file" if limit is None else "pass a smaller limit, or none",
        )
    return cases if limit is None else limit


def atomic_write(path: Path, write: Callable[[Any], object]) -> None:
    """Let ``write`` fill the file; the name never holds half of it."""
    with atomic(path) as part, part.open("wb") as file:
        write(file)


def cached(source: Path, keys: tuple[str, ...], build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays made from a source file: kept in the cache folder until the source changes."""
    np = require("numpy")
    stat = source.stat()
    mark = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    path = cache_folder() / f"{source.parent.name}-{source.stem}-{mark}.npz"
    if path.is_file():
        try:
            return read_npz(path, *keys)
        except PliantError as error:  # the cache is only a copy: make it anew
            warnings.warn(f"the cached {path} is made anew: {error}", RuntimeWarning, stacklevel=2)
    arrays = build()
    try:
        atomic_write(path, lambda file: np.savez(file, **arrays))
    except OSError as error:  # the data are there all the same; only the next start is slower
        warnings.warn(f"the cache {path} could not be written: {error}", RuntimeWarning, stacklevel=2)
    return arrays


def cache_folder() -> Path:
    """Where decoded images are kept: PLIANT_CACHE, or ~/.cache/pliant."""
    return Path(os.environ.get("PLIANT_CACHE") or Path.home() / ".cache" / "pliant")
