"""Pages that are generated when the site is built: the catalogue, the evidence, the benchmarks."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from pliant.systems.table import Row, rows

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append the generated part to the pages that have one."""
    made = {"catalogue.md": catalogue, "evidence.md": evidence, "benchmarks.md": benchmarks}.get(page.file.src_uri)
    return markdown if made is None else markdown + "\n\n" + made()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], lines: list[tuple[object, ...]]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(map(_cell, line)) + " |" for line in lines)])


def _link(row: Row) -> str:
    """To the section of the evidence page that holds the row's claims."""
    return f" ([evidence](evidence.md#{row.same_as or row.id}))" if row.evidence else ""


def catalogue() -> str:
    """Every row, by part of the survey."""
    found = rows()
    text = [f"{len(found)} rows, {sum(r.status == 'works' for r in found)} work."]
    for part, members in groupby(found, key=lambda r: r.part):
        text.append(f"## {part.capitalize()}")
        text.append(_table(
            ("id", "name", "survey", "paper", "status"),
            [(f"`{r.id}`", r.name, r.survey, r.paper, r.status + _link(r)) for r in members],
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


def benchmarks() -> str:
    """The committed results, as they were printed."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    text = [] if files else ["No results yet."]
    for path in files:
        text.append(f"## {path.stem}")
        text.append("```json\n" + json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1) + "\n```")
    return "\n\n".join(text)
