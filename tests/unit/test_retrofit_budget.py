"""Exits, gates and tokens on one model, turned by one budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import HOSTS, call_of, logits
from pliant import PliantError
from pliant.retrofit import Plan, exits, skips, tokens

ROWS = 96


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, num_heads=4, depth=6, num_classes=5
    ).eval()
    x = torch.randn(2 * ROWS, 3, 32, 32)
    plan = Plan().exits("blocks.1", "blocks.3").skips("blocks.[24]").tokens("blocks.[02]")
    return plan.apply(host, x[:4]), {"x": x}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    host, call = call_of("transformers BERT")
    length = torch.arange(2 * ROWS) % 8 + 3
    texts = {
        "input_ids": torch.randint(2, 100, (2 * ROWS, 10)),
        "attention_mask": (torch.arange(10) < length[:, None]).to(torch.int64),
    }
    known = HOSTS["transformers BERT"]
    model = skips(tokens(host, known.tokens, example=call), ["bert.encoder.layer.[13]"], example=call)
    return exits(model, known.exits, example=call), texts


@pytest.mark.parametrize("make", [vit, bert], ids=lambda f: f.__name__)
@torch.no_grad()
def test_one_budget_turns_exits_gates_and_tokens(make: Any) -> None:
    torch.manual_seed(0)
    model, call = make()
    for name, p in model.named_parameters():  # heads and gates that tell rows apart
        if name.startswith(("exits.heads", "skips")) and p.ndim == 2:
            p.normal_()
    model.eval()
    labels = logits(pliant.bind(model, {"*": pliant.rules.Always()})(**call)).argmax(1)
    halves = [{name: t[i : i + ROWS] for name, t in call.items()} for i in (0, ROWS)]
    held_out = [(tuple(halves[0].values()) if make is bert else halves[0]["x"], labels[:ROWS])]
    kinds = {"exits", "skips", "tokens"}
    for budget in (0.8, 0.55):
        point = pliant.tune(model, held_out, budget=budget)
        assert {site.partition(".")[0] for site in point.thresholds} == kinds
        for rows, within in ((halves[0], 0.0), (halves[1], 0.06)):  # those it was tuned on, and others
            with FlopCounterMode(display=False) as counter:
                _, trace = pliant.record(model)(**rows)
            assert int(trace.flops.sum()) == counter.get_total_flops()
            share = float(trace.flops.sum() / trace.dense_flops.sum())
            assert budget - 0.12 <= share <= budget + within
            if not within:
                assert share == pytest.approx(point.share)
                saved = {path.partition(".")[0] for path in trace if float(trace.dense(path).mean()) < 1}
                assert saved == kinds  # each of the three gives something
    with pytest.raises(PliantError, match=r"a budget of 1.0% of dense FLOPs; expected between"):
        pliant.tune(model, held_out, budget=0.01)
