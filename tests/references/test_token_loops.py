"""Dropped and merged tokens against a loop that anyone can read: one row, one token at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pliant
from pliant import rules, scores
from pliant.execute import Drop, Merge, Tokens

Row = list[tuple[Tensor, float]]


def chosen(score: list[float], share: float) -> list[int]:
    """The places of the tokens that stay: the highest scores, the earlier among equals."""
    k = math.floor(share * len(score) + 0.5)
    best = sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]
    return sorted(best)


def novelty(tokens: list[Tensor]) -> list[float]:
    """Even places by how unlike they are to the nearest odd one; odd places stay."""
    odd = tokens[1::2]
    return [2.0 if i % 2 else -max((float(F.cosine_similarity(t, o, dim=0)) for o in odd), default=-2.0) for i, t in enumerate(tokens)]  # fmt: skip


def reduced(row: Tensor, stay: list[int], prefix: int, sizes: list[float] | None) -> Row:
    """What is left of a row, with sizes; where there are none, dropped tokens are gone."""
    tokens = list(row.unbind(0))
    left: Row = [(t, 1.0 if sizes is None else sizes[i]) for i, t in enumerate(tokens[:prefix])]
    left += [(tokens[prefix + i], 1.0 if sizes is None else sizes[prefix + i]) for i in stay]
    if sizes is None:
        return left
    joined: dict[int, list[int]] = {}
    for i in range(len(tokens) - prefix):
        if i not in stay:
            likeness = [float(F.cosine_similarity(tokens[prefix + i], tokens[prefix + j], dim=0)) for j in stay]
            joined.setdefault(likeness.index(max(likeness)), []).append(prefix + i)
    for j, others in joined.items():
        token, size = left[prefix + j]
        whole = size + sum(sizes[i] for i in others)
        left[prefix + j] = (sum((sizes[i] * tokens[i] for i in others), size * token) / whole, whole)  # type: ignore[assignment]
    return left


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 4]), places=st.integers(2, 9), prefix=st.integers(0, 2), share=st.floats(0.1, 1),
    merged=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_against_a_loop(rows: int, places: int, prefix: int, share: float, merged: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, sizes = torch.randn(rows, prefix + places, 3).double(), torch.randint(1, 4, (rows, prefix + places)).double()
    scorer = scores.TokenNovelty() if merged else scores.TokenNorm()
    layer = Tokens(pliant.Site(scorer, rules.Share(share)), how=Merge() if merged else Drop(), prefix=prefix).eval()
    k = max(1, math.floor(float(1 - layer.site.rule.threshold) * places + 0.5))  # type: ignore[operator]
    left = layer.step(x, size=sizes)
    for row, found, size, before in zip(
        x, left.hidden, left.size if left.size is not None else sizes, sizes, strict=True
    ):
        tokens = list(row[prefix:].unbind(0))
        score = novelty(tokens) if merged else [float(t.norm()) for t in tokens]
        wanted = reduced(row, chosen(score, k / places), prefix, before.tolist() if merged else None)
        torch.testing.assert_close(found, torch.stack([t for t, _ in wanted]))
        if merged:
            torch.testing.assert_close(size, torch.tensor([s for _, s in wanted]).double())
            # What is there in all stays as it was.
            torch.testing.assert_close((found * size[:, None]).sum(0), (row * before[:, None]).sum(0))
