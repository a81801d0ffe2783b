"""Made sequences whose answer hangs on a few of their steps, and the characters of AG News."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.data.registry import locate, root_of
from pliant.reproduce import Lab

torch.set_num_threads(1)
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,'-$"
SYMBOLS = len(ALPHABET) + 1
"""The last symbol stands for everything else."""


@dataclass(frozen=True)
class Sequences:
    """Inputs and targets, row by row."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def adding(rows: int, seed: int, steps: int = 50) -> Sequences:
    """ADDING: numbers from -1/2 to 1/2 beside two marks, one in the first tenth and one in the last half; the marked sum."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, steps, generator=g) - 0.5
    marks = torch.zeros(rows, steps)
    marks.scatter_(1, torch.randint(0, max(1, steps // 10), (rows, 1), generator=g), 1.0)
    marks.scatter_(1, torch.randint(steps // 2, steps, (rows, 1), generator=g), 1.0)
    return Sequences(torch.stack([values, marks], 2), (values * marks).sum(1, keepdim=True))


def parity(rows: int, seed: int, bits: int = 16) -> Sequences:
    """PARITY: some of the bits are +1 or -1, the others 0, all in one token; whether the +1s are odd in number."""
    g = torch.Generator().manual_seed(seed)
    said = torch.randint(1, bits + 1, (rows, 1), generator=g) > torch.arange(bits)
    signs = torch.randint(0, 2, (rows, bits), generator=g) * 2 - 1
    x = torch.where(said, signs, 0)
    return Sequences(x.float().unsqueeze(1), (x == 1).sum(1) % 2)


def characters(lab: Lab, part: str, count: int, length: int) -> Sequences:
    """The first ``count`` characters of AG News, lower case, in rows of ``length``; the target is each one's next."""
    folder, layout = locate("ag_news", root_of("ag_news", lab.root))
    texts = getattr(layout.read(folder, None), part)[0]
    number = {c: i for i, c in enumerate(ALPHABET)}
    stream, found = [], 0
    for text in texts:
        stream.append(" ".join(text.lower().split()))
        found += len(stream[-1]) + 1
        if found > count:
            break
    symbols = torch.tensor([number.get(c, SYMBOLS - 1) for c in " ".join(stream)[: count + 1]])
    rows = (len(symbols) - 1) // length
    cut = symbols[: rows * length + 1]
    return Sequences(cut[:-1].view(rows, length), cut[1:].view(rows, length))
