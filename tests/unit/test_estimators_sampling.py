"""What estimators draw: distributions, half precision, evaluation, NaN, state, and weights in executors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from pliant import PliantError, rules
from pliant.estimators import (
    BinaryConcrete,
    Copy,
    Decay,
    EpsilonGreedy,
    EpsilonGreedyOneHot,
    Gumbel,
    GumbelOneHot,
    GumbelSoftmax,
    HardConcrete,
    HardSigmoid,
    Ramp,
    ScoreFunction,
    SemHash,
    SoftBinaryConcrete,
    StochasticStraightThrough,
    StraightThrough,
    concrete_log_density,
)

BINARY: dict[str, Any] = {
    "straight-through": StraightThrough,
    "copy": lambda rule: StraightThrough(rule, surrogate=Copy()),
    "stochastic": lambda rule: StochasticStraightThrough(rule, surrogate=HardSigmoid(0.2)),
    "gumbel": Gumbel,
    "soft concrete": SoftBinaryConcrete,
    "hard concrete": HardConcrete,
    "semhash": SemHash,
    "score function": lambda rule: ScoreFunction(rule, floor=0.8),
    "epsilon-greedy": EpsilonGreedy,
}
SAMPLED = ("stochastic", "gumbel", "score function")
CHOICES = (GumbelSoftmax, GumbelOneHot, EpsilonGreedyOneHot)


def zero() -> rules.Threshold:
    return rules.Threshold(0.0)


def same_distribution(a: Tensor, b: Tensor) -> bool:
    """Kolmogorov and Smirnov's two-sample test at 1 %."""
    grid = torch.cat([a, b]).sort().values
    apart = [torch.searchsorted(t.sort().values, grid, right=True) / len(t) for t in (a, b)]
    return float((apart[0] - apart[1]).abs().max()) < 1.628 * math.sqrt(1 / len(a) + 1 / len(b))


# Distributions.


def test_one_hot_samples_have_the_softmaxs_frequencies() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([0.5, -1.0, 0.0])
    out = GumbelOneHot(temperature=0.3)(scores.expand(100_000, 3))
    assert torch.equal(out.value.sum(-1), torch.ones(100_000))
    expected = 100_000 * scores.softmax(-1)
    assert float(((out.value.sum(0) - expected) ** 2 / expected).sum()) < 9.21  # chi-square, 2 degrees, 1 %
    assert out.log_prob is not None
    assert out.log_prob.shape == (100_000,)
    torch.testing.assert_close(out.log_prob[:9], (out.value[:9] * scores.log_softmax(-1)).sum(-1))


def test_two_way_gumbel_softmax_is_binary_concrete() -> None:
    torch.manual_seed(0)
    n, logit = 50_000, 0.7
    soft = GumbelSoftmax(temperature=0.6)(torch.tensor([logit, 0.0]).expand(n, 2)).value
    torch.testing.assert_close(soft.sum(-1), torch.ones(n))
    binary = SoftBinaryConcrete(zero(), temperature=0.6)(torch.full((n,), logit)).value
    assert same_distribution(soft[:, 0], binary)
    assert not same_distribution(soft[:, 0], SoftBinaryConcrete(zero(), temperature=0.6)(torch.full((n,), 0.8)).value)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("temperature", [0.1, 2 / 3, 5.0])
def test_binary_concrete_spends_with_the_probability_of_its_logit(logit: float, temperature: float) -> None:
    torch.manual_seed(1)
    n, p = 100_000, 1 / (1 + math.exp(-logit))
    out = BinaryConcrete(zero(), temperature=temperature)(torch.full((n,), logit))
    assert abs(float(out.value.mean()) - p) < 3 * math.sqrt(p * (1 - p) / n)


def test_binary_concrete_is_another_name_for_gumbel() -> None:
    assert BinaryConcrete is Gumbel
    assert float(BinaryConcrete(zero()).temperature) == 1.0


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 2 / 3])
def test_hard_concrete_is_zero_as_often_as_it_says(logit: float, temperature: float) -> None:
    torch.manual_seed(0)
    out = HardConcrete(zero(), temperature=temperature)(torch.full((200_000,), logit))
    assert (out.value == 0).any()
    assert out.soft is not None
    assert abs(float((out.value != 0).double().mean()) / float(out.soft[0]) - 1) < 0.01


