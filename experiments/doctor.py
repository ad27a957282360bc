"""Checks this machine: versions, devices, each op against its float64 reference, and what `auto` picks."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from experiments.report import aligned
from gdn_jax.implementations import in_words
from gdn_jax.metrics import environment
from pallas_kernels import ops

DTYPES = ("float32", "bfloat16")

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
    """Runs an op's quick cases with the implementation that "auto" takes here, against the op's float64 reference."""
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
