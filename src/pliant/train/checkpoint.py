"""Checkpoints: exact, whole or not at all, and read without executing anything."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.files import atomic

FORMAT = "pliant.train/2"


def generators(model: nn.Module) -> Iterator[torch.Generator]:
    """The random generators that modules of ``model`` own, each once, in a fixed order."""
    found = {id(v): v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)}
    return iter(found.values())


def model_state(model: nn.Module) -> dict[str, Any]:
    """All that training changes in ``model``: its state_dict, what the state_dict leaves out, its generators."""
    state = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    return {"state_dict": dict(state), "buffers": buffers, "generators": [g.get_state() for g in generators(model)]}


@torch.no_grad()
def load_model_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Put back what :func:`model_state` took."""
    model.load_state_dict(saved["state_dict"])
    buffers = dict(model.named_buffers())
    for name, value in saved["buffers"].items():
        buffers[name].copy_(value)
    for generator, state in zip(generators(model), saved["generators"], strict=True):
        generator.set_state(state)


def shape_of(model: nn.Module) -> dict[str, str]:
    """Every tensor of ``model`` by name with its shape and type: what tells two models apart."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    shapes = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}
    return {**shapes, "number of random generators": str(len(list(generators(model))))}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` whole, in place of the old file."""
    with atomic(path) as part:
        torch.save({"format": FORMAT, **state}, part)


def load(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint and compare its identity with ``expected``: from what is compared to its value.

    Raises:
        PliantError: where the file can't be read, isn't a checkpoint of ours, or is of another plan or model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load doesn't compare checksums: flipped bits would become weights
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file raises anything from EOFError to AttributeError
        raise PliantError(
            got=f"{path}, which cannot be read ({type(error).__name__})",
            expected="a whole checkpoint written by fit",
            do="delete the file to start anew, or restore it from a copy",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise PliantError(
            got=f"{path}, which fit has not written",
            expected=f"a checkpoint of format {FORMAT}",
            do="pass another path as checkpoint; files of others aren't written over",
        )
    for what, value in expected.items():
        if state["identity"].get(what) != value:
            raise PliantError(
                got=f"{path}, a checkpoint of {_difference(what, state['identity'].get(what), value)}",
                expected=f"one of the same {what}",
                do=f"resume with the {what} it was made with, or delete the file to start anew",
            )
    return state


def _difference(what: str, there: Any, here: Any) -> str:
    """The first thing that differs, in a few words."""
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(k for k in [*here, *there] if there.get(k) != here.get(k))
        return f"another {what} ({key}: {there.get(key, 'missing')} there, {here.get(key, 'missing')} here)"
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"another {what} ({len(there)} phases there, {len(here)} here)"
        at = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        return _difference(what, there[at], here[at])
    return f"another {what} ({there} there, {here} here)"
