"""Count the FLOPs of every part of a model, once per input shape, with PyTorch's own counter on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from pliant.core import tape
from pliant.core.bind import bind, clean, executors, share, sites
from pliant.core.errors import PliantError
from pliant.core.site import Outcome, Rule, Site
from pliant.cost import formulas as formulas  # registers them: prices need them
from pliant.rules.fixed import Always
from pliant.rules.threshold import Threshold

Key = tuple[str, int, str]
"""A part: path of its site, which visit of it, and the choice that runs it."""


@dataclass
class Part:
    """What one part costs a row without the parts inside it, of how many units of work, and the keys of those inside."""

    own: int = 0
    of: int = 1
    inner: list[Key] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Prices:
    """FLOPs per row of every part of one model at one input shape; ``root`` is what no site controls."""

    root: Part
    parts: dict[Key, Part]

    def part(self, key: Key) -> Part:
        """The part ``key``; a later visit of a looped site costs what its first visit did."""
        found = self.parts.get(key) or self.parts.get((key[0], 0, key[2]))
        if found is None:
            raise PliantError(
                got=f"part {key[2]!r} of visit {key[1]}, which the dense pass never ran",
                expected="every part to run when everything is computed",
                do="make the executor's masked form run each alternative through tape.part",
                site=key[0],
            )
        return found


class _Meter:
    """Attributes what the counter saw to the part that was running."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.root = Part()
        self.stack = [self.root]
        self.parts: dict[tuple[int, int, str], Part] = {}
        self.inner: dict[Part, list[tuple[int, int, str]]] = {}
        self.seen = 0

    def settle(self) -> None:
        """Give what was counted since the last time to the part that runs."""
        total = sum(self.counter.flop_counts.get("Global", {}).values())
        self.stack[-1].own += total - self.seen
        self.seen = total

    def enter(self, owner: nn.Module, visit: int, choice: str, of: int) -> None:
        self.settle()
        key = (id(owner), visit, choice)
        self.inner.setdefault(self.stack[-1], []).append(key)
        self.stack.append(self.parts.setdefault(key, Part(of=of)))

    def leave(self) -> None:
        self.settle()
        self.stack.pop()

    def extend(self, owner: nn.Module, visits: int) -> None:
        first = [key for key in self.inner[self.stack[-1]] if key[:2] == (id(owner), 0)]
        for visit in range(2, visits):
            self.inner[self.stack[-1]] += [self._later(key, visit) for key in first]

    def _later(self, key: tuple[int, int, str], visit: int) -> tuple[int, int, str]:
        """Part ``key`` of visit 0, and all inside it, for a later visit."""
        owner, _, choice = key
        first, second = self.parts[key], self.parts[owner, 1, choice]
        later = Part(own=first.own + visit * (second.own - first.own), of=first.of)
        self.parts[owner, visit, choice] = later
        self.inner[later] = [self._later(inside, visit) for inside in self.inner.get(first, [])]
        return owner, visit, choice


