"""What `gdn bench` times: real models' shapes, inputs, other libraries, FLOPs and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call; `decays` log decays a value head: 1, or K of them."""

    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    decays: int


WRITTEN = "BxT,H,Hv,K,V,G"  # how a Shape is written out
SHAPES = {
    "retnet-1.3b": Shape(8, 4096, 8, 8, 256, 512, 1),
    "mamba2-1.3b": Shape(8, 4096, 1, 64, 128, 64, 1),
    "head-128": Shape(8, 4096, 16, 16, 128, 128, 1),
    "hgrn2-1.3b": Shape(8, 4096, 16, 16, 128, 128, 128),
}
BF16 = ("q", "k", "v")  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("q", "k", "v", "g")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """Normal q, k / sqrt(K) and v, g = log_sigmoid(N(0, 1)) / 4; fp32 arrays of numpy. ValueError for other decays."""
    import numpy as np

    if shape.decays not in (1, shape.key_dim):
        raise ValueError(f"G is {shape.decays}; a head has 1 decay or K = {shape.key_dim} of them.")
    token = (shape.batch, shape.tokens)
    normal = lambda *sizes: random.standard_normal((*token, *sizes), "float32")  # noqa: E731
    key = (shape.heads, shape.key_dim)
    decays = (shape.value_heads,) if shape.decays == 1 else (shape.value_heads, shape.key_dim)
    return {
        "q": normal(*key),
        "k": normal(*key) / np.float32(shape.key_dim**0.5),
        "v": normal(shape.value_heads, shape.value_dim),
        "g": -np.log1p(np.exp(-normal(*decays))) / 4,
    }


def ours(impl, q, k, v, g):
    from pallas_kernels.linear_attention import linear_attention

    return linear_attention(q, k, v, g, impl=impl)[0]


def _fla(inputs: dict[str, Any]) -> Loaded:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    op = chunk_simple_gla if inputs["g"].ndim == 3 else chunk_gla
    heads, value_heads = inputs["q"].shape[2], inputs["v"].shape[2]

    def call(q, k, v, g):  # of as many key heads as value heads
        q, k = (x.repeat_interleave(value_heads // heads, 2) if value_heads > heads else x for x in (q, k))
        return op(q, k, v, g=g)[0]

    return Loaded(call)


def _jla(inputs: dict[str, Any]) -> Loaded:
    import jax.numpy as jnp
    from jla.ops import linear_attention

    kind = "simple_gla" if inputs["g"].ndim == 3 else "gla"
    group = inputs["v"].shape[2] // inputs["q"].shape[2]

    def call(impl, q, k, v, g):  # of as many key heads as value heads
        q, k = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (q, k))
        return linear_attention(kind, q, k, v, g=g, impl=impl)[0]

    return peers.with_kernels(call, inputs)


def _mamba_ssm(inputs: dict[str, Any]) -> Loaded:
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if inputs["g"].ndim != 3:
        raise ValueError("mamba_ssm has one decay a head, not one a key channel.")
    rates = -torch.ones(inputs["v"].shape[2], device=inputs["v"].device)

    def call(q, k, v, g):  # the same work with another number: its decay exp(dt A) comes with a factor dt of v
        return mamba_chunk_scan_combined(v, -g, rates, k, q, chunk_size=256)

    return Loaded(call)


PEERS = {
    "fla": Peer(peers.FLA, _fla), "jla": Peer(peers.JLA, _jla), "mamba_ssm": Peer(peers.MAMBA_SSM, _mamba_ssm),
}  # fmt: skip


def cost(shape: Shape) -> dict[str, Cost]:
    """Per token and value head, C = 64 tokens at once; bytes of q and k per key head, G decays in fp32:

    forward   2 2KV + 2CK + 2CV FLOPs,     4K; 4V + 4G bytes   (q, k; v, o in bf16, g)
    backward  5 2KV + 3 2CK + 2 2CV FLOPs, 8K; 6V + 8G bytes   (states run again; q, k, dq, dk; v, do, dv, g, dg)
    """
    K, V, C = shape.key_dim, shape.value_dim, 64
    tokens = shape.batch * shape.tokens
    count = tokens * shape.value_heads
    moved = {
        phase: tokens * shape.heads * key * K + count * (value * V + decay * shape.decays)
        for phase, key, value, decay in (("forward", 4, 4, 4), ("backward", 8, 6, 8))
    }
    return {
        "forward": Cost(count * (2 * 2 * K * V + 2 * C * K + 2 * C * V), moved["forward"]),
        "backward": Cost(count * (5 * 2 * K * V + 3 * 2 * C * K + 2 * 2 * C * V), moved["backward"]),
    }
