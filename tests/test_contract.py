"""The house: every system that the catalogue says works keeps the public contract."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import contract
import pliant
from nets import NETS, WIDTH, built
from pliant import PliantError, Site, rules, scores
from pliant.check import CHECKS, DEFAULT, check
from pliant.execute import Residual, Skip


@pytest.mark.parametrize("name", DEFAULT)
@pytest.mark.parametrize("id", contract.SYSTEMS)
def test_every_system_keeps_the_contract(id: str, name: str) -> None:
    assert id in contract.SMALL, f"add {id!r} to SMALL in tests/contract.py"
    model, x = contract.ready(id)
    assert check(model, x, only=[name])[name]


@pytest.mark.parametrize("id", contract.SYSTEMS)
def test_the_check_is_about_decisions_that_vary(id: str) -> None:
    """Else the contract would be kept by a network that never chooses."""
    model, x = contract.ready(id)
    _, trace = pliant.record(pliant.masked(model))(x)
    values = torch.cat([d.value.detach().flatten() for visits in trace.visits.values() for d in visits])
    assert float(values.min()) < float(values.max())


@pytest.mark.parametrize("name", NETS)
def test_every_composition_keeps_the_contract(name: str) -> None:
    quick = ["all_on", "recording", "rows", "dense_flops", "checkpoint", "reentrant", "state_dict", "threads", "single"]
    seen = check(built(name), torch.randn(6, WIDTH), only=quick)
    assert list(seen) == quick


def test_check_leaves_the_model_and_the_random_state_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.BatchNorm1d(WIDTH), pliant.bind(built("skip"), {"*": rules.Random(0.5, generator)})
    ).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    states = [torch.get_rng_state(), generator.get_state()]
    x = torch.randn(6, WIDTH)
    torch.set_rng_state(states[0])
    check(model, x, only=["gathered", "recording", "deepcopy", "flops", "threads", "expected_cost"])
    assert model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    assert all(p.grad is None for p in model.parameters())


def test_check_refuses_what_it_cannot_check() -> None:
    with pytest.raises(PliantError, match="check 'speed'; expected one of gathered"):
        check(built("skip"), torch.randn(6, WIDTH), only=["speed"])
    with pytest.raises(PliantError, match="a model without sites"):
        check(nn.Linear(2, 2), torch.randn(6, 2))
    with pytest.raises(PliantError, match="a batch of 2; expected at least 3 rows"):
        check(built("skip"), torch.randn(2, WIDTH))


def test_draws_from_a_private_generator_are_not_repeated_by_checkpointing() -> None:
    """PyTorch keeps only its own random state for the way back; the check finds what that would do to gradients."""
    model = pliant.bind(built("skip"), {"*": rules.Random(0.5, torch.Generator().manual_seed(3))})
    with pytest.raises(PliantError, match="check 'checkpoint'"):
        check(model, torch.randn(6, WIDTH), only=["checkpoint"])
    assert check(pliant.bind(model, {"*": rules.Random(0.5)}), torch.randn(6, WIDTH), only=["checkpoint"])


def test_a_looped_site_is_checked_as_far_as_it_can_be() -> None:
    block = built("skip")[1]
    model = nn.Sequential(block, nn.Tanh(), block).eval()
    seen = check(model, torch.randn(6, WIDTH), only=[c for c in DEFAULT if c not in ("gradient", "export")])
    assert "visited several times" in seen["replay"]
    assert "exact" in seen["flops"]


def test_a_sampling_model_is_checked_under_frozen_decisions() -> None:
    model = pliant.bind(built("either"), {"*": pliant.estimators.GumbelSample(rules.Threshold(0.0))})
    seen = check(model, torch.randn(6, WIDTH))
    assert list(seen) == list(DEFAULT)
    assert "its own samples" in seen["expected_cost"]


def test_seconds_are_asked_for_by_name() -> None:
    assert "seconds" in CHECKS
    assert "seconds" not in DEFAULT


def test_inputs_may_be_positional_or_named() -> None:
    model, x = built("skip")[1], torch.randn(6, WIDTH)
    for inputs in ((x,), {"x": x}):
        assert check(model, inputs, only=["gathered", "rows", "empty"])


# Models with a fault each, and the check that must find it.


def site() -> Site:
    made = scores.LinearGate(WIDTH, bias=0.0)
    nn.init.normal_(made.linear.weight)
    return Site(made, rules.Threshold(0.0))


class Faulty(Residual):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), site())


class GatheredForgetsTheShortcut(Faulty):
    def gathered(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        return super().gathered(x, given) - x


class PlainIsNotDense(Faulty):
    def plain(self, x: Tensor) -> Tensor:
        return x


class ChoosesBesideItsSite(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (torch.rand(len(x), 1) > 0.5)


class MixesRows(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class WorksOutsideItsParts(Faulty):
    def gathered(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        self.branch(x)
        return super().gathered(x, given)


class SavesAtValueOne(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.skip = Skip(nn.Identity(), site(), otherwise=nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)


class BranchesOnData(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1 if x.sum() > 0 else 0)


class KeepsItsInput(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class HidesATensor(Faulty):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.ones(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.hidden

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        self.hidden.fill_(2.0)
        return super().load_state_dict(*args, **kwargs)  # pyright: ignore[reportArgumentType]


class Squeezes(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(0)


class DropsNaN(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class NeedsRows(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(len(x), x.numel() // len(x)))


class WatchesTheTape(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        from pliant.core import tape

        return super().forward(x) + (tape.tape() is not None)


class RemembersBetweenPasses(Faulty):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x * self.calls)


FAULTS = {
    GatheredForgetsTheShortcut: "gathered",
    PlainIsNotDense: "all_on",
    ChoosesBesideItsSite: "replay",
    MixesRows: "rows",
    Faulty: "gradient",  # a threshold without an estimator
    WorksOutsideItsParts: "flops",
    SavesAtValueOne: "dense_flops",
    BranchesOnData: "export",
    KeepsItsInput: "deepcopy",
    HidesATensor: "state_dict",
    Squeezes: "single",
    NeedsRows: "empty",
    DropsNaN: "nan",
    WatchesTheTape: "recording",
    RemembersBetweenPasses: "checkpoint",
}


def test_threads_that_meet_in_a_global_are_found() -> None:
    slot: dict[str, bool] = {}

    class Shared(Faulty):
        def forward(self, x: Tensor) -> Tensor:
            slot["asks"] = self.site.rule.reads_scores
            time.sleep(0.001)
            return super().forward(x) + slot["asks"]

    with pytest.raises(PliantError, match=r"calls altered .*check 'threads'"):
        check(Shared(), torch.randn(6, WIDTH), only=["threads"])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_found_and_named(fault: type[Faulty]) -> None:
    name = FAULTS[fault]
    with pytest.raises(PliantError, match=f"check '{name}'") as caught:
        check(fault().eval(), torch.randn(6, WIDTH), only=[name])
    crashed = caught.value.expected == "no error"  # found by its own test, not by falling over
    assert crashed == (fault is NeedsRows)
