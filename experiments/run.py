"""The command line: `gdn COMMAND ...`. Experiments come from the registry, `--group.field value` changes a field."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import experiments
from experiments import report, tables
from gdn_jax.config import Data, Experiment, Model, Optim, Run, flat, to_dict
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import explained
from pallas_kernels import bench

# JAX, Flax and the training stack load inside the commands that need them: help and mistakes answer at once.

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 parameters and AdamW's two moments
CHECKPOINT_REST = 1 << 16  # step, configuration, array metadata

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The experiment's fields; the defaults are those of the ID."""

    model: tyro.conf.FlagConversionOff[Model]
    optim: tyro.conf.FlagConversionOff[Optim]
    data: tyro.conf.FlagConversionOff[Data]
    run: tyro.conf.FlagConversionOff[Run]


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the experiments whose IDs match a shell pattern such as 'table3/*/tiny'."""

    json: Switch = False  # print an array of objects


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Overrides):
    """Show what an ID resolves to: size, cost, run directory and every field."""

    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Overrides):
    """Train an experiment, or go on from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Overrides):
    """Measure held-out perplexity of a run's last checkpoint."""

    stride: int | None = None  # score the last N targets of each window; None: windows side by side
    windows: int | None = None  # how many windows of data.seq_len tokens; None: all
    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class RunOptions(Overrides):
    """Train, evaluate, write result.json and loss.png."""

    stride: int | None = None  # as of `gdn eval`
    windows: int | None = None
    json: Switch = False  # print the result row


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Tokenise text: a file or folder of text, .jsonl or .parquet, 'python-stdlib', or 'hf:owner/name'."""

    out: str = ""  # directory to write; empty: data/<source>-<tokenizer hash>
    tokenizer: str = "byte"  # or the path of a SentencePiece .model or tokenizers .json file
    validation: float = 0.01  # fraction of documents held out
    workers: int | None = None  # processes; None: one per core, one alone for small sources
    text_column: str = "text"  # of .jsonl and .parquet rows


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every hash of a prepared directory."""

    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: versions, devices, each op against its oracle, what auto picks and why."""

    json: Switch = False  # print one object


@dataclass(frozen=True, kw_only=True)
class BenchOptions(bench.Options):
    """Time an op here, ours and every installed peer's: device milliseconds, peak memory, fraction of the roofline."""

    json: Switch = False  # print one object


def list_ids(glob: str, options: ListOptions) -> None:
    found = experiments.find(glob or "*")
    if not found:
        groups = dict.fromkeys(id.partition("/")[0] for id in experiments.EXPERIMENTS)
        raise UserError(f"No experiment matches {glob!r}; the IDs begin with {', '.join(groups)}.")
    rows = [_list_row(experiment) for experiment in found]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    header = ("ID", "parameters", "tokens", "data")
    cells = [(row["id"], f"{row['parameters']:,}", report.short(row["tokens"]), row["source"]) for row in rows]
    print(report.aligned([header, *cells]))


def _list_row(experiment: Experiment) -> dict[str, Any]:
    group, name, scale = (*experiment.id.split("/"), "tiny")[:3]
    return {
        "id": experiment.id,
        "group": group,
        "model": name,
        "scale": scale,
        "parameters": report.parameters(experiment.model),
        "tokens": _tokens(experiment),
        "source": experiment.data.source,
        "tokenizer": experiment.data.tokenizer,
        "hash8": experiment.hash8,
    }


def show(experiment: Experiment, options: ShowOptions) -> None:
    from gdn_jax.flops import forward_flops_per_token, train_flops_per_token
    from gdn_jax.train import run_directory

    parameters, seq_len = report.parameters(experiment.model), experiment.data.seq_len
    facts = {
        "id": experiment.id,
        "hash8": experiment.hash8,
        "model_hash8": experiment.model_hash8,
        "parameters": parameters,
        "layers": experiment.model.layers,
        "forward_flops_per_token": forward_flops_per_token(experiment.model, seq_len),
        "train_flops_per_token": train_flops_per_token(experiment.model, seq_len),
        "tokens": _tokens(experiment),
        "checkpoint_bytes": CHECKPOINT_BYTES_PER_PARAMETER * parameters + CHECKPOINT_REST,
        "run_directory": str(run_directory(experiment)),
    }
    facts |= {name: value for name, value in flat(to_dict(experiment)).items() if name != "id"}
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(report.aligned([(name, _readable(value)) for name, value in facts.items()]))


def train(experiment: Experiment, options: TrainOptions) -> None:
    print(_train(experiment))


