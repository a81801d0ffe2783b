"""Text: a batch of texts that a causal host writes token by token, and the keys and values of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from pliant.retrofit.heads import hidden_of


class Reached(BaseException):
    """The host came to its first layer, with these arguments: what it does before its layers is done. See :class:`Entered`."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)


class _Filled(BaseException):
    """A layer has handed its keys and values to the cache, and nothing else of it is wanted."""


@dataclass(frozen=True)
class Place:
    """Where the tokens that a layer is handed stand: rows of the cache (None: all), slots, and how many slots are read.

    ``slots`` is the first slot where all rows stand alike, else a slot for every token (rows, tokens). Reading none, the layer
    stops when its keys and values are stored: then ``rows`` and ``slots`` name one token each, all in one row of the layer's.
    """

    rows: Tensor | None
    slots: int | Tensor
    read: int


class Cache:
    """Keys and values of every layer by row and slot; to a layer, an object with ``update``, as transformers' caches are.

    Every row may stand at a slot of its own, and slots are written anew, so texts that take different numbers of drafts stay in
    one batch. Room is made once: adding a token copies nothing.
    """

    is_compileable = False

    def __init__(self, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self.place = Place(None, 0, slots)
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store what layer ``layer`` computed for the tokens at ``place``; all that its rows may look at."""
        if layer not in self.stored:
            # Zeros, since what a mask hides is still multiplied by 0.
            self.stored[layer] = (self._room(key), self._room(value))
        keys, values = self.stored[layer]
        self._write(keys, key)
        self._write(values, value)
        if not self.place.read:
            raise _Filled
        return self._read(keys), self._read(values)

    def keep(self, index: Tensor) -> None:
        """From now on only the rows ``index`` are there."""
        self.rows = index.shape[0]
        self.stored = {layer: (k[index], v[index]) for layer, (k, v) in self.stored.items()}

    def get_seq_length(self, *_: Any) -> int:
        """Slots that were written; a host asks where no positions are given."""
        return self.place.read

    def _room(self, t: Tensor) -> Tensor:
        return t.new_zeros((self.rows, t.shape[1], self.slots, t.shape[3]))

    def _write(self, into: Tensor, t: Tensor) -> None:
        rows, slots = self.place.rows, self.place.slots
        if not self.place.read:
            into[rows, :, slots] = t[0].transpose(0, 1)
        elif isinstance(slots, int):
            here = into.narrow(2, slots, t.shape[2])
            here.copy_(t) if rows is None else here.index_copy_(0, rows, t)
        else:
            rows = torch.arange(self.rows, device=t.device) if rows is None else rows
            into[rows[:, None], :, slots] = t.transpose(1, 2)

    def _read(self, stored: Tensor) -> Tensor:
        whole = stored.narrow(2, 0, self.place.read)
        return whole if self.place.rows is None else whole.index_select(0, self.place.rows)


class Host(Protocol):
    """What a text needs of the model that writes it; see :class:`pliant.retrofit.causal.CausalExits`."""

    follows: tuple[int, ...]
    mask_at: int
    additive: bool
    plain_front: bool

    def front(self, **call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the first layer is called with."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens as hidden states."""
        ...

    def layers(self) -> Sequence[nn.Module]:
        """The layers, first to last."""
        ...


@dataclass
class Entered:
    """New tokens before the first layer: hidden states, and what all layers are handed beside them.

    ``follow`` are the tensors with rows first, to be cut to the rows that are left; ``leaves`` hold the others.
    """

    hidden: Tensor
    follow: list[Tensor]
    where: list[int]
    leaves: list[Any]
    spec: Any
    slots: int | Tensor
    read: int

    def arguments(self, follow: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer is called with beside the hidden state, ``follow`` being those of the rows in flight."""
        leaves = list(self.leaves)
        for j, t in zip(self.where, follow, strict=True):
            leaves[j] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args[1:], kwargs


class Text:
    """The texts of one batch: what was read so far, by which layers, and where padding stands.

    ``ready[r, s]`` is how many segments of layers have the keys and values of the token at slot ``s`` of row ``r``; one that left
    early waits in ``held`` with the hidden state it left with, until a later token of its row looks for it.
    """

    def __init__(self, host: Host, mask: Tensor, room: int) -> None:
        rows, length = mask.shape
        self.host = host
        self.layers = list(host.layers())
        self.length = length
        self.cache = Cache(rows, length + room)
        self.padding = (mask == 0).sum(1)
        self.here = torch.arange(rows, device=mask.device)
        self.ready = torch.full((rows, length + room), 127, dtype=torch.int8, device=mask.device)
        self.held: Tensor | None = None
        self.table: tuple[list[Any], Any] | None = (
            None  # what the first layer is called with for every position there may be
        )
        self.padded = not isinstance(mask, FakeTensor) and bool((mask == 0).any())  # a price is the same either way

    @property
    def rows(self) -> int:
        """Texts that are still written."""
        return self.cache.rows

    def keep(self, index: Tensor) -> None:
        """From now on only the rows ``index`` are there."""
        self.cache.keep(index)
        self.padding, self.ready = self.padding[index], self.ready[index]
        self.held = None if self.held is None else self.held[index]
        self.here = self.here[: index.shape[0]]

    def enter(self, tokens: Tensor, slots: int | Tensor, read: int) -> Entered:
        """Bring tokens (R, q) before the first layer: at ``slots`` (R, q), or all from one slot on; ``read`` slots are looked at."""
        place = slots + torch.arange(tokens.shape[1], device=tokens.device) if isinstance(slots, int) else slots
        place = place.expand(tokens.shape)
        hidden, leaves, spec = self._front(tokens, place - self.padding[:, None])
        mask = self._mask(place, read, alike=isinstance(slots, int), like=hidden)
        leaves[self.host.mask_at] = mask
        where = [j for j in self.host.follows if j != self.host.mask_at or mask is not None]
        return Entered(hidden, [leaves[j] for j in where], where, leaves, spec, slots, read)

    def run(self, entered: Entered, span: tuple[int, int], state: list[Any], gone: Tensor | None = None) -> Tensor:
        """Layers ``span`` on the rows in flight: ``state`` is [hidden, rows, follow, ...]. Rows that are ``gone`` stay as they are."""
        hidden, here, follow = state[:3]
        whole = here.shape[0] == self.rows
        slots = entered.slots if isinstance(entered.slots, int) or whole else entered.slots[here]
        self.cache.place = Place(None if whole else here, slots, entered.read)
        args, kwargs = entered.arguments(follow)
        for layer in self.layers[slice(*span)]:
            after = hidden_of(layer(hidden, *args, **kwargs), "")
            hidden = after if gone is None else torch.where(gone[:, None, None], hidden, after)
        return hidden

    def hold(self, here: Tensor, slot: int, hidden: Tensor, ready: int) -> None:
        """Note for the tokens at ``slot`` that the first ``ready`` segments have them, and the hidden state behind those."""
        if self.held is None:
            self.held = hidden.new_empty((*self.ready.shape, hidden.shape[-1]))
        self.held[here, slot] = hidden[:, -1]
        self.ready[here, slot] = ready

    def behind(self, here: Tensor, slot: int, segment: int) -> Tensor:
        """Which tokens before ``slot`` segment ``segment`` lacks, (n, 2): index among the rows ``here``, and slot."""
        return (self.ready.index_select(0, here)[:, :slot] <= segment).nonzero()

    def fill(self, rows: Tensor, slots: Tensor, span: tuple[int, int], hidden: Tensor) -> None:
        """Give layers ``span`` keys and values of the tokens at (rows, slots), as if ``hidden`` (n, D) came to each of them.

        A layer is left as soon as they are stored: what it spends is its norm and its projections.
        """
        positions = slots - self.padding[rows]
        _, leaves, spec = self._front(torch.zeros_like(positions)[None], positions[None])
        leaves[self.host.mask_at] = None
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.cache.place = Place(rows, slots, 0)
        for layer in self.layers[slice(*span)]:
            try:
                layer(hidden[None], *args[1:], **kwargs)
            except _Filled:
                continue

    def _front(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Any], Any]:
        """Hidden states before the first layer, and the leaves of what it's called with."""
        positions = positions.clamp(min=0)
        if not self.host.plain_front:
            leaves, spec = self._called(tokens, positions)
            return leaves[0], leaves, spec
        if self.table is None:
            every = torch.arange(self.cache.slots, device=tokens.device)[None]
            self.table = self._called(torch.zeros_like(every), every)
        leaves = list(self.table[0])
        for j in self.host.follows:
            if j != self.host.mask_at:
                leaves[j] = leaves[j][0][positions]
        return self.host.embed(tokens), leaves, self.table[1]

    def _called(self, tokens: Tensor, positions: Tensor) -> tuple[list[Any], Any]:
        call = self.host.front(
            input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True,
            attention_mask=tokens.new_ones((1, 1, 1, 1), dtype=torch.bool),  # four dimensions: taken as it is
        )  # fmt: skip
        return pytree.tree_flatten(call)

    def _mask(self, place: Tensor, read: int, *, alike: bool, like: Tensor) -> Tensor | None:
        """Which slots each token looks at, (R, 1, q, read): those up to its own without padding; itself always."""
        tokens = place.shape[1]
        if alike and not self.padded and (tokens == 1 or (tokens == read and not self.host.additive)):
            return None  # a token by itself may look at all, and fused attention is causal by itself
        slots = torch.arange(read, device=place.device)
        seen = (slots <= place[..., None]) & (slots >= self.padding[:, None, None]) | (slots == place[..., None])
        seen = seen[:, None]
        if not self.host.additive:
            return seen
        return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)
