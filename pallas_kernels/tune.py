"""The fastest configuration of every kernel at given sizes, on the device at hand.

Candidates of a kernel are compiled side by side and timed one by one on what those before it make of random inputs. One
that does not agree with the default there is left out. The fastest of each go into the op together, and into the table
only when the op then matches its float64 oracle; failing that the defaults are tried.
"""

import statistics
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pallas_kernels import bench, ops
from pallas_kernels.tuned import WHOLE, Entry, Table, Timing, as_text, block_of, kernels, read, to_write

Times = dict[str, list[tuple[float, Any]]]  # kernel -> (ms, configuration), fastest first

LEAST_MS, MOST_CALLS = 10.0, 40  # of one repetition
APART = 5e-3  # relative L2 distance between two configurations' results, which differ by rounding alone


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to tune; lists are separated by commas."""

    shapes: str = "all"  # names in the op's benchmark.py, or written out as it says: 8x4096,6,256,512
    kernels: str = "all"  # all, or some of the op's kernels, such as prepare, forward
    repetitions: int = 5  # of each timing; the median decides
    threads: int = 8  # compilations at a time
    out: str = ""  # the table to write; empty: the package's, or the user's where that cannot be written


def timed(call: Callable[[], Any], repetitions: int) -> float:
    """Milliseconds of one call: median over repetitions of calls back to back."""
    import jax

    def run(calls):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3

    run(2)
    calls = max(2, min(MOST_CALLS, int(LEAST_MS / max(run(1), 1e-3)) + 1))
    return statistics.median(run(calls) / calls for _ in range(repetitions))


def apart(got: Any, want: Any) -> float:
    """The largest relative L2 distance of an array from its like; NaN for what is not finite."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def distance(x, y):
        if x.shape != y.shape:  # sums over tiles of key columns, whose number differs
            x, y = x.sum(0), y.sum(0)
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)

    return float(jnp.stack(jax.tree.leaves(jax.tree.map(distance, got, want))).max())


def measure(
    tuning: ModuleType, shape: Any, whole: Any, names: Collection[str], options: Options, say: Callable[[str], None]
) -> Times:
    """Times of the kernels of `whole` that `names` has; what does not compile, run or agree with it is said and left
    out."""
    import jax

    def call(config, interpret):
        return partial(tuning.run, config=config, whole=whole, interpret=interpret)

    def compiled(kinds, config):
        return jax.jit(call(config, False)).lower(kinds).compile()

    kinds, found, jobs = jax.eval_shape(lambda: tuning.inputs(shape)), {}, {}
    with ThreadPoolExecutor(options.threads) as pool:
        for name, first in kernels(whole).items():
            tried = tuning.candidates(first, shape) if name in names else [first]
            jobs[name] = [(config, pool.submit(compiled, kinds, config)) for config in tried]
            kinds = kinds.with_made(jax.eval_shape(call(first, True), kinds))
        wait([job for row in jobs.values() for _, job in row])  # a busy host would be timed too
        work = tuning.inputs(shape)
        for name, tried in jobs.items():
            results, times = tried[0][1].result()(work), []
            for config, job in tried if name in names else ():
                try:
                    run = partial(job.result(), work)
                    distance = apart(run(), results)
                    if distance <= APART:
                        times.append((timed(run, options.repetitions), config))
                    else:
                        say(f"{name} {_short(config)} is {distance:.1e} from the default: left out")
                except Exception as error:  # out of shared memory, most often: that is its answer
                    say(f"{name} {_short(config)}: {str(error).splitlines()[0][:100]}")
            if times:
                found[name] = sorted(times, key=lambda row: row[0])
                say(f"{name} " + ", ".join(f"{ms:.3f} ms {_short(config)}" for ms, config in found[name][:3]))
            work = work.with_made(results)
    return found


def _fastest_whole(
    tuning: ModuleType, shape: Any, options: Options, say: Callable[[str], None]
) -> tuple[Any, Times] | None:
    """Every kernel's times in whichever way to put the op together makes the faster whole, and the default there."""
    found = []
    for default in tuning.wholes(shape):
        times = measure(tuning, shape, default, kernels(default), options, say)
        if set(times) == set(kernels(default)):
            found.append((sum(rows[0][0] for rows in times.values()), default, times))
            say(f"{type(default).__name__}: {found[-1][0]:.3f} ms in all")
    return min(found, key=lambda row: row[0])[1:] if found else None


def _short(config: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(config).items())


