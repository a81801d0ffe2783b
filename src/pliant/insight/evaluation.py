"""What a multi-exit network did on a set, and what any thresholds would have made of it; no model is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.core.errors import PliantError


@dataclass(frozen=True, eq=False)
class Evaluation:
    r"""Every exit's answer to every sample, with the scores that decide where each sample leaves.

    $$\text{exit}(n) = \min\{k : \neg(s_{kn} > t_k)\}, \text{ the last exit where there is none}$$

    Shape: E exits, N samples, images of C channels (1 or 3), H by W.

    Args:
        scores: (E - 1, N) go-on scores of every exit but the last, in [0, 1], float32 or narrower; NaN never leaves.
        predicted: (E, N) int64, predicted class of every exit.
        labels: (N,) int64, true class.
        flops: (E,) int64, executed FLOPs up to each exit (2 per multiply-add), never falling.
        dense_flops: FLOPs of one sample through the whole network.
        classes: name of every class.
        images: (N, C, H, W) in [0, 1], not normalised, or None.
        probabilities: (E, N, number of classes), each exit's at its own temperature, for its calibration; or None.

    Raises:
        PliantError: for no samples, shapes that do not fit, or values out of their range.

    >>> evaluation = Evaluation(
    ...     scores=torch.tensor([[0.1, 0.9, 0.4, float("nan")]]),
    ...     predicted=torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]]),
    ...     labels=torch.tensor([0, 1, 0, 1]),
    ...     flops=torch.tensor([100, 300]),
    ...     dense_flops=300,
    ...     classes=("cat", "dog"),
    ... )
    >>> summary(evaluation, [0.5])
    Summary(accuracy=0.75, mean_flops=200.0, share_of_dense=0.6666666666666666, histogram=(2, 2))

    References:
        Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018, for the
        dial from an anytime to a budgeted classifier. Scores are the complement of a confidence here.
    """

    scores: Tensor
    predicted: Tensor
    labels: Tensor
    flops: Tensor
    dense_flops: int
    classes: tuple[str, ...]
    images: Tensor | None = None
    probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)


@dataclass(frozen=True)
class Point:
    """A chosen operating point: name, budget as a share of the dense FLOPs, a threshold for each exit but the last."""

    name: str
    budget: float | None
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Accuracy in [0, 1], mean FLOPs of a sample, the same as a share of the dense FLOPs, and samples per exit."""

    accuracy: float
    mean_flops: float
    share_of_dense: float
    histogram: tuple[int, ...]


def as_float32(evaluation: Evaluation, thresholds: Sequence[float] | Tensor) -> Tensor:
    r"""The thresholds as they are compared: rounded to float32, one for each exit but the last.

    $$t_k \mapsto \text{float32}(t_k)$$

    Shape: E - 1 numbers to (E - 1,) float32.

    Args:
        evaluation: gives the number of exits.
        thresholds: E - 1 numbers; infinities are allowed, NaN is not.

    Returns:
        The thresholds in float32.

    Raises:
        PliantError: for a wrong number of thresholds or a NaN.

    >>> label, flops = torch.tensor([0]), torch.tensor([1, 2])
    >>> one = Evaluation(torch.zeros(1, 1), torch.tensor([[0], [0]]), label, flops, 2, ("a",))
    >>> as_float32(one, [0.1]).item()
    0.10000000149011612

    References:
        IEEE 754; a Python float that meets a float32 tensor in PyTorch is rounded in the same way.
    """
    exact = torch.as_tensor(thresholds, dtype=torch.float64).detach().cpu().reshape(-1)
    if exact.numel() != len(evaluation.scores):
        raise PliantError(
            got=f"{exact.numel()} thresholds",
            expected=f"{len(evaluation.scores)}, one for every exit but the last",
            do="give one threshold for each row of `scores`",
        )
    if exact.isnan().any():
        raise PliantError(
            got="a threshold that is NaN",
            expected="numbers, infinities included",
            do="use -inf so that every sample goes on, +inf so that every sample leaves",
        )
    return exact.to(torch.float32)


def exits_at(evaluation: Evaluation, thresholds: Sequence[float] | Tensor) -> Tensor:
    r"""The exit at which every sample leaves.

    $$\text{exit}(n) = \min\{k : \neg(s_{kn} > t_k)\}, \text{ the last exit where there is none}$$

    Shape: E - 1 thresholds to (N,) int64 in [0, E).

    Args:
        evaluation: scores of N samples at E exits.
        thresholds: E - 1 numbers; a sample leaves where its score is not above. Compared in float32.

    Returns:
        (N,) int64, index of the exit. A score that is NaN does not leave at its exit, whatever the threshold.

    Raises:
        PliantError: for a wrong number of thresholds or a NaN among them.

    >>> scores = torch.tensor([[0.1, 0.9, 0.9, float("nan")], [0.5, 0.2, 0.5, 0.2]])
    >>> e = Evaluation(scores, torch.zeros(3, 4).long(), torch.zeros(4).long(), torch.tensor([1, 2, 3]), 3, ("a",))
    >>> exits_at(e, [0.5, 0.3])
    tensor([0, 1, 2, 1])
    >>> exits_at(e, [float("inf")] * 2)
    tensor([0, 0, 0, 1])

    References:
        "Dynamic Neural Networks: A Survey", section 2.1, early exiting.
    """
    levels = as_float32(evaluation, thresholds).to(evaluation.scores.device)
    leaves = evaluation.scores.float() <= levels[:, None]  # False for NaN: what is not known goes on
    return (~leaves).long().cumprod(0).sum(0)


