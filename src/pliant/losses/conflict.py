"""Do exits pull the weights that they share the same way?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.trace import Trace


def conflict(trace: Trace, target: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    r"""Cosine between the gradients of any two exits' losses, :math:`\cos(\partial L_i / \partial\theta, \partial L_j / \partial\theta)`.

    Shape:
        ``target``: :math:`(R,)` classes; returns :math:`(K, K)` for :math:`K` recorded exits, NaN where one has no gradient.

    Args:
        trace: of a recorded call with gradients; its graph is kept.
        target: the labels of the whole batch.
        parameters: what the exits share, e.g. ``model.stages[0].parameters()``; those that an exit doesn't use count as 0.

    Returns:
        Cosines: 1 where two exits agree, below 0 where one undoes the other's step.

    Raises:
        PliantError: where no exit was recorded, or there are no parameters.

    >>> from pliant.core.trace import Exit
    >>> w = nn.Parameter(torch.tensor([1.0, 0.5]))
    >>> trace = Trace({}, (Exit(w[None] * 1), Exit(w[None] * 2), Exit(-w[None])), (), 1)
    >>> conflict(trace, torch.tensor([0]), [w])[0].round(decimals=4)
    tensor([ 1.,  1., -1.])

    References:
        Survey section 5.2.1 (1); Huang et al., Multi-Scale Dense Networks, ICLR 2018, for the effect.
    """
    shared = list(parameters)
    if not trace.exits or not shared:
        raise PliantError(
            got=f"{len(trace.exits)} recorded exits and {len(shared)} parameters",
            expected="at least one of each",
            do="record a model with exits and pass the parameters of its first stages",
        )
    rows: list[Tensor] = []
    for e in trace.exits:
        loss = F.cross_entropy(e.logits, target if e.rows is None else target[e.rows])
        grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        pairs = zip(shared, grads, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
    g = torch.stack(rows)
    unit = g / g.norm(dim=1, keepdim=True)  # 0 / 0 is NaN: no direction
    return (unit @ unit.T).clamp(-1, 1)
