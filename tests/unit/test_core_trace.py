"""record, Trace, Given, and what they refuse."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import pliant
from nets import WIDTH, built, force, trace_of
from pliant import Decision, PliantError, Site, Trace, rules, scores
from pliant.execute import Skip


def test_a_trace_is_a_mapping_of_visits() -> None:
    model = force(built("exits"), {"sites.0": [1, 0, 1], "sites.1": [0, 1, 1]}, 3)
    y, trace = pliant.record(model)(torch.randn(3, WIDTH))
    assert (list(trace), len(trace), "sites.0" in trace, "sites.9" in trace) == (["sites.0", "sites.1"], 2, True, False)
    assert trace["sites.1"][0].rows.tolist() == [0, 2]
    assert trace.dense("sites.1").tolist() == [0, 0, 1]  # row 1 never came there
    assert [None if e.rows is None else e.rows.tolist() for e in trace.exits] == [None, [0, 2], [2]]
    assert torch.equal(trace.exits[2].logits[0], y[2])


def test_masked_notes_whose_work_it_really_is() -> None:
    model = force(built("exits"), {"sites.0": [1, 0, 1], "sites.1": [0, 1, 1]}, 3)
    _, trace = pliant.record(pliant.masked(model))(torch.randn(3, WIDTH))
    assert trace["sites.1"][0].rows is None
    assert trace["sites.1"][0].reached.tolist() == [True, False, True]
    assert len(trace.exits) == 3
    assert all(len(e.logits) == 3 for e in trace.exits)


def test_a_trace_is_put_together_when_read_and_holds_on_to_no_model() -> None:
    model = built("exits")
    x = torch.randn(3, WIDTH)
    gone = weakref.ref(model)
    with torch.no_grad():
        _, trace = pliant.record(model)(x)
        _, kept = pliant.record(model)(x)
    twin = pickle.loads(pickle.dumps(replace(kept, accounts=None)))
    assert [d.value.tolist() for v in twin.visits.values() for d in v] == [
        d.value.tolist() for v in kept.visits.values() for d in v
    ]
    assert (list(trace), list(copy.deepcopy(trace))) == (list(kept), list(kept))
    with pytest.raises(AttributeError, match="'sites'"):
        _ = trace.sites  # pyright: ignore[reportAttributeAccessIssue]
    trace = replace(trace, accounts=None)  # the accounts price the model's parts when asked
    kept = replace(kept, accounts=None)
    del model
    gc.collect()
    assert gone() is None


def test_a_trace_of_a_model_taken_apart_says_so() -> None:
    model = nn.Sequential(built("exits"))
    _, trace = pliant.record(model)(torch.randn(3, WIDTH))
    model[0] = nn.Identity()
    with pytest.raises(PliantError, match="a trace of sites that are no longer in the model"):
        list(trace)


def test_a_missing_site_is_named() -> None:
    _, trace = pliant.record(built("exits"))(torch.randn(2, WIDTH))
    with pytest.raises(PliantError, match=r"at site 'nope': got no visit of 'nope'; expected one of 'sites.0'"):
        trace["nope"]
    with pytest.raises(PliantError, match="nothing was decided"):
        Trace({}, (), (), 1)["nope"]


def test_a_trace_without_prices_says_so() -> None:
    with pytest.raises(PliantError, match="a trace without prices"):
        _ = trace_of({"a": [1.0]}, 1).flops
    with pytest.raises(PliantError, match="a trace without prices"):
        _ = trace_of({"a": [1.0]}, 1).dense_flops
    with pytest.raises(PliantError, match="a trace without prices"):
        pliant.cost.expected_flops(trace_of({"a": [1.0]}, 1))


def test_record_needs_a_batch() -> None:
    class Constant(nn.Module):
        def forward(self, n: int) -> int:
            return n

    with pytest.raises(PliantError, match="a call without tensors"):
        pliant.record(Constant())(3)


def test_given_refuses_another_batch() -> None:
    model = built("exits")
    _, trace = pliant.record(model)(torch.randn(3, WIDTH))
    with pytest.raises(PliantError, match=r"at site 'sites.0': got 4 rows in flight; expected the 3"):
        pliant.bind(model, {"*": rules.Given(trace)})(torch.randn(4, WIDTH))


def test_given_values_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(PliantError, match="a decision for 2 rows; expected one for each of the 3"):
        built("skip")[1](torch.randn(3, WIDTH), given=torch.ones(2))


def test_given_refuses_a_looped_site() -> None:
    block = Skip(nn.Linear(WIDTH, WIDTH), Site(scores.LinearGate(WIDTH), rules.Threshold(0.0)))
    model = nn.Sequential(block, block).eval()
    _, trace = pliant.record(model)(torch.randn(2, WIDTH))
    assert [d.visit for d in trace["0.site"]] == [0, 1]
    assert int(trace.flops.sum()) > 0
    with pytest.raises(PliantError, match=r"at site '0.site': got a trace with 2 visits"):
        pliant.bind(model, {"*": rules.Given(trace)})(torch.randn(2, WIDTH))


def test_given_saves_where_nobody_came() -> None:
    model = built("exits")
    x = torch.randn(3, WIDTH)
    y, trace = pliant.record(pliant.bind(model, {"*": rules.Never()}))(x)
    assert list(trace) == ["sites.0"]
    assert torch.equal(pliant.bind(model, {"*": rules.Given(trace)})(x), y)


def test_soft_values_replay_as_weights() -> None:
    model = pliant.bind(built("either"), {"*": rules.Sigmoid()})
    x = torch.randn(3, WIDTH)
    y, trace = pliant.record(model)(x)
    torch.testing.assert_close(pliant.bind(model, {"*": rules.Given(trace)})(x), y)


def test_a_score_must_have_the_rows_of_its_input() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean().reshape(1)

    with pytest.raises(PliantError, match="a decision for 1 rows; expected one for each of the 3"):
        Site(Mean(), rules.Threshold(0.0))(torch.randn(3, 2))
    with pytest.raises(PliantError, match="an input without tensors"):
        Site(Mean(), rules.Never())("text")


def test_reentrant_checkpointing_is_refused_only_where_it_would_lose_a_gradient() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = built("exits").train()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.model, x, use_reentrant=True)

    model, x = Checkpointed(), torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(PliantError, match="use_reentrant=False"):
        pliant.record(model)(x)
    model(x).sum().backward()  # nobody records
    with torch.no_grad():
        pliant.record(model.model)(x)
    y, _ = pliant.record(model.model)(x)  # the error has closed its tape
    assert y.requires_grad


def test_an_error_inside_closes_the_tape() -> None:
    model = built("skip")
    with pytest.raises(RuntimeError):
        pliant.record(model)(torch.randn(3, WIDTH + 1))
    _, trace = pliant.record(model)(torch.randn(3, WIDTH))
    assert len(trace) == 1


def test_nested_recordings_do_not_mix() -> None:
    inner = pliant.record(built("skip"))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.skip = inner, built("skip")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, self_trace = self.inner(x)
            assert list(self_trace) == ["1.site"]
            return self.skip(x)

    _, trace = pliant.record(Outer())(torch.randn(3, WIDTH))
    assert list(trace) == ["skip.1.site"]


def test_decisions_have_any_trailing_shape() -> None:
    d = Decision(torch.ones(2, 3), rows=torch.tensor([2, 0]), reached=torch.tensor([True, False]))
    assert d.dense(4).sum(1).tolist() == [0, 0, 3, 0]
    soft = Decision(torch.ones(2), soft=torch.tensor([0.25, 0.75]))
    assert soft.dense_soft(2).tolist() == [0.25, 0.75]


def test_a_shape_that_hangs_on_the_input_is_said_per_call() -> None:
    site = Site(nn.Conv2d(2, 1, 1), rules.Always())
    assert site(torch.zeros(3, 2, 4, 5), shape=(1, 4, 5)).value.shape == (3, 1, 4, 5)
    with pytest.raises(PliantError, match=r"shape \(3, 1, 4, 5\); expected \(3, 1, 2, 2\)"):
        site(torch.zeros(3, 2, 4, 5), given=torch.ones(3, 1, 4, 5), shape=(1, 2, 2))


def test_a_trace_rebuilt_from_its_tensors_keeps_its_prices() -> None:
    """As DDP rebuilds what a model returns."""
    torch.manual_seed(0)
    _, trace = pliant.record(built("skip").eval())(torch.randn(5, WIDTH))
    again = pytree.tree_map(lambda t: t.clone(), trace)
    assert torch.equal(again.flops, trace.flops)
    assert torch.equal(again.dense_flops, trace.dense_flops)
