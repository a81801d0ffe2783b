"""Clusters of equal size: balanced k-means."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_clusters(points: Tensor, count: int, *, rounds: int = 8, seed: int = 0) -> Tensor:
    r"""Part points into clusters of one size, near points together: k-means whose clusters are full at :math:`n / k`.

    .. math:: \min_{a, c} \sum_i \lVert p_i - c_{a_i} \rVert^2 \quad \text{where every cluster has } n / k \text{ points}

    In each round the points that would lose most by another cluster choose first, among the clusters that aren't full.

    Shape:
        ``points`` :math:`(n, D)`; returns :math:`(k, n / k)`, int64: the indices of each cluster's points, ascending.

    Args:
        points: to be parted.
        count: :math:`k`, a divisor of :math:`n`.
        rounds: at most so many; fewer where nothing changes.
        seed: of the points that are centres at first.

    Returns:
        A permutation of the points, cluster by cluster.

    >>> balanced_clusters(torch.tensor([[0.0], [9.0], [0.1], [9.2], [0.2], [9.1]]), 2).sort(0).values
    tensor([[0, 2, 4],
            [1, 3, 5]])

    References:
        Zhang et al., MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, ACL Findings 2022.

    Differs from the paper: assigned greedily, by regret, instead of by a minimum-cost flow.
    """
    points = points.detach().float()
    if count == 1:
        return torch.arange(points.shape[0], device=points.device)[None]
    assigned = None
    centres = _spread(points, count, seed)
    for _ in range(rounds):
        found = balanced_assignment(torch.cdist(points, centres), points.shape[0] // count)
        if assigned is not None and torch.equal(found, assigned):
            break
        assigned = found
        centres = torch.zeros_like(centres).index_add(0, found, points) / (points.shape[0] // count)
    assert assigned is not None
    return assigned.argsort(stable=True).reshape(count, -1)


def _spread(points: Tensor, count: int, seed: int) -> Tensor:
    """First centres far from each other, each drawn by its squared distance from those before (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(points.shape[0], (1,), generator=generator))]
    nearest = torch.full(points.shape[:1], float("inf"), device=points.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        weights = nearest.cpu() if float(nearest.sum()) > 0 else torch.ones(points.shape[0])  # all points may be equal
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def balanced_assignment(distances: Tensor, size: int) -> Tensor:
    """The cluster of each point (n,) by its distances (n, k), none with more than ``size``: who would lose most chooses first.

    >>> balanced_assignment(torch.tensor([[0.0, 1.0], [0.0, 9.0]]), 1)
    tensor([1, 0])
    """
    if distances.shape[1] == 1:
        return distances.new_zeros(distances.shape[0], dtype=torch.int64)
    best = distances.topk(2, largest=False).values
    order = (best[:, 1] - best[:, 0]).argsort(descending=True, stable=True).tolist()
    choices = distances.argsort(1).tolist()
    room, found = [size] * distances.shape[1], [0] * distances.shape[0]
    for point in order:
        cluster = next(c for c in choices[point] if room[c])
        room[cluster] -= 1
        found[point] = cluster
    return torch.tensor(found, device=distances.device)
