"""bind, masked, plain: copies of a model that share every tensor and differ in what decides or how it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor, Form
from pliant.core.site import Rule, Score, Site

# What wrappers put into paths; a site keeps its name inside them.
_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
    "_original_module.",
)


def clean(path: str) -> str:
    """A module path without the prefixes that wrappers add.

    >>> clean("module._orig_mod.exits.sites.0")
    'exits.sites.0'
    """
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path.removeprefix("module.")


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules()`` with the types that it really has."""
    yield from model.named_modules()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def sites(model: nn.Module) -> dict[str, Site]:
    """Every site of ``model`` by its path, in the order of ``named_modules()``."""
    return {clean(name): module for name, module in named(model) if isinstance(module, Site)}


def executors(model: nn.Module) -> Iterator[Executor]:
    """Every executor of ``model``."""
    return (module for module in model.modules() if isinstance(module, Executor))


def _tensors(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from module._parameters.values()  # pyright: ignore[reportPrivateUsage]
        yield from module._buffers.values()  # pyright: ignore[reportPrivateUsage]
        yield from (v for v in vars(module).values() if isinstance(v, (torch.Tensor, torch.Generator)))


def share(model: nn.Module) -> Any:
    """A copy of the module tree that holds the very same tensors."""
    memo: dict[int, Any] = {id(t): t for t in _tensors(model) if t is not None}
    return copy.deepcopy(model, memo)


Part = Rule | Score
"""What bind puts into a site: another rule, or another scorer."""


def bind(model: nn.Module, parts: Mapping[str, Part | tuple[Part, ...]]) -> Any:
    r"""A copy of ``model`` that shares every parameter and has other rules, or other scores, at the sites that match.

    Force, replay, ablate, budget and anneal are rules. The model itself isn't touched. Bind before wrapping in DDP or FSDP.

    Args:
        model: any module with sites.
        parts: from a pattern on site paths (``*`` and ``?`` as in file names) to the rule that shall decide there, the
            score that it shall read, or a tuple of both; every site gets copies of its own. Where several patterns match
            a site, the first one in the mapping wins.

    Returns:
        A module of the same type.

    Raises:
        PliantError: where a pattern matches no site, or a value is neither a rule nor a score.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4)
    >>> dense = bind(model, {"*": pliant.rules.Always()})
    >>> next(dense.parameters()) is next(model.parameters())
    True
    >>> doubtful = bind(model, {"*": pliant.scores.Entropy()})
    >>> type(pliant.sites(doubtful)["sites.0"].scorer).__name__, type(pliant.sites(doubtful)["sites.0"].rule).__name__
    ('Entropy', 'Threshold')
    """
    chosen = {pattern: value if isinstance(value, tuple) else (value,) for pattern, value in parts.items()}
    for pattern, values in chosen.items():
        for value in values:
            if not isinstance(value, (Rule, Score)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise PliantError(
                    got=f"a {type(value).__name__} for {pattern!r}",
                    expected="a Rule, a Score, or a tuple of them",
                    do="pass e.g. pliant.rules.Always()",
                )
    bound = share(model)
    found = sites(bound)
    for pattern in chosen:
        if not any(fnmatchcase(path, pattern) for path in found):
            raise PliantError(
                got=f"the pattern {pattern!r}",
                expected="one that matches a site of "
                + (", ".join(map(repr, list(found)[:8])) or "a model that has sites"),
                do="see pliant.sites(model) for the paths",
            )
    rules: list[Rule] = []
    for path, site in found.items():
        values = next((values for pattern, values in chosen.items() if fnmatchcase(path, pattern)), ())
        for value in values:
            # A part takes the site's mode: a fresh estimator would sample inside a network in evaluation.
            fresh = copy.deepcopy(value).train(site.training)
            if isinstance(fresh, Rule):
                fresh.replaces(site.rule)
                site.rule = fresh
                fresh.attach(path)
                rules.append(fresh)
            else:
                site.scorer = fresh
    for rule in rules:
        rule.settle(bound)
    return bound


def _with_form(model: nn.Module, form: Form) -> Any:
    other = share(model)
    for executor in executors(other):
        executor.form = form
    return other


def masked(model: nn.Module) -> Any:
    """The same decisions with everything computed: the reference for the gathered form. Shares every parameter."""
    return _with_form(model, "masked")


def gathered(model: nn.Module) -> Any:
    """The same decisions with only what was chosen computed, also while training. Shares every parameter."""
    return _with_form(model, "gathered")


def plain(model: nn.Module) -> Any:
    """The backbone alone, its costliest path with no site asked. Shares every parameter."""
    return _with_form(model, "plain")
