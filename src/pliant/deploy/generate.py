"""generate: text of a causal model whose tokens leave early, and the trace of what each of them spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from pliant.core import tape
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.retrofit.causal import CausalExits
from pliant.retrofit.text import Text

Choose = Callable[[Tensor], Tensor]
"""From logits (R, V) to tokens (R,)."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row; the first of equals, in float32 as transformers compares them.

    >>> greedy(torch.tensor([[0.0, 2.0, 2.0]]))
    tensor([1])
    """
    return logits.float().argmax(-1)


class Sample:
    """Draw each row's token by its probability.

    Args:
        generator: source of randomness, for repeatable texts.
        temperature: logits are divided by it; above 0.

    Raises:
        PliantError: where the temperature isn't above 0.

    >>> Sample(torch.Generator().manual_seed(0))(torch.tensor([[0.0, 50.0]]))
    tensor([1])
    """

    def __init__(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise PliantError(
                got=f"temperature {temperature}", expected="a number above 0", do="pass choose=greedy for 0"
            )
        self.generator, self.temperature = generator, temperature

    def __deepcopy__(self, memo: dict[int, object]) -> Sample:
        return Sample(self.generator, temperature=self.temperature)  # one stream is what makes texts repeatable

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens."""
        weights = (logits.float() / self.temperature).softmax(-1)
        return torch.multinomial(weights, 1, generator=self.generator).squeeze(1)


