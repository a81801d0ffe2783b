"""Gumbel-softmax: frequencies, bias and variance on a choice among three, half precision, and the flag task."""

from __future__ import annotations

import math

import _flag
import _toy
import torch

from pliant.estimators import Gumbel, GumbelOneHot, GumbelSoftmax
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold

SEEDS = (0, 1, 2)
DATA = "made: three logits and a loss of the choice; and " + _flag.TOLD
LOGITS = torch.tensor([0.2, -0.3, 0.5])


def run(lab: Lab) -> list[Claim]:
    torch.manual_seed(0)
    hard = GumbelOneHot()(LOGITS.expand(100_000, 3)).value.sum(0)
    expected = 100_000 * LOGITS.softmax(-1)
    p = math.exp(-float(((hard - expected) ** 2 / expected).sum()) / 2)  # chi-square with two degrees
    off = (GumbelSoftmax()(LOGITS.expand(100_000, 3)).value.sum(-1) - 1).abs().max().item()
    wanted = _toy.exact_choice(LOGITS, _toy.prices)
    found = {}
    for kind in (GumbelSoftmax, GumbelOneHot):
        for tau in (0.1, 1.0):
            lab.progress(f"{kind.__name__} at {tau}", len(found), 4)
            found[kind, tau] = _toy.quality(kind(temperature=tau), LOGITS, _toy.prices, target=wanted, draws=2_000_000)
    broken = _draws(lab)
    flags = []
    for seed in SEEDS:
        lab.progress("flag task", seed, len(SEEDS))
        flags.append(_flag.train(_flag.net(Gumbel(Threshold(0.0)), seed=seed), seed=seed))
    shares = [m.agreement for m in flags]
    claims = [
        Claim("frequencies of hard samples match softmax (chi-square, 100,000 draws)", f"p = {p:.2f}", "> 0.01", p > 0.01, [p]),
        Claim("soft samples sum to 1", f"{off:.1e} off at most", "<= 1e-5", off <= 1e-5, [off]),
    ]  # fmt: skip
    for kind, name in ((GumbelSoftmax, "soft"), (GumbelOneHot, "straight-through")):
        low, high = found[kind, 0.1], found[kind, 1.0]
        claims += [
            Claim(f"{name}: bias at temperature 0.1 on the toy",
                  f"{100 * low.bias:.1f} % (standard error {100 * low.noise:.1f}); at 1, {100 * high.bias:.1f} %",
                  "< 5 % of the true gradient", low.bias < 0.05, [low.bias, high.bias],
                  "the loss is the square of a price, whatever it is: the first that was tried"),
            Claim(f"{name}: variance at 0.1 against 1", f"{low.variance:.2f} against {high.variance:.2f}", "higher", low.variance > high.variance,
                  [low.variance, high.variance]),
        ]  # fmt: skip
    return [
        *claims,
        Claim("bfloat16 and float16: infinite or NaN values and gradients in 1e7 draws of each kind", f"{broken}", "0", broken == 0, [broken]),
        Claim("flag task, two-way: the learned gate equals the flag within 2,000 steps",
              f"{min(shares):.3f} of inputs (worst seed); there from step {[m.solved_at for m in flags]} on", ">= 0.98 (ste's bound)",
              min(shares) >= 0.98, shares),
    ]  # fmt: skip


def _draws(lab: Lab) -> int:
    """How many values or gradients aren't finite."""
    broken = 0
    for dtype in (torch.bfloat16, torch.float16):
        for choice in (GumbelSoftmax(), GumbelOneHot()):
            for k in range(10):
                lab.progress(f"{type(choice).__name__} in {dtype}", k, 10)
                scores = (3 * torch.randn(250_000, 4)).to(dtype).requires_grad_()
                value = choice(scores).value
                (gradient,) = torch.autograd.grad(value, scores, torch.ones_like(value).cumsum(-1))
                broken += int((~value.isfinite()).sum() + (~gradient.isfinite()).sum())
    return broken
