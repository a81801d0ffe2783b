"""Retrofitted exits beside other parts: criteria with memory, own heads, dynamic hosts, training and tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import losses, rules, scores
from pliant.execute import Skip
from pliant.retrofit import exits
from pliant.retrofit.heads import PooledHead


def block(size: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.Tanh())


def host() -> nn.Sequential:
    return nn.Sequential(block(), block(), block(), block(), nn.Linear(6, 4))


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def retrofitted(**changes: Any) -> Any:
    return exits(host(), ["0", "1", "2"], example=X[:2], **changes)


def flops_exact(model: nn.Module, x: Tensor = X) -> tuple[Tensor, pliant.Trace]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(model)(x)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    return y, trace


def test_a_criterion_with_memory_follows_the_rows() -> None:
    model = retrofitted(criterion=scores.Patience(1), threshold=0.0).eval()
    y, trace = flops_exact(model)
    assert 0 < trace.dense("exits.sites.1").sum() < 7
    torch.testing.assert_close(y, flops_exact(pliant.masked(model))[0])
    torch.testing.assert_close(y, torch.cat([model(x[None]) for x in X]))


def test_soft_weights_mix_the_answers() -> None:
    soft = pliant.bind(retrofitted(), {"*": rules.Sigmoid()})
    torch.testing.assert_close(soft.eval()(X), pliant.masked(soft)(X))


def test_own_heads_are_used_as_they_are() -> None:
    heads = [nn.Linear(6, 4) for _ in range(3)]
    model = retrofitted(heads=heads)
    assert list(model.exits.heads) == heads


def test_each_site_has_a_criterion_of_its_own() -> None:
    found = [site.scorer for site in pliant.sites(retrofitted(criterion=scores.Entropy())).values()]
    assert len({id(s) for s in found}) == 3
    assert all(isinstance(s, scores.Entropy) for s in found)


def test_a_training_step_moves_heads_and_backbone() -> None:
    model = retrofitted().train()
    y, trace = pliant.record(model)(X)
    target = torch.arange(7) % 4
    assert [e.rows for e in trace.exits] == [None] * 4
    losses.MultiExit()(y, trace, target, 0.0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_host_behind_the_exits_may_be_frozen() -> None:
    plain = host().requires_grad_(False)
    model = exits(plain, ["0"], example=X).train()
    y, trace = pliant.record(model)(X)
    losses.MultiExit()(y, trace, torch.zeros(7, dtype=torch.int64), 0.0).backward()
    assert all((p.grad is not None) == name.startswith("exits.") for name, p in model.named_parameters())


def test_the_model_keeps_its_mode_and_its_statistics() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).train()
    before = plain[1].running_mean.clone()
    model = exits(plain, ["1"], example=X)
    assert model.training
    assert model.exits.training
    assert torch.equal(plain[1].running_mean, before)


def test_a_dynamic_host_stays_dynamic() -> None:
    gate = pliant.Site(scores.LinearGate(6, bias=0.0), rules.Threshold(0.0))
    nn.init.normal_(gate.scorer.linear.weight)
    plain = nn.Sequential(block(), Skip(block(), gate), block(), nn.Linear(6, 4)).eval()
    model = exits(plain, ["0", "2"], example=X)
    for p in (0.0, 0.4, 0.8, 1.0):
        _, trace = pliant.record(pliant.bind(model, {"*": rules.Random(p, torch.Generator().manual_seed(3))}))(X)
        given = pliant.bind(model, {"*": rules.Given(trace)})
        torch.testing.assert_close(flops_exact(given)[0], flops_exact(pliant.masked(given))[0])


def test_one_retrofitted_model_inside_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = block(), retrofitted()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x))

    model = exits(Outer().eval(), ["first"], example=X)
    for p in (0.0, 0.5, 0.9, 1.0):
        _, trace = pliant.record(pliant.bind(model, {"*": rules.Random(p, torch.Generator().manual_seed(1))}))(X)
        given = pliant.bind(model, {"*": rules.Given(trace)})
        torch.testing.assert_close(flops_exact(given)[0], flops_exact(pliant.masked(given))[0])


def test_thresholds_are_tuned_for_a_budget() -> None:
    model = retrofitted().eval()
    point = pliant.tune(model, [(torch.randn(64, 6), torch.randint(4, (64,)))], budget=0.7)
    assert point.share <= 0.7
    assert list(point.thresholds) == [f"exits.sites.{k}" for k in range(3)]


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_batch_and_a_single_row(rows: int) -> None:
    model = retrofitted().eval()
    y, trace = flops_exact(model, X[:rows])
    assert y.shape == (rows, 4)
    assert trace.flops.shape == (rows,)


def test_tokens_that_do_not_count_are_not_pooled() -> None:
    hidden, head = torch.randn(2, 3, 6), PooledHead(torch.zeros(1, 3, 6), 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(head(hidden, mask)[0], head.linear(hidden[0, :2].mean(0)))
    torch.testing.assert_close(head(hidden, mask)[1], head.linear.bias)
    torch.testing.assert_close(head(hidden), head.linear(hidden.mean(1)))


def test_what_travels_beside_is_cut_only_if_it_is_rows() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, per_row: Tensor, *, table: Tensor) -> tuple[Tensor, Tensor]:
            return (self.linear(x) + table.sum(0)).tanh() * per_row, table

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.table = nn.Parameter(torch.randn(7, 6))  # as many entries as there are rows
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor, per_row: Tensor) -> dict[str, Tensor]:
            table = self.table
            for layer in self.layers:
                x, table = layer(x, per_row, table=table)
            return {"logits": self.head(x)}

    call = (X, torch.rand(7, 1))
    model = exits(Net().eval(), ["layers.0", "layers.1"], example=call)
    plan = rules.Random(0.6, torch.Generator().manual_seed(0))
    y, trace = pliant.record(pliant.bind(model, {"*": plan}))(*call)
    assert 0 < trace.dense("exits.sites.0").sum() < 7
    wanted = pliant.masked(pliant.bind(model, {"*": rules.Given(trace)}))(*call)
    assert list(y) == ["logits"]
    torch.testing.assert_close(y["logits"], wanted["logits"])
