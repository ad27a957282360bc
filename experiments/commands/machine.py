"""`gdn doctor`, `gdn bench` of ops, steps and generation, `gdn tune`: this machine checked, timed, tuned."""

import dataclasses
import json
from dataclasses import dataclass

import experiments
from experiments.commands import named
from experiments.generation_speed import GenerationOptions, report
from experiments.long_rows import LongRowsOptions
from experiments.long_rows import report as report_long_rows
from experiments.options import Switch
from experiments.training_speed import SpeedOptions
from experiments.training_speed import report as report_speed
from gdn_jax.errors import UserError
from pallas_kernels import bench, tune, tuned


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: versions, devices, each op against its oracle; with an ID, what its ops take here and why."""

    json: Switch = False  # print one object


@dataclass(frozen=True, kw_only=True)
class BenchOptions(bench.Options):
    """Time an op here, ours and every installed peer's: device milliseconds, peak memory, fraction of the roofline."""

    json: Switch = False  # print one object


@dataclass(frozen=True, kw_only=True)
class BenchGenerateOptions(GenerationOptions):
    """Time reading prompts and writing tokens with an ID's model, random parameters: tokens/s beside their floors."""

    json: Switch = False  # print one object


@dataclass(frozen=True, kw_only=True)
class BenchFigure3Options(SpeedOptions):
    """Time the training step of Figure 3's models at its lengths: tokens/s, MFU, memory, the paper's claims."""

    json: Switch = False  # print one object


@dataclass(frozen=True, kw_only=True)
class BenchLongRowsOptions(LongRowsOptions):
    """Time the training step on one long row of tokens that several devices share: tokens/s, memory, losses."""

    json: Switch = False  # print one array


@dataclass(frozen=True, kw_only=True)
class TuneOptions(tune.Options):
    """Find the fastest tiles, warps and num_stages of an op's kernels here; only what float64 confirms is kept."""

    json: Switch = False  # print the whole table as one object


def doctor(name: str, options: DoctorOptions) -> int:
    from experiments.doctor import described, examine
    from gdn_jax.implementations import check_impl, implementations

    if name:  # one that is not known is said before minutes of checks
        check_impl(named(name))
    taken = implementations(named(name)) if name else None
    found = examine() | ({"id": name, "impl": taken} if name else {})
    print(json.dumps(found, indent=1) if options.json else described(found))
    return 0 if found["ok"] else 1


def bench_op(op: str, options: BenchOptions) -> int:
    def environment():
        from gdn_jax.metrics import environment  # imports jax, which must wait until no worker needs the device

        return environment()

    if op in experiments.TIMINGS:
        experiments.get(op)  # says what times it
    try:
        jobs = bench.jobs(op, options)
    except ValueError as error:
        raise UserError(str(error)) from None
    return bench.report(jobs, environment, options.out, options.json)


def bench_generate(name: str, options: BenchGenerateOptions) -> None:
    experiment = named(name)
    optim, run = experiment.optim, dataclasses.replace(experiment.run, impl=options.impl)
    if options.precision != "run":
        optim = dataclasses.replace(optim, precision=options.precision)
    report(dataclasses.replace(experiment, optim=optim, run=run), options, options.json)


def bench_figure3(operand: str, options: BenchFigure3Options) -> int:
    return report_speed(options, options.json)


def bench_long_rows(operand: str, options: BenchLongRowsOptions) -> int:
    return report_long_rows(options, options.json)


def tune_op(op: str, options: TuneOptions) -> None:
    from gdn_jax.metrics import environment

    try:
        table = tune.tune(op, options, environment)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from None
    print(tuned.as_text(table) if options.json else tune.markdown(table))
