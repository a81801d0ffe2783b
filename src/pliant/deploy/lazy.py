"""lazy: what an exported graph computes for rows that nobody sent on is put behind an If, so that it doesn't run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_SCATTERS = ("ScatterND", "ScatterElements")
_KEEP_EMPTY = ("Transpose", "Squeeze", "Unsqueeze", "Cast", "Reshape", "Identity", "Slice", "Expand")
_WORTH_IT = ("Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "RNN")


@dataclass
class _Group:
    """Scatters whose indices all come from one NonZero, and the nodes that work for their updates alone."""

    rows: str
    scatters: list[Any]
    region: list[Any]


class _Graph:
    """What's needed to move nodes: the ONNX package, types by name, and numbers for new names."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx = onnx
        self.types = {v.name: v for v in (*graph.value_info, *graph.output)}
        self.taken = 0

    def name(self, of: str) -> str:
        self.taken += 1
        return f"{of}_if{self.taken}"


def put_behind_ifs(onnx: Any, graph: Any) -> None:
    r"""Move what's computed only to be scattered at the rows that a NonZero found into an If, in ``graph`` itself.

    .. math:: \mathrm{scatter}(x, i, f(x_i)) = x \quad \text{where } i \text{ is empty}

    So nothing that works for the updates alone has to run then: not a rule about this library's graphs, but about scatters. Weights
    that only such nodes read move with them.

    Args:
        onnx: the package.
        graph: a GraphProto whose values have types; changed in place.
    """
    known = _Graph(onnx, graph)
    nodes = _behind_ifs(known, list(graph.node), {value.name for value in graph.output})
    del graph.node[:]
    graph.node.extend(nodes)
    _move_weights(graph)


def _behind_ifs(known: _Graph, nodes: list[Any], needed: set[str]) -> list[Any]:
    """``nodes`` of one graph, in an order that runs, with every group that is worth it behind an If."""
    while True:
        groups = [g for g in _groups(nodes, needed) if any(n.op_type in _WORTH_IT for n in g.region)]
        groups = [g for g in groups if all(n.output[0] in known.types for n in g.scatters)]
        if not groups:
            return nodes
        outer = max(groups, key=lambda g: len(g.region))  # what lies within it is found when its branch is done
        made = _if(known, outer)
        gone = {id(n) for n in (*outer.region, *outer.scatters)}
        nodes = _ordered([*(n for n in nodes if id(n) not in gone), *made])


def _if(known: _Graph, group: _Group) -> list[Any]:
    """The nodes that ask whether there are rows, and the If."""
    helper, proto = known.onnx.helper, known.onnx.TensorProto
    size, zero, some = (known.name(f"{group.rows}_{part}") for part in ("size", "zero", "some"))
    branches: list[Any] = []
    for kind in ("then", "else"):
        outputs, last = [], []
        for scatter in group.scatters:
            told = known.onnx.ValueInfoProto()
            told.CopyFrom(known.types[scatter.output[0]])
            told.name = known.name(scatter.output[0])
            known.types[told.name] = told
            outputs.append(told)
            if kind == "then":
                node = known.onnx.NodeProto()
                node.CopyFrom(scatter)
                node.output[0] = told.name
            else:
                node = helper.make_node("Identity", [scatter.input[0]], [told.name], name=known.name("rows_stay"))
            last.append(node)
        nodes = [*(group.region if kind == "then" else []), *last]
        nodes = _behind_ifs(known, nodes, {value.name for value in outputs})
        branches.append(helper.make_graph(nodes, known.name(kind), [], outputs))
    return [
        helper.make_node("Size", [group.rows], [size], name=size),
        helper.make_node("Constant", [], [zero], name=zero, value=helper.make_tensor(zero, proto.INT64, [], [0])),
        helper.make_node("Greater", [size, zero], [some], name=some),
        helper.make_node(
            "If", [some], [n.output[0] for n in group.scatters], name=known.name("rows_go_on"),
            then_branch=branches[0], else_branch=branches[1],
        ),
    ]  # fmt: skip


