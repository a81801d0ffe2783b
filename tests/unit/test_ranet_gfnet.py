"""RANet, GFNet and spatial transformers: what runs, what doesn't, and what the paper's configuration is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pliant
from pliant import rules
from pliant.systems.resolutions import Block, FusionBlock
from pliant.systems.spatial.stn import Localisation

SMALL: dict[str, Any] = {"num_classes": 4, "step": 2, "channels": 4, "growth": 4, "head_channels": 8}


def ran_on(model: nn.Module, kind: type[nn.Module], x: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes on which modules of a kind ran."""
    seen: list[tuple[int, ...]] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].x.shape)))
        for m in model.modules()
        if type(m) is kind
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_ranet_has_the_papers_configuration() -> None:
    model: Any = pliant.create_model("ranet").eval()
    assert len(model.heads) == 6  # 2, 4, 6 blocks; exits behind those that the sub-network below lacks
    assert sum(isinstance(m, Block) for m in model.modules()) == 6
    fused = [m for m in model.modules() if isinstance(m, FusionBlock)]
    assert len(fused) == 2 + 4
    always, x = pliant.bind(model, {"*": rules.Always()}), torch.zeros(1, 3, 32, 32)
    assert ran_on(always, Block, x)[0] == (1, 64, 8, 8)
    # each sub-network begins at its own resolution and comes down to the coarsest where one below it ends
    assert [s[2] for s in ran_on(always, FusionBlock, x)] == [16, 16, 32, 32, 16, 16]
    assert {s[2:] for s in ran_on(always, Block, x)} == {(8, 8)}
    growth = [(m.layers[0].new[1][0].out_channels, m.layers[0].below[1][0].out_channels) for m in fused]
    assert growth == [(9, 3)] * 2 + [(5, 1)] * 4  # a quarter of the new channels comes from below
    # as many parameters and FLOPs as the released network of this configuration, counted alike
    assert sum(p.numel() for p in model.parameters()) == 2_451_158
    assert int(pliant.record(always)(x)[1].flops) == 121_885_824


def test_no_fine_block_runs_where_all_leave_coarse() -> None:
    model = pliant.create_model("ranet", **SMALL).eval()
    x = torch.randn(3, 3, 32, 32)
    early = pliant.bind(model, {"*": rules.Never()})
    assert ran_on(early, FusionBlock, x) == []
    assert {s[2:] for s in ran_on(early, Block, x)} == {(8, 8)}


def test_an_exit_pays_for_lower_subnetworks_once() -> None:
    model: Any = pliant.create_model("ranet", **SMALL).eval()
    x, costs = torch.randn(2, 3, 32, 32), []
    for last in range(6):
        stop = {f"sites.{k}": rules.Always() if k < last else rules.Never() for k in range(5)}
        y, trace = pliant.record(pliant.bind(model, stop))(x)
        costs.append(int(trace.flops[0]))
        full = pliant.record(pliant.masked(pliant.bind(model, {"*": rules.Always()})))(x)[1].exits[last].logits
        torch.testing.assert_close(y, full, rtol=1e-5, atol=1e-5)
    assert costs == sorted(costs)
    assert costs[-1] == int(trace.dense_flops[0])


def test_odd_images_and_refusals() -> None:
    model = pliant.create_model("ranet", **SMALL).eval()
    for side in (17, 30):
        assert pliant.bind(model, {"*": rules.Always()})(torch.randn(2, 3, side, side)).shape == (2, 4)
    with pytest.raises(pliant.PliantError, match=r"blocks=0"):
        pliant.create_model("ranet", blocks=0)
    with pytest.raises(pliant.PliantError, match=r"share=1.5"):
        pliant.create_model("ranet", share=1.5)
    with pytest.raises(pliant.PliantError, match=r"growth=1"):
        pliant.create_model("ranet", growth=1)


def test_the_other_name_of_ranet() -> None:
    assert type(pliant.create_model("ranet_resolution", **SMALL)) is type(pliant.create_model("ranet", **SMALL))


def test_an_untrained_transformer_is_the_identity_and_learns_at_its_own_pace() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 16, 16)
    grads = []
    for pace in (1.0, 0.1):
        torch.manual_seed(1)
        model = pliant.create_model("stn", in_chans=1, pace=pace, parts=2, transform="thin_plate").eval()
        torch.testing.assert_close(model(x), pliant.plain(model)(x), rtol=1e-3, atol=1e-4)
        model(x).square().sum().backward()
        locs = [m for m in model.modules() if isinstance(m, Localisation)]
        assert len(locs) == 2
        grads.append(locs[0].linear.weight.grad)
    torch.testing.assert_close(grads[1], grads[0] * 0.1)


@pytest.mark.parametrize("transform", ["attention", "affine", "projective", "thin_plate"])
def test_every_transform_keeps_the_contract(transform: str) -> None:
    torch.manual_seed(0)
    model = pliant.create_model("stn", in_chans=1, transform=transform, size=8, widths=(4,), num_classes=3).eval()
    nn.init.normal_(next(m for m in model.modules() if isinstance(m, Localisation)).linear.weight, std=0.05)
    seen = pliant.check(model, torch.randn(4, 1, 12, 12), only=["gathered", "all_on", "rows", "flops", "export", "nan"])
    assert len(seen) == 6


def test_a_smaller_output_grid_saves_downstream() -> None:
    x = torch.zeros(1, 1, 32, 32)
    cost = [int(pliant.record(pliant.create_model("stn", in_chans=1, size=s).eval())(x)[1].flops) for s in (None, 16)]
    assert cost[1] < cost[0]


def glances(**more: Any) -> Any:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"in_chans": 1, "size": 8, "steps": 3, "widths": (4, 4, 8), "hidden": 8, "policy": 8}
    return pliant.create_model("gfnet", **{**kwargs, **more})


def test_gfnet_shares_one_local_encoder_and_one_policy() -> None:
    two, four = (sum(p.numel() for p in glances(steps=n).parameters()) for n in (2, 4))
    assert two == four


def test_gfnet_draws_places_in_training_and_means_them_in_evaluation() -> None:
    model, x = glances(), torch.randn(5, 1, 20, 20)
    _, trace = pliant.record(model.train())(x)
    first = trace["stages.1.region.site"][0]
    assert first.log_prob is not None
    assert first.log_prob.shape == (5, 2)
    assert not first.value.requires_grad
    assert len(trace.exits) == 3
    _, trace = pliant.record(pliant.masked(model.eval()))(x)
    for k in (1, 2):
        d = trace[f"stages.{k}.region.site"][0]
        assert d.scores is not None
        torch.testing.assert_close(d.value, d.scores.sigmoid())


def test_gfnet_is_tuned_by_its_exits_alone() -> None:
    model, data = glances().eval(), [(torch.randn(64, 1, 20, 20), torch.randint(10, (64,)))]
    point = pliant.tune(model, data, budget=0.7)
    assert list(point.thresholds) == ["sites.0", "sites.1"]
    _, trace = pliant.record(model)(data[0][0])
    assert float(trace.flops.double().mean()) == pytest.approx(point.flops)
    assert point.solver == "search"
