"""Forced columns of a plan: in value, soft value and log-probability, with any rule for the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pliant
from pliant import PliantError, estimators
from pliant.rules import Forced, Sigmoid, Threshold
from pliant.train import PlanCurriculum


@given(st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=6), st.sampled_from([0, 1, 3]))
def test_free_columns_are_the_rules_and_forced_ones_the_masks(mask: list[int | None], rows: int) -> None:
    scores = torch.linspace(-2, 2, rows * len(mask)).reshape(rows, len(mask))
    torch.manual_seed(0)
    wanted = estimators.ScoreFunction(Threshold(0.0)).train()(scores)
    torch.manual_seed(0)
    got = Forced(estimators.ScoreFunction(Threshold(0.0)), mask).train()(scores)
    for k, m in enumerate(mask):
        assert wanted.soft is not None and wanted.log_prob is not None  # noqa: PT018
        assert got.soft is not None and got.log_prob is not None  # noqa: PT018
        assert torch.equal(got.value[:, k], wanted.value[:, k] if m is None else torch.full((rows,), float(m)))
        assert torch.equal(got.soft[:, k], wanted.soft[:, k] if m is None else torch.full((rows,), float(m)))
        assert torch.equal(got.log_prob[:, k], wanted.log_prob[:, k] if m is None else torch.zeros(rows))


def test_a_soft_rule_stays_a_weight() -> None:
    out = Forced(Sigmoid(), (None, 0))(torch.zeros(2, 2))
    assert out.soft is out.value
    assert out.value.tolist() == [[0.5, 0.0]] * 2


def test_a_plan_is_freed_from_its_tail() -> None:
    torch.manual_seed(0)
    model = pliant.create_model("policy_network", depth=14, view=8).eval()
    x = torch.randn(4, 3, 16, 16)
    rule = Threshold(float("inf"))  # what is free is skipped
    for epoch, on in enumerate((5, 4, 3)):
        freed = PlanCurriculum("site", 6, rule)(epoch)
        plan = pliant.record(pliant.bind(model, freed))(x)[1].dense("site")
        assert plan.tolist() == [[1.0] * on + [0.0] * (6 - on)] * 4
    head = PlanCurriculum("site", 3, rule, order="head", first=0, step=2)
    assert [head(epoch)["site"].extra_repr() for epoch in range(3)] == ["mask=111", "mask=??1", "mask=???"]  # pyright: ignore


def test_mistakes_are_told() -> None:
    with pytest.raises(PliantError, match="the mask"):
        Forced(Threshold(0.0), (2,))
    with pytest.raises(PliantError, match="3 columns"):
        Forced(Threshold(0.0), (1, None, None))(torch.zeros(1, 2))
    with pytest.raises(PliantError, match="curriculum"):
        PlanCurriculum("site", 3, Threshold(0.0), step=0)
