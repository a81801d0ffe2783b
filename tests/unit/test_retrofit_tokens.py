"""Tokens that are dropped or merged between the layers of models that users have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits, off
from pliant import PliantError, rules, scores
from pliant.check import DEFAULT
from pliant.execute import Drop, Merge, Tokens
from pliant.retrofit import exits, skips, tokens

WITH_TOKENS = [name for name, host in HOSTS.items() if host.tokens]
WAYS: dict[str, dict[str, Any]] = {
    "dropped by norm": {},
    "merged": {"how": Merge()},
    "dropped by the class token's attention": {"scorer": lambda _: scores.TokenAttention()},
    "dropped by a learned score": {"scorer": scores.TokenLinear},
}


def counted(model: nn.Module, call: dict[str, Tensor]) -> tuple[Any, pliant.Trace]:
    """A recorded call whose FLOPs are those that the counter sees."""
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(model)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    return y, trace


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in WITH_TOKENS
        for way in WAYS
        if way == "dropped by norm" or name.endswith(("ViT", " BERT"))
    ],
)
@torch.no_grad()
def test_tokens_of_models_that_users_have(name: str, way: str) -> None:
    host, call = call_of(name)
    model = tokens(host, HOSTS[name].tokens, example=call, **WAYS[way])
    y = host(**call)
    always = pliant.bind(model, {"*": rules.Always()})
    whole = tokens(host, HOSTS[name].tokens, example=call, keep=1, **WAYS[way])
    for form in (always, whole, pliant.plain(model)):
        found = form(**call)
        assert torch.equal(logits(found), logits(y))
        assert type(found) is type(y)
    assert [key for key in model.state_dict() if not key.startswith("tokens.")] == list(host.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    y, trace = counted(model, call)
    assert bool((trace.flops < trace.dense_flops).all())
    size = call[next(iter(call))].shape[1] - 1 if "input_ids" in call else 16
    for path in pliant.sites(model):
        kept = pliant.sites(model)[path].rule.count(size)
        assert trace[path][0].value.sum(1).tolist() == [kept] * len(trace.flops)
        size = kept
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Given(trace)})(**call)), logits(y))
    for form in (
        pliant.masked(model),
        pliant.bind(model, {"*": rules.Never()}),
        pliant.bind(model, {"*": rules.Random(0.5)}),
    ):
        counted(form, call)
    alone = [logits(model(**{key: t[i : i + 1] for key, t in call.items()})) for i in range(5)]
    assert float((torch.cat(alone) - logits(y)).abs().max()) <= 2e-6


@pytest.mark.parametrize("order", ["est", "ste", "tse"])
@pytest.mark.parametrize("name", ["transformers BERT", "timm vit_tiny_patch16_224"])
@torch.no_grad()
def test_exits_gates_and_tokens_compose_in_any_order(name: str, order: str) -> None:
    host, call = call_of(name)
    known = HOSTS[name]
    parts = {
        "e": lambda m: exits(m, known.exits, example=call),
        "s": lambda m: skips(m, known.skips[-2:], example=call),
        "t": lambda m: tokens(m, known.tokens, example=call),
    }
    model = host
    for part in order:
        model = parts[part](model)
    assert torch.equal(logits(pliant.bind(model, {"*": rules.Always()})(**call)), logits(host(**call)))
    draw = rules.Random(0.5, torch.Generator().manual_seed(1))
    y, trace = counted(pliant.bind(model, {"exits*": draw, "skips*": draw}), call)
    given = pliant.bind(model, {"*": rules.Given(trace)})
    assert off(given(**call), y) <= 2e-6
    assert off(pliant.masked(given)(**call), y) <= 2e-6
    counted(pliant.masked(pliant.bind(model, {"exits*": rules.Given(trace), "skips*": rules.Given(trace)})), call)


@torch.no_grad()
def test_masks_follow_the_tokens_that_are_left() -> None:
    """A short text among long ones answers as it does alone and unpadded, as long as only its padding is dropped."""
    host, call = call_of("transformers BERT")
    model = tokens(host, ["bert.encoder.layer.1"], example=call, keep=0.5)  # five of the ten stay
    alone = {key: t[4:, :3] for key, t in call.items()}
    assert off(model(**call).logits[4:], host(**alone)) <= 2e-6
    merged = tokens(host, ["bert.encoder.layer.1"], example=call, keep=0.5, how=Merge())
    assert off(merged(**call).logits[4:], host(**alone)) <= 2e-6  # padding weighs nothing
    early = exits(model, ["bert.encoder.layer.2"], example=call)
    seen: list[Tensor] = []
    early.exits.heads[0].register_forward_hook(lambda m, a, k, y: seen.append(k["mask"]), with_kwargs=True)
    early(**call)
    assert seen[0].shape == (5, 6)
    assert seen[0].sum(1).tolist() == [6, 6, 6, 6, 3]


class Block(nn.Module):
    """Attention of one head, without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.num_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + (q @ k.mT).softmax(-1) @ v


