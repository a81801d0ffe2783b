"""A small gated ResNet, and what its gates do on test images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant import bind, record, rules, sites
from pliant.data import Dataset
from pliant.estimators import Gumbel
from pliant.study import accuracy
from pliant.systems.backbones import resnet
from pliant.systems.depth.convnet_aig import gated


def small(depth: int = 20) -> nn.Module:
    """ConvNet-AIG's ResNet at half the width (8, 16, 32), every block with a gate; the hard sample's gradient is Gumbel's."""
    parts = resnet(10, 1, depth=depth, widths=(8, 16, 32))
    parts.blocks[:] = [gated(block, Gumbel, 1.0) for block in parts.blocks]
    return parts.model()


@torch.no_grad()
def values(model: nn.Module, data: Dataset) -> Tensor:
    """What every gate decides about every test image, (gates, images)."""
    recorder = record(model.eval())
    parts = []
    for x in data.test.x.split(500):
        trace = recorder(x)[1]
        parts.append(torch.stack([trace.dense(site) for site in trace]))
    return torch.cat(parts, 1)


def at_random(model: nn.Module, data: Dataset, rates: Tensor, seed: int) -> float:
    """Accuracy with gates that are open at random, each at its own rate."""
    generator = torch.Generator().manual_seed(seed)
    blind = {
        path: rules.Random(float(rate), generator) for path, rate in zip(sites(model), rates.tolist(), strict=True)
    }
    return accuracy(bind(model, blind), data.test)[0]
