"""LSTM-Jump: a number that says where to read, news read in part, and a sentence to be found among others."""

from __future__ import annotations

import time
from typing import Any

import torch
from _clips import Clips, Draw, misled, numbers, sstnews, train
from _common import percent
from torch import Tensor, nn

from pliant import bind, create_model, losses, record, rules
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.data import Split, load
from pliant.losses import Total
from pliant.reproduce import Claim, Lab, Table

torch.set_num_threads(1)
SEEDS, SPAN, FURTHEST, TESTED = (0,), 11, 20, 1000
STEPS = {20: 1000, 100: 3000, "news": 800, "sentence": 400, "course": 300}
COURSE = ((0, 1), (1, 3), (3, 6), (8, 15))
DATA = (
    "made: NUMBERS of 20 and 100; AG News, small part: 5,130 training and 1,520 test articles, first 64 words; SSTNEWS: a sentence of SST-2 (6,920 for "
    "training) among 8 to 15 openings of AG News articles, 20 words each"
)


def reward(y: Tensor, trace: Any, target: Tensor) -> Tensor:
    """1 for a right answer, -1 for a wrong one."""
    return 2 * losses.right(y, target) - 1


TASK = {"task": (1.0, losses.CrossEntropy())}


def terms(policy: float) -> Total:
    """The task, REINFORCE with a learned linear baseline, and the baseline."""
    reinforce = losses.Reinforce(reward, baseline=losses.learned)
    return Total(TASK | {"policy": (policy, reinforce), "baseline": (1.0, losses.ValueLoss(reward))})


class Ahead(rules.Rule):
    """Always as far on."""

    reads_scores = False
    spends = False

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def forward(self, scores: Tensor) -> Outcome:
        return Outcome(torch.zeros_like(scores).index_fill(1, torch.tensor([self.words - 1]), 1.0))


@torch.no_grad()
def tested(model: nn.Module, clips: Clips) -> tuple[float, float, list[Tensor]]:
    """Accuracy, words read for each text, and the jumps of every visit."""
    y, trace = record(model)(clips.x)
    length, last, read, jumps = (clips.x != 0).sum(1), torch.zeros_like(clips.y), torch.zeros_like(clips.y), []
    span = model.stages[0].reader.span  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    start, here = torch.zeros_like(clips.y), torch.arange(len(clips.y))
    for k in range(len(model.stages)):  # pyright: ignore[reportArgumentType]
        if k:
            if f"stages.{k}.site" not in trace:
                break
            d = trace[f"stages.{k}.site"][0]
            here = torch.arange(len(clips.y)) if d.rows is None else d.rows
            jumps.append(d.value.argmax(1) + 1)
            start = start.index_copy(0, here, last[here] + jumps[-1])
        seen = (length - start).clamp(0, span)[here]
        read = read.index_add(0, here, seen)
        last = last.index_copy(0, here, start[here] + span - 1)
    return float((y.argmax(1) == clips.y).double().mean()), float(read.double().mean()), jumps


def pointed(lab: Lab, length: int, seed: int, draw: Draw) -> tuple[float, float]:
    """Accuracy on NUMBERS, and words read."""
    torch.manual_seed(seed)
    model = create_model(
        "lstm_jump", num_classes=length, words=length + 1, embedding=64, hidden=64, span=1, most=length - 1, jumps=1
    )
    train(lab, f"{length} numbers", model, draw, terms(1.0), steps=STEPS[length], rows=256, lr=3e-3, seed=seed)
    return tested(model, draw(4000, torch.Generator().manual_seed(99)))[:2]


def articles(split: Split) -> Draw:
    """Articles, four words of ten unknown."""

    def draw(rows: int, g: torch.Generator) -> Clips:
        pick = torch.randint(len(split), (rows,), generator=g)
        x = split.x[pick]
        x = torch.where((torch.rand(x.shape, generator=g) < 0.4) & (x != 0), 1, x)
        return Clips(x[:, : int((x != 0).sum(1).max())], split.y[pick], pick)

    return draw