def test_the_density_of_a_relaxed_choice_integrates_to_one() -> None:
    y = (torch.arange(1, 20_000, dtype=torch.float64) / 20_000)[:, None]
    log_y = torch.cat([y, 1 - y], -1).log()
    scores = torch.tensor([0.4, -0.3], dtype=torch.float64)
    density = concrete_log_density(log_y, scores, 0.9).exp()
    assert abs(float(density.sum()) / 20_000 - 1) < 1e-2


def test_epsilon_greedy_explores_as_often_as_it_says_and_evenly() -> None:
    torch.manual_seed(0)
    out = EpsilonGreedyOneHot(epsilon=0.3)(torch.tensor([0.0, 2.0, 1.0]).expand(100_000, 3))
    expected = 100_000 * torch.tensor([0.1, 0.8, 0.1])
    assert float(((out.value.sum(0) - expected) ** 2 / expected).sum()) < 9.21
    assert not out.value.requires_grad
    binary = EpsilonGreedy(rules.Threshold(1.0), epsilon=0.4)(torch.full((100_000,), 0.5))
    assert abs(float(binary.value.mean()) - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 100_000)


def test_a_score_function_keeps_its_value_from_the_gradient() -> None:
    out = ScoreFunction(zero())(torch.zeros(3, requires_grad=True))
    assert not out.value.requires_grad
    assert out.soft is not None
    assert out.soft.requires_grad


@pytest.mark.parametrize("name", SAMPLED)
def test_an_expected_cost_is_the_mean_of_realised_ones(name: str) -> None:
    torch.manual_seed(0)
    out = BINARY[name](rules.Threshold(0.5))(torch.full((100_000,), -0.7))
    assert out.soft is not None
    p = float(out.soft[0])
    assert abs(float(out.value.mean()) - p) < 3.5 * math.sqrt(p * (1 - p) / 100_000)
    torch.testing.assert_close(out.log_prob, torch.where(out.value > 0, out.soft, 1 - out.soft).log())


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BINARY)
def test_binary_draws_are_finite_in_half_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.linspace(-12, 12, 100_000).to(dtype).requires_grad_()
    out = BINARY[name](zero())(scores)
    assert out.value.dtype == dtype
    total = out.value.sum()
    for other in (out.soft, out.log_prob):
        if other is not None:
            assert other.isfinite().all()
            total = total + other.float().sum()
    assert out.value.isfinite().all()
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, scores)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CHOICES)
def test_choices_are_finite_in_half_precision(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.linspace(-12, 12, 1_000_000).reshape(-1, 4).to(dtype).requires_grad_()
    out = kind()(scores)
    assert out.value.dtype == dtype
    assert out.value.isfinite().all()
    if out.value.requires_grad:
        (gradient,) = torch.autograd.grad(out.value.float().square().sum(), scores)
        assert gradient.isfinite().all()


# Evaluation.


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(width=32) | st.floats(-3, 3, width=32), min_size=1, max_size=6),
    threshold=st.floats(-2, 2, width=32),
    name=st.sampled_from(sorted(BINARY)),
)
def test_in_evaluation_the_value_is_the_threshold_rules(scores: list[float], threshold: float, name: str) -> None:
    s = torch.tensor(scores)
    rule = rules.Threshold(threshold)
    estimator = BINARY[name](rule).eval()
    state = torch.get_rng_state()
    value = estimator(s).value
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(value, rule(s).value)
    assert set(value.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", CHOICES)
def test_in_evaluation_a_choice_is_the_largest_and_draws_nothing(kind: Any) -> None:
    s = torch.randn(20, 2, 5)
    state = torch.get_rng_state()
    value = kind().eval()(s).value
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(value.argmax(-1), s.argmax(-1))
    assert torch.equal(value.sum(-1), torch.ones(20, 2))


@pytest.mark.parametrize("training", [True, False])
def test_nan_spends(training: bool) -> None:
    s = torch.tensor([float("nan"), -3.0])
    for make in BINARY.values():
        for _ in range(8):  # half of a hashed batch is soft
            assert make(zero()).train(training)(s).value[0] == 1
    broken = torch.tensor([[float("nan"), 5.0, float("nan"), 1.0]])
    for kind in CHOICES:
        assert kind().train(training)(broken).value.tolist() == [[0, 0, 1, 0]]


# State.


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda v: StraightThrough(zero(), surrogate=HardSigmoid(v)), {"rule.threshold", "surrogate.slope"}),
        (lambda v: HardConcrete(zero(), temperature=v), {"rule.threshold", "temperature"}),
        (lambda v: GumbelOneHot(temperature=v), {"temperature"}),
        (lambda v: ScoreFunction(zero(), floor=v), {"rule.threshold", "floor"}),
        (lambda v: EpsilonGreedy(zero(), epsilon=v), {"rule.threshold", "epsilon"}),
        (lambda v: EpsilonGreedyOneHot(epsilon=v), {"epsilon"}),
    ],
)
def test_what_is_annealed_is_a_buffer(make: Any, names: set[str]) -> None:
    one, other = make(0.75), make(1.0)
    assert set(one.state_dict()) == names
    other.load_state_dict(copy.deepcopy(one).state_dict())
    assert other.state_dict() == one.state_dict()


