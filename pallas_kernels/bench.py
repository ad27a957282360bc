"""Device time of an op, ours and every installed peer's, in one run: each measurement in a process of its own.

A process of its own has the device's memory to itself, and its crash costs one row. `python -m pallas_kernels.bench
worker JOB PARENT_PID` is that process: a job as JSON in, one row as JSON out. Rows hold milliseconds and MiB.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import ops, peers, workers
from pallas_kernels.roofline import PEAKS, floor_ms, peak_of

IMPLS = ("auto", "triton", "chunked", "triton_interpret", "reference")

WARM_UP = 3  # calls
LEAST_MS, MOST_CALLS = 20.0, 50  # of one repetition
# with the backward first: its peak is the larger one, and a process's peak never falls
PHASES = {"forward_backward": "forward + backward", "forward": "forward"}
NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; lists are separated by commas."""

    shapes: str = "all"  # names in the op's benchmark.py, or written out as it says: 8x4096,6,256,512
    impls: str = "auto,chunked"  # ours: auto, triton, chunked, triton_interpret, reference; or none
    peers: str = "all"  # all, none, or some of those in the op's benchmark.py, such as fla, jla
    repetitions: int = 7  # each of about 20 ms; the median is reported
    seed: int = 0  # of the inputs
    timeout: int = 300  # seconds for one contender at one shape, compilation included
    out: str = ""  # directory that gets bench.md and bench.json; empty: none


class Job(NamedTuple):
    """One contender at one shape; `shape` is the name and `sizes` are those of the op's Shape."""

    op: str
    shape: str
    sizes: Sequence[int]
    contender: str
    repetitions: int
    seed: int
    timeout: int


def jobs(op: str, options: Options) -> list[Job]:
    """Every measurement `options` ask for, shape by shape. ValueError with a sentence for what cannot be read."""
    known = tuple(ops.benchmark(op).PEERS)
    for name in ("repetitions", "timeout"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be positive.")
    impls = [] if options.impls == "none" else _names("impls", options.impls, IMPLS, "none or some of ")
    others = {"none": [], "all": list(known)}.get(options.peers)
    if others is None:
        others = _names("peers", options.peers, known, "all, none or some of ")
    if not impls + others:
        raise ValueError("impls and peers are both 'none'; name at least one of ours or one peer.")
    return [
        Job(op, name, tuple(sizes), contender, options.repetitions, options.seed, options.timeout)
        for name, sizes in shapes_of(op, options.shapes).items()
        for contender in impls + others
    ]


def _names(option: str, given: str, known: Sequence[str], rule: str) -> list[str]:
    names = list(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} names {name!r}; it must be {rule}{', '.join(known)}, separated by commas.")
    return names


def shapes_of(op: str, given: str) -> dict[str, Any]:
    """Name -> sizes of the shapes in `given`; the name of a written-out one is how it is written. ValueError with a
    sentence for what is neither."""
    benchmark = ops.benchmark(op)
    known, found, words = benchmark.SHAPES, {}, given.split(",")
    if given == "all":
        return known
    count = len(benchmark.Shape._fields)
    how = f"{benchmark.WRITTEN}, such as {as_typed(next(iter(known.values())))}"
    while words:
        word = words.pop(0)
        if re.match(r"\d+x", word):
            rest, words = words[: count - 2], words[count - 2 :]
            out = ",".join([word, *rest])
            if not re.fullmatch(rf"[1-9]\d*x[1-9]\d*(,[1-9]\d*){{{count - 2}}}", out):
                raise ValueError(f"Shape {out!r} is not {how}, each a positive whole number.")
            found[out] = benchmark.Shape(*map(int, re.split("[x,]", out)))
        elif word in known:
            found[word] = known[word]
        else:
            raise ValueError(f"Shape {word!r} is neither {how}, nor one of {', '.join(known)}.")
    return found


def as_typed(sizes: Sequence[int]) -> str:
    """A shape as one types it: 8x4096,6,256,512."""
    return f"{sizes[0]}x" + ",".join(map(str, sizes[1:]))


# --- the worker ---


def timed(run: peers.Run, repetitions: int) -> dict[str, float]:
    """Milliseconds of one call: median, least and most over repetitions of `calls` calls back to back."""
    calls = 1
    while (ms := run(calls)) < LEAST_MS and calls < MOST_CALLS:
        calls = min(MOST_CALLS, max(calls + 1, math.ceil(1.1 * calls * LEAST_MS / max(ms, 1e-3))))
    times = [run(calls) / calls for _ in range(repetitions)]
    return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "calls": calls}


