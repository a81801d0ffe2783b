"""A language model that answers by its first layers where it's sure: early exits for every token, and drafts that it verifies itself.

    python examples/causal_generate.py

Half a minute on one CPU core: a Llama of random weights learns to count in words, with a loss behind its second and its last layer.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import pliant
from pliant.cost import interleaved
from pliant.deploy import Generator, generate, speculate
from pliant.losses import MultiExit
from pliant.retrofit import causal
from pliant.rules import Never

UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = [*UNITS, "ten", *(f"{ten} {unit}".strip() for ten in TENS for unit in ["", *UNITS])]
WORDS = ["<pad>", ",", *dict.fromkeys(" ".join(NUMBERS).split())]


def counted(start: int, numbers: int) -> list[int]:
    """The numbers from ``start`` on, as tokens: each word is one, and so is the comma behind each number."""
    text = " , ".join(NUMBERS[(start + i) % len(NUMBERS)] for i in range(numbers)) + " ,"
    return [WORDS.index(word) for word in text.split()]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=96, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = causal(LlamaForCausalLM(config), at=["model.layers.1"], threshold=0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=120)
    loss = MultiExit([0.5, 1.0])
    for _ in range(120):
        x = torch.tensor([counted(int(start), 24)[:32] for start in torch.randint(len(NUMBERS), (32,))])
        optimiser.zero_grad()
        output, trace = pliant.record(model)(x[:, :-1])  # a recording holds the logits of every exit
        loss(output.logits.transpose(1, 2), trace, x[:, 1:], 0.0).backward()
        optimiser.step()
        schedule.step()

    model.eval()
    prompts = [counted(start, 3) for start in (4, 17, 38, 70)]
    longest = max(map(len, prompts))
    x = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # padded on the left, as transformers wants it
    call = {"attention_mask": (x != 0).long(), "max_new_tokens": 40}

    calls = {
        "all layers": lambda: model.generate(x, do_sample=False, **call),  # transformers' own
        "early exits": lambda: generate(model, x, **call),
        "drafts": lambda: (
            speculate(pliant.bind(model, {"*": Never()}), x, drafts=8, **call).ids
        ),  # it never stops drafting
    }
    whole, early, drafted = (write()[:, longest:] for write in calls.values())
    print("all layers:", " ".join(WORDS[i] for i in whole[0, :14]), "...")
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(Generator(model, 40))(x, call["attention_mask"])
    share, agree = trace.flops.sum() / trace.dense_flops.sum(), int(trace.flops.sum()) == counter.get_total_flops()
    print(f"early exits: {(early == whole).float().mean():.1%} of the words are the same")
    print(f"FLOPs: {share:.1%} of dense; the counter agrees: {agree}")
    print(f"drafts: the same text: {torch.equal(drafted, whole)}")
    seconds = interleaved(calls, rounds=3)
    for name in ("early exits", "drafts"):
        print(f"{name}: {seconds['all layers'].minimum / seconds[name].minimum:.2f} times as fast as model.generate")


if __name__ == "__main__":
    main()
