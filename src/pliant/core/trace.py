"""Trace and record: what one call decided and executed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from pliant.core import tape
from pliant.core.bind import clean, named
from pliant.core.decision import Decision
from pliant.core.errors import PliantError


@dataclass(frozen=True)
class Exit:
    """The logits of one exit that ran, and which rows of the original batch they belong to (None: all in order)."""

    logits: Tensor
    rows: Tensor | None = None
    reached: Tensor | None = None


@dataclass(frozen=True)
class Note:
    """That a part ran: a choice of a site's visit, its rows, and the units of it that each row ran (None: all of them).

    ``wanted`` is how many units the decision asks for, by its soft value: differentiable, and less than what the masked form runs.
    """

    site: str
    visit: int
    choice: str
    rows: Tensor | None = None
    units: Tensor | None = None
    wanted: Tensor | None = None


class Accounts:
    """The prices of one call's parts; see ``pliant.cost``. Here only the interface, so that the core imports nothing."""

    def flops(self, trace: Trace) -> Tensor:
        """Executed FLOPs of each row."""
        raise TypeError("abstract")

    def dense_flops(self, trace: Trace) -> Tensor:
        """FLOPs of each row with every site's costliest alternative."""
        raise TypeError("abstract")

    def within(self, flops: float, paths: Sequence[str]) -> frozenset[str]:
        """Which of the sites ``paths`` may spend so that no row's cost exceeds ``flops``, the first ones first."""
        raise TypeError("abstract")


Accountant = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Accounts]
_accountant: list[Accountant] = []  # pliant.cost puts the one accountant here when it is imported


def install(accountant: Accountant) -> None:
    """Let ``accountant`` price the calls that are recorded from now on."""
    _accountant[:] = [accountant]


def priced(model: nn.Module, *args: Any) -> Accounts:
    """The accounts of a call of ``model`` with ``args``, which isn't made."""
    if not _accountant:
        raise PliantError(got="no accountant", expected="prices", do="import pliant.cost")
    return _accountant[0](model, args, {})


@dataclass(frozen=True)
class Trace:
    """What one call decided (visits), answered (exits) and executed (notes), over a batch of ``batch`` rows.

    A recorded call's trace is put together when it's first read: that takes longer than writing it down.
    """

    visits: Mapping[str, tuple[Decision, ...]]
    exits: tuple[Exit, ...]
    notes: tuple[Note, ...]
    batch: int
    accounts: Accounts | None = field(default=None, compare=False, repr=False)

    @classmethod
    def later(cls, model: nn.Module, written: tape.Tape, batch: int, accounts: Accounts | None) -> Trace:
        """The trace of what was written during a call of ``model``."""
        trace = cls.__new__(cls)
        vars(trace).update(batch=batch, accounts=accounts, _unread=(model, written))
        return trace

    def __getattr__(self, name: str) -> Any:
        unread = vars(self).get("_unread")
        if unread is not None and name in ("visits", "exits", "notes"):
            vars(self).update(_read(*unread))
            vars(self).pop("_unread", None)
        if name not in vars(self):  # another thread may have read it in between
            raise AttributeError(f"a trace has no {name!r}")
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        """All that was recorded, without the model it was recorded from."""
        return {"visits": self.visits, "exits": self.exits, "notes": self.notes} | vars(self)

    def __getitem__(self, site: str) -> tuple[Decision, ...]:
        """All visits of ``site``, in order."""
        if site not in self.visits:
            raise PliantError(
                got=f"no visit of {site!r}",
                expected="one of " + (", ".join(map(repr, self.visits)) or "(nothing was decided)"),
                do="see list(trace) for the sites that were reached",
                site=site,
            )
        return self.visits[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.visits)

    def __len__(self) -> int:
        return len(self.visits)

    def __contains__(self, site: object) -> bool:
        return site in self.visits

    def dense(self, site: str) -> Tensor:
        """The value of the last visit of ``site`` over the whole batch, 0 where a row never reached it."""
        return self[site][-1].dense(self.batch)

    @property
    def flops(self) -> Tensor:
        """Executed FLOPs of each row, (rows,) int64; their sum is what FlopCounterMode counts around the same call."""
        return self._priced().flops(self)

    @property
    def dense_flops(self) -> Tensor:
        """FLOPs of each row with every site's costliest alternative, (rows,) int64."""
        return self._priced().dense_flops(self)

    def _priced(self) -> Accounts:
        if self.accounts is None:
            raise PliantError(
                got="a trace without prices",
                expected="a trace made by record(model)(x) in eager mode",
                do="price it with pliant.cost.accounts(model, args) and Trace(..., accounts=...)",
            )
        return self.accounts


def _there(tensors: list[Any]) -> dict[str, Any]:
    """The tensors that are there, by their place: transforms such as vmap take no None for an output."""
    return {str(i): t for i, t in enumerate(tensors) if t is not None}


class _Context(list[Any]):
    """What stands beside a flat trace's tensors. The prices go along where a trace is rebuilt in the same process, as DDP does."""

    accounts: Accounts | None = None


