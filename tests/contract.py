"""Every system of the catalogue in a small size, made ready to be checked: statistics, gates and thresholds that vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant import rules
from pliant.systems.table import builder

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "msdnet": ({"exits": 3, "base": 1, "step": 1, "channels": 4}, (6, 3, 32, 32)),
    "imta": ({"exits": 3, "base": 1, "step": 1, "channels": 4}, (6, 3, 32, 32)),
    "cascade_nn_layers": ({"widths": (4, 8, 8)}, (6, 3, 16, 16)),
    "branchynet": ({"in_chans": 1}, (6, 1, 28, 28)),
    "sdn": ({"backbone": "resnet8", "at": (0.3, 0.6)}, (6, 3, 32, 32)),
    "big_little_dnn": ({"little": "cnn2", "big": "resnet8"}, (6, 3, 32, 32)),
    "convnet_aig": ({"depth": 14}, (6, 3, 32, 32)),
    "skipnet": ({"depth": 14, "widths": (4, 8, 8)}, (6, 3, 12, 12)),
    "blockdrop": ({"depth": 8, "widths": (4, 8, 8), "policy": (4, 4, 8), "view": 8}, (6, 3, 16, 16)),
    "dfs": ({"depth": 8, "widths": (4, 8, 8), "bits": (4, 8)}, (6, 3, 12, 12)),
    "deebert": ({"words": 12, "layers": 3, "width": 8, "heads": 2, "threshold": 0.99}, (6, 5)),
    "pabee": ({"words": 12, "layers": 4, "width": 8, "heads": 2, "patience": 1}, (6, 5)),
    "ranet": ({"step": 1, "channels": 4, "growth": 4, "head_channels": 8}, (6, 3, 32, 32)),
    "stn": ({"in_chans": 1, "widths": (4, 8), "size": 12}, (6, 1, 20, 20)),
    "gfnet": ({"in_chans": 1, "size": 8, "steps": 3, "widths": (4, 4, 8), "hidden": 8, "policy": 8}, (6, 1, 20, 20)),
    "q_learning_routing": ({"widths": (4, 8), "branches": 3}, (6, 3, 16, 16)),
    "supernet_routing": ({"widths": (4, 8), "branches": 3}, (6, 3, 16, 16)),
    "dynamic_routing_seg": ({"layers": 3, "scales": 2, "channels": 4, "stride": 2}, (6, 3, 16, 16)),
    "sact": ({"units": 3, "widths": (4, 8), "bias": -0.5}, (6, 3, 12, 12)),
    "resnet_act": ({"units": 3, "widths": (4, 8), "bias": -0.5}, (6, 3, 12, 12)),
    "dynconv": ({"blocks": 1, "width": 4}, (6, 3, 12, 12)),
    "carafe": ({"widths": (4, 6)}, (6, 3, 8, 8)),
    "pointrend": ({"width": 4, "hidden": 8, "share": 0.05}, (6, 3, 16, 16)),
    "condconv": ({"widths": (4, 8), "depth": 1, "static": 1, "experts": 3}, (6, 3, 12, 12)),
    "deform_conv_v2": ({"depth": 8, "widths": (4, 8, 8)}, (6, 3, 12, 12)),
    "dfn": ({"in_chans": 3, "kernel": 3, "widths": (2, 4, 8)}, (6, 3, 10, 10)),
    "hypernetworks": ({"in_chans": 5, "hidden": 8, "hyper": 6, "embedding": 2}, (6, 5, 7)),
    "senet": ({"depth": 8, "widths": (4, 8, 8), "reduction": 2}, (6, 3, 12, 12)),
    "dy_relu": ({"widths": (4, 8), "depth": 1, "form": "place"}, (6, 3, 12, 12)),
    "sgd_dynamic_parameters": ({"widths": (4, 8, 8), "depth": 1, "experts": 3}, (6, 3, 12, 12)),
    "sparsely_gated_moe": ({"words": 12, "width": 8, "hidden": 4, "experts": 3}, (6, 5)),
    "switch_transformer": ({"words": 12, "layers": 2, "width": 8, "heads": 2, "experts": 3, "length": 5}, (6, 5)),
    "fbs": ({"layers": ((8, 1), (8, 2), (12, 1))}, (6, 3, 12, 12)),
    "lstm_jump": ({"words": 12, "embedding": 4, "hidden": 6, "span": 2, "most": 3, "jumps": 2}, (6, 9)),
    "adaframe": (
        {"steps": 3, "depth": 8, "widths": (4, 4, 8), "hidden": 8, "glances": 3, "patience": 1, "margin": 0.0}, (6, 7, 3, 12, 12)
    ),
    "scsampler": ({"keep": 2, "depth": 8, "widths": (4, 4, 8), "light": (4, 8)}, (6, 5, 3, 12, 12)),
    "tel": ({"in_chans": 1, "trees": 3, "depth": 3, "width": 0.02, "widths": (4,)}, (6, 1, 12, 12)),
    "skip_rnn": ({"in_chans": 3, "hidden": 8, "bias": -0.5}, (6, 4, 3)),
    "skim_rnn": ({"words": 12, "embedding": 4, "hidden": 8, "small": 2}, (6, 3)),
    "hm_rnn": ({"words": 12, "hidden": (6, 5, 4), "embedding": 3}, (6, 3)),
    "halting_score": ({"units": 3, "channels": 8, "bias": -0.5}, (6, 3, 16, 16)),
    **dict.fromkeys(
        ("policy_network", "self_critical", "rl_curriculum_tail", "alternating_backbone_agent"),
        ({"depth": 8, "view": 8}, (6, 3, 16, 16)),
    ),
    **dict.fromkeys(
        ("gating_function", "gate_relu_tanh", "ste", "ste_slope_annealing", "gumbel_softmax", "binary_concrete",
         "improved_semhash", "reinforce", "rl_compute_reward", "rl_hybrid_supervised"),
        ({"depth": 8}, (6, 3, 16, 16)),
    ),
    **dict.fromkeys(
        ("conf_max_softmax", "conf_entropy", "conf_margin", "conf_patience", "relu_far_overconfidence", "gradient_equilibrium",
         "inline_subnetwork_collaboration"),
        ({"exits": 3, "step": 1, "channels": 4}, (6, 3, 16, 16)),
    ),
}  # fmt: skip
"""From the id of a system to the arguments of a small one and the shape of its input."""

WORDS: dict[str, int] = dict.fromkeys(
    ("lstm_jump", "skim_rnn", "hm_rnn", "deebert", "pabee", "sparsely_gated_moe", "switch_transformer"), 12
)
"""Of the systems that read words: the size of the vocabulary. 0 is padding, and ends some of the texts."""

SYSTEMS = list({builder(id): id for id in reversed(pliant.list_models())}.values())[::-1]
"""Every system once: several rows of section 5 are parts that are shown on the same network."""


def ready(id: str) -> tuple[nn.Module, Tensor]:
    """A small system whose decisions vary over the batch that comes with it."""
    kwargs, shape = SMALL[id]
    torch.manual_seed(0)
    model = pliant.create_model(id, num_classes=4, **kwargs)
    x = texts(shape, WORDS[id]) if id in WORDS else torch.randn(shape)
    settle(model, x)
    return model.eval(), x


def texts(shape: tuple[int, ...], words: int) -> Tensor:
    """Word numbers, the second half of every other text padded."""
    x = torch.randint(1, words, shape)
    x[1::2, shape[1] // 2 :] = 0
    return x


def fresh(x: Tensor) -> Tensor:
    """More inputs like these, of varied strength."""
    if not x.is_floating_point():
        return x.roll(1, 0)
    return torch.randn_like(x) * torch.rand(len(x), *[1] * (x.ndim - 1)).add(0.5)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Real batch statistics, gates that say different things to different rows, thresholds in the middle of their scores."""
    for site in pliant.sites(model).values():
        linear = [m for m in site.scorer.modules() if isinstance(m, nn.Linear)]
        if linear:
            linear[-1].weight.normal_(std=0.1)  # small: a clipped surrogate has no slope far out
        for conv in [m for m in site.scorer.modules() if isinstance(m, nn.Conv2d) and not m.weight.any()]:
            conv.weight.normal_(std=0.1)
    model.train()
    for _ in range(5):
        model(fresh(x))
    model.eval()
    for path, site in pliant.sites(model).items():  # in order: what earlier sites decide changes what later ones see
        rule = getattr(site.rule, "rule", site.rule)
        if not isinstance(rule, (rules.Threshold, rules.ReluTanh)):
            continue
        scores = pliant.record(pliant.masked(model))(x)[1][path][0].scores
        assert scores is not None
        ordered = scores.flatten().sort().values
        low, high = ordered[len(ordered) // 2 - 1], ordered[len(ordered) // 2]
        if low < high:  # midway, so that no score is its own threshold
            if isinstance(rule, rules.ReluTanh):  # no threshold: the scorer's bias is what shifts it
                [m for m in site.scorer.modules() if isinstance(m, nn.Linear)][-1].bias[-1] -= (low + high) / 2
            else:
                rule.threshold.copy_((low + high) / 2)
