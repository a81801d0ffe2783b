"""Adapted parameters and features against loops that anyone can read: one row at a time, one expert, one step at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, Site, rules, scores
from pliant.execute import (
    Adapted,
    Deformed,
    DynamicReLU,
    GeneratedConv2d,
    GrownConv2d,
    KernelGenerator,
    MixedConv2d,
    Scaled,
    ScaledLSTM,
    Steps,
)
from pliant.functional.dynamic_conv import Geometry, conv_each

BATCHES = st.sampled_from([0, 1, 2, 3, 7])
EXPERTS = 3


def mixing(rule: pliant.Rule | None = None) -> Adapted:
    torch.manual_seed(0)
    conv = MixedConv2d(2, 4, 3, experts=EXPERTS, geometry=Geometry(padding=1), bias="experts")
    nn.init.normal_(conv.bias)
    site = Site(scores.PooledLinear(2, EXPERTS), rule or rules.Sigmoid(), shape=(EXPERTS,))
    return Adapted(site, Steps([conv, nn.ReLU()])).eval()


def one_by_one(layer: Adapted, x: Tensor, weights: Tensor) -> Tensor:
    """Each expert's convolution of each row, weighed and summed."""
    conv: MixedConv2d = layer.operation.chain[0]  # pyright: ignore
    rows = []
    for image, weight in zip(x, weights, strict=True):
        total = torch.zeros(4, *image.shape[1:])
        for e in range(EXPERTS):
            total += weight[e] * F.conv2d(image, conv.weight[e], conv.bias[e], padding=1)
        rows.append(total.relu())
    return torch.stack(rows) if rows else x.new_zeros(0, 4, *x.shape[2:])


@given(BATCHES, st.sampled_from(["own", "random", "TopK", "Always", "Never", "ReluTanh", "Softmax"]), st.integers(0, 9))
def test_mixtures_of_experts_kernels(batch: int, how: str, seed: int) -> None:
    """Soft weights, weights that are exactly zero, and choices of k experts are one formula, in every form and replayed."""
    torch.manual_seed(seed)
    rule = {
        "own": rules.Sigmoid(), "random": rules.Random(0.5, torch.Generator().manual_seed(seed)), "TopK": rules.TopK(2),
        "Always": rules.Always(), "Never": rules.Never(), "ReluTanh": rules.ReluTanh(), "Softmax": rules.Softmax(30.0),
    }[how]  # fmt: skip
    layer, x = mixing(rule), torch.randn(batch, 2, 5, 4)
    with torch.no_grad():
        y, trace = pliant.record(layer)(x)
        value = trace["site"][0].value
        assert value.shape == (batch, EXPERTS)
        assert torch.allclose(y, one_by_one(layer, x, value), atol=1e-5)
        for form in (pliant.masked, pliant.gathered):
            again = pliant.bind(form(layer), {"*": rules.Given(trace)})(x)
            assert torch.equal(again, y)
        assert torch.equal(layer(x, given=value), y)
        if how == "Always":
            assert torch.allclose(pliant.plain(layer)(x), y, atol=1e-5)


