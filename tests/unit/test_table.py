"""The catalogue: its facts, its filters, its constructors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pliant
from pliant.systems.create import create_model
from pliant.systems.table import BUILDERS, builder, in_section, list_models, row, rows


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
    for path in Path(folder).glob("*.yaml"):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
            facts[entry["id"]] = (path.stem, entry)
    assert set(facts) == {r.id for r in rows()}
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
    assert list_models(section="4") == []
    assert in_section(row("msdnet"), "5.1.1")


@pytest.mark.parametrize("id", list(BUILDERS))
def test_every_builder_builds_and_remembers_how(id):
    assert callable(builder(id))
    assert row(id).status == "works"
    assert create_model(id, num_classes=3).pliant_config == {"id": id, "kwargs": {"num_classes": 3}}


def test_mistakes_are_told():
    with pytest.raises(pliant.PliantError, match="msdnet"):
        row("msdnt")
    with pytest.raises(pliant.PliantError, match="missing"):
        create_model("skipnet")
    with pytest.raises(pliant.PliantError, match="'depht'"):
        create_model("msdnet", depht=3)
