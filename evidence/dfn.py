"""Dynamic filters: made from an angle, and from the frames before; against what's known and against no filters."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _common import percent, phase, seeded
from torch import Tensor, nn

from pliant import Site, create_model, rules
from pliant.data import load
from pliant.execute.kernels import Adapted, Filtered, GeneratedConv2d
from pliant.execute.regions import Look
from pliant.functional.dynamic_conv import Geometry
from pliant.reproduce import Claim, Lab, Table
from pliant.systems.parameters.dfn import FilterNet
from pliant.train import Fit, fit

torch.set_num_threads(1)
ROWS, EPOCHS, SEEDS, STEPS = 600, 10, (0, 1), 1_500
SEEN, AHEAD, SIDE, KERNEL, WIDTHS, FASTEST = 3, 2, 32, 7, (8, 16, 32), 3
DATA = (
    f"made: derivatives of a Gaussian at {360 / 48:g} degrees apart, on noise; and items of Fashion-MNIST, 14 by 14, that bounce in {SIDE} by "
    f"{SIDE} by up to {FASTEST} pixels a frame: {SEEN} frames are seen, {AHEAD} predicted, {ROWS:,} training and 300 test films"
)
ANGLES = 48


def steered(theta: Tensor) -> Tensor:
    """The first derivative of a Gaussian in these directions, (R, 1, 1, 9, 9), each of norm 1."""
    line = torch.arange(-4.0, 5.0)
    y, x = line[:, None], line[None, :]
    bell = torch.exp(-(x**2 + y**2) / (2 * 1.5**2))
    across, down = bell * x, bell * y
    norm = across.norm()
    return ((theta.cos()[:, None, None] * across + theta.sin()[:, None, None] * down) / norm)[:, None, None]


def steering(seed: int) -> float:
    """Relative error of outputs at angles between those of training."""
    torch.manual_seed(seed)
    net = [nn.Linear(1, 64), nn.LeakyReLU(0.1), nn.Linear(64, 128), nn.LeakyReLU(0.1), nn.Linear(128, 81)]
    scorer = nn.Sequential(*net, nn.Unflatten(1, (1, 1, 9, 9)))
    layer = Adapted(
        Site(scorer, rules.Regressed(), shape=(1, 1, 9, 9)), GeneratedConv2d((1, 1, 9, 9), geometry=Geometry(padding=4))
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def off(theta: Tensor) -> Tensor:
        x = torch.randn(len(theta), 1, 24, 24)
        y, _ = layer(Look(x, theta[:, None] / math.pi - 1))
        wanted = torch.cat([F.conv2d(a[None], k, padding=4) for a, k in zip(x, steered(theta), strict=True)])
        return (y - wanted).square().sum() / wanted.square().sum()

    for _ in range(STEPS):
        optimizer.zero_grad()
        off(torch.randint(ANGLES, (16,)) * (2 * math.pi / ANGLES)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(off((torch.arange(ANGLES - 1) + 0.5) * (2 * math.pi / ANGLES)).sqrt())


def films(lab: Lab, part: str, rows: int, seed: int) -> SimpleNamespace:
    """Frames that are seen, and those that follow."""
    split = getattr(load("fashion_mnist", lab.root, limit=4_000), part)
    g = torch.Generator().manual_seed(seed)
    items = F.interpolate(split.x[:2_000] - split.x.min(), size=14, mode="area")
    items = items / items.amax((1, 2, 3), keepdim=True)
    pick, room = torch.randint(len(items), (rows,), generator=g), SIDE - 14
    at = torch.randint(room + 1, (rows, 2), generator=g)
    pace = torch.randint(-FASTEST, FASTEST + 1, (rows, 2), generator=g)
    frames = torch.zeros(rows, SEEN + AHEAD, SIDE, SIDE)
    for r, t in itertools.product(range(rows), range(SEEN + AHEAD)):
        top, left = (room - ((at[r] + t * pace[r]) % (2 * room) - room).abs()).tolist()  # there and back again
        frames[r, t, top : top + 14, left : left + 14] = items[pick[r], 0]
    return SimpleNamespace(x=frames[:, :SEEN], y=frames[:, SEEN:])


class Direct(nn.Module):
    """The same network without the filter layer: its last map is made a frame by a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FilterNet(KERNEL**2, WIDTHS)
        self.frame = nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(KERNEL**2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The frames that follow, as logits."""
        carry, made = None, []
        for t in range(SEEN + AHEAD - 1):
            frame = x[:, t : t + 1] if t < SEEN else made[-1].sigmoid()
            y, carry = self.net.step(frame, carry)
            made.append(self.frame(y))
        return torch.cat(made[SEEN - 1 :], 1)


def pixelwise(y: Tensor, trace: Any, target: Tensor, progress: float) -> dict[str, Tensor]:
    """Binary cross-entropy of every pixel, from probabilities or, where some lie outside of [0, 1], logits."""
    return {"pixels": F.binary_cross_entropy(y.clamp(1e-4, 1 - 1e-4), target)}


def from_logits(y: Tensor, trace: Any, target: Tensor, progress: float) -> dict[str, Tensor]:
    """The same of logits."""
    return {"pixels": F.binary_cross_entropy_with_logits(y, target)}


@torch.no_grad()
def filters() -> tuple[float, float]:
    """Local against whole form with the same taps; and how much intensity a softmaxed filter makes or loses."""
    torch.manual_seed(0)
    x, taps = torch.zeros(4, 1, 20, 20), torch.randn(4, 49).softmax(1)
    x[:, :, 6:14, 6:14] = torch.rand(4, 1, 8, 8)
    local = Filtered(7)(x, taps[:, :, None, None].expand(4, 49, 20, 20))
    whole = GeneratedConv2d((1, 1, 7, 7), geometry=Geometry(padding=3))(x, taps.reshape(4, 1, 1, 7, 7))
    lost = (local.sum((1, 2, 3)) / x.sum((1, 2, 3)) - 1).abs().max()
    flat = Filtered(7)(torch.ones(4, 1, 20, 20), torch.randn(4, 49, 20, 20).softmax(1))[:, :, 3:-3, 3:-3]
    return float((local - whole).abs().max()), max(float(lost), float((flat - 1).abs().max()))


def run(lab: Lab) -> list[Claim | Table]:
    errors = []
    for seed in (0, 1, 2):
        errors.append(steering(seed))
        lab.progress("steering", seed + 1, 3)
    train, test = films(lab, "train", ROWS, 0), films(lab, "test", 300, 1)
    plan = [phase(EPOCHS, optimizer="adam", lr=2e-3, momentum=0.0, nesterov=False, weight_decay=0.0)]
    sizes = {"num_classes": AHEAD, "in_chans": SEEN, "kernel": KERNEL, "widths": WIDTHS}
    kinds: dict[str, Any] = {
        "filters": (lambda: create_model("dfn", **sizes), pixelwise, lambda y: y), "direct": (Direct, from_logits, torch.sigmoid),
    }  # fmt: skip
    squared: dict[str, list[float]] = {name: [] for name in kinds}
    count: dict[str, int] = {}
    for seed in SEEDS:
        for name, (build, loss, told) in kinds.items():
            model = seeded(seed, build)
            fit(model, train, loss, plan, options=Fit(batch_size=16, seed=seed))
            count[name] = sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                y = told(model.eval()(test.x))
            squared[name].append(float((y - test.y).square().mean()))
            lab.progress(f"{name}, seed {seed}", seed + 1, len(SEEDS))
    copied = float((test.x[:, -1:] - test.y).square().mean())
    same, made = filters()
    shown = {name: ", ".join(f"{v:.4f}" for v in each) for name, each in squared.items()}
    ratio = [a / b for a, b in zip(squared["filters"], squared["direct"], strict=True)]
    return [
        Claim("from an angle it learns filters whose output matches the analytic steerable filter's, at angles not seen in training",
              f"{percent(errors)} % relative error", "< 5 % in each seed", max(errors) < 0.05, errors),
        Claim("it predicts moving items better than the same network without the filter layer, equal parameters",
              f"{shown['filters']} against {shown['direct']} mean squared error",
              "less in each seed", max(ratio) < 1, ratio,
              f"parameters: {count['filters']:,} and {count['direct']:,}; the last frame repeated: {copied:.4f}"),
        Claim("with the same filter at all positions the local form is the convolution", f"{same:.1e} largest difference", "<= 1e-5", same <= 1e-5, [same]),
        Claim("softmaxed filters conserve intensity away from borders", f"{made:.1e} of it", "<= 1e-5", made <= 1e-5, [made],
              "the whole image's under a filter for the image, an even area's under a filter for each pixel"),
        Table("Mean squared error of the predicted frames", ("network", *(f"seed {s}" for s in SEEDS)),
              [(name, *each) for name, each in squared.items()] + [("the last frame repeated", *[copied] * len(SEEDS))]),
    ]  # fmt: skip
