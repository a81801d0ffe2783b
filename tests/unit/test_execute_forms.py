"""Executors: construction, what runs and what doesn't, answers of exits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from nets import WIDTH, built, confidence, force, gate, head, layer
from pliant import PliantError, rules, scores
from pliant.execute import Exits, MostConfident, Residual, Skip, rows


class Counted(nn.Module):
    """Remembers how many rows it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize(("stages", "heads", "sites"), [(0, 0, 0), (2, 1, 1), (2, 2, 2), (3, 3, 1)])
def test_exits_refuse_lists_that_do_not_fit(stages: int, heads: int, sites: int) -> None:
    with pytest.raises(PliantError, match=f"got {stages} stages, {heads} heads and {sites} sites"):
        Exits([layer()] * stages, [head()] * heads, [confidence()] * sites)


def test_one_exit_is_a_static_network() -> None:
    model = Exits([layer()], [head()], []).eval()
    x = torch.randn(3, WIDTH)
    y, trace = pliant.record(model)(x)
    assert torch.equal(y, pliant.plain(model)(x))
    assert len(trace) == 0
    assert len(trace.exits) == 1


def test_skipped_means_not_executed() -> None:
    values = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    x = torch.randn(5, WIDTH)
    models = [
        Skip(Counted(layer()), gate()),
        Skip(Counted(layer()), gate(), otherwise=Counted(layer())),
        Residual(Counted(layer()), gate()),
    ]
    for model in models:
        model.eval()
    for model, name, never in ((models[0], "block", []), (models[2], "branch", [])):
        forced, none = force(model, {"site": values}, 5), pliant.bind(model, {"*": rules.Never()})
        forced(x)
        none(x)
        assert getattr(forced, name).rows == [2]
        assert getattr(none, name).rows == never
    forced = force(models[1], {"site": values}, 5)
    forced(x)
    assert (forced.block.rows, forced.otherwise.rows) == ([2], [3])


def test_a_scorer_that_is_not_read_is_not_run() -> None:
    model = Skip(layer(), pliant.Site(Counted(scores.LinearGate(WIDTH)), rules.Threshold(0.0))).eval()
    x = torch.randn(3, WIDTH)
    for rule in (rules.Always(), rules.Never(), rules.Random(0.5)):
        bound = pliant.bind(model, {"*": rule})
        bound(x)
        assert bound.site.scorer.rows == []
    model(x)
    assert model.site.scorer.rows == [3]


def test_rows_that_left_never_run_later_stages() -> None:
    model = Exits([Counted(layer()) for _ in range(3)], [head() for _ in range(3)], [confidence(), confidence()]).eval()
    forced = force(model, {"sites.0": [1, 0, 1, 1], "sites.1": [0, 1, 0, 1]}, 4)
    forced(torch.randn(4, WIDTH))
    assert [stage.rows for stage in forced.stages] == [[4], [3], [1]]
    early = pliant.bind(model, {"*": rules.Never()})
    early(torch.randn(4, WIDTH))
    assert [stage.rows for stage in early.stages] == [[4], [], []]


def test_stages_may_hand_on_trees() -> None:
    class Pair(nn.Module):
        def forward(self, x: Any) -> Any:
            a, b = x if isinstance(x, tuple) else (x, {"twice": 2 * x})
            return a + 1, {"twice": b["twice"] * 2}

    class Last(nn.Module):
        def forward(self, x: Any) -> Tensor:
            return torch.stack([x[0].sum(1), x[1]["twice"].sum(1)], 1)

    model = Exits([Pair(), Pair()], [Last(), Last()], [confidence()]).eval()
    x = torch.randn(4, 3)
    forced = force(model, {"sites.0": [1, 0, 0, 1]}, 4)
    torch.testing.assert_close(pliant.gathered(forced)(x), pliant.masked(forced)(x))


def test_whoever_no_exit_was_sure_of_takes_the_surest_answer() -> None:
    model = built("surest_exit")
    x = torch.randn(50, WIDTH)
    y, trace = pliant.record(pliant.masked(pliant.bind(model, {"*": rules.Always()})))(x)
    doubts = torch.stack([scores.MaxProbability()(e.logits) for e in trace.exits])
    logits = torch.stack([e.logits for e in trace.exits])
    assert torch.equal(y, logits[doubts.argmin(0), torch.arange(50)])
    early = pliant.bind(model, {"*": rules.Never()})(x)
    assert torch.equal(early, trace.exits[0].logits)
    assert isinstance(model, Exits)
    assert isinstance(model.answer, MostConfident)


def test_a_nan_never_makes_an_exit_the_surest() -> None:
    answer = MostConfident(scores.MaxProbability())
    exits = torch.tensor([[float("nan"), 0.0], [1.0, 0.0], [2.0, 0.0]])
    memory = None
    for logits in exits[:2]:
        _, memory = answer.step(logits[None], memory)
    assert answer.last(exits[2:], memory).tolist() == [[2.0, 0.0]]
    assert answer.last(exits[:1], None).isnan().any()  # nothing else to choose


@pytest.mark.parametrize("index", [[2], [1, 2, 3], [0, 1], [1, 3], [3, 2], [1, 1], []])
def test_rows_side_by_side_are_chosen_as_views_and_all_others_copied(index: list[int]) -> None:
    x, chosen = torch.arange(8.0).reshape(4, 2), torch.tensor(index, dtype=torch.int64)
    found, none = rows.select([x, None], chosen)
    assert none is None
    assert torch.equal(found, x[chosen])
    shares = found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shares == (index in ([2], [1, 2, 3], [0, 1]))


@pytest.mark.parametrize("form", [pliant.gathered, pliant.masked])
def test_one_row_alone_with_a_nan_value_spends(form: Any) -> None:
    model = form(pliant.bind(built("exits"), {"*": rules.Threshold(0.0)}))
    x = torch.full((1, WIDTH), float("nan"))
    assert len(pliant.record(model)(x)[1].exits) == 3


def test_gradients_reach_the_gate_through_masked_and_gathered() -> None:
    for name in ("skip", "residual"):
        model = pliant.bind(built(name), {"*": pliant.estimators.StraightThrough(rules.Threshold(-12.0))}).train()
        grads = []
        for form in (pliant.masked, pliant.gathered):
            loss = form(model)(torch.ones(3, WIDTH)).sum()
            weights = [site.scorer.linear.weight for site in pliant.sites(model).values()]
            grads.append(torch.autograd.grad(loss, weights))
        for a, b in zip(*grads, strict=True):  # every row spends, so both forms see every gate's gradient
            assert a.any()
            torch.testing.assert_close(a, b)


def test_training_computes_everything_and_evaluation_what_was_chosen() -> None:
    model = pliant.bind(built("exits"), {"*": rules.Never()})
    x = torch.randn(3, WIDTH)
    assert len(pliant.record(model.train())(x)[1].exits) == 3
    assert len(pliant.record(model.eval())(x)[1].exits) == 1
