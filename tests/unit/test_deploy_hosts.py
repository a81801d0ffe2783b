"""Models that users have, made dynamic and exported: ONNX Runtime answers as eager does on every path, and skips for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from dynamic import ROWS, bert, lively, resnet, two, vit
from hosts import logits
from pliant.deploy import export_onnx
from pliant.tune.point import dial

onnx = pytest.importorskip("onnx", reason="the extra 'export' isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' isn't installed")
onnxruntime.set_default_logger_severity(3)


@dataclass
class Case:
    """A model, inputs, its file and a session that runs it."""

    model: Any
    call: dict[str, Tensor]
    path: Path
    session: Any
    ran: Callable[..., tuple[Any, Any]]

    def eager(self, thresholds: dict[str, float], rows: Tensor) -> tuple[Tensor, pliant.Trace]:
        """What the model itself says with these thresholds."""
        turned = pliant.core.share(self.model)
        for path, site in pliant.sites(turned).items():
            rule: Any = site.rule
            while hasattr(rule, "rule"):
                rule = rule.rule
            rule._buffers["threshold"] = torch.tensor(thresholds[path])
        y, trace = pliant.record(turned)(**{name: t[rows] for name, t in self.call.items()})
        return logits(y), trace

    def feed(self, thresholds: dict[str, float], rows: Tensor) -> dict[str, Any]:
        """Inputs of the file."""
        names = [i.name for i in self.session.get_inputs()]
        fed = {name: t[rows].numpy() for name, t in zip(names, self.call.values(), strict=True)}
        return {**fed, "thresholds": torch.tensor([thresholds[site] for site in pliant.sites(self.model)]).numpy()}

    def events(self, feed: dict[str, Any]) -> list[dict[str, Any]]:
        """Nodes that ran, in their order, as ONNX Runtime's profiler saw them."""
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(self.path.with_suffix(""))
        # Kept as they are exported: fused and re-laid nodes have other names and shapes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        return sorted((e for e in events if "output_type_shape" in e.get("args", {})), key=lambda e: e["ts"])

    def shapes(self, feed: dict[str, Any], op: str) -> list[tuple[int, ...]]:
        """What every node ``op`` of a run made."""
        found = [e["args"] for e in self.events(feed) if e["args"]["op_name"] == op]
        return [tuple(next(iter(args["output_type_shape"][0].values()))) for args in found]


def _of_vit(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    """The wide layer of each block: rows, tokens."""
    seen = [shape[:2] for shape in case.shapes(feed, "MatMul") if shape[-1] == 768]
    left = [17]
    for site in ("tokens.0.site", "tokens.1.site"):
        left.append(1 + max(1, round((left[-1] - 1) * (1 - min(max(thresholds[site], 0), 1)))))
    rows = [ROWS, ROWS, went[0], went[1]]
    return seen, [ran for ran in zip(rows, [left[0], left[1], left[2], left[2]], strict=True) if ran[0]]


def _of_bert(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[:2] for shape in case.shapes(feed, "MatMul") if shape[-1] == 64]
    left = 1 + max(1, round(9 * (1 - min(max(thresholds["tokens.0.site"], 0), 1))))
    ran = [(ROWS, 10), (went[0], 10), (went[0], left), (went[1], left)]
    return seen, [(rows, size) for rows, size in ran if rows]


def _of_resnet(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[0] for shape in case.shapes(feed, "Conv")]
    return sorted(seen), sorted([ROWS] * 16 + [n for n in went for _ in range(2) if n])


def _of_two(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[0] for shape in case.shapes(feed, "Conv")]
    models = case.model.exits.heads
    own = [sum(isinstance(m, nn.Conv2d) for m in model.modules()) for model in models]
    return seen, [ROWS] * own[0] + [went[0]] * own[1] * (went[0] > 0)


@pytest.fixture(
    scope="session",
    params=[(vit, _of_vit), (resnet, _of_resnet), (two, _of_two), (bert, _of_bert)],
    ids=lambda p: p[0].__name__,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    make, ran = request.param
    model, call = lively(make())
    example = {name: t[:4] for name, t in call.items()}
    path = export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx", example if "input_ids" in call else tuple(example.values()))  # fmt: skip
    return Case(model, call, path, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), ran)


@torch.no_grad()
def paths_of(case: Case) -> dict[str, dict[str, float]]:
    """Thresholds for all go on, none does, half do at each site, and each exit alone."""
    found = pliant.sites(case.model)
    half: dict[str, float] = {}
    for site in found:  # between two rows' scores, each site seeing what those before it let through
        if site.startswith("tokens"):
            half[site] = 0.4
            continue
        now = {**dict.fromkeys(found, float("-inf")), **half}
        scores = case.eager(now, torch.arange(ROWS))[1][site][0].scores
        ordered = scores.sort().values  # type: ignore[union-attr]
        half[site] = float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())
    some = {site: t if site.startswith("tokens") else float("-inf") for site, t in half.items()}
    alone = {f"{site} shut": {**some, site: float("inf")} for site in found if not site.startswith("tokens")}
    return {
        "all": dict.fromkeys(found, float("-inf")), "none": dict.fromkeys(found, float("inf")), "half": half,
        "own": {site: float(dial(s)) for site, s in found.items()}, **alone,  # type: ignore[arg-type]
    }  # fmt: skip


