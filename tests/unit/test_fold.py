"""Folding: the same network, the same exits, the same FLOPs, nothing of the original touched; and what it leans on."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.deploy.fold import FoldedConv, optimised
from pliant.execute import Exits, Residual, rows
from pliant.rules import Always, Threshold
from pliant.scores import LinearGate, MaxProbability
from pliant.systems.depth.msdnet import msdnet


@pytest.fixture(scope="module")
def model() -> Exits:
    """A small MSDNet whose batch norms have statistics and whose rows leave at all exits."""
    torch.manual_seed(0)
    net = msdnet(4, exits=3, base=2, step=1, channels=8)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 32, 32))
    net.eval()
    x = images()
    with torch.no_grad():
        _, trace = pliant.record(pliant.bind(net, {"*": Threshold(float("-inf"))}))(x)
    for name, site in pliant.sites(net).items():
        scores = trace[name][0].scores.sort().values
        site.rule.threshold.fill_((scores[3] + scores[4]) / 2)
    return net


def images(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["by structure", "with an example", "channels last", "packed"])
def folded(request: pytest.FixtureRequest, model: Exits) -> Exits:
    if request.param == "with an example":
        return optimised(model, images())
    fast = optimised(model)
    if request.param != "by structure":
        fast = fast.to(memory_format=torch.channels_last)
    return packed(fast) if request.param == "packed" else fast


def packed(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, FoldedConv):
            module.small = False  # so that one row goes the packed way too
            module.pack()
    return net


def is_packed(net: nn.Module) -> bool:
    return all(m._fits() for m in net.modules() if isinstance(m, FoldedConv))


def decisions(net: nn.Module, x: torch.Tensor) -> dict[str, list[float]]:
    _, trace = pliant.record(net)(x)
    return {name: trace.dense(name).tolist() for name in trace}


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_outputs_and_exits_are_the_same(model: Exits, folded: Exits, count: int) -> None:
    x = images()[:count]
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=0, atol=1e-4)
        assert decisions(folded, x) == decisions(model, x)


def test_exits_differ_between_rows(model: Exits) -> None:
    assert {tuple(v) for v in zip(*decisions(model, images()).values(), strict=True)} >= {(0.0, 0.0), (1.0, 1.0)}


def test_no_batch_norm_is_left_and_sites_keep_their_names(model: Exits, folded: Exits) -> None:
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert list(pliant.sites(folded)) == list(pliant.sites(model))
    assert type(folded) is Exits
    for name, site in pliant.sites(model).items():
        assert torch.equal(pliant.sites(folded)[name].rule.threshold, site.rule.threshold)


def test_every_view_of_the_model_still_works(model: Exits, folded: Exits) -> None:
    x = images()
    with torch.no_grad():
        y, trace = pliant.record(folded)(x)
        assert torch.equal(y, folded(x))
        assert torch.allclose(pliant.masked(folded)(x), y, rtol=0, atol=1e-5)
        dense = pliant.bind(folded, {"*": Always()})
        assert torch.allclose(dense(x), pliant.plain(folded)(x), rtol=0, atol=1e-5)
        assert next(dense.parameters()) is next(folded.parameters())
        assert torch.equal(pliant.bind(folded, {"*": pliant.rules.Given(trace)})(x), y)


def test_flops_are_those_of_the_model_and_of_the_counter(model: Exits, folded: Exits) -> None:
    x = images()
    with torch.no_grad():
        _, trace = pliant.record(folded)(x)
        _, before = pliant.record(model)(x)
        with FlopCounterMode(display=False) as counter:
            folded(x)
    assert trace.flops.tolist() == before.flops.tolist()
    assert trace.dense_flops.tolist() == before.dense_flops.tolist()
    assert counter.get_total_flops() == int(trace.flops.sum())


def test_the_original_is_untouched(model: Exits) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images()
    with torch.no_grad():
        y = model(x)
        fast = optimised(model, x)
        for p in fast.parameters():
            p.zero_()
        assert torch.equal(model(x), y)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())
    assert all(not m._forward_hooks for m in fast.modules())
    assert fast.form == model.form == "auto"
    assert all(p.requires_grad for p in model.parameters())


def test_training_a_folded_model_is_refused(model: Exits) -> None:
    fast = optimised(model).train()
    with pytest.raises(pliant.PliantError, match=r"folded model in training mode.*optimised"):
        fast(images())
    with torch.no_grad():
        assert fast.eval()(images()).shape == (9, 4)


def test_a_model_in_training_is_refused(model: Exits) -> None:
    with pytest.raises(pliant.PliantError, match=r"model in training mode.*model.eval"):
        optimised(copy.deepcopy(model).train())


def test_state_deepcopy_and_file(model: Exits, folded: Exits) -> None:
    x = images()
    again = copy.deepcopy(folded)
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
        again.load_state_dict(torch.load(file))
        assert torch.equal(again(x), folded(x))
        assert torch.allclose(copy.deepcopy(folded).double()(x.double()), model(x).double(), rtol=0, atol=1e-4)


def test_gradients_reach_the_input_of_a_folded_model(model: Exits, folded: Exits) -> None:
    x, reference = images().requires_grad_(), images().requires_grad_()
    folded(x).sum().backward()
    model(reference).sum().backward()
    assert torch.allclose(x.grad, reference.grad, rtol=1e-3, atol=1e-4)  # pyright: ignore[reportArgumentType]


def test_a_folded_model_exports(folded: Exits) -> None:
    batch = torch.export.ShapesCollection()
    x = images()
    batch[x] = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        exported = torch.export.export(folded, (x,), dynamic_shapes=batch).module()
        for count in (9, 4):
            assert torch.allclose(exported(x[:count]), folded(x[:count]), rtol=0, atol=1e-5)


class Block(nn.Module):
    """Convolution and norm as attributes, the second norm before its convolution, the third conv read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.conv3, self.bn3, self.gate = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = y + self.conv2(self.bn2(y))
        z = self.conv3(y)
        return self.bn3(z) * self.gate(z)


