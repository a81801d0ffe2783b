"""Rows: select them, put them back, and run a part on some of them. The only place that renumbers rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.site import Site

Rows = Any
"""A tree of tensors whose first dimension is rows (None leaves allowed)."""


def select(state: Rows, index: Tensor) -> Rows:
    """The rows ``index`` of every tensor in ``state``: views where a few stand side by side, else copies.

    >>> select([torch.arange(3), None], torch.tensor([2, 0]))
    [tensor([2, 0]), None]
    """
    start = _side_by_side(index)
    if start is None:
        return _each(state, lambda t: _rows(t, index))
    return _each(state, lambda t: t.narrow(0, start, index.shape[0]))


_FEW = 64  # above as many, rows side by side are too rare to look for


def _side_by_side(index: Tensor) -> int | None:
    """The first of ``index`` if the others follow on it one by one. One row alone always does."""
    if torch.compiler.is_compiling() or not index.is_cpu or not 0 < index.shape[0] <= _FEW:
        return None
    found = index.tolist()
    return found[0] if found == list(range(found[0], found[0] + len(found))) else None


def _each(state: Rows, pick: Callable[[Tensor], Tensor]) -> Rows:
    if isinstance(state, Tensor):
        return pick(state)
    if type(state) in (list, tuple):  # by hand, since a tree map costs as much as choosing the rows
        return type(state)([_each(t, pick) if t is not None else None for t in state])
    return pytree.tree_map(lambda t: pick(t) if isinstance(t, Tensor) else t, state)


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """``index_select`` that keeps channels-last features so: by itself it rewrites them, five times slower."""
    if t.ndim != 4 or t.is_contiguous() or not t.is_contiguous(memory_format=torch.channels_last):
        return t.index_select(0, index)
    return t.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def scatter(into: Rows, index: Tensor, part: Rows) -> Rows:
    """``into`` with its rows ``index`` replaced by those of ``part``; neither is changed.

    >>> scatter(torch.zeros(3), torch.tensor([1]), torch.ones(1))
    tensor([0., 1., 0.])
    """
    if isinstance(into, Tensor):
        return into.index_copy(0, index, part)
    return pytree.tree_map(lambda a, b: a.index_copy(0, index, b) if isinstance(a, Tensor) else a, into, part)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; under export, whether they are for every input."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and only export needs it

    return statically_known_true(a == b)


def weighted(decision: Decision) -> bool:
    """Whether the value is a weight to multiply by (a soft rule, or a gradient wants it), not a plain choice."""
    return decision.is_weight or decision.value.requires_grad


def weigh(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with as many trailing dimensions of one as ``like`` needs to multiply it row by row."""
    return value.reshape(value.shape[0], *[1] * (like.ndim - 1))


