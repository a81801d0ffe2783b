"""Give a ResNet-18 of torchvision early exits: train it, attach, train the heads alone, set the thresholds, measure.

    python examples/retrofit_resnet18.py

Half a minute on one CPU core, on scikit-learn's handwritten digits; any model and data will do instead. One seed and 359
test images: expect accuracies to move by a few points with either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.cost import interleaved
from pliant.data import load
from pliant.retrofit import exits


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for i in torch.randperm(len(x)).split(size)]


def backbone() -> nn.Module:
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)  # the images are 8 x 8
    model.maxpool = nn.Identity()
    return model


def accuracy(y: Tensor, target: Tensor) -> float:
    return 100 * (y.argmax(1) == target).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load("digits")

    host = backbone()
    optimiser = torch.optim.SGD(host.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(6):
        for x, y in batches(data.train.x, data.train.y, 64):
            optimiser.zero_grad()
            F.cross_entropy(host(x), y).backward()
            optimiser.step()

    host.eval().requires_grad_(False)
    model = exits(host, at=["layer1", "layer2", "layer3"], example=data.train.x[:4])
    every = pliant.record(
        pliant.masked(model)
    )  # in evaluation mode, so that the batch norms of the host stay as they are
    optimiser = torch.optim.Adam(model.exits.heads.parameters(), lr=0.01)
    for _ in range(6):
        for x, y in batches(data.train.x, data.train.y, 64):
            optimiser.zero_grad()
            _, trace = every(x)
            sum(F.cross_entropy(e.logits, y) for e in trace.exits[:-1]).backward()
            optimiser.step()

    point = pliant.tune(model, batches(data.val.x, data.val.y, 64), risk=0.01)
    x, y = data.test.x, data.test.y
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found, trace = pliant.record(model)(x)
    leave = [int((trace.dense(s) == 0).sum()) for s in trace]
    print("thresholds:", ", ".join(f"{s} {t:.3f}" for s, t in point.thresholds.items()))
    print(f"host: {accuracy(host(x), y):.1f} % of {len(x)} test digits; with exits: {accuracy(found, y):.1f} %")
    print("rows gone after each exit:", leave)
    share = trace.flops.sum() / trace.dense_flops.sum()
    print(f"FLOPs: {share:.1%} of dense; the counter agrees: {int(trace.flops.sum()) == counter.get_total_flops()}")
    seconds = interleaved({"host": lambda: host(x), "exits": lambda: model(x)}, rounds=5)
    print(f"seconds: {seconds['exits'].minimum / seconds['host'].minimum:.1%} of the host's")


if __name__ == "__main__":
    main()
