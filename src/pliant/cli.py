"""The command `pliant`. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as missing:  # the library itself runs without the command's packages
    sys.exit(f"pliant: {missing.name} is missing. Do: pip install 'pliant[cli]'")

from pliant.core.errors import PliantError

if TYPE_CHECKING:
    from torch import nn

    from pliant.data import Dataset
    from pliant.study import Row, Study

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Dynamic neural networks: skipped means not executed, and every number is measured.\n\n"
    "Exit codes: 0 done; 1 a check or a claim failed; 2 a mistake in what was asked for.",
)  # fmt: skip
out, err = Console(), Console(stderr=True)

Data = Annotated[str, typer.Option("--data", help="Data set: digits (embedded), fashion_mnist, cifar10.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the data sets; default, $PLIANT_DATA.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Model = Annotated[Path, typer.Argument(help="Folder written by 'pliant train' or save_pretrained.")]


@contextmanager
def _told() -> Iterator[None]:
    """Turn the library's errors into one line and exit code 2."""
    try:
        yield
    except PliantError as mistake:
        err.print(f"pliant: {mistake}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from mistake


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each thing that is being done."""
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield told


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _load(data: str, root: Path | None, limit: int | None = None) -> Dataset:
    from pliant.data import load

    return load(data, root, limit=limit)


@app.command(epilog="Example: pliant demo --data fashion_mnist --root ~/data --out fashion.html")
def demo(
    data: Data = "digits", root: Root = None, seed: Seed = 0, as_json: AsJson = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of training; default, the recipe's.")] = None,
    path: Annotated[Path, typer.Option("--out", help="Where the HTML report goes.")] = Path("pliant-report.html"),
) -> None:  # fmt: skip
    """Train a small MSDNet, tune it to 30, 50 and 70 % of its FLOPs, run it, and show what that bought."""
    from pliant.study import RECIPES, study, with_epochs

    with _told(), _progress() as progress:
        recipe = _recipe(RECIPES, data)
        recipe = recipe if epochs is None else with_epochs(recipe, epochs)
        progress("loading data", 0, 1)
        loaded = _load(data, root)
        progress("loading data", 1, 1)
        found = study(recipe, loaded, seed=seed, progress=progress)
        written = _write_report(found, path, f"MSDNet on {data}")
    if as_json:
        _print_json({**found.to_dict(), "data": data, "seed": seed, "report": str(written)})
        return
    _print_table(found, data)
    out.print(f"Report: {written}", soft_wrap=True)


def _recipe(recipes: dict[str, Any], data: str) -> Any:
    if data not in recipes:
        raise PliantError(
            got=f"data set {data!r}", expected="one of " + ", ".join(recipes), do="pass --data with one of these"
        )
    return recipes[data]


def _print_table(found: Study, data: str) -> None:
    """A column for each budget; per test image."""
    dense = found.evaluation.dense_flops
    table = Table(title=f"MSDNet on {data}: dense {dense / 1e9:.6f} GFLOPs, test accuracy {found.dense_accuracy:.2%}")
    table.add_column("per test image")
    for row in found.rows:
        table.add_column(f"budget {row.budget:.0%}", justify="right")
    for name, cell in _LINES.items():
        table.add_row(name, *(cell(row) for row in found.rows))
    out.print(table)
    out.print(
        "Seconds: one thread, batches of 256, dense and dynamic in turn on the same modules. Realised: what part of the "
        "saving that FLOPs promise the clock confirms. Random exits: the same shares of rows per exit, rows chosen blindly."
    )
    for note in found.notes:
        out.print(f"Note: {note}", soft_wrap=True)


_LINES: dict[str, Callable[[Row], str]] = {
    "test accuracy": lambda r: f"{r.accuracy:.2%}",
    "executed GFLOPs": lambda r: f"{r.gflops:.6f}",
    "executed GMACs": lambda r: f"{r.gmacs:.6f}",
    "share of dense FLOPs": lambda r: f"{r.share:.1%}",
    "seconds, dense": lambda r: f"{r.seconds_dense:.6f}",
    "seconds, dynamic": lambda r: f"{r.seconds_dynamic:.6f}",
    "promised saving realised": lambda r: f"{r.realised_saving:.2f}",
    "left at each exit": lambda r: " ".join(map(str, r.histogram)),
    "accuracy, random exits": lambda r: f"{r.random_accuracy:.2%}",
    "accuracy, static network": lambda r: f"{r.static_accuracy:.2%}",
    "GFLOPs, static network": lambda r: f"{r.static_gflops:.6f}",
}


def _write_report(found: Study, path: Path, title: str) -> Path:
    from dataclasses import asdict

    from pliant.insight.report import write_report
    from pliant.reproduce import versions

    rows = [{k: v for k, v in asdict(row).items() if k not in ("histogram", "share")} for row in found.rows]
    notes = [*found.notes, *(f"{name} {version}" for name, version in versions().items())]
    return write_report(path, found.evaluation, found.points, curve=found.curve, title=title, rows=rows, notes=notes)


@app.command("list", epilog="Example: pliant list --section 2.1.1 --works --json")
def list_(
    pattern: Annotated[str, typer.Argument(help="Ids to show, with * and ?.")] = "*",
    section: Annotated[str | None, typer.Option(help="Only this section of the survey.")] = None,
    works: Annotated[bool, typer.Option("--works", help="Only what works.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the catalogue: every system of the survey, and whether it works here."""
    from fnmatch import fnmatchcase

    from pliant.systems.table import in_section, rows

    found = [
        {"id": r.id, "name": r.name, "survey": r.survey, "ref": r.ref, "status": r.status, "evidence": r.evidence}
        for r in rows()
        if fnmatchcase(r.id, pattern)
        and (section is None or in_section(r, section))
        and (not works or r.status == "works")
    ]
    if as_json:
        _print_json(found)
        return
    table = Table("id", "name", "survey", "ref", "status", "evidence")
    for row in found:
        table.add_row(*(str(v) if v is not None else "" for v in row.values()))
    out.print(table)
    out.print(f"{len(found)} rows, {sum(r['status'] == 'works' for r in found)} work")


@app.command(epilog="Example: pliant info msdnet")
def info(id: Annotated[str, typer.Argument(help="Id from 'pliant list'.")], as_json: AsJson = False) -> None:
    """Show one row of the catalogue and, where it works, the arguments of its constructor."""
    import inspect

    from pliant.systems.table import builder, row

    with _told():
        found = row(id)
        arguments = {}
        if found.status == "works":
            parameters = inspect.signature(builder(id)).parameters.values()
            arguments = {p.name: None if p.default is p.empty else p.default for p in parameters}
    value = {
        "id": found.id, "name": found.name, "survey": found.survey, "ref": found.ref, "paper": found.paper,
        "status": found.status, "component": found.component, "evidence": found.evidence, "arguments": arguments,
    }  # fmt: skip
    if as_json:
        _print_json(value)
        return
    for name, what in value.items():
        out.print(f"{name:>10}  {what}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: pliant train --data digits --to runs/digits")
def train(
    to: Annotated[Path, typer.Option("--to", help="Folder for the trained model.")],
    data: Data = "digits", root: Root = None, seed: Seed = 0, as_json: AsJson = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of training; default, the recipe's.")] = None,
) -> None:  # fmt: skip
    """Train the recipe's network on a data set and save it. Interrupted, the same command goes on where it stopped."""
    from pliant.deploy.pretrained import save_pretrained
    from pliant.study import RECIPES, accuracy, with_epochs
    from pliant.study import train as run

    with _told(), _progress() as progress:
        recipe = _recipe(RECIPES, data)
        recipe = recipe if epochs is None else with_epochs(recipe, epochs)
        loaded = _load(data, root)
        to.mkdir(parents=True, exist_ok=True)
        checkpoint = to / "training.ckpt"
        model = run(recipe, loaded, seed=seed, progress=progress, checkpoint=checkpoint)
        save_pretrained(model, to)
        checkpoint.unlink(missing_ok=True)
        right = accuracy(model, loaded.val)[0]
    value = {"model": str(to), "val_accuracy": right, "data": data, "note": loaded.note, "seed": seed}
    _print_json(value) if as_json else out.print(f"{to}: validation accuracy {right:.2%}", soft_wrap=True)


@app.command(epilog="Example: pliant tune runs/digits --data digits --budget 0.5")
def tune(
    model: Model, data: Data = "digits", root: Root = None, as_json: AsJson = False,
    budget: Annotated[float | None, typer.Option(help="Share of dense FLOPs, in (0, 1].")] = None,
    risk: Annotated[float | None, typer.Option(help="Allowed loss of held-out accuracy, in [0, 1].")] = None,
) -> None:  # fmt: skip
    """Set a saved model's thresholds on held-out data and save them with it."""
    from pliant.deploy.pretrained import save_pretrained
    from pliant.study import batches
    from pliant.tune import tune as run

    with _told():
        network = _from(model)
        point = run(network, batches(_load(data, root).val), budget=budget, risk=risk)
        save_pretrained(network, model)
    if as_json:
        _print_json(point.to_dict())
    else:
        out.print(
            f"held-out accuracy {point.accuracy:.2%} at {point.share:.1%} of dense FLOPs; saved in {model}",
            soft_wrap=True,
        )


def _from(folder: Path) -> nn.Module:
    from pliant.deploy.pretrained import from_pretrained

    return from_pretrained(folder).eval()


@app.command(epilog="Example: pliant evaluate runs/digits --data digits --json")
def evaluate(model: Model, data: Data = "digits", root: Root = None, as_json: AsJson = False) -> None:
    """Run a saved model on the test part: accuracy, executed FLOPs, seconds, and who left where."""
    from pliant.study import measured

    with _told():
        loaded = _load(data, root)
        value = {**measured(_from(model), loaded), "data": data, "note": loaded.note}
    if as_json:
        _print_json(value)
        return
    for name, what in value.items():
        out.print(f"{name:>16}  {what}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: pliant report runs/digits --data digits --out digits.html")
def report(
    model: Model, data: Data = "digits", root: Root = None,
    path: Annotated[Path, typer.Option("--out", help="Where the HTML report goes.")] = Path("pliant-report.html"),
) -> None:  # fmt: skip
    """Write the report of a saved multi-exit model: one self-contained page."""
    from pliant.study import reported

    with _told():
        written = _write_report(reported(_from(model), _load(data, root)), path, f"{model.name} on {data}")
    out.print(str(written), soft_wrap=True)


@app.command(epilog="Example: pliant export runs/digits digits.onnx --data digits")
def export(
    model: Annotated[str, typer.Argument(help="Folder written by save_pretrained, or an id: that with random weights.")],
    path: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    data: Data = "digits", root: Root = None, as_json: AsJson = False,
    shape: Annotated[str | None, typer.Option(help="Of one input, such as 3,32,32; default, what --data has.")] = None,
    words: Annotated[int | None, typer.Option(min=2, help="Inputs are word numbers below this one.")] = None,
    arguments: Annotated[list[str] | None, typer.Option("--set", help="With an id: NAME=VALUE of its constructor.")] = None,
) -> None:  # fmt: skip
    """Write one ONNX file that skips for real at any batch size; its thresholds stay an input of the graph."""
    from pliant.deploy.onnx import described, example_of, export_onnx

    with _told():
        network = _built(model, arguments or [])
        example = _load(data, root).val.x[:4] if shape is None else example_of(shape, words)
        value = {"model": model, **described(export_onnx(network, path, example))}
    if as_json:
        _print_json(value)
        return
    for name, what in value.items():
        out.print(f"{name:>10}  {what}", highlight=False, markup=False, soft_wrap=True)


def _built(model: str, arguments: list[str]) -> nn.Module:
    """The model of a folder, or a new one of an id."""
    from pliant.systems.create import create_model

    if Path(model).is_dir() or "/" in model:
        return _from(Path(model))
    given: dict[str, Any] = {}
    for argument in arguments:
        name, found, value = argument.partition("=")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
        if not found:
            raise PliantError(got=f"--set {argument}", expected="NAME=VALUE", do="pass e.g. --set exits=3")
    return create_model(model, **given).eval()


@app.command(epilog="Example: pliant reproduce msdnet --root ~/data")
def reproduce(
    id: Annotated[str, typer.Argument(help="Id of a system with a file in evidence/.")],
    root: Root = None, as_json: AsJson = False,
    folder: Annotated[Path, typer.Option("--evidence", help="The evidence folder.")] = Path("evidence"),
) -> None:  # fmt: skip
    """Run a system's claims on real data and write evidence/results/ID.json. Exit code 1 where a claim fails."""
    from pliant.reproduce import reproduce as run

    with _told(), _progress() as progress:
        result = run(id, folder=folder, root=root, progress=progress)
    if as_json:
        _print_json(result)
    else:
        table = Table("claim", "measured", "bound", "held", title=f"{id} on {result['data']}")
        for claim in result["claims"]:
            table.add_row(claim["claim"], claim["measured"], claim["bound"], "held" if claim["held"] else "FAILED")
        out.print(table)
    if not all(claim["held"] for claim in result["claims"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
