"""`gdn bench figure3`: a training step of each model at each length, timed in processes of their own.

A point is kept in runs/figure3/<model>/<scale>/ as soon as it is measured, and taken from there where the same code on
the same device with the same options would measure it again. `python -m experiments.training_speed worker JOB PARENT`
measures one; this module starts no JAX elsewhere.
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import experiments
from experiments import model_peers
from experiments.figure3 import SETTINGS, Timing
from experiments.models import PAPER_MODELS
from experiments.options import Switch
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import read_json, write_json
from pallas_kernels import workers

MODULE = "experiments.training_speed"
KEPT = Path("runs")  # below it, <id>/<point>.json
STARTING = 300  # seconds within which a process must find its device
# fields of Run that decide a step's speed
HOW = ("remat", "scan_layers", "micro_batches", "impl", "chunk", "residuals")
OUT_OF_MEMORY, NOT_RUN = "out of memory", "not run"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Time the training step of Figure 3's models at its lengths: tokens/s, MFU, peak memory, compile time."""

    scale: Literal["tiny", "400m", "1.3b"] = "1.3b"
    models: str = "all"  # some of the ten, separated by commas
    settings: str = "all"  # some of 2Kx16,4Kx8,8Kx4,16Kx2: tokens of a row x rows (64x8,128x4,256x2,512x1 at tiny)
    peers: str = ""  # other libraries' own steps beside ours, where they have the model: jla
    remat: Literal["id", "none", "products", "kernels", "products+kernels", "full"] = "id"  # id: the ID's own
    micro_batches: int = 1  # slices of a step's rows
    impl: Literal["auto", "chunked", "reference", "triton", "triton_interpret"] = "auto"
    warm_up: int = 2  # steps before those that are timed
    repetitions: int = 7  # steps that are timed, each waited for; the median is reported
    step_profile: Switch = False  # also one step by kernel family, beside each family's floor
    timeout: int = 900  # seconds for one point, compilation included
    out: str = ""  # directory that gets figure3-SCALE.md, .json and .png; empty: none


class Point(NamedTuple):
    """One measurement: what `work` needs, as JSON."""

    id: str
    setting: str
    remat: str
    micro_batches: int
    impl: str
    warm_up: int
    repetitions: int
    step_profile: bool
    peer: str = ""  # another library, whose step is timed instead of ours

    @property
    def timing(self) -> Timing:
        return experiments.TIMINGS[self.id]

    @property
    def experiment(self) -> Experiment:
        """What is timed; UserError for micro-batches that do not divide the rows."""
        found = self.timing.experiment(self.setting)
        changed = {"micro_batches": self.micro_batches, "impl": self.impl}
        if self.remat != "id":
            changed["remat"] = self.remat
        return dataclasses.replace(found, run=dataclasses.replace(found.run, **changed))

    @property
    def path(self) -> Path:
        """Where its row is kept."""
        return KEPT / self.id / f"{name(self.setting, self.changed)}.json"

    @property
    def changed(self) -> Row:
        """In what its measurement is not the ID's own."""
        if self.peer:
            return {"peer": self.peer}
        return changes(self.timing, self.setting, how(self.experiment))


def how(experiment: Experiment) -> Row:
    """The fields of an experiment's run group that decide how fast a step is."""
    return {field: getattr(experiment.run, field) for field in HOW}


def changes(timing: Timing, setting: str, run: Row) -> Row:
    """The fields in which `run` differs from the ID's own."""
    own = how(timing.experiment(setting))
    return {field: value for field, value in run.items() if value != own[field]}


def name(setting: str, changed: Row) -> str:
    """A point in one word: "4Kx8", "4Kx8-remat-full"."""
    return "-".join([setting, *(f"{field.replace('_', '-')}-{value}" for field, value in changed.items())])


