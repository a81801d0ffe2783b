"""DeeBERT: entropy on off-ramps that learned from a frozen trunk; the two stages against joint training; seconds of one text."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from _common import percent, seeded, trained
from _texts import LENGTH, adamw, news
from torch import Tensor

from pliant import bind, create_model, plain, record, rules
from pliant.cost import interleaved
from pliant.execute import Exits
from pliant.losses import MultiExit, Total
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy
from pliant.systems.depth.deebert import ramps_from_last, two_stages

LAYERS, EPOCHS, SEEDS = 6, 4, (0, 1)
DATA = f"AG News, small part: 5,130 training and 1,520 test articles, first {LENGTH} words; {LAYERS} layers of 64, from scratch"
SWEEP = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@torch.no_grad()
def layer(model: Exits, x: Tensor) -> Tensor:
    """The layer after which every row left, from 1."""
    _, trace = record(model)(x)
    return 1 + torch.stack([trace.dense(site) for site in trace]).sum(0)


def built(words: int, classes: int) -> Exits:
    return create_model("deebert", num_classes=classes, words=words, layers=LAYERS, length=LENGTH, dropout=0.2)


def run(lab: Lab) -> list[Claim | Table]:
    data = news(lab)
    words, classes = len(data.vocabulary), len(data.classes)
    lost, share, back, same, joint, table, ratios = [], [], [], [], [], [], []
    for seed in SEEDS:
        model = seeded(seed, lambda: built(words, classes))
        first, second = two_stages(model, epochs=EPOCHS)
        trained(lab, f"trunk, seed {seed}", model, data, [adamw(EPOCHS)], loss=first[0].loss, seed=seed)
        with torch.no_grad():
            stage1 = plain(model)(data.test.x)
        ramps_from_last(model)
        trained(lab, f"off-ramps, seed {seed}", model, data, [_like(second[0], 2)], loss=second[0].loss, seed=seed)
        full, before, kept = accuracy(bind(model, {"*": rules.Threshold(-1.0)}), data.test)[0], None, []
        for s in SWEEP:
            now = bind(model, {"*": rules.Threshold(s / math.log(classes))})
            here = layer(now, data.test.x)
            if s == 0:
                with torch.no_grad():
                    same.append(float((now(data.test.x) != stage1).any(1).sum()))
            back.append(0 if before is None else int((here > before).sum()))
            kept.append((full - accuracy(now, data.test)[0], float(here.mean()) / LAYERS, s))
            table.append((seed, s, kept[-1][1], full - kept[-1][0], full))
            before = here
        best = min((k for k in kept if k[1] <= 0.7), default=min(kept, key=lambda k: k[1]))
        lost.append(best[0])
        share.append(best[1])
        ratios.append(
            _seconds(bind(model, {"*": rules.Threshold(best[2] / math.log(classes))}), data.test.x[:150]) / best[1]
        )
        other = seeded(seed, lambda: built(words, classes))
        loss = Total({"exits": (1.0, MultiExit([1.0] * LAYERS))})
        trained(lab, f"together, seed {seed}", other, data, [adamw(EPOCHS)], loss=loss, seed=seed)
        joint.append(full - accuracy(bind(other, {"*": rules.Threshold(-1.0)}), data.test)[0])
    return [
        Claim("S = 0 says exactly what stage 1's model says", f"{sum(same):.0f} of {len(SEEDS) * len(data.test)} texts differ", "0", not any(same), same),
        Claim("a higher S never runs deeper", f"{sum(back)} texts", "0", not any(back), back),
        Claim("some S keeps accuracy at 70 % of the layers or less", f"{percent(lost)} points lost at {percent(share)} % of the layers", "<= 1 point",
              max(lost) <= 0.01 and max(share) <= 0.7, lost),
        Claim("one text at a time: share of the full model's time over the share of its layers", ", ".join(f"{r:.2f}" for r in ratios), "within 10 %",
              all(abs(r - 1) <= 0.1 for r in ratios), ratios, "processor time of 150 texts; the off-ramps' own time is in it"),
        Claim("two stages: the last layer is at least as good as where trunk and off-ramps learn together", f"{percent(joint)} points better", ">= 0, mean",
              sum(joint) >= 0, joint),
        Table("Mean depth as a share of the layers, accuracy, and accuracy at full depth", ("seed", "S, nats", "depth", "accuracy", "full"), table),
    ]  # fmt: skip


def _like(phase, epochs: int):
    """The ramps' phase at a rate that suits an encoder trained from scratch."""
    return replace(phase, epochs=epochs, lr=1e-3)


def _seconds(model: Exits, x: Tensor) -> float:
    """Time of the model over that of all its layers, one text at a time."""
    every, rows = plain(model), x.split(1)
    with torch.no_grad():
        calls = {"some": lambda: [model(r) for r in rows], "all": lambda: [every(r) for r in rows]}
        found = interleaved(calls, rounds=5, clock=time.thread_time)
    return found["some"].minimum / found["all"].minimum
