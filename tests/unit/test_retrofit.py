"""Exits attached to models of torchvision, timm and transformers: the contract, on random weights."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import rules
from pliant.check import check
from pliant.retrofit import exits

ROWS, CLOSE = 6, 2e-6
HOSTS = ["torchvision resnet18", "timm resnet26", "timm vit", "transformers bert", "timm eva", "torchvision swin"]


@dataclass
class Made:
    host: nn.Module
    model: Any
    call: dict[str, Tensor]
    trace: pliant.Trace

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        return {name: t[index] for name, t in self.call.items()}


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def pictures(size: int, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.randn(ROWS, 3, size, size)}


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(ROWS, 10, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[4, 3:] = 0
    return {"input_ids": torch.randint(100, (ROWS, 10)), "attention_mask": mask}


def bert(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, num_labels=5, **changes,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def host(name: str) -> tuple[nn.Module, list[str], dict[str, Tensor]]:
    library, _, kind = name.partition(" ")
    if library == "transformers":
        return bert(), ["bert.encoder.layer.0", "bert.encoder.layer.2"], tokens()
    found = pytest.importorskip(library + (".models" if library == "torchvision" else ""), reason=f"needs {library}")
    if kind == "resnet18":
        return found.resnet18(num_classes=5), ["layer1", "layer2", "layer3"], pictures(32)
    if kind == "swin":
        return found.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5), ["features.1"], pictures(32)
    if kind == "resnet26":
        return found.create_model("resnet26", num_classes=5), ["layer1", "layer2.1", "layer3"], pictures(32)
    if kind == "vit":
        model = found.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)
        return model, ["blocks.3", "blocks.7"], pictures(64)
    # As many patches as rows: the rotary embedding that travels beside the batch must not be cut.
    model = found.create_model("eva02_tiny_patch14_224", img_size=(28, 42), num_classes=5)
    return model, ["blocks.2", "blocks.5"], {"x": torch.randn(ROWS, 3, 28, 42)}


@functools.cache
def made(name: str) -> Made:
    torch.manual_seed(1)
    model, at, call = host(name)
    model.eval()
    new = exits(model, at, example=call)
    opened = pliant.bind(new, {"*": rules.Threshold(float("-inf"))})
    with torch.no_grad():
        _, trace = pliant.record(opened)(**call)
        for path, site in pliant.sites(new).items():  # between two scores: both outcomes, none near
            low, high = trace[path][0].scores.sort().values[2:4]
            site.rule.threshold.copy_((low + high) / 2)
        _, trace = pliant.record(new)(**call)
    return Made(model, new, call, trace)


@pytest.fixture(params=HOSTS)
def case(request: pytest.FixtureRequest) -> Made:
    return made(request.param)


@pytest.fixture
def small() -> Made:
    return made("transformers bert")


def off(a: Any, b: Any) -> float:
    return float((logits(a) - logits(b)).abs().max())


@torch.no_grad()
def test_all_going_on_is_the_host_bit_for_bit(case: Made) -> None:
    y = case.host(**case.call)
    for model in (pliant.bind(case.model, {"*": rules.Always()}), pliant.plain(case.model)):
        found = model(**case.call)
        assert torch.equal(logits(found), logits(y))
        assert type(found) is type(y)


@torch.no_grad()
def test_rows_leave_at_some_exits_and_not_at_others(case: Made) -> None:
    first = case.trace.dense("exits.sites.0")
    assert 0 < first.sum() < ROWS
    assert len(case.trace.exits) == len(case.trace) + 1 or case.trace.dense(list(case.trace)[-1]).sum() == 0


@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one_in_any_order(case: Made) -> None:
    y = logits(case.model(**case.call))
    for i in range(ROWS):
        assert off(case.model(**case.rows(torch.tensor([i]))), y[i : i + 1]) <= CLOSE
    turned = torch.randperm(ROWS)
    assert off(case.model(**case.rows(turned)), y[turned]) <= CLOSE


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_gathered_equals_masked_and_every_flop_is_billed(case: Made, seed: int) -> None:
    p = [0.3, 0.6, 0.9][seed]
    drawn = pliant.bind(case.model, {"*": rules.Random(p, torch.Generator().manual_seed(seed))})
    _, trace = pliant.record(drawn)(**case.call)
    model = pliant.bind(case.model, {"*": rules.Given(trace)})
    found = []
    for form in (model, pliant.masked(model)):
        with FlopCounterMode(display=False) as counter:
            y, trace = pliant.record(form)(**case.call)
        assert int(trace.flops.sum()) == counter.get_total_flops()
        assert int(trace.flops.max()) <= int(trace.dense_flops[0])
        found.append(y)
    assert type(found[0]) is type(found[1])
    assert off(*found) <= CLOSE


@torch.no_grad()
def test_own_decisions_replay_bit_for_bit_and_are_billed(case: Made) -> None:
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(case.model)(**case.call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert torch.equal(logits(case.model(**case.call)), logits(y))
    assert torch.equal(logits(pliant.bind(case.model, {"*": rules.Given(trace)})(**case.call)), logits(y))
    assert off(pliant.masked(case.model)(**case.call), y) <= CLOSE


@torch.no_grad()
def test_nobody_goes_on(case: Made) -> None:
    never = pliant.bind(case.model, {"*": rules.Never()})
    ran: list[str] = []
    last = [m for m in never.modules() if isinstance(m, nn.Linear)]
    for module in last:
        module.register_forward_hook(lambda m, a, y: ran.append(type(m).__name__))
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(never)(**case.call)
    assert type(y) is type(case.host(**case.call))
    assert torch.equal(logits(y), trace.exits[0].logits)
    assert len(trace.exits) == 1
    assert int(trace.flops.sum()) == counter.get_total_flops() < int(trace.dense_flops.sum())
    assert pliant.core.tape.rows() is None  # and a call afterwards is whole again
    assert torch.equal(logits(pliant.bind(never, {"*": rules.Always()})(**case.call)), logits(case.host(**case.call)))


def test_paths_and_state_keys_of_the_host_stay(case: Made) -> None:
    old, new = case.host.state_dict(), case.model.state_dict()
    assert list(old) == [name for name in new if not name.startswith("exits.")]
    assert dict(case.host.named_modules()).keys() <= dict(case.model.named_modules()).keys()
    missing, unexpected = case.model.load_state_dict(old, strict=False)
    assert not unexpected
    assert all(name.startswith("exits.") for name in missing)
    assert not hasattr(case.host, "exits")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.host.modules())
    shared = dict(case.model.named_parameters())
    assert all(shared[name] is p for name, p in case.host.named_parameters())


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(case: Made) -> None:
    y = logits(case.model(**case.call)).clone()
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert torch.equal(logits(twin(**case.call)), y)
        for p in [*twin.parameters(), *twin.buffers()]:
            if p.is_floating_point():
                p.fill_(float("nan"))
        assert logits(twin(**case.call)).isnan().all()
        assert torch.equal(logits(case.model(**case.call)), y)


@torch.no_grad()
def test_two_threads_share_a_model(case: Made) -> None:
    halves = [case.rows(torch.arange(3)), case.rows(torch.arange(2, ROWS))]
    wanted = [logits(case.model(**half)) for half in halves]
    altered: list[int] = []

    def work(k: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                y, trace = pliant.record(case.model)(**halves[k])
                if not torch.equal(logits(y), wanted[k]) or trace.batch != len(wanted[k]):
                    altered.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not altered


@pytest.mark.parametrize("name", ["torchvision resnet18", "transformers bert"])
def test_public_checks(name: str) -> None:
    case = made(name)
    items = ["gathered", "all_on", "recording", "checkpoint"]
    x: Any = case.call if "bert" in name else case.call["x"]
    assert list(check(case.model, x, only=items)) == items


@torch.no_grad()
@pytest.mark.parametrize("name", ["torchvision resnet18", "transformers bert"])
def test_an_exported_program_drops_rows_too(name: str) -> None:
    case = made(name)
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        pliant.core.share(case.model), (), case.call, dynamic_shapes=[{0: batch}] * len(case.call)
    ).module()
    for rows in (torch.arange(ROWS), torch.arange(ROWS - 1)):
        assert off(program(**case.rows(rows)), case.model(**case.rows(rows))) <= CLOSE


@torch.no_grad()
def test_a_layer_called_on_its_own_is_the_hosts(small: Made) -> None:
    hidden = torch.randn(3, 10, 32)
    layers = [model.get_submodule("bert.encoder.layer.0") for model in (small.host, small.model)]
    assert torch.equal(layers[0](hidden), layers[1](hidden))


@torch.no_grad()
def test_mask_by_position_and_padding_content_do_not_matter(small: Made) -> None:
    y = small.model(**small.call).logits
    assert torch.equal(small.model(*small.call.values()).logits, y)
    other = small.call["input_ids"].where(small.call["attention_mask"] > 0, torch.tensor(7))
    assert off(small.model(input_ids=other, attention_mask=small.call["attention_mask"]), y) <= CLOSE


@torch.no_grad()
def test_a_tuple_when_asked_for(small: Made) -> None:
    for model in (small.model, pliant.bind(small.model, {"*": rules.Never()})):
        y = model(**small.call, return_dict=False)
        assert isinstance(y, tuple)
        assert torch.equal(y[0], model(**small.call).logits)


def test_the_signature_is_the_hosts(small: Made) -> None:
    assert inspect.signature(small.model.forward) == inspect.signature(small.host.forward)


@torch.no_grad()
def test_an_exception_closes_everything(small: Made) -> None:
    broken = pliant.bind(small.model, {"*": rules.Always()})
    hook = broken.bert.encoder.layer[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pliant.record(broken)(**small.call)
    hook.remove()
    assert pliant.core.tape.tape() is None
    assert pliant.core.tape.rows() is None
    assert torch.equal(broken(**small.call).logits, small.host(**small.call).logits)
