"""fit: run the phases, log every term of the loss by its name, resume exactly."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.train import checkpoint
from pliant.train.bound import bound, described, generators, hand_back, parts_of, shared_buffers
from pliant.train.launch import start
from pliant.train.order import Shard, batches, derived, sizes
from pliant.train.phases import Loss, Phase, anneal, check, identity, optimizer_of, prepare
from pliant.train.state import as_found, asked, seed
from pliant.train.step import Batch, Step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

History = list[dict[str, Any]]
"""A dict per epoch: phase, epoch (of the phase, from 1), lr (of its last step), each term's mean per row, seconds."""
_OURS = ("phase", "epoch", "lr", "seconds", "held_out")


class Data(Protocol):
    """Inputs and targets, row by row."""

    @property
    def x(self) -> Tensor:
        """Inputs, rows first."""
        ...

    @property
    def y(self) -> Tensor:
        """Targets, rows first."""
        ...


@dataclass(frozen=True)
class Fit:
    """How to run, apart from what to train.

    Args:
        batch_size: rows per step, over all processes together; a last batch of one row joins the one before it.
        seed: of order, augmentation and all noise that the model draws from PyTorch's own generators.
        augment: callables ``(x, generator) -> x``, applied in order to a batch; the generator is on the CPU.
        checkpoint: file that training is saved to and resumed from; None for none.
        every: epochs between checkpoints; one is always written at the end.
        precision: "32-true", "bf16-mixed", "16-mixed", or "auto": bf16-mixed where CUDA has it, else 32-true.
        accelerator: as Fabric names them: "auto", "cpu", "cuda", ...
        devices: how many; "auto" is one, or what ``fabric run --devices`` says.
        on_epoch: called in the first process after every epoch with its entry of the history; ``fit`` prints nothing.

    Raises:
        PliantError: where batch_size or every is below 1.

    >>> Fit(batch_size=32).precision
    '32-true'
    """

    _: KW_ONLY
    batch_size: int = 64
    seed: int = 0
    augment: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = ()
    checkpoint: Path | str | None = None
    every: int = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | str = "auto"
    on_epoch: Callable[[dict[str, Any]], object] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "every"):
            if getattr(self, name) < 1:
                raise PliantError(got=f"{name}={getattr(self, name)}", expected="at least 1", do=f"raise {name}")


def fit(model: nn.Module, data: Data, loss: Loss, phases: Sequence[Phase], *, options: Fit = Fit()) -> History:
    r"""Train ``model`` through ``phases``, minimising :math:`\sum_i L_i(y, \text{trace}, \text{target}, \text{progress})`.

    Changes the model in place. When it returns (or raises), the model is on the device it came from, its modules are in
    the mode they had and the same parameters require gradients; PyTorch's global generators are as they were.

    Resumes where ``options.checkpoint`` stands if the file exists, exactly: order, augmentation and noise of an epoch are
    functions of seed, epoch and process, so weights come out bit for bit as without the interruption (given
    deterministic operations and as many processes). A run that had ended returns at once.

    In several processes (DDP) every batch is dealt out to the processes, gradients are averaged by rows, and the result
    is that of the joint batch, except that batch norm sees each process's rows only; statistics are the first process's.

    Shape:
        ``data.x``: :math:`(N, ...)`; ``data.y``: :math:`(N, ...)`; the model maps :math:`(B, ...)` to a prediction.

    Args:
        model: any module; it is run in training mode inside ``pliant.record``.
        data: anything with tensors ``x`` and ``y``.
        loss: from (prediction, trace, target, progress) to named terms; progress is the share of all steps that are done.
        phases: run in this order; see ``plan(phases)``.
        options: how to run.

    Returns:
        The history, that of the time before an interruption included.

    Raises:
        PliantError: bad data, phases, patterns or loss; a term that isn't finite (the last good checkpoint stays); a
            checkpoint that can't be read or is of another plan, model or data set.

    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(x=torch.arange(8.0).reshape(8, 1) / 8, y=torch.arange(8.0).reshape(8, 1) / 4)
    >>> def loss(y, trace, target, progress):
    ...     return {"square": (y - target).square().mean()}
    >>> model = nn.Linear(1, 1)
    >>> history = fit(model, data, loss, [Phase("all", epochs=200, lr=0.5)], options=Fit(batch_size=8, accelerator="cpu"))
    >>> history[-1]["epoch"], round(model.weight.item(), 2)
    (200, 2.0)
    """
    _check_data(data)
    check(phases, model)
    losses = [loss if phase.loss is None else phase.loss for phase in phases]
    if any(isinstance(each, nn.Module) and any(p.requires_grad for p in each.parameters()) for each in losses):
        raise PliantError(
            got="a loss with parameters that want a gradient",
            expected="a loss without, since phases train the model's parameters only",
            do="make those parameters part of the model, or freeze them",
        )
    fabric = start(options.accelerator, options.devices, options.precision)
    run = _Run(fabric, model, data, options, tuple(phases))
    with as_found(model, fabric.device):
        run.resume()
        for number in range(len(phases)):
            run.phase(number, losses[number])
    return run.history


