"""Pages that are generated when the site is built: the catalogue, the evidence, the benchmarks."""

from __future__ import annotations

import base64
import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from pliant.systems.table import Row, rows

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append the generated part to the pages that have one."""
    made = {
        "catalogue.md": catalogue, "evidence.md": evidence, "benchmarks.md": benchmarks, "decisions.md": decisions,
        "extend.md": record,
    }.get(page.file.src_uri)  # fmt: skip
    return markdown if made is None else markdown + "\n\n" + made()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], lines: list[tuple[object, ...]]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(map(_cell, line)) + " |" for line in lines)])


def _link(row: Row) -> str:
    """To the section of the evidence page that holds the row's claims."""
    return f" ([evidence](evidence.md#{row.same_as or row.id}))" if row.evidence else ""


def _component(row: Row) -> str:
    """What a row that is a part is called here."""
    return f": `{row.component}`" if row.component else ""


def catalogue() -> str:
    """Every row, by part of the survey."""
    found = rows()
    text = [f"{len(found)} rows, {sum(r.status == 'works' for r in found)} work."]
    for part, members in groupby(found, key=lambda r: r.part):
        text.append(f"## {part.capitalize()}")
        text.append(_table(
            ("id", "name", "survey", "paper", "status"),
            [(f"`{r.id}`", r.name + _component(r), r.survey, r.paper, r.status + _link(r)) for r in members],
        ))  # fmt: skip
    return "\n\n".join(text)


def evidence() -> str:
    """Every claim that was run, held or not."""
    files = sorted((ROOT / "evidence" / "results").glob("*.json"))
    text = [] if files else ["No results yet."]
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        text.append(f"## {found['id']}")
        held = sum(c["held"] for c in found["claims"])
        text.append(
            f"**{held} of {len(found['claims'])} held.** {found['data']}. Seeds {found['seeds']}, {found['seconds']:.0f} s, torch {found['versions']['torch']}."
        )
        text.append(_table(
            ("claim", "measured", "bound", "held"),
            [(c["claim"], c["measured"], c["bound"], "held" if c["held"] else "**failed**") for c in found["claims"]],
        ))  # fmt: skip
        text += [f"- {c['claim']}: {c['note']}" for c in found["claims"] if c["note"]]
    return "\n\n".join(text)


def decisions() -> str:
    """The tables that compare ways to decide and ways to train a decision, each with its picture."""
    text: list[str] = []
    for id in ("estimators", "exit_criteria"):
        path = ROOT / "evidence" / "results" / f"{id}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for table in found["tables"]:
            text.append(f"## {table['title']}")
            text.append(_table(tuple(table["columns"]), [tuple(map(_number, row)) for row in table["rows"]]))
            if table["plot"]:
                text.append(picture(table))
        text.append(
            f"{found['data']}. Seeds {found['seeds']}, {found['seconds']:.0f} s, torch {found['versions']['torch']}, "
            f"commit {found['commit']}. Again: `pliant reproduce {id}`; its claims are [here](evidence.md#{id})."
        )
    return "\n\n".join(text or ["No results yet."])


def _number(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def picture(table: dict[str, Any]) -> str:
    """A scatter plot of two of the table's columns, its rows by name, as an image in the page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pliant"  # the same picture for the same figures
    from matplotlib import pyplot

    across, up = (table["columns"].index(name) for name in table["plot"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    marks = "os^vD<>ph*PX"
    for i, row in enumerate(r for r in table["rows"] if isinstance(r[across], float) and isinstance(r[up], float)):
        axes.plot(row[across], row[up], marks[i % len(marks)], label=row[0])
    axes.set_xlabel(table["plot"][0])
    axes.set_ylabel(table["plot"][1])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    code = base64.b64encode(written.getvalue()).decode("ascii")
    return f'<img alt="{table["title"]}: {table["plot"][1]} over {table["plot"][0]}" src="data:image/svg+xml;base64,{code}">'


def record(id: str = "cascade_nn_layers") -> str:
    """All that was written to add one system, read from where it stands."""
    path = f"src/pliant/systems/depth/{id}.py"
    code = (ROOT / path).read_text(encoding="utf-8")

    def line(name: str) -> str:
        found = [t for t in (ROOT / name).read_text(encoding="utf-8").splitlines() if t.strip().startswith(f'"{id}":')]
        return f"In `{name}`:\n\n```text\n" + found[0] + "\n```"

    parts = [
        f"The file, `{path}`, {len(code.splitlines())} lines:\n\n```py\n{code}```",
        line("src/pliant/systems/table.py"),
        line("tests/contract.py"),
        f"Its claims are in `evidence/{id}.py`, what came of them is [here](evidence.md#{id}).",
    ]
    return "\n\n".join(parts)


def benchmarks() -> str:
    """The committed results, as they were printed."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    text = [] if files else ["No results yet."]
    for path in files:
        text.append(f"## {path.stem}")
        text.append("```json\n" + json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1) + "\n```")
    return "\n\n".join(text)
