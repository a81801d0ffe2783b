"""Two CPU processes (gloo): a rate is that of the joint batch, and so is its gradient."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from pliant import Decision, Trace
from pliant.losses import GateL1, GlobalTargetRate, TargetRate

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from pliant import Decision, Trace
from pliant.losses import GateL1, GlobalTargetRate, TargetRate

dist.init_process_group("gloo")
rank = dist.get_rank()
whole = torch.load(sys.argv[1])
found = {}
for name, term in (("each", TargetRate(0.3)), ("mean", GlobalTargetRate(0.3)), ("l1", GateL1())):
    gates = {site: (v[:5] if rank == 0 else v[5:]).clone().requires_grad_() for site, v in whole.items()}
    trace = Trace({site: (Decision(v),) for site, v in gates.items()}, (), (), 5 if rank == 0 else 3)
    loss = term(torch.zeros(1), trace, torch.zeros(1), 0.0)
    loss.backward()
    found[name] = (loss.detach(), {site: v.grad for site, v in gates.items()})
torch.save(found, f"{sys.argv[2]}-{rank}.pt")
dist.destroy_process_group()
"""


def test_rates_and_gradients_are_those_of_the_joint_batch(tmp_path):
    whole = {"a": (torch.rand(8) > 0.4).float(), "b": (torch.rand(8) > 0.7).float()}
    torch.save(whole, tmp_path / "whole.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["torchrun", "--nproc-per-node=2", f"--master-port={port}", str(tmp_path / "script.py"), str(tmp_path / "whole.pt"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"out-{rank}.pt") for rank in (0, 1)]
    for name, term in (("each", TargetRate(0.3)), ("mean", GlobalTargetRate(0.3)), ("l1", GateL1())):
        gates = {site: v.clone().requires_grad_() for site, v in whole.items()}
        trace = Trace({site: (Decision(v),) for site, v in gates.items()}, (), (), 8)
        loss = term(torch.zeros(1), trace, torch.zeros(1), 0.0)
        loss.backward()
        for site, v in gates.items():
            # What training in several processes does: gradients averaged by rows. A row's own gradient is divided by its
            # process's rows, so times rows over all rows gives its part of the joint gradient.
            joint = torch.cat([ranks[rank][name][1][site] * (rows / 8) for rank, rows in ((0, 5), (1, 3))])
            torch.testing.assert_close(joint, v.grad)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss.detach())
