"""SCSampler: a light network finds the clip that matters, and learns which clips the heavy one can't read."""

from __future__ import annotations

import time
from typing import Any

import torch
from _clips import Clips, Draw, any_of, bigger, images, needle, of
from _common import percent, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import bind, create_model, plain, record, rules
from pliant.cost import interleaved
from pliant.data import Split
from pliant.losses import saliency_ranking
from pliant.reproduce import Claim, Lab, Table

torch.set_num_threads(1)
SEEDS, FRAMES, KEEP, ROWS, TESTED = (0,), 32, 4, 12_000, 600
TARGETS, OTHERS = (1, 3, 5, 7, 9), (0, 2, 4, 6, 8)
KNOWN, BLIND = (1, 3, 8), (5, 7, 9)  # two appearances of three classes; the rest are distractors
DATA = (
    f"NEEDLE of Fashion-MNIST (first {ROWS:,} training images): {FRAMES} images of 32 pixels, one of which is a trouser, dress, sandal, sneaker or "
    f"boot, the others tops and bags; {TESTED} test clips of test images. Thumbnails of 8 pixels"
)


def net(classes: int) -> Any:
    """A ResNet-8, and a sampler at a thirtieth of its price."""
    return create_model(
        "scsampler", num_classes=classes, in_chans=1, keep=KEEP, depth=8, widths=(8, 16, 32), light=(16, 32)
    )


def steps_of(parameters: Any, steps: int, lr: float) -> Any:
    optimizer = torch.optim.Adam(parameters, lr)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def heavy(lab: Lab, network: nn.Module, split: Split, *, seed: int, epochs: int = 3) -> None:
    """Train the heavy network on single images, and freeze it."""
    g = torch.Generator().manual_seed(seed)
    count = len(split) // 128
    optimizer, schedule = steps_of(network.parameters(), epochs * count, 3e-3)
    for epoch in range(epochs):
        lab.progress("heavy network", epoch, epochs)
        for index in torch.randperm(len(split), generator=g)[: count * 128].split(128):
            loss = F.cross_entropy(network.train()(split.x[index]), split.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)


def classifying(model: Any, clips: Clips) -> Tensor:
    """The cross-entropy of the sampler on every clip of a video, by the video's label."""
    logits = model.site.scorer.logits(clips.x)
    return F.cross_entropy(logits.flatten(0, 1), clips.y.repeat_interleave(logits.shape[1]))


def ranking(model: Any, clips: Clips) -> Tensor:
    """The order of the heavy network's scores, both at the true class."""
    with torch.no_grad():
        worth = model.network(clips.x.flatten(0, 1)).softmax(1).unflatten(0, clips.x.shape[:2])
    at = clips.y[:, None, None].expand(-1, clips.x.shape[1], 1)
    saliency = model.site.scorer.logits(clips.x).softmax(-1)
    return saliency_ranking(saliency.gather(2, at)[..., 0], worth.gather(2, at)[..., 0], margin=0.2)


def sampler(lab: Lab, model: Any, draw: Draw, loss: Any, *, seed: int, steps: int = 500, rows: int = 32) -> Any:
    """Train the sampler alone."""
    g, scorer = torch.Generator().manual_seed(seed), model.site.scorer.train()
    optimizer, schedule = steps_of(scorer.parameters(), steps, 3e-3)
    for step in range(steps):
        if step % 50 == 0:
            lab.progress("sampler", step, steps)
        found = loss(model, draw(rows, g))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def tested(model: Any, clips: Clips) -> tuple[float, Tensor, float]:
    """Accuracy, what was chosen (R, T), and the share of the dense FLOPs."""
    right, chosen, spent, dense = [], [], 0, 0
    for x, y in zip(clips.x.split(50), clips.y.split(50), strict=True):
        logits, trace = record(model)(x)
        right.append(logits.argmax(1) == y)
        chosen.append(trace.dense("site"))
        spent, dense = spent + int(trace.flops.sum()), dense + int(trace.dense_flops.sum())
    return float(torch.cat(right).double().mean()), torch.cat(chosen), spent / dense


def split_of(lab: Lab, part: str) -> Split:
    return bigger(images("fashion_mnist", part, lab, limit=ROWS), 32)


def found(lab: Lab, seed: int) -> tuple[Any, list[float], Clips]:
    """A trained pair; how often the needle is among the chosen, the accuracy on those and on all, and the price."""
    train, test = (split_of(lab, part) for part in ("train", "test"))
    model: Any = seeded(seed, lambda: net(5))
    heavy(lab, model.network, of(train, TARGETS), seed=seed)
    sampler(lab, model, needle(of(train, TARGETS), of(train, OTHERS), FRAMES), classifying, seed=seed)
    clips = needle(of(test, TARGETS), of(test, OTHERS), FRAMES)(TESTED, torch.Generator().manual_seed(99))
    right, chosen, share = tested(model, clips)
    hit = float(chosen[torch.arange(TESTED), clips.truth].mean())
    return model, [hit, right, tested(plain_of(model), clips)[0], share], clips


def plain_of(model: Any) -> Any:
    """All clips by the heavy network."""
    return bind(model, {"*": rules.Always()})


