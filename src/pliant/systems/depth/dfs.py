"""DFS: for each residual block and image, skip it, run it at few bits, or run it in full."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.estimators.straight_through import StraightThrough
from pliant.execute.chain import Chain
from pliant.execute.levels import Levels
from pliant.execute.norm import NormBank
from pliant.functional.quantize import quantize
from pliant.rules.threshold import Threshold
from pliant.scores.recurrent import GateMemory, RecurrentGate
from pliant.systems.backbones import BasicBlock, resnet

BITS = (8, 10, 12, 14, 16)


def bit_costs(bits: Sequence[int] = BITS) -> list[float]:
    """What each form of a block costs, as a share of the full one's bit-operations: skipped, :math:`(b / 32)^2`, full.

    >>> bit_costs((8, 16))
    [0.0, 0.0625, 0.25, 1.0]
    """
    return [0.0, *((b / 32) ** 2 for b in bits), 1.0]


class AtBits(nn.Module):
    """A residual block with weights and activations on a grid of ``bits``, and batch norms of its own for that width."""

    def __init__(self, block: BasicBlock, norms: Sequence[NormBank], level: int, bits: int) -> None:
        super().__init__()
        self.shared = [block]  # not registered: the full form holds it
        self.norms = nn.ModuleList(bank.at(level) for bank in norms)
        self.bits = bits

    def extra_repr(self) -> str:
        """The width."""
        return f"bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        """The block on the grid."""
        block, norms = self.shared[0], iter(self.norms)
        y = x
        for layer in block.branch:
            y = (
                self._conv(layer, y)
                if isinstance(layer, nn.Conv2d)
                else next(norms)(y)
                if isinstance(layer, nn.BatchNorm2d)
                else layer(y)
            )
        return (block.shortcut(x) + y).relu()

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        weight = quantize(conv.weight, self.bits)
        return F.conv2d(quantize(x, self.bits, rows=True), weight, None, conv.stride, conv.padding)


class Bypass(nn.Module):
    """A block without its branch: the shortcut, rectified as the block is."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.shared = [block]  # not registered: the full form holds it

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut of ``x``."""
        return self.shared[0].shortcut(x).relu()


def start_levels(model: nn.Module) -> None:
    """Start every bit-width's batch norms as the trained full block's: between training the backbone and the gates.

    >>> start_levels(dfs(depth=8))
    """
    for form in model.modules():
        if isinstance(form, AtBits):
            trained = [layer for layer in form.shared[0].branch if isinstance(layer, nn.BatchNorm2d)]
            for norm, like in zip(form.norms, trained, strict=True):
                norm.load_state_dict(like.state_dict())


def fractional(block: BasicBlock, memory: GateMemory, bits: Sequence[int]) -> Levels:
    """``block`` in all its forms, under a recurrent gate."""
    norms = [NormBank(layer, len(bits)) for layer in block.branch if isinstance(layer, nn.BatchNorm2d) and bits]
    forms = [Bypass(block), *(AtBits(block, norms, level, b) for level, b in enumerate(bits)), block]
    site = Site(RecurrentGate(block.inputs, memory), StraightThrough(Threshold(0.0)), shape=(len(forms) - 1,))
    return Levels(forms, site)


def dfs(
    num_classes: int = 10, in_chans: int = 3, *, depth: int = 38, widths: Sequence[int] = (16, 32, 64), bits: Sequence[int] = BITS,
    hidden: int = 10,
) -> nn.Sequential:  # fmt: skip
    r"""A CIFAR ResNet whose every block but the first is skipped, run at 8 to 16 bits, or run in full, for each image.

    .. math:: x_l = f_{k_l}(x_{l-1}), \quad k_l = \#\{\text{steps open}\} \in \{\text{skip}, 8, 10, 12, 14, 16\text{ bits}, \text{full}\}

    Train the backbone (``plain``) first, then after :func:`start_levels` the gates alone (``*scorer*``) until everything runs in full, then all together with
    ``pliant.losses.LevelTarget(bit_costs(), target)`` at a weight that suits the length of training: 1e-5 in the paper, 2 in the evidence.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        depth: layers, 6n + 2.
        widths: of the three groups.
        bits: widths of the forms between skipping and full precision, rising; none leaves skipping or not.
        hidden: units of the gates' shared memory.

    Returns:
        Stem, blocks and head; the site of block ``i`` is ``blocks.blocks.i.site``.

    Raises:
        PliantError: where the depth isn't 6n + 2, or the widths don't rise.

    >>> from pliant.core.bind import sites
    >>> list(sites(dfs(depth=8)))
    ['blocks.blocks.1.site', 'blocks.blocks.2.site']

    References:
        Survey section 2.1.1 (2b); Shen et al., Fractional Skipping: Towards Finer-Grained Dynamic CNN Inference, AAAI 2020.

    Differs from the paper: a form is told by the steps that lead to it, not by a softmax over forms, and all steps start open; each
    bit-width has batch norms of its own; ranges of activations are of each image; a projecting shortcut stays in full precision.
    PyTorch computes quantised values in floating point, so a bit-width saves bit-operations that ``trace.flops`` doesn't count,
    and no seconds: only skipping does.
    """
    if sorted(set(bits)) != list(bits) or any(b < 1 for b in bits):
        raise PliantError(got=f"bits={tuple(bits)}", expected="rising, at least 1", do="pass e.g. (8, 16)")
    parts = resnet(num_classes, in_chans, depth=depth, widths=widths)
    memory = GateMemory(hidden, bias=2.0, outputs=len(bits) + 1)
    first, *rest = parts.blocks
    gated = [fractional(block, memory, bits) for block in rest if isinstance(block, BasicBlock)]
    return nn.Sequential(OrderedDict(stem=parts.stem, blocks=Chain([first, *gated]), head=parts.head))
