"""Routers: how much each token wants each expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score


class Noise(NamedTuple):
    """What noisy scores were drawn from: clean scores and the noise's standard deviation, (R, ..., E)."""

    clean: Tensor
    std: Tensor


class NoisyRouter(Score):
    r"""Linear scores with noise of a learned size while training: :math:`s = x W_g + \varepsilon\,(\mathrm{softplus}(x W_n) + 0.01)`.

    Both matrices start at 0: equal load at first, and noise enough that every expert is tried. Hands on what the noise was
    drawn from, which :class:`pliant.losses.Load` reads.

    Shape:
        ``x`` :math:`(R, ..., D)`; scores :math:`(R, ..., E)`.

    Args:
        width: :math:`D`.
        experts: :math:`E`.

    >>> NoisyRouter(4, 3).eval()(torch.ones(2, 5, 4)).abs().sum()
    tensor(0., grad_fn=<SumBackward0>)

    References:
        Survey section 2.1.2 (2); Shazeer et al., Sparsely-Gated Mixture-of-Experts, ICLR 2017.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate, self.noise = (nn.Linear(width, experts, bias=False) for _ in range(2))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of ``x``."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Scores of ``x``, and what their noise was drawn from."""
        clean = self.gate(x)
        std = F.softplus(self.noise(x)) + 0.01
        return (clean + torch.randn_like(clean) * std if self.training else clean), Noise(clean, std)


class Router(Score):
    r"""Linear scores in single precision, of inputs that jitter while training: :math:`s = (x \odot u) W`, :math:`u \sim U[1 - j, 1 + j]`.

    Shape:
        ``x`` :math:`(R, ..., D)`; scores :math:`(R, ..., E)`, float32.

    Args:
        width: :math:`D`.
        experts: :math:`E`.
        jitter: :math:`j`, in [0, 1).

    Raises:
        PliantError: where ``jitter`` is outside its range.

    >>> Router(4, 3)(torch.zeros(2, 5, 4, dtype=torch.bfloat16)).dtype
    torch.float32

    References:
        Survey section 2.1.2 (2); Fedus et al., Switch Transformers, JMLR 2022.
    """

    def __init__(self, width: int, experts: int, *, jitter: float = 0.01) -> None:
        super().__init__()
        if not 0 <= jitter < 1:
            raise PliantError(got=f"jitter={jitter}", expected="within [0, 1)", do="pass e.g. 0.01")
        self.jitter = jitter
        self.gate = nn.Linear(width, experts, bias=False)
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, self.gate.weight.float())
