"""`gdn bench long-rows`: a training step on one long row of tokens, split over devices (run.context).

    gdn bench long-rows --devices 1,2          gated-deltanet and transformer at 1.3b, 32K to 256K tokens
    gdn bench long-rows --scale tiny --lengths 256,512

Each point is measured in a process of its own: AdamW and clipping as `gdn train` runs them, random tokens, nothing kept
for the backward but the layers' inputs (run.remat full). The first loss depends on nothing but the row: devices that
share it must agree on it with one device that has it whole. The last one has been through every update since.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import experiments
from experiments.generation_speed import sizes
from experiments.models import PAPER_MODELS
from experiments.report import piped
from experiments.timed_step import failure, timed
from experiments.training_speed import NOT_RUN
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import write_json
from pallas_kernels import workers

MODULE = "experiments.long_rows"
NAME = "long-rows"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LongRowsOptions:
    """Time the training step on one long row of tokens that several devices share: tokens/s, memory, losses."""

    scale: Literal["tiny", "desk", "400m", "1.3b"] = "1.3b"
    models: str = "gated-deltanet,transformer"  # some of the ten, separated by commas
    lengths: str = "32768,65536,131072,262144"  # tokens of the row
    devices: str = "1,2"  # devices that share it
    remat: Literal["none", "products", "kernels", "products+kernels", "full"] = "full"
    warm_up: int = 1  # steps before those that are timed
    repetitions: int = 3  # steps that are timed; the median is reported
    timeout: int = 900  # seconds for one point, compilation included
    out: str = ""  # directory that gets long-rows-SCALE.md, .json and .png; empty: none


def points(options: LongRowsOptions) -> list[Row]:
    """The jobs of the workers; UserError for what cannot be."""
    for field in ("warm_up", "repetitions", "timeout"):
        if getattr(options, field) < 1:
            raise UserError(f"{field} is {getattr(options, field)}; it must be positive.")
    models = list(dict.fromkeys(options.models.split(",")))
    for model in models:
        if model not in PAPER_MODELS:
            known = ", ".join(PAPER_MODELS)
            raise UserError(f"models names {model!r}{nearest(model, PAPER_MODELS)}; it must be some of {known}.")
    found = [
        {"id": f"table3/{model}/{options.scale}", "model": model, "tokens": tokens, "devices": devices,
         "remat": options.remat, "warm_up": options.warm_up, "repetitions": options.repetitions}
        for model in models for tokens in sizes("lengths", options.lengths)
        for devices in sizes("devices", options.devices)
    ]  # fmt: skip
    for point in found:
        if point["tokens"] % point["devices"]:
            raise UserError(f"lengths names {point['tokens']}, which {point['devices']} devices cannot share evenly.")
        experiment_of(point)
    return found


def experiment_of(point: Row) -> Experiment:
    """One row a step, split over the point's devices."""
    found = experiments.get(point["id"])
    run = {"remat": point["remat"], "micro_batches": 1, "fsdp": 1, "context": point["devices"]}
    return dataclasses.replace(
        found,
        optim=dataclasses.replace(found.optim, batch_size=1),
        data=dataclasses.replace(found.data, seq_len=point["tokens"]),
        run=dataclasses.replace(found.run, **run),
    )


def work(point: Row) -> Row:
    """The row of a point, measured in this process."""
    import jax

    from gdn_jax import metrics

    row = point | {"environment": metrics.environment(), "tokens_per_s": None, "note": ""}
    devices, experiment = jax.devices()[: point["devices"]], experiment_of(point)
    if len(devices) < point["devices"]:
        return row | {"note": f"{NOT_RUN}: there are {len(devices)} devices here"}
    try:
        return row | timed(experiment, devices, warm_up=point["warm_up"], repetitions=point["repetitions"])
    except UserError as error:
        return row | {"note": f"refuses: {error}"}
    except jax.errors.JaxRuntimeError as error:
        return row | {"note": failure(error, experiment)}


