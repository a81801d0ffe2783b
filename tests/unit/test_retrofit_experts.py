"""Feed-forward layers of models that users have, split into experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits, off
from pliant import PliantError, rules
from pliant.check import DEFAULT
from pliant.functional.clusters import balanced_clusters
from pliant.retrofit import Plan, exits, experts, fit_routers, skips, tokens

SPLIT = [name for name, host in HOSTS.items() if host.experts]


def counted(model: nn.Module, call: dict[str, Tensor]) -> tuple[Any, pliant.Trace]:
    """A recorded call whose FLOPs are those that the counter sees."""
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(model)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    return y, trace


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_experts_of_models_that_users_have(name: str) -> None:
    host, call = call_of(name)
    model = experts(host, HOSTS[name].experts, experts=8, top=3, example=call)
    y = host(**call)
    for form in (pliant.bind(model, {"*": rules.Always()}), pliant.plain(model)):
        found = form(**call)
        assert torch.equal(logits(found), logits(y))
        assert type(found) is type(y)
    own = [key for key in model.state_dict() if not key.startswith("experts.")]
    assert own == list(host.state_dict())
    assert set(model.load_state_dict(host.state_dict(), strict=False).missing_keys) == set(model.state_dict()) - set(
        own
    )
    assert not any(vars(m).get("forward") for m in host.modules())
    y, trace = counted(model, call)
    assert len(trace) >= 2
    assert all(set(d.value.sum(-1).unique().tolist()) == {3.0} for d in (trace[path][0] for path in trace))
    assert bool((trace.flops < trace.dense_flops).all())
    assert off(pliant.masked(model)(**call), y) <= 2e-6
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Given(trace)})(**call)), logits(y))
    alone = [logits(model(**{key: t[i : i + 1] for key, t in call.items()})) for i in range(5)]
    assert float((torch.cat(alone) - logits(y)).abs().max()) <= 2e-6
    for rule in (rules.Random(0.4, torch.Generator().manual_seed(0)), rules.Never()):
        drawn, trace = counted(pliant.bind(model, {"*": rule}), call)
        given = pliant.bind(model, {"*": rules.Given(trace)})
        assert off(pliant.masked(given)(**call), drawn) <= 2e-6


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("transformers BERT", "estf"), ("transformers BERT", "fets"), ("transformers BERT", "sfte"),
        ("timm vit_tiny_patch16_224", "tfse"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_experts_compose_with_exits_gates_and_tokens_in_any_order(name: str, order: str) -> None:
    host, call = call_of(name)
    known = HOSTS[name]
    parts = {
        "e": lambda m: exits(m, known.exits, example=call),
        "s": lambda m: skips(m, known.skips[-2:], example=call),
        "t": lambda m: tokens(m, known.tokens, example=call),
        "f": lambda m: experts(m, known.experts, experts=4, top=2, example=call),
    }
    model = host
    for part in order:
        model = parts[part](model)
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Always()})(**call)), logits(host(**call)))
    draw = rules.Random(0.5, torch.Generator().manual_seed(1))
    y, trace = counted(pliant.bind(model, {"exits*": draw, "skips*": draw, "experts*": draw}), call)
    given = pliant.bind(model, {"*": rules.Given(trace)})
    assert off(given(**call), y) <= 2e-6
    assert off(pliant.masked(given)(**call), y) <= 2e-6


class Block(nn.Module):
    def __init__(self, size: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def small() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_the_public_checks() -> None:
    x = torch.randn(6, 5, 8)
    model = experts(small(), ["blocks.*"], experts=4, top=2, example=x)
    items = [item for item in DEFAULT if item != "speed"]
    assert list(pliant.check(model, x, only=items)) == items


def test_routers_learn_in_both_forms_and_copies_are_their_own() -> None:
    x = torch.randn(8, 5, 8)
    model = experts(small(), ["blocks.*"], experts=4, top=2, example=x).train()
    for form in (model, pliant.gathered(model)):
        model.zero_grad()
        y, trace = pliant.record(form)(x)
        (y.square().mean() + pliant.cost.expected_flops(trace).mean() / 1e4).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.any(), name
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(float("nan"))
        assert twin(x).isnan().all()
        assert not model.eval()(x).isnan().any()


@torch.no_grad()
def test_who_looks_between_the_layers_sees_all_neurons() -> None:
    x = torch.randn(4, 5, 8)
    host = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Flatten()).eval()
    model = experts(host, ["0"], experts=4, top=2, example=x)
    wanted, looked = model(x), list[torch.Size]()
    model[0][1].register_forward_hook(lambda m, a, y: looked.append(y.shape))
    torch.testing.assert_close(model(x), wanted)
    assert looked == [(4, 5, 16)]
    counted(model, {"input": x})


@torch.no_grad()
def test_parts_of_weights_that_were_kept_are_cut_again_when_weights_change() -> None:
    x = torch.randn(3, 5, 8)
    model = experts(small(), ["blocks.*"], experts=4, top=2, example=x)
    before = model(x)
    model.load_state_dict({key: t * 0.5 for key, t in small().state_dict().items()}, strict=False)
    after = model(x)
    assert off(after, before) > 1e-3
    torch.testing.assert_close(pliant.masked(model)(x), after)


@torch.no_grad()
def test_a_fitted_router_loses_less_than_a_random_choice() -> None:
    torch.manual_seed(0)
    host = small()
    held, x = torch.randn(512, 5, 8), torch.randn(256, 5, 8)
    model = experts(host, ["blocks.*"], experts=8, top=4, example=x[:3])
    told = fit_routers(model, [held[:256], (held[256:], torch.zeros(256))])
    assert list(told) == list(pliant.sites(model))
    assert all(0.1 < share <= 1 for share in told.values())
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(0))})
    wanted = host(x)
    lost = [float((form(x) - wanted).square().mean()) for form in (model, drawn)]
    assert lost[0] < 0.6 * lost[1]
    with pytest.raises(PliantError, match="no inputs"):
        fit_routers(model, [])
    with pytest.raises(PliantError, match="without routers to fit"):
        fit_routers(host, [x])


@torch.no_grad()
def test_one_budget_turns_exits_gates_and_how_many_experts_run() -> None:
    x, y = torch.randn(64, 5, 8), torch.randint(3, (64,))
    model = experts(small(), ["blocks.*"], experts=8, top=4, example=x)
    model = exits(skips(model, ["blocks.1"], example=x), ["blocks.0"], example=x)
    point = pliant.tune(model, [(x, y)], budget=0.6)
    assert 0.45 <= point.share <= 0.6
    assert list(point.thresholds) == list(pliant.sites(model))
    assert 0 < point.thresholds["experts.0.site"] < 1
    trace = pliant.record(model)(x)[1]
    assert float(trace.flops.sum() / trace.dense_flops.sum()) == pytest.approx(point.share)


@torch.no_grad()
def test_an_exported_program_answers_alike() -> None:
    x = torch.randn(5, 5, 8)
    model = experts(small(), ["blocks.*"], experts=4, top=2, example=x)
    program = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}]).module()
    for rows in (5, 3):
        torch.testing.assert_close(program(x[:rows]), model(x[:rows]))


def test_experts_in_a_plan(tmp_path: Path) -> None:
    host, call = call_of("transformers ViT")
    plan = Plan().experts("vit.layers.[01]", experts=8, top=0.25).exits("vit.layers.2")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    model = again.apply(host, call)
    assert list(pliant.sites(model)) == ["experts.0.site", "experts.1.site", "exits.sites.0"]
    lines = plan.told(host, call).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["experts", f"vit.layers.{k}"] for k in (0, 1)]


def test_clusters_are_of_one_size_and_hold_what_is_near() -> None:
    points = torch.randn(4, 1, 3).mul(9).expand(4, 6, 3).flatten(0, 1) + torch.randn(24, 3) / 9
    mixed = torch.randperm(24)
    found = balanced_clusters(points[mixed], 4)
    assert sorted(found.flatten().tolist()) == list(range(24))
    assert all(len({int(mixed[i]) // 6 for i in cluster}) == 1 for cluster in found.tolist())
    assert balanced_clusters(torch.zeros(6, 2), 3).shape == (3, 2)
    assert balanced_clusters(points, 1).tolist() == [list(range(24))]


class Normed(nn.Module):
    """A norm over the neurons: what one says hangs on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class Softmax(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


def resnet() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("torchvision resnet18")
    return host, ["layer1"], call


def attention() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("transformers BERT")
    return host, ["bert.encoder.layer.0.attention"], call


def squeeze() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("timm mobilenetv3_small_100")
    return host, ["blocks.1.1"], call


X = torch.randn(3, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (resnet, "at site 'layer1': got a module without a feed-forward layer.*pliant.retrofit.channels"),
        (squeeze, r"what lies between reads them as a whole.*pliant.retrofit.channels"),
        (attention, r"without a feed-forward layer.*e.g. 'bert.encoder.layer"),
        (lambda: (nn.Sequential(Normed()), ["0"], X), "reads them as a whole.*pliant.retrofit.skips"),
        (lambda: (nn.Sequential(Softmax()), ["0"], X), "what some say hangs on others"),
        (lambda: (nn.Sequential(Block()), ["nothing"], X), "the name 'nothing'"),
        (lambda: (nn.Sequential(Block(hidden=30)), ["0"], X), "30 hidden neurons for 4 experts.*Do: pass experts=[35]"),
    ],
)
def test_what_cannot_be_split_is_refused(make: Any, message: str) -> None:
    host, at, example = make()
    with pytest.raises(PliantError, match=message):
        experts(host.eval(), at, experts=4, top=1, example=example)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, "top=0 of 4 experts"),
        ({"top": 5}, "top=5 of 4 experts"),
        ({"top": 1.5}, "top=1.5 of 4 experts"),
        ({"scorer": lambda _: nn.Identity()}, r"scores of shape \(3, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"experts": 4, "top": 2, "example": X, **changes}
    host = nn.Sequential(Block()).eval()
    with pytest.raises(PliantError, match=message):
        experts(host, ["0"], **arguments)


def test_experts_are_attached_once_and_share_no_layer() -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    model = experts(host, ["0"], experts=4, top=1, example=X)
    assert len(pliant.sites(model)) == 1  # of three layers in a row the first two
    with pytest.raises(PliantError, match="attached once"):
        experts(model, ["0"], experts=4, top=1, example=X)
