"""Exits of text encoders: DeeBERT's two stages, PABEE's patience."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import PliantError, Site, rules, scores
from pliant.data import Split
from pliant.execute import Exits
from pliant.systems.depth.deebert import deebert, ramps_from_last, two_stages
from pliant.systems.depth.pabee import pabee
from pliant.train import fit


def texts() -> Split:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(1, 12, (40, 5), generator=g)
    x[::3, 3:] = 0
    return Split(x, (x == 7).any(1).long())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_trunk_is_frozen_while_ramps_learn() -> None:
    torch.manual_seed(0)
    model, data = deebert(2, 12, layers=3, width=8, heads=2), texts()
    first, second = two_stages(model, epochs=1, lr=1e-2)
    start = parameters(model)
    fit(model, data, first[0].loss, first)
    trained = parameters(model)
    assert all(torch.equal(start[n], trained[n]) for n in start if n.startswith(("heads.0", "heads.1")))
    assert not torch.equal(start["stages.0.0.words.weight"], trained["stages.0.0.words.weight"])
    ramps_from_last(model)
    assert torch.equal(model.heads[0][0].linear.weight, model.heads[2][0].linear.weight)
    before = parameters(model)
    fit(model, data, second[0].loss, second)
    after = parameters(model)
    changed = {name.split(".")[0] + name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"heads0", "heads1"}


def test_the_losses_of_both_stages_are_the_papers() -> None:
    """The classifier's cross-entropy, then the unweighted sum of the off-ramps', the classifier left out."""
    torch.manual_seed(0)
    model, data = deebert(2, 12, layers=4, width=8, heads=2, dropout=0.0).train(), texts()
    y, trace = pliant.record(model)(data.x)
    each = [nn.functional.cross_entropy(e.logits, data.y) for e in trace.exits]
    for (phase,), wanted in zip(two_stages(model), (each[3], each[0] + each[1] + each[2]), strict=True):
        assert phase.loss is not None
        (found,) = phase.loss(y, trace, data.y, 0.0).values()
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_no_entropy_is_low_enough_for_zero_and_a_higher_one_never_runs_deeper() -> None:
    torch.manual_seed(0)
    model = deebert(2, 12, layers=4, width=8, heads=2).eval()
    x, depths = texts().x, []
    for threshold in (-1.0, 0.5, 0.9, 0.99, 1.0):
        now = pliant.bind(model, {"*": rules.Threshold(threshold)})
        y, trace = pliant.record(now)(x)
        depths.append(torch.stack([trace.dense(f"sites.{k}") for k in range(3) if f"sites.{k}" in trace]).sum(0))
        if threshold < 0:
            assert torch.equal(y, pliant.plain(model)(x))
    assert all((a >= b).all() for a, b in itertools.pairwise(depths))


@torch.no_grad()
def test_patience_never_leaves_before_its_time_and_more_of_it_never_earlier() -> None:
    torch.manual_seed(0)
    model = pabee(4, 12, layers=5, width=8, heads=2).eval()
    x, found = texts().x, []
    for patience in (1, 2, 3, 4):
        now = pliant.bind(model, {"*": scores.Patience(patience)})
        _, trace = pliant.record(now)(x)
        layer = 1 + torch.stack([trace.dense(site) for site in trace]).sum(0)
        assert layer.min() >= patience + 1
        alone = [1 + sum(float(t.dense(s)) for s in t) for t in (pliant.record(now)(row[None])[1] for row in x)]
        assert layer.tolist() == alone
        found.append(layer)
    assert all((a <= b).all() for a, b in itertools.pairwise(found))
    assert (found[-1] == 5).all()


@torch.no_grad()
def test_regression_leaves_where_predictions_have_settled() -> None:
    class Read(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.k : self.k + 1]

    made = torch.tensor([[0.0, 1.0, 1.05, 1.06], [0.0, 0.05, 3.0, 9.0], [0.0, 1.0, 2.0, 3.0]])
    sites = [Site(scores.Steady(1, tau=0.1), rules.Threshold(0.0)) for _ in range(3)]
    chain = Exits([nn.Identity()] * 4, [Read(k) for k in range(4)], sites).eval()
    assert chain(made).squeeze(1).tolist() == pytest.approx([1.05, 0.05, 3.0])
    wider = pliant.bind(chain, {"*": scores.Steady(1, tau=2.0)})
    assert wider(made).squeeze(1).tolist() == pytest.approx([1.0, 0.05, 1.0])


def test_what_steady_refuses() -> None:
    with pytest.raises(PliantError, match="tau=0"):
        scores.Steady(1, tau=0)
    with pytest.raises(PliantError, match="one for each row"):
        scores.Steady(1, tau=0.1)(torch.zeros(3, 2))
