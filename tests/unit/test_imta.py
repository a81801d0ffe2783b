"""IMTA: what each of its three parts changes, and what it must not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pliant
from pliant.losses import MultiExit
from pliant.systems.depth.imta import imta, stages
from pliant.systems.depth.msdnet import msdnet
from pliant.train import Fit, fit

SMALL = {"exits": 3, "base": 1, "step": 1, "channels": 4, "head_channels": 16}


def data(rows=48):
    return SimpleNamespace(x=torch.randn(rows, 3, 16, 16), y=torch.arange(rows) % 4)


def started(model):
    for head in list(model.heads)[1:]:
        nn.init.normal_(head.inline.weight)
    return model


def test_it_starts_as_msdnet():
    torch.manual_seed(0)
    plain = msdnet(4, **SMALL)
    model = imta(4, **SMALL)
    state = plain.state_dict()
    theirs = {k.replace("heads.1.features.", "heads.1.features.features.").replace("heads.2.features.", "heads.2.features.features."): v
              for k, v in state.items()}  # fmt: skip
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert all(".inline." in name or ".transfer." in name for name in missing)
    x = torch.randn(5, 3, 16, 16)
    for a, b in zip(*(pliant.record(pliant.masked(m.eval()))(x)[1].exits for m in (plain, model)), strict=True):
        assert torch.equal(a.logits, b.logits)


def test_with_inline_layers_in_use_it_keeps_the_contract():
    torch.manual_seed(0)
    model = started(imta(4, **SMALL)).train()
    x = torch.randn(6, 3, 16, 16)
    for _ in range(4):
        model(torch.randn(8, 3, 16, 16))
    model.eval()
    with torch.no_grad():
        scores = pliant.record(pliant.masked(model))(x)[1]["sites.0"][0].scores
    for site in model.sites:
        site.rule.threshold.copy_(scores.median() + 1e-3)
    seen = pliant.check(
        model, x, only=["gathered", "all_on", "replay", "rows", "flops", "dense_flops", "export", "checkpoint", "nan"]
    )
    assert "exact" in seen["flops"]


def test_the_second_stage_leaves_the_trunk_to_the_byte_and_the_first_leaves_the_inline_layers():
    torch.manual_seed(0)
    model, train = imta(4, **SMALL), data()
    (first, one), (second, two) = stages((2, 2), lr=0.05, schedule="cosine", milestones=())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fit(model, train, first, one, options=Fit(batch_size=16))
    between = {name: t.clone() for name, t in model.state_dict().items()}
    inline = [name for name in before if ".inline." in name or ".transfer." in name]
    assert all(torch.equal(before[name], between[name]) for name in inline)
    assert not torch.equal(before["stages.0.0.steps.0.1.running_mean"], between["stages.0.0.steps.0.1.running_mean"])
    fit(model, train, second, two, options=Fit(batch_size=16))
    after = model.state_dict()
    trunk = [name for name in after if name.startswith("stages.")]
    assert any("running_mean" in name for name in trunk)
    assert all(torch.equal(between[name], after[name]) for name in trunk)
    assert all(not torch.equal(between[name], after[name]) for name in inline)


def norms(balanced: bool, exits: int) -> float:
    """Norm of the gradient at the first convolution, at the start, averaged over a few networks."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        arguments = {**SMALL, "exits": exits, "reduction": 0.0, "factors": (1,), "bottlenecks": (1,)}
        model = (imta if balanced else msdnet)(4, **arguments)
        x, y = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
        prediction, trace = pliant.record(model.train())(x)
        MultiExit()(prediction, trace, y, 0.0).backward()
        found.append(float(next(model.stages[0].parameters()).grad.norm()))
    return sum(found) / len(found)


def test_the_gradient_at_the_first_block_stops_growing_with_the_exits_behind_it():
    sums, means = [norms(False, k) for k in (2, 10)], [norms(True, k) for k in (2, 10)]
    assert sums[1] > 1.5 * sums[0]
    assert means[1] < 1.2 * means[0]


def test_arguments_are_those_of_msdnet():
    with pytest.raises(pliant.PliantError, match="0 exits"):
        imta(exits=0)
