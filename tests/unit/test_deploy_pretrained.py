"""A saved model comes back bit for bit, or is refused with a reason; a save that stops leaves no mix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import pliant
from pliant import OperatingPoint, PliantError
from pliant.deploy import from_pretrained, pretrained, save_pretrained
from pliant.systems import create

SMALL = {"num_classes": 4, "exits": 3, "base": 1, "step": 1, "channels": 4, "factors": (1, 2), "bottlenecks": (1, 2)}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def small(**changes: Any) -> nn.Module:
    return pliant.create_model("msdnet", **{**SMALL, **changes}).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(small(), tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


class Tied(nn.Module):
    """One matrix under two names, a view of half of another, and a whole view of a third."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        base = torch.arange(8.0)
        self.register_buffer("whole", base)
        self.register_buffer("part", base[4:])
        self.register_buffer("square", base.view(2, 4))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> Tied:
    def build(id: str, **kwargs: Any) -> nn.Module:
        model = Tied(**kwargs)
        model.pliant_config = {"id": id, "kwargs": kwargs}  # type: ignore[assignment]
        return model

    monkeypatch.setattr(create, "create_model", build)
    return build("tied", width=3)  # type: ignore[return-value]


def test_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small()
    x = torch.randn(6, 3, 16, 16)
    before = torch.random.get_rng_state()
    back = from_pretrained(save_pretrained(model.train(), tmp_path / "a" / "b"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not back.training
    assert same(back, model)
    assert torch.equal(back(x), model.eval()(x))
    assert back.pliant_config == {"id": "msdnet", "kwargs": json.loads(json.dumps(SMALL))}
    assert back.operating_point is None


def test_what_the_folder_holds(folder: Path) -> None:
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert config["format"] == 1
    assert config["pliant"] == pliant.__version__
    stored = load_file(folder / WEIGHTS)
    assert {n: [str(t.dtype)[6:], list(t.shape)] for n, t in stored.items()} == config["tensors"]


def test_the_mode_of_the_files_is_the_usual_one(folder: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.write_text("")
    assert {f.stat().st_mode for f in folder.iterdir()} == {usual.stat().st_mode}


def test_the_operating_point_travels(tmp_path: Path) -> None:
    model = small()
    OperatingPoint({"sites.0": 0.25, "sites.1": float("-inf")}, temperatures={"sites.0": 1.5}, budget=0.5).apply(model)
    back = from_pretrained(save_pretrained(model, tmp_path / "m"))
    assert isinstance(back.operating_point, OperatingPoint)
    kept, sent = back.operating_point.to_dict(), model.operating_point.to_dict()
    assert {k: v for k, v in kept.items() if v == v} == {k: v for k, v in sent.items() if v == v}
    assert kept["flops"] != kept["flops"]  # it was NaN: nothing was measured
    assert same(back, model)
    json.loads((tmp_path / "m" / CONFIG).read_text(), parse_constant=pytest.fail)  # strict JSON, for other readers


def test_thresholds_turned_after_building_come_back(tmp_path: Path) -> None:
    model = pliant.bind(small(), {"sites.1": pliant.rules.Threshold(0.125)})
    assert pliant.sites(from_pretrained(save_pretrained(model, tmp_path / "m")))["sites.1"].rule.threshold == 0.125


def test_half_precision_comes_back_so(tmp_path: Path) -> None:
    model = small().to(torch.bfloat16)
    back = from_pretrained(save_pretrained(model, tmp_path / "m"))
    assert same(back, model)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}


def test_shared_memory_is_stored_once_and_shared_again(tied: Tied, tmp_path: Path) -> None:
    back: Any = from_pretrained(save_pretrained(tied, tmp_path / "m"))
    assert json.loads((tmp_path / "m" / CONFIG).read_text())["aliases"] == {"b.weight": "a.weight"}
    assert back.a.weight is back.b.weight
    assert same(back, tied)


def test_a_save_over_another_replaces_it(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    other = small(num_classes=7)
    save_pretrained(other, folder)
    assert same(from_pretrained(folder), other)
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]


def replace_raises_at(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, [0]

    def replace(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == turn:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("turn", [1, 2])
def test_stopped_while_replacing(turn: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = from_pretrained(folder)
    replace_raises_at(turn, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(small(), folder)
    if turn == 1:
        assert same(from_pretrained(folder), old)
    else:
        with pytest.raises(PliantError, match=r"another checksum.*saving was interrupted"):
            from_pretrained(folder)
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_stopped_while_a_new_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_raises_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(small(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def half_then_full(_: Any, path: Path, **__: Any) -> None:
    path.write_bytes(b"half of it")
    full()


@pytest.mark.parametrize("where", ["weights", "config", "flush"])
@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_leaves_the_old_pair(
    where: str, new: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = from_pretrained(folder)
    broken = {"weights": (pretrained, "save_file", half_then_full), "config": (Path, "write_text", full)}
    monkeypatch.setattr(*broken.get(where, (os, "fsync", full)))
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(small(), tmp_path / "new" if new else folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert same(from_pretrained(folder), old)


def test_what_safetensors_says_of_a_full_disk_is_an_os_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError("IoError: no space left on device")

    monkeypatch.setattr(pretrained, "save_file", refuse)
    with pytest.raises(OSError, match="could not be written: IoError"):
        save_pretrained(small(), folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda f: truncate(f / WEIGHTS), "another checksum"),
    "one bit of the weights": (lambda f: flip(f / WEIGHTS), "another checksum"),
    "truncated config": (lambda f: truncate(f / CONFIG), "isn't JSON"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "isn't JSON"),
    "a list for a config": (lambda f: (f / CONFIG).write_text("[1]"), "without a format number"),
    "a foreign config": (lambda f: (f / CONFIG).write_text('{"architectures": ["X"]}'), "without a format number"),
    "no id": (lambda f: edit(f, id=None), "without a proper 'id'"),
    "a newer format": (lambda f: edit(f, format=2, pliant="9.0"), "format 2, written by pliant 9.0.*upgrade pliant"),
    "an unknown id": (lambda f: edit(f, id="msdnett"), "got id 'msdnett'"),
    "another argument": (lambda f: edit(f, kwargs={"colour": 1}), "got argument 'colour'"),
    "another width": (lambda f: edit(f, kwargs={**SMALL, "channels": 8}), r"don't fit 'msdnet': .* is \(.* and \d+ more"),
    "another system": (lambda f: edit(f, id="branchynet", kwargs={}), "don't fit 'branchynet': .*is there without a place"),
    "a NaN in the point": (lambda f: edit(f, point={"thresholds": {"sites.0": "nan"}}), "NaN"),
    "another point": (lambda f: edit(f, point={"thresholds": {}, "mood": 1}), "operating point with fields"),
    "a point without thresholds": (lambda f: edit(f, point={}), "without a proper 'thresholds'"),
    "an alias of nothing": (lambda f: edit(f, aliases={"a": "b"}), "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "without model.safetensors"),
    "no config": (lambda f: (f / CONFIG).unlink(), "without config.json"),
    "a pickle instead": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin but no model.safetensors.*pickles run code"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(damage: str, folder: Path) -> None:
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(PliantError, match=message):
        from_pretrained(folder)


def test_weights_of_a_rewritten_checksum_that_are_no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"not tensors")
    edit(folder, sha256=pretrained._sha256(folder / WEIGHTS))
    with pytest.raises(PliantError, match="cannot be read"):
        from_pretrained(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PliantError, match="no folder"):
        from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(PliantError, match="which is a file"):
        save_pretrained(small(), tmp_path / "file")


def nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        pliant.sites(model)["sites.0"].rule.threshold.fill_(float("nan"))
    return model


def with_point(value: float) -> nn.Module:
    model = small()
    model.operating_point = OperatingPoint({"sites.0": value})  # type: ignore[assignment]
    return model


def with_config(config: Any) -> nn.Module:
    model = small()
    model.pliant_config = config
    return model


UNSAVEABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a NaN threshold": (lambda: nan(small()), "'sites.0': got a threshold that is NaN"),
    "a NaN in the point": (lambda: with_point(float("nan")), "operating point with a NaN"),
    "no id": (lambda: nn.Linear(2, 2), "doesn't know its id"),
    "odd arguments": (lambda: with_config({"id": "msdnet", "kwargs": {"form": nn.ReLU()}}), "aren't plain data"),
    "other arguments": (lambda: with_config({"id": "msdnet", "kwargs": {}}), "doesn't build again"),
    "other rules": (
        lambda: pliant.bind(small(), {"sites.0": pliant.rules.Always()}), "sites.0 has the rule Always, not Threshold"
    ),
    "no data": (lambda: small().to("meta"), "without data"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_what_could_not_come_back_is_not_saved(case: str, tmp_path: Path) -> None:
    make, message = UNSAVEABLE[case]
    with pytest.raises(PliantError, match=message):
        save_pretrained(make(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nan_thresholds_in_the_weights_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_check_thresholds", lambda *_: None)
        save_pretrained(nan(small()), folder)
    with pytest.raises(PliantError, match=r"at site 'sites.0': got a threshold that is NaN"):
        from_pretrained(folder)


def test_sites_that_share_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(id: str, **kwargs: Any) -> nn.Module:
        model: Any = small(**kwargs)
        model.sites[1].scorer = model.sites[0].scorer
        model.pliant_config = {"id": id, "kwargs": kwargs}
        return model

    monkeypatch.setattr(create, "create_model", build)
    model = build("shared")
    model.sites[0].scorer.temperature.fill_(2.0)
    back: Any = from_pretrained(save_pretrained(model, tmp_path / "m"))
    assert back.sites[1].scorer is back.sites[0].scorer
    assert same(back, model)
