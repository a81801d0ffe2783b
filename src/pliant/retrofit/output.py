"""What a host returns: find the prediction in it, and build the same type around another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.core.errors import PliantError


def prediction_of(output: Any) -> Tensor:
    """The logits in a host's output: the tensor itself, ``.logits`` / ``["logits"]``, or a tuple's first element."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif type(output) is tuple and output:
        found = output[0]
    if isinstance(found, Tensor) and found.ndim >= 2:
        return found
    raise PliantError(
        got=f"a model that returns {type(output).__name__}",
        expected="a tensor of logits with rows first, a mapping with 'logits', or a tuple that begins with them",
        do="wrap the model so that it returns its logits",
    )


def output_like(kind: type, prediction: Tensor) -> Any:
    """``prediction`` as an output of type ``kind``; what else such an output may hold is left out."""
    if issubclass(kind, Tensor):
        return prediction
    return (prediction,) if kind is tuple else kind(logits=prediction)
