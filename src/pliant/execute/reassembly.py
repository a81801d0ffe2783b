"""Reassembly: upsample a map, each target position by weights of its own over the neighbours of its source."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.functional.resample import reassemble


class Reassemble(Executor):
    r"""Upsample :math:`r` times: each target position is a mean of its source's neighbours, weighted by the decision.

    .. math:: y_p = \frac{\sum_n v_{n,p}\, x_{\lfloor p / r \rfloor + n}}{\sum_n v_{n,p}}

    Whatever the weights, reassembling costs the same: the masked and the gathered form are one. ``Always``, which is also
    the plain form, is the box average, repeated; with no weight at all the answer is 0.

    Shape:
        ``x``: :math:`(R, C, H, W)`; answer :math:`(R, C, rH, rW)`; ``given``: :math:`(R, k^2, rH, rW)`.

    Args:
        site: decides the weights from ``x`` (:class:`pliant.scores.KernelPredictor`, :class:`pliant.rules.Softmax`).
        ratio: :math:`r`.
        side: :math:`k`, odd; neighbours beyond the border are zeros.

    >>> import pliant
    >>> up = Reassemble(pliant.Site(pliant.scores.KernelPredictor(2), pliant.rules.Softmax()))
    >>> up(torch.ones(1, 2, 8, 8))[0, 0, 6:10, 6:10].mean().round(decimals=3)
    tensor(1., grad_fn=<RoundBackward1>)

    References:
        Survey section 3.1.2 (1); Wang et al., CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019.

    Differs from the paper: nothing in the formulas; its kernel never builds the neighbourhoods in memory.
    """

    def __init__(self, site: Site, *, ratio: int = 2, side: int = 5) -> None:
        super().__init__()
        self.site = site
        self.ratio, self.side = ratio, side

    def extra_repr(self) -> str:
        """The sizes."""
        return f"ratio={self.ratio}, side={self.side}"

    def plain(self, x: Tensor) -> Tensor:
        """The box average, repeated."""
        return reassemble(x, x.new_full((x.shape[0], *self._shape(x)), 1 / self.side**2), self.side)

    def masked(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """The same as gathered: nothing can be left out."""
        return self.gathered(x, given=given)

    def gathered(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """Decide and reassemble."""
        value = self.site(x, given=given, shape=self._shape(x)).value
        total = value.sum(1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
        return reassemble(x, value / total, self.side)

    def _shape(self, x: Tensor) -> tuple[int, int, int]:
        return self.side**2, self.ratio * x.shape[2], self.ratio * x.shape[3]