def summary(evaluation: Evaluation, thresholds: Sequence[float] | Tensor) -> Summary:
    r"""Accuracy, cost and histogram of exits at given thresholds.

    $$\text{accuracy} = \frac1N \sum_n [\hat y_{\text{exit}(n), n} = y_n], \quad
      \text{cost} = \frac1N \sum_k h_k F_k, \quad h_k = |\{n : \text{exit}(n) = k\}|$$

    Shape: E - 1 thresholds to three numbers and E counts.

    Args:
        evaluation: N samples at E exits, FLOPs in units of one FLOP.
        thresholds: E - 1 numbers, compared in float32.

    Returns:
        The summary; its histogram sums to N. Sums are exact integers, divided once.

    Raises:
        PliantError: for a wrong number of thresholds or a NaN among them.

    >>> scores, labels = torch.tensor([[0.1, 0.9]]), torch.tensor([0, 1])
    >>> e = Evaluation(scores, torch.tensor([[0, 0], [0, 1]]), labels, torch.tensor([10, 40]), 40, ("a", "b"))
    >>> summary(e, [0.5])
    Summary(accuracy=1.0, mean_flops=25.0, share_of_dense=0.625, histogram=(1, 1))

    References:
        "Dynamic Neural Networks: A Survey", section 2.1, early exiting.
    """
    where = exits_at(evaluation, thresholds)
    histogram = torch.bincount(where, minlength=len(evaluation.predicted)).tolist()
    right = evaluation.predicted.gather(0, where[None])[0] == evaluation.labels
    total = sum(count * flops for count, flops in zip(histogram, evaluation.flops.tolist(), strict=True))
    mean = float(total) / len(where)
    return Summary(int(right.sum()) / len(where), mean, mean / evaluation.dense_flops, tuple(histogram))


def correct(evaluation: Evaluation) -> tuple[int, ...]:
    r"""How many samples each exit would classify rightly, were every sample sent to it (the anytime points).

    $$c_k = |\{n : \hat y_{kn} = y_n\}|$$

    Shape: (E, N) predictions to E counts.

    Args:
        evaluation: N samples at E exits.

    Returns:
        E counts of samples.

    Raises:
        Nothing: an Evaluation is checked where it is made.

    >>> labels, flops = torch.tensor([0, 1]), torch.tensor([1, 2])
    >>> e = Evaluation(torch.zeros(1, 2), torch.tensor([[0, 0], [0, 1]]), labels, flops, 2, ("a", "b"))
    >>> correct(e)
    (1, 2)

    References:
        Huang et al., ICLR 2018, anytime prediction.
    """
    return tuple((evaluation.predicted == evaluation.labels).sum(1).tolist())


def random_exits(evaluation: Evaluation, histogram: Sequence[int]) -> float:
    r"""Expected accuracy of random samples sent to the exits in the same numbers: what the scores must beat.

    $$\mathbb{E}[\text{accuracy}] = \sum_k \frac{h_k}{\sum_j h_j} \cdot \frac{c_k}{N}$$

    Shape: E counts to one number.

    Args:
        evaluation: N samples at E exits.
        histogram: E counts of samples, as in a Summary.

    Returns:
        The expectation in closed form. Under a random assignment every sample is equally likely to stand at any
        place of exit k, so nothing needs to be drawn: there is no generator, and no noise.

    Raises:
        PliantError: for a wrong number of counts, a negative one, or none above zero.

    >>> labels, flops = torch.tensor([0, 1]), torch.tensor([1, 2])
    >>> e = Evaluation(torch.zeros(1, 2), torch.tensor([[0, 0], [0, 1]]), labels, flops, 2, ("a", "b"))
    >>> random_exits(e, (1, 1))
    0.75

    References:
        The usual control of early exiting: same cost, choice without looking.
    """
    exits, samples = evaluation.predicted.shape
    if len(histogram) != exits or min(histogram) < 0 or sum(histogram) == 0:
        raise PliantError(
            got=f"histogram {tuple(histogram)}",
            expected=f"{exits} counts, none negative, not all zero",
            do="pass the histogram of a Summary of the same evaluation",
        )
    right = sum(count * hits for count, hits in zip(histogram, correct(evaluation), strict=True))
    return float(right) / float(sum(histogram) * samples)


