"""channels: between the convolutions of any model each input runs some of the channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core.bind import share
from pliant.core.calls import call_of
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Rule, Site
from pliant.estimators.ranked import RankStraightThrough
from pliant.functional.clusters import balanced_assignment, balanced_clusters
from pliant.functional.dynamic_conv import Geometry, output_size
from pliant.retrofit.host_channels import HostChannels, Role, own_tensors
from pliant.retrofit.pairs import Ran, Watched, all_of, inside, modules_of, own, refuse_not_called, trouble, watch
from pliant.retrofit.parts import hooked
from pliant.retrofit.refuse import refuse_model
from pliant.retrofit.skips import Aside, expanded
from pliant.rules.share import Share
from pliant.scores.mass import ChannelMass

LONGEST = 3
"""Convolutions of one chain. Its sites decide from what the first one reads, which says less of what comes later."""


class Chain(NamedTuple):
    """Layers in running order, from the convolution that writes hidden channels to the one that reads the last of them."""

    roles: tuple[Role, ...]
    hidden: tuple[int, ...]
    x: Tensor


def channels(
    model: nn.Module, at: Sequence[str], *, example: Any, top: float = 0.5, groups: int | None = None,
    scorer: Callable[[Tensor, int], nn.Module] | None = None, rule: Rule | None = None,
) -> Any:  # fmt: skip
    r"""Choose channels between the convolutions inside ``at`` of your own model; a gate picks for each input which run.

    .. math:: y = W_2 * \phi\big(v \odot (W_1 * x)\big), \qquad v \in \{0, 1\}^C

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched. All original paths and
    state_dict keys stay; what is new lies under ``channels`` (``channels.0.sites.0``). In evaluation a convolution writes only the
    channels that an input chose and the next one reads only those, input by input, at any batch size; while training all run and
    count by the value. Channels that weren't chosen are 0 to whoever reads them. With all channels on the host's own layers
    run, so the answers are bit-identical. The gate begins as what the weights alone say of each channel: fit it by
    :func:`fit_routers`, train it by gradient. Exported, everything is computed.

    Chains are found by running the model: a convolution, then one or two that read what was written before, and in between only
    what treats each channel alone (norms in evaluation, activations, pooling, depthwise convolutions) or weighs channels by
    means over the map (squeeze and excitation); proven by running them in parts. So norms over the channels, and channels that
    others read too, are refused. Channels that a residual sum reads stay. Composes with :func:`exits`, :func:`skips`, :func:`tokens`
    and :func:`experts`, in any order.

    Shape:
        maps :math:`(R, I, H, W)`, decisions :math:`(R, C)`.

    Args:
        model: any module whose convolutions get rows first.
        at: dotted names or patterns of modules that hold such chains, such as ``"layer*.*"``; all inside are taken.
        example: a small batch, as for :func:`exits`.
        top: the share of each input's channels that runs, in (0, 1]; a dial, which ``pliant.tune`` turns.
        groups: so many groups of channels are chosen instead of channels, by one site for each chain; default, each by itself.
            Few groups pay in batches: inputs that chose the same run together.
        scorer: from an example of what a chain reads and a number of channels :math:`C` to a module that gives each row as many
            scores; default, a linear one of means over the map.
        rule: each site gets a copy, and ``top`` isn't read; default, ``RankStraightThrough(Share(top))``.

    Returns:
        A model of the same type with the same inputs and outputs.

    Raises:
        PliantError: where a name isn't known or its module doesn't run just once, nothing inside is such a chain, or the scores don't
            fit; where the model is compiled or wrapped.

    >>> import pliant
    >>> host = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), nn.Flatten()).eval()
    >>> x = torch.randn(5, 3, 4, 4)
    >>> model = channels(host, ["0"], example=x, top=0.25)
    >>> y, trace = pliant.record(model)(x)
    >>> trace["channels.0.sites.0"][0].value.sum(1), trace.flops[0], trace.dense_flops[0]
    (tensor([2., 2., 2., 2., 2.]), tensor(544), tensor(2032))
    >>> torch.equal(pliant.bind(model, {"*": pliant.rules.Always()})(x), host(x))
    True

    References:
        Survey section 2.1.2 (3b); Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019.

    Differs from the paper: channels are chosen and not scaled; all of a chain's gates read what its first convolution reads;
    nothing is retrained.
    """
    refuse_model(model, "channels")
    if isinstance(top, bool) or not 0 < top <= 1:
        raise PliantError(got=f"top={top!r}", expected="a share of the channels in (0, 1]", do="pass e.g. top=0.5")
    found, counts = expanded(model, at), (3, 5)
    seen = watch(model, call_of(example), found, _known, counts)
    refuse_not_called(seen, found)
    chains: list[Chain] = all_of(found, at, lambda path: _proven(seen, path))
    twin = share(model)
    made = Aside()
    for chain in chains:
        layers: list[Any] = [twin.get_submodule(role.path) for role in chain.roles]
        sites: list[Site] = []
        convs = [layer for layer, role in zip(layers, chain.roles, strict=True) if role.kind == "conv"]
        grouping = [] if groups is None else _grouping(convs, chain, groups)
        for k, choices in enumerate(chain.hidden if groups is None else [groups]):
            score = ChannelMass(chain.x, choices) if scorer is None else scorer(chain.x, choices)
            _refuse_scorer(score, chain, choices)
            if scorer is None:
                _begin(score, convs[k : k + 2], k == 0, grouping[0] if grouping else None)
            decides = copy.deepcopy(rule or RankStraightThrough(Share(top)))
            sites.append(Site(score, decides, shape=(choices,)).to(chain.x.device))
        executor = HostChannels(layers, chain.roles, sites, grouping).train(model.training)
        executor.between = seen.between(twin, *_ends(chain), [role.path for role in chain.roles])
        made.append(executor)
    twin.add_module("channels", made)
    return twin


def _known(layer: Any) -> bool:
    """Whether a layer can take a part in a chain: convolutions padded by zeros, and what has parameters for each channel."""
    if own(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    tensors = own_tensors(layer).values()
    most = max((t.numel() for t in tensors), default=0)
    one = all(t.numel() == 1 or (t.numel() == most == max(t.shape)) for t in tensors)
    return most > 1 and one and own(layer, type(layer)) and not isinstance(layer, nn.Linear)


def _proven(seen: Watched, path: str) -> list[Chain] | PliantError:
    """The chains inside ``path`` that can run in parts, none with a layer of another."""
    near = [ran for ran in seen.layers if inside(ran.path, path)]
    fit: list[Chain] = []
    said: list[str] = []
    taken: set[str] = set()
    for start in range(len(near)):
        for chain in _chains(near[start:]):  # the longest first
            if taken & {role.path for role in chain.roles}:
                continue
            found = trouble(seen, path, _build(path, chain), _ends(chain))
            if found is None:
                fit.append(chain)
                taken |= {role.path for role in chain.roles}
                break
            said.append(f"{' to '.join(name or path for name in modules_of(path, _ends(chain)))}: {found}")
    return fit or _no_chain(seen, path, said)


def _ends(chain: Chain) -> tuple[str, str]:
    return chain.roles[0].path, chain.roles[-1].path


def _build(path: str, chain: Chain) -> Callable[[nn.Module, Rule], Executor]:
    def build(module: nn.Module, rule: Rule) -> Executor:
        layers = [module.get_submodule(name) for name in modules_of(path, [role.path for role in chain.roles])]
        sites = [Site(nn.Identity(), copy.deepcopy(rule), shape=(hidden,)) for hidden in chain.hidden]
        return HostChannels(layers, chain.roles, sites).eval()

    return build


def _chains(near: Sequence[Ran]) -> list[Chain]:
    """What may be a chain that begins with the first layer, by sizes and order alone; the longest first."""
    first, found = near[0], list[Chain]()
    if not _dense(first) or first.x.ndim != 4:
        return []
    roles, hidden = [Role(first.path, "conv", writes=0)], [first.layer.out_channels]
    size = _size(first)
    for ran in near[1:]:
        k, width = len(hidden) - 1, hidden[-1]
        if not isinstance(ran.layer, nn.Conv2d):
            if _channels_of(ran) != width:
                break
            roles.append(Role(ran.path, "alone", k, k))
        elif not _dense(ran):
            if not ran.layer.groups == ran.layer.in_channels == ran.layer.out_channels == width:
                break
            roles.append(Role(ran.path, "alone", k, k))
            size = _size(ran)
        elif tuple(ran.x.shape[2:]) == (1, 1) != size:
            reads = ran.layer.in_channels == width and roles[-1].kind != "weigh"
            if not reads and (ran.layer.out_channels != width or roles[-1].kind != "weigh"):
                break
            roles.append(Role(ran.path, "weigh", k, None) if reads else Role(ran.path, "weigh", None, k))
        elif ran.layer.in_channels == width:
            found.append(Chain((*roles, Role(ran.path, "conv", k, None)), tuple(hidden), first.x))
            if len(hidden) == LONGEST - 1:
                break
            roles.append(Role(ran.path, "conv", k, k + 1))
            hidden.append(ran.layer.out_channels)
            size = _size(ran)
        else:
            break
    return found[::-1]


def _dense(ran: Ran) -> bool:
    return isinstance(ran.layer, nn.Conv2d) and ran.layer.groups == 1


def _size(ran: Ran) -> tuple[int, int]:
    """Height and width of what a convolution makes."""
    layer = ran.layer
    return output_size(tuple(ran.x.shape[2:]), layer.kernel_size, Geometry(layer.stride, layer.padding, layer.dilation))


def _channels_of(ran: Ran) -> int:
    """Of how many channels a layer that isn't a convolution has parameters."""
    return max(t.numel() for t in own_tensors(ran.layer).values())


