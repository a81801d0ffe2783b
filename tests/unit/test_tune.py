"""Thresholds, temperatures and the operating point."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import pliant
from pliant.tune import HeldOut, OperatingPoint, calibration_error, collect, fit_temperature, geometric, search, tune
from pliant.tune.solvers import cheapest, geometric_shares, thresholds_for_shares


def held_out(rows: int = 400, exits: int = 4, seed: int = 0) -> HeldOut:
    """A made chain whose later exits are better and whose scores tell right from wrong, imperfectly."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (rows,), generator=g)
    difficulty = torch.rand(rows, generator=g)
    logits = torch.randn(exits, rows, 5, generator=g)
    strength = 4 * (torch.arange(1, exits + 1)[:, None] / exits - difficulty + 0.5)
    logits.scatter_add_(2, labels.expand(exits, rows)[..., None], strength[..., None])
    scores = torch.stack([pliant.scores.MaxProbability()(z) for z in logits[:-1]])
    return HeldOut(
        tuple(f"sites.{k}" for k in range(exits - 1)), logits, scores, labels, torch.tensor([20, 45, 70, 100][:exits])
    )


@pytest.mark.parametrize("solver", [geometric, search])
@pytest.mark.parametrize("budget", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_solvers_keep_the_budget_and_spend_it(solver, budget):
    held = held_out()
    _, cost = held.evaluate(solver(held, 100 * budget))
    assert 100 * budget - 3 <= cost <= 100 * budget


@pytest.mark.parametrize("seed", range(4))
def test_search_is_never_worse_than_geometric_and_near_the_optimum(seed):
    held = held_out(200, 3, seed)
    budget = 50.0
    grid = [[*torch.quantile(s, torch.linspace(0, 1, 40)).tolist(), float("-inf")] for s in held.scores]
    best = max(
        acc for pair in itertools.product(*grid) if (acc_cost := held.evaluate(torch.tensor(pair)))[1] <= budget
        for acc in acc_cost[:1]
    )  # fmt: skip
    found = held.evaluate(search(held, budget))[0]
    assert found >= held.evaluate(geometric(held, budget))[0]
    assert found >= best - 0.0075


def test_shuffling_the_rows_changes_no_threshold():
    held = held_out()
    order = torch.randperm(len(held.labels), generator=torch.Generator().manual_seed(1))
    other = HeldOut(held.sites, held.logits[:, order], held.scores[:, order], held.labels[order], held.flops)
    for solver in (geometric, search):
        assert torch.equal(solver(held, 50.0), solver(other, 50.0))


def test_ties_leave_together():
    held = held_out(10, 2)
    tied = HeldOut(held.sites, held.logits, torch.full_like(held.scores, 0.5), held.labels, held.flops)
    leaves = tied.leaves(thresholds_for_shares(tied, geometric_shares(2, 1.0)))
    assert leaves.unique().numel() == 1


def test_unreachable_budget_names_the_range():
    held = held_out()
    with pytest.raises(pliant.PliantError, match=r"20.*20\.0%.*100"):
        geometric(held, 10.0)
    with pytest.raises(pliant.PliantError, match="first exit"):
        search(held, 101.0)


def test_cheapest_keeps_the_risk():
    held = held_out()
    dense = held.correct[-1].double().mean().item()
    accuracy, cost = held.evaluate(cheapest(held, 0.02))
    assert accuracy >= dense - 0.02
    assert cost < 100
    assert held.evaluate(cheapest(held, 1.0))[1] == pytest.approx(20, abs=1)


def test_temperature_undoes_a_scale_and_keeps_the_answer():
    held = held_out()
    z, y = held.logits[1], held.labels
    assert fit_temperature(3 * z, y) == pytest.approx(3 * fit_temperature(z, y), rel=0.02)
    assert calibration_error(10 * z / fit_temperature(10 * z, y), y) < calibration_error(10 * z, y) / 2
    assert fit_temperature(z[:0], y[:0]) == 1.0
    with pytest.raises(pliant.PliantError, match="finite"):
        fit_temperature(z * float("nan"), y)


def chain() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4)
    x = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model.eval(), [(x[:40], torch.randint(4, (40,))), (x[40:], torch.randint(4, (24,)))]


