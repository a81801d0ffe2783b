"""Fold batch norms into convolutions and lay features out as the processor likes them: the same network, faster."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import _pytree as pytree

from pliant.core.bind import bind, executors, named, sites
from pliant.core.errors import PliantError
from pliant.core.trace import record
from pliant.cost.meter import interleaved
from pliant.rules.fixed import Always, Never

_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_TOLERANCE = 1e-3
_SMALL = 2**15  # weights below which one row alone is faster without oneDNN, measured on MSDNet

# oneDNN's convolution with weights in its own layout and the ReLU inside; what torch.compile's CPU code calls as well.
_direct: Any = torch.ops.aten.mkldnn_convolution
_packed: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_pack: Any = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)


class _Packed:
    """A weight in oneDNN's own layout. Copies of a module share it; it's only used for the weight that it was made of."""

    def __init__(self, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int) -> None:
        self.made_of = _version(weight)
        self.weight = _pack(weight.detach(), list(padding), list(stride), list(dilation), groups, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _stale, ()


def _stale() -> _Packed:
    """What fits no weight: in a file, where it's packed again when it's read, and where oneDNN can't serve."""
    packed = _Packed.__new__(_Packed)
    packed.made_of = (0, -1)
    return packed


def _version(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight's numbers do (but for tensors made in inference mode, which count no versions)."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class FoldedConv(nn.Module):
    """A convolution that took in its batch norm, and the ReLU behind it where there is one; for inference only."""

    def __init__(self, conv: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.activation = activation
        self.packed: _Packed | None = None
        self.train(conv.training)
        # PyTorch sends a 1x1 convolution of fewer than 16 rows on one thread to a kernel that is half as fast.
        self.direct = (
            type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            and torch.backends.mkldnn.is_available()
        )  # fmt: skip
        self.small = conv.weight.numel() < _SMALL  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.register_load_state_dict_post_hook(_pack_again)

    def pack(self) -> None:
        """Keep the weight in oneDNN's own layout too, which otherwise is made anew in every call. Implies channels last."""
        c: Any = self.conv
        suits = self.direct and None not in (_packed, _pack) and c.weight.dtype == torch.float32 and c.weight.is_cpu
        self.packed = _Packed(c.weight, c.padding, c.stride, c.dilation, c.groups) if suits else _stale()

    def _fits(self) -> bool:
        """Whether what is packed is the weight as it is now."""
        return self.packed is not None and self.packed.made_of == _version(self.conv.weight)  # pyright: ignore[reportArgumentType]

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        super()._apply(fn, recurse)
        _pack_again(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _pack_again(self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, in the fastest of the kernels that do the same."""
        if self.training:
            raise PliantError(
                got="a folded model in training mode",
                expected="evaluation: its batch norms are gone",
                do="train the model it was made of, then call optimised(model) again",
            )
        c: Any = self.conv
        if not (self.direct and _suits(x) and x.dtype == c.weight.dtype) or (self.small and x.shape[0] == 1):
            y = c(x)
        elif self.packed is not None and self._fits() and not _wants_gradient(x):
            relu = "none" if self.activation is None else "relu"
            return _packed(
                x, self.packed.weight, c.bias, c.padding, c.stride, c.dilation, c.groups, relu, [], ""
            )  # fmt: skip
        else:
            y = c(x) if x.shape[0] == 1 else _direct(x, c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups)
        return y if self.activation is None else self.activation(y)


def _pack_again(module: FoldedConv, *_: Any) -> None:
    """Pack what was packed and has another weight now."""
    if module.packed is not None and not module._fits():
        module.pack()


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _suits(x: Tensor) -> bool:
    """Whether oneDNN takes ``x`` as it is: a real float32 batch on the CPU, not one that is only being traced."""
    return (
        not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu" and x.ndim == 4
        and x.shape[0] > 0 and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _foldable(conv: Any, norm: Any) -> bool:
    """Whether ``norm`` is the batch norm that fits ``conv`` and has statistics of its own."""
    kind = _NORMS.get(type(conv))
    return kind is not None and type(norm) is kind and norm.running_var is not None \
        and norm.num_features == conv.out_channels  # fmt: skip


def _uses(model: nn.Module) -> dict[int, int]:
    """How many places hold each module: one that stands in two can't be folded for one of them."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for child in module.children():
            uses[id(child)] = uses.get(id(child), 0) + 1
    return uses


def _fold_sequences(model: nn.Module) -> None:
    """Fold what stands in a row in a Sequential; the entries that go leave the others' names as they are."""
    uses = _uses(model)
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        entries = list(module._modules.items())
        for i, (name, conv) in enumerate(entries[:-1]):
            norm_name, norm = entries[i + 1]
            if not _foldable(conv, norm) or uses[id(conv)] > 1 or uses[id(norm)] > 1:
                continue
            after_name, after = entries[i + 2] if i + 2 < len(entries) else ("", None)
            activation = nn.ReLU(inplace=True) if type(after) is nn.ReLU else None
            module._modules[name] = FoldedConv(fuse_conv_bn_eval(conv, norm), activation)  # pyright: ignore[reportArgumentType]
            del module._modules[norm_name]
            if activation is not None:
                del module._modules[after_name]


def _observed(model: nn.Module, args: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Paths of convolutions and of the batch norms that read their very output, each time and nothing else."""
    made: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id comes twice
    sources: dict[str, set[str | None]] = {}
    readers: dict[str, set[str]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            source = made.get(id(inputs[0]), (None,))[0] if inputs else None
            sources.setdefault(path, set()).add(source)
            if source is not None:
                readers.setdefault(source, set()).add(path)
            if type(module) in _NORMS:
                made[id(output)] = (path, output)

        return hook

    forms: list[tuple[Any, Any]] = [(executor, executor.form) for executor in executors(model)]
    handles = [m.register_forward_hook(watch(p)) for p, m in named(model) if not list(m.children())]
    try:
        for executor, _ in forms:
            executor.form = "masked"  # so that every alternative runs
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
        for executor, form in forms:
            executor.form = form
    return [
        (conv, norm) for norm, found in sources.items() for conv in found
        if len(found) == 1 and conv is not None and readers[conv] == {norm}
        and _foldable(model.get_submodule(conv), model.get_submodule(norm))
    ]  # fmt: skip


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = new


def _fold_observed(model: nn.Module, args: tuple[Any, ...]) -> None:
    uses = _uses(model)
    for conv_path, norm_path in _observed(model, args):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        if uses[id(conv)] == uses[id(norm)] == 1:
            _replace(model, conv_path, FoldedConv(fuse_conv_bn_eval(conv, norm), None))  # pyright: ignore[reportArgumentType]
            _replace(model, norm_path, nn.Identity())


def _answers(model: nn.Module, args: tuple[Any, ...]) -> list[Any]:
    """What the model answers as it decides itself, with every site on and off, and at every exit."""
    found: list[Any] = []
    for rules in ({}, {"*": Always()}, {"*": Never()}) if sites(model) else ({},):
        y, trace = record(bind(model, rules))(*args)
        found += [y, *(made.logits for made in trace.exits)] if rules else [y]
    return pytree.tree_leaves(found)


def _check_same(model: nn.Module, folded: nn.Module, args: tuple[Any, ...]) -> None:
    with torch.no_grad():
        pairs = list(zip(_answers(model, args), _answers(folded, args), strict=True))
    for before, after in pairs:
        if isinstance(before, Tensor) and not torch.allclose(before, after, _TOLERANCE, _TOLERANCE, equal_nan=True):
            raise PliantError(
                got=f"outputs on the example that differ by {float((before - after).abs().max()):.2g} after folding",
                expected="the same outputs",
                do="fold by hand what isn't a convolution followed by its batch norm alone, or pass another example",
            )


def optimised(model: nn.Module, example: Any = None) -> Any:
    r"""A copy for inference with batch norms folded and, where it's faster, channels-last features.

    .. math:: \gamma\,\frac{W x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = W' x + b'

    Sites, their names, thresholds and the counted FLOPs stay; ``record``, ``bind`` and ``masked`` work on the copy.

    Shape:
        the copy takes and returns what ``model`` does.

    Args:
        model: in evaluation mode. Convolutions followed by a batch norm in a Sequential are found by themselves.
        example: one batch, or a tuple of arguments. With it, pairs that stand as attributes of a module are found too,
            the memory formats are timed on it, and the outputs are compared.

    Returns:
        A module of the same type that shares nothing with ``model``.

    Raises:
        PliantError: where the model is in training mode, or the folded outputs differ on the example.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fast = optimised(net)
    >>> [type(m).__name__ for m in fast], fast(torch.zeros(2, 3, 8, 8)).shape
    (['FoldedConv'], torch.Size([2, 4, 6, 6]))

    References:
        Jacob et al., Quantization and Training of Neural Networks, CVPR 2018, section 3.2 (folding).
    """
    if model.training:
        raise PliantError(
            got="a model in training mode",
            expected="evaluation, where batch norms are fixed",
            do="call model.eval() first",
        )
    args = example if isinstance(example, tuple) or example is None else (example,)
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode don't count their versions
        folded: Any = copy.deepcopy(model)
        _fold_sequences(folded)
        if args is not None:
            _fold_observed(folded, args)
            folded = _faster(folded, args)
            _check_same(model, folded, args)
    return folded


def _faster(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """``model`` with its weights in the memory format that is fastest on ``args``."""
    candidates: dict[str, nn.Module] = {"as it is": model}
    for name in ("channels last", "packed"):
        candidates[name] = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in candidates["packed"].modules():
        if isinstance(module, FoldedConv):
            module.pack()
    seconds = interleaved({name: functools.partial(m, *args) for name, m in candidates.items()}, rounds=5)
    return candidates[min(seconds, key=lambda name: seconds[name].minimum)]
