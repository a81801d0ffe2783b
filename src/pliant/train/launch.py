"""Lightning Fabric, started with what was asked for: devices, processes, precision."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from pliant.core.errors import PliantError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def _from_command_line(name: str) -> str | None:
    """What ``fabric run --name=...`` said, if that command started this process."""
    return os.environ.get(f"LT_{name}") if os.environ.get("LT_CLI_USED") == "1" else None


def precision_of(asked: str, accelerator: str) -> str:
    """The precision to train in: "auto" is bf16-mixed on a CUDA device that has bfloat16 in hardware, else 32-true.

    >>> precision_of("auto", "cpu")
    '32-true'
    """
    if asked not in PRECISIONS:
        raise PliantError(
            got=f"precision {asked!r}", expected="one of " + ", ".join(PRECISIONS), do="pass one of those"
        )
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if asked == "16-mixed" and not cuda:
        raise PliantError(got="16-mixed without CUDA", expected="a CUDA device", do="use bf16-mixed or 32-true")
    if asked != "auto":
        return asked
    return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def start(accelerator: str, devices: int | str, precision: str) -> Fabric:
    """A running Fabric; flags of ``fabric run`` win over defaults, and against other values Fabric itself objects.

    Several processes: started by ``fabric run`` or torchrun, else by Fabric, which runs the script again in each.
    """
    try:
        fabric_type: Any = importlib.import_module("lightning_fabric").Fabric
    except ImportError as error:
        raise PliantError(
            got="no module 'lightning_fabric'",
            expected="the extra 'train' to be installed",
            do="run: pip install 'pliant[train]', or train with a plain PyTorch loop over pliant.record(model)",
        ) from error
    by_command = os.environ.get("LT_CLI_USED") == "1"
    wanted = precision_of(precision, _from_command_line("ACCELERATOR") or accelerator)
    if precision == "32-true" and _from_command_line("PRECISION"):
        wanted = None
    nodes = 1
    if devices == "auto" and not by_command:
        # Fabric's "auto" would take every GPU there is. Under torchrun it's one for each process that was started.
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    try:
        fabric = fabric_type(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=wanted)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, PliantError):
            raise
        raise PliantError(
            got=f"accelerator={accelerator!r}, devices={devices!r}: {error}",
            expected="hardware that is here, and no conflict with the flags of 'fabric run'",
            do="change accelerator and devices, or leave them at 'auto'",
        ) from error
    if fabric.world_size > 1:
        # Exits that no loss reads and branches that nobody took leave parameters without a gradient. The string "ddp",
        # all that the command line takes, has no way to say so. (In a step that happens to use all parameters, PyTorch's
        # reducer advises once, from C++ on stderr, not to look for unused ones; Python can't filter it.)
        kwargs = getattr(fabric.strategy, "_ddp_kwargs", None)
        if kwargs is not None:
            kwargs.setdefault("find_unused_parameters", True)
        if not by_command:
            fabric.launch()  # under torchrun it only connects the processes
    return fabric
