"""HyperLSTM: a character model against a layer-norm LSTM of as many parameters, and what its scales do."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from _soft import Same
from torch import Tensor, nn

from pliant import bind, create_model, plain, record
from pliant.execute.hyper import GrownConv2d, KernelGenerator
from pliant.reproduce import Claim, Lab, Table

torch.set_num_threads(1)
SEEDS, STEPS, BATCH, LENGTH, HIDDEN, HYPER, EMBEDDING = (0, 1, 2), 400, 64, 32, 64, 16, 4
DATA = (
    f"Tiny Shakespeare, characters: {STEPS} steps of {BATCH} pieces of {LENGTH}; bits per character on the last tenth of the text. The YAML's "
    "paper has Penn Treebank"
)


def text(lab: Lab) -> tuple[Tensor, Tensor, int]:
    """Training and test characters as numbers, and how many there are."""
    root = Path(os.environ["PLIANT_DATA"]) if lab.root is None else lab.root
    raw = gzip.decompress((root / "text_lm" / "tiny_shakespeare.txt.gz").read_bytes()).decode()
    known = {c: i for i, c in enumerate(sorted(set(raw)))}
    ids = torch.tensor([known[c] for c in raw])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(known)


def hyper(chars: int) -> Any:
    return create_model(
        "hypernetworks", num_classes=chars, in_chans=chars, hidden=HIDDEN, hyper=HYPER, embedding=EMBEDDING
    )


def lstm(chars: int, hidden: int) -> Any:
    return plain(create_model("hypernetworks", num_classes=chars, in_chans=chars, hidden=hidden, hyper=1, embedding=1))


def parameters(model: nn.Module, *, scorer: bool) -> int:
    """How many there are, with or without those of the small LSTM."""
    return sum(p.numel() for name, p in model.named_parameters() if scorer or ".site." not in name)


def pieces(ids: Tensor, starts: Tensor, chars: int) -> tuple[Tensor, Tensor]:
    """One-hot characters (R, C, T), and the ones that follow each (R, T)."""
    at = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return F.one_hot(at[:, :-1], chars).transpose(1, 2).float(), at[:, 1:]


def taught(model: nn.Module, ids: Tensor, chars: int, seed: int) -> nn.Module:
    """After so many steps of Adam with clipped gradients."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model.train()
    for _ in range(STEPS):
        x, y = pieces(ids, torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=g), chars)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor, chars: int) -> float:
    """Bits per character, each piece from an empty state, its first 8 characters not counted."""
    x, y = pieces(ids, torch.linspace(0, len(ids) - LENGTH - 1, 1_000).long(), chars)
    return float(F.cross_entropy(model(x)[:, :, 8:], y[:, 8:]) / math.log(2))


@torch.no_grad()
def scales(model: Any, ids: Tensor, chars: int) -> Tensor:
    """Everything the site decides on some pieces (T, R, 12, H)."""
    x, _ = pieces(ids, torch.linspace(0, len(ids) - LENGTH - 1, 200).long(), chars)
    _, trace = record(model)(x)
    return torch.stack([d.value for d in trace["loop.site"]])


@torch.no_grad()
def start(chars: int) -> tuple[float, float]:
    """A fresh HyperLSTM against the layer-norm LSTM whose matrices are 0.1 times its own; and two grown kernels of one embedding."""
    torch.manual_seed(0)
    model = hyper(chars).eval()
    small = hyper(chars).eval()
    small.load_state_dict(model.state_dict())
    small.loop.inputs.weight.mul_(0.1)
    small.loop.states.weight.mul_(0.1)
    x = torch.randn(4, chars, 12)
    generator = KernelGenerator(8, tile=4)
    one, other = GrownConv2d(generator, 8, 8), GrownConv2d(generator, 8, 8)
    other.z.copy_(one.z)
    maps = torch.randn(2, 8, 6, 6)
    return float((model(x) - plain(small)(x)).abs().max()), float((one(maps) - other(maps)).abs().max())


def run(lab: Lab) -> list[Claim | Table]:
    train, test, chars = text(lab)
    scaled, grown = start(chars)
    wanted = parameters(hyper(chars), scorer=True)
    width = next(h for h in range(HIDDEN, 4 * HIDDEN) if parameters(lstm(chars, h), scorer=False) >= wanted)
    ours, theirs, frozen, spread = [], [], [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = taught(hyper(chars), train, chars, seed)
        torch.manual_seed(seed)
        rival = taught(lstm(chars, width), train, chars, seed)
        ours.append(bits(model, test, chars))
        theirs.append(bits(rival, test, chars))
        seen = scales(model, train, chars)
        spread.append(float(seen[:, :, :8].std(0).mean()))
        frozen.append(bits(bind(model, {"*": Same(seen.mean((0, 1)))}), test, chars))
        lab.progress("characters", seed + 1, len(SEEDS))
    gain = [b - a for a, b in zip(ours, theirs, strict=True)]
    lost = [b - a for a, b in zip(ours, frozen, strict=True)]
    shown = {
        name: ", ".join(f"{v:.3f}" for v in each)
        for name, each in {"ours": ours, "theirs": theirs, "frozen": frozen}.items()
    }
    return [
        Claim("fewer bits per character than a layer-norm LSTM of as many parameters after as many steps, mean of 3 seeds",
              f"{mean(gain):.3f} fewer ({shown['ours']} against {shown['theirs']})", "> 0", mean(gain) > 0, gain,
              f"{wanted:,} parameters: {HIDDEN} units and {HYPER} small ones, against {width} units"),
        Claim("scales vary from step to step: their standard deviation over a piece's steps, mean over rows and gates",
              ", ".join(f"{s:.3f}" for s in spread), "> 0.01 (they start at 0.1)", min(spread) > 0.01, spread),
        Claim("freezing scales and biases at their means costs bits per character", f"{mean(lost):.3f} more ({shown['frozen']})", "> 0 in each seed",
              min(lost) > 0, lost),
        Claim("at its start it's the layer-norm LSTM with matrices scaled by 0.1", f"{scaled:.1e} largest difference", "<= 1e-5", scaled <= 1e-5, [scaled]),
        Claim("static form: kernels of two layers with equal embeddings are equal", f"{grown:.1e} largest difference", "0", grown == 0, [grown]),
        Table("Bits per character", ("network", *(f"seed {s}" for s in SEEDS)),
              [("HyperLSTM", *ours), ("layer-norm LSTM", *theirs), ("HyperLSTM, scales frozen", *frozen)]),
    ]  # fmt: skip
