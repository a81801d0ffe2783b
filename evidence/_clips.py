"""Made clips and texts of which only a part matters: NEEDLE, RAMP, EASYHARD, NUMBERS, SSTNEWS. Parts come from separate images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pliant
from pliant.data import Split, load
from pliant.losses import Total
from pliant.reproduce import Lab

torch.set_num_threads(1)


class Clips(NamedTuple):
    """Clips (R, T, ...), their classes, and what there is to be found out: where the event is, or how much noise there is."""

    x: Tensor
    y: Tensor
    truth: Tensor


Draw = Callable[[int, torch.Generator], Clips]
"""Fresh clips: how many rows, drawn with which generator."""


def images(name: str, part: str, lab: Lab, *, limit: int | None = None) -> Split:
    """A part of a set of images, between 0 and 1."""
    whole = load(name, lab.root, limit=limit)
    split = getattr(whole, part)
    low, high = whole.train.x.min(), whole.train.x.max()
    return Split((split.x - low) / (high - low), split.y)


def of(split: Split, classes: tuple[int, ...]) -> Split:
    """The images of these classes, numbered in their order."""
    at = torch.tensor([classes.index(y) if y in classes else -1 for y in split.y.tolist()])
    return Split(split.x[at >= 0], at[at >= 0])


def any_of(split: Split, shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images of ``split`` and their labels."""
    pick = torch.randint(len(split), shape, generator=g)
    return split.x[pick], split.y[pick]


def needle(targets: Split, others: Split, frames: int) -> Draw:
    """NEEDLE: one frame shows a target, at a random place; the truth is where."""

    def draw(rows: int, g: torch.Generator) -> Clips:
        x, (shown, y) = any_of(others, (rows, frames), g)[0], any_of(targets, (rows,), g)
        at = torch.randint(frames, (rows,), generator=g)
        x[torch.arange(rows), at] = shown
        return Clips(x, y, at)

    return draw


PIXELS, LENGTH, EVENT = 8, 64, 6


def gauge(distance: Tensor, g: torch.Generator) -> Tensor:
    """Eight noisy pixels with a bump where the signed distance (-1 to 1) to the event says."""
    at = (distance + 1) / 2 * (PIXELS - 1)
    bump = torch.exp(-(torch.arange(PIXELS) - at[..., None]).square() / 2)
    return bump + 0.05 * torch.randn(bump.shape, generator=g)


def ramp(split: Split, told: Callable[[Tensor, torch.Generator], Tensor]) -> Draw:
    """RAMP: 64 frames of digits 5 to 9, but 6 of one digit from 0 to 4 at a random place; a gauge row above each frame.

    ``told`` makes of the true signed distances those that gauges show. The truth is the event's first frame.
    """
    targets, others = of(split, (0, 1, 2, 3, 4)), of(split, (5, 6, 7, 8, 9))

    def draw(rows: int, g: torch.Generator) -> Clips:
        frames = any_of(others, (rows, LENGTH), g)[0]
        y = torch.randint(5, (rows,), generator=g)
        start = torch.randint(LENGTH - EVENT + 1, (rows,), generator=g)
        order, first = targets.y.argsort(), torch.bincount(targets.y).cumsum(0)
        below, count = first[y] - torch.bincount(targets.y)[y], torch.bincount(targets.y)[y]
        pick = below[:, None] + (torch.rand(rows, EVENT, generator=g) * count[:, None]).long()
        at = start[:, None] + torch.arange(EVENT)
        frames[torch.arange(rows)[:, None], at] = targets.x[order[pick]]
        distance = (start[:, None] + (EVENT - 1) / 2 - torch.arange(LENGTH)) / LENGTH
        rows_of_gauge = gauge(told(distance, g), g)[:, :, None, None]
        return Clips(torch.cat([rows_of_gauge, frames], 3), y, start)

    return draw


def truly(distance: Tensor, g: torch.Generator) -> Tensor:
    """Gauges that are right."""
    return distance


