"""The main job end to end: train a multi-exit network, tune it to budgets, run it, and measure what was bought."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core.bind import bind, sites
from pliant.core.calls import call_of
from pliant.core.errors import PliantError
from pliant.core.trace import record
from pliant.cost.count import describe, prices
from pliant.cost.meter import interleaved, realised_share, threads
from pliant.data import Dataset, RandomCrop, RandomFlip, Split
from pliant.insight.calibration import calibrations
from pliant.insight.evaluation import Evaluation, Point, exits_at, random_exits, summary
from pliant.losses import CrossEntropy, MultiExit, Total
from pliant.rules.fixed import Always
from pliant.systems.create import create_model
from pliant.train import Fit, Phase, fit
from pliant.tune import OperatingPoint, collect, geometric, tune
from pliant.tune.held_out import HeldOut, is_chain
from pliant.tune.point import dial as dial_of


@dataclass(frozen=True)
class Recipe:
    """What to build and how to train it on one data set, as data.

    Args:
        id: of the catalogue.
        model: keyword arguments of the system.
        phases: of training.
        batch: rows per step.
        rows: training rows used; None for all.
        augment: transforms of training images.
        static: keyword arguments that make a static network of the same family, and the values to size it by.
        threads: of PyTorch while training; one is the fastest for tiny networks, and more crawl where others compute too.
    """

    id: str
    model: Mapping[str, Any]
    phases: tuple[Phase, ...]
    batch: int = 64
    rows: int | None = None
    augment: tuple[Callable[..., Tensor], ...] = ()
    static: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    threads: int = 1


def _sgd(epochs: int) -> tuple[Phase, ...]:
    """MSDNet's optimiser with a cosine schedule, which suits short runs better than steps."""
    return (
        Phase(
            "joint",
            epochs=epochs,
            optimizer="sgd",
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            schedule="cosine",
        ),
    )


_IMAGES = {"exits": 5, "base": 1, "step": 1, "growing": 1, "channels": 8}
_STATIC_IMAGES = {"base": (1, 2, 3, 4, 6, 8, 10), "channels": (4, 6, 8, 12, 16)}
RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        "msdnet",
        {
            "exits": 4,
            "base": 1,
            "step": 2,
            "channels": 8,
            "growth": 8,
            "factors": (1, 2),
            "bottlenecks": (1, 2),
            "head_channels": 8,
        },
        _sgd(10),
        static={"base": (1, 2, 3, 4, 5), "channels": (2, 4, 6, 8)},
    ),
    "fashion_mnist": Recipe("msdnet", _IMAGES, _sgd(3), rows=6_000, augment=(RandomFlip(),), static=_STATIC_IMAGES),
    "cifar10": Recipe(
        "msdnet", _IMAGES, _sgd(5), rows=6_000, augment=(RandomCrop(4), RandomFlip()), static=_STATIC_IMAGES
    ),
}


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with ``epochs`` epochs in each phase."""
    return replace(recipe, phases=tuple(replace(phase, epochs=epochs) for phase in recipe.phases))


@dataclass(frozen=True)
class Row:
    """One line of the table: a budget and what it bought on the test part; costs per image, seconds on one thread."""

    budget: float
    accuracy: float
    gflops: float
    gmacs: float
    share: float
    seconds_dense: float
    seconds_dynamic: float
    realised_saving: float
    random_accuracy: float
    static_accuracy: float
    static_gflops: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """All that the table, the report and ``--json`` need."""

    model: nn.Module
    evaluation: Evaluation
    points: tuple[Point, ...]
    tuned: tuple[OperatingPoint, ...]
    curve: tuple[tuple[float, ...], ...]
    rows: tuple[Row, ...]
    dense_accuracy: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "dense_accuracy": self.dense_accuracy, "dense_gflops": self.evaluation.dense_flops / 1e9,
            "rows": [asdict(r) for r in self.rows], "points": [p.to_dict() for p in self.tuned], "notes": list(self.notes),
        }  # fmt: skip


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def quiet(_what: str, _done: int, _of: int) -> None:
    """Show nothing."""


def train(recipe: Recipe, data: Dataset, *, seed: int = 0, loss: Total | None = None, progress: Progress = quiet,
          what: str = "training", checkpoint: Path | None = None) -> nn.Module:  # fmt: skip
    """Build the recipe's system for ``data`` and train it; the same seed gives the same network.

    Args:
        recipe: what and how.
        data: its training part is used and nothing else.
        seed: of initialisation, order and augmentation.
        loss: default, the sum of all exits' cross-entropies.
        progress: shown after every epoch.
        what: how to call it.
        checkpoint: where training stands after each epoch; an interrupted run goes on from it.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(seed)
    model = create_model(recipe.id, num_classes=len(data.classes), in_chans=data.shape[0], **recipe.model)
    total = sum(phase.epochs for phase in recipe.phases)
    part = data.train if recipe.rows is None else data.train.take(min(recipe.rows, len(data.train)))
    before = dict(
        zip(
            (p.name for p in recipe.phases),
            itertools.accumulate((p.epochs for p in recipe.phases), initial=0),
            strict=False,
        )
    )
    options = Fit(
        batch_size=recipe.batch, seed=seed, augment=recipe.augment, checkpoint=checkpoint,
        on_epoch=lambda entry: progress(what, before[entry["phase"]] + entry["epoch"], total),
    )  # fmt: skip
    progress(what, 0, total)
    with threads(recipe.threads):
        fit(model, part, loss or Total({"exits": (1.0, MultiExit())}), recipe.phases, options=options)
    return model.eval()


