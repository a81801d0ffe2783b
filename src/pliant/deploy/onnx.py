"""ONNX: one file that skips for real at any batch size, with the thresholds an input of the graph."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core import tape
from pliant.core.bind import clean, executors, named, share
from pliant.core.calls import prediction_of
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.files import atomic
from pliant.core.site import Site
from pliant.deploy.lazy import put_behind_ifs
from pliant.tune.point import dial

_LIMIT = 2**31 - 2**20  # bytes that one ONNX file can hold, less some room for the graph itself


def export_onnx(model: nn.Module, path: str | Path, example: Any) -> Path:
    r"""Write ``model`` as one ONNX file that skips for real, at any batch size, one row and none included.

    Rows that leave are dropped from the later stages (``NonZero``, ``Gather``, the stage, ``ScatterND``), and a stage that
    nobody reaches doesn't run: it stands behind an ``If`` (with one dummy row where its rows don't come back by a scatter).

    Inputs: the model's own, and ``thresholds`` :math:`(S,)` float, the dials of the :math:`S` sites whose rule has one, in the
    order of ``pliant.sites(model)``; its default is where they stand now, so it needn't be fed (ONNX Runtime warns
    once that such a default is no constant: it's meant). Outputs: ``logits``, and for
    a model with exits ``exit`` :math:`(R,)` int64, the index of the exit where each row left. Metadata: ``pliant.thresholds``
    (JSON, by site, in the order of the input; infinities as strings), ``pliant.id`` and ``pliant.version``.

    Shape:
        ``example``: tensors with rows first, :math:`(R, ...)`; :math:`R` becomes dynamic, the other dimensions stay.

    Args:
        model: any model with sites, in any mode; what's exported is its evaluation.
        path: of the file; an existing one is replaced when the new one is whole.
        example: a tensor, a tuple of arguments, or a mapping of keyword arguments, with at least two rows; one row serves
            where it's a single tensor.

    Returns:
        The path.

    Raises:
        PliantError: where the packages for export are missing, the example doesn't fit, a threshold is NaN, or the exporter
            can't follow the model.

    >>> import pliant, tempfile, onnxruntime
    >>> model = pliant.create_model("msdnet", num_classes=4, exits=2, base=1, step=1, channels=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export_onnx(model, folder + "/model.onnx", torch.randn(2, 3, 16, 16))
    ...     session = onnxruntime.InferenceSession(file)
    >>> session.get_modelmeta().custom_metadata_map["pliant.thresholds"]
    '{"sites.0": 0.5}'

    References:
        Survey sections 2.1.1 and 6 (gap between theory and practice).
    """
    onnx = _packages()
    path = Path(path)
    served = _Served(model)
    args, kwargs = _call(example)
    program = _program(served, args, kwargs)
    inputs = [*_input_names(args, kwargs), *(["thresholds"] if served.dials else [])]
    outputs = ["logits", *(["exit"] if served.leaves else [])]
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > _LIMIT:
        raise PliantError(
            got=f"a model of {size / 2**30:.1f} GiB", expected="less than 2 GiB, what one ONNX file holds",
            do="export it in half precision",
        )  # fmt: skip
    proto = _translated(program, inputs, outputs)
    put_behind_ifs(onnx, proto.graph)
    _name_rows(proto)
    now = {path: float(value) for path, value in served.thresholds().items()}
    if now:
        # An initializer of an input's name is its default, which the optimiser must leave alone.
        default = onnx.numpy_helper.from_array(torch.tensor(list(now.values())).numpy(), "thresholds")
        proto.graph.initializer.append(default)
    config = getattr(model, "pliant_config", None) or {}
    from pliant import __version__  # the package is whole by now

    said = {
        "pliant.thresholds": json.dumps({p: v if math.isfinite(v) else str(v) for p, v in now.items()}),
        "pliant.id": str(config.get("id", "")),
        "pliant.version": __version__,
    }
    for key, value in said.items():
        proto.metadata_props.add(key=key, value=value)
    with atomic(path) as part:
        part.write_bytes(proto.SerializeToString())
    return path


def described(path: Path) -> dict[str, Any]:
    """What an exported file takes and gives, where its thresholds stand, and its size."""
    proto = _packages().load(path)
    names = {1: "float32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}

    def told(value: Any) -> str:
        t = value.type.tensor_type
        shape = ", ".join(d.dim_param or str(d.dim_value) for d in t.shape.dim)
        return f"{names.get(t.elem_type, t.elem_type)} ({shape})"

    return {
        "file": str(path), "bytes": path.stat().st_size,
        "inputs": {value.name: told(value) for value in proto.graph.input},
        "outputs": {value.name: told(value) for value in proto.graph.output},
        "thresholds": json.loads(next(p.value for p in proto.metadata_props if p.key == "pliant.thresholds")),
    }  # fmt: skip


def example_of(shape: str, words: int | None = None) -> Tensor:
    """Four made inputs of a shape such as "3,32,32": normal numbers, or word numbers below ``words``.

    Raises:
        PliantError: where the shape isn't one.

    >>> example_of("3,8,8").shape, example_of("5", words=9).dtype
    (torch.Size([4, 3, 8, 8]), torch.int64)
    """
    sizes = [int(n) if n.strip().isdigit() else 0 for n in shape.split(",")]
    if min(sizes) < 1:
        raise PliantError(got=f"the shape {shape!r}", expected="that of one input", do="pass e.g. 3,32,32")
    own = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, *sizes, generator=own) if words is None else torch.randint(1, words, (4, *sizes), generator=own)
    )


class _Served(nn.Module):
    """What's exported: the model in evaluation, its thresholds arguments, its answer beside the exit that gave it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: nn.Module = share(model).eval()
        self.dials: dict[str, str] = {}
        for name, site in named(self.model):
            if not isinstance(site, Site):
                continue
            site.rule = copy.deepcopy(site.rule)  # two sites may share one rule; each gets a dial of its own
            place, rule = f"{name}.rule" if name else "rule", site.rule
            while isinstance(inner := getattr(rule, "rule", None), nn.Module):
                place, rule = f"{place}.rule", inner
            threshold = dial(site)
            # A rule with a threshold per channel keeps it as it is: a dial is one number.
            if threshold is not None and threshold.numel() == 1 and _registered(rule, threshold):
                self.dials[clean(name)] = f"{place}.threshold"
        for site, value in self.thresholds().items():
            if value.isnan():
                raise PliantError(
                    got="a threshold that is NaN", expected="a number", do="tune the model again", site=site
                )
        self.leaves = _chain(self.model) is not None

    def thresholds(self) -> dict[str, Tensor]:
        """By site, where the dials stand."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {site: tensors[name].detach() for site, name in self.dials.items()}

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], thresholds: Tensor | None) -> tuple[Tensor, ...]:
        """Logits, and where rows leave at exits, the index of the exit."""
        turned: dict[str, Tensor] = {}
        if thresholds is not None:
            now = self.thresholds().values()
            turned = {
                name: (value.reshape(old.shape) if old.ndim else value).to(old.dtype)
                for name, value, old in zip(self.dials.values(), thresholds.unbind(0), now, strict=True)
            }
        with ExitStack() as stack:
            written = stack.enter_context(tape.opened(tape.Tape())) if self.leaves else None
            y = torch.func.functional_call(self.model, turned, args, kwargs)
        logits = y if isinstance(y, Tensor) else prediction_of(y)
        return (logits,) if written is None else (logits, self._left(written, logits))

    def _left(self, written: tape.Tape, logits: Tensor) -> Tensor:
        """The exit where each row left: as the chain says, or of the sites before it, every one said to go on."""
        chain = _chain(self.model)  # found anew: the exporter puts stand-ins for modules
        if id(chain) in written.left:
            return written.left[id(chain)].ceil().to(torch.int64)
        own = {id(site) for site in chain.sites}
        left = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        for site, decision in written.decisions:
            if id(site) in own:
                left = left + (decision.dense(logits.shape[0]) > 0).to(torch.int64)
        return left


def _registered(rule: Any, threshold: Tensor) -> bool:
    return any(t is threshold for t in (*rule._buffers.values(), *rule._parameters.values()))


def _chain(model: nn.Module) -> Any:
    """The one executor whose exits a row leaves by; None where there is none, or several side by side."""

    def has_exits(m: Executor) -> bool:
        return all(isinstance(getattr(m, part, None), nn.ModuleList) for part in ("sites", "heads"))

    chains = [m for m in executors(model) if has_exits(m)]
    within = {id(m) for m in chains[0].modules()} if chains else set()
    return chains[0] if chains and all(id(m) in within for m in chains) else None


def _packages() -> Any:
    try:
        importlib.import_module("onnxscript")
        importlib.import_module("onnx.numpy_helper")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise PliantError(
            got=f"no package {error.name!r}", expected="onnx and onnxscript", do="pip install 'pliant[export]'"
        ) from error


def _call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with at least two rows: PyTorch takes a size of one for a constant."""
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    rows = tensors[0].shape[0] if tensors and tensors[0].ndim else 0
    if rows == 0 or (rows == 1 and len(tensors) > 1):
        raise PliantError(
            got="an example " + (f"of {rows} rows" if tensors else "without tensors"),
            expected="tensors with at least two rows", do="pass a batch such as the model is served with",
        )  # fmt: skip

    def own(t: Any) -> Any:  # copies: the same tensor passed twice would count as one input
        return (t.repeat(2, *[1] * (t.ndim - 1)) if rows == 1 else t.clone()) if isinstance(t, Tensor) else t

    return pytree.tree_map(own, (args, kwargs))


def _input_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """One name per tensor: ``input``, ``input_1``, ... by place, and keyword arguments by their own."""
    places = len([t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)])
    names = ["input" if i == 0 else f"input_{i}" for i in range(places)]
    for key, value in kwargs.items():
        inner = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        names += [key] if len(inner) == 1 else [f"{key}_{i}" for i in range(len(inner))]
    return names


