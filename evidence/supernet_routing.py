"""SuperNet routing: sparse execution equals dense execution, runs exactly what is open, and takes the time of a path."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from pliant import Site, bind, create_model, gathered, masked, record, rules
from pliant.core.site import Outcome
from pliant.cost import interleaved
from pliant.execute import Node, Routes
from pliant.reproduce import Claim, Lab, Table
from pliant.scores import RouteGate
from pliant.systems.backbones import BasicBlock

torch.set_num_threads(1)
SEEDS = (0, 1, 2)
DATA = "none: random inputs and random gates; a layer of three nodes and seven edges, and the catalogue's network"
CHANNELS, SIDE, BATCH = 32, 16, 64


class Zeros(rules.Rule):
    """Weights, half of them exactly 0, the same for the same number of rows."""

    reads_scores = False

    def forward(self, scores: Tensor) -> Outcome:
        draw = torch.rand(scores.shape, generator=torch.Generator().manual_seed(scores.numel()))
        return Outcome((2 * draw - 1).relu(), weight=True)


def layer(rule) -> Routes:
    def node(targets: tuple[int, ...]) -> Node:
        site = Site(RouteGate(8, len(targets)), rule(), shape=(len(targets),))
        return Node(site, [(t, BasicBlock(8, 8)) for t in targets])

    return Routes([node((0, 1)), node((0, 1, 2)), node((1, 2))])


def run(lab: Lab) -> list[Claim | Table]:
    apart, exact, gaps = [], [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, x = layer(Zeros).eval(), [torch.randn(33, 8, 8, 8) for _ in range(3)]
        rows: dict[int, int] = {}
        for k, edge in enumerate(model.edges):
            edge.register_forward_pre_hook(lambda _, args, k=k, rows=rows: rows.__setitem__(k, len(args[0])))
        with torch.no_grad():
            y, trace = record(model)(x)
            ran = [rows.get(k, 0) for k in range(len(model.edges))]
            wanted = torch.cat([(trace[site][0].value > 0).sum(0) for site in trace]).tolist()
            exact.append(float(ran == wanted))
            ref = masked(model)(x)
        apart.append(max(float((a - b).abs().max()) for a, b in zip(y, ref, strict=True)))
        closed = bind(layer(rules.Never).eval(), {"*": rules.Never()})
        calls: list[int] = []
        for edge in closed.edges:
            edge.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
        closed(x)
        exact.append(float(sum(calls) == 0))
        gaps.append(_gradient_gap(seed))
        lab.progress("equality", seed + 1, len(SEEDS))
    table, ratios = [], []
    for branches in (2, 4, 8):
        for batch in (1, 8, BATCH):
            share = _share(branches, batch)
            table.append((branches, batch, share, share * branches))
            if batch == BATCH and branches > 2:
                ratios.append(share * branches)
        lab.progress("time", branches, 8)
    return [
        Claim(
            "gates with exact zeros: sparse execution equals dense execution",
            f"{max(apart):.1e} largest difference",
            "<= 1e-5",
            max(apart) <= 1e-5,
            apart,
        ),
        Claim(
            "each edge runs on exactly the samples whose gate is open, and on none where nobody's is",
            f"{sum(exact):.0f} of {len(exact)} cases",
            "all",
            min(exact) == 1,
            exact,
            "a target that nobody at all reaches learns its shape from a call with 0 samples",
        ),
        Claim(
            "L equal branches, one-hot gates, 64 rows: time as a share of all branches' for L = 4 and 8",
            ", ".join(f"{r:.2f}/L" for r in ratios),
            "< 1.8/L",
            max(ratios) < 1.8,
            ratios,
        ),
        Claim(
            "gradients of sparse mode equal those of dense mode (relative to the largest)",
            f"{max(gaps):.1e}",
            "<= 1e-5",
            max(gaps) <= 1e-5,
            gaps,
            "max(0, tanh) gates, each shut for some rows: where one is shut neither mode has a gradient",
        ),
        Table(
            "Seconds of one-hot routing over those of all branches, by batch",
            ("branches", "batch", "share", "share times L"),
            table,
        ),
    ]


def _gradient_gap(seed: int) -> float:
    """Of a training step's gradients in both forms, frozen statistics."""
    torch.manual_seed(seed)
    model, x = layer(rules.ReluTanh).eval(), [torch.randn(9, 8, 8, 8) for _ in range(3)]
    for site in model.sites:
        nn.init.normal_(site.scorer.linear.weight, std=3.0)
        nn.init.zeros_(site.scorer.linear.bias)
    found = []
    for form in (masked, gathered):
        loss = sum((y * (k + 1)).square().mean() for k, y in enumerate(form(model)(x)))
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(grads, model.parameters(), strict=True)
                ]
            )
        )
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


@torch.no_grad()
def _share(branches: int, batch: int) -> float:
    """Time of one-hot routing, random routes, over that of all branches in the same layer."""
    torch.manual_seed(0)
    model = create_model("supernet_routing", widths=(CHANNELS,), in_chans=CHANNELS, branches=branches).eval()
    layer_ = model.layers[0].routes
    nn.init.normal_(layer_.sites[0].scorer.linear.weight, std=5.0)
    x = [torch.randn(batch, CHANNELS, SIDE, SIDE)]
    every = bind(layer_, {"*": rules.Always()})
    found = interleaved({"one": lambda: layer_(x), "all": lambda: every(x)}, rounds=9, clock=time.thread_time)
    return found["one"].minimum / found["all"].minimum
