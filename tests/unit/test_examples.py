"""Every example runs as its own program and says what it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {
    "bert_exits_trainer": ("transformers", "accelerate"), "lightning_skips": ("lightning", "timm"),
    "causal_generate": ("transformers",), "retrofit_resnet18": ("torchvision",),
    "vit_exits_tokens": ("timm",), "export_and_run": ("onnxruntime", "onnxscript"),
}  # fmt: skip
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_in_under_80_lines(name: str):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"the example needs {package}")
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 80
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    right = [float(share) for share in re.findall(r"([\d.]+) % ", done.stdout)]
    assert all(share > 80 for share in right), done.stdout  # each says accuracies so; chance is 10 %
    assert "False" not in done.stdout
