"""Fixed rules: force, replay, ablate. They read no scores, so no scorer runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.core import tape
from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule
from pliant.core.trace import Trace


class Always(Rule):
    """Spend everywhere: the dense network.

    >>> Always()(torch.zeros(2)).value
    tensor([1., 1.])
    """

    reads_scores = False

    def count(self, choices: int) -> int:
        """All."""
        return choices

    def forward(self, scores: Tensor) -> Outcome:
        """Ones."""
        return Outcome(torch.ones_like(scores))


class Never(Rule):
    """Save everywhere: the cheapest path.

    >>> Never()(torch.zeros(2)).value
    tensor([0., 0.])
    """

    reads_scores = False

    def count(self, choices: int) -> int:
        """None of them."""
        return 0

    def forward(self, scores: Tensor) -> Outcome:
        """Zeros."""
        return Outcome(torch.zeros_like(scores))


class Random(Rule):
    """Spend with probability ``p``, whatever the input: the control that a learned decision has to beat.

    Args:
        p: probability in [0, 1].
        generator: source of randomness, for repeatable draws; it is shared by all sites the rule is bound to. Pass none
            (PyTorch's own) under activation checkpointing, which draws again on the way back and repeats only that.

    Raises:
        PliantError: where ``p`` is outside [0, 1].

    >>> Random(0.5, torch.Generator().manual_seed(0))(torch.zeros(4)).value
    tensor([1., 0., 1., 1.])
    """

    reads_scores = False

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise PliantError(got=f"p = {p}", expected="a probability in [0, 1]", do="pass the share that shall spend")
        self.p = p
        self.generator = generator

    def __deepcopy__(self, memo: dict[int, object]) -> Random:
        return Random(self.p, self.generator)  # generators can't be copied; one stream is what makes draws repeatable

    def _draw(self, scores: Tensor) -> Tensor:
        """Uniform numbers, drawn where the generator lives: one seed draws the same on every device."""
        device = scores.device if self.generator is None else self.generator.device
        return torch.rand(scores.shape, generator=self.generator, device=device).to(scores.device)

    def equal(self) -> Rule:
        """The same share of every row, drawn without replacement."""
        return _RandomShare(self.p, self.generator)

    def forward(self, scores: Tensor) -> Outcome:
        """Draws."""
        value = (self._draw(scores) < self.p).to(scores.dtype)
        return Outcome(value, soft=torch.full_like(scores, self.p))


class _RandomShare(Random):
    """Spend on exactly the share ``p`` of each row's choices, drawn at random."""

    def count(self, choices: int) -> int:
        """That share of them."""
        return math.floor(self.p * choices + 0.5)

    def equal(self) -> Rule:
        """Itself."""
        return self

    def forward(self, scores: Tensor) -> Outcome:
        """Draws."""
        order = self._draw(scores).argsort(-1)
        best = order[..., : self.count(scores.shape[-1])]
        return Outcome(torch.zeros_like(scores).scatter(-1, best, 1.0), soft=torch.full_like(scores, self.p))


class Given(Rule):
    """Replay a trace: every site decides as it did there, and saves where a row never reached it.

    Args:
        trace: of the same batch.

    Raises:
        PliantError: when called with another batch, or at a site that the trace visited more than once by an executor that
            doesn't number its visits.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> x = torch.randn(3, 3, 32, 32)
    >>> y, trace = pliant.record(model)(x)
    >>> torch.equal(pliant.bind(model, {"*": Given(trace)})(x), y)
    True
    """

    reads_scores = False

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.values: dict[int, Tensor] = {}  # by visit: a loop may come here at some of its steps only
        self.weights = False
        self.path = ""

    def __deepcopy__(self, memo: dict[int, object]) -> Given:
        return self._with(self.values)

    def _with(self, values: dict[int, Tensor]) -> Given:
        twin = Given(self.trace)
        twin.values, twin.weights, twin.path = values, self.weights, self.path
        return twin

    def at(self, visit: int) -> Given:
        """What the trace holds of that visit; at one that it doesn't hold every row saves."""
        return self._with({visit: self.values[visit]} if visit in self.values else {})

    def attach(self, path: str) -> None:
        """Take this site's values out of the trace; a site that nobody reached saves."""
        self.path = path
        if path not in self.trace:
            return
        visits = self.trace[path]
        self.values = {decision.visit: decision.dense(self.trace.batch).detach() for decision in visits}
        self.weights = visits[0].is_weight  # a soft rule's values are weights, and replay as such

    def forward(self, scores: Tensor) -> Outcome:
        """The values of the rows in flight."""
        if not self.values:
            return Outcome(torch.zeros_like(scores))
        if len(self.values) > 1:
            raise PliantError(
                got=f"a trace with {len(self.values)} visits of one site",
                expected="one visit per call, or an executor that numbers them",
                do="pass visit= to the site, or the values step by step with given=",
                site=self.path,
            )
        rows = tape.rows()
        values = next(iter(self.values.values()))
        values = values if rows is None else values.index_select(0, rows)
        if values.shape[0] != scores.shape[0]:
            raise PliantError(
                got=f"{scores.shape[0]} rows in flight",
                expected=f"the {values.shape[0]} that the trace holds here",
                do="replay a trace on the batch that it was recorded on",
                site=self.path,
            )
        values = values.to(scores)
        return Outcome(values, soft=values if self.weights else None)
