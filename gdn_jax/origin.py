"""Where an experiment came from: the user's file that holds it, and the parameters that its training begins with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class File:
    """The Python file that an experiment was read from. It is never imported because a run names it."""

    path: str  # as the user named it
    sha256: str  # of its content then


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint whose parameters a fine-tuning begins with."""

    path: str  # of the run, as the user named it
    step: int
    sha256: str  # of its parameters' checksums
