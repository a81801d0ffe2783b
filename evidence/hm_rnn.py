"""Hierarchical multiscale RNN on the characters of AG News: where segments end, how often levels run, exact copies."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from _common import seeded
from _sequences import SYMBOLS, Sequences, characters
from torch import Tensor

import pliant
from pliant import create_model
from pliant.estimators import Ramp
from pliant.losses import CrossEntropy, Total
from pliant.reproduce import Claim, Lab
from pliant.train import Fit, Phase, fit

LENGTH, HIDDEN, BATCH, CHARACTERS, TEST, EPOCHS, BIAS = 32, 64, 32, 307_200, 40_000, 3, -0.3
SEEDS = (0, 1, 2)
DATA = f"AG News, small part: the first {CHARACTERS:,} characters of its training articles in rows of {LENGTH}, {TEST:,} of its test articles"
NOTE = f"3 levels of {HIDDEN}, {EPOCHS} epochs of {CHARACTERS // LENGTH // BATCH} steps, slope 1 to 5, boundary bias {BIAS} at the start"


def train(lab: Lab, data: Sequences, seed: int) -> Any:
    model = seeded(
        seed,
        lambda: create_model("hm_rnn", num_classes=SYMBOLS, hidden=(HIDDEN, HIDDEN, HIDDEN), embedding=32, bias=BIAS),
    )
    done, slope = count(1), Ramp(rate=4 / max(1, EPOCHS - 1))
    plan = Phase(
        "train", epochs=EPOCHS, optimizer="adam", lr=5e-3, clip=1.0, schedule="cosine", anneal={"*.slope": slope}
    )
    options = Fit(seed=seed, batch_size=BATCH, on_epoch=lambda _: lab.progress(f"seed {seed}", next(done), EPOCHS))
    fit(model, data, Total({"task": (1.0, CrossEntropy())}), [plan], options=options)
    return model.eval()


def inside(text: Sequences) -> Tensor:
    """Where a letter stands before a letter."""
    return (text.x >= 1) & (text.x <= 26) & (text.y >= 1) & (text.y <= 26)


@torch.no_grad()
def ends(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor], float]:
    """Logits, whether each level but the top ended a segment at each step, (rows, T), and the share of the dense FLOPs."""
    y, trace = pliant.record(model)(x)
    z = [torch.stack([d.dense(trace.batch)[:, 0] for d in trace[f"loop.sites.{n}"]], 1) for n in range(2)]
    return y, z, float(trace.flops.sum() / trace.dense_flops.sum())


@torch.no_grad()
def copies(model: Any, x: Tensor) -> tuple[bool, bool, float]:
    """Whether copied states are the same bits, whether copying calls no level, and how far both forms are apart."""
    calls = [0, 0, 0]
    hooks = [
        level.register_forward_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
        for n, level in enumerate(model.loop.levels)
    ]
    exact = free = True
    embedded = model.embed(x)
    for row in embedded.split(1):
        calls[:] = [0, 0, 0]
        states = model.loop(row)[0].split(HIDDEN, 1)
        ran = calls[:]
        _, trace = pliant.record(model.loop)(row)
        z = [torch.stack([d.dense(1)[0, 0] for d in trace[f"sites.{n}"]]) for n in range(2)]
        before = F.pad(z[1], (1, 0))[:-1]
        runs = [torch.ones_like(z[0]), ((z[0] + before) > 0).float(), z[1]]
        free = free and ran == [int(r.sum()) for r in runs]
        for state, r in zip(states, runs, strict=True):
            earlier = F.pad(state, (0, 0, 1, 0))[:-1]
            exact = exact and torch.equal(state[r == 0], earlier[r == 0])
    for hook in hooks:
        hook.remove()
    apart = float((model(x) - pliant.masked(model)(x)).abs().max())
    return exact, free, apart


def run(lab: Lab) -> list[Claim]:
    data, test = characters(lab, "train", CHARACTERS, LENGTH), characters(lab, "test", TEST, LENGTH)
    space, letter = test.x == 0, inside(test)
    gaps, second, third, bits, spent, exact, free, apart = [], [], [], [], [], [], [], []
    for seed in SEEDS:
        model = train(lab, data, seed)
        y, (z1, z2), share = ends(model, test.x)
        gaps.append(abs(float(z1[space].mean() - z1[letter].mean())))
        before = F.pad(z2, (1, 0))[:, :-1]
        second.append(float(((z1 + before) > 0).double().mean()))
        third.append(float(z2.double().mean()))
        bits.append(float(F.cross_entropy(y, test.y)) / math.log(2))
        spent.append(share)
        one = copies(model, test.x[:20])
        exact.append(one[0])
        free.append(one[1])
        apart.append(one[2])
    falls = all(c <= b and c < 1 for b, c in zip(second, third, strict=True))
    return [
        Claim("|P(z1 = 1 | space) - P(z1 = 1 | inside a word)|, no boundary told", said(gaps), ">= 0.3 in every seed", min(gaps) >= 0.3, gaps, NOTE),
        Claim("update rate of level 2", said(second), "<= 0.7", max(second) <= 0.7, second, NOTE),
        Claim("update rate of level 3", said(third), "<= that of level 2, and < 1", falls, third,
              f"no rate term; the boundary logits start at a bias of {BIAS}"),
        Claim("a copied state is the same bits", "yes" if all(exact) else "no", "yes", all(exact)),
        Claim("and no level is called for it", "yes" if all(free) else "no", "yes", all(free)),
        Claim("ragged run against masked", f"{max(apart):.1e} apart", "<= 1e-5", max(apart) <= 1e-5, apart),
        Claim("bits per character on held-out text", said(bits), "reported", True, bits),
        Claim("share of the dense FLOPs", said(spent), "reported", True, spent),
    ]  # fmt: skip


def said(values: list[float]) -> str:
    return ", ".join(f"{v:.3f}" for v in values)
