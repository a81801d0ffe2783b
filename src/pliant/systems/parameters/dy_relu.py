"""DY-ReLU: activations of two lines whose slopes and heights hang on the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pliant.core.site import Site
from pliant.execute.kernels import Adapted, DynamicReLU, ScaledPlaces
from pliant.rules.soft import Sigmoid, SpatialSoftmax
from pliant.scores.modulation import Excitation
from pliant.systems.mobile import Activation, inverted, mobile
from pliant.systems.parts import chosen


def _lines(channels: int, shape: tuple[int, int], reduction: int) -> Adapted:
    scorer = Excitation(channels, shape, reduction=reduction)
    nn.init.zeros_(scorer.excite.weight)  # no residual: it starts as the ReLU
    nn.init.zeros_(scorer.excite.bias)
    return Adapted(Site(scorer, Sigmoid(2.0), shape=shape), DynamicReLU())


def shared(reduction: int) -> Activation:
    """Form A: the same lines for all channels."""
    return lambda channels: _lines(channels, (1, 4), reduction)


def by_channel(reduction: int) -> Activation:
    """Form B: lines of each channel."""
    return lambda channels: _lines(channels, (channels, 4), reduction)


def by_place(reduction: int) -> Activation:
    """Form C: lines of each channel times a weight of each position, both decided from the same features."""

    def build(channels: int) -> nn.Module:
        places = Site(nn.Conv2d(channels, 1, 1), SpatialSoftmax())
        return Adapted(places, ScaledPlaces(_lines(channels, (channels, 4), reduction)))

    return build


FORMS: dict[str, Callable[[int], Activation]] = {"shared": shared, "channel": by_channel, "place": by_place}


def dy_relu(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 24, 40), depth: int = 2,
    form: str = "channel", reduction: int = 8, stem_stride: int = 1,
) -> nn.Module:  # fmt: skip
    r"""A small MobileNetV2 with a dynamic ReLU in place of every ReLU.

    .. math:: y_c = \max_{k \le 2}\,(a_c^k(x)\, x_c + b_c^k(x)), \qquad a = (1, 0) + \lambda_a\,\Delta_a, \quad b = \lambda_b\,\Delta_b

    with residuals :math:`\Delta = 2\sigma(\cdot) - 1` from pooled features through a bottleneck, :math:`\lambda_a = 1` and
    :math:`\lambda_b = 0.5`. A site's value is :math:`1 + \Delta`, so that ``Always``, and the plain form, have the ReLU;
    residuals start at 0, so the network does too.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, \text{num\_classes})`.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        widths: channels of the stages.
        depth: blocks of each stage.
        form: "shared" (A: one function for all channels), "channel" (B), "place" (C: also by position).
        reduction: :math:`R` of the bottleneck.
        stem_stride: of the first convolution.

    Returns:
        The network; a site at every activation.

    Raises:
        PliantError: where there is no such form.

    >>> import torch
    >>> from pliant.core.bind import plain
    >>> net = dy_relu(widths=(4, 8), depth=1).eval()
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(net(x), plain(net)(x), atol=1e-6)  # untrained, it has ReLUs
    True

    References:
        Survey section 2.2.3 (3); Chen et al., Dynamic ReLU, ECCV 2020.

    Differs from the paper: a small network for small images; the last linear layer of the hyper function starts at 0. In form
    C the weight of a position, which is never negative, multiplies the highest line, which is the same thing. A bottleneck
    has at least 4 units.
    """
    activation = chosen(FORMS, form, "form")(reduction)
    parts = mobile(
        num_classes, in_chans, widths=widths, depth=depth, stem_stride=stem_stride,
        branches=[inverted(4, activation)] * (depth * len(widths)), activation=activation,
    )  # fmt: skip
    return parts.model()
