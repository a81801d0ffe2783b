"""Layers of a host that follow one another: found by watching it run, proven by running them in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import named, plain, share
from pliant.core.calls import Call, rows_of
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Rule, Site
from pliant.retrofit.parts import looked_at
from pliant.rules.fixed import Always, Random


class Ran(NamedTuple):
    """A layer that ran, and what it read."""

    path: str
    layer: Any
    x: Tensor


@dataclass
class Watched:
    """What one call of a host showed."""

    host: nn.Module  # the copy that ran, plain
    layers: list[Ran] = field(default_factory=list)  # of the kind that was asked for, in running order
    runs: Counter[str] = field(default_factory=Counter)  # of every module
    order: list[str] = field(default_factory=list)  # in which they began

    calls: dict[str, Call] = field(default_factory=dict)  # what the named modules were called with

    def between(self, model: nn.Module, first: str, last: str, known: Iterable[str] = ()) -> tuple[nn.Module, ...]:
        """The modules of ``model`` that begin after ``first`` and before ``last``, all but the ``known``."""
        inner = set(self.order[self.order.index(first) + 1 : self.order.index(last)]) - set(known)
        return tuple(model.get_submodule(path) for path in sorted(inner))


Kind = Callable[[nn.Module], bool]
"""Which layers are asked for."""


def own(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer runs the forward of one of ``kinds``, unwatched: what stands in for it can know what it does."""
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    same = any(type(layer).forward is kind.forward for kind in kinds)
    return same and "forward" not in vars(layer) and not hooked


def watch(model: nn.Module, call: Call, at: Sequence[str], kind: Kind, rows: tuple[int, int]) -> Watched:
    """Run a plain copy of ``model`` in evaluation mode at two batch sizes; layers that don't have rows first are left out."""
    few, many = (_watch(model, rows_of(call, n), at, kind) for n in rows)
    size = {ran.path: ran.x.shape[0] for ran in many.layers}
    few.layers = [
        ran for ran in few.layers
        if few.runs[ran.path] == 1 and (ran.x.shape[0], size.get(ran.path)) == rows
    ]  # fmt: skip
    return few


def _watch(model: nn.Module, call: Call, at: Sequence[str], kind: Kind) -> Watched:
    host: nn.Module = plain(model).eval()
    seen = Watched(host)
    layers = {path for path, module in named(host) if kind(module)}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.runs[path] += 1
        seen.order.append(path)
        if path in layers and len(args) == 1 and isinstance(args[0], Tensor):
            seen.layers.append(Ran(path, module, args[0]))
        if path in at:
            seen.calls[path] = _cloned((args, kwargs))

    handles = [
        module.register_forward_pre_hook(partial(before, path), with_kwargs=True) for path, module in named(host) if path
    ]  # fmt: skip
    with torch.no_grad():
        host(*call[0], **call[1])
    for handle in handles:
        handle.remove()
    return seen


def _cloned(call: Any) -> Any:
    """Tensors of their own: a host may write into what it is handed."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, call)


def refuse_not_called(seen: Watched, at: Sequence[str]) -> None:
    """Raise where a module in ``at`` doesn't run just once."""
    for path in at:
        if seen.runs[path] != 1:
            raise PliantError(
                got=f"a module that runs {seen.runs[path]} times a call",
                expected="one that is called once" + ("; a container isn't called itself" if not seen.runs[path] else ""),
                do="name the modules inside that are called once", site=path,
            )  # fmt: skip


def inside(path: str, outer: str) -> bool:
    """Whether ``path`` is ``outer`` or lies in it."""
    return path == outer or path.startswith(outer + ".")


Build = Callable[[nn.Module, Rule], Executor]
"""Makes an executor around layers of a module, all of whose sites have the rule."""


def trouble(seen: Watched, path: str, build: Build, ends: tuple[str, str]) -> str | None:
    """Why layers inside ``path``, the first and the last of them called ``ends``, can't run in parts.

    None where they can, as a call of ``path`` alone proves.
    """
    if looked_at(seen.between(seen.host, *ends)):
        return "something is attached to what lies between"
    call = seen.calls[path]
    awake = _awake(seen.host.get_submodule(path))

    def answer(form: Any, rule: Rule) -> list[Tensor]:
        module = share(awake)
        executor = build(module, rule)
        executor.form = form
        args, kwargs = _cloned(call)
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    def half() -> Random:
        place = next((p.device for p in seen.host.parameters()), torch.device("cpu"))
        return Random(0.5, torch.Generator(place).manual_seed(0))

    with torch.no_grad():
        try:
            dense, whole = answer("plain", Always()), answer("gathered", Always())
            wanted, got = answer("masked", half()), answer("gathered", half())
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            return f"what lies between reads them as a whole: {str(error).splitlines()[0] if str(error) else error!r}"[
                :160
            ]
    if not all(map(torch.equal, dense, whole)):
        return "the answer changes with all of them on"
    off = max((float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(got, wanted, strict=True)), default=0.0)
    if not off <= 3 * torch.finfo(wanted[0].dtype).eps ** 0.5:
        return f"what some say hangs on others: answers change by {off:.1e}"
    if all(map(torch.equal, dense, wanted)):
        return "the answer doesn't hang on them"
    return None


def _awake(module: nn.Module) -> nn.Module:
    """A copy without parameters near 0: a fresh network's last norms and scales would hide whatever happens before them."""
    twin = share(module)
    generator = torch.Generator().manual_seed(0)
    for part in twin.modules():
        for name, p in part._parameters.items():
            if p is not None and p.numel() > 1 and float(p.detach().abs().amax()) < 1e-3:
                drawn = torch.rand(p.shape, generator=generator).to(p.device, p.dtype)
                part._parameters[name] = nn.Parameter(0.5 + drawn, False)
    return twin


def all_of(found: Sequence[str], at: Sequence[str], proven: Callable[[str], list[Any] | PliantError]) -> list[Any]:
    """What is found in each module: in each that was named, and in those of a pattern's that have it.

    Raises:
        PliantError: where a named one has none, or none has.
    """
    kept, refusal = list[Any](), None
    for path in found:
        here = proven(path)
        if isinstance(here, list):
            kept += here
        elif path in at:
            raise here
        else:
            refusal = refusal or here
    if not kept and refusal is not None:
        raise refusal
    return kept


def modules_of(at: str, names: Sequence[str]) -> Iterator[str]:
    """``names`` as they are called inside ``at``."""
    return (name.removeprefix(at).lstrip(".") for name in names)


def sites_of(executors: Sequence[nn.Module]) -> list[Site]:
    """All sites of ``executors``."""
    return [m for executor in executors for m in executor.modules() if isinstance(m, Site)]
