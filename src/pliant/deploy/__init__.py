"""Deployment: compiled between decisions, saved as a folder, exported to ONNX, folded and laid out for the processor."""

from __future__ import annotations

from pliant.deploy.compile import compile
from pliant.deploy.fold import optimised
from pliant.deploy.generate import Generator, Sample, generate, greedy
from pliant.deploy.onnx import export_onnx
from pliant.deploy.pretrained import from_pretrained, save_pretrained
from pliant.deploy.speculate import Speculated, speculate

__all__ = [
    "Generator", "Sample", "Speculated", "compile", "export_onnx", "from_pretrained", "generate", "greedy", "optimised",
    "save_pretrained", "speculate",
]  # fmt: skip
