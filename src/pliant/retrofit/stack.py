"""Stack: the layers of a causal host, what stands before and behind them, and which hosts have none that exits can use."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, gathered, masked, named, share
from pliant.core.calls import prediction_of
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.site import Site
from pliant.core.trace import Trace
from pliant.retrofit import probe
from pliant.retrofit.text import Cache, Reached, Text
from pliant.rules.fixed import Always, Given

STEPS = 3  # that are written to prove that exits work


@dataclass(frozen=True)
class Stack:
    """Where the layers of a host lie and how they're called."""

    path: str  # of the list of layers
    count: int
    depths: tuple[int, ...]  # how many layers stand before each exit
    after: tuple[str, ...]  # what runs behind the last layer, in order: norm, head
    follows: tuple[int, ...]  # which leaves of a layer's arguments have rows first, the hidden state left out
    mask_at: int  # which leaf is the mask
    additive: bool  # whether the mask is added to scores, not a choice
    plain: bool  # whether layers are handed token embeddings, and beside them what hangs on each token's position alone


def refuse_host(model: nn.Module) -> None:
    """Raise where ``model`` writes no text token by token, or keeps something else than all keys and values."""
    config: Any = getattr(model, "config", None)
    writes = getattr(model, "can_generate", None)
    if config is None or writes is None or not writes() or model.get_output_embeddings() is None:  # pyright: ignore[reportCallIssue]
        raise PliantError(
            got=f"a {type(model).__name__}, which writes no text", expected="a causal language model of transformers",
            do="pass e.g. a LlamaForCausalLM; for a model that classifies, pliant.retrofit.exits",
        )  # fmt: skip
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise PliantError(
            got=f"a {type(model).__name__}, which reads an encoder", expected="a decoder alone",
            do="pass a causal language model; cross-attention isn't followed",
        )  # fmt: skip
    from transformers.cache_utils import DynamicCache, DynamicLayer

    kept = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kept:
        raise PliantError(
            got=f"layers that keep a {', '.join(sorted(k.__name__ for k in kept))}", expected="all keys and values of all tokens",
            do="set config.sliding_window = None where the texts are shorter than the window; recurrent layers can't leave tokens out",
        )  # fmt: skip
    if config._attn_implementation not in ("sdpa", "eager"):
        raise PliantError(
            got=f"attention by {config._attn_implementation!r}", expected="'sdpa' or 'eager'",
            do="call model.set_attn_implementation('sdpa') first",
        )  # fmt: skip


def stack_of(model: nn.Module, at: Sequence[str]) -> Stack:
    """The layers that ``at`` are among, and what the model does before and behind them."""
    modules = dict(named(model))
    lists = {path for path, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 1 and _layered(model, m)}
    layers = [name for name in modules if name.rpartition(".")[0] in lists]
    if isinstance(at, str) or not at:
        raise PliantError(got=f"at={at!r}", expected="a list of layer names", do=f"pass e.g. {layers[:1]}")
    for name in at:
        if name not in layers:
            close = difflib.get_close_matches(name, layers, n=4, cutoff=0.3) or layers[:4]
            raise PliantError(
                got=f"the name {name!r}",
                expected=f"that of a layer, such as {close}",
                do="name whole layers of the decoder",
            )
    path = at[0].rpartition(".")[0]
    count = len(modules[path])  # pyright: ignore[reportArgumentType]
    depths = tuple(int(name.rpartition(".")[2]) + 1 for name in at if name.rpartition(".")[0] == path)
    if len(depths) < len(at) or list(depths) != sorted(set(depths)) or depths[-1] == count:
        raise PliantError(
            got=f"at={list(at)}", expected=f"layers of {path!r} in their order, without the last one, {path}.{count - 1}",
            do="the last layer has the model's own answer behind it: name others",
        )  # fmt: skip
    few, many = (_called(model, path, torch.zeros(n, 2, dtype=torch.int64), torch.arange(2)) for n in (2, 3))
    follows = tuple(j for j, t in enumerate(few) if j and _rows(t, 2) and _rows(many[j], 3))
    masks = [j for j, t in enumerate(few) if isinstance(t, Tensor) and t.shape == (1, 1, 1, 1)]
    if len(masks) != 1 or not any(isinstance(t, Cache) for t in few) or not _rows(few[0], 2):
        raise _unfit(model, "hands its layers no hidden state first, no cache or no mask")
    additive = model.config._attn_implementation == "eager"  # pyright: ignore[reportAttributeAccessIssue]
    follows = tuple(sorted({*follows, *masks}))
    return Stack(
        path, count, depths, _after(model, path), follows, masks[0], additive, _plain(model, path, follows, masks[0])
    )


def refuse_depths(stack: Stack, at: Sequence[str], heads: Sequence[nn.Module] | None) -> None:
    """Raise where there isn't a head for every exit."""
    if heads is not None and len(heads) != len(stack.depths):
        raise PliantError(
            got=f"{len(heads)} heads", expected=f"one for each of {len(at)} layers", do="pass as many, or none at all"
        )


