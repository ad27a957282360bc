"""`gdn bench figure3`: a training step of each model at each length, timed in processes of their own.

A point is kept in runs/figure3/<model>/<scale>/ as soon as it is measured, and taken from there where the same code on
the same device with the same options would measure it again. `python -m experiments.training_speed worker JOB PARENT`
measures one; this module starts no JAX elsewhere.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import experiments
from experiments import model_peers
from experiments.figure3 import SETTINGS, Timing
from experiments.generation_speed import sizes
from experiments.models import PAPER_MODELS
from experiments.options import Switch
from experiments.timed_step import OUT_OF_MEMORY, failure, timed, timed_peer
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import read_json, write_json
from pallas_kernels import workers

MODULE = "experiments.training_speed"
KEPT = Path("runs")  # below it, <id>/<point>.json
STARTING = 300  # seconds within which a process must find its device
# fields of Run that decide a step's speed
HOW = ("remat", "scan_layers", "micro_batches", "impl", "chunk", "residuals")
OWN = {"devices": 1, "fsdp": 1, "decay": True}  # of an ID's own point
NOT_RUN = "not run"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Time the training step of Figure 3's models at its lengths: tokens/s, MFU, peak memory, compile time."""

    scale: Literal["tiny", "400m", "1.3b"] = "1.3b"
    models: str = "all"  # some of the ten, separated by commas
    settings: str = "all"  # some of 2Kx16,4Kx8,8Kx4,16Kx2: tokens of a row x rows (64x8,128x4,256x2,512x1 at tiny)
    peers: str = ""  # other libraries' own steps beside ours, where they have the model: jla, fla
    remat: Literal["id", "none", "products", "kernels", "products+kernels", "full"] = "id"  # id: the ID's own
    micro_batches: int = 1  # slices of a step's rows
    impl: Literal["auto", "chunked", "reference", "triton", "triton_interpret"] = "auto"
    devices: str = "1"  # of this host, over which a step is spread: some of 1,2,...; each has the setting's rows
    fsdp: str = "1"  # of these, how many share the parameters: 1,2 takes of each number of devices what divides it
    decay: str = "on"  # off: without the decay of Gated DeltaNet's layers, the plain delta rule; on,off times both
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
    devices: int = 1
    fsdp: int = 1
    decay: bool = True
    peer: str = ""  # another library, whose step is timed instead of ours

    @property
    def timing(self) -> Timing:
        return experiments.TIMINGS[self.id]

    @property
    def experiment(self) -> Experiment:
        """What is timed; UserError for micro-batches that do not divide the rows of a device, and where there is no
        decay to switch off."""
        found = self.timing.experiment(self.setting)
        changed = {"micro_batches": self.micro_batches, "impl": self.impl}
        if self.remat != "id":
            changed["remat"] = self.remat
        found = dataclasses.replace(found, run=dataclasses.replace(found.run, **changed))
        model = found.model
        if not self.decay:
            if model.gated_deltanet is None:
                have = ", ".join(one for one in PAPER_MODELS if "gated-deltanet" in one)
                raise UserError(f"decay names off, and {self.timing.model} has no gated_deltanet layer; {have} have.")
            model = dataclasses.replace(model, gated_deltanet=dataclasses.replace(model.gated_deltanet, decay=False))
        return dataclasses.replace(
            found,
            model=model,
            optim=dataclasses.replace(found.optim, batch_size=self.devices * found.optim.batch_size),
            run=dataclasses.replace(found.run, fsdp=self.fsdp),
        )

    @property
    def path(self) -> Path:
        """Where its row is kept."""
        return KEPT / self.id / f"{name(self.setting, self.changed)}.json"

    @property
    def changed(self) -> Row:
        """In what its measurement is not the ID's own."""
        if self.peer:
            return {"peer": self.peer}
        others = {field: getattr(self, field) for field in OWN if getattr(self, field) != OWN[field]}
        return changes(self.timing, self.setting, how(self.experiment)) | others


