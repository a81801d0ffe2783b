"""Cascade of neural network layers: one threshold for all layers of an MLP, and the same cascade cut over two processes."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch
from _common import fashion, held, percent, phase, seeded, told, trained
from torch import Tensor, nn

import pliant
from pliant.execute import Exits
from pliant.reproduce import Claim, Lab
from pliant.systems.depth.cascade_nn_layers import output_after_every
from pliant.tune import HeldOut

ROWS, EPOCHS, SEEDS, WIDTH, LAYERS, CUT = 20_000, 10, (0, 1, 2), 256, 5, 2
DATA = told(ROWS, "; an MLP of 5 hidden layers of 256; the paper's and the bound's MNIST isn't here")


def mlp() -> nn.Module:
    """An MLP with an output layer after each hidden layer."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU())
    layers = [first, *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS - 1))]
    return output_after_every(layers, [nn.Linear(WIDTH, 10) for _ in layers])


def one_threshold(val: HeldOut) -> float:
    """The cheapest threshold that costs no accuracy on held-out rows."""
    dense = val.correct[-1].double().mean().item()
    kept = [t for t in torch.linspace(0, 0.9, 181).tolist() if val.evaluate(torch.full((LAYERS - 1,), t))[0] >= dense]
    return max(kept, default=0.0)


class Remote(nn.Module):
    """The rest of a network, in another process: what comes in goes over the line, and the answer comes back."""

    def __init__(self, line: Connection) -> None:
        super().__init__()
        self.line, self.sent = line, 0

    def forward(self, x: Tensor) -> Tensor:
        self.sent += x.numel() * x.element_size()
        self.line.send(x.numpy())
        return torch.from_numpy(self.line.recv())


def serve(line: Connection, rest: Any) -> None:
    """Answer until the line closes."""
    torch.set_num_threads(1)
    with torch.no_grad():
        while (x := line.recv()) is not None:
            line.send(rest(torch.from_numpy(x)).numpy())


@torch.no_grad()
def split(model: Any, x: Tensor) -> tuple[Tensor, int]:
    """The answers of the cascade cut after ``CUT`` layers, and the bytes that went over the line."""
    rest = Exits(list(model.stages[CUT:]), list(model.heads[CUT:]), list(model.sites[CUT:])).eval()
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    server = fork.Process(target=serve, args=(there, rest))
    server.start()
    there.close()  # so that a server that breaks ends the line
    remote = Remote(here)
    stages = [*model.stages[:CUT], nn.Identity()]
    device = Exits(stages, [*model.heads[:CUT], remote], list(model.sites[:CUT])).eval()
    y = torch.cat([device(chunk) for chunk in x.split(100)])
    here.send(None)
    server.join()
    return y, remote.sent


def run(lab: Lab) -> list[Claim]:
    data = fashion(lab, ROWS)
    share, lost, exact, sent = [], [], [], []
    for seed in SEEDS:
        model: Any = trained(lab, f"seed {seed}", seeded(seed, mlp), data, [phase(EPOCHS, lr=0.05)], seed=seed)
        val, test = held(model, data)
        t = one_threshold(val)
        right, flops = test.evaluate(torch.full((LAYERS - 1,), t))
        share.append(flops / test.flops[-1].item())
        lost.append(test.correct[-1].double().mean().item() - right)
        model = pliant.bind(model, {"*": pliant.rules.Threshold(t)})
        x = data.test.x[:1000]
        with torch.no_grad():
            whole = torch.cat([model(chunk) for chunk in x.split(100)])
        y, bytes_ = split(model, x)
        on = int((test.leaves(torch.full((LAYERS - 1,), t))[:1000] >= CUT).sum())
        exact.append(torch.equal(y, whole))
        sent.append(bytes_ == on * WIDTH * 4)
    return [
        Claim("one threshold, chosen on held-out images so that nothing is lost there, halves the mean FLOPs", f"{percent(share)} % of dense",
              "<= 50 %", max(share) <= 0.5, share),
        Claim("and accuracy on test images stays", f"{percent(lost)} points lost", "<= 0.1 points", max(lost) <= 0.001, lost),
        Claim("cut over two processes the answers are the same bit by bit", "yes" if all(exact) else "no", "yes", all(exact), exact),
        Claim("and the bytes sent are those of the rows that went on times the activation at the cut", "yes" if all(sent) else "no", "yes",
              all(sent), sent),
    ]  # fmt: skip