@dataclass(frozen=True)
class Like:
    """A tensor's shape, dtype and device without its numbers: a trace must not hold on to the batch it is of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Call = tuple[tuple[Any, ...], dict[str, Any]]


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The inputs of a call with each tensor replaced by what it's like."""

    def like(t: Any) -> Any:
        return Like(tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else t

    if not kwargs and all(isinstance(t, Tensor) for t in args):  # most calls; the tree map costs as much as recording
        return tuple(like(t) for t in args), {}
    return pytree.tree_map(like, (args, dict(kwargs)))


def _rows(call: Call) -> int:
    return next((t.shape[0] for t in pytree.tree_leaves(call) if isinstance(t, Like) and t.shape), 0)


Sizes = dict[tuple[str, int], int]
"""How many choices spent at a visit of each site whose choices are the size of a tensor (``Site.sized``)."""


class _Sized(Rule):
    """Stands in while prices are counted: a known number of choices spends, all of them where none is known."""

    def __init__(self, sizes: dict[int, int], *, reads_scores: bool) -> None:
        super().__init__()
        self.sizes, self.reads_scores, self.visit = sizes, reads_scores, 0

    def at(self, visit: int) -> _Sized:
        twin = _Sized(self.sizes, reads_scores=self.reads_scores)
        twin.visit = visit
        return twin

    def count(self, choices: int) -> int:
        return self.sizes.get(self.visit, choices)

    def forward(self, scores: Tensor) -> Outcome:
        return Outcome(torch.ones_like(scores))


def _stand_in(path: str, site: Site, sizes: Sizes) -> Rule:
    """A rule that spends everywhere, asking for scores as the site's own does."""
    reads = site.rule.reads_scores
    if site.sized:
        return _Sized({visit: n for (name, visit), n in sizes.items() if name == path}, reads_scores=reads)
    return Threshold(float("-inf")) if reads else Always()


def count(model: nn.Module, call: Call, sizes: Sizes | None = None) -> Prices:
    """Run everything once on fake tensors and attribute each operation to the innermost part it belongs to.

    Args:
        model: any module with sites; it isn't touched, and no real number is computed.
        call: the inputs to be priced, from :func:`describe`; at least one row.
        sizes: of tensors whose size is decided; default, all that there is.

    Returns:
        FLOPs per row (2 per multiply-add).

    Raises:
        PliantError: where a part's cost isn't a multiple of the number of rows.
    """
    rules = {path: _stand_in(path, site, sizes or {}) for path, site in sites(model).items()}
    dense = bind(model, rules) if rules else share(model)
    for module in dense.modules():
        # Buffers of its own, lest batch norms count this call among their batches; parameters without gradients, since
        # PyTorch's module tracker fails on a view of a parameter that a module returns under no_grad.
        own = {name: b.clone() for name, b in module._buffers.items() if b is not None}
        module._buffers.update(own)
        frozen = {name: nn.Parameter(p.detach(), False) for name, p in module._parameters.items() if p is not None}
        module._parameters.update(frozen)
    for executor in executors(dense):
        if executor.form != "plain":  # a plain executor runs its backbone and has no parts
            executor.form = "masked"
    batch = _rows(call)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        args, kwargs = pytree.tree_map(
            lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device) if isinstance(t, Like) else t, call
        )
        with FlopCounterMode(display=False) as counter:
            meter = _Meter(counter)
            with tape.opened(tape.Tape(meter)):
                dense(*args, **kwargs)
            meter.settle()
    paths = {id(m): clean(name) for name, m in dense.named_modules()}
    keys = {key: (paths[key[0]], key[1], key[2]) for key in meter.parts}
    for part in (meter.root, *meter.parts.values()):
        part.inner = [keys[key] for key in meter.inner.get(part, [])]
        if part.own % batch:
            raise PliantError(
                got=f"a part of {part.own} FLOPs for {batch} rows",
                expected="a cost that grows with the rows",
                do="move what doesn't depend on the rows out of the model's forward",
            )
        part.own //= batch
        if part.own % part.of:
            raise PliantError(
                got=f"a part of {part.own} FLOPs a row for {part.of} units",
                expected="units of equal cost",
                do="note what doesn't grow with the units as a part of its own",
            )
    return Prices(meter.root, {keys[key]: part for key, part in meter.parts.items()})


# By the first parameter, which a model shares with all its bound, masked and plain copies: they cost the same parts.
_cache = WeakIdKeyDictionary()


def _structure(model: nn.Module) -> int:
    """What the parts of a model cost hangs on: its modules as they print themselves, not the rules that decide."""
    return hash(
        tuple(
            (name, type(module).__qualname__, module.extra_repr(), getattr(module, "form", "") == "plain")
            for name, module in model.named_modules()
            if not isinstance(module, Rule) and ".rule." not in name
        )
    )


def prices(model: nn.Module, call: Call, sizes: Sizes | None = None) -> Prices:
    """The prices of a call, counted once per structure, input shape, decided sizes and set of rules that read scores."""
    batch = _rows(call)
    if batch == 0:  # an empty batch costs nothing, but its prices may be asked for all the same
        call = pytree.tree_map(lambda t: Like((1, *t.shape[1:]), t.dtype, t.device) if _has_rows(t, 0) else t, call)
    leaves, spec = pytree.tree_flatten(call)
    shapes = tuple(repr((t.shape[1:], t.dtype, t.device) if _has_rows(t, max(batch, 1)) else t) for t in leaves)
    reads = tuple(site.rule.reads_scores for site in sites(model).values())
    key = (_structure(model), str(spec), shapes, reads, model.training, tuple(sorted((sizes or {}).items())))
    owner = next(model.parameters(), model)
    table: Any = _cache.setdefault(owner, {})
    if key not in table:
        table[key] = count(model, call, sizes)
    return table[key]


def _has_rows(t: Any, rows: int) -> bool:
    return isinstance(t, Like) and len(t.shape) > 0 and t.shape[0] == rows
