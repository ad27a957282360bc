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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import peers, shapes, workers
from pallas_kernels.shapes import DeltaShape

IMPLS = ("auto", "triton", "chunked", "triton_interpret", "reference")
SHAPES = {"gated_delta_rule": shapes.GATED_DELTA_RULE}  # of every op that can be benched
WRITTEN_OUT = "BxT,H,K,V, such as 8x4096,6,256,512"

WARM_UP = 3  # calls
LEAST_MS, MOST_CALLS = 20.0, 50  # of one repetition
# with the backward first: its peak is the larger one, and a process's peak never falls
PHASES = {"forward_backward": "forward + backward", "forward": "forward"}
NOT_RUN = "not run"


class Peak(NamedTuple):
    """What a device reaches in practice, not its data sheet: dense bf16 FLOP/s and bytes/s of device memory."""

    flops: float
    bandwidth: float


# substring of the device kind -> measured on one: a bf16 matmul of 8192^3, a copy counting bytes read and written
PEAKS = {"H100": Peak(790e12, 3.0e12), "H200": Peak(790e12, 4.3e12)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; lists are separated by commas."""

    shapes: str = "all"  # names of pallas_kernels/shapes.py, or written out as BxT,H,K,V: 8x4096,6,256,512
    impls: str = "auto,chunked"  # ours: auto, triton, chunked, triton_interpret, reference; or none
    peers: str = "all"  # all, none, or some of fla, flash_qla, jla
    repetitions: int = 7  # each of about 20 ms; the median is reported
    seed: int = 0  # of the inputs
    timeout: int = 300  # seconds for one contender at one shape, compilation included
    out: str = ""  # directory that gets bench.md and bench.json; empty: none


class Job(NamedTuple):
    """One contender at one shape; `shape` is the name and `sizes` are those of DeltaShape."""

    op: str
    shape: str
    sizes: Sequence[int]
    contender: str
    repetitions: int
    seed: int
    timeout: int


def jobs(op: str, options: Options) -> list[Job]:
    """Every measurement `options` ask for, shape by shape. ValueError with a sentence for what cannot be read."""
    if op not in SHAPES:
        raise ValueError(f"There is no op {op!r} to bench; it must be one of {', '.join(SHAPES)}.")
    for name in ("repetitions", "timeout"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be positive.")
    impls = [] if options.impls == "none" else _names("impls", options.impls, IMPLS, "none or some of ")
    others = {"none": [], "all": list(peers.PEERS)}.get(options.peers)
    if others is None:
        others = _names("peers", options.peers, tuple(peers.PEERS), "all, none or some of ")
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


def shapes_of(op: str, given: str) -> dict[str, DeltaShape]:
    """Name -> sizes of the shapes in `given`; the name of a written-out one is how it is written. ValueError with a
    sentence for what is neither."""
    if op not in SHAPES:
        raise ValueError(f"There are no shapes of an op {op!r}; it must be one of {', '.join(SHAPES)}.")
    known, found, words = SHAPES[op], {}, given.split(",")
    if given == "all":
        return known
    while words:
        word = words.pop(0)
        if re.match(r"\d+x", word):
            rest, words = words[:3], words[3:]
            written = ",".join([word, *rest])
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*){3}", written):
                raise ValueError(f"Shape {written!r} is not {WRITTEN_OUT}, each a positive whole number.")
            found[written] = DeltaShape(*map(int, re.split("[x,]", written)))
        elif word in known:
            found[word] = known[word]
        else:
            raise ValueError(f"Shape {word!r} is neither {WRITTEN_OUT}, nor one of {', '.join(known)}.")
    return found


def peak_of(device: str) -> Peak | None:
    """The measured peaks of a device kind, or None without an entry in PEAKS."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def floor_ms(shape: DeltaShape, device: str) -> dict[str, float] | None:
    """The roofline of each phase in milliseconds, or None for a device kind without an entry in PEAKS.

        max(FLOPs / peak FLOP/s, bytes / peak bytes/s),   per token and head, C = 64 tokens solved at once:
        forward   3 2KV + 2 2CK + 2 2CV FLOPs,   4K + 4V + 8 bytes   (q, k, v, o in bf16, g, beta in fp32)
        backward  8 2KV + 6 2CK + 5 2CV FLOPs,   8K + 6V + 24 bytes  (states run again; q, k, v, do, dq, dk, dv)

    The bytes are those of arguments and results alone: what an implementation keeps in between is its own choice.
    """
    peak = peak_of(device)
    if peak is None:
        return None
    k, v, c = shape.key_dim, shape.value_dim, 64
    token_heads = shape.batch * shape.tokens * shape.heads

    def bound(flops: int, moved: int) -> float:
        return 1e3 * token_heads * max(flops / peak.flops, moved / peak.bandwidth)

    forward = bound(3 * 2 * k * v + 2 * 2 * c * k + 2 * 2 * c * v, 4 * k + 4 * v + 8)
    backward = bound(8 * 2 * k * v + 6 * 2 * c * k + 5 * 2 * c * v, 8 * k + 6 * v + 24)
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}


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
    row = _row(job)
    try:
        contender = peers.load(job.contender, DeltaShape(*job.sizes), job.seed)
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
    sentence for every shape at which "auto" did not measure the Triton kernel, `stopped` the signal that ended the
    measuring or 0; rows not reached then say "not run".
    """
    rows: list[dict[str, Any]] = []
    stopped = 0
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
        "versions": _versions({job.contender for job in todo}),
        "problems": [problem for row in rows if (problem := _problem(row))],
        "stopped": int(stopped),
    }


def _problem(row: dict[str, Any]) -> str | None:
    if row["contender"] != "auto" or row["note"] == NOT_RUN:
        return None
    where = f"{row['op']} at {row['shape']}"
    if row["implementation"] != "triton":
        reason = row["refused"] or row["note"]
        return f"{where}: auto took {row['implementation'] or 'nothing'}, not triton ({reason})."
    return f"{where}: auto took triton, which was not wholly measured ({row['note']})." if row["note"] else None


def measure(job: Job) -> dict[str, Any]:
    """The row of one job, measured by a worker of its own; a crash or too long a wait is a note in it."""
    peer = peers.PEERS.get(job.contender)
    if peer and importlib.util.find_spec(peer.module) is None:
        return _row(job) | {"note": "not installed"}
    row = workers.ask("pallas_kernels.bench", job._asdict(), job.timeout, peer.environment if peer else None)
    if isinstance(row, str):
        return _row(job) | {"note": row}
    floor = floor_ms(DeltaShape(*job.sizes), row["device"])
    row["floor_ms"] = floor
    for phase in PHASES:
        if row[phase]:
            row[phase]["of_floor"] = floor[phase] / row[phase]["ms"] if floor else "unknown"
    return row


def _row(job: Job) -> dict[str, Any]:
    batch, tokens, *rest = job.sizes
    return {
        "op": job.op,
        "shape": job.shape,
        "sizes": f"{batch}x{tokens},{','.join(map(str, rest))}",
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


def _versions(contenders: set[str]) -> dict[str, str]:
    names = ["jax", "jaxlib"]
    names += [name for key, peer in peers.PEERS.items() if key in contenders for name in peer.distributions]
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- for a reader ---


def report(todo: Sequence[Job], environment: Callable[[], dict[str, Any]], out: str, as_json: bool) -> int:
    """Measure, then print the table (or one JSON object) and write both into `out` unless it is empty.

    `environment` gives "date", "commit" and "dirty"; it is called when no worker needs the device any more.
    Returns the exit code: 0, 1 when "auto" did not measure the Triton kernel everywhere, 128 + a signal.
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
    return 1 if found["problems"] else 0


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
    facts = [
        f"Device: {found['device']}{cpu}",
        f"Milliseconds of device time, median (least to most) of {found['repetitions']} repetitions; bf16 q, k, v, "
        f"fp32 g and beta, seed {found['seed']}; peak memory of forward + backward in a process of its own",
        f"Of floor: roofline / measured, forward / forward + backward; measured ceilings: {peaks}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}",
        f"Date: {found['date']}, commit {found['commit']}{' with uncommitted changes' if found['dirty'] else ''}",
    ]
    for name in dict.fromkeys(row["contender"] for row in found["rows"]):
        if name in peers.PEERS and peers.PEERS[name].environment:
            facts.append(f"{name} ran with {' '.join(f'{k}={v}' for k, v in peers.PEERS[name].environment.items())}")
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
