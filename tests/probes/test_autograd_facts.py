"""Facts about PyTorch that the design leans on: checkpointing, threads, copies."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pliant
from nets import WIDTH, built, force, gate, layer
from pliant import rules
from pliant.execute import Residual


class Blocks(nn.Module):
    """Skipped blocks, each under checkpointing or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Residual(layer(), gate()) for _ in range(4)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def test_forced_decisions_survive_checkpointing_since_bind_is_no_context() -> None:
    """A handler stack's context would end before backward, and the recomputation would decide otherwise."""
    values = {f"blocks.{i}.site": [1.0, 0.0, 1.0, 0.0, i % 2] for i in range(4)}
    x, results = torch.randn(5, WIDTH), []
    for reentrant in (None, False):
        model = force(Blocks(reentrant).train(), values, 5)
        results.append(gradients(model, model(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_record_counts_each_site_once_under_checkpointing() -> None:
    """The recomputation happens in backward, when the tape is closed."""
    model = Blocks(False).train()
    y, trace = pliant.record(model)(torch.randn(5, WIDTH, requires_grad=True))
    assert [len(trace[s]) for s in trace] == [1] * 4
    y.sum().backward()
    assert [len(trace[s]) for s in trace] == [1] * 4
    assert len(trace.notes) == 8  # four scores, four branches


def test_a_cost_loss_read_from_a_trace_keeps_its_gradient_under_non_reentrant_checkpointing() -> None:
    results, x = [], torch.randn(5, WIDTH, requires_grad=True)
    for reentrant in (None, False):
        model = Blocks(reentrant).train()
        bound = pliant.bind(model, {"*": pliant.estimators.StraightThrough(rules.Threshold(0.0))})
        _, trace = pliant.record(bound)(x)
        cost = pliant.cost.expected_flops(trace).sum()
        results.append(torch.autograd.grad(cost, [b.site.scorer.linear.weight for b in model.blocks]))
    for a, b in zip(*results, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_hides_gradients_from_a_trace() -> None:
    """Why it's refused under a recording: its forward runs without gradients, so a decision has no history."""
    seen: list[bool] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.append(y.requires_grad)
            return y

    model, x = Watch(), torch.randn(2, WIDTH, requires_grad=True)
    checkpoint(model, x, use_reentrant=True)
    checkpoint(model, x, use_reentrant=False)
    assert seen == [False, True]


def test_sampled_decisions_are_drawn_again_alike() -> None:
    """checkpoint keeps the random state by default, so a Gumbel draw is repeated on the way back."""
    results, x = [], torch.randn(5, WIDTH)
    for reentrant in (None, False):
        model = pliant.bind(Blocks(reentrant).train(), {"*": pliant.estimators.Gumbel(rules.Threshold(0.0))})
        torch.manual_seed(5)
        results.append(gradients(model, model.train()(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_share_a_model_and_none_is_altered() -> None:
    """The tape is thread-local and bind makes copies: state on modules altered 99 % of another thread's results."""
    model = built("exits_of_skips")
    x = torch.randn(6, WIDTH)
    with torch.no_grad():
        never = pliant.bind(model, {"*": rules.Never()})
        want_own, want_never = model(x), never(x)
        assert not torch.equal(want_own, want_never)
        want = pliant.record(model)(x)[1]
    wrong: list[str] = []
    barrier = threading.Barrier(3)

    @torch.no_grad()
    def record() -> None:
        barrier.wait()
        for _ in range(50):
            y, trace = pliant.record(model)(x)
            if not torch.equal(y, want_own) or len(trace.notes) != len(want.notes) or list(trace) != list(want):
                wrong.append("recorded")

    @torch.no_grad()
    def run(net: nn.Module, want_y: Tensor) -> None:
        barrier.wait()
        wrong.extend("ran" for _ in range(50) if not torch.equal(net(x), want_y))

    threads = [threading.Thread(target=record)]
    threads += [threading.Thread(target=run, args=pair) for pair in ((never, want_never), (model, want_own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_can_be_copied_while_its_graph_is_alive() -> None:
    """State kept on modules (``site.last = scores``) would hold non-leaf tensors, which deepcopy refuses."""
    model = Blocks(None).train()
    x = torch.randn(3, WIDTH)
    y, trace = pliant.record(model)(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    model.last = trace["blocks.0.site"][0].scores
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)


def test_a_model_can_be_copied_in_the_middle_of_a_forward() -> None:
    copies: list[nn.Module] = []
    model = Blocks(None).train()
    model.blocks[2].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)) if not copies else None)
    x = torch.randn(3, WIDTH)
    y, _ = pliant.record(model)(x)
    assert torch.equal(copies[0](x), y)


def test_bind_is_quick_beside_a_real_copy_and_shares_parameters() -> None:
    """deepcopy with the tensors in its memo copies the tree of modules, not what they hold."""
    model = nn.Sequential(*[Residual(nn.Linear(1000, 1000), gate()) for _ in range(8)])
    best = {"bind": float("inf"), "copy": float("inf")}
    for _ in range(3):
        for name, make in (
            ("bind", lambda: pliant.bind(model, {"*": rules.Never()})),
            ("copy", lambda: copy.deepcopy(model)),
        ):
            start = time.perf_counter()
            made = make()
            best[name] = min(best[name], time.perf_counter() - start)
            ours = {p.data_ptr() for p in model.parameters()}
            assert all((p.data_ptr() in ours) == (name == "bind") for p in made.parameters())
    assert best["bind"] < best["copy"]


def test_vmap_of_records() -> None:
    """What a trace holds leaves a transform as ordinary outputs, one row a call."""
    model = pliant.masked(built("exits_of_skips"))
    x = torch.randn(4, WIDTH)
    want, whole = pliant.record(model)(x)
    y, trace = torch.vmap(lambda row: pliant.record(model)(row[None]))(x)
    torch.testing.assert_close(y[:, 0], want)
    for site in whole:
        assert torch.equal(trace[site][0].value[:, 0], whole[site][0].value)
    assert trace.notes == whole.notes
