"""Fine-tuning: a run that begins with the parameters of another one, a fresh optimizer and step 0."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

from gdn_jax import checkpoint, tokenizer
from gdn_jax.config import Experiment, flat, to_dict
from gdn_jax.errors import UserError
from gdn_jax.model import LM
from gdn_jax.origin import Start

ONLY_BEGIN = ("init", "rescale_o_proj")  # fields of a model that decide random parameters alone


def from_run(experiment: Experiment, run_dir: Path) -> Experiment:
    """`experiment`, changed to begin with the newest parameters of the run in `run_dir`.

    Raises UserError where there are none, or where they are of another model or another tokenizer.
    """
    source = checkpoint.read_config(run_dir)
    ours, theirs = flat(to_dict(experiment.model)), flat(to_dict(source.model))
    differing = [
        f"model.{key} ({theirs.get(key)} there, {ours.get(key)} here)"
        for key in {**theirs, **ours}
        if key not in ONLY_BEGIN and theirs.get(key) != ours.get(key)
    ]
    if differing:
        named = ", ".join(differing[: checkpoint.NAMED])
        raise UserError(
            f"The parameters of {run_dir} are of another model than {experiment.id}: {named}; "
            f"give {experiment.id} these fields, or fine-tune an experiment that has them."
        )
    with contextlib.closing(checkpoint.reader(run_dir, source)) as checkpoints:
        step = checkpoints.latest
        trained_on, digest = checkpoints.check(step), _sha256(checkpoints.checksums(step))
    words = tokenizer.load(experiment.data.tokenizer)
    if words.hash8 != trained_on.tokenizer:
        raise UserError(
            f"The parameters of {run_dir} were trained with a tokenizer of hash {trained_on.tokenizer}, and "
            f"data.tokenizer {words.name!r} has {words.hash8}: its ids mean other text; name the tokenizer of that run."
        )
    return dataclasses.replace(experiment, start=Start(path=str(run_dir), step=step, sha256=digest))


def parameters(start: Start, abstract: LM) -> LM:
    """The parameters that a run begins with, placed like `abstract`; UserError where they are gone or have changed."""
    source = checkpoint.read_config(Path(start.path))
    with contextlib.closing(checkpoint.reader(Path(start.path), source)) as checkpoints:
        model, _ = checkpoints.load_model(start.step, abstract)
        if _sha256(checkpoints.checksums(start.step)) != start.sha256:
            raise UserError(
                f"Step {start.step} of {start.path} is not what this run was to begin with (sha256 "
                f"{start.sha256[:8]}); name its source again with --from, or choose another run.dir."
            )
    return model


def _sha256(checksums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
