"""Cursors against a loop over rows and visits that anyone can read: where each goes, what it reads, what is never fetched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
import pliant.systems.temporal.adaframe
from pliant import Decision, PliantError, Site, Trace, losses, rules
from pliant.data import Decode
from pliant.estimators import Categorical
from pliant.execute import Cursor, Exits, Jump, Move, Open, Piece, Place, Reader, Reading, Say, Store
from pliant.systems.clips import Frames, Nothing

FORMS: dict[str, Callable[[nn.Module], Any]] = {"masked": pliant.masked, "gathered": pliant.gathered}
MOVES: dict[str, Move] = {"jump": Jump(3), "place": Place()}
WIDTH, VISITS = 3, 3


class Adder(Reader):
    """Encodes every element and adds it to the memory, half forgotten; remembers how many it encoded (only for these tests)."""

    def __init__(self, span: int) -> None:
        super().__init__()
        self.span = span
        self.encoder = nn.Linear(2, WIDTH)
        self.encoded: list[int] = []

    def start(self, x: Tensor) -> Any:
        return (x.new_zeros(x.shape[0], WIDTH),)

    def lengths(self, x: Tensor) -> Tensor:
        return (x[..., 0] != 0).sum(1)

    def forward(self, piece: Piece, memory: Any) -> Any:
        self.encoded.append(len(piece.elements))
        (total,) = memory
        for k in range(self.span):
            total = torch.where((piece.there > k)[:, None], total / 2 + self.encoder(piece.elements[:, k]), total)
        return (total,)


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2)

    def forward(self, reading: Reading) -> Tensor:
        return super().forward(reading.memory[0])


def net(kind: str, span: int) -> Exits:
    torch.manual_seed(0)
    move, reader, head = MOVES[kind], Adder(span), Head()
    stages = [
        Open(reader, at=0.25),
        *(Cursor(Site(nn.Identity(), rules.Never(), shape=move.shape), move, reader) for _ in range(VISITS - 1)),
    ]
    stops = [Site(nn.Identity(), rules.Never()) for _ in range(VISITS - 1)]
    return Exits(stages, [head] * VISITS, stops, view=Say()).eval()


def inputs(rows: int, lengths: list[int]) -> Tensor:
    """Sequences of up to nine elements; what isn't there is 0."""
    x = torch.randn(rows, 9, 2, generator=torch.Generator().manual_seed(1)) + 5
    for r, length in enumerate(lengths):
        x[r, length:] = 0
    return x


def alone(model: Any, x: Tensor, values: Tensor, on: Tensor, kind: str) -> Tensor:
    """Every row by itself: go, read what exists from there on, and stop where the exit says so."""
    reader: Any = model.stages[0].reader
    out = torch.zeros(len(x), 2)
    for r in range(len(x)):
        sequence = [element for element in x[r] if element[0] != 0]
        at, memory = round(0.25 * (len(sequence) - 1)), torch.zeros(WIDTH)
        for visit in range(VISITS):
            for element in sequence[at : at + reader.span]:
                memory = memory / 2 + reader.encoder(element)
            if visit == VISITS - 1 or on[r, visit] == 0:
                break
            last, value = at + reader.span - 1, values[r, visit]
            if kind == "place":
                at = int((value * (len(sequence) - 1)).round())
            else:
                ones = [k for k in range(3) if value[k] > 0]
                at = last + 1 + (ones[0] if ones else 2)
        out[r] = nn.functional.linear(memory, model.heads[0].weight, model.heads[0].bias)
    return out


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Tensor, Tensor, list[int]]:
    rows, shape = draw(st.sampled_from([0, 1, 2, 5])), MOVES[kind].shape
    count = rows * (VISITS - 1)
    numbers = st.sampled_from([0.0, 1.0] if shape else [0.0, 0.2, 0.6, 1.0])
    each = 3 if shape else 1
    values = torch.tensor(draw(st.lists(numbers, min_size=count * each, max_size=count * each)))
    every = st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count)
    on = torch.tensor(draw(st.one_of(every, st.just([0.0] * count), st.just([1.0] * count))))
    lengths = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    return values.reshape(rows, VISITS - 1, *shape), on.reshape(rows, VISITS - 1), lengths


