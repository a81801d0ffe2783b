"""The networks that section 5's parts are shown on: a gated ResNet, a chain of exits, a halting loop, a planned ResNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pliant import estimators
from pliant.core.bind import bind, sites
from pliant.core.site import Score, Site
from pliant.execute import Halting, collaborative, equilibrium
from pliant.execute.heads import PooledClassifier
from pliant.rules import Halting as HaltingRule
from pliant.rules import ReluTanh, Softmax, Threshold
from pliant.scores import (
    Entropy,
    Guarded,
    HaltingHead,
    LogitDistance,
    Margin,
    MaxProbability,
    Patience,
    Remainder,
)
from pliant.systems.backbones import BasicBlock, conv_norm, resnet
from pliant.systems.depth.blockdrop import planned
from pliant.systems.depth.convnet_aig import convnet_aig
from pliant.systems.depth.msdnet import msdnet
from pliant.systems.parameters.condconv import condconv
from pliant.systems.routing.supernet_routing import supernet_routing

Build = Callable[..., nn.Module]


def _gates(rule: Callable[[], Any]) -> Build:
    def build(num_classes: int = 10, in_chans: int = 3, *, depth: int = 20) -> nn.Module:
        """A CIFAR ResNet of ``depth`` layers with ConvNet-AIG's gate at every block, decided by this part."""
        return bind(convnet_aig(num_classes, in_chans, depth=depth), {"*": rule()})

    return build


def _exits(score: Callable[[], Score], over: Callable[[Any], nn.Module] = lambda chain: chain) -> Build:
    def build(
        num_classes: int = 10, in_chans: int = 3, *, exits: int = 4, step: int = 2, channels: int = 8
    ) -> nn.Module:
        """A small MSDNet, its exits decided by this part."""
        chain = msdnet(num_classes, in_chans, exits=exits, base=step, step=step, channels=channels)
        return over(bind(chain, {"*": score()}))

    return build


def halting_score(
    num_classes: int = 10, in_chans: int = 3, *, units: int = 5, channels: int = 16, bias: float = -3.0
) -> nn.Module:
    """Residual units, each with a halting head, after which an image may leave with the mixture of its states.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        units: at most so many run.
        channels: of all units.
        bias: of the halting logits at the start; -3 lets all units run.
    """
    loop = Halting(
        [BasicBlock(channels, channels) for _ in range(units)],
        [HaltingHead(channels, bias=bias) for _ in range(units - 1)],
        [Site(Remainder(), HaltingRule()) for _ in range(units - 1)],
    )
    return nn.Sequential(*conv_norm(in_chans, channels), nn.ReLU(), loop, PooledClassifier(channels, num_classes))


def policy_network(num_classes: int = 10, in_chans: int = 3, *, depth: int = 20, view: int = 16) -> nn.Module:
    """A CIFAR ResNet whose blocks a small ResNet-8 plans from the image, shrunk to ``view`` by ``view``.

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        depth: layers, 6n + 2.
        view: side of what the policy sees.
    """
    parts = resnet(num_classes, in_chans, depth=depth)
    return planned(parts, resnet(num_classes, in_chans, depth=8, widths=(8, 16, 32)), width=32, view=view)


def relu_far_overconfidence(
    num_classes: int = 10, in_chans: int = 3, *, exits: int = 4, step: int = 2, channels: int = 8
) -> nn.Module:
    """A small MSDNet whose exits let nobody leave who is far from the data, once each guard is fitted."""
    chain = conf_max_softmax(num_classes, in_chans, exits=exits, step=step, channels=channels)
    guarded = {path: Guarded(MaxProbability(), LogitDistance(num_classes)) for path in sites(chain)}
    return bind(chain, guarded)


def q_learning_routing(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 32, 64), branches: int = 4
) -> nn.Module:
    """A chain of layers with blocks side by side, whose routers' scores are values of the branches."""
    net = supernet_routing(num_classes, in_chans, widths=widths, branches=branches)
    return bind(net, {"*": estimators.EpsilonGreedyOneHot()})


alternating_backbone_agent = self_critical = rl_curriculum_tail = policy_network
conf_max_softmax = exit_threshold_search = temperature_scaling = _exits(MaxProbability)
loss_multi_exit = one_for_all_kd = loss_inter_scale_ranking = conf_max_softmax
conf_entropy = _exits(Entropy)
conf_margin = _exits(Margin)
conf_patience = _exits(lambda: Patience(1))
gradient_equilibrium = _exits(MaxProbability, equilibrium)
inline_subnetwork_collaboration = _exits(MaxProbability, collaborative)

gating_function = binary_concrete = gumbel_softmax = _gates(lambda: estimators.BinaryConcrete(Threshold(0.0)))
loss_target_rate = loss_gate_l1 = loss_resource_aware = subnetwork_distillation = gating_function
gate_relu_tanh = _gates(ReluTanh)
ste = _gates(lambda: estimators.StraightThrough(Threshold(0.0)))
ste_slope_annealing = _gates(lambda: estimators.StraightThrough(Threshold(0.0), surrogate=estimators.HardSigmoid(1.0)))
reinforce = rl_compute_reward = rl_hybrid_supervised = _gates(lambda: estimators.ScoreFunction(Threshold(0.0)))
improved_semhash = _gates(lambda: estimators.SemHash(Threshold(0.0)))


def sgd_dynamic_parameters(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 24, 40), depth: int = 2, experts: int = 8
) -> nn.Module:
    """A small CondConv under softmax weights whose temperature, 30 at the start, training anneals ("*.temperature")."""
    net = condconv(num_classes, in_chans, widths=widths, depth=depth, experts=experts)
    return bind(net, {"*": Softmax(30.0)})
