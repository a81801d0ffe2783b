"""Hold, Partial and Hierarchy against loops that anyone can read: each row alone, step by step, and a plain Python ``if``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, rules
from pliant.execute import Encoded, GRUStep, Hierarchy, Hold, Level, LSTMStep, Partial, Pressed, SmallLSTM
from pliant.scores import Pressure, StepGate

INPUTS, HIDDEN, STEPS = 3, 4, 5
FORMS = {"masked": pliant.masked, "gathered": pliant.gathered}


# The loops: one row (T, I) at a time.


def skip_rnn_alone(net: Hold, row: Tensor) -> tuple[Tensor, list[int]]:
    """Skip RNN as the paper writes it; the last state's output, and the steps that updated."""
    cell: Any = net.cell
    h, c = cell.cell.first
    urge, increment, updated = 1.0, 0.0, []
    for t, x in enumerate(row):
        if urge > 0.5:
            h, c = cell.cell.cell(x, (h, c))
            increment = float((cell.increment.weight[0] @ c + cell.increment.bias[0]).sigmoid())
            urge = increment
            updated.append(t)
        else:
            urge = urge + min(increment, 1 - urge)
    return h, updated


def jumping_alone(net: Hold, row: Tensor) -> tuple[Tensor, list[int]]:
    """The same by the closed form: after an update it's known how long the state will be held."""
    cell: Any = net.cell
    h, c = cell.cell.first
    t, updated = 0, []
    while t < len(row):
        h, c = cell.cell.cell(row[t], (h, c))
        increment = (cell.increment.weight[0] @ c + cell.increment.bias[0]).sigmoid()
        updated.append(t)
        n = 1
        while not float(n * increment) > 0.5:
            n += 1
        t += n
    return h, updated


def held_alone(net: Hold, row: Tensor, values: list[float], there: list[bool]) -> Tensor:
    """The cell at the steps with value 1."""
    state = net.cell.start(1)
    for t in range(len(row)):
        if values[t] == 1 and there[t]:
            state = net.cell(row[t : t + 1], state)
    return state[0][0]


def skimmed_alone(net: Partial, row: Tensor, values: list[float], there: list[bool]) -> Tensor:
    """The large cell at the steps with value 1, at the others the small one's formula, written out."""
    cell, small = net.cell, net.small
    h, c = cell.start(1)
    h, c = h[0], c[0]
    for t in range(len(row)):
        if not there[t]:
            continue
        if values[t] == 1:
            new_h, new_c = cell(row[t : t + 1], (h[None], c[None]))
            h, c = new_h[0], new_c[0]
        else:
            d = small.small  # pyright: ignore[reportAttributeAccessIssue]
            g, i, f, o = small.gates(torch.cat([row[t], h])).split(d)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            head = f.sigmoid() * c[:d] + i.sigmoid() * g.tanh()
            c = torch.cat([head, c[d:]])
            h = torch.cat([o.sigmoid() * head.tanh(), h[d:]])
    return h


def levels_alone(net: Hierarchy, row: Tensor, values: list[list[float]]) -> Tensor:
    """Copy, update or flush, each level by the three products that it then needs."""
    levels: list[Any] = list(net.levels)
    top = len(levels) - 1
    h = [torch.zeros(level.hidden) for level in levels]
    c = [torch.zeros(level.hidden) for level in levels]
    ended = [False] * len(levels)
    outputs = []
    for t, x in enumerate(row):
        below, closed = x, True
        for n, level in enumerate(levels):
            if not ended[n] and not closed:
                below, closed = h[n], False  # COPY: nothing is computed, and no segment ends
                continue
            weight, size = level.linear.weight, level.hidden
            w, u, v = weight.split([len(below), size, weight.shape[1] - len(below) - size], 1)
            sums = u @ h[n] + level.linear.bias
            if closed:
                sums = sums + w @ below
            if ended[n] and n < top:
                sums = sums + v @ h[n + 1]
            gates = [F.layer_norm(s, (size,)) for s in sums[:-1].split(size)]
            f, i, o, g = (gate * a + b for gate, a, b in zip(gates, level.gain, level.shift, strict=True))
            if ended[n]:
                c[n] = i.sigmoid() * g.tanh()  # FLUSH
            else:
                c[n] = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()  # UPDATE
            h[n] = o.sigmoid() * c[n].tanh()
            ended[n] = n < top and values[t][n] == 1
            below, closed = h[n], ended[n]
        outputs.append(torch.cat(h))
    return torch.stack(outputs)