def evaluate(experiment: Experiment, options: EvalOptions) -> None:
    numbers = _evaluate(experiment, options.stride, options.windows)
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        print(report.validation_table(numbers))


def run(experiment: Experiment, options: RunOptions) -> None:
    from gdn_jax.evaluate.perplexity import check_scoring

    check_scoring(experiment.data.seq_len, options.stride, options.windows)  # before hours of training
    run_dir = _train(experiment)
    _evaluate(experiment, options.stride, options.windows)
    row = report.result_row(run_dir)
    plot = report.draw_loss(run_dir)
    if options.json:
        print(json.dumps(row, indent=1))
    else:
        print(report.summary(row))
        print(f"Wrote {run_dir / 'result.json'} and {plot}.")


def prepare_data(source: str, options: PrepareOptions) -> None:
    from gdn_jax.prepare import default_directory, prepare

    data = Data(source=source, tokenizer=options.tokenizer, validation=options.validation)
    out = Path(options.out) if options.out else default_directory(data, Run().data_root)
    prepare(
        source, out, options.tokenizer,
        validation=options.validation, text_column=options.text_column, workers=options.workers,
    )  # fmt: skip
    print(out)


def verify_data(directory: str, options: VerifyOptions) -> None:
    from gdn_jax.data import open_prepared

    prepared = open_prepared(directory, tokenizer_hash=None, verify=True)
    facts = {"directory": directory, "source": prepared.manifest["source"]}
    facts |= {f"tokenizer_{key}": value for key, value in prepared.manifest["tokenizer"].items()}
    for split, counts in prepared.manifest["splits"].items():
        facts |= {f"{split}_{key}": counts[key] for key in ("tokens", "documents", "bytes", "words")}
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(report.aligned([(name, _readable(value)) for name, value in facts.items()]))
        print("Every file is whole.")


def doctor(_: str, options: DoctorOptions) -> int:
    from experiments.doctor import described, examine

    found = examine()
    print(json.dumps(found, indent=1) if options.json else described(found))
    return 0 if found["ok"] else 1


def bench_op(op: str, options: BenchOptions) -> int:
    from gdn_jax.metrics import environment

    try:
        jobs = bench.jobs(op, options)
    except ValueError as error:
        raise UserError(str(error)) from None
    return bench.report(jobs, environment, options.out, options.json)


class _Stopped(Exception):
    """A signal stopped the training, which has said what it saved."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def _train(experiment: Experiment) -> Path:
    from gdn_jax import train as training

    try:
        with contextlib.redirect_stdout(sys.stderr):  # progress is for the reader, stdout for the result
            return training.train(experiment)
    except training.Interrupted as stop:
        sentence = f"Stopped and saved at step {stop.step}; the same command goes on from there."
        raise _Stopped(sentence, 128 + stop.signal) from None


def _evaluate(experiment: Experiment, stride: int | None, windows: int | None) -> dict[str, Any]:
    """Measure the run's last checkpoint and keep the numbers in its directory."""
    from gdn_jax import checkpoint, tokenizer
    from gdn_jax.evaluate.perplexity import check_scoring, perplexity
    from gdn_jax.layers import compute_for
    from gdn_jax.train import chosen_impls, prepared_data, run_directory

    check_scoring(experiment.data.seq_len, stride, windows)
    chosen_impls(experiment)
    run_dir = run_directory(experiment)
    trained, model, step = checkpoint.load(run_dir)
    checkpoint.check_same(trained, experiment, run_dir)
    data, optim = experiment.data, experiment.optim
    numbers = perplexity(
        model, prepared_data(experiment, None), tokenizer.load(data.tokenizer),
        seq_len=data.seq_len, stride=stride, windows=windows,
        batch_size=optim.batch_size // experiment.run.micro_batches,
        compute=compute_for(experiment), with_segments=data.reset_at_documents,
    )  # fmt: skip
    report.save_evaluation(run_dir, numbers, step)
    return {"id": experiment.id, "hash8": experiment.hash8, "step": step} | numbers


def _tokens(experiment: Experiment) -> int:
    return experiment.optim.steps * experiment.optim.batch_size * experiment.data.seq_len


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.4g}"
    large = isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
    return f"{value:,}" if large else str(value)


# --- from words to a call ---


class Command(NamedTuple):
    """What a command runs, its options, and the one word before them ("[GLOB]" may be left out)."""

    call: Callable[..., int | None]
    options: type
    operand: str = ""


