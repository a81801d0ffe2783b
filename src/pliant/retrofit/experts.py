"""experts: the feed-forward layers of any model split into experts, of which each token runs some."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core.bind import share
from pliant.core.calls import call_of
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Rule, Site
from pliant.estimators.ranked import RankStraightThrough
from pliant.functional.clusters import balanced_clusters
from pliant.retrofit.host_experts import HostExperts
from pliant.retrofit.pairs import Ran, Watched, all_of, inside, modules_of, own, refuse_not_called, trouble, watch
from pliant.retrofit.refuse import refuse_model
from pliant.retrofit.skips import Aside, expanded
from pliant.rules.share import Share
from pliant.scores.mass import Mass


class Pair(NamedTuple):
    """First layers, which read the same, and the one that reads their hidden neurons."""

    ups: tuple[str, ...]
    down: str
    hidden: int
    x: Tensor


def experts(
    model: nn.Module, at: Sequence[str], *, experts: int, top: int | float, example: Any,
    scorer: Callable[[Tensor], nn.Module] | None = None, rule: Rule | None = None,
) -> Any:  # fmt: skip
    r"""Split the feed-forward layers inside ``at`` of your own model into experts; a router picks for each token which run.

    .. math:: y_t = b + \sum_e v_{te}\, V_{:,e}\, \phi(W_e x_t + b_e)

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched. All original paths and
    state_dict keys stay: an expert is a group of hidden neurons, by index; what is new lies under ``experts``
    (``experts.0.site``, ``experts.0.order``). Neurons whose weights resemble each other come together (balanced k-means). In
    evaluation experts that weren't chosen aren't run, at any batch size, and parts of the weights are kept side by side, once
    more in memory, until the weights change (through ``.data`` unseen); while training all run and count by the value. With all
    experts on the host's own layers run, so the answers are bit-identical. The router begins as the mean of each expert's
    first weights: fit it by :func:`fit_routers`, train it by gradient. Exported, everything is computed.

    A feed-forward layer is found by running the model: linear layers that read the same, then one that reads their neurons, with
    nothing in between but what treats each number alone, proven by running it in parts. So attention, and a norm over
    the neurons, are refused. Convolutions of size 1 serve as linear layers, pixels as tokens. Composes with :func:`exits`,
    :func:`skips`, :func:`tokens` and :func:`channels`, in any order.

    Shape:
        tokens :math:`(R, ..., D)`, decisions :math:`(R, ..., E)`.

    Args:
        model: any module whose feed-forward layers get rows first.
        at: dotted names or patterns of modules that are or hold feed-forward layers, such as ``"blocks.*"``; all inside are taken.
        experts: :math:`E`, a divisor of the hidden neurons.
        top: how many run for each token, as a number of experts or as a share of them; a dial, which ``pliant.tune`` turns.
        example: a small batch, as for :func:`exits`.
        scorer: from an example of what a layer reads to a module that gives each token :math:`E` scores; default, a linear one.
        rule: each site gets a copy, and ``top`` isn't read; default, ``RankStraightThrough(Share(top))``.

    Returns:
        A model of the same type with the same inputs and outputs.

    Raises:
        PliantError: where a name isn't known or its module doesn't run just once, nothing inside is a feed-forward layer, or the numbers
            don't fit; where the model is compiled or wrapped.

    >>> import pliant
    >>> host = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 3)).eval()
    >>> x = torch.randn(5, 4)
    >>> model = experts(host, ["0"], experts=4, top=1, example=x)
    >>> y, trace = pliant.record(model)(x)
    >>> trace["experts.0.site"][0].value.sum(1), trace.flops[0], trace.dense_flops[0]
    (tensor([1., 1., 1., 1., 1.]), tensor(88), tensor(184))
    >>> torch.equal(pliant.bind(model, {"*": pliant.rules.Always()})(x), host(x))
    True

    References:
        Survey section 2.1.2 (2); Zhang et al., MoEfication, ACL Findings 2022; Szatkowski et al., D2DMoE, NeurIPS 2024.

    Differs from the papers: the router is linear; nothing is retrained; activations other than ReLU are left as they are, and
    then more of the answer is lost.
    """
    refuse_model(model, "experts")
    found, counts = expanded(model, at), (3, 5)
    part = _share(experts, top)
    seen = watch(model, call_of(example), found, _tokenwise, counts)
    refuse_not_called(seen, found)
    pairs: list[Pair] = all_of(found, at, lambda path: _proven(seen, path, experts))
    twin = share(model)
    made = Aside()
    for pair in pairs:
        ups, down = [twin.get_submodule(up) for up in pair.ups], twin.get_submodule(pair.down)
        order = balanced_clusters(_first(ups, pair), experts)
        score = Mass(pair.x, experts) if scorer is None else scorer(pair.x)
        _refuse_scorer(score, pair, experts)
        if scorer is None:
            _begin(score, ups[0], down, order)
        site = Site(score, copy.deepcopy(rule or RankStraightThrough(Share(part))), shape=(experts,)).to(pair.x.device)
        executor = HostExperts(ups, down, site, order).train(model.training)
        executor.between = seen.between(twin, pair.ups[0], pair.down, pair.ups)
        made.append(executor)
    twin.add_module("experts", made)
    return twin


def _tokenwise(layer: Any) -> bool:
    """Whether a layer treats each token alone: linear, or a convolution of size 1, to which pixels are tokens."""
    if own(layer, nn.Linear):
        return True
    return (
        own(layer, nn.Conv2d)
        and (*layer.kernel_size, *layer.stride, layer.groups) == (1, 1, 1, 1, 1)
        and layer.padding == (0, 0)
    )


def _share(experts: int, top: int | float) -> float:
    whole = isinstance(top, int)
    if experts < 1 or isinstance(top, bool) or not (1 <= top <= experts if whole else 0 < top <= 1):
        raise PliantError(
            got=f"top={top!r} of {experts} experts", expected="a number of experts of at least 1, or a share of them in (0, 1]",
            do="pass e.g. experts=16, top=4 or top=0.25",
        )  # fmt: skip
    return top / experts if whole else top


def _pairs(seen: Watched) -> Iterator[Pair]:
    """What may be a feed-forward layer by the sizes and the order in which linear layers ran."""
    groups: list[list[Ran]] = []
    for ran in seen.layers:
        if groups and groups[-1][0].x is ran.x:
            groups[-1].append(ran)
        else:
            groups.append([ran])
    for ups, downs in itertools.pairwise(groups):
        down, hidden = downs[0], downs[0].layer.weight.shape[1]
        if len(downs) == 1 and all(len(up.layer.weight) % hidden == 0 for up in ups):
            maps = isinstance(down.layer, nn.Conv2d)
            x = ups[0].x.movedim(1, -1) if maps else ups[0].x
            if not maps or hidden >= x.shape[-1]:  # else it squeezes, as what weighs channels does
                yield Pair(tuple(up.path for up in ups), down.path, hidden, x)


def _proven(seen: Watched, path: str, experts: int) -> list[Pair] | PliantError:
    """The feed-forward layers inside ``path``."""
    near = [pair for pair in _pairs(seen) if all(inside(name, path) for name in (*pair.ups, pair.down))]
    fit: list[Pair] = []
    said: list[str] = []
    for pair in near:
        if any(pair.ups[0] == other.down for other in fit):  # of three linear layers the first two
            continue
        parts = next((n for n in (experts, 2) if pair.hidden % n == 0), 1)

        def build(module: nn.Module, rule: Rule, pair: Pair = pair, parts: int = parts) -> Executor:
            layers = [module.get_submodule(name) for name in modules_of(path, (*pair.ups, pair.down))]
            order = torch.arange(pair.hidden, device=pair.x.device).reshape(parts, -1)
            return HostExperts(layers[:-1], layers[-1], Site(nn.Identity(), rule, shape=(parts,)), order).eval()

        found = trouble(seen, path, build, (pair.ups[0], pair.down))
        if found is None:
            fit.append(pair)
        else:
            said.append(f"{pair.ups[0].removeprefix(path + '.')} to {pair.down.removeprefix(path + '.')}: {found}")
    if not fit:
        return _no_layer(seen, path, said)
    for pair in fit:
        if pair.hidden % experts:
            some = [n for n in range(2, pair.hidden + 1) if pair.hidden % n == 0]
            raise PliantError(
                got=f"{pair.hidden} hidden neurons for {experts} experts", expected="experts of one size",
                do=f"pass experts={min(some, key=lambda n: abs(n - experts))}", site=path,
            )  # fmt: skip
    return fit


def _no_layer(seen: Watched, path: str, said: Sequence[str]) -> PliantError:
    """Why there is nothing to split in ``path``, and where there may be."""
    others = [
        p.down.rpartition(".")[0] for p in _pairs(seen)
        if not inside(p.down, path) and "." in p.down and p.hidden > p.x.shape[-1] and p.x.shape[1:-1] != (1, 1)
    ]  # fmt: skip
    maps = any(isinstance(module, nn.Conv2d) for module in seen.host.get_submodule(path).modules())
    near = ", ".join(map(repr, dict.fromkeys(others[:3])))
    names = f"name a module that holds one, e.g. {near}, or gate" if near and not maps else "gate"
    return PliantError(
        got="a module without a feed-forward layer" + (f" ({'; '.join(said[:2])})" if said else ""),
        expected="linear layers, then one that reads their neurons, with what treats each neuron alone in between, rows first",
        do="gate the channels of convolutions: pliant.retrofit.channels" if maps else f"{names} whole blocks: pliant.retrofit.skips",
        site=path,
    )  # fmt: skip


def _first(ups: Sequence[Any], pair: Pair) -> Tensor:
    """What each hidden neuron reads, (H, ...), of one length: neurons that look for the same come together."""
    weights = [
        up.weight.detach().flatten(1).float().unflatten(0, (-1, pair.hidden)).transpose(0, 1).flatten(1) for up in ups
    ]
    return nn.functional.normalize(torch.cat(weights, 1), dim=1)


@torch.no_grad()
def _begin(score: Any, up: Any, down: Any, order: Tensor) -> None:
    """The router's first weights: the mean of each expert's, neurons weighted by what they can add."""
    weight = down.weight.flatten(1).norm(dim=0)[order]
    weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    score.linear.weight.copy_((up.weight.flatten(1)[order] * weight[..., None]).sum(1))
    if up.bias is not None:
        score.linear.bias.copy_((up.bias[order] * weight).sum(1))


def _refuse_scorer(scorer: nn.Module, pair: Pair, experts: int) -> None:
    with torch.no_grad():
        scores = share(scorer).eval()(pair.x)
    if scores.shape != (*pair.x.shape[:-1], experts):
        raise PliantError(
            got=f"scores of shape {tuple(scores.shape)} for tokens of shape {tuple(pair.x.shape)}",
            expected=f"{experts} for each token", do="pass scorer= that makes a module from (R, ..., D) to (R, ..., E)",
            site=pair.down,
        )  # fmt: skip