class Net(nn.Module):
    def __init__(self, classes: bool = True) -> None:
        super().__init__()
        self.blocks, self.head, self.classes = nn.Sequential(*[Block() for _ in range(4)]), nn.Linear(8, 3), classes

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x)
        return self.head(y[:, 0] if self.classes else y)


@pytest.mark.parametrize("way", ["dropped by a learned score"])
def test_the_public_checks(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 9, 8)
    model = tokens(Net().eval(), ["blocks.[02]"], example=x, **WAYS[way])
    items = [item for item in DEFAULT if item != "speed"]
    assert list(pliant.check(model, x, only=items)) == items


def test_the_public_checks_of_everything_on_one_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = exits(
        skips(tokens(Net().eval(), ["blocks.0"], example=x, how=Merge()), ["blocks.1"], example=x),
        ["blocks.1"],
        example=x,
    )
    items = ["gathered", "all_on", "replay", "rows", "flops", "dense_flops", "export", "empty", "nan"]
    assert list(pliant.check(model, x, only=items)) == items


def test_a_learned_score_finds_the_tokens_that_matter() -> None:
    """One of eight tokens, at any place, says what the class is; the rest is noise that is as long."""
    torch.manual_seed(0)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        y, place = torch.randint(2, (rows,)), torch.randint(1, 9, (rows,))
        x = torch.randn(rows, 9, 8)
        x[:, :, 0] = 0
        x[:, 0] = 0
        x[torch.arange(rows), place, 0] = 2.5
        x[torch.arange(rows), place, 1] = 2.5 * (2 * y - 1).float()
        return x, y

    host = Net()
    host.blocks[0] = nn.Identity()  # nothing is told of a token before it's dropped
    model = tokens(host, ["blocks.0"], example=batch(4)[0], keep=0.25, scorer=scores.TokenLinear).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        x, y = batch(64)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    x, y = batch(256)
    found, trace = pliant.record(model.eval())(x)
    blind = pliant.bind(model, {"*": rules.Random(0.25)})(x)
    assert (found.argmax(1) == y).float().mean() >= 0.95
    assert (blind.argmax(1) == y).float().mean() <= 0.8
    assert trace["tokens.0.site"][0].value[x[:, 1:, 0] == 2.5].mean() >= 0.9


@torch.no_grad()
def test_one_budget_over_exits_gates_and_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 9, 8)
    model = skips(tokens(Net().eval(), ["blocks.0"], example=x), ["blocks.1"], example=x)
    model = exits(model, ["blocks.2"], example=x)
    point = pliant.tune(model, [(x, torch.randint(3, (64,)))], budget=0.7)
    assert 0.55 <= point.share <= 0.7
    assert list(point.thresholds) == list(pliant.sites(model))
    assert 0 < point.thresholds["tokens.0.site"] < 1
    assert float(pliant.sites(model)["tokens.0.site"].rule.threshold) == pytest.approx(
        point.thresholds["tokens.0.site"]
    )
    trace = pliant.record(model)(x)[1]
    assert float(trace.flops.sum() / trace.dense_flops.sum()) == pytest.approx(point.share)


