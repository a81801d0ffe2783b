"""BranchyNet, Shallow-Deep Networks, big/little, ConvNet-AIG, and the backbones they share."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, rules
from pliant.check import check
from pliant.execute.heads import PooledClassifier
from pliant.systems.backbones import BACKBONES, resnet
from pliant.systems.depth.big_little_dnn import big_little
from pliant.systems.depth.sdn import exits_only, ramp
from pliant.train.phases import Phase, prepare

CONFIGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "b-lenet": ("branchynet", {"in_chans": 1}, 28),
    "b-alexnet": ("branchynet", {"backbone": "alexnet", "num_classes": 4}, 32),
    "b-resnet": ("branchynet", {"backbone": "resnet14"}, 16),
    "sdn-resnet": ("sdn", {"backbone": "resnet14", "at": (0.3, 0.6, 0.85)}, 16),
    "sdn-vgg": ("sdn", {"backbone": "vgg16", "at": (0.3, 0.9), "image_size": 16}, 16),
    "big-little": ("big_little_dnn", {"in_chans": 1, "big": "resnet8"}, 28),
    "aig": ("convnet_aig", {"depth": 14, "always": (0, 2)}, 16),
    "aig-sample": ("convnet_aig", {"depth": 8, "estimator": "sample"}, 16),
}
CHECKS = ["gathered", "all_on", "replay", "recording", "rows", "flops", "dense_flops", "state_dict", "deepcopy", "empty",
          "single", "nan"]  # fmt: skip
CHEAP = ["gathered", "flops", "nan"]  # for the one network of 15 million weights, which every check copies
ROWS = 5


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def lively(name: str) -> tuple[Any, Tensor]:
    """A small system in evaluation whose norms have seen data and whose sites decide both ways."""
    id, kwargs, size = CONFIGS[name]
    model = pliant.create_model(id, **kwargs)
    x = torch.randn(ROWS, kwargs.get("in_chans", 3), size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, pliant.scores.MLPGate):
            nn.init.normal_(module.out.weight, std=3.0)
    model.eval()
    sites = pliant.sites(model)
    everything = {path: rules.Threshold(float("-inf")) for path in sites}
    with torch.no_grad():
        _, trace = pliant.record(pliant.bind(model, everything))(x)
    for path, site in sites.items():
        threshold = getattr(site.rule, "rule", site.rule).threshold
        ordered = trace[path][0].scores.sort().values
        threshold.copy_((ordered[2] + ordered[3]) / 2)
    return model, x


@pytest.mark.parametrize("name", CONFIGS)
def test_the_contract_holds(name: str) -> None:
    model, x = lively(name)
    seen = check(model, x, only=CHEAP if name == "sdn-vgg" else CHECKS)
    assert "apart by" in seen["gathered"]
    with torch.no_grad():
        _, trace = pliant.record(model)(x)
    values = torch.cat([trace.dense(site) for site in trace])
    assert 0 < values.mean() < 1  # else little was checked


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_and_recording_are_bit_identical(name: str) -> None:
    model, x = lively(name)
    with torch.no_grad():
        torch.manual_seed(1)
        y = model(x)
        torch.manual_seed(1)
        recorded, trace = pliant.record(model)(x)
        assert torch.equal(recorded, y)
        assert torch.equal(pliant.bind(model, {"*": rules.Given(trace)})(x), y)


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_survive_json_and_the_classes_are_the_answer(name: str) -> None:
    id, kwargs, size = CONFIGS[name]
    model = pliant.create_model(id, **json.loads(json.dumps({**kwargs, "num_classes": 7}))).eval()
    x = torch.randn(2, kwargs.get("in_chans", 3), size, size)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize(("id", "kwargs"), [
    ("branchynet", {"backbone": "lenet"}), ("branchynet", {"backbone": "alexnet"}), ("branchynet", {"backbone": "resnet14"}),
    ("sdn", {"backbone": "resnet20"}), ("sdn", {"backbone": "vgg16"}), ("big_little_dnn", {}), ("convnet_aig", {"depth": 8}),
])  # fmt: skip
def test_small_images_of_both_sizes_go_in(id: str, kwargs: dict[str, Any], size: int) -> None:
    model = pliant.create_model(id, in_chans=1, **kwargs).eval()
    with torch.no_grad():
        assert pliant.masked(model)(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("id", "kwargs", "message"), [
    ("branchynet", {"backbone": "resnet21"}, "got backbone 'resnet21'; expected one of lenet, alexnet"),
    ("branchynet", {"backbone": "vgg16"}, "got backbone 'vgg16'"),
    ("sdn", {"backbone": "resnet8", "at": (0.3, 0.31)}, "growing numbers of blocks"),
    ("sdn", {"backbone": "resnet8", "at": (0.9, 0.3)}, "growing numbers of blocks"),
    ("big_little_dnn", {"little": "cnn3"}, "got backbone 'cnn3'"),
    ("convnet_aig", {"depth": 9}, r"6n \+ 2"),
    ("convnet_aig", {"depth": 8, "always": (3,)}, "indices from 0 to 2"),
    ("convnet_aig", {"depth": 8, "estimator": "hard"}, "expected one of argmax, sample"),
])  # fmt: skip
def test_mistakes_are_told(id: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(PliantError, match=message):
        pliant.create_model(id, **kwargs)


# BranchyNet.


@pytest.mark.parametrize(
    ("backbone", "blocks"), [("lenet", [1, 2]), ("alexnet", [2, 1, 2]), ("resnet110", [2, 17, 36])]
)
def test_branches_stand_where_the_paper_has_them(backbone: str, blocks: list[int]) -> None:
    model = pliant.create_model("branchynet", backbone=backbone)
    assert [len(stage) for stage in model.stages] == blocks


def test_lenet_at_28_pixels_has_the_papers_maps() -> None:
    model = pliant.create_model("branchynet", in_chans=1)
    sizes = []
    for module in model.modules():
        if isinstance(module, PooledClassifier):
            module.pool.register_forward_pre_hook(lambda _, args: sizes.append(args[0][0].numel()))
    model(torch.randn(2, 1, 28, 28))
    assert sizes == [640, 720]  # what the released code's linear layers read: the pools have nothing left to do


def test_a_row_leaves_a_branch_by_the_entropy_in_nats_over_log_c() -> None:
    model, x = lively("b-alexnet")
    with torch.no_grad():
        _, trace = pliant.record(model)(x)
        p = trace.exits[0].logits.softmax(-1)
    nats = -(p * p.log()).sum(-1)
    limit = float(model.sites[0].rule.threshold) * math.log(4)
    assert torch.equal(trace.dense("sites.0"), (nats > limit).float())


def test_the_joint_loss_reaches_trunk_and_branches() -> None:
    model = pliant.create_model("branchynet", backbone="alexnet").train()
    y, trace = pliant.record(model)(torch.randn(4, 3, 32, 32))
    assert len(trace.exits) == 3
    pliant.losses.MultiExit()(y, trace, torch.tensor([0, 1, 2, 3]), 0.0).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# Shallow-Deep Networks.


def test_internal_classifiers_stand_where_the_released_code_has_them() -> None:
    """Counted, not typed in: blocks 4, 8, ..., 24 of ResNet-56 and convolutions 2, 4, 6, 7, 9, 10 of VGG-16."""
    ends = {}
    for name in ("resnet56", "vgg16"):
        model = pliant.create_model("sdn", backbone=name)
        ends[name] = list(itertools.accumulate(len(stage) for stage in model.stages))[:-1]
    assert [end - 1 for end in ends["resnet56"]] == [4, 8, 12, 16, 20, 24]
    assert ends["vgg16"] == [2, 4, 6, 7, 9, 10]


def test_exits_are_at_the_shares_asked_for() -> None:
    shares = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    model = pliant.create_model("sdn", at=shares).eval()
    x = torch.zeros(1, 3, 32, 32)
    total, spent = flops(pliant.plain(model), x), 0
    for stage, share in zip(model.stages, shares, strict=False):
        spent += flops(stage, x)
        x = stage(x)
        assert spent / total == pytest.approx(share, abs=0.02)


def by_phase(model: Any) -> list[nn.Parameter]:
    return prepare(Phase("exits", epochs=1, train=("heads.0.*", "heads.1.*")), model)


@pytest.mark.parametrize("freeze", [exits_only, by_phase])
@pytest.mark.parametrize("backbone", ["resnet14", "vgg16"])
def test_training_the_exits_only_leaves_the_host_bit_identical(backbone: str, freeze: Any) -> None:
    model = pliant.create_model("sdn", backbone=backbone, at=(0.3, 0.6), image_size=16, num_classes=4)
    x, labels = torch.randn(6, 3, 16, 16), torch.randint(4, (6,))
    with torch.no_grad():
        model(x)  # the host's norms have seen data
        host = copy.deepcopy(pliant.plain(model)).eval()
        wanted = host(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(freeze(model), 1e-2)
    losses = []
    for _ in range(4):
        model.train()
        freeze(model)
        y, trace = pliant.record(model)(x)
        loss = pliant.losses.MultiExit([1.0, 1.0, 0.0])(y, trace, labels, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        assert torch.equal(pliant.plain(model)(x), wanted)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    heads = {f"heads.{k}.{name}" for k in (0, 1) for name in ("mix", "linear.weight", "linear.bias")}
    assert {key for key in heads if "linear" in key} <= moved <= heads  # on a 4 by 4 map there is nothing to mix


def test_the_host_is_the_plain_backbone_of_the_same_seed() -> None:
    torch.manual_seed(3)
    host = BACKBONES["resnet14"]().model().eval()
    torch.manual_seed(3)
    model = pliant.create_model("sdn", backbone="resnet14", at=(0.3, 0.6)).eval()
    torch.manual_seed(3)
    gated = pliant.create_model("convnet_aig", depth=14).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(pliant.plain(model)(x), host(x))
        assert torch.equal(pliant.plain(gated)(x), host(x))


def test_where_no_exit_is_sure_the_most_confident_answers() -> None:
    model, x = lively("sdn-resnet")
    with torch.no_grad():
        y, trace = pliant.record(pliant.bind(model, {"*": rules.Threshold(float("-inf"))}))(x)
    exits = torch.stack([e.logits for e in trace.exits])
    best = exits.softmax(-1).amax(-1).argmax(0)
    assert torch.equal(y, exits[best, torch.arange(len(x))])


def test_the_weights_of_the_exits_grow_to_their_cost() -> None:
    weights = ramp((0.15, 0.9))
    assert weights(0.0) == [0.01, 0.01, 1.0]
    assert weights(1.0) == pytest.approx([0.15, 0.9, 1.0])
    model = pliant.create_model("sdn", backbone="resnet14", at=(0.3, 0.6))
    y, trace = pliant.record(model)(torch.randn(4, 3, 16, 16))
    target = torch.tensor([0, 1, 2, 3])
    got = pliant.losses.MultiExit(ramp((0.3, 0.6)))(y, trace, target, 1.0)
    ce = [nn.functional.cross_entropy(e.logits, target) for e in trace.exits]
    torch.testing.assert_close(got, 0.3 * ce[0] + 0.6 * ce[1] + ce[2])


# Big/little.


def test_the_big_network_costs_at_least_eight_times_the_little_one() -> None:
    for kwargs, factor in (({}, 25), ({"big": "resnet8"}, 8)):
        little, big = pliant.create_model("big_little_dnn", **kwargs).heads
        x = torch.zeros(1, 3, 32, 32)
        assert flops(big.eval(), x) >= factor * flops(little.eval(), x)


def test_the_mean_cost_is_little_plus_the_share_forwarded_times_big() -> None:
    model, x = lively("big-little")
    little, big = (flops(head, x[:1]) for head in model.heads)
    with torch.no_grad():
        y, trace = pliant.record(model)(x)
        forwarded = trace.dense("sites.0")
        assert int(trace.flops.sum()) == len(x) * little + int(forwarded.sum()) * big
        margins = model.heads[0](x).softmax(-1).topk(2).values
        theta = 1 - float(model.sites[0].rule.threshold)
        assert torch.equal(forwarded == 0, margins[:, 0] - margins[:, 1] >= theta)
        wanted = torch.where(forwarded.bool().unsqueeze(1), model.heads[1](x), model.heads[0](x))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)


def test_any_pair_of_models_makes_a_cascade() -> None:
    class Table(nn.Module):
        """A model of somebody else, on integers."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x).sum(1)

    cascade = big_little(
        Table(), nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 4)), threshold=0.3
    ).eval()
    x = torch.randint(9, (5, 3))
    seen = check(cascade, x, only=["gathered", "replay", "flops", "rows"])
    assert len(seen) == 4


