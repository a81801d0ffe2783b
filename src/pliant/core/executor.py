"""Executor: what a value makes run, in three forms that agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import nn

Form = Literal["auto", "masked", "gathered", "plain"]


class Executor(nn.Module, ABC):
    """Runs what was chosen.

    Three forms with one meaning: *masked* computes everything and mixes by the value (gradients for every gate);
    *gathered* computes only what was chosen; *plain* is the network without sites. ``auto`` is masked while training
    and gathered otherwise. ``masked(model)`` and ``plain(model)`` set the form on a copy that shares the parameters.
    """

    form: Form = "auto"

    @abstractmethod
    def masked(self, *args: Any, **kwargs: Any) -> Any:
        """Compute everything, mix by the value."""

    @abstractmethod
    def gathered(self, *args: Any, **kwargs: Any) -> Any:
        """Compute only what was chosen."""

    @abstractmethod
    def plain(self, *args: Any) -> Any:
        """The costliest path, without asking any site."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run in the form that is set."""
        if self.form == "plain":
            return self.plain(*args)
        if self.form == "masked" or (self.form == "auto" and self.training):
            return self.masked(*args, **kwargs)
        return self.gathered(*args, **kwargs)
