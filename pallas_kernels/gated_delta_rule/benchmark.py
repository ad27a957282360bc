"""What `gdn bench` and `gdn tune` time: real models' shapes, inputs, other libraries, FLOPs and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call, with as many value heads as key heads."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int


WRITTEN = "BxT,H,K,V"  # how a Shape is written out
SHAPES = {
    "fla-1.3b": Shape(8, 4096, 6, 256, 512),
    "fla-1.3b-16k": Shape(2, 16384, 6, 256, 512),
    "released-1.3b": Shape(8, 4096, 9, 200, 400),
    "released-h1-1.3b": Shape(8, 4096, 9, 192, 384),
    "released-0.4b": Shape(8, 4096, 9, 128, 256),
    "head-128": Shape(8, 4096, 16, 128, 128),
    "head-128-16k": Shape(2, 16384, 16, 128, 128),
    "head-128-64k": Shape(1, 65536, 8, 128, 128),
}
BF16 = ("q", "k", "v")  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("q", "k", "v", "g", "beta")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """q and k of unit norm, normal v, g = log_sigmoid(N(0, 1)) / 4, beta = sigmoid(U(0, 1)); fp32 arrays of numpy."""
    import numpy as np

    token = (shape.batch, shape.tokens, shape.heads)
    normal = lambda *sizes: random.standard_normal((*token, *sizes), "float32")  # noqa: E731
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return {
        "q": unit(normal(shape.key_dim)),
        "k": unit(normal(shape.key_dim)),
        "v": normal(shape.value_dim),
        "g": -np.log1p(np.exp(-normal())) / 4,
        "beta": 1 / (1 + np.exp(-random.uniform(size=token).astype("float32"))),
    }


def ours(impl, q, k, v, g, beta):
    from pallas_kernels.gated_delta_rule import gated_delta_rule

    return gated_delta_rule(q, k, v, g, beta, impl=impl)[0]


def _fla(inputs: dict[str, Any]) -> Loaded:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return Loaded(lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0])


def _flash_qla(inputs: dict[str, Any]) -> Loaded:
    from flash_qla import chunk_gated_delta_rule

    return Loaded(lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0])


def _jla(inputs: dict[str, Any]) -> Loaded:
    from jla.ops import linear_attention

    def call(impl, q, k, v, g, beta):
        return linear_attention("gated_deltanet", q, k, v, g=g, beta=beta, impl=impl)[0]

    return peers.with_kernels(call, inputs)


PEERS = {
    "fla": Peer(peers.FLA, _fla), "flash_qla": Peer(peers.FLASH_QLA, _flash_qla), "jla": Peer(peers.JLA, _jla),
}  # fmt: skip


def cost(shape: Shape) -> dict[str, Cost]:
    """Per token and head, C = 64 tokens solved at once:

    forward   3 2KV + 2 2CK + 2 2CV FLOPs,   4K + 4V + 8 bytes   (q, k, v, o in bf16, g, beta in fp32)
    backward  8 2KV + 6 2CK + 5 2CV FLOPs,   8K + 6V + 24 bytes  (states run again; q, k, v, do, dq, dk, dv)
    """
    K, V, C = shape.key_dim, shape.value_dim, 64
    count = shape.batch * shape.tokens * shape.heads
    return {
        "forward": Cost(count * (3 * 2 * K * V + 2 * 2 * C * K + 2 * 2 * C * V), count * (4 * K + 4 * V + 8)),
        "backward": Cost(count * (8 * 2 * K * V + 6 * 2 * C * K + 5 * 2 * C * V), count * (8 * K + 6 * V + 24)),
    }
