"""Exits of a BERT: rows that are done leave the batch, against one text at a time and against waiting for the whole batch.

    python benchmarks/bert.py --json benchmarks/results/bert.json

``transformers``' BertForSequenceClassification, 12 layers, hidden size 256, random weights, 32 texts of 64 tokens. An exit
(mean over tokens, linear layer, largest probability) follows each of the first 11 layers; thresholds are such that the texts
leave evenly, after 6 layers on average. All forms have the same weights and heads and take the same decisions:

- dense: the untouched model
- rows leave: ``pliant.retrofit.exits``
- one at a time: a batch of one, which stops at its exit (what DeeBERT's and PABEE's public code do)
- whole batch waits: every layer for all texts until the last one is done
- its layers alone: embedding and layers at the rows that come there, without exits, choices or copies: the limit of "rows leave"

One thread, in turn, processor time; medians of ratios within a round, minima in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import CLOCKS, allocator, assert_same, counts_of, environment, in_turn, leaving, save, taken
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import pliant

LAYERS = 12
SHARES = [3.0] * 5 + [2.0] + [3.0] * 5 + [0.0]  # of 32 texts: after 6 layers on average


def built(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=256, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=1024, num_labels=4,
        vocab_size=1000, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


class ByHand(nn.Module):
    """The same heads, scores and thresholds in the two loops that one would write by hand."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.classifier, self.exits = model.bert, model.classifier, model.exits

    def sure(self, k: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows leave, and what they say."""
        logits, site = self.exits.heads[k](h), self.exits.sites[k]
        return site.scorer(logits) <= site.rule.threshold, logits

    def last(self, h: Tensor) -> Tensor:
        return self.classifier(self.bert.pooler(h))

    def one_at_a_time(self, words: Tensor) -> Tensor:
        return torch.cat([self._one(words[i : i + 1]) for i in range(len(words))])

    def _one(self, words: Tensor) -> Tensor:
        h = self.bert.embeddings(words)
        for k, layer in enumerate(self.bert.encoder.layer):
            h = layer(h)
            if k < LAYERS - 1:
                leaves, logits = self.sure(k, h)
                if leaves.item():
                    return logits
        return self.last(h)

    def whole_batch_waits(self, words: Tensor) -> Tensor:
        h = self.bert.embeddings(words)
        done, answer = torch.zeros(len(words), dtype=torch.bool), torch.zeros(len(words), self.classifier.out_features)
        for k, layer in enumerate(self.bert.encoder.layer):
            h = layer(h)
            if k < LAYERS - 1:
                leaves, logits = self.sure(k, h)
                answer = torch.where((leaves & ~done)[:, None], logits, answer)
                done |= leaves
                if done.all():
                    return answer
        return torch.where(done[:, None], answer, self.last(h))


def layers_alone(host: Any, words: Tensor, leave: list[int]) -> Callable[[], None]:
    """The embedding and each layer on as many rows as come there, with nothing between them: what no form can beat."""
    h, left = host.bert.embeddings(words), len(words)
    todo = []
    for layer, leaves in zip(host.bert.encoder.layer, leave, strict=True):
        if left:
            todo.append((layer, h[:left].clone()))
        left -= leaves

    def call() -> None:
        host.bert.embeddings(words)
        for layer, x in todo:
            layer(x)

    return call


def measure(rows: int, tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    host = built(seed)
    words = torch.randint(1, 1000, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    at = [f"bert.encoder.layer.{k}" for k in range(LAYERS - 1)]
    model = leaving(pliant.retrofit.exits(host, at=at, example=words[:4]), words, counts_of(SHARES, rows))
    hand = ByHand(model)
    calls = {
        "dense": lambda: host(words), "rows leave": lambda: model(words), "one at a time": lambda: hand.one_at_a_time(words),
        "whole batch waits": lambda: hand.whole_batch_waits(words),
    }  # fmt: skip
    with torch.inference_mode():
        calls["its layers alone"] = layers_alone(host, words, counts_of(SHARES, rows))
        ours = model(words).logits
        for name in ("one at a time", "whole batch waits"):
            assert_same(calls[name](), ours, name)
        _, trace = pliant.record(model)(words)
        seconds = in_turn(calls, rounds)
    share = float(trace.flops.sum() / trace.dense_flops.sum())
    depth = float(taken(model, words).float().mean()) + 1
    found: dict[str, Any] = {"rows": rows, "tokens": tokens, "mean exit": depth, "share of dense FLOPs": share}
    for clock, measured in seconds.items():
        found[clock] = {
            name: {
                "share_of_dense": statistics.median(a / b for a, b in zip(each, measured["dense"], strict=True)),
                "ms": 1e3 * min(each),
            }
            for name, each in measured.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = allocator("keep")
    found = measure(options.rows, options.tokens, options.rounds, options.seed)
    table = Table(
        title=f"mean exit {found['mean exit']:.2f} of {LAYERS}, {found['share of dense FLOPs']:.1%} of dense FLOPs"
    )
    for column in ("form", "share of dense time", "ms"):
        table.add_column(column)
    for name, each in found[options.clock].items():
        table.add_row(name, f"{each['share_of_dense']:.3f}", f"{each['ms']:.1f}")
    Console().print(table)
    told = environment(options.seed, memory) | {"transformers": transformers.__version__}
    save(options.json, {"environment": told, "result": found})


if __name__ == "__main__":
    main()