def test_slope_annealing_has_the_written_values_and_phases_give_the_same() -> None:
    from pliant.train.phases import Phase, anneal

    model = pliant.Site(nn.Flatten(0), StraightThrough(zero(), surrogate=HardSigmoid()))
    slope: Tensor = model.get_buffer("rule.surrogate.slope")
    for epoch, wanted in ((0, 1.0), (50, 3.0), (200, 5.0)):
        Ramp().apply(model, "*slope", epoch)
        assert slope.item() == wanted == Ramp()(epoch)
    rise = Phase("anneal", epochs=101, anneal={"*slope": (1.0, 5.0)})
    for epoch in (0, 1, 50, 100):
        anneal(rise, model, epoch)
        assert slope.item() == pytest.approx(Ramp()(epoch))
    forever = Phase("anneal", epochs=201, anneal={"*slope": Ramp()})
    for epoch, wanted in ((0, 1.0), (50, 3.0), (200, 5.0)):
        anneal(forever, model, epoch)
        assert slope.item() == wanted
    with pytest.raises(PliantError, match="matches a buffer"):
        Ramp().apply(model, "*slop", 0)
    assert [Decay(0.01)(t) for t in (0, 1000)] == [1.0, 0.5]


def test_estimators_refuse_what_makes_no_sense() -> None:
    for make, says in (
        (lambda: HardSigmoid(0.0), r"slope 0\.0"),
        (lambda: GumbelSoftmax(temperature=-1.0), r"temperature -1\.0"),
        (lambda: HardConcrete(zero(), stretch=(0.0, 1.1)), "wider than"),
        (lambda: ScoreFunction(zero(), floor=0.4), r"within \[0\.5, 1\]"),
        (lambda: EpsilonGreedy(zero(), epsilon=1.5), r"epsilon 1\.5"),
        (lambda: SemHash(rules.Always()), "expected a Threshold"),
        (lambda: GumbelOneHot()(torch.zeros(3)), "alternatives last"),
    ):
        with pytest.raises(PliantError, match=says):
            make()


# Weights strictly between 0 and 1 in executors.

WEIGHTS = ("soft concrete", "hard concrete", "semhash")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("otherwise", [None, nn.Linear(4, 4)], ids=["identity", "other"])
def test_fractional_weights_mean_the_same_masked_and_gathered(name: str, grad: bool, otherwise: Any) -> None:
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    block = nn.Linear(4, 4)
    x = torch.randn(64, 4)
    nets = [
        pliant.execute.Skip(block, pliant.Site(gate, BINARY[name](zero())), otherwise=otherwise).train(),
        pliant.execute.Residual(block, pliant.Site(gate, BINARY[name](zero())), shortcut=otherwise).train(),
    ]
    for net in nets:
        with torch.set_grad_enabled(grad):
            torch.manual_seed(3)
            y, trace = pliant.record(pliant.masked(net))(x)
            torch.manual_seed(3)
            other, _ = pliant.record(pliant.gathered(net))(x)
        value = trace["site"][0].value.detach()
        assert ((value > 0) & (value < 1)).any()
        torch.testing.assert_close(other, y, atol=1e-5, rtol=1e-5)
        base = x if otherwise is None else otherwise(x)
        mixed = value[:, None] * block(x)
        mixed = mixed + (base if isinstance(net, pliant.execute.Residual) else (1 - value[:, None]) * base)
        torch.testing.assert_close(y, mixed, atol=1e-5, rtol=1e-5)
        replay = pliant.bind(net, {"*": rules.Given(trace)})
        torch.testing.assert_close(replay(x), y, atol=1e-5, rtol=1e-5)
