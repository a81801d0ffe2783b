"""One-for-all distillation and weight schemes against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pliant
from pliant import PliantError, Site, Trace, rules, scores
from pliant.core.trace import Exit
from pliant.execute import Exits
from pliant.losses import (
    MultiExit,
    OneForAll,
    by_cost,
    by_depth,
    conflict,
    constant,
    next_exit,
    previous_exit,
    where_right,
)  # fmt: skip
from pliant.losses.distill import kl


def chain():
    stages = [nn.Linear(5, 5) for _ in range(3)]
    heads = [nn.Linear(5, 4) for _ in range(3)]
    return Exits(stages, heads, [Site(scores.MaxProbability(), rules.Threshold(0.5)) for _ in range(2)]).double()


def recorded(model=None):
    model = chain() if model is None else model
    x, target = torch.randn(8, 5, dtype=torch.double), torch.randint(4, (8,))
    y, trace = pliant.record(model.train())(x)
    return model, y, trace, target


def softened(teacher, student, t):
    """T^2 KL, the sum over classes and the mean over rows, written out."""
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    return t**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize(("gamma", "t"), [(0.1, 1.0), (0.9, 3.0), (1.0, 2.0)])
def test_the_formula(gamma, t):
    _, y, trace, target = recorded()
    z = [e.logits for e in trace.exits]
    wanted = F.cross_entropy(z[2], target)
    for k in range(2):
        wanted = wanted + (1 - gamma) * F.cross_entropy(z[k], target) + gamma * softened(z[2], z[k], t)
    torch.testing.assert_close(OneForAll(gamma=gamma, temperature=t)(y, trace, target, 0.0), wanted)


@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
def test_without_distillation_it_is_the_plain_sum_to_the_bit(weights):
    model, y, trace, target = recorded()
    found = []
    for term in (MultiExit(weights), OneForAll(gamma=0.0, weights=weights)):
        model.zero_grad()
        loss = term(y, trace, target, 0.0)
        loss.backward(retain_graph=True)
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_gradient_reaches_the_teacher():
    model, y, trace, target = recorded()
    teacher = [*model.stages[2].parameters(), *model.heads[2].parameters()]
    distilled = OneForAll(gamma=1.0)(y, trace, target, 0.0) - F.cross_entropy(trace.exits[-1].logits, target)
    grads = torch.autograd.grad(distilled, teacher, retain_graph=True)
    plain = torch.autograd.grad(F.cross_entropy(trace.exits[-1].logits, target), teacher, retain_graph=True)
    whole = torch.autograd.grad(OneForAll(gamma=1.0)(y, trace, target, 0.0), teacher, retain_graph=True)
    assert all(g.abs().max() < 1e-15 for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))
    torch.autograd.grad(kl(trace.exits[-1].logits, trace.exits[0].logits).sum(), model.stages[0].weight)


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_loss_does_not_shrink_with_the_classes(classes):
    """The released code's mean over elements does: by 1 / C."""
    teacher, student = torch.zeros(3, classes), torch.zeros(3, classes)
    teacher[:, 0] = 20.0
    element_mean = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").mean()
    torch.testing.assert_close(kl(teacher, student).mean() / element_mean, torch.tensor(float(classes)))


def test_who_teaches_whom_and_where():
    _, y, trace, target = recorded()
    z = [e.logits for e in trace.exits]
    ce = [F.cross_entropy(logits, target) for logits in z]
    deeper = OneForAll(gamma=1.0, temperature=2.0, teachers=next_exit)(y, trace, target, 0.0)
    torch.testing.assert_close(deeper, softened(z[1], z[0], 2) + softened(z[2], z[1], 2) + ce[2])
    before = OneForAll(gamma=1.0, temperature=2.0, teachers=previous_exit)(y, trace, target, 0.0)
    torch.testing.assert_close(before, ce[0] + softened(z[0], z[1], 2) + softened(z[1], z[2], 2))
    right = (z[2].argmax(-1) == target).double()
    only = OneForAll(gamma=1.0, temperature=1.0, trust=where_right)(y, trace, target, 0.0)
    wanted = ce[2]
    for k in range(2):
        each = F.cross_entropy(z[k], target, reduction="none")
        wanted = wanted + (right * kl(z[2], z[k]) + (1 - right) * each).mean()
    torch.testing.assert_close(only, wanted)


