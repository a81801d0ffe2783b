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
from hosts import HOSTS, call_of, logits
from pliant.deploy import export_onnx
from pliant.retrofit import cascade, exits, skips, tokens
from pliant.tune.point import dial

onnx = pytest.importorskip("onnx", reason="the extra 'export' isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' isn't installed")
onnxruntime.set_default_logger_severity(3)

ROWS = 100


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """Four blocks: tokens leave after the first and the second, rows after the second and the third."""
    timm = pytest.importorskip("timm", reason="needs timm")
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5).eval()
    x = torch.randn(ROWS, 3, 64, 64)
    model = tokens(host, ["blocks.[01]"], example=x[:4], keep=0.6)
    return exits(model, ["blocks.1", "blocks.2"], example=x[:4]), {"x": x}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    host, _ = call_of("torchvision resnet18")
    x = torch.randn(ROWS, 3, 32, 32)
    return skips(host, ["layer[12].1"], example=x[:4]), {"x": x}


def two() -> tuple[nn.Module, dict[str, Tensor]]:
    timm = pytest.importorskip("timm", reason="needs timm")
    x = torch.randn(ROWS, 3, 64, 64)
    little, big = (timm.create_model(name, num_classes=5).eval() for name in ("test_resnet", "test_efficientnet"))
    return cascade([little, big], example=x[:4]), {"x": x}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Texts of three to ten words, padded."""
    host, call = call_of("transformers BERT")
    length = torch.arange(ROWS) % 8 + 3
    texts = {
        "input_ids": torch.randint(2, 100, (ROWS, 10)),
        "attention_mask": (torch.arange(10) < length[:, None]).to(torch.int64),
    }
    model = tokens(host, ["bert.encoder.layer.1"], example=call, keep=0.6)
    return exits(model, HOSTS["transformers BERT"].exits, example=call), texts


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

    def profiled(self, feed: dict[str, Any], op: str) -> list[tuple[int, ...]]:
        """Shapes that every node ``op`` of a run made, in the order they ran."""
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(self.path.with_suffix(""))
        # Kept as they are exported: fused and re-laid nodes have other names and shapes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        found = [e for e in events if e.get("args", {}).get("op_name") == op and "output_type_shape" in e["args"]]
        return [tuple(next(iter(e["args"]["output_type_shape"][0].values()))) for e in sorted(found, key=lambda e: e["ts"])]  # fmt: skip


def _of_vit(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    """The wide layer of each block: rows, tokens."""
    seen = [shape[:2] for shape in case.profiled(feed, "MatMul") if shape[-1] == 768]
    left = [17]
    for site in ("tokens.0.site", "tokens.1.site"):
        left.append(1 + max(1, round((left[-1] - 1) * (1 - min(max(thresholds[site], 0), 1)))))
    rows = [ROWS, ROWS, went[0] + 1, went[1] + 1]
    return seen, list(zip(rows, [left[0], left[1], left[2], left[2]], strict=True))


def _of_bert(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[:2] for shape in case.profiled(feed, "MatMul") if shape[-1] == 64]
    left = 1 + max(1, round(9 * (1 - min(max(thresholds["tokens.0.site"], 0), 1))))
    return seen, [(ROWS, 10), (went[0] + 1, 10), (went[0] + 1, left), (went[1] + 1, left)]


def _of_resnet(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[0] for shape in case.profiled(feed, "Conv")]
    return sorted(seen), sorted([ROWS] * (len(seen) - 4) + [n + 1 for n in went for _ in range(2)])


def _of_two(case: Any, feed: Any, went: list[int], thresholds: dict[str, float]) -> tuple[Any, Any]:
    seen = [shape[0] for shape in case.profiled(feed, "Conv")]
    models = case.model.exits.heads
    own = [sum(isinstance(m, nn.Conv2d) for m in model.modules()) for model in models]
    return seen, [ROWS] * own[0] + [went[0] + 1] * own[1]


@pytest.fixture(
    scope="session",
    params=[(vit, _of_vit), (resnet, _of_resnet), (two, _of_two), (bert, _of_bert)],
    ids=lambda p: p[0].__name__,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    make, ran = request.param
    model, call = make()
    with torch.no_grad():  # heads and gates that tell rows apart
        for name, p in model.named_parameters():
            if name.startswith(("exits.heads", "skips")) and p.ndim == 2:
                p.normal_(std=2.0)
    example = {name: t[:4] for name, t in call.items()}
    path = export_onnx(model.eval(), tmp_path_factory.mktemp("onnx") / "model.onnx", example if "input_ids" in call else tuple(example.values()))  # fmt: skip
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


@torch.no_grad()
def test_what_is_skipped_does_not_run(case: Case) -> None:
    """Nodes work on the rows that came there, one dummy row where a set was gathered, and the tokens that are left."""
    for name, thresholds in paths_of(case).items():
        if name not in ("all", "none", "half"):
            continue
        _, trace = case.eager(thresholds, torch.arange(ROWS))
        went = {
            s: int(trace.dense(s).sum()) if s in trace else 0
            for s in pliant.sites(case.model)
            if not s.startswith("tokens")
        }
        feed = case.feed(thresholds, torch.arange(ROWS))
        seen, wanted = case.ran(case, feed, list(went.values()), thresholds)
        assert seen == wanted, name
