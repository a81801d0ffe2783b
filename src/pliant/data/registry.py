"""The table of data sets, and `load`, which reads one from the package's extras or from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pliant.core.errors import PliantError
from pliant.data import audio, images, text
from pliant.data.dataset import Dataset, Split
from pliant.data.files import Parts


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies in a folder: where, known by which file, read how, and its limits."""

    folders: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Path, int | None], Parts]
    cases: tuple[int, int]  # training (validation included) and test cases when complete
    note: str = ""
    fits: Callable[[Path], bool] = Path.is_dir  # tells layouts of equal file names apart


@dataclass(frozen=True)
class Entry:
    """One data set of the table."""

    kind: Literal["image", "text", "audio"]
    classes: tuple[str, ...]
    licence: str
    layouts: tuple[Layout, ...]
    white: int = 255
    max_length: int = 0


DIGITS = tuple("0123456789")
SENTIMENT = ("negative", "positive")

TABLE: dict[str, Entry] = {
    "digits": Entry("image", DIGITS, "CC BY 4.0 (UCI, via scikit-learn, BSD-3-Clause)", (), white=16),
    "fashion_mnist": Entry(
        "image",
        ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        "MIT",
        (
            Layout(
                ("fashion_mnist", "FashionMNIST/raw", "raw"),
                ("train-images-idx3-ubyte",),
                images.fashion_idx,
                (60_000, 10_000),
            ),
        ),
    ),
    "cifar10": Entry(
        "image",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "not stated; the authors ask for citation",
        (
            Layout(
                ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "cifar10"),
                ("data_batch_1.bin",),
                images.cifar_binary,
                (50_000, 10_000),
            ),
            Layout(
                ("cifar10/cifar-10-batches-py", "cifar-10-batches-py", "cifar10"),
                ("data_batch_1",),
                images.cifar_python,
                (50_000, 10_000),
            ),
            Layout(("cifar10",), ("train.npz",), images.cifar_jpeg, (50_000, 10_000), "CIFAR-10, JPEG copy (lossy)"),
        ),
    ),
    "sst2": Entry(
        "text",
        SENTIMENT,
        "not stated; the authors ask for citation",
        (
            Layout(
                ("sst2/SST-2", "SST-2", "sst2"),
                ("train.tsv",),
                text.sst_glue,
                (67_349, 872),
                "SST-2 as in GLUE: phrases for training; GLUE's dev part is the test part",
                text.is_glue,
            ),
            Layout(
                ("sst", "sst2"),
                ("train.tsv",),
                text.sst_five,
                (6_920, 1_821),
                "SST-2, whole sentences only",
                text.is_five,
            ),
        ),
        max_length=64,
    ),
    "ag_news": Entry(
        "text",
        ("World", "Sports", "Business", "Sci/Tech"),
        "research and other non-commercial use",
        (
            Layout(("ag_news", "ag_news_csv"), ("train.csv",), text.ag_csv, (120_000, 7_600)),
            Layout(
                ("ag_news",),
                ("train.tsv",),
                text.ag_tsv,
                (5_700, 1_900),
                "AG News, small: only its original test articles, split anew; not comparable with published figures",
            ),
        ),
        max_length=128,
    ),
    "imdb": Entry(
        "text",
        SENTIMENT,
        "not stated; the authors ask for citation",
        (
            Layout(
                ("imdb/aclImdb", "aclImdb", "imdb"), ("train/pos", "train/neg"), text.imdb_folders, (25_000, 25_000)
            ),
            Layout(("imdb",), ("train.tsv",), text.imdb_tsv, (25_000, 25_000)),
        ),
        max_length=256,
    ),
    "fsdd": Entry(
        "audio",
        DIGITS,
        "CC BY-SA 4.0",
        (
            Layout(
                ("fsdd", "free-spoken-digit-dataset", "free-spoken-digit-dataset-master"),
                ("recordings",),
                audio.fsdd_wav,
                (2_700, 300),
            ),
            Layout(("fsdd",), ("train.npz",), audio.fsdd_npz, (2_700, 300)),
        ),
    ),
}


def names() -> list[str]:
    r"""The names which `load` knows.

    >>> names()
    ['digits', 'fashion_mnist', 'cifar10', 'sst2', 'ag_news', 'imdb', 'fsdd']
    """
    return list(TABLE)


