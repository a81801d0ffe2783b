"""Two CPU processes (gloo): identical weights, the joint batch's gradient, unused parameters, one checkpoint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "fabric_two_processes.py"
SCRIPT = """
import os, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch import nn
from pliant import PliantError
from pliant.systems.depth.msdnet import msdnet
from pliant.train import Fit, Phase, fit

folder = sys.argv[1]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)

    def forward(self, x):
        return self.two(self.one(x).tanh())

def square(y, trace, target, progress):
    return {"square": (y - target).square().mean()}

x = torch.randn(15, 3, generator=torch.Generator().manual_seed(2))
data = SimpleNamespace(x=x, y=x.sum(1, keepdim=True))
torch.manual_seed(int(os.environ.get("RANK", 0)))  # ranks start apart: fit has to make them one
net = Net()
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(net.state_dict(), f"{folder}/before-{sys.argv[2]}.pt")
# One step on the joint batch of 15 rows (8 and 7) with lr 1: the change of the weights is minus the gradient. Weight
# decay would move the unused parameters if their gradient were 0 instead of none.
history = fit(net, data, square, [Phase("one step", 1, lr=1.0, weight_decay=0.1)], options=Fit(batch_size=15))

images = SimpleNamespace(x=torch.randn(33, 1, 8, 8, generator=torch.Generator().manual_seed(1)), y=torch.arange(33) % 10)
torch.manual_seed(0)
model = msdnet(10, 1, exits=3, base=1, step=1, channels=4, factors=(1, 2), bottlenecks=(1, 2))
def exits(y, trace, target, progress):
    return {"exits": torch.stack([nn.functional.cross_entropy(e.logits, target) for e in trace.exits[:2]]).sum()}
phases = [Phase("heads", 1, lr=0.05, train=("heads.*",)), Phase("joint", 2, lr=0.05, momentum=0.9)]
options = Fit(batch_size=16, checkpoint=f"{folder}/run-{sys.argv[2]}.ckpt")
fit(model, images, exits, phases, options=options)

told = ""
def sick(y, trace, target, progress):
    bad = float("nan") if int(os.environ.get("RANK", 0)) == 1 else 1.0
    return {"sick": y.mean() * bad}
try:
    fit(Net(), data, sick, [Phase("p", 1)], options=Fit(batch_size=15))
except PliantError as error:
    told = str(error)
rank = os.environ.get("RANK", "0")
saved = {"net": net.state_dict(), "model": model.state_dict(), "history": history, "told": told}
torch.save(saved, f"{folder}/{sys.argv[2]}-{rank}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""


def environment():
    """Warnings are errors in the processes too; one thread each."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", "PATH": path}


def launched(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_example_runs_under_fabric_run():
    flags = ["--accelerator=cpu", "--strategy=ddp", "--devices=2", f"--main-port={free_port()}"]
    told = launched("fabric", "run", *flags, str(EXAMPLE))
    assert "processes: 2; weights identical in all of them: yes" in told


def test_two_processes_do_what_one_does_on_the_joint_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = f"--master-port={free_port()}"
    launched("torchrun", "--nproc-per-node=2", port, str(script), str(tmp_path), "two")
    launched(sys.executable, str(script), str(tmp_path), "one")
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("two-0", "two-1", "one-0"))
    before = torch.load(tmp_path / "before-two.pt")

    for part in ("net", "model"):  # batch norm's statistics included
        for name, weight in first[part].items():
            assert torch.equal(weight, second[part][name]), name
    for name, weight in first["net"].items():
        if name.startswith("unused"):
            assert torch.equal(weight, before[name])
        else:
            assert not torch.equal(weight, before[name])
            # float32 sums in another order, gradients of the order of 1: 1e-6 apart at most
            assert torch.allclose(weight, alone["net"][name], atol=1e-6, rtol=0)
    assert abs(first["history"][0]["square"] - alone["history"][0]["square"]) < 1e-6
    assert first["history"][0]["square"] == second["history"][0]["square"]

    for state in (first, second):  # NaN in one process is told in both, so that neither waits for the other
        assert "loss term 'sick'" in state["told"]
    assert len(torch.load(tmp_path / "run-two.ckpt")["history"]) == 3
