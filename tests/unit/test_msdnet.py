"""MSDNet's size, exactly: what optimisation must never change."""

from __future__ import annotations

import pytest
import torch

import pliant
from pliant.deploy.fold import optimised
from pliant.rules import Threshold
from pliant.systems.depth.msdnet import msdnet

UP_TO_EXIT = [29_911_552, 50_471_936, 73_491_968, 91_852_800, 113_752_576, 132_920_320, 150_814_208]


def test_parameters() -> None:
    assert sum(p.numel() for p in msdnet().parameters()) == 2_986_690


@pytest.mark.parametrize("prepare", [lambda model: model, optimised], ids=["as built", "optimised"])
def test_flops_up_to_each_exit(prepare: object) -> None:
    model = prepare(msdnet().eval())  # pyright: ignore[reportCallIssue]
    x = torch.zeros(1, 3, 32, 32)
    for k, flops in enumerate(UP_TO_EXIT):
        rules = {f"sites.{i}": Threshold(float("inf" if i >= k else "-inf")) for i in range(6)}
        with torch.no_grad():
            _, trace = pliant.record(pliant.bind(model, rules))(x)
        assert trace.flops.tolist() == [flops]
        assert trace.dense_flops.tolist() == [UP_TO_EXIT[-1]]
