"""A small text encoder as a list of parts: embedding, transformer layers that hand (hidden, there) on, pooled classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.systems.parts import Parts

PAD = 0
State = tuple[Tensor, Tensor]
"""Hidden states (R, T + 1, D), and which of them stand for a word (R, T + 1), bool; both rows first, so both follow a row."""


class Embed(nn.Module):
    r"""Words and their places behind one summary token: :math:`h_0 = c,\ h_t = E_{x_t} + p_t`; number 0 is padding.

    Shape:
        words :math:`(R, T)`, integers; hidden :math:`(R, T + 1, D)` and mask :math:`(R, T + 1)`, always true for the summary.

    Args:
        words: size of the vocabulary.
        width: :math:`D`.
        length: the longest text, in words.
        dropout: on the embeddings.

    Raises:
        PliantError: where the input isn't whole numbers (R, T), or is longer than ``length``.

    >>> hidden, there = Embed(10, 4, length=5)(torch.tensor([[3, 2, 0], [7, 0, 0]]))
    >>> hidden.shape, there.sum(1)
    (torch.Size([2, 4, 4]), tensor([3, 2]))

    References:
        Survey section 2.1.1 (1b); Devlin et al., BERT, NAACL 2019.
    """

    def __init__(self, words: int, width: int, *, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.length = length
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.summary = nn.Parameter(torch.randn(width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.words.weight.mul_(0.1)

    def forward(self, x: Tensor) -> State:
        """Hidden states and mask of the words ``x``."""
        if x.ndim != 2 or x.is_floating_point() or x.shape[1] > self.length:
            raise PliantError(
                got=f"{x.dtype} of shape {tuple(x.shape)}", expected=f"word numbers (rows, at most {self.length})",
                do="cut the texts, or build the encoder with length=",
            )  # fmt: skip
        hidden = self.words(x) + self.places[: x.shape[1]]
        hidden = torch.cat([self.summary.expand(x.shape[0], 1, -1), hidden], 1)
        return self.dropout(hidden), torch.cat([torch.ones_like(x[:, :1], dtype=torch.bool), x != PAD], 1)


class EncoderLayer(nn.Module):
    r"""Self-attention and two linear layers, each normalised before and added: :math:`h' = h + A(N h),\ h'' = h' + F(N h')`.

    Attention is written out, since the FLOP counter knows no fused one on every device. Padding is seen by nobody.

    Shape:
        a state in, a state out.

    Args:
        width: of the hidden states, a multiple of ``heads``.
        heads: of attention.
        dropout: on what is added.

    Raises:
        PliantError: where the width can't be shared among the heads.

    >>> state = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    >>> EncoderLayer(8, heads=2)(state)[0].shape
    torch.Size([2, 3, 8])

    References:
        Survey section 2.1.1 (1b); Vaswani et al., NeurIPS 2017.

    Differs from BERT: normalised before, not after each sum, which trains from scratch without care.
    """

    def __init__(self, width: int, *, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise PliantError(
                got=f"width {width} for {heads} heads", expected="a multiple of the heads", do="change one"
            )
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: State) -> State:
        """The next hidden states; the mask passes."""
        hidden, there = state
        rows, words, width = hidden.shape
        near = self.qkv(self.norms[0](hidden)).view(rows, words, 3, self.heads, width // self.heads)
        query, key, value = near.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2)) * (width // self.heads) ** -0.5
        weights = scores.masked_fill(~there[:, None, None], float("-inf")).softmax(-1)
        seen = (weights @ value).transpose(1, 2).reshape(rows, words, width)
        hidden = hidden + self.dropout(self.out(seen))
        return hidden + self.dropout(self.wide(self.norms[1](hidden))), there


class Pooler(nn.Module):
    """BERT's pooler: a linear layer and tanh on the (normalised) summary token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, state: State) -> Tensor:
        """The text's features (R, D)."""
        return self.linear(self.norm(state[0][:, 0])).tanh()


def classifier(width: int, num_classes: int, *, pooler: Pooler | None = None, dropout: float = 0.0) -> nn.Sequential:
    """A pooler (one of its own, or a given one to share), dropout, and a linear layer."""
    return nn.Sequential(pooler or Pooler(width), nn.Dropout(dropout), nn.Linear(width, num_classes))


def encoder(
    num_classes: int = 2, words: int = 20_000, *, layers: int = 6, width: int = 64, heads: int = 4, length: int = 64,
    dropout: float = 0.1,
) -> Parts:  # fmt: skip
    """Embedding, ``layers`` layers and a pooled classifier, for texts of at most ``length`` words.

    >>> encoder(4, 10, layers=2, width=8, heads=2).model()(torch.tensor([[3, 2, 0]])).shape
    torch.Size([1, 4])
    """
    stem = Embed(words, width, length=length, dropout=dropout)
    blocks: list[nn.Module] = [EncoderLayer(width, heads=heads, dropout=dropout) for _ in range(layers)]
    return Parts(stem, blocks, classifier(width, num_classes, dropout=dropout))