def test_rows_that_left_learn_from_their_labels_and_an_exit_without_rows_counts_nothing():
    model = chain()
    x, target = torch.randn(6, 5, dtype=torch.double), torch.randint(4, (6,))
    given = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0], [1, 0]]).double()
    y, trace = pliant.record(pliant.gathered(model))(x, given=given)
    second, last = trace.exits[1].rows, trace.exits[2].rows
    assert (second.tolist(), last.tolist()) == ([0, 2, 3, 5], [0, 3])
    z = [e.logits for e in trace.exits]
    gamma, t = 0.7, 2.0
    wanted = F.cross_entropy(z[2], target[last])
    for k, rows in ((0, torch.arange(6)), (1, second)):
        each = F.cross_entropy(z[k], target[rows], reduction="none")
        taught = torch.isin(rows, last)
        each = each.clone()
        where = taught.nonzero().squeeze(1)
        each[where] = (1 - gamma) * each[where] + gamma * kl(z[2], z[k][where], t)
        wanted = wanted + each.mean()
    torch.testing.assert_close(OneForAll(gamma=gamma, temperature=t)(y, trace, target, 0.0), wanted)
    none = Trace({}, (Exit(z[0]), Exit(z[1][:0], torch.empty(0, dtype=torch.int64))), (), 6)
    alone = OneForAll(gamma=gamma)(y, none, target, 0.0)
    torch.testing.assert_close(alone, F.cross_entropy(z[0], target))
    torch.testing.assert_close(MultiExit()(y, none, target, 0.0), F.cross_entropy(z[0], target))


@pytest.mark.parametrize("wrong", [{"gamma": 1.5}, {"gamma": -0.1}, {"temperature": 0.0}])
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(PliantError, match="gamma"):
        OneForAll(**wrong)


def test_weight_schemes():
    _, y, trace, target = recorded()
    each = torch.stack([F.cross_entropy(e.logits, target) for e in trace.exits])
    for weights in (constant(3), by_depth(3), by_cost([1, 2, 4])):
        loss = MultiExit(weights)(y, trace, target, 0.0)
        torch.testing.assert_close(loss, (each * torch.tensor(weights, dtype=torch.double)).sum())
    assert constant(3) == [1.0, 1.0, 1.0]
    assert by_depth(3) == [1 / 6, 2 / 6, 3 / 6]
    with pytest.raises(PliantError, match="weights for 3"):
        OneForAll(weights=[1.0])(y, trace, target, 0.0)
    for wrong in ([], [0.0, 1.0]):
        with pytest.raises(PliantError, match="positive cost"):
            by_cost(wrong)


def test_weights_of_nothing_before_the_last_exit_leave_single_exit_training():
    model, y, trace, target = recorded()
    MultiExit([0.0, 0.0, 1.0])(y, trace, target, 0.0).backward(retain_graph=True)
    wanted = torch.autograd.grad(F.cross_entropy(trace.exits[-1].logits, target), list(model.stages.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.stages.parameters(), wanted, strict=True))


def test_conflict_is_the_cosine_of_two_exits_gradients():
    model, _, trace, target = recorded()
    first = list(model.stages[0].parameters())
    flat = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(e.logits, target), first, retain_graph=True)]
        )
        for e in trace.exits
    ]
    got = conflict(trace, target, first)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(got[i, j], F.cosine_similarity(flat[i], flat[j], dim=0))
    last = conflict(trace, target, model.stages[2].parameters())
    assert last[:2].isnan().all()  # the earlier exits don't use the last stage
    torch.testing.assert_close(last[2, 2], torch.ones((), dtype=torch.double))
    with pytest.raises(PliantError, match="0 parameters"):
        conflict(trace, target, [])
