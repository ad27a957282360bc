"""The contenders of the gated delta rule's benchmark, ours and other libraries', as functions that a clock can call.

Frameworks load inside the functions: the process that starts the workers imports none and holds no device memory.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pallas_kernels.shapes import DeltaShape

Run = Callable[[int], float]  # so many calls back to back -> the milliseconds they took together
MIB = 1 << 20


class Peer(NamedTuple):
    """Another library: the module it is imported by, whose versions its numbers carry, what it needs set."""

    module: str
    distributions: tuple[str, ...]
    framework: Literal["jax", "torch"]
    environment: dict[str, str]


PEERS = {
    # fla hands K = V = 128 to flash_qla where that is installed, which is measured by itself
    "fla": Peer("fla", ("flash-linear-attention", "torch", "triton", "tilelang"), "torch", {"FLA_FLASH_QLA": "0"}),
    "flash_qla": Peer("flash_qla", ("flash-qla", "torch", "tilelang"), "torch", {}),
    "jla": Peer("jla", ("jax-linear-attention",), "jax", {}),
}


class Contender(NamedTuple):
    """One implementation at one shape, loaded in this process.

    implementation  what runs: for ours the impl that was resolved
    refused         why a faster one of the same library was not taken, or ""
    prepare         False: the forward; True: forward and gradients of q, k, v, g, beta
    peak            device memory in MiB that one call needs, inputs and results included; None when the device
                    does not say. Exact only while nothing larger ran in the process before.
    """

    device: str
    implementation: str
    refused: str
    prepare: Callable[[bool], Run]
    peak: Callable[[Run], float | None]


def load(name: str, shape: DeltaShape, seed: int) -> Contender:
    """An impl of ours or a peer. Inputs from `seed`: q, k normals of unit norm, v and do normal, in bf16;
    g = log_sigmoid(N(0, 1)) / 4 and beta = sigmoid(U(0, 1)) in fp32."""
    peer = PEERS.get(name)
    if peer and peer.framework == "torch":
        return _torch(name, shape, seed)
    return _jax(name, shape, seed)


def _jax(name: str, shape: DeltaShape, seed: int) -> Contender:
    import jax
    import jax.numpy as jnp

    token = (shape.batch, shape.tokens, shape.heads)

    def unit(key):
        x = jax.random.normal(key, (*token, shape.key_dim), jnp.float32)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(jnp.bfloat16)

    def normal(key):
        return jax.random.normal(key, (*token, shape.value_dim), jnp.float32).astype(jnp.bfloat16)

    def log_decay(key):
        return jax.nn.log_sigmoid(jax.random.normal(key, token, jnp.float32)) / 4

    def strength(key):
        return jax.nn.sigmoid(jax.random.uniform(key, token, jnp.float32))

    draws = (unit, unit, normal, log_decay, strength, normal)  # q, k, v, g, beta, do
    keys = list(jax.random.split(jax.random.key(seed), len(draws)))
    kinds = [jax.eval_shape(draw, key) for draw, key in zip(draws, keys, strict=True)]

    @functools.cache
    def inputs():
        return [jax.jit(draw)(key) for draw, key in zip(draws, keys, strict=True)]

    call, implementation, refused = (_jla if name == "jla" else _ours)(name, shape, kinds)

    def with_gradients(*arrays):
        o, pull = jax.vjp(call, *arrays[:-1])
        return o, pull(arrays[-1])  # o too: without it, a compiler may leave half of the forward out

    def prepare(backward: bool) -> Run:
        function, count = (with_gradients, 6) if backward else (call, 5)
        # compiled before the inputs exist: the buffers of XLA's autotuning then stay below the call's own peak
        compiled = jax.jit(function).lower(*kinds[:count]).compile()
        arguments = jax.block_until_ready(inputs()[:count])

        def run(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                result = compiled(*arguments)
            jax.block_until_ready(result)
            return (time.perf_counter() - start) * 1e3

        return run

    device = jax.devices()[0]

    def peak(run: Run) -> float | None:
        run(1)
        peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak_bytes is None else peak_bytes / MIB

    return Contender(device.device_kind, implementation, refused, prepare, peak)


def _ours(impl: str, shape: DeltaShape, kinds: list[Any]) -> tuple[Callable, str, str]:
    from pallas_kernels.gated_delta_rule import api

    choice = api.resolve(impl, key_dim=shape.key_dim, value_dim=shape.value_dim)

    def call(q, k, v, g, beta):
        return api.gated_delta_rule(q, k, v, g, beta, impl=choice.impl)[0]

    return call, choice.impl, choice.reason


def _jla(name: str, shape: DeltaShape, kinds: list[Any]) -> tuple[Callable, str, str]:
    import jax
    from jla.ops import linear_attention

    def call(impl, q, k, v, g, beta):
        return linear_attention("gated_deltanet", q, k, v, g=g, beta=beta, impl=impl)[0]

    try:  # its "auto" falls back without a word
        jax.eval_shape(functools.partial(call, "mosaic_gpu"), *kinds[:5])
    except ValueError as error:
        return functools.partial(call, "auto"), "without its kernels", str(error).splitlines()[0]
    return functools.partial(call, "mosaic_gpu"), name, ""


def _torch(name: str, shape: DeltaShape, seed: int) -> Contender:
    import torch

    if name == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    else:
        from flash_qla import chunk_gated_delta_rule

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    token = (shape.batch, shape.tokens, shape.heads)

    def normal(*sizes: int):
        return torch.randn(*sizes, generator=generator, device=device)

    q, k = (torch.nn.functional.normalize(normal(*token, shape.key_dim), dim=-1).bfloat16() for _ in range(2))
    v, do = (normal(*token, shape.value_dim).bfloat16() for _ in range(2))
    g = torch.nn.functional.logsigmoid(normal(*token)) / 4
    beta = torch.rand(*token, generator=generator, device=device).sigmoid()
    arrays = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def forward():
        with torch.no_grad():
            return chunk_gated_delta_rule(*arrays)[0]

    def with_gradients():
        o = chunk_gated_delta_rule(*arrays)[0]
        return o, torch.autograd.grad(o, arrays, do)

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

    return Contender(torch.cuda.get_device_name() if cuda else "cpu", name, "", prepare, peak)
