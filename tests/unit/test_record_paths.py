"""Paths that a recording remembers between calls are looked up again before they're used."""

from __future__ import annotations

import copy

import torch
from torch import nn

import pliant
from pliant.core import trace as core_trace
from pliant.execute import Residual


def residual(rule: pliant.Rule) -> Residual:
    return Residual(nn.Linear(2, 2), pliant.Site(nn.Flatten(0), rule))


def paths(model: nn.Module) -> list[str]:
    return list(pliant.record(model)(torch.ones(2, 2))[1])


def test_a_module_that_moved_is_found_where_it_stands_now() -> None:
    model = nn.Sequential(residual(pliant.rules.Always()), residual(pliant.rules.Never())).eval()
    always, never = model[0], model[1]
    assert paths(model) == ["0.site", "1.site"]
    model[0], model[1] = never, always
    _, trace = pliant.record(model)(torch.ones(2, 2))
    assert [trace.dense(name).tolist() for name in ("0.site", "1.site")] == [[0.0, 0.0], [1.0, 1.0]]
    assert [note.site for note in trace.notes] == ["1.site"]
    model.insert(0, nn.Identity())
    assert paths(model) == ["1.site", "2.site"]


def test_a_copy_and_a_wrapper_have_their_own_paths() -> None:
    model = nn.Sequential(residual(pliant.rules.Always())).eval()
    assert paths(model) == ["0.site"]
    assert paths(copy.deepcopy(model)) == ["0.site"]
    assert paths(nn.Sequential(nn.Identity(), model)) == ["1.0.site"]
    assert paths(nn.ModuleDict({"module": model})["module"]) == ["0.site"]
    assert paths(residual(pliant.rules.Always()).eval()) == ["site"]


def test_a_second_call_walks_no_modules() -> None:
    model = nn.Sequential(residual(pliant.rules.Always()), residual(pliant.rules.Always())).eval()
    paths(model)
    walks = []
    before = core_trace.named
    try:
        core_trace.named = lambda m: walks.append(m) or before(m)
        assert paths(model) == ["0.site", "1.site"]
    finally:
        core_trace.named = before
    assert walks == []


def test_a_shared_site_counts_its_visits() -> None:
    one = residual(pliant.rules.Always())
    model = nn.Sequential(one, nn.Identity(), one).eval()
    _, trace = pliant.record(model)(torch.ones(2, 2))
    assert [d.visit for d in trace["0.site"]] == [0, 1]
