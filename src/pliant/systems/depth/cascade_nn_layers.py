"""Cascade of neural network layers: an output layer after every hidden one, and one threshold for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pliant.core.site import Site
from pliant.execute.exits import Exits
from pliant.execute.heads import PooledClassifier
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability


def output_after_every(layers: Sequence[nn.Module], heads: Sequence[nn.Module], *, threshold: float = 0.1) -> Exits:
    r"""Any chain of layers with an output layer after each: a row stops where :math:`\max_c p_c \ge 1 - t`.

    Args:
        layers: hidden layers in their order.
        heads: an output layer for each.
        threshold: :math:`t`, the same at every layer; ``bind(model, {"*": Threshold(t)})`` turns all at once.
    """
    return Exits(layers, heads, [Site(MaxProbability(), Threshold(threshold)) for _ in layers[1:]])


def cascade_nn_layers(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 32, 64, 64), threshold: float = 0.1
) -> Exits:
    """A convolutional net whose every hidden layer has an output layer; see :func:`output_after_every` for your own layers.

    Formula: as :func:`output_after_every`.

    Shape:
        images (R, in_chans, H, W), H and W at least 2 to the number of layers less one; logits (R, num_classes).

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        widths: channels of each 3x3 convolution; all but the first halve the map.
        threshold: one minus the probability at which a row stops.

    >>> len(cascade_nn_layers(widths=(8, 16, 16)).heads)
    3

    References:
        Survey section 2.1.1 (1b); Leroux et al., Cascade of Neural Network Layers, IJCNN 2015.
    """
    layers = [
        nn.Sequential(nn.Conv2d(before, width, 3, stride=1 + (i > 0), padding=1), nn.ReLU())
        for i, (before, width) in enumerate(zip((in_chans, *widths), widths, strict=False))
    ]
    return output_after_every(layers, [PooledClassifier(w, num_classes) for w in widths], threshold=threshold)
