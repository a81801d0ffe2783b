"""Every model that users have, in every way: it works, or it's refused with the reason. The table in the docs says the same."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits, off
from pliant import PliantError, retrofit, rules

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"
KINDS = ("exits", "skips", "channels", "experts", "tokens", "cascade")
MORE: dict[str, dict[str, Any]] = {"experts": {"experts": 8, "top": 3}}

MAPS = "its layers pass maps or windows on, and later ones need them whole"
PLACES = "its attention is causal: later layers read tokens by their place"
STAGES = "it has no residual blocks: a row can't pass by a layer that changes the shape"
NO_FFN = "it has no feed-forward layers between its convolutions"
NO_CONV = "it has no convolutions that follow one another"
WRITES = "it answers for every token: `retrofit.causal` gives it exits and drafts, token by token"
WHY = {
    MAPS: r"got a layer that returns \(3, .*maps and windows need them all.*pliant.retrofit.exits, skips",
    PLACES: r"changes by .* shuffled.*causal or rotary attention",
    STAGES: r"got a block from .* to .*name whole blocks",
    NO_FFN: r"a module without a feed-forward layer",
    NO_CONV: r"a module without convolutions that follow one another.*pliant.retrofit.experts",
    WRITES: r"pliant.retrofit.causal",
}
CONVOLUTIONS = ("resnet50", "mobilenetv3_small_100", "efficientnet_b0", "resnet18", "vgg16")


@functools.lru_cache(maxsize=1)
def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The host and a call; some take longer to make than to test."""
    return call_of(name)


def reason(name: str, kind: str) -> str | None:
    """Why ``kind`` is refused on this host; None where it works."""
    short = name.split()[1]
    if kind == "cascade" or kind == "exits":
        return WRITES if short == "Llama" else None
    if kind == "skips":
        return STAGES if short == "vgg16" else None
    if kind == "tokens":
        maps = (*CONVOLUTIONS, "convnext_atto", "swin_tiny_patch4_window7_224")
        return MAPS if short in maps else PLACES if short == "Llama" else None
    if kind == "experts":
        return NO_FFN if short in CONVOLUTIONS else None
    return None if short in (*CONVOLUTIONS, "convnext_atto") else NO_CONV


CELLS = [(name, kind) for name in HOSTS for kind in KINDS]
REFUSED = [cell for cell in CELLS if reason(*cell)]


def table() -> str:
    """As it stands in the docs."""
    numbers = {why: str(i + 1) for i, why in enumerate(dict.fromkeys(map(str, (reason(*cell) for cell in REFUSED))))}
    lines = [f"| | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    for name in HOSTS:
        cells = [f"no ({numbers[why]})" if (why := reason(name, kind)) else "yes" for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in numbers.items())])


def test_the_docs_have_this_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{table()}"


def test_what_works_is_tested() -> None:
    """Gates, channels, experts and tokens are tested on all hosts that name layers for them, each in its own file."""
    for name, kind in CELLS:
        if kind not in ("exits", "cascade"):
            assert bool(getattr(HOSTS[name], kind)) == (reason(name, kind) is None), (name, kind)


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=[" ".join(cell) for cell in REFUSED])
def test_what_does_not_work_is_refused_with_the_reason(name: str, kind: str) -> None:
    host, call = made(name)
    known = HOSTS[name]
    layers = {"exits": ["model.layers.1"]}.get(kind, known.skips or known.exits)
    arguments = ([host, copy.deepcopy(host)],) if kind == "cascade" else (host, layers)
    with pytest.raises(PliantError, match=WHY[str(reason(name, kind))]):
        getattr(retrofit, kind)(*arguments, example=call, **MORE.get(kind, {}))


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in CELLS if kind in ("exits", "cascade") and not reason(name, kind)]
)
@torch.no_grad()
def test_exits_and_cascades_of_models_that_users_have(name: str, kind: str) -> None:
    host, call = made(name)
    if kind == "exits":
        model = retrofit.exits(host, HOSTS[name].exits, example=call)
        assert [key for key in model.state_dict() if not key.startswith("exits.")] == list(host.state_dict())
        assert not model.load_state_dict(host.state_dict(), strict=False).unexpected_keys
    else:
        other = copy.deepcopy(host)
        for p in other.parameters():
            p.mul_(0.9)
        model = retrofit.cascade([other, host], example=call)
    y, always = host(**call), pliant.bind(model, {"*": rules.Always()})
    for form in (always, pliant.plain(model)):
        found = form(**call)
        assert type(found) is type(y)
        assert torch.equal(logits(found), logits(y))  # bit for bit
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(1))})
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(drawn)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops() < int(trace.dense_flops.sum())
    given = pliant.bind(model, {"*": rules.Given(trace)})
    assert torch.equal(logits(given(**call)), logits(y))
    assert off(pliant.masked(given)(**call), y) <= 1e-5
