"""tokens: drop or merge tokens between the layers of any model whose layers treat them as a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import bind, gathered, plain, share, sites
from pliant.core.calls import Call, call_of, prediction_of, rows_of
from pliant.core.errors import PliantError
from pliant.core.site import Rule, Site
from pliant.estimators.ranked import RankStraightThrough
from pliant.execute.tokens import Drop, Left, Merge, Reduce, Tokens
from pliant.functional.tokens import take
from pliant.retrofit import probe
from pliant.retrofit.heads import hidden_of
from pliant.retrofit.host_tokens import HostTokens
from pliant.retrofit.refuse import refuse_model
from pliant.retrofit.skips import expanded
from pliant.rules.fixed import Always
from pliant.rules.share import Share
from pliant.scores.tokens import TokenAttention, TokenNorm, TokenNovelty, TokenScore, TokenScored


def tokens(
    model: nn.Module, at: Sequence[str], *, example: Any, keep: float | Sequence[float] = 0.7, how: Reduce | None = None,
    scorer: Callable[[Tensor], nn.Module] | None = None, prefix: int | None = None,
) -> Any:  # fmt: skip
    r"""Drop or merge tokens after each of the layers ``at`` of your own model: later layers run on fewer.

    .. math:: x' = (x_1, \dots, x_p, x_{i_1}, \dots, x_{i_k}), \qquad k = \lfloor \text{keep} \cdot (T - p) + 1/2 \rfloor

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched. All original paths and
    state_dict keys stay; what is new lies under ``tokens`` (``tokens.0.site``, ...). Scores choose which tokens stay, row by
    row; how many is the same in every row, so the next layers run on one smaller tensor at any batch size. Attention masks
    follow the tokens that are left, and padding goes first. With ``keep=1``, or all sites on ``Always``, the answers are
    bit-identical to the model's. How many stay is a dial (:class:`pliant.rules.Share`): ``pliant.tune`` and an exported
    graph turn it. Composes with :func:`exits` and :func:`skips`, in either order. The model is run on the example with its
    tokens shuffled: if that changes the answer, a later layer reads them by their place, and it's refused.

    Shape:
        hidden states :math:`(R, T, D)` after each layer; the model's logits :math:`(R, C)`.

    Args:
        model: any module whose layers pass tokens along, rows first: ViTs of timm, torchvision and transformers, BERT's kind.
        at: dotted names, or patterns such as ``"blocks.[369]"``.
        example: a small batch, as for :func:`exits`.
        keep: the share of tokens that stays at each layer, of those that come there, in [0, 1]; one, or one for each layer.
        how: what becomes of the others: ``Drop()``, the default, or ``Merge()`` from :mod:`pliant.execute`.
        scorer: from an example of the hidden state to a module from tokens :math:`(R, C, D)` to scores :math:`(R, C)`, one for
            each layer. Default, ``TokenNovelty`` to merge and ``TokenNorm`` to drop, but where all tokens are about as long, as
            behind BERT's layers, ``TokenAttention``, which reads the layer's own. ``TokenLinear`` learns.
        prefix: so many tokens at the front always stay; default, what the model calls ``num_prefix_tokens``, else 1.

    Returns:
        A model of the same type with the same inputs and outputs.

    Raises:
        PliantError: where a name isn't known; a layer doesn't run just once or returns no tokens (convolutions, windows); later
            layers read tokens by their place; the answer is one for each token; the model is compiled or wrapped.

    >>> import pliant
    >>> class Block(nn.Module):
    ...     def forward(self, x):
    ...         return x + x.mean(1, keepdim=True)
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         return self.head(self.blocks(x)[:, 0])
    >>> host, x = Net().eval(), torch.randn(2, 11, 4)
    >>> model = tokens(host, ["blocks.0"], example=x, keep=0.6)
    >>> y, trace = pliant.record(model)(x)
    >>> trace["tokens.0.site"][0].value.sum(1)
    tensor([6., 6.])
    >>> torch.equal(pliant.bind(model, {"*": pliant.rules.Always()})(x), host(x))
    True

    References:
        Survey section 3.1; Rao et al., DynamicViT, NeurIPS 2021; Liang et al., EViT, ICLR 2022; Bolya et al., Token Merging:
        Your ViT But Faster, ICLR 2023.

    Differs from the papers: attached from outside, between layers; nothing is retrained unless a scorer learns.
    """
    refuse_model(model, "tokens")
    call, counts = call_of(example), (3, 5)
    bare = plain(model)
    found = expanded(model, at)
    few, many = (probe.look(bare, rows_of(call, n), found) for n in counts)
    names = sorted(found, key=lambda path: few.ran.index(path) if path in few.ran else -1)
    probe.refuse_unfit(few, many, names, counts)
    shares = [keep] * len(names) if isinstance(keep, (int, float)) else list(keep)
    if len(shares) != len(names):
        raise PliantError(
            got=f"{len(shares)} shares for {len(names)} layers", expected="one, or one for each", do=f"pass keep= for {names}"
        )  # fmt: skip
    prefix = int(getattr(model, "num_prefix_tokens", 1)) if prefix is None else prefix
    made: list[nn.Module] = []
    for path, part in zip(names, shares, strict=True):
        hidden = _tokens_of(few, path, prefix)
        site = _site(hidden, part, scorer or partial(_default, how, prefix))
        _refuse_scorer(site.scorer, hidden[:, prefix:], path)
        made.append(Tokens(site, how=how or Drop(), prefix=prefix).train(model.training))
    twin = share(model)
    HostTokens(made, names).install(twin, probe.cover(twin, names))
    _prove(twin, rows_of(call, counts[0]))
    return twin


def _tokens_of(few: probe.Seen, path: str, prefix: int) -> Tensor:
    """The hidden state that ``path`` returns, where that is tokens."""
    hidden = hidden_of(few.hidden[path], path)
    if hidden.ndim != 3 or not 0 <= prefix < hidden.shape[1]:
        near = [
            p for p, s in few.first.items()  # windows come with other numbers of rows
            if len(s) == 3 and s[0] == hidden.shape[0] and s == few.taken.get(p) and p.count(".") <= path.count(".")
        ]  # fmt: skip
        raise PliantError(
            got=f"a layer that returns {tuple(hidden.shape)}" + (f" with prefix={prefix}" if hidden.ndim == 3 else ""),
            expected="(rows, tokens, features), tokens that later layers treat as a set: maps and windows need them all",
            do=f"name a layer that does, e.g. {', '.join(map(repr, near[:3]))}" if near and hidden.ndim != 3 else
            "drop rows or whole blocks here instead: pliant.retrofit.exits, skips", site=path,
        )  # fmt: skip
    return hidden


def _default(how: Reduce | None, prefix: int, hidden: Tensor) -> TokenScore:
    """Where a layer normalises what it returns, as BERT's do, all tokens are about as long and length says nothing."""
    if isinstance(how, Merge):
        return TokenNovelty()
    length = hidden[:, prefix:].norm(dim=-1)
    alike = (length.amax(1) - length.amin(1) <= 0.05 * length.mean(1)).all()
    return TokenAttention() if alike else TokenNorm()


