"""Channels between the convolutions of models that users have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits, off
from pliant import PliantError, rules
from pliant.check import DEFAULT
from pliant.deploy import export_onnx
from pliant.retrofit import Plan, channels, exits, experts, fit_routers, skips, tokens
from pliant.tune.point import dial

CHOSEN = [name for name, host in HOSTS.items() if host.channels]


def host_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A host whose residual branches say something: fresh ones end in norms and scales near 0."""
    host, call = call_of(name)
    for p in host.parameters():
        if p.ndim == 1 and p.detach().abs().max() < 1e-3:
            nn.init.uniform_(p, 0.2, 0.4)
    return host, call


def counted(model: nn.Module, call: dict[str, Tensor]) -> tuple[Any, pliant.Trace]:
    """A recorded call whose FLOPs are those that the counter sees."""
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(model)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    return y, trace


def near(a: Any, b: Any) -> bool:
    """Equal but for the order of summation."""
    return off(a, b) <= 5e-6 * (1 + float(logits(b).abs().max()))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        *((name, None) for name in CHOSEN),
        ("timm resnet50", 4),
        ("timm mobilenetv3_small_100", 4),
    ],
)
@torch.no_grad()
def test_channels_of_models_that_users_have(name: str, groups: int | None) -> None:
    host, call = host_of(name)
    model = channels(host, HOSTS[name].channels, groups=groups, example=call)
    y = host(**call)
    for form in (pliant.bind(model, {"*": rules.Always()}), pliant.plain(model)):
        assert torch.equal(logits(form(**call)), logits(y))
    own = [key for key in model.state_dict() if not key.startswith("channels.")]
    assert own == list(host.state_dict())
    assert set(model.load_state_dict(host.state_dict(), strict=False).missing_keys) == set(model.state_dict()) - set(
        own
    )
    assert not any(vars(m).get("forward") for m in host.modules())
    found, trace = counted(model, call)
    assert off(found, y) > 0
    assert len(trace) >= 2
    for path in trace:
        value = trace[path][0].value
        assert value.sum(1).tolist() == [int(value.shape[1] * 0.5 + 0.5)] * 5
    assert bool((trace.flops < trace.dense_flops).all())
    assert near(pliant.masked(model)(**call), found)
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Given(trace)})(**call)), logits(found))
    alone = [logits(model(**{key: t[i : i + 1] for key, t in call.items()})) for i in range(5)]
    assert near(torch.cat(alone), found)
    for rule in (rules.Random(0.4, torch.Generator().manual_seed(0)), rules.Never()):
        drawn, trace = counted(pliant.bind(model, {"*": rule}), call)
        assert near(pliant.masked(pliant.bind(model, {"*": rules.Given(trace)}))(**call), drawn)


@pytest.mark.parametrize("order", ["esc", "cse"])
@torch.no_grad()
def test_channels_compose_with_exits_and_gates_in_any_order(order: str) -> None:
    host, call = host_of("timm resnet50")
    known = HOSTS["timm resnet50"]
    parts = {
        "e": lambda m: exits(m, known.exits, example=call),
        "s": lambda m: skips(m, ["layer1.1", "layer3.2"], example=call),
        "c": lambda m: channels(m, ["layer1.1", "layer3.[12]"], example=call),
    }
    model = host
    for part in order:
        model = parts[part](model)
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Always()})(**call)), logits(host(**call)))
    draw = rules.Random(0.5, torch.Generator().manual_seed(1))
    y, trace = counted(pliant.bind(model, {"*": draw}), call)
    given = pliant.bind(model, {"*": rules.Given(trace)})
    assert near(given(**call), y)
    assert near(pliant.masked(given)(**call), y)


@torch.no_grad()
def test_no_exit_stands_between_convolutions_that_follow_one_another() -> None:
    host, call = host_of("torchvision vgg16")
    at = HOSTS["torchvision vgg16"].exits  # poolings
    with pytest.raises(PliantError, match=r"at site 'features.4': got an exit that rows can't leave at"):
        exits(channels(host, ["features"], example=call), at, example=call)
    with pytest.raises(PliantError, match=r"at site 'features'.*attach channels before it"):
        channels(exits(host, at, example=call), ["features"], example=call)


