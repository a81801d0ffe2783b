"""HostExperts: a dense feed-forward pair of somebody else's model, of whose hidden neurons each token runs some groups."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.decision import Decision
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.functional.dispatch import Sent, dispatch
from pliant.retrofit.parts import all_on, calls, looked_at, muted, unread, wanted


class Chosen(NamedTuple):
    """What was decided for ``x``, and where its tokens go; None where everything is computed."""

    x: Tensor
    decision: Decision
    sent: Sent | None


class Packed(dict[Any, tuple[Any, Any]]):
    """Parts of weights side by side, each with the version of the weight that it was cut from. Copies begin empty."""

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()

    def __reduce__(self) -> Any:
        return Packed, ()


def version(*tensors: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor's numbers do, except through ``.data``."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)


class HostExperts(Executor):
    """Stands in for the layers of one pair, linear or convolutions of size 1, whose ``forward`` it replaces on the instance, so no path changes.

    Gathered, the first layers hand on the hidden neurons of every chosen (token, expert) pair, sorted by expert; what lies
    between treats each number alone and doesn't mind; the last layer adds the experts' answers up token by token.
    """

    order: Tensor

    def __init__(self, ups: Sequence[nn.Module], down: nn.Module, site: Site, order: Tensor) -> None:
        super().__init__()
        self.ups = tuple(up.forward for up in ups)  # the layers' own, bound methods
        self.down = down.forward
        self.site = site
        self.between: tuple[nn.Module, ...] = ()  # other modules that run before the last layer
        self.maps = isinstance(down, nn.Conv2d)
        self.packed = Packed()
        self.register_buffer("order", order)  # (E, H / E): the neurons of each expert
        for k, up in enumerate(ups):
            vars(up)["forward"] = functools.partial(self.up, k)
        vars(down)["forward"] = functools.partial(self.low)

    def plain(self, *args: Any) -> None:
        """Nothing is decided."""

    def masked(self, x: Tensor) -> Chosen:
        """All neurons run; those of experts that weren't chosen count as 0."""
        t = self.tokens(x)
        return Chosen(x, self.site(t, shape=(*t.shape[1:-1], len(self.order))), None)

    def gathered(self, x: Tensor) -> Chosen:
        """Tokens go to the experts that they chose; where all chose all, the host's own layers run, and where somebody looks on."""
        chosen = self.masked(x)
        if torch.compiler.is_exporting() or looked_at(self.between, (*self.ups, self.down)) or all_on(chosen.decision):
            return chosen
        return chosen._replace(sent=dispatch(chosen.decision.value.flatten(0, -2)))

    def up(self, k: int, x: Tensor) -> Tensor:
        """What the host calls as the forward of its ``k``-th first layer."""
        if k == 0:
            calls.open[id(self)] = self.forward(x)
        chosen = calls.open.get(id(self))
        if chosen is None or chosen.x is not x:
            return self.ups[k](x)
        with self._part(chosen, str(k)):
            return self.ups[k](x) if chosen.sent is None else self._hidden(k, x, chosen.sent)

    def low(self, h: Tensor) -> Tensor:
        """What the host calls as the forward of its last layer."""
        chosen = calls.open.pop(id(self), None)
        if chosen is None:
            return self.down(h)
        with self._part(chosen, "down"):
            if chosen.sent is None:
                return self.down(h if all_on(chosen.decision) else self._muted(h, chosen.decision))
            return self._sum(h, chosen)

    def routers(self) -> list[tuple[str, nn.Module, nn.Module, Site]]:
        """The site by name, with the layers that read what it reads and what its experts make."""
        return [("site", self.ups[0].__self__, self.down.__self__, self.site)]

    def reads(self, x: Tensor) -> Tensor:
        """What a router reads of a first layer's input."""
        return self.tokens(x)

    def mass(self, h: Tensor, k: int) -> Tensor:
        """How much each expert adds to each token, at most: (N, E) from all hidden neurons (R, ..., H)."""
        weight = self.down.__self__.weight.detach().flatten(1)
        return (self.tokens(h).flatten(0, -2).abs() * weight.norm(dim=0))[:, self.order].sum(-1)

    def tokens(self, x: Tensor) -> Tensor:
        """What a layer of the pair reads or makes with features last: pixels are tokens to a convolution of size 1."""
        return x.movedim(1, -1) if self.maps else x

    def _muted(self, h: Tensor, decision: Decision) -> Tensor:
        expert = self.order.flatten().argsort().div(self.order.shape[1], rounding_mode="floor")  # of each neuron
        gate = decision.value.to(h.dtype).index_select(-1, expert)
        gate = gate.movedim(-1, 1) if self.maps else gate
        return muted(h, gate, decision)

    def _hidden(self, k: int, x: Tensor, sent: Sent) -> Tensor:
        """The hidden neurons of each pair of a token and an expert: (P, H / E)."""
        weight, bias = self._first(k)
        x = self.tokens(x).flatten(0, -2)
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return self._written(x, weight, bias, sent)
        some = x.index_select(0, sent.token).split(sent.counts)
        parts = [
            F.linear(t, weight[e], None if bias is None else bias[e]) for e, t in enumerate(some) if t.shape[0]
        ]  # fmt: skip
        return torch.cat(parts) if parts else x.new_zeros((0, weight.shape[1]))

    def _written(self, x: Tensor, weight: Tensor, bias: Tensor | None, sent: Sent) -> Tensor:
        """The same, each expert's neurons written to where they belong: a fifth less time than putting them together."""
        h = x.new_empty((len(sent.token), weight.shape[1]))
        for e, (token, part) in enumerate(zip(sent.token.split(sent.counts), h.split(sent.counts), strict=True)):
            if bias is None:
                torch.mm(x.index_select(0, token), weight[e].T, out=part)
            else:
                torch.addmm(bias[e], x.index_select(0, token), weight[e].T, out=part)
        return h

    def _sum(self, h: Tensor, chosen: Chosen) -> Tensor:
        """Answers of the experts, added up token by token, and the bias once."""
        x, decision, sent = self.tokens(chosen.x), chosen.decision, chosen.sent
        assert sent is not None
        weight, bias = self._last(), self.down.__self__.bias
        y: Any = None  # made like the first answer, which autocast may have narrowed
        tokens, gates = (t.split(sent.counts) for t in (sent.token, sent.gate))
        for e, part in enumerate(h.split(sent.counts)):
            if part.shape[0] == 0:
                continue
            part = F.linear(part, weight[e])
            part = part * gates[e][:, None].to(part.dtype) if rows.weighted(decision) else part
            y = part.new_zeros((x.shape[:-1].numel(), part.shape[1])) if y is None else y
            y = y.index_add_(0, tokens[e], part)
        y = x.new_zeros((x.shape[:-1].numel(), weight.shape[1])) if y is None else y
        y = y if bias is None else y + bias.to(y.dtype)
        y = y.reshape(*x.shape[:-1], y.shape[1])
        return y.movedim(-1, 1).contiguous() if self.maps else y

    def _first(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Weight (E, m H / E, D) and bias of each expert in a first layer, which may hold m numbers for each neuron."""
        layer = self.ups[k].__self__
        size = self.order.numel()
        places = torch.arange(0, len(layer.weight), size, device=self.order.device)[None, :, None] + self.order[:, None]

        def cut(t: Tensor) -> Tensor:
            return t.index_select(0, places.flatten()).unflatten(0, (len(self.order), -1))

        weight = self._cut(("weight", k), layer.weight, lambda w: cut(w.flatten(1)))
        return weight, None if layer.bias is None else self._cut(("bias", k), layer.bias, cut)

    def _last(self) -> Tensor:
        """Weight (E, D', H / E) of each expert in the last layer."""

        def cut(weight: Tensor) -> Tensor:
            some = weight.flatten(1).index_select(1, self.order.flatten())
            return some.unflatten(1, self.order.shape).transpose(0, 1).contiguous()

        return self._cut("down", self.down.__self__.weight, cut)

    def _cut(self, name: Any, tensor: Tensor, cut: Any) -> Tensor:
        """Parts of a weight: cut anew where a gradient passes, else once for each version of it."""
        if (torch.is_grad_enabled() and tensor.requires_grad) or torch.compiler.is_compiling():
            return cut(tensor)
        now = version(tensor, self.order)
        found = self.packed.get(name)
        if found is None or found[0] != now:
            found = self.packed[name] = (now, cut(tensor.detach()))
        return found[1]

    def _part(self, chosen: Chosen, name: str) -> Any:
        """One layer of the pair runs: units are pairs of a token and an expert."""
        decision, sent = chosen.decision, chosen.sent
        of = decision.value.shape[1:].numel()
        if unread():
            return tape.part(self.site, decision.visit, f"1/{name}", of=of)
        units = None if sent is None else (decision.value != 0).flatten(1).sum(1)
        return tape.part(
            self.site, decision.visit, f"1/{name}", units=units, wanted=wanted(decision).flatten(1).sum(1), of=of
        )  # fmt: skip
