"""Solvers against known optima, guarantees of risk, the spread of costs, and the order in which rows come."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_tune import chain, held_out

import pliant
from pliant import PliantError
from pliant.tune import HeldOut, OperatingPoint, controlled, fit_temperature, geometric, lagrangian, lost, spread, tune
from pliant.tune.risk import grid_of_doubt, p_value


def optimum(held: HeldOut, budget: float, points: int = 20) -> float:
    """The best accuracy within the budget over all of ``points`` thresholds per exit."""
    grids = [
        torch.cat([torch.quantile(s, torch.linspace(0, 1, points - 1)), torch.tensor([float("-inf")])])
        for s in held.scores
    ]
    every = torch.tensor(list(itertools.product(*(g.tolist() for g in grids))))
    left = torch.ones(len(every), held.scores.shape[1])
    accuracy, cost = torch.zeros(len(every)).double(), torch.zeros(len(every)).double()
    for k in range(len(held.flops)):
        leaves = left * (held.scores[k] <= every[:, k : k + 1]) if k < len(held.sites) else left
        accuracy += (leaves * held.correct[k]).mean(1).double()
        cost += leaves.mean(1).double() * held.flops[k]
        left = left - leaves
    return float(accuracy[cost <= budget].max())


@pytest.mark.parametrize("budget", [35.0, 50.0, 70.0])
def test_lagrangian_is_near_the_optimum_of_eight_thousand_and_never_worse_than_geometric(budget):
    held = held_out(500, 4)
    accuracy, cost = held.evaluate(lagrangian(held, budget))
    assert cost <= budget
    assert accuracy >= held.evaluate(geometric(held, budget))[0]
    assert accuracy >= optimum(held, budget) - 0.002


def test_shuffling_changes_no_threshold_and_ties_leave_together():
    held = held_out(300, 4)
    held = replace(held, scores=(held.scores * 20).round() / 20)  # many ties
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    other = HeldOut(held.sites, held.logits[:, order], held.scores[:, order], held.labels[order], held.flops)
    for solve in (lambda h: lagrangian(h, 50.0), lambda h: controlled(h, 0.1)):
        assert torch.equal(solve(held), solve(other))


def test_rows_whose_scores_are_nan_never_leave_early():
    held = held_out(200, 3)
    held.scores[:, :20] = float("nan")
    thresholds = lagrangian(held, 60.0)
    assert (held.leaves(thresholds)[:20] == 2).all()
    assert held.evaluate(thresholds)[1] <= 60


def test_the_p_value_is_the_binomial_one_or_better_and_falls_with_the_risk():
    values = [p_value(r, 200, 0.1) for r in (0.0, 0.02, 0.05, 0.08, 0.1, 0.2)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert values[0] == pytest.approx(0.9**200)


def test_the_risk_is_kept_in_all_but_a_share_of_draws_and_the_empirical_one_alone_would_not():
    """300 draws of held-out rows from one population: the true risk exceeds epsilon in at most delta of them."""
    everything = held_out(20_000, 4, seed=3)
    g = torch.Generator().manual_seed(0)
    exceeded, cheap = 0, []
    for _ in range(60):
        rows = torch.randint(20_000, (400,), generator=g)
        held = HeldOut(
            everything.sites,
            everything.logits[:, rows],
            everything.scores[:, rows],
            everything.labels[rows],
            everything.flops,
        )
        thresholds = controlled(held, 0.1, delta=0.1)
        exceeded += lost(everything, everything.leaves(thresholds)).mean().item() > 0.1
        cheap.append(everything.evaluate(thresholds)[1])
    assert exceeded <= 12  # 6 expected at most; above 12 has a probability of 1 %
    assert max(cheap) < 100


def test_a_user_loss_and_a_grid_of_its_own():
    held = held_out()
    never = controlled(held, 0.1, loss=lambda h, exits: torch.ones(len(exits)))
    assert (never == float("-inf")).all()
    always = controlled(held, 0.1, loss=lambda h, exits: torch.zeros(len(exits)), grid=[0.1, 0.7])
    assert (always == torch.tensor(0.7)).all()
    assert grid_of_doubt() == sorted(grid_of_doubt())
    for wrong in (
        lambda: controlled(held, 0.0), lambda: controlled(held, 0.1, delta=1.0), lambda: controlled(held, 0.1, grid=[1, 0]),
        lambda: controlled(held, 0.1, loss=lambda h, exits: 2 * torch.ones(len(exits))),
    ):  # fmt: skip
        with pytest.raises(PliantError):
            wrong()


def test_tune_with_delta_controls_the_risk_leaves_temperatures_and_is_told_in_the_point():
    model, data = chain()
    point = tune(model, data, risk=0.2, delta=0.1)
    assert (point.solver, point.delta, point.temperatures) == ("controlled", 0.1, {})
    assert OperatingPoint.from_dict(point.to_dict()) == point
    for wrong in ({"budget": 0.5, "delta": 0.1}, {"risk": 0.1, "delta": 0.0}):
        with pytest.raises(PliantError, match="delta"):
            tune(model, data, **wrong)


def test_the_point_tells_the_spread_of_costs_as_really_run():
    model, data = chain()
    point = tune(model, data, budget=0.8)
    flops = torch.cat([pliant.record(model)(x)[1].flops for x, _ in data])
    assert point.spread == spread(flops)
    assert point.spread["p50"] <= point.spread["p95"] <= point.spread["max"] <= point.dense_flops


def test_what_says_it_is_the_test_set_is_refused():
    model, data = chain()

    class Loader(list):
        """Batches that know their data set."""

    for dataset in (
        SimpleNamespace(train=False),
        SimpleNamespace(split="test"),
        SimpleNamespace(dataset=SimpleNamespace(train=False)),
    ):
        loader = Loader(data)
        loader.dataset = dataset
        with pytest.raises(PliantError, match="test set"):
            tune(model, loader, budget=0.9)
    loader.dataset = SimpleNamespace(train=True, split="val")
    tune(model, loader, budget=0.9)


def test_tune_fits_each_temperature_on_the_rows_that_reach_its_exit():
    model, data = chain()
    seen = []

    def fit(logits, labels):
        seen.append(len(labels))
        return fit_temperature(logits, labels)

    tune(model, data, budget=0.8, solver=geometric, temperature=fit)
    assert len(seen) == 4  # two exits, two turns
    assert seen[0] == seen[2] == 64
    assert seen[1] < 64
