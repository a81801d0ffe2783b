"""SkipNet's gates and BlockDrop's plans."""

from __future__ import annotations

import itertools

import pytest
import torch

import pliant
from pliant import PliantError, rules
from pliant.losses import BlockDropReward, Hybrid, SelfCritical
from pliant.systems.backbones import resnet
from pliant.systems.depth.blockdrop import blockdrop
from pliant.systems.depth.skipnet import GATES, skipnet


@pytest.mark.parametrize("gate", list(GATES))
def test_all_open_is_the_backbone_and_every_gate_learns(gate: str) -> None:
    torch.manual_seed(0)
    model = skipnet(4, 3, depth=8, widths=(4, 8, 8), gate=gate).eval()
    x = torch.randn(5, 3, 12, 12)
    dense = pliant.bind(model, {"*": rules.Always()})
    with torch.no_grad():
        torch.testing.assert_close(dense(x), pliant.plain(model)(x))
    assert sum(p.numel() for p in resnet(4, 3, depth=8, widths=(4, 8, 8)).model().parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if "scorer" not in name
    )
    model.train()
    model(x).square().mean().backward()
    for path, site in pliant.sites(model).items():
        assert any(p.grad is not None and p.grad.any() for p in site.parameters()), path


def test_the_recurrent_gates_share_one_memory_and_pass_it_on() -> None:
    torch.manual_seed(0)
    model = skipnet(4, 3, depth=14, widths=(4, 8, 8)).eval()
    found = [site.scorer.memory for site in pliant.sites(model).values()]
    assert len(found) == 5
    assert all(memory is found[0] for memory in found)
    _, trace = pliant.record(model)(torch.randn(3, 3, 12, 12))
    carries = [trace[path][0].carry[0] for path in trace]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(carries))


def test_the_light_gates_cost_less_than_a_hundredth_of_the_feed_forward_ones() -> None:
    x = torch.randn(1, 3, 32, 32)
    extra = {}
    for gate in GATES:
        model = skipnet(depth=20, gate=gate).eval()
        trace = pliant.record(model)(x)[1]
        extra[gate] = int(trace.dense_flops[0]) - int(pliant.record(pliant.plain(model))(x)[1].flops[0])
    assert extra["light"] * 100 < extra["feedforward"]
    assert extra["light"] < extra["recurrent"] < extra["strided"] < extra["feedforward"]


def test_one_policy_plans_all_blocks_and_both_stages_have_gradients() -> None:
    torch.manual_seed(0)
    model = blockdrop(4, 3, depth=14, widths=(4, 8, 8), policy=(4, 4, 8)).train()
    x, target = torch.randn(6, 3, 12, 12), torch.randint(4, (6,))
    term = SelfCritical(BlockDropReward(gamma=2.0))
    y, trace = pliant.record(model)(x)
    assert trace["site"][0].value.shape == (6, 6)
    with torch.no_grad():
        further = pliant.record(term.other(model))(x)
    term(y, trace, target, 0.0, further).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.site.parameters())
    y, trace = pliant.record(
        pliant.bind(skipnet(4, 3, depth=8), {"*": pliant.estimators.ScoreFunction(rules.Threshold(0.0))})
    )(x)
    assert Hybrid(alpha=0.1)(y, trace, target, 0.0).requires_grad


def test_what_is_refused() -> None:
    with pytest.raises(PliantError, match="one of recurrent"):
        skipnet(gate="golden")
    with pytest.raises(PliantError, match="6n \\+ 2"):
        blockdrop(depth=9)
