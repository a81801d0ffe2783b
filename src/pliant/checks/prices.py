"""Checks of cost: what is counted is what runs, and spending less takes less time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pliant.checks.subject import Subject, failed
from pliant.core.bind import gathered, masked
from pliant.rules.fixed import Always, Never

ROUNDS = 7


def flops_counted(s: Subject) -> str:
    """The sum of ``trace.flops`` is what PyTorch's counter sees around the very same call."""
    seen = []
    for name, model in s.patterns():
        for form in (gathered, masked):
            with FlopCounterMode(display=False) as counter:
                _, trace = s.record(form(model))
            counted, booked = counter.get_total_flops(), int(trace.flops.sum())
            if counted != booked:
                raise failed(
                    "flops", f"{booked} FLOPs booked, {form.__name__} under {name}", f"the {counted} that really ran",
                    "run every alternative inside tape.part, and nothing costly outside but what all rows run",
                )  # fmt: skip
            if form is gathered:
                seen.append(f"{name} {counted / s.batch:.3g}")
    return "exact; FLOPs per input: " + ", ".join(seen)


def dense_is_most(s: Subject) -> str:
    """No row costs more than ``dense_flops``; Always costs it, up to the price of scores that it doesn't ask."""
    _, own = s.record(gathered(s.model))
    _, always = s.record(s.everywhere(Always()))
    _, never = s.record(s.everywhere(Never()))
    do = "let value 1 be the costlier alternative at every site"
    for name, trace in (("its own decisions", own), ("Always", always), ("Never", never)):
        if (trace.flops > trace.dense_flops).any():
            raise failed("dense_flops", f"rows above dense_flops under {name}", "at most dense_flops", do)
    if not torch.equal(always.flops, always.dense_flops) or (always.dense_flops > own.dense_flops).any():
        raise failed("dense_flops", "Always at another cost than dense_flops", "the same", do)
    if (never.flops > always.flops).any():
        raise failed("dense_flops", "Never above Always", "at most the same", do)
    shares = [float(t.flops.double().mean() / own.dense_flops.double().mean()) for t in (never, own, always)]
    return "share of dense: never {:.3f}, own {:.3f}, always {:.3f}".format(*shares)


def _seconds(s: Subject, model: nn.Module) -> float:
    start = time.perf_counter()
    s.call(model)
    return time.perf_counter() - start


def seconds_fall(s: Subject) -> str:
    """Never takes less time than Always: interleaved on one thread, the shortest of several rounds of each."""
    models: dict[str, Any] = {"always": s.everywhere(Always()), "never": s.everywhere(Never())}
    saved = 1 - float(s.record(models["never"])[1].flops.sum() / s.record(models["always"])[1].flops.sum().clamp_min(1))
    best = dict.fromkeys(models, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for name, model in models.items():
                best[name] = min(best[name], _seconds(s, model))
    finally:
        torch.set_num_threads(threads)
    share = best["never"] / best["always"]
    if saved > 0 and share >= 1:
        raise failed(
            "seconds", f"{share:.2f} of the dense time with no site firing", "less than 1",
            "check on a size where skipping should pay (large maps, several rows)",
        )  # fmt: skip
    return f"{share:.2f} of the dense seconds at {1 - saved:.2f} of the dense FLOPs"
