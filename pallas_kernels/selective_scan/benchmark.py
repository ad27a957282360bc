"""What `gdn bench` times: real models' shapes, inputs, other libraries and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call: channels, and numbers in a channel's state."""

    batch: int
    tokens: int
    channels: int
    state: int


WRITTEN = "BxT,D,N"  # how a Shape is written out
SHAPES = {
    "mamba-1.3b": Shape(8, 4096, 4096, 16),
    "mamba-1.3b-16k": Shape(2, 16384, 4096, 16),
    "mamba-0.4b": Shape(8, 4096, 2048, 16),
}
BF16 = ("x", "B", "C")  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("x", "dt", "A", "B", "C", "D")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """Normal x, B and C, dt log-uniform in [0.001, 0.1], A = -1 ... -N, D = 1; fp32 arrays of numpy."""
    import numpy as np

    token = (shape.batch, shape.tokens)
    normal = lambda size: random.standard_normal((*token, size), "float32")  # noqa: E731
    exponents = random.uniform(np.log(1e-3), np.log(1e-1), (*token, shape.channels))
    rates = -np.arange(1, shape.state + 1, dtype="float32")
    return {
        "x": normal(shape.channels),
        "dt": np.exp(exponents).astype("float32"),
        "A": np.tile(rates, (shape.channels, 1)),
        "B": normal(shape.state),
        "C": normal(shape.state),
        "D": np.ones(shape.channels, "float32"),
    }


def ours(impl, x, dt, A, B, C, D):
    from pallas_kernels.selective_scan import selective_scan

    return selective_scan(x, dt, A, B, C, D, impl=impl)[0]


def _jla(inputs: dict[str, Any]) -> Loaded:
    from jla.ops import linear_attention

    def call(impl, x, dt, A, B, C, D):
        return linear_attention("mamba1", C, B, x, dt=dt.astype(x.dtype), a=A, d=D, impl=impl)[0]

    return peers.with_kernels(call, inputs)


def _mamba_ssm(inputs: dict[str, Any]) -> Loaded:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def call(x, dt, A, B, C, D):  # channels before tokens
        x, dt, B, C = (y.transpose(1, 2).contiguous() for y in (x, dt.to(x.dtype), B, C))
        return selective_scan_fn(x, dt, A, B, C, D)

    return Loaded(call)


PEERS = {"jla": Peer(peers.JLA, _jla), "mamba_ssm": Peer(peers.MAMBA_SSM, _mamba_ssm)}


def cost(shape: Shape) -> dict[str, Cost]:
    """Bytes alone, per token; no product is for tensor cores, and fp32 arithmetic on [D, N] is not counted:

    forward    8D + 4N    (x and y in bf16, dt in fp32; B, C)
    backward  14D + 8N    (x, dy, dx in bf16, dt and its gradient in fp32; B, C and their gradients)
    """
    tokens, D, N = shape.batch * shape.tokens, shape.channels, shape.state
    return {"forward": Cost(0, tokens * (8 * D + 4 * N)), "backward": Cost(0, tokens * (14 * D + 8 * N))}
