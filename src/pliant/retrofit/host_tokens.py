"""HostTokens: tokens that leave somebody else's model between its layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.errors import PliantError
from pliant.core.trace import batch_of
from pliant.execute import rows
from pliant.retrofit.follow import TokenCall, calls
from pliant.retrofit.heads import hidden_of
from pliant.retrofit.skips import Aside

QUERIES = ("q_proj", "query", "q_lin", "q")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
KEYS = ("k_proj", "key", "k_lin", "k")


class HostTokens(Aside):
    """One :class:`~pliant.execute.Tokens` for each of the layers ``at``, and hooks that are bound methods of this module, as in HostExits."""

    def __init__(self, executors: Sequence[nn.Module], at: Sequence[str]) -> None:
        super().__init__(executors)
        self.at = tuple(at)
        self.heads: tuple[int, ...] = (0,) * len(self.at)

    def install(self, root: nn.Module, cover: Sequence[str]) -> None:
        """Register the hooks on ``root``, once."""
        names = list(inspect.signature(root.forward).parameters)
        mask_at = names.index("attention_mask") if "attention_mask" in names else None
        root.register_forward_pre_hook(functools.partial(self._begins, mask_at), with_kwargs=True)
        root.register_forward_hook(self._ends, always_call=True)
        for k, path in enumerate(self.at):
            root.get_submodule(path).register_forward_hook(functools.partial(self._after, k))
        for path in cover:
            root.get_submodule(path).register_forward_pre_hook(self._before, with_kwargs=True)
        root.add_module("tokens", self)
        self.heads = tuple(self._hear(root, k) for k in range(len(self.at)))

    def _hear(self, root: nn.Module, k: int) -> int:
        """Catch queries and keys of layer ``at[k]`` where its scorer reads them; how many heads they are of."""
        site = getattr(self[k], "site", None)
        if not getattr(getattr(site, "scorer", None), "reads_looks", False):
            return 0
        for module in root.get_submodule(self.at[k]).modules():
            children = dict(module.named_children())
            wanted = [next((n for n in names if n in children), "") for names in (QUERIES, KEYS)]
            wanted = ["qkv"] if "qkv" in children else wanted
            heads = next((int(getattr(module, name)) for name in HEADS if hasattr(module, name)), 0)
            if heads and all(isinstance(children.get(name), nn.Linear) for name in wanted):
                for name, kind in zip(wanted, ("q", "k") if len(wanted) > 1 else ("qkv",), strict=True):
                    children[name].register_forward_hook(functools.partial(self._heard, k, kind))
                return heads
        raise PliantError(
            got="a layer whose queries and keys can't be caught",
            expected="attention with linear layers called qkv, q_proj and k_proj, or query and key",
            do="score by pliant.scores.TokenNorm or TokenLinear",
            site=self.at[k],
        )

    def _open(self) -> TokenCall | None:
        """The call that runs in this thread, if it's one of this host: a layer may also be called on its own."""
        stack = calls.stack
        return stack[-1] if stack and stack[-1].owner is self else None

    def _begins(self, mask_at: int | None, root: nn.Module, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and mask_at is not None and mask_at < len(args):
            mask = args[mask_at]
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        calls.stack.append(TokenCall(self, batch_of(args, kwargs), mask))

    def _ends(self, root: nn.Module, args: Any, output: Any) -> None:
        calls.stack.pop()

    def _heard(self, k: int, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        call = self._open()
        if call is not None:
            call.heard.setdefault(k, {})[name] = call.whole(output)  # an exit at the same layer may drop rows yet

    def _after(self, k: int, layer: nn.Module, args: Any, output: Any) -> Any:
        """After layer ``at[k]``: what is returned is what the host goes on with."""
        call = self._open()
        tokens: Any = self[k]
        if call is None:
            return None
        hidden = hidden_of(output, self.at[k])
        there = self._there(call, hidden)
        size = call.here(call.size)
        if size is None and there is not None:
            size = there.to(hidden.dtype)  # padding weighs nothing
        left = tokens.step(hidden, size=size, there=there, looks=self._looks(call, k, layer))
        call.left(hidden.shape[1], left)
        return (left.hidden, *output[1:]) if isinstance(output, tuple) else left.hidden

    def _there(self, call: TokenCall, hidden: Tensor) -> Tensor | None:
        """Which tokens are no padding, where the host takes an attention mask of one number for each."""
        mask = call.follow(call.mask)
        if mask is None or mask.shape[1:] != hidden.shape[1:2]:
            return None
        return (mask if rows.same(mask.shape[0], hidden.shape[0]) else call.here(mask)) != 0

    def _looks(self, call: TokenCall, k: int, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The class token's query, and the keys of those that may go, by heads."""
        heard, heads = call.heard.pop(k, {}), self.heads[k]
        if not heads:
            return None
        if "forward" in vars(layer):  # a gate's, by which rows pass without any attention
            raise PliantError(
                got="attention of a layer that rows may pass by", expected="a layer that every row runs",
                do="put the gate on another layer, or score by pliant.scores.TokenNorm or TokenLinear", site=self.at[k],
            )  # fmt: skip
        heard = {name: call.here(t) for name, t in heard.items()}
        both = heard["qkv"].chunk(3, -1)[:2] if "qkv" in heard else (heard["q"], heard["k"])
        query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in both)
        prefix = int(self[k].prefix)  # pyright: ignore[reportArgumentType]
        return query[:, :, :1], key[:, :, prefix:]

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a layer: what comes beside the hidden state may still have the tokens that left."""
        call = self._open()
        if call is None or call.index is None:
            return None
        return pytree.tree_map(call.follow, (args, kwargs))