def with_statistics(net: nn.Module) -> nn.Module:
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
            nn.init.uniform_(m.running_mean, -1, 1)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(m.running_var, 0.5, 2)  # pyright: ignore[reportArgumentType]
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 2)
    return net.eval()


def test_attributes_are_folded_with_an_example_and_only_true_pairs() -> None:
    torch.manual_seed(0)
    net = with_statistics(Block())
    x = torch.randn(3, 4, 8, 8)
    fast = optimised(net, x)
    assert isinstance(fast.conv1, FoldedConv)
    assert isinstance(fast.bn1, nn.Identity)
    assert isinstance(fast.bn2, nn.BatchNorm2d)
    assert isinstance(fast.bn3, nn.BatchNorm2d)
    assert torch.allclose(fast(x), net(x), atol=1e-5)
    assert not any(isinstance(m, FoldedConv) for m in optimised(net).modules())


class Sneaky(Block):
    """Reads the convolution's output a second time where no module sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv1(x)
        return self.bn1(z) + z


def test_a_fold_that_changes_the_outputs_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(pliant.PliantError, match=r"differ by .* after folding"):
        optimised(with_statistics(Sneaky()), torch.randn(3, 4, 8, 8))


def test_blocks_that_rows_skip_are_seen_and_shared_or_foreign_parts_left_alone() -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    shared = nn.Conv2d(4, 4, 1)
    net = with_statistics(nn.Sequential(
        Residual(Block(), pliant.Site(LinearGate(4), pliant.rules.Never())),
        Residual(branch, pliant.Site(LinearGate(4), Threshold(0.0))),
        nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), nn.GELU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, dilation=2), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ))  # fmt: skip
    x = torch.randn(3, 4, 12, 12)
    fast = optimised(net, x)
    assert isinstance(fast[0].branch.conv1, FoldedConv)
    assert list(pliant.sites(fast)) == list(pliant.sites(net)) == ["0.site", "1.site"]
    assert fast[2][0] is fast[3][0]
    assert isinstance(fast[2][0], nn.Conv2d)
    assert isinstance(fast[6][0], nn.Conv2d)
    assert [type(m).__name__ for m in fast[4]] == ["FoldedConv", "GELU"]
    assert [type(m).__name__ for m in fast[1].branch] == ["FoldedConv"]
    for rules in ({}, {"*": Always()}, {"*": pliant.rules.Never()}):
        ours, reference = (pliant.bind(m, rules) if rules else m for m in (fast, net))
        # The norm without running statistics reads the batch, in both.
        assert torch.allclose(ours(x), reference(x), atol=1e-4)
        assert torch.allclose(pliant.masked(ours)(x), ours(x), atol=1e-4)


def test_a_wrong_fold_in_a_part_that_no_row_runs_is_refused_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Residual(Sneaky(), pliant.Site(LinearGate(4), pliant.rules.Never())))
    with pytest.raises(pliant.PliantError, match=r"differ by .* after folding"):
        optimised(with_statistics(net), torch.randn(3, 4, 8, 8))


def test_packed_weights_are_shared_by_copies_that_share_and_made_anew_by_others(model: Exits) -> None:
    fast, x = packed(optimised(model)), images()
    bound = pliant.bind(fast, {"*": Always()})
    assert is_packed(bound)
    firsts = [next(m for m in net.modules() if isinstance(m, FoldedConv)) for net in (fast, bound)]
    assert firsts[0].packed is firsts[1].packed
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
            assert is_packed(other)
            assert torch.equal(other(x), fast(x))


def test_packed_weights_are_never_stale(model: Exits) -> None:
    fast, x = packed(optimised(model)), images()
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
        assert not is_packed(other)
        loose = optimised(model)
        for p in loose.parameters():
            p.mul_(0.5)
        assert torch.allclose(other(x), loose(x), rtol=0, atol=1e-5)
        other.load_state_dict(fast.state_dict())
        assert is_packed(other)
        assert torch.equal(other(x), fast(x))
        assert torch.allclose(other.double()(x.double()).float(), fast(x), rtol=0, atol=1e-4)
        assert is_packed(other.float())
        assert torch.allclose(other(x), fast(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_the_counter_knows_the_direct_convolution(groups: int, kernel: int, stride: int) -> None:
    conv = nn.Conv2d(4, 6, kernel, stride, groups=groups).eval()
    x = torch.randn(3, 4, 9, 9)
    counted = []
    small, direct, ready = (FoldedConv(copy.deepcopy(conv), None) for _ in range(3))
    direct.small = False
    for module in (conv, small, direct, packed(ready)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = module(x)
        counted.append(counter.get_total_flops())
    side = y.shape[-1]
    assert counted == [3 * side * side * 6 * (4 // groups) * kernel * kernel * 2] * 4


def test_chosen_rows_keep_their_memory_format() -> None:
    index = torch.tensor([2, 0])
    for x in (torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)):
        chosen = rows.select(x, index)
        assert torch.equal(chosen, torch.stack([x[2], x[0]]))
        assert chosen.stride()[1:] == x.stride()[1:]
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    rows.select(x, index).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(1).sum(1).tolist() == [90.0, 0.0, 90.0, 0.0]


class Watch(nn.Module):
    """Notes how many of the features made before are still alive."""

    def __init__(self, seen: list[tuple[weakref.ref[torch.Tensor], int]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        self.seen.append((weakref.ref(y), sum(ref() is not None for ref, _ in self.seen)))
        return y


def test_features_that_nobody_needs_are_freed_while_the_chain_runs() -> None:
    seen: list[tuple[weakref.ref[torch.Tensor], int]] = []
    sites = [pliant.Site(MaxProbability(), Threshold(t)) for t in (0.05, 0.2, 0.3)]
    net = Exits([Watch(seen) for _ in range(4)], [nn.Identity() for _ in range(4)], sites).eval()
    spread = torch.arange(8.0).flip(0)
    gc.disable()
    try:
        with torch.no_grad():
            # The heads pass the features on as logits, so what the first exit answers must stay; copies don't.
            for i in range(4):
                net.heads[i] = nn.Softmax(-1)
            net(torch.stack([spread, torch.zeros(8)], 1))
    finally:
        gc.enable()
    alive = [count for _, count in seen]
    assert len(alive) >= 3
    assert max(alive) <= 1, "a stage sees at most the features it reads"


def test_rows_of_any_tree_are_chosen() -> None:
    index, t = torch.tensor([1]), torch.arange(2.0)
    assert rows.select(None, index) is None
    assert rows.select((t, [t, None], {"a": t}), index) == (torch.ones(1), [torch.ones(1), None], {"a": torch.ones(1)})
    assert rows.scatter({"a": t}, index, {"a": torch.full((1,), 5.0)})["a"].tolist() == [0.0, 5.0]
    assert t.tolist() == [0.0, 1.0]
