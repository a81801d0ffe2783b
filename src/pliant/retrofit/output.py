"""What a host returns: the same type built around another prediction."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def output_like(kind: type, prediction: Tensor) -> Any:
    """``prediction`` as an output of type ``kind``; what else such an output may hold is left out."""
    if issubclass(kind, Tensor):
        return prediction
    return (prediction,) if kind is tuple else kind(logits=prediction)
