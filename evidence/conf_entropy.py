"""Entropy as a confidence: the same exits as the largest probability with two classes, others with ten, and a transformer's exits."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean

import torch
from _chains import differing, fashion_four
from _common import ALL_EXITS, always, fashion, faster, held, percent, phase, seeded, trained
from _texts import LAYERS, TOLD, adamw, news, transformer
from torch import Tensor

from pliant import tune
from pliant.data import Dataset, Split
from pliant.reproduce import Claim, Lab, Table
from pliant.scores import Entropy, MaxProbability
from pliant.study import accuracy, batches
from pliant.tune import HeldOut

EPOCHS, SEEDS = 6, (0, 1)
SHIRTS = (0, 6)  # T-shirt and shirt
DATA = (
    TOLD
    + "; entropy against the largest probability: first 4,000 training and 4,000 test images of Fashion-MNIST, and the shirts of these"
)


def only(part: Split, classes: tuple[int, int]) -> Split:
    """The rows of two classes, as 0 and 1."""
    chosen = (part.y == classes[0]) | (part.y == classes[1])
    return Split(part.x[chosen], (part.y[chosen] == classes[1]).long())


def shirts(data: Dataset) -> Dataset:
    return replace(data, train=only(data.train, SHIRTS), val=only(data.val, SHIRTS), test=only(data.test, SHIRTS))


def of_two(doubt: Tensor) -> Tensor:
    """Entropy over log 2 of two classes, the lesser of which has probability ``doubt``."""
    return -(torch.xlogy(doubt, doubt) + torch.xlogy(1 - doubt, 1 - doubt)) / math.log(2)


def unlike_with_two(logits: Tensor) -> int:
    """Rows of (rows, 2) logits for which entropy and the largest probability decide differently, at 99 matched thresholds."""
    doubt, entropy = MaxProbability()(logits), Entropy()(logits)
    levels = doubt.unique()
    below = levels[(torch.linspace(0.01, 0.99, 99) * (len(levels) - 1)).long()].double()
    above = levels[(torch.linspace(0.01, 0.99, 99) * (len(levels) - 1)).long() + 1].double()
    between = (below * above).sqrt()  # between two levels that occur, so that no row is at the threshold
    return sum(int(((doubt > t) != (entropy > of_two(t))).sum()) for t in between)


def unlike_with_ten(test: HeldOut) -> float:
    """Share of images that leave at another exit by entropy than by the largest probability, half of all leaving at each exit."""
    exits = []
    for score in (MaxProbability(), Entropy()):
        said = torch.stack([score(z) for z in test.logits[:-1]])
        exits.append(replace(test, scores=said).leaves(said.median(1).values))
    return (exits[0] != exits[1]).double().mean().item()


def run(lab: Lab) -> list[Claim | Table]:
    images, texts = fashion(lab, 4_000), news(lab)
    two, ten, counts, speed, lost, depth, rows = ([] for _ in range(7))
    for seed in SEEDS:
        pair = shirts(images)
        small = seeded(seed, lambda: fashion_four(classes=2))
        trained(lab, f"shirts, seed {seed}", small, pair, [phase(4)], seed=seed)
        two += [unlike_with_two(z) for z in held(small, pair)[1].logits]
        large = seeded(seed, fashion_four)
        trained(lab, f"ten classes, seed {seed}", large, images, [phase(3)], seed=seed)
        ten.append(unlike_with_ten(held(large, images)[1]))

        model = seeded(seed, lambda: transformer(texts))
        trained(lab, f"transformer, seed {seed}", model, texts, [adamw(EPOCHS)], loss=ALL_EXITS, seed=seed)
        tune(model, batches(texts.val), budget=0.4)
        counts += differing(model, texts.test.x[:256], sizes=(7, 32))
        speed.append(faster(always(model), model, texts.test.x[:512], batch=32, rounds=3))
        test = held(model, texts)[1]
        dense = test.correct[-1].double().mean().item()
        point = tune(model, batches(texts.val), budget=0.5)
        got, flops, _ = accuracy(model, texts.test)
        exits = test.leaves(torch.tensor(list(point.thresholds.values())))
        lost.append(dense - got)
        depth.append((exits.double().mean().item() + 1) / LAYERS)
        rows.append([f"seed {seed}", *test.correct.double().mean(1).tolist(), got, flops / float(test.flops[-1])])
    return [
        Claim("two classes: rows for which entropy and the largest probability decide differently, 99 matched thresholds at each exit",
              f"{sum(two)}", "0", not any(two), two),
        Claim("ten classes: images that leave at another exit, half of them leaving at each", f"{percent(ten)} %", ">= 1 %", min(ten) >= 0.01, ten),
        Claim("batches of 7 and 32 texts have the decisions of single texts", f"{sum(counts)} of 256 differ", "0", not any(counts), counts),
        Claim("and at a budget of 40 % are faster than the full transformer, batch 32", f"{min(speed):.2f}x (worst seed)", "> 1x", min(speed) > 1, speed),
        Claim("at half the mean depth accuracy is near full depth's", f"{percent(lost)} points lost", "<= 1 point",
              max(lost) <= 0.01 and max(depth) <= 0.55, lost, f"mean depth {percent(depth)} % of {LAYERS} layers, thresholds from held-out texts; "
              f"{mean(r[LAYERS] for r in rows):.3f} right at full depth: more depth hardly helps on this small part"),
        Table("Accuracy of the transformer's exits on test texts, and tuned for half the cost",
              ("run", *(f"exit {k + 1}" for k in range(LAYERS)), "tuned", "cost"), rows),
    ]  # fmt: skip
