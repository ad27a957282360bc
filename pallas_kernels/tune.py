"""The fastest configuration of every kernel at given sizes, on the device at hand.

Candidates of a stage are compiled side by side and timed one by one on what the stages before it make of random inputs.
One that does not agree with the default there is left out. The fastest of each stage go into the op together, and into
the table only when the op then matches its float64 oracle; failing that the defaults are tried.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pallas_kernels import bench
from pallas_kernels.shapes import DeltaShape

# cases of gated_delta_rule/conformance.py that a configuration must pass before it is admitted
CHECKS = ("T=129", "documents", "decay 0.3", "group value", "beta in (1,2)")
LEAST_MS, MOST_CALLS = 10.0, 40  # of one repetition
APART = 5e-3  # relative L2 distance between two configurations' results, which differ by rounding alone


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to tune; lists are separated by commas."""

    shapes: str = "all"  # names of pallas_kernels/shapes.py, or written out as BxT,H,K,V: 8x4096,6,256,512
    stages: str = "all"  # some of prepare, forward, state, output, reverse, chunks, pairs, tokens
    repetitions: int = 5  # of each timing; the median decides
    threads: int = 8  # compilations at a time
    out: str = ""  # the table to write; empty: the one that the kernels read


def candidates(stage: str, key_dim: int) -> list[dict[str, Any]]:
    """Configurations of a stage worth a try: those that were among the fastest at some size, and their neighbours."""
    widest = 1 << (key_dim.bit_length() - 1)
    wide, widest = min(128, widest), min(256, widest)

    def grid(**choices):
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    found = {
        "prepare": grid(key_tile=(64, 128), warps=(4,), stages=(2, 3)),
        "state": grid(block_v=(64,), key_tile=(64, widest), transposed=(False, True), warps=(4,), stages=(2, 3))
        + grid(block_v=(128,), key_tile=(widest,), transposed=(True,), warps=(8,), stages=(2, 3))
        + grid(block_v=(32,), key_tile=(widest,), transposed=(False,), warps=(4,), stages=(2, 3)),
        "output": grid(block_v=(32, 64), key_tile=(64, widest), warps=(4,), stages=(2, 3))
        + grid(block_v=(64, 128), key_tile=(widest,), warps=(8,), stages=(2,)),
        "chunks": grid(block_v=(64, 128), key_tile=(32, 64), warps=(4,), stages=(2, 3))
        + grid(block_v=(64, 128), key_tile=(wide,), warps=(8,), stages=(2, 3)),
        "pairs": grid(block_v=(32, 64), warps=(4,), stages=(2, 3)),
        "tokens": grid(block_v=(32, 64), key_tile=(wide,), pair_tile=(32, 64), warps=(8,), stages=(2, 3))
        + grid(block_v=(64,), key_tile=(64,), pair_tile=(32,), warps=(4, 8), stages=(2, 3)),
    }
    found["forward"] = found["state"]
    found["reverse"] = [row | {"ahead": ahead} for ahead in (True, False) for row in found["state"]]
    return [row for i, row in enumerate(found[stage]) if row not in found[stage][:i]]


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
    shape: DeltaShape, block: int, stages: list[str], options: Options, say: Callable[[str], None]
) -> dict[str, list]:
    """Stage -> [(ms, configuration)], fastest first; what does not compile, run or agree is said and left out."""
    import jax

    from pallas_kernels.gated_delta_rule import triton_op, tuning

    def call(stage, configuration, interpret):
        return partial(
            tuning.run, stage, configuration=configuration, scale=shape.key_dim**-0.5, block=block, interpret=interpret
        )

    def compiled(stage, kinds, configuration):
        return jax.jit(call(stage, configuration, False)).lower(kinds).compile()

    kinds, found, jobs = jax.eval_shape(lambda: tuning.inputs(shape)), {}, {}
    with ThreadPoolExecutor(options.threads) as pool:
        for stage in triton_op.stages(block):
            default = triton_op.DEFAULTS[stage]
            tried = candidates(stage, shape.key_dim) if stage in stages else []
            tried = [default, *(row for row in tried if row != default)]
            jobs[stage] = [(row, pool.submit(compiled, stage, kinds, row)) for row in tried]
            kinds = kinds.with_made(jax.eval_shape(call(stage, default, True), kinds))
        wait([job for row in jobs.values() for _, job in row])  # a busy host would be timed too
        work = tuning.inputs(shape)
        for stage, tried in jobs.items():
            results, times = tried[0][1].result()(work), []
            for configuration, job in tried if stage in stages else ():
                try:
                    run = partial(job.result(), work)
                    distance = apart(run(), results)
                    if distance <= APART:
                        times.append((timed(run, options.repetitions), configuration))
                    else:
                        say(f"{stage} {_short(configuration)} is {distance:.1e} from the default: left out")
                except Exception as error:  # out of shared memory, most often: that is its answer
                    say(f"{stage} {_short(configuration)}: {str(error).splitlines()[0][:100]}")
            if times:
                found[stage] = sorted(times, key=lambda row: row[0])
                say(f"{stage} " + ", ".join(f"{ms:.3f} ms {_short(c)}" for ms, c in found[stage][:3]))
            work = work.with_made(results)
    return found


