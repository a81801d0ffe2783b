"""The guard: outliers go on in both forms, and tuning sees them so."""

from __future__ import annotations

import pytest
import torch
from test_tune import chain

import pliant
from pliant import PliantError
from pliant.scores import MaxProbability
from pliant.scores.guard import Guarded, LogitDistance
from pliant.tune import collect, tune


def test_outliers_run_to_full_depth_in_both_forms_and_tuning_keeps_them_out():
    model, data = chain()
    held = collect(model, data)
    guards = {
        path: (
            Guarded(MaxProbability(), LogitDistance(4).fit(held.logits[k], held.labels, keep=0.8)),
            pliant.rules.Threshold(1.0),
        )
        for k, path in enumerate(held.sites)
    }
    guarded = pliant.bind(model, guards)
    x = torch.cat([data[0][0], 50 * data[0][0]])
    y, trace = pliant.record(pliant.masked(guarded))(x)
    assert torch.allclose(pliant.gathered(guarded)(x), y, atol=1e-4)
    assert (trace.dense("sites.0")[40:] == 1).all()
    assert (trace.dense("sites.0")[:40] == 0).any()
    for budget in (0.9, 0.8):
        point = tune(guarded, data, budget=budget)
        assert all(t == t for t in point.thresholds.values())
        flops = torch.cat([pliant.record(guarded)(x)[1].flops for x, _ in data])
        assert flops.double().mean().item() == pytest.approx(point.flops)


def test_a_guard_that_cannot_be_fitted_says_why():
    with pytest.raises(PliantError, match="every class"):
        LogitDistance(3).fit(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
