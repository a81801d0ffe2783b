"""The order of the data: a function of seed, epoch and process, so that resuming needs no memory of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.core.errors import PliantError


def derived(*parts: object) -> int:
    """A 63-bit seed made of ``parts``: equal parts, equal seed.

    >>> derived(0, "order", 1) == derived(0, "order", 1), derived(0, "order", 1) == derived(0, "order", 2)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Shard:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1


def sizes(rows: int, batch_size: int, world: int = 1) -> list[int]:
    """Rows of each batch of an epoch. A last batch that leaves a process fewer than two rows joins the one before it.

    A single row has no batch statistics, so batch norm refuses it; merged, every row is still seen once an epoch.

    >>> sizes(10, 4), sizes(9, 4), sizes(3, 8), sizes(11, 4, world=2)
    ([4, 4, 2], [4, 5], [3], [4, 7])
    """
    if batch_size < world or rows < world:
        raise PliantError(
            got=f"batches of {batch_size} and {rows} rows for {world} processes" if world > 1 else
            (f"batch_size={batch_size}" if rows else "no data"),
            expected="at least one row for every process in every batch",
            do="give more rows, a larger batch_size, or fewer devices",
        )  # fmt: skip
    found = [min(batch_size, rows - at) for at in range(0, rows, batch_size)]
    if len(found) > 1 and found[-1] < min(2 * world, batch_size):
        found[-2:] = [found[-2] + found[-1]]
    return found


def batches(rows: int, batch_size: int, shard: Shard, seed: int, epoch: int) -> list[tuple[Tensor, int]]:
    """This process's row numbers of every batch of ``epoch``, and how many rows that batch has in all processes.

    >>> one, other = (batches(5, 5, Shard(rank, 2), 0, 0)[0][0].tolist() for rank in (0, 1))
    >>> sorted(one + other), len(one), len(other)
    ([0, 1, 2, 3, 4], 3, 2)
    """
    split = sizes(rows, batch_size, shard.world)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(derived(seed, "order", epoch)))
    return [(joint[shard.rank :: shard.world], len(joint)) for joint in order.split(split)]
