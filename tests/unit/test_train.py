"""fit: what is trained, logged, refused; phases freeze, schedule and anneal."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pliant
from pliant.systems.depth.msdnet import msdnet
from pliant.train import Fit, Phase, fit, plan
from pliant.train.launch import precision_of
from pliant.train.order import Shard, batches, sizes


def exits_loss(y, trace, target, progress):
    """The sum of all exits' cross-entropies, one term each."""
    assert all(e.rows is None for e in trace.exits)
    return {f"exit {k}": F.cross_entropy(e.logits, target) for k, e in enumerate(trace.exits)}


def small(**kwargs):
    torch.manual_seed(0)
    return msdnet(10, 1, exits=3, base=1, step=1, channels=4, factors=(1, 2), bottlenecks=(1, 2), **kwargs)


def images(rows=40):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(rows) % 10
    return SimpleNamespace(x=torch.randn(rows, 1, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1) / 5, y=y)


def points(rows=16):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(x=x, y=x.sum(1, keepdim=True))


def square(y, trace, target, progress):
    return {"square": (y - target).square().mean()}


def cpu(**kwargs):
    return Fit(**{"batch_size": 8, "accelerator": "cpu", **kwargs})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_trains_all_exits_and_logs_every_term_by_its_name():
    model, seen = small(), []
    history = fit(
        model, images(), exits_loss, [Phase("joint", epochs=4, momentum=0.9)], options=cpu(on_epoch=seen.append)
    )
    assert history == seen
    assert [(row["phase"], row["epoch"]) for row in history] == [("joint", k) for k in (1, 2, 3, 4)]
    assert set(history[0]) == {"phase", "epoch", "lr", "exit 0", "exit 1", "exit 2", "seconds"}
    assert all(history[-1][f"exit {k}"] < history[0][f"exit {k}"] for k in range(3))


def test_a_step_is_that_of_a_plain_loop_over_record():
    data, model, twin = points(), nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    phase = Phase("all", epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, schedule="cosine", clip=0.5)
    fit(model, data, square, [phase], options=cpu(seed=3))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for epoch in range(2):
        for k, (rows, _) in enumerate(batches(16, 8, Shard(), 3, epoch)):
            for group in optimizer.param_groups:
                group["lr"] = phase.rate(epoch + (k + 0.5) / 2)
            y, trace = pliant.record(twin)(data.x[rows])
            optimizer.zero_grad()
            square(y, trace, data.y[rows], 0.0)["square"].backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
    assert same(state(model), state(twin))


def test_each_term_is_added_exactly_once():
    def twice(y, trace, target, progress):
        half = (y - target).square().mean() / 2
        return {"one": half, "other": half}

    models = [nn.Linear(3, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, loss in zip(models, (square, twice), strict=True):
        fit(model, points(), loss, [Phase("all", epochs=1)], options=cpu())
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-7)


def test_the_mean_of_a_term_is_over_rows_whatever_the_batches():
    loss = [
        fit(nn.Linear(3, 1, bias=False).requires_grad_(True), points(13), lambda y, trace, target, p: {
            "target": target.mean() + 0 * y.sum()}, [Phase("all", epochs=1)], options=cpu(batch_size=size))[0]["target"]
        for size in (4, 5, 13)
    ]  # fmt: skip
    assert loss == pytest.approx([points(13).y.mean().item()] * 3, rel=1e-5)


def test_frozen_parameters_and_their_norms_stay_byte_identical():
    model = small()
    before = state(model)
    fit(model, images(), exits_loss, [Phase("heads", epochs=2, train=("heads.*",))], options=cpu())
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("heads.") for name in moved)
    assert any("running_mean" in name for name in moved)  # a norm that is trained keeps counting
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_norm_without_parameters_goes_with_what_is_around_it():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), nn.Sequential(nn.Linear(4, 1), nn.Flatten(1))
    )
    fit(model, points(), square, [Phase("last", epochs=1, train=("1.*",))], options=cpu())
    assert model[0][1].num_batches_tracked == 0
    fit(model, points(), square, [Phase("all", epochs=1)], options=cpu())
    assert model[0][1].num_batches_tracked == 2