# ConvNet-AIG.


def test_gates_start_about_85_percent_open() -> None:
    model = pliant.create_model("convnet_aig", depth=32).train()
    with torch.no_grad():
        _, trace = pliant.record(model)(torch.randn(40, 3, 8, 8))
    opened = torch.stack([trace.dense(site) for site in trace])
    assert opened.shape == (15, 40)
    assert 0.8 < opened.mean() < 0.92


def test_blocks_that_always_run_have_no_gate_and_no_cost_of_one() -> None:
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    free = pliant.create_model("convnet_aig", depth=8, always=(0, 1, 2)).eval()
    assert pliant.sites(free) == {}
    torch.manual_seed(0)
    gated = pliant.create_model("convnet_aig", depth=8, always=(1,)).eval()
    assert list(pliant.sites(gated)) == ["blocks.0.residual.site", "blocks.2.residual.site"]
    assert flops(free, x) == flops(resnet(depth=8).model().eval(), x)
    gates = 2 * 2 * sum(inputs * 16 + 16 * 2 for inputs in (16, 32))
    _, trace = pliant.record(gated)(x)
    assert int(trace.flops.sum()) == flops(gated, x)
    assert int(trace.dense_flops.sum()) == flops(free, x) + gates


@pytest.mark.parametrize("form", [pliant.masked, pliant.gathered])
def test_a_block_is_shortcut_plus_gated_branch_rectified(form: Any) -> None:
    model, x = lively("aig")
    with torch.no_grad():
        y, trace = pliant.record(form(model))(x)
        rows = []
        for i in range(len(x)):
            h = model.stem(x[i : i + 1])
            for k, block in enumerate(model.blocks):
                if not isinstance(block, nn.Sequential):  # one that always runs
                    h = block(h)
                    continue
                site, kept = block.residual.site, block.residual.shortcut(h)
                gate = site.scorer
                two = gate.out(gate.norm(gate.hidden(h.mean((2, 3)))).relu())[0]
                run = two[1] - two[0] > site.rule.rule.threshold  # argmax where the threshold is 0
                assert bool(run) == bool(trace.dense(f"blocks.{k}.residual.site")[i])
                h = (kept + block.residual.branch(h) if run else kept).relu()
            rows.append(model.head(h))
    torch.testing.assert_close(y, torch.cat(rows), rtol=1e-5, atol=1e-6)


def test_argmax_repeats_itself_and_sampling_draws() -> None:
    x = torch.randn(16, 3, 8, 8)
    for estimator, same in (("argmax", True), ("sample", False)):
        model = pliant.create_model("convnet_aig", depth=20, estimator=estimator).eval()
        with torch.no_grad():
            first, second = (pliant.record(model)(x)[1] for _ in range(2))
        assert all(torch.equal(first.dense(s), second.dense(s)) for s in first) is same


def test_the_target_rate_reaches_every_gate() -> None:
    model = pliant.create_model("convnet_aig", depth=14).train()
    _, trace = pliant.record(model)(torch.randn(8, 3, 16, 16))
    torch.stack([(0.6 - d.value.mean()) ** 2 for s in trace for d in trace[s]]).mean().backward()
    for path, site in pliant.sites(model).items():
        assert site.scorer.out.bias.grad.any(), path


def test_a_batch_of_one_trains_no_gate_but_runs_in_evaluation() -> None:
    """A gate's batch norm has nothing to normalise by in one row: PyTorch says so, and no number comes out."""
    model, x = pliant.create_model("convnet_aig", depth=8), torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(x)
    assert model.eval()(x).shape == (1, 10)
