"""The command: every sub-command, its JSON, its exit codes, and that mistakes are told in one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pliant.cli import app
from pliant.core.errors import PliantError
from pliant.reproduce import Table

run = CliRunner()


def said(*arguments: str, code: int = 0) -> str:
    result = run.invoke(app, list(arguments))
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in app.registered_commands])
def test_every_command_has_help_with_an_example(command):
    assert "Example: pliant " + command in " ".join(said(command, "--help").split())


def test_list_prints_one_object_per_row():
    rows = json.loads(said("list", "--json"))
    assert len(rows) == 256
    assert set(rows[0]) == {"id", "name", "survey", "ref", "status", "evidence"}
    assert {r["id"] for r in rows if r["status"] == "works"} >= {"msdnet"}
    assert all(r["status"] == "works" for r in json.loads(said("list", "--works", "--json")))
    assert [r["id"] for r in json.loads(said("list", "msd*", "--section", "2.1.1", "--json"))] == ["msdnet"]


def test_info_names_the_arguments_and_a_mistake_the_nearest_ids():
    assert json.loads(said("info", "msdnet", "--json"))["arguments"]["exits"] == 7
    result = run.invoke(app, ["info", "msdnt"])
    assert result.exit_code == 2
    assert "msdnet" in result.stderr
    assert "Traceback" not in result.stderr


def test_train_tune_evaluate_report_export(tmp_path):
    folder = str(tmp_path / "model")
    assert json.loads(said("train", "--to", folder, "--epochs", "3", "--json"))["val_accuracy"] > 0.5
    point = json.loads(said("tune", folder, "--budget", "0.6", "--json"))
    assert point["flops"] <= 0.6 * point["dense_flops"]
    found = json.loads(said("evaluate", folder, "--json"))
    assert found["share"] == pytest.approx(0.6, abs=0.06)
    assert sum(found["left_at"]) == 359
    page = tmp_path / "page.html"
    said("report", folder, "--out", str(page))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    path = tmp_path / "model.onnx"
    value = json.loads(said("export", folder, str(path), "--json"))
    assert path.stat().st_size == value["bytes"] > 0
    assert value["inputs"] == {
        "input": "float32 (rows, 1, 8, 8)",
        "thresholds": f"float32 ({len(value['thresholds'])})",
    }
    assert value["thresholds"] == pytest.approx(point["thresholds"])


def test_export_of_an_id_and_what_it_refuses(tmp_path):
    path = tmp_path / "model.onnx"
    small = [f"--set={name}" for name in ("exits=2", "base=1", "step=1", "channels=4")]
    assert "Example: pliant export" in said("export", "--help")
    lines = said("export", "msdnet", str(path), "--shape", "3,16,16", *small)
    assert "'logits': 'float32 (rows, 10)'" in lines
    assert "'sites.0': 0.5" in lines
    for arguments, message in (
        (["nothing", str(path)], "nothing"),
        (["msdnet", str(path), "--shape", "3,x"], "the shape '3,x'"),
        (["msdnet", str(path), "--set", "exits"], "--set exits"),
        (["msdnet", str(path), "--set", "depth=3"], "argument 'depth'"),
        ([str(tmp_path / "nowhere"), str(path)], "nowhere"),
    ):
        result = run.invoke(app, ["export", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


def test_unreachable_budget_and_missing_model_exit_with_2(tmp_path):
    folder = str(tmp_path / "model")
    said("train", "--to", folder, "--epochs", "1", "--json")
    result = run.invoke(app, ["tune", folder, "--budget", "0.01"])
    assert result.exit_code == 2
    assert "first exit" in result.stderr
    assert run.invoke(app, ["evaluate", str(tmp_path / "nowhere")]).exit_code == 2
    assert run.invoke(app, ["demo", "--data", "mnist"]).exit_code == 2
    assert run.invoke(app, ["reproduce", "msdnet", "--evidence", str(tmp_path)]).exit_code == 2


def test_demo_prints_the_table_and_writes_the_report(tmp_path):
    page = tmp_path / "demo.html"
    found = json.loads(said("demo", "--epochs", "2", "--out", str(page), "--json"))
    assert [row["budget"] for row in found["rows"]] == [0.3, 0.5, 0.7]
    for row in found["rows"]:
        assert row["share"] == pytest.approx(row["budget"], abs=0.06)
        assert row["gmacs"] == pytest.approx(row["gflops"] / 2)
        assert 0 <= row["static_accuracy"] <= 1
        assert 0 <= row["random_accuracy"] <= 1
        assert row["seconds_dense"] > 0
        assert sum(row["histogram"]) == 359
    assert page.is_file()


def test_reproduce_writes_tables_beside_the_claims(tmp_path):
    (tmp_path / "table.py").write_text(
        "from pliant.reproduce import Claim, Table\nDATA, SEEDS = 'nothing', (0,)\n"
        "def run(lab):\n    return [Claim('a', '1', '1', True), Table('t', ('name', 'x'), [('a', 1.0)], ('x', 'x'))]\n"
    )
    result = json.loads(said("reproduce", "table", "--evidence", str(tmp_path), "--json"))
    assert len(result["claims"]) == 1
    assert result["tables"] == [{"title": "t", "columns": ["name", "x"], "rows": [["a", 1.0]], "plot": ["x", "x"]}]
    with pytest.raises(PliantError, match="rows of \\[1\\] cells"):
        Table("t", ("name", "x"), [("a",)])
    with pytest.raises(PliantError, match="a plot of \\['y'\\]"):
        Table("t", ("name", "x"), [], ("x", "y"))


def test_reproduce_writes_claims_and_says_failed_with_1(tmp_path):
    (tmp_path / "toy.py").write_text(
        "from pliant.reproduce import Claim\nDATA, SEEDS = 'nothing', (0,)\n"
        "def run(lab):\n    return [Claim('one', '1', '>= 1', True), Claim('two', '2', '>= 3', False)]\n"
    )
    result = json.loads(said("reproduce", "toy", "--evidence", str(tmp_path), "--json", code=1))
    assert result == json.loads((tmp_path / "results" / "toy.json").read_text())
    assert [c["held"] for c in result["claims"]] == [True, False]
