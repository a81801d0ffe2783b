"""fit_routers: routers of experts and channels learn from what their layers do on held-out data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import named, plain
from pliant.core.calls import Call, call_of, labelled
from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.scores.mass import Mass


class _Listener:
    """The normal equations of one router, summed up over all that its layer reads and does."""

    def __init__(self, executor: Any, k: int, reads: nn.Module, does: nn.Module, site: Site) -> None:
        self.executor, self.k, self.site = executor, k, site
        self.score: Any = site.scorer
        size, outputs = self.score.linear.in_features + 1, self.score.linear.out_features
        place: dict[str, Any] = {"device": self.score.linear.weight.device, "dtype": torch.float64}
        self.gram, self.cross = torch.zeros(size, size, **place), torch.zeros(size, outputs, **place)
        self.square = torch.zeros(outputs, **place)
        self.x: Tensor | None = None
        reads.register_forward_pre_hook(self.read)
        does.register_forward_pre_hook(self.done)

    def read(self, layer: nn.Module, args: Any) -> None:
        """What the router will read."""
        x = self.score.read(self.executor.reads(args[0])).flatten(0, -2).double()
        self.x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)

    def done(self, layer: nn.Module, args: Any) -> None:
        """What the parts do with it."""
        if self.x is None:
            return
        y = self.executor.mass(args[0], self.k).double()
        self.gram += self.x.T @ self.x
        self.cross += self.x.T @ y
        self.square += y.square().sum(0)
        self.x = None

    def solve(self, ridge: float) -> float:
        """Write the solution into the router; the share of the variance that it tells."""
        count = self.gram[-1, -1]
        pull = ridge * self.gram.diagonal()[:-1].mean().clamp_min(1e-12)
        damp = torch.diag(torch.cat([pull.expand(len(self.gram) - 1), pull.new_zeros(1)]))
        found = torch.linalg.lstsq(self.gram + damp, self.cross).solution
        self.score.linear.weight.copy_(found[:-1].T)
        self.score.linear.bias.copy_(found[-1])
        left = (self.square - 2 * (found * self.cross).sum(0) + (found * (self.gram @ found)).sum(0)).sum()
        spread = (self.square - self.cross[-1].square() / count).sum()
        return 1.0 - float(left / spread.clamp_min(1e-30))


@torch.no_grad()
def fit_routers(model: nn.Module, batches: Iterable[Any], *, ridge: float = 1e-3) -> dict[str, float]:
    r"""Fit the routers of :func:`experts` and :func:`channels` to how much each expert, or channel, really adds; no training.

    .. math:: \min_{W, b} \sum_t \sum_e \Big(w_e \cdot x_t + b_e - \sum_{i \in e} |h_{ti}|\,\lVert V_{:,i} \rVert\Big)^2 + \lambda \lVert W \rVert^2

    Runs the plain host on the batches, in evaluation mode, and solves each router's least squares in closed form, where it
    stands: ``model``'s own routers change, nothing else does.

    Args:
        model: with experts or channels whose scorers are :class:`pliant.scores.Mass`.
        batches: inputs as the model takes them, or pairs and mappings with labels, which are left out.
        ridge: :math:`\lambda`, in units of the mean square of what the router reads.

    Returns:
        For each site the share of the variance that its forecasts tell, at most 1.

    Raises:
        PliantError: where there is nothing to fit, or no batch.

    >>> import pliant
    >>> _ = torch.manual_seed(0)
    >>> host = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 3)).eval()
    >>> x = torch.randn(512, 4)
    >>> model = pliant.retrofit.experts(host, ["0"], experts=4, top=2, example=x)
    >>> {site: share > 0.2 for site, share in fit_routers(model, [x]).items()}
    {'experts.0.site': True}

    References:
        Zhang et al., MoEfication, ACL Findings 2022; Szatkowski et al., D2DMoE, NeurIPS 2024.

    Differs from the papers: a linear router by least squares, instead of a network by gradient.
    """
    host: nn.Module = plain(model).eval()
    listeners: dict[str, _Listener] = {}
    for path, module in named(host):
        for k, (name, reads, does, site) in enumerate(module.routers() if hasattr(module, "routers") else ()):  # type: ignore[operator]
            if isinstance(site.scorer, Mass):
                listeners[f"{path}.{name}"] = _Listener(module, k, reads, does, site)
    if not listeners:
        raise PliantError(
            got="a model without routers to fit", expected="experts or channels whose scorers forecast masses",
            do="attach them by pliant.retrofit.experts or channels with the default scorer",
        )  # fmt: skip
    for batch in batches:
        args, kwargs = _inputs(batch)
        host(*args, **kwargs)
    if any(float(listener.gram[-1, -1]) == 0 for listener in listeners.values()):
        raise PliantError(got="no inputs", expected="at least one batch", do="pass e.g. [x]")
    return {path: listener.solve(ridge) for path, listener in listeners.items()}


def _inputs(batch: Any) -> Call:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return labelled(batch)[0] if pair or (isinstance(batch, Mapping) and "labels" in batch) else call_of(batch)
