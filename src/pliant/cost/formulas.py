"""Formulas for operators that PyTorch's counter reads as free: oneDNN's and int8 products, convolutions, the fused recurrent layer.

Executors and folded networks call oneDNN's directly where it's faster than what PyTorch would choose.

On a CPU ``nn.LSTM`` in float32, bfloat16 or float16 runs as ``mkldnn_rnn_layer``, one call for each layer and direction, in
training as in evaluation. Every other recurrent layer there (``nn.GRU``, ``nn.RNN``, the cells, packed sequences, float64,
projections) is made of matrix products, which the counter knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_convolutions: tuple[Any, ...] = (
    torch.ops.aten.mkldnn_convolution, getattr(torch.ops.mkldnn, "_convolution_pointwise", None),
)  # fmt: skip
_layer: Any = torch.ops.aten.mkldnn_rnn_layer
_backward: Any = torch.ops.aten.mkldnn_rnn_layer_backward


def _products(steps: Any, inputs: Any, states: Any) -> int:
    """Of input and state with their weights, (4H, I) and (4H, H), at every step of every row: 2 FLOPs a multiply-add."""
    return 2 * steps[0] * steps[1] * (inputs[0] * inputs[1] + states[0] * states[1])


if _product is not None and _product not in flop_registry:

    @register_flop_formula(_product)
    def _product_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * rows[0] * weight[0] * weight[1]


if torch.ops.aten._int_mm not in flop_registry:  # what int8 quantisation makes of a linear layer

    @register_flop_formula(torch.ops.aten._int_mm)
    def _int_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]


for _op in _convolutions:
    if _op is not None and _op not in flop_registry:

        @register_flop_formula(_op)
        def _conv_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
            return conv_flop_count(x, weight, out_shape, transposed=False)


if _layer not in flop_registry:

    @register_flop_formula(_layer)
    def _forward_flops(x: Any, inputs: Any, states: Any, *_: Any, **__: Any) -> int:
        return _products(x, inputs, states)


if _backward not in flop_registry:

    @register_flop_formula(_backward)
    def _backward_flops(x: Any, inputs: Any, states: Any, *_: Any, **__: Any) -> int:
        """Twice as many: each product has the gradients of both its factors."""
        return 2 * _products(x, inputs, states)
