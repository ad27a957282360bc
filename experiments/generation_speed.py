"""`gdn bench generate`: tokens per second of the engine on random parameters, beside what the device allows."""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments import model_peers
from experiments.report import piped
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Time reading prompts and writing tokens with an ID's model, random parameters: tokens/s beside their floors."""

    batches: str = "1,16,64"  # rows that are continued together
    prompts: str = "200,1000"  # tokens of every prompt
    tokens: int = 64  # written after each
    repetitions: int = 3  # after one that compiles; the median is reported
    precision: Literal["run", "bf16", "fp32"] = "run"  # of activations and parameters; run: as the ID trains
    impl: Literal["auto", "chunked", "reference", "triton", "triton_interpret"] = "auto"  # for reading the prompts
    peers: str = ""  # another library's generation beside ours, where it has the model: jla
    out: str = ""  # directory that gets generate.md and generate.json; empty: none


def sizes(option: str, given: str) -> list[int]:
    """The positive whole numbers in "1,16,64", in their order."""
    words = given.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"{option} is {given!r}; it must be positive whole numbers, separated by commas.")
    return list(dict.fromkeys(map(int, words)))


def measure(experiment: Experiment, options: GenerationOptions) -> dict[str, Any]:
    """Every batch with every prompt length, what needs least memory first, each a row; one line each to stderr.

    A request that does not fit has a note in its row instead of numbers. The peak is the process's until then.
    """
    for name in ("tokens", "repetitions"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}; it must be positive.")
    asked = [(b, p) for p in sizes("prompts", options.prompts) for b in sizes("batches", options.batches)]
    if options.peers:
        model_peers.check(options.peers, experiment.id)

    import jax

    from gdn_jax.implementations import traced
    from gdn_jax.layers import compute_for
    from gdn_jax.memory import needed_bytes
    from gdn_jax.metrics import environment
    from gdn_jax.model import count_parameters, for_inference, init_model

    cfg, compute = experiment.model, compute_for(experiment)

    def needed(size: tuple[int, int]) -> int:
        batch, prompt = size
        return needed_bytes(cfg, [prompt], max_tokens=options.tokens, batch_size=batch, compute=compute)

    rows = []

    def time_all() -> None:
        model = jax.jit(lambda key: for_inference(init_model(cfg, key), compute.dtype))(jax.random.key(0))
        for batch, prompt in sorted(asked, key=needed):
            rows.append(_row(model, batch, prompt, options, compute))
            print(f"[{len(rows)}/{len(asked)}] {_said(rows[-1])}", file=sys.stderr, flush=True)

    impls = traced(experiment.run.impl, time_all)
    beside = _peer(experiment, asked, options) if options.peers else None
    here = environment()
    return {
        "id": experiment.id,
        "parameters": count_parameters(cfg),
        "precision": experiment.optim.precision,
        "impls": impls,
        "tokens": options.tokens,
        "repetitions": options.repetitions,
        "device": jax.devices()[0].device_kind,
        "rows": sorted(rows, key=lambda row: asked.index((row["batch"], row["prompt"]))),
        "peer": beside,
        **{name: here[name] for name in ("date", "commit", "dirty", "python", "versions")},
    }


def _peer(experiment: Experiment, asked: list[tuple[int, int]], options: GenerationOptions) -> dict[str, Any]:
    """Another library's speeds at the same sizes. Its prefill is the time to the first token, its decode what every
    further one adds."""
    import jax
    import numpy as np

    write, words = model_peers.PEERS[options.peers].generate(experiment)
    rows = []
    for batch, prompt in asked:
        prompts = np.random.default_rng(0).integers(0, experiment.model.vocab, (batch, prompt)).tolist()
        row: dict[str, Any] = {"batch": batch, "prompt": prompt, "prefill": None, "decode": None, "note": ""}
        try:
            first, further = (_timed(write, prompts, count, options) for count in (1, 1 + options.tokens))
            row["prefill"] = _speed(first, batch * prompt, None)
            each = [(seconds - statistics.median(first)) / options.tokens for seconds in further]
            if min(each) > 0:
                row["decode"] = _speed(each, batch, None)
            else:
                row["note"] = f"{options.tokens} further tokens took no time that shows; ask for more --tokens"
        except jax.errors.JaxRuntimeError as error:
            row["note"] = str(error).splitlines()[0]
        rows.append(row)
        print(f"[{options.peers} {len(rows)}/{len(asked)}] {_said(row)}", file=sys.stderr, flush=True)
    return {"library": model_peers.version(options.peers), "words": words, "rows": rows}


