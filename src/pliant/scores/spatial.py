"""Scores with maps: one logit for a map (SkipNet), one for each of its positions (DynConv), or how unsure each is (PointRend)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Score
from pliant.scores.confidence import Pooled


class ConvGate(Score):
    r"""SkipNet's feed-forward gate: max-pool, two 3x3 convolutions, average, two logits; :math:`s = z_1 - z_0`.

    Dear: in the paper an eighth of a residual block. Maps smaller than 2 by 2 aren't shrunk.

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R,)`.

    Args:
        channels: :math:`C`.
        hidden: channels of the convolutions; default, :math:`C`.
        bias: of the score at the start; positive starts open.

    >>> ConvGate(4).eval()(torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2])

    References:
        Survey section 5.1.3; Wang et al., SkipNet, ECCV 2018.
    """

    def __init__(self, channels: int, *, hidden: int | None = None, bias: float = 1.0) -> None:
        super().__init__()
        width = channels if hidden is None else hidden
        self.shrink = nn.MaxPool2d(2, ceil_mode=True)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.pool = Pooled()
        self.out = nn.Linear(width, 2)
        nn.init.normal_(self.out.weight, std=1e-3)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor((0.0, bias)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of features ``x``."""
        z = self.out(self.pool(self.layers(self.shrink(x))))
        return z[:, 1] - z[:, 0]


class MaskHead(Score):
    r"""One logit for each position: :math:`s = w * x + b` with a 1x1 or wider convolution.

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R, 1, H', W')`, smaller by ``stride``.

    Args:
        channels: :math:`C`.
        kernel: side of the convolution, odd.
        stride: that of the block whose output is masked.
        bias: :math:`b` at the start; positive starts open.

    Raises:
        PliantError: where the kernel's side isn't odd.

    >>> MaskHead(4, bias=2.0)(torch.zeros(1, 4, 1, 2))
    tensor([[[[2., 2.]]]], grad_fn=<ConvolutionBackward0>)

    References:
        Survey sections 3.1.1 (1) and 5.1.3.
    """

    def __init__(self, channels: int, *, kernel: int = 1, stride: int = 1, bias: float = 1.0) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise PliantError(got=f"kernel={kernel}", expected="odd and at least 1", do="pass 1 or 3")
        self.conv = nn.Conv2d(channels, 1, kernel, stride=stride, padding=kernel // 2)
        nn.init.normal_(self.conv.weight, std=1e-3)
        nn.init.constant_(self.conv.bias, bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every position of ``x``."""
        return self.conv(x)


class SqueezeMaskHead(MaskHead):
    r"""DynConv's mask unit: a 3x3 convolution of each place plus a linear view of the whole map.

    .. math:: s_{ij} = (w * x)_{ij} + u \cdot \mathrm{mean}_{hw}(x) + b

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R, 1, H', W')`, smaller by ``stride``.

    Args:
        channels: :math:`C`.
        kernel: side of the convolution, odd.
        stride: that of the block whose output is masked.
        bias: :math:`b` at the start; positive starts open.

    >>> SqueezeMaskHead(4)(torch.zeros(2, 4, 5, 5)).shape
    torch.Size([2, 1, 5, 5])

    References:
        Survey sections 3.1.1 (1) and 5.1.3; Verelst and Tuytelaars, Dynamic Convolutions, CVPR 2020.
    """

    def __init__(self, channels: int, *, kernel: int = 3, stride: int = 1, bias: float = 1.0) -> None:
        super().__init__(channels, kernel=kernel, stride=stride, bias=bias)
        self.pool = Pooled()
        self.whole = nn.Linear(channels, 1, bias=False)
        nn.init.normal_(self.whole.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every position of ``x``."""
        return self.conv(x) + self.whole(self.pool(x)).reshape(-1, 1, 1, 1)


class PointUncertainty(Score):
    r"""How near the best two classes of each position are, :math:`s = z_{(2)} - z_{(1)} \le 0`; of one class, :math:`-|z|`.

    In units of logits, so the natural rule ranks (:class:`pliant.rules.TopK`) and has no threshold.

    Shape:
        logits :math:`(R, K, H, W)`; scores :math:`(R, 1, H, W)`.

    >>> PointUncertainty()(torch.tensor([3.0, 1.0, 2.5]).reshape(1, 3, 1, 1)).item()
    -0.5

    References:
        Survey section 3.1.1; Kirillov et al., PointRend: Image Segmentation as Rendering, CVPR 2020.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scores of logits ``x``."""
        if x.shape[1] == 1:
            return -x.abs()
        best = x.topk(2, dim=1).values
        return best[:, 1:] - best[:, :1]


class KernelPredictor(Score):
    r"""CARAFE's predictor: a 1x1 convolution to few channels, a 3x3 one to :math:`r^2 k^2`, shuffled to the target's size.

    The last weights start with a standard deviation of 0.001, so that all neighbours start with the same score, nearly.

    Shape:
        features :math:`(R, C, H, W)`; scores :math:`(R, k^2, rH, rW)`.

    Args:
        channels: :math:`C`.
        ratio: :math:`r`.
        side: :math:`k`.
        compressed: channels between.

    >>> KernelPredictor(8, ratio=2, side=5)(torch.zeros(1, 8, 3, 4)).shape
    torch.Size([1, 25, 6, 8])

    References:
        Survey section 3.1.2 (1); Wang et al., CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019.
    """

    def __init__(self, channels: int, *, ratio: int = 2, side: int = 5, compressed: int = 64) -> None:
        super().__init__()
        self.compress = nn.Conv2d(channels, compressed, 1)
        self.encode = nn.Conv2d(compressed, (ratio * side) ** 2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(ratio)
        nn.init.xavier_uniform_(self.compress.weight)
        nn.init.normal_(self.encode.weight, std=1e-3)
        for conv in (self.compress, self.encode):
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every target position's neighbours."""
        return self.shuffle(self.encode(self.compress(x)))
