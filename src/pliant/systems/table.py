"""The catalogue: every system of the survey, what works here, and how to build it."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from pliant.core.errors import PliantError

BUILDERS: dict[str, str] = {
    "msdnet": "pliant.systems.depth.msdnet:msdnet",
    "imta": "pliant.systems.depth.imta:imta",
    "cascade_nn_layers": "pliant.systems.depth.cascade_nn_layers:cascade_nn_layers",
    "branchynet": "pliant.systems.depth.branchynet:branchynet",
    "sdn": "pliant.systems.depth.sdn:sdn",
    "big_little_dnn": "pliant.systems.depth.big_little_dnn:big_little_dnn",
    "convnet_aig": "pliant.systems.depth.convnet_aig:convnet_aig",
    "skipnet": "pliant.systems.depth.skipnet:skipnet",
    "blockdrop": "pliant.systems.depth.blockdrop:blockdrop",
    "dfs": "pliant.systems.depth.dfs:dfs",
    "deebert": "pliant.systems.depth.deebert:deebert",
    "pabee": "pliant.systems.depth.pabee:pabee",
    "ranet": "pliant.systems.depth.ranet:ranet",
    "stn": "pliant.systems.spatial.stn:stn",
    "sact": "pliant.systems.depth.sact:sact",
    "resnet_act": "pliant.systems.depth.sact:resnet_act",
    "dynconv": "pliant.systems.spatial.dynconv:dynconv",
    "carafe": "pliant.systems.spatial.carafe:carafe",
    "pointrend": "pliant.systems.spatial.pointrend:pointrend",
    "gfnet": "pliant.systems.spatial.gfnet:gfnet",
    "supernet_routing": "pliant.systems.routing.supernet_routing:supernet_routing",
    "dynamic_routing_seg": "pliant.systems.routing.dynamic_routing_seg:dynamic_routing_seg",
    "tel": "pliant.systems.routing.tel:tel",
    "condconv": "pliant.systems.parameters.condconv:condconv",
    "deform_conv_v2": "pliant.systems.parameters.deform_conv_v2:deform_conv_v2",
    "dfn": "pliant.systems.parameters.dfn:dfn",
    "hypernetworks": "pliant.systems.parameters.hypernetworks:hypernetworks",
    "senet": "pliant.systems.parameters.senet:senet",
    "dy_relu": "pliant.systems.parameters.dy_relu:dy_relu",
    "lstm_jump": "pliant.systems.temporal.lstm_jump:lstm_jump",
    "adaframe": "pliant.systems.temporal.adaframe:adaframe",
    "scsampler": "pliant.systems.temporal.scsampler:scsampler",
    "sparsely_gated_moe": "pliant.systems.width.sparsely_gated_moe:sparsely_gated_moe",
    "switch_transformer": "pliant.systems.width.switch_transformer:switch_transformer",
    "fbs": "pliant.systems.width.fbs:fbs",
    "skip_rnn": "pliant.systems.temporal.skip_rnn:skip_rnn",
    "skim_rnn": "pliant.systems.temporal.skim_rnn:skim_rnn",
    "hm_rnn": "pliant.systems.temporal.hm_rnn:hm_rnn",
}
PARTS: dict[str, str] = {
    "conf_max_softmax": "pliant.scores.MaxProbability",
    "conf_entropy": "pliant.scores.Entropy",
    "conf_margin": "pliant.scores.Margin",
    "conf_patience": "pliant.scores.Patience",
    "relu_far_overconfidence": "pliant.scores.Guarded",
    "halting_score": "pliant.execute.Halting",
    "exit_threshold_search": "pliant.tune.tune",
    "temperature_scaling": "pliant.tune.fit_temperature",
    "policy_network": "pliant.scores.Policy",
    "gating_function": "pliant.scores.MLPGate",
    "gate_relu_tanh": "pliant.rules.ReluTanh",
    "loss_multi_exit": "pliant.losses.MultiExit",
    "gradient_equilibrium": "pliant.execute.equilibrium",
    "inline_subnetwork_collaboration": "pliant.execute.collaborative",
    "one_for_all_kd": "pliant.losses.OneForAll",
    "loss_inter_scale_ranking": "pliant.losses.Ranking",
    "loss_target_rate": "pliant.losses.TargetRate",
    "loss_gate_l1": "pliant.losses.GateL1",
    "loss_resource_aware": "pliant.losses.ResourceAware",
    "subnetwork_distillation": "pliant.losses.SubnetworkDistillation",
    "alternating_backbone_agent": "pliant.train.agent_on_backbone",
    "reinforce": "pliant.losses.Reinforce",
    "rl_compute_reward": "pliant.losses.Priced",
    "self_critical": "pliant.losses.SelfCritical",
    "rl_curriculum_tail": "pliant.train.PlanCurriculum",
    "q_learning_routing": "pliant.losses.QLearning",
    "rl_hybrid_supervised": "pliant.losses.Hybrid",
    "ste": "pliant.estimators.StraightThrough",
    "ste_slope_annealing": "pliant.estimators.HardSigmoid",
    "gumbel_softmax": "pliant.estimators.Gumbel",
    "binary_concrete": "pliant.estimators.BinaryConcrete",
    "improved_semhash": "pliant.estimators.SemHash",
    "sgd_dynamic_parameters": "pliant.execute.MixedConv2d",
}
"""Rows of section 5 that are parts: what they are called here. Each is built on the network of systems/training.py."""

BUILDERS |= {id: f"pliant.systems.training:{id}" for id in PARTS}
_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[2]


@dataclass(frozen=True)
class Row:
    """One row of the catalogue: the facts of a system, and by them whether it works here.

    Args:
        id: its name in code.
        name: its name in the field.
        survey: section of the survey.
        ref: the survey's number of the paper, if it has one.
        paper: authors, title, place, year.
        same_as: id of the row that this one describes again, or nothing.
        part: the part of the survey that it stands in.
    """

    id: str
    name: str
    survey: str
    ref: str
    paper: str
    same_as: str
    part: str

    @property
    def component(self) -> str | None:
        """Where the row is a part that any model may use: its name in this library."""
        return PARTS.get(self.same_as or self.id)

    @property
    def status(self) -> str:
        """``works`` or ``missing``."""
        return "works" if (self.same_as or self.id) in BUILDERS else "missing"

    @property
    def evidence(self) -> str | None:
        """Path of the results of its claims in a source checkout, if they have been run."""
        path = f"evidence/results/{self.same_as or self.id}.json"
        return path if (_CHECKOUT / path).is_file() else None


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows in the survey's order.

    >>> len(rows())
    256
    """
    lines = (_HERE / "catalogue.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Row(*line.split("\t")) for line in lines[1:])


def row(id: str) -> Row:
    """The row with this id.

    Raises:
        PliantError: where there is none; the message names the nearest ids.

    >>> row("msdnet").ref
    '12'
    """
    for found in rows():
        if found.id == id:
            return found
    near = difflib.get_close_matches(id, [r.id for r in rows()], n=3)
    raise PliantError(
        got=f"id {id!r}",
        expected="one of " + ", ".join(near) if near else "an id of the catalogue",
        do="see 'pliant list'",
    )


def in_section(found: Row, section: str) -> bool:
    """Whether a row stands in a section of the survey: "2.1" holds "2.1.1 (1c)" and not "2.10".

    >>> in_section(row("msdnet"), "2.1"), in_section(row("msdnet"), "2.1.2")
    (True, False)
    """

    def within(place: str) -> bool:
        return place == section or place.startswith((section + ".", section + " "))

    return any(within(place.strip()) for place in found.survey.split(";"))


def list_models(pattern: str = "*", *, section: str | None = None) -> list[str]:
    """Ids of the systems that work.

    Args:
        pattern: on ids, with ``*`` and ``?``.
        section: only this section of the survey.

    Returns:
        Ids in the survey's order.

    >>> list_models("msd*")
    ['msdnet']
    """
    return [
        r.id for r in rows()
        if r.status == "works" and fnmatchcase(r.id, pattern) and (section is None or in_section(r, section))
    ]  # fmt: skip


def builder(id: str) -> Callable[..., nn.Module]:
    """The constructor of a system.

    Raises:
        PliantError: where there is no such row, or it doesn't work yet.
    """
    found = row(id)
    target = BUILDERS.get(found.same_as or id)
    if target is None:
        raise PliantError(
            got=f"{id!r} ({found.name}), which is missing here", expected="a system that works: " + ", ".join(list_models()),
            do="see 'pliant list --works'",
        )  # fmt: skip
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
