"""The command line: `gdn COMMAND ...`. Experiments come from the registry, `--group.field value` changes a field."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import experiments
from experiments import figures, tables
from experiments.commands import Stopped, convert, generate, machine, named, say_if_changed
from experiments.commands import data as on_data
from experiments.commands import experiment as on_ids
from experiments.options import Overrides, parse, with_mixers
from experiments.report import aligned
from gdn_jax.console import CODE, STOPPED
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import explained


class Command(NamedTuple):
    """What a command runs, its options, and the one word before them (in brackets: it may be left out)."""

    call: Callable[..., int | None]
    options: type
    operand: str = ""


COMMANDS = {
    "list": Command(on_ids.list_ids, on_ids.ListOptions, "[GLOB]"),
    "show": Command(on_ids.show, on_ids.ShowOptions, "ID"),
    "train": Command(on_ids.train, on_ids.TrainOptions, "ID"),
    "eval": Command(on_ids.evaluate, on_ids.EvalOptions, "RUN"),
    "run": Command(on_ids.run, on_ids.RunOptions, "ID"),
    "table": Command(tables.table, tables.TableOptions, "TABLE"),
    "figure": Command(figures.figure, figures.FigureOptions, "FIGURE"),
    "data prepare": Command(on_data.prepare_data, on_data.PrepareOptions, "SOURCE"),
    "data verify": Command(on_data.verify_data, on_data.VerifyOptions, "DIR"),
    "generate": Command(generate.generate_text, generate.GenerateOptions, "RUN"),
    "convert import": Command(convert.import_run, convert.ImportOptions, "SOURCE"),
    "convert export": Command(convert.export_run, convert.ExportOptions, "RUN"),
    "doctor": Command(machine.doctor, machine.DoctorOptions, "[ID]"),
    "bench": Command(machine.bench_op, machine.BenchOptions, "OP"),
    "bench generate": Command(machine.bench_generate, machine.BenchGenerateOptions, "ID"),
    "bench figure3": Command(machine.bench_figure3, machine.BenchFigure3Options),
    "bench long-rows": Command(machine.bench_long_rows, machine.BenchLongRowsOptions),
    "tune": Command(machine.tune_op, machine.TuneOptions, "OP"),
}
GROUPS = {name.partition(" ")[0] for name in COMMANDS if " " in name} - COMMANDS.keys()  # of two words always
HINTS = {
    "ID": "; `gdn list` shows all IDs",
    "RUN": ", an ID, FILE:NAME or the directory of a run",
}
HELP = ("-h", "--help")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # as jax says it
GPU_MEMORY = "0.92"  # the share of a GPU's memory that jax takes; its own 0.75 is too little for a 1.3b step on 80 GB


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 failed check, 2 user's mistake, 128 + a signal that stopped it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)  # read when jax first asks for a device
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return CODE
    except BrokenPipeError:  # `gdn list | head`; the interpreter flushes once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(explained(error), file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError) as error:  # the latter of a platform that jax knows and that is not here
        if OUT_OF_MEMORY in str(error):
            print(f"The device's memory is full ({_sized(error)}); take fewer or shorter sequences.", file=sys.stderr)
            return 2
        if not _without_device():
            raise
        platforms = os.environ["JAX_PLATFORMS"]
        print(f"JAX_PLATFORMS is {platforms!r}, and jax has none here; unset it, or set it to cpu.", file=sys.stderr)
        return 2


def _sized(error: BaseException) -> str:
    """What an allocation failed at, in a few words."""
    return str(error).partition(OUT_OF_MEMORY)[2].partition("\n")[0].strip(": .")[:100] or "no size given"


def _without_device() -> bool:
    """Whether jax finds no device because of what JAX_PLATFORMS names."""
    if not (os.environ.get("JAX_PLATFORMS") and "jax" in sys.modules):
        return False
    try:
        sys.modules["jax"].devices()
    except (RuntimeError, AssertionError):
        return True
    return False


def _dispatch(words: list[str]) -> int | None:
    group = bool(words) and words[0] in GROUPS
    if not words[group:] or words[group] in HELP:
        print(_overview())
        return 0
    name = " ".join(words[:2])
    if not group and name not in COMMANDS:
        name = words[0]
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}{nearest(name, COMMANDS)}; `gdn --help` lists all.")
    command, words = COMMANDS[name], words[len(name.split()) :]
    asks_help = any(word in HELP for word in words)
    operand = words.pop(0) if command.operand and words and not words[0].startswith("-") else ""
    if not (operand or not command.operand or command.operand.startswith("[") or asks_help):
        hint = HINTS.get(command.operand, "")
        raise UserError(f"`gdn {name}` needs {command.operand} as its first word{hint}.")
    prog = f"gdn {name} {command.operand}".rstrip()
    if not issubclass(command.options, Overrides):
        return command.call(operand, parse(command.options(), words, prog))
    defaults = "" if operand else next(iter(experiments.EXPERIMENTS))  # whose options help without an ID shows
    operand = operand or defaults
    # An ID that evaluates is the run of another ID and the tasks asked of it; nothing else takes one.
    takes_tasks = any(field.name == "tasks" for field in dataclasses.fields(command.options))
    evaluates = experiments.EVALUATIONS.get(operand) if takes_tasks else None
    given = {"tasks": evaluates.suite.name} if evaluates else {}
    operand = evaluates.experiment.id if evaluates else operand
    experiment = named(operand)
    groups = {name: getattr(experiment, name) for name in ("model", "optim", "data", "run")}
    options = parse(
        command.options(**groups | {"model": with_mixers(experiment.model, words)}, **given), words, prog, defaults
    )
    experiment = dataclasses.replace(experiment, **{name: getattr(options, name) for name in groups})
    say_if_changed(experiment)
    return command.call(experiment, options)


def _overview() -> str:
    lines = [
        (f"  gdn {name} {command.operand}".rstrip(), command.options.__doc__) for name, command in COMMANDS.items()
    ]
    return (
        f"usage: gdn COMMAND ...\n\n{aligned(lines)}\n\n"
        f"ID and RUN are an ID of `gdn list`, the directory of a run, or FILE.py:NAME, an Experiment of your own\n"
        f"Change any field of an experiment: gdn train ID --optim.lr 3e-4 --run.dir here\n"
        f"All options of a command: gdn COMMAND --help (with an ID: its own values as defaults)"
    )


if __name__ == "__main__":
    sys.exit(main())