def forced(model: Exits, values: Tensor, on: Tensor) -> Any:
    visits = {f"stages.{k + 1}.site": (Decision(values[:, k], weight=values.ndim == 2),) for k in range(VISITS - 1)}
    visits |= {f"sites.{k}": (Decision(on[:, k]),) for k in range(VISITS - 1)}
    return pliant.bind(model, {"*": rules.Given(Trace(visits, (), (), len(values)))})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("kind", MOVES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_cursors_row_by_row(form: str, span: int, kind: str, data: st.DataObject) -> None:
    values, on, lengths = data.draw(cases(kind))
    model, x = net(kind, span), inputs(len(values), lengths)
    got = FORMS[form](forced(model, values, on))(x)
    torch.testing.assert_close(got, alone(model, x, values, on, kind), rtol=1e-5, atol=1e-5)


def test_a_frame_that_is_not_visited_is_neither_decoded_nor_encoded() -> None:
    """Rows that stopped leave, and of the others one frame a visit is fetched: everything else may be broken."""
    x, on = inputs(3, [9, 9, 9]), torch.tensor([[1.0, 1], [1, 0], [0, 0]])
    values = torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, 1.0]])
    model = forced(net("place", 1), values, on)
    visited = {0: [2, 0, 8], 1: [2, 4], 2: [2]}
    broken = torch.full_like(x, float("nan"))
    broken[..., 0] = 1.0  # still there
    for row, frames in visited.items():
        broken[row, frames] = x[row, frames]
    torch.testing.assert_close(model(broken), model(x))
    reader: Any = model.stages[0].reader
    assert reader.encoded == [3, 2, 1] * 2  # six frames of twenty-seven, in each of the two calls
    fetched: list[int] = []

    class Lazy(Store):
        def fetch(self, row: Tensor, index: Tensor) -> Tensor:
            fetched.extend((row[:, None] * 9 + index).flatten().tolist())
            return super().fetch(row, index)

    rows, nine = torch.arange(3), torch.full((3,), 9)
    reading = reader.visit(Reading(reader.start(x), rows, nine, rows, Lazy(x)), torch.tensor([2, 0, 8]))
    assert fetched == [2, 9, 26]
    assert reading.at.tolist() == [2, 0, 8]


def test_clips_stay_bytes_until_somebody_looks() -> None:
    decoded: list[int] = []
    decode = Decode([0.5], [0.25])
    decode.register_forward_hook(lambda module, args, out: decoded.append(len(out)))
    clip = torch.randint(0, 256, (2, 50, 1, 4, 4), dtype=torch.uint8)
    frames = Frames(nn.Sequential(decode, nn.Flatten()), 16, Nothing(), hidden=5)
    model = pliant.systems.temporal.adaframe.glancing(
        frames, 3, hidden=5, steps=3, std=0.1, patience=1, margin=9.0
    ).eval()
    float_frames = copy.deepcopy(model)
    readers: Any = [stage.reader for stage in float_frames.stages]
    for reader in readers:
        reader.encoder = nn.Flatten()
    torch.testing.assert_close(model(clip), float_frames((clip / 255 - 0.5) / 0.25), rtol=1e-5, atol=1e-6)
    assert decoded == [2, 2, 2]  # six frames of a hundred
    with pytest.raises(PliantError, match=r"frames of torch.float32; expected torch.uint8"):
        decode(torch.zeros(1, 1, 2, 2))


