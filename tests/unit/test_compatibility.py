"""What the survey says dynamic networks go along with: int8 quantisation, structured pruning, distillation; each with exits and with skips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.losses import CrossEntropy, FlopsBudget, MultiExit, Total

Attach = Callable[[nn.Module, Tensor], Any]


def vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5
    )


def resnet() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    return models.resnet18(num_classes=5)


HOSTS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "ViT": (vit, ["blocks.0", "blocks.2"], ["blocks.[1-3]"]),
    "ResNet-18": (resnet, ["layer1", "layer3"], ["layer*.1"]),
}
ATTACH: dict[str, Callable[[list[str], list[str]], Attach]] = {
    "exits": lambda at, blocks: lambda host, x: pliant.retrofit.exits(host, at=at, example=x),
    "skips": lambda at, blocks: lambda host, x: pliant.retrofit.skips(host, blocks, example=x),
}
CASES = [(host, how) for host in HOSTS for how in ATTACH]


def built(host: str, how: str) -> tuple[nn.Module, Attach, Tensor]:
    torch.manual_seed(0)
    build, at, blocks = HOSTS[host]
    return build().eval(), ATTACH[how](at, blocks), torch.randn(6, 3, 32, 32)


def assert_dynamic(model: nn.Module, host: nn.Module, x: Tensor, *, off: float) -> None:
    """Everything on is the host, some off is what the masked form says, and the FLOPs are those that the counter sees."""
    with torch.no_grad():
        assert torch.equal(pliant.bind(model, {"*": pliant.rules.Always()})(x), host(x))
        tossed = pliant.bind(model, {"*": pliant.rules.Random(0.5, torch.Generator().manual_seed(0))})
        _, trace = pliant.record(tossed)(x)
        given = pliant.bind(model, {"*": pliant.rules.Given(trace)})
        with FlopCounterMode(display=False) as counter:
            y = given(x)
        assert counter.get_total_flops() == int(trace.flops.sum()) < int(trace.dense_flops.sum())
        torch.testing.assert_close(y, pliant.masked(given)(x), rtol=off, atol=off)


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("first", ["quantised first", "dynamic first"])
@pytest.mark.parametrize(("host", "how"), CASES)
def test_int8_dynamic_quantisation(host: str, how: str, first: str):
    ao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, attach, x = built(host, how)
    config = ao.Int8DynamicActivationInt8WeightConfig(version=2)

    def gates_stay(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not path.startswith(("skips", "exits"))

    if first == "dynamic first":
        dynamic = attach(model, x)
        ao.quantize_(dynamic, config, filter_fn=gates_stay)
        model = pliant.plain(dynamic)  # the host keeps its own weights
    else:
        ao.quantize_(model, config)
        dynamic = attach(model, x)
    assert_dynamic(dynamic, model, x, off=1e-3)


@pytest.mark.parametrize("first", ["pruned first", "dynamic first"])
@pytest.mark.parametrize(("host", "how"), CASES)
def test_structured_pruning(host: str, how: str, first: str):
    model, attach, x = built(host, how)
    dynamic = attach(model, x) if first == "dynamic first" else None
    some = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1:4]
    for module in some:
        prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)
        prune.remove(module, "weight")
    dynamic = dynamic or attach(model, x)
    assert all(int((m.weight.flatten(1).abs().sum(1) == 0).sum()) == round(len(m.weight) / 2) for m in some)
    assert_dynamic(dynamic, model, x, off=1e-5)


@pytest.mark.parametrize(("host", "how"), CASES)
def test_distillation_from_the_untouched_host(host: str, how: str):
    model, attach, x = built(host, how)
    teacher, student = copy.deepcopy(model), attach(model, x).train()
    loss = Total({"budget": (1.0, FlopsBudget(0.7))} if how == "skips" else {"exits": (0.1, MultiExit())})
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    with torch.no_grad():
        wanted = 5 * teacher(x)  # of random weights: hardly apart
    y, found = wanted.argmax(1), []
    for _ in range(12):
        logits, trace = pliant.record(student)(x)
        answers = [e.logits for e in trace.exits] or [logits]
        taught = sum(F.kl_div(a.log_softmax(1), wanted.softmax(1), reduction="batchmean") for a in answers)
        optimiser.zero_grad()
        (taught + sum(loss(logits, trace, y, 1.0).values())).backward()
        optimiser.step()
        found.append(float(taught.detach()))
    assert found[-1] < found[0]
    changed = [p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in student.named_parameters() if how in n]
    assert any(changed)
    assert_dynamic(student.eval(), pliant.plain(student), x, off=1e-4)
    assert CrossEntropy()(student(x), trace, y, 1.0).isfinite()
