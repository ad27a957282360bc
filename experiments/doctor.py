"""Checks this machine: versions, devices, each op against its float64 reference, and what `auto` picks."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.report import aligned
from gdn_jax.implementations import in_words
from gdn_jax.layers import Compute
from gdn_jax.metrics import environment
from gdn_jax.mixers.recurrence import RECURRENCES, advance
from pallas_kernels import ops
from pallas_kernels.accuracy import outside, relative_errors

DTYPES = ("float32", "bfloat16")
STEPS, STEP_LIMIT = 20, 1e-5  # tokens that are decoded, and how far float32 may be from float64

# library -> what it is for; none is needed to train on prepared data
OPTIONAL = {
    "pyarrow": "Parquet text",
    "zstandard": ".jsonl.zst text",
    "datasets": "hf: sources",
    "sentencepiece": ".model tokenizers",
    "tokenizers": ".json tokenizers",
    "safetensors": "gdn convert",
    "tensorboardX": "--run.tensorboard",
    "wandb": "--run.wandb",
}


def examine() -> dict[str, Any]:
    """Run every check: {"environment", "ops": [{"op", "impl", "refused", "case", "failures"}], "optional", "ok"}."""
    checks = [check for op in ops.names() for check in checks_of(op)]
    optional = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    ok = not any(check["failures"] for check in checks)
    return {"environment": environment(), "ops": checks, "optional": optional, "ok": ok}


def checks_of(op: str) -> Iterator[dict[str, Any]]:
    """Runs an op's quick cases with the implementation that "auto" takes here, against the op's float64 reference; of a
    recurrence also its decoding step."""
    suite = ops.module(op, "conformance")
    for case in suite.QUICK:
        for dtype in DTYPES:
            sized = replace(case, dtype=dtype)
            choice = suite.choice(sized)
            failures = suite.failures(sized, choice.impl)
            yield {
                "op": op,
                "impl": choice.impl,
                "refused": choice.reason,
                "case": f"{case.name}, {dtype}",
                "failures": failures,
            }
    if op in RECURRENCES:
        case = f"decoding, {STEPS} tokens, float32"
        yield {"op": op, "impl": "step", "refused": "", "case": case, "failures": decoding_failures(op)}


class _Carried(NamedTuple):
    """What `advance` reads of a cache."""

    state: jax.Array


def decoding_failures(op: str) -> list[str]:
    """`name error > limit` for outputs and final state of an op's step, token by token, beyond the limit of float32."""
    suite = ops.module(op, "conformance")
    case = replace(suite.QUICK[0], T=STEPS, documents=0.0, dtype="float32")
    inputs = suite.inputs(case)
    *arrays, state = (jnp.asarray(x, jnp.float32) for x in inputs[0])

    def step(state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_token = tuple(x[:, token, None] if x.ndim > 2 else x for x in arrays)  # others belong to no token
        compute = Compute(dtype=jnp.float32)
        o, state = advance(RECURRENCES[op], of_token, _Carried(state), compute=compute, segment_ids=None)
        return state, o[:, 0]

    state, o = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))(state)
    got = [np.asarray(x, np.float64) for x in (jnp.moveaxis(o, 0, 1), state)]
    want = suite.oracle(case, *inputs)
    names = suite.SUITE.results
    errors = relative_errors(dict(zip(names, got, strict=True)), {name: want[name] for name in names})
    return outside(errors, dict.fromkeys(names, STEP_LIMIT))


def described(found: dict[str, Any]) -> str:
    """What `examine` found, for a reader."""
    facts = [(name, _plain(value)) for name, value in found["environment"].items()]
    lines, chosen = ["Environment", aligned(facts), "", "Ops"], set()
    for op in found["ops"]:
        if op["impl"] != "step" and (key := (op["op"], op["impl"], op["refused"])) not in chosen:
            chosen.add(key)
            why = f" ({op['refused']})" if op["refused"] else ""
            lines.append(f"{op['op']}: auto takes {op['impl']}{why}")
        verdict = f"FAILED: {', '.join(op['failures'])}" if op["failures"] else "ok"
        lines.append(f"  {op['case']}: {verdict}")
    if "impl" in found:
        lines += ["", f"A training step of {found['id']} here", aligned(list(in_words(found["impl"]).items()))]
    installed = [(name, "yes" if there else "no", OPTIONAL[name]) for name, there in found["optional"].items()]
    lines += ["", "Optional libraries", aligned(installed), ""]
    lines.append("All checks passed." if found["ok"] else "Some checks FAILED: results here cannot be trusted.")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
