"""Calibration of every exit: the figures against their definitions, and what the report shows of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from pliant import PliantError
from pliant.insight.calibration import calibration, calibrations
from pliant.insight.evaluation import Evaluation, Point, exits_at
from pliant.insight.report import write_report
from pliant.tune import calibration_error


def made(rows: int = 200, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, rows, classes, generator=g)
    return logits, torch.randint(classes, (rows,), generator=g)


def evaluation(**changes) -> Evaluation:
    logits, labels = made()
    p = logits.softmax(-1)
    found = Evaluation(
        1 - p[:1].amax(-1), p.argmax(-1), labels, torch.tensor([10, 30]), 30, ("a", "b", "c"), probabilities=p
    )
    return replace(found, **changes)


def test_figures_are_those_of_their_definitions():
    logits, labels = made()
    p = logits[0].double().softmax(-1)
    found = calibration(p, labels)
    one_hot = torch.nn.functional.one_hot(labels, 3)
    assert found.ece == pytest.approx(calibration_error(logits[0], labels), abs=1e-12)
    assert found.brier == pytest.approx((p - one_hot).square().sum(1).mean().item(), abs=1e-12)
    assert found.nll == pytest.approx(torch.nn.functional.cross_entropy(logits[0].double(), labels).item(), abs=1e-12)
    doubt, wrong = 1 - p.amax(1), p.argmax(1) != labels
    pairs = doubt[wrong][:, None] - doubt[~wrong]
    assert found.auroc == pytest.approx(((pairs > 0).double() + (pairs == 0) / 2).mean().item(), abs=1e-12)
    ordered = wrong[doubt.argsort()].double()
    risks = [ordered[:n].mean().item() for n in range(1, len(labels) + 1)]
    assert found.aurc == pytest.approx(sum(risks) / len(risks), abs=1e-12)
    assert sum(b.rows for b in found.bins) == found.rows == 200
    assert len(found.bins) == 15


def test_order_of_rows_and_of_ties_does_not_matter():
    p = torch.tensor([[0.7, 0.3]] * 6 + [[0.9, 0.1]] * 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    one, other = calibration(p, labels), calibration(p[order], labels[order])
    for name in ("ece", "brier", "nll", "auroc", "aurc"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12), name


def test_exits_are_judged_on_the_rows_that_reach_them():
    e = evaluation()
    exits = exits_at(e, [0.3])
    first, last = calibrations(e.probabilities, e.labels, exits)
    assert first.rows == 200
    assert last == calibration(e.probabilities[1][exits == 1], e.labels[exits == 1])
    nobody = calibrations(e.probabilities, e.labels, torch.zeros_like(exits))[1]
    assert nobody.rows == 0
    assert math.isnan(nobody.ece)


def test_what_is_not_a_probability_is_refused():
    logits, labels = made()
    with pytest.raises(PliantError, match="softmax"):
        calibration(logits[0], labels)
    with pytest.raises(PliantError, match="shape"):
        calibration(logits[0].softmax(-1), labels[:5])
    with pytest.raises(PliantError, match="probabilities of shape"):
        evaluation(probabilities=torch.zeros(2, 200, 4))


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_the_page_carries_the_figures_of_the_opening_point(tmp_path):
    e = evaluation()
    path = write_report(tmp_path / "a.html", e, [Point("half", 0.5, (0.3,))], curve=[[1.0], [0.0]], title="T")
    found = data_of(path)["calibration"]
    expected = calibrations(e.probabilities, e.labels, exits_at(e, [0.3]))
    assert [c["ece"] for c in found] == [c.ece for c in expected]
    assert [b[0] for b in found[1]["bins"]] == [b.rows for b in expected[1].bins]
    assert all(v is None for b in found[1]["bins"] if b[0] == 0 for v in b[1:])


def test_a_page_without_probabilities_has_no_calibration_and_exits_that_nobody_reaches_are_told(tmp_path):
    plain = write_report(tmp_path / "a.html", evaluation(probabilities=None), [], curve=[[0.5]], title="T")
    assert "calibration" not in data_of(plain)
    empty = write_report(tmp_path / "b.html", evaluation(), [], curve=[[2.0]], title="T")
    assert data_of(empty)["calibration"][1]["rows"] == 0
    assert data_of(empty)["calibration"][1]["ece"] is None
