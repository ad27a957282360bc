"""The gated delta rule as Triton kernels: which sizes, which configuration, and the stages put together.

block 64    prepare (parallel) -> forward (serial)                      reverse (serial) -> chunks (parallel)
block 128   prepare (parallel) -> state (serial) -> output (parallel)   reverse (serial) -> pairs, tokens (parallel)

A block is the tokens between kept states: every 64 they are twice the traffic, but outputs come with them and gradients
need one kernel; every 128 both take one more. Which is faster is measured.

A serial pass has one program for each row, head and tile of value columns. Where that is too few for the device, long
rows are cut into pieces that run side by side, exactly (triton_pieces.py).
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule import (
    triton_chunks,
    triton_gradients,
    triton_output,
    triton_pieces,
    triton_prepare,
    triton_state,
)
from pallas_kernels.gated_delta_rule.triton_gradients import BLOCK
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK
from pallas_kernels.tiles import document_starts, pad_tokens

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (192, 384), (200, 400), (256, 256), (256, 512))
TUNED = Path(__file__).with_name("tuned.json")  # written by `gdn tune`

# what runs where nothing was tuned
DEFAULTS = {
    "all": {"block": 128},  # tokens between kept states, and of one program of the gradients: 64 or 128
    "prepare": {"key_tile": 64, "warps": 4, "stages": 3},
    "forward": {"block_v": 64, "key_tile": 64, "transposed": False, "warps": 4, "stages": 2},
    "state": {"block_v": 64, "key_tile": 64, "transposed": False, "warps": 4, "stages": 2},
    "output": {"block_v": 64, "key_tile": 64, "warps": 4, "stages": 2},
    "reverse": {"block_v": 64, "key_tile": 64, "transposed": False, "ahead": False, "warps": 4, "stages": 2},
    "chunks": {"block_v": 64, "key_tile": 64, "warps": 4, "stages": 2},
    "pairs": {"block_v": 64, "warps": 4, "stages": 2},
    "tokens": {"block_v": 64, "key_tile": 128, "pair_tile": 32, "warps": 8, "stages": 2},
}

# The exponential of anything below is 0 in fp32, so that raising g to it changes no decay. It keeps the sums of 64 log
# decays, whose differences are the exponents within a chunk, small enough for fp32: a reset may be -1e9 or -inf.
LEAST_LOG_DECAY = -104.0

MOST_ELEMENTS = 1 << 31  # 32-bit indices
FEW_PROGRAMS, MANY_PROGRAMS = 32, 256  # of a serial pass: at most few, rows are cut into pieces, for at most many
SHORTEST_PIECE = 1024
ONE_EACH = 128  # programs of a serial pass: about one a multiprocessor


class Stage(NamedTuple):
    """A kernel, the arrays it takes and gives by name, and which of the constants it wants."""

    kernel: Any
    takes: str
    gives: str
    constants: tuple[str, ...] = ()


STAGES = {
    "prepare": Stage(
        triton_prepare.prepare, "q k g beta documents", "inverse attention total gamma leaving write", ("scale",)
    ),
    "forward": Stage(
        triton_state.forward, "k v gamma write inverse initial_state q attention", "o rho kept final",
        ("scale", "block"),
    ),
    "state": Stage(triton_state.forward, "k v gamma write inverse initial_state", "rho kept final", ("scale", "block")),
    "output": Stage(triton_output.output, "q k gamma write rho kept attention", "o", ("scale",)),
    "reverse": Stage(
        triton_state.reverse, "q k do gamma write inverse attention d_final", "dv d_kept d_initial", ("scale", "block")
    ),
    "chunks": Stage(
        triton_chunks.chunks, "q k total gamma leaving beta documents do dv rho kept d_kept", "dq dk dg dbeta",
        ("scale", "dtype"),
    ),
    "pairs": Stage(triton_gradients.pairs, "total beta documents do dv rho", "m1 m2", ("scale",)),
    "tokens": Stage(
        triton_gradients.tokens, "q k gamma leaving beta do dv rho kept d_kept m1 m2", "dq dk moved written ends",
        ("scale", "dtype"),
    ),
}  # fmt: skip


def stages(block: int) -> tuple[str, ...]:
    """The stages of forward and backward, in order, with states kept every `block` tokens."""
    if block == CHUNK:
        return ("prepare", "forward", "reverse", "chunks")
    return ("prepare", "state", "output", "reverse", "pairs", "tokens")


def largest_array(batch: int, tokens: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Elements of the largest array that the kernels read or write: values, or states every 64 tokens."""
    return batch * value_heads * tokens * max(key_dim, value_dim, key_dim * value_dim // CHUNK)


def why_not(key_dim: int, value_dim: int, chunk: int, *, elements: int = 0, interpret: bool) -> str | None:
    """The reason the kernels cannot run, or None; `elements` is that of `largest_array`."""
    if elements >= MOST_ELEMENTS:
        return (
            f"an array of {elements:,} elements is past the {MOST_ELEMENTS:,} that they are made for; split the batch"
        )
    if (key_dim, value_dim) not in SIZES:
        known = ", ".join(f"{k}x{v}" for k, v in SIZES)
        return f"there is no kernel for key x value dimensions {key_dim}x{value_dim} (there is for {known})"
    if chunk != CHUNK:
        return f"the kernels solve {CHUNK} tokens at once, not {chunk}"
    return None if interpret else triton.why_not_here()


def not_admitted(key_dim: int, value_dim: int, device_kind: str) -> str | None:
    """The reason "auto" must leave the kernels alone at these sizes, or None where they passed their checks."""
    size = f"{key_dim}x{value_dim}"
    if size in _tuned().get("admitted", {}).get(device_kind, ()):
        return None
    return (
        f"its configuration at {size} has not passed the float64 check on {device_kind}; "
        f"`gdn tune gated_delta_rule --shapes 8x4096,24,{key_dim},{value_dim}` checks and admits it"
    )


@functools.cache
def _tuned() -> dict[str, Any]:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


_trial: list[dict] = []


def use(devices: dict[str, dict[str, dict[str, dict[str, Any]]]] | None) -> None:
    """Take configurations from `devices` instead of TUNED, until `use(None)`: tuning tries them out. Forgets what jax
    has compiled."""
    _trial[:] = [] if devices is None else [devices]
    jax.clear_caches()


def _programs(rows, value_dim):
    """Of a serial pass over `rows` rows times heads, one a tile of 64 value columns."""
    return rows * -(-value_dim // 64)


def entry(key_dim: int, value_dim: int, rows: int = MANY_PROGRAMS) -> str:
    """The name in the table of these sizes; `rows` is batch, or pieces, times value heads."""
    few = _programs(rows, value_dim) <= ONE_EACH
    return f"{key_dim}x{value_dim}" + few * " few"


def config(key_dim: int, value_dim: int, device_kind: str = "", rows: int = MANY_PROGRAMS) -> dict[str, dict[str, Any]]:
    """Stage -> configuration at these sizes: the table's for this kind of device, else for the first kind it has
    (all are Hopper), else the defaults. Where rows are few, what was tuned for that comes first."""
    devices = _trial[0] if _trial else _tuned().get("devices", {})
    of_device = devices.get(device_kind) or next(iter(devices.values()), {})
    names = entry(key_dim, value_dim, rows), entry(key_dim, value_dim)
    return DEFAULTS | next((of_device[name] for name in names if name in of_device), {})


def run(name: str, arrays: dict[str, Any], configuration: dict[str, Any], **constants: Any) -> dict[str, Any]:
    """`arrays` and what stage `name` gives, by name."""
    stage = STAGES[name]
    chosen = {key: constants[key] for key in (*stage.constants, "interpret")}
    results = stage.kernel(*(arrays[key] for key in stage.takes.split()), **chosen, **configuration)
    names = stage.gives.split()
    return arrays | dict(zip(names, results if len(names) > 1 else (results,), strict=True))


def pieces(batch: int, tokens: int, value_heads: int, value_dim: int) -> int:
    """Into how many pieces the serial passes cut every row."""
    programs, count = _programs(batch * value_heads, value_dim), 1
    if programs > FEW_PROGRAMS:
        return 1
    while 2 * count * programs <= MANY_PROGRAMS and tokens >= 2 * count * SHORTEST_PIECE:
        count *= 2
    return count


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _entering(runs):
    """The document that enters each chunk; the first one is entered by document 0."""
    return jnp.pad(runs, ((0, 0), (1, 0)))[:, : runs.shape[1] : CHUNK]


class _Static(NamedTuple):
    scale: float
    residuals: str
    interpret: bool
    pieces: int

    def constants(self, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {"scale": self.scale, "interpret": self.interpret, **configs["all"]}


def _forward(arrays, static, outputs, keep):
    """`arrays` with prepare's results, `outputs` o and final, `keep` rho and kept; under pieces also each one's map."""
    configs = _configs(arrays, static)
    constants = static.constants(configs)
    serial = configs["forward" if constants["block"] == CHUNK else "state"]
    arrays = run("prepare", arrays, configs["prepare"], **constants)
    alone = partial(triton_state.forward, keep=False, **constants, **serial)
    if static.pieces > 1:
        rows, K, heads = arrays["k"].shape[0], arrays["k"].shape[-1], arrays["gamma"].shape[1]
        passed = [arrays[name] for name in ("gamma", "write", "inverse")]
        identity = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (rows, heads, K, K))
        (maps,), (local,) = alone(arrays["k"], None, *passed, identity), alone(arrays["k"], arrays["v"], *passed, None)
        entering = triton_pieces.chain(
            maps, local, arrays["initial_state"], count=static.pieces, reverse=False, interpret=static.interpret
        )
        arrays = arrays | {"maps": maps, "initial_state": entering}
    if not outputs:
        return run("state", arrays, serial, **constants)
    if constants["block"] != CHUNK:
        return run("output", run("state", arrays, serial, **constants), configs["output"], **constants)
    if keep:
        return run("forward", arrays, serial, **constants)
    o, final = alone(*(arrays[name] for name in STAGES["forward"].takes.split()))
    return arrays | {"o": o, "final": final}


def _configs(arrays, static):
    kind = "" if static.interpret else jax.devices()[0].device_kind
    batch, _, value_heads, value_dim = arrays["v" if "v" in arrays else "rho"].shape
    return config(arrays["k"].shape[-1], value_dim, kind, batch * value_heads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, tokens, initial_state, documents):
    return _outputs(static, tokens, initial_state, documents, keep=False)[0]


def _op_fwd(static, tokens, initial_state, documents):
    return _outputs(static, tokens, initial_state, documents, keep=static.residuals == "saved")


def _outputs(static, tokens, initial_state, documents, keep):
    """(o, final state) and what the backward takes."""
    q, k, v, g, beta = tokens
    given = {"q": q, "k": k, "v": v, "g": _heads_first(g), "beta": _heads_first(beta), "initial_state": initial_state}
    given["documents"] = documents
    arrays = _forward(given, static, outputs=True, keep=keep)
    final = arrays["final"]
    final = final.reshape(-1, static.pieces, *final.shape[1:])[:, -1]
    if keep:
        names = ["q", "k", "beta", "rho", "kept", "inverse", "attention", "total", "gamma", "leaving", "write"]
        names += ["maps"] * (static.pieces > 1)
        given = {name: arrays[name] for name in [*names, "documents"]}
    return (arrays["o"], final), given


def _op_bwd(static, saved, cotangents):
    arrays = _forward(saved, static, outputs=False, keep=True) if "v" in saved else saved
    do, d_final = cotangents
    configs = _configs(arrays, static)
    constants = static.constants(configs)
    if static.pieces > 1:
        names = ("gamma", "write", "inverse", "attention")
        (local,) = triton_state.reverse(
            arrays["q"], arrays["k"], do, *(arrays[name] for name in names), None,
            keep=False, **constants, **configs["reverse"],
        )  # fmt: skip
        d_final = triton_pieces.chain(
            arrays["maps"], local, d_final, count=static.pieces, reverse=True, interpret=static.interpret
        )
    arrays = arrays | {"do": do, "d_final": d_final}
    group = arrays["beta"].shape[1] // arrays["k"].shape[2]
    constants["dtype"] = jnp.bfloat16 if group == 1 else jnp.float32  # per value head until the sum over the group
    names = stages(constants["block"])
    for name in names[names.index("reverse") :]:
        arrays = run(name, arrays, configs[name], **constants)
    if "dg" not in arrays:
        names = ("beta", "moved", "written", "ends")
        arrays["dg"], arrays["dbeta"] = triton_gradients.gates(*(arrays[name] for name in names))
    dq, dk, dg, dbeta = (arrays[name] for name in ("dq", "dk", "dg", "dbeta"))
    if group > 1:
        dq, dk = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3).astype(jnp.bfloat16) for x in (dq, dk))
    d_initial = arrays["d_initial"]
    d_initial = d_initial.reshape(-1, static.pieces, *d_initial.shape[1:])[:, 0]
    return (dq, dk, arrays["dv"], _heads_first(dg), _heads_first(dbeta)), d_initial, None