@torch.no_grad()
def test_the_share_is_a_dial_and_copies_are_their_own() -> None:
    x = torch.randn(2, 21, 8)
    model = tokens(Net().eval(), ["blocks.0"], example=x, keep=0.5)
    rule = pliant.sites(model)["tokens.0.site"].rule
    for threshold, left in ((0.5, 11), (0.0, 21), (0.9, 3), (float("-inf"), 21), (float("inf"), 2)):
        rule.threshold.fill_(threshold)
        counted(model, {"x": x})
        assert model.blocks(x).shape[1] == 21  # on their own they drop nothing
        seen: list[int] = []
        with model.blocks[1].register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.shape[1])):
            model(x)
        assert seen == [left]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(float("nan"))
    assert twin(x).isnan().all()
    assert not model(x).isnan().any()


def test_a_layer_called_on_its_own_and_a_failing_call_leave_nothing_behind() -> None:
    x = torch.randn(2, 9, 8)
    model = tokens(Net().eval(), ["blocks.0"], example=x)
    assert model.blocks[0](x).shape == x.shape
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 9, 7))
    assert model.blocks[0](x).shape == x.shape


def swin_block() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("timm swin_tiny_patch4_window7_224")
    return host, ["layers.0.blocks.0"], call


def resnet() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("torchvision resnet18")
    return host, ["layer1"], call


def llama() -> tuple[nn.Module, list[str], Any]:
    host, call = call_of("transformers Llama")
    return host, ["model.layers.1"], call


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (swin_block, r"returns \(3, 14, 14, 96\); expected .*maps and windows need them all.*exits, skips"),
        (resnet, r"at site 'layer1': got a layer that returns \(3, 64, 8, 8\)"),
        (llama, r"changes by .* when the tokens behind the first 1 are shuffled.*causal or rotary"),
        (lambda: (Net(classes=False).eval(), ["blocks.0"], torch.randn(2, 9, 8)), r"changes by .*shuffled"),
        (lambda: (Net().eval(), ["nothing"], torch.randn(2, 9, 8)), "the name 'nothing'"),
        (lambda: (Net().eval(), ["blocks.0.norm", "blocks.0"], torch.randn(2, 9, 8)), "inside"),
    ],
)
def test_where_tokens_cannot_leave_is_refused(make: Any, message: str) -> None:
    host, at, example = make()
    with pytest.raises(PliantError, match=message):
        tokens(host, at, example=example)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 1.2}, "share=1.2"),
        ({"keep": [0.5, 0.5]}, "2 shares for 1 layers"),
        ({"prefix": 9}, "with prefix=9"),
        ({"scorer": lambda _: nn.Identity()}, r"scores of shape \(3, 8, 8\)"),
        ({"scorer": lambda _: scores.TokenAttention(), "at": ["blocks.0.norm"]}, "queries and keys can't be caught"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"at": ["blocks.0"], "example": torch.randn(2, 9, 8), **changes}
    with pytest.raises(PliantError, match=message):
        tokens(Net().eval(), **arguments)


@torch.no_grad()
def test_attention_of_a_layer_that_rows_may_pass_by_is_refused() -> None:
    x = torch.randn(2, 9, 8)
    model = tokens(Net().eval(), ["blocks.0"], example=x, scorer=lambda _: scores.TokenAttention())
    with pytest.raises(PliantError, match="attention of a layer that rows may pass by"):
        skips(model, ["blocks.0"], example=x)
    with pytest.raises(PliantError, match="attention of a layer that rows may pass by"):
        tokens(
            skips(Net().eval(), ["blocks.0"], example=x),
            ["blocks.0"],
            example=x,
            scorer=lambda _: scores.TokenAttention(),
        )


def test_where_all_tokens_are_as_long_attention_decides() -> None:
    for name, wanted in (("transformers BERT", scores.TokenAttention), ("transformers ViT", scores.TokenNorm)):
        host, call = call_of(name)
        model = tokens(host, HOSTS[name].tokens, example=call)
        assert type(model.tokens[0].site.scorer) is wanted


def test_a_rule_that_keeps_another_number_in_every_row_is_refused() -> None:
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[1.0], [9.0], [9.0]]])
    layer = Tokens(pliant.Site(scores.TokenNorm(), rules.Threshold(2.5)), how=Drop()).eval()
    with pytest.raises(PliantError, match=r"1 to 2 of 2 tokens kept.*pliant.rules.Share"):
        layer(x)
    with pytest.raises(PliantError, match="attached once"):
        tokens(tokens(Net().eval(), ["blocks.0"], example=(y := torch.randn(2, 9, 8))), ["blocks.1"], example=y)
