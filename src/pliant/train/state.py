"""What training borrows and gives back: modes, devices, random states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def seed(device: torch.device, value: int) -> None:
    """Seed the generators that the model draws from; those of other devices stay."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


@contextmanager
def as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards: modes, requires_grad, device and global generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    home = next((t.device for t in [*model.parameters(), *model.buffers()]), device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            if home != device:
                model.to(home)
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)
                parameter.grad = None


@contextmanager
def asked(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Meanwhile in evaluation mode and without gradients; afterwards modes and global generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
