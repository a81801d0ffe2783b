"""Account: a trace times the prices of its parts; executed, dense and expected cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.tape import SIZE
from pliant.core.trace import Accounts, Trace, install
from pliant.cost.count import Key, Part, Prices, Sizes, describe, prices


class Bill(Accounts):
    """The accounts of one call; the counting is done when first asked for."""

    def __init__(self, make: Callable[[Sizes], Prices]) -> None:
        self._make = make

    @functools.cached_property
    def prices(self) -> Prices:
        """FLOPs per row of every part when everything stays."""
        return self._make({})

    def prices_of(self, trace: Trace) -> Prices:
        """FLOPs per row of every part at the sizes that were decided, such as how many tokens stayed."""
        sizes = {
            (note.site, note.visit): int(note.units[0])
            for note in trace.notes
            if note.choice == SIZE and note.units is not None and len(note.units)
        }
        return self._make(sizes) if sizes else self.prices

    def flops(self, trace: Trace) -> Tensor:
        """Executed: each note's units times the price of its part."""
        table = self.prices_of(trace)
        total = torch.full((trace.batch,), table.root.own, dtype=torch.int64)
        for note in trace.notes:
            part = table.part((note.site, note.visit, note.choice))
            price, units = (part.own, 1) if note.units is None else (part.own // part.of, note.units.cpu())
            if note.rows is None:
                total += price * units
            else:
                rows = note.rows.cpu()
                total.index_add_(0, rows, torch.zeros_like(rows) + price * units)
        return total

    def dense_flops(self, trace: Trace) -> Tensor:
        """Every site at its costliest alternative."""
        return torch.full((trace.batch,), _dense(self.prices, self.prices.root), dtype=torch.int64)

    def within(self, flops: float, paths: Sequence[str]) -> frozenset[str]:
        """Which of the sites ``paths`` may spend so that no row's cost exceeds ``flops``, the first ones first."""
        table = self.prices
        low, high = (_most(table, table.root, shut) for shut in (frozenset(paths), frozenset[str]()))
        if not low <= flops:
            raise PliantError(
                got=f"a budget of {flops:,.0f} FLOPs per row",
                expected=f"at least the cheapest path's {low:,} (dense: {high:,})",
                do="raise the budget, or bind the rule to more sites",
            )
        ran = dict.fromkeys(path for path, _, _ in table.parts if path in set(paths))  # in the order of execution
        shut = frozenset(paths)
        for path in ran:
            if _most(table, table.root, shut - {path}) <= flops:
                shut -= {path}
        return frozenset(paths) - shut


def _alternatives(table: Prices, part: Part) -> list[tuple[tuple[str, int], dict[str, list[Key]]]]:
    """The sites decided inside ``part``, each with the parts of its alternatives: "1/a" and "1/b" are both of "1"."""
    found: dict[tuple[str, int], dict[str, list[Key]]] = {}
    for key in part.inner:
        found.setdefault(key[:2], {}).setdefault(key[2].partition("/")[0], []).append(key)
    return list(found.items())


def _dense(table: Prices, part: Part) -> int:
    return _most(table, part, frozenset())


def _most(table: Prices, part: Part, shut: frozenset[str]) -> int:
    """The most that a row can pay for ``part`` when the sites ``shut`` save unasked."""
    total = part.own
    for (path, _), choices in _alternatives(table, part):
        costs = {choice: sum(_most(table, table.part(key), shut) for key in keys) for choice, keys in choices.items()}
        if path in shut:
            total += costs.get("0", 0)
        else:
            total += costs.pop("score", 0)
            total += max(costs.values(), default=0)
    return total


def expected_flops(trace: Trace) -> Tensor:
    r"""What each row would cost on average if its sites drew their values by their soft ones: differentiable.

    .. math:: E(\text{part}) = c_\text{part} + \sum_{\text{sites inside}} v\, E(\text{on}) + (1 - v)\, E(\text{off})

    Shape:
        Returns :math:`(R,)`, floating point, FLOPs.

    Args:
        trace: from ``record(model)(x)``; a site without a soft value counts with its hard one.

    Returns:
        Expected FLOPs per row.

    >>> import pliant
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=3, base=1, step=1, channels=4).eval()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(1, 3, 32, 32))
    >>> bool(expected_flops(trace) == trace.flops)
    True

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, CVPR 2020.
    """
    table = _prices_of(trace)
    return torch.as_tensor(_expected(trace, table, table.root), dtype=torch.float64).expand(trace.batch)


def expected_shares(trace: Trace) -> dict[str, Tensor]:
    r"""Of every site: what its alternatives would cost on average over what the costliest one costs: differentiable.

    .. math:: s = \frac{v\, E(\text{on}) + (1 - v)\, E(\text{off})}{\max(c_\text{on}, c_\text{off})}

    The score isn't counted, since it's spent whatever is decided. Sites that control nothing that costs are left out.

    Shape:
        Each :math:`(n,)`, floating point: one for each visit and each row that came there.

    Args:
        trace: from ``record(model)(x)``; a site without a soft value counts with its hard one.

    Returns:
        From site to shares, in the order of the network.

    >>> import pliant
    >>> model = pliant.create_model("convnet_aig", depth=8).eval()
    >>> _, trace = pliant.record(pliant.bind(model, {"*": pliant.rules.Always()}))(torch.zeros(1, 3, 8, 8))
    >>> {site: s.tolist() for site, s in expected_shares(trace).items()}["blocks.0.residual.site"]
    [1.0]

    References:
        Survey section 5.2.1 (2); Verelst and Tuytelaars, CVPR 2020.
    """
    table = _prices_of(trace)
    found: dict[str, list[Tensor]] = {}
    for part in (table.root, *table.parts.values()):
        for (site, _), choices in _alternatives(table, part):
            dense = {choice: sum(_dense(table, table.part(key)) for key in keys) for choice, keys in choices.items()}
            most = max((cost for choice, cost in dense.items() if choice != "score"), default=0)
            for d in trace.visits.get(site, ()) if most and site not in found else ():
                whole = torch.as_tensor(_chosen(trace, table, d, choices)).expand(trace.batch) / most
                found.setdefault(site, []).append(whole if d.rows is None else whole[d.rows])
    return {site: torch.cat(shares) for site, shares in found.items()}


def _prices_of(trace: Trace) -> Prices:
    bill = trace._priced()
    if not isinstance(bill, Bill):
        raise TypeError("priced by another accountant")
    return bill.prices_of(trace)


def _expected(trace: Trace, table: Prices, part: Part) -> Tensor | float:
    """What a part costs on average, those inside it included."""
    return float(part.own) + _inside(trace, table, part)


def _inside(trace: Trace, table: Prices, part: Part) -> Tensor | float:
    """What the sites decided inside a part cost on average."""
    total: Tensor | float = 0.0
    for (site, visit), choices in _alternatives(table, part):
        for key in choices.get("score", ()):
            total = total + _expected(trace, table, table.part(key))
        found = [d for d in trace.visits.get(site, ()) if d.visit == visit]
        if found:
            total = total + _chosen(trace, table, found[0], choices)
    return total


def _chosen(trace: Trace, table: Prices, decision: Decision, choices: dict[str, list[Key]]) -> Tensor | float:
    """What the alternatives of one decision cost on average."""
    v = _whole(decision, trace.batch).double()
    total: Tensor | float = 0.0
    for key in (key for choice, keys in choices.items() if choice != "score" for key in keys):
        part = table.part(key)
        if decision.value.ndim > 1:  # the value is a choice among units, which the executor has added up
            total = total + part.own / part.of * _wanted(trace, key, part.of) + _inside(trace, table, part)
        else:
            total = total + (v if key[2].startswith("1") else 1 - v) * _expected(trace, table, part)
    return total


def _wanted(trace: Trace, key: Key, of: int) -> Tensor | float:
    """The units of a part, ``of`` in all, that each row of the batch asks for; 0 where nothing ran for it."""
    total: Tensor | float = 0.0
    for note in trace.notes:
        if (note.site, note.visit, note.choice) != key:
            continue
        units = note.units if note.wanted is None else note.wanted
        if note.rows is None:
            total = total + (of if units is None else units.double())
        else:
            here = torch.full_like(note.rows, of, dtype=torch.float64) if units is None else units.double()
            total = total + here.new_zeros(trace.batch).index_add(0, note.rows, here)
    return total


def _whole(decision: Decision, batch: int) -> Tensor:
    """Soft value over the batch, whoever really came here: being reached is the outer sites' factor already."""
    value = decision.value if decision.soft is None else decision.soft
    if decision.rows is None:
        return value
    return value.new_zeros((batch, *value.shape[1:])).index_copy(0, decision.rows, value)


def accounts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bill:
    """The accounts of a call of ``model``; nothing is counted before it's asked for."""
    call = describe(args, kwargs)
    return Bill(lambda sizes: prices(model, call, sizes))


install(accounts)