@torch.no_grad()
def test_who_looks_between_convolutions_sees_all_channels() -> None:
    model = channels(small(), ["blocks.0"], example=X)
    wanted, looked = model(X), list[torch.Size]()
    model.blocks[0].norm.register_forward_hook(lambda m, a, y: looked.append(y.shape))
    torch.testing.assert_close(model(X), wanted)
    assert looked == [(6, 16, 5, 5)]
    counted(model, {"x": X})


class Hybrid(nn.Module):
    """Convolutions, then a feed-forward layer for each pixel as a token."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.rest, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        return self.head(self.rest(self.block(x)).mean(1))


@torch.no_grad()
def test_everything_on_one_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 3, 3)
    model: Any = tokens(Hybrid().eval(), ["block"], example=x, keep=0.5, prefix=0)
    model = channels(experts(model, ["block"], experts=4, top=2, example=x), ["stem"], example=x)
    model = exits(skips(model, ["rest"], example=x), ["block"], example=x)
    assert torch.equal(pliant.bind(model, {"*": rules.Always()})(x), pliant.plain(model)(x))
    draw = rules.Random(0.5, torch.Generator().manual_seed(1))
    y, trace = counted(
        pliant.bind(model, {"exits*": draw, "skips*": draw, "experts*": draw, "channels*": draw}), {"x": x}
    )
    given = pliant.bind(model, {"*": rules.Given(trace)})
    torch.testing.assert_close(given(x), y)
    torch.testing.assert_close(pliant.masked(given)(x), y)


@torch.no_grad()
def test_a_graph_answers_alike_and_its_shares_can_still_be_turned(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra 'export' isn't installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' isn't installed")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = experts(channels(Hybrid().eval(), ["stem"], example=x), ["block"], experts=4, top=2, example=x)
    model = exits(model, ["block"], example=x)
    export_onnx(model, tmp_path / "model.onnx", x)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = list(pliant.sites(model))
    for share in (0.5, 0.25):
        thresholds = torch.tensor([0.0 if name.startswith("exits") else 1 - share for name in names])
        for site, threshold in zip(pliant.sites(model).values(), thresholds, strict=True):
            cast(Tensor, dial(site)).fill_(threshold)
        for rows in (4, 1):
            y = session.run(None, {"input": x[:rows].numpy(), "thresholds": thresholds.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(y), model(x[:rows]), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    def __init__(self, size: int = 6, hidden: int = 16) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(size, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, size, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.norm(self.a(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def small() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(6, 6, 5, 5, generator=torch.Generator().manual_seed(0))


def test_the_public_checks() -> None:
    model = channels(small(), ["blocks.*"], example=X)
    items = [item for item in DEFAULT if item != "speed"]
    assert list(pliant.check(model, X, only=items)) == items


def test_gates_learn_and_copies_are_their_own() -> None:
    model = channels(small(), ["blocks.*"], example=X).train()
    for form, training in ((model, True), (pliant.gathered(model), True), (model, False)):
        model.zero_grad()
        y, trace = pliant.record(form.train(training))(X)
        (y.square().mean() + pliant.cost.expected_flops(trace).mean() / 1e6).backward()
        for name, p in model.named_parameters():
            if training or not name.startswith("channels"):
                assert p.grad is not None, name
                assert p.grad.any() or name.endswith("a.bias"), name  # a norm takes the bias away
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(float("nan"))
        assert twin(X).isnan().all()
        assert not model(X).isnan().any()


@torch.no_grad()
def test_a_norm_counts_all_rows_while_training() -> None:
    model = channels(small(), ["blocks.*"], example=X).train()
    model(X)
    wanted: Any = small().train()
    wanted.blocks[0](X)
    assert torch.equal(model.blocks[0].norm.running_var, wanted.blocks[0].norm.running_var)


@pytest.mark.parametrize("groups", [None, 4])
@torch.no_grad()
def test_a_fitted_gate_loses_less_than_a_random_choice(groups: int | None) -> None:
    host = small()
    scales = torch.rand(6, generator=torch.Generator().manual_seed(1))[:, None, None] * 2
    held = torch.randn(256, 6, 5, 5) * scales
    x = torch.randn(128, 6, 5, 5) * scales
    model = channels(host, ["blocks.*"], example=X, top=0.5, groups=groups)
    told = fit_routers(model, [held])
    assert list(told) == list(pliant.sites(model))
    assert all(0.05 < share <= 1 for share in told.values())
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(0))})
    if groups is not None:  # of a few random ones none is much worse than another
        return
    wanted = host(x)
    lost = [float((form(x) - wanted).square().mean()) for form in (model, drawn)]
    assert lost[0] < 0.7 * lost[1]


@torch.no_grad()
def test_one_budget_turns_exits_gates_and_how_many_channels_run() -> None:
    x, y = torch.randn(64, 6, 5, 5), torch.randint(3, (64,))
    model = channels(small(), ["blocks.*"], example=x)
    model = exits(skips(model, ["blocks.1"], example=x), ["blocks.0"], example=x)
    point = pliant.tune(model, [(x, y)], budget=0.6)
    assert 0.45 <= point.share <= 0.6
    assert list(point.thresholds) == list(pliant.sites(model))
    assert 0 < point.thresholds["channels.0.sites.0"] < 1
    trace = pliant.record(model)(x)[1]
    assert float(trace.flops.sum() / trace.dense_flops.sum()) == pytest.approx(point.share)


@torch.no_grad()
def test_an_exported_program_answers_alike() -> None:
    model = channels(small(), ["blocks.*"], example=X)
    program = torch.export.export(model, (X,), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}]).module()
    for count in (6, 3):
        torch.testing.assert_close(program(X[:count]), model(X[:count]))


def test_channels_in_a_plan(tmp_path: Path) -> None:
    host, call = call_of("torchvision resnet18")
    plan = Plan().channels("layer[34].*", top=0.25).exits("layer2")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    model = again.apply(host, call)
    assert list(pliant.sites(model)) == [*(f"channels.{k}.sites.0" for k in range(4)), "exits.sites.0"]
    lines = plan.told(host, call).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["channels", "layer3.0"], ["channels", "layer3.1"]]


class Grouped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)


class Layered(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.norm(self.a(x).movedim(1, -1)).movedim(-1, 1))


class Summed(Block):
    """Others read the channels too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        return x + self.b(h) + h.sum(1, keepdim=True)


