"""Checks of training: gradients arrive, checkpointing keeps them, expectations are right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from pliant.checks.subject import Subject, failed, gap, tensors
from pliant.core.bind import executors, gathered, masked, sites
from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.core.trace import Trace, record
from pliant.cost.account import expected_flops
from pliant.rules.fixed import Given

DRAWS = 64
STANDARD_ERRORS = 5


def gradient_reaches_scorers(s: Subject) -> str:
    """Answer, expected cost, log-probabilities and values together move every scorer that has something to learn."""
    learn = {
        path: [p for p in site.scorer.parameters() if p.requires_grad]
        for path, site in sites(s.model).items()
        if site.rule.reads_scores
    }
    learn = {path: found for path, found in learn.items() if found}
    if not learn:
        return "no scorer has parameters"
    s.model.train()
    args, kwargs = s.inputs()
    y, trace = record(s.model)(*args, **kwargs)
    s.model.eval()
    loss = sum((t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in tensors(y) if t.requires_grad)
    loss = loss + (expected_flops(trace) / trace.dense_flops.clamp_min(1)).sum()
    for visits in trace.visits.values():
        loss = loss + sum(d.log_prob.sum() for d in visits if d.log_prob is not None)
    for path in learn:
        if sites(s.model)[path].rule.value_based:
            loss = loss + sum(d.scores.sum() for d in trace.visits.get(path, ()) if d.scores is not None)
    parameters = list({id(p): p for found in learn.values() for p in found}.values())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)  # pyright: ignore[reportArgumentType]
    by_id = {id(p): g for p, g in zip(parameters, grads, strict=True)}
    for path, found in learn.items():
        got = [g for p in found if (g := by_id[id(p)]) is not None]
        if not got or not any(g.any() for g in got) or not all(g.isfinite().all() for g in got):
            what = "no gradient" if not got else "a gradient that is zero" if not any(g.any() for g in got) else "NaN"
            raise failed(
                "gradient", f"{what} at the scorer", "a finite gradient from answer, expected cost or log-probability",
                "wrap the threshold in an estimator, e.g. pliant.estimators.StraightThrough", path,
            )  # fmt: skip
    return f"reaches {len(learn)} scorers"


def expected_equals_mean(s: Subject) -> str:
    """The expected cost is the mean of realised ones, for random decisions and for rules that sample."""
    if s.loops() is not None:
        return "not asked: a site is visited several times a call"
    seen = []
    for _ in range(2):  # exact where nothing is left to chance; between, the expectation is linear in each value
        fixed = s.frozen(s.everywhere(s.random()))
        wanted, ran = expected_flops(s.record(masked(fixed))[1]), s.record(gathered(fixed))[1].flops
        if not torch.allclose(wanted, ran.double(), rtol=1e-12):
            raise failed(
                "expected_cost", f"{wanted.tolist()[:4]} FLOPs expected of fixed decisions", f"the {ran.tolist()[:4]} run",
                "price each alternative through tape.part in both forms",
            )  # fmt: skip
    model = s.everywhere(s.random())
    wanted = expected_flops(s.record(masked(model))[1])
    running = gathered(model)  # one copy, whose prices are counted once
    means = [s.record(running)[1].flops.double().mean() - wanted.mean() for _ in range(DRAWS)]
    seen.append(_centred("random decisions, gathered", torch.stack(means), float(wanted.mean())))
    s.model.train()
    try:
        traces = [s.record(s.model)[1] for _ in range(DRAWS)] if _samples(s) else []
    finally:
        s.model.eval()
    if traces:
        apart = [(expected_flops(_hard(t)) - expected_flops(t)).mean() for t in traces]
        seen.append(_centred("its own samples", torch.stack(apart), float(expected_flops(traces[0]).mean())))
    return "exact for fixed decisions; " + "; ".join(seen)


def _samples(s: Subject) -> bool:
    s.model.train()
    trace = s.record(s.model)[1]
    return any(d.log_prob is not None for visits in trace.visits.values() for d in visits)


def _hard(trace: Trace) -> Trace:
    """The same trace with every sampled decision counted as it fell."""
    visits = {
        site: tuple(replace(d, soft=d.soft if d.log_prob is None else None) for d in found)
        for site, found in trace.visits.items()
    }
    return replace(trace, visits=visits)


def _centred(what: str, apart: Tensor, scale: float) -> str:
    error = float(apart.std() / len(apart) ** 0.5)
    off = abs(float(apart.mean()))
    if off > STANDARD_ERRORS * error + 1e-9 * scale:
        raise failed(
            "expected_cost", f"a mean cost {off:.4g} FLOPs off the expected one of {scale:.4g} under {what}",
            f"at most {STANDARD_ERRORS} standard errors of {error:.4g}",
            "give Outcome.soft the probability of spending, and price each alternative through tape.part",
        )  # fmt: skip
    return f"{what}: off by {off / max(scale, 1e-30):.1e} (standard error {error / max(scale, 1e-30):.1e})"


class Checkpointed(nn.Module):
    """Runs a module under activation checkpointing."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer; its activations are computed again on the way back."""
        return checkpoint(self.inner, *args, use_reentrant=self.reentrant, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module offers beside its forward is still there, as with PyTorch's own wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def checkpointed(model: nn.Module, *, reentrant: bool = False) -> Checkpointed:
    """``model`` under activation checkpointing as a whole."""
    return Checkpointed(model, reentrant)


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What the executors run, by owner and name: their children but for sites and what holds them."""
    for executor in executors(model):
        for name, child in executor.named_children():
            if isinstance(child, Site):
                continue
            if isinstance(child, nn.ModuleList):
                yield from ((child, key) for key, part in child.named_children() if not isinstance(part, Site))
            elif type(child).forward is not nn.Module.forward:
                yield executor, name


def _gradients(s: Subject, model: nn.Module, like: nn.Module) -> list[Tensor]:
    args, kwargs = s.inputs()
    torch.manual_seed(0)
    y = tensors(model(*args, **kwargs))
    weights = [torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape).to(t) for t in y]
    loss = torch.stack([(t * w).sum() for t, w in zip(y, weights, strict=True)]).sum()
    if not loss.requires_grad:  # all parameters are the scorers', and decisions are forced
        return []
    found = torch.autograd.grad(loss, [p for p in like.parameters() if p.requires_grad], allow_unused=True)
    return [g if g is not None else torch.zeros(()) for g in found]


def checkpoint_equal(s: Subject) -> str:
    """Recomputed activations give the same gradients, with decisions forced and with its own."""
    looped, worst = s.loops(), 0.0
    s.model.train()
    try:
        models = {"its own decisions": s.model}
        if looped is None:
            forced = s.trace_of(s.everywhere(s.random()))
            models["forced decisions"] = s.everywhere(Given(forced))
        for name, model in models.items():
            wanted = _gradients(s, model, s.model)
            whole = _gradients(s, checkpointed(model), s.model)
            pieces = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            for owner, key in list(_parts(pieces)):
                owner._modules[key] = Checkpointed(owner._modules[key], reentrant=False)  # pyright: ignore[reportArgumentType]
            parts = _gradients(s, pieces, s.model)
            for what, got in (("the whole", whole), ("the parts", parts)):
                found = gap(got, wanted)
                worst = max(worst, found)
                if not found <= 1e-4:
                    raise failed(
                        "checkpoint", f"gradients apart by {found:.1e} with {what} checkpointed under {name}",
                        "at most 1e-4", "keep no state from forward to backward outside autograd",
                    )  # fmt: skip
    finally:
        s.model.eval()
    return f"gradients apart by {worst:.1e} at most"


def reentrant_refused(s: Subject) -> str:
    """Reentrant checkpointing under a recording loses the cost's gradient: it must be refused, not lose it."""
    args, kwargs = pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t,
        s.inputs(),
    )
    if kwargs or not any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return "not asked: reentrant checkpointing takes floating-point inputs by position"
    s.model.train()
    try:
        tensors(record(checkpointed(s.model, reentrant=True))(*args)[0])
    except PliantError as error:
        if "use_reentrant=False" not in str(error):
            raise
        return "refused"
    finally:
        s.model.eval()
    raise failed(
        "reentrant", "a recording through reentrant checkpointing", "PliantError", "write every decision to the tape"
    )