def prove(model: Any) -> None:
    """Write a few tokens by the layers one by one: as the host alone says them, and with a row that left as the masked form does."""
    tokens = torch.arange(21, device=next(model.parameters()).device).reshape(3, 7) % _words(model)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    still = share(model).eval()
    try:
        with torch.no_grad():
            answers = _answers(still, tokens, mask)
            ahead = _differ(_answers(still, _other_last(tokens), mask)[:, :-1], answers[:, :-1])
            said = _said(gathered(bind(still, {"exits.sites.*": Always()})), tokens, mask)
            trouble = _differ(said, answers)
            plan = bind(still, {"exits.sites.*": _plan(still, tokens)})
            left = trouble or _differ(_said(gathered(plan), tokens, mask), _said(masked(plan), tokens, mask))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise _unfit(model, f"can't be driven layer by layer ({type(error).__name__}: {error})") from error
    if ahead:
        raise _unfit(model, f"reads ahead: what it says behind a token hangs on the next one, {ahead}")
    if trouble:
        raise _unfit(model, f"says something else when its layers are driven one by one, {trouble}")
    if left:
        raise _unfit(model, f"says something else behind a token that left, {left}")


def _plan(model: nn.Module, tokens: Tensor) -> Given:
    """The first row leaves at the first exit, but at the last step."""
    stays = [torch.tensor([1.0 * (step == STEPS - 1), 1.0, 1.0], device=tokens.device) for step in range(STEPS)]
    sites = [path for path, site in named(model) if isinstance(site, Site)]
    return Given(Trace({path: tuple(map(Decision, stays)) for path in sites}, (), (), len(tokens)))


def _said(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """What is said behind the prompt and behind each of the tokens that follow, (R, 1 + STEPS, V)."""
    length = tokens.shape[1] - STEPS
    text = Text(model.exits, mask[:, :length], STEPS)
    said = [model.exits.prompt(text, tokens[:, :length])]
    said += [model.exits(text, tokens[:, length + step], step) for step in range(STEPS)]
    return torch.stack(said, 1)


def _answers(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The same from the host itself, in one pass over the whole text."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = prediction_of(model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False))
    return logits[:, -STEPS - 1 :]


def _other_last(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % tokens.max()], 1)


def _differ(a: Tensor, b: Tensor) -> str | None:
    known = b.isfinite()  # eager attention makes NaN of padding in some dtypes
    off = float((a - b)[known].abs().max() / (1 + b[known].abs().max()))
    eps = torch.finfo(b.dtype).eps
    return None if off <= min(3 * eps**0.5, 1000 * eps) else f"by {off:.1e}"


def _words(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _layered(model: Any, layers: nn.ModuleList) -> bool:
    """Whether a list holds the layers: all that the configuration counts."""
    return len(layers) == model.config.get_text_config(decoder=True).num_hidden_layers


def _plain(model: Any, path: str, follows: Sequence[int], mask_at: int) -> bool:
    """Whether what the first layer is handed can be read from a table: token embeddings, and what positions alone say.

    Raises where a position far off changes what's said of the near ones: a text would change while it grows.
    """
    tokens = torch.tensor([[0, 1, 0]])
    far = model.config.get_text_config(decoder=True).max_position_embeddings + 7
    try:
        near = _called(model, path, tokens[:, :2], torch.arange(2))
        other = _called(model, path, 1 - tokens, torch.tensor([0, 1, far]))
    except PliantError:
        return False
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens[:, :2].to(near[0].device))
    beside = [(near[j], other[j]) for j in follows if j != mask_at]
    by_token = all(b.shape[:2] == (1, 3) for _, b in beside)
    if by_token and not all(torch.equal(a, b[:, :2]) for a, b in beside):
        raise _unfit(model, "scales all positions by the length of the text")
    return by_token and torch.equal(near[0], embedded)


def _called(model: Any, path: str, tokens: Tensor, positions: Tensor) -> list[Any]:
    """The leaves of what the first layer is called with, for tokens (R, q) at positions (q,) of each row."""
    still = share(model).eval()

    def reached(layer: nn.Module, args: Any, kwargs: Any) -> None:
        raise Reached(args, kwargs)

    still.get_submodule(path)[0].register_forward_pre_hook(reached, with_kwargs=True)
    tokens = tokens.to(next(model.parameters()).device)
    mask = tokens.new_ones((1, 1, 1, 1), dtype=torch.bool)
    try:
        still(
            input_ids=tokens, position_ids=positions.to(tokens.device).expand(tokens.shape), attention_mask=mask,
            past_key_values=Cache(*tokens.shape), use_cache=True,
        )  # fmt: skip
    except Reached as found:
        return pytree.tree_leaves(found.call)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise _unfit(model, f"can't be brought to its first layer ({type(error).__name__}: {error})") from error
    raise _unfit(model, f"doesn't call {path}.0")


def _after(model: Any, path: str) -> tuple[str, ...]:
    """What runs behind the last layer, up to and with the head; the modules inside these left out."""
    head = next(name for name, m in named(model) if m is model.get_output_embeddings())
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    ran = probe.look(model, ((), {"input_ids": tokens, "use_cache": False}), []).ran
    last = max(i for i, name in enumerate(ran) if name.startswith(path + "."))
    behind = [name for name in ran[last + 1 : ran.index(head) + 1] if not path.startswith(name)]
    return tuple(name for name in behind if not any(name.startswith(other + ".") for other in behind))


def _rows(t: Any, count: int) -> bool:
    return isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == count


def _unfit(model: nn.Module, why: str) -> PliantError:
    return PliantError(
        got=f"a {type(model).__name__} that {why}",
        expected="a decoder whose layers take a hidden state first, a mask and a cache, and are alike but for their weights",
        do="use a model of the Llama or GPT-2 kind; for one that classifies, pliant.retrofit.exits",
    )  # fmt: skip
