"""What the evidence files share: data, training, and a few figures. One thread throughout."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant.cost import interleaved
from pliant.data import Dataset, load
from pliant.losses import CrossEntropy, MultiExit, Total
from pliant.reproduce import Lab
from pliant.study import batches
from pliant.train import Fit, Phase, fit
from pliant.tune import HeldOut, collect

torch.set_num_threads(1)


def fashion(lab: Lab, rows: int) -> Dataset:
    """Fashion-MNIST with the first ``rows`` training images, 2,000 held-out and 4,000 test images."""
    data = load("fashion_mnist", lab.root, limit=rows)
    return replace(data, val=data.val.take(2000), test=data.test.take(4000))


def told(rows: int, more: str = "") -> str:
    """How the data is named in results."""
    return f"Fashion-MNIST: first {rows:,} training, 2,000 held-out and 4,000 test images{more}"


ALL_EXITS = Total({"exits": (1.0, MultiExit())})
LAST_ONLY = Total({"task": (1.0, CrossEntropy())})


def phase(epochs: int, **changes: Any) -> Phase:
    """SGD with Nesterov momentum and a cosine schedule."""
    settings: dict[str, Any] = {
        "name": "train", "epochs": epochs, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-4, "schedule": "cosine",
    }  # fmt: skip
    return Phase(**{**settings, **changes})


def trained(
    lab: Lab,
    what: str,
    model: nn.Module,
    data: Dataset,
    phases: Sequence[Phase],
    *,
    loss: Any = ALL_EXITS,
    seed: int = 0,
) -> Any:
    """``model`` after ``phases``, in evaluation mode; build it under the same seed for repeatable runs."""
    total, done = sum(p.epochs for p in phases), count(1)
    fit(
        model,
        data.train,
        loss,
        phases,
        options=Fit(seed=seed, on_epoch=lambda _: lab.progress(what, next(done), total)),
    )
    return model.eval()


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A model built under ``seed``."""
    torch.manual_seed(seed)
    return build()


def held(model: nn.Module, data: Dataset) -> tuple[HeldOut, HeldOut]:
    """What every exit says about the held-out and the test part."""
    return collect(model, batches(data.val)), collect(model, batches(data.test))


@torch.no_grad()
def right(model: nn.Module, data: Dataset) -> Tensor:
    """Whether ``model`` is right about each test image."""
    return torch.cat([model(x).argmax(-1) for x in data.test.x.split(256)]) == data.test.y


def percent(values: Sequence[float]) -> str:
    """The mean of shares in percent, with every seed's value."""
    return f"{100 * mean(values):.2f} ({', '.join(f'{100 * v:.2f}' for v in values)})"


def faster(
    dense: Callable[[Tensor], Tensor], dynamic: Callable[[Tensor], Tensor], x: Tensor, *, batch: int, rounds: int = 7
) -> float:
    """How many times faster ``dynamic`` is than ``dense`` on ``x`` in batches: that thread's processor time, in turn."""
    chunks = x.split(batch)
    calls = {"dense": lambda: [dense(c) for c in chunks], "dynamic": lambda: [dynamic(c) for c in chunks]}
    found = interleaved(calls, rounds=rounds, clock=time.thread_time)
    return found["dense"].minimum / found["dynamic"].minimum


def always(model: nn.Module) -> Any:
    """The dense network of ``model``."""
    return pliant.bind(model, {"*": pliant.rules.Always()})
