"""Phases that bind rules, bring a loss, stop themselves; curricula, recipes, and resuming in the middle of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pliant
from pliant import PliantError
from pliant.estimators import ScoreFunction, StraightThrough
from pliant.estimators.schedules import Decay, Ramp
from pliant.rules import Always, Never, Random, Threshold
from pliant.train import Curriculum, Fit, Phase, Plateau, agent_on_backbone, alternating, exits_on_backbone, fit, plan


def gated(blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)

    def block() -> nn.Module:
        branch = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        return pliant.execute.Skip(branch, pliant.Site(pliant.scores.LinearGate(6), Threshold(0.0)))

    return nn.Sequential(nn.Linear(3, 6), *(block() for _ in range(blocks)), nn.Linear(6, 1))


def points(rows: int = 24) -> SimpleNamespace:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(x=x, y=x.sum(1, keepdim=True))


def square(y, trace, target, progress):
    return {"square": (y - target).square().mean()}


def reward(y, trace, target, progress):
    """Squares, and the score function of those that were decided with a log-probability."""
    each = (y - target).square()
    chosen = [d.log_prob for site in trace for d in trace[site] if d.log_prob is not None]
    told = torch.stack([lp.flatten() for lp in chosen]).sum(0) if chosen else each.squeeze(1) * 0
    return {"square": each.mean(), "agent": (told * each.detach().squeeze(1)).mean()}


def cpu(**kwargs):
    return Fit(**{"batch_size": 8, "accelerator": "cpu", **kwargs})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Seen:
    """A loss that writes down which sites decided with what."""

    def __init__(self) -> None:
        self.rules: list[dict[str, bool]] = []

    def __call__(self, y, trace, target, progress):
        self.rules.append({site: trace[site][0].log_prob is not None for site in trace})
        return reward(y, trace, target, progress)


def test_a_phase_trains_under_its_own_rules_and_the_model_keeps_its_own():
    model = gated()
    rules = [site.rule for site in pliant.sites(model).values()]
    before = state(model)
    seen = []

    def loss(y, trace, target, progress):
        seen.append([trace.dense(site).mean().item() for site in trace])
        return square(y, trace, target, progress)

    phases = [
        Phase("on", 1, lr=0.01, rules={"*": Always()}),
        Phase("off", 1, lr=0.01, rules={"1.*": Never(), "*": Always()}),
    ]
    fit(model, points(), loss, phases, options=cpu())
    assert seen[:3] == [[1.0, 1.0, 1.0]] * 3
    assert seen[3:] == [[0.0, 1.0, 1.0]] * 3
    assert [site.rule for site in pliant.sites(model).values()] == rules
    after = state(model)
    assert list(after) == list(before)
    assert not torch.equal(after["1.block.0.weight"], before["1.block.0.weight"])
    assert not torch.equal(after["1.block.1.running_mean"], before["1.block.1.running_mean"])
    for name in after:
        if "scorer" in name or "rule" in name:  # gates whose scores nobody read
            assert torch.equal(after[name], before[name]), name


def test_a_phase_has_its_own_loss_and_metric():
    def other(y, trace, target, progress):
        return {"other": (y - target).abs().mean()}

    asked = []

    def metric(model):
        asked.append((model.training, torch.is_grad_enabled()))
        return float(torch.rand(()))  # draws nothing from training's generators

    phases = [Phase("a", 1, lr=0.01), Phase("b", 2, lr=0.01, loss=other, metric=metric)]
    plain = fit(gated(), points(), square, [phases[0], replace(phases[1], metric=None)], options=cpu())
    history = fit(gated(), points(), square, phases, options=cpu())
    assert ["square" in h for h in history] == [True, False, False]
    assert ["other" in h and "held_out" in h for h in history] == [False, True, True]
    assert asked == [(False, False)] * 2
    assert history[2]["other"] == plain[2]["other"]


def test_estimators_bound_in_a_phase_are_annealed_there_and_forgotten():
    model, slopes = gated(), []

    def loss(y, trace, target, progress):
        return square(y, trace, target, progress)

    class Watching(StraightThrough):
        def forward(self, scores):
            slopes.append(float(self.surrogate.slope))
            return super().forward(scores)

    estimator = Watching(Threshold(0.0), surrogate=pliant.estimators.HardSigmoid(1.0))
    phase = Phase("gates", 3, lr=0.01, rules={"*": estimator}, anneal={"*.slope": Ramp(1.0, 0.5, 1.75)})
    fit(model, points(8), loss, [phase], options=cpu())
    assert slopes == [1.0] * 3 + [1.5] * 3 + [1.75] * 3
    assert float(estimator.surrogate.slope) == 1.0
    assert not any("slope" in name for name in model.state_dict())
    with pytest.raises(PliantError, match=r"\*\.slope"):
        fit(model, points(), loss, [replace(phase, rules={})], options=cpu())


def test_schedules_of_buffers_have_the_stated_values():
    assert [Ramp()(epoch) for epoch in (0, 50, 200)] == [1.0, 3.0, 5.0]
    assert [round(Decay(0.1)(epoch), 6) for epoch in (0, 1, 50)] == [1.0, 0.904837, 0.5]
    model = gated()
    fit(model, points(), square, [Phase("a", 3, lr=0.01, anneal={"*.threshold": lambda t: -10.0 - t})], options=cpu())
    assert {float(site.rule.threshold) for site in pliant.sites(model).values()} == {-12.0}


def test_a_curriculum_frees_the_last_blocks_first_and_forced_ones_are_no_choices():
    model, loss = gated(), Seen()
    paths = tuple(pliant.sites(model))
    freed = Curriculum(paths, free={"*": ScoreFunction(Threshold(0.0))})
    fit(model, points(8), loss, [Phase("agent", 3, lr=0.01, rules=freed)], options=cpu())
    assert [[epoch[path] for path in paths] for epoch in loss.rules] == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]
    assert list(Curriculum(paths, order="head", step=2)(0)) == list(paths[1:])
    with pytest.raises(PliantError, match="curriculum"):
        Curriculum(())


def test_forced_decisions_cost_what_the_dense_network_does():
    model = gated().eval()
    forced = pliant.bind(model, Curriculum(tuple(pliant.sites(model)), first=0)(0))
    _, trace = pliant.record(forced)(points().x)
    assert torch.equal(trace.flops, trace.dense_flops)
    assert all(d.scores is None and d.log_prob is None for site in trace for d in trace[site])


def test_what_a_phase_does_not_train_keeps_every_byte_under_bound_rules():
    model = gated()
    for phase, frozen in (
        (
            Phase("agent", 2, lr=0.1, train=("*scorer*",), rules={"*": ScoreFunction(Threshold(0.0))}, loss=reward),
            "block",
        ),
        (Phase("net", 2, lr=0.1, train=("*", "!*scorer*"), rules={"*": Always()}), "scorer"),
    ):
        before = state(model)
        fit(model, points(), square, [phase], options=cpu())
        after = state(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed
        assert not any(frozen in name for name in changed), changed


def test_a_plateau_ends_a_phase_and_the_next_one_follows():
    model = gated()
    phases = [Phase("short", 50, lr=1e-9, stop=Plateau(patience=2, least=1e-3)), Phase("next", 2, lr=0.01)]
    history = fit(model, points(), square, phases, options=cpu())
    assert [h["phase"] for h in history] == ["short"] * 3 + ["next"] * 2
    with pytest.raises(PliantError, match="held_out"):
        fit(model, points(), square, [Phase("x", 5, stop=Plateau("held_out", patience=1))], options=cpu())
    with pytest.raises(PliantError, match="patience"):
        Plateau(patience=0)
    higher = Plateau("held_out", patience=1, better="higher")
    assert [higher([{"held_out": v} for v in values]) for values in ((0.5, 0.6), (0.5, 0.5))] == [False, True]


class Stop(Exception):
    """Ends a run."""


def recipe(model: nn.Module) -> list[Phase]:
    """Every kind of phase: all-on, a curriculum with draws of its own, a stop rule, an annealed and a random rule."""
    generator = torch.Generator().manual_seed(5)
    paths = tuple(pliant.sites(model))
    freed = Curriculum(paths, forced=Random(0.7, generator), free={"*": ScoreFunction(Threshold(0.0))})
    base = Phase("", 1, lr=0.02, momentum=0.9)
    first, agent, joint = agent_on_backbone(settings=base, sampled=freed, reward=reward, epochs=(2, 3, 2))
    slope = StraightThrough(Threshold(0.0), surrogate=pliant.estimators.HardSigmoid(1.0))
    last = replace(
        base,
        name="relaxed",
        epochs=2,
        rules={"1.*": Random(0.5, generator), "*": slope},
        anneal={"*.slope": (1.0, 3.0)},
    )
    return [first, agent, replace(joint, epochs=9, stop=Plateau(patience=1, least=1e9)), last]


def run(path=None, stop=99):
    model, seen = gated(), []

    def on_epoch(entry):
        seen.append(entry)
        if len(seen) == stop:
            raise Stop

    try:
        history = fit(model, points(), square, recipe(model), options=cpu(checkpoint=path, on_epoch=on_epoch))
    except Stop:
        history = None
    return model, history


@pytest.mark.parametrize("stop", range(1, 10))
def test_stopped_after_any_epoch_of_any_kind_of_phase_it_resumes_to_the_bit(tmp_path, stop):
    expected, history = run()
    assert [h["phase"] for h in history] == ["pre-train"] * 2 + ["agent"] * 3 + ["joint"] * 2 + ["relaxed"] * 2
    path = tmp_path / "run.ckpt"
    run(path, stop)
    saved = torch.load(path, weights_only=True)
    assert saved["phase"] == history[stop - 1]["phase"]
    assert sum(saved["lengths"]) == stop
    model, resumed = run(path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for a, b in zip(history, resumed, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_checkpoint_of_another_rule_or_loss_is_refused(tmp_path):
    phase = Phase("a", 2, lr=0.01, rules={"*": Random(0.5)})
    fit(gated(), points(), square, [phase], options=cpu(checkpoint=tmp_path / "run.ckpt"))
    for change, said in (({"rules": {"*": Random(0.4)}}, "rules"), ({"loss": reward}, "loss")):
        with pytest.raises(PliantError, match=rf"another plan \({said}"):
            fit(gated(), points(), square, [replace(phase, **change)], options=cpu(checkpoint=tmp_path / "run.ckpt"))


def test_rules_with_parameters_and_patterns_of_nothing_are_refused():
    model = gated()
    with pytest.raises(PliantError, match="with parameters"):
        fit(model, points(), square, [Phase("a", 1, rules={"*": pliant.scores.LinearGate(6)})], options=cpu())
    with pytest.raises(PliantError, match="matches a site"):
        fit(model, points(), square, [Phase("a", 1, rules={"x": Always()})], options=cpu())
    for train in (("!*scorer*",), ("*scorer*", "!*")):
        with pytest.raises(PliantError, match="left to choose"):
            fit(model, points(), square, [Phase("a", 1, train=train)], options=cpu())


class Replacing(nn.Module):
    """Puts a new tensor in its buffer's place at every call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.skip = pliant.execute.Skip(nn.Linear(3, 3), pliant.Site(nn.Flatten(0), Threshold(0.0)))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(self.skip(x))


