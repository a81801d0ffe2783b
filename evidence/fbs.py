"""FBS: half of the channels for each image, against all of them, fixed ones and random ones; and the seconds of it."""

from __future__ import annotations

import copy
import time

import torch
from _common import fashion, percent, phase, right, seeded, told, trained
from torch import Tensor, nn

import pliant
from pliant import Site, rules
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.data import Dataset
from pliant.execute import Channels
from pliant.losses import CrossEntropy, GateL1, Total, scored
from pliant.reproduce import Claim, Lab, Table
from pliant.scores import Saliency
from pliant.systems.width.fbs import Density, fbs

SEEDS = (0, 1, 2)
ROWS = 3000
DATA = told(ROWS, "; four convolutions of 32, 64, 64 and 96 channels instead of CIFAR-10 and eight")
LAYERS = ((32, 1), (64, 2), (64, 1), (96, 2))
STEPS = (0.8, 0.65, 0.5)
EPOCHS, RATE = 4, 0.05  # of each step of fine-tuning
LOSS = Total({"task": (1.0, CrossEntropy()), "saliency": (1e-8 * sum(c for c, _ in LAYERS), GateL1(of=scored))})


class Kept(rules.Rule):
    """The same channels for every image."""

    reads_scores = False

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, scores: Tensor) -> Outcome:
        return Outcome(self.mask.expand_as(scores))


def lowered(lab: Lab, what: str, model: nn.Module, data: Dataset, bound, seed: int) -> nn.Module:
    """``model`` fine-tuned at falling densities, ``bound(model, density)`` deciding."""
    for density in STEPS:
        found = trained(
            lab,
            f"{what}, density {density}",
            bound(model, density),
            data,
            [phase(EPOCHS, lr=RATE)],
            loss=LOSS,
            seed=seed,
        )
    return found


@torch.no_grad()
def kept(model: nn.Module, data: Dataset):
    """From a model and a density to the model with its channels of the highest mean saliency."""
    _, trace = pliant.record(model)(data.train.x[:1000])
    means = {site: trace[site][0].scores.mean(0) for site in trace}

    def bound(model: nn.Module, density: float) -> nn.Module:
        masks = {site: Density(density)(mean[None]).value for site, mean in means.items()}
        return pliant.bind(model, {site: Kept(mask) for site, mask in masks.items()})

    return bound


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    dense, half, static, random, share, shared = [], [], [], [], [], []
    for seed in SEEDS:
        model = seeded(seed, lambda: fbs(10, 1, layers=LAYERS, density=1.0))
        trained(lab, f"all channels, seed {seed}", model, data, [phase(6, lr=0.1)], loss=LOSS, seed=seed)
        other = copy.deepcopy(model)
        fixed = kept(model, data)
        full = trained(
            lab,
            f"all channels on, seed {seed}",
            copy.deepcopy(model),
            data,
            [phase(EPOCHS * len(STEPS), lr=RATE)],
            loss=LOSS,
            seed=seed,
        )
        dense.append(float(right(full, data).float().mean()))
        model = lowered(
            lab, f"each image's own, seed {seed}", model, data, lambda m, d: pliant.bind(m, {"*": Density(d)}), seed
        )
        other = lowered(lab, f"the same for all, seed {seed}", other, data, fixed, seed)
        half.append(float(right(model, data).float().mean()))
        static.append(float(right(other, data).float().mean()))
        drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(seed))})
        random.append(float(right(drawn, data).float().mean()))
        x = data.test.x[:200]
        with torch.no_grad():
            traces = [pliant.record(m)(x)[1] for m in (model, other)]
            share.append(float(traces[0].flops.sum() / traces[0].dense_flops.sum()))
            values = torch.cat([traces[0][site][0].value for site in traces[0]], 1)
            shared.append(float(values.mean(0).sub(0.5).abs().lt(0.49).float().mean()))
    lost = [a - b for a, b in zip(dense, half, strict=True)]
    gained = [a - b for a, b in zip(half, static, strict=True)]
    apart, table = _seconds(lab)
    worst = max(ratio for channels, _, density, _, ratio in table if density == 0.5 and channels >= 128)
    return [
        Claim(
            "half of the channels, chosen for each image: at most 1.5 points below all of them after equal training",
            f"{percent(half)} against {percent(dense)} %: {percent(lost)} points lost", "<= 1.5 points in the mean",
            sum(lost) / len(lost) <= 0.015, lost,
        ),
        Claim(
            "and at most 40 % of the multiply-adds", f"{percent(share)} % of dense FLOPs, executed", "<= 40 %",
            max(share) <= 0.4, share,
        ),
        Claim(
            "chosen for each image beats the channels of the highest mean saliency after equal fine-tuning",
            f"{percent(half)} against {percent(static)} %: {percent(gained)} points", ">= 1 point in the mean",
            sum(gained) / len(gained) >= 0.01, gained,
            f"the fixed ones keep their boosts for each image; random channels at the same rate: {percent(random)} %; "
            f"{percent(shared)} % of the channels are kept for some images and not for others",
        ),
        Claim(
            "batch 1: computing the chosen channels alone equals masking", f"{apart:.1e} largest difference, relative",
            "<= 1e-5", apart <= 1e-5, [apart],
        ),
        Claim(
            "batch 1, half of the channels in and out, layers of 128 and more: share of the dense layer's time",
            f"{worst:.2f} at worst", "<= 0.70", worst <= 0.7, [row[-1] for row in table],
            "with saliencies and decisions in it; the dense layer has the same boosts and all channels on",
        ),
        Table(
            "Six layers in a row, the first of which reads all: time as a share of the dense ones'",
            ("channels", "side", "density", "batch", "share"), table,
        ),
    ]  # fmt: skip


@torch.no_grad()
def _seconds(lab: Lab) -> tuple[float, list[tuple[int, int, float, int, float]]]:
    """How far both forms are apart, and the time of six layers in a row as a share of the dense ones'."""
    apart, table = 0.0, []
    for channels, side in ((64, 32), (128, 16), (256, 16), (512, 8)):
        for density in (0.25, 0.5):
            torch.manual_seed(0)
            pair = nn.Sequential(*(_layer(channels, density) for _ in range(6))).eval()
            for batch in (1, 8):
                x = torch.randn(batch, channels, side, side)
                y, ref = pair(x).maps, pliant.masked(pair)(x).maps
                apart = max(apart, float((y - ref).abs().max() / ref.abs().max()))
                dense = pliant.plain(pair)
                calls = {"some": lambda x=x, m=pair: m(x), "all": lambda x=x, m=dense: m(x)}
                found = interleaved(calls, rounds=9, clock=time.thread_time)
                table.append((channels, side, density, batch, found["some"].minimum / found["all"].minimum))
        lab.progress("seconds", channels, 512)
    return apart, table


def _layer(channels: int, density: float) -> Channels:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    site = Site(nn.Identity(), Density(density), shape=(channels,))
    boost = Saliency(channels, channels)
    nn.init.normal_(boost.linear.weight)
    return Channels(conv, nn.BatchNorm2d(channels, affine=False), site, boost=boost)
