"""Backbone and decision maker in phases: what a phase leaves alone, and a run interrupted in the middle of one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _common import fashion, phase, seeded, told

from pliant import create_model, record, rules, sites
from pliant.estimators import ScoreFunction
from pliant.losses import CrossEntropy, Total
from pliant.reproduce import Claim, Lab
from pliant.study import accuracy
from pliant.train import Curriculum, Fit, agent_on_backbone, alternating, fit

ROWS, SEEDS = 512, (0, 1)
DATA = told(ROWS, "; a gated ResNet-8")
TASK = Total({"task": (1.0, CrossEntropy())})


def build():
    return create_model("convnet_aig", in_chans=1, depth=8)


def reward(y, trace, target, progress):
    """Cross-entropy, and the score function of "right, at a low cost" with the batch's mean as baseline."""
    gain = (y.argmax(-1) == target).float() - 0.5 * (trace.flops / trace.dense_flops).float()
    told_of = [d.log_prob for path in trace for d in trace[path] if d.log_prob is not None]
    chosen = torch.stack(told_of).sum(0) if told_of else torch.zeros_like(gain)
    return {**TASK(y, trace, target, progress), "agent": -((gain - gain.mean()) * chosen).mean()}


def phases(model):
    """BlockDrop's three, with a curriculum over the blocks, and one turn of net and agent."""
    freed = Curriculum(tuple(sites(model)), free={"*": ScoreFunction(rules.Threshold(0.0))})
    three = agent_on_backbone(settings=phase(1, lr=0.05), sampled=freed, reward=reward, epochs=(2, 3, 1))
    net = phase(1, name="net", lr=0.02, train=three[0].train)
    agent = phase(1, name="agent again", lr=0.02, train=three[1].train, rules=three[2].rules, loss=reward)
    return [*three, *alternating(net, agent, 1)]


def apart(before, after):
    """Names of the tensors that differ by a byte."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Interrupted(Exception):
    """Ends a run."""


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    touched, differ, trained, right, shares = [], [], [], [], []
    for seed in SEEDS:
        model = seeded(seed, build)
        plan = phases(model)
        for each in plan:  # one by one, to look at the weights in between
            before = state(model)
            fit(model, data.train, TASK, [each], options=Fit(seed=seed))
            changed = apart(before, state(model))
            if each.train != ("*",):
                agent = "*scorer*" in each.train
                touched.append(float(sum(("scorer" in name) != agent for name in changed)))
            trained.append(float(len(changed)))
            lab.progress(f"seed {seed}: {each.name}", plan.index(each) + 1, len(plan))
        right.append(accuracy(model.eval(), data.test)[0])
        with torch.no_grad():
            trace = record(model)(data.test.x[:1000])[1]
        shares.append((trace.flops / trace.dense_flops).mean().item())
        differ.append(float(_interrupted(lab, data, seed)))
    return [
        Claim("tensors outside a phase's trainable set that changed by a byte, buffers of batch norm included",
              f"{sum(touched):.0f} in {len(touched)} phases", "0", not any(touched) and all(trained), touched,
              f"in the phases {min(trained):.0f} to {max(trained):.0f} tensors did change"),
        Claim("tensors that differ after an interruption in the middle of phase 2 and a resume from those of a run without",
              f"{sum(differ):.0f}", "0", not any(differ), differ,
              "phase 2 is the agent's, under a curriculum and with draws; one epoch of its three was done"),
        Claim("what the phases make of the network: accuracy, and share of the dense FLOPs",
              f"{', '.join(f'{100 * r:.1f} % at {100 * s:.0f} %' for r, s in zip(right, shares, strict=True))}",
              "reported", True, [*right, *shares]),
    ]  # fmt: skip


def _interrupted(lab: Lab, data, seed: int) -> int:
    """How many tensors differ between a run that was interrupted and one that wasn't."""
    whole = seeded(seed, build)
    fit(whole, data.train, TASK, phases(whole), options=Fit(seed=seed))
    done = 0

    def interrupt(entry):
        nonlocal done
        done += 1
        if done == 3:
            raise Interrupted

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        model = seeded(seed, build)
        try:
            fit(model, data.train, TASK, phases(model), options=Fit(seed=seed, checkpoint=path, on_epoch=interrupt))
        except Interrupted:
            lab.progress(f"seed {seed}: interrupted", 1, 1)
        model = seeded(seed + 99, build)  # other weights: all must come from the checkpoint
        fit(model, data.train, TASK, phases(model), options=Fit(seed=seed, checkpoint=path))
    return len(apart(state(whole), state(model)))
