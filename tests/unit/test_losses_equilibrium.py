"""Gradient equilibrium and inline collaboration against their formulas, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pliant
from pliant import PliantError, Site, rules, scores
from pliant.execute import Exits, InlineHead, Residual, collaborative, equilibrium, scale_last
from pliant.execute.heads import PooledClassifier
from pliant.functional import scale_gradient

K = 3


def site():
    return Site(scores.MaxProbability(), rules.Threshold(0.5))


def chain(count=K, width=5, classes=4):
    stages = [nn.Linear(width, width).double() for _ in range(count)]
    heads = [nn.Linear(width, classes).double() for _ in range(count)]
    return Exits(stages, heads, [site() for _ in range(count - 1)])


class Net(nn.Module):
    """A head with its own pooled features and a last linear layer."""

    def __init__(self, width=5, classes=4):
        super().__init__()
        self.own = nn.Linear(width, width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x):
        return self.linear(self.own(x).relu())


def collaborating(count=K, width=5, *, started=True):
    base = Exits(
        [nn.Linear(width, width) for _ in range(count)],
        [Net() for _ in range(count)],
        [site() for _ in range(count - 1)],
    )
    model = collaborative(base)
    if started:
        for head in list(model.heads)[1:]:
            nn.init.normal_(head.inline.weight)
    return model


def test_scaled_gradients_of_gradients():
    x = torch.randn(3, dtype=torch.double, requires_grad=True)
    y = scale_gradient(x, 0.5)
    assert torch.equal(x, y)
    first = torch.autograd.grad((y**3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, 0.5 * 3 * x**2)
    second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(second, 0.5 * 0.5 * 6 * x)  # each passage through the identity scales
    assert scale_gradient(x.detach(), 0.5).requires_grad is False


@pytest.mark.parametrize("form", [pliant.masked, pliant.gathered])
def test_the_gradient_of_every_block_is_the_mean_over_exits(form):
    """g_k = J_k^T (h_k + ... ) by hand: h_k / (K - k + 1) + (K - k) / (K - k + 1) A_{k+1}^T g_{k+1}."""
    model = chain()
    balanced = form(pliant.bind(equilibrium(model), {"*": rules.Always()}))
    x = torch.randn(7, 5, dtype=torch.double)
    _, trace = pliant.record(balanced)(x)
    weights = [torch.randn(7, 4, dtype=torch.double) for _ in range(K)]
    sum((e.logits * w).sum() for e, w in zip(trace.exits, weights, strict=True)).backward()

    features, h = [], x
    for stage in model.stages:
        features.append(h)
        h = stage(h)
    reaching = torch.zeros(7, 5, dtype=torch.double)
    for k in range(K, 0, -1):
        deeper = reaching @ model.stages[k].weight if k < K else reaching
        own = weights[k - 1] @ model.heads[k - 1].weight
        reaching = own / (K - k + 1) + (K - k) / (K - k + 1) * deeper
        torch.testing.assert_close(
            model.stages[k - 1].weight.grad, reaching.T @ features[k - 1], atol=1e-12, rtol=1e-10
        )
    h = x
    for k, stage in enumerate(model.stages):  # heads get all of theirs
        h = stage(h)
        torch.testing.assert_close(model.heads[k].weight.grad, weights[k].T @ h)


def test_answers_costs_and_keys_stay():
    torch.manual_seed(0)
    model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    balanced = equilibrium(model, scale=scale_last)
    x = torch.randn(6, 3, 32, 32)
    for given in (torch.ones(6, 2), torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [1, 1], [1, 0]])):
        y, trace = pliant.record(model)(x, given=given)
        z, other = pliant.record(balanced)(x, given=given)
        assert torch.equal(y, z)
        assert torch.equal(trace.flops, other.flops)
    assert list(balanced.state_dict()) == list(model.state_dict())
    assert next(balanced.parameters()) is next(model.parameters())
    pliant.check(balanced, x, only=["gathered", "flops", "checkpoint", "deepcopy", "recording", "state_dict"])


def test_only_the_scale_that_the_classifier_reads_is_scaled():
    class Two(nn.Module):
        def forward(self, x):
            return [x[0] * 1, x[1] * 1] if isinstance(x, list) else [x, x]

    class Last(nn.Module):
        def forward(self, x):
            return x[-1]

    class Both(nn.Module):
        def forward(self, x):
            return x[0] + x[1]

    model = equilibrium(
        Exits([Two(), Two(), Two()], [Last(), Last(), Both()], [site(), site()]), scale=scale_last
    ).train()
    x = [torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)]
    _, trace = pliant.record(model)(x)
    sum(e.logits.sum() for e in trace.exits).backward()
    assert torch.allclose(x[0].grad, torch.ones(1, 2))  # fine scale: untouched
    assert torch.allclose(x[1].grad, torch.ones(1, 2))  # coarse scale: the mean of three exits' ones


def test_a_chain_inside_a_network_and_around_gates_is_found_and_twice_is_refused():
    inner = Exits(
        [nn.Linear(4, 4), Residual(nn.Linear(4, 4), site_of_gate())], [nn.Linear(4, 4), nn.Linear(4, 4)], [site()]
    )
    balanced = equilibrium(nn.Sequential(nn.Linear(4, 4), inner))
    pliant.check(balanced, torch.randn(6, 4), only=["gathered", "flops", "recording"])
    with pytest.raises(PliantError, match="already"):
        equilibrium(balanced)
    with pytest.raises(PliantError, match="without a chain"):
        equilibrium(nn.Linear(2, 2))
    same = nn.Linear(4, 4)
    with pytest.raises(PliantError, match="twice"):
        equilibrium(Exits([same, same, same], [nn.Linear(4, 4) for _ in range(3)], [site(), site()]))


def site_of_gate():
    made = scores.LinearGate(4, bias=0.0)
    nn.init.normal_(made.linear.weight)
    return Site(made, rules.Threshold(0.0))


def test_collaborating_heads_keep_the_contract():
    torch.manual_seed(0)
    model, x = collaborating(), torch.randn(8, 5)
    model.train()
    for _ in range(5):
        model(torch.randn(16, 5))
    seen = pliant.check(equilibrium(model.eval()), x)
    assert "exact" in seen["flops"]


def test_a_collaborating_head_starts_as_the_one_it_was_made_of_and_reads_the_logits_of_its_own_rows():
    torch.manual_seed(0)
    base = Exits([nn.Linear(5, 5) for _ in range(K)], [Net() for _ in range(K)], [site() for _ in range(K - 1)]).eval()
    x = torch.randn(9, 5)
    _, before = pliant.record(pliant.masked(base))(x)
    model = collaborative(base)
    assert not model.training
    _, same = pliant.record(pliant.masked(model))(x)
    for a, b in zip(before.exits, same.exits, strict=True):
        assert torch.equal(a.logits, b.logits)
    for head in list(model.heads)[1:]:
        nn.init.normal_(head.inline.weight)
    go = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [1, 1], [1, 0], [0, 0]]).float()
    _, trace = pliant.record(pliant.gathered(model))(x, given=go)
    h1 = model.stages[0](x)
    z1 = model.heads[0](h1)
    second = torch.tensor([0, 2, 4, 6, 7])
    h2 = model.stages[1](h1[second])
    head = model.heads[1]
    z2 = head.linear(head.features(h2)) + head.inline(head.transfer(z1[second]))
    assert trace.exits[1].rows.tolist() == second.tolist()
    torch.testing.assert_close(trace.exits[1].logits, z2)
    torch.testing.assert_close(trace.exits[2].logits, model.heads[2](model.stages[2](h2[[0, 2, 3]]), z2[[0, 2, 3]]))
    torch.testing.assert_close(pliant.plain(model)(x), pliant.bind(model, {"*": rules.Always()})(x))


def test_the_plain_form_runs_only_the_heads_that_the_last_one_needs():
    class Untouched(Net):
        def forward(self, x):
            raise AssertionError

    model = Exits(
        [nn.Linear(5, 5) for _ in range(4)],
        [Untouched(), Net(), InlineHead(Net()), InlineHead(Net())],
        [site() for _ in range(3)],
    )
    assert pliant.plain(model.eval())(torch.randn(2, 5)).shape == (2, 4)


def test_what_cannot_collaborate_is_refused():
    with pytest.raises(PliantError, match="'linear'"):
        InlineHead(nn.Linear(2, 2))
    with pytest.raises(PliantError, match="reads its stage alone"):
        collaborative(collaborating())
    with pytest.raises(PliantError, match="first head"):
        Exits([nn.Identity()], [InlineHead(PooledClassifier(2, 2))], [])