# The networks.


@functools.cache
def hold(bias: float = -0.5) -> Hold:
    torch.manual_seed(0)
    net = Hold(Pressed(LSTMStep(INPUTS, HIDDEN), HIDDEN, bias=bias), Site(Pressure(), rules.Threshold(0.5))).eval()
    nn.init.normal_(net.cell.increment.weight, std=2.0)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    nn.init.normal_(net.cell.cell.first)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return net


@functools.cache
def partial() -> Partial:
    torch.manual_seed(0)
    site = Site(StepGate(INPUTS, HIDDEN), rules.Threshold(0.0))
    return Partial(LSTMStep(INPUTS, HIDDEN), SmallLSTM(INPUTS, HIDDEN, small=2), site).eval()


@functools.cache
def hierarchy(depth: int = 3) -> Hierarchy:
    torch.manual_seed(0)
    widths = (INPUTS, *(5, 4, 3, 2)[:depth], 0)
    levels = [Level(*widths[n : n + 3]) for n in range(depth)]
    for level in levels:
        nn.init.normal_(level.shift, std=0.5)
    return Hierarchy(levels, [Site(nn.Identity(), rules.Threshold(0.0), shape=(1,)) for _ in levels[1:]]).eval()


def inputs(batch: int, steps: int = STEPS) -> Tensor:
    return torch.randn(batch, steps, INPUTS, generator=torch.Generator().manual_seed(batch))


def patterns(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    """Batches of 0, 1 or an odd number of rows; nothing, everything or anything is chosen."""

    def drawn(rows: int, p: float, seed: int) -> Tensor:
        return (torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed)) < p).float()

    return st.builds(drawn, st.sampled_from([0, 1, 2, 5]), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.integers(0, 99))


