"""A static network as a list of parts that systems compose: stem, blocks, head; and where its cost goes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pliant.core.bind import share
from pliant.core.errors import PliantError

T = TypeVar("T")


@dataclass(frozen=True)
class Reached:
    """How far the network is after some of its parts: share of its FLOPs spent, and the shape of one row there."""

    share: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """A chain: stem, blocks, head."""

    stem: nn.Module
    blocks: list[nn.Module]
    head: nn.Module

    def model(self) -> nn.Sequential:
        """The plain network."""
        return nn.Sequential(OrderedDict(stem=self.stem, blocks=nn.Sequential(*self.blocks), head=self.head))

    def stages(self, after: Sequence[int]) -> list[nn.Module]:
        """The chain without its head, cut after each of these numbers of blocks (0 is after the stem)."""
        chain, ends = [self.stem, *self.blocks], [0, *(n + 1 for n in after), len(self.blocks) + 1]
        if any(a >= b for a, b in itertools.pairwise(ends[:-1])) or ends[-2] > ends[-1]:
            raise PliantError(
                got=f"cuts after {list(after)} blocks of {len(self.blocks)}",
                expected="growing numbers of blocks, no two alike",
                do="cut at fewer places, or take a deeper backbone",
            )
        return [nn.Sequential(*chain[a:b]) for a, b in itertools.pairwise(ends)]

    def reached(self, shape: tuple[int, ...]) -> list[Reached]:
        """After the stem and after each block, for one row of ``shape``: counted on fake tensors, nothing is computed."""
        spent: list[int] = []
        shapes: list[tuple[int, ...]] = []
        parts = [share(part).eval() for part in (self.stem, *self.blocks, self.head)]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = torch.zeros(1, *shape)
            for part in parts:
                x = part(x)
                spent.append(counter.get_total_flops())
                shapes.append(tuple(x.shape[1:]))
        return [Reached(flops / spent[-1], s) for flops, s in zip(spent[:-1], shapes[:-1], strict=True)]


def chosen(table: Mapping[str, T], name: str, what: str = "backbone") -> T:
    """The entry ``name``, or an error that names those there are."""
    if name not in table:
        raise PliantError(
            got=f"{what} {name!r}", expected="one of " + ", ".join(table), do=f"pass {what}=<one of these>"
        )
    return table[name]