def admitted(op: str, shape: Any, before: Any, times: Times, threads: int, say: Callable[[str], None]) -> Any | None:
    """The configuration with which the op passes its checks at these sizes: the fastest of each kernel that was timed,
    or else the defaults, and the rest as `before`. None when neither passes."""
    cases = ops.module(op, "tuning").checks(shape)

    def failures(configuration):
        check = partial(ops.module(op, "conformance").failures, impl="triton", configuration=configuration)
        with ThreadPoolExecutor(threads) as pool:  # most of the time is compilation
            found = list(pool.map(check, cases))
        return [f"{case.name}: {error}" for case, wrong in zip(cases, found, strict=True) for error in wrong]

    fastest = {name: rows[0][1] for name, rows in times.items()}
    default = {name: type(config)() for name, config in fastest.items()}
    for said, chosen in ("fastest", fastest), ("default", default):
        configuration = replace(before, **chosen)
        wrong = failures(configuration)
        if not wrong:
            return configuration
        say(f"the {said} configurations are not admitted: {wrong[0]}")
    return None


def tune(op: str, options: Options, environment: Callable[[], dict[str, Any]]) -> Table:
    """Tune, write the table, return it.

    An entry that several shapes share is tuned at the first of them. ValueError with a sentence for options or a table
    that cannot be read; NotImplementedError off a Hopper device.
    """
    if op not in (having := ops.names("tuning")):
        raise ValueError(f"There is no op {op!r} to tune; it must be one of {', '.join(having)}.")
    shapes, tuning = bench.shapes_of(op, options.shapes), ops.module(op, "tuning")
    from pallas_kernels import triton_calls

    known = tuning.KERNELS
    names = known if options.kernels == "all" else options.kernels.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"kernels names {name!r}; it must be all or some of {', '.join(known)}.")
    for name in ("repetitions", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be positive.")
    for name, shape in shapes.items():
        if reason := tuning.why_not(shape):
            raise ValueError(f"Shape {name!r} cannot be tuned: {reason}.")
    reason = triton_calls.why_not_here()
    if reason:
        raise NotImplementedError(f"{op} cannot be tuned here: {reason}.")
    import jax

    kind, path = jax.devices()[0].device_kind, Path(options.out or to_write(op))
    table = read(path, tuning.KINDS) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    new_file = path.with_name(path.name + ".new")
    new_file.touch()  # before minutes of measuring
    entries, seen = table.setdefault(kind, {}), set()
    for name, shape in shapes.items():
        shape = tuning.as_run(shape)
        size = tuning.entry_name(shape)
        if size in seen:
            continue
        seen.add(size)
        say = lambda line, name=name: print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: E731
        timings = {}
        if set(names) == set(known):
            before, times = _fastest_whole(tuning, shape, options, say) or (None, {})
        else:  # as the op is put together now, and the rest stays as it is: an entry is always whole
            if size in entries:
                before, timings = entries[size].configuration, entries[size].timings
            else:
                before = tuning.in_force(shape, kind)
            if not set(names) & set(kernels(before)):
                say(f"{', '.join(names)}: not among the kernels that run here, {', '.join(kernels(before))}")
                continue
            times = measure(tuning, shape, type(before)(), names, options, say)
        chosen = admitted(op, shape, before, times, options.threads, say) if times else None
        if chosen is None:
            say("nothing is admitted; the table keeps what it had")
            continue
        new = {name: next(ms for ms, c in rows if c == kernels(chosen)[name]) for name, rows in times.items()}
        if set(names) == set(known):
            new = {WHOLE: sum(new.values())} | new
        here = environment()
        facts = {key: here[key] for key in ("date", "commit", "dirty", "source")}
        facts |= {"shape": name, "jax": here["versions"]["jax"], "jaxlib": here["versions"]["jaxlib"]}
        timings = timings | {kernel: Timing(ms=round(ms, 4), **facts) for kernel, ms in new.items()}
        entries[size] = Entry(configuration=chosen, admitted=tuning.admits(size), timings=timings)
        new_file.write_text(as_text(table))
        new_file.replace(path)
        say(f"admitted in {path}: " + "; ".join(f"{kernel} {ms:.3f} ms" for kernel, ms in new.items()))
    new_file.unlink(missing_ok=True)
    return table


def markdown(table: Table) -> str:
    """The table's configurations, one row a kernel, with their milliseconds where they were measured."""
    lines = ["| device | size | kernel | ms | configuration |", "| --- | --- | --- | --- | --- |"]
    for kind, entries in table.items():
        for size, entry in entries.items():
            whole = " ".join(f"{key}={value}" for key, value in block_of(entry.configuration).items())
            rows = {WHOLE: whole} | {name: _short(config) for name, config in kernels(entry.configuration).items()}
            for name, words in rows.items():
                ms = entry.timings[name].ms if name in entry.timings else "not run"
                lines.append(f"| {kind} | {size} | {name} | {ms} | {words} |")
    return "\n".join(lines)