def vit() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("timm vit_tiny_patch16_224")
    return host, ["blocks.1"], call


def swin() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("timm swin_tiny_patch4_window7_224")
    return host, ["layers.0"], call


def single() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("timm mobilenetv3_small_100")
    return host, ["blocks.5.0"], call


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (vit, "at site 'blocks.1': got a module without convolutions that follow.*pliant.retrofit.experts"),
        (swin, "without convolutions that follow.*pliant.retrofit.experts"),
        (
            single,
            "at site 'blocks.5.0': got a module without convolutions that follow.*e.g. 'blocks.*pliant.retrofit.skips",
        ),
        (lambda: (nn.Sequential(Grouped()), ["0"], X), "reads them as a whole|what some say hangs on others"),
        (lambda: (nn.Sequential(Layered()), ["0"], X), "reads them as a whole"),
        (lambda: (nn.Sequential(Summed()), ["0"], X), "reads them as a whole|what some say hangs on others"),
        (lambda: (nn.Sequential(Block()), ["nothing"], X), "the name 'nothing'"),
    ],
)
def test_what_has_no_channels_to_choose_is_refused(make: Any, message: str) -> None:
    host, at, example = make()
    with pytest.raises(PliantError, match=message):
        channels(host.eval(), at, example=example)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, "top=0; expected a share"),
        ({"top": 1.5}, "top=1.5"),
        ({"groups": 5}, "groups=5 for 16 channels; expected groups of one size. Do: pass groups=4"),
        ({"scorer": lambda *_: nn.Identity()}, r"scores of shape \(3, 6, 5, 5\) for 3 rows and 16 channels"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"example": X, **changes}
    with pytest.raises(PliantError, match=message):
        channels(small(), ["blocks.0"], **arguments)


def test_channels_are_attached_once_and_of_a_pattern_where_there_are_some() -> None:
    host = nn.Sequential(Block(), nn.Conv2d(6, 6, 1), Block()).eval()
    model = channels(host, ["*"], example=X)
    assert list(pliant.sites(model)) == ["channels.0.sites.0", "channels.1.sites.0"]
    with pytest.raises(PliantError, match="at site '1'"):
        channels(host, ["0", "1"], example=X)
    with pytest.raises(PliantError, match="attached once"):
        channels(model, ["0"], example=X)
