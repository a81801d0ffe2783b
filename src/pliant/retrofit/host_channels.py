"""HostChannels: convolutions of somebody else's model that follow one another, between which each row runs some channels."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.functional.channels import Picked, alike, conv_picked, pack, pick, unpack
from pliant.functional.dynamic_conv import Geometry, output_size
from pliant.retrofit.parts import all_on, calls, looked_at, muted, unread, wanted


class Role(NamedTuple):
    """What a layer does with hidden channels, which are called by their number in the chain.

    "conv" reads some, or writes some, or both; "alone" treats each channel alone; "weigh" reads or writes means over the map.
    """

    path: str
    kind: Literal["conv", "alone", "weigh"]
    reads: int | None = None
    writes: int | None = None


class Chosen(NamedTuple):
    """What was decided for each of the hidden channels, (R, C) each, and which run; None where everything is computed."""

    decisions: tuple[Decision, ...]
    picked: tuple[Picked, ...] | None


class HostChannels(Executor):
    """Stands in for the layers of one chain, whose ``forward`` it replaces on the instance, so no path changes.

    Gathered, a convolution hands on the chosen channels of all rows side by side, as those of a single row; what lies between
    treats each channel alone and doesn't mind, given the parameters of those channels; the next convolution takes them up.
    All sites decide from what the first convolution reads. There is one for each of the hidden channels; or, with ``groups`` that
    say of which group each channel is (C,), a single one that decides all of them.
    """

    def __init__(
        self, layers: Sequence[nn.Module], roles: Sequence[Role], sites: Sequence[Site], groups: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.layers: tuple[Any, ...] = tuple(layer.forward for layer in layers)  # the layers' own, bound methods
        self.between: tuple[nn.Module, ...] = ()  # other modules that run before the last layer
        self.roles = tuple(roles)
        self.sites = nn.ModuleList(sites)
        self.grouped = len(groups)
        for k, group in enumerate(groups):
            self.register_buffer(f"group{k}", group)
        for j, layer in enumerate(layers):
            vars(layer)["forward"] = functools.partial(self.layer, j)

    def plain(self, *args: Any) -> None:
        """Nothing is decided."""

    def masked(self, x: Tensor) -> Chosen:
        """All channels run; those that weren't chosen count as 0."""
        decisions = tuple(site(x, shape=site.shape) for site in self._sites())
        return Chosen(
            tuple(map(self._expanded, decisions * (self.grouped or 1), range(self.grouped or len(decisions)))), None
        )

    def gathered(self, x: Tensor) -> Chosen:
        """Chosen channels run; all do while training, since a norm's statistics are of all rows, and where somebody looks on."""
        chosen = self.masked(x)
        whole = self.training or torch.compiler.is_exporting() or looked_at(self.between, self.layers)
        if whole or all(map(all_on, chosen.decisions)):
            return chosen
        masks = [d.value.detach() != 0 for d in chosen.decisions]
        sets = alike(torch.cat(masks, 1))
        return chosen._replace(picked=tuple(pick(mask, sets) for mask in masks))

    def layer(self, j: int, x: Tensor) -> Tensor:
        """What the host calls as the forward of layer ``j``."""
        if j == 0:
            calls.open[id(self)] = self.forward(x)
        last = j == len(self.layers) - 1
        chosen = calls.open.pop(id(self), None) if last else calls.open.get(id(self))
        if chosen is None:
            return self.layers[j](x)
        if self.roles[j].kind == "weigh":  # a pixel of each channel: too little to be worth parts
            return self._weighs(j, x, chosen)
        with self._part(j, chosen):
            if chosen.picked is None:
                return self._whole(j, x, chosen)
            return self._alone(j, x, chosen) if self.roles[j].kind == "alone" else self._some(j, x, chosen)

    def routers(self) -> list[tuple[str, nn.Module, nn.Module, Site]]:
        """Each site by name, with the layers that read what it reads and what its channels make."""
        last = (self.grouped or 1) - 1  # a site of groups is judged by what the last of its channels add
        return [(f"sites.{k}", self._layer(0), self._reader(k + last), s) for k, s in enumerate(self._sites())]

    def reads(self, x: Tensor) -> Tensor:
        """What a router reads of the first layer's input."""
        return x

    def mass(self, h: Tensor, k: int) -> Tensor:
        """How much each choice of site ``k`` adds for each row, at most: (R, C), or by groups, from maps (R, C, H, W)."""
        k = self.grouped - 1 if self.grouped else k
        each = h.abs().mean((2, 3)) * self._reader(k).weight.detach().flatten(2).norm(dim=(0, 2))
        if not self.grouped:
            return each
        return each.new_zeros(len(each), *self._sites()[0].shape).index_add(1, self._group(k), each)

    def _sites(self) -> list[Any]:
        return list(self.sites)

    def _group(self, k: int) -> Tensor:
        return self.get_buffer(f"group{k}")

    def _expanded(self, decision: Decision, k: int) -> Decision:
        """What was decided for each group as a decision for each of hidden channels ``k``."""
        if not self.grouped:
            return decision
        value, soft = decision.value.index_select(1, self._group(k)), decision.soft
        wide = value if soft is decision.value else None if soft is None else soft.index_select(1, self._group(k))
        return replace(decision, value=value, soft=wide)

    def _layer(self, j: int) -> Any:
        return self.layers[j].__self__

    def _reader(self, k: int) -> Any:
        """The convolution that takes up the channels of site ``k``."""
        return self._layer(next(j for j, role in enumerate(self.roles) if role.kind == "conv" and role.reads == k))

    def _whole(self, j: int, x: Tensor, chosen: Chosen) -> Tensor:
        role = self.roles[j]
        mutes = role.kind != "alone" and role.reads is not None
        return self.layers[j](self._muted(x, chosen.decisions[role.reads]) if mutes else x)  # type: ignore[index]

    def _muted(self, x: Tensor, decision: Decision) -> Tensor:
        """Maps whose channels that weren't chosen say nothing."""
        if all_on(decision):
            return x
        return muted(x, decision.value.to(x.dtype)[..., None, None], decision)

    def _some(self, j: int, x: Tensor, chosen: Chosen) -> Tensor:
        """The convolution of the chosen channels."""
        role, layer = self.roles[j], self._layer(j)
        assert chosen.picked is not None
        reads, writes = (None if k is None else chosen.picked[k] for k in (role.reads, role.writes))
        if reads is not None and role.reads is not None:
            decision = chosen.decisions[role.reads]
            x = x[:, : len(reads.row)]
            if rows.weighted(decision):
                x = x * decision.value.to(x.dtype)[reads.row, reads.channel][None, :, None, None]
        y = conv_picked(x, layer.weight, layer.bias, reads=reads, writes=writes, geometry=_geometry(layer))
        # The host may not bear maps without a channel, so one that nobody reads goes on.
        return y.new_zeros((1, 1, *y.shape[2:])) if y.shape[1] == 0 else y

    def _alone(self, j: int, x: Tensor, chosen: Chosen) -> Tensor:
        """What treats channels alone, with the parameters of those that were chosen."""
        layer, role = self._layer(j), self.roles[j]
        assert chosen.picked is not None
        assert role.reads is not None
        channel = chosen.picked[role.reads].channel
        if isinstance(layer, nn.Conv2d):
            geometry = _geometry(layer)
            if len(channel) == 0:
                return x.new_zeros((1, 1, *output_size(tuple(x.shape[2:]), tuple(layer.weight.shape[2:]), geometry)))
            bias = None if layer.bias is None else layer.bias.index_select(0, channel)
            return F.conv2d(x, layer.weight.index_select(0, channel), bias, *geometry[:3], groups=len(channel))
        return x if len(channel) == 0 else self.layers[j].__func__(_twin(layer, channel, _channels(layer)), x)

    def _weighs(self, j: int, x: Tensor, chosen: Chosen) -> Tensor:
        """Means of all channels, those that weren't chosen as 0; of what it says of all channels, those that were chosen."""
        role = self.roles[j]
        if role.reads is not None:
            decision = chosen.decisions[role.reads]
            if chosen.picked is None:
                return self.layers[j](self._muted(x, decision))
            picked = chosen.picked[role.reads]
            whole = unpack(x[:, : len(picked.row)], picked, (decision.value.shape[0], decision.value.shape[1]))
            return self.layers[j](muted(whole, decision.value.to(x.dtype)[..., None, None], decision))
        y = self.layers[j](x)
        if chosen.picked is None or role.writes is None:
            return y
        y = pack(y, chosen.picked[role.writes])
        return y.new_zeros((1, 1, *y.shape[2:])) if y.shape[1] == 0 else y

    def _part(self, j: int, chosen: Chosen) -> Any:
        """Layer ``j`` runs: units are pairs of a channel read and one written, or channels where only one kind is chosen."""
        role = self.roles[j]
        ends = dict.fromkeys(k for k in (role.writes, role.reads) if k is not None)
        decisions = [chosen.decisions[k] for k in ends]
        site = self._sites()[0 if self.grouped else next(iter(ends))]
        visit, name = decisions[0].visit, f"1/{role.path}"
        of = math.prod(d.value.shape[1] for d in decisions)
        if unread():
            return tape.part(site, visit, name, of=of)
        counts = [(d.value != 0).sum(1) for d in decisions]
        units = None if chosen.picked is None else functools.reduce(torch.mul, counts)
        want = functools.reduce(torch.mul, [wanted(d).sum(1) for d in decisions])
        return tape.part(site, visit, name, units=units, wanted=want, of=of)


def _geometry(conv: Any) -> Geometry:
    return Geometry(conv.stride, conv.padding, conv.dilation)


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself, without those of its children."""
    found = {**layer._parameters, **layer._buffers}
    return {name: t for name, t in found.items() if t is not None}


def _channels(layer: nn.Module) -> int:
    return max(t.numel() for t in own_tensors(layer).values())


def _twin(layer: nn.Module, channel: Tensor, channels: int) -> nn.Module:
    """A copy of a module whose parameters and buffers are those of some channels: what is shared with other threads stays."""
    twin = copy.copy(layer)
    for name in ("_parameters", "_buffers"):
        vars(twin)[name] = {
            key: t if t is None or t.numel() < channels else t.index_select(_dim(t), channel)
            for key, t in vars(layer)[name].items()
        }
    return twin


def _dim(t: Tensor) -> int:
    """The dimension of the channels: the only one that isn't 1."""
    return max(range(t.ndim), key=lambda d: t.shape[d])