def work(job: Job) -> dict[str, Any]:
    """Measure one job in this process, which must be fresh for its peak memory to be its own."""
    row, benchmark = _row(job), ops.benchmark(job.op)
    try:
        contender = peers.load(job.contender, benchmark, job.op, benchmark.Shape(*job.sizes), job.seed)
    except Exception as error:  # whatever another library raises is its answer
        return row | {"note": _reason(error)}
    row |= {"device": contender.device, "implementation": contender.implementation, "refused": contender.refused}
    reasons = {}
    for phase in PHASES:
        try:
            run = contender.prepare(phase == "forward_backward")
            for _ in range(WARM_UP):
                run(1)
            if phase == "forward_backward":
                row["peak_mib"] = contender.peak(run)
            row[phase] = timed(run, job.repetitions)
        except Exception as error:
            reasons[phase] = _reason(error)
    if len(set(reasons.values())) == 1 and len(reasons) == len(PHASES):
        row["note"] = reasons["forward"]
    else:
        row["note"] = "; ".join(f"{PHASES[phase]} {reason}" for phase, reason in reasons.items())
    return row


def _reason(error: Exception) -> str:
    """First line of what an implementation says. NotImplementedError and plain exception types are refusals, all others
    failures."""
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1].line}"
    plain = type(error) in (ValueError, TypeError, AssertionError, RuntimeError)
    if plain or isinstance(error, NotImplementedError):
        return f"refuses: {said}"
    return f"failed: {type(error).__name__}: {said}"


# --- the process that starts the workers ---