def _groups(nodes: Sequence[Any], needed: set[str]) -> Iterator[_Group]:
    """Scatters by the NonZero that their indices come from."""
    source: dict[str, str] = {}
    found: dict[str, list[Any]] = {}
    for node in nodes:
        if node.op_type == "NonZero":
            source[node.output[0]] = node.output[0]
        elif node.op_type in _KEEP_EMPTY and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
        elif node.op_type in _SCATTERS and node.input[1] in source:
            found.setdefault(source[node.input[1]], []).append(node)
    for rows, scatters in found.items():
        region = _region(nodes, scatters, needed | {rows})
        behind = _behind(nodes, [n.output[0] for n in scatters])
        if not any(id(n) in behind for n in (*region, *scatters)):  # else the If would wait for itself
            yield _Group(rows, scatters, region)


def _region(nodes: Sequence[Any], scatters: Sequence[Any], needed: set[str]) -> list[Any]:
    """The nodes whose every result ends in the indices or updates of ``scatters``."""
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in _reads(node):
            readers.setdefault(name, []).append(node)
    own = {id(n) for n in scatters}
    bases = {n.input[0] for n in scatters}
    inside: dict[int, Any] = {}
    for node in reversed(nodes):
        results = [name for name in node.output if name]
        users = [reader for name in results for reader in readers.get(name, ())]
        outside = any(name in needed or name in bases for name in results)
        if users and not outside and id(node) not in own and all(id(u) in own or id(u) in inside for u in users):
            inside[id(node)] = node
    return [n for n in nodes if id(n) in inside]


def _behind(nodes: Sequence[Any], names: Iterable[str]) -> set[int]:
    """Nodes that read, over others or at once, one of ``names``."""
    reached, found = set(names), set[int]()
    for node in nodes:
        if any(name in reached for name in _reads(node)):
            found.add(id(node))
            reached.update(node.output)
    return found


def _reads(node: Any) -> set[str]:
    """What a node reads, its branches included."""
    names = {name for name in node.input if name}
    for graph in _branches(node):
        made = {name for n in graph.node for name in n.output} | {t.name for t in graph.initializer}
        made |= {value.name for value in graph.input}
        names |= {name for n in graph.node for name in _reads(n)} - made
    return names


def _branches(node: Any) -> list[Any]:
    return [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]


def _ordered(nodes: Sequence[Any]) -> list[Any]:
    """In an order that runs: each node behind those that make what it reads, otherwise as they stood."""
    maker = {name: node for node in nodes for name in node.output if name}
    place = {id(node): i for i, node in enumerate(nodes)}
    reads = {id(node): _reads(node) for node in nodes}
    done: set[int] = set()
    found: list[Any] = []
    for first in nodes:
        stack = [first]
        while stack:
            node = stack[-1]
            before = [maker[name] for name in reads[id(node)] if name in maker and id(maker[name]) not in done]
            stack.extend(sorted(before, key=lambda n: -place[id(n)]))
            if not before:
                stack.pop()
                if id(node) not in done:
                    done.add(id(node))
                    found.append(node)
    return found


def _move_weights(graph: Any) -> None:
    """Put weights that one branch alone reads into it, where ONNX Runtime lays them out as its kernels like them."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in _reads(node):
            readers.setdefault(name, []).append(node)
    fixed = {value.name for value in (*graph.input, *graph.output)}
    for i in reversed(range(len(graph.initializer))):
        weight = graph.initializer[i]
        branch = _only_branch(readers.get(weight.name, []), weight.name)
        if branch is not None and weight.name not in fixed:
            branch.initializer.append(weight)
            del graph.initializer[i]
    for node in graph.node:
        for branch in _branches(node):
            _move_weights(branch)


def _only_branch(users: Sequence[Any], name: str) -> Any:
    """The one branch that reads ``name``, if nothing else does."""
    if len(users) != 1 or name in users[0].input:
        return None
    found = [branch for branch in _branches(users[0]) if any(name in _reads(node) for node in branch.node)]
    return found[0] if len(found) == 1 else None
