"""Confidence scores of a prediction, as the wish to go on: 0 is sure, 1 is at a loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score


class _Confidence(Score):
    """A score of logits, with a temperature that calibration may set."""

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def scaled(self, logits: Tensor) -> Tensor:
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise PliantError(
                got=f"logits of shape {tuple(logits.shape)}",
                expected="(rows, classes) with at least two classes",
                do="give the site the classifier's logits",
            )
        return logits / self.temperature


class MaxProbability(_Confidence):
    r"""One minus the largest softmax probability, :math:`1 - \max_c \mathrm{softmax}(z / T)_c`.

    Computed as the sum of the other classes' probabilities, so that confidences near 1 don't tie at it.

    Shape:
        logits :math:`(R, C)`; scores :math:`(R,)` in :math:`[0, 1 - 1/C]`.

    >>> MaxProbability()(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([5.0000e-01, 1.2339e-04])

    References:
        Survey section 5.1.1; Huang et al., Multi-Scale Dense Networks, ICLR 2018.

    Differs from the paper: it is the complement of the confidence, since value 1 spends; and the complement is
    summed, not subtracted: the paper's code compares probabilities that saturate at 1.0 and tie.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scores of logits ``x``."""
        p = self.scaled(x).softmax(-1)
        return p.scatter(-1, p.argmax(-1, keepdim=True), 0.0).sum(-1)


class Entropy(_Confidence):
    r"""Normalised entropy, :math:`-\sum_c p_c \log p_c / \log C`.

    Shape:
        logits :math:`(R, C)`; scores :math:`(R,)` in :math:`[0, 1]`.

    >>> Entropy()(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([1.0000, 0.0018])

    References:
        Survey section 5.1.1; Teerapittayanon et al., BranchyNet, ICPR 2016; normalised as in FastBERT (ACL 2020).

    Differs from the paper: divided by log C, so that one threshold serves tasks with different C.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scores of logits ``x``."""
        log_p = self.scaled(x).log_softmax(-1)
        # A class that is ruled out (a logit of -inf) adds nothing, where 0 times -inf would be NaN.
        return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1) / math.log(x.shape[-1])


class Margin(_Confidence):
    r"""One minus the gap between the two largest probabilities, :math:`1 - (p_{(1)} - p_{(2)})`.

    Shape:
        logits :math:`(R, C)`; scores :math:`(R,)` in :math:`[0, 1]`.

    >>> Margin()(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([1.0000e+00, 2.4676e-04])

    References:
        Survey section 5.1.1; Park et al., Big/Little Deep Neural Network, CODES+ISSS 2015.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scores of logits ``x``."""
        top = self.scaled(x).softmax(-1).topk(2, -1).values
        return 1 - (top[..., 0] - top[..., 1])


class Patience(Score):
    r"""Not yet patient: :math:`1 - \min(c_k, t) / t` where :math:`c_k` counts the exits in a row that agree.

    :math:`c_k = c_{k-1} + 1` where the predicted class didn't change, else 0. With the threshold at 0 a row leaves at the
    first exit with :math:`c_k = t`. Reads no probabilities, so calibration doesn't matter to it.

    Shape:
        logits :math:`(R, C)`; scores :math:`(R,)` in :math:`\{0, 1/t, ..., 1\}`; carries (label, count) per row.

    Args:
        patience: :math:`t`, exits in agreement that are enough, at least 1.

    Raises:
        PliantError: where ``patience`` is below 1.

    >>> score, carry = Patience(1), None
    >>> for logits in ([[0.0, 1.0]], [[0.0, 2.0]]):
    ...     s, carry = score.step(torch.tensor(logits), carry)
    ...     print(s)
    tensor([1.])
    tensor([0.])

    References:
        Survey section 5.1.1; Zhou et al., BERT Loses Patience, NeurIPS 2020.
    """

    def __init__(self, patience: int) -> None:
        super().__init__()
        if patience < 1:
            raise PliantError(got=f"patience {patience}", expected="at least 1", do="pass a positive count of exits")
        self.patience = patience

    def forward(self, x: Tensor) -> Tensor:
        """Scores at a first exit: nobody is patient yet."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Scores of logits ``x`` after the exits that ``carry`` remembers."""
        said = self.said(x)
        if carry is None:
            count = torch.zeros(said.shape, dtype=torch.int64, device=x.device)
        else:
            count = (carry[1] + 1) * self.agree(said, carry[0])
        score = 1 - count.clamp(max=self.patience).to(x.dtype) / self.patience
        # A row with NaN logits agrees with nothing.
        return torch.where(x.isnan().any(-1), torch.full_like(score, float("nan")), score), (said, count)

    def said(self, x: Tensor) -> Tensor:
        """What an exit says of each row: its class."""
        return x.argmax(-1)

    def agree(self, said: Tensor, before: Tensor) -> Tensor:
        """Whether two exits say the same."""
        return said == before


class Steady(Patience):
    r"""Patience for regression: exits agree where :math:`|y_k - y_{k-1}| < \tau`.

    Shape:
        predictions :math:`(R, 1)`; scores :math:`(R,)` in :math:`\{0, 1/t, ..., 1\}`; carries (prediction, count) per row.

    Args:
        patience: :math:`t`, exits in agreement that are enough, at least 1.
        tau: in the units of the target, above 0.

    Raises:
        PliantError: where ``patience`` is below 1, ``tau`` isn't above 0, or there are several predictions for a row.

    >>> score, carry = Steady(1, tau=0.1), None
    >>> for y in ([[1.0]], [[1.05]]):
    ...     s, carry = score.step(torch.tensor(y), carry)
    ...     print(s)
    tensor([1.])
    tensor([0.])

    References:
        Survey section 5.1.1; Zhou et al., BERT Loses Patience, NeurIPS 2020.
    """

    def __init__(self, patience: int, *, tau: float) -> None:
        super().__init__(patience)
        if not tau > 0:
            raise PliantError(got=f"tau={tau}", expected="above 0", do="pass a difference in the units of the target")
        self.tau = tau

    def said(self, x: Tensor) -> Tensor:
        """The prediction of each row."""
        if x.shape[1:] != (1,):
            raise PliantError(
                got=f"predictions of shape {tuple(x.shape)}", expected="one for each row, (R, 1)",
                do="use Patience for classes",
            )  # fmt: skip
        return x.squeeze(-1)

    def agree(self, said: Tensor, before: Tensor) -> Tensor:
        """Whether two exits are near each other."""
        return (said - before).abs() < self.tau


class Pooled(nn.Module):
    """Not a score: mean over all but rows and channels, for gates on feature maps (B, C, ...) -> (B, C).

    >>> Pooled()(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Mean over everything behind the channels."""
        return x.flatten(2).mean(2) if x.ndim > 2 else x
