"""The library needs torch and safetensors alone: every system is built and run with all extras hidden."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
for name in {hidden}:
    sys.modules[name] = None  # what an import of it meets when it isn't installed
import torch, pliant
import contract
for id in {ids}:
    kwargs, shape = contract.SMALL[id]
    model = pliant.create_model(id, num_classes=4, **kwargs).eval()
    x = contract.texts(shape, contract.WORDS[id]) if id in contract.WORDS else torch.randn(shape)
    y, trace = pliant.record(model)(x[:2])
    assert y.shape[:2] == (2, 4), id  # segmentation nets answer (2, 4, H, W), language models (2, 4, T)
    assert trace.flops.sum() > 0, id
print("light")
"""
HIDDEN = [
    "typer", "rich", "sklearn", "PIL", "pooch", "lightning_fabric", "click", "timm", "torchvision", "transformers",
    "onnx", "onnxscript", "onnxruntime", "matplotlib",
]  # fmt: skip


def test_every_system_works_without_extras() -> None:
    import contract

    code = CODE.format(hidden=HIDDEN, ids=contract.SYSTEMS)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests')\n{code}"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout == "light\n", done.stderr
