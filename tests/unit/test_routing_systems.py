"""Routing systems in the forms that the catalogue's small configuration doesn't show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pliant
from pliant import rules

ITEMS = ["gathered", "all_on", "rows", "flops", "nan", "gradient"]


def small(id: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = pliant.create_model(id, num_classes=3, **kwargs)
    for site in pliant.sites(model).values():
        linear = [m for m in site.scorer.modules() if isinstance(m, nn.Linear)]
        if linear:
            nn.init.normal_(linear[-1].weight, std=1.0)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


@pytest.mark.parametrize("router", ["one_hot", "gates", "relu_tanh"])
def test_every_router_keeps_the_contract(router: str) -> None:
    model = small("supernet_routing", widths=(4, 8), branches=3, router=router)
    assert len(pliant.check(model, torch.randn(5, 3, 16, 16), only=ITEMS)) == len(ITEMS)


def test_a_lattice_of_three_scales_keeps_the_contract() -> None:
    model = small("dynamic_routing_seg", layers=3, scales=3, channels=4, stride=1, shrink=4)
    assert len(pliant.check(model, torch.randn(4, 3, 16, 16), only=ITEMS)) == len(ITEMS)


def rows_of(note: pliant.core.Note) -> torch.Tensor:
    return torch.arange(16) if note.rows is None else note.rows


def test_one_hot_routes_cost_one_block_a_layer_and_group_rows() -> None:
    model = small("supernet_routing", widths=(4,), branches=4)
    _, trace = pliant.record(model)(torch.randn(16, 3, 16, 16))
    value = trace["layers.0.routes.sites.0"][0].value
    assert torch.equal(value.sum(1), torch.ones(16))
    assert len(trace.flops.unique()) == 1
    blocks = [note for note in trace.notes if note.choice in ("1/0", "1/1", "1/2", "1/3")]
    assert sorted(torch.cat([rows_of(note) for note in blocks]).tolist()) == list(range(16))


def test_the_lattice_answers_every_pixel() -> None:
    for stride, side in ((1, 8), (2, 16), (4, 32)):
        model = pliant.create_model("dynamic_routing_seg", num_classes=5, layers=3, scales=3, channels=4, stride=stride)
        assert model.eval()(torch.zeros(2, 3, side, side)).shape == (2, 5, side, side)


def test_never_passes_the_stem_through() -> None:
    model = small("dynamic_routing_seg", layers=3, scales=2, channels=4, stride=2)
    x = torch.randn(2, 3, 16, 16)
    first = model.stem(x)
    features = pliant.bind(model, {"*": rules.Never()}).lattice(first)
    torch.testing.assert_close(features[0], first[0])
    assert not features[1].any()


def test_a_deeper_narrower_tree_layer_keeps_the_contract() -> None:
    model = small("tel", trees=2, depth=6, width=0.02, widths=(4,), cells=1)
    seen = pliant.check(model, torch.randn(5, 3, 12, 12), only=[i for i in ITEMS if i != "gradient"])
    assert len(seen) == len(ITEMS) - 1
