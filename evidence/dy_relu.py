"""DY-ReLU: two lines for each channel and image against one ReLU, and against a wider network of the same FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from _common import fashion, percent, phase, right, told
from _soft import Others, ahead, average, executed, numbers, race, scored, widened
from torch import nn

from pliant import bind, create_model, rules, sites
from pliant.execute.kernels import DynamicReLU, Scaled
from pliant.reproduce import Claim, Lab, Table
from pliant.systems.mobile import mobile

ROWS, EPOCHS, SEEDS, WIDTHS = 2_500, 10, (0, 1, 2), (8, 12, 16)
SIZES: dict[str, Any] = {"in_chans": 1, "depth": 1, "stem_stride": 2}
DATA = told(ROWS, "; MobileNetV2 of 3 blocks, 8 to 16 channels; the YAML's claims are for CIFAR-10")


def dynamic(form: str) -> nn.Module:
    return create_model("dy_relu", widths=WIDTHS, form=form, **SIZES)


def static(widths: Sequence[int] = WIDTHS) -> nn.Module:
    return mobile(widths=widths, **SIZES).model()


def identities() -> tuple[float, float]:
    """Zero residuals against the ReLU, and one line of slope a against scaling by a."""
    torch.manual_seed(0)
    x, a = torch.randn(4, 6, 5, 5), torch.rand(4, 6)
    relu = float((DynamicReLU()(x, torch.ones(4, 6, 4)) - x.relu()).abs().max())
    line = DynamicReLU(1)(x, torch.stack([a, torch.ones(4, 6)], 2))
    return relu, float((line - Scaled()(x, a)).abs().max())


def run(lab: Lab) -> list[Claim | Table]:
    relu, line = identities()
    data = fashion(lab, ROWS)
    x = data.test.x
    cost = executed(dynamic("channel"), x[:8])
    wide = widened(static, WIDTHS, x, cost)
    builds: Any = {
        "B, by channel": lambda: dynamic("channel"), "A, shared": lambda: dynamic("shared"), "ReLU": static,
        "ReLU, widened": lambda: static(wide),
    }  # fmt: skip
    adam = phase(EPOCHS, optimizer="adam", lr=0.015, momentum=0.0, nesterov=False, weight_decay=0.0)
    nets = race(lab, builds, data, [adam], SEEDS)
    accuracy = scored(nets, data)
    ours = accuracy["B, by channel"]
    gain = {name: ahead(ours, theirs) for name, theirs in accuracy.items() if name != "B, by channel"}
    spread = [
        [float(v[..., :2].std(0).mean()) for v in numbers(net, x).values()] for net in nets["B, by channel"]
    ]  # fmt: skip
    varied = [mean(float(s > 0.05) for s in each) for each in spread]
    others = [bind(net, {s: Others(rules.Sigmoid(2.0)) for s in sites(net)}) for net in nets["B, by channel"]]
    lost = ahead(ours, [float(right(net, data).double().mean()) for net in others])
    beaten = [mean(g) > 0 for g in gain.values()]
    flops = {name: executed(each[0], x[:8]) for name, each in nets.items()}
    return [
        Claim("with residuals of 0 it's the ReLU", f"{relu:.1e} largest difference", "0", relu == 0, [relu]),
        Claim("one line through 0 is squeeze-and-excitation's scaling", f"{line:.1e} largest difference", "<= 1e-6", line <= 1e-6, [line]),
        Claim("coefficients by channel beat shared ones, the ReLU, and the ReLU in a network widened to no fewer FLOPs, mean of 3 seeds",
              "; ".join(f"{name}: {average(g)}" for name, g in gain.items()), "> 0 each", all(beaten), [v for g in gain.values() for v in g],
              f"accuracy {percent(ours)} %; {cost / flops['ReLU'] - 1:.1%} more FLOPs than the ReLU's; widened to {', '.join(map(str, wide))} channels; "
              "tried before, SGD at 0.05 in 7 epochs: -2.15, -1.42 and -0.49 points"),
        Claim("slopes of a channel vary from image to image in most layers", f"{percent(varied)} % of the layers",
              "standard deviation > 0.05 in more than half", min(varied) > 0.5, varied),
        Claim("another image's coefficients cost accuracy", average(lost), "> 0 in each seed", min(lost) > 0, lost),
        Table("Four networks trained alike", ("network", "MFLOPs", *(f"seed {s}" for s in SEEDS)),
              [(name, flops[name] / 1e6, *accuracy[name]) for name in nets]),
        Table("Standard deviation of slopes over test images, mean over channels and lines", ("activation", *(f"seed {s}" for s in SEEDS)),
              [(f"{k + 1}", *(each[k] for each in spread)) for k in range(len(spread[0]))]),
    ]  # fmt: skip
