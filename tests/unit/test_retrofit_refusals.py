"""What can't be retrofitted is refused, with the reason and what can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import PliantError
from pliant.execute import Skip
from pliant.retrofit import exits

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers, one in a residual branch, one that runs twice; ``body`` may be changed."""

    def __init__(self, body: Callable[[Net, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.twice, self.layers = nn.Tanh(), nn.ModuleList([nn.Linear(6, 6)])
        self.body = body

    def forward(self, x: Tensor) -> Any:
        if self.body is not None:
            return self.body(self, x)
        x = self.twice(self.first(x))
        x = x + self.branch(x)
        return self.last(self.twice(self.layers[0](x)))


def time_first(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x.unsqueeze(0).expand(3, -1, -1)).mean(0))


def batch_again(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x))[torch.arange(len(x))]


def mixes_rows(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.last(h - h.mean(0))


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown name", {"at": ["frist"]}, r"'frist'.*such as \['first'"),
    ("a string", {"at": "first"}, "list of different layer names"),
    ("no name", {"at": []}, "list of different layer names"),
    ("a name twice", {"at": ["first", "first"]}, "list of different layer names"),
    ("the root", {"at": [""]}, "that of a submodule"),
    ("a container", {"at": ["layers"]}, "container isn't called itself.*'layers.0'"),
    ("inside another", {"at": ["layers.0", "layers"]}, "'layers.0' inside 'layers'"),
    ("a layer that runs twice", {"at": ["twice"]}, "runs 2 times"),
    ("another order", {"at": ["layers.0", "first"]}, r"pass at=\['first', 'layers.0'\]"),
    ("a residual branch", {"at": ["first", "branch"]}, "at site 'branch'.*rows can't leave"),
    ("too few heads", {"at": ["first"], "heads": []}, "0 heads"),
    ("a head of another size", {"at": ["first"], "heads": [nn.Linear(6, 3)]}, r"answers \(3, 3\)"),
    ("another number of classes", {"at": ["first"], "num_classes": 5}, r"answers \(3, 5\)"),
    ("an empty example", {"at": ["first"], "example": X[:0]}, "example without rows"),
    ("rows not first", {"model": Net(time_first), "at": ["first"]}, r"returns \(3, 3, 6\).*first dimension|time first"),
    ("the batch size again", {"model": Net(batch_again), "at": ["first"]}, "rows can't leave at: IndexError"),
    ("rows that mix", {"model": Net(mixes_rows), "at": ["first"]}, "answers of other rows change"),
    ("no logits", {"model": Net(lambda net, x: [net.first(x)]), "at": ["first"]}, "returns list"),
    ("a sum over rows", {"model": Net(lambda net, x: net.first(x).T), "at": ["first"]}, "rows first"),
    ("a compiled model", {"model": torch.compile(Net()), "at": ["first"]}, "hooks added after compilation"),
    ("a wrapped model", {"model": nn.DataParallel(Net()), "at": ["first"]}, "attach exits, then wrap"),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": Net(), "example": X, **changes}
    with pytest.raises(PliantError, match=message):
        exits(arguments.pop("model"), **arguments)


def test_a_compiled_part_is_refused() -> None:
    net = Net()
    net.layers[0].compile(backend="eager")
    with pytest.raises(PliantError, match="a compiled Linear"):
        exits(net, ["first"], example=X)


def test_exits_are_attached_once() -> None:
    with pytest.raises(PliantError, match="attached once"):
        exits(exits(Net(), ["first"], example=X), ["layers.0"], example=X)


def test_a_name_that_is_taken() -> None:
    net = Net()
    net.exits = nn.Identity()
    with pytest.raises(PliantError, match="attribute 'exits'"):
        exits(net, ["first"], example=X)


def test_a_layer_inside_a_dynamic_part() -> None:
    skip = Skip(nn.Sequential(nn.Linear(6, 6)), pliant.Site(nn.Flatten(0), pliant.rules.Always()))
    with pytest.raises(PliantError, match="inside the dynamic part '0'"):
        exits(nn.Sequential(skip, nn.Linear(6, 4)), ["0.block.0"], example=X)


def test_a_windowed_layer_of_swin() -> None:
    models = pytest.importorskip("timm", reason="needs timm")
    swin = models.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=4
    )
    with pytest.raises(PliantError, match=r"windows.*'layers.0.blocks.0"):
        exits(swin, ["layers.0.blocks.0.attn"], example=torch.randn(2, 3, 56, 56))


def test_labels_are_refused_at_the_call() -> None:
    class Labelled(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(x)

    model = exits(Labelled(), ["first"], example=X)
    with pytest.raises(PliantError, match="labels="):
        model(X, labels=torch.zeros(4))
    assert pliant.plain(model)(X, labels=torch.zeros(4)).shape == (4, 4)


def test_a_layer_that_does_not_run_at_a_call() -> None:
    def choose(net: Net, x: Tensor) -> Tensor:
        return net.last(net.first(x) if x.shape[1] == 6 else x[:, :6])

    model = exits(Net(choose), ["first"], example=X)
    with pytest.raises(PliantError, match="didn't run this layer"):
        model(torch.randn(4, 7))


def test_a_layer_that_runs_twice_at_a_call() -> None:
    def loop(net: Net, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] - 5):
            h = net.first(x[:, :6])
        return net.last(h)

    model = exits(Net(loop), ["first"], example=X, threshold=-1.0)
    with pytest.raises(PliantError, match="exit 0 after 1 others"):
        model(torch.randn(4, 7))


def test_a_criterion_without_one_score_a_row() -> None:
    class PerToken(pliant.Score):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = exits(Net(), ["first"], example=X, criterion=PerToken())
    with pytest.raises(PliantError, match="one value per row"):
        model(X)
