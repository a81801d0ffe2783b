"""One self-contained HTML page about a multi-exit network: open it anywhere, turn the dial, no network needed."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core.errors import PliantError
from pliant.core.files import atomic
from pliant.insight.calibration import Calibration, calibrations
from pliant.insight.evaluation import Evaluation, Point, as_float32, correct, exits_at

# Known columns of the table: heading, and how a number is shown. Other keys are shown under their own name.
COLUMNS: dict[str, tuple[str, str]] = {
    "budget": ("Budget", "share"),
    "accuracy": ("Test accuracy", "percent"),
    "gflops": ("GFLOPs per image", "number"),
    "gmacs": ("GMACs per image", "number"),
    "seconds_dense": ("Seconds, dense", "number"),
    "seconds_dynamic": ("Seconds, dynamic", "number"),
    "realised_saving": ("Share of promised saving realised", "share"),
    "random_accuracy": ("Random exits, same histogram", "percent"),
    "static_accuracy": ("Static network, equal FLOPs", "percent"),
    "static_gflops": ("GFLOPs of the static network", "number"),
}
EACH = 8  # images shown at either end of an exit
POOL = 600  # images embedded at most
SIDE = 64  # longest side of an embedded image, in pixels
PAGE_BYTES = 2_900_000


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    points: Sequence[Point],
    *,
    curve: Sequence[Sequence[float]],
    title: str,
    rows: Sequence[Mapping[str, object]] = (),
    notes: Sequence[str] = (),
) -> Path:
    r"""Write the report: table, accuracy-cost curve, images of every exit, and a dial that recomputes them in the page.

    $$\text{page}(t) = \text{summary}(\text{evaluation}, t) \text{ for every } t \text{ of the dial}$$

    Shape: E exits, N samples; the dial has T positions of E - 1 thresholds each.

    Args:
        path: the file to write; its folder must exist. It is replaced as a whole or left alone.
        evaluation: what every exit answered to every sample; FLOPs in units of one FLOP.
        points: chosen operating points; the page opens at the first. May be empty.
        curve: thresholds at each position of the dial, from cheap to costly.
        title: heading of the page.
        rows: the table, one mapping for each row; a key of COLUMNS is given its heading and format, another key
            is shown as it is. Accuracies and shares in [0, 1], costs per image. A row with `static_accuracy` and
            `static_gflops` (or `gflops`) is also drawn as a point of a static network.
        notes: lines for the foot of the page: data set, versions, seed.

    Returns:
        The path written. Scores and thresholds travel as float32 and are compared as in `exits_at`, so the page's
        counts are those of Python exactly.

    Raises:
        PliantError: for an empty dial, thresholds that do not fit the exits, a missing folder, or missing Pillow.

    >>> import tempfile
    >>> label, flops = torch.tensor([0]), torch.tensor([1, 4])
    >>> e = Evaluation(torch.tensor([[0.5]]), torch.tensor([[0], [0]]), label, flops, 4, ("a",))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(Path(folder) / "report.html", e, [], curve=[[1.0], [0.0]], title="One image")
    ...     page.read_text(encoding="utf-8").splitlines()[0]
    '<!doctype html>'

    References:
        "Dynamic Neural Networks: A Survey", section 2.1; Huang et al., ICLR 2018, figures of accuracy against budget.
    """
    if not curve:
        raise PliantError(
            got="a dial of no positions",
            expected="at least one vector of thresholds",
            do="pass curve= a list of threshold vectors, from cheap to costly",
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise PliantError(got=f"folder {str(target.parent)!r}", expected="an existing folder", do="create it first")
    dial = torch.stack([as_float32(evaluation, vector) for vector in curve])
    chosen = [as_float32(evaluation, point.thresholds) for point in points]
    data = _payload(evaluation, points, dial, chosen)
    data |= {"title": title, "notes": [str(note) for note in notes], "table": _table(rows), "statics": _statics(rows)}
    opening = chosen[0] if chosen else dial[len(dial) // 2]
    if evaluation.probabilities is not None:
        found = calibrations(evaluation.probabilities, evaluation.labels, exits_at(evaluation, opening))
        data["calibration"] = [_calibration(each) for each in found]
    if evaluation.images is not None:
        spread = torch.linspace(0, len(dial) - 1, min(len(dial), 12)).round().long()
        room = PAGE_BYTES - len(_script(data)) - len(_template())
        data["pool"] = _pool(evaluation, evaluation.images, [opening, *chosen], dial[spread], room=room)
    before, after = _template().split("{{data}}")
    with atomic(target) as part:
        page = before.replace("{{title}}", html.escape(title)) + _script(data) + after
        part.write_text(page, encoding="utf-8", newline="\n")
    return target


def _template() -> str:
    """The page without its data."""
    return resources.files("pliant.insight").joinpath("report.html").read_text(encoding="utf-8")


def _script(data: Mapping[str, object]) -> str:
    """JSON that cannot close its script element: no <, > or & is left in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(tensor: Tensor, kind: str) -> str:
    """Base64 of the tensor's numbers, little-endian, row by row."""
    return base64.b64encode(tensor.detach().cpu().contiguous().numpy().astype(kind).tobytes()).decode("ascii")


