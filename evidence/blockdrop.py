"""BlockDrop: blocks kept and accuracy after all phases, paths, what a wrong answer's price does, and the curriculum."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from _common import LAST_ONLY, fashion, faster, percent, phase, seeded, told, trained
from torch import Tensor, nn

import pliant
from pliant import create_model, estimators, rules
from pliant.data import Dataset
from pliant.losses import BlockDropReward, CrossEntropy, EntropyBonus, SelfCritical, Total
from pliant.reproduce import Claim, Lab, Table
from pliant.study import accuracy
from pliant.train import PlanCurriculum, agent_on_backbone

ROWS, SEEDS, EPOCHS, DEPTH, WIDTHS = 3000, (0, 1), (8, 14, 20), 20, (8, 16, 32)
BLOCKS, GAMMAS = (DEPTH - 2) // 2, (2.0, 10.0)
DATA = told(
    ROWS,
    f"; ResNet-{DEPTH} of half the width, {BLOCKS} blocks, instead of CIFAR-10 and ResNet-32; policy of widths 4, 8, 16",
)
RULE = estimators.ScoreFunction(rules.Threshold(0.0), floor=0.8)


@torch.no_grad()
def plans(model: nn.Module, x: Tensor) -> Tensor:
    """Which blocks each image runs, (images, blocks)."""
    return torch.cat([pliant.record(model)(some)[1].dense("site") for some in x.split(500)])


@torch.no_grad()
def reward(model: nn.Module, data: Dataset, gamma: float) -> float:
    """BlockDrop's reward of the greedy plan, mean over test images."""
    found = []
    for x, y in zip(data.test.x.split(500), data.test.y.split(500), strict=True):
        said, trace = pliant.record(model)(x)
        found.append(BlockDropReward(gamma=gamma)(said, trace, y))
    return float(torch.cat(found).mean())


def phases(gamma: float, curriculum: bool):
    """The agent on the frozen network at gamma 1, the paper's default, then both; less noise once the network learns too."""
    agent = Total({"policy": (1.0, SelfCritical(BlockDropReward(gamma=1.0))), "entropy": (0.01, EntropyBonus())})
    joint = Total({"policy": (1.0, SelfCritical(BlockDropReward(gamma=gamma))), "task": (1.0, CrossEntropy())})
    settings = phase(1, optimizer="adam", lr=2e-3, momentum=0.0, nesterov=False, schedule="constant")
    freed = PlanCurriculum("site", BLOCKS, RULE) if curriculum else {"*": RULE}
    _, second, third = agent_on_backbone(settings=settings, sampled=freed, reward=agent, epochs=EPOCHS)
    calm = {"*": estimators.ScoreFunction(rules.Threshold(0.0), floor=0.95)}
    return second, replace(third, loss=joint, lr=1e-3, schedule="cosine", rules=calm)


def run(lab: Lab) -> list[Claim | Table]:
    data = fashion(lab, ROWS)
    kept, more, lost, paths, harder, ahead, speed, rows = ([] for _ in range(8))
    for seed in SEEDS:
        start = seeded(
            seed, lambda: create_model("blockdrop", in_chans=1, depth=DEPTH, widths=WIDTHS, policy=(4, 8, 16))
        )
        always = pliant.plain(start)
        trained(lab, f"backbone, seed {seed}", always, data, [phase(EPOCHS[0])], loss=LAST_ONLY, seed=seed)
        full = accuracy(always.eval(), data.test)[0]
        used, agent = {}, copy.deepcopy(start)
        free = copy.deepcopy(start)
        for what, model, curriculum in (("policy", agent, True), ("without curriculum", free, False)):
            first = phases(GAMMAS[0], curriculum=curriculum)[0]
            trained(lab, f"{what}, seed {seed}", model, data, [first], loss=LAST_ONLY, seed=seed)
        ahead.append(reward(agent.eval(), data, 1.0) - reward(free.eval(), data, 1.0))
        for gamma in GAMMAS:
            model, joint = copy.deepcopy(agent), phases(gamma, curriculum=True)[1]
            trained(lab, f"together, gamma {gamma:g}, seed {seed}", model, data, [joint], loss=LAST_ONLY, seed=seed)
            plan, got = plans(model, data.test.x), accuracy(model, data.test)[0]
            used[gamma] = float(plan.mean())
            rows.append((seed, gamma, used[gamma], got, full))
            if gamma == GAMMAS[0]:
                with torch.no_grad():
                    sure = torch.cat([model(x).softmax(1).amax(1) for x in data.test.x.split(500)])
                order, count = sure.argsort(), len(sure) // 5
                kept.append(used[gamma])
                lost.append(full - got)
                paths.append(len(plan.unique(dim=0)))
                harder.append(float(plan[order[:count]].sum(1).mean() - plan[order[-count:]].sum(1).mean()))
                speed.append(faster(always, model, data.test.x[:60], batch=1))
        more.append(used[GAMMAS[1]] - used[GAMMAS[0]])
    return [
        Claim("at most 60 % of the blocks run after all phases", f"{percent(kept)} %", "<= 60 %", max(kept) <= 0.6, kept,
              f"gamma {GAMMAS[0]:g}; tried before: gamma 2 from the start, 9 and 5 epochs, as much noise in both phases: 91 %, 3.7 points lost"),
        Claim("and accuracy stays", f"{percent(lost)} points below the pre-trained network", "<= 1 point", max(lost) <= 0.01, lost),
        Claim(f"gamma {GAMMAS[1]:g} keeps more blocks than {GAMMAS[0]:g}", f"{percent(more)} points", "> 0", min(more) > 0, more),
        Claim("different paths over 4,000 test images", ", ".join(map(str, paths)), ">= 10 on 10k", min(paths) >= 10, paths),
        Claim("the least sure fifth of the images runs more blocks than the surest", ", ".join(f"{h:+.2f}" for h in harder), "> 0", min(harder) > 0, harder),
        Claim("with the curriculum the reward after as many epochs is higher", ", ".join(f"{a:+.3f}" for a in ahead), "> 0", min(ahead) > 0, ahead,
              "greedy plan, test images"),
        Claim("batch 1, policy and all: as fast as the whole network or faster", ", ".join(f"{s:.2f}" for s in speed), "> 1 times", min(speed) > 1, speed,
              "processor time against the same network without policy"),
        Table("After all phases", ("seed", "gamma", "blocks", "accuracy", "all blocks"), rows),
    ]  # fmt: skip