def test_modes_gradient_wishes_and_global_generators_are_left_as_found():
    model = small().eval()
    model.heads[0].train()
    frozen = next(model.parameters()).requires_grad_(False)
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    fit(model, images(), exits_loss, [Phase("joint", epochs=1)], options=cpu())
    assert [m.training for m in model.modules()] == modes
    assert not frozen.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_seed_gives_the_same_network_with_dropout_and_augmentation():
    def jitter(x, generator):
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    found = []
    for noise, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1))
        torch.manual_seed(noise)  # what was drawn before doesn't matter
        fit(model, points(), square, [Phase("all", epochs=2, lr=0.05)], options=cpu(seed=seed, augment=(jitter,)))
        found.append(state(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_noise_and_augmentation_are_new_in_every_batch_and_epoch():
    drawn, augmented = [], []

    def note(x, generator):
        augmented.append(torch.rand((), generator=generator).item())
        return x

    def loss(y, trace, target, progress):
        drawn.append(torch.rand(()).item())
        return square(y, trace, target, progress)

    fit(nn.Linear(3, 1), points(), loss, [Phase(name, epochs=2) for name in "ab"], options=cpu(augment=(note,)))
    assert len(set(drawn)) == len(set(augmented)) == 8
    assert not set(drawn) & set(augmented)


def test_annealing_reaches_both_ends_and_progress_runs_from_0_towards_1():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = pliant.Site(nn.Linear(3, 1), pliant.estimators.Gumbel(pliant.rules.Threshold(0.0)))
            self.last = nn.Linear(3, 1)

        def forward(self, x):
            return self.site(x).value * self.last(x)

    model, temperatures, progress = Gated(), [], []

    def loss(y, trace, target, p):
        temperatures.append(round(model.site.rule.temperature.item(), 5))
        progress.append(p)
        return square(y, trace, target, p)

    phases = [
        Phase("anneal", epochs=3, lr=0.01, anneal={"*.rule.temperature": (5.0, 1.0)}),
        Phase("fixed", epochs=1, lr=0.01),
    ]
    fit(model, points(), loss, phases, options=cpu(batch_size=16))
    assert temperatures == [5.0, 3.0, 1.0, 1.0]
    assert progress == [0.0, 0.25, 0.5, 0.75]


def test_schedules():
    cosine = Phase("c", epochs=4, lr=1.0, schedule="cosine", warmup=2)
    assert [cosine.rate(t) for t in (0.5, 1.0, 2.0, 3.0, 4.0)] == pytest.approx([0.25, 0.5, 1.0, 0.5, 0.0])
    rates = [row["lr"] for row in fit(nn.Linear(3, 1), points(), square, [
        Phase("m", epochs=3, lr=0.1, schedule="multistep", milestones=(1, 2), gamma=0.5)], options=cpu())]  # fmt: skip
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_clipping_bounds_the_step():
    model = nn.Linear(3, 1)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    huge = points()
    huge.y = huge.y * 1e6
    fit(model, huge, square, [Phase("all", epochs=1, lr=1.0, clip=0.25)], options=cpu(batch_size=16))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_other_optimizers(optimizer):
    phase = Phase("all", epochs=30, optimizer=optimizer, lr=0.05, weight_decay=1e-4)
    history = fit(nn.Linear(3, 1), points(), square, [phase], options=cpu())
    assert history[-1]["square"] < history[0]["square"] / 5


def test_the_order_is_a_function_of_seed_and_epoch_and_every_row_comes_once():
    for rows, size, world in ((10, 4, 1), (9, 4, 1), (9, 4, 2), (7, 64, 3), (5, 1, 1)):
        shards = [batches(rows, size, Shard(rank, world), 0, 7) for rank in range(world)]
        assert sorted(torch.cat([index for shard in shards for index, _ in shard]).tolist()) == list(range(rows))
        for parts in zip(*shards, strict=True):
            assert {joint for _, joint in parts} == {sum(len(index) for index, _ in parts)}
            assert max(len(index) for index, _ in parts) - min(len(index) for index, _ in parts) <= 1
    first, again, other = (torch.cat([i for i, _ in batches(20, 4, Shard(), 0, e)]) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_last_batch_of_one_row_joins_the_one_before():
    assert sizes(9, 4) == [4, 5]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    assert len(fit(model, points(9), square, [Phase("all", epochs=1)], options=cpu(batch_size=4))) == 1
    assert model[1].num_batches_tracked == 2


def test_a_batch_larger_than_the_data_is_one_batch():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    fit(model, points(), square, [Phase("all", epochs=3)], options=cpu(batch_size=1000))
    assert model[1].num_batches_tracked == 3


def test_mixed_precision_runs_and_its_loss_is_in_float32():
    dtypes = set()

    def loss(y, trace, target, progress):
        dtypes.update(e.logits.dtype for e in trace.exits)
        assert trace.flops.sum() > 0  # prices are still to be had
        return exits_loss(y, trace, target, progress)

    history = fit(small(), images(), loss, [Phase("joint", epochs=2, lr=0.05)], options=cpu(precision="bf16-mixed"))
    assert all(math.isfinite(row["exit 2"]) for row in history)
    assert dtypes == {torch.float32}


def test_mixed_precision_really_computes_in_bfloat16_on_float32_weights():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            seen["inside"] = x.dtype
            return x

    class Input(nn.Module):
        def forward(self, x):
            seen["input"] = x.dtype
            return x

    model = nn.Sequential(Input(), nn.Linear(3, 1), Spy())
    fit(model, points(), square, [Phase("all", epochs=1)], options=cpu(precision="bf16-mixed"))
    assert seen == {"input": torch.float32, "inside": torch.bfloat16}
    assert model[1].weight.dtype == torch.float32


def test_auto_precision_is_32_true_on_the_cpu():
    assert precision_of("auto", "cpu") == "32-true"
    if not torch.cuda.is_available():
        assert precision_of("auto", "auto") == "32-true"


def test_the_plan_is_a_table():
    phases = [
        Phase(
            "gates",
            epochs=2,
            optimizer="adam",
            lr=1e-3,
            train=("*.site.*", "last.*"),
            anneal={"*.temperature": (5, 0.5)},
        ),
        Phase(
            "joint",
            epochs=30,
            momentum=0.9,
            nesterov=True,
            schedule="multistep",
            milestones=(15, 25),
            warmup=1,
            clip=5.0,
        ),
    ]
    lines = plan(phases).splitlines()
    assert len(lines) == 3
    assert "*.site.*, last.*" in lines[1]
    assert "*.temperature 5->0.5" in lines[1]
    assert "sgd lr=0.1 momentum=0.9 nesterov" in lines[2]
    assert "multistep x0.1 at 15,25, warm-up 1" in lines[2]
    assert lines[2].endswith("5")


def test_nothing_is_printed(capfd):
    fit(nn.Linear(3, 1), points(), square, [Phase("all", epochs=1)], options=cpu())
    assert capfd.readouterr() == ("", "")