def _payload(
    evaluation: Evaluation, points: Sequence[Point], dial: Tensor, chosen: Sequence[Tensor]
) -> dict[str, object]:
    """What the page computes from. FLOPs travel as text: a JSON number beyond 2^53 would be rounded."""
    exits, samples = evaluation.predicted.shape
    wide = len(evaluation.classes) > 256
    if len(evaluation.classes) > 65536:
        raise PliantError(got=f"{len(evaluation.classes)} classes", expected="at most 65,536", do="group the classes")
    whole = "<u2" if wide else "|u1"
    return {
        "exits": exits,
        "samples": samples,
        "wide": wide,
        "classes": [str(name) for name in evaluation.classes],
        "scores": _packed(evaluation.scores.float(), "<f4"),
        "predicted": _packed(evaluation.predicted, whole),
        "labels": _packed(evaluation.labels, whole),
        "flops": [str(count) for count in evaluation.flops.tolist()],
        "dense": str(int(evaluation.dense_flops)),
        "correct": list(correct(evaluation)),
        "dial": _packed(dial, "<f4"),
        "positions": len(dial),
        "points": [
            {"name": str(point.name), "budget": point.budget, "thresholds": _packed(levels, "<f4")}
            for point, levels in zip(points, chosen, strict=True)
        ],
    }


def _table(rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Headings in order of first appearance, and cells as text."""
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    heads = [COLUMNS.get(key, (key.replace("_", " "), "number")) for key in keys]
    cells = [[_cell(row.get(key), kind) for key, (_, kind) in zip(keys, heads, strict=True)] for row in rows]
    return {"keys": keys, "heads": [head for head, _ in heads], "cells": cells}


def _cell(value: object, kind: str) -> str:
    """One cell: text as it is, numbers to what can be read."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if kind == "percent":
        return f"{100 * value:.2f} %"
    if kind == "share":
        return f"{100 * value:.3g} %" if abs(value) < 1 else f"{100 * value:.0f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def _calibration(found: Calibration) -> dict[str, object]:
    """One exit's figures as plain data; JSON knows no NaN."""

    def told(value: object) -> object:
        return None if isinstance(value, float) and math.isnan(value) else value

    figures = {k: told(v) for k, v in vars(found).items() if k != "bins"}
    return {**figures, "bins": [[told(v) for v in (b.rows, b.confidence, b.accuracy)] for b in found.bins]}


def _statics(rows: Sequence[Mapping[str, object]]) -> list[dict[str, float]]:
    """Static networks among the rows, as points of the chart."""
    found: dict[tuple[float, float], None] = {}
    for row in rows:
        accuracy, gflops = row.get("static_accuracy"), row.get("static_gflops", row.get("gflops"))
        if isinstance(accuracy, (int, float)) and isinstance(gflops, (int, float)) and math.isfinite(accuracy + gflops):
            found[(float(gflops) * 1e9, float(accuracy))] = None
    return [{"flops": flops, "accuracy": accuracy} for flops, accuracy in found]


def _ends(evaluation: Evaluation, thresholds: Tensor) -> list[list[int]]:
    """For every exit, the rows that leave there with the lowest and the highest scores; ties by row, as in the page."""
    where = exits_at(evaluation, thresholds)
    ends = []
    for exit_ in range(len(evaluation.predicted)):
        rows = torch.nonzero(where == exit_).flatten()
        if len(evaluation.scores):  # the last exit has no score: its rows are ordered by the one before
            hardness = evaluation.scores[min(exit_, len(evaluation.scores) - 1), rows].float()
            rows = rows[torch.sort(hardness.nan_to_num(nan=math.inf), stable=True).indices]
        ordered = rows.tolist()
        ends.append(ordered if len(ordered) <= 2 * EACH else ordered[:EACH] + ordered[-EACH:])
    return ends


def _pool(
    evaluation: Evaluation, images: Tensor, whole: Sequence[Tensor], along: Tensor, *, room: int
) -> dict[str, object]:
    """Images worth embedding in one PNG, most wanted first: all ends at some thresholds, then what fits along the dial."""
    samples = len(evaluation.labels)
    opening = {row for end in _ends(evaluation, whole[0]) for row in end}
    wanted = [row for vector in whole for end in _ends(evaluation, vector) for row in end]
    # Outermost first over all positions and exits, else the first positions would take every place.
    inwards = [
        [end[-1 - i // 2 if i % 2 else i // 2] for i in range(len(end))] for t in along for end in _ends(evaluation, t)
    ]
    wanted += [row for rank in zip_longest(*inwards) for row in rank if row is not None]
    wanted += torch.linspace(0, samples - 1, min(samples, POOL)).round().long().tolist()
    rows = list(dict.fromkeys(wanted))[:POOL]
    while True:
        pool = _atlas(images, rows)
        if len(str(pool["png"])) <= room or len(rows) <= 2 * EACH:
            return pool | {"complete": opening.issubset(rows)}
        rows = rows[: len(rows) * 3 // 4]


def _atlas(images: Tensor, rows: Sequence[int]) -> dict[str, object]:
    """The images of some rows side by side in one PNG: one compression, one picture to decode."""
    try:
        from PIL import Image  # only images need Pillow; the numbers of a report do not
    except ModuleNotFoundError as error:
        raise PliantError(
            got="images but no Pillow",
            expected="the package pillow",
            do='pip install "pliant[report]", or leave out the images',
        ) from error
    tiles = images[torch.as_tensor(rows)].detach().float().cpu()
    longest = max(tiles.shape[-2:])
    if longest > SIDE:
        size = [max(1, round(side * SIDE / longest)) for side in tiles.shape[-2:]]
        tiles = F.interpolate(tiles, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    count, channels, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    padded = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, lines * columns - count))
    sheet = padded.reshape(lines, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (sheet.reshape(lines * height, columns * width, channels) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"rows": list(rows), "columns": columns, "width": width, "height": height, "each": EACH, "png": png}