def test_buffers_that_a_module_replaces_come_back_to_the_model():
    model = Replacing()
    fit(model, points(), square, [Phase("a", 2, lr=0.01, rules={"*": Always()})], options=cpu())
    assert float(model.calls) == 6


def test_the_plan_tells_rules_loss_metric_and_stop_and_only_those_that_are_used():
    text = plan([Phase("a", 2), Phase("b", 3, rules={"*": Random(0.5)}, loss=square, stop=Plateau())])
    assert text.splitlines()[0].split() == [
        "phase",
        "epochs",
        "optimizer",
        "schedule",
        "trains",
        "anneals",
        "clip",
        "rules",
        "loss",
        "stop",
    ]
    assert "*: Random(p=0.5)  square  Plateau(of=loss, patience=3, least=0.0, better=lower)" in text
    assert "rules" not in plan([Phase("a", 2)])


def test_recipes_are_lists_of_phases_that_can_be_run():
    model = gated()
    last = exits_on_backbone(settings=Phase("", 1, lr=0.01), last=square, early=("1.*",), epochs=(1, 1))
    history = fit(
        model, points(), square, [*last, *alternating(Phase("a", 1, lr=0.01), Phase("b", 1, lr=0.01), 2)], options=cpu()
    )
    assert [h["phase"] for h in history] == ["backbone", "exits", "a 1", "b 1", "a 2", "b 2"]
    for wrong in (
        lambda: alternating(Phase("a", 1), Phase("b", 1), 0),
        lambda: agent_on_backbone(settings=Phase("", 1), sampled={}, reward=reward, epochs=(1,)),
    ):
        with pytest.raises(PliantError):
            wrong()