def _site(hidden: Tensor, part: float, scorer: Callable[[Tensor], nn.Module]) -> Site:
    score = scorer(hidden)
    score = (score if isinstance(score, TokenScore) else TokenScored(score)).to(hidden.device)
    learns = any(p.requires_grad for p in score.parameters())
    rule: Rule = RankStraightThrough(Share(part)) if learns else Share(part)
    return Site(score, rule.to(hidden.device))


def _refuse_scorer(scorer: nn.Module, hidden: Tensor, path: str) -> None:
    if getattr(scorer, "reads_looks", False):
        return
    with torch.no_grad():
        scores = share(scorer).eval()(hidden)
    if scores.shape != hidden.shape[:2]:
        raise PliantError(
            got=f"scores of shape {tuple(scores.shape)} for tokens of shape {tuple(hidden.shape)}",
            expected="one score for each token", do="pass scorer= that makes a module from (R, C, D) to (R, C)", site=path,
        )  # fmt: skip


class _Shuffle(nn.Module):
    """In the place of a :class:`Tokens`: all stay, in another order."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def step(self, x: Tensor, **_: Any) -> Left:
        """The same tokens, those behind the prefix turned around."""
        place = torch.arange(x.shape[1], device=x.device)
        order = torch.cat([place[: self.prefix], place[self.prefix :].flip(0)]).expand(x.shape[0], -1)
        return Left(take(x, order), None, order)


def _prove(model: nn.Module, call: Call) -> None:
    """Shuffle tokens, which must change nothing; then let half of them go, which every later layer must bear."""
    others = {path: Always() for path in sites(model) if not path.startswith("tokens.")}
    probed: Any = gathered(bind(model, others) if others else model).eval()
    at: tuple[str, ...] = probed.tokens.at
    wanted = prediction_of(_called(plain(probed), call))
    for k, path in enumerate(at):
        shuffled = share(probed)
        for other, executor in enumerate(list(shuffled.tokens)):
            shuffled.tokens[other] = _Shuffle(executor.prefix) if other == k else executor
            executor.form = "plain"
        off = _off(prediction_of(_called(shuffled, call, path)), wanted)
        if off > max(1e-4, 4 * torch.finfo(wanted.dtype).eps):
            raise PliantError(
                got=f"an answer that changes by {off:.1e} when the tokens behind the first {shuffled.tokens[k].prefix} are shuffled",
                expected="later layers that treat tokens as a set",
                do="windows, causal or rotary attention and pooling by place need every token: pass prefix= if more of the first are "
                "special, else use pliant.retrofit.exits or skips",
                site=path,
            )  # fmt: skip
    for k, path in enumerate(at):
        halved = bind(probed, {"tokens.*": Always()})
        sites(halved)[f"tokens.{k}.site"].rule = Share(0.5)
        got = prediction_of(_called(halved, call, path))
        if got.shape != wanted.shape:
            raise PliantError(
                got=f"answers of shape {tuple(got.shape)} with half of the tokens, {tuple(wanted.shape)} with all",
                expected="an answer that doesn't hang on how many there are",
                do="use a model that classifies whole inputs, or pliant.retrofit.exits and skips", site=path,
            )  # fmt: skip


def _called(model: nn.Module, call: Call, path: str | None = None) -> Any:
    try:
        with torch.no_grad():
            return model(*call[0], **call[1])
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        if path is None or isinstance(error, PliantError):
            raise
        raise PliantError(
            got=f"a later layer that can't run on fewer tokens: {type(error).__name__}: {str(error).splitlines()[0]}",
            expected="layers that take any number of them",
            do="windows, maps and positions beside the hidden state need every token: use pliant.retrofit.exits or skips",
            site=path,
        ) from error


def _off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest answer."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
