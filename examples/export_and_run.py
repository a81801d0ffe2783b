"""Export a network with early exits and gates to one ONNX file, run it in ONNX Runtime, and turn its thresholds there.

    python examples/export_and_run.py

Ten seconds on one CPU core. The file skips for real, at any batch size; PyTorch isn't needed where it runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.data import load
from pliant.deploy import export_onnx
from pliant.retrofit import exits, skips


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def network(channels: int = 32) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(stem, *[Block(channels) for _ in range(6)], head)


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    every = pliant.record(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in (rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(64)):
        optimiser.zero_grad()
        sum(F.cross_entropy(e.logits, y[i]) for e in every(x[i])[1].exits).backward()
        optimiser.step()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(3)  # it warns that thresholds, an input, may not be folded; they mustn't be
    data = load("digits")
    example = data.train.x[:4]
    model = exits(skips(network(), ["3", "5"], example=example), ["1", "3"], example=example)
    trained(model.train(), data.train.x, data.train.y, epochs=7)
    pliant.tune(model.eval(), [(data.val.x, data.val.y)], budget=0.7)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "digits.onnx", example)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    own = json.loads(session.get_modelmeta().custom_metadata_map["pliant.thresholds"])
    print("thresholds:", {site: round(value, 3) for site, value in own.items()})
    x, y = data.test.x.numpy(), data.test.y.numpy()
    exit_only = [np.inf if site == "exits.sites.0" else value for site, value in own.items()]
    for name, thresholds in (("as tuned", list(own.values())), ("all on", [-np.inf] * len(own)), ("exit 0", exit_only)):
        feed = {"input": x, "thresholds": np.array(thresholds, dtype=np.float32)}
        start = time.perf_counter()
        logits, left = session.run(None, feed)
        seconds = time.perf_counter() - start
        right = 100 * (logits.argmax(1) == y).mean()
        print(f"{name:>8}: {seconds:.4f} s, {right:.1f} % right, rows at each exit {np.bincount(left, minlength=3)}")
    same = np.abs(session.run(None, {"input": x[:7]})[0] - model(data.test.x[:7]).detach().numpy()).max() < 1e-4
    print("seven rows in ONNX Runtime as in PyTorch:", same)


if __name__ == "__main__":
    main()
