"""Dispatch: send tokens to the experts that their gates chose, in order, and add the answers up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sent(NamedTuple):
    """Which token goes where: tokens sorted by expert (N,), their gates (N,), and how many each expert has."""

    token: Tensor
    gate: Tensor
    counts: list[int]


def dispatch(gates: Tensor) -> Sent:
    r"""Sort the pairs of a token and an expert whose gate isn't 0 by expert, and in each by token.

    Shape:
        ``gates`` :math:`(M, E)`.

    >>> dispatch(torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.2, 0.8]]))
    Sent(token=tensor([1, 2, 0, 2]), gate=tensor([1.0000, 0.2000, 0.5000, 0.8000]), counts=[2, 2])

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.
    """
    chosen = gates.detach().t() != 0  # NaN is sent, so that it's seen in the answer
    expert, token = chosen.nonzero(as_tuple=True)
    return Sent(token, gates[token, expert], chosen.sum(1).tolist())


def combine(tokens: Tensor, sent: Sent, run: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    r"""Run each expert once on its tokens, scale by the gates and add up: :math:`y_m = \sum_{e:\,g_{me} \ne 0} g_{me} f_e(x_m)`.

    Shape:
        ``tokens`` :math:`(M, D)`; returns :math:`(M, D')`, 0 where a token was sent nowhere.

    Args:
        tokens: of the whole batch.
        sent: from :func:`dispatch`.
        run: the experts; one without a token isn't run.

    >>> sent = dispatch(torch.tensor([[0.0, 0.5], [1.0, 0.0]]))
    >>> combine(torch.tensor([[4.0], [6.0]]), sent, [torch.neg, torch.sqrt])
    tensor([[ 1.],
            [-6.]])

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.
    """
    gathered = tokens.index_select(0, sent.token).split(sent.counts)
    parts = [expert(some) for expert, some in zip(run, gathered, strict=True) if some.shape[0]]
    if not parts:
        return torch.zeros_like(tokens)
    answers = torch.cat(parts) * sent.gate[:, None]
    return answers.new_zeros(tokens.shape[0], answers.shape[1]).index_add(0, sent.token, answers)


def within_capacity(chosen: Tensor, capacity: int) -> Tensor:
    r"""Of the tokens that chose an expert, the first ``capacity`` of each text: :math:`c_{te} \cdot 1[\sum_{s \le t} c_{se} \le C]`.

    Shape:
        ``chosen`` :math:`(R, T, E)`, bool; likewise returned.

    Args:
        chosen: who wants which expert.
        capacity: :math:`C`, of each expert for each row.

    >>> within_capacity(torch.tensor([[[True], [True], [False], [True]]]), 2).flatten()
    tensor([ True,  True, False, False])

    References:
        Survey section 2.1.2 (2); Fedus et al., Switch Transformers, JMLR 2022.
    """
    return chosen & (chosen.to(torch.int64).cumsum(1) <= capacity)