def _no_chain(seen: Watched, path: str, said: Sequence[str]) -> PliantError:
    """Why there are no channels to choose in ``path``, and where there may be."""
    others = [
        _common(*_ends(chains[0])) for k, ran in enumerate(seen.layers)
        if not inside(ran.path, path) and (chains := _chains(seen.layers[k:]))
    ]  # fmt: skip
    near = ", ".join(map(repr, list(dict.fromkeys(name for name in others if name))[:3]))
    inner = list(seen.host.get_submodule(path).modules())
    if hooked(module for module in inner if isinstance(module, nn.Conv2d)):
        said = [*said, "something is attached to convolutions: attach channels before it"]
    linear = any(isinstance(module, nn.Linear) for module in inner)
    other = "split linear layers: pliant.retrofit.experts" if linear else "gate whole blocks: pliant.retrofit.skips"
    return PliantError(
        got="a module without convolutions that follow one another" + (f" ({'; '.join(said[:2])})" if said else ""),
        expected="a convolution, what treats each of its channels alone, and a convolution that reads them, rows first",
        do=(f"name a module that holds some, e.g. {near}, or " if near else "") + other, site=path,
    )  # fmt: skip


def _common(first: str, last: str) -> str:
    """The innermost module that holds both."""
    a, b = first.split("."), last.split(".")
    n = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)) - 1)
    return ".".join(a[:n])