COMMANDS = {
    "list": Command(list_ids, ListOptions, "[GLOB]"),
    "show": Command(show, ShowOptions, "ID"),
    "train": Command(train, TrainOptions, "ID"),
    "eval": Command(evaluate, EvalOptions, "ID"),
    "run": Command(run, RunOptions, "ID"),
    "table": Command(tables.table, tables.TableOptions, "TABLE"),
    "data prepare": Command(prepare_data, PrepareOptions, "SOURCE"),
    "data verify": Command(verify_data, VerifyOptions, "DIR"),
    "doctor": Command(doctor, DoctorOptions),
    "bench": Command(bench_op, BenchOptions, "OP"),
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 failed check, 2 user's mistake, 128 + a signal that stopped it."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except _Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("Stopped; what was finished before is kept.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `gdn list | head`; the interpreter flushes once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(explained(error), file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int | None:
    if not words or words[0] in HELP or words in (["data"], *(["data", word] for word in HELP)):
        print(_overview())
        return 0
    name = " ".join(words[: 2 if words[0] == "data" else 1])
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}{nearest(name, COMMANDS)}; `gdn --help` lists all.")
    command, words = COMMANDS[name], words[len(name.split()) :]
    asks_help = any(word in HELP for word in words)
    operand = words.pop(0) if command.operand and words and not words[0].startswith("-") else ""
    if not (operand or command.operand in ("", "[GLOB]") or asks_help):
        hint = "; `gdn list` shows all IDs" if command.operand == "ID" else ""
        raise UserError(f"`gdn {name}` needs {command.operand} as its first word{hint}.")
    prog = f"gdn {name} {command.operand}".rstrip()
    if command.operand != "ID":
        return command.call(operand, _parse(command.options(), words, prog))
    # Help without an ID shows the defaults of the first one.
    experiment = experiments.get(operand or next(iter(experiments.EXPERIMENTS)))
    groups = {name: getattr(experiment, name) for name in ("model", "optim", "data", "run")}
    options = _parse(command.options(**groups), words, prog)
    experiment = dataclasses.replace(experiment, **{name: getattr(options, name) for name in groups})
    return command.call(experiment, options)


def _overview() -> str:
    lines = [
        (f"  gdn {name} {command.operand}".rstrip(), command.options.__doc__) for name, command in COMMANDS.items()
    ]
    return (
        f"usage: gdn COMMAND ...\n\n{report.aligned(lines)}\n\n"
        f"Change any field of an experiment: gdn train ID --optim.lr 3e-4 --run.dir here\n"
        f"All options of a command: gdn COMMAND --help (with an ID: its own values as defaults)"
    )


def _parse(default: Any, words: list[str], prog: str) -> Any:
    """`default` with the options in `words`; a mistake is a UserError that names the option."""
    try:
        return _tyro(default, words, prog)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro explains itself in boxes of many lines only: find the option that is wrong on its own.
    hints = _hints(default)
    for option in _split(words):
        name, _, value = option[0].removeprefix("--").partition("=")
        name, values = name.replace("-", "_"), ([value] if value else option[1:])
        if not option[0].startswith("--"):
            raise UserError(f"{' '.join(option)!r} is not expected here; options are written --name value.")
        if name not in hints:
            known = f"`{prog} --help` lists all"
            raise UserError(f"There is no option --{name}{nearest(f'--{name}', [f'--{h}' for h in hints])}; {known}.")
        try:
            _tyro(default, option, prog)
        except SystemExit:
            given = repr(" ".join(values)) if values else "given without a value"
            raise UserError(f"--{name} is {given}; it must be {_rule(hints[name])}.") from None
    raise UserError(f"The options {' '.join(words)!r} do not go together; `{prog} --help` explains each.")


def _tyro(default: Any, words: list[str], prog: str) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # the sentences are ours
        return tyro.cli(
            type(default),
            default=default,
            args=words,
            prog=prog,
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
        )


def _split(words: list[str]) -> list[list[str]]:
    """["--a", "1", "--b"] -> [["--a", "1"], ["--b"]]."""
    out: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not out:
            out.append([word])
        else:
            out[-1].append(word)
    return out


def _hints(options: Any, prefix: str = "") -> dict[str, Any]:
    """Name of every option -> its type."""
    out = {}
    for name, hint in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        out |= _hints(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: hint}
    return out


def _rule(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return f"{_rule(args[0])} or None"
    if origin is tuple:
        return "one word or more"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "one word"}[hint]


if __name__ == "__main__":
    sys.exit(main())
