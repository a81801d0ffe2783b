"""Deformable ConvNets v2: does modulation tell objects from clutter, and is it worth what it costs?"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _common import percent, phase
from _soft import ahead, at_means, average, executed, race, scored, widened
from torch import Tensor, nn

from pliant import bind, create_model, masked, plain, record, rules, sites
from pliant.data import Split, load
from pliant.reproduce import Claim, Lab, Table

ROWS, EPOCHS, SEEDS, SIDE, WIDTHS, PIECES = 2_000, 8, (0, 1, 2), 32, (8, 16, 32), 6
DATA = (
    f"made of Fashion-MNIST: an item of 18 by 18 pixels anywhere on {SIDE} by {SIDE}, over {PIECES} pieces of 7 pixels torn from others; "
    f"{ROWS:,} training and 2,000 test images; ResNet-8 (8, 16, 32), its later four 3x3 convolutions deformable; detection on COCO isn't here"
)
SIZES: dict[str, Any] = {"in_chans": 1, "depth": 8}


def cluttered(lab: Lab, part: str, rows: int, seed: int) -> tuple[Split, Tensor, Tensor]:
    """Images, where the item's pixels are, and where those of clutter are (R, H, W)."""
    split = getattr(load("fashion_mnist", lab.root, limit=6_000), part)
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    every = F.interpolate(split.x - split.x.min(), size=18, mode="area")
    every = every / every.amax((1, 2, 3), keepdim=True)
    pick, torn = draw(len(every), rows), draw(len(every), rows, PIECES)
    cut, put, at = (
        draw(12, rows, PIECES, 2).tolist(),
        draw(SIDE - 6, rows, PIECES, 2).tolist(),
        draw(SIDE - 17, rows, 2),
    )
    x, item = torch.zeros(rows, 1, SIDE, SIDE), torch.zeros(rows, SIDE, SIDE, dtype=torch.bool)
    for r, (top, left) in enumerate(at.tolist()):
        for k in range(PIECES):
            (i, j), (a, b) = cut[r][k], put[r][k]
            x[r, :, a : a + 7, b : b + 7] = every[torn[r, k], :, i : i + 7, j : j + 7]
        on = every[pick[r], 0] > 0.1
        x[r, 0, top : top + 18, left : left + 18][on] = every[pick[r], 0][on]
        item[r, top : top + 18, left : left + 18] = on
    return Split((x - 0.2) / 0.3, split.y[pick]), item, (x[:, 0] > 0.1) & ~item


def version(name: str) -> nn.Module:
    return create_model("deform_conv_v2", widths=WIDTHS, version=name, **SIZES)


def static(widths: Sequence[int] = WIDTHS) -> nn.Module:
    return plain(create_model("deform_conv_v2", widths=widths, **SIZES))


@torch.no_grad()
def identities() -> tuple[float, float]:
    """A layer at its start against half the convolution; and the network with masks of 1 against version 1, relative."""
    torch.manual_seed(0)
    both, first = version("v2").eval(), version("v1").eval()
    for site in sites(both).values():
        nn.init.normal_(site.scorer.conv.weight, std=0.05)
    first.load_state_dict({k: v for k, v in both.state_dict().items() if ".mask." not in k})
    x = torch.randn(4, 1, 16, 16)
    y, z = bind(both, {"*.mask": rules.Always()})(x), first(x)
    layer = next(m for m in version("v2").modules() if hasattr(m, "offsets"))
    inner: Any = layer
    maps = torch.randn(4, inner.operation.conv.in_channels, 9, 9)
    half = 0.5 * inner.operation.conv(maps)
    return float((inner(maps) - half).abs().max() / half.abs().max()), float((y - z).abs().max() / z.abs().max())


@torch.no_grad()
def modulation(model: nn.Module, x: Tensor, item: Tensor, clutter: Tensor) -> list[tuple[float, float]]:
    """Mean mask of every layer where most of a position's pixels are the item's, and where they're clutter's."""
    _, trace = record(masked(model))(x)
    found = []
    for site in trace:
        if site.endswith("mask"):
            mask = trace.dense(site).mean(1)
            size = mask.shape[1:]
            on, off = (F.adaptive_avg_pool2d(where.float()[:, None], size)[:, 0] > 0.5 for where in (item, clutter))
            found.append((float(mask[on].mean()), float(mask[off].mean())))
    return found


def run(lab: Lab) -> list[Claim | Table]:
    half, first = identities()
    train, _, _ = cluttered(lab, "train", ROWS, 0)
    test, item, clutter = cluttered(lab, "test", 2_000, 1)
    data: Any = SimpleNamespace(train=train, test=test)
    wide = widened(static, (11, 17, 35), test.x, executed(version("v2"), test.x[:8]))
    builds: Any = {"v2": lambda: version("v2"), "v1": lambda: version("v1"), "static, widened": lambda: static(wide)}
    nets = race(lab, builds, data, [phase(EPOCHS, lr=0.05)], SEEDS)
    accuracy = scored(nets, data)
    flops = {name: executed(each[0], test.x[:8]) for name, each in nets.items()}
    over = [modulation(net, test.x[:500], item[:500], clutter[:500]) for net in nets["v2"]]
    apart = [mean(a - b for a, b in each) for each in over]
    gain, more = ahead(accuracy["v2"], accuracy["v1"]), ahead(accuracy["v2"], accuracy["static, widened"])
    frozen = {"means": [at_means(net, train.x, only="mask") for net in nets["v2"]]}
    lost = ahead(accuracy["v2"], scored(frozen, data)["means"])
    return [
        Claim("a layer at its start is half the plain convolution", f"{half:.1e} relative difference", "<= 1e-5", half <= 1e-5, [half]),
        Claim("with masks of 1 it's version 1", f"{first:.1e} relative difference", "<= 1e-5", first <= 1e-5, [first]),
        Claim("modulation is higher on the item than on clutter, mean over layers and taps", ", ".join(f"{a:+.3f}" for a in apart),
              "> 0 in each seed", min(apart) > 0, apart, "by a position's own pixels, not by where its moved taps read"),
        Claim("accuracy above version 1's of the same channels, mean of 3 seeds", average(gain), "> 0", mean(gain) > 0, gain,
              f"{percent(accuracy['v2'])} % at {flops['v2'] / 1e6:.2f} MFLOPs, {percent(accuracy['v1'])} % at {flops['v1'] / 1e6:.2f}"),
        Claim(f"and above a static ResNet's, widened to no fewer FLOPs ({', '.join(map(str, wide))} channels)", average(more), "> 0",
              mean(more) > 0, more, f"{percent(accuracy['static, widened'])} % at {flops['static, widened'] / 1e6:.2f} MFLOPs"),
        Claim("masks at their means over the training images cost accuracy", average(lost), "> 0", mean(lost) > 0, lost),
        Table("Mean modulation on items and on clutter", ("layer", *(f"seed {s}, {w}" for s in SEEDS for w in ("item", "clutter"))),
              [(k + 1, *(v for each in over for v in each[k])) for k in range(len(over[0]))]),
    ]  # fmt: skip
