"""The halting score (ACT's rule): sums, gradients, steps that grow with the work there is, and real skipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from _common import phase, seeded
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pliant import Site, gathered, masked, record, rules, scores
from pliant.execute import Halting
from pliant.losses import CrossEntropy, Ponder, Total, ponder, steps
from pliant.reproduce import Claim, Lab
from pliant.train import Fit, fit

BITS, UNITS, WIDTH, EPOCHS, TAU, SEEDS = 10, 11, 24, 24, 5e-2, (0, 1)
DATA = f"made: parity of k bits, k uniform in 1..{BITS}; unit n of the loop reads bit n, and blanks after the last one"


class Reader(nn.Module):
    """One ponder step: the shared cell on bit ``n`` of the row."""

    def __init__(self, cell: nn.GRUCell, n: int) -> None:
        super().__init__()
        self.cell, self.n = cell, n

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        s, x = state
        bit = x[:, self.n : self.n + 1] if self.n < BITS else torch.zeros_like(x[:, :1])
        return self.cell(bit, s), x


class Parity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        cell, halt = nn.GRUCell(1, WIDTH), scores.HaltingHead(WIDTH, bias=-3.0)
        site = Site(scores.Remainder(), rules.Halting(0.01))
        units = [Reader(cell, n) for n in range(UNITS)]
        self.loop = Halting(units, [halt] * (UNITS - 1), [site] * (UNITS - 1))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.loop((x.new_zeros(len(x), WIDTH), x))[0])


def made(rows: int, seed: int) -> tuple[SimpleNamespace, Tensor]:
    """Rows of k signs and then zeros, the parity of their plus signs, and k."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(1, BITS + 1, (rows,), generator=g)
    signs = 2.0 * torch.randint(0, 2, (rows, BITS), generator=g) - 1
    x = signs * (torch.arange(BITS) < k[:, None])
    return SimpleNamespace(x=x, y=(x == 1).sum(1) % 2), k


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties share their mean rank."""

    def ranks(t: Tensor) -> Tensor:
        _, inverse, counts = t.double().unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2.0)[inverse]

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


class Fixed(nn.Module):
    """A halting logit for each row, as a parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def mechanism() -> tuple[float, int, float]:
    """Worst deviation of a sum of weights from 1, largest N, worst deviation of d rho / d h from the rule; in float64."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(UNITS - 1, 2000)).double()
    halts = [Fixed(row) for row in logits]
    loop = Halting(
        [nn.Identity()] * UNITS, halts, [Site(scores.Remainder(), rules.Halting(0.01)) for _ in halts]
    ).train()
    # All states are ones, so the answer is the sum of the weights.
    y, trace = record(loop)(torch.ones(2000, 1, dtype=torch.float64))
    n = steps(trace).double()
    grads = torch.stack(torch.autograd.grad(ponder(trace).sum(), [halt.logits for halt in halts]))
    h = torch.sigmoid(logits)
    wanted = torch.where(torch.arange(1, UNITS)[:, None] < n, -1.0, 0.0)
    sums = (h.cumsum(0) >= 0.99).double()
    first = torch.where(sums.any(0), sums.argmax(0) + 1, UNITS)
    assert torch.equal(first.double(), n), "N isn't the first unit whose sum reaches 1 - eps"
    return (y - 1).abs().max().item(), int(n.max()), (grads / (h * (1 - h)) - wanted).abs().max().item()


def late(y: Tensor, trace: Any, target: Tensor, progress: float) -> Tensor:
    """The ponder cost, rising from 40 to 60 % of the training: at full price from the start, rows stop unlearnt."""
    return min(1.0, max(0.0, 5 * progress - 2)) * Ponder()(y, trace, target, progress)


def trained(lab: Lab, tau: float, seed: int) -> Any:
    model = seeded(seed, Parity)
    loss = Total({"task": (1.0, CrossEntropy()), "ponder": (tau, late)})
    adam = phase(
        EPOCHS, optimizer="adam", lr=5e-3, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", clip=1.0
    )
    told = f"tau {tau:g}, seed {seed}"
    options = Fit(batch_size=64, seed=seed, on_epoch=lambda e: lab.progress(told, e["epoch"], EPOCHS))
    fit(model, made(12_800, seed + 1)[0], loss, [adam], options=options)
    return model.eval()


def run(lab: Lab) -> list[Claim]:
    off, most, slope = mechanism()
    test, k = made(2_000, 99)
    grows, accuracy, fell, accuracy_after, mean_steps, exact, share, apart = ([] for _ in range(8))
    by_k, by_row = [], []
    for seed in SEEDS:
        model, hurried = trained(lab, TAU, seed), trained(lab, 10 * TAU, seed)
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                y, trace = record(gathered(model))(test.x)
            n, after = steps(trace), record(hurried)(test.x)
            # GRU and halting head, 2 FLOPs a multiply-add; the loop's last unit has no head.
            unit, head, out = 2 * 3 * WIDTH * (1 + WIDTH), 2 * WIDTH, 2 * 2 * WIDTH
            wanted = n * unit + n.clamp(max=UNITS - 1) * head + out
            exact.append(
                bool(torch.equal(trace.flops.double(), wanted.double()))
                and counter.get_total_flops() == int(wanted.double().sum())
            )
            share.append((trace.flops.sum() / trace.dense_flops.sum()).item())
            apart.append((masked(model)(test.x) - y).abs().max().item())
        each = torch.stack([n[k == j].double().mean() for j in range(1, BITS + 1)])
        grows.append(spearman(torch.arange(BITS), each))
        by_row.append(spearman(k, n))
        accuracy.append((y.argmax(1) == test.y).double().mean().item())
        mean_steps.append(n.double().mean().item())
        fell.append(1 - steps(after[1]).double().mean().item() / mean_steps[-1])
        accuracy_after.append((after[0].argmax(1) == test.y).double().mean().item())
        by_k.append("/".join(f"{value:.1f}" for value in each.tolist()))
    said = ", ".join(f"{100 * a:.1f}" for a in accuracy)
    return [
        Claim("the weights of every unit's states sum to 1 (2,000 rows of random halting logits)", f"{off:.1e} off", "<= 1e-6", off <= 1e-6, [off]),
        Claim("N is at most M, and the first unit whose sum reaches 1 - eps", f"{most} of {UNITS}", f"<= {UNITS}", most <= UNITS, [most]),
        Claim("the gradient of the ponder cost is -1 for n < N and 0 from N on", f"{slope:.1e} off", "<= 1e-6", slope <= 1e-6, [slope]),
        Claim("mean steps grow with the number of bits (Spearman of the ten means)", ", ".join(f"{g:.3f}" for g in grows), "> 0.8", min(grows) > 0.8, grows,
              f"tau {TAU:g}, rising from 40 to 60 % of the training; accuracy {said} %; mean steps for k = 1..{BITS}, by seed:"
              f" {'; '.join(by_k)}."
              f" Of single rows and their bits: {', '.join(f'{r:.3f}' for r in by_row)}; that was asked for before, beyond the claim, and failed:"
              " tau 0.001 all through, -0.038 and 0.505 (accuracy 98.3, 100.0 %);"
              " tau 0.05 rising from 25 to 50 %, before one seed had learnt parity, 0.266 and 0.986 (accuracy 84.5, 100.0 %); a cell that sees all bits"
              " at every step, which learns parity too, but with steps that don't grow with k; 16 epochs and tau 0.005, 0.080 and 0.421;"
              " 24 epochs and tau 0.02, 0.452 and 0.677, all these with 16 units in the cell; this run's settings 0.363 and 0.994"),
        Claim("with tau x 10 the mean steps fall", ", ".join(f"{100 * f:.1f}" for f in fell) + " %", ">= 30 %", min(fell) >= 0.3, fell,
              "accuracy then: " + ", ".join(f"{100 * a:.1f}" for a in accuracy_after) + " %. Tried: tau 0.001 and 0.01 all through,"
              " 72.8 and 61.1 % (accuracy 64.7, 68.0 %); tau 0.05 and 0.5 from 25 to 50 % on, 32.0 and 4.5 %;"
              " 16 epochs and tau 0.005 and 0.05, 19.4 and 24.5 %; 24 epochs and tau 0.02 and 0.2, 18.4 and 17.2 %"),
        Claim("measured FLOPs are those of the sum of N, not of M units", "exactly" if all(exact) else "no", "exactly", all(exact), share,
              ", ".join(f"{100 * s:.1f}" for s in share) + f" % of the dense FLOPs; masked and gathered answers {max(apart):.1e} apart"),
    ]  # fmt: skip
