"""Scores of tokens: how much each wants to go on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score


class TokenScore(Score):
    """Scores (R, C) of tokens (R, C, D); padding wants least of all. Reads what :class:`pliant.execute.Tokens` shows."""

    def forward(self, x: Any) -> Tensor:
        """Scores of a view of tokens, or of the tokens themselves."""
        tokens, there, looks = (x, None, None) if isinstance(x, Tensor) else x
        scores = self.scored(tokens, looks)
        return scores if there is None else scores.masked_fill(~there, float("-inf"))

    @abstractmethod
    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """The scores; ``looks`` are queries of the first token and keys of these, where something caught them."""


class TokenNorm(TokenScore):
    r"""The length of each token: :math:`s_i = \lVert x_i \rVert`. Costs nothing that's counted and needs no training.

    Shape:
        tokens :math:`(R, C, D)`; scores :math:`(R, C)`.

    >>> TokenNorm()(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
    tensor([[5., 1.]])

    References:
        Survey section 3.1.
    """

    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """Norms."""
        return tokens.norm(dim=-1)


class TokenLinear(TokenScore):
    r"""A learned linear score: :math:`s_i = w \cdot \mathrm{norm}(x_i) + b`, from zero weights.

    Shape:
        tokens :math:`(R, C, D)`; scores :math:`(R, C)`.

    Args:
        features: :math:`D`, or an example of a hidden state, whose dtype and device are taken too.

    >>> TokenLinear(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5])

    References:
        Survey section 3.1; Rao et al., DynamicViT, NeurIPS 2021.

    Differs from the paper: one linear layer, which sees each token alone.
    """

    def __init__(self, features: int | Tensor) -> None:
        super().__init__()
        like = features if isinstance(features, Tensor) else torch.empty(features)
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.norm = nn.LayerNorm(like.shape[-1], elementwise_affine=False, **place)
        self.linear = nn.Linear(like.shape[-1], 1, **place)
        nn.init.normal_(self.linear.weight, std=1e-3)
        nn.init.zeros_(self.linear.bias)

    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """One linear layer on each normalised token."""
        return self.linear(self.norm(tokens)).squeeze(-1)


class TokenNovelty(TokenScore):
    r"""How little a token resembles its nearest in the other half: which to merge, by bipartite soft matching.

    .. math:: s_i = -\max_{j \in B} \cos(x_i, x_j)\ (i \in A), \qquad s_j = 2\ (j \in B)

    :math:`A` are the tokens at even, :math:`B` those at odd places; those of :math:`B` are what others merge into.

    Shape:
        tokens :math:`(R, C, D)`; scores :math:`(R, C)`.

    >>> TokenNovelty()(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 1.0]]])).round(decimals=2)
    tensor([[-1.0000,  2.0000, -1.0000,  2.0000, -0.7100]])

    References:
        Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.

    Differs from the paper: similar by hidden states, since another's attention doesn't hand its keys out.
    """

    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """Minus the largest cosine with the other half."""
        x = F.normalize(tokens, dim=-1)
        cosines = x @ x[:, 1::2].mT
        nearest = F.pad(cosines, (0, 1), value=-2.0).amax(-1)  # a lone token has no other half
        even = torch.arange(tokens.shape[1], device=tokens.device) % 2 == 0
        return torch.where(even, -nearest, 2.0)


class TokenAttention(TokenScore):
    r"""How much the class token looks at each token in the layer before, the mean over heads.

    .. math:: s_i = \frac{1}{H} \sum_h \mathrm{softmax}_i \big(q_h \cdot k_{hi} / \sqrt{d}\big)

    Queries and keys are what the layer itself has computed (``pliant.retrofit.tokens`` catches them), so a score costs one
    product with a single query.

    Shape:
        queries :math:`(R, H, 1, d)` and keys :math:`(R, H, C, d)`; scores :math:`(R, C)`.

    Raises:
        PliantError: at the call, where nothing caught queries and keys.

    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0], [0.0], [50.0]]]])
    >>> TokenAttention()((torch.zeros(1, 3, 1), None, (q, k))).round(decimals=2)
    tensor([[0., 0., 1.]])

    References:
        Survey section 3.1; Liang et al., EViT, ICLR 2022.

    Differs from the paper: a share of attention among the tokens that may go, leaving the class token's own out.
    """

    reads_looks = True

    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention of the one query."""
        if looks is None:
            raise PliantError(
                got="tokens alone", expected="queries and keys of the layer before",
                do="attach by pliant.retrofit.tokens after blocks whose attention has linear layers for both",
            )  # fmt: skip
        query, key = looks
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1).squeeze(1)


class TokenScored(TokenScore):
    """Any module from tokens (R, C, D) to scores (R, C), with padding left to whoever has it.

    >>> TokenScored(nn.Flatten(1))(torch.tensor([[[3.0], [1.0]]]))
    tensor([[3., 1.]])
    """

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def scored(self, tokens: Tensor, looks: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the module says."""
        return self.score(tokens)
