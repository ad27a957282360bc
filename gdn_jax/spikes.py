"""Spikes: losses out of line with those of the steps before them, and what was done about them.

A step is a spike where its loss or its gradient norm is not finite and, once KNOWN earlier losses are known, where

    loss > max(median + DEVIATIONS * 1.4826 * MAD, highest + RISE)        MAD: the median distance from the median

over the last WINDOW losses that were no spikes, without that of the step just before: it has not reached the host when
the step is asked for, and no step waits for another's loss. The highest is there for mixed text, where a batch of a
rare kind has a loss of its own. A gradient norm that is large but finite is none: it comes and goes at a usual loss,
and clipping is there for it.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np

KNOWN, WINDOW = 32, 128
DEVIATIONS, RISE = 10.0, 0.5  # RISE in nats per token
COUNTS = ("skipped", "in_a_row", "passed", "rewinds")
GAUSSIAN = 1.4826  # a normal distribution's standard deviation over its MAD
SKIPS = 10  # in a row, then the run stops
REWINDS = 3  # without a regular checkpoint between them, then the run stops


class Watch:
    """What a run knows of its losses. A checkpoint keeps `recorded()`, so that a resumed run judges as this one does.

    skipped    updates left out so far
    in_a_row   of these, since the last one that was made
    passed     batches that rewinds have passed over: step n trains on batch n - 1 + passed
    rewinds    since the last regular checkpoint
    """

    def __init__(self, recorded: dict[str, Any] | None = None):
        recorded = recorded or {"losses": []} | dict.fromkeys(COUNTS, 0)
        self._losses = deque((tuple(row) for row in recorded["losses"]), maxlen=WINDOW + 1)  # (step, loss)
        self.skipped, self.in_a_row, self.passed, self.rewinds = (recorded[name] for name in COUNTS)

    def recorded(self) -> dict[str, Any]:
        return {"losses": [list(row) for row in self._losses]} | {name: getattr(self, name) for name in COUNTS}

    def back(self, step: int, spike: int, recorded: dict[str, Any] | None) -> "Watch":
        """After a rewind from `spike` to `step`, with what was recorded there."""
        watch = Watch(recorded)
        watch.passed, watch.rewinds = self.passed + spike - step, self.rewinds + 1
        return watch

    def add(self, step: int, loss: float) -> None:
        """The loss of a step that was no spike."""
        self._losses.append((step, loss))
        self.in_a_row = 0

    def limit(self, step: int) -> np.float32:
        """The loss above which `step` is a spike; inf where too little is known."""
        losses = np.array([loss for known, loss in self._losses if known < step - 1][-WINDOW:])
        if losses.size < KNOWN:
            return np.float32(np.inf)
        middle = np.median(losses)
        deviation = GAUSSIAN * np.median(np.abs(losses - middle))
        return np.float32(max(middle + DEVIATIONS * deviation, losses.max() + RISE))

    def too_often(self, on_spike: str) -> str:
        """Why the run stops at this spike; empty where it goes on."""
        if on_spike == "skip":
            return f", the {SKIPS}th such step in a row;" if self.in_a_row >= SKIPS else ""
        if on_spike == "rewind":
            return f", after {REWINDS} rewinds without a checkpoint between them;" if self.rewinds >= REWINDS else ""
        return "; pass it with --run.on_spike skip or rewind,"


def usual(loss: Any, norm: Any, limit: Any) -> Any:
    """Whether a step is no spike: of numbers, and of arrays inside a jitted step."""
    return (abs(loss) < math.inf) & (norm < math.inf) & (loss <= limit)


class Spike(NamedTuple):
    """A step out of line."""

    step: int
    loss: float
    norm: float
    limit: np.float32

    def __str__(self) -> str:
        far = f" (usual: up to {self.limit:.4g})" if math.isfinite(self.limit) else ""
        return f"At step {self.step} the loss is {self.loss:.5g}{far} and the gradient norm {self.norm:.5g}"

    def values(self) -> dict[str, float | str]:
        """For JSON, which has no number that is not finite."""
        values = {"loss": self.loss, "grad_norm": self.norm}
        return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
