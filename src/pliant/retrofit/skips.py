"""skips: gates that bypass blocks of any model, row by row."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, gathered, masked, named, share
from pliant.core.calls import Call, call_of, prediction_of, rows_of
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Rule, Score, Site
from pliant.core.trace import record
from pliant.estimators.gumbel import Gumbel
from pliant.execute import rows
from pliant.retrofit import probe
from pliant.retrofit.heads import PooledHead, hidden_of
from pliant.retrofit.host import Entry, Leaf
from pliant.retrofit.refuse import refuse_model
from pliant.rules.fixed import Always, Given, Random
from pliant.rules.threshold import Threshold


class Aside(nn.ModuleList):
    """What was added to a host. As a layer it passes its input on: a host that is a Sequential calls whatever it holds."""

    def forward(self, x: Any) -> Any:
        """``x``."""
        return x


class HostSkip(Executor):
    """A block of somebody else's model behind a gate: its ``forward`` is replaced on the instance, so no path changes."""

    def __init__(
        self, host: Callable[..., Any], site: Site, *, path: str, fixed: frozenset[Leaf], extra: int | None
    ) -> None:
        super().__init__()
        self.host = host  # the block's own forward, a bound method
        self.site = site
        self.path = path
        self.fixed = fixed
        self.extra = extra  # None: the block returns a tensor; else a tuple with as many None behind the hidden state

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the block calls as its forward."""
        return self.plain(*args, **kwargs) if self.form == "plain" else super().forward(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The block as if nothing had been attached."""
        return self.host(*args, **kwargs)

    def masked(self, *args: Any, **kwargs: Any) -> Any:
        """The block for every row, mixed with its input by the value."""
        hidden = self._hidden(args, kwargs)
        decision = self.site(hidden, shape=())
        on = rows.run_masked(self.site, decision, 1, lambda: hidden_of(self.host(*args, **kwargs), self.path))
        return self._closed(rows.mix(decision, on, hidden))

    def gathered(self, *args: Any, **kwargs: Any) -> Any:
        """The block for the rows that chose it, with what comes beside the hidden state cut to them."""
        hidden = self._hidden(args, kwargs)
        decision = self.site(hidden, shape=())
        leaves, spec = pytree.tree_flatten((args, kwargs))
        follow = [j for j, leaf in enumerate(self._leaves(args, kwargs)) if self._has_rows(leaves[j], leaf, hidden)]

        def run(*cut: Tensor) -> Tensor:
            now = dict(zip(follow, cut, strict=True))
            a, k = pytree.tree_unflatten([now.get(j, t) for j, t in enumerate(leaves)], spec)
            return hidden_of(self.host(*a, **k), self.path)

        state = tuple(leaves[j] for j in follow)
        return self._closed(rows.run_some(self.site, decision, run, state, rows.replaced, lambda: hidden))

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        for name, value in kwargs.items():
            if name.startswith("past_key_value") and value is not None:
                raise PliantError(
                    got=f"a cache of keys and values ({name}=)", expected="none: a block that a row skipped has none for it",
                    do="call the model with use_cache=False", site=self.path,
                )  # fmt: skip
        return first_of(args, kwargs, self.path)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Leaf]:
        """The name of every leaf, in the order in which a tree is flattened."""
        return [
            (self.path, place, j)
            for place, tree in [*enumerate(args), *((k, kwargs[k]) for k in kwargs)]
            for j, _ in enumerate(pytree.tree_leaves(tree))
        ]

    def _has_rows(self, t: Any, leaf: Leaf, hidden: Tensor) -> bool:
        return isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == hidden.shape[0] and leaf not in self.fixed

    def _closed(self, hidden: Tensor) -> Any:
        return hidden if self.extra is None else (hidden, *[None] * self.extra)


def first_of(args: Any, kwargs: Any, path: str) -> Tensor:
    """The hidden state that a block is called with: its first floating-point tensor."""
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim:
            return t
    raise PliantError(
        got="a call without a floating-point tensor", expected="a hidden state with rows first",
        do="name a block that passes one on", site=path,
    )  # fmt: skip


