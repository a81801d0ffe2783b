"""LSTM-Jump: read some words, then jump over as many as the policy says, until it stops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.site import Site
from pliant.estimators.score_function import Categorical, ScoreFunction
from pliant.execute.cursor import Classify, Cursor, Jump, Open, Piece, Reader, Say
from pliant.execute.exits import Exits
from pliant.losses.baselines import Critic
from pliant.rules.threshold import Threshold
from pliant.scores.jump import WhereToJump, WhetherToJump


class Words(Reader):
    """An embedding and a fused LSTM on ``span`` words; 0 is padding. Memory: the output, and every layer's state."""

    def __init__(self, words: int, embedding: int, hidden: int, *, span: int, layers: int) -> None:
        super().__init__()
        self.span = span
        self.embed = nn.Embedding(words, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)

    def start(self, x: Tensor) -> Any:
        """Zeros."""
        layers, hidden = self.lstm.num_layers, self.lstm.hidden_size
        state = self.embed.weight.new_zeros(x.shape[0], layers, hidden)
        return state[:, -1], state, state

    def lengths(self, x: Tensor) -> Tensor:
        """Words in front of the padding."""
        return (x != 0).sum(1)

    def forward(self, piece: Piece, memory: Any) -> Any:
        """The memory after the words that exist; a row without any keeps its own.

        Where a text ends inside the window, only the output is that of its last word: nothing will be read after it.
        """
        top, h, c = memory
        weights: list[Tensor] = [
            w for layer in self.lstm.all_weights for w in layer
        ]  # nn.LSTM's own list isn't exportable
        start = (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        out, h_n, c_n = torch.lstm(
            self.embed(piece.elements), start, weights, True, self.lstm.num_layers, 0.0, self.training, False, True
        )
        last = (piece.there - 1).clamp_min(0)[:, None, None].expand(-1, 1, out.shape[2])
        some = piece.there > 0
        return (
            torch.where(some[:, None], out.gather(1, last).squeeze(1), top),
            torch.where(some[:, None, None], h_n.transpose(0, 1), h),
            torch.where(some[:, None, None], c_n.transpose(0, 1), c),
        )


class OfSaid(nn.Module):
    """A layer on the memory in what's said behind a visit."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, said: Any) -> Tensor:
        """The layer's answer."""
        return self.layer(said[1])


def lstm_jump(
    num_classes: int = 2, *, words: int = 10_000, embedding: int = 100, hidden: int = 128, layers: int = 1, span: int = 20,
    most: int = 40, jumps: int = 5,
) -> Exits:  # fmt: skip
    r"""Skim a text: after every :math:`R` words a softmax on the state says how far to jump, :math:`k \in \{0, \dots, K\}`; 0 stops.

    .. math:: m_i = \mathrm{LSTM}(x_{a_i}, \dots, x_{a_i + R - 1}; m_{i-1}), \quad k_i \sim \mathrm{softmax}(W m_i + b), \quad
        a_{i+1} = a_i + R - 1 + k_i

    The draw is made of two with the same distribution: whether to stop (``sites.i``, whose threshold is a dial), and how far to
    go if not (``stages.i.site``). Both have a linear baseline beside them. Train with the cross-entropy, ``Reinforce`` of
    whether the answer is right with ``baseline=pliant.losses.learned``, and ``ValueLoss``.

    Shape:
        word numbers :math:`(R, T)`, padded with 0 behind their end; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        words: of the vocabulary, the padding included.
        embedding: numbers for each word.
        hidden: units of the LSTM.
        layers: of it.
        span: :math:`R`, words read at a time.
        most: :math:`K`, the furthest jump; 1 reads on.
        jumps: at most as many.

    Returns:
        The chain.

    >>> from pliant.core.bind import sites
    >>> list(sites(lstm_jump(words=9, jumps=2)))
    ['stages.1.site', 'stages.2.site', 'sites.0', 'sites.1']

    References:
        Survey section 4.1.3; Yu, Lee, Le, Learning to Skim Text, ACL 2017.

    Differs from the paper: in evaluation it stops where stopping is likelier than not (the paper: than each single jump); a step
    of training has one rollout of a text, so put a text into a batch several times for several.
    """
    reader = Words(words, embedding, hidden, span=span, layers=layers)
    policy, baseline, head = nn.Linear(hidden, most + 1), nn.Linear(hidden, 1), Classify(hidden, num_classes)
    move = Jump(most)

    def where() -> Site:
        return Site(Critic(WhereToJump(policy), baseline), Categorical(), shape=move.shape)

    def whether() -> Site:
        return Site(Critic(WhetherToJump(policy), OfSaid(baseline)), ScoreFunction(Threshold(0.0)))

    stages = [Open(reader), *(Cursor(where(), move, reader) for _ in range(jumps))]
    return Exits(stages, [head] * len(stages), [whether() for _ in range(jumps)], view=Say())
