"""Models that users have: small or small-input forms from timm, torchvision and transformers, on random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROWS = 5


@dataclass(frozen=True)
class Host:
    """How a model is built and called, and where it can be made dynamic."""

    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
    exits: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)


def pictures(size: int, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.randn(ROWS, 3, size, size)}


def texts() -> dict[str, Tensor]:
    mask = torch.ones(ROWS, 10, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[4, 3:] = 0
    return {"input_ids": torch.randint(2, 100, (ROWS, 10)), "attention_mask": mask}


def timm_model(name: str, size: int, **more: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        timm = pytest.importorskip("timm", reason="needs timm")
        return timm.create_model(name, num_classes=5, **more), pictures(size)

    return build


def vision_model(name: str, size: int) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        models = pytest.importorskip("torchvision.models", reason="needs torchvision")
        return getattr(models, name)(num_classes=5), pictures(size)

    return build


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def language_model(kind: str, **more: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = getattr(transformers, f"{kind}Config")(vocab_size=100, num_labels=5, **more)
        return getattr(transformers, f"{kind}ForSequenceClassification")(config), texts()

    return build


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SIZES)
    return transformers.ViTForImageClassification(config), pictures(32, "pixel_values")


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **SIZES)
    return transformers.LlamaForCausalLM(config), texts()


HOSTS: dict[str, Host] = {
    "timm resnet50": Host(timm_model("resnet50", 64), ["layer1", "layer3.2"], ["layer*.1", "layer3.[2-5]"], channels=["layer[13].[01]"]),
    "timm mobilenetv3_small_100": Host(timm_model("mobilenetv3_small_100", 64), ["blocks.1", "blocks.3"], ["blocks.*.*"], channels=["blocks.*.*"]),
    "timm efficientnet_b0": Host(timm_model("efficientnet_b0", 64), ["blocks.2", "blocks.4"], ["blocks.*.[1-3]"], channels=["blocks.*.0"]),
    "timm convnext_atto": Host(
        timm_model("convnext_atto", 64), ["stages.0", "stages.2"], ["stages.*.blocks.*"], experts=["stages.*.blocks.0"], channels=["stages.*.blocks.1"]
    ),
    "timm vit_tiny_patch16_224": Host(
        timm_model("vit_tiny_patch16_224", 64, img_size=64), ["blocks.3", "blocks.7"], [f"blocks.{i}" for i in range(1, 12, 2)],
        ["blocks.[26]"], ["blocks.[0-2]"],
    ),
    "timm swin_tiny_patch4_window7_224": Host(
        timm_model("swin_tiny_patch4_window7_224", 56, img_size=56), ["layers.1"], ["layers.*.blocks.1"],
        experts=["layers.*.blocks.1"],
    ),
    "torchvision resnet18": Host(vision_model("resnet18", 32), ["layer1", "layer2"], ["layer*.1"], channels=["layer*.*"]),
    "torchvision vgg16": Host(vision_model("vgg16", 32), ["features.4", "features.16"], [], channels=["features"]),
    "transformers BERT": Host(
        language_model("Bert", **SIZES), ["bert.encoder.layer.0", "bert.encoder.layer.2"], ["bert.encoder.layer.[1-3]"],
        ["bert.encoder.layer.0"], ["bert.encoder.layer.*"],
    ),
    "transformers DistilBERT": Host(
        language_model("DistilBert", dim=32, n_layers=4, n_heads=4, hidden_dim=64),
        ["distilbert.transformer.layer.1"], ["distilbert.transformer.layer.[1-3]"],
        ["distilbert.transformer.layer.0"], ["distilbert.transformer.layer.*"],
    ),
    "transformers RoBERTa": Host(
        language_model("Roberta", **SIZES), ["roberta.encoder.layer.1"], ["roberta.encoder.layer.[1-3]"],
        ["roberta.encoder.layer.1"], ["roberta.encoder.layer.[12]"],
    ),
    "transformers ViT": Host(vit, ["vit.layers.1"], ["vit.layers.[1-3]"], ["vit.layers.[02]"], ["vit.layers.*"]),
    "transformers Llama": Host(llama, [], ["model.layers.[1-3]"], experts=["model.layers.*"]),
}  # fmt: skip


def call_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A host in evaluation mode and a call of it."""
    torch.manual_seed(1)
    model, call = HOSTS[name].build()
    return model.eval(), call


def logits(output: Any) -> Tensor:
    """The prediction in what a host returns."""
    return output if isinstance(output, Tensor) else output.logits


def off(a: Any, b: Any) -> float:
    """How far two answers are apart."""
    return float((logits(a) - logits(b)).abs().max())