class Whole(nn.Module):
    """The same layers in one go, for one text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed, self.lstm, self.linear = (
            model.stages[0].reader.embed,
            model.stages[0].reader.lstm,
            model.heads[0].linear,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(self.embed(x))[0][:, -1])


def news(lab: Lab, seed: int) -> dict[str, float]:
    """AG News: accuracy of all and of some words, the share read, and how much faster one text at a time is."""
    data = load("ag_news", lab.root, max_length=64)
    models: dict[str, Any] = {}
    kinds = {"whole": {"span": 64, "most": 1, "jumps": 0}, "jumping": {"span": SPAN, "most": FURTHEST, "jumps": 1}}
    for name, kwargs in kinds.items():
        torch.manual_seed(seed)
        model: Any = create_model(
            "lstm_jump", num_classes=4, words=len(data.vocabulary), embedding=64, hidden=128, **kwargs
        )
        nn.init.normal_(model.stages[0].reader.embed.weight, std=0.3)
        loss = terms(0.05) if name == "jumping" else Total(TASK)
        models[name] = train(
            lab, f"AG News, {name}", model, articles(data.train), loss, steps=STEPS["news"], lr=3e-3, seed=seed
        )
    test = Clips(data.test.x, data.test.y, data.test.y)
    whole, jumping = (tested(models[name], test) for name in kinds)
    texts = [x[:, : int((x != 0).sum())] for x in data.test.x[:100].split(1)]
    full = Whole(models["whole"])
    with torch.no_grad():
        torch.testing.assert_close(full(texts[0]), models["whole"](texts[0]), rtol=1e-4, atol=1e-4)
        calls = {"whole": lambda: [full(x) for x in texts], "jumping": lambda: [models["jumping"](x) for x in texts]}
        took = {name: t.minimum for name, t in interleaved(calls, rounds=7, clock=time.thread_time).items()}
    return {
        "whole": whole[0],
        "jumping": jumping[0],
        "read": jumping[1] / whole[1],
        "faster": took["whole"] / took["jumping"],
    }


def found(lab: Lab, seed: int) -> tuple[list[tuple[str, float, float]], int]:
    """SSTNEWS: accuracy and words read by a policy and by always jumping its mean distance, from the same start; that distance."""
    sentences, words = sstnews(lab, "train", around=(0, 0))
    torch.manual_seed(seed)
    model: Any = create_model(
        "lstm_jump", num_classes=2, words=words, embedding=64, hidden=96, span=10, most=40, jumps=6
    )
    nn.init.normal_(model.stages[0].reader.embed.weight, std=0.3)
    reading = bind(model, {"sites.*": rules.Always()})
    train(
        lab,
        "sentences alone",
        bind(reading, {"stages.*": Ahead(1)}),
        sentences,
        Total(TASK),
        steps=STEPS["sentence"],
        rows=64,
        lr=2e-3,
    )
    start = {name: t.clone() for name, t in model.state_dict().items()}
    clips = sstnews(lab, "test")[0](TESTED, torch.Generator().manual_seed(99))
    rows: list[tuple[str, float, float]] = []
    mean = 0
    for name in ("the policy", "its mean distance"):
        model.load_state_dict(start)
        taught = reading if name == "the policy" else bind(reading, {"stages.*": Ahead(mean)})
        loss = terms(0.3) if name == "the policy" else Total(TASK)
        for k, around in enumerate(COURSE):
            draw = sstnews(lab, "train", around=around)[0]
            train(lab, f"SSTNEWS, {name}", taught, draw, loss, steps=STEPS["course"], rows=64, lr=1.5e-3, seed=seed + k)
        right, read, jumps = tested(taught.eval(), clips)
        rows.append((name, right, read))
        mean = round(float(torch.cat(jumps).double().mean()))
    return rows, mean


def run(lab: Lab) -> list[Claim | Table]:
    short, long, lost = (
        [pointed(lab, n, s, d) for s in SEEDS]
        for n, d in ((20, numbers(20)), (100, numbers(100)), (20, misled(numbers(20))))
    )
    by_news = [news(lab, s) for s in SEEDS]
    drop, read, faster = (
        [n["whole"] - n["jumping"] for n in by_news],
        [n["read"] for n in by_news],
        [n["faster"] for n in by_news],
    )
    both = [found(lab, s) for s in SEEDS]
    gain = [rows[0][1] - rows[1][1] for rows, _ in both]
    right = [[r for r, _ in kind] for kind in (short, long, lost)]
    words = [w for kind in (short, long) for _, w in kind]
    return [
        Claim("NUMBERS of 20: accuracy", f"{percent(right[0])} %", ">= 98 %", min(right[0]) >= 0.98, right[0]),
        Claim("NUMBERS of 100: accuracy", f"{percent(right[1])} %", ">= 98 %", min(right[1]) >= 0.98, right[1]),
        Claim("with two numbers read of each sequence", f"{max(words):.2f} numbers", "<= 2", max(words) <= 2, words),
        Claim("with another first number, accuracy on 20 is chance", f"{percent(right[2])} %", "about 1/T, 5 %, and three standard errors",
              max(right[2]) <= 0.0603, right[2],
              "1/T counts the place alone: one number read anywhere is the label with 1/20, by its place, and with 19/400 by being equal"),
        Claim("that is, what one blind look gives, 1/20 + 19/400", f"{percent(right[2])} %", "9.75 %, and three standard errors",
              max(right[2]) <= 0.112, right[2]),
        Claim("AG News: below the LSTM that reads all words by", f"{percent(drop)} points", "<= 1.5 points", max(drop) <= 0.015, drop,
              f"{percent([n['whole'] for n in by_news])} % with all words, {percent([n['jumping'] for n in by_news])} % with two windows of {SPAN}. Tried: 64"
              " texts a step and no unknown words, 4.6 to 6.1 points; 1,200 steps, 3.3 points"),
        Claim("with a share of the words read", f"{percent(read)} %", "<= 50 %", max(read) <= 0.5, read),
        Claim("one text at a time, against the fused LSTM on all words", ", ".join(f"{f:.2f}x" for f in faster), ">= 1.6x", min(faster) >= 1.6, faster,
              "oneDNN's fused layer packs the weights anew in every call, which at this width costs as much as twenty words; two windows are two calls"),
        Claim("SSTNEWS: a policy is better than always jumping its mean distance", f"{percent(gain)} points", ">= 1 point", min(gain) >= 0.01, gain,
              "both begin with an LSTM that knows sentences alone and are then given more and more around them; with no such course neither got beyond chance"),
        Table("SSTNEWS", ("jumps by", "accuracy", "words read"), both[0][0]),
    ]  # fmt: skip