def biased(split: Split) -> Draw:
    """Sixteen images, two each of two appearances of the class, one of which the heavy network can't read; the truth is where it can."""
    known, blind, others = of(split, KNOWN), of(split, BLIND), of(split, (0, 2, 4, 6))

    def draw(rows: int, g: torch.Generator) -> Clips:
        x, y = any_of(others, (rows, 16), g)[0], torch.randint(3, (rows,), generator=g)
        order = torch.rand(rows, 16, generator=g).argsort(1)
        for k, pool in enumerate((known, known, blind, blind)):
            members = [(pool.y == c).nonzero().squeeze(1) for c in range(3)]
            pick = torch.stack([m[torch.randint(len(m), (rows,), generator=g)] for m in members], 1)
            x[torch.arange(rows), order[:, k]] = pool.x[pick[torch.arange(rows), y]]
        return Clips(x, y, order[:, :2])

    return draw


def blind_to(split: Split, g: torch.Generator) -> Split:
    """What a blind network is trained on: all but one appearance of each class has random labels."""
    known, rest = of(split, KNOWN), of(split, tuple(c for c in range(10) if c not in KNOWN))
    return Split(torch.cat([known.x, rest.x]), torch.cat([known.y, torch.randint(3, (len(rest),), generator=g)]))


def ranked(lab: Lab, seed: int) -> dict[str, tuple[float, float]]:
    """Of a blind heavy network: accuracy on the two chosen clips, and the share of them it can't read, by how the sampler was trained."""
    train, test = (split_of(lab, part) for part in ("train", "test"))
    clips = biased(test)(TESTED, torch.Generator().manual_seed(99))
    model: Any = seeded(seed, lambda: net(3))
    heavy(lab, model.network, blind_to(train, torch.Generator().manual_seed(seed)), seed=seed)
    state, results = {k: v.clone() for k, v in model.state_dict().items()}, {}
    for name, loss in (("classes", classifying), ("ranks", ranking)):
        model.load_state_dict(state)
        sampler(lab, model, biased(train), loss, seed=seed, steps=300)
        right, chosen, _ = tested(bind(model, {"*": rules.TopK(2)}), clips)
        seen = chosen.gather(1, clips.truth).sum(1) / 2
        results[name] = (right, 1 - float(seen.mean()))
    return results


@torch.no_grad()
def timed(model: Any, clips: Clips) -> list[tuple[int, float, float]]:
    """For several K: seconds measured, and T times the sampler's plus K times the heavy network's, for batches of 32 videos."""
    x = clips.x[:32]
    one = {"S": lambda: model.site.scorer(x)} | {
        f"F{k}": (lambda k=k: model.network(x[:, :k].flatten(0, 1))) for k in (8,)
    }
    calls = one | {f"K{k}": (lambda k=k, m=bind(model, {"*": rules.TopK(k)}): m(x)) for k in (2, 4, 8, 16)}
    took = {name: t.minimum for name, t in interleaved(calls, rounds=9, clock=time.thread_time).items()}
    return [(k, 1e3 * took[f"K{k}"], 1e3 * (took["S"] + k / 8 * took["F8"])) for k in (2, 4, 8, 16)]


def run(lab: Lab) -> list[Claim | Table]:
    each = [found(lab, seed) for seed in SEEDS]
    hits, right, all_of, share = (list(values) for values in zip(*(figures for _, figures, _ in each), strict=True))
    by_rank = [ranked(lab, seed) for seed in SEEDS]
    gain = [r["ranks"][0] - r["classes"][0] for r in by_rank]
    unread = [[r[name][1] for r in by_rank] for name in ("classes", "ranks")]
    model, _, clips = each[0]
    times = timed(model, clips)
    off = [abs(a / b - 1) for _, a, b in times]
    small, large = (record(m)(clips.x[:1])[1].flops.item() for m in (bind(model, {"*": rules.Never()}), plain(model)))
    scored = record(model)(clips.x[:1])[1].flops.item() - KEEP * large / FRAMES
    assert small == 0
    return [
        Claim(f"NEEDLE: the needle is among the {KEEP} of {FRAMES} clips that the sampler chooses (blind: {100 * KEEP / FRAMES:.1f} %)",
              f"{percent(hits)} %", ">= 80 %", min(hits) >= 0.8, hits,
              f"the sampler costs 1/{large / scored:.0f} of the heavy network"),
        Claim(f"accuracy on those {KEEP} is at least that on the average of all {FRAMES}", f"{percent(right)} % against {percent(all_of)} %", ">= 0 points",
              all(a >= b for a, b in zip(right, all_of, strict=True)), [*right, *all_of]),
        Claim("at a share of its FLOPs, the sampler's included", f"{percent(share)} %", "<= 20 %", max(share) <= 0.2, share),
        Claim("a heavy network that can't read one of two appearances: a sampler trained by ranks beats one trained by classes",
              f"{percent(gain)} points", "> 0 points", min(gain) > 0, gain,
              f"of the two chosen clips it can't read {percent(unread[0])} % (classes) and {percent(unread[1])} % (ranks); two of sixteen clips show each"
              " appearance, and all that the heavy network was trained on but one appearance of each class had random labels"),
        Claim("measured time is T t(S) + K t(F), for K of 2, 4, 8 and 16 after training", f"{percent(off)} % off", "<= 15 %", max(off) <= 0.15, off),
        Table("Milliseconds for 32 videos", ("K", "measured", "T t(S) + K t(F)"), times),
    ]  # fmt: skip
