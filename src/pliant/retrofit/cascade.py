"""cascade: models of one task in a row, the next of which runs for the rows that the one before is unsure of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pliant.core.bind import share
from pliant.core.calls import Call, call_of, prediction_of
from pliant.core.errors import PliantError
from pliant.core.site import Score, Site
from pliant.core.trace import batch_of
from pliant.execute.exits import Exits
from pliant.retrofit.host import refuse_loss
from pliant.retrofit.output import output_like
from pliant.rules.threshold import Threshold
from pliant.scores.confidence import MaxProbability


class Called(nn.Module):
    """A model that is called with the arguments that it's given in one, and answers with its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Call) -> Tensor:
        """The logits."""
        return prediction_of(self.model(*call[0], **call[1]))


class Cascade(nn.Module):
    """Models in a row as one model: takes what they take and answers as the last one does; see :func:`cascade`."""

    def __init__(self, models: Sequence[nn.Module], sites: Sequence[Site], kind: type) -> None:
        super().__init__()
        self.exits = Exits([nn.Identity() for _ in models], [Called(model) for model in models], sites)
        self.kind = kind

    @property
    def models(self) -> list[nn.Module]:
        """The models, as they were given."""
        return [head.model for head in self.exits.heads]  # pyright: ignore[reportReturnType]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer of the model at which each row left."""
        refuse_loss(kwargs)
        count = batch_of(args, kwargs)
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and (t.ndim == 0 or t.shape[0] != count):
                raise PliantError(
                    got=f"a tensor of shape {tuple(t.shape)} in a batch of {count}", expected="rows first in every input",
                    do="expand it, or wrap the models so that they make it themselves",
                )  # fmt: skip
        return output_like(tuple if kwargs.get("return_dict") is False else self.kind, self.exits((args, kwargs)))


def cascade(
    models: Sequence[nn.Module], *, example: Any, criterion: Score | None = None, threshold: float = 0.5
) -> Cascade:
    r"""Put models of one task in a row, cheapest first: a row goes on to the next where the one before is unsure.

    .. math:: y = v_1 (v_2 (\dots) + (1 - v_2) f_2(x)) + (1 - v_1) f_1(x)

    Every model reads the raw input, and they share nothing, so a hard row pays for all of them. The models are used as they are,
    parameters, buffers and mode; they may be dynamic themselves, with sites of their own under ``exits.heads.k.model``.

    Shape:
        whatever all models take, rows first in every tensor; logits :math:`(R, C)`.

    Args:
        models: at least two with the same inputs and classes; see :func:`exits` for what they may return.
        example: a small batch: a tensor, a tuple of positional or a mapping of keyword inputs.
        criterion: the wish to go on, from a model's logits; each site gets a copy. Default, ``MaxProbability()``.
        threshold: rows with a higher score go on, in the units of the criterion; ``pliant.tune`` sets it.

    Returns:
        One model with their inputs and the last one's type of output; its sites are ``exits.sites.k``.

    Raises:
        PliantError: where there are fewer than two, one is given twice, they don't answer alike, or an answer has more than
            one score. At the call: where a tensor hasn't rows first, or ``labels`` are given.

    >>> import pliant
    >>> small, large = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> model = cascade([small, large], example=torch.randn(2, 4)).eval()
    >>> x = torch.randn(5, 4)
    >>> torch.equal(pliant.bind(model, {"*": pliant.rules.Never()})(x), small(x))
    True

    References:
        Survey sections 2.1.1 (1a) and 5.1.1; Park et al., Big/Little Deep Neural Network, CODES+ISSS 2015.
    """
    if len(models) < 2 or len({id(model) for model in models}) != len(models):
        raise PliantError(
            got=f"{len(models)} models, {len({id(model) for model in models})} of them different",
            expected="at least two, each its own", do="pass the cheap one first",
        )  # fmt: skip
    call = call_of(example)
    with torch.no_grad():
        outputs = [share(model).eval()(*call[0], **call[1]) for model in models]
    said = [prediction_of(output) for output in outputs]
    if any(logits.shape != said[-1].shape for logits in said) or said[-1].shape[0] != batch_of(*call):
        raise PliantError(
            got="answers of shape " + ", ".join(str(tuple(logits.shape)) for logits in said),
            expected="the same for all, rows first", do="give every model the same classes",
        )  # fmt: skip
    sites = [Site(copy.deepcopy(criterion or MaxProbability()), Threshold(threshold)) for _ in models[1:]]
    with torch.no_grad():
        value = share(sites[0]).eval()(said[0]).value
    if value.shape != said[0].shape[:1]:
        raise PliantError(
            got=f"scores of shape {tuple(value.shape)} for {said[0].shape[0]} rows, of answers {tuple(said[0].shape)}",
            expected="one for each row", do="pass criterion= that scores whole inputs; for a language model that writes, "
            "pliant.retrofit.causal and pliant.deploy.speculate",
        )  # fmt: skip
    made = Cascade(models, [site.to(said[-1].device) for site in sites], type(outputs[-1]))
    return made.train(models[-1].training) if len({m.training for m in models}) == 1 else made
