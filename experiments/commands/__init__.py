"""What each `gdn` command does, one module a topic; run.py names and calls them.

JAX, Flax and the training stack load inside the commands that need them: help and mistakes answer at once.
"""

import json
from typing import Any

from experiments.report import aligned


class Stopped(Exception):
    """A signal stopped a command that has said what it kept."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One flat object, as JSON or as a table for a reader."""
    print(json.dumps(facts, indent=1) if as_json else aligned([(name, _readable(x)) for name, x in facts.items()]))


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.4g}"
    large = isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
    return f"{value:,}" if large else str(value)
