"""Models that users have, made dynamic in each way: exits with tokens, gates, a cascade."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hosts import HOSTS, call_of
from pliant.retrofit import cascade, exits, skips, tokens

ROWS = 100


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """Four blocks: tokens leave after the first and the second, rows after the second and the third."""
    timm = pytest.importorskip("timm", reason="needs timm")
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5).eval()
    x = torch.randn(ROWS, 3, 64, 64)
    model = tokens(host, ["blocks.[01]"], example=x[:4], keep=0.6)
    return exits(model, ["blocks.1", "blocks.2"], example=x[:4]), {"x": x}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    host, _ = call_of("torchvision resnet18")
    x = torch.randn(ROWS, 3, 32, 32)
    return skips(host, ["layer[12].1"], example=x[:4]), {"x": x}


def two() -> tuple[nn.Module, dict[str, Tensor]]:
    timm = pytest.importorskip("timm", reason="needs timm")
    x = torch.randn(ROWS, 3, 64, 64)
    little, big = (timm.create_model(name, num_classes=5).eval() for name in ("test_resnet", "test_efficientnet"))
    return cascade([little, big], example=x[:4]), {"x": x}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Texts of three to ten words, padded."""
    host, call = call_of("transformers BERT")
    length = torch.arange(ROWS) % 8 + 3
    texts = {
        "input_ids": torch.randint(2, 100, (ROWS, 10)),
        "attention_mask": (torch.arange(10) < length[:, None]).to(torch.int64),
    }
    model = tokens(host, ["bert.encoder.layer.1"], example=call, keep=0.6)
    return exits(model, HOSTS["transformers BERT"].exits, example=call), texts


def lively(made: tuple[nn.Module, dict[str, Tensor]]) -> tuple[nn.Module, dict[str, Tensor]]:
    """In evaluation, with heads and gates that tell rows apart."""
    model, call = made
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("exits.heads", "skips")) and p.ndim == 2:
                p.normal_(std=2.0)
    return model.eval(), call
