"""What `load` gives back: a `Dataset` of three `Split`s, with its licence and its limits written on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from pliant.core.errors import PliantError
from pliant.data.augment import Transform, augment


@dataclass(frozen=True, eq=False)
class Split:
    r"""One part of a data set: inputs and their labels, row by row.

    Shape: x (N, ...), y (N,) int64.

    Args:
        x: the inputs; floating inputs are finite.
        y: the class of each row.

    Raises:
        PliantError: rows and labels differ in number, labels are not int64, or an input is NaN or infinite.

    >>> part = Split(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> len(part), len(part.take(2))
    (3, 2)
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.y.dtype != torch.int64 or len(self.x) != len(self.y):
            raise PliantError(
                got=f"{len(self.x)} inputs and labels of shape {tuple(self.y.shape)}, {self.y.dtype}",
                expected="one int64 label per input",
                do="pass x of shape (N, ...) and y of shape (N,)",
            )
        if self.x.is_floating_point() and not torch.isfinite(self.x).all():
            bad = int((~torch.isfinite(self.x.flatten(1)).all(1)).sum())
            raise PliantError(
                got=f"NaN or infinite values in {bad} of {len(self.x)} inputs",
                expected="finite inputs",
                do="remove or repair those rows",
            )

    def __len__(self) -> int:
        return len(self.y)

    def take(self, n: int) -> Split:
        r"""The first n rows (all of them if there are fewer); the order is fixed, so the same rows each time.

        >>> Split(torch.zeros(3, 1), torch.tensor([2, 1, 0])).take(2).y
        tensor([2, 1])
        """
        return Split(self.x[:n], self.y[:n])

    def loader(
        self, batch_size: int, *, seed: int | None = None, transforms: Sequence[Transform] = ()
    ) -> DataLoader[tuple[Tensor, ...]]:
        r"""Batches of (x, y): in order without a seed, newly shuffled in every epoch with one.

        Whole batches are cut out of the tensors at once, with no work per row; PyTorch's global generator is not used.

        Shape: each batch is x (B, ...), y (B,); the last batch may be smaller.

        Args:
            batch_size: rows per batch.
            seed: seed of the order; the same seed gives the same sequence of epochs.
            transforms: augmentations of x, such as `RandomCrop(4)`; they draw from a generator made from the seed.

        Raises:
            PliantError: batch size below 1, or transforms without a seed.

        >>> part = Split(torch.arange(4.0).reshape(4, 1), torch.tensor([0, 1, 2, 3]))
        >>> [y.tolist() for _, y in part.loader(3)]
        [[0, 1, 2], [3]]
        """
        if batch_size < 1:
            raise PliantError(got=f"batch_size={batch_size}", expected="at least 1", do="pass a positive batch size")
        if transforms and seed is None:
            raise PliantError(got="transforms without a seed", expected="a seed", do="pass seed=0 or another number")
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        rows = TensorDataset(self.x, self.y)
        order = SequentialSampler(rows) if seed is None else RandomSampler(rows, generator=generator)
        change = None
        if transforms:
            change = partial(_augmented, torch.Generator().manual_seed((seed or 0) + 1), tuple(transforms))
        return DataLoader(
            rows,
            batch_size=None,  # the sampler already gives whole batches of row numbers
            sampler=BatchSampler(order, batch_size, drop_last=False),
            collate_fn=change,
            generator=generator,
        )


def _augmented(
    generator: torch.Generator, transforms: tuple[Transform, ...], batch: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Augment the inputs of one batch."""
    return augment(batch[0], generator, transforms), batch[1]


@dataclass(frozen=True, eq=False)
class Dataset:
    r"""A named data set, ready for use.

    Args:
        name: its name in `names()`.
        kind: "image", "text" or "audio".
        train: training part.
        val: held-out part for thresholds and stopping; never taken from the test part.
        test: test part.
        classes: names of the classes; label i is classes[i].
        licence: licence of the data, as far as its sources state one.
        note: limits of this copy, "" if there are none. Show it beside every figure.
        mean: mean which was subtracted, per channel, in units of the full range (1 = white); () for text.
        std: deviation which was divided by, the same way.
        vocabulary: for text, the words by id; () otherwise.

    >>> part = Split(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    >>> Dataset("two", "image", part, part, part, classes=("a", "b"), licence="none", note="").shape
    (1, 8, 8)
    """

    name: str
    kind: Literal["image", "text", "audio"]
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    licence: str
    note: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            y = getattr(self, part).y
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(self.classes):
                raise PliantError(
                    got=f"labels {int(y.min())} to {int(y.max())} in the {part} part of {self.name!r}",
                    expected=f"0 to {len(self.classes) - 1}",
                    do="check that the folder holds this data set and not another one",
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])