_op.defvjp(_op_fwd, _op_bwd)


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale, residuals, interpret):
    """Arguments as in api.gated_delta_rule; initial_state and segment_ids may be None. Any T."""
    (batch, tokens), dtype = q.shape[:2], v.dtype
    count = pieces(batch, tokens, *v.shape[2:])
    padding = -tokens % (BLOCK * count)

    def cut(x):
        return x.reshape(batch * count, -1, *x.shape[2:])

    documents = None
    if segment_ids is not None:
        runs = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (0, padding)), mode="edge")
        documents = cut(runs), cut(_entering(runs))
    g = jnp.maximum(g.astype(jnp.float32), LEAST_LOG_DECAY)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), g, beta.astype(jnp.float32)]
    if padding:  # k = v = beta = g = 0 writes nothing and keeps the state
        given = [pad_tokens(x, padding) for x in given]
    if initial_state is None:
        initial_state = jnp.zeros((batch, *v.shape[2:3], q.shape[-1], v.shape[-1]), jnp.float32)
    static = _Static(scale, residuals, interpret, count)
    o, state = _op(static, tuple(cut(x) for x in given), initial_state.astype(jnp.float32), documents)
    return o.reshape(batch, -1, *o.shape[2:])[:, :tokens].astype(dtype), state
