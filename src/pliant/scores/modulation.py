"""Scorers of soft decisions: weights of experts, channels and coefficients from pooled features, offsets from a map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.site import Score
from pliant.functional.gradient import scale_gradient
from pliant.scores.confidence import Pooled


class PooledLinear(Score):
    r"""A linear map of pooled features: :math:`s = W\,\mathrm{mean}_{hw}(x) + b`, CondConv's routing function.

    Shape:
        features :math:`(R, C, ...)`; scores :math:`(R, E)`.

    Args:
        channels: :math:`C`.
        outputs: :math:`E`.

    >>> PooledLinear(4, 8)(torch.zeros(3, 4, 5, 5)).shape
    torch.Size([3, 8])

    References:
        Survey section 2.2.1 (1); Yang et al., CondConv, NeurIPS 2019.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.pool = Pooled()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        return self.linear(self.pool(x))


class Excitation(Score):
    r"""Squeeze and excite: :math:`s = W_2\,\mathrm{relu}(W_1\,\mathrm{mean}_{hw}(x) + b_1) + b_2` through a bottleneck.

    Shape:
        features :math:`(R, C, ...)`; scores :math:`(R, *\text{shape})`.

    Args:
        channels: :math:`C`.
        shape: of a row's scores; default, one for each channel.
        reduction: the bottleneck has :math:`C / \text{reduction}` units, at least 4.

    >>> Excitation(16, reduction=4)(torch.zeros(3, 16, 5, 5)).shape
    torch.Size([3, 16])

    References:
        Survey section 2.2.3 (1), Eqs. 9-10; Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """

    def __init__(self, channels: int, shape: tuple[int, ...] | None = None, *, reduction: int = 16) -> None:
        super().__init__()
        self.shape = (channels,) if shape is None else shape
        hidden = max(4, channels // reduction)
        self.pool = Pooled()
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, math.prod(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        return self.excite(self.squeeze(self.pool(x)).relu()).unflatten(1, self.shape)


class Saliency(Score):
    r"""How much each output channel of a convolution is worth: :math:`g = \mathrm{relu}(W\,\mathrm{mean}_{hw}|x| + 1)` at first.

    Shape:
        features :math:`(R, I, ...)`; scores :math:`(R, O)`, none below 0.

    Args:
        inputs: :math:`I`.
        outputs: :math:`O`.

    >>> Saliency(4, 8)(torch.zeros(3, 4, 5, 5)).unique()
    tensor([1.], grad_fn=<Unique2Backward0>)

    References:
        Survey section 2.1.2 (3b); Gao et al., Dynamic Channel Pruning, ICLR 2019.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Saliencies by features ``x``."""
        return self.linear(x.abs().flatten(2).mean(2)).relu()


class SideConv(Score):
    r"""A convolution beside another one, of the same geometry, that starts at a constant: :math:`s = a + V * x`, :math:`V = 0`.

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R, K, H', W')`.

    Args:
        conv: the convolution that it stands beside.
        outputs: :math:`K`.
        start: :math:`a`.
        pace: factor of its parameters' gradient; with SGD it's that of their learning rate (0.1 in the paper).

    >>> SideConv(nn.Conv2d(4, 8, 3, stride=2, padding=1), 18, start=1.0)(torch.zeros(3, 4, 8, 8)).mean()
    tensor(1., grad_fn=<MeanBackward0>)

    References:
        Survey section 2.2.1 (2); Zhu et al., Deformable ConvNets v2, CVPR 2019.
    """

    def __init__(self, conv: nn.Conv2d, outputs: int, *, start: float = 0.0, pace: float = 1.0) -> None:
        super().__init__()
        self.start, self.pace = start, pace
        size, stride, padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.conv = nn.Conv2d(conv.in_channels, outputs, size, stride, padding, dilation)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        """The constant and the pace."""
        return f"start={self.start}, pace={self.pace}"

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        conv, bias = self.conv, self.conv.bias
        weight = scale_gradient(conv.weight, self.pace)
        bias = None if bias is None else scale_gradient(bias, self.pace)
        return self.start + F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


class HyperCell(Score):
    r"""A small LSTM that says by how much each row of a larger one's matrices counts at this step.

    .. math::
        \hat h_t = \mathrm{LSTM}([x_t; h_{t-1}], \hat h_{t-1}), \quad d^k = A^k (B^k \hat h_t + 1), \quad b = F (G \hat h_t)

    with :math:`B = 0`, :math:`A = 0.1 / e` and :math:`F = 0` at the start: every scale is 0.1 and every bias 0.

    Shape:
        steps :math:`(R, I)`, input and state side by side; scores :math:`(R, 12, H)`: scales of the state for four gates, scales
        of the input for four gates, and 1 more than four biases.

    Args:
        inputs: :math:`I`.
        width: :math:`H`, units of the larger LSTM.
        hidden: units of the small one.
        embedding: :math:`e`, numbers that each scale vector is made from.

    >>> scores, carry = HyperCell(6, 4, hidden=8, embedding=2).step(torch.zeros(3, 6), None)
    >>> scores[0, :, 0].round(decimals=4).tolist()
    [0.1..., 0.1..., 0.1..., 0.1..., 0.1..., 0.1..., 0.1..., 0.1..., 1.0, 1.0, 1.0, 1.0]

    References:
        Survey section 2.2.2 (1); Ha, Dai, Le, HyperNetworks, ICLR 2017.

    Differs from the paper: the small LSTM has no layer norm.
    """

    def __init__(self, inputs: int, width: int, *, hidden: int = 128, embedding: int = 16) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs, hidden)
        nn.init.orthogonal_(self.cell.weight_hh)
        self.embed = nn.Linear(hidden, 12 * embedding, bias=False)
        nn.init.zeros_(self.embed.weight[: 8 * embedding])
        nn.init.normal_(self.embed.weight[8 * embedding :], std=0.01)
        start = torch.cat([torch.full((8, embedding, width), 0.1 / embedding), torch.zeros(4, embedding, width)])
        self.maps = nn.Parameter(start)
        ones = torch.cat([torch.ones(8, 1, embedding), torch.zeros(4, 1, embedding)])
        self.bias = nn.Parameter(ones)

    def forward(self, x: Tensor) -> Tensor:
        """Scores at a first step."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, carry: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores after the steps that ``carry`` remembers."""
        state = self.cell(x, carry)
        made = self.embed(state[0]).unflatten(1, (12, -1)).transpose(0, 1) + self.bias
        scores = torch.bmm(made, self.maps).transpose(0, 1)
        return scores + torch.cat([scores.new_zeros(8, 1), scores.new_ones(4, 1)]), state
