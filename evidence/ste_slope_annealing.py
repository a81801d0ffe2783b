"""Slope annealing: the schedule, its resumption, and word ends in a stream of letters, with and without it."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant.estimators import HardSigmoid, Ramp, StraightThrough
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold
from pliant.train import Fit, Phase, fit

torch.set_num_threads(1)

SEEDS = (0, 1, 2)
LETTERS, LENGTH, ROWS = 6, 30, 32
EPOCHS = 150  # so that slopes from 1 to 5 and 50 epochs at 5 are seen
STEPS = (3, 1)  # an epoch: trained to the end, and cut short
DATA = "made: streams of 30 letters of an alphabet of 6, words of 2 to 6 letters of which none begins another"


class Ends(nn.Module):
    """Marks word ends; what is learned from is how many letters passed since the last mark."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.GRU(LETTERS, 32, batch_first=True)
        rule = StraightThrough(Threshold(0.0), surrogate=HardSigmoid())
        self.site = pliant.Site(nn.Sequential(nn.Linear(32, 1), nn.Flatten(1)), rule)

    def forward(self, letters: Tensor) -> tuple[Tensor, Tensor]:
        """Letters since the last mark, and the marks: both (streams, letters)."""
        ends = self.site(self.read(nn.functional.one_hot(letters, LETTERS).float())[0]).value
        since, counts = torch.zeros(len(letters)), []
        for t in range(letters.shape[1]):
            since = since + 1
            counts.append(since)
            since = since * (1 - ends[:, t])
        return torch.stack(counts, 1), ends


def words(seed: int) -> list[list[int]]:
    """Eight words of which none begins another."""
    g = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < 8:
        size = int(torch.randint(2, 7, (1,), generator=g))
        word = torch.randint(LETTERS, (size,), generator=g).tolist()
        if not any(word[: len(w)] == w or w[:size] == word for w in found):
            found.append(word)
    return found


def streams(vocabulary: list[list[int]], rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Letters, word ends, and letters since the last end."""
    g = torch.Generator().manual_seed(seed)
    letters, ends, since = (torch.zeros(rows, LENGTH, dtype=torch.long) for _ in range(3))
    for row in range(rows):
        chosen = (vocabulary[k] for k in torch.randint(len(vocabulary), (LENGTH,), generator=g).tolist())
        line = [(x, k == len(w) - 1, k + 1) for w in chosen for k, x in enumerate(w)][:LENGTH]
        for into, values in zip((letters, ends, since), zip(*line, strict=True), strict=True):
            into[row] = torch.tensor(values)
    return letters, ends, since


def f1(seed: int, annealed: bool, steps: int, *, lr: float = 1e-2) -> float:
    """Of the marks on new streams, after training with the slope annealed or 1 throughout."""
    vocabulary = words(seed)
    pool = streams(vocabulary, 2_000, 1_000 + seed)
    letters, ends, _ = streams(vocabulary, 300, 2_000 + seed)
    torch.manual_seed(seed)
    model = Ends().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(EPOCHS):
        if annealed:
            Ramp().apply(model, "*slope", epoch)
        for _ in range(steps):
            chosen = torch.randint(len(pool[0]), (ROWS,))
            count, _ = model(pool[0][chosen])
            optimizer.zero_grad()
            nn.functional.smooth_l1_loss(count, pool[2][chosen].float()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        marks = model.eval()(letters)[1]
    both = (marks * ends).sum().item()
    return 2 * both / max(1.0, (marks.sum() + ends.sum()).item())


class _Stopped(Exception):
    """An interruption."""


def resumed() -> tuple[list[float], bool]:
    """Slopes in the epochs after an interruption, and whether the weights come out as without it."""
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    data = SimpleNamespace(x=x, y=(x[:, :1] > 0).float())
    phases = [Phase("anneal", epochs=101, lr=0.1, anneal={"*slope": (1.0, 5.0)})]

    def build() -> nn.Module:
        torch.manual_seed(1)
        rule = StraightThrough(Threshold(0.0), surrogate=HardSigmoid())
        site = pliant.Site(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), rule)
        return pliant.execute.Residual(nn.Linear(3, 1), site, shortcut=nn.Linear(3, 1))

    def loss(y: Tensor, _trace: Any, target: Tensor, _progress: float) -> dict[str, Tensor]:
        return {"square": (y - target).square().mean()}

    seen: list[float] = []

    def stop(entry: dict[str, Any]) -> None:
        if entry["epoch"] == 51:
            raise _Stopped

    whole = build()
    fit(whole, data, loss, phases, options=Fit(batch_size=8, accelerator="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        options = Fit(batch_size=8, accelerator="cpu", checkpoint=path, on_epoch=stop)
        with contextlib.suppress(_Stopped):
            fit(build(), data, loss, phases, options=options)
        again = build()
        slope = again.get_buffer("site.rule.surrogate.slope")
        options = replace(options, on_epoch=lambda _: seen.append(slope.item()))
        fit(again, data, loss, phases, options=options)
    same = all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    return seen, same


def run(lab: Lab) -> list[Claim]:
    values = [Ramp()(epoch) for epoch in (0, 50, 200)]
    seen, same = resumed()
    rest = [Ramp()(epoch) for epoch in range(101 - len(seen), 101)]
    on_time = len(seen) in (50, 51) and all(abs(a - b) < 1e-6 for a, b in zip(seen, rest, strict=True))
    ends = [_ends(lab, steps) for steps in STEPS]
    return [
        Claim("slopes at epochs 0, 50, 200", f"{values}", "[1.0, 3.0, 5.0]", values == [1.0, 3.0, 5.0], values),
        Claim("a run resumed from its checkpoint goes on at the slope where it was", f"{len(seen)} epochs, from {seen[0]:.2f} to {seen[-1]:.2f}",
              "min(5, 1 + 0.04 epoch)", on_time, seen[:3]),
        Claim("and ends with the weights of one that wasn't interrupted", "yes" if same else "no", "yes", same, [float(same)]),
        *ends,
    ]  # fmt: skip


def _ends(lab: Lab, steps: int) -> Claim:
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for annealed in (True, False):
            lab.progress(
                f"word ends, {steps} steps an epoch, {'annealed' if annealed else 'slope 1'}", seed, len(SEEDS)
            )
            found[annealed].append(f1(seed, annealed, steps))
    ours, without = mean(found[True]), mean(found[False])
    return Claim(
        f"word ends after {EPOCHS * steps} steps: F1 with annealing (mean of 3 seeds)", f"{ours:.4f} against {without:.4f} without",
        ">= without", ours >= without, [*found[True], *found[False]], "values: the seeds with annealing, then those without",
    )  # fmt: skip
