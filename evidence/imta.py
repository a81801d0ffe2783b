"""IMTA: gradients at the first block by number of exits; its two stages against plain training of MSDNet."""

from __future__ import annotations

from statistics import mean

import torch
from _chains import accuracies
from _common import ALL_EXITS, fashion, percent, phase, seeded, told, trained

from pliant import create_model, masked, record
from pliant.losses import MultiExit
from pliant.reproduce import Claim, Lab
from pliant.systems.depth.imta import stages

ROWS, EPOCHS, SEEDS = 3_000, (5, 3), (0, 1, 2)
INITS = range(10)
DATA = told(ROWS, "; the YAML's claim is for CIFAR-100")
CONFIG = {"in_chans": 1, "exits": 4, "base": 1, "step": 1, "channels": 6, "growth": 6, "head_channels": 16}
DEPTHS = (2, 4, 6, 8, 10)
GAMMA, TEMPERATURE = 0.1, 1.0  # as released


def norm(id: str, exits: int, x: torch.Tensor, y: torch.Tensor) -> float:
    """Norm of the gradient at the first block of an untrained network, mean of ten initialisations."""
    found = []
    for seed in INITS:
        net = seeded(seed, lambda: create_model(id, **{**CONFIG, "exits": exits, "reduction": 0.0})).train()
        prediction, trace = record(net)(x)
        MultiExit()(prediction, trace, y, 0.0).backward()
        grads = [p.grad.flatten() for p in net.stages[0].parameters() if p.grad is not None]
        found.append(float(torch.cat(grads).norm()))
    return mean(found)


def forward_gap(x: torch.Tensor) -> float:
    """Largest difference between the exits' answers of MSDNet and of IMTA with its weights, before its inline layers learn."""
    plain, ours = (create_model(id, **CONFIG).eval() for id in ("msdnet", "imta"))
    state = {}
    for name, tensor in plain.state_dict().items():
        head = name.startswith("heads.") and not name.startswith("heads.0.") and ".features." in name
        state[name.replace(".features.", ".features.features.", 1) if head else name] = tensor
    ours.load_state_dict(state, strict=False)
    with torch.no_grad():
        said = [record(masked(net))(x)[1].exits for net in (plain, ours)]
    return max(float((a.logits - b.logits).abs().max()) for a, b in zip(*said, strict=True))


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    x, y = data.train.x[:32], data.train.y[:32]
    norms = {id: [norm(id, k, x, y) for k in DEPTHS] for id in ("msdnet", "imta")}
    gains: dict[str, list[list[float]]] = {"trunk": [], "all": []}
    still = []
    for seed in SEEDS:
        plain = {}
        for what, epochs in (("trunk", EPOCHS[0]), ("all", sum(EPOCHS))):
            base = seeded(seed, lambda: create_model("msdnet", **CONFIG))
            trained(
                lab, f"MSDNet, {epochs} epochs, seed {seed}", base, data, [phase(epochs)], loss=ALL_EXITS, seed=seed
            )
            plain[what] = accuracies(base, data)
        ours = seeded(seed, lambda: create_model("imta", **CONFIG))
        recipe = stages(EPOCHS, gamma=GAMMA, temperature=TEMPERATURE, schedule="cosine", milestones=())
        trunk = {}
        for n, (loss, phases) in enumerate(recipe):
            trunk = {name: t.clone() for name, t in ours.state_dict().items() if name.startswith("stages.")}
            trained(lab, f"IMTA {n + 1}, seed {seed}", ours, data, phases, loss=loss, seed=seed)
        after = ours.state_dict()
        still.append(float(all(torch.equal(t, after[name]) for name, t in trunk.items())))
        for what, base in plain.items():
            gains[what].append([b - a for a, b in zip(base, accuracies(ours, data), strict=True)])
    means = {what: [mean(gain) for gain in found] for what, found in gains.items()}
    shown = {
        what: ", ".join(f"{100 * mean(e):+.2f}" for e in zip(*found, strict=True)) for what, found in gains.items()
    }
    growth = {id: found[-1] / found[0] for id, found in norms.items()}
    listed = {id: ", ".join(f"{v:.2f}" for v in found) for id, found in norms.items()}
    gap = forward_gap(x)
    return [
        Claim("answers are MSDNet's until the inline layers learn", f"{gap:.1e} largest difference", "0", gap == 0, [gap]),
        Claim("with 10 exits the gradient at the first block is no larger than with 2",
              f"{growth['imta']:.2f} times", "<= 1 time", max(norms["imta"]) <= norms["imta"][0], norms["imta"],
              f"2, 4, 6, 8, 10 exits: {listed['imta']}"),
        Claim("where MSDNet's grows with every pair of exits", f"{growth['msdnet']:.2f} times", "each larger than the one before",
              all(a < b for a, b in zip(norms["msdnet"], norms["msdnet"][1:], strict=False)), norms["msdnet"], f"2, 4, 6, 8, 10 exits: {listed['msdnet']}"),
        Claim("IMTA beats MSDNet whose trunk trained as many epochs, mean of exits", f"{percent(means['trunk'])} points", ">= +0.5 points (mean of seeds)",
              mean(means["trunk"]) >= 0.005, means["trunk"], f"gamma {GAMMA}, T {TEMPERATURE:g}; by exit, mean of seeds: {shown['trunk']} points"),
        Claim("and MSDNet trained as many epochs as both its stages", f"{percent(means['all'])} points", ">= +0.5 points (mean of seeds)",
              mean(means["all"]) >= 0.005, means["all"], f"by exit: {shown['all']} points; tried before: 4,000 rows, 4 + 3 epochs, -1.27 points;"
              " 5 + 2 epochs, gamma 0.5, T 3, -1.43 points, and -0.80 against the trunk's epochs"),
        Claim("the second stage leaves the trunk's weights and batch statistics to the byte",
              f"{sum(still):.0f} of {len(still)} networks", "all", all(still), still),
    ]  # fmt: skip
