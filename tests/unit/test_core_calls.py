"""Batches of loaders as calls, and thresholds tuned on batches of keywords."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.core.calls import joined, labelled, rows_of
from pliant.retrofit import exits


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear((x * mask[..., None]).mean(1))


class Texts(nn.Module):
    """Words, of which a mask lets some count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(20, 8), nn.Linear(8, 8), Mean()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.two(self.one(self.embed(input_ids)), attention_mask.float())}


def keywords(rows: int, length: int = 6) -> dict[str, Tensor]:
    words = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": torch.arange(rows) % 4}


def test_pairs_and_mappings_are_read_and_others_refused():
    for batch in (keywords(3), (keywords(3), torch.zeros(3)), [torch.ones(3, 2), torch.zeros(3)]):
        call, target = labelled(batch)
        assert len(target) == 3
        assert all(
            len(t) == 5
            for part in rows_of(call, 5)
            for t in (part.values() if isinstance(part, dict) else part)
            if len(t)
        )
    for batch in (torch.ones(3), {"input_ids": torch.ones(3)}, (torch.ones(3),)):
        with pytest.raises(pliant.PliantError, match="labels"):
            labelled(batch)


def test_batches_of_one_length_are_joined_and_others_refused():
    whole = joined([labelled(keywords(rows))[0] for rows in (2, 3)])
    assert whole[1]["input_ids"].shape == (5, 6)
    with pytest.raises(pliant.PliantError, match="pad held-out texts"):
        joined([labelled(keywords(2, length))[0] for length in (5, 6)])


def test_pairs_of_keywords_and_mappings_with_labels_tune_to_the_same_point():
    torch.manual_seed(0)
    batches = [keywords(40), keywords(24)]
    example = {k: v[:3] for k, v in batches[0].items() if k != "labels"}
    found = []
    for loader in (batches, [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in batches]):
        torch.manual_seed(1)
        model = exits(Texts().eval(), at=["one"], example=example)
        point = pliant.tune(model, loader, budget=0.95)
        assert point.rows == 64
        assert point.share <= 0.95
        found.append(point.thresholds)
    assert found[0] == found[1]


def test_one_dial_is_turned_by_keywords_too():
    torch.manual_seed(0)
    batches = [keywords(40), keywords(24)]
    example = {k: v[:3] for k, v in batches[0].items() if k != "labels"}
    model = pliant.retrofit.skips(Texts().eval(), ["one"], example=example)
    point = pliant.tune(model, batches, budget=0.9)
    assert point.share <= 0.9
