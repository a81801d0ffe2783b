"""Retrofitted models train as users train: under DDP in two processes, with activation checkpointing, in mixed precision."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from hosts import call_of as host_call
from pliant.losses import FlopsBudget, MultiExit, Total
from pliant.retrofit import exits, skips

BOTH = Total({"exits": (1.0, MultiExit()), "budget": (1.0, FlopsBudget(0.7))})
HOSTS = {
    "timm vit_tiny_patch16_224": (["blocks.3"], ["blocks.[4-5]"], "set_grad_checkpointing"),
    "transformers BERT": (["bert.encoder.layer.0"], ["bert.encoder.layer.[1-2]"], "activation_checkpointing_enable"),
    "timm resnet50": (["layer1.2"], ["layer2.[1-3]"], "set_grad_checkpointing"),
}


def dynamic(name: str) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    host, call = host_call(name)
    at, blocks, _ = HOSTS[name]
    example = call if "input_ids" in call else call["x"]
    return skips(exits(host, at=at, example=example), blocks, example=example), host, call


def gradients(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of both losses; the dice and dropout fall as they did before."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    y, trace = pliant.record(model)(**call)
    logits = y if isinstance(y, Tensor) else y.logits
    sum(BOTH(logits, trace, torch.arange(len(logits)) % 5, 0.5).values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", HOSTS)
def test_activation_checkpointing_changes_no_gradient(name: str):
    model, _, call = dynamic(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # running statistics would be counted twice: a checkpoint runs its layers twice
    whole = gradients(model, call)
    getattr(model, HOSTS[name][2])()
    again = gradients(model, call)
    assert whole.keys() == again.keys()
    assert any("skips" in n for n in whole)
    assert any("exits" in n for n in whole)
    for n in whole:
        torch.testing.assert_close(again[n], whole[n], rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", HOSTS)
def test_mixed_precision_trains_gates_exits_and_host(name: str):
    model, _, call = dynamic(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model.train(), call)
        answer = model.eval()(**call)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert any("skips" in n and g.abs().sum() > 0 for n, g in found.items())
    assert (answer if isinstance(answer, Tensor) else answer.logits).dtype == torch.bfloat16


SCRIPT = """
import sys, torch, torch.distributed as dist, torchvision
from torch.nn.parallel import DistributedDataParallel
import pliant
from pliant.losses import MultiExit, Total
from pliant.retrofit import exits, skips

torch.manual_seed(0)
torch.set_num_threads(1)
host = torchvision.models.resnet18(num_classes=5).eval()
x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
model = skips(exits(host, at=["layer1", "layer2"], example=x[:4]), ["layer3.1"], example=x[:4],
              rule=pliant.estimators.StraightThrough(pliant.rules.Threshold(0.0)))
loss = Total({"exits": (1.0, MultiExit()), "budget": (1.0, pliant.losses.FlopsBudget(0.5))})
several = len(sys.argv) > 2
if several:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
recorder = pliant.record(pliant.masked(model))  # in evaluation: batch norm doesn't tell processes apart
if several:
    recorder = DistributedDataParallel(recorder, find_unused_parameters=False)
logits, trace = recorder(x)
sum(loss(logits, trace, y, 0.5).values()).backward()
if not several or rank == 0:
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sys.argv[1])
if several:
    looking = DistributedDataParallel(recorder.module.model, find_unused_parameters=True)
    try:
        pliant.record(looking)(x)
    except pliant.PliantError as error:
        print("the other way round" in str(error))
    dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one_batch(tmp_path: Path):
    pytest.importorskip("torchvision", reason="needs torchvision")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script)]
    piped: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [environment | {"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    two = [subprocess.Popen([*command, str(tmp_path / "two.pt"), "ddp"], env=one, **piped) for one in ranks]
    for process in two:
        told, trouble = process.communicate(timeout=240)
        assert process.returncode == 0, trouble[-3000:]
        assert told.strip() == "True"
    subprocess.run([*command, str(tmp_path / "one.pt")], env=environment, check=True)
    one, both = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert one.keys() == both.keys()
    assert any("skips" in n for n in one)
    for n in one:
        torch.testing.assert_close(both[n], one[n], rtol=1e-3, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    assert F.mse_loss(both["fc.weight"], torch.zeros_like(both["fc.weight"])) > 0
