"""SENet: what squeeze-and-excitation adds to a small ResNet, in accuracy, FLOPs and seconds, and what its gates know."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from _common import fashion, percent, phase, right, told
from _soft import ahead, at_means, average, executed, numbers, probe, race, scored, slower, widened
from torch import nn

from pliant import create_model, plain
from pliant.functional.dynamic_conv import Geometry, conv_each
from pliant.reproduce import Claim, Lab, Table

ROWS, EPOCHS, SEEDS, WIDTHS = 4_000, 8, (0, 1, 2), (8, 16, 32)
DATA = told(ROWS, "; ResNet-8 of half the width (8, 16, 32); the YAML's claims are for CIFAR-10")


def attended() -> nn.Module:
    return create_model("senet", in_chans=1, depth=8, widths=WIDTHS)


def static(widths: Sequence[int] = WIDTHS) -> nn.Module:
    return plain(create_model("senet", in_chans=1, depth=8, widths=widths))


def apart() -> float:
    """Scaling a convolution's outputs against scaling its kernels, relative."""
    torch.manual_seed(0)
    x, a, w = torch.randn(8, 6, 9, 9), torch.rand(8, 12), torch.randn(12, 6, 3, 3)
    y = F.conv2d(x, w, padding=1) * a[:, :, None, None]
    z = conv_each(x, a[:, :, None, None, None] * w, geometry=Geometry(padding=1))
    return float((y - z).abs().max() / y.abs().max())


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    x = data.test.x
    cost = executed(attended(), x[:8])
    wide = widened(static, WIDTHS, x, cost)
    builds: Any = {"SE": attended, "none": static, "none, widened": lambda: static(wide)}
    adam = phase(EPOCHS, optimizer="adam", lr=5e-3, momentum=0.0, nesterov=False, weight_decay=0.0)
    nets = race(lab, builds, data, [adam], SEEDS)
    accuracy = scored(nets, data)
    flops = {name: executed(each[0], x[:8]) for name, each in nets.items()}
    gain, over = ahead(accuracy["SE"], accuracy["none"]), ahead(accuracy["SE"], accuracy["none, widened"])
    frozen = [float(right(at_means(net, data.train.x), data).double().mean()) for net in nets["SE"]]
    lost = ahead(accuracy["SE"], frozen)
    gates = [list(numbers(net, x).values()) for net in nets["SE"]]
    first, last = ([probe(each[k], data.test.y) for each in gates] for k in (0, -1))
    more, gap, time = flops["SE"] / flops["none"] - 1, apart(), slower(nets["SE"][0], nets["none"][0], x[:128])
    return [
        Claim("scaling a convolution's outputs is convolving with each row's scaled kernels", f"{gap:.1e} relative difference",
              "<= 1e-5", gap <= 1e-5, [gap]),
        Claim("accuracy above the ResNet without it, mean of 3 seeds", average(gain), ">= +0.3 points", mean(gain) >= 0.003, gain,
              f"accuracy {percent(accuracy['SE'])} % against {percent(accuracy['none'])} %; tried before, SGD at 0.1 on 3,000 images, 7 epochs: -1.88 points"),
        Claim(f"and above a static ResNet widened to no fewer FLOPs ({', '.join(map(str, wide))} channels)", average(over), "> 0",
              mean(over) > 0, over, f"{percent(accuracy['none, widened'])} % at {flops['none, widened'] / flops['SE']:.3f} times the FLOPs"),
        Claim("more FLOPs", f"{more:.2%}", "< 2 %", more < 0.02, [more]),
        Claim("more processor time, 128 images", f"{time - 1:.1%}", "< 15 %", time < 1.15, [time]),
        Claim("weights replaced by their means over the training images lose part of the gain", average(lost), "> 0",
              mean(lost) > 0, lost),
        Claim("the last block's weights tell the class better than the first's, by a linear classifier",
              f"{percent(last)} % against {percent(first)} %", "better in each seed", all(b > a for a, b in zip(first, last, strict=True)),
              [*first, *last]),
        Table("Three networks trained alike", ("network", "MFLOPs", *(f"seed {s}" for s in SEEDS)),
              [(name, flops[name] / 1e6, *accuracy[name]) for name in nets]),
    ]  # fmt: skip