class PooledGate(Score):
    """A pooled linear gate for a hidden state of any layout; it starts open and nearly blind."""

    def __init__(self, like: Tensor, *, bias: float = 2.0) -> None:
        super().__init__()
        self.head = PooledHead(like, 1)
        nn.init.normal_(self.head.linear.weight, std=1e-3)
        nn.init.constant_(self.head.linear.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """One logit for each row."""
        return self.head(x).squeeze(-1)


def skips(
    model: nn.Module, blocks: Sequence[str], *, example: Any, scorer: Callable[[Tensor], nn.Module] = PooledGate,
    rule: Rule | None = None,
) -> Any:  # fmt: skip
    r"""Put a gate before each of the residual ``blocks`` of your own model; rows that it shuts pass by the block.

    .. math:: y = v \cdot \mathrm{block}(x) + (1 - v) \cdot x

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched. All original paths and
    state_dict keys stay; what is new lies under ``skips`` (``skips.0.site``, ...). In evaluation a block runs for the rows that
    chose it, with masks and the like cut to them; while training it runs for all and is mixed with its input by the value. With
    every gate open the answers are bit-identical to the model's. Composes with :func:`exits`, in either order. A block whose
    input and output differ in shape can't be passed by and is refused; a gate on a block without a shortcut of its own throws
    away what earlier layers said, which nothing here can see.

    Shape:
        hidden states :math:`(R, C, H, W)`, :math:`(R, T, D)` or :math:`(R, D)`, the same before and after a block.

    Args:
        model: any module whose blocks pass a batch along, rows first.
        blocks: dotted names, or patterns such as ``"layer*.1"`` (each part by itself), of which those that keep the shape are
            taken.
        example: a small batch, as for :func:`exits`.
        scorer: from an example of the hidden state to a module that gives each row one score, one for each block; default, a
            pooled linear gate that starts open.
        rule: each site gets a copy; default, a threshold at 0 trained by Gumbel noise.

    Returns:
        A model of the same type with the same inputs and outputs.

    Raises:
        PliantError: where a name isn't known, a block doesn't run just once or changes the shape, returns more than a hidden
            state, or doesn't treat each row alone; where the model is compiled or wrapped. At the call: with a key-value cache.

    >>> import pliant
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.linear(x)
    >>> host = nn.Sequential(Block(), Block(), nn.Linear(4, 3)).eval()
    >>> x = torch.randn(5, 4)
    >>> model = skips(host, ["0", "1"], example=x)
    >>> list(pliant.sites(model)), torch.equal(model(x), host(x))
    (['skips.0.site', 'skips.1.site'], True)
    >>> torch.equal(pliant.bind(model, {"*": pliant.rules.Never()})(x), host[2](x))
    True

    References:
        Survey section 2.1.1 (2); Veit and Belongie, ConvNet-AIG, ECCV 2018; Wang et al., SkipNet, ECCV 2018.

    Differs from the papers: gates are attached from outside, so any backbone serves; the whole block is passed by, an activation
    behind its sum included.
    """
    refuse_model(model, "skips")
    names = expanded(model, blocks)
    call = call_of(example)
    counts = (3, 5)
    bare = share(model)
    for executor in bare.modules():
        if isinstance(executor, Executor):
            executor.form = "plain"
    few, many = (probe.look(bare, rows_of(call, n), names) for n in counts)
    names = _fitting(few, names, blocks)
    probe.refuse_unfit(few, many, names, counts)
    fixed = probe.fixed(few, many, counts)
    twin = share(model)
    made = Aside()
    for path in names:
        hidden = hidden_of(few.hidden[path], path)
        block = twin.get_submodule(path)
        site = (
            Site(scorer(hidden), copy.deepcopy(rule or Gumbel(Threshold(0.0)))).to(hidden.device).train(model.training)
        )
        _refuse_scorer(site.scorer, hidden, path)
        output = few.hidden[path]
        extra = len(output) - 1 if isinstance(output, tuple) else None
        skip = HostSkip(block.forward, site, path=path, fixed=fixed, extra=extra).train(model.training)
        vars(block)["forward"] = Entry(skip.run)
        made.append(skip)
    twin.add_module("skips", made)
    _prove(twin, rows_of(call, counts[1]))
    return twin


def _refuse_scorer(scorer: nn.Module, hidden: Tensor, path: str) -> None:
    with torch.no_grad():
        scores = share(scorer).eval()(hidden)
    if scores.shape != hidden.shape[:1]:
        raise PliantError(
            got=f"scores of shape {tuple(scores.shape)} for {hidden.shape[0]} rows", expected="one score per row",
            do="pass scorer= that maps an example of the hidden state to such a module", site=path,
        )  # fmt: skip


def expanded(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The modules that the names and patterns stand for, none inside another."""
    found = [path for path, module in named(model) if path and not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    if isinstance(blocks, str) or not blocks:
        raise PliantError(got=f"blocks={blocks!r}", expected="a list of names or patterns", do="pass e.g. ['layer*.1']")
    chosen = [path for path in found if any(_matches(path, pattern) for pattern in blocks)]
    for pattern in blocks:
        if not any(_matches(path, pattern) for path in chosen):
            close = difflib.get_close_matches(pattern, found, n=4, cutoff=0.3)
            raise PliantError(
                got=f"the name {pattern!r}", expected="that of a submodule" + (f", such as {close}" if close else ""),
                do="see dict(model.named_modules()) for the names",
            )  # fmt: skip
    for path in chosen:
        inner = next((other for other in chosen if other.startswith(path + ".")), None)
        if inner is not None:
            raise PliantError(
                got=f"{inner!r} inside {path!r}", expected="blocks that follow one another", do="leave one of them out"
            )
    return chosen


def _matches(path: str, pattern: str) -> bool:
    """As in file names: what stands for anything doesn't stand for a dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _fitting(few: probe.Seen, names: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """In running order: named blocks, which must pass a hidden state of one shape, and of a pattern's those that do."""
    kept: list[str] = []
    for path in sorted(names, key=lambda path: few.ran.index(path) if path in few.ran else -1):
        trouble = _unfit(few, path)
        if trouble is None:
            kept.append(path)
        elif path in blocks:
            raise PliantError(
                got=trouble, expected="a residual block that passes a hidden state of one shape, and nothing else",
                do="name whole blocks that don't change the resolution or the channels", site=path,
            )  # fmt: skip
    if not kept:
        raise PliantError(
            got=f"blocks={list(blocks)}, none of which keeps the shape of its hidden state ({_unfit(few, names[0])})",
            expected="at least one residual block", do="name blocks that don't change the resolution or the channels",
        )  # fmt: skip
    return kept


def _unfit(few: probe.Seen, path: str) -> str | None:
    """Why a row can't pass by the block ``path``; None where it can."""
    if path not in few.ran:
        return "a module that isn't called"
    before, after = few.taken.get(path), few.first.get(path)
    if before is None or before != after:
        return f"a block from {before} to {after}"
    output = few.hidden[path]
    if isinstance(output, Tensor):
        return None
    if type(output) is tuple and all(t is None for t in output[1:]):
        return None
    return (
        f"a block that returns a {type(output).__name__} of {len(output) if isinstance(output, tuple) else 'its own'}"
    )


def _prove(model: nn.Module, call: Call) -> None:
    """Let some rows pass by some blocks, and compare with the masked form."""
    probed = bind(model, {"skips.*": Random(0.5, torch.Generator().manual_seed(0))}).eval()
    everything = {path: rule for path, rule in (("exits.sites.*", Always()),) if hasattr(model, "exits")}
    probed = bind(probed, everything) if everything else probed
    with torch.no_grad():
        try:
            got, trace = record(gathered(probed))(*call[0], **call[1])
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            wanted = prediction_of(masked(bind(probed, {"skips.*": Given(trace)}))(*call[0], **call[1]))
            off = float((prediction_of(got) - wanted).abs().max() / (1 + wanted.abs().max()))
            trouble = None if off <= 3 * torch.finfo(wanted.dtype).eps ** 0.5 else f"answers change by {off:.1e}"
    if trouble is not None:
        raise PliantError(
            got=f"blocks that rows can't pass by: {trouble}", expected="blocks that treat each row alone",
            do="name whole residual blocks whose arguments all have rows first",
        )  # fmt: skip