def test_every_expert_learns_and_so_does_the_router() -> None:
    layer = mixing().train()
    layer(torch.randn(4, 2, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert (layer.operation.chain[0].weight.grad.flatten(1).abs().sum(1) > 0).all()  # pyright: ignore


@pytest.mark.parametrize("batch", [1, 40])
def test_the_price_of_a_row_does_not_hang_on_its_batch(batch: int) -> None:
    layer, x = mixing(), torch.randn(batch, 2, 6, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, trace = pliant.record(layer)(x)
    weights = 4 * 2 * 9 + 4
    assert trace.flops.tolist() == [2 * (36 * 4 * 18 + EXPERTS * weights + 2 * EXPERTS)] * batch
    assert int(trace.flops.sum()) == counter.get_total_flops()


def test_scaled_channels_are_scaled_kernels() -> None:
    """The survey's Eqs. 9-10: attention on a convolution's output is a convolution by reweighed kernels."""
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    attended = nn.Sequential(conv, Adapted(Site(scores.Excitation(8), rules.Sigmoid(), shape=(8,)), Scaled()))
    x = torch.randn(5, 3, 6, 6)
    y, trace = pliant.record(attended)(x)
    kernels = trace["1.site"][0].value[:, :, None, None, None] * conv.weight
    assert torch.allclose(y, conv_each(x, kernels, geometry=Geometry(padding=1)), atol=1e-5)


def test_a_row_of_lines() -> None:
    x, value = torch.randn(3, 2, 4), 2 * torch.rand(3, 2, 4)
    y = DynamicReLU()(x, value)
    for r in range(3):
        for c in range(2):
            a1, a2, b1, b2 = (value[r, c] - 1).tolist()
            lines = [(1 + a1) * x[r, c] + 0.5 * b1, a2 * x[r, c] + 0.5 * b2]
            assert torch.allclose(y[r, c], torch.maximum(*lines), atol=1e-6)


def test_lines_of_ones_are_the_relu_and_one_line_is_an_excitation() -> None:
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(DynamicReLU()(x, torch.ones(3, 1, 4)), x.relu())
    a = torch.rand(3, 4)
    value = torch.stack([a, torch.ones(3, 4)], 2)
    assert torch.allclose(DynamicReLU(lines=1)(x, value), Scaled()(x, a), atol=1e-6)


def test_generated_kernels_at_ones_sum() -> None:
    layer, x = GeneratedConv2d((3, 2, 3, 3), geometry=Geometry(padding=1)), torch.randn(4, 2, 5, 5)
    assert torch.allclose(layer(x, torch.ones(4, 3, 2, 3, 3)), layer.static(x), atol=1e-5)


def deformable(modulated: bool) -> tuple[nn.Conv2d, Deformed]:
    conv = nn.Conv2d(2, 4, 3, padding=1)
    side = scores.SideConv
    mask = Site(side(conv, 9), rules.Sigmoid()) if modulated else None
    return conv, Deformed(conv, Site(side(conv, 18, start=1.0), rules.Regressed()), mask)


def test_deformable_starts_as_half_the_convolution_and_version_one_as_all_of_it() -> None:
    x = torch.randn(3, 2, 7, 7)
    conv, second = deformable(True)
    bias = conv.bias[:, None, None]  # pyright: ignore
    assert torch.allclose(second(x) - bias, 0.5 * (conv(x) - bias), atol=1e-5)
    conv, first = deformable(False)
    assert torch.allclose(first(x), conv(x), atol=1e-5)


def test_a_mask_of_ones_is_version_one() -> None:
    _, second = deformable(True)
    nn.init.normal_(second.offsets.scorer.conv.weight)  # pyright: ignore
    x = torch.randn(3, 2, 7, 7)
    first = Deformed(second.operation.conv, second.offsets)
    assert torch.allclose(pliant.bind(second, {"mask": rules.Always()})(x), first(x), atol=1e-5)


def lstm(inputs: int = 3, hidden: int = 4) -> ScaledLSTM:
    torch.manual_seed(0)
    site = Site(scores.HyperCell(inputs + hidden, hidden, hidden=5, embedding=2), rules.Regressed(), shape=(12, hidden))
    return ScaledLSTM(inputs, hidden, site).eval()


def layer_norm_lstm(net: ScaledLSTM, x: Tensor, scale: float) -> Tensor:
    """One sequence (I, T), its matrices times ``scale``."""
    h, c, states = torch.zeros(4), torch.zeros(4), []
    for t in range(x.shape[1]):
        total = (scale * net.states.weight @ h + scale * net.inputs.weight @ x[:, t]).reshape(4, 4)
        i, g, f, o = (
            F.layer_norm(gate, (4,)) * gain + shift
            for gate, gain, shift in zip(total, net.gain, net.shift, strict=True)
        )
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(net.norm(c))
        states.append(h)
    return torch.stack(states, 1)


def test_at_the_start_a_hyper_lstm_is_a_layer_norm_lstm_of_a_tenth_and_plain_the_whole_one() -> None:
    net, x = lstm(), torch.randn(2, 3, 6)
    for model, scale in ((net, 0.1), (pliant.plain(net), 1.0), (pliant.bind(net, {"*": rules.Always()}), 1.0)):
        y = model(x)
        for row in range(2):
            assert torch.allclose(y[row], layer_norm_lstm(net, x[row], scale), atol=1e-5)


@given(BATCHES, st.integers(0, 4))
def test_scales_of_every_step_replay(batch: int, steps: int) -> None:
    net, x = lstm(), torch.randn(batch, 3, steps)
    nn.init.normal_(net.site.scorer.embed.weight)  # pyright: ignore
    with torch.no_grad():
        y, trace = pliant.record(net)(x)
        assert y.shape == (batch, 4, steps)
        if steps:
            assert len(trace["site"]) == steps
            assert torch.equal(pliant.bind(net, {"*": rules.Given(trace)})(x), y)
            values = torch.stack([d.value for d in trace["site"]], 1)
            assert torch.allclose(net(x, given=values), y, atol=1e-6)


def test_grown_kernels() -> None:
    generator = KernelGenerator(8, tile=4)
    a, b = GrownConv2d(generator, 4, 8), GrownConv2d(generator, 4, 8)
    with torch.no_grad():
        assert not torch.allclose(generator(a.z), generator(b.z))
        b.z.copy_(a.z)
    assert torch.equal(generator(a.z), generator(b.z))
    tile = generator.slices(a.z[1, 0]).reshape(4, -1)  # second tile of outputs, by hand
    kernel = torch.stack([generator.grow(row).reshape(4, 3, 3) for row in tile], 1)
    assert torch.allclose(generator(a.z)[4:8], kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixedConv2d(2, 2, 1, experts=0), "0 experts"),
        (lambda: MixedConv2d(2, 2, 1, bias="one"), "bias='one'"),
        (lambda: ScaledLSTM(2, 4, Site(nn.Identity(), rules.Always(), shape=(4,))), r"expected \(12, 4\)"),
        (lambda: GrownConv2d(KernelGenerator(), 3, 16), "3 to 16 channels"),
        (lambda: rules.Softmax(0.0), "temperature=0.0"),
        (lambda: rules.Softmax()(torch.zeros(3)), r"scores of shape \(3,\)"),
        (lambda: rules.Sigmoid(0.0), "most=0.0"),
        (lambda: rules.SpatialSoftmax(-1.0), "share=-1.0"),
        (lambda: pliant.create_model("condconv", static=99), "99 static blocks of 6"),
        (lambda: pliant.create_model("deform_conv_v2", static=-1), "-1 static blocks"),
        (lambda: pliant.create_model("deform_conv_v2", version="v3"), "version 'v3'"),
        (lambda: pliant.create_model("senet", graph="D"), "graph 'D'"),
        (lambda: pliant.create_model("dy_relu", form="D"), "form 'D'"),
        (lambda: pliant.create_model("dfn", kernel=4), "kernel=4"),
    ],
)
def test_mistakes_are_told(make, words: str) -> None:
    with pytest.raises(PliantError, match=words):
        make()


@pytest.mark.parametrize("graph", ["after", "beside", "through"])
def test_attention_by_any_graph(graph: str) -> None:
    net = pliant.create_model("senet", depth=8, widths=(4, 8, 8), graph=graph).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(pliant.bind(net, {"*": rules.Always()})(x), pliant.plain(net)(x), atol=1e-5)


@pytest.mark.parametrize("form", ["shared", "channel", "place"])
def test_activations_of_any_form(form: str) -> None:
    net = pliant.create_model("dy_relu", widths=(4, 8), depth=1, form=form).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(pliant.bind(net, {"*": rules.Always()})(x), pliant.plain(net)(x), atol=1e-5)
