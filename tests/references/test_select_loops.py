"""Selected elements against a loop over rows and elements that anyone can read; and the account of what ran."""

from __future__ import annotations

from collections.abc import Callable
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
from pliant.execute import Select
from pliant.losses import saliency_ranking
from pliant.scores import ElementSaliency

WIDTH, CLASSES, ELEMENTS = 3, 2, 4
FORMS: dict[str, Callable[[nn.Module], Any]] = {"masked": pliant.masked, "gathered": pliant.gathered}


class Counted(nn.Linear):
    """A layer that remembers on how many elements it ran; only for these tests."""

    def __init__(self) -> None:
        super().__init__(WIDTH, CLASSES)
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(len(x))
        return super().forward(x)


def net() -> Select:
    torch.manual_seed(0)
    return Select(Site(ElementSaliency(nn.Linear(WIDTH, CLASSES)), rules.TopK(2)), Counted()).eval()


def alone(model: Select, x: Tensor, value: Tensor) -> Tensor:
    """Every row by itself: the answers to its chosen elements, averaged by their values."""
    out = torch.zeros(len(x), CLASSES)
    for r in range(len(x)):
        total = 0.0
        for t in range(x.shape[1]):
            if value[r, t] > 0:
                out[r] += value[r, t] * model.network(x[r, t : t + 1])[0]
                total += float(value[r, t])
        if total > 0:
            out[r] /= total
    return out


@st.composite
def values(draw: st.DrawFn, levels: tuple[float, ...] = (0.0, 1.0)) -> Tensor:
    rows = draw(st.sampled_from([0, 1, 2, 5]))
    size = rows * ELEMENTS
    every = st.lists(st.sampled_from(levels), min_size=size, max_size=size)
    return torch.tensor(draw(st.one_of(every, st.just([0.0] * size), st.just([1.0] * size)))).reshape(rows, ELEMENTS)


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, ELEMENTS, WIDTH, generator=torch.Generator().manual_seed(1))


def forced(value: Tensor, weight: bool = False) -> Any:
    return pliant.bind(
        net(), {"*": rules.Given(Trace({"site": (Decision(value, weight=weight),)}, (), (), len(value)))}
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(value=values())
def test_chosen_elements_row_by_row(form: str, value: Tensor) -> None:
    x = inputs(len(value))
    want = alone(net(), x, value)
    torch.testing.assert_close(FORMS[form](forced(value))(x), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(FORMS[form](net())(x, given=value), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(value=values((0.0, 0.25, 1.0)))
def test_values_may_be_weights(form: str, value: Tensor) -> None:
    x = inputs(len(value))
    torch.testing.assert_close(FORMS[form](forced(value, True))(x), alone(net(), x, value), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(value=values())
def test_what_is_booked_is_what_ran(value: Tensor) -> None:
    x, model = inputs(len(value)), forced(value)
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(model)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert trace.flops.tolist() == (value.sum(1) * 2 * WIDTH * CLASSES).tolist()
    _, dense = pliant.record(pliant.masked(model))(x)
    assert expected_flops(trace).tolist() == expected_flops(dense).tolist() == trace.flops.tolist()


def test_only_chosen_elements_are_run_and_read() -> None:
    x, value = inputs(2), torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]])
    x[value == 0] = float("nan")
    for form, ran in (("gathered", 3), ("masked", 8)):
        model = FORMS[form](forced(value))
        assert model(x).isfinite().all()
        assert model.network.ran == [ran]


def test_the_number_kept_is_free_after_training() -> None:
    x, model = inputs(5), net()
    scores = model.site.scorer(x)
    for k in range(1, ELEMENTS + 1):
        best = torch.zeros(5, ELEMENTS).scatter(1, scores.topk(k, 1).indices, 1.0)
        got = pliant.bind(model, {"*": rules.TopK(k)})(x)
        torch.testing.assert_close(got, alone(model, x, best), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, pliant.plain(model)(x))


def test_ranking_of_saliencies_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    saliency, worth = torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator).round(decimals=1)
    found = [
        max(0.0, float(saliency[r, j] - saliency[r, i]) + 0.1)
        for r in range(3) for i in range(5) for j in range(5) if worth[r, i] > worth[r, j]
    ]  # fmt: skip
    assert abs(float(saliency_ranking(saliency, worth, margin=0.1)) - sum(found) / len(found)) < 1e-6
    assert float(saliency_ranking(saliency, torch.ones(3, 5))) == 0


def test_a_row_needs_elements() -> None:
    with pytest.raises(PliantError, match=r"an input of shape \(2, 3\); expected rows of elements"):
        net()(torch.zeros(2, 3))