def same(net: Any, expected: Tensor, values: Tensor, *x: Tensor) -> None:
    """Both forms answer so under ``values``, and are priced as PyTorch's counter counts."""
    for form in FORMS.values():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y, trace = pliant.record(_Given(form(net)))(values, *x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert int(trace.flops.sum()) == counter.get_total_flops()


class _Given(nn.Module):
    """A network with its decisions handed in."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, values: Tensor, *x: Tensor) -> Tensor:
        return self.net(*x, given=values)


# The properties.


@settings(max_examples=15, deadline=None)
@given(values=patterns((STEPS,)), padded=st.booleans())
@pytest.mark.parametrize("make", [hold, partial])
def test_a_step_is_run_or_saved_row_by_row(make: Any, values: Tensor, padded: bool) -> None:
    net, x = make(), inputs(len(values))
    there = torch.ones(len(values), STEPS, dtype=torch.bool)
    if padded:
        there[::2, STEPS // 2 :] = False
    alone = held_alone if make is hold else skimmed_alone
    with torch.no_grad():
        expected = [alone(net, *row) for row in zip(x, values.tolist(), there.tolist(), strict=True)]
    same(net, torch.stack(expected) if expected else torch.zeros(0, HIDDEN), values, x, *([there] if padded else []))


@settings(max_examples=15, deadline=None)
@given(values=patterns((STEPS, 3)), depth=st.sampled_from([2, 3, 4]))
def test_a_level_copies_updates_or_flushes(values: Tensor, depth: int) -> None:
    net, x = hierarchy(depth), inputs(len(values))
    values = values[..., : depth - 1]
    with torch.no_grad():
        expected = [levels_alone(net, row, chosen) for row, chosen in zip(x, values.tolist(), strict=True)]
    width = sum(level.hidden for level in net.levels)  # pyright: ignore[reportArgumentType, reportCallIssue]
    same(net, torch.stack(expected) if expected else torch.zeros(0, STEPS, width), values, x)


def test_skip_rnn_decides_as_the_paper_writes_it_and_jumps_as_it_steps() -> None:
    net, x = hold(), inputs(7, 40)
    with torch.no_grad():
        _, trace = pliant.record(net)(x)
        u = torch.stack([d.value for d in trace["site"]], 1)
        assert 0.2 < float(u.mean()) < 0.8
        for row, chosen in zip(x, u, strict=True):
            expected, updated = skip_rnn_alone(net, row)
            jumped, visited = jumping_alone(net, row)
            assert updated == visited == chosen.nonzero().flatten().tolist()
            torch.testing.assert_close(jumped, expected, rtol=0, atol=1e-6)
            # Alone and unrecorded the executor jumps; recorded it visits every step. The numbers are the same bits.
            stepped, _ = pliant.record(net)(row[None])
            assert torch.equal(net(row[None]), stepped)
            torch.testing.assert_close(stepped[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [float("-inf"), 0.0, 0.3, 0.99, 1.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jump_ends_where_the_score_passes_any_threshold(threshold: float, dtype: torch.dtype) -> None:
    net = copy.deepcopy(hold(-2.0)).to(dtype)
    net.site.rule.threshold.fill_(threshold)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    x = inputs(1, 30).to(dtype)
    x[:, 20] = x[:, 20] if threshold else float("nan")
    with torch.no_grad():
        stepped, _ = pliant.record(net)(x)
        assert torch.equal(net(x).nan_to_num(9), stepped.nan_to_num(9))
    pressure, state = Pressure(), (torch.zeros(1), torch.ones(1))
    assert pressure.until(state, 0.5) == float("inf")
    assert pressure.until((torch.full((1,), float("nan")), torch.ones(1)), 2.0) == 0


class Counted(nn.Module):
    """An encoder that counts its calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return x


def test_inputs_of_held_steps_are_not_encoded() -> None:
    net, x = copy.deepcopy(hold()), inputs(5, 40)
    encoder: Any = Counted()
    net.cell.cell = Encoded(encoder, net.cell.cell)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        _, trace = pliant.record(net)(x)
        assert encoder.rows == int(sum(d.value.sum() for d in trace["site"]))
        encoder.calls = encoder.rows = 0
        visits: list[int] = []
        net.site.register_forward_hook(lambda *_: visits.append(1))
        net(x[:1])
        updates = int(sum(d.value[0] for d in trace["site"]))
        assert encoder.calls == updates
        assert not visits  # alone, a row needs its site at no step: its scores are known ahead


def test_draws_and_weights_are_never_jumped_over() -> None:
    net = pliant.bind(hold(), {"site": pliant.estimators.GumbelSample(rules.Threshold(0.5))})
    visits: list[int] = []
    net.site.register_forward_hook(lambda *_: visits.append(1))
    net(inputs(1))
    assert len(visits) == STEPS
    soft = pliant.bind(hold(), {"site": rules.Sigmoid()})
    torch.testing.assert_close(pliant.gathered(soft)(inputs(3)), pliant.masked(soft)(inputs(3)))


@pytest.mark.parametrize("make", [hold, partial, hierarchy])
def test_weights_mix_both_alternatives(make: Any) -> None:
    net = make()
    path = "sites.*" if make is hierarchy else "site"
    net = pliant.bind(net, {path: rules.Sigmoid()})
    x = inputs(3)
    torch.testing.assert_close(pliant.gathered(net)(x), pliant.masked(net)(x))


def test_the_small_cell_never_runs_where_the_large_one_does() -> None:
    net, x = copy.deepcopy(partial()), inputs(1)
    ran: list[str] = []
    net.cell.register_forward_hook(lambda *_: ran.append("read"))
    net.small.register_forward_hook(lambda *_: ran.append("skim"))
    pliant.gathered(net)(x, given=torch.tensor([[1.0, 0, 0, 1, 0]]))
    assert ran == ["read", "skim", "skim", "read", "skim"]


def test_copying_is_exact_and_free() -> None:
    net, x = copy.deepcopy(hierarchy()), inputs(3)
    ran: list[int] = []
    for n, level in enumerate(net.levels):
        level.register_forward_hook(lambda *_, n=n: ran.append(n))
    values = torch.zeros(3, STEPS, 2)
    values[:, 2, 0] = 1
    y = net(x, given=values)
    assert [ran.count(n) for n in range(3)] == [STEPS, 1, 0]
    second = y[:, :, 5:9]
    assert not second[:, :2].any()
    assert all(torch.equal(second[:, t], second[:, 2]) for t in range(3, STEPS))
    assert not y[:, :, 9:].any()


@pytest.mark.parametrize("make", [partial, hierarchy])
def test_one_row_alone_has_the_same_numbers_recorded_or_not(make: Any) -> None:
    net, found = make(), 0.0
    for x in inputs(5, 12).split(1):
        with torch.no_grad():
            y, trace = pliant.record(net)(x)
            assert torch.equal(net(x), y)
        found += sum(float(d.value.sum()) for visits in trace.visits.values() for d in visits)
    assert 0 < found < 5 * 12 * (1 if make is partial else 2)


def test_one_row_alone_passes_gradients_in_evaluation() -> None:
    """Decisions are compared as numbers, and nothing is said about it: the rest stays differentiable."""
    for net in (hold(), partial(), hierarchy()):
        x = inputs(1).requires_grad_()
        net(x).sum().backward()
        assert x.grad is not None
        assert x.grad.any()


def test_gru_and_refusals() -> None:
    net = pliant.create_model("skip_rnn", in_chans=INPUTS, cell="gru", hidden=HIDDEN).eval()
    assert isinstance(net.loop.cell.cell, GRUStep)  # pyright: ignore[reportAttributeAccessIssue]
    assert net(inputs(2)).shape == (2, 10)
    with pytest.raises(PliantError, match="cell 'elman'; expected one of lstm, gru"):
        pliant.create_model("skip_rnn", cell="elman")
    with pytest.raises(PliantError, match="small=9; expected within 0 and hidden=4"):
        pliant.create_model("skim_rnn", hidden=4, small=9)
    with pytest.raises(PliantError, match="1 levels; expected at least two"):
        pliant.create_model("hm_rnn", hidden=(4,))
    with pytest.raises(PliantError, match="2 levels and sites of shapes"):
        Hierarchy(list(hierarchy(2).levels), [])
    with pytest.raises(PliantError, match=r"no scores at sites 'loop\.\*'"):
        pliant.losses.Saving("loop.*")(torch.zeros(1), pliant.Trace({}, (), (), 1), torch.zeros(1), 0.0)
    skip = pliant.create_model("skim_rnn", words=9, embedding=3, hidden=4, small=0).eval()
    assert isinstance(skip.loop, Hold)


def test_gradients_reach_every_gate_through_both_forms_of_training() -> None:
    """The straight-through gradient of an update is the difference of what it makes and what was held."""
    for id, kwargs, x in (
        ("skip_rnn", {"in_chans": INPUTS, "hidden": HIDDEN, "bias": -0.5}, inputs(4)),
        ("skim_rnn", {"words": 9, "embedding": 3, "hidden": HIDDEN, "small": 2}, torch.randint(1, 9, (4, STEPS))),
        ("hm_rnn", {"num_classes": 9, "hidden": (5, 4, 3), "embedding": 3}, torch.randint(1, 9, (4, STEPS))),
    ):
        torch.manual_seed(0)
        model = pliant.create_model(id, **kwargs).train()
        model(x).square().sum().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # An increment is learned from what it decides; the top level of the hierarchy has no end to score.
        assert not silent, (id, silent)
