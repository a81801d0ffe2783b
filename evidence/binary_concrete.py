"""Binary concrete: its probability, its distribution, its stretched form's exact zeros, and the flag task."""

from __future__ import annotations

import math

import _flag
import torch

from pliant.estimators import BinaryConcrete, GumbelSoftmax, HardConcrete, SoftBinaryConcrete
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold

SEEDS = (0, 1, 2)
DATA = "made: logits; and " + _flag.TOLD
DRAWS = 100_000
FORMS = {"straight-through": BinaryConcrete, "hard concrete": HardConcrete, "soft": SoftBinaryConcrete}


def zero() -> Threshold:
    return Threshold(0.0)


def run(lab: Lab) -> list[Claim]:
    torch.manual_seed(0)
    far, zeros, off = [], [], []
    for logit in (-3.0, 0.0, 2.0):
        p = 1 / (1 + math.exp(-logit))
        for tau in (0.1, 2 / 3, 1.0, 5.0):
            drawn = BinaryConcrete(zero(), temperature=tau)(torch.full((DRAWS,), logit)).value
            far.append(abs(drawn.double().mean().item() - p) / math.sqrt(p * (1 - p) / DRAWS))
    for logit in (-2.0, 0.0, 2.0):
        out = HardConcrete(zero())(torch.full((10 * DRAWS,), logit))
        assert out.soft is not None
        zeros.append((out.value == 0).sum().item())
        off.append(abs((out.value != 0).double().mean().item() / out.soft[0].item() - 1))
    chances = []
    for tau in (0.3, 2 / 3, 1.0):
        soft = GumbelSoftmax(temperature=tau)(torch.tensor([0.7, 0.0]).expand(DRAWS, 2)).value[:, 0]
        chances.append(_same(soft, SoftBinaryConcrete(zero(), temperature=tau)(torch.full((DRAWS,), 0.7)).value))
    claims = [
        Claim("P(h = 1) = sigmoid(l) for l in {-3, 0, 2} at four temperatures, 100,000 draws",
              f"{max(far):.2f} sigma at most", "<= 3 sigma", max(far) <= 3, far),
        Claim("two-way Gumbel-softmax and this give the same soft samples (Kolmogorov-Smirnov)", f"p = {min(chances):.2f} at least", "> 0.01",
              min(chances) > 0.01, chances),
        Claim("hard concrete: exact zeros occur", f"{min(zeros)} of {10 * DRAWS} at least", "> 0", min(zeros) > 0, zeros),
        Claim("hard concrete: mean(h != 0) equals the closed form", f"{100 * max(off):.2f} % off at most", "<= 1 %", max(off) <= 0.01, off),
    ]  # fmt: skip
    for name, kind in FORMS.items():
        found = []
        for seed in SEEDS:
            lab.progress(f"flag task, {name}", seed, len(SEEDS))
            found.append(_flag.train(_flag.net(kind(zero()), seed=seed), seed=seed))
        shares = [m.agreement for m in found]
        accuracy = min(m.accuracy for m in found)
        claims.append(Claim(
            f"flag task, {name}: the learned gate equals the flag within 2,000 steps",
            f"{min(shares):.3f} of inputs, accuracy {accuracy:.3f} (worst seeds)", ">= 0.98 (ste's bound)", min(shares) >= 0.98, shares,
            "trained on weights, run on choices: a small weight does the branch's work while training, and the threshold then drops it"
            if kind is SoftBinaryConcrete else "",
        ))  # fmt: skip
    return claims


def _same(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov's probability of so large a distance between two samples of one distribution."""
    grid = torch.cat([a, b]).sort().values
    one, other = (torch.searchsorted(t.sort().values, grid, right=True).double() / len(t) for t in (a, b))
    x = (one - other).abs().max().item() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)))
