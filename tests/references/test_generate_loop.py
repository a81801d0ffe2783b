"""Early exit for every token of a written text, as a loop that anyone can read: no cache, no batch, the whole text at every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pliant
from pliant.deploy import Generator, generate
from pliant.retrofit import causal

pytest.importorskip("transformers", reason="needs transformers")
from transformers import LlamaConfig, LlamaForCausalLM

AT = ["model.layers.0", "model.layers.2"]


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def written(host: LlamaForCausalLM, prompt: list[int], new: int, threshold: float) -> tuple[list[int], list[int]]:
    """Text and, for each token that was read while writing, how many layers it ran.

    Layers that a token left out see, in its stead, the hidden state that it left with: their keys and values are made of that.
    """
    ids, depths = list(prompt), [4] * len(prompt)
    for step in range(new):
        if step:
            depths.append(4)
        hidden = host.model.embed_tokens(torch.tensor([ids]))
        position = torch.arange(len(ids))[None]
        embedding = host.model.rotary_emb(hidden, position)
        for number, layer in enumerate(host.model.layers):
            after = layer(hidden, attention_mask=None, position_embeddings=embedding, position_ids=position)
            for t in range(len(ids)):
                if number < depths[t]:
                    hidden[0, t] = after[0, t]
            if step and number in (0, 2) and depths[-1] == 4 and doubt(host, hidden) <= threshold:
                depths[-1] = number + 1
        ids.append(int(said(host, hidden).argmax()))
    return ids, depths[len(prompt) :]


def said(host: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """Logits behind the last token."""
    return host.lm_head(host.model.norm(hidden[0, -1]))


def doubt(host: LlamaForCausalLM, hidden: Tensor) -> float:
    """1 - the likeliest token's probability."""
    return 1 - float(said(host, hidden).softmax(-1).max())


@pytest.mark.parametrize("threshold", [0.0, 0.8, 0.88, 1.0])
@torch.no_grad()
def test_texts_with_early_exits_are_those_of_the_loop(threshold: float) -> None:
    host = llama()
    model = causal(host, AT, threshold=threshold)
    prompts = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    wanted = [written(host, p, 10, threshold) for p in prompts]
    text = generate(model, ids, attention_mask=mask, max_new_tokens=10)
    _, trace = pliant.record(Generator(model, 10))(ids, mask)
    first, second = (trace.visits.get(f"model.exits.sites.{k}", ()) for k in (0, 1))
    went = [torch.zeros(4, 9) for _ in range(2)]
    for k, visits in enumerate((first, second)):
        for d in visits:
            went[k][:, d.visit] = d.dense(4)
    depths = (1 + 2 * went[0] + went[1]).long()
    for row, prompt in enumerate(prompts):
        assert text[row, 5 - len(prompt) :].tolist() == wanted[row][0]
        assert depths[row].tolist() == wanted[row][1]
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=10)
        assert alone[0].tolist() == wanted[row][0]
    if threshold in (0.8, 0.88):
        assert len(depths.unique()) > 1  # some leave early, others don't
