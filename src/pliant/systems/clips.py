"""Parts of systems that look at frames of clips: what is done with a frame, and a light overview of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.execute.cursor import Piece, Reader


class Overview(nn.Module):
    """The global memory: light features of evenly spaced frames with codes of their places, read by soft attention."""

    def __init__(self, network: nn.Module, width: int, frames: int, *, hidden: int) -> None:
        super().__init__()
        self.network, self.frames, self.width = network, frames, width
        self.places = nn.Parameter(torch.randn(frames, width) * 0.1)
        self.query = nn.Linear(hidden, width)

    def begin(self, x: Tensor) -> Tensor:
        """Of clips (R, T, ...) the features (R, G, width)."""
        at = torch.linspace(0, x.shape[1] - 1, self.frames, device=x.device).round().long()
        seen = x.index_select(1, at)
        return self.network(seen.flatten(0, 1)).unflatten(0, seen.shape[:2]) + self.places

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """The context (R, width) that the state ``h`` asks for."""
        near = torch.bmm(features, self.query(h)[..., None]) / self.width**0.5
        return torch.bmm(near.softmax(1).transpose(1, 2), features).squeeze(1)


class Nothing(nn.Module):
    """No global memory."""

    width = 0

    def begin(self, x: Tensor) -> Tensor:
        """Nothing, for each row."""
        return torch.zeros(x.shape[0], 0, device=x.device)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """Nothing."""
        return features


class Frames(Reader):
    """An encoder and an LSTM on one frame, the context and the place. Memory: hidden state, cell state, global memory."""

    def __init__(self, encoder: nn.Module, width: int, overview: Any, *, hidden: int) -> None:
        super().__init__()
        self.encoder, self.overview = encoder, overview
        self.cell = nn.LSTMCell(width + overview.width + 1, hidden)

    def start(self, x: Tensor) -> Any:
        """Zeros, and the global memory."""
        zeros = self.cell.weight_hh.new_zeros(x.shape[0], self.cell.hidden_size)
        return zeros, zeros, self.overview.begin(x)

    def forward(self, piece: Piece, memory: Any) -> Any:
        """The memory after a frame."""
        h, c, overview = memory
        seen = [self.encoder(piece.elements[:, 0]), self.overview(h, overview), 2 * piece.where[:, None] - 1]
        h, c = self.cell(torch.cat(seen, 1), (h, c))
        return h, c, overview