class _Run:
    """One call of fit: where it stands and what it needs."""

    def __init__(self, fabric: Fabric, model: nn.Module, data: Data, options: Fit, phases: tuple[Phase, ...]) -> None:
        self.fabric, self.model, self.data, self.options, self.phases = fabric, model, data, options, phases
        self.shard = Shard(fabric.global_rank, fabric.world_size)
        self.steps = len(sizes(len(data.x), options.batch_size, self.shard.world))
        self.epochs = sum(phase.epochs for phase in phases)
        self.path = None if options.checkpoint is None else Path(options.checkpoint)
        self.history: History = []
        self.lengths: list[int] = []  # epochs done of every phase that was begun
        self.bound: nn.Module = model  # what the phase trains: the model with the phase's rules
        self.resumed: dict[str, Any] = {}
        self.identity = _identity(model, data, options, phases)
        self.identity["options"]["precision"] = str(fabric.strategy.precision.precision)

    def resume(self) -> None:
        """Go to where the checkpoint stands, if there is one; the first process reads it for all."""
        if self.path is None:
            return
        found: dict[str, Any] | PliantError | None = None
        if self.fabric.is_global_zero and self.path.exists():
            try:
                found = checkpoint.load(self.path, self.identity)
            except PliantError as error:
                found = error  # raised below in every process, so that none waits for the others
        found = self.fabric.broadcast(found)
        if isinstance(found, PliantError):
            raise found
        if found is not None:
            checkpoint.load_model_state(self.model, found["model"])
            self.history, self.lengths, self.resumed = found["history"], found["lengths"], found
            for generator, state in zip(self.generators(), found["generators"], strict=True):
                generator.set_state(state)

    def generators(self) -> list[torch.Generator]:
        """Those of the rules of all phases: a later phase may draw on from where an earlier one stopped."""
        found = (generator for phase in self.phases for generator in generators(phase.rules, phase.epochs))
        return list({id(generator): generator for generator in found}.values())

    def save(self, optimizer: Any) -> None:
        """Write where training stands; tensors that the bound copy shares with the model are written once."""
        if self.path is None or not self.fabric.is_global_zero:
            return
        state = {
            "model": checkpoint.model_state(self.model),
            "bound": checkpoint.model_state(self.bound),
            "optimizer": {"state": optimizer.optimizer.state_dict(), "scaler": self.fabric.strategy.precision.state_dict()},
            "generators": [generator.get_state() for generator in self.generators()],
            "history": self.history,
            "lengths": self.lengths,
            "phase": self.phases[len(self.lengths) - 1].name,
        }  # fmt: skip
        checkpoint.save(self.path, {"identity": self.identity, **state})

    def over(self, number: int) -> bool:
        """Whether a phase was run to its end, or stopped itself."""
        phase, done = self.phases[number], sum(self.lengths[number : number + 1])
        own = self.history[sum(self.lengths[:number]) :][:done]
        return done >= phase.epochs or (phase.stop is not None and done > 0 and phase.stop(own))

    def phase(self, number: int, loss: Loss) -> None:
        """What is left of a phase."""
        if self.over(number):
            return
        phase = self.phases[number]
        if len(self.lengths) == number:
            self.lengths.append(0)
        first = self.lengths[number]
        self.fabric.to_device(self.model)  # before it is bound: buffers are shared only where nothing moves afterwards
        parts = parts_of(phase.rules, max(0, first - 1))
        step, chosen = self.bind(phase, parts, loss)
        optimizer: Any = self.fabric.setup_optimizers(optimizer_of(phase, chosen))
        if first > 0 and self.resumed:
            checkpoint.load_model_state(self.bound, self.resumed["bound"])
            optimizer.load_state_dict(self.resumed["optimizer"]["state"])
            if self.resumed["optimizer"]["scaler"]:
                self.fabric.strategy.precision.load_state_dict(self.resumed["optimizer"]["scaler"])
        for epoch in range(first, phase.epochs):
            if described(parts_of(phase.rules, epoch)) != described(parts):
                parts = parts_of(phase.rules, epoch)
                step, _ = self.bind(phase, parts, loss)
            shared = shared_buffers(self.model, self.bound)
            entry = self.epoch(number, epoch, step, optimizer)
            hand_back(shared, self.bound)
            self.history.append(entry | self.held_out(phase))
            self.lengths[number] += 1
            over = self.over(number)
            if len(self.history) % self.options.every == 0 or (over and number == len(self.phases) - 1):
                self.save(optimizer)
            if self.options.on_epoch is not None and self.fabric.is_global_zero:
                self.options.on_epoch(dict(self.history[-1]))
            if over:
                break
        optimizer.zero_grad(set_to_none=True)
        self.bound = self.model

    def bind(self, phase: Phase, parts: Any, loss: Loss) -> tuple[Any, list[nn.Parameter]]:
        """The step of the model with ``parts``, and the parameters that it trains."""
        self.bound = bound(self.model, parts)
        chosen = prepare(phase, self.bound)
        return self.fabric.setup_module(Step(self.bound, loss)), chosen

    def held_out(self, phase: Phase) -> dict[str, float]:
        """The phase's metric, as the first process finds it."""
        if phase.metric is None:
            return {}
        with asked(self.bound, self.fabric.device):
            value = float(phase.metric(self.bound))
        return {"held_out": self.fabric.broadcast(value)}

    def epoch(self, number: int, epoch: int, step: Any, optimizer: Any) -> dict[str, Any]:
        """One epoch: its entry of the history."""
        began, options, shard, phase = time.perf_counter(), self.options, self.shard, self.phases[number]
        done = sum(p.epochs for p in self.phases[:number]) + epoch  # those that a phase left out count as done
        anneal(phase, self.bound, epoch)
        seed(self.fabric.device, derived(options.seed, "noise", done, shard.rank))
        augmenting = torch.Generator().manual_seed(derived(options.seed, "augment", done, shard.rank))
        where = f"epoch {epoch + 1} of phase {phase.name!r}"
        totals: dict[str, Tensor] = {}
        rate = phase.lr
        order = batches(len(self.data.x), options.batch_size, shard, options.seed, done)
        for k, (rows, joint) in enumerate(order):
            rate = phase.rate(epoch + (k + 0.5) / self.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = self.batch(rows, augmenting, (done * self.steps + k) / (self.epochs * self.steps))
            terms = _run_step(step, batch)
            total = torch.stack(list(terms.values())).sum()
            if not total.requires_grad:
                raise PliantError(
                    got=f"a loss that no trained parameter changes, in {where}",
                    expected="terms computed from the prediction or the trace, and patterns that train what they read",
                    do="don't detach them, and widen the phase's train patterns",
                )
            self.note(totals, terms, len(rows), where)
            # Means over the rows of each process, weighted so that their average is the mean over the joint batch.
            self.fabric.backward(total * (len(rows) * shard.world / joint))
            if phase.clip is not None:
                self.fabric.clip_gradients(step, optimizer, max_norm=phase.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.settle(where)
        means = {name: value.item() / len(self.data.x) for name, value in totals.items()}
        seconds = time.perf_counter() - began
        return {"phase": phase.name, "epoch": epoch + 1, "lr": rate, **means, "seconds": seconds}

    def batch(self, rows: Tensor, generator: torch.Generator, progress: float) -> Batch:
        """The rows, augmented, on the device."""
        x, target = self.data.x[rows.to(self.data.x.device)], self.data.y[rows.to(self.data.y.device)]
        for change in self.options.augment:
            x = change(x, generator)
        return Batch(x.to(self.fabric.device), target.to(self.fabric.device), progress)

    def note(self, totals: dict[str, Tensor], terms: Mapping[str, Tensor], rows: int, where: str) -> None:
        """Add each term, weighted by rows over all processes, to its total; refuse what isn't finite, in all of them."""
        sums = torch.stack([term.detach() for term in terms.values()]).double() * rows
        if self.shard.world > 1:
            sums = torch.as_tensor(self.fabric.all_reduce(sums, reduce_op="sum"))
        bad = [name for name, finite in zip(terms, torch.isfinite(sums).tolist(), strict=True) if not finite]
        if bad:
            raise _not_finite("the loss term " + ", ".join(map(repr, bad)), where, self.path)
        for name, value in zip(terms, sums, strict=True):
            totals[name] = totals.get(name, torch.zeros_like(value)) + value

    @torch.no_grad()
    def settle(self, where: str) -> None:
        """At the end of an epoch: the first process's buffers for all, and nothing but numbers in the weights."""
        if self.shard.world > 1:
            buffers = [b for b in self.bound.buffers() if b.numel()]
            for buffer, value in zip(buffers, self.fabric.broadcast([b.cpu() for b in buffers]), strict=True):
                buffer.copy_(value)
        for name, parameter in self.bound.named_parameters():
            if not torch.isfinite(parameter).all():
                raise _not_finite(f"the parameter {name!r}", where, self.path)
        for name, buffer in self.bound.named_buffers():  # a threshold may well be infinite
            if buffer.isnan().any():
                raise _not_finite(f"the buffer {name!r}", where, self.path)


def _run_step(step: Any, batch: Batch) -> Mapping[str, Tensor]:
    """The terms of one batch."""
    try:
        terms = step(batch)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise PliantError(
                got=f"a batch of {len(batch.x)} row for a batch norm that trains",
                expected="at least two rows for each process",
                do="raise batch_size, or freeze the batch norms",
            ) from error
        raise
    if any(name in _OURS for name in terms):
        raise PliantError(
            got="a loss term named " + ", ".join(repr(n) for n in terms if n in _OURS),
            expected="names other than " + ", ".join(_OURS),
            do="rename the term: the history has its own entry of that name",
        )
    return terms


def _not_finite(what: str, where: str, path: Path | None) -> PliantError:
    kept = "" if path is None or not path.exists() else f"; the last good state is kept in {path}"
    return PliantError(
        got=f"NaN or infinity in {what} in {where}{kept}",
        expected="finite numbers",
        do="lower the learning rate, clip the gradient, or use 32-true precision",
    )


def _check_data(data: Data) -> None:
    rows, targets = len(data.x), len(data.y)
    if rows == 0 or rows != targets:
        raise PliantError(
            got=f"{rows} inputs and {targets} targets",
            expected="at least one input, and a target for each",
            do="check the split",
        )


def _identity(model: nn.Module, data: Data, options: Fit, phases: Sequence[Phase]) -> dict[str, Any]:
    """What a checkpoint has to share with the run that resumes it; plain values only."""
    plan = [identity(phase) for phase in phases]
    targets = zlib.crc32(data.y.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "plan": plan,
        "options": {"batch_size": options.batch_size, "seed": options.seed, "augment": [_name(a) for a in options.augment]},
        "model": checkpoint.shape_of(model),
        "data": {"inputs": f"{tuple(data.x.shape)} {data.x.dtype}", "targets": targets},
    }  # fmt: skip


def _name(change: Any) -> str:
    """The name of a function, the text of anything else whose text isn't an address."""
    return getattr(change, "__qualname__", None) or (
        type(change).__qualname__ if " at 0x" in repr(change) else repr(change)
    )
