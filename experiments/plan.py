"""docs/plan-for-scale.md: what the 1.3B models would take on 8, 64 and 512 GPUs, predicted from what one and two took.

    python -m experiments.plan docs/plan-for-scale.md      rewrites the page

Nothing here was run on more than two GPUs. Every number follows from MEASURED, COMPILED and the formulas on the page.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from experiments import get
from experiments.report import parameters, piped

HOST = 8  # GPUs of a host, which share the parameters (run.fsdp)
ROWS, WINDOW = 8, 4096  # of the measured step, on each GPU
STEP_TOKENS = ROWS * WINDOW
BATCH = 128  # windows of a step in the paper's recipe, 524,288 tokens
TOKENS = 100e9  # of the paper's runs
NETWORK = 50e9  # bytes/s of each GPU to other hosts: one 400 Gb/s port for each, by the data sheet of such hosts
# Two H100s of one host against one (LOG.md, 2026-11-27): a step of gated-deltanet with FSDP 619 ms, without 577.
EXPOSED_BY_TWO = 0.619 - 0.577
OF = "gated-deltanet"
MEMORY_OF_TWO = 51.7  # GiB, the same entry, beside 57.2 of one: what the formula for memory is compared with
# `gdn show table3/gated-deltanet/1.3b --devices 8 --run.fsdp 8`: MB on each device a step of 16 micro-batches
COMPILED = {"all-gather": 94_154.5e6 / 16, "all-reduce": 88_834.4e6 / 16}
GIB = 2**30


class Measured(NamedTuple):
    """A training step of 8 x 4096 tokens on one GPU."""

    tokens_per_second: float
    device: str
    origin: str  # date, commit
    peak_gib: float | None  # None: not in LOG.md


MEASURED = {
    "retnet": Measured(59_000, "H100", "2026-11-28, 617f8ce", None),
    "hgrn2": Measured(60_080, "H200", "2026-11-30, c36cfca", 63.7),
    "mamba": Measured(51_253, "H200", "2026-11-30, c36cfca", 48.8),
    "mamba2": Measured(58_992, "H200", "2026-11-30, 26a543b", 61.4),
    "deltanet": Measured(60_600, "H100", "2026-11-27, before 330491e", None),
    "gated-deltanet": Measured(56_791, "H100", "2026-11-27, before 330491e", 57.2),
    "transformer": Measured(57_500, "H100", "2026-11-27, before 330491e", None),
    "samba": Measured(55_753, "H200", "2026-11-30, c36cfca", 47.3),
    "gated-deltanet-h1": Measured(59_901, "H100", "2026-11-27, before 330491e", 58.3),
    "gated-deltanet-h2": Measured(57_000, "H100", "2026-11-28, 617f8ce", None),
}


class Plan(NamedTuple):
    """A predicted step."""

    seconds: float
    tokens_per_second: float
    efficiency: float  # of as many single GPUs
    peak_gib: float | None
    host_bytes: float  # each GPU sends inside its host
    network_bytes: float  # each GPU sends to other hosts


def plan(model: str, gpus: int, windows: int) -> Plan:
    """A step of `windows` windows on `gpus` GPUs, a multiple of HOST, of which each takes windows / gpus.

    Formulas: docs/plan-for-scale.md.
    """
    measured, size = MEASURED[model], parameters(get(f"table3/{model}/1.3b").model)
    rows, hosts, relative = windows / gpus, gpus / HOST, size / parameters(get(f"table3/{OF}/1.3b").model)
    passes = max(1, rows / ROWS)  # micro-batches, each of which gathers and sums again
    inside = (HOST - 1) / HOST
    compute = rows * WINDOW / measured.tokens_per_second
    exposed = passes * EXPOSED_BY_TWO / (1 / 2) * inside * relative
    network = passes * 2 * (hosts - 1) / hosts * 4 * size / HOST
    seconds = compute + exposed + network / NETWORK
    rate = windows * WINDOW / seconds
    saved = 12 * size * inside / GIB
    return Plan(
        seconds,
        rate,
        rate / (gpus * measured.tokens_per_second),
        None if measured.peak_gib is None else measured.peak_gib - saved,
        passes * sum(COMPILED.values()) * relative * inside,
        network,
    )


POINTS = ((8, BATCH), (64, BATCH), (64, 64 * ROWS), (512, 512 * ROWS))


def _of_one() -> str:
    """The model of the measured pair, with everything that is predicted of it."""
    rows = [
        ("GPUs", "windows a step", "tokens/s", "of N single GPUs", "step, ms", "days for 100B tokens", "GiB a GPU",
         "GB sent in the host", "GB sent to other hosts"),
        ("--:",) * 9,
    ]  # fmt: skip
    for gpus, windows in POINTS:
        one = plan(OF, gpus, windows)
        memory, days = f"{one.peak_gib:.1f}", f"{TOKENS / one.tokens_per_second / 86400:.2f}"
        sent = (f"{one.host_bytes / 1e9:.1f}", f"{one.network_bytes / 1e9:.2f}")
        step = (f"{one.tokens_per_second:,.0f}", f"{one.efficiency:.0%}", f"{1e3 * one.seconds:,.0f}")
        rows.append((str(gpus), f"{windows:,}", *step, days, memory, *sent))
    return piped(rows)


def _of_all() -> str:
    """What was measured of every model, and its rates and memory as predicted."""
    asked = [f"{gpus} GPUs, {windows:,} windows" for gpus, windows in POINTS]
    rows = [
        ("model", "measured on one, tokens/s", "GiB", "device, date, commit", *(f"predicted: {one}" for one in asked),
         "predicted: GiB on 8"),
        ("---", "--:", "--:", "---", *("--:",) * 5),
    ]  # fmt: skip
    for model, one in MEASURED.items():
        found = [plan(model, *point) for point in POINTS]
        memory = ("not known",) * 2 if one.peak_gib is None else (str(one.peak_gib), f"{found[0].peak_gib:.1f}")
        rates = [f"{1e-3 * each.tokens_per_second:,.0f}K" for each in found]
        origin = f"{one.device}, {one.origin}"
        rows.append((model, f"{one.tokens_per_second:,.0f}", memory[0], origin, *rates, memory[1]))
    return piped(rows)


def page() -> str:
    """The text of docs/plan-for-scale.md."""
    size = parameters(get(f"table3/{OF}/1.3b").model)
    strong, weak, most = (plan(OF, *point) for point in POINTS[1:])
    by_two = MEASURED[OF].peak_gib - 12 * size / 2 / GIB
    gathered, summed = (f"{moved / 1e9:.2f} GB" for moved in COMPILED.values())
    alone, rest = f"{strong.efficiency:.0%}", f"{weak.efficiency:.0%}"
    work = 1e3 * 2 * WINDOW / MEASURED[OF].tokens_per_second
    share, times, large = f"{512 * STEP_TOKENS / 1e6:.1f}M", 512 * ROWS // BATCH, f"{512 * ROWS:,}"
    wire = 1e3 * most.network_bytes / NETWORK
    return f"""# A plan for scale

