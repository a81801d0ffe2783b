"""Facts about torch.compile, torch.export, torch.cond and the FLOP counter that the design leans on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import pliant
from nets import WIDTH, built, gate, layer
from pliant import rules
from pliant.execute import Skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, *, fullgraph: bool = True) -> nn.Module:
    return torch.compile(model, backend="eager", fullgraph=fullgraph)


def test_the_masked_form_compiles_as_one_graph() -> None:
    """threading.local is traced, so a closed tape costs nothing and breaks no graph."""
    model = pliant.masked(built("exits_of_skips"))
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(compiled(model)(x), model(x))


def test_a_recording_compiles_as_one_graph_and_the_trace_leaves_it() -> None:
    model = pliant.record(pliant.masked(built("exits_of_skips")))
    x = torch.randn(5, WIDTH)
    want, eager = model(x)
    y, trace = compiled(model)(x)
    torch.testing.assert_close(y, want)
    assert list(trace) == list(eager)
    for site in eager:
        assert torch.equal(trace.dense(site), eager.dense(site))
    assert [(n.site, n.choice) for n in trace.notes] == [(n.site, n.choice) for n in eager.notes]


def test_training_compiles_with_gradients() -> None:
    model = pliant.bind(built("skip"), {"*": pliant.estimators.StraightThrough(rules.Threshold(0.0))}).train()
    x, results = torch.randn(5, WIDTH), []
    for net in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        results.append(torch.autograd.grad(net(x).sum(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bound_view_of_a_model_compiles_by_itself() -> None:
    model = pliant.masked(built("exits"))
    x = torch.randn(5, WIDTH)
    for rule in (rules.Always(), rules.Never()):
        view = pliant.bind(model, {"*": rule})
        torch.testing.assert_close(compiled(view)(x), view(x))


def test_a_threshold_is_a_dial_after_compiling() -> None:
    """It's a buffer: turning it neither recompiles nor is ignored."""
    model = pliant.masked(built("exits"))
    net, x = compiled(model), torch.randn(20, WIDTH)
    net(x)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    for t in (0.0, 0.6, 1.0):
        model.sites[0].rule.threshold.fill_(t)
        torch.testing.assert_close(net(x), model(x))
    assert counters["stats"]["unique_graphs"] == before


def test_the_gathered_form_needs_graph_breaks() -> None:
    """How many rows go on is data: as one graph it can't be traced, in pieces it runs and agrees."""
    model, x = built("exits"), torch.randn(6, WIDTH)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(model)(x)
    torch._dynamo.reset()
    with torch.no_grad():  # with gradients on, Dynamo itself reads .grad of a non-leaf tensor, which warns
        torch.testing.assert_close(compiled(model, fullgraph=False)(x), model(x))


def test_hooks_added_after_compile_are_ignored_without_a_word() -> None:
    """Why observing isn't done by hooks."""
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net, calls = torch.compile(inner, backend="eager"), []
    x = torch.randn(2, 3)
    net(x)
    inner[0].register_forward_hook(lambda *_: calls.append(1))
    net(x)
    assert calls == []
    inner(x)
    assert calls == [1]


@pytest.mark.parametrize("name", ["exits", "exits_of_skips", "skip_in_skip"])
def test_an_exported_recording_returns_its_trace(name: str) -> None:
    """Trace and Decision are registered pytrees; each gathered set ends in a dummy row that was never reached."""
    model = built(name)
    if name.startswith("exits"):
        for site, t in zip(model.sites, (0.6, 0.55), strict=True):
            site.rule.threshold.fill_(t)
    run, x = pliant.record(model), torch.randn(12, WIDTH)
    shapes = torch.export.ShapesCollection()
    shapes[x] = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(run, (x,), dynamic_shapes=shapes).module()
        for rows in (12, 7, 2):
            y, trace = program(x[:rows])
            want, eager = run(x[:rows])
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
            for site in eager:
                assert torch.equal(trace[site][-1].dense(rows), eager.dense(site))


def test_a_site_inside_a_branch_of_cond_runs_but_cannot_be_recorded() -> None:
    """A branch may have no side effect, and a tape is one: PyTorch refuses it loudly, and nothing leaks."""
    block = pliant.masked(Skip(layer(), gate()))

    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.block(x), lambda x: x.clone(), (x,))

    model, x = Cond().eval(), torch.ones(3, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x), block(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), block(x))
        with pytest.raises(torch._dynamo.exc.UncapturedHigherOrderOpError, match=r"[Ss]ide effect"):
            pliant.record(model)(x)


def test_cond_is_charged_its_larger_branch() -> None:
    """So FLOPs are counted around what really ran, never around a cond."""
    a, b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))

    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: a(x), lambda x: b(x), (x,))

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        branch(torch.ones(1, 4))
    assert counter.get_total_flops() == 2 * 2 * 4 * 64  # and not the 32 that ran


def test_the_counter_reads_nothing_for_a_fused_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it is one operation that PyTorch has no formula for: pliant registers one, hidden here."""
    monkeypatch.delitem(flop_registry, torch.ops.aten.mkldnn_rnn_layer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        nn.LSTM(4, 4)(torch.ones(3, 2, 4))
    assert counter.get_total_flops() == 0


def test_the_counter_counts_on_fake_tensors_what_it_counts_on_real_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    totals = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 3, 8, 8))
    totals.append(counter.get_total_flops())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 3, 8, 8))
    totals.append(counter.get_total_flops())
    assert totals == [2 * 2 * (9 * 3 * 4 * 36 + 4 * 36 * 5)] * 2


def test_zero_rows_pass_through_the_usual_layers() -> None:
    """Eager needs no dummy row: convolution, batch norm and pooling take an empty batch in evaluation."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()  # fmt: skip
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 5)
