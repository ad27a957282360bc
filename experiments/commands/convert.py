"""`gdn convert import` and `gdn convert export`: checkpoints of other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.commands import named, print_facts, say_if_changed
from experiments.options import Switch
from gdn_jax.config import Data
from gdn_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a run of a checkpoint: a Hugging Face directory of flash-linear-attention's, or lit-gpt safetensors."""

    out: str = ""  # the run's directory; it must not exist
    like: str = ""  # for lit-gpt tensors: an experiment with that model, as table3/gated-deltanet/1.3b
    tokenizer: str = ""  # "byte", or a SentencePiece .model or tokenizers .json file; empty: the directory's own
    source: str = "english-novels"  # data that `gdn eval` measures by default, as of data.source
    seq_len: int = 4096  # its windows
    validation: float = 0.05  # its held-out fraction, as the data was prepared
    precision: Literal["files", "bf16", "fp32"] = "files"  # of activations; files: that of the tensors
    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run's last checkpoint as safetensors that flash-linear-attention, or the authors' release, loads."""

    out: str = ""  # directory to write; it must not exist
    format: Literal["fla", "lit"] = "fla"  # a Hugging Face directory, or the release's keys
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the tensors; bf16 rounds
    step: int | None = None  # which checkpoint; None: the newest
    json: Switch = False  # print one flat object


def import_run(source: str, options: ImportOptions) -> None:
    out = _out(options.out)
    like = named(options.like).model if options.like else None
    # The tokenizer may still be unknown here: empty means the directory's own.
    data = Data(
        source=options.source, tokenizer=options.tokenizer, seq_len=options.seq_len, validation=options.validation
    )
    from gdn_jax.convert.exchange import import_checkpoint

    precision = None if options.precision == "files" else options.precision
    facts = import_checkpoint(Path(source), out, data=data, like=like, precision=precision)
    print_facts(facts, options.json)


def export_run(name: str, options: ExportOptions) -> None:
    out = _out(options.out)
    experiment = named(name)
    say_if_changed(experiment)
    from gdn_jax.convert.exchange import export_checkpoint
    from gdn_jax.runs import run_directory

    facts = export_checkpoint(
        run_directory(experiment), out, form=options.format, dtype=options.dtype, step=options.step
    )
    print_facts(facts, options.json)


def _out(name: str) -> Path:
    if not name:
        raise UserError("--out is missing; give the directory to write.")
    return Path(name)
