"""Checks of copies: exported, saved, copied, and shared between threads, a model answers the same."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.checks.subject import Subject, failed, identical, near, tensors
from pliant.core.bind import bind, share, sites
from pliant.core.trace import record
from pliant.rules.fixed import Always, Never

CALLS = 10


def export_equals_eager(s: Subject) -> str:
    """torch.export with a dynamic batch answers as eager does on every path: all on, all off, mixed, its own."""
    if s.batch < 3:
        return "not asked: needs at least 3 rows, so that a smaller batch isn't a special case"
    turn = [Always(), Never()]
    paths: dict[str, Any] = {
        "all on": s.everywhere(Always()),
        "all off": s.everywhere(Never()),
        "mixed": bind(s.model, {path: turn[i % 2] for i, path in enumerate(s.paths)}),
    }
    if not s.stochastic():
        paths["its own decisions"] = s.model
    fewer, worst = torch.arange(s.batch - 1), 0.0
    for name, model in paths.items():
        program = _exported(s, model, name)
        sure = s.decided() if model is s.model else torch.ones(s.batch, dtype=torch.bool)
        for rows in (None, fewer):
            what = f"exported against eager, {name}"
            do = "let every executor have a form without Python branches on data"
            index = torch.arange(s.batch) if rows is None else rows
            worst = max(worst, near("export", s.call(program, rows), s.call(model, rows), what, do, sure[index]))
    return f"apart by {worst:.1e} at most on: {', '.join(paths)}"


def _exported(s: Subject, model: nn.Module, name: str) -> nn.Module:
    args, kwargs = s.inputs()
    # Copies: the same tensor passed twice would be one entry below.
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
    shapes = torch.export.ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == s.batch:
            shapes[t] = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(share(model), args, kwargs, dynamic_shapes=shapes).module()
    except Exception as error:  # whatever the exporter raises, it's this check's finding
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise failed(
            "export", f"{type(error).__name__} from torch.export ({name}): {first[:300]}",
            "a program with a dynamic batch", "use no Python branch or .item() on data in forward",
        ) from error  # fmt: skip


def _reference(s: Subject) -> tuple[Any, list[Tensor]]:
    """A model whose answers can be compared: the own rules, or frozen ones where those draw."""
    model = s.frozen(s.model) if s.stochastic() and s.loops() is None else s.model
    return model, s.call(model)


def state_dict_round_trip(s: Subject) -> str:
    """A copy with scrambled tensors answers the same once the saved state is loaded, strictly."""
    model, wanted = _reference(s)
    state = {name: t.clone() for name, t in s.model.state_dict().items()}
    other = copy.deepcopy(s.model)
    with torch.no_grad():
        for t in other.state_dict().values():
            t.normal_() if t.is_floating_point() else t.zero_()
    other.load_state_dict(state, strict=True)
    if model is not s.model:
        other = _reference_of(s, other, model)
    if not identical(s.call(other), wanted):
        raise failed(
            "state_dict", "another answer after saving and loading", "the same bits",
            "register every tensor that the answer depends on as a parameter or persistent buffer",
        )  # fmt: skip
    return f"{len(state)} tensors, the same bits"


def _reference_of(s: Subject, other: nn.Module, model: nn.Module) -> Any:
    return bind(other, {path: site.rule for path, site in sites(model).items()})


def deep_copies(s: Subject) -> str:
    """copy.deepcopy works before and after a training forward, its graph still alive, and answers the same."""
    model, wanted = _reference(s)
    args, kwargs = s.inputs()
    training = copy.deepcopy(s.model).train()
    y = record(training)(*args, **kwargs)[0]
    try:
        copy.deepcopy(training)
    except (RuntimeError, TypeError) as error:
        raise failed(
            "deepcopy", f"{type(error).__name__} after a training forward: {error}", "a copy",
            "keep no result of forward on a module",
        ) from error  # fmt: skip
    del y
    twin = copy.deepcopy(model)
    if not identical(s.call(twin), wanted):
        raise failed("deepcopy", "another answer from the copy", "the same bits", "keep no state outside tensors")
    ours = {p.data_ptr() for p in model.parameters() if p.numel()}
    if any(p.data_ptr() in ours for p in twin.parameters() if p.numel()):
        raise failed("deepcopy", "a copy that shares parameters", "tensors of its own", "use no custom __deepcopy__")
    return "before and after a training forward"


def two_threads(s: Subject) -> str:
    """One thread records while another runs a forced copy of the same tensors; neither changes the other."""
    model, wanted = _reference(s)
    never = s.everywhere(Never())
    cheap = s.call(never)
    flops = s.record(model)[1].flops
    wrong: list[str] = []
    start = threading.Barrier(2)

    def watch() -> None:
        args, kwargs = s.inputs()
        start.wait()
        for _ in range(CALLS):
            with torch.no_grad():
                y, trace = record(model)(*args, **kwargs)
            if not identical(tensors(y), wanted) or not torch.equal(trace.flops, flops):
                wrong.append("the recording thread")

    def force() -> None:
        start.wait()
        wrong.extend("the forced thread" for _ in range(CALLS) if not identical(s.call(never), cheap))

    threads = [threading.Thread(target=watch), threading.Thread(target=force)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise failed(
            "threads", f"{len(wrong)} of {2 * CALLS} calls altered ({wrong[0]})", "none",
            "write no state to a module or a global in forward",
        )  # fmt: skip
    return f"0 of {2 * CALLS} calls altered"