def run(todo: Sequence[Job]) -> dict[str, Any]:
    """Measure every job, one line each to stderr.

    Returns {"op", "rows", "repetitions", "seed", "device", "versions", "problems", "stopped"}: `problems` has a
    sentence for every shape at which an implementation of ours was not measured or, on a device whose ceilings are
    known, "auto" left the op's fastest one; `stopped` is the signal that ended the measuring, or 0; rows not reached
    then say "not run".
    """
    rows: list[dict[str, Any]] = []
    stopped = 0
    print(
        f"{todo[0].op}: {len(todo)} to measure, at most {todo[0].timeout} s each. The named shapes are a GPU's; on a "
        "CPU write small ones out with --shapes.",
        file=sys.stderr,
        flush=True,
    )
    try:
        with workers.terminable():
            for job in todo:
                rows.append(measure(job))
                print(f"[{len(rows)}/{len(todo)}] {job.shape} {_progress(rows[-1])}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        stopped = signal.SIGTERM if isinstance(stop, workers.Terminated) else signal.SIGINT
    rows += [_row(job) | {"note": NOT_RUN} for job in todo[len(rows) :]]
    return {
        "op": todo[0].op,
        "rows": rows,
        "repetitions": todo[0].repetitions,
        "seed": todo[0].seed,
        "device": ", ".join(sorted({row["device"] for row in rows if row["device"]})) or "unknown",
        "versions": _versions(todo[0].op, {job.contender for job in todo}),
        "problems": [problem for row in rows if (problem := _problem(row))],
        "stopped": int(stopped),
    }


def _unmeasured(row: dict[str, Any]) -> bool:
    """Whether an implementation of ours was asked for and not wholly measured."""
    return row["contender"] in IMPLS and row["note"] not in ("", NOT_RUN)


def _problem(row: dict[str, Any]) -> str | None:
    where, taken = f"{row['op']} at {row['shape']}: {row['contender']}", row["implementation"]
    if _unmeasured(row):
        return f"{where} was not wholly measured ({row['note']})."
    # on a device of unknown ceilings there is nothing faster to be missed
    if row["contender"] in IMPLS and row["refused"] and peak_of(row["device"]):
        return f"{where} took {taken} ({row['refused']})."
    return None


def measure(job: Job) -> dict[str, Any]:
    """The row of one job, measured by a worker of its own; a crash or too long a wait is a note in it."""
    benchmark = ops.benchmark(job.op)
    library = benchmark.PEERS[job.contender].library if job.contender in benchmark.PEERS else None
    if library and importlib.util.find_spec(library.module) is None:
        return _row(job) | {"note": "not installed"}
    row = workers.ask("pallas_kernels.bench", job._asdict(), job.timeout, library.environment if library else None)
    if isinstance(row, str):
        return _row(job) | {"note": row}
    floor = floor_ms(benchmark.cost(benchmark.Shape(*job.sizes)), row["device"])
    row["floor_ms"] = floor
    for phase in PHASES:
        if row[phase]:
            row[phase]["of_floor"] = floor[phase] / row[phase]["ms"] if floor else "unknown"
    return row


def _row(job: Job) -> dict[str, Any]:
    return {
        "op": job.op,
        "shape": job.shape,
        "sizes": as_typed(job.sizes),
        "contender": job.contender,
        "implementation": "",
        "refused": "",
        "device": "",
        "forward": None,
        "forward_backward": None,
        "floor_ms": None,
        "peak_mib": None,
        "note": "",
    }


def _libraries(op: str, contenders: Collection[str]) -> dict[str, peers.Library]:
    return {name: peer.library for name, peer in ops.benchmark(op).PEERS.items() if name in contenders}


def _versions(op: str, contenders: set[str]) -> dict[str, str]:
    names = ["jax", "jaxlib"]
    names += [name for library in _libraries(op, contenders).values() for name in library.distributions]
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- for a reader ---


def report(todo: Sequence[Job], environment: Callable[[], dict[str, Any]], out: str, as_json: bool) -> int:
    """Measure, then print the table (or one JSON object) and write both into `out` unless it is empty.

    `environment` gives "date", "commit" and "dirty"; it is called when no worker needs the device any more.
    Returns the exit code: 0, 1 when an implementation of ours was not wholly measured, 128 + a signal.
    """
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    found = run(todo)
    here = environment()
    found |= {name: here[name] for name in ("date", "commit", "dirty")}
    texts = {"bench.json": json.dumps(found, indent=1), "bench.md": markdown(found)}
    for name, text in texts.items() if out else ():
        Path(out, name).write_text(text + "\n")
    print(texts["bench.json" if as_json else "bench.md"], flush=True)
    for problem in found["problems"]:
        print(problem, file=sys.stderr)
    if found["stopped"]:
        print("Stopped; what was not measured says so.", file=sys.stderr)
        return 128 + found["stopped"]
    return int(any(map(_unmeasured, found["rows"])))


def markdown(found: dict[str, Any]) -> str:
    """A table of what `run` returned, and below it what the numbers need."""
    header = ("shape", "contender", "forward ms", "forward + backward ms", "of floor", "peak MiB", "note")
    lines = [header, ("---",) * len(header)]
    for row in found["rows"]:
        both = [row[phase] for phase in ("forward", "forward_backward")]
        fractions = [_of_floor(time) for time in both]
        peak = "unknown" if row["forward_backward"] else NOT_RUN
        lines.append(
            (
                row["shape"] if row["shape"] == row["sizes"] else f"{row['shape']} ({row['sizes']})",
                _who(row),
                *(_ms(time) for time in both),
                " / ".join(fractions if any("%" in word for word in fractions) else dict.fromkeys(fractions)),
                peak if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                row["note"] or (row["refused"] and f"faster refused: {row['refused']}") or "ok",
            )
        )
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    cpu = "; times on a CPU say nothing about a GPU" if "cpu" in found["device"].lower() else ""
    peaks = "; ".join(
        f"{name} {peak.flops / 1e12:.0f} TFLOP/s bf16, {peak.bandwidth / 1e12:.1f} TB/s" for name, peak in PEAKS.items()
    )
    rounded = ", ".join(ops.benchmark(found["op"]).BF16)
    facts = [
        f"Device: {found['device']}{cpu}",
        f"Milliseconds of device time, median (least to most) of {found['repetitions']} repetitions; {rounded} in "
        f"bf16, the rest in fp32, seed {found['seed']}; peak memory of forward + backward in a process of its own",
        f"Of floor: roofline / measured, forward / forward + backward; measured ceilings: {peaks}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}",
        f"Date: {found['date']}, commit {found['commit']}{' with uncommitted changes' if found['dirty'] else ''}",
    ]
    for name, library in _libraries(found["op"], {row["contender"] for row in found["rows"]}).items():
        if library.environment:
            facts.append(f"{name} ran with {' '.join(f'{k}={v}' for k, v in library.environment.items())}")
    return f"{found['op']}\n\n{table}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _progress(row: dict[str, Any]) -> str:
    times = [f"{name} {_ms(row[phase])} ms" for phase, name in PHASES.items() if row[phase]]
    return f"{_who(row)}: {', '.join([*times, *([row['note']] if row['note'] else [])])}"


def _who(row: dict[str, Any]) -> str:
    same = row["implementation"] in ("", row["contender"])
    return row["contender"] if same else f"{row['contender']} ({row['implementation']})"


def _ms(time: dict[str, float] | None) -> str:
    if time is None:
        return NOT_RUN
    return f"{time['ms']:.3f} ({time['min_ms']:.3f} to {time['max_ms']:.3f})"


def _of_floor(time: dict[str, Any] | None) -> str:
    if time is None:
        return NOT_RUN
    return "unknown" if time["of_floor"] == "unknown" else f"{time['of_floor']:.0%}"


if __name__ == "__main__":
    workers.answer(lambda job: work(Job(**job)), "pallas_kernels.bench")