@torch.no_grad()
def test_a_hundred_inputs_answer_as_in_eager_on_every_path(case: Case) -> None:
    for name, thresholds in paths_of(case).items():
        for rows in (torch.arange(ROWS), torch.arange(7), torch.tensor([3])):
            y, trace = case.eager(thresholds, rows)
            found = case.session.run(None, case.feed(thresholds, rows))
            torch.testing.assert_close(
                torch.from_numpy(found[0]), y, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            if len(found) > 1:
                left = sum((trace.dense(s) for s in trace if s.startswith("exits")), torch.zeros(len(rows)))
                assert torch.equal(torch.from_numpy(found[1]), torch.as_tensor(left).long()), name
            if name == "half" and len(rows) == ROWS:
                assert 0 < min(float(trace.dense(s).mean()) for s in trace) < 1  # a mixed path indeed


def test_the_thresholds_are_an_input_and_may_be_left_out(case: Case) -> None:
    rows = torch.arange(9)
    own = paths_of(case)["own"]
    feed = case.feed(own, rows)
    given = case.session.run(None, feed)
    feed.pop("thresholds")
    for a, b in zip(given, case.session.run(None, feed), strict=True):
        assert (a == b).all()
    said = case.session.get_modelmeta().custom_metadata_map["pliant.thresholds"]
    assert list(json.loads(said)) == list(pliant.sites(case.model))
    onnx.checker.check_model(onnx.load(case.path), full_check=True)


def run_of(case: Case, thresholds: dict[str, float], rows: Tensor) -> tuple[dict[str, Any], dict[str, int]]:
    """A feed, and how many rows the model itself lets go on at each site for rows."""
    _, trace = case.eager(thresholds, rows)
    sites = [s for s in pliant.sites(case.model) if not s.startswith("tokens")]
    return case.feed(thresholds, rows), {s: int(trace.dense(s).sum()) if s in trace else 0 for s in sites}


@torch.no_grad()
def test_what_is_skipped_does_not_run(case: Case) -> None:
    """Nodes work on the rows that came there and the tokens that are left; where no row came, they don't run at all."""
    ran: dict[str, int] = {}
    for name, thresholds in paths_of(case).items():
        if name in ("all", "none", "half"):
            feed, went = run_of(case, thresholds, torch.arange(ROWS))
            seen, wanted = case.ran(case, feed, list(went.values()), thresholds)
            assert seen == wanted, name
            ran[name] = len(case.events(feed))
    assert ran["none"] < ran["all"] >= ran["half"]


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_a_single_one(case: Case, rows: int) -> None:
    """One row runs as one row, not beside a dummy, and only what it needs; of no rows there are no answers."""
    found = paths_of(case)
    ran: dict[str, int] = {}
    for name in ("all", "none"):
        thresholds = {s: 0.0 if s.startswith("tokens") else t for s, t in found[name].items()}
        feed, _ = run_of(case, thresholds, torch.arange(rows)) if rows else (case.feed(thresholds, torch.arange(0)), {})
        answers = case.session.run(None, feed)
        assert answers[0].shape == (rows, 5)
        events = [e for e in case.events(feed) if e["args"]["op_name"] in ("Conv", "Gemm", "MatMul")]
        shapes = [next(iter(e["args"]["output_type_shape"][0].values())) for e in events]
        assert {shape[0] for shape in shapes} <= {rows}
        ran[name] = len(events)
    assert ran["none"] < ran["all"] if rows else ran["none"] == ran["all"]