@torch.no_grad()
def _grouping(convs: Sequence[Any], chain: Chain, groups: int) -> list[Tensor]:
    """Of which group each channel is: first channels that read alike come together, then those that read most from the same group."""
    for hidden in chain.hidden:
        if groups < 1 or hidden % groups:
            some = [n for n in range(1, hidden + 1) if hidden % n == 0]
            raise PliantError(
                got=f"groups={groups} for {hidden} channels", expected="groups of one size",
                do=f"pass groups={min(some, key=lambda n: abs(n - groups))}", site=chain.roles[0].path,
            )  # fmt: skip
    weights = [conv.weight.detach().float() for conv in convs]
    order = balanced_clusters(nn.functional.normalize(weights[0].flatten(1), dim=1), groups)
    found = [
        torch.empty_like(order.flatten()).scatter(
            0, order.flatten(), torch.arange(groups).repeat_interleave(order.shape[1]).to(order.device)
        )
    ]
    for weight in weights[1:-1]:
        said = weight.flatten(2).norm(dim=2)  # (O, I)
        by_group = said.new_zeros(len(said), groups).index_add(1, found[-1], said)
        found.append(balanced_assignment(-by_group, len(said) // groups))
    return found


@torch.no_grad()
def _begin(score: Any, convs: Sequence[Any], first: bool, group: Tensor | None) -> None:
    """The gate's first weights: how much each channel, or group, can add by what is written into it and what reads it."""
    writes, reads = convs
    weight = reads.weight.flatten(2).norm(dim=(0, 2))
    into = writes.weight.flatten(2).norm(dim=2) * weight[:, None]
    into = into if group is None else into.new_zeros(score.linear.out_features, into.shape[1]).index_add(0, group, into)
    if first:
        score.linear.weight.copy_(into)
    else:  # what the gate reads isn't what's written from
        score.linear.bias.copy_(into.sum(1))


def _refuse_scorer(scorer: nn.Module, chain: Chain, choices: int) -> None:
    with torch.no_grad():
        scores = share(scorer).eval()(chain.x)
    if scores.shape != (chain.x.shape[0], choices):
        raise PliantError(
            got=f"scores of shape {tuple(scores.shape)} for {chain.x.shape[0]} rows and {choices} channels or groups",
            expected="one score for each", do="pass scorer= that makes a module from (R, I, H, W) to (R, C)",
            site=chain.roles[0].path,
        )  # fmt: skip
