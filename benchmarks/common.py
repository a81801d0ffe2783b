"""What the benchmarks share: models with sensible statistics, thresholds for wanted exits, results on disk."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant.execute import Exits
from pliant.rules import Threshold

HERE = Path(__file__).parent
Call = Callable[[], object]
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.thread_time, "wall": time.perf_counter}


def in_turn(calls: dict[Any, Call], rounds: int) -> dict[str, dict[Any, list[float]]]:
    """Seconds by both clocks of every call in every round; each is run once untimed first.

    Every round has an order of its own: a call that always came behind one with the same weights would find them in cache.
    """
    seconds: dict[str, dict[Any, list[float]]] = {clock: {name: [] for name in calls} for clock in CLOCKS}
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_ in range(rounds + 1):
        shuffle(order)
        for name in order:
            call = calls[name]
            before = {clock: now() for clock, now in CLOCKS.items()}
            call()
            after = {clock: now() for clock, now in CLOCKS.items()}
            for clock in CLOCKS if round_ else ():
                seconds[clock][name].append(after[clock] - before[clock])
    return seconds


ALLOCATORS = ("keep", "default")


def allocator(choice: str) -> str:
    """With "keep", glibc keeps what is freed; otherwise it returns large tensors and faults them in anew in every call.

    By default that costs a fifth of the time at 64 rows, and how much hangs on where the heap happens to end.
    """
    if choice == "default":
        return "default"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "default: no mallopt here"
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in malloc.h
    return "glibc keeps freed memory" if mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0) else "default"


def calibrated(model: nn.Module, shape: Sequence[int], *, seed: int, passes: int = 4, batch: int = 32) -> nn.Module:
    """``model`` in evaluation mode after a few training passes, so that its batch norms hold real statistics."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(passes):
            model(torch.randn(batch, *shape, generator=generator))
    return model.eval()


def with_heads(model: Exits, x: Tensor) -> list[Tensor]:
    """Every stage and every head on every row and no site: what ``dense_flops`` prices, the scores apart."""
    logits: list[Tensor] = []
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x)
        logits.append(head(x))
    return logits


def counts_of(shares: Sequence[float], rows: int) -> list[int]:
    """Whole rows per exit for a batch, by largest remainders."""
    exact = [s * rows / sum(shares) for s in shares]
    counts = [math.floor(e) for e in exact]
    for k in sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])[: rows - sum(counts)]:
        counts[k] += 1
    return counts


def leaving(model: Any, x: Tensor, counts: Sequence[int]) -> Any:
    """``model`` with thresholds at which exactly ``counts[k]`` rows of the batch ``x`` leave at exit k.

    The thresholds stand between the sorted scores of this very batch, so the scorers and the rule really run.
    """
    with torch.no_grad():
        _, trace = pliant.record(pliant.bind(model, {"*": Threshold(float("-inf"))}))(x)
    here = torch.arange(len(x))
    rules: dict[str, Threshold] = {}
    for name, count in zip(trace, counts, strict=False):
        scores = trace[name][0].scores[here].double()  # pyright: ignore[reportOptionalSubscript]
        ranked, order = scores.sort()
        if count == 0:
            threshold = -1.0
        elif count >= len(here):
            threshold = 2.0
        else:
            threshold = float((ranked[count - 1] + ranked[count]) / 2)
        here = here[order[count:]]
        rules[name] = Threshold(threshold)
    bound = pliant.bind(model, rules)
    got = taken(bound, x).bincount(minlength=len(counts)).tolist()
    if got != list(counts):
        raise RuntimeError(f"wanted {list(counts)} rows to leave at the exits, got {got}: try another --seed")
    return bound


def taken(model: Any, x: Tensor) -> Tensor:
    """At which exit each row leaves."""
    with torch.no_grad():
        _, trace = pliant.record(model)(x)
    went_on = torch.stack([trace.dense(s) if s in trace else torch.zeros(len(x)) for s in pliant.sites(model)])
    return went_on.cumprod(0).sum(0).long()


def assert_same(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Outputs are compared before anything is timed."""
    gap = float((a - b).abs().max())
    if not gap <= tolerance:
        raise RuntimeError(f"{what}: outputs differ by {gap:.2g}, more than {tolerance:g}")


def environment(seed: int, memory: str, threads: int = 1) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ), platform.processor())  # fmt: skip
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "-uno", "--", "../src"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "pliant": pliant.__version__,
        "commit": run.stdout.strip() if run.returncode == 0 else None,
        "src_changed_since_commit": bool(dirty.stdout.strip()) if dirty.returncode == 0 else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "allocator": memory,
        "seed": seed,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def save(path: str | None, found: dict[str, Any]) -> None:
    """Write results whole or not at all."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".json", delete=False) as file:
        json.dump(found, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, target)
    print(f"wrote {target}")
