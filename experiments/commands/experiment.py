"""`gdn list`, `show`, `train`, `eval` and `run`: the commands that take an experiment ID."""

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import experiments
from experiments import published, report
from experiments.commands import Stopped, evaluation, named, print_facts
from experiments.commands.evaluation import TaskOptions
from experiments.figure3 import Timing
from experiments.options import FromRun, Overrides, Switch
from gdn_jax.config import Experiment, flat, to_dict
from gdn_jax.errors import UserError

OF_KIND = {"evaluates": "the run of", "times": "a training step of"}


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the experiments whose IDs match a shell pattern such as 'table3/*/tiny'."""

    json: Switch = False  # print an array of objects


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Overrides):
    """Show what an ID resolves to: size, cost, run directory and every field."""

    tasks: str = ""  # a suite, whose tasks an evaluating ID puts to the run
    devices: int = 0  # also what so many devices would send each other in a step, as XLA compiles it for a CPU's
    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Overrides):
    """Train an experiment, or go on from its last checkpoint."""

    from_: FromRun = ""  # begin with the newest parameters of this run, an ID or a directory, instead of random ones


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Overrides, TaskOptions):
    """Measure a run's last checkpoint: held-out perplexity, or tasks, or anybody's text."""

    stride: int | None = None  # score the last N targets of each window; None: windows side by side
    windows: int | None = None  # how many windows of data.seq_len tokens; None: all
    text: tuple[str, ...] = ()  # files to score instead
    requests: str = ""  # write the tasks' requests to this file instead of answering them, for another machine
    answer: str = ""  # answer the requests in this file; the tasks then find the answers in RUN/answers.jsonl
    json: Switch = False  # print one flat object


@dataclass(frozen=True, kw_only=True)
class RunOptions(Overrides, TaskOptions):
    """Train, evaluate, write result.json and loss.png."""

    from_: FromRun = ""  # as of `gdn train`
    stride: int | None = None  # as of `gdn eval`
    windows: int | None = None
    json: Switch = False  # print the result row


def list_ids(glob: str, options: ListOptions) -> None:
    rows = [_list_row(experiment) for experiment in experiments.find(glob or "*")]
    rows += [_evaluation_row(one) for id, one in experiments.EVALUATIONS.items() if fnmatchcase(id, glob or "*")]
    rows += [_timing_row(one) for id, one in experiments.TIMINGS.items() if fnmatchcase(id, glob or "*")]
    if not rows:
        known = [*experiments.EXPERIMENTS, *experiments.EVALUATIONS, *experiments.TIMINGS]
        groups = dict.fromkeys(id.partition("/")[0] for id in known)
        inside = f"{glob.rstrip('/')}/*"
        hint = f" (did you mean {inside!r}?)" if any(fnmatchcase(id, inside) for id in known) else ""
        raise UserError(f"No experiment matches {glob!r}{hint}; the IDs begin with {', '.join(groups)}.")
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    header = ("ID", "kind", "parameters", "tokens", "data")
    cells = [
        (row["id"], row["kind"], f"{row['parameters']:,}", report.short(row["tokens"]), row["source"])
        if row["kind"] == "trains"
        else (row["id"], row["kind"], f"{OF_KIND[row['kind']]} {row['of']}")
        for row in rows
    ]
    print(report.aligned([header, *cells]))


def _list_row(experiment: Experiment) -> dict[str, Any]:
    group, name, scale = (*experiment.id.split("/"), "tiny")[:3]
    return {
        "id": experiment.id,
        "kind": "trains",
        "group": group,
        "model": name,
        "scale": scale,
        "parameters": report.parameters(experiment.model),
        "tokens": _tokens(experiment),
        "source": experiment.data.source,
        "tokenizer": experiment.data.tokenizer,
        "hash8": experiment.hash8,
    }


def _checkpoint_bytes(experiment: Experiment) -> int:
    import jax

    from gdn_jax.checkpoint import checkpoint_bytes
    from gdn_jax.model import abstract_model
    from gdn_jax.optim import optimizer

    model = abstract_model(experiment.model)
    return checkpoint_bytes(model, jax.eval_shape(optimizer(experiment.optim).init, model))


def _evaluation_row(one: experiments.Evaluation) -> dict[str, Any]:
    changed = {"id": one.id, "kind": "evaluates", "group": one.id.partition("/")[0]}
    return _list_row(one.experiment) | changed | {"of": one.experiment.id, "tasks": one.suite.tasks}


def _timing_row(one: Timing) -> dict[str, Any]:
    sizes = {setting.seq_len * setting.batch_size for setting in one.settings.values()}
    changed = {"id": one.id, "kind": "times", "group": one.id.partition("/")[0], "tokens": max(sizes)}
    return _list_row(one.of) | changed | {"of": one.of.id, "settings": list(one.settings)}


def show(experiment: Experiment, options: ShowOptions) -> None:
    if options.devices < 0:
        raise UserError(f"devices is {options.devices}; it must be positive, or 0 for none.")
    if options.devices:  # before JAX looks for devices
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}"
    from gdn_jax.flops import forward_flops_per_token, train_flops_per_token
    from gdn_jax.implementations import implementations, in_words
    from gdn_jax.runs import run_directory

    parameters, seq_len = report.parameters(experiment.model), experiment.data.seq_len
    facts = {
        "id": experiment.id,
        "hash8": experiment.hash8,
        "recipe8": experiment.recipe8,
        "model_hash8": experiment.model_hash8,
        "parameters": parameters,
        "layers": experiment.model.layers,
        "forward_flops_per_token": forward_flops_per_token(experiment.model, seq_len),
        "train_flops_per_token": train_flops_per_token(experiment.model, seq_len),
        "tokens": _tokens(experiment),
        "checkpoint_bytes": _checkpoint_bytes(experiment),
        "run_directory": str(run_directory(experiment)),
    }
    if options.tasks:
        suite = experiments.SUITES[options.tasks]
        of = {"id": experiment.id.replace("table3", suite.name, 1), "of": experiment.id}
        facts |= of | {"tasks": suite.tasks, "columns": list(suite.columns)}
    facts |= {name: value for name, value in flat(to_dict(experiment)).items() if name != "id"}
    try:
        facts |= {f"here.{op}": words for op, words in in_words(implementations(experiment)).items()}
    except UserError as error:  # of this machine, not of the experiment
        facts["here"] = str(error)
    if options.devices:
        facts |= {f"step.{kind}": words for kind, words in _collectives(experiment, options.devices).items()}
    print_facts(facts, options.json)


def _collectives(experiment: Experiment, count: int) -> dict[str, str]:
    import jax

    from gdn_jax.collectives import collectives, in_words
    from gdn_jax.sharding import make_mesh
    from gdn_jax.train import Trainer

    if len(jax.devices()) < count:
        raise UserError(f"devices is {count} and JAX began with {len(jax.devices())}; ask in a process of its own.")
    trainer = Trainer(experiment, make_mesh(experiment.run.fsdp, jax.devices()[:count], context=experiment.run.context))
    return in_words(collectives(trainer.traced_step().lower().compile().as_text()))


def train(experiment: Experiment, options: TrainOptions) -> None:
    from gdn_jax import distributed

    distributed.start(os.environ)
    run_dir = _train(_begun(experiment, options.from_))
    if distributed.first():
        print(run_dir)


def evaluate(experiment: Experiment, options: EvalOptions) -> None:
    from gdn_jax import alive, distributed

    distributed.start(os.environ)
    asked = [name for name in ("tasks", "text", "answer") if getattr(options, name)]
    if options.requests and not distributed.alone():
        raise UserError("--requests is written by one process; several can answer them.")
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} ask for two things; give one of them.")
    if options.requests and not options.tasks:
        raise UserError("--requests writes the requests of tasks; name them with --tasks.")
    if options.requests:
        evaluation.write_requests(experiment, options, Path(options.requests))
        return
    with distributed.clear_stdout():
        distributed.on_every(lambda: evaluation.checked(options))
        if not asked:
            numbers = _evaluate(experiment, options.stride, options.windows)
            said = json.dumps(numbers, indent=1) if options.json else report.validation_table(numbers)
        else:
            with alive.watched(distributed.silence(os.environ), distributed.ANSWERS):
                said = _asked(experiment, options)
    if distributed.first():
        print(said)


def _asked(experiment: Experiment, options: EvalOptions) -> str:
    if options.text:
        return evaluation.score_text(experiment, options.text, options.max_length, options.json)
    if options.answer:
        return evaluation.answer(experiment, Path(options.answer), options.max_length)
    found = evaluation.measure(experiment, options)
    return json.dumps(found, indent=1) if options.json else evaluation.described(found)


def run(experiment: Experiment, options: RunOptions) -> None:
    from gdn_jax import distributed
    from gdn_jax.evaluate.perplexity import check_scoring

    distributed.start(os.environ)
    if not distributed.alone():
        raise UserError("`gdn run` also evaluates, in one process; train with `gdn train ID`, then evaluate in one.")
    experiment = _begun(experiment, options.from_)
    # before hours of training
    check_scoring(experiment.data.seq_len, options.stride, options.windows)
    evaluation.checked(options)
    run_dir = _train(experiment)
    measured = _evaluate(experiment, options.stride, options.windows)
    tasks = evaluation.measure(experiment, options) if options.tasks else []
    row = report.result_row(run_dir)
    plot = report.draw_loss(run_dir)
    if options.json:
        print(json.dumps(row, indent=1))
    else:
        print(report.summary(row))
        if measured["marks"] and not published.marks(row["validation"]):
            print(f"Asked now\n{report.validation_table(measured)}")
        if tasks:
            print(evaluation.described(tasks))
        print(f"Wrote {run_dir / 'result.json'} and {plot}.")


def _begun(experiment: Experiment, source: str) -> Experiment:
    """The experiment, to begin with the parameters of the run that `source` names, if any."""
    if not source:
        return experiment
    from gdn_jax.fine_tuning import from_run
    from gdn_jax.runs import run_directory

    return from_run(experiment, run_directory(named(source)))


def _train(experiment: Experiment) -> Path:
    from gdn_jax import train as training

    try:
        with contextlib.redirect_stdout(sys.stderr):  # progress is for the reader, stdout for the result
            return training.train(experiment)
    except training.Interrupted as stop:
        sentence = f"Stopped and saved at step {stop.step}; the same command goes on from there."
        raise Stopped(sentence, 128 + stop.signal) from None


def _evaluate(experiment: Experiment, stride: int | None, windows: int | None) -> dict[str, Any]:
    """Measure the run's last checkpoint and keep the numbers in its directory.

    Its model may be measured on any data of its tokenizer, which the numbers then say.
    """
    from gdn_jax import alive, checkpoint, distributed, tokenizer
    from gdn_jax.evaluate.perplexity import check_scoring, perplexity
    from gdn_jax.implementations import check_impl
    from gdn_jax.layers import compute_for
    from gdn_jax.metrics import environment
    from gdn_jax.progress import Progress
    from gdn_jax.runs import check_tokenizer, open_run, prepared_data, run_directory

    data = experiment.data

    def opened() -> tuple:
        check_scoring(data.seq_len, stride, windows)
        check_impl(experiment)
        run = open_run(run_directory(experiment))
        checkpoint.check_same(dataclasses.replace(run.experiment, data=data), experiment, run.directory)
        check_tokenizer(tokenizer.load(data.tokenizer), run.trained_on, run.directory)
        return run, prepared_data(experiment)

    if not distributed.alone():
        Progress().say(distributed.described())
    with alive.watched(distributed.silence(os.environ), distributed.BEGIN):
        run, prepared = distributed.on_every(opened)
        rows, here = experiment.optim.batch_size // experiment.run.micro_batches, environment()
        asked = {"seq_len": data.seq_len, "stride": stride, "windows": windows, "rows": rows}
        asked |= {"reset_at_documents": data.reset_at_documents, "precision": experiment.optim.precision}
        asked |= {"impl": experiment.run.impl, "context": experiment.run.context, "step": run.step}
        asked |= {"trained_on": run.trained_on._asdict(), "data": prepared.identity._asdict()}
        distributed.agree(asked | {name: here[name] for name in ("python", "versions", "source", "backend")})
        numbers = perplexity(
            run.model, prepared, run.tokenizer, seq_len=data.seq_len, stride=stride, windows=windows, batch_size=rows,
            compute=compute_for(experiment), with_segments=data.reset_at_documents, context=experiment.run.context,
        )  # fmt: skip
        trained = {"trained_on": run.trained_on.fingerprint, "trained_window": run.experiment.data.seq_len}
        evaluation = {"step": run.step, "of_steps": run.experiment.optim.steps} | trained | numbers
        if distributed.first():
            report.save_evaluation(run.directory, evaluation)
    return {"id": experiment.id, "hash8": experiment.hash8, "marks": published.marks(evaluation)} | evaluation


def _tokens(experiment: Experiment) -> int:
    return experiment.optim.steps * experiment.optim.batch_size * experiment.data.seq_len
