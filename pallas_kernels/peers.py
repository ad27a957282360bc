"""A benchmark's contenders, ours and other libraries', as functions that a clock can call.

Frameworks load inside the functions: the process that starts the workers imports none and holds no device memory. Which
libraries an op is compared with, and how they are called, is in the op's benchmark.py.
"""

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

Run = Callable[[int], float]  # so many calls back to back -> the milliseconds they took together
MIB = 1 << 20


class Library(NamedTuple):
    """Another library: the module it is imported by, whose versions its numbers carry, what it needs set."""

    module: str
    distributions: tuple[str, ...]
    framework: Literal["jax", "torch"]
    environment: dict[str, str]


# fla hands K = V = 128 to flash_qla where that is installed, which is measured by itself
FLA = Library("fla", ("flash-linear-attention", "torch", "triton", "tilelang"), "torch", {"FLA_FLASH_QLA": "0"})
FLASH_QLA = Library("flash_qla", ("flash-qla", "torch", "tilelang"), "torch", {})
JLA = Library("jla", ("jax-linear-attention",), "jax", {})
MAMBA_SSM = Library("mamba_ssm", ("mamba-ssm", "torch", "triton"), "torch", {})
CAUSAL_CONV1D = Library("causal_conv1d", ("causal-conv1d", "torch"), "torch", {})
LIGER = Library("liger_kernel", ("liger-kernel", "torch", "triton"), "torch", {})


class Loaded(NamedTuple):
    """A peer's function of the inputs by name, what runs in it ("": the peer's name), why nothing faster ("")."""

    call: Callable[..., Any]
    implementation: str = ""
    refused: str = ""


class Peer(NamedTuple):
    """A library and what loads its function: load(inputs by name, for their shapes and dtypes) -> Loaded."""

    library: Library
    load: Callable[[dict[str, Any]], Loaded]


def with_kernels(call: Callable[..., Any], inputs: dict[str, Any]) -> Loaded:
    """call(impl, **inputs) of jla with its kernels, or else without and why: its "auto" falls back without a word."""
    import jax

    try:
        jax.eval_shape(functools.partial(call, "mosaic_gpu"), **inputs)
    except ValueError as error:
        return Loaded(functools.partial(call, "auto"), "without its kernels", str(error).splitlines()[0])
    return Loaded(functools.partial(call, "mosaic_gpu"))


class Contender(NamedTuple):
    """One implementation at one shape, loaded in this process.

    implementation  what runs: for ours the impl that was resolved
    refused         why a faster one of the same library was not taken, or ""
    prepare         False: the forward; True: forward and gradients
    peak            device memory in MiB that one call needs, inputs and results included; None when the device
                    does not say. Exact only while nothing larger ran in the process before.
    """

    device: str
    implementation: str
    refused: str
    prepare: Callable[[bool], Run]
    peak: Callable[[Run], float | None]


def load(name: str, benchmark: ModuleType, op: str, shape: Any, seed: int) -> Contender:
    """An impl of ours or a peer, with the inputs that the op's benchmark draws from `seed`."""
    import numpy as np

    random = np.random.default_rng(seed)
    inputs = benchmark.inputs(shape, random)
    peer = benchmark.PEERS.get(name)
    contender = _torch if peer and peer.library.framework == "torch" else _jax
    return contender(name, benchmark, op, inputs, random)


def _jax(name: str, benchmark: ModuleType, op: str, inputs: dict[str, Any], random: Any) -> Contender:
    import jax
    import jax.numpy as jnp

    dtypes = {name: jnp.bfloat16 if name in benchmark.BF16 else x.dtype for name, x in inputs.items()}
    kinds = {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in inputs.items()}
    loaded = benchmark.PEERS[name].load(kinds) if name in benchmark.PEERS else _ours(name, benchmark, op, kinds)

    def forward(given, cotangent):
        return loaded.call(**given)

    def with_gradients(given, cotangent):
        chosen = {name: given[name] for name in benchmark.GRADIENTS}
        o, pull = jax.vjp(lambda chosen: loaded.call(**given | chosen), chosen)
        return o, pull(cotangent)  # o too: without it, a compiler may leave half of the forward out

    o = jax.eval_shape(lambda given: loaded.call(**given), kinds)

    @functools.cache
    def arguments():
        cotangent = jnp.asarray(random.standard_normal(o.shape, "float32"), o.dtype)
        return {name: jnp.asarray(x, dtypes[name]) for name, x in inputs.items()}, cotangent

    def prepare(backward: bool) -> Run:
        # compiled before the inputs exist: the buffers of XLA's autotuning then stay below the call's own peak
        compiled = jax.jit(with_gradients if backward else forward).lower(kinds, o).compile()
        given, cotangent = arguments()

        def run(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                result = compiled(given, cotangent)
            jax.block_until_ready(result)
            return (time.perf_counter() - start) * 1e3

        return run

    device = jax.devices()[0]

    def peak(run: Run) -> float | None:
        run(1)
        peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak_bytes is None else peak_bytes / MIB

    return Contender(device.device_kind, loaded.implementation or name, loaded.refused, prepare, peak)


def _ours(impl: str, benchmark: ModuleType, op: str, kinds: dict[str, Any]) -> Loaded:
    import jax

    from pallas_kernels import dispatch

    with dispatch.record(silent=True) as choices:
        jax.eval_shape(functools.partial(benchmark.ours, impl), **kinds)
    choice = next(choice for choice in choices if choice.op == op)
    return Loaded(functools.partial(benchmark.ours, choice.impl), choice.impl, choice.reason)


def _torch(name: str, benchmark: ModuleType, op: str, inputs: dict[str, Any], random: Any) -> Contender:
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def put(x, rounded):
        x = torch.from_numpy(x).to(device)
        x = x.long() if x.dtype == torch.int32 else x
        return x.bfloat16() if rounded else x

    given = {name: put(x, name in benchmark.BF16) for name, x in inputs.items()}
    chosen = [given[name].requires_grad_() for name in benchmark.GRADIENTS]
    loaded = benchmark.PEERS[name].load(given)

    def forward():
        with torch.no_grad():
            return loaded.call(**given)

    @functools.cache
    def cotangent():
        o = forward()
        return torch.as_tensor(random.standard_normal(tuple(o.shape), "float32")).to(o)

    def with_gradients():
        o = loaded.call(**given)
        return o, torch.autograd.grad(o, chosen, cotangent())

    def prepare(backward: bool) -> Run:
        call = with_gradients if backward else forward

        def run_on_cuda(calls: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        def run_on_cpu(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) * 1e3

        return run_on_cuda if cuda else run_on_cpu

    def peak(run: Run) -> float | None:
        if not cuda:
            return None
        torch.cuda.reset_peak_memory_stats()  # tuning in the calls before needed its own buffers
        run(1)
        return torch.cuda.max_memory_allocated() / MIB

    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return Contender(kind, loaded.implementation or name, loaded.refused, prepare, peak)
