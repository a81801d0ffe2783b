"""Texts: SST-2, AG News and IMDB, as rows of word numbers; the vocabulary is counted on the training part alone."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.data import files
from pliant.data.files import FRESH, Parts

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_Rows = tuple[list[str], list[int]]


def words(text: str) -> list[str]:
    """Lower-case words and single marks; the line breaks of web pages are dropped."""
    return _WORD.findall(text.replace("<br />", " ").lower())


def build_vocabulary(texts: Sequence[str], size: int = 20_000, min_count: int = 2) -> tuple[str, ...]:
    """Words by falling count, ties by the alphabet; ids 0 and 1 are padding and unknown words."""
    counts = Counter(word for text in texts for word in words(text))
    kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return ("<pad>", "<unknown>", *(word for _, word in kept[: size - 2]))


def encode(texts: Sequence[str], vocabulary: Sequence[str], max_length: int) -> Tensor:
    """Word numbers (N, max_length), cut or padded at the end; a text without words is one unknown word."""
    number = {word: i for i, word in enumerate(vocabulary)}
    out = torch.full((len(texts), max_length), PAD, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = [number.get(word, UNKNOWN) for word in words(text)[:max_length]] or [UNKNOWN]
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def _split(rows: _Rows, test: _Rows, limit: int | None, folder: Path) -> Parts:
    """Hold out the tail of the training rows."""
    texts, labels = rows
    train, val = files.cut(len(labels), limit, folder)
    kept, held = slice(train.start, train.stop), slice(val.start, val.stop)
    return Parts((texts[kept], labels[kept]), (texts[held], labels[held]), test, len(labels))


def is_glue(folder: Path) -> bool:
    """Whether train.tsv starts with GLUE's heading line."""
    return files.read_text(files.find(folder, "train.tsv")).startswith("sentence\t")


def is_five(folder: Path) -> bool:
    """Whether train.tsv starts with a label, as the treebank's five-label files do."""
    return not is_glue(folder)


def sst_five(folder: Path, limit: int | None) -> Parts:
    """train/dev/test.tsv with five labels: neutral sentences (2) are dropped, the class is label > 2."""
    parts = []
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        path = files.find(folder, name)
        rows = [(files.label_of(row[0], path, i), row[1]) for i, row in enumerate(files.read_rows(path, 2), 1)]
        if any(label > 4 for label, _ in rows):
            raise PliantError(got=f"a label above 4 in {path}", expected="labels 0 to 4", do=FRESH)
        rows = [row for row in rows if row[0] != 2]
        parts.append(([text for _, text in rows], [int(label > 2) for label, _ in rows]))
    (texts, labels), val, test = parts
    kept = files.capped(len(labels), limit, folder)
    return Parts((texts[:kept], labels[:kept]), val, test, len(labels))


def sst_glue(folder: Path, limit: int | None) -> Parts:
    """GLUE's train.tsv and dev.tsv (sentence, label, one heading line); GLUE's own test.tsv has no labels."""
    parts = []
    for name in ("train.tsv", "dev.tsv"):
        path = files.find(folder, name)
        rows = files.read_rows(path, 2)
        if rows[:1] != [["sentence", "label"]]:
            raise PliantError(got=f"{path} with first line {rows[:1]}", expected="sentence, tab, label", do=FRESH)
        labels = [files.label_of(row[1], path, i) for i, row in enumerate(rows[1:], 2)]
        parts.append(([row[0] for row in rows[1:]], labels))
    return _split(parts[0], parts[1], limit, folder)


def ag_tsv(folder: Path, limit: int | None) -> Parts:
    """train.tsv and test.tsv: label from 0, title, description."""
    parts = []
    for name in ("train.tsv", "test.tsv"):
        path = files.find(folder, name)
        rows = files.read_rows(path, 3)
        labels = [files.label_of(row[0], path, i) for i, row in enumerate(rows, 1)]
        parts.append(([f"{row[1]} . {row[2]}" for row in rows], labels))
    return _split(parts[0], parts[1], limit, folder)


def ag_csv(folder: Path, limit: int | None) -> Parts:
    """The authors' train.csv and test.csv: label from 1, title, description, in quotes."""
    parts = []
    for name in ("train.csv", "test.csv"):
        path = files.find(folder, name)
        texts, labels = [], []
        try:
            for i, row in enumerate(csv.reader(io.StringIO(files.read_text(path)), strict=True), 1):
                if len(row) != 3:
                    raise PliantError(got=f"{len(row)} fields in row {i} of {path}", expected="3 fields", do=FRESH)
                labels.append(files.label_of(row[0], path, i) - 1)
                texts.append(f"{row[1]} . {row[2]}".replace("\\", " "))
        except csv.Error as error:
            raise PliantError(got=f"{path}, which is no whole CSV file ({error})", expected="CSV", do=FRESH) from error
        parts.append((texts, labels))
    return _split(parts[0], parts[1], limit, folder)


def imdb_tsv(folder: Path, limit: int | None) -> Parts:
    """train.tsv and test.tsv: label, stars, text."""
    parts = []
    for name in ("train.tsv", "test.tsv"):
        path = files.find(folder, name)
        rows = files.read_rows(path, 3)
        parts.append(([row[2] for row in rows], [files.label_of(row[0], path, i) for i, row in enumerate(rows, 1)]))
    return _split(parts[0], parts[1], limit, folder)


def imdb_folders(folder: Path, limit: int | None) -> Parts:
    """The authors' {train,test}/{neg,pos}/*.txt, put in a fixed shuffled order."""
    parts = []
    for part in ("train", "test"):
        paths: list[tuple[Path, int]] = []
        for label, name in enumerate(("neg", "pos")):
            own = sorted((folder / part / name).glob("*.txt"))
            if not own:
                raise PliantError(
                    got=f"no .txt file in {folder / part / name}",
                    expected="aclImdb/{train,test}/{neg,pos}/*.txt",
                    do="unpack the whole archive again",
                )
            paths += [(path, label) for path in own]
        order = files.fixed_order([f"{path.parent.name}/{path.name}" for path, _ in paths])
        parts.append(([files.read_text(paths[i][0]) for i in order], [paths[i][1] for i in order]))
    return _split(parts[0], parts[1], limit, folder)