def in_pieces(shape: DeltaShape) -> DeltaShape:
    """`shape` as the kernels see it: long rows of few heads are cut."""
    from pallas_kernels.gated_delta_rule import triton_op

    count = triton_op.pieces(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    return shape._replace(batch=shape.batch * count, tokens=shape.tokens // count)


def _fastest_block(shape, options, say):
    """`measure` of every stage with states every 64 or every 128 tokens, whichever makes the faster whole; "all" says
    which. Wide heads are tried at 128 alone: states every 64 tokens would be most of their traffic."""
    from pallas_kernels.gated_delta_rule import triton_op

    tried, whole = {}, {}
    for block in (64, 128) if shape.key_dim in (64, 128) else (128,):
        tried[block] = measure(shape, block, list(triton_op.KERNELS), options, say)
        if set(tried[block]) == set(triton_op.stages(block)):
            whole[block] = sum(rows[0][0] for rows in tried[block].values())
            say(f"states every {block} tokens: {whole[block]:.3f} ms in all")
    if not whole:
        return {}
    block = min(whole, key=whole.get)
    return {"all": [(whole[block], {"block": block})]} | tried[block]


def _short(configuration: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in configuration.items())


def admitted(
    shape: DeltaShape, before: dict[str, dict], times: dict[str, list], kind: str, threads: int,
    say: Callable[[str], None],
) -> dict[str, dict]:  # fmt: skip
    """Stage -> configuration with which the op passes CHECKS at these sizes: the fastest of each, or else the defaults;
    a stage not timed has the one it had `before`. Empty when neither passes."""
    from pallas_kernels.gated_delta_rule import conformance, triton_op

    def failures(chosen):
        triton_op.use({kind: {f"{shape.key_dim}x{shape.value_dim}": chosen}})
        cases = [case for case in conformance.CASES if case.name in CHECKS]
        sized = [replace(case, K=shape.key_dim, V=shape.value_dim, dtype="bfloat16") for case in cases]
        try:
            with ThreadPoolExecutor(threads) as pool:  # most of the time is compilation
                found = pool.map(lambda case: conformance.failures(case, "triton"), sized)
                return [f"{case.name}: {error}" for case, wrong in zip(sized, found, strict=True) for error in wrong]
        finally:
            triton_op.use(None)

    fastest = {stage: rows[0][1] for stage, rows in times.items()}
    default = {stage: triton_op.DEFAULTS[stage] for stage in times if stage != "all"}
    for name, configurations in ("fastest", fastest), ("default", fastest | default):
        wrong = failures(before | configurations)
        if not wrong:
            return before | configurations
        say(f"the {name} configurations are not admitted: {wrong[0]}")
    return {}


def tune(op: str, options: Options, environment: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Tune, write the table, return it: {"devices": kind -> "KxV" or "KxV few" -> stage -> configuration, "admitted":
    kind -> the "KxV" that passed, "measured": like "devices", milliseconds with date, commit, versions and shape}.

    "few": where rows times heads leave the serial passes about one program a multiprocessor. An entry that several
    shapes share is tuned at the first of them. ValueError with a sentence for options that cannot be read;
    NotImplementedError off a Hopper device.
    """
    shapes = bench.shapes_of(op, options.shapes)
    from pallas_kernels import triton_dialect
    from pallas_kernels.gated_delta_rule import triton_op

    stages = list(triton_op.KERNELS) if options.stages == "all" else options.stages.split(",")
    for stage in stages:
        if stage not in triton_op.KERNELS:
            raise ValueError(f"stages names {stage!r}; it must be all or some of {', '.join(triton_op.KERNELS)}.")
    for name in ("repetitions", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be positive.")
    for name, shape in shapes.items():
        if (shape.key_dim, shape.value_dim) not in triton_op.SIZES:
            reason = triton_op.why_not(shape.key_dim, shape.value_dim, 64, interpret=True)
            raise ValueError(f"Shape {name!r} cannot be tuned: {reason}.")
    reason = triton_dialect.why_not_here()
    if reason:
        raise NotImplementedError(f"{op} cannot be tuned here: {reason}.")
    import jax

    kind, path = jax.devices()[0].device_kind, Path(options.out or triton_op.TUNED)
    table = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".new")
    whole.touch()  # before minutes of measuring
    empty = {"devices": {}, "admitted": [], "measured": {}}
    devices, admissions, measured = (table.setdefault(key, {}).setdefault(kind, none) for key, none in empty.items())
    tuned = set()
    for name, shape in shapes.items():
        shape = in_pieces(shape)
        size = triton_op.entry(shape.key_dim, shape.value_dim, shape.batch * shape.heads)
        if size in tuned:
            continue
        tuned.add(size)
        say = lambda line, name=name: print(f"{name}: {line}", file=sys.stderr, flush=True)  # noqa: E731
        before = {}
        if set(stages) == set(triton_op.KERNELS):
            times = _fastest_block(shape, options, say)
        else:  # under the block that is in force, and the rest stays as it is: an entry is always whole
            held = devices.get(size) or triton_op.config(
                shape.key_dim, shape.value_dim, kind, shape.batch * shape.heads
            )
            runs = triton_op.stages(held["all"]["block"])
            before = {stage: held[stage] for stage in ("all", *runs)}
            if not set(stages) & set(runs):
                say(f"{', '.join(stages)}: not among the stages that run here, {', '.join(runs)}")
                continue
            times = measure(shape, before["all"]["block"], stages, options, say)
        chosen = admitted(shape, before, times, kind, options.threads, say) if times else {}
        if not chosen:
            say("nothing is admitted; the table keeps what it had")
            continue
        here = environment()
        facts = {"shape": name} | {key: here[key] for key in ("date", "commit", "dirty", "source", "versions")}
        new = {stage: next(ms for ms, c in rows if c == chosen[stage]) for stage, rows in times.items()}
        if "all" in new:
            new["all"] = sum(ms for stage, ms in new.items() if stage != "all")
        kept = measured.get(size, {}) if before else {}
        devices[size] = chosen
        measured[size] = kept | {stage: facts | {"ms": round(ms, 4)} for stage, ms in new.items()}
        if not size.endswith("few"):
            admissions[:] = sorted({*admissions, size})
        whole.write_text(json.dumps(table, indent=1) + "\n")
        whole.replace(path)
        say("admitted: " + "; ".join(f"{stage} {ms:.3f} ms" for stage, ms in new.items()))
    whole.unlink(missing_ok=True)
    return table


def markdown(table: dict[str, Any]) -> str:
    """The table's configurations, one row a stage, with their milliseconds where they were measured."""
    lines = ["| device | K x V | stage | ms | configuration |", "| --- | --- | --- | --- | --- |"]
    for kind, sizes in table["devices"].items():
        for size, chosen in sizes.items():
            for stage, configuration in chosen.items():
                ms = table["measured"].get(kind, {}).get(size, {}).get(stage, {}).get("ms", "not run")
                lines.append(f"| {kind} | {size} | {stage} | {ms} | {_short(configuration)} |")
    return "\n".join(lines)
