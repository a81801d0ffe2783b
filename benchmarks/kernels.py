"""What kernels that differ from row to row cost beside static ones, and deformable convolution beside torchvision's operator.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json

All calls of a row of the table run in turn on one thread, in evaluation, and their outputs are compared first. Figures are
medians over the rounds of the ratio within a round; milliseconds are minima. Processor time of the one thread.

- mixed: kernels mixed from 8 experts for each row, then one convolution; in times of the static convolution, with gradients in
  the second column (a training step by input and weights).
- all experts: every expert's convolution, outputs mixed; likewise.
- at once: kernels of the whole batch written out, then one grouped convolution; what public code does.
- deformable: torchvision's time over ours, without and with gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from common import ALLOCATORS, Call, allocator, assert_same, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.ops import deform_conv2d as theirs

from pliant.cost.meter import threads
from pliant.functional.deform import deform_conv2d
from pliant.functional.dynamic_conv import Geometry, conv_each, conv_then_mix, mix_kernels, mix_then_conv

SHAPES = [(32, 32, 8), (32, 16, 32), (64, 16, 8), (64, 16, 32), (128, 8, 8), (128, 8, 32), (256, 4, 32)]
"""Channels, side, rows."""
STAGES = [(64, 56, 1), (128, 28, 1), (128, 28, 8), (256, 14, 8), (512, 7, 8)]
"""Likewise, where a ResNet on photographs has deformable layers."""
EXPERTS, PAD = 8, Geometry(padding=1)


def stepped(call: Callable[[], Tensor], inputs: list[Tensor]) -> Call:
    """A training step: the call, and gradients of what it's made from."""
    return lambda: torch.autograd.grad(call().sum(), inputs)


def ratios(calls: dict[str, Call], rounds: int, over: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Medians of one call's time over another's."""
    seconds = in_turn(calls, rounds)["processor"]
    found = {
        name: statistics.median(a / b for a, b in zip(seconds[x], seconds[y], strict=True))
        for name, (x, y) in over.items()
    }
    return found | {f"{name} ms": 1e3 * min(times) for name, times in seconds.items()}


def kernels(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One row of the table of mixed kernels."""
    channels, side, rows = shape
    x, weights = torch.randn(rows, channels, side, side), torch.rand(rows, EXPERTS)
    experts = torch.randn(EXPERTS, channels, channels, 3, 3) / (9 * channels) ** 0.5
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "static": lambda x, w: F.conv2d(x, w[0], padding=1),
        "mixed": lambda x, w: mix_then_conv(x, weights, w, geometry=PAD),
        "all experts": lambda x, w: conv_then_mix(x, weights, w, geometry=PAD),
        "at once": lambda x, w: conv_each(x, mix_kernels(weights, w), geometry=PAD),
    }
    wanted = calls["mixed"](x, experts)
    for name in ("all experts", "at once"):
        assert_same(calls[name](x, experts), wanted, name, 1e-3)
    over = {name: (name, "static") for name in calls if name != "static"}
    with torch.no_grad():
        found = ratios({name: lambda c=c: c(x, experts) for name, c in calls.items()}, rounds, over)
    inputs = [x.clone().requires_grad_(), experts.clone().requires_grad_()]
    steps = {name: stepped(lambda c=c: c(*inputs), inputs) for name, c in calls.items()}
    trained = ratios(steps, max(3, rounds // 3), over)
    return {"channels": channels, "side": side, "rows": rows, "inference": found, "training": trained}


def deformable(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One row of the table of deformable convolution."""
    channels, side, rows = shape
    inputs = [
        torch.randn(rows, channels, side, side), torch.randn(rows, 18, side, side),
        torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5, torch.rand(rows, 9, side, side),
    ]  # fmt: skip

    def ours(x: Tensor, offsets: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(x, offsets, weight, mask=mask, geometry=PAD)

    def peer(x: Tensor, offsets: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return theirs(x, offsets, weight, padding=1, mask=mask)

    over = {"times faster": ("torchvision", "ours"), "over static": ("ours", "static")}
    with torch.no_grad():
        assert_same(ours(*inputs), peer(*inputs), "deformable")
        static: Call = lambda: F.conv2d(inputs[0], inputs[2], padding=1)  # noqa: E731
        calls: dict[str, Call] = {"ours": lambda: ours(*inputs), "torchvision": lambda: peer(*inputs), "static": static}
        found = ratios(calls, rounds, over)
    learned = [t.clone().requires_grad_() for t in inputs]
    steps = {
        "ours": stepped(lambda: ours(*learned), learned), "torchvision": stepped(lambda: peer(*learned), learned),
        "static": stepped(lambda: F.conv2d(learned[0], learned[2], padding=1), [learned[0], learned[2]]),
    }  # fmt: skip
    return {
        "channels": channels, "side": side, "rows": rows, "inference": found,
        "training": ratios(steps, max(3, rounds // 3), over),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--rounds", type=int, default=15, help="of each call; a third as many training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    memory = allocator(args.allocator)
    with threads(1):
        found = {
            "kernels": [kernels(shape, args.rounds) for shape in SHAPES],
            "deformable": [deformable(shape, args.rounds) for shape in (*SHAPES, *STAGES)],
            "environment": environment(args.seed, memory) | {"torchvision": torchvision.__version__},
        }
    save(args.json, found)
    console = Console()
    for title, columns in (
        ("kernels", ("mixed", "all experts", "at once")),
        ("deformable", ("times faster", "over static")),
    ):
        table = Table("channels", "side", "rows", *columns, *(f"{c}, training" for c in columns), title=title)
        for row in found[title]:
            numbers = [row[mode][c] for mode in ("inference", "training") for c in columns]
            table.add_row(*(str(row[k]) for k in ("channels", "side", "rows")), *(f"{n:.2f}" for n in numbers))
        console.print(table)
    console.print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {found['environment']['cpu']}")


if __name__ == "__main__":
    main()
