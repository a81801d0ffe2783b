"""Chosen channels against a loop that anyone can read: one row, one output channel, one input channel at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import rules
from pliant.core.site import Outcome, Site
from pliant.cost import expected_flops
from pliant.execute.channels import Channels, Chosen
from pliant.losses import GateL1, scored
from pliant.scores import Saliency
from pliant.systems.width.fbs import Density, fbs

IN, OUT = 3, 4


def layer(*, boost: bool, stride: int = 1) -> Channels:
    torch.manual_seed(0)
    scorer = nn.Identity() if boost else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(IN, OUT))
    norm = nn.BatchNorm2d(OUT, affine=not boost)
    norm.running_mean, norm.running_var = torch.randn(OUT), torch.rand(OUT) + 0.5
    made = Channels(
        nn.Conv2d(IN, OUT, 3, stride, 1, bias=False), norm, Site(scorer, rules.TopK(2), shape=(OUT,)),
        boost=Saliency(IN, OUT) if boost else None,
    )  # fmt: skip
    return made.eval()


def loop(made: Channels, x: Chosen, value: Tensor) -> Tensor:
    """Each output channel that was chosen is a sum over the input channels that aren't 0; the others stay 0."""
    conv, norm = made.layer.conv, made.layer.norm
    answers = []
    for row in range(len(value)):
        maps = torch.zeros_like(conv(x.maps[row : row + 1]))[0]
        g = None if made.boost is None else made.boost(x.maps[row : row + 1])[0]
        for o in range(OUT):
            if value[row, o] == 0:
                continue
            total = torch.zeros_like(maps[o])
            for i in range(IN):
                if x.active[row, i]:
                    kernel = conv.weight[o, i][None, None]
                    total = total + F.conv2d(x.maps[row, i][None, None], kernel, stride=conv.stride, padding=1)[0, 0]
            total = (total - norm.running_mean[o]) / (norm.running_var[o] + norm.eps).sqrt()  # type: ignore[index]
            if g is None:
                total = total * norm.weight[o] + norm.bias[o]
            else:
                total = total * g[o] + made.layer.shift[o]  # type: ignore[index]
            maps[o] = total.relu()
        answers.append(maps)
    return torch.stack(answers) if answers else torch.zeros(0, OUT, *x.maps.shape[2:])


def patterns(channels: int, rows: int) -> Any:
    return st.lists(st.lists(st.booleans(), min_size=channels, max_size=channels), min_size=rows, max_size=rows)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_forms_are_the_loop(data: Any) -> None:
    made = layer(boost=data.draw(st.booleans()), stride=data.draw(st.sampled_from([1, 2])))
    rows = data.draw(st.sampled_from([0, 1, 2, 5]))
    reads = torch.tensor(data.draw(patterns(IN, rows))).reshape(rows, IN).float()
    value = torch.tensor(data.draw(patterns(OUT, rows))).reshape(rows, OUT).float()
    x = Chosen(torch.randn(rows, IN, 6, 5) * reads[..., None, None], reads, reads)
    with torch.no_grad():
        got, ref = made(x, given=value), pliant.masked(made)(x, given=value)
        torch.testing.assert_close(got.maps, ref.maps)
        if rows:
            torch.testing.assert_close(got.maps, loop(made, x, value))
    assert torch.equal(got.active, value)


class Fixed(rules.Always):
    """Decides as it was told."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.kept = value

    def forward(self, scores: Tensor) -> Outcome:
        return Outcome(self.kept)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_chain_costs_pairs_of_channels_that_ran(data: Any) -> None:
    model = fbs(4, 2, layers=[(3, 1), (5, 1)]).eval()
    rows = data.draw(st.sampled_from([1, 3]))
    first, second = (torch.tensor(data.draw(patterns(n, rows))).float() for n in (3, 5))

    bound = pliant.bind(model, {"layers.0.site": Fixed(first), "layers.1.site": Fixed(second)})
    x = torch.randn(rows, 2, 4, 4)
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(bound)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    rest = 2 * (2 * 3 + 3 * 5 + 5 * 4)  # saliencies and the head
    pairs = 2 * first.sum(1) + first.sum(1) * second.sum(1)
    assert trace.flops.tolist() == (2 * 9 * 16 * pairs + rest).long().tolist()
    assert expected_flops(trace).tolist() == trace.flops.tolist()


def test_soft_values_weigh_channels_alike_in_both_forms() -> None:
    made = pliant.bind(layer(boost=False), {"*": rules.Sigmoid()})
    x = torch.randn(3, IN, 6, 5)
    torch.testing.assert_close(made(x).maps, pliant.masked(made)(x).maps)


def test_density_is_rounded_up_and_saliencies_are_penalised() -> None:
    model = fbs(4, 2, layers=[(5, 1)], density=0.5)
    y, trace = pliant.record(model)(torch.randn(3, 2, 4, 4))
    decision = trace["layers.0.site"][0]
    assert decision.value.sum(1).tolist() == [3.0, 3.0, 3.0]
    assert decision.scores is not None
    penalty = GateL1(of=scored)(y, trace, torch.zeros(3), 0.0)
    torch.testing.assert_close(penalty, decision.scores.abs().mean())
    penalty.backward()
    boost = model.layers[0].boost
    assert boost.linear.weight.grad.any()  # type: ignore[union-attr]


def test_other_convolutions_are_refused() -> None:
    site = Site(nn.Identity(), Density(0.5), shape=(4,))
    for conv in (
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
    ):
        with pytest.raises(pliant.PliantError, match="one group, no bias"):
            Channels(conv, nn.BatchNorm2d(4), site)
    with pytest.raises(pliant.PliantError, match="density in"):
        fbs(density=0.0)
