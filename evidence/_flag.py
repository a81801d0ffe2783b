"""A made task: run the heavy branch only where a flag bit is set. Without it a line tells the label, with it a parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.core.trace import Trace
from pliant.cost import expected_flops
from pliant.scores import LinearGate

torch.set_num_threads(1)

WIDTH = 6  # the last coordinate is the flag
TOLD = (
    "made: 5 signs and a flag bit; label = sign 0 where the flag is unset, the parity of signs 1 to 3 where it is set"
)


class Flags(NamedTuple):
    """Inputs of -1 and 1, labels, and the flag (0 or 1)."""

    x: Tensor
    y: Tensor
    flag: Tensor


@dataclass(frozen=True)
class Metrics:
    """What a trained net does in evaluation, as shares of the inputs.

    ``agreement``: the gate equals the flag. ``accuracy``: the label is right. ``rate``: the branch runs. ``collapsed``: the gate
    is the same for (nearly) all. ``decisive``: the gate's logit is further than 2 from its threshold. ``solved_at``: the first
    step after which agreement was at least ``enough`` at every look, or None.
    """

    agreement: float
    accuracy: float
    rate: float
    collapsed: bool
    decisive: float
    solved_at: int | None


def make(seed: int, rows: int) -> Flags:
    """``rows`` inputs; half of the flags are set."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (rows, WIDTH), generator=g)
    flag = bits[:, -1]
    y = torch.where(flag == 1, bits[:, 1] ^ bits[:, 2] ^ bits[:, 3], bits[:, 0])
    return Flags(2.0 * bits - 1, y, flag)


def net(estimator: pliant.rules.Rule, *, seed: int = 0, scorer: nn.Module | None = None, bias: float = 1.0) -> Any:
    """A line for everyone, plus a hidden layer of 32 for those whom a linear gate sends there."""
    torch.manual_seed(seed)
    branch = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 2))
    site = pliant.Site(LinearGate(WIDTH, bias=bias) if scorer is None else scorer, estimator)
    return pliant.execute.Residual(branch, site, shortcut=nn.Linear(WIDTH, 2))


Loss = Callable[[Tensor, Trace, Tensor], Tensor]
"""From logits, trace and labels to one number."""


def spent(trace: Trace) -> Tensor:
    """Expected FLOPs of each row as a share of the dense ones."""
    return (expected_flops(trace) / trace.dense_flops).float()


def relaxed(price: float = 0.4) -> Loss:
    """Cross-entropy plus ``price`` times the expected share of FLOPs, for estimators with a gradient in the value."""
    return lambda y, trace, target: F.cross_entropy(y, target) + price * spent(trace).mean()


def score_function(price: float = 0.4, *, keep: float = 0.9) -> Loss:
    """REINFORCE on the same objective; the baseline is a moving mean of the losses of the steps before.

    Only the task's part needs the score function: the expected cost is known exactly.
    """
    moving: list[Tensor] = []

    def loss(y: Tensor, trace: Trace, target: Tensor) -> Tensor:
        each = F.cross_entropy(y, target, reduction="none")
        baseline = moving[0] if moving else each.detach().mean()
        moving[:] = [keep * baseline + (1 - keep) * each.detach().mean()]
        log_prob = sum(d.log_prob for visits in trace.visits.values() for d in visits if d.log_prob is not None)
        return each.mean() + (log_prob * (each.detach() - baseline)).mean() + price * spent(trace).mean()

    return loss


@torch.no_grad()
def measure(model: nn.Module, data: Flags, *, solved_at: int | None = None) -> Metrics:
    """``model`` in evaluation, gathered, on ``data``; its mode is put back."""
    before = model.training
    y, trace = pliant.record(model.eval())(data.x)
    model.train(before)
    value = trace.dense("site").reshape(len(data.y), -1).mean(1)
    decision = trace["site"][0]
    logits = decision.scores if decision.scores is not None else torch.zeros(0)
    rate = value.mean().item()
    return Metrics(
        agreement=(value == data.flag).double().mean().item(),
        accuracy=(y.argmax(-1) == data.y).double().mean().item(),
        rate=rate,
        collapsed=not 0.02 <= rate <= 0.98,
        decisive=(logits.abs() > 2).double().mean().item(),
        solved_at=solved_at,
    )


def train(
    model: nn.Module, *, loss: Loss | None = None, steps: int = 2000, warmup: int = 300, seed: int = 0, lr: float = 3e-2,
    enough: float = 0.98,
) -> Metrics:  # fmt: skip
    """Adam, cosine schedule, on batches of 128 fresh inputs; looked at every 50 steps on 1,000 others.

    In the first ``warmup`` of the ``steps`` the gate is a fair coin, so that either path meets every input. Without it a gate
    keeps what it happened to choose first: the line never learns the inputs that the branch gets, and the other way round.
    """
    loss = relaxed() if loss is None else loss
    torch.manual_seed(10_000 + seed)
    test = make(777_000 + seed, 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    coin = pliant.bind(model.train(), {"*": pliant.rules.Random(0.5)})
    solved: int | None = None
    for step in range(steps):
        data = make(1_000_000 * (seed + 1) + step, 128)
        optimizer.zero_grad()
        if step < warmup:
            F.cross_entropy(coin(data.x), data.y).backward()
        else:
            loss(*pliant.record(model)(data.x), data.y).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            if measure(model, test).agreement < enough:
                solved = None
            elif solved is None:
                solved = step + 1
    return measure(model, test, solved_at=solved)
