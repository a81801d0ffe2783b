"""Gates put before the blocks of models that users have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits, off
from pliant import PliantError, rules
from pliant.check import DEFAULT
from pliant.retrofit import exits, skips

GATED = [name for name, host in HOSTS.items() if host.skips]


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_gates_on_models_that_users_have(name: str) -> None:
    host, call = call_of(name)
    model = skips(host, HOSTS[name].skips, example=call)
    y = host(**call)
    for form in (pliant.bind(model, {"*": rules.Always()}), pliant.plain(model)):
        found = form(**call)
        assert torch.equal(logits(found), logits(y))
        assert type(found) is type(y)
    assert [key for key in model.state_dict() if not key.startswith("skips.")] == list(host.state_dict())
    assert not any(vars(m).get("forward") for m in host.modules())
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(1))})
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(drawn)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops() < int(trace.dense_flops.sum())
    given = pliant.bind(model, {"*": rules.Given(trace)})
    assert torch.equal(logits(given(**call)), logits(y))
    assert off(pliant.masked(given)(**call), y) <= 2e-6
    shut = pliant.bind(model, {"*": rules.Never()})
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(shut)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert off(pliant.masked(shut)(**call), shut(**call)) <= 2e-6


@pytest.mark.parametrize("name", ["torchvision resnet18", "transformers BERT"])
@torch.no_grad()
def test_gates_and_exits_compose_in_either_order(name: str) -> None:
    host, call = call_of(name)
    at, blocks = HOSTS[name].exits, HOSTS[name].skips

    def heads() -> list[nn.Module]:
        torch.manual_seed(3)
        return list(exits(host, at, example=call).exits.heads)

    one = exits(skips(host, blocks, example=call), at, example=call, heads=heads())
    other = skips(exits(host, at, example=call, heads=heads()), blocks, example=call)
    drawn = pliant.bind(one, {"*": rules.Random(0.6, torch.Generator().manual_seed(1))})
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(drawn)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert len(trace.exits) == len(at) + 1
    for model in (one, other):
        given = pliant.bind(model, {"*": rules.Given(trace)})
        assert off(given(**call), y) <= 2e-6
        assert off(pliant.masked(given)(**call), y) <= 2e-6
        assert torch.equal(logits(pliant.bind(model, {"*": rules.Always()})(**call)), logits(host(**call)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.linear(x)
        return x + (y if scale is None else y * scale)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(4, 3)).eval()


def test_gates_learn_and_their_copies_are_their_own() -> None:
    x = torch.randn(8, 4)
    model = skips(small(), ["[01]"], example=x).train()
    y, trace = pliant.record(model)(x)
    (y.square().mean() + pliant.cost.expected_flops(trace).mean() / 100).backward()
    for path, site in pliant.sites(model).items():
        assert any(p.grad is not None and p.grad.any() for p in site.parameters()), path
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(float("nan"))
        assert twin(x).isnan().all()
        assert not model.eval()(x).isnan().any()


def test_the_public_checks() -> None:
    x = torch.randn(6, 4)
    model = skips(small(), ["[01]"], example=x)
    for site in pliant.sites(model).values():
        nn.init.normal_(site.scorer.head.linear.weight)
        nn.init.zeros_(site.scorer.head.linear.bias)
    items = [item for item in DEFAULT if item != "speed"]
    assert list(pliant.check(model, x, only=items)) == items


@torch.no_grad()
def test_an_exported_program_passes_rows_by_too() -> None:
    host, call = call_of("torchvision resnet18")
    model = skips(host, ["layer*.1"], example=call, rule=rules.Threshold(0.0))
    for path, site in pliant.sites(model).items():
        _, trace = pliant.record(model)(**call)
        scores = trace[path][0].scores
        site.scorer.head.linear.bias -= scores.median() + 1e-4
    program = torch.export.export(
        pliant.core.share(model), (call["x"],), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}]
    ).module()
    for rows in (5, 3):
        assert off(program(call["x"][:rows]), model(call["x"][:rows])) <= 2e-6


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["nothing"], "the name 'nothing'; expected that of a submodule"),
        ([], r"blocks=\[\]; expected a list"),
        ("0", "blocks='0'; expected a list"),
        (["2"], r"at site '2': got a block from \(3, 4\) to \(3, 3\)"),
        (["0", "0.linear"], "'0.linear' inside '0'"),
        (["?.linear", "2"], "at site '2'"),
    ],
)
def test_what_cannot_be_passed_by_is_refused(blocks: Any, message: str) -> None:
    with pytest.raises(PliantError, match=message):
        skips(small(), blocks, example=torch.randn(3, 4))


def test_gates_are_attached_once_and_scores_are_one_for_each_row() -> None:
    x = torch.randn(3, 4)
    model = skips(small(), ["0"], example=x)
    with pytest.raises(PliantError, match="skips are attached once"):
        skips(model, ["1"], example=x)
    with pytest.raises(PliantError, match=r"scores of shape \(3, 4\) for 3 rows"):
        skips(small(), ["0"], example=x, scorer=lambda _: nn.Identity())


def test_a_cache_of_keys_and_values_is_refused() -> None:
    host, call = call_of("transformers Llama")
    model = skips(host, ["model.layers.1"], example=call)
    with pytest.raises(PliantError, match="use_cache=False"):
        model(**call, use_cache=True)
