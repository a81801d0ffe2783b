"""HostExits: exits that live in hooks on the layers of somebody else's model."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from pliant.core import tape
from pliant.core.calls import prediction_of
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.retrofit.follow import follow
from pliant.retrofit.heads import hidden_of
from pliant.retrofit.output import output_like

Leaf = tuple[str, int | str, int]
"""A tensor that a module is handed: the module's path, position or keyword ("" for what it returns), leaf of that."""


class _AllDone(BaseException):
    """Nobody goes on.

    A forward hook can't skip what follows, and a foreign module may refuse zero rows; one dummy row kept alive would cost
    FLOPs that no input asked for. So the chain is left by raising, from the hook to ``HostExits.gathered``, which the root
    calls as its forward. Not an ``Exception``, so that no ``except Exception`` in the host stops it on the way.
    """


@dataclass
class _Call:
    """One call of the host: who is still in it and what was decided so far. Lives on the thread's stack, not on modules."""

    owner: HostExits
    compact: bool
    mask: Tensor | None
    parts: ExitStack
    rows: int = -1  # in flight; known from the first exit on
    cuts: list[tuple[int, Tensor]] = field(default_factory=list)  # a former number of rows, and which are still there
    carry: Any = None
    passed: list[tuple[Decision, Tensor | None, Tensor]] = field(default_factory=list)

    def keep(self, index: Tensor) -> None:
        """From now on only the rows ``index`` of those in flight are there."""
        self.cuts = [(size, kept.index_select(0, index)) for size, kept in self.cuts]
        self.cuts.append((self.rows, index))
        self.rows = index.shape[0]
        self.mask = self.cut(self.mask)

    def cut(self, t: Any) -> Any:
        """A tensor that still has the rows of before, cut to those in flight; any other as it is."""
        if not isinstance(t, Tensor) or t.ndim == 0 or rows.same(t.shape[0], self.rows):
            return t
        kept = next((kept for size, kept in self.cuts if rows.same(t.shape[0], size)), None)
        return t if kept is None else t.index_select(0, kept.to(t.device))


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Call] = []


_calls = _Calls()