def mix(decision: Decision, on: Rows, off: Rows) -> Rows:
    r"""Per row :math:`v \cdot \text{on} + (1 - v) \cdot \text{off}`; a plain choice where the value isn't a weight.

    >>> mix(Decision(torch.tensor([1.0, 0.0])), torch.ones(2, 1), torch.zeros(2, 1)).flatten()
    tensor([1., 0.])
    """
    value, blend = decision.value, weighted(decision)

    def one(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        v = weigh(value, a)
        return v * a + (1 - v) * b if blend else torch.where(v > 0, a, b)

    return pytree.tree_map(one, on, off)


def run_masked(site: Site, decision: Decision, choice: int, run: Callable[..., Rows], *args: Rows) -> Rows:
    """Run alternative ``choice`` on every row in flight, noting whose alternative it really is."""
    # By negation, so that NaN comes to both; a weight strictly between 0 and 1 comes to both too.
    reached = ~(decision.value <= 0) if choice else ~(decision.value >= 1)
    with tape.part(site, decision.visit, str(choice), reached=reached):
        return run(*args)


def run_some(
    site: Site, decision: Decision, run: Callable[..., Rows], state: tuple[Rows, ...], put: Callable[..., Rows],
    into: Callable[[], Rows],
) -> Rows:  # fmt: skip
    """Run alternative 1 on the rows that chose it and ``put(into(), index, result, decision)`` them back.

    All rows: nothing is renumbered and the result is ``put(into(), None, result, decision)``. None: the result is ``into()``.
    """
    if torch.compiler.is_exporting():
        return _run_exported(site, decision, 1, run, state, put, into)
    value = decision.value
    if value.shape[0] == 1:  # all or nothing: asked of the number itself, since every operator costs one row a lot
        index, chosen = value, int(value.item() != 0)
    else:
        index = value.nonzero()
        chosen = index.shape[0]
    if chosen == 0:
        return into()
    if chosen == value.shape[0]:
        if tape.tape() is None:
            return put(into(), None, run(*state), decision)
        with tape.part(site, decision.visit, "1"):
            return put(into(), None, run(*state), decision)
    index = index.squeeze(1)
    with tape.part(site, decision.visit, "1", index=index):
        part = run(*select(state, index))
    return put(into(), index, part, decision)


def _run_exported(
    site: Site, decision: Decision, choice: int, run: Callable[..., Rows], state: tuple[Rows, ...],
    put: Callable[..., Rows], into: Callable[[], Rows],
) -> Rows:  # fmt: skip
    """The same without a Python branch."""
    index, kept, real = exported_rows(decision)
    with tape.part(site, decision.visit, str(choice), index=kept, reached=real):
        part = run(*select(state, kept))
    return put(into(), index, _each(part, lambda t: t.narrow(0, 0, index.shape[0])), decision)


def exported_rows(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that chose 1; those that run, one dummy where nobody did; and which of them are no dummy."""
    index = chosen_rows(decision)
    return index, *never_empty(index, decision.value.shape[0])


def never_empty(index: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of ``total`` places those of ``index``, in an exported program the first where there are none; and which are no such dummy.

    Convolutions and batch norms refuse a size that may be 0, so the program is told of one that's at least 1.
    """
    chosen = index.shape[0]
    torch._check(chosen <= total)
    torch._check(chosen < 2**31)
    some = torch.sym_max(chosen, 1)
    kept = torch.cat([index, index.new_zeros(1)]).narrow(0, 0, some)
    real = torch.cat([torch.ones_like(index, dtype=torch.bool), index.new_zeros(1, dtype=torch.bool)])
    return kept, real.narrow(0, 0, some)


def numbered(answer: Tensor) -> tuple[Tensor, Tensor]:
    """An exit's answers, and how many exits further each row left: none."""
    return answer, torch.zeros(answer.shape[0], device=answer.device)


def further(whole: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` answers, as the exit before them sees them."""
    return whole[0].narrow(0, 0, count), whole[1].narrow(0, 0, count) + 1


def chosen_rows(decision: Decision) -> Tensor:
    """The rows that chose 1, without the dummy that an outer set may be: nobody is in it."""
    value = decision.value.detach()
    return (value if decision.reached is None else value * decision.reached.to(value.dtype)).nonzero().squeeze(1)


def run_either(site: Site, decision: Decision, runs: tuple[Callable[..., Rows], Callable[..., Rows]], x: Rows) -> Rows:
    """Run alternative 0 or 1 on the rows that chose it; the results come back in the order of the batch.

    A soft value is a weight on both alternatives, so every row runs both.
    """
    if decision.is_weight:
        off, on = (run_masked(site, decision, choice, run, x) for choice, run in enumerate(runs))
        return mix(decision, on, off)
    value = decision.value.detach()
    if not torch.compiler.is_compiling() and value.shape[0] == 1:  # one or the other: nothing to sort, as in run_some
        choice = int(value.item() != 0)
        with tape.part(site, decision.visit, str(choice)):
            return runs[choice](x)
    return run_each(site, decision, (value == 0, value != 0), runs, x)


def run_each(
    site: Site, decision: Decision, chosen: Sequence[Tensor], runs: Sequence[Callable[..., Rows]], x: Rows, *,
    wanted: Sequence[Tensor | None] | None = None,
) -> Rows:  # fmt: skip
    """Run alternative ``k`` on the rows of the mask ``chosen[k]``; the results come back in the order of the batch.

    Every row chose exactly one. ``wanted`` is what each alternative's expected cost differentiates, row by row.
    """
    if torch.compiler.is_exporting():
        return _each_exported(site, decision, chosen, runs, x)
    rows, wants = chosen[0].shape[0], wanted or [None] * len(runs)
    indexes = [mask.nonzero().squeeze(1) for mask in chosen]
    for choice, index in enumerate(indexes):
        if index.shape[0] == rows:
            with tape.part(site, decision.visit, str(choice), wanted=wants[choice]):
                return runs[choice](x)
    parts: list[Rows] = []
    for choice, index in enumerate(indexes):
        if index.shape[0]:
            want = wants[choice]
            want = None if want is None else want.index_select(0, index)
            with tape.part(site, decision.visit, str(choice), index=index, wanted=want):
                parts.append(runs[choice](select(x, index)))
    order = torch.cat(indexes).argsort()
    return pytree.tree_map(
        lambda *each: torch.cat(each).index_select(0, order) if isinstance(each[0], Tensor) else each[0], *parts
    )


def _each_exported(
    site: Site, decision: Decision, chosen: Sequence[Tensor], runs: Sequence[Callable[..., Rows]], x: Rows
) -> Rows:
    """The same without a Python branch: each result is copied into place, so that its rows are seen to be the input's."""
    whole: Rows = None
    rows = chosen[0].shape[0]
    for choice, (mask, run) in enumerate(zip(chosen, runs, strict=True)):
        here = replace(decision, value=mask.to(torch.float32))
        part, index = _run_exported(site, here, choice, run, (x,), _first_only, lambda: None), chosen_rows(here)
        base = whole if choice else _each(part, lambda t: t.new_zeros((rows, *t.shape[1:])))
        whole = scatter(base, index, part)
    return whole


def _first_only(_into: None, _index: Tensor, part: Rows, _decision: Decision) -> Rows:
    return part


def replaced(into: Rows, index: Tensor | None, part: Rows, decision: Decision) -> Rows:
    """``put`` for a part that replaces what was there."""
    if weighted(decision):
        here = decision if index is None else replace(decision, value=decision.value[index], soft=None)
        here = replace(here, soft=here.value)
        part = mix(here, part, into if index is None else select(into, index))
    return part if index is None else scatter(into, index, part)


def added(into: Tensor, index: Tensor | None, part: Tensor, decision: Decision) -> Tensor:
    """``put`` for a part that is added to what was there."""
    if weighted(decision):
        part = part * weigh(decision.value if index is None else decision.value[index], part)
    return into + part if index is None else into.index_add(0, index, part)
