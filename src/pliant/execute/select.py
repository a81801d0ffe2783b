"""Select: a network on those elements of each row that want it, and the mean of what it says of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Site
from pliant.execute import rows


class Select(Executor):
    r"""Run a network on the chosen elements of each row's sequence and average its answers by their values.

    .. math:: y = \frac{\sum_t v_t\, f(x_t)}{\sum_t v_t}

    Gathered, the chosen elements of all rows are one batch; the others aren't read. A row that chose none answers 0.

    Shape:
        ``x`` :math:`(R, T, ...)`; the network maps :math:`(N, ...)` to :math:`(N, C)`; the answer is :math:`(R, C)`; ``given``
        :math:`(R, T)`.

    Args:
        site: decides :math:`T` values for each row from ``x`` (:class:`pliant.scores.ElementSaliency`).
        network: :math:`f`, on one element each.

    Raises:
        PliantError: where ``x`` holds no sequences.

    >>> import pliant
    >>> select = Select(Site(nn.Flatten(), pliant.rules.TopK(1)), nn.Identity()).eval()
    >>> select(torch.tensor([[[1.0], [5.0], [3.0]]]))
    tensor([[5.]])

    References:
        Survey section 4.2.2 (2); Korbar, Tran, Torresani, SCSampler, ICCV 2019.
    """

    def __init__(self, site: Site, network: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.network = network

    def plain(self, x: Tensor) -> Tensor:
        """The mean over all elements."""
        return self._each(x).mean(1)

    def masked(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """The network on every element."""
        decision = self._decide(x, given)
        with tape.part(self.site, decision.visit, "1", wanted=_wanted(decision), of=x.shape[1]):
            y = self._each(x)
        return _mean(decision.value, y)

    def gathered(self, x: Tensor, given: Tensor | Outcome | None = None) -> Tensor:
        """The network on the chosen elements, packed."""
        decision = self._decide(x, given)
        chosen = ~(decision.value.detach() <= 0)  # by negation, so that NaN is chosen
        index = chosen.flatten().nonzero().squeeze(1)
        count, run_on = index.shape[0], index
        if torch.compiler.is_exporting():
            run_on, _ = rows.never_empty(index, chosen.numel())
        with tape.part(self.site, decision.visit, "1", units=chosen.sum(1), wanted=_wanted(decision), of=x.shape[1]):
            part = self.network(x.flatten(0, 1).index_select(0, run_on)).narrow(0, 0, count)
        y = part.new_zeros((chosen.numel(), *part.shape[1:])).index_copy(0, index, part)
        return _mean(decision.value, y.unflatten(0, chosen.shape))

    def _decide(self, x: Tensor, given: Tensor | Outcome | None) -> Decision:
        if x.ndim < 3:
            raise PliantError(
                got=f"an input of shape {tuple(x.shape)}", expected="rows of elements, (rows, elements, ...)",
                do="stack the elements of each row in its second dimension",
            )  # fmt: skip
        return self.site(x, given=given, shape=x.shape[1:2])

    def _each(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _wanted(decision: Decision) -> Tensor:
    """How many elements each row asks for."""
    return (decision.value if decision.soft is None else decision.soft).sum(1)


def _mean(value: Tensor, y: Tensor) -> Tensor:
    """The mean of ``y`` (R, T, C) by ``value`` (R, T); 0 for a row without any. What isn't chosen isn't read, NaN or not."""
    weight = value[..., None]
    total = torch.where(weight <= 0, 0.0, weight * y).sum(1)
    return total / torch.where(value.sum(1, keepdim=True) == 0, 1.0, value.sum(1, keepdim=True))