def how(experiment: Experiment) -> Row:
    """The fields of an experiment's run group that decide how fast a step is."""
    return {field: getattr(experiment.run, field) for field in HOW}


def changes(timing: Timing, setting: str, run: Row) -> Row:
    """The fields in which `run` differs from the ID's own."""
    own = how(timing.experiment(setting))
    return {field: value for field, value in run.items() if value != own[field]}


def name(setting: str, changed: Row) -> str:
    """A point in one word: "4Kx8", "4Kx8-remat-full", "4Kx8-devices-2-fsdp-2"."""
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
            options.warm_up, options.repetitions, options.step_profile, devices, fsdp, decay == "on",
        )
        for model in models for setting in settings for devices, fsdp in _meshes(options)
        for decay in _names("decay", options.decay, ["on", "off"])
    ]  # fmt: skip
    for point in found:
        _ = point.experiment  # its rules are checked before minutes of measuring
    return found + _beside(options, found)


def _meshes(options: SpeedOptions) -> list[tuple[int, int]]:
    """(devices, of them that share the parameters) of every point of a model and setting."""
    devices, fsdp = sizes("devices", options.devices), sizes("fsdp", options.fsdp)
    found = [(count, sharing) for count in devices for sharing in fsdp if count % sharing == 0]
    for sharing in fsdp:
        if sharing not in {one for _, one in found}:
            raise UserError(f"fsdp names {sharing}, which divides none of the devices {options.devices}.")
    for count in devices:
        if count not in {one for one, _ in found}:
            raise UserError(f"devices names {count}, which none of fsdp {options.fsdp} divides; name 1 there too.")
    if options.step_profile and max(devices) > 1:
        raise UserError(f"devices names {max(devices)}, and step_profile is of one device; leave one of them out.")
    return found


def _beside(options: SpeedOptions, ours: list[Point]) -> list[Point]:
    """The points of the libraries in options.peers, of the models that they have."""
    found = []
    for peer in _names("peers", options.peers, list(model_peers.PEERS)) if options.peers else []:
        model_peers.version(peer)
        models = model_peers.PEERS[peer].models
        alone = [point for point in ours if all(getattr(point, field) == OWN[field] for field in OWN)]
        if not alone:
            raise UserError(
                f"{peer} is timed beside an ID's own point, and devices is {options.devices}, decay {options.decay}; "
                f"name 1 and on there too."
            )
        theirs = [point._replace(peer=peer, step_profile=False) for point in alone if point.timing.model in models]
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
        return row | timed(point.experiment, jax.devices()[: point.devices], step_profile=point.step_profile, **counts)
    except UserError as error:
        return row | {"note": f"refuses: {error}"}
    except Exception as error:
        if not point.peer and not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        return row | {"note": failure(error, point.experiment)}


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
            there, most = found["environment"]["devices"], max(one.devices for one in todo)
            if most > len(there):
                raise UserError(
                    f"devices names {most}, and this machine has {len(there)} ({', '.join(dict.fromkeys(there))}); "
                    f"name no more."
                )
            here.update(found)
        if row := kept(point, here["environment"]):
            return row, f"kept, {described(row)}"
        row = _measured(point, timeout, here)
        return row, described(row)

    return workers.each(todo, measured, lambda point: _row(point) | here | {"note": NOT_RUN})


def _measured(point: Point, timeout: int, here: Row) -> Row:
    """The row of a worker, kept; how it failed is a note in it."""
    row = workers.ask(MODULE, point._asdict(), timeout, model_peers.environment(point.peer) if point.peer else None)
    if isinstance(row, str):
        row = _row(point) | here | {"note": row}
    point.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(point.path, row)
    return row


def kept(point: Point, here: Row) -> Row | None:
    """The row that was kept for a point, where measuring it again would measure the same; a crash is tried again."""
    if not point.path.exists():
        return None
    fields = ("recipe8", "run", "changed", "warm_up", "repetitions")
    row, asked = read_json(point.path, dict, *fields, "note"), _row(point)
    same = all(row[field] == asked[field] for field in fields)
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