def _flatten(t: Trace) -> tuple[list[Any], _Context]:
    exits = [_there([e.logits, e.rows, e.reached]) for e in t.exits]
    leaves = [dict(t.visits), exits, [_there([n.rows, n.units, n.wanted]) for n in t.notes]]
    names = [[n.site, n.visit, n.choice] for n in t.notes]
    context = _Context([t.batch if isinstance(t.batch, int) else -1, names])  # pyright: ignore[reportUnnecessaryIsInstance]
    if not torch.compiler.is_compiling():
        context.accounts = t.accounts
    return leaves, context


def _unflatten(leaves: Any, context: Any) -> Trace:
    visits, exits, notes = leaves
    batch, names = context
    return Trace(
        visits,
        tuple(Exit(e["0"], e.get("1"), e.get("2")) for e in exits),
        tuple(Note(n[0], n[1], n[2], r.get("0"), r.get("1"), r.get("2")) for n, r in zip(names, notes, strict=True)),
        batch,
        getattr(context, "accounts", None),
    )


pytree.register_pytree_node(
    Trace, _flatten, _unflatten, serialized_type_name="pliant.Trace",
    to_dumpable_context=list, from_dumpable_context=lambda c: c,
)  # fmt: skip


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of a call: the first dimension of its first tensor."""
    if args and isinstance(args[0], Tensor) and args[0].ndim:
        return args[0].shape[0]
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise PliantError(got="a call without tensors", expected="an input with rows first", do="pass a batch")


class Recorder(nn.Module):
    """Wraps a model so that a call returns ``(y, trace)``; see :func:`record`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Trace]:
        """Call the model with a tape open."""
        if isinstance(self.model, DistributedDataParallel):
            _refuse_search(self.model)
        written = tape.Tape()
        with tape.opened(written):
            y = self.model(*args, **kwargs)
        accounts = _accountant[0](self.model, args, kwargs) if _accountant else None
        trace = Trace.later(self.model, written, batch_of(args, kwargs), accounts)
        if torch.compiler.is_compiling():
            trace = Trace(trace.visits, trace.exits, trace.notes, trace.batch, accounts)
        return y, trace


def _refuse_search(model: DistributedDataParallel) -> None:
    """DDP takes a parameter that only the trace has read for unused, and then meets its gradient."""
    if model.find_unused_parameters and torch.is_grad_enabled():
        raise PliantError(
            got="a DistributedDataParallel that looks for unused parameters in the prediction alone",
            expected="one that sees the trace too, or doesn't look",
            do="wrap it the other way round, DistributedDataParallel(record(model)), or pass find_unused_parameters=False",
        )


_known: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[str, str]]] = weakref.WeakKeyDictionary()


def _holds(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether ``path``, as found before, still leads to ``module``."""
    here: nn.Module | None = model
    for name in path.split(".") if path else ():
        here = None if here is None else here._modules.get(name)  # pyright: ignore[reportPrivateUsage]
    return here is module


def _paths(model: nn.Module, written: tape.Tape) -> dict[int, str]:
    """The clean path of every owner. A walk over all modules costs more than the recording, so what it found is kept
    beside the model and each path is looked up before it's used again."""
    owners = {id(site): site for site, _ in written.decisions}
    for owner, *_ in written.ran:
        owners[id(owner)] = owner
    known = {} if torch.compiler.is_compiling() else _known.get(model, {})
    found: dict[int, str] = {}
    for key, owner in owners.items():
        path, cleaned = known.get(key, (None, ""))
        if path is None or not _holds(model, path, owner):
            break
        found[key] = cleaned
    if len(found) < len(owners):
        known = known | {id(module): (name, clean(name)) for name, module in named(model) if id(module) in owners}
        if not torch.compiler.is_compiling():
            _known[model] = known
        if not owners.keys() <= known.keys():
            raise PliantError(
                got="a trace of sites that are no longer in the model",
                expected="the model as it was when the call was recorded",
                do="read the trace (list(trace)) before taking its model apart",
            )
        found = {key: known[key][1] for key in owners}
    return found


def _read(model: nn.Module, written: tape.Tape) -> dict[str, Any]:
    """Turn what was written into a trace's fields: owners become paths, visits of a site come together."""
    paths = _paths(model, written)
    visits: dict[str, tuple[Decision, ...]] = {}
    for site, decision in written.decisions:
        path = paths[id(site)]
        visits[path] = (*visits.get(path, ()), decision) if decision.visit else (decision,)
    exits = tuple([Exit(*e) for e in written.exits])
    notes = tuple([Note(paths[id(ran[0])], *ran[1:]) for ran in written.ran])
    return {"visits": visits, "exits": exits, "notes": notes}


def record(model: nn.Module) -> Recorder:
    r"""A wrapper whose call returns the prediction and what was decided: ``y, trace = record(model)(x)``.

    Recording leaves ``y`` bit-identical. The tape is thread-local and closes when the call ends.

    Args:
        model: any module; its sites are found by their paths in ``named_modules()``.

    Returns:
        A module with the same inputs, returning ``(y, Trace)``.

    Raises:
        PliantError: where a site runs without gradients inside a recording that wants them (reentrant checkpointing).

    >>> import pliant
    >>> import torch
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> y, trace = record(model)(torch.zeros(2, 3, 32, 32))
    >>> list(trace), y.shape
    (['sites.0', 'sites.1'], torch.Size([2, 4]))
    """
    return Recorder(model)
