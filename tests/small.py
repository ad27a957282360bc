"""A run small enough for tests: real modules, two layers, a few kilobytes of text."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from gdn_jax import prepare
from gdn_jax.config import Data, Experiment, GatedDeltaNetConfig, Model, Optim, Run
from gdn_jax.metrics import read_rows
from gdn_jax.model import LM, init_model
from gdn_jax.progress import SILENT

TEXT = Path(__file__).resolve().parent.parent


def experiment(directory: Path, **run) -> Experiment:
    """24 steps of 8 windows of 32 bytes; `run` overrides fields of its run group."""
    mixer = GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=16)
    model = Model(
        pattern=("gated_deltanet",),
        repeats=2,
        d_model=32,
        d_ff=64,
        vocab=320,
        gated_deltanet=mixer,
    )
    defaults = {
        "dir": str(directory / "run"),
        "data_root": str(directory / "data"),
        "log_every": 1,
        "eval_every": 12,
        "eval_windows": 4,
        "save_every": 5,
        "compile_cache": str(directory / "cache"),
        "chunk": 32,
    }
    return Experiment(
        id="test/small",
        model=model,
        optim=Optim(steps=24, batch_size=8, lr=1e-2, warmup=0.1, precision="fp32"),
        data=Data(source=str(directory / "text"), seq_len=32, validation=0.2),
        run=Run(**(defaults | run)),
    )


def prepare_text(directory: Path) -> None:
    """The project's own sources as text, prepared for `experiment(directory)`."""
    text = directory / "text"
    text.mkdir(parents=True, exist_ok=True)
    for path in sorted(TEXT.glob("pallas_kernels/**/*.py")) + sorted(TEXT.glob("gdn_jax/*.py")):
        (text / path.name).write_text(path.read_text())
    group = experiment(directory).data
    out = prepare.default_directory(group, str(directory / "data"))
    prepare.prepare(group.source, out, group.tokenizer, validation=group.validation, progress=SILENT)


def losses(directory: Path) -> dict[int, float]:
    """{step: training loss} of the logged steps of a run."""
    return {row["step"]: row["loss"] for row in read_rows(directory) if "loss" in row}


def with_steps(small: Experiment, steps: int) -> Experiment:
    """The same run with another number of steps."""
    return dataclasses.replace(small, optim=dataclasses.replace(small.optim, steps=steps))


def scripted_model(following: dict[int, int]) -> LM:
    """A model whose likeliest token after `a` is following[a], at most 32 of them: its mixers write nothing."""
    mixer = GatedDeltaNetConfig(heads=1, key_dim=8, value_dim=8)
    cfg = Model(
        pattern=("gated_deltanet",), repeats=1, d_model=32, d_ff=0, vocab=320, tied=False, gated_deltanet=mixer
    )  # fmt: skip
    model = jax.tree.map(jnp.zeros_like, jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0)))
    model.norm.weight[...] = jnp.ones(32)
    for row, (before, after) in enumerate(following.items()):
        model.embed[...] = model.embed[...].at[before, row].set(1.0)
        model.head.kernel[...] = model.head.kernel[...].at[row, after].set(1.0)
    return model
