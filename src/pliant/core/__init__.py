"""The one idea: Site, Decision, Trace, record, bind, masked, errors. Imports nothing of ours."""

from __future__ import annotations

from pliant.core.bind import bind, gathered, masked, plain, share, sites
from pliant.core.decision import Decision
from pliant.core.errors import PliantError
from pliant.core.executor import Executor
from pliant.core.site import Outcome, Rule, Score, Site
from pliant.core.trace import Exit, Note, Recorder, Trace, record

__all__ = [
    "Decision", "Executor", "Exit", "Note", "Outcome", "PliantError", "Recorder", "Rule", "Score", "Site", "Trace",
    "bind", "gathered", "masked", "plain", "record", "share", "sites",
]  # fmt: skip
