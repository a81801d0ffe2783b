"""Static parts are compiled one by one, and a new mix of decisions compiles nothing again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pliant
from hosts import call_of, off
from pliant import PliantError, rules
from pliant.deploy.compile import static_parts
from pliant.execute import Exits
from pliant.retrofit import exits, skips


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chain() -> nn.Module:
    torch.manual_seed(0)

    def site() -> pliant.Site:
        return pliant.Site(pliant.scores.MaxProbability(), rules.Threshold(0.7))

    stages = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    return Exits(stages, [nn.Linear(4, 4) for _ in range(3)], [site(), site()]).eval()


@torch.no_grad()
def test_other_mixes_compile_nothing_again() -> None:
    model, counter = chain(), CompileCounter()
    compiled = pliant.compile(model, backend=counter)
    x = torch.randn(8, 4)

    def run(rows: int, first: int, second: int) -> None:
        plan = torch.zeros(rows, 2)
        plan[:first, 0] = 1
        plan[:second, 1] = 1
        torch.testing.assert_close(compiled(x[:rows], given=plan), model(x[:rows], given=plan))

    for mix in ((8, 6, 4), (8, 8, 8), (8, 1, 1), (8, 5, 1)):  # some rows, all, and one, which is a constant to PyTorch
        run(*mix)
    once = counter.frame_count
    assert once <= 3 * len(list(static_parts(model)))
    for first in range(2, 9):
        for second in range(first + 1):
            run(8, first, second)
    run(7, 3, 0)
    run(2, 2, 2)
    assert counter.frame_count == once


@torch.no_grad()
def test_decisions_stay_eager_and_are_recorded() -> None:
    model = chain()
    compiled = pliant.compile(model, backend="eager")
    x = torch.randn(6, 4)
    low = pliant.record(pliant.bind(model, {"*": rules.Always()}))(x)[1]
    for path, site in pliant.sites(compiled).items():
        assert low[path]
        site.rule.threshold.fill_(0.4)  # a buffer that the model shares
    (y, trace), (wanted, other) = (pliant.record(m)(x) for m in (compiled, model))
    torch.testing.assert_close(y, wanted)
    assert trace.flops.tolist() == other.flops.tolist()
    assert trace.dense_flops.tolist() == other.dense_flops.tolist()


def test_parameters_are_shared_and_copies_are_compiled_afresh() -> None:
    model = chain()
    compiled = pliant.compile(model, backend="eager")
    assert all(a is b for a, b in zip(model.parameters(), compiled.parameters(), strict=True))
    assert list(compiled.state_dict()) == list(model.state_dict())
    x = torch.randn(3, 4)
    with torch.no_grad():
        y = compiled(x)
        for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            torch.testing.assert_close(twin(x), y)
            for p in twin.parameters():
                p.fill_(float("nan"))
            assert twin(x).isnan().all()
        torch.testing.assert_close(compiled(x), y)
        torch.testing.assert_close(pliant.bind(compiled, {"*": rules.Always()})(x), pliant.plain(model)(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own, when it looks at an activation
def test_training_steps_are_the_eager_ones() -> None:
    model = chain().train()
    compiled = pliant.compile(model, backend="aot_eager")
    x = torch.randn(4, 4)
    grads = []
    for m in (model, compiled):
        m.zero_grad()
        m(x).square().mean().backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_hosts_with_exits_and_gates_are_compiled_between_them() -> None:
    host, call = call_of("torchvision resnet18")
    model = exits(skips(host, ["layer*.1"], example=call), ["layer1", "layer2"], example=call)
    compiled = pliant.compile(model, backend="eager")
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(2))})
    y, trace = pliant.record(drawn)(**call)
    given = {"*": rules.Given(trace)}
    parts = [path for path, _ in static_parts(model)]
    assert "layer1.0" in parts
    assert "skips.0" in parts
    assert not any(path.startswith("layer1.1") for path in parts)
    assert off(pliant.compile(pliant.bind(model, given), backend="eager")(**call), y) <= 2e-6
    assert off(compiled(**call), model(**call)) <= 2e-6


def test_nothing_to_compile_is_refused() -> None:
    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with pytest.raises(PliantError, match="without a static part"):
        pliant.compile(Count())