def points(options: SpeedOptions) -> list[Point]:
    """Every measurement `options` ask for, model by model. UserError with a sentence for what cannot be."""
    for field, least in (("micro_batches", 1), ("warm_up", 1), ("repetitions", 1), ("timeout", 1)):
        if getattr(options, field) < least:
            raise UserError(f"{field} is {getattr(options, field)}; it must be positive.")
    models = _names("models", options.models, list(PAPER_MODELS))
    settings = _names("settings", options.settings, list(SETTINGS[options.scale]))
    found = [
        Point(
            f"figure3/{model}/{options.scale}", setting, options.remat, options.micro_batches, options.impl,
            options.warm_up, options.repetitions, options.step_profile,
        )
        for model in models for setting in settings
    ]  # fmt: skip
    for point in found:
        _ = point.experiment  # its rules are checked before minutes of measuring
    return found + _beside(options, found)


def _beside(options: SpeedOptions, ours: list[Point]) -> list[Point]:
    """The points of the libraries in options.peers, of the models that they have."""
    found = []
    for peer in _names("peers", options.peers, list(model_peers.PEERS)) if options.peers else []:
        model_peers.version(peer)
        models = model_peers.PEERS[peer].models
        theirs = [point._replace(peer=peer, step_profile=False) for point in ours if point.timing.model in models]
        if not theirs:
            raise UserError(f"{peer} has none of the models {options.models}; it has {', '.join(models)}.")
        found += theirs
    return found


def _names(option: str, given: str, known: list[str]) -> list[str]:
    words = known if given == "all" else list(dict.fromkeys(given.split(",")))
    for word in words:
        if word not in known:
            hint = nearest(word, known)
            raise UserError(
                f"{option} names {word!r}{hint}; it must be all or some of {', '.join(known)}, separated by commas."
            )
    return words


# --- the worker ---


def work(job: Row) -> Row:
    """The worker's answer: a description of this machine for an empty job, else the measured row of a point."""
    from gdn_jax import metrics

    # an edit of the figure leaves the points that were measured
    here = metrics.environment() | {"code": metrics.source_hash(("gdn_jax", "pallas_kernels"))}
    return {"environment": here} if not job else measure(Point(**job)) | {"environment": here}


def measure(point: Point) -> Row:
    """Compile and time the step of one point in this process, which must be fresh for its peak memory to be its own."""
    import jax

    row, counts = _row(point), {"warm_up": point.warm_up, "repetitions": point.repetitions}
    try:
        if point.peer:
            return row | timed_peer(point.peer, point.experiment, **counts)
        return row | timed(point.experiment, jax.devices()[:1], step_profile=point.step_profile, **counts)
    except UserError as error:
        return row | {"note": f"refuses: {error}"}
    except jax.errors.JaxRuntimeError as error:
        return row | {"note": failure(error, point.experiment)}


