"""Plan: what shall be attached to a model, as data: to print before it's applied, to save, and to load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from pliant.core.bind import share
from pliant.core.calls import Call, call_of
from pliant.core.errors import PliantError
from pliant.core.files import atomic
from pliant.execute.tokens import Drop, Merge, Reduce
from pliant.retrofit import probe
from pliant.retrofit.attach import exits
from pliant.retrofit.channels import channels
from pliant.retrofit.experts import experts
from pliant.retrofit.skips import expanded, skips
from pliant.retrofit.tokens import tokens

VERSION = 1
WAYS: dict[str, Callable[[], Reduce]] = {"drop": Drop, "merge": Merge}


def _tokens(model: nn.Module, at: Sequence[str], *, how: str = "drop", **settings: Any) -> Any:
    if how not in WAYS:
        raise PliantError(
            got=f"how={how!r}", expected=f"one of {', '.join(WAYS)}", do="name what becomes of the others"
        )
    return tokens(model, at, how=WAYS[how](), **settings)


KINDS: dict[str, tuple[Callable[..., Any], str]] = {
    "exits": (exits, "before"),
    "skips": (skips, "inside"),
    "tokens": (_tokens, "behind"),
    "experts": (experts, "inside"),
    "channels": (channels, "inside"),
}
"""What attaches each kind, and which FLOPs a plan tells of it: those before its layer, inside or behind."""


@dataclass(frozen=True)
class Step:
    """One kind of thing at some layers.

    Args:
        kind: "exits", "skips", "tokens", "experts" or "channels".
        at: names of layers, or for all but exits patterns too.
        settings: as keyword arguments of that function that JSON can hold, such as ``threshold``.
    """

    kind: str
    at: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    r"""Steps that make a model dynamic, applied one after the other.

    >>> host = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    >>> x = torch.randn(3, 4)
    >>> plan = Plan().skips("1").exits("0", threshold=0.3)
    >>> print(plan.told(host, x))
    what   where  shape   FLOPs
    skips  1      (3, 4)    0.0 % inside
    exits  0      (3, 4)   57.1 % before
    >>> list(__import__("pliant").sites(plan.apply(host, x)))
    ['skips.0.site', 'exits.sites.0']

    References:
        Survey section 2.1.1.
    """

    steps: tuple[Step, ...] = ()

    def exits(self, *at: str, **settings: Any) -> Plan:
        """The plan with early exits after the layers ``at``; settings as for :func:`pliant.retrofit.exits`."""
        return self._with("exits", at, settings)

    def skips(self, *blocks: str, **settings: Any) -> Plan:
        """The plan with gates before ``blocks``; settings as for :func:`pliant.retrofit.skips`."""
        return self._with("skips", blocks, settings)

    def tokens(self, *at: str, **settings: Any) -> Plan:
        """The plan with tokens leaving after the layers ``at``; settings as for :func:`pliant.retrofit.tokens`, ``how`` by name:
        "drop" or "merge"."""
        return self._with("tokens", at, settings)

    def experts(self, *at: str, **settings: Any) -> Plan:
        """The plan with the feed-forward layers inside ``at`` split; settings as for :func:`pliant.retrofit.experts`."""
        return self._with("experts", at, settings)

    def channels(self, *at: str, **settings: Any) -> Plan:
        """The plan with channels chosen inside ``at``; settings as for :func:`pliant.retrofit.channels`."""
        return self._with("channels", at, settings)

    def _with(self, kind: str, at: Sequence[str], settings: dict[str, Any]) -> Plan:
        try:
            json.dumps(settings)
        except TypeError as error:
            raise PliantError(
                got=f"settings that no file can hold ({error})", expected="numbers, names and lists of them",
                do=f"call pliant.retrofit.{kind} itself for modules of your own",
            ) from error  # fmt: skip
        if not at or any(step.kind == kind for step in self.steps):
            raise PliantError(
                got=f"{len(at)} layers for {kind}" + (", which the plan has already" if at else ""),
                expected="each kind once, with its layers", do="name all of them in one call",
            )  # fmt: skip
        return Plan((*self.steps, Step(kind, tuple(at), settings)))

    def apply(self, model: nn.Module, example: Any) -> Any:
        """The dynamic model; ``model`` stays as it is.

        Raises:
            PliantError: as the functions do.
        """
        for step in self.steps:
            model = KINDS[step.kind][0](model, list(step.at), example=example, **step.settings)
        return model

    def told(self, model: nn.Module, example: Any) -> str:
        """A table: what, where, the hidden state there, and the share of the model's FLOPs before, inside or behind it.

        Raises:
            PliantError: where a layer isn't known or isn't called.
        """
        at = {step.kind: step.at if step.kind == "exits" else expanded(model, step.at) for step in self.steps}
        spent, shapes, total = _spent(model, call_of(example), {path for paths in at.values() for path in paths})
        rows = [("what", "where", "shape", "FLOPs")]
        for step in self.steps:
            for path in at[step.kind]:
                if path not in spent:
                    raise PliantError(
                        got=f"a layer that isn't called: {path!r}", expected="one that runs once a call",
                        do="see dict(model.named_modules()) for the names",
                    )  # fmt: skip
                before, after = spent[path]
                word = KINDS[step.kind][1]
                part = {"before": after, "inside": after - before, "behind": total - after}[word] / max(total, 1)
                rows.append((step.kind, path, str(shapes[path]), f"{part:6.1%} {word}".replace("%", " %")))
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join("  ".join([*(row[k].ljust(widths[k]) for k in range(3)), row[3]]).rstrip() for row in rows)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        steps = [{"kind": s.kind, "at": list(s.at), "settings": dict(s.settings)} for s in self.steps]
        with atomic(Path(path)) as part:
            part.write_text(json.dumps({"version": VERSION, "steps": steps}, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PliantError: where the file isn't one.
        """
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8"))
            steps = tuple(Step(s["kind"], tuple(map(str, s["at"])), dict(s["settings"])) for s in said["steps"])
            whole = said["version"] == VERSION and all(step.kind in KINDS for step in steps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _no_plan(path, f"{type(error).__name__}: {error}") from error
        if not whole:
            raise _no_plan(path, f"version {said['version']} with steps {[step.kind for step in steps]}")
        return Plan(steps)


def _no_plan(path: str | Path, got: str) -> PliantError:
    return PliantError(got=got, expected=f"a plan of version {VERSION} in {path}", do="write it with Plan.save")


def _spent(
    model: nn.Module, call: Call, names: set[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]], int]:
    """Of each layer: FLOPs when it begins and ends, and the shape that it returns; and all FLOPs of the call."""
    twin = share(model).eval()
    start: dict[str, int] = {}
    spent: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for path in names:
            layer = probe.module_of(twin, path)

            def begins(*_: Any, path: str = path) -> None:
                start[path] = counter.get_total_flops()

            def ends(_layer: Any, _args: Any, output: Any, path: str = path) -> None:
                spent[path] = start[path], counter.get_total_flops()
                tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
                shapes[path] = tuple(tensors[0].shape) if tensors else ()

            layer.register_forward_pre_hook(begins)
            layer.register_forward_hook(ends)
        twin(*call[0], **call[1])
        return spent, shapes, counter.get_total_flops()