Written by `python -m experiments.plan docs/plan-for-scale.md`; tests/test_plan.py keeps it current. **What is called
predicted was not run**: this library has trained on one and on two GPUs of one host, on nothing larger.

## Predicted: {OF} at 1.3B, {HOST} GPUs a host, parameters shared inside a host, copies across hosts

{_of_one()}

{BATCH} windows of {WINDOW} tokens are the paper's batch; 512 GPUs cannot split it, which is refused. In the
last two rows each GPU keeps the {ROWS} windows of the measured step: tokens/s of a larger batch, which is
another recipe. GB are what each GPU sends in a step.

## All ten at 1.3B

One GPU, {ROWS} x {WINDOW} tokens, jax 0.11.2, AdamW included (README.md, LOG.md), and the same points:

{_of_all()}

## From what

- Two H100s of one host, {OF} (LOG.md, 2026-11-27): 619 ms with FSDP, 577 without:
  {1e3 * EXPOSED_BY_TWO:.0f} ms that nothing hides.
- Compiled, by `gdn show table3/{OF}/1.3b --devices {HOST} --run.fsdp {HOST}`, of each of its
  16 micro-batches: {gathered} gathered and {summed} summed on each device, in a CPU's program;
  a GPU's turns sums into reduce-scatters.

## By which formulas: N GPUs, n = {HOST} of a host, h = N / n hosts, B windows, P parameters

- passes = max(1, B / N / {ROWS}): micro-batches, each of which gathers and sums again.
- compute = B / N x {WINDOW} / (measured tokens/s): as if a GPU with fewer windows lost nothing, which
  is optimistic.
- exposed = passes x {1e3 * EXPOSED_BY_TWO:.0f} ms / (1/2) x (n - 1) / n x P / P({OF}): a ring's share of
  the bytes, as much of it hidden on {HOST} GPUs as on 2.
- sent in the host = passes x (gathered + summed) x (n - 1) / n x P / P({OF}).
- sent to other hosts = passes x 2 (h - 1) / h x 4 P / n: a ring's all-reduce of each GPU's part of the
  fp32 gradients.
- step = compute + exposed + sent to other hosts / {NETWORK / 1e9:.0f} GB/s: a 400 Gb/s port for each GPU, by the
  data sheet; none of it hidden, which is pessimistic.
- memory = measured - 12 P (n - 1) / n bytes, fp32 parameters and two moments; of two GPUs this says
  {by_two:.1f} GiB, measured were {MEMORY_OF_TWO}. Two windows a GPU take less.

## What breaks first

1. **512 GPUs with the paper's batch**: {BATCH} windows. {large} windows ({share} tokens, {times} times the
   paper's) are another recipe; splitting windows (context parallelism) is the other way, and not in
   this plan.
2. **64 GPUs with the paper's batch**: two windows a GPU are {work:.0f} ms of compute beside
   {1e3 * strong.seconds - work:.0f} ms that nothing hides: {alone} of 64 single GPUs, {rest} with eight windows each.
3. **Micro-batches**: each repeats gathers and sums, two at {HOST} GPUs; summing once a step would save
   half of the sums.
4. **The network at 512**: {wire:.0f} ms of {1e3 * most.seconds:.0f} with a port for each GPU,
   {8 * wire:.0f} ms with one port for a host's eight. Gradients summed in bf16 would halve it.
5. **Faults**: one process of 512 that fails ends all. A checkpoint is {12 * size / 1e9:.1f} GB, of which each
   GPU of one host writes {12 * size / HOST / 1e9:.1f} GB.
"""


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/plan-for-scale.md")
    path.write_text(page())
    print(f"Wrote {path}.")
