"""A model as a folder: config.json and model.safetensors, versioned, with no pickle; the operating point travels along."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pliant.core.bind import sites
from pliant.core.errors import PliantError
from pliant.core.files import atomic, beside, flush

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def save_pretrained(model: nn.Module, dir: str | Path) -> Path:
    """Write ``model`` as a folder with ``config.json`` and ``model.safetensors``.

    A new folder appears whole. In an existing one both files are written first and then put in place, the weights before
    the config that holds their checksum: stopped in between, the folder is refused by :func:`from_pretrained`, never mixed.

    Args:
        model: built by ``pliant.create_model``; its ``operating_point``, if it has one, is saved too. Rules that were bound
            are not saved (their thresholds are), so the model must have the kinds of rules that it was built with.
        dir: the folder; other files in it stay.

    Returns:
        The folder.

    Raises:
        PliantError: where the model can't be built again from its id and arguments, its configuration isn't plain data, or
            a threshold is NaN.

    >>> import pliant, tempfile
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=2, base=1, step=1, channels=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_pretrained(model, folder + "/model")
    ...     print(sorted(f.name for f in saved.iterdir()))
    ['config.json', 'model.safetensors']
    """
    folder = Path(dir)
    if folder.exists() and not folder.is_dir():
        raise PliantError(got=f"{folder}, which is a file", expected="a folder", do="pass another name")
    stored, aliases = _unshared(_state(model))
    config = _config(model, stored, aliases)
    if folder.is_dir():
        with atomic(folder / CONFIG) as new_config, atomic(folder / WEIGHTS) as new_weights:
            _write(stored, config, new_weights, new_config)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = beside(folder)
    try:
        made.mkdir()
        _write(stored, config, made / WEIGHTS, made / CONFIG)
        os.replace(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    flush(folder.parent)
    return folder


def from_pretrained(dir: str | Path) -> nn.Module:
    """Build the model that :func:`save_pretrained` wrote, in evaluation mode, with its operating point.

    Reads no pickle and runs no code from the folder. The global random state is left as it was.

    Args:
        dir: the folder.

    Returns:
        The model, on the CPU, in the number format it was saved in.

    Raises:
        PliantError: where a file is missing, damaged, of another save, of another model, or of a newer version.

    >>> import pliant, tempfile
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=2, base=1, step=1, channels=4).eval()
    >>> x = torch.randn(2, 3, 16, 16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(torch.equal(from_pretrained(save_pretrained(model, folder))(x), model(x)))
    True
    """
    folder = Path(dir)
    config = _read_config(folder)
    state = _read_weights(folder, config)
    model = _build(config["id"], config["kwargs"])
    _fit(model, state, config["id"])
    _check_thresholds(state, "restore the folder, or tune the model again and save it")
    model.load_state_dict(state, strict=True)
    model.operating_point = None  # pyright: ignore[reportArgumentType]
    if config["point"] is not None:
        from pliant.tune.point import OperatingPoint

        model.operating_point = OperatingPoint.from_dict(_plain(config["point"]))  # pyright: ignore[reportArgumentType]
    return model.eval()


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, t in state.items():
        if not isinstance(t, Tensor) or t.is_meta:
            raise PliantError(
                got=f"state {name!r} that is " + ("without data" if isinstance(t, Tensor) else f"a {type(t).__name__}"),
                expected="tensors with data", do="keep state in parameters and buffers, and load the weights first",
            )  # fmt: skip
    _check_thresholds(state, "tune the model again")
    return state


def _check_thresholds(state: Mapping[str, Tensor], do: str) -> None:
    for name, t in state.items():
        if name.split(".")[-1] == "threshold" and t.isnan().any():
            raise PliantError(
                got="a threshold that is NaN", expected="a number", do=do, site=name.split(".rule.")[0]
            )  # fmt: skip


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and by which other names it goes; views of parts of one memory become tensors of their own."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    memories: set[tuple[Any, int]] = set()
    for name, t in state.items():
        memory = (t.device, t.untyped_storage().data_ptr())
        key = (*memory, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        own = (
            t.is_contiguous()
            and t.untyped_storage().nbytes() == t.numel() * t.element_size()
            and memory not in memories
        )
        memories.add(memory)
        stored[name] = t.detach() if own else t.detach().clone(memory_format=torch.contiguous_format)
    return stored, aliases


def _config(model: nn.Module, stored: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Any]:
    """All of config.json but the checksum."""
    own: Any = getattr(model, "pliant_config", None)
    if not isinstance(own, Mapping):
        raise PliantError(
            got=f"a {type(model).__name__} that doesn't know its id",
            expected="a model made by pliant.create_model",
            do="build it so, or set model.pliant_config = {'id': ..., 'kwargs': {...}}",
        )
    try:
        kwargs = json.loads(json.dumps(own["kwargs"], allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PliantError(
            got=f"arguments that aren't plain data ({error})", expected="numbers, strings, lists and mappings",
            do="build the model from plain arguments",
        ) from error  # fmt: skip
    again = _build(own["id"], kwargs)
    theirs = {**stored, **{alias: stored[name] for alias, name in aliases.items()}}
    differing = _differences(theirs, again.state_dict())
    mine, built = _rules(model), _rules(again)
    differing += [f"{p} has the rule {r}, not {built.get(p)}" for p, r in mine.items() if built.get(p) != r]
    if differing:
        raise PliantError(
            got=f"a model that {own['id']!r} with its arguments doesn't build again: " + _few(differing),
            expected="the model as it was built, its thresholds and weights aside",
            do="save the model before binding other rules to it, folding or changing its modules",
        )
    from pliant import __version__  # the package is whole by now

    point: Any = getattr(model, "operating_point", None)
    if point is not None and any(math.isnan(v) for v in point.thresholds.values()):
        raise PliantError(got="an operating point with a NaN threshold", expected="numbers", do="tune the model again")
    return {
        "format": FORMAT, "pliant": __version__, "id": own["id"], "kwargs": kwargs,
        "point": None if point is None else _strict(point.to_dict()),
        "tensors": {name: [_type(t), list(t.shape)] for name, t in stored.items()}, "aliases": dict(aliases),
    }  # fmt: skip


def _rules(model: nn.Module) -> dict[str, str]:
    return {path: type(site.rule).__name__ for path, site in sites(model).items()}


def _write(stored: dict[str, Tensor], config: dict[str, Any], weights: Path, target: Path) -> None:
    try:
        save_file(stored, weights, metadata={"format": "pt"})
    except SafetensorError as error:  # the package's own name for a full disk and its like
        raise OSError(f"{weights} could not be written: {error}") from error
    target.touch()
    weights.chmod(stat.S_IMODE(target.stat().st_mode))  # the package lets nobody else read what it writes
    flush(weights)
    whole = {**config, "sha256": _sha256(weights)}
    target.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    flush(target)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    _there(folder, path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what isn't UTF-8
        raise PliantError(
            got=f"{path}, which isn't JSON ({error})", expected="the file that save_pretrained wrote",
            do="restore the folder from a copy",
        ) from error  # fmt: skip
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise _foreign(path, "without a format number")
    if config["format"] > FORMAT:
        raise PliantError(
            got=f"{path} of format {config['format']}, written by pliant {config.get('pliant')}",
            expected=f"format {FORMAT} at most", do="upgrade pliant",
        )  # fmt: skip
    kinds: dict[str, Any] = {
        "id": str, "kwargs": dict, "point": (dict, type(None)), "sha256": str, "tensors": dict, "aliases": dict
    }  # fmt: skip
    for key, kind in kinds.items():
        if key not in config or not isinstance(config[key], kind):
            raise _foreign(path, f"without a proper {key!r}")
    point = config["point"]
    thresholds = {} if point is None else point.get("thresholds")
    if not isinstance(thresholds, dict):
        raise _foreign(path, "without a proper 'thresholds'")
    if any(_plain(v) != _plain(v) for v in thresholds.values()):
        raise PliantError(
            got=f"{path} with a threshold that is NaN", expected="numbers", do="tune the model again and save it"
        )
    return config


def _there(folder: Path, path: Path) -> None:
    if path.is_file():
        return
    if not folder.is_dir():
        raise PliantError(
            got=f"{folder}, which is no folder", expected="one written by save_pretrained", do="check the path"
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise PliantError(
            got=f"{folder} with {_few(pickles)} but no {path.name}", expected=f"{CONFIG} and {WEIGHTS}",
            do="load those weights yourself into pliant.create_model(...) and save them with save_pretrained: pickles run code",
        )  # fmt: skip
    raise PliantError(
        got=f"{folder} without {path.name}",
        expected=f"{CONFIG} and {WEIGHTS}",
        do="check the path, or save the model again",
    )


def _foreign(path: Path, what: str) -> PliantError:
    return PliantError(got=f"{path} {what}", expected="the file that save_pretrained wrote", do="check the path")


def _read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    _there(folder, path)
    if _sha256(path) != config["sha256"]:
        raise PliantError(
            got=f"{path} with another checksum than {CONFIG} holds", expected="the two files of one save",
            do="restore the folder from a copy, or save the model again: the weights are damaged, or saving was interrupted",
        )  # fmt: skip
    try:
        stored = load_file(path)
        return {**stored, **{alias: stored[name] for alias, name in config["aliases"].items()}}
    except (SafetensorError, KeyError, TypeError) as error:
        raise PliantError(
            got=f"{path}, which cannot be read ({error})", expected="the file that save_pretrained wrote",
            do="restore the folder from a copy",
        ) from error  # fmt: skip


def _build(id: str, kwargs: dict[str, Any]) -> nn.Module:
    from pliant.systems.create import create_model

    with torch.random.fork_rng(devices=[]):
        return create_model(id, **kwargs)


def _fit(model: nn.Module, state: Mapping[str, Tensor], id: str) -> None:
    """Bring ``model`` to the number formats of ``state``, once the names and shapes agree."""
    mine = model.state_dict()
    differing = _differences(state, mine)
    if differing:
        raise PliantError(
            got=f"weights that don't fit {id!r}: " + _few(differing), expected="the names and shapes of this model",
            do="load them with the version of pliant that wrote them (config.json names it), or check where they come from",
        )  # fmt: skip
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, t in tensors.items():
        if name in state and t.dtype != state[name].dtype:
            t.data = t.data.to(state[name].dtype)


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    found = [f"{name} is there without a place" for name in ours if name not in theirs]
    found += [f"{name} is missing" for name in theirs if name not in ours]
    for name, t in ours.items():
        other = theirs.get(name)
        if other is None:
            continue
        if t.shape != other.shape or t.is_floating_point() != other.is_floating_point():
            found.append(f"{name} is {tuple(t.shape)} {_type(t)}, not {tuple(other.shape)} {_type(other)}")
    return found


def _few(found: list[str]) -> str:
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _type(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _strict(data: Any) -> Any:
    """Numbers that JSON has no word for become strings."""
    if isinstance(data, Mapping):
        return {str(k): _strict(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_strict(v) for v in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _plain(data: Any) -> Any:
    """What :func:`_strict` was given."""
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_plain(v) for v in data]
    return _ODD.get(data, data) if isinstance(data, str) else data