def by_hand(model: Any, text: list[int], moves: list[int]) -> Tensor:
    """LSTM-Jump on one text, word by word through the gates' formulas; moves are jumps, 0 stops."""
    words = model.stages[0].reader
    lstm, hidden = words.lstm, words.lstm.hidden_size
    h, c, at = torch.zeros(hidden), torch.zeros(hidden), 0
    for move in [*moves, 0]:
        for word in text[at : at + words.span]:
            gates = lstm.weight_ih_l0 @ words.embed.weight[word] + lstm.bias_ih_l0
            i, f, g, o = (gates + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        at = at + words.span - 1 + move
        if move == 0:
            break
    return model.heads[0].linear(h)


def test_lstm_jump_word_by_word() -> None:
    torch.manual_seed(0)
    model = pliant.create_model("lstm_jump", num_classes=3, words=20, embedding=4, hidden=5, span=3, most=4, jumps=3)
    model.eval()
    texts = [[5, 3, 9, 1, 2, 8, 8, 4, 7, 6, 3, 2, 1], [4, 4], [7, 2, 9, 1], [1] * 10]
    moves = [[4, 1, 2], [1, 1, 1], [2, 0], [0]]
    x = torch.zeros(4, 13, dtype=torch.int64)
    visits: dict[str, Any] = {}
    for r, text in enumerate(texts):
        x[r, : len(text)] = torch.tensor(text)
    for k in range(3):
        chosen = [m[k] if k < len(m) else 0 for m in moves]
        jump = nn.functional.one_hot((torch.tensor(chosen) - 1).clamp_min(0), 4).float()
        visits[f"stages.{k + 1}.site"] = (Decision(jump),)
        visits[f"sites.{k}"] = (Decision((torch.tensor(chosen) > 0).float()),)
    replay = pliant.bind(model, {"*": rules.Given(Trace(visits, (), (), 4))})
    want = torch.stack([by_hand(model, text, m) for text, m in zip(texts, moves, strict=True)])
    for form in FORMS.values():
        torch.testing.assert_close(form(replay)(x), want, rtol=1e-5, atol=1e-6)
    _, trace = pliant.record(pliant.bind(model, {"sites.*": rules.Threshold(-1e3)}))(x)
    assert [d.value.shape[0] for d in (trace[f"sites.{k}"][0] for k in range(3))] == [4, 3, 2]  # ended texts have left


def adaframe_by_hand(model: Any, clip: Tensor, patience: int, margin: float) -> tuple[Tensor, int]:
    """AdaFrame on one clip, look by look: the answer after the look that promised most, and how many looks there were."""
    reader, site = model.stages[0].reader, model.stages[1].site.scorer.scorer
    overview, frames, steps = reader.overview, len(clip), len(model.stages)
    sampled = [round(k * (frames - 1) / (overview.frames - 1)) for k in range(overview.frames)]
    light = torch.cat([overview.network(clip[k : k + 1]) for k in sampled]) + overview.places
    h = c = torch.zeros(1, reader.cell.hidden_size)
    at, best, answer, missed = round(0.5 * (frames - 1)), -float("inf"), torch.zeros(0), 0
    for look in range(1, steps + 1):
        weights = (light @ overview.query(h)[0] / overview.width**0.5).softmax(0)
        context = sum(w * f for w, f in zip(weights, light, strict=True))
        place = torch.tensor([[2 * at / (frames - 1) - 1]])
        h, c = reader.cell(torch.cat([reader.encoder(clip[at : at + 1]), context[None], place], 1), (h, c))
        promised = float(model.view.utility(h))
        if promised > best:
            best, answer = promised, model.heads[0].linear(h)[0]
        missed += promised < best - margin
        if missed >= patience or look == steps:
            break
        at = round(float(site.linear(h).sigmoid()) * (frames - 1))
    return answer, look


@torch.no_grad()
def test_adaframe_look_by_look() -> None:
    torch.manual_seed(0)
    settings = {"steps": 5, "depth": 8, "widths": (4, 4, 8), "hidden": 8, "glances": 3, "patience": 2, "margin": 0.02}
    model: Any = pliant.create_model("adaframe", num_classes=3, in_chans=1, **settings).eval()
    reader = model.stages[0].reader
    for weight in (
        model.stages[1].site.scorer.scorer.linear.weight,
        model.view.utility.weight,
        *reader.cell.parameters(),
    ):
        weight.normal_()  # states, places and promises that differ from look to look
    reader.cell.weight_ih.mul_(10)
    x = torch.randn(12, 9, 1, 12, 12) * 3
    found = [adaframe_by_hand(model, clip, 2, 0.02) for clip in x]
    want, looks = torch.stack([answer for answer, _ in found]), [look for _, look in found]
    assert len(set(looks)) > 1
    for form in FORMS.values():
        torch.testing.assert_close(form(model)(x), want, rtol=1e-4, atol=1e-5)
    _, trace = pliant.record(model)(x)
    gone_on = sum(trace.dense(f"sites.{k}") if f"sites.{k}" in trace else torch.zeros(12) for k in range(4))
    assert (1 + gone_on).tolist() == looks
    patient = pliant.bind(model, {"sites.*": rules.Threshold(0.5 - 3)})
    assert bool((pliant.record(patient)(x)[1].flops >= trace.flops).all())


def test_what_a_look_gained_and_what_is_to_come_row_by_row() -> None:
    torch.manual_seed(0)
    model = pliant.create_model(
        "adaframe", num_classes=3, in_chans=1, steps=3, depth=8, widths=(4, 4, 8), hidden=8
    ).train()
    target = torch.tensor([0, 1, 2, 0])
    y, trace = pliant.record(pliant.bind(model, {"sites.*": rules.Always()}))(torch.randn(4, 9, 1, 12, 12))
    got = losses.MarginReturns(0.9)(y, trace, target)
    for r in range(4):
        best, gains = 0.0, []
        for e in trace.exits:
            p = e.logits[r].detach().softmax(0).tolist()
            margin = p[target[r]] - max(p[c] for c in range(3) if c != target[r])
            gains.append(max(0.0, margin - best))
            best = max(best, margin)
        want = [gains[0] + 0.9 * (gains[1] + 0.9 * gains[2]), gains[1] + 0.9 * gains[2]]
        torch.testing.assert_close(got[:, r], torch.tensor(want), rtol=1e-4, atol=1e-5)
    with pytest.raises(PliantError, match=r"discount 2; expected within \[0, 1\]"):
        losses.MarginReturns(2)
    found = losses.ValueLoss(losses.MarginReturns(0.9))(y, trace, target, 0.0)
    found.backward()
    assert model.stages[0].reader.cell.weight_hh.grad.any()  # the critic teaches the memory


def test_two_draws_are_one_softmax_over_stopping_and_jumps() -> None:
    torch.manual_seed(0)
    model: Any = pliant.create_model("lstm_jump", words=9, embedding=4, hidden=5, span=1, most=3, jumps=1).train()
    x = torch.randint(1, 9, (1, 6)).repeat(20_000, 1)
    _, trace = pliant.record(model)(x)
    whether, where = trace["sites.0"][0], trace["stages.1.site"][0]
    scorer: Any = pliant.sites(model)["sites.0"].scorer
    memory = model.stages[0](x[:1]).memory[0]
    p = scorer.scorer.linear(memory).softmax(1)[0]
    drawn = torch.cat([1 - whether.value[:, None], whether.value[:, None] * where.value], 1)
    torch.testing.assert_close(drawn.mean(0), p, rtol=0, atol=0.015)
    assert whether.log_prob is not None
    assert where.log_prob is not None
    joint = whether.log_prob + whether.value * where.log_prob
    torch.testing.assert_close(joint, (drawn @ p.log()[:, None]).squeeze(1), rtol=1e-4, atol=1e-5)


def test_the_score_function_of_a_categorical_is_its_gradient() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([0.3, -0.2, 0.9]).expand(100_000, 3).clone().requires_grad_()
    out, pay = Categorical()(scores), torch.tensor([1.0, 2.0, 4.0])
    assert out.log_prob is not None
    assert not out.value.requires_grad
    (found,) = torch.autograd.grad((out.log_prob * (out.value @ pay)).mean(), scores)
    p = scores[0].detach().softmax(0)
    torch.testing.assert_close(found.sum(0), p * (pay - (p * pay).sum()), rtol=0, atol=0.03)
    broken = Categorical()(torch.tensor([[0.0, float("nan")]]))
    assert broken.value.tolist() == [[0.0, 1.0]]
    assert broken.log_prob is not None
    assert broken.log_prob.isnan().all()


def test_a_site_of_another_shape_is_refused() -> None:
    with pytest.raises(PliantError, match=r"a site of shape \(\) for a Jump; expected \(3,\)"):
        Cursor(Site(nn.Identity(), rules.Never()), Jump(3), Adder(1))