class Entry(functools.partial):  # type: ignore[type-arg]
    """What the root has for ``forward``: the exits' own, under the host's signature. Follows ``copy.deepcopy``."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.func.__self__.host)


class HostExits(Executor):
    """The exits of a host: heads, sites and the hooks, which are bound methods of this one module.

    So every path and every state_dict key of the host stays, and ``copy.deepcopy`` (hence ``bind`` and ``masked``) rebinds
    the hooks to the copy; a closure would point back at the old model.
    """

    def __init__(
        self, host: Callable[..., Any], at: Sequence[str], heads: Sequence[nn.Module], sites: Sequence[Site], *,
        fixed: frozenset[Leaf], kind: type,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.sites = nn.ModuleList(sites)
        # Asked once: a wrapper that is later put around a head (checkpointing, sharding) doesn't show the attribute.
        self.reads_mask = tuple(bool(getattr(head, "reads_mask", False)) for head in heads)
        self.host = host  # the root's own forward, a bound method
        self.at = tuple(at)
        self.fixed = fixed
        self.kind = kind
        names = list(inspect.signature(host).parameters)
        self.mask_at = names.index("attention_mask") if "attention_mask" in names else None

    def install(self, root: nn.Module, cover: Sequence[str]) -> None:
        """Register the hooks on ``root``, once."""
        for k, path in enumerate(self.at):
            root.get_submodule(path).register_forward_hook(functools.partial(self._after, k))
        for path in cover:
            root.get_submodule(path).register_forward_pre_hook(functools.partial(self._before, path), with_kwargs=True)
        root.add_module("exits", self)
        vars(root)["forward"] = Entry(self.run)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host in the form that is set: what the root calls as its forward."""
        return self.plain(*args, **kwargs) if self.form == "plain" else super().forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a layer it passes its input on: a host that is a Sequential calls whatever it holds."""
        return args[0]

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The host as if nothing had been attached."""
        return self.host(*args, **kwargs)

    def masked(self, *args: Any, **kwargs: Any) -> Any:
        """Everything for every row; the answers mixed by the values."""
        return self._run(False, args, kwargs)

    def gathered(self, *args: Any, **kwargs: Any) -> Any:
        """Rows that leave are dropped from the hidden state; their answers are put back in batch order at the end."""
        return self._run(True, args, kwargs)

    def _run(self, compact: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_loss(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_at is not None and self.mask_at < len(args):
            mask = args[self.mask_at]
        kind = tuple if kwargs.get("return_dict") is False else self.kind
        with ExitStack() as parts:
            call = _Call(self, compact, mask if isinstance(mask, Tensor) else None, parts)
            _calls.stack.append(call)
            parts.callback(_calls.stack.pop)
            try:
                output = self.host(*args, **kwargs)
            except _AllDone:
                return output_like(kind, self._answers(call, call.passed.pop()[2]))
            if len(call.passed) < len(self.at):
                raise PliantError(
                    got="a call that didn't run this layer",
                    expected="every layer with an exit to run once, as on the example",
                    do="call the model in the way that the example did",
                    site=self.at[len(call.passed)],
                )
            last = prediction_of(output)
            tape.write_exit(self, last)
            return output_like(kind if kind is tuple else type(output), self._answers(call, last))

    def _answers(self, call: _Call, answer: Tensor) -> Tensor:
        """From the last answers back to the first: put each exit's own beside those of the rows that went on."""
        if call.compact and torch.compiler.is_exporting():
            return self._exported_answers(call, answer)
        for decision, index, early in reversed(call.passed):
            answer = (
                rows.replaced(early, index, answer, decision) if call.compact else rows.mix(decision, answer, early)
            )
        return answer

    def _exported_answers(self, call: _Call, answer: Tensor) -> Tensor:
        """The same, without dummy rows, and the exit of each row beside its answer."""
        whole = rows.numbered(answer)
        for decision, index, early in reversed(call.passed):
            assert index is not None
            whole = rows.replaced(rows.numbered(early), index, rows.further(whole, index.shape[0]), decision)
        tape.write_left(self, whole[1])
        return whole[0]

    def _open(self) -> _Call | None:
        """The call that runs in this thread, if it's one of this host: a layer may also be called on its own."""
        stack = _calls.stack
        return stack[-1] if stack and stack[-1].owner is self else None

    def _after(self, k: int, layer: nn.Module, args: Any, output: Any) -> Any:
        """After layer ``at[k]``: its exit. What is returned, if anything, is what the host goes on with."""
        call = self._open()
        if call is None:
            return None
        if k != len(call.passed):
            raise PliantError(
                got=f"exit {k} after {len(call.passed)} others",
                expected="every layer with an exit to run once, in the order of at=",
                do="attach exits to layers that run once a call",
                site=self.at[k],
            )
        site, head, hidden = self.sites[k], self.heads[k], hidden_of(output, self.at[k])
        with _kept():
            logits = head(hidden, mask=follow(call.mask)) if self.reads_mask[k] else head(hidden)
            tape.write_exit(self, logits)
            decision = site(logits, carry=call.carry)
        if decision.value.shape != hidden.shape[:1]:
            raise PliantError(
                got=f"values of shape {tuple(decision.value.shape)} for {hidden.shape[0]} rows",
                expected="one value per row",
                do="use a criterion that gives each row one score, and heads that give each row one answer",
                site=f"exits.sites.{k}",
            )
        call.rows, call.carry = hidden.shape[0], decision.carry
        if not call.compact:
            call.passed.append((decision, None, logits))
            call.parts.enter_context(tape.part(site, decision.visit, "1", reached=decision.value > 0))
            return None
        return self._compact(call, k, decision, logits, output)

    def _compact(self, call: _Call, k: int, decision: Decision, logits: Tensor, output: Any) -> Any:
        """Drop the rows that leave from what layer ``at[k]`` returned."""
        site, real = self.sites[k], None
        if torch.compiler.is_exporting():  # no branch on data
            index, kept, real = rows.exported_rows(decision)
        else:
            index = kept = rows.chosen_rows(decision)
            if index.shape[0] == 0:
                call.passed.append((decision, index, logits))
                raise _AllDone
            if index.shape[0] == call.rows:
                call.passed.append((decision, None, logits))
                call.parts.enter_context(tape.part(site, decision.visit, "1"))
                return None
        call.passed.append((decision, index, logits))
        call.parts.enter_context(tape.part(site, decision.visit, "1", index=kept, reached=real))
        call.carry = rows.select(call.carry, kept)
        call.keep(kept)
        return self._cut(call, self.at[k], "", output)

    def _before(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a layer: what comes beside the hidden state (masks, embeddings) may still have the rows that left."""
        call = self._open()
        if call is None or not call.cuts:
            return None
        return tuple(self._cut(call, path, i, a) for i, a in enumerate(args)), {
            name: self._cut(call, path, name, a) for name, a in kwargs.items()
        }

    def _cut(self, call: _Call, path: str, place: int | str, tree: Any) -> Any:
        """Cut every tensor in ``tree`` but those whose first dimension isn't rows, as the example showed."""
        leaves, spec = pytree.tree_flatten(tree)
        kept = [t if (path, place, j) in self.fixed else call.cut(t) for j, t in enumerate(leaves)]
        return pytree.tree_unflatten(kept, spec)


def _kept() -> AbstractContextManager[Any]:
    """What an exit saves for backward is kept, also where the layers around it are checkpointed: when those run again, this
    call is over and its exits don't."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(lambda t: t, lambda t: t)


def refuse_loss(kwargs: dict[str, Any]) -> None:
    """Raise where a call asks the host for its own loss."""
    if kwargs.get("labels") is not None:
        raise PliantError(
            got="a call with labels=",
            expected="inputs only: the host's own loss would see the last exit's rows alone",
            do="record the call and use pliant.losses on y and the trace",
        )
