"""Losses of policies: exact in the mean by enumeration, silent where nothing was chosen, refusing what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pliant
from pliant import PliantError, losses, rules
from pliant.core.decision import Decision
from pliant.core.trace import Trace
from pliant.estimators import EpsilonGreedy, ScoreFunction
from pliant.execute import Residual
from pliant.rules import Threshold
from pliant.scores import LinearGate

WIDTH, DRAWS, CHUNKS = 3, 4000, 25
TARGET = torch.tensor(0)


def block(floor: float = 1.0) -> Residual:
    gate = pliant.Site(LinearGate(WIDTH, bias=0.0), ScoreFunction(Threshold(0.0), floor=floor))
    nn.init.normal_(gate.scorer.get_submodule("linear").weight, std=0.5)  # pyright: ignore[reportArgumentType]
    return Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), gate)


def network(floor: float = 1.0) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(block(floor), block(floor)).train()


def reward(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
    """Far from a sum over the gates."""
    return (y.detach() * torch.tensor([1.0, -2.0, 0.5])).sum(-1).tanh() - 0.3 * losses.used(trace) ** 2


def gates(model: Any) -> list[nn.Parameter]:
    return [p for site in pliant.sites(model).values() for p in site.scorer.parameters()]


def probability(model: Any, k: int, h: Tensor, d: int) -> Tensor:
    site = model[k].site
    p = torch.sigmoid(getattr(site.scorer, "scorer", site.scorer)(h))
    p = site.rule.floor * p + (1 - site.rule.floor) * (1 - p)
    return p if d else 1 - p


def exact(model: Any, x: Tensor) -> list[Tensor]:
    """The gradient of minus the mean reward by the gates, over all four pairs of decisions."""
    total = torch.zeros(())
    for first in (0, 1):
        h = x + first * model[0].branch(x)
        for second in (0, 1):
            y = h + second * model[1].branch(h)
            fake = {
                f"{k}.site": (Decision(torch.tensor([float(d)]), scores=torch.zeros(1)),)
                for k, d in enumerate((first, second))
            }
            p = probability(model, 0, x, first) * probability(model, 1, h, second)
            total = total - (p * reward(y, Trace(fake, (), (), 1), TARGET)).sum()
    return list(torch.autograd.grad(total, gates(model), allow_unused=True))


def agrees(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """The mean of many draws is the exact gradient, within five standard errors; returns miss and variance."""
    wanted = torch.cat([g.flatten() for g in exact(model, x) if g is not None])
    parameters = [
        p for site in pliant.sites(model).values() for p in getattr(site.scorer, "scorer", site.scorer).parameters()
    ]
    draws = []
    torch.manual_seed(1)
    for _ in range(CHUNKS):
        found = torch.autograd.grad(loss(), parameters)
        draws.append(torch.cat([g.flatten() for g in found]))
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / CHUNKS**0.5
    assert ((mean - wanted).abs() <= 5 * error + 1e-6).all(), (mean, wanted, error)
    return (mean - wanted).norm().item(), torch.stack(draws).var(0).sum().item()


def once(model: Any, x: Tensor, term: Any) -> Tensor:
    many = x.expand(DRAWS, -1)
    y, trace = pliant.record(model)(many)
    if isinstance(term, losses.Further):
        with torch.no_grad():
            further = pliant.record(term.other(model))(many)
        return term(y, trace, TARGET, 0.0, further)
    return term(y, trace, TARGET, 0.0)


X = torch.tensor([[0.6, -0.4, 1.0]])
WAYS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: losses.Reinforce(reward),
    "moving": lambda: losses.Reinforce(reward, baseline=losses.MovingAverage()),
    "leave one out": lambda: losses.Reinforce(reward, baseline=losses.LeaveOneOut()),
    "samples of the same": lambda: losses.Reinforce(reward, baseline=losses.LeaveOneOut(4)),
    "self-critical": lambda: losses.SelfCritical(reward),
}


@pytest.mark.parametrize("floor", [1.0, 0.8])
@pytest.mark.parametrize("name", WAYS)
def test_the_mean_gradient_is_the_exact_one(name: str, floor: float) -> None:
    model, term = network(floor), WAYS[name]()
    agrees(model, X, lambda: once(model, X, term))


def test_a_learned_baseline_leaves_the_mean_and_learns_the_reward() -> None:
    model = network()
    for site in pliant.sites(model).values():
        site.scorer = losses.Critic(site.scorer, nn.Linear(WIDTH, 1))
    agrees(model, X, lambda: once(model, X, losses.Reinforce(reward, baseline=losses.learned)))
    value, heads = losses.ValueLoss(reward), [s.scorer.head for s in pliant.sites(model).values()]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = once(model, X, value)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        y, trace = pliant.record(model)(X.expand(DRAWS, -1))
        wanted = reward(y, trace, TARGET).mean()
        torch.testing.assert_close(heads[0](X).squeeze(), wanted, atol=0.03, rtol=0)
    assert all(p.grad is None for p in model[0].branch.parameters())


def test_a_baseline_lowers_the_variance() -> None:
    model = network()

    def shifted(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        return reward(y, trace, target) + 10

    def variance(baseline: Any) -> float:
        torch.manual_seed(2)
        term, found = losses.Reinforce(shifted, baseline=baseline), []
        for _ in range(CHUNKS):
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(once(model, X, term), gates(model))]))
        return torch.stack(found[1:]).var(0).sum().item()  # a moving mean knows nothing in the first step

    without = variance(losses.nothing)
    assert variance(losses.MovingAverage()) < without / 3
    assert variance(losses.LeaveOneOut()) < without / 3


def test_where_the_draw_is_the_greedy_one_the_self_critical_gradient_is_zero() -> None:
    model = network()
    for site in pliant.sites(model).values():
        nn.init.constant_(site.scorer.get_submodule("linear").bias, 100.0)  # pyright: ignore[reportArgumentType]
    assert all(not g.any() for g in torch.autograd.grad(once(model, X, losses.SelfCritical(reward)), gates(model)))


def test_forms_give_the_same_for_the_same_draws() -> None:
    model, x = network(), torch.randn(9, WIDTH)
    found = []
    for form in (pliant.masked, pliant.gathered):
        torch.manual_seed(3)
        y, trace = pliant.record(form(model).train())(x)
        found.append(torch.autograd.grad(losses.Reinforce(reward)(y, trace, TARGET, 0.0), gates(model)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_forced_decisions_are_no_choices() -> None:
    """As a curriculum from the tail forces them."""
    model = pliant.bind(network(), {"0.site": rules.Always()})
    y, trace = pliant.record(model)(torch.randn(5, WIDTH))
    assert trace["0.site"][0].log_prob is None
    assert losses.used(trace).tolist() == trace["1.site"][0].value.tolist()
    loss = losses.Reinforce(reward)(y, trace, TARGET, 0.0)
    first, second = (list(s.scorer.parameters()) for s in pliant.sites(model).values())
    assert all(g is None for g in torch.autograd.grad(loss, first, allow_unused=True, retain_graph=True))
    assert all(g is not None for g in torch.autograd.grad(loss, second))
    y, trace = pliant.record(pliant.bind(model, {"*": rules.Always()}))(torch.randn(5, WIDTH).requires_grad_())
    assert losses.Reinforce(reward)(y, trace, TARGET, 0.0).item() == 0


def test_rows_that_never_came_contribute_nothing() -> None:
    log_prob = torch.tensor([-0.5, float("nan")], requires_grad=True)
    came = Decision(torch.ones(2), scores=torch.zeros(2), log_prob=log_prob, reached=torch.tensor([True, False]))
    loss = losses.surrogate(Trace({"a": (came,)}, (), (), 2), torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 0.25
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [-0.5, 0.0]


def test_hybrid_with_all_gates_on_and_no_price_is_plain_training() -> None:
    model, x, target = network(), torch.randn(6, WIDTH), torch.tensor([0, 1, 2, 0, 1, 2])
    on = pliant.bind(model, {"*": rules.Always()})
    y, trace = pliant.record(on)(x)
    branch = [p for k in (0, 1) for p in model[k].branch.parameters()]
    hybrid = torch.autograd.grad(losses.Hybrid(alpha=0.0)(y, trace, target, 0.0), branch)
    plain = torch.autograd.grad(nn.functional.cross_entropy(pliant.plain(model)(x), target), branch)
    for one, other in zip(hybrid, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_hybrid_adds_both_gradients() -> None:
    model, x, target = network(), torch.randn(6, WIDTH), torch.tensor([0, 1, 2, 0, 1, 2])
    y, trace = pliant.record(model)(x)
    returns = losses.SkipNetReturns(alpha=0.5)
    wanted = nn.functional.cross_entropy(y, target) + losses.surrogate(trace, returns(y, trace, target))
    torch.testing.assert_close(losses.Hybrid(alpha=0.5)(y, trace, target, 0.0), wanted)
    light = nn.functional.cross_entropy(y, target) + 0.01 * losses.surrogate(trace, returns(y, trace, target))
    torch.testing.assert_close(losses.Hybrid(alpha=0.5, weight=0.01)(y, trace, target, 0.0), light)
    with pytest.raises(PliantError, match=r"weight=-1"):
        losses.Hybrid(weight=-1)
    ones = nn.functional.cross_entropy(y, target, reduction="none").detach()
    saved = torch.stack([1 - d.value for site in trace for d in trace[site]])
    torch.testing.assert_close(returns(y, trace, target)[0], -(ones - 0.25 * saved.sum(0)))
    torch.testing.assert_close(returns(y, trace, target)[1], -(ones - 0.25 * saved[1]))


def test_gradients_under_checkpointing_are_the_same() -> None:
    found = []
    for saves in (False, True):
        model = network()

        class Saved(nn.Module):
            def __init__(self, model: nn.Module, saves: bool) -> None:
                super().__init__()
                self.model, self.saves = model, saves

            def forward(self, x: Tensor) -> Any:
                return checkpoint(self.model, x, use_reentrant=False) if self.saves else self.model(x)

        x = torch.linspace(-1, 1, 24).reshape(8, WIDTH)
        torch.manual_seed(4)
        y, trace = pliant.record(Saved(model, saves))(x)
        loss = losses.Reinforce(reward, baseline=losses.LeaveOneOut())(y, trace, TARGET, 0.0) + y.square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    model, x, target = network(), torch.randn(rows, WIDTH), torch.zeros(rows, dtype=torch.long)
    y, trace = pliant.record(model)(x)
    terms = [
        losses.Reinforce(reward, baseline=losses.LeaveOneOut()), losses.Reinforce(reward, baseline=losses.MovingAverage()),
        losses.Hybrid(), losses.EntropyBonus(),
    ]  # fmt: skip
    for term in terms:
        loss = term(y, trace, target, 0.0)
        assert loss.isfinite()
        loss.backward(retain_graph=True)


def test_a_chain_of_five_states_is_worth_what_is_known() -> None:
    """Stop for what a state pays, or go on to the last one, which pays 1; discount 0.8."""
    torch.manual_seed(0)
    pays, discount, end = torch.tensor([0.1, 0.7, 0.1, 0.2, 0.3]), 0.8, 5
    q = nn.Parameter(torch.zeros(end, 2))
    explore = EpsilonGreedy(Threshold(0.0), epsilon=0.5).train()
    optimizer = torch.optim.Adam([q], lr=0.02)
    loss = losses.QLearning(lambda y, trace, target: y, discount=discount)
    for _ in range(400):
        rows = torch.full((256,), True)
        visits, rewards = [], []
        for state in range(end):
            scores = q[state].expand(256, 2)
            on = explore((scores[:, 1] - scores[:, 0]).detach()).value
            value = torch.stack([1 - on, on], 1)
            visits.append(Decision(value, scores=scores, reached=rows, visit=state))
            rewards.append(torch.where(on > 0, float(state == end - 1), pays[state]))
            rows = rows & (on > 0)
        optimizer.zero_grad()
        loss(torch.stack(rewards), Trace({"s": tuple(visits)}, (), (), 256), TARGET, 0.0).backward()
        optimizer.step()
    wanted = torch.zeros(end, 2)
    coming = torch.tensor(1.0)
    for state in reversed(range(end)):
        wanted[state] = torch.stack([pays[state], coming])
        coming = discount * wanted[state].max()
    assert ((q.detach() - wanted).abs() <= 0.05 * wanted).all(), (q, wanted)


def test_the_price_of_a_budget_finds_itself() -> None:
    price = losses.Dual(0.5, rate=0.1)
    for _ in range(3):
        price.update(torch.tensor([1.0, 1.0]))
    assert price.value.item() == pytest.approx(0.15)
    price.update(torch.tensor([]))
    for _ in range(20):
        price.update(torch.tensor([0.0]))
    assert price.value.item() == 0
    assert losses.Dual(0.5, rate=0.1).load_state_dict(price.state_dict())


def test_entropy_falls_off_from_a_fair_coin() -> None:
    fair, sure = (
        Trace({"a": (Decision(torch.ones(1), soft=torch.tensor([p]), log_prob=torch.zeros(1)),)}, (), (), 1)
        for p in (0.5, 0.99)
    )
    bonus = losses.EntropyBonus()
    y = torch.zeros(1, 2)
    assert bonus(y, fair, TARGET, 0.0) < bonus(y, sure, TARGET, 0.0) < 0


def mistakes() -> list[tuple[Callable[[], object], str]]:
    d = Decision(torch.ones(2), scores=torch.zeros(2))
    undrawn, drawn = (
        Trace({"a": (x,)}, (), (), 2)
        for x in (d, Decision(torch.ones(2), scores=torch.zeros(2), log_prob=torch.zeros(2)))
    )
    y, target = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    return [
        (lambda: losses.Reinforce(reward)(torch.zeros(2, 3), undrawn, target, 0.0), "without log-probabilities"),
        (lambda: losses.surrogate(drawn, torch.zeros(3)), r"rewards of shape \(3,\)"),
        (lambda: losses.Reinforce(reward, baseline=losses.learned)(torch.zeros(2, 3), drawn, target, 0.0), "without a value"),
        (lambda: losses.SelfCritical(losses.SkipNetReturns())(y, drawn, target, 0.0, (y, drawn)), "one for each row"),
        (lambda: losses.SkipNetReturns(costs={"b": 1.0})(y, drawn, target), "costs for"),
        (lambda: losses.QLearning(lambda *a: torch.zeros(1, 2))(y, undrawn, target, 0.0), "scores of shape"),
        (lambda: losses.QLearning(reward, discount=1.5), "discount 1.5"),
        (lambda: losses.LeaveOneOut(3)(torch.zeros(4), None), "4 rows for 3 samples"),
        (lambda: losses.LeaveOneOut(0), "0 samples"),
        (lambda: losses.MovingAverage(1.0), "keep 1.0"),
        (lambda: losses.Dual(0.5, rate=0.0), "rate 0.0"),
        (lambda: losses.BlockDropReward(gamma=-1.0), "gamma -1.0"),
        (lambda: losses.Priced(-0.1), "price -0.1"),
    ]  # fmt: skip


@pytest.mark.parametrize("k", range(13))
def test_mistakes_are_told(k: int) -> None:
    make, says = mistakes()[k]
    with pytest.raises(PliantError, match=says):
        make()
