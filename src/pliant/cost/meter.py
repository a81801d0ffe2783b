"""Seconds: calls compared in one run, interleaved, on a stated number of threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pliant.core.errors import PliantError


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over several rounds."""

    minimum: float
    median: float
    rounds: int


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, PyTorch's operators use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 7, on_threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:  # fmt: skip
    """Time several calls in turn, A B C A B C ..., so that a machine that drifts is unfair to none.

    Args:
        calls: by name; each is run once untimed first. Assert that their outputs agree before timing them.
        rounds: counted rounds.
        on_threads: threads for PyTorch's operators; one is what shared machines measure well.
        clock: seconds; ``time.thread_time`` leaves out what others on the machine take, for calls on this one thread.

    Returns:
        Seconds by name. Quote ratios of minima, not absolute times.

    Raises:
        PliantError: where there is nothing to time.

    >>> found = interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
    >>> list(found), found["a"].rounds
    (['a', 'b'], 3)
    """
    if not calls or rounds < 1:
        raise PliantError(
            got=f"{len(calls)} calls, {rounds} rounds", expected="at least one of each", do="pass calls to time"
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with threads(on_threads), torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock()
                call()
                seconds[name].append(clock() - start)
    return {name: Timing(min(s), statistics.median(s), rounds) for name, s in seconds.items()}


def realised_share(seconds: float, dense_seconds: float, flops: float, dense_flops: float) -> float:
    r"""What part of the promised saving the clock confirms, :math:`(1 - t / t_d) / (1 - c / c_d)`.

    >>> realised_share(0.6, 1.0, 50.0, 100.0)
    0.8
    """
    promised = 1 - flops / dense_flops
    return float("nan") if promised <= 0 else (1 - seconds / dense_seconds) / promised
