"""Straight-through estimators: exact values and gradients, and the flag task with each surrogate."""

from __future__ import annotations

from functools import partial

import _flag
import torch

from pliant.estimators import Clipped, Copy, HardSigmoid, Sigmoid, StochasticStraightThrough, StraightThrough, Surrogate
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold

SEEDS = (0, 1, 2)
DATA = _flag.TOLD
SURROGATES = {
    "sigmoid": Sigmoid, "plain copy": Copy, "hard sigmoid": HardSigmoid, "clipped copy": Clipped,
}  # fmt: skip
NOTES = {
    (
        "StochasticStraightThrough",
        "clipped copy",
    ): "outside of [-1, 1] nothing pulls a logit, where it is still drawn with"
    " probability 0.27 or 0.73: no decision can settle",
    (
        "StraightThrough",
        "sigmoid",
    ): "tried before: learning rate 0.01 without a schedule, 0.956 (worst seed); without the 300"
    " steps of fair coins the line and the branch share the inputs otherwise than by the flag (0.6 to 0.8)",
}


def run(lab: Lab) -> list[Claim]:
    a = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    apart, binary, settled = [], [], []
    for make in SURROGATES.values():
        surrogate = make().double()
        for kind in (StraightThrough, StochasticStraightThrough):
            estimator = kind(Threshold(0.0), surrogate=surrogate).double()
            s = a.clone().requires_grad_()
            value = estimator(s).value
            (gradient,) = torch.autograd.grad(value.sum(), s)
            apart.append(_apart(surrogate, a, gradient))
            binary.append(float(set(value.detach().unique().tolist()) == {0.0, 1.0}))
            estimator.eval()
            settled.append(float(all(torch.equal(estimator(s).value, (s > 0).double()) for _ in range(3))))
    claims = [
        Claim("values are exactly 0 or 1", "yes" if all(binary) else "no", "yes", all(binary), binary),
        Claim("gradients equal the surrogate's finite differences", f"{max(apart):.1e} largest difference", "<= 1e-6", max(apart) <= 1e-6, apart),
        Claim("evaluation is deterministic, the threshold's", "yes" if all(settled) else "no", "yes", all(settled), settled),
    ]  # fmt: skip
    for kind in (StochasticStraightThrough, StraightThrough):
        for name, make in SURROGATES.items():
            claims.append(_flagged(lab, kind, name, make))
    return claims


def _apart(surrogate: Surrogate, a: torch.Tensor, gradient: torch.Tensor) -> float:
    """The largest difference, but for the points on a kink."""
    step = 1e-6
    smooth = ((a.abs() - 1).abs() > 2 * step).nonzero().squeeze(1)
    finite = (surrogate(a + step) - surrogate(a - step)) / (2 * step)
    return (gradient - finite)[smooth].abs().max().item()


def _flagged(lab: Lab, kind: type[StraightThrough], name: str, make: type[Surrogate]) -> Claim:
    train = partial(_flag.train, steps=2000)
    found = []
    for seed in SEEDS:
        lab.progress(f"{kind.__name__}, {name}", seed, len(SEEDS))
        found.append(train(_flag.net(kind(Threshold(0.0), surrogate=make()), seed=seed), seed=seed))
    shares = [m.agreement for m in found]
    sort = "sampled" if kind is StochasticStraightThrough else "deterministic"
    return Claim(
        f"{sort}, {name}: the learned gate equals the flag within 2,000 steps",
        f"{min(shares):.3f} of inputs (worst seed); there from step {[m.solved_at for m in found]} on",
        ">= 0.98", min(shares) >= 0.98, shares, NOTES.get((kind.__name__, name), ""),
    )  # fmt: skip