def _program(served: _Served, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The graph of PyTorch, with a dynamic number of rows."""
    shapes = torch.export.ShapesCollection()
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    for t in tensors:
        if t.ndim and t.shape[0] == tensors[0].shape[0]:
            shapes[t] = {0: torch.export.Dim.DYNAMIC}
    now = list(served.thresholds().values())
    thresholds = torch.stack([t.reshape(()).float() for t in now]) if now else None
    try:
        with torch.no_grad():
            return torch.export.export(served.eval(), (args, kwargs, thresholds), dynamic_shapes=shapes)
    except PliantError:
        raise
    except Exception as error:  # whatever the exporter raises, the model is what it couldn't follow
        raise _unfollowed("torch.export", error) from error


def _translated(program: Any, inputs: list[str], outputs: list[str]) -> Any:
    try:
        with redirect_stdout(StringIO()):
            made = torch.onnx.export(
                program, input_names=inputs, output_names=outputs, dynamo=True, external_data=False, verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _sort_stable},
            )  # fmt: skip
    except Exception as error:  # as above
        raise _unfollowed("torch.onnx.export", error) from error
    return made.model_proto  # pyright: ignore[reportOptionalMemberAccess]


def _sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK of all: among equals the lower index comes first, which is what a stable sort promises."""
    op = importlib.import_module("onnxscript").opset18
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _unfollowed(exporter: str, error: Exception) -> PliantError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return PliantError(
        got=f"{type(error).__name__} from {exporter}: {first[:300]}", expected="a model that it can follow",
        do="use no Python branch on data and no .item() in forward, and only operators that ONNX has",
    )  # fmt: skip


def _name_rows(proto: Any) -> None:
    """Call the dynamic first dimension ``rows`` wherever a reader looks."""
    old = next((d.dim_param for i in proto.graph.input for d in i.type.tensor_type.shape.dim[:1] if d.dim_param), None)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if old is not None and dim.dim_param == old:
                dim.dim_param = "rows"
