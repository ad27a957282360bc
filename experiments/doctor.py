"""Whether this machine computes what it should: versions, devices, each op against its oracle, what auto picks."""

import importlib.util
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.report import aligned
from gdn_jax.implementations import in_words
from gdn_jax.metrics import environment
from pallas_kernels import gated_norm, linear_attention, linear_cross_entropy, selective_scan, short_conv
from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_delta_rule import api, conformance
from pallas_kernels.gated_norm import conformance as gated_norm_conformance
from pallas_kernels.linear_attention import conformance as linear_attention_conformance
from pallas_kernels.selective_scan import conformance as selective_scan_conformance
from pallas_kernels.short_conv import conformance as short_conv_conformance

DELTA_CASES = ("resets strewn in", "beta=1", "group value")  # two shapes, so seconds to compile
DELTA_SIZE = {"K": 128, "V": 128}  # the size that most devices have kernels for
# op -> its conformance suite, which implementation auto picks, and the cases to run
OTHERS = {
    "linear_attention": (
        linear_attention_conformance, linear_attention.resolve, ("group value", "channels, group value"),
    ),
    "selective_scan": (selective_scan_conformance, selective_scan.resolve, ("documents",)),
    "short_conv": (short_conv_conformance, short_conv.resolve, ("documents",)),
    "gated_norm": (gated_norm_conformance, gated_norm.resolve, ("gate after", "gate first")),
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
HEAD_LIMIT = 1e-5  # relative error of the fp32 head loss and its gradients

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
    ops = [*_gated_delta_rule(), *_other_ops(), *_linear_cross_entropy()]
    optional = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    ok = not any(op["failures"] for op in ops)
    return {"environment": environment(), "ops": ops, "optional": optional, "ok": ok}


def _gated_delta_rule() -> list[dict[str, Any]]:
    found = []
    for case in (replace(case, **DELTA_SIZE) for case in conformance.CASES if case.name in DELTA_CASES):
        for dtype in DTYPES:
            choice = api.resolve("auto", key_dim=case.K, value_dim=case.V, dtype=jnp.dtype(dtype))
            failures = conformance.failures(replace(case, dtype=dtype), choice.impl)
            found.append(_entry(choice, f"{case.name}, {dtype}", failures))
    return found


def _other_ops() -> list[dict[str, Any]]:
    found = []
    for suite, resolve, names in OTHERS.values():
        choice = resolve("auto")
        for case in (case for case in suite.CASES if case.name in names):
            for dtype in DTYPES:
                failures = suite.failures(replace(case, dtype=dtype), choice.impl)
                found.append(_entry(choice, f"{case.name}, {dtype}", failures))
    return found


def _linear_cross_entropy() -> list[dict[str, Any]]:
    """Value and gradients of the chunked head against the one that makes all logits, in float64 and fp32."""
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((2, 70, 32)), random.standard_normal((32, 320)) / 32**0.5
    targets, weights = random.integers(0, 320, (2, 70)), random.uniform(size=(2, 70))

    def run(impl: str, dtype: Any) -> list[np.ndarray]:
        arrays = [jnp.asarray(value, dtype) for value in (x, kernel, weights)]

        def loss(x, kernel, weights):
            return linear_cross_entropy.linear_cross_entropy(
                x, kernel, jnp.asarray(targets), weights, chunk=32, impl=impl
            )

        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
        return [np.asarray(result, np.float64) for result in (value, *gradients)]

    got = run("chunked", jnp.float32)
    with jax.enable_x64(True):
        want = run("reference", jnp.float64)
    errors = [np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in zip(got, want, strict=True)]
    names = ("loss", "dx", "dkernel", "dweights")
    failures = [
        f"{name} {error:.1e} > {HEAD_LIMIT:.1e}"
        for name, error in zip(names, errors, strict=True)
        if not error <= HEAD_LIMIT
    ]
    return [_entry(linear_cross_entropy.resolve("auto"), "70 tokens, float32", failures)]


def _entry(choice: Choice, case: str, failures: list[str]) -> dict[str, Any]:
    return {"op": choice.op, "impl": choice.impl, "refused": choice.reason, "case": case, "failures": failures}


def described(found: dict[str, Any]) -> str:
    """What `examine` found, for a reader."""
    facts = [(name, _plain(value)) for name, value in found["environment"].items()]
    lines, chosen = ["Environment", aligned(facts), "", "Ops"], set()
    for op in found["ops"]:
        if (key := (op["op"], op["impl"], op["refused"])) not in chosen:
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
