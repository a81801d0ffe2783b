"""What ONNX Runtime and torch.export make of a model: the same answers on every path, and rows that are not computed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import PliantError, rules
from pliant.deploy import export_onnx
from pliant.deploy import onnx as module
from pliant.execute import Exits, Experts, Residual, Skip
from pliant.execute.heads import PooledClassifier
from pliant.scores import MaxProbability

onnx = pytest.importorskip("onnx", reason="the extra 'export' isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' isn't installed")
onnxruntime.set_default_logger_severity(3)

SIDE, CLASSES, BATCHES = 8, 4, (1, 2, 7, 32)


class Mean(nn.Module):
    """One score a row, spread around 0 on random features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].sum(1)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())


def gate() -> pliant.Site:
    return pliant.Site(Mean(), rules.Threshold(0.0))


def confidence() -> pliant.Site:
    return pliant.Site(MaxProbability(), rules.Threshold(0.5))


def mixed() -> Exits:
    """Exits whose stages bypass blocks, choose between two, and add branches."""
    stages = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Skip(conv(), gate())),
        nn.Sequential(Skip(conv(), gate(), otherwise=nn.Conv2d(6, 6, 1)), Residual(conv(), gate(), shortcut=nn.Conv2d(6, 6, 1))),
        nn.Sequential(Residual(conv(), gate()), conv()),
    ]  # fmt: skip
    return Exits(stages, [PooledClassifier(6, CLASSES) for _ in stages], [confidence() for _ in range(2)])


def msdnet() -> nn.Module:
    return pliant.create_model(
        "msdnet", num_classes=CLASSES, exits=3, base=1, step=1, channels=4, factors=(1, 2), bottlenecks=(1, 2),
        head_channels=8,
    )  # fmt: skip


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE)


def lively(model: nn.Module) -> nn.Module:
    """Statistics from data and heads with a wider spread, so that confidences differ from row to row."""
    with torch.no_grad():
        for _ in range(5):
            model(images(16))
        for name, p in model.named_parameters():
            if name.startswith("heads") and p.shape[0] == CLASSES:
                p.mul_(6)
    return model.eval()


def turned(model: nn.Module, thresholds: dict[str, float]) -> Any:
    return pliant.bind(model, {site: rules.Threshold(t) for site, t in thresholds.items()})


