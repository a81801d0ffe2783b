"""exits: attach early exits to the layers of any model."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, gathered, masked, named, share
from pliant.core.calls import Call, call_of, prediction_of, rows_of
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Score, Site
from pliant.core.trace import Trace, batch_of
from pliant.retrofit import probe
from pliant.retrofit.heads import PooledHead, hidden_of
from pliant.retrofit.host import HostExits
from pliant.retrofit.output import output_like
from pliant.retrofit.refuse import refuse_model
from pliant.rules.fixed import Given
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability


def exits(
    model: nn.Module, at: Sequence[str], *, example: Any, num_classes: int | None = None,
    heads: Sequence[nn.Module] | None = None, criterion: Score | None = None, threshold: float = 0.5,
) -> Any:  # fmt: skip
    r"""Attach an early exit after each of the layers ``at`` of your own model; rows that are sure enough leave there.

    .. math:: y = v_1 (v_2 (\dots) + (1 - v_2) f_2) + (1 - v_1) f_1, \qquad f_k = \mathrm{head}_k(h_k)

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched. All original module paths
    and state_dict keys stay; what is new lies under ``exits`` (``exits.heads.0``, ``exits.sites.0``, ...). In evaluation
    the rows that leave are dropped from the hidden state, and masks and the like that travel beside it are cut to the
    rows that are left; while training everything is computed and the answers are mixed by the values. With all rows
    going on, the answers are bit-identical to the model's. The model is run on the example a few times, in evaluation
    mode, to see what its modules do with rows and to prove that rows can leave; what can't be retrofitted is refused:
    such as a layer in the middle of a residual branch, or a model whose own forward picks from its output by the rows of
    its input, as decoders that classify by their last token do. An empty batch does what the model does with it.

    Shape:
        hidden states :math:`(R, C, H, W)`, :math:`(R, T, D)` or :math:`(R, D)`; the model's logits :math:`(R, C)`.

    Args:
        model: any module whose layers pass a batch along, rows first. It may return its logits as a tensor, as
            ``.logits`` of a mapping such as a transformers output, or first in a tuple; the other fields are left out.
        at: dotted names of layers, in the order in which they run.
        example: a small batch: a tensor, a tuple of positional or a mapping of keyword inputs; two or more different rows
            prove more than one.
        num_classes: of the default heads; default, as many as the model's logits have.
        heads: one module per exit from hidden state to logits, used as they are; default, the mean over positions
            (over the tokens that ``attention_mask`` lets count, where the model takes one) and a linear layer, untrained.
        criterion: the wish to go on, from an exit's logits; each site gets a copy. Default, ``MaxProbability()``.
        threshold: rows with a higher score go on, in the units of the criterion.

    Returns:
        A model of the same type with the same inputs and outputs.

    Raises:
        PliantError: where a layer isn't known, doesn't run just once, isn't given in running order, lies inside another
            or has no rows first; where the model is compiled, wrapped or dynamic already; where heads don't fit; where
            dropping rows changes the answers of others. At the call: where ``labels`` are given.

    >>> import pliant
    >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> x = torch.randn(5, 4)
    >>> model = exits(host, at=["1"], example=x)
    >>> list(pliant.sites(model)), torch.equal(pliant.bind(model, {"*": pliant.rules.Always()})(x), host(x))
    (['exits.sites.0'], True)

    References:
        Survey section 2.1.1 (1); Teerapittayanon et al., BranchyNet, ICPR 2016; Xin et al., DeeBERT, ACL 2020.

    Differs from the papers: heads are attached from outside, so any backbone serves.
    """
    refuse_model(model, "exits")
    _refuse_replaced(model)
    at = _checked(model, at)
    if heads is not None and len(heads) != len(at):
        raise PliantError(got=f"{len(heads)} heads", expected=f"one for each of {len(at)} layers", do="pass as many")
    call = call_of(example)
    leave = sorted({round(i * (len(at) - 1) / 2) for i in range(3)})  # the first, a middle and the last exit
    counts = (len(leave) + 2, len(leave) + 4)
    few, many = (probe.look(model, rows_of(call, n), at) for n in counts)
    probe.refuse_unfit(few, many, at, counts)
    logits = prediction_of(few.output)
    if logits.shape[0] != counts[0]:
        raise PliantError(
            got=f"logits of shape {tuple(logits.shape)} for {counts[0]} rows", expected="rows first",
            do="wrap the model so that its answer has one row per input",
        )  # fmt: skip
    _refuse_type(few.output, logits)
    hidden = [hidden_of(few.hidden[path], path) for path in at]
    if heads is None:
        heads = [PooledHead(h, num_classes or logits.shape[-1]) for h in hidden]
    _refuse_heads(heads, hidden, logits, at)
    sites = [Site(copy.deepcopy(criterion or MaxProbability()), Threshold(threshold)).to(h.device) for h in hidden]
    twin = share(model)
    made = HostExits(
        twin.forward, at, heads, sites, fixed=probe.fixed(few, many, counts), kind=type(few.output)
    ).train(model.training)  # fmt: skip
    made.install(twin, probe.cover(twin, at))
    _prove(twin, rows_of(call, counts[0]), at, leave)
    return twin


def _refuse_replaced(model: nn.Module) -> None:
    if "forward" in vars(model):
        raise PliantError(
            got="a model whose forward was replaced on the instance",
            expected="the forward of its class",
            do="undo the replacement first (exits are attached once: name all layers in one call)",
        )


def _checked(model: nn.Module, at: Sequence[str]) -> tuple[str, ...]:
    modules = dict(named(model))
    modules.pop("")
    if isinstance(at, str) or len(at) == 0 or len(set(at)) != len(at):
        raise PliantError(got=f"at={at!r}", expected="a list of different layer names", do="pass e.g. ['layer2']")
    for path in at:
        if path not in modules:
            close = difflib.get_close_matches(path, modules, n=4, cutoff=0.3)
            raise PliantError(
                got=f"the name {path!r}", expected="that of a submodule" + (f", such as {close}" if close else ""),
                do="see dict(model.named_modules()) for the names",
            )  # fmt: skip
        for other in at:
            if path.startswith(other + "."):
                raise PliantError(
                    got=f"{path!r} inside {other!r}", expected="layers that follow one another",
                    do=f"name the last layer inside {other!r} instead of it, or leave {path!r} out",
                )  # fmt: skip
        for outer, module in modules.items():
            if isinstance(module, Executor) and (path + ".").startswith(outer + "."):
                raise PliantError(
                    got=f"a layer inside the dynamic part {outer!r}", expected="one outside of it",
                    do=f"attach to a layer before or after {outer!r}", site=path,
                )  # fmt: skip
    return tuple(at)


def _refuse_heads(heads: Sequence[nn.Module], hidden: Sequence[Tensor], logits: Tensor, at: Sequence[str]) -> None:
    for head, h, path in zip(heads, hidden, at, strict=True):
        with torch.no_grad():
            answer = share(head).eval()(h)
        if answer.shape != logits.shape:
            raise PliantError(
                got=f"a head that answers {tuple(answer.shape)} for {h.shape[0]} rows",
                expected=f"what the model answers, {tuple(logits.shape)}",
                do="give every head (or num_classes=) the size of the model's own logits"
                + ("; for a language model that writes, pliant.retrofit.causal" if logits.ndim == 3 else ""),
                site=path,
            )


def _refuse_type(output: Any, logits: Tensor) -> None:
    """Where nobody goes on, the host never returns: its type must be one that logits alone can make."""
    try:
        output_like(type(output), logits)
    except (TypeError, ValueError) as error:
        raise PliantError(
            got=f"a {type(output).__name__} that can't be made from logits alone ({error})",
            expected="a tensor, a tuple or a mapping with 'logits'",
            do="wrap the model so that it returns its logits",
        ) from error


def _prove(model: nn.Module, call: Call, at: Sequence[str], leave: Sequence[int]) -> None:
    """Let rows leave at some exits and compare with the masked form; then look for the exit that is to blame."""
    trouble = _trial(model, call, at, dict(enumerate(leave)))
    if trouble is None:
        return
    blame = next((k for k in leave if _trial(model, call, at, {0: k})), leave[0])
    raise PliantError(
        got=f"an exit that rows can't leave at: {trouble}",
        expected="layers behind it that treat each row alone and take the batch from their arguments",
        do="attach to a whole block, outside of residual branches, of a model whose forward doesn't use its inputs again",
        site=at[blame],
    )


def _trial(model: nn.Module, call: Call, at: Sequence[str], leave: dict[int, int]) -> str | None:
    """What goes wrong when row ``i`` leaves at exit ``leave[i]`` and the others go on; None where nothing does."""
    count, device = batch_of(*call), next(t.device for t in pytree.tree_leaves(call) if isinstance(t, Tensor))
    stays = torch.tensor([[leave.get(i, len(at)) > k for i in range(count)] for k in range(len(at))], device=device)
    plan = {f"exits.sites.{k}": (Decision(value.float()),) for k, value in enumerate(stays)}
    probed = bind(model, {"exits.sites.*": Given(Trace(plan, (), (), count))}).eval()
    with torch.no_grad():
        wanted = prediction_of(masked(probed)(*call[0], **call[1]))
        try:
            got = prediction_of(gathered(probed)(*call[0], **call[1]))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    off = float((got - wanted).abs().max() / (1 + wanted.abs().max()))
    return None if off <= 3 * torch.finfo(wanted.dtype).eps ** 0.5 else f"the answers of other rows change by {off:.1e}"
