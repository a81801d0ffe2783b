"""Losses of what is decided step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.core.trace import Trace
from pliant.losses.visits import scored


class Saving:
    r"""The mean of minus the log-probability of saving, :math:`\frac{1}{T} \sum_t -\log \sigma(-s_t)`: Skim-RNN's skim loss.

    It reads the scores as logits with their threshold at 0, as they are trained.

    Args:
        sites: pattern on the paths of the sites that count.

    Raises:
        PliantError: where no such site scored anything.

    >>> from pliant import Decision
    >>> trace = Trace({"a": (Decision(torch.ones(2), scores=torch.zeros(2)),)}, (), (), 2)
    >>> Saving()(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
    tensor(0.6931)

    References:
        Survey section 4.1.1 (2); Seo et al., Skim-RNN, ICLR 2018.
    """

    def __init__(self, sites: str = "*") -> None:
        self.sites = sites

    def __call__(self, y: Tensor, trace: Trace, target: Tensor, progress: float) -> Tensor:
        """The mean over rows and visits, in nats."""
        found = [d.scores for _, d in scored(trace, self.sites) if d.scores is not None]
        if not found:
            raise PliantError(
                got=f"no scores at sites {self.sites!r}",
                expected="sites that decide by scores",
                do="see pliant.sites(model) for the paths, and train with rules that read scores",
            )
        return F.softplus(torch.cat(found)).mean()
