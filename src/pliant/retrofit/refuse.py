"""What can't be retrofitted at all, whatever is attached."""

from __future__ import annotations

import torch
from torch import nn

from pliant.core.bind import named
from pliant.core.errors import PliantError


def refuse_model(model: nn.Module, name: str) -> None:
    """Raise where ``model`` is wrapped or compiled, or has something called ``name`` already."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers):
        raise PliantError(
            got=f"a model inside {type(model).__name__}", expected="the model itself", do=f"attach {name}, then wrap"
        )
    for _, module in named(model):
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise PliantError(
                got=f"a compiled {type(module).__name__}",
                expected="a model in eager mode: hooks added after compilation are ignored",
                do=f"attach {name} to the model as it was before torch.compile or torch.jit.script",
            )
    if hasattr(model, name):
        raise PliantError(
            got=f"a model with an attribute {name!r} of its own", expected="the name to be free",
            do=f"{name} are attached once: name all layers in one call, or wrap the model in a module that holds it under another name",
        )  # fmt: skip
