"""SkipNet's recurrent gate and the chain that hands its memory on, against a loop over rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, rules, scores
from pliant.execute import Chain, Exits, Forget, Remember, Residual, Skip

WIDTH = 5
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"masked": pliant.masked, "gathered": pliant.gathered}
BATCHES = st.sampled_from([0, 1, 2, 3, 5, 7])


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def gates(count: int) -> list[Site]:
    memory = scores.GateMemory(4, bias=0.0)
    nn.init.normal_(memory.out.weight, std=4.0)
    return [Site(scores.RecurrentGate(WIDTH, memory), rules.Threshold(0.0)) for _ in range(count)]


def blocks(sites: list[Site]) -> list[nn.Module]:
    """Of each kind one, with a plain module between."""
    return [
        Skip(layer(), sites[0]), nn.Linear(WIDTH, WIDTH), Residual(layer(), sites[1]),
        Skip(layer(), sites[2], otherwise=layer()), Residual(layer(), sites[3], shortcut=nn.Linear(WIDTH, WIDTH)),
    ]  # fmt: skip


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain(blocks(gates(4))).eval()


def lstm(memory: scores.GateMemory) -> nn.LSTMCell:
    """PyTorch's own cell with the same numbers."""
    cell = nn.LSTMCell(memory.hidden, memory.hidden)
    with torch.no_grad():
        cell.weight_ih.copy_(memory.seen.weight)
        cell.bias_ih.copy_(memory.seen.bias)
        cell.weight_hh.copy_(memory.kept.weight)
        cell.bias_hh.copy_(memory.kept.bias)
    return cell


def alone(net: Chain, x: Tensor, state=None, plan: list[float] | None = None) -> tuple[Tensor, list[float], object]:
    """One row (1, WIDTH) through the chain; PyTorch's LSTM cell keeps the memory."""
    values: list[float] = []
    for block in net.blocks:
        if not isinstance(block, (Skip, Residual)):
            x = block(x)
            continue
        gate = block.site.scorer
        if plan is None:
            state = lstm(gate.memory)(gate.project(x), state)
            values.append(float(gate.memory.out(state[0]) > 0))
        else:
            values.append(plan[len(values)])
        on = values[-1] == 1
        if isinstance(block, Residual):
            x = block.shortcut(x) + block.branch(x) if on else block.shortcut(x)
        elif on:
            x = block.block(x)
        elif block.otherwise is not None:
            x = block.otherwise(x)
    return x, values, state


@pytest.mark.parametrize("form", FORMS)
@given(batch=BATCHES, seed=st.integers(0, 99))
def test_a_chain_is_the_loop_over_rows(form: str, batch: int, seed: int) -> None:
    net = chain()
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(FORMS[form](net))(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    with torch.no_grad():
        wanted = [alone(net, row) for row in x.split(1)] if batch else []
    torch.testing.assert_close(y, torch.cat([w[0] for w in wanted]) if batch else x, rtol=1e-5, atol=1e-5)
    assert torch.stack([trace.dense(site) for site in trace], 1).tolist() == [w[1] for w in wanted]


@given(data=st.data(), batch=BATCHES)
def test_a_plan_decides_all_gates_and_scores_none(data: st.DataObject, batch: int) -> None:
    net, x = chain(), torch.randn(batch, WIDTH)
    row = st.one_of(
        st.just([0.0] * 4), st.just([1.0] * 4), st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4)
    )
    plan = [data.draw(row) for _ in range(batch)]
    answers = []
    for form in FORMS.values():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form(net))(x, given=torch.tensor(plan).reshape(batch, 4))
        assert int(trace.flops.sum()) == counter.get_total_flops()
        assert not any(note.choice == "score" for note in trace.notes)
        answers.append(y)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        rows = [alone(net, r, plan=p)[0] for r, p in zip(x.split(1), plan, strict=True)] if batch else [x]
    torch.testing.assert_close(answers[1], torch.cat(rows), rtol=1e-5, atol=1e-6)


def exits_with_a_memory() -> tuple[Exits, Chain, Chain]:
    torch.manual_seed(0)
    sites = gates(8)
    first, second = Chain(blocks(sites[:4])), Chain(blocks(sites[4:]))
    heads = [nn.Sequential(Forget(), nn.Linear(WIDTH, 3)) for _ in range(2)]
    exit_ = Site(scores.MaxProbability(), rules.Threshold(0.55))
    return Exits([nn.Sequential(Remember(), first), second], heads, [exit_]).eval(), first, second


@pytest.mark.parametrize("form", FORMS)
@given(batch=BATCHES, seed=st.integers(0, 99))
def test_exits_choose_the_rows_of_the_memory(form: str, batch: int, seed: int) -> None:
    net, first, second = exits_with_a_memory()
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y, trace = pliant.record(FORMS[form](net))(x)
        went = trace.dense("sites.0") if "sites.0" in trace else torch.zeros(batch)
        for i in range(batch):
            s, _, state = alone(first, x[i : i + 1])
            logits = net.heads[0][1](s)
            if went[i]:
                s, _, _ = alone(second, s, state)
                logits = net.heads[1][1](s)
            torch.testing.assert_close(y[i : i + 1], logits, rtol=1e-5, atol=1e-5)


def test_the_memory_matters_and_starts_empty_elsewhere() -> None:
    net, x = chain(), torch.randn(6, WIDTH)
    s = {}
    for name, model in (("chain", net), ("sequence", nn.Sequential(*net.blocks))):
        # masked with everything run, so that only the memory differs
        trace = pliant.record(pliant.bind(model, {"*": rules.Threshold(float("-inf"))}))(x)[1]
        s[name] = [trace[site][0].scores for site in trace]
    assert torch.equal(s["chain"][0], s["sequence"][0])
    assert not torch.allclose(s["chain"][1], s["sequence"][1])


def test_all_on_is_plain_and_gradients_reach_the_shared_memory() -> None:
    net, x = chain(), torch.randn(4, WIDTH)
    assert torch.equal(pliant.bind(net, {"*": rules.Always()})(x), pliant.plain(net)(x))
    learns = pliant.bind(net, {"*": pliant.estimators.StraightThrough(rules.Threshold(0.0))}).train()
    learns(x).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@given(row=st.integers(0, 4))
def test_nan_stays_in_its_row(row: int) -> None:
    net, x = chain(), torch.randn(5, WIDTH)
    broken = x.clone()
    broken[row] = float("nan")
    others = torch.arange(5) != row
    for form in FORMS.values():
        with torch.no_grad():
            y = form(net)(broken)
            torch.testing.assert_close(y[others], form(net)(x)[others], rtol=1e-5, atol=1e-6)
        assert y[row].isnan().all()


def test_copies_share_one_memory() -> None:
    net, x = chain(), torch.randn(3, WIDTH)
    twin = copy.deepcopy(net)
    memories = {id(site.scorer.memory) for site in pliant.sites(twin).values()}
    assert len(memories) == 1
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))


def test_the_house_checks() -> None:
    model = nn.Sequential(chain(), nn.Linear(WIDTH, 3)).eval()
    pliant.check(
        pliant.bind(model, {"*": pliant.estimators.StraightThrough(rules.Threshold(0.0))}), torch.randn(5, WIDTH)
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Chain([]), "at least one"),
        (lambda: chain()(torch.zeros(2, WIDTH), given=torch.ones(2, 3)), "each gated block"),
        (lambda: scores.GateMemory(0), "at least 1"),
    ],
)
def test_mistakes_are_told(make: Callable[[], object], says: str) -> None:
    with pytest.raises(PliantError, match=says):
        make()
