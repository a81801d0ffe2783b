"""Masked and gathered agree, and the account is exact, over all patterns of decisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from nets import CLASSES, NETS, WIDTH, built, force
from pliant import rules
from pliant.execute import Exits, Residual, Skip

BATCHES = st.sampled_from([0, 1, 2, 3, 5, 7])


@st.composite
def patterns(draw: st.DrawFn, name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A network, a value for every row at every site, and a batch; empty and full patterns often."""
    model, batch = built(name), draw(BATCHES)
    row = st.one_of(
        st.just([0.0] * batch),
        st.just([1.0] * batch),
        st.lists(st.sampled_from([0.0, 1.0]), min_size=batch, max_size=batch),
    )
    values = {path: torch.tensor(draw(row)) for path in pliant.sites(model)}
    return model, values, torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=20)
@given(data=st.data())
def test_forms_agree_on_answers_decisions_and_cost(name: str, data: st.DataObject) -> None:
    model, values, x = data.draw(patterns(name))
    forced = force(model, values, len(x))
    answers, traces = [], []
    for form in (pliant.masked(forced), pliant.gathered(forced)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form)(x)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        assert trace.flops.shape == (len(x),)
        answers.append(y)
        traces.append(trace)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    everything, chosen = traces
    assert (chosen.flops <= chosen.dense_flops).all()
    assert set(everything) == set(values)
    for site in everything:  # a site that no row reached was never visited when gathered
        want = everything.dense(site)
        assert torch.equal(chosen.dense(site) if site in chosen else torch.zeros(len(x)), want)
        assert (want <= values[site]).all()
    # Decisions that are hard: what is expected is what was run.
    torch.testing.assert_close(pliant.cost.expected_flops(everything), chosen.flops.double())


@pytest.mark.parametrize("name", NETS)
@given(data=st.data())
def test_a_recorded_call_replays_bit_by_bit(name: str, data: st.DataObject) -> None:
    model, values, x = data.draw(patterns(name))
    forced = pliant.gathered(force(model, values, len(x)))
    y, trace = pliant.record(forced)(x)
    assert torch.equal(y, forced(x))
    again = pliant.gathered(pliant.bind(model, {"*": rules.Given(trace)}))
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("name", NETS)
@given(data=st.data())
def test_gradients_agree(name: str, data: st.DataObject) -> None:
    model, values, x = data.draw(patterns(name))
    forced = force(model, values, len(x))
    parameters = list(model.parameters())
    weights = torch.linspace(0.5, 1.5, len(x)).unsqueeze(1)
    got = []
    for form in (pliant.masked(forced), pliant.gathered(forced)):
        loss = (form(x) * weights).sum()
        if not loss.requires_grad:
            return  # a chain of blocks that were all skipped
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        got.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("exits", "surest_exit", "patient")])
@given(data=st.data())
def test_soft_weights_mix_alike(name: str, data: st.DataObject) -> None:
    """Some sites hard, some soft; the soft ones run every alternative and weigh it, in both forms."""
    model, values, x = data.draw(patterns(name))
    hard = force(model, values, len(x))
    gates = [p for p, site in pliant.sites(model).items() if isinstance(site.scorer, pliant.scores.LinearGate)]
    soft = data.draw(st.lists(st.sampled_from(gates), min_size=1, unique=True))
    mixed = pliant.bind(hard, {path: rules.Sigmoid() for path in soft})
    answers = []
    for form in (pliant.masked(mixed), pliant.gathered(mixed)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form)(x)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        answers.append(y)
        replayed = pliant.bind(model, {"*": rules.Given(trace)})
        torch.testing.assert_close(replayed(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)


@given(data=st.data(), batch=BATCHES)
def test_given_is_as_good_as_a_bound_rule(data: st.DataObject, batch: int) -> None:
    """A plan passed per call decides like the same values bound; nothing is scored."""
    x = torch.randn(batch, WIDTH)
    plan = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=2 * batch, max_size=2 * batch))
    ).reshape(batch, 2)
    chain = built("exits")
    assert isinstance(chain, Exits)
    bound = force(chain, {"sites.0": plan[:, 0], "sites.1": plan[:, 1]}, batch)
    for form in (pliant.masked, pliant.gathered):
        assert torch.equal(form(chain)(x, given=plan), form(bound)(x))
    for block in (built("skip")[1], built("either")[0], built("residual")[1]):
        assert isinstance(block, (Skip, Residual))
        bound = force(block, {"site": plan[:, 0]}, batch)
        for form in (pliant.masked, pliant.gathered):
            y, trace = pliant.record(form(block))(x, given=plan[:, 0])
            assert torch.equal(y, form(bound)(x))
            assert trace["site"][0].scores is None
            assert not any(note.choice == "score" for note in trace.notes)


@pytest.mark.parametrize("name", NETS)
@given(data=st.data())
def test_a_row_alone_is_a_row_in_a_batch(name: str, data: st.DataObject) -> None:
    model, values, x = data.draw(patterns(name))
    y = force(model, values, len(x))(x)
    for i in range(len(x)):
        alone = force(model, {path: v[i : i + 1] for path, v in values.items()}, 1)(x[i : i + 1])
        torch.testing.assert_close(alone[0], y[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
@given(row=st.integers(0, 4), rest=st.integers(0, 99))
def test_nan_stays_in_its_row(name: str, row: int, rest: int) -> None:
    model = built(name)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(rest))
    broken = x.clone()
    broken[row] = float("nan")
    for form in (pliant.masked(model), pliant.gathered(model)):
        with torch.no_grad():
            y, clean = form(broken), form(x)
        assert y[row].isnan().all()
        others = torch.arange(5) != row
        torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-6)


def test_shapes_of_an_empty_batch() -> None:
    for name in NETS:
        y = built(name)(torch.zeros(0, WIDTH))
        assert y.shape in ((0, CLASSES), (0, WIDTH))
