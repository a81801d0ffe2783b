"""Plans of what shall be attached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import pliant
from hosts import call_of, logits
from pliant import PliantError, rules
from pliant.retrofit import Plan, exits, skips


def test_a_plan_that_was_saved_attaches_the_same(tmp_path: Path) -> None:
    host, call = call_of("torchvision resnet18")
    plan = Plan().skips("layer*.1").exits("layer1", "layer3", threshold=0.25)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    model = again.apply(host, call)
    by_hand = exits(skips(host, ["layer*.1"], example=call), ["layer1", "layer3"], example=call, threshold=0.25)
    assert list(pliant.sites(model)) == list(pliant.sites(by_hand))
    assert float(pliant.sites(model)["exits.sites.0"].rule.threshold) == 0.25
    with torch.no_grad():
        assert torch.equal(logits(pliant.bind(model, {"*": rules.Always()})(**call)), logits(host(**call)))
    assert not hasattr(host, "skips")


def test_a_plan_says_where_it_attaches_and_what_that_is_worth() -> None:
    host, call = call_of("transformers BERT")
    lines = Plan().skips("bert.encoder.layer.[1-3]").exits("bert.encoder.layer.1").told(host, call).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        *(["skips", f"bert.encoder.layer.{k}"] for k in (1, 2, 3)), ["exits", "bert.encoder.layer.1"],
    ]  # fmt: skip
    shares = [float(line.split()[-3]) for line in lines[1:]]
    assert shares[0] == shares[1] == shares[2] < 25
    assert 45 < shares[3] < 50


def test_tokens_in_a_plan(tmp_path: Path) -> None:
    host, call = call_of("transformers ViT")
    plan = Plan().exits("vit.layers.2").tokens("vit.layers.[01]", keep=0.5, how="merge")
    plan.save(tmp_path / "plan.json")
    model = Plan.load(tmp_path / "plan.json").apply(host, call)
    assert list(pliant.sites(model)) == ["exits.sites.0", "tokens.0.site", "tokens.1.site"]
    assert type(model.tokens[1].how).__name__ == "Merge"
    shares = [float(line.split()[-3]) for line in plan.told(host, call).splitlines()[2:]]
    assert 60 < shares[0] < 70
    assert 40 < shares[1] < 47
    with pytest.raises(PliantError, match="how='melt'; expected one of drop, merge"):
        Plan().tokens("vit.layers.1", how="melt").apply(host, call)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    host, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    for call, message in (
        (lambda: Plan().exits(), "0 layers for exits"),
        (lambda: Plan().exits("0").exits("1"), "which the plan has already"),
        (lambda: Plan().skips("0", rule=rules.Always()), "no file can hold"),
        (lambda: Plan().exits("9").told(host, x), "the name '9'"),
        (lambda: Plan.load(tmp_path / "none.json"), "FileNotFoundError"),
    ):
        with pytest.raises(PliantError, match=message):
            call()
    for text in (
        "{",
        "[]",
        '{"version": 9, "steps": []}',
        '{"version": 1, "steps": [{"kind": "x", "at": [], "settings": {}}]}',
    ):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PliantError, match="a plan of version 1"):
            Plan.load(tmp_path / "plan.json")
