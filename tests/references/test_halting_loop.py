"""The halting loop against Graves' rule as anyone would write it: one row at a time, one unit at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, losses, rules, scores
from pliant.core.trace import Trace
from pliant.execute import Exits, Halting

WIDTH, UNITS = 5, 4
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"masked": pliant.masked, "gathered": pliant.gathered}
BATCHES = st.sampled_from([0, 1, 2, 3, 5, 7])


def unit() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def site() -> Site:
    return Site(scores.Remainder(), rules.Halting())


def head() -> nn.Module:
    made = scores.HaltingHead(WIDTH, bias=0.0)
    nn.init.normal_(made.linear.weight, std=2.0)
    return made


def several(units: int = UNITS) -> Halting:
    torch.manual_seed(0)
    return Halting(
        [unit() for _ in range(units)], [head() for _ in range(units - 1)], [site() for _ in range(units - 1)]
    ).eval()


def shared(units: int = UNITS) -> Halting:
    torch.manual_seed(1)
    return Halting([unit()] * units, [head()] * (units - 1), [site()] * (units - 1)).eval()


MAKES = {"several": several, "shared": shared}


def alone(loop: Halting, s: Tensor, eps: float = 0.01, plan: list[float] | None = None) -> tuple[Tensor, Tensor, int]:
    """Answer, ponder cost and N of one row (1, WIDTH)."""
    states: list[Tensor] = []
    h: list[Tensor] = []
    total = 0.0
    for n, module in enumerate(loop.units):
        s = module(s)
        states.append(s)
        if n == len(loop.units) - 1:
            break
        h.append(torch.sigmoid(loop.halts[n](s))[0])
        total += float(h[-1].detach())
        if (total >= 1 - eps) if plan is None else plan[n] == 0:
            break
    count = len(states)
    spent = torch.zeros(())
    answer = torch.zeros_like(s)
    for n in range(count - 1):
        p = torch.minimum(h[n], 1 - spent)
        answer = answer + p * states[n]
        spent = spent + p
    remainder = 1 - spent
    return answer + remainder * states[-1], count + remainder, count


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("form", FORMS)
@given(batch=BATCHES, units=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_halts_as_the_loop_over_rows_does(name: str, form: str, batch: int, units: int, seed: int) -> None:
    loop = MAKES[name](units)
    x = 2 * torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y, trace = pliant.record(FORMS[form](loop))(x)
        wanted = [alone(loop, row) for row in x.split(1)] if batch else []
    torch.testing.assert_close(
        y, torch.cat([w[0] for w in wanted]) if batch else torch.zeros(0, WIDTH), rtol=1e-5, atol=1e-6
    )
    if units > 1:
        assert losses.steps(trace).tolist() == [w[2] for w in wanted]
        torch.testing.assert_close(
            losses.ponder(trace), torch.stack([w[1] for w in wanted]) if batch else torch.zeros(0), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", MAKES)
@given(data=st.data(), batch=BATCHES)
def test_forms_agree_and_the_account_is_exact_for_every_plan(name: str, data: st.DataObject, batch: int) -> None:
    loop = MAKES[name]()
    x = torch.randn(batch, WIDTH)
    row = st.one_of(
        st.just([0.0] * (UNITS - 1)),
        st.just([1.0] * (UNITS - 1)),
        st.lists(st.sampled_from([0.0, 1.0]), min_size=UNITS - 1, max_size=UNITS - 1),
    )
    plan = torch.tensor([data.draw(row) for _ in range(batch)]).reshape(batch, UNITS - 1)
    answers = []
    for form in FORMS.values():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(loop))(x, given=plan)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        answers.append(y)
    with torch.no_grad():
        wanted = [alone(loop, r, plan=p) for r, p in zip(x.split(1), plan.tolist(), strict=True)] if batch else []
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers[1], torch.cat([w[0] for w in wanted]) if batch else x, rtol=1e-5, atol=1e-6)
    # Executed FLOPs are the sum of N: a unit for each step, and a halting head after each unit but the loop's last.
    n = torch.tensor([w[2] for w in wanted], dtype=torch.int64)
    assert torch.equal(trace.flops, n * 2 * WIDTH * WIDTH + n.clamp(max=UNITS - 1) * 2 * WIDTH)
    assert torch.equal(losses.steps(trace), n.float())
    torch.testing.assert_close(pliant.cost.expected_flops(trace), trace.flops.double())


@given(batch=st.integers(1, 6), seed=st.integers(0, 99), tau=st.sampled_from([0.0, 0.3]))
def test_gradients_are_those_of_the_loop_over_rows(batch: int, seed: int, tau: float) -> None:
    loop = several()
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))
    aims = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    found = []
    for form in FORMS.values():
        y, trace = pliant.record(form(loop))(x)
        loss = (y * aims).sum() + tau * batch * losses.Ponder()(y, trace, aims, 0.0)
        found.append(torch.autograd.grad(loss, list(loop.parameters()), allow_unused=True))
    rows = [alone(loop, row) for row in x.split(1)]
    loss = (torch.cat([r[0] for r in rows]) * aims).sum() + tau * torch.stack([r[1] for r in rows]).sum()
    found.append(torch.autograd.grad(loss, list(loop.parameters()), allow_unused=True))
    for each in zip(*found, strict=True):
        a, b, c = (torch.zeros(()) if g is None else g for g in each)
        torch.testing.assert_close(a, b if b.ndim == a.ndim else b.expand_as(a), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, c if c.ndim == b.ndim else c.expand_as(b), rtol=1e-4, atol=1e-5)


class _Logit(nn.Module):
    """A halting logit that is a parameter, one per row."""

    def __init__(self, h: list[float]) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.logit(torch.tensor(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logit


def test_the_gradient_of_the_ponder_cost_is_the_papers() -> None:
    """d rho / d h_n is -1 for n < N and 0 at and after N."""
    h = torch.tensor([[0.3, 0.995, 0.2], [0.3, 0.2, 0.2], [0.8, 0.1, 0.2]])  # rows by unit: N = 3, 1, 4
    loop = Halting([nn.Identity()] * 4, [_Logit(row.tolist()) for row in h], [site() for _ in range(3)])
    for form in FORMS.values():
        if form is pliant.gathered:
            continue  # these halts know the whole batch only
        y, trace = pliant.record(form(loop))(torch.ones(3, 2))
        torch.testing.assert_close(y, torch.ones(3, 2))  # weights sum to 1
        rho = losses.ponder(trace)
        assert losses.steps(trace).tolist() == [3.0, 1.0, 4.0]
        torch.testing.assert_close(rho, torch.tensor([3 + 0.4, 1 + 1.0, 4 + 0.4]), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(rho.sum(), [halt.logit for halt in loop.halts])
        slope = h * (1 - h)
        wanted = torch.tensor([[-1.0, 0.0, -1.0], [-1.0, 0.0, -1.0], [0.0, 0.0, -1.0]])
        torch.testing.assert_close(torch.stack(grads), wanted * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MAKES)
def test_always_is_plain_and_never_is_one_unit(name: str) -> None:
    loop, x = MAKES[name](), torch.randn(6, WIDTH)
    y, trace = pliant.record(pliant.bind(loop, {"*": rules.Always()}))(x)
    assert torch.equal(y, pliant.plain(loop)(x))
    assert torch.equal(trace.flops, trace.dense_flops)
    assert torch.equal(pliant.bind(loop, {"*": rules.Never()})(x), loop.units[0](x))


def test_a_trace_replays_bit_by_bit_and_a_threshold_is_a_dial() -> None:
    loop, x = several(), 2 * torch.randn(7, WIDTH)
    y, trace = pliant.record(loop)(x)
    assert torch.equal(pliant.bind(loop, {"*": rules.Given(trace)})(x), y)
    costs = [pliant.record(pliant.bind(loop, {"*": rules.Halting(e)}))(x)[1].flops for e in (0.0, 0.01, 0.3, 0.9)]
    for less, more in zip(costs[1:], costs, strict=False):
        assert (less <= more).all()


def test_a_site_that_is_repeated_replays_visit_by_visit() -> None:
    loop = shared()
    x = 3 * torch.randn(9, WIDTH)
    for form in (pliant.gathered, pliant.masked):
        y, trace = pliant.record(form(loop))(x)
        assert len(trace["sites.0"]) == 3
        assert torch.equal(pliant.bind(form(loop), {"*": rules.Given(trace)})(x), y)
        rows = torch.tensor([4, 1])
        some = {"sites.0": tuple(replace(d, value=d.dense(9)[rows], rows=None, reached=None) for d in trace["sites.0"])}
        few = pliant.bind(loop, {"*": rules.Given(Trace(some, (), (), 2))})(x[rows])
        torch.testing.assert_close(few, y[rows])


def test_a_tree_of_state_and_input_is_mixed_leaf_by_leaf() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            s, x = state
            return torch.tanh(self.cell(torch.cat([s, x], 1))), x

    loop = Halting([Cell()] * UNITS, [head()] * (UNITS - 1), [site()] * (UNITS - 1)).eval()
    x = torch.randn(5, WIDTH)
    (s, same), (masked_s, _) = loop((torch.zeros(5, WIDTH), x)), pliant.masked(loop)((torch.zeros(5, WIDTH), x))
    torch.testing.assert_close(same, x)
    torch.testing.assert_close(s, masked_s, rtol=1e-5, atol=1e-6)


def test_loops_inside_exits_and_two_loops_in_a_row() -> None:
    made = Exits(
        [several(), nn.Sequential(shared(), several())],
        [nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)],
        [Site(scores.MaxProbability(), rules.Threshold(0.5))],
    ).eval()
    x = 2 * torch.randn(7, WIDTH)
    found = []
    for form in FORMS.values():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(made))(x)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        found.append((y, losses.steps(trace), losses.ponder(trace)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    went = pliant.record(made)(x)[1].dense("sites.0")
    assert (found[0][1] >= 1 + 2 * went).all()
    assert (found[0][1] <= UNITS + 2 * UNITS * went).all()


@given(row=st.integers(0, 4))
def test_nan_runs_to_the_end_and_stays_in_its_row(row: int) -> None:
    loop, x = several(), torch.randn(5, WIDTH)
    broken = x.clone()
    broken[row] = float("nan")
    for form in FORMS.values():
        with torch.no_grad():
            y, trace = pliant.record(form(loop))(broken)
        others = torch.arange(5) != row
        assert y[row].isnan().all()
        assert losses.steps(trace)[row] == UNITS
        torch.testing.assert_close(y[others], form(loop)(x)[others], rtol=1e-5, atol=1e-6)


def test_copies_and_state_dicts() -> None:
    for loop in (several(), shared()):
        x = torch.randn(3, WIDTH)
        twin = copy.deepcopy(loop)
        assert torch.equal(twin(x), loop(x))
        for p in twin.parameters():
            nn.init.zeros_(p)
        twin.load_state_dict(loop.state_dict())
        assert torch.equal(twin(x), loop(x))
    assert list(pliant.sites(shared())) == ["sites.0"]


def test_the_house_checks() -> None:
    pliant.check(nn.Sequential(several(), nn.Linear(WIDTH, 3)).eval(), 2 * torch.randn(5, WIDTH))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Halting([unit()], [head()], []), "M units"),
        (lambda: Halting([], [], []), "at least one"),
        (lambda: Halting([unit()] * 2, [nn.Linear(WIDTH, 1)], [site()])(torch.zeros(2, WIDTH)), "one for each row"),
        (lambda: losses.ponder(pliant.record(nn.Identity())(torch.zeros(2))[1]), "halting decisions"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], says: str) -> None:
    with pytest.raises(PliantError, match=says):
        make()