def load(
    name: str, root: str | Path | None = None, *, limit: int | None = None, max_length: int | None = None
) -> Dataset:
    r"""Load a data set by name. Nothing is downloaded: see `fetch` for that.

    x <- (x / white - mean) / std per channel for images, with the training part's mean and deviation; word numbers
    (0 padding, 1 unknown) for texts, with a vocabulary of the training part; log-mel pictures for sound.

    Where the authors give no validation part, it is the last tenth of their training part, at most 5,000 cases, and is
    the same for every `limit`. It never comes from the test part.

    Shape: images (N, C, H, W) float32; texts (N, T) int64; sound (N, 1, 64, 40) float32; labels (N,) int64.

    Args:
        name: one of `names()`. "digits" comes with scikit-learn and needs no folder.
        root: the folder which holds the data set's folder, or that folder itself; the environment variable
            PLIANT_DATA if not given.
        limit: number of training cases to use, the first in the fixed order; all by default.
        max_length: words kept of each text; 64 for sst2, 128 for ag_news, 256 for imdb by default.

    Returns:
        A `Dataset`; its `note` names the limits of this copy and belongs beside every figure.

    Raises:
        PliantError: unknown name, nothing found, or a file which is damaged or incomplete.

    >>> data = load("digits")
    >>> len(data.train), len(data.val), len(data.test), data.shape
    (1078, 360, 359, (1, 8, 8))
    >>> data.test.y.dtype, round(float(data.train.x.std()), 3)
    (torch.int64, 1.0)

    References: scikit-learn's load_digits (Alpaydin and Kaynak 1998); Xiao et al. 2017; Krizhevsky 2009; Socher et al.
    2013; Zhang et al. 2015; Maas et al. 2011; Jackson et al., Free Spoken Digit Dataset.
    """
    entry = entry_of(name)
    for word, value in (("limit", limit), ("max_length", max_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PliantError(
                got=f"{word}={value!r}", expected="a positive whole number", do=f"pass for example {word}=100"
            )
    if max_length is not None:
        if entry.kind != "text":
            raise PliantError(
                got=f"max_length for the {entry.kind} set {name!r}", expected="a text set", do="leave it out"
            )
        entry = replace(entry, max_length=max_length)
    if not entry.layouts:
        return _assemble(name, entry, images.digits(limit), "")
    folder, layout = locate(name, root_of(name, root))
    parts = layout.read(folder, limit)
    notes = [layout.note] if layout.note else []
    for part, there, whole in (
        ("training", parts.held, layout.cases[0]),
        ("test", len(parts.test[1]), layout.cases[1]),
    ):
        if there != whole:
            notes.append(f"{part} part: {there:,} of {whole:,} cases")
    if limit is not None:
        notes.append(f"first {limit:,} training cases only")
    return _assemble(name, entry, parts, "; ".join(notes))


def entry_of(name: str) -> Entry:
    """The table's row for a name."""
    if name not in TABLE:
        raise PliantError(got=f"data set {name!r}", expected=f"one of {', '.join(TABLE)}", do="correct the name")
    return TABLE[name]


def root_of(name: str, root: str | Path | None) -> Path:
    """The folder given, or that of PLIANT_DATA."""
    chosen = root if root is not None else os.environ.get("PLIANT_DATA")
    if not chosen:
        raise PliantError(
            got=f"no folder for the data set {name!r}",
            expected=f"a folder with {wanted(name)}",
            do="pass root=, or set the environment variable PLIANT_DATA",
        )
    return Path(chosen).expanduser()


def locate(name: str, root: Path) -> tuple[Path, Layout]:
    """Where the data set lies under root, and in which layout; named folders go before root itself."""
    layouts = TABLE[name].layouts
    tries = [(layout, folder) for layout in layouts for folder in layout.folders] + [(each, ".") for each in layouts]
    for layout, folder in tries:
        there = any((root / folder / f"{mark}{end}").exists() for mark in layout.marks for end in ("", ".gz"))
        if there and layout.fits(root / folder):
            return root / folder, layout
    raise PliantError(
        got=f"no data set {name!r} in {root}",
        expected=wanted(name),
        do=f"put the files there, or call pliant.data.fetch({name!r}, root)",
    )


def wanted(name: str) -> str:
    """The layouts of a data set in words."""
    return " or ".join(f"{layout.folders[0]}/{layout.marks[0]}" for layout in TABLE[name].layouts)


def _assemble(name: str, entry: Entry, parts: Parts, note: str) -> Dataset:
    """Tensors from raw parts: normalised images, encoded texts, or log-mel pictures."""
    raw: tuple[tuple[Any, Any], ...] = (parts.train, parts.val, parts.test)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocabulary: tuple[str, ...] = ()
    if entry.kind == "image":
        mean, std = images.moments(parts.train[0], entry.white)
        inputs = [images.normalised(x, entry.white, mean, std) for x, _ in raw]
    elif entry.kind == "text":
        vocabulary = text.build_vocabulary(parts.train[0])
        inputs = [text.encode(x, vocabulary, entry.max_length) for x, _ in raw]
    else:
        inputs = [audio.log_mel(x) for x, _ in raw]
        mean, std = (float(inputs[0].mean()),), (float(inputs[0].std()) or 1.0,)
        inputs = [x.sub_(mean[0]).div_(std[0]) for x in inputs]
    train, val, test = (
        Split(x, torch.tensor([int(label) for label in labels], dtype=torch.int64))
        for x, (_, labels) in zip(inputs, raw, strict=True)
    )
    return Dataset(name, entry.kind, train, val, test, entry.classes, entry.licence, note, mean, std, vocabulary)
