"""Backbones as lists of parts, and the heads that systems share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pliant import PliantError
from pliant.execute.heads import MixedPoolClassifier, PooledClassifier
from pliant.systems.backbones import BACKBONES


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "parameters"), [
    # Published: 0.27 M, 0.85 M and 1.7 M without projections, which add 2752 (weights and norms).
    ("resnet20", 269_722 + 2_752), ("resnet56", 853_018 + 2_752), ("resnet110", 1_727_962 + 2_752),
])  # fmt: skip
def test_residual_networks_have_the_published_sizes(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in BACKBONES[name]().model().parameters()) == parameters


def test_vgg_has_thirteen_convolutions_and_alexnet_five() -> None:
    def convolutions(name: str) -> int:
        return sum(isinstance(m, nn.Conv2d) for m in BACKBONES[name]().model().modules())

    assert [convolutions(n) for n in ("vgg16", "alexnet", "lenet", "cnn2")] == [13, 5, 3, 2]


@pytest.mark.parametrize("name", ["lenet", "alexnet", "vgg16", "cnn2", "resnet8"])
def test_stages_are_the_network_cut(name: str) -> None:
    parts = BACKBONES[name](4, 3)
    model, x = parts.model().eval(), torch.randn(2, 3, 32, 32)
    wanted = model(x)
    for after in ([], [0], [len(parts.blocks)], list(range(len(parts.blocks)))):
        y = x
        for stage in parts.stages(after):
            y = stage(y)
        assert torch.equal(parts.head(y), wanted)
    for wrong in ([1, 1], [1, 0], [len(parts.blocks) + 1], [-1]):
        with pytest.raises(PliantError, match="growing numbers of blocks"):
            parts.stages(wrong)


def test_cost_reached_is_what_the_counter_sees_and_nothing_is_touched() -> None:
    parts = BACKBONES["vgg16"]()
    before = {k: v.clone() for k, v in parts.model().state_dict().items()}
    reached = parts.reached((3, 16, 16))
    after = parts.model().state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(m.training for m in parts.model().modules())
    model, x, spent = parts.model().eval(), torch.zeros(1, 3, 16, 16), []
    for part in (model.stem, *model.blocks):
        spent.append(flops(part, x))
        x = part(x)
    total = flops(model, torch.zeros(1, 3, 16, 16))
    for found, want in zip(reached, itertools.accumulate(spent), strict=True):
        assert found.share == want / total
    assert reached[-1].shape == tuple(x.shape[1:])


def test_a_mixed_pool_is_the_mix_of_both_pools() -> None:
    head, x = MixedPoolClassifier(3, 5), torch.randn(2, 3, 8, 8)
    a = head.mix.detach()
    mixed = a * nn.functional.max_pool2d(x, 2) + (1 - a) * nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(head(x), head.linear(mixed.flatten(1)))
    assert torch.equal(head(x[..., :4, :4]), head.linear(x[..., :4, :4].flatten(1)))  # no pool is left at 4 by 4
    assert head(torch.randn(1, 3, 7, 13)).shape == (1, 5)
    head(x).sum().backward()
    assert head.mix.grad is not None
    assert head.mix.grad.any()
    with pytest.raises(PliantError, match="got a map of 3 by 8"):
        head(x[..., :3, :])


def test_a_pooled_classifier_reads_the_mean() -> None:
    head, x = PooledClassifier(3, 5), torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(head(x), head.linear(x.mean((2, 3))))
