"""A policy that plans a ResNet-32's blocks: execution. What training buys (the YAML's claim 1) is BlockDrop's evidence."""

from __future__ import annotations

import torch
from torch import nn

from pliant import Site, bind, gathered, masked, plain, record, rules, scores
from pliant.data import load
from pliant.execute import Chain, Planned, Residual
from pliant.reproduce import Claim, Lab
from pliant.systems.backbones import resnet

torch.set_num_threads(1)
IMAGES, SEEDS = 96, (0, 1)
DATA = f"CIFAR-10: first {IMAGES} test images; weights at random, since only execution is asked"


def nets() -> tuple[nn.Module, Planned]:
    """A plain ResNet-32 and the same modules under a plan from a ResNet-8 of half the width."""
    backbone = resnet(10, 3, depth=32)
    small = resnet(10, 3, depth=8, widths=(8, 16, 32))
    blocks: list[nn.Module] = []
    for block in backbone.blocks:
        blocks += [Residual(block.branch, Site(nn.Identity(), rules.Always()), shortcut=block.shortcut), nn.ReLU()]
    features = nn.Sequential(scores.Shrink(16), small.stem, *small.blocks)
    policy = scores.Policy(features, 32, len(backbone.blocks), bias=0.0)
    nn.init.normal_(policy.linear.weight, std=1.0)
    site = Site(policy, rules.Threshold(0.0), shape=(len(backbone.blocks),))
    return backbone.model(), Planned(site, Chain(blocks), stem=backbone.stem, head=backbone.head)


@torch.no_grad()
def run(lab: Lab) -> list[Claim]:
    x = load("cifar10", lab.root, limit=200).test.x[:IMAGES]
    same, apart, counted, share, kinds = [], [], [], [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        backbone, net = nets()
        backbone.train()(torch.randn(64, 3, 32, 32))  # statistics for the batch norms
        net.train()(torch.randn(64, 3, 32, 32))
        backbone.eval(), net.eval()
        on = torch.ones(len(x), len(net.chain.gates) // 2)
        wanted = backbone(x)
        same.append(
            all(torch.equal(y, wanted) for y in (net(x, given=on), bind(net, {"*": rules.Always()})(x), plain(net)(x)))
        )
        g = torch.Generator().manual_seed(seed)
        for plan in (record(net)(x)[1].dense("site"), torch.randint(0, 2, on.shape, generator=g).float()):
            y = gathered(net)(x, given=plan)
            alone = torch.cat([net(r, given=p) for r, p in zip(x.split(1), plan.split(1), strict=True)])
            scale = y.abs().max()
            apart += [float((y - other).abs().max() / scale) for other in (alone, masked(net)(x, given=plan))]
            kinds.append(len(plan.unique(dim=0)))
        looks = record(net)(x)[1]
        counted.append(sum(n.choice == "score" for n in looks.notes) == 1)
        free = record(net)(x, given=looks.dense("site"))[1]
        share.append(float((looks.flops - free.flops).double().mean() / looks.dense_flops.double().mean()))
        lab.progress("plans", SEEDS.index(seed) + 1, len(SEEDS))
    return [
        Claim("everything on is the untouched backbone, bit for bit", "yes" if all(same) else "no", "yes", all(same), same),
        Claim("a batch under mixed plans equals its images one by one, and the masked form", f"{max(apart):.1e} of the largest logit", "<= 1e-5",
              max(apart) <= 1e-5, apart,
              f"{kinds} different plans among {IMAGES} images"),
        Claim("the policy is the only scorer that runs, and is paid for", f"{100 * max(share):.1f} % of the dense FLOPs", "a few % (<= 5 %)",
              all(counted) and max(share) <= 0.05, share),
    ]  # fmt: skip