def static_sizes(recipe: Recipe, data: Dataset) -> list[tuple[int, Recipe]]:
    """Static networks of the same family, one exit each, by their counted FLOPs per input."""
    example = describe((torch.zeros(1, *data.shape),), {})
    found: list[tuple[int, Recipe]] = []
    for values in itertools.product(*recipe.static.values()):
        kwargs = {**recipe.model, "exits": 1, **dict(zip(recipe.static, values, strict=True))}
        model = create_model(recipe.id, num_classes=len(data.classes), in_chans=data.shape[0], **kwargs).eval()
        found.append((prices(model, example).root.own, replace(recipe, model=kwargs)))
    if not recipe.static:
        raise PliantError(
            got="a recipe without sizes for a static network",
            expected="static={...}",
            do="name the arguments to size it by",
        )
    return found


@torch.no_grad()
def accuracy(model: nn.Module, part: Split, *, batch: int = 256) -> tuple[float, float, Tensor]:
    """Accuracy, mean executed FLOPs and the predicted classes of really running ``model`` on ``part``."""
    predicted, flops = [], 0
    recorder = record(model)
    for x in part.x.split(batch):
        y, trace = recorder(x)
        predicted.append(y.argmax(-1))
        flops += int(trace.flops.sum())
    classes = torch.cat(predicted)
    return (classes == part.y).double().mean().item(), flops / len(part), classes


def evaluation_of(model: nn.Module, data: Dataset, *, held: HeldOut | None = None) -> Evaluation:
    """What every exit of ``model`` says about the test part, with the images as they look."""
    held = collect(model, batches(data.test)) if held is None else held
    images = None
    if data.kind == "image":
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (data.mean, data.std))
        images = (data.test.x * std + mean).clamp(0, 1)
    scorers = {path: site.scorer for path, site in sites(model).items()}
    # The last exit has no site, so no temperature either.
    scales = [float(getattr(scorers[path], "temperature", 1.0)) for path in held.sites] + [1.0]
    probabilities = (held.logits / torch.tensor(scales)[:, None, None]).softmax(-1)
    return Evaluation(
        held.scores,
        held.logits.argmax(-1),
        held.labels,
        held.flops,
        int(held.flops.max()),
        data.classes,
        images,
        probabilities,
    )


def batches(part: Split, size: int = 256) -> list[tuple[Tensor, Tensor]]:
    """The rows of ``part`` in order, in batches."""
    return list(zip(part.x.split(size), part.y.split(size), strict=True))


def _seconds(
    model: nn.Module, part: Split, *, batch: int = 256, rows: int = 512, rounds: int = 7
) -> tuple[float, float]:
    """Seconds per image, dense and dynamic, on the same modules in the same run, one thread."""
    dense = bind(model, {"*": Always()})
    chunks = part.x[:rows].split(batch)
    found = interleaved(
        {"dense": lambda: [dense(x) for x in chunks], "dynamic": lambda: [model(x) for x in chunks]}, rounds=rounds
    )
    count = min(rows, len(part))
    return found["dense"].minimum / count, found["dynamic"].minimum / count


