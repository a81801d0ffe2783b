"""speculate: text of the full model, drafted by its first layers and verified by the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.deploy.generate import (
    ended,
    ends_of,
    greedy,
    pad_of,
    prompt_mask,
    refuse_few,
    refuse_plain,
    trimmed,
)  # fmt: skip
from pliant.retrofit.causal import CausalExits
from pliant.retrofit.text import Text


class Speculated(NamedTuple):
    """Texts, and for each of them how many rounds it took, how many tokens were drafted and how many of these accepted.

    >>> Speculated(torch.tensor([[1, 2]]), torch.tensor([1]), torch.tensor([2]), torch.tensor([1])).rounds
    tensor([1])
    """

    ids: Tensor
    rounds: Tensor
    drafted: Tensor
    accepted: Tensor


def speculate(
    model: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None, max_new_tokens: int = 20, at: int = 0,
    drafts: int = 4, eos: int | Sequence[int] | None = None,
) -> Speculated:  # fmt: skip
    r"""Continue each prompt with the full model's greedy text, several tokens to a pass: the first layers draft, the others verify.

    .. math:: \hat y_{t + i} = \arg\max f(h_{t + i, l}), \qquad
        y_{t + i} = \arg\max f(h_{t + i, L}), \qquad \text{accepted up to the first } \hat y_{t + i} \ne y_{t + i}

    In each round the layers before exit ``at`` write up to ``drafts`` tokens one by one. The layers behind it then read all of them
    in one pass that starts from the drafts' own hidden states, keys and values, so no layer sees a token twice. Each text of the
    batch takes the drafts that it accepts and the token that the full model says behind them, and leaves the batch when it ends.
    Drafting stops earlier where the site of the exit wants to go on for every text: bind ``Never()`` there to draft always. The text is the full model's up to
    rounding: where two tokens are likeliest to within rounding, one pass over many tokens may prefer the other one than a pass over
    one, as it may in another batch.

    Shape:
        ``input_ids`` and ``attention_mask`` :math:`(R, T)`, padded on the left; texts :math:`(R, T + N)`; counts :math:`(R,)`.

    Args:
        model: from :func:`pliant.retrofit.causal`.
        input_ids: prompts; at least one token each.
        attention_mask: 0 at padding; default, none.
        max_new_tokens: at most as many.
        at: which exit drafts, counted from 0.
        drafts: tokens of a round, at least 1.
        eos: tokens that end a text; default, those of the model's ``generation_config``.

    Returns:
        The texts, and how many rounds, drafted and accepted tokens each of them took.

    Raises:
        PliantError: where the model has no such exit, or the prompts are empty or padded on the right.

    >>> import pliant
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    >>> host = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, eos_token_id=None, **sizes)).eval()
    >>> model = pliant.bind(pliant.retrofit.causal(host, at=["model.layers.0"]), {"*": pliant.rules.Never()})
    >>> ids = torch.tensor([[3, 4, 5]])
    >>> torch.equal(speculate(model, ids, max_new_tokens=5).ids, host.generate(ids, max_new_tokens=5, do_sample=False))
    True

    References:
        Elhoushi et al., LayerSkip, ACL 2024; Zhang et al., Draft and Verify, ACL 2024; Leviathan et al., Fast Inference from
        Transformers via Speculative Decoding, ICML 2023.

    Differs from the papers: drafting by the confidence of the exit's own site; texts of a batch advance by themselves.
    """
    exits: CausalExits = refuse_plain(model).exits
    if not 0 <= at < len(exits.sites) or drafts < 1:
        raise PliantError(
            got=f"at={at}, drafts={drafts}", expected=f"one of {len(exits.sites)} exits, and at least one draft",
            do="count exits from 0",
        )  # fmt: skip
    ends = ends_of(model, eos)
    with torch.no_grad():
        spoken = _Speech(exits, input_ids, prompt_mask(input_ids, attention_mask), refuse_few(max_new_tokens), drafts)
        spoken.write(at, ends)
    said = spoken.said[:, :max_new_tokens]
    said = said.masked_fill(_behind(said, ends), pad_of(model, ends))
    return Speculated(trimmed(input_ids, said, ends), spoken.rounds, spoken.drafted, spoken.accepted)


def _behind(said: Tensor, eos: Sequence[int]) -> Tensor:
    """Which tokens stand behind a text's end."""
    ends = ended(said, eos).int()
    return (ends.cumsum(1) - ends) > 0


