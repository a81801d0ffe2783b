"""Exits: a staged chain whose finished rows leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Score, Site
from pliant.execute import rows
from pliant.execute.heads import Linked


class Answer(nn.Module):
    """Which answer a row takes away: that of the exit where it leaves. Wrap or replace for other choices.

    ``logits`` are what the chain's ``view`` says, where it has one: a tuple whose first is logits.
    """

    def step(self, logits: Any, memory: Any) -> tuple[Tensor, Any]:
        """From an exit's logits: the answer of a row that leaves here, and what later exits must know, rows first."""
        return logits if isinstance(logits, Tensor) else logits[0], memory

    def last(self, logits: Any, memory: Any) -> Tensor:
        """The answer of a row that no exit let go, from the last logits and what the exits before handed on."""
        return logits if isinstance(logits, Tensor) else logits[0]


class MostConfident(Answer):
    """A row that no exit was sure of takes the answer of the surest exit (Shallow-Deep Networks' fall-back).

    Rows that leave early cost nothing more: only those that come to the end have their exits' logits compared.

    Args:
        score: a confidence score; the exit with the lowest wish to go on wins, the earlier one in a tie, NaN never.

    >>> import pliant
    >>> answer = MostConfident(pliant.scores.MaxProbability())
    >>> _, memory = answer.step(torch.tensor([[3.0, 0.0]]), None)
    >>> answer.last(torch.tensor([[0.0, 1.0]]), memory)
    tensor([[3., 0.]])
    """

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def step(self, logits: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Hand the logits on."""
        return logits, [*(memory or ()), logits]

    def last(self, logits: Tensor, memory: Any) -> Tensor:
        """The logits of the surest exit."""
        exits = torch.stack([*(memory or ()), logits])
        surest = self.score(exits).nan_to_num(nan=math.inf, posinf=math.inf).argmin(0)
        return exits.gather(0, surest[None, :, None].expand(1, *logits.shape)).squeeze(0)


class MostUseful(Answer):
    """A row takes the answer of the exit that promised most, the earlier one in a tie: AdaFrame's.

    For a view that says (logits, what's promised (R,)). NaN is the most of all, so that no broken answer is passed over.

    >>> answer, memory = MostUseful(), None
    >>> for logits, promised in ((1.0, 0.2), (2.0, 0.9), (3.0, 0.5)):
    ...     early, memory = answer.step((torch.tensor([[logits]]), torch.tensor([promised])), memory)
    >>> early
    tensor([[2.]])

    References:
        Survey section 4.2.1 (3); Wu et al., AdaFrame, CVPR 2019.
    """

    def step(self, logits: Any, memory: Any) -> tuple[Tensor, Any]:
        """The best answer so far, and what it promised."""
        said, promised = logits
        if memory is not None:
            best, most = memory
            better = ~(promised <= most)
            said = torch.where(rows.weigh(better, said), said, best)
            promised = torch.where(better, promised, most)
        return said, (said, promised)

    def last(self, logits: Any, memory: Any) -> Tensor:
        """The best of all answers."""
        return self.step(logits, memory)[0]


class Exits(Executor):
    r"""A chain of stages with an exit after each; a row goes on where its site's value is 1, else it leaves.

    .. math:: y = v_1 (v_2 (\dots) + (1 - v_2) f_2) + (1 - v_1) f_1, \qquad f_k = \mathrm{head}_k(\mathrm{stage}_k(\dots))

    Gathered, the rows that stay are compacted before the next stage, and every answer is put back in batch order.

    Shape:
        ``x``: :math:`(R, ...)`, or any tree of such tensors between stages; the answer is :math:`(R, C)`.
        ``given``: :math:`(R, K - 1)`, a plan: the values of all sites.

    Args:
        stages: :math:`K` modules; what one returns the next takes.
        heads: :math:`K` classifiers, each on what its stage returned; a :class:`Linked` one also on the logits of the exit
            before it.
        sites: :math:`K - 1` sites that read their exit's logits; the last exit takes whoever is left.
        answer: which answer a leaving row takes; default, its exit's.
        view: for sites and answers that need more than logits: from what a stage returned and its logits to a tuple of tensors,
            rows first, logits first (:class:`Say`).

    Raises:
        PliantError: where the three lists don't fit, or the first head is a linked one.

    >>> import pliant
    >>> def site():
    ...     return pliant.Site(pliant.scores.MaxProbability(), pliant.rules.Threshold(0.4))
    >>> net = Exits([nn.Identity(), nn.Identity()], [nn.Identity(), nn.Softmax(-1)], [site()]).eval()
    >>> net(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[4.0000, 0.0000],
            [0.5000, 0.5000]])

    References:
        Survey section 2.1.1 (1); Huang et al., Multi-Scale Dense Networks, ICLR 2018; Kaya et al., ICML 2019.
    """

    def __init__(
        self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], sites: Sequence[Site], *,
        answer: Answer | None = None, view: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(stages) == 0 or len(heads) != len(stages) or len(sites) != len(stages) - 1:
            raise PliantError(
                got=f"{len(stages)} stages, {len(heads)} heads and {len(sites)} sites",
                expected="K stages (at least one), K heads and K - 1 sites",
                do="give every stage a head, and every head but the last a site",
            )
        # Looked up once, since what wraps a head later (checkpointing, compiling) is of another type.
        self.linked = [isinstance(head, Linked) for head in heads]
        if self.linked[0]:
            raise PliantError(
                got="a first head that reads the logits of the exit before it",
                expected="one that reads its stage's features alone",
                do="link the second head and those behind it",
            )
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.sites = nn.ModuleList(sites)
        self.answer = Answer() if answer is None else answer
        self.view = view

    def plain(self, x: Any) -> Tensor:
        """The chain with its last head only, and those whose logits it reads."""
        first = len(self.heads) - 1
        while self.linked[first]:
            first -= 1
        said: list[Tensor] = []
        for k, stage in enumerate(self.stages):
            x = stage(x)
            if k >= first:
                said = [self.heads[k](x, *said) if self.linked[k] else self.heads[k](x)]
        return said[-1]

    def masked(self, x: Any, given: Tensor | Outcome | None = None) -> Tensor:
        """Every stage and every exit for every row, mixed by the values."""
        return self._rest(self._links(), _go_on_masked, 0, [x, _values(given), None, None, None])

    def gathered(self, x: Any, given: Tensor | Outcome | None = None) -> Tensor:
        """Only what the rows still there need."""
        state = [x, _values(given), None, None, None]
        if not torch.compiler.is_exporting() or len(self.sites) == 0:
            return self._rest(self._links(), _go_on_gathered, 0, state)
        answer, left = self._rest(self._links(), _go_on_numbered, 0, state)
        tape.write_left(self, left)
        return answer

    def _links(self) -> _Links:
        """What every exit needs, looked up once a call: in each exit anew it would cost as much as the decision."""
        return list(zip(self.stages, self.heads, [*self.sites, None], strict=True))  # pyright: ignore[reportReturnType]

    def _rest(self, links: _Links, go_on: _GoOn, k: int, state: list[Any]) -> Tensor:
        """Stage ``k``, its exit, and for the rows that go on the rest: naturally recursive, so it nests and exports.

        ``state`` is what the chain carries: features, plan, the scorers' carry, the answers' memory, and the last logits for
        a head that reads them. It's emptied here, since the frames below live until the last stage is done and would hold
        features that nobody needs any longer.
        """
        stage, head, site = links[k]
        x, given, carry, memory, before = state
        state.clear()
        x = stage(x)
        logits = head(x) if before is None else head(x, before)
        if tape.tape() is not None:
            tape.write_exit(self, logits)
        seen = logits if self.view is None else self.view(x, logits)
        if site is None:
            return self.answer.last(seen, memory)
        early, memory = self.answer.step(seen, memory)
        decision = site(seen, given=None if given is None else given[:, k], carry=carry)
        state = [x, given, decision.carry, memory, logits if self.linked[k + 1] else None]
        del x

        def rest(chosen: list[Any]) -> Tensor:
            if chosen is not state:
                state.clear()
            return self._rest(links, go_on, k + 1, chosen)

        return go_on(site, decision, rest, state, early)


def _values(given: Tensor | Outcome | None) -> Tensor | None:
    return given.value if isinstance(given, Outcome) else given


_Links = list[tuple[nn.Module, nn.Module, Site | None]]
_GoOn = Callable[[Site, Decision, Callable[[list[Any]], Tensor], list[Any], Tensor], Tensor]


def _go_on_masked(
    site: Site, decision: Decision, rest: Callable[[list[Any]], Tensor], state: list[Any], early: Tensor
) -> Tensor:
    return rows.mix(decision, rows.run_masked(site, decision, 1, rest, state), early)


def _go_on_gathered(
    site: Site, decision: Decision, rest: Callable[[list[Any]], Tensor], state: list[Any], early: Tensor
) -> Tensor:
    return rows.run_some(site, decision, rest, (state,), rows.replaced, lambda: early)


def _go_on_numbered(
    site: Site, decision: Decision, rest: Callable[[list[Any]], Any], state: list[Any], early: Tensor
) -> Any:
    """As gathered, with the exit of each row beside its answer."""

    def further(chosen: list[Any]) -> Any:
        answer = rest(chosen)
        answer, left = rows.numbered(answer) if isinstance(answer, Tensor) else answer
        return answer, left + 1

    return rows.run_some(site, decision, further, (state,), rows.replaced, lambda: rows.numbered(early))
