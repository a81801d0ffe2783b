"""Checks of what a model answers: one meaning in every form, for every row, whoever watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pliant.checks.subject import Subject, failed, identical, near
from pliant.core.bind import executors, gathered, masked, plain
from pliant.execute.exits import Answer, Exits
from pliant.rules.fixed import Always


def gathered_equals_masked(s: Subject) -> str:
    """Computing only what was chosen answers as computing everything does, for every pattern of decisions."""
    worst, names = 0.0, []
    for name, model in s.patterns():
        rows = s.decided() if model is s.model else None
        do = "make both forms of the executors run the same parts on the same rows"
        got, wanted = s.call(gathered(model)), s.call(masked(model))
        worst = max(worst, near("gathered", got, wanted, f"gathered against masked under {name}", do, rows))
        names.append(name)
    return f"apart by {worst:.1e} at most under {', '.join(names)}"


def all_on_equals_plain(s: Subject) -> str:
    """Always() at every site is the network without sites."""
    do = "make Executor.plain the path where every value is 1"
    always = s.everywhere(Always())
    y, trace = s.record(always)
    wanted, said = s.call(plain(s.model)), ""
    if any(isinstance(e, Exits) and type(e.answer) is not Answer for e in executors(s.model)) and trace.exits:
        # Such a system may answer with an earlier exit's logits even if all went on; its last exit is the backbone.
        y, said = [trace.exits[-1].logits], " (the last exit's logits: which exit answers is the system's choice)"
    worst = near("all_on", y, wanted, "Always against the plain backbone", do)
    return f"apart by {worst:.1e}{said}"


def replay(s: Subject) -> str:
    """Given(trace) answers what the recorded call did."""
    looped = s.loops()
    if looped is not None:
        return f"not asked: {looped!r} is visited several times a call, which given= replays"
    exact = []
    for name, model in s.patterns():
        for form in (gathered, masked):
            y, trace = s.record(form(model))
            again = s.call(form(s.frozen_rows(trace, torch.arange(s.batch))))
            near("replay", again, y, f"replaying {name}", "let every choice be made at a site, and nowhere else")
            exact.append(identical(again, y))
    return f"{sum(exact)} of {len(exact)} replays bit-identical, the others within the tolerance"


def recording(s: Subject) -> str:
    """Watching changes no number."""
    for name, model in s.patterns():
        if name == "its own decisions" and s.stochastic():
            torch.manual_seed(0)
        if not identical(s.record(model)[0], s.call(model)):
            raise failed(
                "recording", f"another answer under {name} while recording", "the same bits",
                "let nothing in forward depend on whether a tape is open",
            )  # fmt: skip
    return "bit-identical"


def rows_alone(s: Subject) -> str:
    """A batch answers as its inputs do one by one, and in any order."""
    order = torch.randperm(s.batch, generator=torch.Generator().manual_seed(0))
    parts = [order, *torch.arange(s.batch)[: min(s.batch, 8)].split(1)]
    do = "let no operation of the forward in evaluation mix rows"
    worst, left_out = 0.0, 0
    if not s.stochastic():
        y, sure = s.call(s.model), s.decided()
        left_out = int((~sure).sum())
        for part in parts:
            wanted = [t.index_select(0, part.to(t.device)) for t in y]
            what = f"rows {part.tolist()[:8]} against the batch"
            worst = max(worst, near("rows", s.call(s.model, part), wanted, what, do, sure[part]))
    if s.loops() is None:
        trace = s.trace_of(s.everywhere(s.random()))
        y = s.call(s.frozen_rows(trace, torch.arange(s.batch)))
        for part in parts:
            wanted = [t.index_select(0, part.to(t.device)) for t in y]
            what = f"rows {part.tolist()[:8]} against the batch, random decisions"
            worst = max(worst, near("rows", s.call(s.frozen_rows(trace, part), part), wanted, what, do))
    return f"apart by {worst:.1e} at most, {left_out} rows too near to a threshold left out"


def empty_batch(s: Subject) -> str:
    """No rows in, no rows out: a tensor of the usual shape, and a cost of (0,)."""
    wanted = [(0, *t.shape[1:]) for t in s.call(s.model)]
    for name, model in (("gathered", gathered(s.model)), ("masked", masked(s.model))):
        y, trace = s.record(model, torch.empty(0, dtype=torch.int64))
        got = [tuple(t.shape) for t in y]
        if got != wanted or trace.flops.shape != (0,) or trace.dense_flops.shape != (0,):
            raise failed(
                "empty", f"shapes {got} and a cost of shape {tuple(trace.flops.shape)} for no rows, {name}",
                f"{wanted} and (0,)", "let every part take tensors without rows",
            )  # fmt: skip
    return f"answers {wanted[0]}"


def single(s: Subject) -> str:
    """One row is a batch."""
    one = torch.zeros(1, dtype=torch.int64)
    do = "don't squeeze the row dimension"
    for name, model in (("its own decisions", s.model), ("Always", s.everywhere(Always()))):
        if name == "its own decisions" and (s.stochastic() or not s.decided()[0]):
            continue
        y, trace = s.record(model, one)
        near("single", y, [t[:1] for t in s.call(model)], f"row 0 alone under {name}", do)
        if trace.batch != 1 or trace.flops.shape != (1,):
            raise failed("single", f"a cost of shape {tuple(trace.flops.shape)} for one row", "(1,)", do)
    return "answers as within the batch"


def not_a_number(s: Subject) -> str:
    """A row of NaN answers NaN, at the dense network's price or less, and leaves the other rows alone."""
    if not any(t.is_floating_point() for t in _per_row(s)):
        return "not asked: no input is floating point"
    own = s.frozen(s.model) if s.stochastic() and s.loops() is None else s.model  # draws would change by chance
    clean = s.call(own)
    others = s.decided()
    others[0] = False
    broken = Subject(s.model, s.args if not s.kwargs else s.kwargs)
    broken.args, broken.kwargs = pytree.tree_map(lambda t: _break(t, s.batch), (s.args, s.kwargs))
    for name, model in (("gathered", gathered(own)), ("masked", masked(own))):
        y = broken.call(model)
        if not all(t[0].isnan().all() for t in y if t.is_floating_point()):
            raise failed(
                "nan", f"numbers for a row of NaN, {name}", "NaN: never a silent wrong answer",
                "let a NaN score spend, and use no operation that drops NaN",
            )  # fmt: skip
        near("nan", y, clean, f"the rows beside a row of NaN, {name}", "let no operation mix rows", others)
    return "NaN for that row, the others untouched"


def _per_row(s: Subject) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((s.args, s.kwargs)) if isinstance(t, Tensor)]


def _break(t: Any, batch: int) -> Any:
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim == 0 or t.shape[0] != batch:
        return t
    t = t.clone()
    t[0] = float("nan")
    return t
