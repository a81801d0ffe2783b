"""SuperNet routing in its general form: in every layer a router chooses among parallel branches, by image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.site import Rule, Site
from pliant.estimators.gumbel import Gumbel, GumbelOneHot
from pliant.execute.heads import PooledClassifier
from pliant.execute.routes import Node, Routes
from pliant.rules.soft import ReluTanh
from pliant.rules.threshold import Threshold
from pliant.scores.routes import RouteGate
from pliant.systems.backbones import BasicBlock, conv_norm
from pliant.systems.parts import chosen

ROUTERS: dict[str, tuple[float, Callable[[], Rule]]] = {
    "one_hot": (0.0, GumbelOneHot),
    "gates": (1.0, lambda: Gumbel(Threshold(0.0))),
    "relu_tanh": (1.5, ReluTanh),
}
"""From a router's name to its scores' bias at the start, and its rule."""


class Single(nn.Module):
    """Routes of a layer with one node, which lead to one node."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()
        self.routes = routes

    def forward(self, x: Tensor) -> Tensor:
        """The next node's input."""
        return self.routes([x])[0]


def supernet_routing(
    num_classes: int = 10, in_chans: int = 3, *, widths: Sequence[int] = (16, 32, 64), branches: int = 4, router: str = "one_hot",
) -> nn.Sequential:  # fmt: skip
    r"""A chain of layers, each of several residual blocks side by side, of which a router runs some.

    .. math:: x_{l+1} = \sum_{k:\, a_k > 0} a_k\, F_{lk}(x_l), \qquad a = \mathrm{rule}(\mathrm{router}_l(x_l))

    Rows are grouped by route: each block runs once, on those that chose it.

    Shape:
        images :math:`(R, \text{in\_chans}, H, W)`; logits :math:`(R, C)`.

    Args:
        num_classes: :math:`C`.
        in_chans: channels of the images.
        widths: channels of each layer; the first keeps the resolution, each later one halves it.
        branches: blocks side by side.
        router: "one_hot" (Gumbel: a path), "gates" (Gumbel: any set), or "relu_tanh" (weights that may be 0).

    Returns:
        Stem, layers and head; the site of layer ``l`` is ``layers.l.routes.sites.0``.

    Raises:
        PliantError: where there are no layers or branches, or no such router.

    >>> from pliant.core.bind import sites
    >>> list(sites(supernet_routing(widths=(4, 8))))
    ['layers.0.routes.sites.0', 'layers.1.routes.sites.0']

    References:
        Survey section 2.1.3, Eq. 6. The general form is :class:`pliant.execute.Routes`, of any nodes and edges; this is its instance
        with one node per layer.
    """
    if not widths or branches < 1:
        raise PliantError(
            got=f"widths {tuple(widths)}, {branches} branches", expected="at least one of each", do="pass more"
        )
    bias, rule = chosen(ROUTERS, router, "router")

    def layer(inputs: int, outputs: int, stride: int) -> Single:
        edges = [(0, BasicBlock(inputs, outputs, stride)) for _ in range(branches)]
        return Single(Routes([Node(Site(RouteGate(inputs, branches, bias=bias), rule(), shape=(branches,)), edges)]))

    plan = zip((widths[0], *widths), widths, [1] + [2] * (len(widths) - 1), strict=False)
    stem = nn.Sequential(*conv_norm(in_chans, widths[0]), nn.ReLU())
    layers = nn.Sequential(*(layer(*each) for each in plan))
    return nn.Sequential(OrderedDict(stem=stem, layers=layers, head=PooledClassifier(widths[-1], num_classes)))
