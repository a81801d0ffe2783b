"""Terms that read a second pass: who gets a gradient, what stays as it is, and what fit does about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pliant
from pliant import PliantError, estimators, record, rules, scores
from pliant.execute import Skip
from pliant.losses import (
    CrossEntropy,
    OneForAll,
    Sandwich,
    SubnetworkDistillation,
    TaughtExits,
    Total,
    dense,
    frozen,
    itself,
)  # fmt: skip
from pliant.losses.distill import kl
from pliant.systems.depth.msdnet import msdnet
from pliant.train import Fit, Phase, fit
from pliant.train.step import Batch, Step


def gated():
    site = pliant.Site(scores.LinearGate(4, bias=0.0), estimators.StraightThrough(rules.Threshold(0.0)))
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Skip(nn.Linear(4, 4), site), nn.Linear(4, 3)).train()


def batch(rows=16):
    return torch.randn(rows, 4), torch.randint(3, (rows,))


def terms_of(model, loss, x, target):
    return Step(model, loss)(Batch(x, target, 0.0))


def test_the_formula_with_a_live_teacher():
    model, (x, target) = gated(), batch()
    found = terms_of(model, Total({"kd": (1.0, SubnetworkDistillation(share=0.3, temperature=4.0))}), x, target)["kd"]
    y = model(x)
    with torch.no_grad():
        full = pliant.bind(model, {"*": rules.Always()})(x)
    p, q = (full / 4).softmax(-1), (y / 4).softmax(-1)
    wanted = 0.3 * 16 * (p * (p.log() - q.log())).sum(-1).mean() + 0.7 * F.cross_entropy(y, target)
    torch.testing.assert_close(found, wanted)


def test_gates_learn_from_the_dense_pass_which_gets_no_gradient_and_moves_no_statistics():
    model, (x, target) = gated(), batch()
    once = terms_of(model, Total({"task": (1.0, CrossEntropy())}), x, target)
    after_one = {name: t.clone() for name, t in model.named_buffers()}
    model[1].reset_running_stats()
    terms = terms_of(model, Total({"kd": (1.0, SubnetworkDistillation(share=1.0))}), x, target)
    for name, t in model.named_buffers():
        assert torch.equal(t, after_one[name]), name
    terms["kd"].backward()
    assert model[2].site.scorer.linear.weight.grad.abs().max() > 0
    found = [p.grad.clone() for p in model.parameters()]
    # The same from logits that are plainly constants: nothing came through the dense pass.
    model.zero_grad()
    model[1].reset_running_stats()
    with torch.no_grad():
        constant = dense(model)(x)
    kl(constant, model(x), 2.0).mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), found, strict=True))
    assert list(once) == ["task"]


def test_a_frozen_teacher_stays_while_its_original_trains_on():
    model, (x, target) = gated(), batch()
    teacher = frozen(model)
    wanted = teacher(model)(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(teacher(model)(x), wanted)
    assert not any(p.requires_grad for p in teacher(model).parameters())
    found = terms_of(
        model, Total({"kd": (1.0, SubnetworkDistillation(teacher, share=1.0, temperature=1.0))}), x, target
    )
    torch.testing.assert_close(found["kd"], kl(wanted, model(x)).mean())


def test_another_network_teaches_every_exit_but_the_last():
    torch.manual_seed(0)
    small = {"exits": 3, "base": 1, "step": 1, "channels": 4, "head_channels": 8}
    model, teacher = msdnet(4, **small).train(), msdnet(4, **small).eval()
    x, target = torch.randn(6, 3, 16, 16), torch.randint(4, (6,))
    loss = Total({"exits": (1.0, TaughtExits(frozen(teacher), gamma=0.4, temperature=2.0))})
    found = terms_of(model, loss, x, target)["exits"]
    z = [e.logits for e in record(model)(x)[1].exits]
    t = pliant.bind(teacher, {"*": rules.Threshold(0.5)})(x).detach()
    wanted = F.cross_entropy(z[2], target)
    for k in range(2):
        wanted = wanted + 0.6 * F.cross_entropy(z[k], target) + 0.4 * kl(t, z[k], 2.0).mean()
    torch.testing.assert_close(found, wanted)
    assert isinstance(TaughtExits(frozen(teacher)).exits, OneForAll)


def test_fit_makes_the_passes_and_the_other_network_follows_the_weights():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = SimpleNamespace(x=x, y=(x[:, 0] > 0).long())
    model = gated()
    loss = Total({"kd": (1.0, SubnetworkDistillation(share=0.5)), "task": (0.5, CrossEntropy())})
    history = fit(model, data, loss, [Phase("one", 6, lr=0.1)], options=Fit(batch_size=16))
    assert history[-1]["kd"] < history[0]["kd"]
    step = Step(model, loss)
    step(Batch(x, data.y, 0.0))
    (other,) = step.others.values()
    assert next(other.parameters()) is next(model.parameters())
    assert list(step.state_dict()) == [f"recorder.model.{name}" for name in model.state_dict()]


def test_mixed_precision_widens_the_other_pass_too():
    model, (x, target) = gated(), batch()
    step = Step(model, Total({"kd": (1.0, SubnetworkDistillation())}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(Batch(x, target, 0.0))["kd"].dtype == torch.float32


def test_the_model_itself_once_more():
    model, (x, _) = gated(), batch()
    before = {name: t.clone() for name, t in model.named_buffers()}
    again = itself(model)
    assert torch.equal(again(x), model(x))
    model[1].reset_running_stats()
    again(x)
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def test_without_a_second_pass_it_says_what_to_do():
    model, (x, target) = gated(), batch()
    y, trace = record(model)(x)
    loss = Total({"kd": (1.0, SubnetworkDistillation())})
    with pytest.raises(PliantError, match="again="):
        loss(y, trace, target, 0.0)
    by_hand = loss(y, trace, target, 0.0, again=lambda term: record(term.other(model))(x))
    assert by_hand["kd"].ndim == 0
    with pytest.raises(PliantError, match="gamma"):
        SubnetworkDistillation(temperature=0.0)


def test_a_sandwich_trains_the_full_network_by_labels_alone():
    model, (x, target) = gated(), batch()
    loss = terms_of(model, Total({"kd": (1.0, Sandwich(share=1.0))}), x, target)["kd"]
    wanted = (
        F.cross_entropy(dense(model)(x), target)
        + terms_of(model, Total({"kd": (1.0, SubnetworkDistillation(share=1.0))}), x, target)["kd"]
    )
    parameters = [p for name, p in model.named_parameters() if "scorer" not in name]
    for one, other in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(loss, wanted)
    full = dense(model)(x).detach().requires_grad_()
    term = Sandwich(share=1.0)(dense(model)(x).detach(), None, target, 0.0, (full, None))
    (gradient,) = torch.autograd.grad(term, full)  # of the labels; none of the distillation
    torch.testing.assert_close(gradient, (full.softmax(1) - F.one_hot(target, 3)).detach() / len(x))
