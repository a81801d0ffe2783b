"""causal: exits for every token that a language model of transformers writes."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.bind import share
from pliant.core.calls import prediction_of
from pliant.core.executor import Executor
from pliant.core.site import Score, Site
from pliant.execute import rows
from pliant.retrofit.host import Entry
from pliant.retrofit.refuse import refuse_model
from pliant.retrofit.stack import Stack, prove, refuse_depths, refuse_host, stack_of
from pliant.retrofit.text import Entered, Reached, Text
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability


class _Fronts(threading.local):
    def __init__(self) -> None:
        self.open: list[CausalExits] = []


_fronts = _Fronts()


class CausalExits(Executor):
    r"""The exits of a causal host: called with a :class:`Text` and a token for each of its rows, it says what may come next.

    .. math:: y = v_1 (v_2 (\dots) + (1 - v_2) f(h_2)) + (1 - v_1) f(h_1), \qquad f = \mathrm{head} \circ \mathrm{norm}

    Gathered, the rows that leave are dropped from the layers behind, and their keys and values there are computed later, many at a
    time, from the hidden state that they left with: when a later token of the same row comes so far. Masked, all layers run for
    all rows, and a row that left hands each of them that same hidden state.

    Shape:
        token :math:`(R,)`, the answer :math:`(R, V)`.
    """

    def __init__(
        self, host: Callable[..., Any], stack: Stack, heads: Sequence[nn.Module], sites: Sequence[Site]
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.sites = nn.ModuleList(sites)
        self.host = host  # the root's own forward, a bound method
        self.stack = stack
        self.follows = stack.follows
        self.mask_at = stack.mask_at
        self.additive = stack.additive
        self.plain_front = stack.plain
        depths = [0, *stack.depths, stack.count]
        self.spans = list(itertools.pairwise(depths))

    def install(self, root: nn.Module) -> None:
        """Take the root's forward over, once, and wait before its first layer."""
        root.add_module("exits", self)
        vars(root)["forward"] = Entry(self.run)
        self.layers()[0].register_forward_pre_hook(self._reached, with_kwargs=True)

    @property
    def root(self) -> nn.Module:
        """The host."""
        return self.host.__self__  # pyright: ignore[reportFunctionMemberAccess]

    def layers(self) -> Sequence[nn.Module]:
        """The layers, first to last."""
        return self.root.get_submodule(self.stack.path)  # pyright: ignore[reportReturnType]

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens as hidden states."""
        return self.root.get_input_embeddings()(tokens)  # pyright: ignore[reportCallIssue]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward; a recording holds every exit's logits (R, V, T) of the whole text, for losses."""
        if tape.tape() is None or self.form == "plain":
            return self.host(*args, **kwargs)
        asked = kwargs.get("output_hidden_states")
        output = self.host(*args, **{**kwargs, "output_hidden_states": True})
        for k, depth in enumerate(self.stack.depths):
            tape.write_exit(self, self.logits(k, output.hidden_states[depth]).transpose(1, 2))
        tape.write_exit(self, prediction_of(output).transpose(1, 2))
        if asked:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def site(self, k: int) -> Site:
        """The site of exit ``k``."""
        return self.sites[k]  # pyright: ignore[reportReturnType]

    def front(self, **call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the host calls its first layer with."""
        _fronts.open.append(self)
        try:
            self.host(**call)
        except Reached as reached:
            return reached.call
        finally:
            _fronts.open.pop()
        raise RuntimeError("the host didn't come to its first layer")

    def _reached(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _fronts.open and _fronts.open[-1] is self:
            raise Reached(args, kwargs)

    def logits(self, k: int, hidden: Tensor) -> Tensor:
        """What exit ``k`` says of hidden states (R, T, D); by default the host's last norm and head are every exit's."""
        if k < len(self.heads):
            return self.heads[k](hidden)
        for path in self.stack.after:
            hidden = self.root.get_submodule(path)(hidden)
        return hidden

    def prompt(self, text: Text, tokens: Tensor) -> Tensor:
        """Read the prompt with all layers; what is said behind its last token."""
        entered = text.enter(tokens, 0, text.length)
        hidden = text.run(entered, (0, self.stack.count), [entered.hidden, text.here, entered.follow])
        return self.logits(len(self.sites), hidden[:, -1:])[:, -1]

    def plain(self, text: Text, token: Tensor, step: int) -> Tensor:
        """All layers, no exit."""
        entered, state = self._enter(text, token, step)
        return self.logits(len(self.sites), text.run(entered, (0, self.stack.count), state))[:, -1]

    def masked(self, text: Text, token: Tensor, step: int) -> Tensor:
        """Every layer and every exit for every row, mixed by the values."""
        entered, state = self._enter(text, token, step)
        gone = torch.zeros_like(text.here, dtype=torch.bool)
        return self._masked(text, entered, step, 0, [*state, None, gone])

    def gathered(self, text: Text, token: Tensor, step: int) -> Tensor:
        """Only what the rows still there need."""
        entered, state = self._enter(text, token, step)
        return self._gathered(text, entered, step, 0, [*state, None])

    def _enter(self, text: Text, token: Tensor, step: int) -> tuple[Entered, list[Any]]:
        slot = text.length + step
        entered = text.enter(token[:, None], slot, slot + 1)
        return entered, [entered.hidden, text.here, entered.follow]

    def _gathered(self, text: Text, entered: Entered, step: int, k: int, state: list[Any]) -> Tensor:
        """Segment ``k``, its exit, and for the rows that go on the rest."""
        here, slot = state[1], text.length + step
        if k:
            self._fill(text, step, k, here)
        hidden = text.run(entered, self.spans[k], state)
        text.hold(here, slot, hidden, k + 1)
        logits = self.logits(k, hidden)[:, -1]
        tape.write_exit(self, logits)
        if k == len(self.sites):
            return logits
        site = self.site(k)
        decision = site(logits, carry=state[3], visit=step)
        rest = functools.partial(self._gathered, text, entered, step, k + 1)
        state = [hidden, here, state[2], decision.carry]
        return rows.run_some(site, decision, rest, (state,), rows.replaced, lambda: logits)

    def _fill(self, text: Text, step: int, k: int, here: Tensor) -> None:
        """Before segment ``k``: the keys and values of the tokens that left before it, in the rows that came here."""
        behind = text.behind(here, text.length + step, k)
        if len(behind) and text.held is not None:
            row, slots = here[behind[:, 0]], behind[:, 1]
            with tape.part(self.sites[k - 1], step, "0", index=behind[:, 0]):
                text.fill(row, slots, self.spans[k], text.held[row, slots])
            text.ready[row, slots] = k + 1

    def _masked(self, text: Text, entered: Entered, step: int, k: int, state: list[Any]) -> Tensor:
        here, gone = state[1], state[4]
        hidden = text.run(entered, self.spans[k], state, gone)
        logits = self.logits(k, hidden)[:, -1]
        tape.write_exit(self, logits)
        if k == len(self.sites):
            return logits
        site = self.site(k)
        decision = site(logits, carry=state[3], visit=step)
        slots = torch.full_like(here, text.length + step)
        rows.run_masked(site, decision, 0, text.fill, here, slots, self.spans[k + 1], hidden[:, -1])
        state = [hidden, here, state[2], decision.carry, gone | (decision.value == 0)]
        rest = functools.partial(self._masked, text, entered, step, k + 1)
        return rows.mix(decision, rows.run_masked(site, decision, 1, rest, state), logits)


def causal(
    model: nn.Module, at: Sequence[str], *, criterion: Score | None = None, threshold: float = 0.5,
    heads: Sequence[nn.Module] | None = None,
) -> Any:  # fmt: skip
    r"""Attach exits for every token to a language model of transformers: a token that is sure enough leaves before the last layer.

    .. math:: y_t = f(h_{t, K}), \qquad h_{t, l + 1} = v_{t, l}\, \mathrm{layer}_l(h_{t, l}; h_{\le t, l}) + (1 - v_{t, l})\, h_{t, l}

    Returns **a copy that shares every parameter and buffer**; the model itself stays untouched, and all of its paths and state_dict
    keys stay. Called as before, the copy answers as the model does, bit by bit; a recording of that call holds the logits of every
    exit, (R, V, T), which is what losses of exits train. Exits work where text is written: see :func:`pliant.deploy.generate`
    and :func:`pliant.deploy.speculate`. The prompt is read by all layers. What a layer that a token left out needs to know of it is
    computed from the hidden state it left with, when a later token looks for it. The layers are driven one by one, and that this
    gives what the model says is proven on a few tokens here; models for which it doesn't are refused.

    Shape:
        ``input_ids`` :math:`(R, T)`; logits :math:`(R, T, V)`; an exit's, at one step of writing, :math:`(R, V)`.

    Args:
        model: a causal language model with ``generate``, such as ``LlamaForCausalLM`` or ``GPT2LMHeadModel``.
        at: dotted names of the layers after which a token may leave, in their order.
        criterion: the wish to go on, from an exit's logits; each site gets a copy. Default, ``MaxProbability()``.
        threshold: tokens with a higher score go on, in the units of the criterion.
        heads: one module per exit from hidden states (R, T, D) to logits (R, T, V); default, the model's own last norm and head.

    Returns:
        A model of the same type; its sites are ``exits.sites.k``.

    Raises:
        PliantError: where the model isn't causal, has an encoder, or caches that forget (sliding windows, recurrent states);
            where a name isn't that of a layer, or of the last one; where heads don't fit; where the model is compiled or wrapped.

    >>> import pliant
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    >>> host = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()
    >>> model = causal(host, at=["model.layers.0"])
    >>> ids = torch.tensor([[3, 4, 5]])
    >>> list(pliant.sites(model)), torch.equal(model(ids).logits, host(ids).logits)
    (['exits.sites.0'], True)
    >>> [tuple(e.logits.shape) for e in pliant.record(model)(ids)[1].exits]
    [(1, 20, 3), (1, 20, 3)]

    References:
        Survey section 2.1.1 (1); Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022; Elhoushi et al.,
        LayerSkip, ACL 2024.

    Differs from the papers: keys and values that are missing are computed many at a time instead of at every step.
    """
    refuse_model(model, "exits")
    refuse_host(model)
    stack = stack_of(model, at)
    refuse_depths(stack, at, heads)
    sites = [Site(copy.deepcopy(criterion or MaxProbability()), Threshold(threshold)) for _ in at]
    device = next(model.parameters()).device
    twin = share(model)
    made = CausalExits(twin.forward, stack, heads or [], [site.to(device) for site in sites]).train(model.training)
    made.install(twin)
    prove(twin)
    return twin