def test_tune_sets_a_chain_and_the_run_costs_what_the_point_says():
    model, data = chain()
    point = tune(model, data, budget=0.8)
    x = torch.cat([x for x, _ in data])
    _, trace = pliant.record(model)(x)
    assert point.share <= 0.8
    assert trace.flops.double().mean().item() == pytest.approx(point.flops)
    assert model.operating_point is point
    assert OperatingPoint.from_dict(point.to_dict()) == point


def test_collect_prices_every_exit_as_executed():
    model, data = chain()
    held = collect(model, data)
    dense = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(data[0][0])[1].flops[0]
    assert held.flops[-1] == dense
    assert (held.flops.diff() > 0).all()


def gated() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)

    def skip() -> nn.Module:
        gate = pliant.scores.LinearGate(8)
        nn.init.normal_(gate.linear.weight)
        return pliant.execute.Skip(nn.Linear(8, 8), pliant.Site(gate, pliant.rules.Threshold()))

    model = nn.Sequential(nn.Linear(6, 8), *(skip() for _ in range(4)), nn.Linear(8, 3))
    x = torch.randn(80, 6)
    return model.eval(), [(x, torch.randint(3, (80,)))]


def test_tune_turns_one_dial_for_gates():
    model, data = gated()
    before = [s.rule.threshold.clone() for s in pliant.sites(model).values()]
    for budget in (0.6, 0.8):
        point = tune(model, data, budget=budget)
        _, trace = pliant.record(model)(data[0][0])
        assert trace.flops.double().mean().item() == pytest.approx(point.flops)
        assert budget - 0.1 <= point.share <= budget
    assert any(not torch.equal(a, s.rule.threshold) for a, s in zip(before, pliant.sites(model).values(), strict=True))
    risk = tune(model, data, risk=0.0)
    assert risk.accuracy >= pliant.tune(model, data, budget=1.0).accuracy - 1e-9
    with pytest.raises(pliant.PliantError, match="between"):
        tune(model, data, budget=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "exactly one"),
        ({"budget": 0.5, "risk": 0.1}, "exactly one"),
        ({"budget": 1.5}, "share"),
        ({"risk": -0.1}, "accuracy loss"),
    ],
)
def test_tune_refuses_nonsense(arguments, said):
    model, data = chain()
    with pytest.raises(pliant.PliantError, match=said):
        tune(model, data, **arguments)


def test_tune_refuses_training_mode_no_data_no_sites_and_nan():
    model, data = chain()
    with pytest.raises(pliant.PliantError, match="evaluation mode"):
        tune(model.train(), data, budget=0.9)
    with pytest.raises(pliant.PliantError, match="0 batches"):
        tune(model.eval(), [], budget=0.9)
    with pytest.raises(pliant.PliantError, match="0 sites"):
        tune(nn.Linear(2, 2).eval(), data, budget=0.9)
    with pytest.raises(pliant.PliantError, match="NaN logits"):
        tune(model, [(data[0][0] * float("nan"), data[0][1])], budget=0.9)


def test_a_point_refuses_another_model():
    model, data = chain()
    point = tune(model, data, budget=0.9)
    with pytest.raises(pliant.PliantError, match=r"sites\.0"):
        point.apply(nn.Linear(2, 2))
    with pytest.raises(pliant.PliantError, match="fields"):
        OperatingPoint.from_dict({"threshold": 1})


class Wanting(nn.Module):
    """A gate that asks for its block above all where the block before it was left out."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] + 100 * (x[:, 1] != self.k)


class Marking(nn.Module):
    """A block that says in the second column that it ran."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.layer = k, nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), self.k + 1 - x[:, 1]], 1) + 0 * self.layer(x)


def test_one_dial_reads_scores_as_they_come_with_earlier_sites_turned() -> None:
    """Quantiles of the scores that come with everything on would run every second block, or none."""
    sites = [pliant.Site(Wanting(k), pliant.rules.Threshold(0.0)) for k in range(6)]
    model = nn.Sequential(*(pliant.execute.Residual(Marking(k), site) for k, site in enumerate(sites))).eval()
    x = torch.stack([torch.linspace(0, 1, 300), torch.zeros(300)], 1)[torch.randperm(300)]
    point = pliant.tune(model, [(x, torch.zeros(300, dtype=torch.long))], budget=0.4)
    assert 0.35 <= point.share <= 0.4