class _Speech:
    """The texts of one call while they are written."""

    def __init__(self, exits: CausalExits, input_ids: Tensor, mask: Tensor, room: int, drafts: int) -> None:
        rows = len(input_ids)
        self.exits, self.room, self.drafts = exits, room, drafts
        self.text = Text(exits, mask, room + drafts + 1)
        self.said = input_ids.new_zeros((rows, room + drafts + 1))
        self.here = torch.arange(rows, device=input_ids.device)  # the texts that are left
        self.count = torch.ones_like(self.here)  # tokens said, of those that are left
        self.rounds, self.drafted, self.accepted = (torch.zeros_like(self.here) for _ in range(3))
        self.input_ids, self.token = input_ids, self.here

    def write(self, at: int, eos: Sequence[int]) -> None:
        """Rounds of drafting and verifying until every text has ended."""
        if not len(self.here):  # layers refuse no rows
            return
        self.token = greedy(self.exits.prompt(self.text, self.input_ids))
        self.said[:, 0] = self.token
        self._leave(ended(self.token, eos) | (self.count >= self.room))
        while len(self.here):
            drafts, hidden = self._draft(at)
            truth = self._verify(at, hidden)
            agreed = (drafts == truth[:, :-1]).long().cumprod(1).sum(1)
            order = torch.arange(truth.shape[1], device=truth.device)
            taken = order <= agreed[:, None]
            self.said[self.here[:, None], self.count[:, None] + order] = truth  # what isn't taken is written over
            self.rounds[self.here] += 1
            self.drafted[self.here] += drafts.shape[1]
            self.accepted[self.here] += agreed
            self.token = truth.gather(1, agreed[:, None]).squeeze(1)
            self.count = self.count + agreed + 1
            self._leave((ended(truth, eos) & taken).any(1) | (self.count >= self.room))

    def _draft(self, at: int) -> tuple[Tensor, Tensor]:
        """Tokens that the first layers say one after the other (R, q), and the hidden states that end with theirs (R, q + 1, D)."""
        tokens, hidden = [self.token], [self._first(at, self.token, 0)]
        most = min(self.drafts, self.room - int(self.count.min()) - 1)
        sure = True
        while len(tokens) <= most and sure:
            logits = self.exits.logits(at, hidden[-1])[:, -1]
            tokens.append(greedy(logits))
            sure = len(tokens) > most or not bool(self.exits.sites[at](logits).value.all())
            hidden.append(self._first(at, tokens[-1], len(hidden)))
        return torch.stack(tokens, 1)[:, 1:], torch.cat(hidden, 1)

    def _first(self, at: int, token: Tensor, ahead: int) -> Tensor:
        """The hidden state of a token behind the layers before exit ``at``."""
        entered = self._enter(token[:, None], ahead)
        state = [entered.hidden, self.text.here, entered.follow]
        return self.text.run(entered, (0, self.exits.stack.depths[at]), state)

    def _verify(self, at: int, hidden: Tensor) -> Tensor:
        """What the full model says behind the last token and behind each draft, (R, q + 1)."""
        text, stack = self.text, self.exits.stack
        entered = self._enter(self.text.here.new_zeros(hidden.shape[:2]), 0)
        whole = text.run(entered, (stack.depths[at], stack.count), [hidden, text.here, entered.follow])
        return greedy(self.exits.logits(len(self.exits.sites), whole))

    def _enter(self, tokens: Tensor, ahead: int) -> Any:
        """Tokens at each text's own slots: the last said one stands at ``length + count - 1``."""
        first = self.text.length + self.count - 1 + ahead
        slots = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if bool((first == first[0]).all()) and tokens.shape[1] == 1:
            return self.text.enter(tokens, int(first[0]), int(first[0]) + 1)
        return self.text.enter(tokens, slots, int(slots.max()) + 1)

    def _leave(self, done: Tensor) -> None:
        """Texts that have ended leave the batch."""
        if bool(done.any()):
            left = (~done).nonzero().squeeze(1)
            self.text.keep(left)
            self.here, self.count, self.token = self.here[left], self.count[left], self.token[left]