def curve(evaluation: Evaluation, vectors: Sequence[Sequence[float]]) -> tuple[Summary, ...]:
    r"""The accuracy-cost curve: one summary for each vector of thresholds.

    $$(t^{(1)}, \dots, t^{(T)}) \mapsto (\text{summary}(t^{(1)}), \dots, \text{summary}(t^{(T)}))$$

    Shape: T vectors of E - 1 thresholds to T summaries.

    Args:
        evaluation: N samples at E exits.
        vectors: positions of the dial, compared in float32.

    Returns:
        T summaries, in the order of the vectors.

    Raises:
        PliantError: for a vector of a wrong length or with a NaN.

    >>> label, flops = torch.tensor([0]), torch.tensor([1, 4])
    >>> e = Evaluation(torch.tensor([[0.5]]), torch.tensor([[0], [0]]), label, flops, 4, ("a",))
    >>> [s.share_of_dense for s in curve(e, [[1.0], [0.0]])]
    [0.25, 1.0]

    References:
        Huang et al., ICLR 2018, budgeted batch classification.
    """
    return tuple(summary(evaluation, vector) for vector in vectors)


def _check_shapes(e: Evaluation) -> None:
    """Refuse no samples and tensors that do not fit each other."""
    if e.predicted.dim() != 2 or e.predicted.numel() == 0:
        raise PliantError(
            got=f"predictions of shape {tuple(e.predicted.shape)}",
            expected="(exits, samples) with at least one exit and one sample",
            do="evaluate on a set that is not empty",
        )
    exits, samples = e.predicted.shape
    for name, tensor, shape in (
        ("scores", e.scores, (exits - 1, samples)),
        ("labels", e.labels, (samples,)),
        ("flops", e.flops, (exits,)),
    ):
        if tuple(tensor.shape) != shape:
            raise PliantError(
                got=f"{name} of shape {tuple(tensor.shape)}",
                expected=f"{shape}, as predictions of shape {(exits, samples)} ask for",
                do=f"give {name} for the same exits and samples",
            )
    if e.probabilities is not None and tuple(e.probabilities.shape) != (exits, samples, len(e.classes)):
        raise PliantError(
            got=f"probabilities of shape {tuple(e.probabilities.shape)}",
            expected=f"{(exits, samples, len(e.classes))}: exits, samples, classes",
            do="give every exit's softmax for every sample, or None",
        )
    if e.images is not None and (e.images.dim() != 4 or len(e.images) != samples or e.images.shape[1] not in (1, 3)):
        raise PliantError(
            got=f"images of shape {tuple(e.images.shape)}",
            expected=f"({samples}, 1 or 3, height, width)",
            do="give one grey or colour image for each sample, or None",
        )


def _check_values(e: Evaluation) -> None:
    """Refuse types that would be rounded unseen, and values out of their range."""
    if not e.scores.is_floating_point() or e.scores.dtype == torch.float64:
        raise PliantError(
            got=f"scores of {e.scores.dtype}",
            expected="float32 or narrower, in which they are compared with the thresholds",
            do="pass the scores as the model made them, or round them yourself with .float()",
        )
    if ((e.scores < 0) | (e.scores > 1)).any():
        raise PliantError(
            got="a score outside [0, 1]", expected="go-on scores in [0, 1]", do="pass 1 - confidence, or a sigmoid"
        )
    for name, tensor in (("predicted", e.predicted), ("labels", e.labels), ("flops", e.flops)):
        if tensor.dtype != torch.int64:
            raise PliantError(
                got=f"{name} of {tensor.dtype}", expected="torch.int64", do=f"convert {name} with .long()"
            )
    for name, tensor in (("predicted", e.predicted), ("labels", e.labels)):
        if int(tensor.min()) < 0 or int(tensor.max()) >= len(e.classes):
            raise PliantError(
                got=f"{name} from {int(tensor.min())} to {int(tensor.max())}",
                expected=f"classes 0 to {len(e.classes) - 1}",
                do="name every class in `classes`",
            )
    if int(e.flops.min()) < 0 or (e.flops.diff() < 0).any() or e.dense_flops <= 0:
        raise PliantError(
            got=f"FLOPs {e.flops.tolist()} with {e.dense_flops} dense",
            expected="cumulative counts that never fall, and a dense count above zero",
            do="count the FLOPs up to each exit, not of each stage",
        )
    if e.images is not None:
        low, high = (float(v) for v in e.images.aminmax())
        if not (math.isfinite(low) and math.isfinite(high) and low >= 0 and high <= 1 and e.images.is_floating_point()):
            raise PliantError(
                got=f"images of {e.images.dtype} from {low:g} to {high:g}",
                expected="floating point in [0, 1]",
                do="undo the normalisation: images * std + mean",
            )