def measure(todo: list[Row], timeout: int) -> dict[str, Any]:
    """{"rows", "stopped"} as workers.each."""

    def failed(point: Row, note: str) -> Row:
        return point | {"tokens_per_s": None, "note": note}

    def measured(point: Row) -> tuple[Row, str]:
        row = workers.ask(MODULE, point, timeout)
        row = failed(point, row) if isinstance(row, str) else row
        return row, _said(row)

    return workers.each(todo, measured, lambda point: failed(point, NOT_RUN))


def _said(row: Row) -> str:
    what = f"{row['model']} {row['tokens']:,} tokens over {_devices(row)}"
    if row["tokens_per_s"] is None:
        return f"{what}: {row['note']}"
    return f"{what}: {row['tokens_per_s']:,.0f} tokens/s, step {row['step_ms']:,.0f} ms"


def _devices(row: Row) -> str:
    return f"{row['devices']} device{'s' * (row['devices'] > 1)}"


HEADER = (
    "model", "tokens of the row", "devices", "tokens/s (least to most)", "MFU", "step ms", "peak GiB a device",
    "first loss", "last loss", "note",
)  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """A table, and what its numbers need."""
    table = piped([HEADER, ("---", *["--:"] * 8, "---"), *map(_cells, rows)])
    ran = [row["environment"] for row in rows if "environment" in row]
    if not ran:
        return table
    here, asked = ran[-1], rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    dirty = ", with uncommitted changes" if here["dirty"] else ""
    kinds = ", ".join(dict.fromkeys(here["devices"]))
    facts = [
        f"Devices: {kinds}; {versions}; {here['date'][:10]}, commit {here['commit'][:9]}{dirty}",
        f"One row a step, remat {asked['remat']}; median of {asked['repetitions']} steps after {asked['warm_up']}",
        "Peak: of the device that took most, or what XLA plans for it where the device does not say",
    ]
    return f"{table}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _cells(row: Row) -> tuple[str, ...]:
    sizes = (row["model"], f"{row['tokens']:,}", str(row["devices"]))
    if row["tokens_per_s"] is None:
        return (*sizes, *[NOT_RUN] * 6, row["note"])
    memory = row["planned_bytes"] if row["peak_bytes"] is None else row["peak_bytes"]
    return (
        *sizes,
        f"{row['tokens_per_s']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f})",
        "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['step_ms']:,.0f}",
        f"{memory / 2**30:.1f}",
        *(f"{loss:.5f}" for loss in row["losses"]),
        row["note"] or "ok",
    )


def draw(rows: list[Row]) -> Any:
    """The step's time by the row's length, a curve for each model and number of devices."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = picture.subplots()
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        if row["tokens_per_s"] is not None:
            curves.setdefault((row["model"], row["devices"]), []).append((row["tokens"], row["step_ms"] / 1e3))
    models = list(dict.fromkeys(model for model, _ in curves))
    for (model, devices), curve in curves.items():
        style = "--" if devices == 1 else "-"
        label = f"{model}, {devices} device{'s' * (devices > 1)}"
        panel.plot(*zip(*sorted(curve), strict=True), style, marker="o", color=f"C{models.index(model)}", label=label)
    lengths = sorted({row["tokens"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
    panel.set_xlabel("tokens of the row")
    panel.set_ylabel("seconds of a training step")
    panel.spines[["top", "right"]].set_visible(False)
    if curves:
        panel.legend(fontsize=8, frameon=False)
    return picture


def report(options: LongRowsOptions, as_json: bool) -> int:
    """Measure, print, write into options.out; the exit code: 0, 1 where a point has no number, 128 + a signal."""
    todo = points(options)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    measured = measure(todo, options.timeout)
    rows = measured["rows"]
    if options.out:
        to = {suffix: Path(options.out) / f"{NAME}-{options.scale}.{suffix}" for suffix in ("md", "json", "png")}
        to["md"].write_text(markdown(rows) + "\n")
        write_json(to["json"], {"scale": options.scale, "rows": rows})
        draw(rows).savefig(to["png"], dpi=150)
    print(json.dumps(rows, indent=1) if as_json else markdown(rows), flush=True)
    if measured["stopped"]:
        return 128 + measured["stopped"]
    return 1 if any(row["tokens_per_s"] is None for row in rows) else 0


if __name__ == "__main__":
    workers.answer(work, MODULE)
