"""One training step compiled and timed in this process, ours or another library's, on random tokens.

The process must be fresh for the peak of its memory to be this step's own.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import model_peers
from gdn_jax.config import Experiment

OUT_OF_MEMORY = "out of memory"

Row = dict[str, Any]


def failure(error: Exception, experiment: Experiment) -> str:
    """A runtime error in one sentence; where memory ran out, with what would need less."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not ran_out(error):
        return f"failed: {said}"
    run = experiment.run
    return f"{OUT_OF_MEMORY} with remat {run.remat} and {run.micro_batches} micro-batches a step: {said}"


def ran_out(error: Exception) -> bool:
    """Whether it says, in jax's words or torch's, that a device's memory did not do."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)


def timed(
    experiment: Experiment, devices: Sequence[Any], *, warm_up: int, repetitions: int, step_profile: bool = False
) -> Row:
    """The training step on random tokens: compiled, then `repetitions` times after `warm_up`, each waited for.

    tokens/s are of all devices, MFU is one device's, the peak of memory that of the device that took most.
    """
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
        stats = max((one.memory_stats() or {} for one in devices), key=lambda stats: stats.get("peak_bytes_in_use", 0))
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
        except Exception as error:
            if not ran_out(error) or remat == of.remat[-1]:
                raise
    peak, limit = built.memory()
    return {
        "parameters": built.parameters,
        "peer": {"library": model_peers.version(peer), "words": built.words, "remat": remat},
        **_speed(seconds[warm_up:], batches[0][:, 1:].size),
        "compile_seconds": compile_seconds,
        # of this attempt alone where it was the first
        "peak_bytes": peak if remat == of.remat[0] else None,
        "limit_bytes": limit,
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
