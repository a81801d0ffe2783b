"""Retrofitted models of every kind under torch.export and pliant.compile: one program each for all mixes of decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pliant
from dynamic import ROWS, bert, lively, resnet, two, vit
from hosts import logits, off

KINDS: list[Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = [vit, resnet, two, bert]
every_kind = pytest.mark.parametrize("make", KINDS, ids=lambda f: f.__name__)


@torch.no_grad()
def mixes(model: Any, call: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Thresholds by site: all rows go on, none does, about half do at each; tokens at three shares."""
    found = pliant.sites(model)
    tokens = [path for path in found if path.startswith("tokens")]
    middle = {**dict.fromkeys(found, float("-inf")), **dict.fromkeys(tokens, 0.4)}
    for path in found:
        if path not in tokens:  # between the scores of those that come there
            scores = pliant.record(at(model, middle))(**call)[1][path][0].scores
            middle[path] = float(scores.median()) + 1e-5
    return {
        "all": {**dict.fromkeys(found, float("-inf")), **dict.fromkeys(tokens, 0.1)},
        "none": {**dict.fromkeys(found, float("inf")), **dict.fromkeys(tokens, 0.9)},
        "half": middle,
    }


def at(model: Any, thresholds: dict[str, float]) -> Any:
    """The model with its dials turned: their buffers are filled, in whatever has them."""
    for name, value in model.named_buffers():
        path = name.removeprefix("model.").partition(".rule")[0]
        if name.endswith(".threshold") and path in thresholds:
            value.fill_(thresholds[path])
    return model


@every_kind
@torch.no_grad()
def test_an_exported_program_answers_as_eager_whatever_its_thresholds(make: Any) -> None:
    torch.manual_seed(0)
    model, call = lively(make())
    example = {name: t[:4] for name, t in call.items()}
    shapes = torch.export.ShapesCollection()
    for t in example.values():
        shapes[t] = {0: torch.export.Dim.DYNAMIC}
    program: Any = torch.export.export(pliant.core.share(model), (), example, dynamic_shapes=shapes).module()
    for name, thresholds in mixes(model, call).items():
        for rows in (ROWS, 7, 1):
            some = {key: t[:rows] for key, t in call.items()}
            y = at(model, thresholds)(**some)
            found = at(program, thresholds)(**some)
            torch.testing.assert_close(
                logits(found), logits(y), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@every_kind
@torch.no_grad()
def test_another_mix_of_decisions_compiles_nothing_again(make: Any) -> None:
    """Parts have programs for one row, for some and for all; from then on whoever leaves finds one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, call = lively(make())
    counter = CompileCounter()
    compiled = pliant.compile(model, backend=counter)
    found = mixes(model, call)
    share = {path: 0.4 for path in found["all"] if path.startswith("tokens")}

    def run(rows: Tensor) -> None:
        some = {name: t[rows] for name, t in call.items()}
        assert off(compiled(**some), model(**some)) <= 2e-5

    for name in ("all", "half", "none"):
        at(model, {**found[name], **share})  # the compiled one shares the buffers
        for rows in (16, 1, 9):
            run(torch.arange(rows))
    once = counter.frame_count
    at(model, found["half"])
    for rows in (2, 3, 5, 9, 16, 30):
        for _ in range(3):
            run(torch.randperm(ROWS)[:rows])
    assert counter.frame_count == once > 0
    torch._dynamo.reset()
