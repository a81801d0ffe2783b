"""The code that README and docs show runs, page by page."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shared: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(block, page.name, "exec"), shared)


def test_readme_says_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def hooks(monkeypatch, tmp_path, tables):
    """The site's generator, over a made result."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "evidence" / "results"
    folder.mkdir(parents=True)
    result = {"id": "estimators", "data": "made", "claims": [], "tables": tables, "seeds": [0], "seconds": 1.0,
              "versions": {"torch": "2"}, "commit": "abc"}  # fmt: skip
    (folder / "estimators.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_a_table_of_evidence_comes_with_its_picture(monkeypatch, tmp_path):
    table = {"title": "T", "columns": ["name", "cost", "accuracy"], "plot": ["cost", "accuracy"],
             "rows": [["a", 0.5, 0.81234567], ["b", 0.6, 0.9], ["c", "not run", 0.9]]}  # fmt: skip
    page = hooks(monkeypatch, tmp_path, [table]).decisions()
    assert "| a | 0.5 | 0.8123 |" in page
    assert "| c | not run | 0.9 |" in page
    assert page.count("data:image/svg+xml;base64,") == 1
    assert page == hooks(monkeypatch, tmp_path / "again", [table]).decisions()


def test_without_results_the_page_says_so(monkeypatch, tmp_path):
    module = hooks(monkeypatch, tmp_path, [])
    (tmp_path / "evidence" / "results" / "estimators.json").unlink()
    assert module.decisions() == "No results yet."


def lines_of_code(text):
    """Lines that hold code: no blank ones, comments or docstrings."""
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    kept = [t for n, t in enumerate(text.splitlines(), 1) if n not in strings and t.strip()]
    return [t for t in kept if not t.strip().startswith("#")]


def test_the_record_of_one_system_is_what_was_written(monkeypatch, tmp_path):
    """The page on extending shows the very file, and both lines beside it; under 60 lines, and no part of its own."""
    module = hooks(monkeypatch, tmp_path, [])
    monkeypatch.setattr(module, "ROOT", ROOT)
    id = "cascade_nn_layers"
    text = (ROOT / "src/pliant/systems/depth" / f"{id}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert 10 < len(lines_of_code(text)) < len(text.splitlines())
    assert "class " not in "\n".join(lines_of_code(text))  # composed of parts that were there
    page = module.record()
    assert f"```py\n{text}```" in page
    for name in ("src/pliant/systems/table.py", "tests/contract.py"):
        (line,) = (
            t for t in (ROOT / name).read_text(encoding="utf-8").splitlines() if t.strip().startswith(f'"{id}":')
        )
        assert line in page
        assert f"In `{name}`" in page
    assert (ROOT / "evidence" / f"{id}.py").is_file()
    assert str(len(text.splitlines())) in (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
