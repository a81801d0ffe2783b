"""A second look at every exit: who is far from the data goes on, however sure the first score is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score


class LogitDistance(nn.Module):
    r"""Mahalanobis distance of an exit's logits to the nearest class, over a limit: :math:`\min_c \|L^{-1}(z - \mu_c)\|_2 / m`.

    Logits are an affine image of the head's input, so a distance there is one in feature space, along what the head sees.
    Above 1 is an outlier. Unfitted, everything is within.

    Shape:
        logits :math:`(R, C)`; distances :math:`(R,)`.

    Args:
        num_classes: :math:`C`.

    >>> _ = torch.manual_seed(0)
    >>> z = torch.cat([torch.randn(50, 2) + 5, torch.randn(50, 2) - 5])
    >>> guard = LogitDistance(2).fit(z, torch.arange(100) // 50)
    >>> guard(torch.tensor([[5.0, 5.0], [250.0, 250.0]])) > 1
    tensor([False,  True])

    References:
        Survey section 5.1.1; Hein et al., CVPR 2019 (the failure); Lee et al., NeurIPS 2018 (Mahalanobis distance).

    Differs from the paper: Hein et al. change the training (ACET); this leaves the weights alone.
    """

    mean: Tensor
    whiten: Tensor
    limit: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, num_classes))
        self.register_buffer("whiten", torch.zeros(num_classes, num_classes))
        self.register_buffer("limit", torch.ones(()))

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor, *, keep: float = 0.97) -> LogitDistance:
        """Means, covariance and limit from held-out rows, of which the share ``keep`` shall be within.

        Raises:
            PliantError: where a class is missing, ``keep`` isn't in (0, 1), or logits aren't finite.
        """
        classes = len(self.mean)
        count = torch.bincount(labels, minlength=classes)
        if logits.shape[1:] != (classes,) or int(count.min()) == 0 or not 0 < keep < 1 or not logits.isfinite().all():
            raise PliantError(
                got=f"logits of shape {tuple(logits.shape)}, {int((count == 0).sum())} classes without rows, keep={keep}",
                expected=f"finite (N, {classes}), every class at least once, and keep in (0, 1)",
                do="fit on held-out rows of all classes",
            )
        z = logits.double()
        mean = torch.zeros(classes, classes, dtype=z.dtype, device=z.device).index_add(0, labels, z) / count[:, None]
        rest = z - mean[labels]
        covariance = rest.T @ rest / len(z)
        covariance += 1e-6 * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(classes, device=z.device)
        factor = torch.linalg.cholesky(covariance)
        self.mean.copy_(mean)
        self.whiten.copy_(torch.linalg.inv(factor).T)
        self.limit.fill_(1.0)
        self.limit.fill_(self(logits).quantile(keep).item())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Distances over the limit."""
        apart = (x[:, None, :] - self.mean.to(x)) @ self.whiten.to(x)
        return apart.square().sum(-1).amin(1).sqrt() / self.limit


class Guarded(Score):
    r"""A score that only those within the guard may leave by: :math:`s(z)` where :math:`g(z) \le 1`, else NaN, which goes on.

    An outlier so runs to full depth, whatever the threshold. A distance that is no number is an outlier's.

    Shape:
        logits :math:`(R, C)`; scores :math:`(R,)`.

    Args:
        score: any score of logits; its temperature stays the one that calibration sets.
        guard: from logits to distances, above 1 for outliers, e.g. a fitted :class:`LogitDistance`.

    >>> import pliant
    >>> class Far(nn.Module):
    ...     def forward(self, x):
    ...         return x.abs().amax(1) / 10
    >>> Guarded(pliant.scores.MaxProbability(), Far())(torch.tensor([[9.0, 0.0], [900.0, 0.0]]))
    tensor([0.0001,    nan])

    References:
        Survey section 5.1.1; Hein et al., CVPR 2019.
    """

    def __init__(self, score: Score, guard: nn.Module) -> None:
        super().__init__()
        self.score, self.guard = score, guard

    @property
    def temperature(self) -> Any:
        """That of the score; none where it has none."""
        return self.score.temperature

    def forward(self, x: Tensor) -> Tensor:
        """Scores of logits ``x``."""
        return self._held(self.score(x), x)

    def step(self, x: Any, carry: Any) -> tuple[Tensor, Any]:
        """Scores of logits ``x``, with what the score carries."""
        scores, carry = self.score.step(x, carry)
        return self._held(scores, x), carry

    def _held(self, scores: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.guard(x) <= 1, scores, torch.full_like(scores, float("nan")))