def _timed(write, prompts: list[list[int]], count: int, options: GenerationOptions) -> list[float]:
    seconds = []
    for _ in range(1 + options.repetitions):
        start = time.perf_counter()
        write(prompts, count)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _row(model, batch: int, prompt: int, options: GenerationOptions, compute) -> dict[str, Any]:
    import jax
    import numpy as np

    from gdn_jax.batch import Batch
    from gdn_jax.generate import CHUNK
    from gdn_jax.memory import cache_bytes, check_fits, free_bytes, step_bytes
    from gdn_jax.prefill import cache_room
    from gdn_jax.sampling import Sampling

    cfg, tokens = model.config, options.tokens
    row: dict[str, Any] = {
        "batch": batch,
        "prompt": prompt,
        "prefill": None,
        "decode": None,
        "cache_bytes": cache_bytes(cfg, batch, cache_room(cfg, prompt + tokens), compute),
        "peak_bytes": None,
        "note": "",
    }
    encoded = list(np.random.default_rng(0).integers(0, cfg.vocab, (batch, prompt), np.int32))
    try:
        check_fits(
            cfg, [prompt] * batch, max_tokens=tokens, batch_size=batch, compute=compute, free=free_bytes()
        )  # fmt: skip
    except UserError as error:
        return row | {"note": str(error)}
    reading, writing = [], []
    for _ in range(1 + options.repetitions):
        engine = Batch(
            model, encoded, [0] * batch, batch_size=batch, max_tokens=tokens, chunk=CHUNK, compute=compute,
            sampling=Sampling(), vocab=cfg.vocab,
        )  # fmt: skip
        jax.block_until_ready(engine.rows)
        start = time.perf_counter()
        engine.fill(lambda tokens: None)
        jax.block_until_ready(engine.rows)
        read = time.perf_counter()
        written = 0
        while (chunk := engine.launch()) is not None:
            written += chunk.tokens.shape[1]
        jax.block_until_ready(engine.rows)
        reading.append(read - start)
        writing.append((time.perf_counter() - read) / written)
        del engine, chunk
    stats = jax.local_devices()[0].memory_stats() or {}
    row["peak_bytes"] = stats.get("peak_bytes_in_use")
    moved = step_bytes(cfg, batch, prompt + tokens // 2, compute)
    row["prefill"] = _speed(reading[1:], batch * prompt, _reading_floor(cfg, batch, prompt, compute))
    row["decode"] = _speed(writing[1:], batch, _writing_floor(moved)) | {"bytes": moved}
    return row


def _speed(seconds: list[float], tokens: int, floor: float | None) -> dict[str, Any]:
    """Tokens per second: the median and both ends, and of the floor; `floor` in seconds."""
    middle = statistics.median(seconds)
    return {
        "tokens_per_s": tokens / middle,
        "least": tokens / max(seconds),
        "most": tokens / min(seconds),
        "floor_tokens_per_s": None if floor is None else tokens / floor,
        "of_floor": None if floor is None else floor / middle,
    }


def _peak():
    import jax

    from pallas_kernels.roofline import peak_of

    return peak_of(jax.devices()[0].device_kind)


def _writing_floor(moved: int) -> float | None:
    """The least seconds for one token of each row: the bytes it moves, at the device's measured bandwidth."""
    peak = _peak()
    return None if peak is None else moved / peak.bandwidth


def _reading_floor(cfg, batch: int, prompt: int, compute) -> float | None:
    """Seconds of the prompts' floating point operations, the head's for the last token alone, at bf16's measured peak;
    None in fp32, which has another."""
    import jax.numpy as jnp

    from gdn_jax.flops import forward_flops_per_token

    peak = _peak()
    if peak is None or compute.dtype != jnp.bfloat16:
        return None
    head = 2.0 * cfg.vocab * cfg.d_model
    return batch * (prompt * (forward_flops_per_token(cfg, prompt) - head) + head) / peak.flops


# --- for a reader ---


def report(experiment: Experiment, options: GenerationOptions, as_json: bool) -> None:
    """Measure, then print the table (or one JSON object) and write both into `out` unless it is empty."""
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    found = measure(experiment, options)
    texts = {"generate.json": json.dumps(found, indent=1), "generate.md": markdown(found)}
    for name, text in texts.items() if options.out else ():
        Path(options.out, name).write_text(text + "\n")
    print(texts["generate.json" if as_json else "generate.md"], flush=True)


def markdown(found: dict[str, Any]) -> str:
    """The table of what `measure` returned, and below it what the numbers need."""
    header = (
        "batch", "prompt", "prefill tokens/s", "of floor", "decode tokens/s", "of floor", "GB a step", "caches MiB",
        "peak MiB", "note",
    )  # fmt: skip
    lines = [header, ("---",) * len(header)]
    for row in found["rows"]:
        prefill, decode = row["prefill"], row["decode"]
        lines.append(
            (
                f"{row['batch']:,}",
                f"{row['prompt']:,}",
                _rate(prefill),
                _share(prefill),
                _rate(decode),
                _share(decode),
                f"{decode['bytes'] / 1e9:.3g}" if decode else "not run",
                _mib(row["cache_bytes"]),
                _mib(row["peak_bytes"]) if decode else "not run",
                row["note"] or "ok",
            )
        )
    beside = found["peer"]
    for row in beside["rows"] if beside else ():
        speeds = (_rate(row["prefill"]), "-", _rate(row["decode"]), "-", "-", "-", "-")
        name = f"{row['batch']:,} ({beside['library'].split()[0]})"
        lines.append((name, f"{row['prompt']:,}", *speeds, row["note"] or "ok"))
    cpu = "; speeds of a CPU say nothing about a GPU" if found["device"].lower() == "cpu" else ""
    facts = [
        f"Device: {found['device']}{cpu}",
        f"Model: {found['id']}, {found['parameters']:,} random parameters, {found['precision']}; "
        + "; ".join(f"{op}: {taken['impl']}" for op, taken in found["impls"].items()),
        f"Tokens per second of all rows together, median (least to most) of {found['repetitions']} repetitions; "
        f"{found['tokens']} tokens written after each prompt",
        "Floor of prefill: its floating point operations at the device's measured bf16 peak; of decode: GB a step "
        "(parameters once, states in and out, visible keys and values once) at its measured bandwidth",
        "Peak: the process's until then, the smallest request first",
        *([_of_peer(beside)] if beside else []),
        f"Versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}",
        f"Date: {found['date']}, commit {found['commit']}{' with uncommitted changes' if found['dirty'] else ''}",
    ]
    return f"{piped(lines)}\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _of_peer(beside: dict[str, Any]) -> str:
    """What a reader needs to know of another library's rows."""
    sizes = beside["words"] or "at our sizes"
    return (
        f"{beside['library']}: its own model, {sizes}; prefill: to the first token, decode: what every further one adds"
    )


def _said(row: dict[str, Any]) -> str:
    speeds = f"prefill {_rate(row['prefill'])}, decode {_rate(row['decode'])} tokens/s"
    return f"batch {row['batch']}, prompts of {row['prompt']}: {row['note'] or speeds}"


def _rate(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "not run"
    return f"{speed['tokens_per_s']:,.0f} ({speed['least']:,.0f} to {speed['most']:,.0f})"


def _share(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "not run"
    return "unknown" if speed["of_floor"] is None else f"{speed['of_floor']:.0%}"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.1f}"
