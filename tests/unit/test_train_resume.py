"""Exact resume: killed in the middle, the run ends with the weights of one that wasn't; bad checkpoints are refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pliant
from pliant import PliantError
from pliant.core import files
from pliant.train import Fit, Phase, checkpoint, fit

SCRIPT = """
import itertools, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch, torch.nn.functional as F
from pliant.systems.depth.msdnet import msdnet
from pliant.train import Fit, Phase, fit

checkpoint, result, ready, stop = *sys.argv[1:4], int(sys.argv[4])
calls = itertools.count(1)
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
model = msdnet(10, 1, exits=3, base=1, step=1, channels=4, factors=(1, 2), bottlenecks=(1, 2))
data = SimpleNamespace(x=torch.randn(40, 1, 8, 8), y=torch.arange(40) % 10)

def jitter(x, generator):
    if next(calls) == stop:  # in the middle of an epoch: wait here to be killed
        Path(ready).touch()
        time.sleep(600)
    return x + 0.1 * torch.randn(x.shape, generator=generator)

def loss(y, trace, target, progress):
    return {"noise": 0.1 * torch.rand(()) * y.square().mean(),
            "exits": torch.stack([F.cross_entropy(e.logits, target) for e in trace.exits]).sum()}

phases = [Phase("heads", 2, lr=0.05, momentum=0.9, train=("heads.*",)),
          Phase("joint", 4, optimizer="adamw", lr=0.01, schedule="cosine", warmup=1)]
history = fit(model, data, loss, phases, options=Fit(batch_size=16, seed=3, augment=(jitter,), checkpoint=checkpoint))
torch.save({"weights": model.state_dict(), "history": history}, result)
"""


def call(folder, name, stop=0):
    (folder / "script.py").write_text(SCRIPT)
    arguments = [*(str(folder / f"{name}.{end}") for end in ("ckpt", "pt", "ready")), str(stop)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(folder / "script.py"), *arguments], stderr=subprocess.PIPE
    )


def finished(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def killed_when_ready(process, ready):
    until = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until, "it never came to where it should be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ready.unlink()


def test_killed_in_the_middle_and_resumed_the_weights_are_bitwise_those_of_an_uninterrupted_run(tmp_path):
    whole = call(tmp_path, "whole")
    # Three batches an epoch: killed in the second batch of epoch 2, and resumed there, in the second batch of epoch 5,
    # which is in the second phase.
    for stop, done in ((5, 1), (11, 4)):
        killed_when_ready(call(tmp_path, "killed", stop), tmp_path / "killed.ready")
        assert len(torch.load(tmp_path / "killed.ckpt")["history"]) == done
    last = call(tmp_path, "killed")
    finished(last)
    finished(whole)
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "killed"))
    assert len(one["history"]) == len(other["history"]) == 6
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for a, b in zip(one["history"], other["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


class Noisy(nn.Module):
    """Keeps what a state_dict leaves out: a buffer that isn't saved, and a rule with a generator of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        rule = pliant.rules.Random(0.5, torch.Generator().manual_seed(7))
        self.skip = pliant.execute.Skip(nn.Linear(3, 3), pliant.Site(nn.Flatten(0), rule))

    def forward(self, x):
        self.calls += 1
        return self.linear(self.skip(x)) * (1 + 0.01 * self.calls)


def points(rows=16):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(x=x, y=x.sum(1, keepdim=True))


def square(y, trace, target, progress):
    return {"square": (y - target).square().mean()}


PHASES = (Phase("one", 2, lr=0.05, momentum=0.9), Phase("two", 3, optimizer="adam", lr=0.01))


class Stop(Exception):
    """Ends a run."""


def run(path=None, *, stop=99, phases=PHASES, data=None, model=None, **kwargs):
    seen = []

    def on_epoch(row):
        seen.append(row)
        if len(seen) == stop:
            raise Stop

    if model is None:
        torch.manual_seed(0)
        model = Noisy()
    options = Fit(**{"batch_size": 8, "accelerator": "cpu", "checkpoint": path, "on_epoch": on_epoch, **kwargs})
    try:
        history = fit(model, data or points(), square, phases, options=options)
    except Stop:
        history = None
    return model, history, seen


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("every", [1, 2])
def test_stopped_after_any_epoch_it_resumes_exactly_what_no_state_dict_holds_included(tmp_path, stop, every):
    path = tmp_path / "deep" / "run.ckpt"
    run(path, stop=stop, every=every)
    model, history, _ = run(path, every=every)
    reference, expected, _ = run()
    assert [row["square"] for row in history] == [row["square"] for row in expected]
    for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.calls, reference.calls)
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]


def test_a_run_that_had_ended_returns_its_history_and_weights_at_once(tmp_path):
    first, history, _ = run(tmp_path / "run.ckpt")
    again, same, seen = run(tmp_path / "run.ckpt")
    assert same == history
    assert seen == []
    assert torch.equal(again.linear.weight, first.linear.weight)


def test_a_truncated_a_flipped_and_a_foreign_file_are_refused_and_kept(tmp_path):
    path = tmp_path / "run.ckpt"
    run(path, stop=2)
    whole = path.read_bytes()
    bad = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [
        b"not a checkpoint at all",
        b"\x80\x04N.",
    ]
    at = whole.index(torch.load(path)["model"]["state_dict"]["linear.weight"].numpy().tobytes())
    bad.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(PliantError, match=r"cannot be read|has not written"):
            run(path)
        assert path.read_bytes() == content
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(PliantError, match="fit has not written"):
        run(path)


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": checkpoint.FORMAT, "identity": Evil()}, tmp_path / "run.ckpt")
    with pytest.raises(PliantError, match="cannot be read"):
        run(tmp_path / "run.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"phases": (PHASES[0], replace(PHASES[1], lr=0.02))}, r"another plan \(lr: 0.01 there, 0.02 here\)"),
    ({"phases": PHASES[:1]}, r"another plan \(2 phases there, 1 here\)"),
    ({"batch_size": 4}, r"another options \(batch_size: 8 there, 4 here\)"),
    ({"seed": 1}, "seed"),
    ({"precision": "bf16-mixed"}, "precision"),
    ({"model": nn.Linear(3, 1)}, "another model"),
    ({"data": points(17)}, "another data"),
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    run(tmp_path / "run.ckpt", stop=1)
    with pytest.raises(PliantError, match=message):
        run(tmp_path / "run.ckpt", **change)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    run(path, stop=1)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        run(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(run(path)[1]) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
