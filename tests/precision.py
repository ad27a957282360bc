"""Losses of one training computed in several ways: trained in this process, and compared with what a seed changes."""

import contextlib
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import experiments
from gdn_jax import data, sharding
from gdn_jax.config import Experiment
from gdn_jax.progress import SILENT
from gdn_jax.runs import prepared_data
from gdn_jax.train import Trainer
from pallas_kernels import admission
from pallas_kernels.dispatch import Refusal

SEEDS = (0, 1, 2)
LAST = 50  # steps whose mean loss is a run's training loss
WITHIN = 2.0  # standard deviations over the seeds
# model -> the op of its recurrence
RECURRENCES = {"gated-deltanet": "gated_delta_rule", "mamba2": "linear_attention", "hgrn2": "linear_attention"}
WITHOUT_KERNEL = ("short_conv", "gated_norm")  # variants in which one op alone takes its plain form
# variant -> fields that it changes, by group. The recurrence's kernels multiply in bf16: fp32 goes without them
FIELDS = {
    "fp32": {"optim": {"precision": "fp32"}, "run": {"impl": "chunked"}},
    "chunked": {"run": {"impl": "chunked"}},
    **{f"remat {name}": {"run": {"remat": name}} for name in ("products", "kernels", "products+kernels", "full")},
}
VARIANTS = (*FIELDS, *WITHOUT_KERNEL)


class Losses(NamedTuple):
    """What a run of one seed leaves."""

    steps: tuple[float, ...]  # the training loss of each
    held_out: float
    impls: dict[str, str]  # op -> implementation

    @property
    def trained(self) -> float:
        return statistics.fmean(self.steps[-LAST:])

    @property
    def kernels(self) -> set[str]:
        """The ops that ran a kernel, in some layer at least: "auto" never takes one for a norm without a gate."""
        return {op for op, impl in self.impls.items() if "triton" in impl.split("; ")}


class Difference(NamedTuple):
    """How far a variant's loss is from the reference's of its own seed, on the same batches."""

    value: float
    reference: float
    mean: float  # of the reference over the seeds
    deviation: float  # of the reference over the seeds (n - 1)

    @property
    def deviations(self) -> float:
        return abs(self.value - self.reference) / self.deviation

    def __str__(self) -> str:
        from_mean = abs(self.value - self.mean) / self.deviation
        return (
            f"{self.value:.5f}, {self.value - self.reference:+.5f} from {self.reference:.5f} of its seed, "
            f"{self.deviations:.2f} standard deviations of {self.deviation:.5f} ({from_mean:.2f} from the seeds' mean "
            f"{self.mean:.5f})"
        )


def recipe(model: str, scale: str, steps: int, root: Path) -> Experiment:
    """The training of table3/<model>/<scale> in fewer steps, on the ten novels, prepared below `root`."""
    found = experiments.get(f"table3/{model}/{scale}")
    novels = experiments.get(f"table3/{model}/tiny").data
    return dataclasses.replace(
        found,
        optim=dataclasses.replace(found.optim, steps=steps),
        data=dataclasses.replace(novels, seq_len=found.data.seq_len),
        run=dataclasses.replace(found.run, data_root=str(root)),
    )


def changed(experiment: Experiment, fields: dict[str, dict[str, Any]]) -> Experiment:
    """The experiment with fields of its groups replaced."""
    groups = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in fields.items()}
    return dataclasses.replace(experiment, **groups)


@contextlib.contextmanager
def without_kernel(op: str):
    """Within, "auto" takes no kernel of this op, and those of all others that it took before."""
    admits = admission.refusal

    def refusal(asked, **sizes):
        return Refusal(op, "triton", "left out for this comparison") if asked == op else admits(asked, **sizes)

    admission.refusal = refusal
    jax.clear_caches()
    try:
        yield
    finally:
        admission.refusal = admits
        jax.clear_caches()


def trained(experiment: Experiment, seeds: Sequence[int]) -> dict[int, Losses]:
    """A run of each seed on one device, through the step of `gdn train`; nothing is written but the prepared text."""
    prepared, group = prepared_data(experiment, SILENT), experiment.data
    windows = data.validation_windows(prepared, group.seq_len, experiment.run.eval_windows)
    trainer = Trainer(experiment, sharding.make_mesh(1, jax.devices()[:1]))
    impls = {op: found["impl"] for op, found in trainer.implementations().items()}
    found = {}
    with jax.set_mesh(trainer.mesh):
        for seed in seeds:
            state, losses = trainer.begin(seed), []
            batches = data.train_batches(
                prepared, seq_len=group.seq_len, batch_size=experiment.optim.batch_size, seed=seed, start_step=0,
                with_segments=group.reset_at_documents,
            )  # fmt: skip
            with contextlib.closing(batches):
                for _ in range(experiment.optim.steps):
                    *state, metrics = trainer.step(*state, sharding.place_batch(trainer.mesh, next(batches)))
                    losses.append(metrics["loss"])
            held_out = trainer.validation_loss(state[0], windows)
            found[seed] = Losses(tuple(map(float, losses)), held_out, impls)
    return found


def of_variant(experiment: Experiment, variant: str) -> Losses:
    """The first seed's run, computed as the variant says."""
    with without_kernel(variant) if variant in WITHOUT_KERNEL else contextlib.nullcontext():
        return trained(changed(experiment, FIELDS.get(variant, {})), SEEDS[:1])[SEEDS[0]]


def differences(found: Losses, references: dict[int, Losses]) -> dict[str, Difference]:
    """Those of the training loss and of the held-out loss."""

    def of(value: float, values: dict[int, float]) -> Difference:
        spread = statistics.stdev(values.values())
        return Difference(value, values[SEEDS[0]], statistics.fmean(values.values()), spread)

    return {
        f"mean of the last {LAST} steps": of(found.trained, {seed: one.trained for seed, one in references.items()}),
        "held out": of(found.held_out, {seed: one.held_out for seed, one in references.items()}),
    }


def outside(compared: dict[str, Difference]) -> list[str]:
    """The losses that lie further from their own seed's reference than WITHIN standard deviations; not finite is."""
    return [name for name, one in compared.items() if not one.deviations <= WITHIN]


def furthest(found: Losses, reference: Losses) -> tuple[float, int]:
    """The largest difference of two runs' losses at one step, and that step, from 1."""
    apart = np.abs(np.subtract(found.steps, reference.steps))
    return float(apart.max()), int(apart.argmax()) + 1


def described(variant: str, found: Losses, references: dict[int, Losses]) -> str:
    """A comparison in lines."""
    apart, step = furthest(found, references[SEEDS[0]])
    lines = [f"{name}: {one}" for name, one in differences(found, references).items()]
    ops = ", ".join(f"{op} {impl}" for op, impl in found.impls.items())
    return "\n    ".join([f"{variant} ({ops})", *lines, f"furthest at step {step}: {apart:.5f}"])
