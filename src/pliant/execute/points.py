"""Points: a coarse map that is refined step by step, by a head that runs on the points that want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.core import tape
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Site
from pliant.execute import rows
from pliant.execute.pixels import wanted_of
from pliant.functional.resample import sample_at
from pliant.functional.sparse_conv import Places, places


class Refine(Executor):
    r"""Double a map of logits several times; after each time a head answers anew at the points that want it.

    .. math:: z_t = (1 - v_t) \odot \mathrm{up}(z_{t-1}) + v_t \odot \mathrm{head}(f, z_0), \qquad t = 1, \dots, T

    The head reads bilinear samples of the fine features :math:`f` and of the coarse logits :math:`z_0`, point by point.
    Gathered, it runs at the chosen points alone. ``Always`` is the head on the whole grid of the last step.

    Shape:
        ``x``: features :math:`(R, C, H', W')` and coarse logits :math:`(R, K, H, W)`; answer :math:`(R, K, 2^T H, 2^T W)`.

    Args:
        head: from features (N, C) and logits (N, K) of points to their logits (N, K).
        sites: :math:`T`, each decides a map (R, 1, h, w) from the doubled logits.

    Raises:
        PliantError: where there is no step, or ``x`` isn't such a pair.

    >>> import pliant
    >>> class Coarse(nn.Module):
    ...     def forward(self, features, logits):
    ...         return logits + 9
    >>> site = pliant.Site(pliant.scores.PointUncertainty(), pliant.rules.TopK(1, dims=3))
    >>> refine = Refine(Coarse(), [site]).eval()
    >>> refine((torch.zeros(1, 2, 4, 4), torch.tensor([[[[-1.0, 0.5]]]]))).squeeze().round(decimals=2)
    tensor([[-1.0000, -0.6200,  9.1200,  0.5000],
            [-1.0000, -0.6200,  0.1200,  0.5000]])

    References:
        Survey section 3.1.1; Kirillov et al., PointRend: Image Segmentation as Rendering, CVPR 2020.

    Differs from the paper: rows may choose different numbers of points, where the rule says so.
    """

    def __init__(self, head: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        if not sites:
            raise PliantError(got="no site", expected="one for each step", do="pass a list of sites")
        self.head = head
        self.sites = nn.ModuleList(sites)

    def plain(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """The head everywhere on the last grid."""
        coarse = self._coarse(x)
        size = [n * 2 ** len(self.sites) for n in coarse.shape[2:]]
        return self._everywhere(x, size)

    def masked(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """The head everywhere in every step."""
        return self._steps(x, self._masked)

    def gathered(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """The head where it's wanted."""
        return self._steps(x, self._gathered)

    def _steps(self, x: tuple[Tensor, Tensor], refined: Callable[..., Tensor]) -> Tensor:
        z = self._coarse(x)
        for site in self.sites:
            z = F.interpolate(z, scale_factor=2.0, mode="bilinear", align_corners=False)
            z = refined(site, x, z)
        return z

    def _masked(self, site: Site, x: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        decision = site(z, shape=(1, *z.shape[2:]))
        wanted = wanted_of(site, decision)
        with tape.part(site, wanted.visit, "1", wanted=wanted.likely.flatten(1).sum(1), of=z.shape[2] * z.shape[3]):
            new = self._everywhere(x, z.shape[2:])
        value = decision.value
        return value * new + (1 - value) * z if rows.weighted(decision) else torch.where(wanted.active > 0, new, z)

    def _gathered(self, site: Site, x: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        decision = site(z, shape=(1, *z.shape[2:]))
        wanted = wanted_of(site, decision)
        at = places(wanted.active)
        units, likely = (m.flatten(1).sum(1) for m in (wanted.active, wanted.likely))
        with tape.part(site, wanted.visit, "1", units=units.long(), wanted=likely, of=z.shape[2] * z.shape[3]):
            new = self.head(*(sample_at(t, at) for t in x))
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        if rows.weighted(decision):
            value = decision.value.flatten().index_select(0, at.index)[:, None]
            new = value * new + (1 - value) * flat.index_select(0, at.index)
        return flat.index_copy(0, at.index, new).reshape(-1, *z.shape[2:], z.shape[1]).permute(0, 3, 1, 2)

    def _everywhere(self, x: tuple[Tensor, Tensor], size: Sequence[int]) -> Tensor:
        """The head at every point of a grid."""
        count = x[0].shape[0] * size[0] * size[1]
        at = Places(torch.arange(count, device=x[0].device), x[0].shape[0], size[0], size[1])
        return (
            self.head(*(sample_at(t, at) for t in x)).reshape(-1, size[0], size[1], x[1].shape[1]).permute(0, 3, 1, 2)
        )

    def _coarse(self, x: tuple[Tensor, Tensor]) -> Tensor:
        if not isinstance(x, tuple) or len(x) != 2 or any(t.ndim != 4 for t in x):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PliantError(
                got=f"a {type(x).__name__}", expected="a tuple of features and coarse logits, each (R, C, H, W)",
                do="let the network in front return both",
            )  # fmt: skip
        return x[1]