def failure(error: Exception, experiment: Experiment) -> str:
    """A runtime error in one sentence; where memory ran out, with what would need less."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "RESOURCE_EXHAUSTED" not in str(error):
        return f"failed: {said}"
    run = experiment.run
    return f"{OUT_OF_MEMORY} with remat {run.remat} and {run.micro_batches} micro-batches a step: {said}"


def timed(
    experiment: Experiment, devices: Sequence[Any], *, warm_up: int, repetitions: int, step_profile: bool = False
) -> Row:
    """The training step on random tokens: compiled, then `repetitions` times after `warm_up`, each waited for."""
    import jax

    from gdn_jax import sharding
    from gdn_jax.model import count_parameters
    from gdn_jax.train import Trainer

    seq_len, batch_size = experiment.data.seq_len, experiment.optim.batch_size
    run = experiment.run
    trainer = Trainer(experiment, sharding.make_mesh(run.fsdp, list(devices), context=run.context))
    impls = trainer.implementations()
    with jax.set_mesh(trainer.mesh):
        tokens = _tokens(experiment, warm_up + repetitions)
        batches = [sharding.place_batch(trainer.mesh, {"tokens": rows}) for rows in tokens]
        state = jax.block_until_ready(trainer.begin(experiment.run.seed))
        program = trainer.step.trace(*state, batches[0])
        start = time.perf_counter()
        step = program.lower().compile()
        compile_seconds = time.perf_counter() - start

        def run_step(state, batch):
            *state, metrics = step(*state, batch)
            return state, metrics["loss"]

        state, seconds, losses = _clocked(run_step, state, batches)
        stats = jax.local_devices()[0].memory_stats() or {}
        profiled = {}
        if step_profile:
            profiled["profile"] = _profile(step, (*state, batches[-1]), program.jaxpr, experiment)
    speed = _speed(seconds[warm_up:], seq_len * batch_size)
    account = step.memory_analysis()
    measured = {
        "parameters": count_parameters(experiment.model),
        "impl": impls,
        **speed,
        "mfu": mfu(experiment, speed["tokens_per_s"] / len(devices), devices[0].device_kind),
        "compile_seconds": compile_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
        "planned_bytes": account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes,
    }
    return measured | _losses(losses) | profiled


def timed_peer(peer: str, experiment: Experiment, *, warm_up: int, repetitions: int) -> Row:
    """Another library's training step on the same tokens, keeping as much for its backward as fits into memory."""
    import jax

    batches = _tokens(experiment, warm_up + repetitions)
    of = model_peers.PEERS[peer]
    for remat in of.remat:
        built = step = None  # of an attempt that did not fit, nothing may stay
        try:
            built = of.build(experiment, remat)
            given = [built.batch(tokens) for tokens in batches]
            start = time.perf_counter()
            step = built.compile(built.state, given[0])
            compile_seconds = time.perf_counter() - start
            seconds, losses = _clocked(step, built.state, given)[1:]
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or remat == of.remat[-1]:
                raise
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "parameters": built.parameters,
        "peer": {"library": model_peers.version(peer), "words": built.words, "remat": remat},
        **_speed(seconds[warm_up:], batches[0][:, 1:].size),
        "compile_seconds": compile_seconds,
        # of this attempt alone where it was the first
        "peak_bytes": stats.get("peak_bytes_in_use") if remat == of.remat[0] else None,
        "limit_bytes": stats.get("bytes_limit"),
    } | _losses(losses)


def _tokens(experiment: Experiment, steps: int) -> Any:
    """Random tokens of so many batches, [steps,B,1+T] int32."""
    import numpy as np

    shape = (steps, experiment.optim.batch_size, experiment.data.seq_len + 1)
    return np.random.default_rng(experiment.run.seed).integers(0, experiment.model.vocab, shape, np.int32)


def _clocked(step: Callable, state: Any, batches: Sequence[Any]) -> tuple[Any, list[float], list[float]]:
    """The state after step(state, batch) -> (state, loss) of every batch, each waited for; its seconds and losses."""
    import jax

    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        state, loss = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return state, seconds, losses


def _losses(losses: list[float]) -> Row:
    bad = [loss for loss in losses if not math.isfinite(loss)]
    return {"losses": [losses[0], losses[-1]], "note": f"failed: the loss is {bad[-1]}" if bad else ""}


def mfu(experiment: Experiment, tokens_per_s: float, kind: str) -> float | None:
    """Model FLOP utilisation of one device, of its data sheet's bf16 peak; None for a kind without an entry."""
    from gdn_jax.flops import train_flops_per_token
    from pallas_kernels.roofline import data_sheet_flops

    peak = data_sheet_flops(kind)
    flops = train_flops_per_token(experiment.model, experiment.data.seq_len)
    return None if peak is None else tokens_per_s * flops / peak


def _speed(seconds: list[float], tokens: int) -> Row:
    middle = statistics.median(seconds)
    return {
        "tokens_per_s": tokens / middle,
        "least": tokens / max(seconds),
        "most": tokens / min(seconds),
        "step_ms": 1e3 * middle,
    }


def _profile(step: Any, arguments: tuple, program: Any, experiment: Experiment) -> Row | None:
    """One step under the profiler, by kernel family; None where the trace has no line of a device."""
    import jax

    from experiments import step_profile
    from pallas_kernels.roofline import peak_of

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(step(*arguments))
        events = step_profile.device_events(step_profile.read_trace(Path(directory)))
    ours = step_profile.kernels_of(program)
    sizes = {"seq_len": experiment.data.seq_len, "batch_size": experiment.optim.batch_size}
    needs = step_profile.floors(experiment.model, **sizes, ours=ours)
    peak = peak_of(jax.devices()[0].device_kind)
    return step_profile.profile(events, ours, needs, peak)


