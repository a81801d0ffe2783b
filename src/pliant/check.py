"""check: whether a model keeps the public contract, item by item."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pliant.checks import answers, copies, learning, prices
from pliant.checks.subject import Subject, call_of, failed
from pliant.core.bind import sites
from pliant.core.errors import PliantError
from pliant.core.trace import batch_of

CHECKS: dict[str, Callable[[Subject], str]] = {
    "gathered": answers.gathered_equals_masked,
    "all_on": answers.all_on_equals_plain,
    "replay": answers.replay,
    "recording": answers.recording,
    "rows": answers.rows_alone,
    "gradient": learning.gradient_reaches_scorers,
    "expected_cost": learning.expected_equals_mean,
    "flops": prices.flops_counted,
    "dense_flops": prices.dense_is_most,
    "seconds": prices.seconds_fall,
    "export": copies.export_equals_eager,
    "checkpoint": learning.checkpoint_equal,
    "reentrant": learning.reentrant_refused,
    "state_dict": copies.state_dict_round_trip,
    "deepcopy": copies.deep_copies,
    "threads": copies.two_threads,
    "empty": answers.empty_batch,
    "single": answers.single,
    "nan": answers.not_a_number,
}
"""Every item of the contract by name."""

DEFAULT = tuple(name for name in CHECKS if name != "seconds")
"""What runs unless asked otherwise: all but the one that takes the time, which depends on the machine."""


def check(model: nn.Module, x: Any, *, only: Collection[str] | None = None) -> dict[str, str]:
    r"""Check that ``model`` keeps the public contract on the batch ``x``.

    Every item that is passed says what it saw; the first that fails raises. The model isn't touched: all runs on a
    copy, and random number generators are put back.

    Shape:
        ``x``: :math:`(R, ...)` with :math:`R \ge 3` rows; a tuple of positional or a mapping of keyword inputs too.

    Args:
        model: any module with sites. Give its batch norms real statistics and its thresholds values at which both
            outcomes occur, or little is checked.
        x: one batch.
        only: names of the items to run, out of ``CHECKS``; default, ``DEFAULT``, which is all but "seconds".

    Returns:
        From the name of each item to what was seen.

    Raises:
        PliantError: naming the item and what it found; or where the model has no sites, or an item isn't known.

    >>> import pliant, torch
    >>> from pliant.check import check
    >>> from torch import nn
    >>> gate = pliant.Site(pliant.scores.LinearGate(4, bias=0.0), pliant.rules.Threshold(0.0))
    >>> model = pliant.execute.Skip(nn.Linear(4, 4), gate)
    >>> list(check(model, torch.randn(6, 4), only=["gathered", "flops"]))
    ['gathered', 'flops']
    """
    names = DEFAULT if only is None else tuple(only)
    for name in names:
        if name not in CHECKS:
            raise PliantError(
                got=f"check {name!r}", expected="one of " + ", ".join(CHECKS), do="see pliant.check.CHECKS"
            )
    if not sites(model):
        raise PliantError(got="a model without sites", expected="at least one Site", do="compose it with an executor")
    args, kwargs = call_of(x)
    if batch_of(args, kwargs) < 3:
        raise PliantError(
            got=f"a batch of {batch_of(args, kwargs)}", expected="at least 3 rows", do="pass a few more inputs"
        )
    seen: dict[str, str] = {}
    with _generators_kept(model):
        for name in names:
            torch.manual_seed(0)
            try:
                seen[name] = CHECKS[name](Subject(model, x))
            except Exception as error:  # whatever breaks, the caller learns in which check
                if isinstance(error, PliantError) and "(check '" in str(error):
                    raise
                raise failed(
                    name, f"{type(error).__name__}: {error}", "no error", "mend what the error names"
                ) from error
    return seen


@contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    """Put back PyTorch's random state and that of every generator that the model's modules hold."""
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]
    states = [g.get_state() for g in held]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
