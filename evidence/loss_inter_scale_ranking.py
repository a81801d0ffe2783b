"""The ranking between scales: does it lead a proposed box to a small digit on a cluttered canvas, and is scale 2 better for it?"""

from __future__ import annotations

from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from _common import ALL_EXITS, percent, seeded, trained
from _looks import SHARPNESS, TOLD, Seen, look, made, twice
from torch import Tensor

from pliant import masked, record
from pliant.core.trace import Exit, Trace
from pliant.execute import Exits
from pliant.functional import overlap, square
from pliant.losses import Ranking, Total
from pliant.reproduce import Claim, Lab
from pliant.train import Phase

ROWS, ROUNDS, MARGIN, SEEDS = 5_000, 6, 0.05, (0, 1)
DATA = f"{TOLD}; {ROWS:,} training canvases, 1,000 test canvases of other digits"
ATTENTION = "stages.1.attention.*"


def classify(epochs: int) -> Phase:
    """Both classifiers, the proposal frozen."""
    return Phase(
        "classify", epochs, optimizer="adam", lr=3e-3, schedule="cosine", train=("*", "!" + ATTENTION), loss=ALL_EXITS
    )


ATTEND = Phase(
    "attend", 4, optimizer="adam", lr=3e-4, train=(ATTENTION,), loss=Total({"ranking": (1.0, Ranking(MARGIN))})
)
ARMS = {"ranking": [ATTEND, classify(2)] * ROUNDS, "none": [classify(2)] * ROUNDS}


@torch.no_grad()
def seen(model: Exits, test: Any) -> tuple[list[float], Tensor]:
    """Accuracy of both scales, and how well each proposed box meets the digit's."""
    _, trace = record(masked(model.eval()))(test.x)
    right = [(exit.logits.argmax(1) == test.y).double().mean().item() for exit in trace.exits]
    return right, overlap(boxes(model, test.x), test.boxes)


def boxes(model: Exits, x: Tensor) -> Tensor:
    state: Seen = model.stages[0](x)
    return model.stages[1].attention(state[1])  # pyright: ignore[reportCallIssue]


def ranking(model: Exits, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
    """The loss of one image for a box at ``place``, (tx, ty, tl)."""
    first = model.heads[0](model.stages[0](x))
    second = model.heads[1]((x, model.stages[1].features(look(x, square(place[:, :2], place[:, 2:])))))  # pyright: ignore
    return Ranking(MARGIN)(second, Trace({}, (Exit(first.detach()), Exit(second)), (), 1), y, 0.0)


def pushed(
    model: Exits, x: Tensor, y: Tensor, box: Tensor, *, steps: int = 40
) -> list[tuple[float, float, bool, bool]]:
    """From boxes that are half a digit off to four sides: the loss, least size of the gradient's parts, whether it points to the
    digit, and whether the box meets it better after ``steps`` of it."""
    middle, side = (box[:2] + box[2:]) / 2, float(box[2] - box[0])
    found = []
    for way in torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]):
        place = torch.cat([middle + way * side / 2, torch.tensor([0.6 * side])])[None]
        before = overlap(square(place[:, :2], place[:, 2:]), box[None])
        for step in range(steps):
            place.requires_grad_()
            loss = ranking(model, x, y, place)
            (grad,) = torch.autograd.grad(loss, place)
            if step == 0:  # down the gradient is against ``way``
                first = loss.item(), grad.abs().min().item(), bool((grad[0, :2] * way).sum() > 0)
            place = (place - 0.005 * grad / grad.norm().clamp_min(1e-12)).detach()
        found.append((*first, bool(overlap(square(place[:, :2], place[:, 2:]), box[None]) > before)))
    return found


def run(lab: Lab) -> list[Claim]:
    test = made(lab, 1_000, seed=1, part="test")
    data = SimpleNamespace(train=made(lab, ROWS, seed=0))
    met: dict[str, list[float]] = {name: [] for name in ARMS}
    gain: dict[str, list[float]] = {name: [] for name in ARMS}
    said, least, towards, often, nearer = [], [], [], [], []
    for seed in SEEDS:
        for name, phases in ARMS.items():
            model: Any = seeded(seed, twice)
            trained(lab, f"{name}, seed {seed}", model, data, [classify(8), *phases], seed=seed)  # pyright: ignore
            right, iou = seen(model, test)
            met[name].append(iou.mean().item())
            gain[name].append(right[1] - right[0])
            said.append(f"{name}, seed {seed}: {100 * right[0]:.1f} and {100 * right[1]:.1f} %")
            if name == "ranking":
                known = (model(test.x).argmax(1) == test.y) & (
                    model.heads[0](model.stages[0](test.x)).argmax(1) == test.y
                )
                rows = known.nonzero().flatten()[:50].tolist()
                found = [pushed(model, test.x[r : r + 1], test.y[r : r + 1], test.boxes[r]) for r in rows]
                active = [starts for starts in found if all(start[0] > 0 for start in starts)]  # else a hinge is silent
                least.append(min(start[1] for start in active[0]))
                towards.append(float(sum(start[2] for start in active[0])))
                every = [start for starts in active for start in starts]
                often.append(mean(start[2] for start in every))
                nearer.append(mean(start[3] for start in every))
    return [
        Claim("with the ranking loss the proposed box meets the digit (mean IoU)", ", ".join(f"{v:.3f}" for v in met["ranking"]), ">= 0.4",
              min(met["ranking"]) >= 0.4, met["ranking"],
              f"mask of {SHARPNESS:g} per pixel, not 10; classifiers see boxes 0.6 to 1.1 times as large as proposed, and moved. Tried before: 10 per pixel,"
              " and boxes shaken while the proposal is trained, 0.12; classifiers that see no other boxes, 0.17; boxes shaken evenly in size, 0.23;"
              " 4 rounds, 0.424 and 0.394"),
        Claim("and without it doesn't", ", ".join(f"{v:.3f}" for v in met["none"]), "< 0.2", max(met["none"]) < 0.2, met["none"],
              "the box stays where features respond most, at the size it begins with: 0.6 of the canvas, which can't reach 0.18"),
        Claim("scale 2 is more accurate than scale 1", f"{percent(gain['ranking'])} points", ">= 5 points", min(gain["ranking"]) >= 0.05, gain["ranking"],
              f"scales 1 and 2: {'; '.join(said)}; without the ranking loss {percent(gain['none'])} points:"
              " the gain comes with the larger view of the box, which the ranking makes smaller but not better"),
        Claim("on one image the loss has a gradient by each of tx, ty and tl", f"{min(least):.1e} at least", "> 0", min(least) > 0, least,
              "the first test image that both scales get right, and whose loss isn't 0, for boxes half a digit off to four sides"),
        Claim("which points to the digit from all four sides", ", ".join(f"{n:.0f}" for n in towards), "4 of 4", min(towards) == 4, [*towards, *often, *nearer],
              f"over the first such images (50 looked at) {percent(often)} % of the gradients do, and {percent(nearer)} % of the boxes meet the digit better"
              " after 40 steps down the gradient of their one image: it's bumpy, and only the mean over images leads a proposal. Tried before: 4 rounds,"
              " boxes that end nearer, 1 and 2 of 4"),
    ]  # fmt: skip