def _row(point: Point) -> Row:
    """The row of a point before anything was measured."""
    experiment = point.experiment
    return {
        "id": point.id,
        "model": point.timing.model,
        "scale": point.timing.scale,
        "setting": point.setting,
        "seq_len": experiment.data.seq_len,
        "batch_size": experiment.optim.batch_size,
        "recipe8": experiment.recipe8,
        "parameters": None,
        "precision": experiment.optim.precision,
        "run": how(experiment),
        "changed": point.changed,
        "peer": None,
        "warm_up": point.warm_up,
        "repetitions": point.repetitions,
        "impl": {},
        "tokens_per_s": None,
        "least": None,
        "most": None,
        "step_ms": None,
        "mfu": None,
        "compile_seconds": None,
        "peak_bytes": None,
        "limit_bytes": None,
        "planned_bytes": None,
        "losses": None,
        "note": "",
    }


# --- the process that starts the workers ---


def run(todo: Sequence[Point], timeout: int) -> dict[str, Any]:
    """Measure every point that is not kept, one line each to stderr: {"rows", "stopped"} as workers.each.

    Rows not reached say "not run".
    """
    here: Row = {}

    def measured(point: Point) -> tuple[Row, str]:
        if not here:
            found = workers.ask(MODULE, {}, STARTING)
            if isinstance(found, str):
                raise UserError(f"No process could find its device here ({found}); `gdn doctor` says more.")
            here.update(found)
        if row := kept(point, here["environment"]):
            return row, f"kept, {described(row)}"
        row = _measured(point, timeout, here)
        return row, described(row)

    return workers.each(todo, measured, lambda point: _row(point) | here | {"note": NOT_RUN})


def _measured(point: Point, timeout: int, here: Row) -> Row:
    """The row of a worker, kept; how it failed is a note in it."""
    row = workers.ask(MODULE, point._asdict(), timeout)
    if isinstance(row, str):
        row = _row(point) | here | {"note": row}
    point.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(point.path, row)
    return row


def kept(point: Point, here: Row) -> Row | None:
    """The row that was kept for a point, where measuring it again would measure the same; a crash is tried again."""
    if not point.path.exists():
        return None
    row = read_json(point.path, dict, "recipe8", "run", "warm_up", "repetitions", "note")
    asked = _row(point)
    same = all(row[field] == asked[field] for field in ("recipe8", "run", "warm_up", "repetitions"))
    same = same and all(row["environment"][field] == here[field] for field in ("code", "devices", "versions", "python"))
    told = not row["note"] or row["note"].startswith(OUT_OF_MEMORY)
    profiled = not point.step_profile or row["note"] or "profile" in row
    if point.peer and row["peer"]:
        same = same and row["peer"]["library"] == model_peers.version(point.peer)
    return row if same and told and profiled else None


def described(row: Row) -> str:
    """A row in one line."""
    what = f"{row['model']} {name(row['setting'], row['changed'])}"
    if row["note"]:
        return f"{what}: {row['note']}"
    return f"{what}: {row['tokens_per_s']:,.0f} tokens/s, step {row['step_ms']:,.1f} ms"


def report(options: SpeedOptions, as_json: bool) -> int:
    """Measure, then print table, claims and profiles (or one JSON object), and write them with the figure into
    options.out unless it is empty. Returns the exit code: 0, 1 where a point has no number, 128 + a signal."""
    from experiments import drawn_figure3

    todo = points(options)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    measured = run(todo, options.timeout)
    found = drawn_figure3.collected(options.scale, measured["rows"])
    if options.out:
        drawn_figure3.write(found, Path(options.out))
    print(json.dumps(found, indent=1) if as_json else drawn_figure3.markdown(found), flush=True)
    if measured["stopped"]:
        print("Stopped; what was measured is kept, and the same command goes on.", file=sys.stderr)
        return 128 + measured["stopped"]
    return 1 if any(row["note"] for row in measured["rows"]) else 0


if __name__ == "__main__":
    workers.answer(work, MODULE)
