"""Look at a host before anything is attached: run it on an example at two batch sizes and note what each module does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import named, share
from pliant.core.calls import Call
from pliant.core.errors import PliantError
from pliant.retrofit.host import Leaf


def module_of(model: nn.Module, path: str) -> nn.Module:
    """The submodule ``path``, or an error that names it."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PliantError(
            got=f"the name {path!r}", expected="that of a submodule", do="see dict(model.named_modules()) for the names"
        ) from error


def cover(model: nn.Module, at: Iterable[str]) -> list[str]:
    """The modules whose arguments must be cut: the siblings of each layer in ``at`` and of its parents.

    What runs inside a sibling gets its tensors from the sibling. A container that isn't called stands for its children.
    """
    found: dict[str, None] = {}

    def add(path: str, module: nn.Module) -> None:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for name, child in module.named_children():
                add(f"{path}.{name}", child)
        else:
            found[path] = None

    for path in at:
        parts = path.split(".")
        for depth in range(len(parts)):
            parent = ".".join(parts[:depth])
            for name, child in model.get_submodule(parent).named_children():
                if name != parts[depth]:
                    add(f"{parent}.{name}".lstrip("."), child)
    return list(found)


@dataclass
class Seen:
    """What one run showed."""

    ran: list[str] = field(default_factory=list)
    first: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shape of each module's first returned tensor
    sizes: dict[Leaf, int] = field(default_factory=dict)  # first dimension of every tensor handed to or returned by it
    taken: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # shape of the first floating-point tensor it's handed
    hidden: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def _leaves(path: str, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Leaf, Tensor]]:
    for place, tree in [*enumerate(args), *kwargs.items()]:
        for j, t in enumerate(pytree.tree_leaves(tree)):
            if isinstance(t, Tensor) and t.ndim:
                yield (path, place, j), t


def look(model: nn.Module, call: Call, at: Sequence[str]) -> Seen:
    """Run a copy of ``model`` once in evaluation mode and note every module."""
    seen = Seen()

    def note(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.ran.append(path)
        seen.sizes.update((leaf, t.shape[0]) for leaf, t in _leaves(path, args, {**kwargs, "": output}))
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if tensors and tensors[0].is_floating_point():
            seen.first[path] = tuple(tensors[0].shape)
        handed = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point())
        seen.taken[path] = next((tuple(t.shape) for t in handed), ())
        if path in at:
            seen.hidden[path] = output

    probe = share(model).eval()
    for path, module in named(probe):
        if path:
            module.register_forward_hook(partial(note, path), with_kwargs=True)
    with torch.no_grad():
        seen.output = probe(*call[0], **call[1])
    return seen


def fixed(few: Seen, many: Seen, rows: tuple[int, int]) -> frozenset[Leaf]:
    """The tensors whose first dimension isn't rows, though it may by chance have their number."""
    return frozenset(leaf for leaf, n in few.sizes.items() if (n, many.sizes.get(leaf)) != rows)


def refuse_unfit(few: Seen, many: Seen, at: Sequence[str], rows: tuple[int, int]) -> None:
    """Raise where a layer in ``at`` doesn't run just once, in order, with rows first."""
    runs = Counter(few.ran)
    fit = [p for p in few.first if runs[p] == 1 and _follows(few, many, p, rows)]
    for path in at:
        if runs[path] != 1:
            raise PliantError(
                got=f"a layer that runs {runs[path]} times a call",
                expected="one that is called once" + ("; a container isn't called itself" if not runs[path] else ""),
                do=f"attach to a layer that is, e.g. {_near(path, fit)}",
                site=path,
            )
        if path not in fit:
            raise PliantError(
                got=f"a layer that returns {few.first.get(path, 'no floating-point tensor')} for {rows[0]} rows",
                expected="the batch as its first dimension (windows, patches or time first can't be cut by rows)",
                do=f"attach to a layer that has it, e.g. {_near(path, fit)}",
                site=path,
            )
    order = [path for path in few.ran if path in at]
    if order != list(at):
        raise PliantError(
            got=f"at={list(at)}", expected="the layers in the order in which they run", do=f"pass at={order}"
        )


def _follows(few: Seen, many: Seen, path: str, rows: tuple[int, int]) -> bool:
    a, b = few.first[path], many.first.get(path, ())
    return bool(a and b) and (a[0], b[0]) == rows


def _near(path: str, names: Sequence[str]) -> str:
    """The names nearest to ``path`` in the tree: those that share the longest prefix and are of its depth."""
    parts = path.split(".")

    def distance(name: str) -> tuple[int, int]:
        other = name.split(".")
        common = next(
            (i for i, (a, b) in enumerate(zip(parts, other, strict=False)) if a != b), min(len(parts), len(other))
        )
        return -common, abs(len(other) - len(parts))

    return ", ".join(map(repr, sorted(names, key=distance)[:3])) or "(this model has none)"
