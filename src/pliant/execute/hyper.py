"""Weights made by another network: an LSTM whose rows are scaled at every step, and kernels grown from embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site


class ScaledLSTM(Executor):
    r"""A layer-norm LSTM whose matrices a site scales row by row, anew at every step.

    .. math::
        (i, g, f, o)_t = \mathrm{LN}(d^h_t \odot W_h h_{t-1} + d^x_t \odot W_x x_t + b_t), \quad
        c_t = \sigma(f + 1)\, c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(\mathrm{LN}(c_t))

    with a norm for each gate. The decision is :math:`(d^h, d^x, b + 1)`, so that at ones it's the layer-norm LSTM: the plain form.
    Numbers cost the same whatever they are, so both forms are one.

    Shape:
        ``x`` :math:`(R, I, T)`; returns the states :math:`(R, H, T)`; each visit decides :math:`(R, 12, H)`; ``given``
        :math:`(R, T, 12, H)`.

    Args:
        inputs: :math:`I`.
        hidden: :math:`H`.
        site: reads input and state side by side, :math:`(R, I + H)`, and is visited :math:`T` times: a
            :class:`pliant.scores.HyperCell` under ``Regressed``, with ``shape=(12, H)``.
        dropout: of the candidate :math:`\tanh(g)` while training.

    Raises:
        PliantError: where the site's shape isn't :math:`(12, H)`.

    >>> import pliant
    >>> site = Site(pliant.scores.HyperCell(3 + 4, 4, hidden=8), pliant.rules.Regressed(), shape=(12, 4))
    >>> ScaledLSTM(3, 4, site)(torch.zeros(2, 3, 5)).shape
    torch.Size([2, 4, 5])

    References:
        Survey section 2.2.2 (1); Ha, Dai, Le, HyperNetworks, ICLR 2017.
    """

    def __init__(self, inputs: int, hidden: int, site: Site, *, dropout: float = 0.0) -> None:
        super().__init__()
        if site.shape != (12, hidden):
            raise PliantError(
                got=f"a site of shape {site.shape}",
                expected=f"(12, {hidden})",
                do="make the site with shape=(12, hidden)",
            )
        self.site = site
        self.width, self.dropout = hidden, dropout
        self.inputs = nn.Linear(inputs, 4 * hidden, bias=False)
        self.states = nn.Linear(hidden, 4 * hidden, bias=False)
        nn.init.xavier_uniform_(self.inputs.weight)
        for gate in self.states.weight.detach().chunk(4):
            nn.init.orthogonal_(gate)
        self.gain = nn.Parameter(torch.ones(4, hidden))
        self.shift = nn.Parameter(torch.zeros(4, hidden))
        self.norm = nn.LayerNorm(hidden)

    def plain(self, x: Tensor) -> Tensor:
        """The layer-norm LSTM."""
        return self._run(x, None, None)

    def masked(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """The same as gathered."""
        return self._run(x, given, self.site)

    def gathered(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Decide and step, from the first to the last."""
        return self._run(x, given, self.site)

    def _run(self, x: Tensor, given: Tensor | None, site: Site | None) -> Tensor:
        steps = x.transpose(1, 2)
        seen = self.inputs(steps).unflatten(2, (4, -1))
        h = c = x.new_zeros(x.shape[0], self.width)
        carry, states = None, [x.new_zeros(x.shape[0], self.width, 0)]
        for t in range(x.shape[2]):
            kept = self.states(h).unflatten(1, (4, -1))
            if site is not None:
                plan = None if given is None else given[:, t]
                decision = site(torch.cat([steps[:, t], h], 1), given=plan, carry=carry, visit=t)
                (by_state, by_input, bias), carry = decision.value.split(4, 1), decision.carry
                total = by_state * kept + by_input * seen[:, t] + bias - 1
            else:
                total = kept + seen[:, t]
            h, c = self._step(total, c)
            states.append(h.unsqueeze(2))
        return torch.cat(states, 2)

    def _step(self, total: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """State and cell after gates with these sums, (R, 4, H)."""
        i, g, f, o = (F.layer_norm(total, total.shape[2:]) * self.gain + self.shift).unbind(1)
        candidate = F.dropout(torch.tanh(g), self.dropout, self.training)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * candidate
        return torch.sigmoid(o) * torch.tanh(self.norm(c)), c


class KernelGenerator(nn.Module):
    r"""Two linear layers that make a tile of kernels from an embedding: :math:`K_i = W_2 (W_1^i z + b_1^i) + b_2`.

    Shape:
        embeddings :math:`(o, c, e)`; returns the kernel :math:`(n o, n c, k, k)` of :math:`o \times c` tiles.

    Args:
        embedding: :math:`e`.
        kernel: :math:`k`.
        tile: :math:`n`, channels of a tile in and out.
        hidden: numbers that each input channel's slice is made from.

    >>> KernelGenerator(4, 3, tile=8)(torch.zeros(2, 1, 4)).shape
    torch.Size([16, 8, 3, 3])

    References:
        Survey section 2.2.2 (1); Ha, Dai, Le, HyperNetworks, ICLR 2017 (static form).
    """

    def __init__(self, embedding: int = 64, kernel: int = 3, *, tile: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.kernel, self.tile = kernel, tile
        self.slices = nn.Linear(embedding, tile * hidden)
        self.grow = nn.Linear(hidden, tile * kernel * kernel)
        # Embeddings are standard normal and the layers linear, so this gives kernels the spread of He's initialisation.
        nn.init.normal_(self.slices.weight, std=embedding**-0.5)
        nn.init.normal_(self.grow.weight, std=(2 / (hidden * tile * kernel * kernel)) ** 0.5)

    def forward(self, z: Tensor) -> Tensor:
        """Kernels of embeddings ``z``."""
        tiles = self.grow(self.slices(z).unflatten(2, (self.tile, -1)))  # (o, c, in, out * k * k)
        tiles = tiles.unflatten(3, (self.tile, self.kernel, self.kernel))
        return tiles.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1)


class GrownConv2d(nn.Module):
    r"""A convolution whose kernel a generator, shared with other layers, grows from embeddings of its own. Not input-dependent.

    Shape:
        ``x`` :math:`(R, I, H, W)`; returns :math:`(R, O, H', W')`.

    Args:
        generator: shared.
        inputs: :math:`I`, a multiple of the generator's tile.
        outputs: :math:`O`, likewise.
        stride: in pixels.

    Raises:
        PliantError: where the channels aren't multiples of the tile.

    >>> GrownConv2d(KernelGenerator(4, tile=8), 8, 16)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])

    References:
        Survey section 2.2.2 (1); Ha, Dai, Le, HyperNetworks, ICLR 2017 (static form).
    """

    def __init__(self, generator: KernelGenerator, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        tile = generator.tile
        if inputs % tile or outputs % tile:
            raise PliantError(
                got=f"{inputs} to {outputs} channels",
                expected=f"multiples of {tile}",
                do="change the channels or the tile",
            )
        self.generator, self.stride = generator, stride
        self.z = nn.Parameter(torch.randn(outputs // tile, inputs // tile, generator.slices.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Convolved by the grown kernel, padded to keep its size."""
        return F.conv2d(x, self.generator(self.z), None, self.stride, self.generator.kernel // 2)
