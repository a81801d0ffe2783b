"""Nodes that work for rows alone move behind an If, and only those."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pliant.deploy.lazy import put_behind_ifs

onnx = pytest.importorskip("onnx", reason="the extra 'export' isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' isn't installed")
onnxruntime.set_default_logger_severity(3)

BEGIN = [
    ("NonZero", ["chosen"], ["found"]),
    ("Transpose", ["found"], ["index"]),
    ("Squeeze", ["index", "one"], ["flat"]),
]


def branch(kind: str, reads: str, made: str) -> Any:
    """A graph of one node on what the graph around it has."""
    value = onnx.helper.make_tensor_value_info(made, onnx.TensorProto.FLOAT, ["S", 3])
    return onnx.helper.make_graph([onnx.helper.make_node(kind, [reads], [made])], made, [], [value])


def model(nodes: list[Any], outputs: list[str]) -> Any:
    """A graph over ``x`` (R, 3) and ``chosen`` (R,)."""
    make, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    made = [n if isinstance(n, onnx.NodeProto) else onnx.helper.make_node(*n) for n in [*BEGIN, *nodes]]
    graph = onnx.helper.make_graph(
        made, "graph", [make("x", kinds.FLOAT, ["R", 3]), make("chosen", kinds.FLOAT, ["R"])],
        [make(name, kinds.FLOAT, ["S" if name == "worked" else "R", 3]) for name in outputs],
        [onnx.numpy_helper.from_array(a, name) for name, a in (
            ("one", np.array([1])), ("weight", np.eye(3, dtype=np.float32) * 2), ("again", np.eye(3, dtype=np.float32) + 1),
        )],
        value_info=[make(name, kinds.FLOAT, ["S", 3]) for name in ("first", "second") if name not in outputs],
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def run(proto: Any, chosen: list[float]) -> list[Any]:
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(3 * len(chosen), dtype=np.float32).reshape(-1, 3)
    return session.run(None, {"x": x, "chosen": np.array(chosen, dtype=np.float32)})


def then(node: Any) -> Any:
    return next(a.g for a in node.attribute if a.name == "then_branch")


def ops(graph: Any) -> str:
    """Kinds of nodes, with those that run where there are rows in brackets."""
    return " ".join(f"If[{ops(then(n))}]" if n.op_type == "If" else n.op_type for n in graph.node)


GATHER = ("Gather", ["x", "flat"], ["rows"])
WORK = ("MatMul", ["rows", "weight"], ["worked"])
PUT = ("ScatterND", ["x", "index", "worked"], ["first"])
NEXT = [("Gather", ["first", "flat"], ["others"]), ("MatMul", ["others", "again"], ["done"])]
AGAIN = ("ScatterND", ["first", "index", "done"], ["second"])

CASES: dict[str, tuple[list[Any], list[str], str]] = {
    "a part for some rows": ([GATHER, WORK, PUT], ["first"], "If[Transpose Squeeze Gather MatMul ScatterND]"),
    "what else is wanted of the part stays": ([GATHER, WORK, PUT], ["first", "worked"], "MatMul ScatterND"),
    "nothing that costs": ([GATHER, ("Neg", ["rows"], ["worked"]), PUT], ["first"], "Gather Neg ScatterND"),
    "two for the same rows, one behind the other": ([GATHER, WORK, PUT, *NEXT, AGAIN], ["second"], "MatMul ScatterND"),
    "two for the same rows side by side": (
        [GATHER, WORK, PUT, ("MatMul", ["rows", "again"], ["done"]), ("ScatterND", ["x", "index", "done"], ["second"])],
        ["first", "second"], "If[Transpose Squeeze Gather MatMul MatMul ScatterND ScatterND]",
    ),
    "one within another": (
        [GATHER, WORK, ("ReduceSum", ["worked", "one"], ["sum"]), ("Greater", ["sum", "limit"], ["over"]),
         ("Squeeze", ["over", "one"], ["over1"]), ("NonZero", ["over1"], ["found2"]), ("Transpose", ["found2"], ["index2"]),
         ("GatherND", ["worked", "index2"], ["rows2"]), ("MatMul", ["rows2", "again"], ["worked2"]),
         ("ScatterND", ["worked", "index2", "worked2"], ["second"]), ("ScatterND", ["x", "index", "second"], ["first"])],
        ["first"], "Size Constant Greater If[Transpose GatherND MatMul ScatterND] ScatterND]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_the_same_answers_with_what_is_for_rows_alone_behind_an_if(name: str) -> None:
    nodes, outputs, wanted = CASES[name]
    proto = model(nodes, outputs)
    if "limit" in str(nodes):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(20.0, dtype=np.float32), "limit"))
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    put_behind_ifs(onnx, changed.graph)
    assert ops(changed.graph).endswith(wanted)
    for chosen in ([1.0, 0, 1, 1], [0.0, 0, 0], [1.0], [0.0], []):
        for a, b in zip(run(proto, chosen), run(changed, chosen), strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_move_with_the_only_branch_that_reads_them() -> None:
    proto = model([GATHER, WORK, PUT, ("MatMul", ["first", "again"], ["second"])], ["second"])
    put_behind_ifs(onnx, proto.graph)
    assert "weight" not in {w.name for w in proto.graph.initializer} >= {"again"}
    moved = then(next(n for n in proto.graph.node if n.op_type == "If")).initializer
    assert "weight" in {w.name for w in moved}


def test_a_branch_of_the_models_own_counts_as_a_reader() -> None:
    own = onnx.helper.make_node(
        "If", ["yes"], ["second"], then_branch=branch("Neg", "worked", "a"), else_branch=branch("Abs", "worked", "b")
    )
    proto = model([GATHER, WORK, PUT, own], ["first", "second"])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    put_behind_ifs(onnx, proto.graph)
    assert "MatMul" in ops(proto.graph).partition("If")[0]
    run(proto, [1.0, 0.0])
