"""Models of one task in a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from hosts import call_of, logits, off
from pliant import PliantError, rules
from pliant.retrofit import cascade, exits


def pair(kind: str) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    small, large = {
        "pictures": ("timm mobilenetv3_small_100", "timm resnet50"), "texts": ("transformers DistilBERT", "transformers BERT"),
    }[kind]  # fmt: skip
    little, call = call_of(small)
    big, _ = call_of(large)
    return little, big, call


@pytest.mark.parametrize("kind", ["pictures", "texts"])
@torch.no_grad()
def test_each_row_has_the_answer_of_the_model_where_it_left(kind: str) -> None:
    little, big, call = pair(kind)
    model = cascade([little, big], example=call)
    answers = [m(**call) for m in (little, big)]
    for rule, answer in zip((rules.Never(), rules.Always()), answers, strict=True):
        y = pliant.bind(model, {"*": rule})(**call)
        assert type(y) is type(answers[-1])
        assert torch.equal(logits(y), logits(answer))
    drawn = pliant.bind(model, {"*": rules.Random(0.5, torch.Generator().manual_seed(0))})
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(drawn)(**call)
    assert int(trace.flops.sum()) == counter.get_total_flops() < int(trace.dense_flops.sum())
    went = trace.dense("exits.sites.0").bool()
    assert 0 < went.sum() < len(went)
    wanted = torch.where(went[:, None], logits(answers[1]), logits(answers[0]))
    assert off(logits(y), wanted) <= 2e-6
    assert off(pliant.masked(pliant.bind(model, {"*": rules.Given(trace)}))(**call), y) <= 2e-6
    assert model.models == [little, big]


def test_members_may_be_dynamic_and_all_sites_are_one_budget() -> None:
    little, big, call = pair("pictures")
    model = cascade([little, exits(big, ["layer1"], example=call)], example=call)
    assert list(pliant.sites(model)) == ["exits.heads.1.model.exits.sites.0", "exits.sites.0"]
    assert list(pliant.check(model, call["x"], only=["gathered", "recording", "flops", "single"]))


def test_what_does_not_answer_alike_is_refused() -> None:
    x = torch.randn(3, 4)
    one = nn.Linear(4, 3)
    for models, message in (
        ([one], "1 models"),
        ([one, one], "1 of them different"),
        ([one, nn.Linear(4, 2)], "answers of shape"),
    ):
        with pytest.raises(PliantError, match=message):
            cascade(models, example=x)

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    model = cascade([Scaled(4, 3), Scaled(4, 3)], example=(x, torch.ones(3, 1)))
    with pytest.raises(PliantError, match=r"shape \(\) in a batch of 3"):
        model(x, torch.tensor(2.0))
