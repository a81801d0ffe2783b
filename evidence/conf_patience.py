"""Patience on a transformer's six exits: depth against accuracy, logits times five, and batches against single texts."""

from __future__ import annotations

import copy

import torch
from _chains import differing
from _common import held, percent, seeded, trained
from _texts import LAYERS, TOLD, adamw, linear, news, transformer
from torch import Tensor, nn

from pliant import Site, bind, record, rules, scores
from pliant.data import Dataset
from pliant.execute import Exits
from pliant.losses import MultiExit, Total, by_depth
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy

EPOCHS, SEEDS, TIMES = 6, (0, 1), 5.0
DATA = TOLD
LOSS = Total({"exits": (1.0, MultiExit(by_depth(LAYERS)))})


def patient(model: Exits, t: int) -> Exits:
    """The chain whose rows leave when ``t`` exits in a row have agreed."""
    return bind(bind(model, {"*": scores.Patience(t)}), {"*": rules.Threshold(0.0)})  # pyright: ignore[reportReturnType]


@torch.no_grad()
def decided(model: Exits, x: Tensor) -> Tensor:
    """What every site decides about every row, (sites, rows), 0 where it wasn't reached."""
    _, trace = record(model)(x)
    values = [trace.dense(site) for site in trace]
    return torch.stack([*values, *[torch.zeros(len(x))] * (LAYERS - 1 - len(values))])


@torch.no_grad()
def louder(model: Exits) -> Exits:
    """A copy that says all logits times five."""
    copied = copy.deepcopy(model)
    for layer in linear(copied):
        layer.weight *= TIMES
        layer.bias *= TIMES
    return copied


def as_deep(model: Exits, data: Dataset, depth: float) -> Exits:
    """The chain with one threshold on the largest probability, whose mean depth on held-out texts is ``depth``."""
    ours: Exits = bind(model, {"*": scores.MaxProbability()})  # pyright: ignore[reportAssignmentType]
    val, low, high = held(ours, data)[0], 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        deep = val.leaves(torch.full((LAYERS - 1,), middle)).double().mean().item() + 1
        low, high = (middle, high) if deep > depth else (low, middle)
    return bind(ours, {"*": rules.Threshold(high)})  # pyright: ignore[reportReturnType]


def ties() -> int:
    """Rows of made logits, tied within and between exits, whose exit isn't that of a loop over single rows, for every patience."""
    g = torch.Generator().manual_seed(0)
    made = torch.randint(0, 2, (500, LAYERS, 3), generator=g).float()  # many rows with two or three largest logits

    class Read(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.k]

    chain = Exits(
        [nn.Identity() for _ in range(LAYERS)], [Read(k) for k in range(LAYERS)],
        [Site(scores.Entropy(), rules.Threshold(0.0)) for _ in range(LAYERS - 1)],
    ).eval()  # fmt: skip
    wrong = 0
    for t in range(1, LAYERS + 1):
        found = 1 + decided(patient(chain, t), made).sum(0).long()
        wrong += sum(int(a != _alone(row, t)) for row, a in zip(made, found.tolist(), strict=True))
    return wrong


def _alone(row: Tensor, t: int) -> int:
    """The layer after which one row leaves, counted from 1, by the paper's loop."""
    said, count = row.argmax(-1).tolist(), 0
    for k in range(1, LAYERS):
        count = count + 1 if said[k] == said[k - 1] else 0
        if count == t:
            return k + 1
    return LAYERS


def run(lab: Lab) -> list[Claim | Table]:
    data = news(lab)
    best, shallow, moved, shift, counts, rows = ([] for _ in range(6))
    for seed in SEEDS:
        model = seeded(seed, lambda: transformer(data))
        trained(lab, f"seed {seed}", model, data, [adamw(EPOCHS)], loss=LOSS, seed=seed)
        full = held(model, data)[1].correct[-1].double().mean().item()
        kept = []
        for t in range(1, LAYERS + 1):
            ours = patient(model, t)
            deep = 1 + decided(ours, data.test.x).sum(0).mean().item()
            got = accuracy(ours, data.test)[0]
            rows.append([f"seed {seed}, t = {t}", deep / LAYERS, got, full])
            kept += [(full - got, deep / LAYERS)] if deep <= 0.75 * LAYERS else []
            counts += differing(ours, data.test.x[:128], sizes=(7, 64), clear_of=-1.0)
            moved.append(float((decided(ours, data.test.x) != decided(patient(louder(model), t), data.test.x)).sum()))
        lost, share = min(kept)
        best.append(lost)
        shallow.append(share)
        sure = as_deep(model, data, share * LAYERS)
        before, after = (decided(net, data.test.x).sum(0).mean().item() for net in (sure, louder(sure)))
        shift.append(abs(before - after) / LAYERS)
        lab.progress(f"seed {seed}: depth {share:.0%}", 1, 1)
    made = ties()
    return [
        Claim("some patience keeps full depth's accuracy with a mean depth of at most 75 %", f"{percent(best)} points lost", "<= 0.3 points",
              max(best) <= 0.003, best, f"mean depth {percent(shallow)} % of {LAYERS} layers"),
        Claim("decisions that change when all logits are multiplied by 5, any patience", f"{sum(moved):.0f}", "0", not any(moved), moved),
        Claim("where the mean exit by the largest probability, as deep before, moves by this share of the depth", f"{percent(shift)} %", "> 10 %",
              min(shift) > 0.1, shift),
        Claim("batches of 7 and 64 texts have the classes and exits of single texts, patience 1 to 6", f"{sum(counts)} differ", "0", not any(counts), counts),
        Claim("and rows of tied logits leave where the paper's loop over single rows does, patience 1 to 6", f"{made} differ", "0", made == 0, [made]),
        Table("Mean depth as a share of six layers, accuracy, and accuracy at full depth", ("run", "depth", "accuracy", "full"), rows),
    ]  # fmt: skip
