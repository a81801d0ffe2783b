"""Examples and held-out batches as calls of a model, and the prediction in what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pliant.core.errors import PliantError
from pliant.core.trace import batch_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(example: Any) -> Call:
    """An example as the arguments of a call: a mapping is keywords, a tuple positions, anything else the one argument."""
    if isinstance(example, Mapping):
        return (), dict(cast("Mapping[str, Any]", example))
    return (tuple(cast("list[Any]", example)), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def rows_of(call: Call, count: int) -> Call:
    """A call with ``count`` rows, made by repeating those of ``call`` in turn."""
    batch = batch_of(*call)
    if batch == 0:
        raise PliantError(got="an example without rows", expected="at least one", do="pass a small batch")

    def repeat(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.ndim == 0 or t.shape[0] != batch:
            return t
        return t.index_select(0, torch.arange(count, device=t.device) % batch)

    return pytree.tree_map(repeat, call)


def labelled(batch: object) -> tuple[Call, Tensor]:
    """A batch of a loader as a call and its labels: a pair ``(inputs, labels)``, or a mapping with ``labels``.

    Raises:
        PliantError: where it is neither.

    >>> (args, kwargs), labels = labelled({"input_ids": torch.ones(2, 3), "labels": torch.tensor([0, 1])})
    >>> args, list(kwargs), labels.tolist()
    ((), ['input_ids'], [0, 1])
    """
    what = type(batch).__name__
    if isinstance(batch, Mapping):
        inputs = dict(cast("Mapping[str, Any]", batch))
        labels = inputs.pop("labels", None)
        if isinstance(labels, Tensor):
            return ((), inputs), labels
    elif isinstance(batch, (tuple, list)):
        pair = cast("list[Any]", batch)
        if len(pair) == 2 and isinstance(pair[1], Tensor):
            return call_of(pair[0]), pair[1]
        what += f" of {len(pair)}"
    raise PliantError(
        got=f"a batch that is a {what}",
        expected="a pair (inputs, labels), or a mapping with 'labels'", do="pass a loader of such batches",
    )  # fmt: skip


def moved(call: Call, device: torch.device) -> Call:
    """The same call on ``device``."""

    def move(t: Any) -> Any:
        return t.to(device) if isinstance(t, Tensor) else t

    return pytree.tree_map(move, call)


def joined(calls: list[Call]) -> Call:
    """The rows of several calls in one.

    Raises:
        PliantError: where they differ in more than their rows.
    """
    if len(calls) == 1:
        return calls[0]
    leaves, specs = zip(*(pytree.tree_flatten(call) for call in calls), strict=True)
    shapes = [[t.shape[1:] if isinstance(t, Tensor) and t.ndim else None for t in each] for each in leaves]
    if any(spec != specs[0] for spec in specs) or any(shape != shapes[0] for shape in shapes):
        raise PliantError(
            got="batches whose inputs differ in shape", expected="the same shape but for the rows",
            do="pad held-out texts to one length",
        )  # fmt: skip
    whole = [
        torch.cat(each) if shape is not None else each[0]
        for each, shape in zip(zip(*leaves, strict=True), shapes[0], strict=True)
    ]
    return pytree.tree_unflatten(whole, specs[0])


def prediction_of(output: object) -> Tensor:
    """The logits in a host's output: the tensor itself, ``.logits`` / ``["logits"]``, or a tuple's first element."""
    found, kind = cast("Any", output), type(output).__name__
    if isinstance(output, Mapping):
        found = cast("Mapping[str, Any]", output).get("logits")
    elif type(output) is tuple:
        found = next(iter(cast("tuple[Any, ...]", output)), None)
    if isinstance(found, Tensor) and found.ndim >= 2:
        return found
    raise PliantError(
        got=f"a model that returns {kind}",
        expected="a tensor of logits with rows first, a mapping with 'logits', or a tuple that begins with them",
        do="wrap the model so that it returns its logits",
    )