def anyhow(distance: Tensor, g: torch.Generator) -> Tensor:
    """Gauges that are random: the control."""
    return 2 * torch.rand(distance.shape, generator=g) - 1


def easyhard(split: Split, frames: int, levels: tuple[float, ...]) -> Draw:
    """EASYHARD: one digit under independent noise in every frame; the truth is the level, one for each clip."""

    def draw(rows: int, g: torch.Generator) -> Clips:
        x, y = any_of(split, (rows,), g)
        level = torch.tensor(levels)[torch.randint(len(levels), (rows,), generator=g)]
        noise = torch.randn(rows, frames, *x.shape[1:], generator=g)
        return Clips(x[:, None] + level[:, None, None, None, None] * noise, y, level)

    return draw


def numbers(length: int) -> Draw:
    """NUMBERS: the first number says which number is the label. Word n + 1 is number n; the truth is the first number."""

    def draw(rows: int, g: torch.Generator) -> Clips:
        x = torch.randint(length, (rows, length), generator=g)
        return Clips(x + 1, x.gather(1, x[:, :1])[:, 0], x[:, 0])

    return draw


def misled(draw: Draw) -> Draw:
    """The same with another first number than the one that counts."""

    def other(rows: int, g: torch.Generator) -> Clips:
        clips = draw(rows, g)
        x = clips.x.clone()
        x[:, 0] = torch.randint(1, x.shape[1] + 1, (rows,), generator=g)
        return clips._replace(x=x)

    return other


def sstnews(lab: Lab, part: str, *, around: tuple[int, int] = (8, 15)) -> tuple[Draw, int]:
    """SSTNEWS: a sentence of SST-2 (its sentiment is the label) among 8 to 15 openings of AG News articles; and how many words there are.

    The truth is where the sentence begins.
    """
    reviews, news = load("sst2", lab.root, max_length=24), load("ag_news", lab.root, max_length=20)
    words = {word: k for k, word in enumerate(dict.fromkeys((*reviews.vocabulary, *news.vocabulary)))}
    one, other = ([words[w] for w in data.vocabulary] for data in (reviews, news))
    sentences, filler = getattr(reviews, part), getattr(news, part)
    first, rest = torch.tensor(one)[sentences.x], torch.tensor(other)[filler.x]

    def draw(rows: int, g: torch.Generator) -> Clips:
        pick = torch.randint(len(first), (rows,), generator=g)
        texts, starts = [], []
        for r in range(rows):
            others = rest[
                torch.randint(
                    len(rest), (int(torch.randint(around[0], around[1] + 1, (1,), generator=g)),), generator=g
                )
            ]
            at = int(torch.randint(len(others) + 1, (1,), generator=g))
            before, behind = (part[part != 0] for part in (others[:at].flatten(), others[at:].flatten()))
            sentence = first[pick[r]]
            texts.append(torch.cat([before, sentence[sentence != 0], behind]))
            starts.append(len(before))
        return Clips(nn.utils.rnn.pad_sequence(texts, batch_first=True), sentences.y[pick], torch.tensor(starts))

    return draw, len(words)


def train(
    lab: Lab, what: str, model: nn.Module, draw: Draw, terms: Total, *, steps: int, rows: int = 128, lr: float = 1e-3, seed: int = 0,
    samples: int = 1,
) -> Any:  # fmt: skip
    """``model`` after ``steps`` of Adam, the rate falling to 0 by a cosine, each on fresh clips, ``samples`` times each."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    used = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(used, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recorder = pliant.record(model.train())
    for step in range(steps):
        clips = draw(rows, g)
        x, target = clips.x.repeat(samples, *[1] * (clips.x.ndim - 1)), clips.y.repeat(samples)
        y, trace = recorder(x)
        loss = torch.stack(list(terms(y, trace, target, step / steps).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(used, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(steps // 10, 1) == 0:
            lab.progress(what, step, steps)
    return model.eval()


def bigger(split: Split, side: int) -> Split:
    """Images with a dark border, ``side`` pixels wide."""
    return Split(F.pad(split.x, [(side - split.x.shape[-1]) // 2] * 4), split.y)
