"""Profile of one training step: device time of each family of kernels, beside the least time the device allows.

A family's floor is max(FLOPs / peak FLOP/s, bytes / peak bytes/s) with what the definition needs: FLOPs as in
gdn_jax/flops.py, three times the forward; bytes of every array read once and written once, in bf16 where it is one.
What a remat policy computes again is in no floor. An op that ran without a kernel of ours has its time and its floor
within products and elementwise.
"""

import collections
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.report import piped
from gdn_jax.config import Model
from pallas_kernels.roofline import Peak

PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, OTHER = "products", "softmax attention", "elementwise", "copies", "other"
# family -> what the names of its kernels contain, first match; our own kernels are known by the step's program
FAMILIES = {
    ATTENTION: r"fmha|sdpa|flash|cudnn",
    PRODUCTS: r"gemm|nvjet|cutlass|xmma|splitk|_dot|\bdot",
    COPIES: r"memcpy|memset|copy|transpose|slice|concatenate|(^|_)pad",
    ELEMENTWISE: r"fusion|softmax|reduce|convert|wrapped|multiply|add|select|iota|broadcast|scatter|gather|rng",
}
LARGEST = 5  # kernels named for each family

Names = Mapping[str, str]  # kernel of ours -> op


# --- the trace ---


def read_trace(directory: Path) -> list[dict[str, Any]]:
    """The events of the trace that jax.profiler left in `directory`."""
    (path,) = directory.glob("**/*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def device_events(events: Iterable[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(name, start, duration in microseconds) of what ran on the streams of GPUs; [] on a CPU, which has no such line.

    The other lines of a GPU ("XLA Ops", "Steps", ...) show the same time once more.
    """
    events = list(events)
    named: dict[str, dict] = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event["name"] in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    devices = {pid for (pid, _), name in named["process_name"].items() if "GPU" in name}
    streams = {
        key for key, name in named["thread_name"].items() if key[0] in devices and name.lower().startswith("stream")
    }
    return [
        (event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams
    ]


def family(kernel: str, ours: Names) -> str:
    """The family of a kernel by its name."""
    for name, op in ours.items():
        if re.match(rf"{re.escape(name)}(\W|_+\d|$)", kernel):
            return op
    return next((one for one, words in FAMILIES.items() if re.search(words, kernel, re.IGNORECASE)), OTHER)


def kernels_of(program: Any) -> dict[str, str]:
    """Name of every Pallas kernel in a jaxpr -> its op, the folder of pallas_kernels/ that calls it; one that several
    ops share names them all."""
    found: dict[str, dict[str, None]] = {}

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                files = [frame.file_name for frame in equation.source_info.traceback.frames]
                ops = [match[1] for name in files if (match := re.search(r"/pallas_kernels/(\w+)/[^/]+$", name))]
                found.setdefault(_name(equation.params), {})[ops[0] if ops else OTHER] = None
                continue
            for value in equation.params.values():
                for sub in value if isinstance(value, (tuple, list)) else [value]:
                    sub = getattr(sub, "jaxpr", sub)
                    if hasattr(sub, "eqns"):
                        walk(sub)

    walk(getattr(program, "jaxpr", program))
    return {name: " / ".join(ops) for name, ops in found.items()}


def _name(params: Mapping[str, Any]) -> str:
    return params["name_and_src_info"].name if "name_and_src_info" in params else params["name"]


# --- floors ---

# mixer -> (its op, channels in bf16 that the op reads a token, channels it writes, numbers in fp32 that it reads,
#           channels of the convolution before it, arrays of the norm after it: 2 with a gate, 1 without, 0 for none)
MIXERS = {
    "gated_deltanet": lambda cfg: _delta_rule(cfg.gated_deltanet, cfg.gated_deltanet.num_value_heads, 2, 2),
    "deltanet": lambda cfg: _delta_rule(cfg.deltanet, cfg.deltanet.heads, 1, 1),
    "retnet": lambda cfg: (
        "linear_attention", cfg.retnet.heads * (2 * cfg.retnet.key_dim + cfg.retnet.value_dim),
        cfg.retnet.heads * cfg.retnet.value_dim, 0, 0, 2,
    ),
    "hgrn2": lambda cfg: ("linear_attention", 3 * cfg.d_model, cfg.d_model, cfg.d_model, 0, 1),
    "mamba": lambda cfg: (
        "selective_scan", 3 * cfg.mamba.inner + 2 * cfg.mamba.state, cfg.mamba.inner, 0, cfg.mamba.inner, 0,
    ),
    "mamba2": lambda cfg: _mamba2(cfg.mamba2),
}  # fmt: skip


def _delta_rule(mixer: Any, value_heads: int, gates: int, norm: int) -> tuple[str, int, int, int, int, int]:
    keys, values = 2 * mixer.heads * mixer.key_dim, value_heads * mixer.value_dim
    conv = keys + values if mixer.conv_width else 0
    return "gated_delta_rule", keys + values, values, gates * value_heads, conv, norm


def _mamba2(mixer: Any) -> tuple[str, int, int, int, int, int]:
    inner, shared = mixer.heads * mixer.head_dim, 2 * mixer.groups * mixer.state
    return "linear_attention", inner + shared, inner, mixer.heads, inner + shared, 2


def floors(cfg: Model, *, seq_len: int, batch_size: int, ours: Names) -> dict[str, dict[str, float]]:
    """family -> {"flops", "bytes"} of a step; ops without a kernel in `ours` are added to products and elementwise.

    An op reads its arguments and writes its results, and in the backward reads arguments and the results' gradients and
    writes the arguments' gradients: 3 in + 2 out, for a map of one array to one of its size 5 arrays.
    """
    from gdn_jax.flops import MIXER_FLOPS, matmul_parameters
    from gdn_jax.model import count_parameters

    tokens, kernels = seq_len * batch_size, {op for name in ours.values() for op in name.split(" / ")}
    found = collections.defaultdict(lambda: {"flops": 0.0, "bytes": 0.0})

    def add(name: str, flops: float = 0.0, moved: float = 0.0) -> None:
        known = name in (PRODUCTS, ATTENTION, ELEMENTWISE) or name in kernels
        found[name if known else PRODUCTS]["flops"] += flops
        found[name if known else ELEMENTWISE]["bytes"] += moved

    parameters, layers, D = count_parameters(cfg), cfg.layers, cfg.d_model
    add(PRODUCTS, 6.0 * matmul_parameters(cfg) * tokens)
    # AdamW reads parameter, gradient and both moments and writes three of them; the norm reads the gradient once more;
    # the cast to bf16 reads 4 bytes and writes 2
    add(ELEMENTWISE, moved=parameters * (7 * 4 + 4 + 6))
    norms, residuals = layers * (2 if cfg.d_ff else 1) + 1, layers * (2 if cfg.d_ff else 1)
    add(ELEMENTWISE, moved=2 * tokens * 5 * D * norms)
    add(ELEMENTWISE, moved=2 * tokens * 5 * D * residuals)  # two in, one out; backward: two gradients in, their sum out
    add(ELEMENTWISE, moved=2 * tokens * 8 * cfg.d_ff * layers)  # SiLU(gate) * up: 3 arrays, then 5
    for mixer in cfg.pattern:
        flops = 3.0 * MIXER_FLOPS[mixer](cfg, seq_len) * tokens * cfg.repeats
        if mixer not in MIXERS:
            add(ATTENTION, flops, 2 * tokens * cfg.repeats * D * (3 * 3 + 2))
            continue
        op, read, written, gates, conv, norm = MIXERS[mixer](cfg)
        each = tokens * cfg.repeats
        add(op, flops, each * (2 * (3 * read + 2 * written) + 4 * 3 * gates))
        add("short_conv", moved=each * 2 * 5 * conv)
        add("gated_norm" if norm == 2 else ELEMENTWISE, moved=each * 2 * {0: 0, 1: 5, 2: 8}[norm] * written)
    return {name: found[name] for name in found if any(found[name].values())}


# --- the profile ---


def profile(
    events: list[tuple[str, float, float]], ours: Names, needs: Mapping[str, Mapping[str, float]], peak: Peak | None
) -> dict[str, Any] | None:
    """A step's device events by family, or None where there are none.

    {"busy_ms", "idle_ms", "families": {name: {"ms", "share" of busy, "floor_ms", "kernels": the largest}}}; idle is
    what no stream worked of the time from the first event to the last.
    """
    if not events:
        return None
    kernels: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for name, _, duration in events:
        kernels[family(name, ours)][name].append(duration / 1e3)
    end = first = min(start for _, start, _ in events)
    worked = 0.0
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        worked += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    busy = sum(duration for _, _, duration in events) / 1e3
    families = {}
    total = {name: sum(map(sum, each.values())) for name, each in kernels.items()}
    for name in sorted(total, key=lambda name: -total[name]) + sorted(needs.keys() - total.keys()):
        ms = total.get(name, 0.0)
        largest = sorted(kernels[name].items(), key=lambda item: -sum(item[1]))[:LARGEST]
        need = needs.get(name, {"flops": 0.0, "bytes": 0.0})
        families[name] = {
            "ms": ms,
            "share": ms / busy if busy else 0.0,
            "floor_ms": None if peak is None else peak.least_ms(need["flops"], need["bytes"]),
            "kernels": [{"name": kernel, "ms": sum(times), "calls": len(times)} for kernel, times in largest],
        }
    return {"busy_ms": busy, "idle_ms": (end - first - worked) / 1e3, "families": families}


def markdown(found: Mapping[str, Any]) -> str:
    """A profile as a table."""
    lines = [("family", "ms", "of busy", "floor ms", "largest kernels"), ("---", "--:", "--:", "--:", "---")]
    for name, one in found["families"].items():
        floor = "unknown" if one["floor_ms"] is None else f"{one['floor_ms']:.1f}"
        largest = ", ".join(f"{k['name'][:40]} x{k['calls']} {k['ms']:.1f}" for k in one["kernels"][:2])
        lines.append((name, f"{one['ms']:.1f}", f"{one['share']:.0%}", floor, largest or "none"))
    lines.append(("busy", f"{found['busy_ms']:.1f}", "100%", "", f"idle {found['idle_ms']:.1f}"))
    return piped(lines)
