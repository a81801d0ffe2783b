"""The catalogue: its facts, its filters, its constructors."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

import pliant
from pliant.systems import table
from pliant.systems.create import create_model
from pliant.systems.table import BUILDERS, builder, in_section, list_models, row, rows

PARTS = ("depth", "width", "routing", "parameters", "spatial", "temporal", "training", "applications")  # survey's order


def test_rows_are_whole():
    found = rows()
    ids = {r.id for r in found}
    assert len(found) == len(ids) == 256
    assert all(r.name and r.survey and r.paper and r.part for r in found)
    assert all(r.same_as in ids for r in found if r.same_as)


def test_rows_are_the_facts_of_the_yaml_files():
    folder = os.environ.get("PLIANT_SYSTEMS")
    if not folder:
        pytest.skip("PLIANT_SYSTEMS names no folder of YAML files")
    yaml = pytest.importorskip("yaml")
    facts = {}
    assert {path.stem for path in Path(folder).glob("*.yaml")} == set(PARTS)
    for part in PARTS:
        for entry in yaml.safe_load((Path(folder) / f"{part}.yaml").read_text(encoding="utf-8")):
            facts[entry["id"]] = (part, entry)
    assert list(facts) == [r.id for r in rows()]
    for r in rows():
        part, entry = facts[r.id]
        assert r.part == part
        for name in ("name", "survey", "ref", "paper", "same_as"):
            told = entry.get(name)
            assert getattr(r, name) == ("" if told is None else " ".join(str(told).split())), (r.id, name)


def test_filters():
    assert "msdnet" in list_models()
    assert list_models("msd*") == ["msdnet"]
    assert list_models(section="2.1.1")
    assert "skip_rnn" in list_models(section="4")
    assert list_models(section="9") == []
    assert in_section(row("msdnet"), "5.1.1")
    assert "msdnet" in list_models(section="2.1")
    assert not list_models("msd*", section="2.1.2")
    assert not in_section(row("msdnet"), "2.1.10")


def test_only_what_works_is_listed():
    assert set(list_models()) == {r.id for r in rows() if r.status == "works"} < {r.id for r in rows()}


def test_a_row_described_again_is_built_by_its_original(monkeypatch):
    again = next(r for r in rows() if r.same_as and r.status == "missing")
    monkeypatch.setitem(table.BUILDERS, again.same_as, BUILDERS["branchynet"])
    assert again.status == "works"
    assert again.id in list_models()
    assert builder(again.id) is builder("branchynet")
    assert create_model(again.id, num_classes=3).pliant_config["id"] == again.id


@pytest.mark.parametrize("r", [r for r in rows() if r.evidence], ids=lambda r: r.id)
def test_evidence_is_a_path_in_the_checkout(r):
    assert r.evidence == f"evidence/results/{r.same_as or r.id}.json"
    assert (Path(table.__file__).parents[3] / r.evidence).is_file()


def test_no_evidence_beside_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "_CHECKOUT", tmp_path)
    assert row("msdnet").evidence is None


@pytest.mark.parametrize("id", list(BUILDERS))
def test_every_builder_builds_and_remembers_how(id):
    assert callable(builder(id))
    assert row(id).status == "works"
    assert create_model(id, num_classes=3).pliant_config == {"id": id, "kwargs": {"num_classes": 3}}


def test_mistakes_are_told():
    with pytest.raises(pliant.PliantError, match="msdnet"):
        row("msdnt")
    with pytest.raises(pliant.PliantError, match="an id of the catalogue"):
        create_model("zzzz")
    with pytest.raises(pliant.PliantError, match=r"missing.*msdnet"):
        create_model("fastbert")
    with pytest.raises(pliant.PliantError, match="'depht'"):
        create_model("msdnet", depht=3)


@pytest.mark.parametrize("id", list(table.PARTS))
def test_a_part_has_the_name_that_the_catalogue_says(id):
    *module, name = row(id).component.split(".")
    assert callable(getattr(importlib.import_module(".".join(module)), name))
    assert row("msdnet").component is None
