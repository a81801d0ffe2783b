"""create_model: build a system of the catalogue by its id."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from pliant.core.errors import PliantError
from pliant.systems.table import builder


def create_model(id: str, **kwargs: Any) -> nn.Module:
    """Build a system by its id.

    Args:
        id: from :func:`list_models`.
        kwargs: of its constructor; ``num_classes=`` and ``in_chans=`` everywhere.

    Returns:
        The model, with random weights, in training mode as any new module.

    Raises:
        PliantError: for an id or an argument that doesn't exist; the message names those that do.

    >>> create_model("msdnet", num_classes=4, exits=3).pliant_config["id"]
    'msdnet'
    """
    build = builder(id)
    known = inspect.signature(build).parameters
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise PliantError(
            got=f"argument {unknown[0]!r} for {id!r}",
            expected="one of " + ", ".join(known),
            do="see 'pliant info " + id + "'",
        )
    model = build(**kwargs)
    model.pliant_config = {"id": id, "kwargs": dict(kwargs)}  # pyright: ignore[reportArgumentType]
    return model
