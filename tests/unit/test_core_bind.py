"""bind, masked, plain, names and errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pliant
from nets import WIDTH, built
from pliant import PliantError, rules, scores
from pliant.core.bind import clean


def test_the_first_pattern_that_matches_wins() -> None:
    model = pliant.bind(
        built("exits_of_skips"), {"stages.0.*": rules.Never(), "*.site": rules.Always(), "sites.?": rules.Never()}
    )
    kinds = {path: type(site.rule).__name__ for path, site in pliant.sites(model).items()}
    assert kinds["stages.0.0.site"] == kinds["stages.0.1.site"] == "Never"
    assert kinds["stages.2.1.site"] == "Always"
    assert kinds["sites.1"] == "Never"


def test_bind_leaves_the_model_and_shares_its_tensors() -> None:
    model = built("skip")
    before = model[1].site.rule
    bound = pliant.bind(model, {"*": rules.Always()})
    assert model[1].site.rule is before
    assert type(bound) is type(model)
    ours = dict(model.named_parameters())
    assert all(p is ours[name] for name, p in bound.named_parameters())
    with torch.no_grad():
        model[0][0].weight.zero_()
    assert not bound[0][0].weight.any()


def test_a_bound_rule_takes_the_mode_of_the_model() -> None:
    gumbel = pliant.estimators.Gumbel(rules.Threshold(0.0))
    assert gumbel.training
    model = pliant.bind(built("skip"), {"*": gumbel})
    assert not model[1].site.rule.training
    x = torch.randn(20, WIDTH)
    assert torch.equal(model(x), model(x))
    assert gumbel.training


def test_each_site_gets_a_rule_of_its_own() -> None:
    model = pliant.bind(built("exits"), {"*": rules.Threshold(0.5)})
    model.sites[0].rule.threshold.fill_(0.1)
    assert model.sites[1].rule.threshold == 0.5


def test_bind_refuses_what_is_not_a_rule_and_what_matches_nothing() -> None:
    with pytest.raises(PliantError, match="got a float for '\\*'; expected a Rule"):
        pliant.bind(built("exits"), {"*": 0.5})  # pyright: ignore[reportArgumentType]
    with pytest.raises(PliantError, match=r"the pattern 'layer\*'.*'sites.0', 'sites.1'"):
        pliant.bind(built("exits"), {"layer*": rules.Always()})
    with pytest.raises(PliantError, match="a model that has sites"):
        pliant.bind(nn.Linear(2, 2), {"*": rules.Always()})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("module.sites.0", "sites.0"),
        ("_orig_mod.sites.0", "sites.0"),
        ("module._orig_mod.stages.1._checkpoint_wrapped_module.site", "stages.1.site"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.site", "a.site"),
        ("a.module.site", "a.module.site"),
    ],
)
def test_names_are_clean_of_wrappers(path: str, name: str) -> None:
    assert clean(path) == name


class Wrapped(nn.Module):
    """What DDP looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_a_site_keeps_its_name_inside_wrappers() -> None:
    model = built("exits")
    x = torch.randn(4, WIDTH)
    _, trace = pliant.record(Wrapped(model))(x)
    assert list(pliant.sites(Wrapped(model))) == list(trace) == ["sites.0", "sites.1"]
    y, _ = pliant.record(model)(x)
    assert torch.equal(pliant.bind(Wrapped(model), {"*": rules.Given(trace)})(x), y)


def test_forms() -> None:
    model = built("exits")
    assert {m.form for m in (model, pliant.masked(model), pliant.gathered(model), pliant.plain(model))} == {
        "auto", "masked", "gathered", "plain",
    }  # fmt: skip
    x = torch.randn(4, WIDTH)
    _, trace = pliant.record(pliant.plain(model))(x)
    assert len(trace) == 0
    assert int(trace.flops[0]) == 2 * WIDTH * (3 * WIDTH + 4)


def test_errors_tell_all_and_survive_pickling() -> None:
    error = PliantError(got="a", expected="b", do="c", site="s")
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == str(error) == "at site 's': got a; expected b. Do: c."
    assert isinstance(error, ValueError)
    assert (twin.got, twin.expected, twin.do, twin.site) == ("a", "b", "c", "s")
    assert str(copy.copy(error)) == str(error)


def test_bind_gives_sites_other_scores_alone_or_with_a_rule() -> None:
    model = built("exits")
    before = {path: (site.scorer, site.rule) for path, site in pliant.sites(model).items()}
    bound = pliant.bind(model, {"sites.0": scores.Entropy(), "*": (scores.Margin(), rules.Threshold(0.25))})
    found = pliant.sites(bound)
    assert [type(site.scorer) for site in found.values()] == [scores.Entropy, scores.Margin]
    assert float(found["sites.1"].rule.threshold) == 0.25  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert type(found["sites.0"].rule) is type(before["sites.0"][1])
    assert {path: (site.scorer, site.rule) for path, site in pliant.sites(model).items()} == before
    x = torch.randn(4, WIDTH)
    _, trace = pliant.record(pliant.masked(bound))(x)
    logits = trace.exits[0].logits
    assert torch.equal(trace["sites.0"][0].scores, scores.Entropy()(logits))  # pyright: ignore[reportArgumentType]


def test_each_site_gets_a_score_of_its_own() -> None:
    bound = pliant.bind(built("exits"), {"*": scores.Entropy()})
    first, second = (site.scorer for site in pliant.sites(bound).values())
    first.temperature.fill_(2.0)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert float(second.temperature) == 1.0  # pyright: ignore[reportArgumentType]