def study(
    recipe: Recipe,
    data: Dataset,
    *,
    budgets: Sequence[float] = (0.3, 0.5, 0.7),
    seed: int = 0,
    progress: Progress = quiet,
) -> Study:
    """Train, tune on the held-out part, run on the test part, and compare with random exits and static networks.

    Args:
        recipe: what and how.
        data: train, val and test parts are used for just what their names say.
        budgets: shares of dense FLOPs.
        seed: of everything random.
        progress: told what is being done.

    Returns:
        The study.
    """
    model = train(recipe, data, seed=seed, progress=progress)
    progress("tuning", 0, len(budgets))
    validation = batches(data.val)
    tune(model, validation, budget=max(budgets))  # fits the temperatures; from here on they stay, and thresholds move
    held, result = collect(model, validation), evaluation_of(model, data)
    sizes = static_sizes(recipe, data)
    dense_accuracy = accuracy(bind(model, {"*": Always()}), data.test)[0]
    tuned: list[OperatingPoint] = []
    rows: list[Row] = []
    for k, budget in enumerate(budgets):
        point = tune(model, validation, budget=budget, temperature=None)
        progress("tuning", k + 1, len(budgets))
        right, flops, _ = accuracy(model, data.test)
        dense_seconds, seconds = _seconds(model, data.test)
        histogram = summary(result, list(point.thresholds.values())).histogram
        size, twin = min(sizes, key=lambda found, wanted=flops: abs(found[0] / wanted - 1))
        static = train(twin, data, seed=seed, loss=Total({"task": (1.0, CrossEntropy())}), progress=progress,
                       what=f"static network for {budget:.0%}")  # fmt: skip
        tuned.append(point)
        rows.append(Row(
            budget=budget, accuracy=right, gflops=flops / 1e9, gmacs=flops / 2e9, share=flops / result.dense_flops,
            seconds_dense=dense_seconds, seconds_dynamic=seconds,
            realised_saving=realised_share(seconds, dense_seconds, flops, result.dense_flops),
            random_accuracy=random_exits(result, histogram), static_accuracy=accuracy(static, data.test)[0],
            static_gflops=size / 1e9, histogram=histogram,
        ))  # fmt: skip
    points = tuple(Point(f"{p.budget:.0%} budget", p.budget, tuple(p.thresholds.values())) for p in tuned)
    notes = (data.note,) if data.note else ()
    return Study(model, result, points, tuple(tuned), dial(held), tuple(rows), dense_accuracy, notes)


def dial(held: HeldOut, positions: int = 41) -> tuple[tuple[float, ...], ...]:
    """Threshold vectors from the cheapest path to the dense network, by the geometric protocol on held-out data."""
    low, high = float(held.flops.min()), float(held.flops.max())
    inner = [geometric(held, low + (high - low) * k / (positions - 1)).tolist() for k in range(1, positions - 1)]
    ends = ([float("inf")] * len(held.sites), [float("-inf")] * len(held.sites))
    return tuple(map(tuple, [ends[0], *inner, ends[1]]))


def reported(model: nn.Module, data: Dataset) -> Study:
    """What the report of a saved multi-exit model needs: its own operating point, and the dial from held-out data.

    Raises:
        PliantError: where the model isn't a chain of exits.
    """
    if not is_chain(model, call_of(data.val.x[:1])):
        raise PliantError(
            got="a model that isn't a chain of exits", expected="sites that are the exits of one chain",
            do="use 'pliant evaluate' for gated models",
        )  # fmt: skip
    held, result = collect(model, batches(data.val)), evaluation_of(model, data)
    point: OperatingPoint | None = getattr(model, "operating_point", None)
    points = () if point is None else (Point("operating point", point.budget, tuple(point.thresholds.values())),)
    dense_accuracy = accuracy(bind(model, {"*": Always()}), data.test)[0]
    return Study(
        model,
        result,
        points,
        () if point is None else (point,),
        dial(held),
        (),
        dense_accuracy,
        (data.note,) if data.note else (),
    )


def measured(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """Accuracy, executed and dense FLOPs, seconds, and for a chain who left where, on the test part."""
    right, flops, _ = accuracy(model, data.test)
    dense_right, dense_flops, _ = accuracy(bind(model, {"*": Always()}), data.test)
    dense_seconds, seconds = _seconds(model, data.test)
    found: dict[str, Any] = {
        "accuracy": right, "gflops": flops / 1e9, "gmacs": flops / 2e9, "share": flops / dense_flops,
        "dense_accuracy": dense_right, "dense_gflops": dense_flops / 1e9, "seconds": seconds, "dense_seconds": dense_seconds,
        "realised_saving": realised_share(seconds, dense_seconds, flops, dense_flops),
    }  # fmt: skip
    if is_chain(model, call_of(data.test.x[:1])):
        result = evaluation_of(model, data)
        thresholds = [float(dial_of(site)) for site in sites(model).values()]  # pyright: ignore[reportArgumentType]
        found["left_at"] = list(summary(result, thresholds).histogram)
        if result.probabilities is not None:
            exits = exits_at(result, thresholds)
            each = calibrations(result.probabilities, result.labels, exits)
            found["calibration"] = [
                {k: None if v != v else v for k, v in vars(c).items() if k != "bins"} for c in each
            ]  # JSON knows no NaN
    return found