def cuts(model: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """Thresholds for every path: all leave at once, all go on, and each site letting about half go on."""
    scores = {}
    with torch.no_grad():
        _, trace = pliant.record(turned(model, dict.fromkeys(pliant.sites(model), float("-inf"))))(x)
    for site in trace:
        ordered = trace[site][0].scores.sort().values
        scores[site] = float(ordered[len(ordered) // 2 : len(ordered) // 2 + 2].mean())  # between two rows' scores
    return {
        "own": {s: float(pliant.sites(model)[s].rule.threshold) for s in scores},
        "none": dict.fromkeys(scores, float("inf")),
        "all": dict.fromkeys(scores, float("-inf")),
        "half": scores,
        "first exit": {s: float("inf") if s.startswith("sites") else t for s, t in scores.items()},
        "last exit": {s: float("-inf") if s.startswith("sites") else t for s, t in scores.items()},
    }


class Case:
    """A model, its exported file, and a session that runs it."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.path = export_onnx(model, folder / "model.onnx", images(4))
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def run(self, x: Tensor, thresholds: dict[str, float] | None = None) -> tuple[Tensor, Tensor]:
        feed = {"input": x.numpy()}
        if thresholds is not None:
            feed["thresholds"] = torch.tensor([thresholds[s] for s in pliant.sites(self.model)]).numpy()
        logits, left = self.session.run(None, feed)
        return torch.from_numpy(logits), torch.from_numpy(left)


@pytest.fixture(scope="module", params=[mixed, msdnet], ids=lambda f: f.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    return Case(lively(request.param()), tmp_path_factory.mktemp("onnx"))


def left_at(trace: pliant.Trace) -> Tensor:
    return sum((trace.dense(s) for s in trace if s.startswith("sites")), torch.zeros(trace.batch)).long()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("path", ["own", "none", "all", "half", "first exit", "last exit"])
def test_onnx_runtime_answers_as_eager_on_every_path(case: Case, batch: int, path: str) -> None:
    thresholds = cuts(case.model, images(64))[path]
    x = images(batch)
    with torch.no_grad():
        y, trace = pliant.record(turned(case.model, thresholds))(x)
    logits, left = case.run(x, thresholds)
    torch.testing.assert_close(logits, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(left, left_at(trace))
    if path == "half" and batch == 32:
        assert left.unique().tolist() == [0, 1, 2]  # the path is a mixed one indeed


def test_without_thresholds_those_of_the_model_hold(case: Case) -> None:
    x = images(9)
    with torch.no_grad():
        torch.testing.assert_close(case.run(x)[0], case.model(x), rtol=1e-5, atol=1e-5)


def test_equal_thresholds_stay_apart(case: Case) -> None:
    """The graph's optimiser merges equal constants; these are inputs: turning one leaves the other."""
    x, sites = images(16), list(pliant.sites(case.model))
    exits = [s for s in sites if s.startswith("sites")]
    for i in range(2):
        thresholds = {**dict.fromkeys(sites, 0.0), **dict.fromkeys(exits, -1.0), exits[i]: 2.0}
        assert case.run(x, thresholds)[1].tolist() == [i] * 16


def test_inputs_outputs_and_metadata(case: Case) -> None:
    proto = onnx.load(case.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [i.name for i in proto.graph.input] == ["input", "thresholds"]
    assert [o.name for o in proto.graph.output] == ["logits", "exit"]
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in (proto.graph.input[0], *proto.graph.output)] == [
        "rows"
    ] * 3
    said = {p.key: p.value for p in proto.metadata_props}
    now = {s: float(site.rule.threshold) for s, site in pliant.sites(case.model).items()}
    assert list(json.loads(said["pliant.thresholds"]).items()) == list(now.items())
    assert said["pliant.id"] == getattr(case.model, "pliant_config", {"id": ""})["id"]
    assert said["pliant.version"] == pliant.__version__
    assert [f.name for f in case.path.parent.iterdir()] == ["model.onnx"]


def profiled(path: Path, feed: dict[str, Any], op: str = "Conv") -> list[int]:
    """Rows that every node ``op`` of a run saw, in the order they ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    # Kept as they are exported: fused and re-laid nodes have other names and shapes.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    convs = [e for e in events if e.get("args", {}).get("op_name") == op and "output_type_shape" in e["args"]]
    return [next(iter(e["args"]["output_type_shape"][0].values()))[0] for e in sorted(convs, key=lambda e: e["ts"])]


def test_rows_that_left_are_not_computed(tmp_path: Path) -> None:
    """Each convolution of stage k sees the rows that reached it; where nobody did, it doesn't run, nor does what it alone reads."""
    model: Any = lively(msdnet())
    path = export_onnx(model, tmp_path / "model.onnx", images(4))
    x = images(32)
    counts = [sum(isinstance(m, nn.Conv2d) for m in [*s.modules(), *h.modules()]) for s, h in zip(model.stages, model.heads, strict=True)]  # fmt: skip
    sites = list(pliant.sites(model))
    for thresholds in cuts(model, x).values():
        with torch.no_grad():
            _, trace = pliant.record(turned(model, thresholds))(x)
        reached = [32, *(int(trace.dense(s).sum()) if s in trace else 0 for s in sites)]
        wanted = [n for k, n in enumerate(reached) for n in [n] * counts[k] if n]
        feed = {"input": x.numpy(), "thresholds": torch.tensor([thresholds[s] for s in sites]).numpy()}
        seen = Counter(profiled(path, feed))
        if min(reached):
            assert seen == Counter(wanted)
        else:
            assert seen <= Counter(wanted)
            assert set(seen) == set(wanted)


@pytest.mark.parametrize("make", [mixed, msdnet])
def test_the_exported_program_answers_as_eager_with_its_trace(make: Any) -> None:
    model = lively(make())
    for thresholds in cuts(model, images(64)).values():
        eager = pliant.record(turned(model, thresholds))
        x = images(4)
        shapes = torch.export.ShapesCollection()
        shapes[x] = {0: torch.export.Dim.DYNAMIC}
        with torch.no_grad():
            program: Any = torch.export.export(eager, (x,), dynamic_shapes=shapes).module()
            for batch in BATCHES:
                x = images(batch)
                (y, trace), (wanted, ours) = program(x), eager(x)
                torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
                for site in ours:
                    assert torch.equal(trace[site][0].dense(batch), ours.dense(site))


def test_a_rule_that_reads_no_scores_has_no_dial(tmp_path: Path) -> None:
    model = pliant.bind(lively(mixed()), {"sites.0": rules.Always(), "stages.*": rules.Never()})
    path = export_onnx(model, tmp_path / "model.onnx", images(4))
    session = onnxruntime.InferenceSession(path)
    assert [i.shape for i in session.get_overridable_initializers()] == [[1]]
    logits, left = session.run(None, {"input": (x := images(5)).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-5, atol=1e-5)
    assert set(left.tolist()) <= {1, 2}


def test_a_model_without_dials_has_no_thresholds(tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(export_onnx(nn.Linear(3, 2), tmp_path / "model.onnx", torch.ones(1, 3)))
    assert [i.name for i in session.get_inputs()] == ["input"]
    assert [o.name for o in session.get_outputs()] == ["logits"]


class TwoInputs(nn.Module):
    """A gate behind an estimator, whose rule two sites share, and inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        rule = pliant.estimators.StraightThrough(rules.Threshold(0.0))
        self.one = Residual(nn.Linear(6, 6), pliant.Site(Mean(), rule))
        self.two = Residual(nn.Linear(6, 6), pliant.Site(Mean(), rule))

    def forward(self, x: Tensor, scale: Tensor, table: Tensor) -> dict[str, Tensor]:
        return {"logits": self.two(self.one(x) * scale) + table.sum(0)}


def test_named_inputs_and_a_rule_that_two_sites_share(tmp_path: Path) -> None:
    model = TwoInputs()  # in training mode: its evaluation is exported
    example = {"x": torch.randn(4, 6), "scale": torch.rand(4, 1), "table": torch.randn(3, 6)}
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx", example))
    assert model.training
    assert [i.name for i in session.get_inputs()] == ["x", "scale", "table"]
    feed = {"x": torch.randn(9, 6), "scale": torch.rand(9, 1), "table": torch.randn(3, 6)}
    for on in ([0.0, 0.0], [-99.0, 99.0], [99.0, -99.0]):
        eager = pliant.bind(
            model.eval(), {f"{n}.site": rules.Threshold(t) for n, t in zip(("one", "two"), on, strict=True)}
        )
        arrays = {name: t.numpy() for name, t in feed.items()}
        with torch.no_grad():
            y = eager(**feed)["logits"]
        (logits,) = session.run(None, {**arrays, "thresholds": torch.tensor(on).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), y, rtol=1e-5, atol=1e-5)


def test_a_nan_row_goes_on_as_in_eager(case: Case) -> None:
    x = images(5)
    x[2] = float("nan")
    thresholds = {s: 0.0 if s.startswith("stages") else 2.0 for s in pliant.sites(case.model)}
    assert case.run(x, thresholds)[1].tolist() == [0, 0, 2, 0, 0]


def test_infinite_thresholds_are_strict_json(tmp_path: Path) -> None:
    model = pliant.bind(lively(mixed()), {"sites.1": rules.Threshold(float("-inf"))})
    said = {p.key: p.value for p in onnx.load(export_onnx(model, tmp_path / "m.onnx", images(2))).metadata_props}
    assert json.loads(said["pliant.thresholds"], parse_constant=pytest.fail)["sites.1"] == "-inf"


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_refusals_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    nan = lively(mixed())
    nan.sites[1].rule.threshold.fill_(float("nan"))  # type: ignore[index, union-attr]
    with pytest.raises(PliantError, match=r"at site 'sites.1': got a threshold that is NaN"):
        export_onnx(nan, path, images(2))
    with pytest.raises(PliantError, match=r"from torch.export: .*no Python branch on data"):
        export_onnx(Branches(), path, torch.ones(2, 2))
    with pytest.raises(PliantError, match="an example without tensors"):
        export_onnx(nn.Identity(), path, ())
    with pytest.raises(PliantError, match="an example of 1 rows"):
        export_onnx(TwoInputs(), path, (torch.ones(1, 6), torch.ones(1, 1), torch.ones(3, 6)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_LIMIT", 3)
        with pytest.raises(PliantError, match="less than 2 GiB"):
            export_onnx(nn.Linear(2, 2), path, torch.ones(2, 2))
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(PliantError, match=r"pip install 'pliant\[export\]'"):
        export_onnx(nn.Identity(), path, torch.ones(2, 2))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@torch.no_grad()
def test_an_expert_that_no_token_chose_does_not_run(tmp_path: Path) -> None:
    site = pliant.Site(nn.Identity(), rules.TopKSoftmax(1), shape=(4,))
    model = Experts([nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)) for _ in range(4)], site).eval()
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 5, 4))
    session = onnxruntime.InferenceSession(path)
    for chosen in ([0, 1, 2, 3], [2], [0, 3]):
        x = torch.randn(3, 5, 4) + 50 * torch.eye(4)[torch.tensor(chosen * 15)[:15].view(3, 5)]
        assert set(x.argmax(-1).flatten().tolist()) == set(chosen)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x))
        seen = profiled(path, {"input": x.numpy()}, "Gemm")
        assert len(seen) == 2 * len(chosen)
        assert sum(seen) == 2 * 15  # and none ran beside those that chose it
