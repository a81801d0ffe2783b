"""Improved semantic hashing: shares, gradients, evaluation, and how decisive its gates get without a schedule."""

from __future__ import annotations

import _flag
import torch

from pliant.estimators import SemHash
from pliant.reproduce import Claim, Lab
from pliant.rules import Threshold

SEEDS = (0, 1, 2)
DATA = _flag.TOLD
ROWS = 40_000


def run(lab: Lab) -> list[Claim]:
    semhash = SemHash(Threshold(0.0))
    s = (0.5 * torch.randn(ROWS, 1, dtype=torch.float64)).requires_grad_()
    torch.manual_seed(0)
    value = semhash(s).value
    (gradient,) = torch.autograd.grad(value.sum(), s)
    torch.manual_seed(0)
    noisy = s.detach() + torch.randn_like(s)
    p = torch.sigmoid(noisy)
    alpha, beta = (1.2 * p - 0.1).clamp(0, 1), (noisy > 0).double()
    clear = alpha != beta  # where it saturates, soft and hard are the same
    hard = (value.detach() == beta)[clear].double().mean().item()
    written = 1.2 * p * (1 - p) * ((alpha > 0) & (alpha < 1)).double()
    off = (gradient - written).abs().max().item()
    semhash.eval()
    values = [semhash(s).value.detach() for _ in range(3)]
    settled = all(torch.equal(v, (s > 0).double()) for v in values)
    found = []
    for seed in SEEDS:
        lab.progress("flag task", seed, len(SEEDS))
        found.append(_flag.train(_flag.net(SemHash(Threshold(0.0)), seed=seed), seed=seed))
    decisive, shares = [m.decisive for m in found], [m.agreement for m in found]
    return [
        Claim("share of hard forwards", f"{hard:.3f}", "0.5 +- 0.02", abs(hard - 0.5) <= 0.02, [hard]),
        Claim("gradients equal those of alpha, soft or hard", f"{off:.1e} largest difference", "<= 1e-6", off <= 1e-6, [off]),
        Claim("evaluation is 0 or 1 and deterministic", "yes" if settled else "no", "yes", settled, [float(settled)]),
        Claim("flag task: the gate's logit is further than 2 from its threshold", f"{min(decisive):.3f} of test inputs (worst seed)",
              ">= 0.9", min(decisive) >= 0.9, decisive),
        Claim("flag task: the learned gate equals the flag within 2,000 steps",
              f"{min(shares):.3f} of inputs (worst seed); there from step {[m.solved_at for m in found]} on", ">= 0.98 (ste's bound)",
              min(shares) >= 0.98, shares),
    ]  # fmt: skip
