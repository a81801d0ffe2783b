"""Levels against a loop that anyone can read, quantisation against its formula, and what levels cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import Decision, PliantError, Site, Trace, rules
from pliant.cost import expected_flops
from pliant.execute import Levels, NormBank
from pliant.functional.levels import level, level_weights
from pliant.functional.quantize import quantize
from pliant.losses import LevelTarget
from pliant.systems.depth.dfs import bit_costs, dfs

STEPS = 3


def made(rule: rules.Rule | None = None) -> Levels:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))
    site = Site(nn.Linear(4, STEPS), rule or rules.Threshold(0.0), shape=(STEPS,))
    return Levels([None, nn.Linear(4, 4), nn.Linear(4, 4), wide], site).eval()


def loop(model: Levels, x: Tensor, value: Tensor) -> Tensor:
    """Each row goes from form to form as long as its steps are open, and runs the one where it stops."""
    answers = []
    for row, steps in zip(x, value.tolist(), strict=True):
        k = 0
        while k < STEPS and steps[k] != 0:
            k += 1
        answers.append(model.forms[k](row[None]))
    return torch.cat(answers) if answers else torch.zeros_like(x)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_forms_are_the_loop_and_bill_what_ran(data: Any) -> None:
    model, rows = made(), data.draw(st.sampled_from([0, 1, 2, 5]))
    flat = data.draw(st.lists(st.booleans(), min_size=rows * STEPS, max_size=rows * STEPS))
    value, x = torch.tensor(flat).reshape(rows, STEPS).float(), torch.randn(rows, 4)
    with torch.no_grad():
        y = model(x, given=value)
        torch.testing.assert_close(pliant.masked(model)(x, given=value), y)
        torch.testing.assert_close(y, loop(model, x, value))
        if rows == 0:
            return
        with FlopCounterMode(display=False) as counter:
            _, trace = pliant.record(model)(x, given=value)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    prices = torch.tensor([0, 2 * 16, 2 * 16, 2 * 2 * 28])
    assert trace.flops.tolist() == prices[level(value)].tolist()
    assert trace.dense_flops.tolist() == [112] * rows
    assert expected_flops(trace).tolist() == trace.flops.tolist()


def test_weights_are_the_chance_of_stopping_at_each_level() -> None:
    p = torch.rand(6, STEPS, dtype=torch.float64)
    drawn = (torch.rand(20_000, 6, STEPS, dtype=torch.float64) < p).double()
    shares = torch.stack([(level(drawn.flatten(0, 1)).view(-1, 6) == k).double().mean(0) for k in range(STEPS + 1)], 1)
    assert (shares - level_weights(p)).abs().max() < 0.02
    torch.testing.assert_close(level_weights(p).sum(1), torch.ones(6, dtype=torch.float64))


def test_soft_values_mix_all_forms_alike_in_both_forms() -> None:
    model, x = made(rules.Sigmoid()), torch.randn(3, 4)
    torch.testing.assert_close(model(x), pliant.masked(model)(x))
    weights = level_weights(model.site.scorer(x).sigmoid())
    wanted = sum(weights[:, k, None] * form(x) for k, form in enumerate(model.forms))
    torch.testing.assert_close(model(x), wanted)


def test_quantisation_is_rounding_on_the_range_and_passes_the_gradient() -> None:
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    q = quantize(x, 3, rows=True)
    for row, found in zip(x.detach(), q.detach(), strict=True):
        step = (row.max() - row.min()) / 7
        torch.testing.assert_close(found, row.min() + step * ((row - row.min()) / step).round())
    q.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert (quantize(x, 16) - x).abs().max() < (quantize(x, 4) - x).abs().max() / 1000
    assert torch.equal(quantize(torch.ones(2, 3), 8), torch.ones(2, 3))
    assert quantize(torch.zeros(0, 3), 8, rows=True).shape == (0, 3)
    torch.testing.assert_close(quantize(x[:1], 3, rows=True), q[:1])


def test_a_bank_has_a_norm_for_each_visit() -> None:
    bank = NormBank(nn.BatchNorm1d(2), 2).train()
    bank.at(0)(torch.randn(8, 2) + 5)
    assert bank.at(0).running_mean.mean() > 0.3
    assert not bank.at(1).running_mean.any()
    with pytest.raises(PliantError, match="0 norms"):
        NormBank(nn.BatchNorm1d(2), 0)


def test_more_bits_say_more_nearly_what_the_full_block_says() -> None:
    torch.manual_seed(0)
    model = dfs(4, depth=8, widths=(4, 8, 8), bits=(2, 8, 16)).eval()
    block, x = model.blocks.blocks[1], torch.rand(4, 4, 8, 8)
    with torch.no_grad():
        full = block.forms[-1](x)
        apart = [float((form(x) - full).abs().mean()) for form in list(block.forms)[1:-1]]
    assert apart[0] > apart[1] > apart[2]
    names = dict(model.named_parameters())
    assert sum("branch.0.weight" in name for name in names) == 3  # each block's convolutions once, whatever its forms


def test_the_target_pulls_to_both_sides() -> None:
    costs = bit_costs()
    assert costs == pytest.approx([0, 1 / 16, 25 / 256, 9 / 64, 49 / 256, 1 / 4, 1])
    soft = torch.full((2, 6), 0.5, requires_grad=True)
    for value, sign in ((torch.ones(2, 6), 1), (torch.zeros(2, 6), -1)):
        trace = Trace({"a": (Decision(value, soft=soft),)}, (), (), 2)
        term = LevelTarget(costs, 0.5)(torch.zeros(2, 4), trace, torch.zeros(2), 0.0)
        (grad,) = torch.autograd.grad(term, soft)
        assert (grad * sign > 0).all()


def test_what_is_refused() -> None:
    trace = Trace({"a": (Decision(torch.ones(2)),)}, (), (), 2)
    for call, message in (
        (lambda: Levels([None], Site(nn.Identity(), rules.Always(), shape=(0,))), "1 forms"),
        (lambda: Levels([None, None], Site(nn.Identity(), rules.Always())), r"shape \(K,\)"),
        (lambda: LevelTarget((0, 1), 2.0), r"within \[0, 1\]"),
        (lambda: LevelTarget((0, 1), 0.5)(torch.zeros(2), trace, torch.zeros(2), 0.0), "levels of 2 forms"),
        (lambda: dfs(bits=(16, 8)), "rising"),
    ):
        with pytest.raises(PliantError, match=message):
            call()