class Generator(Executor):
    r"""A causal model with exits as a model from prompts to the tokens behind them, so that it can be recorded and bound.

    .. math:: y_t = \mathrm{choose}(f(h_t)), \qquad h_t \text{ of the exit where token } t - 1 \text{ leaves}

    Gathered, a text that has ended leaves the batch; masked, it's written on and thrown away.

    Shape:
        ``input_ids`` and ``attention_mask`` :math:`(R, T)`; the tokens :math:`(R, N)`, padded behind a text's end.

    Args:
        model: from :func:`pliant.retrofit.causal`.
        max_new_tokens: :math:`N`, at least 1.
        eos: tokens that end a text; default, those of the model's ``generation_config``.
        choose: from logits (R, V) to tokens (R,).

    Raises:
        PliantError: where the model has no such exits, or the prompt isn't one. See :func:`generate`.

    >>> import pliant
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    >>> host = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, eos_token_id=None, **sizes)).eval()
    >>> model = pliant.bind(pliant.retrofit.causal(host, at=["model.layers.0"]), {"*": pliant.rules.Never()})
    >>> y, trace = pliant.record(Generator(model, 5))(torch.tensor([[3, 4], [5, 6]]))
    >>> y.shape, len(trace["model.exits.sites.0"]), bool((trace.flops < trace.dense_flops).all())
    (torch.Size([2, 5]), 4, True)

    References:
        Survey section 2.1.1 (1); Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022.
    """

    def __init__(
        self, model: Any, max_new_tokens: int = 20, *, eos: int | Sequence[int] | None = None, choose: Choose = greedy
    ) -> None:
        super().__init__()
        self.model = refuse_plain(model)
        self.max_new_tokens = refuse_few(max_new_tokens)
        self.eos = ends_of(model, eos)
        self.pad = pad_of(model, self.eos)
        self.choose = choose

    def extra_repr(self) -> str:
        """What its cost hangs on."""
        return f"max_new_tokens={self.max_new_tokens}"

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The tokens behind the prompts."""
        mask = prompt_mask(input_ids, attention_mask)
        if not len(input_ids):  # layers refuse no rows
            return input_ids.new_zeros((0, self.max_new_tokens))
        return super().forward(input_ids, mask)

    def plain(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Every text by all layers: its exits are plain too."""
        return self.gathered(input_ids, mask)

    def masked(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Every text to the last step."""
        text, token = self._begin(input_ids, mask)
        said, done = [token], self._ended(token)
        steps, meter = self.max_new_tokens - 1, tape.meter()
        for step in range(steps if meter is None else min(steps, 2)):
            with tape.part(self, step, "1", reached=~done):
                logits = self.model.exits(text, token, step)
            token = torch.where(done, self.pad, self.choose(logits))
            said.append(token)
            done = done | self._ended(token)
        if meter is not None and steps > 2:
            meter.extend(self, steps)  # every step looks at one more token: its cost is linear, so two tell all
        return torch.stack(said, 1)

    def gathered(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Texts that have ended leave."""
        text, token = self._begin(input_ids, mask)
        said = input_ids.new_full((len(input_ids), self.max_new_tokens), self.pad)
        here = None  # the texts that are left; None: all
        for step in range(self.max_new_tokens):
            said[slice(None) if here is None else here, step] = token
            left = (~self._ended(token)).nonzero().squeeze(1) if self.eos else text.here
            if step == self.max_new_tokens - 1 or not len(left):
                break
            if len(left) < text.rows:
                text.keep(left)
                token, here = token[left], left if here is None else here[left]
            with tape.part(self, step, "1", index=here):
                logits = self.model.exits(text, token, step)
            token = self.choose(logits)
        return said

    def _begin(self, input_ids: Tensor, mask: Tensor) -> tuple[Text, Tensor]:
        text = Text(self.model.exits, mask, self.max_new_tokens)
        return text, self.choose(self.model.exits.prompt(text, input_ids))

    def _ended(self, token: Tensor) -> Tensor:
        return ended(token, self.eos)


def ended(token: Tensor, eos: Sequence[int]) -> Tensor:
    """Which tokens end a text.

    >>> ended(torch.tensor([3, 2]), [2])
    tensor([False,  True])
    """
    found = torch.zeros_like(token, dtype=torch.bool)
    for end in eos:
        found = found | (token == end)
    return found


def generate(
    model: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
    eos: int | Sequence[int] | None = None, choose: Choose = greedy,
) -> Tensor:  # fmt: skip
    r"""Continue each prompt of a batch, every token leaving where its exit lets it; prompts included, as transformers does.

    .. math:: y_t = \mathrm{choose}(f(h_t)), \qquad h_t \text{ of the exit where token } t - 1 \text{ leaves}

    Rows whose token is sure enough leave and the others go on alone, at any batch size; texts that have ended leave the batch. With
    no token leaving, the text is what ``model.generate(do_sample=False)`` says. Processors of ``generation_config`` (repetition
    penalties and the like) aren't applied. For the trace, record a :class:`Generator`.

    Shape:
        ``input_ids`` and ``attention_mask`` :math:`(R, T)`, padded on the left; returns :math:`(R, T + N)` with :math:`N` up to
        ``max_new_tokens``, the longest text's.

    Args:
        model: from :func:`pliant.retrofit.causal`.
        input_ids: prompts; at least one token each.
        attention_mask: 0 at padding; default, none.
        max_new_tokens: at most as many.
        eos: tokens that end a text; default, those of the model's ``generation_config``.
        choose: :func:`greedy`, a :class:`Sample`, or any function from logits (R, V) to tokens (R,).

    Returns:
        Prompts and what follows them, int64.

    Raises:
        PliantError: where the model has no exits for tokens, or the prompts are empty or padded on the right.

    >>> import pliant
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    >>> host = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, eos_token_id=None, **sizes)).eval()
    >>> model = pliant.retrofit.causal(host, at=["model.layers.0"])
    >>> ids = torch.tensor([[3, 4, 5]])
    >>> full = pliant.bind(model, {"*": pliant.rules.Always()})
    >>> torch.equal(generate(full, ids, max_new_tokens=5), host.generate(ids, max_new_tokens=5, do_sample=False))
    True

    References:
        Survey section 2.1.1 (1); Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022.
    """
    made = Generator(model, max_new_tokens, eos=eos, choose=choose).train(model.training)
    return trimmed(input_ids, made(input_ids, attention_mask), made.eos)


def trimmed(input_ids: Tensor, said: Tensor, eos: Sequence[int]) -> Tensor:
    """Prompts and tokens, up to where the longest text ends.

    >>> trimmed(torch.tensor([[1], [1]]), torch.tensor([[2, 0, 0], [5, 2, 0]]), [2])
    tensor([[1, 2, 0],
            [1, 5, 2]])
    """
    before = ended(said, eos).int().cumsum(1) - ended(said, eos).int()
    length = int((before == 0).sum(1).max()) if len(said) else said.shape[1]
    return torch.cat([input_ids, said[:, :length]], 1)


def prompt_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask of prompts that can be continued, or an error."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
        raise PliantError(
            got=f"prompts of shape {tuple(input_ids.shape)} and {input_ids.dtype}", expected="token numbers (rows, tokens)",
            do="pass at least one token for each text",
        )  # fmt: skip
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise PliantError(
            got=f"a mask of shape {tuple(attention_mask.shape)}", expected=f"that of the prompts, {tuple(input_ids.shape)}",
            do="pass the tokenizer's attention_mask",
        )  # fmt: skip
    gap = (attention_mask[:, 1:] == 0) & (attention_mask[:, :-1] != 0)
    if not isinstance(attention_mask, FakeTensor) and bool(gap.any() | (attention_mask[:, -1] == 0).any()):
        raise PliantError(
            got="prompts with padding behind or between their tokens", expected="padding on the left, and a token in each row",
            do="use tokenizer.padding_side = 'left'",
        )  # fmt: skip
    return attention_mask


def refuse_plain(model: Any) -> Any:
    """Raise where ``model`` has no exits for tokens."""
    if not isinstance(getattr(model, "exits", None), CausalExits):
        raise PliantError(
            got=f"a {type(model).__name__} without exits for tokens", expected="a model from pliant.retrofit.causal",
            do="attach them first: pliant.retrofit.causal(model, at=[...])",
        )  # fmt: skip
    return model


def refuse_few(max_new_tokens: int) -> int:
    """Raise where nothing is to be written."""
    if max_new_tokens < 1:
        raise PliantError(got=f"max_new_tokens={max_new_tokens}", expected="at least 1", do="ask for more")
    return max_new_tokens


def ends_of(model: nn.Module, eos: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a text."""
    if eos is None:
        eos = getattr(model.generation_config, "eos_token_id", None)
    return [] if eos is None else [eos] if isinstance(eos, int) else [int(end) for end in eos]


def pad_of(model: nn.Module, eos: Sequence[int]) -> int:
    """What stands behind a text's end: as for transformers, the padding token, else the first that ends a text, else 0."""
    pad = getattr(model.generation_config, "pad_token_id", None)
    return int(pad) if pad is not None else eos[0] if eos else 0
