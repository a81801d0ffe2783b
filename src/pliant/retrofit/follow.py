"""Which tokens are left in the call that runs in this thread, and what has to follow them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pliant.core import tape
from pliant.execute import rows
from pliant.execute.tokens import Left
from pliant.functional.tokens import take


@dataclass
class TokenCall:
    """One call of the host: which tokens are left. Lives on the thread's stack, not on modules.

    By rows of the whole batch, of which exits may have let some go in between; the tape knows which are in flight.
    """

    owner: object
    batch: int
    mask: Tensor | None
    tokens: int | None = None  # before any left
    index: Tensor | None = None  # (batch, n): where each that is left stood at first
    hidden: tuple[int, ...] = (0, 0)  # tokens that are left, and their features
    size: Tensor | None = None  # (batch, n): of how many each is the mean
    heard: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def here(self, t: Any) -> Any:
        """Of a tensor over the whole batch the rows in flight."""
        now = tape.rows()
        return t if t is None or now is None else t.index_select(0, now)

    def whole(self, t: Any) -> Any:
        """A tensor of the rows in flight over the whole batch; nobody reads what the other rows then have."""
        now = tape.rows()
        return t if t is None or now is None else t.new_zeros((self.batch, *t.shape[1:])).index_copy(0, now, t)

    def left(self, tokens: int, left: Left) -> None:
        """Some of ``tokens`` have left."""
        if self.tokens is None:
            self.tokens = tokens
        if left.order is not None:
            before = self.here(self.index)
            self.index = self.whole(left.order if before is None else take(before, left.order))
        self.size, self.hidden = self.whole(left.size), tuple(left.hidden.shape[1:])

    def _is_hidden(self, t: Tensor) -> bool:
        """Whether it's the hidden state, which has those that are left already."""
        return t.ndim == 3 and all(rows.same(a, b) for a, b in zip(t.shape[1:], self.hidden, strict=True))

    def follow(self, t: Any) -> Any:
        """A tensor that comes beside the hidden state, a mask say, cut to the tokens that are left; else as it is."""
        if self.index is None or not isinstance(t, Tensor) or t.ndim not in (2, 3, 4) or self._is_hidden(t):
            return t
        at = [d for d in {2: (1,), 3: (1, 2), 4: (2, 3)}[t.ndim] if rows.same(t.shape[d], self.tokens or 0)]
        features = t.ndim == 2 and t.is_floating_point()  # pooled, and as wide as there were tokens by chance
        if not at or features or (t.ndim == 3 and at == [2] and not rows.same(t.shape[1], 1)):
            return t
        index = self.index if rows.same(t.shape[0], self.batch) else self.here(self.index)
        assert index is not None
        t = t.expand(index.shape[0], *t.shape[1:]) if rows.same(t.shape[0], 1) else t
        for d in at:
            t = take(t.transpose(1, d), index).transpose(1, d)
        return t.contiguous()  # as when rows leave next: a compiled layer has a program for each layout


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[TokenCall] = []


calls = _Calls()


def follow(t: Any) -> Any:
    """``t`` cut to the tokens that are left in the call that runs in this thread, if tokens can leave there."""
    return calls.stack[-1].follow(t) if calls.stack else t
