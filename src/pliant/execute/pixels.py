"""Pixels: a residual branch at chosen positions of each map."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows
from pliant.execute.norm import executed_norm
from pliant.functional.sparse_conv import Places, add, convolve, dilate, linear, pad_map, pad_rows, places, take

_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity,
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """Positions asked of a branch's output: for which site, which are to run, how likely each is, (R, 1, H, W).

    ``part`` is what the names of the layers' parts begin with.
    """

    site: nn.Module
    visit: int
    active: Tensor
    likely: Tensor
    part: str = "1/"


class Branch(nn.Sequential):
    r"""Convolutions, batch norms and activations in a row that can run at some positions only.

    What a wider convolution reads is wider than what it's asked for, so each layer has positions of its own, found from
    the last layer back. While training, a batch norm's statistics are those of the positions that it's asked for, in the
    masked form too; with fewer than two of them it uses its running ones. Layers in front of the first convolution run
    everywhere.

    Args:
        layers: ``nn.Conv2d`` with an odd kernel and the padding that keeps the size, ``nn.BatchNorm2d``, activations.

    Raises:
        PliantError: where a layer is of another kind.

    >>> branch = Branch(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    >>> branch(torch.zeros(1, 2, 5, 5)).shape
    torch.Size([1, 2, 5, 5])

    References:
        Survey section 3.1.1 (1); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        for name, layer in self.named_children():
            _check(name, layer)
        convs = [conv for conv in map(_conv, self) if conv is not None]
        if not convs:
            raise PliantError(got="a branch without a convolution", expected="at least one", do="add an nn.Conv2d")
        self.stride = math.prod(conv.stride[0] for conv in convs)

    def forward(self, x: Tensor, run: Callable[[Branch, Tensor], Tensor] | None = None) -> Tensor:
        """The whole map, or what ``run`` (of :func:`everywhere` or :func:`somewhere`) makes of the layers."""
        return super().forward(x) if run is None else run(self, x)

    def demands(self, x: Tensor, last: Tensor) -> list[Tensor]:
        """What is asked of every layer's output when ``last`` is asked of the branch on ``x``."""
        convs, size, sizes = [_conv(layer) for layer in self], shrunk(x, 1), []
        for conv in convs:
            sizes.append(size)
            size = size if conv is None else (-(-size[0] // conv.stride[0]), -(-size[1] // conv.stride[0]))
        found: list[Tensor] = []
        for conv, before in zip(reversed(convs), reversed(sizes), strict=True):
            found.append(last)
            if conv is not None and (conv.kernel_size[0] > 1 or conv.stride[0] > 1):
                last = dilate(last, conv.kernel_size[0], before, stride=conv.stride[0], dilation=conv.dilation[0])
        return found[::-1]


def everywhere(branch: Branch, x: Tensor, *, wanted: Wanted) -> Tensor:
    """Every layer on the whole map; batch norms take their statistics where it's wanted."""
    active, likely = (branch.demands(x, m) for m in (wanted.active, wanted.likely))
    started = False
    for i, layer in enumerate(branch):
        if _conv(layer) is not None:
            started = True
            with _part(wanted, i, None, likely[i]):
                x = layer(x)
        elif started and isinstance(layer, nn.BatchNorm2d) and layer.training:
            x = executed_norm(layer, x.permute(0, 2, 3, 1), active[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = layer(x)
    return x


def somewhere(branch: Branch, x: Tensor, *, wanted: Wanted) -> Tensor:
    """Every layer at the positions that are asked of it: the output's, as rows (N, C)."""
    active, likely = (branch.demands(x, m) for m in (wanted.active, wanted.likely))
    at: Places | None = None  # None: x is still a whole map
    for i, layer in enumerate(branch):
        conv = _conv(layer)
        if conv is None:
            x = executed_norm(layer, x) if at is not None and isinstance(layer, nn.BatchNorm2d) else layer(x)
            continue
        there = places(active[i]) if at is None or active[i] is not active[i - 1] else at
        with _part(wanted, i, active[i], likely[i]):
            x = _convolve(conv, x, at, there)
        at = there
        activation = getattr(layer, "activation", None)  # of a convolution that took in its batch norm and what follows
        x = x if activation is None else activation(x)
    return x


def _convolve(conv: nn.Conv2d, x: Tensor, at: Places | None, there: Places) -> Tensor:
    """A convolution from a map, or from rows at ``at``, to rows at ``there``."""
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return linear(take(x, there) if at is None else x, conv.weight.flatten(1), conv.bias)
    margin = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    padded = pad_map(x, margin) if at is None else pad_rows(x, at, margin)
    return convolve(
        padded, there, conv.weight, conv.bias, stride=conv.stride[0], dilation=conv.dilation[0], groups=conv.groups
    )


class Pixels(Executor):
    r"""Add a residual branch to its shortcut at the positions that want it.

    .. math:: y = \mathrm{shortcut}(x) + m \odot \mathrm{branch}(x), \qquad m \in \{0, 1\}^{1 \times H' \times W'}

    Gathered, the branch's first layers run on the dilated mask, its last ones on the mask itself; 1x1 convolutions are
    matrix products on packed positions, others gather neighbours first. The result has its channels last in memory.

    Shape:
        ``x``: :math:`(R, C, H, W)`; shortcut and branch return :math:`(R, C', H', W')`; ``given``: :math:`(R, 1, H', W')`.

    Args:
        branch: a :class:`Branch`, or layers to make one of.
        site: decides a map of the output's size from ``x`` (:class:`pliant.scores.MaskHead`).
        shortcut: always runs, everywhere; default, the identity.
        dense_above: share of active positions in a batch above which all are computed after all, since gathering them
            takes longer; about 0.45 on processors. The default never does: then a row costs what its own mask asks for,
            and an expected cost is the mean of realised ones.

    Raises:
        PliantError: where ``dense_above`` isn't a share, or a layer can't run by positions.

    >>> import pliant
    >>> site = pliant.Site(pliant.scores.MaskHead(2), pliant.rules.Threshold(0.0))
    >>> block = Pixels(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)), site).eval()
    >>> given = torch.zeros(1, 1, 4, 4)
    >>> given[..., 0, 0] = 1
    >>> y, trace = pliant.record(block)(torch.randn(1, 2, 4, 4), given=given)
    >>> trace.flops, trace.dense_flops  # 2 x 2 x 9 multiply-adds at one position, and at all sixteen
    (tensor([72]), tensor([1152]))

    References:
        Survey section 3.1.1 (1); Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.

    Differs from the paper: batch norm learns from executed positions only (the released code lets it see all of them).
    """

    def __init__(
        self, branch: nn.Sequential, site: Site, *, shortcut: nn.Module | None = None, dense_above: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 <= dense_above <= 1:
            raise PliantError(got=f"dense_above={dense_above}", expected="within [0, 1]", do="pass a share, e.g. 0.45")
        self.branch = branch if isinstance(branch, Branch) else Branch(*branch)
        self.site = site
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.dense_above = dense_above
        self.stride = self.branch.stride

    def extra_repr(self) -> str:
        """When it falls back."""
        return f"dense_above={self.dense_above}" if self.dense_above < 1 else ""

    def plain(self, x: Tensor) -> Tensor:
        """Shortcut and branch, everywhere."""
        return self.shortcut(x) + self.branch(x)

    def masked(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """The branch everywhere, times the mask."""
        decision = self.site(x, given=given, shape=(1, *shrunk(x, self.stride)))
        return self._masked(x, decision, wanted_of(self.site, decision))

    def gathered(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """The branch where the mask is 1."""
        decision = self.site(x, given=given, shape=(1, *shrunk(x, self.stride)))
        wanted = wanted_of(self.site, decision)
        if not torch.compiler.is_exporting():
            share = float(wanted.active.mean()) if wanted.active.numel() else 0.0
            if share == 0 and not self.training and tape.tape() is None:
                return self.shortcut(x).contiguous(memory_format=torch.channels_last)  # laid out as any other answer
            if share > self.dense_above:
                return self._masked(x, decision, wanted)
        y = self.branch(x, partial(somewhere, wanted=wanted))
        at = places(wanted.active)
        if rows.weighted(decision):
            y = y * take(decision.value, at)
        return add(self.shortcut(x), at, y)

    def _masked(self, x: Tensor, decision: Decision, wanted: Wanted) -> Tensor:
        y = self.branch(x, partial(everywhere, wanted=wanted))
        value = decision.value
        y = value * y if rows.weighted(decision) else torch.where(value > 0, y, torch.zeros_like(y))
        return self.shortcut(x) + y


def wanted_of(site: Site, decision: Decision) -> Wanted:
    """What a decision about positions asks for."""
    value = decision.value
    return Wanted(
        site,
        decision.visit,
        (~(value.detach() <= 0)).to(value.dtype),
        value if decision.soft is None else decision.soft,
    )


def _part(wanted: Wanted, layer: int, units: Tensor | None, likely: Tensor) -> AbstractContextManager[None]:
    """A layer's part of the tape, in positions; nothing is added up while nobody records."""
    if tape.tape() is None:
        return nullcontext()
    return tape.part(
        wanted.site, wanted.visit, f"{wanted.part}{layer}", units=None if units is None else units.flatten(1).sum(1).long(),
        wanted=likely.flatten(1).sum(1), of=likely.shape[2] * likely.shape[3],
    )  # fmt: skip


def shrunk(x: Tensor, stride: int) -> tuple[int, int]:
    """Height and width of what a stride makes of maps ``x``."""
    return -(-x.shape[2] // stride), -(-x.shape[3] // stride)


def _conv(layer: Any) -> nn.Conv2d | None:
    """The convolution that ``layer`` is, or that it holds with its batch norm folded into it."""
    inner = layer if isinstance(layer, nn.Conv2d) else getattr(layer, "conv", None)
    return inner if isinstance(inner, nn.Conv2d) else None


def _check(name: str, layer: Any) -> None:
    """Refuse what can't run by positions."""
    wrong = ""
    if isinstance(layer, nn.Conv2d):
        k, d = layer.kernel_size, layer.dilation
        square = len({*k}) == len({*layer.stride}) == len({*d}) == 1 and layer.padding_mode == "zeros"
        if not square or k[0] % 2 == 0 or layer.padding not in ((d[0] * (k[0] - 1) // 2,) * 2, "same"):
            wrong = f"{layer}"
    elif isinstance(layer, nn.BatchNorm2d):
        wrong = "" if layer.track_running_stats else "a batch norm without running statistics"
    elif not isinstance(layer, _POINTWISE):
        wrong = f"a {type(layer).__name__}"
    if wrong:
        raise PliantError(
            got=f"{wrong} as layer {name!r} of a branch",
            expected="nn.Conv2d (square, odd, padded by half its kernel), nn.BatchNorm2d with running statistics, or one of "
            + ", ".join(kind.__name__ for kind in _POINTWISE),
            do="leave other layers outside the branch",
        )
