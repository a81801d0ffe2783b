"""compile: what lies between decisions is compiled, and decisions stay eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import share
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.retrofit.skips import Aside, HostSkip


class _Compiled:
    """A module's own forward, compiled when it's first called. A copy of the module gets one of its own.

    Rows are marked as what varies, so that the first mix of decisions doesn't fix their number.
    """

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]) -> None:
        self.forward = forward  # a bound method: copies follow the module
        self.options = options
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _fake(args, kwargs):  # prices and exported programs are of the plain module
            return self.forward(*args, **kwargs)
        if self.compiled is None:
            self.compiled = torch.compile(_own(self.forward), **self.options)
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.ndim and t.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(t, 0)
        return self.compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": None}


def _own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` behind code of its own: PyTorch keeps programs by code, and only a few of them, while blocks share theirs."""

    def part(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    part.__code__ = part.__code__.replace()  # a code object that no other part has
    return part


def _fake(args: Any, kwargs: Any) -> bool:
    fake = torch._subclasses.FakeTensor
    return any(isinstance(t, fake) for t in pytree.tree_leaves((args, kwargs)))


def static_parts(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that are called and hold no decision, by path.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", exits=2, base=1, step=1, channels=4)
    >>> [path for path, _ in static_parts(model)]
    ['stages.0', 'stages.1', 'heads.0', 'heads.1']
    """
    if isinstance(model, Site) or ("forward" in vars(model) and not isinstance(model, Executor) and path):
        return  # a module whose forward was replaced is some executor's, which runs the old one
    inner = (m for m in model.modules() if m is not model)
    decides = any(map(_decides, model.modules())) or any(map(_hooked, inner))
    if _called(model) and not decides and any(True for _ in model.parameters()):
        yield path, model
        return
    if isinstance(model, HostSkip):
        yield path, model  # its block's own forward
        return
    for name, child in model.named_children():
        yield from static_parts(child, f"{path}.{name}".lstrip("."))


def _called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward  # a list of modules isn't called itself


def _hooked(module: nn.Module) -> bool:
    """Whether decisions hang on a layer of a host: behind its own forward, and so inside that of what holds it."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(isinstance(getattr(getattr(h, "func", h), "__self__", None), (Aside, Executor)) for h in hooks)


def _decides(module: nn.Module) -> bool:
    return isinstance(module, (Site, Executor)) or "forward" in vars(module)


def compile(model: nn.Module, **options: Any) -> Any:
    r"""A copy of ``model`` whose static parts are compiled one by one, while decisions stay in eager mode.

    A whole dynamic network can't be compiled without a graph break at every decision, or a recompilation for every mix of
    them. So each largest part without a decision (stages, heads, branches, experts) is compiled by itself with a dynamic
    number of rows: when the mix changes, nothing is compiled again. A part may have up to three programs: for one row, which
    is a constant to PyTorch, for several, and for all that came, where an executor then hands on more than the others
    need; on one thread, where PyTorch has another kernel for convolutions of fewer than 16 rows, one more. Parts are compiled
    when they first run. Tune, bind and replay before compiling: what ``bind`` returns is compiled afresh; thresholds may be
    changed at any time. On a processor most time goes to kernels that eager mode calls as well: compiling alone gains
    nothing for convolutions there, and 1.02 to 1.4 times eager's speed where batch norms are folded first,
    ``compile(optimised(model, x))`` (``benchmarks/compile.py``).

    Args:
        model: any model with sites, or without; in evaluation or training.
        options: as for ``torch.compile``: ``backend``, ``mode``, ``fullgraph`` ... With none of backend, mode and options, a
            model on a processor keeps its convolutions' layout, since the compiler's choice halves their speed on small maps.

    Returns:
        A model of the same type that shares every parameter and buffer.

    Raises:
        PliantError: where nothing is left to compile.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", exits=2, base=1, step=1, channels=4).eval()
    >>> x = torch.randn(3, 3, 32, 32)
    >>> with torch.no_grad():
    ...     torch.allclose(compile(model, backend="eager")(x), model(x), atol=1e-6)
    True

    References:
        Survey section 6 (gap between theory and practice).
    """
    twin = share(model)
    found = list(static_parts(twin))
    if not found:
        raise PliantError(
            got="a model without a static part", expected="modules with parameters between the decisions",
            do="compile models that compute something",
        )  # fmt: skip
    chosen = {"backend", "mode", "options"} & options.keys()
    if not chosen and all(p.device.type == "cpu" for p in twin.parameters()):
        options = {**options, "options": {"layout_optimization": False}}
    for _, part in found:
        if isinstance(part, HostSkip):
            part.host = _Compiled(part.host, options)
        else:
            vars(part)["forward"] = _Compiled(part.forward, options)
    return twin
