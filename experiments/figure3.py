"""Figure 3: training throughput of the ten models on one GPU, 32,768 tokens a step from 2K x 16 to 16K x 2.

    gdn bench figure3 --scale tiny                                        every model on a CPU, minutes
    gdn bench figure3 --scale 1.3b --models gated-deltanet,transformer    about a minute a point on one GPU of 80 GB
    gdn bench figure3 --models gated-deltanet --devices 1,2 --fsdp 1,2    the same on one GPU and over two of a host
    gdn bench figure3 --models gated-deltanet --decay on,off              and without the decay
    gdn figure figure3 --scale 1.3b                                       from the points there are

A point is a training step as `gdn train` runs it (the jitted step with AdamW and clipping, the ID's precision and
run.remat) on random tokens: no data are needed. Each is measured in a process of its own and kept as soon as it is
there, so a command that was stopped goes on; forty points take more than one command. Expect, in the paper, on one
H100: Gated DeltaNet as fast as DeltaNet and 2-3K tokens/s behind Mamba2, Transformer++ first at 2K and falling, H1 and
H2 ahead of Gated DeltaNet. The paper prints curves alone; what paper.json has of them was read from the figure.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from experiments.models import PAPER_MODELS
from experiments.table3 import EXPERIMENTS as TRAINED
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest


class Setting(NamedTuple):
    """The batch of a step."""

    seq_len: int
    batch_size: int


_PAPER = {"2Kx16": Setting(2048, 16), "4Kx8": Setting(4096, 8), "8Kx4": Setting(8192, 4), "16Kx2": Setting(16384, 2)}
SETTINGS = {
    "tiny": {"64x8": Setting(64, 8), "128x4": Setting(128, 4), "256x2": Setting(256, 2), "512x1": Setting(512, 1)},
    "400m": _PAPER,
    "1.3b": _PAPER,
}


@dataclass(frozen=True)
class Timing:
    """An ID that times the training step of another ID's model, and trains nothing."""

    id: str
    model: str
    scale: str
    of: Experiment  # whose model, recipe and way of computing it takes

    @property
    def settings(self) -> dict[str, Setting]:
        return SETTINGS[self.scale]

    def experiment(self, setting: str) -> Experiment:
        """The experiment that is timed, with one micro-batch a step; UserError for a setting that this scale lacks."""
        if setting not in self.settings:
            known = ", ".join(self.settings)
            raise UserError(
                f"There is no setting {setting!r} at {self.scale}{nearest(setting, self.settings)}; there are {known}."
            )
        seq_len, batch_size = self.settings[setting]
        return replace(
            self.of,
            id=self.id,
            optim=replace(self.of.optim, batch_size=batch_size),
            data=replace(self.of.data, seq_len=seq_len),
            run=replace(self.of.run, micro_batches=1),
        )


def _timings() -> tuple[Timing, ...]:
    trained = {experiment.id: experiment for experiment in TRAINED}
    return tuple(
        Timing(f"figure3/{model}/{scale}", model, scale, trained[f"table3/{model}/{scale}"])
        for model in PAPER_MODELS
        for scale in SETTINGS
    )


TIMINGS = _timings()
