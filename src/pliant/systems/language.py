"""Character language models as chains: symbols in, logits of the next one at every step out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError


class Recurrent(nn.Module):
    """An LSTM over the steps of (R, T, D) that hands on all its states (R, T, H), dropped out."""

    def __init__(self, inputs: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The states. By the function behind the module, whose lists of weights no exported program may hold."""
        start = x.new_zeros(1, x.shape[0], self.lstm.hidden_size)
        weights: list[Tensor] = list(self.lstm.parameters())
        return self.dropout(torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0])


class Symbols(nn.Module):
    """Vectors of symbols and of their places: (R, T) integers to (R, T, D)."""

    def __init__(self, words: int, width: int, *, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """The vectors."""
        if x.ndim != 2 or x.is_floating_point() or x.shape[1] > self.places.shape[0]:
            raise PliantError(
                got=f"{x.dtype} of shape {tuple(x.shape)}", expected=f"symbols (rows, at most {self.places.shape[0]})",
                do="cut the texts, or build the model with length=",
            )  # fmt: skip
        return self.words(x) + self.places[: x.shape[1]]


class CausalLayer(nn.Module):
    r"""Attention to what came before, and a feed-forward part, each normalised before and added.

    Shape:
        :math:`(R, T, D)` to :math:`(R, T, D)`.

    Args:
        width: :math:`D`, a multiple of ``heads``.
        heads: of attention.
        feed: the feed-forward part, (R, T, D) to (R, T, D).
        dropout: on what is added.

    Raises:
        PliantError: where the width can't be shared among the heads.

    >>> layer = CausalLayer(8, heads=2, feed=nn.Identity()).eval()
    >>> x = torch.randn(1, 3, 8)
    >>> torch.allclose(layer(x)[:, :2], layer(x[:, :2]), atol=1e-6)
    True

    References:
        Vaswani et al., NeurIPS 2017.
    """

    def __init__(self, width: int, *, heads: int, feed: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise PliantError(
                got=f"width {width} for {heads} heads", expected="a multiple of the heads", do="change one"
            )
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = feed
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """The next hidden states."""
        rows, steps, width = hidden.shape
        near = self.qkv(self.norms[0](hidden)).view(rows, steps, 3, self.heads, width // self.heads)
        query, key, value = near.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2)) * (width // self.heads) ** -0.5
        later = torch.ones(steps, steps, dtype=torch.bool, device=hidden.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        seen = (weights @ value).transpose(1, 2).reshape(rows, steps, width)
        hidden = hidden + self.dropout(self.out(seen))
        return hidden + self.dropout(self.feed(self.norms[1](hidden)))


class NextSymbol(nn.Module):
    """A norm and a linear layer: (R, T, D) to logits (R, C, T), as ``F.cross_entropy`` reads them."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.linear(self.norm(x)).transpose(1, 2)


class Added(nn.Module):
    """A part, squashed by a sigmoid, beside a shortcut around it."""

    def __init__(self, part: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.part = part
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.dropout(self.part(x).sigmoid())


def feed_forward(width: int, hidden: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Two linear layers with a ReLU between.

    >>> feed_forward(4, 8)(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))
