"""What `gdn bench` times: real models' shapes, inputs, another library and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost

EPS = 1e-5


class Shape(NamedTuple):
    """Sizes of one call: vectors of `value_dim` numbers, each gated after its norm."""

    batch: int
    tokens: int
    heads: int
    value_dim: int


WRITTEN = "BxT,H,V"  # how a Shape is written out
SHAPES = {
    "fla-1.3b": Shape(8, 4096, 6, 512),
    "released-1.3b": Shape(8, 4096, 9, 400),
    "released-0.4b": Shape(8, 4096, 9, 256),
    "head-128": Shape(8, 4096, 16, 128),
}
BF16 = ("x", "gate")  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("x", "weight", "gate")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """Normal x and gate, weight near 1; fp32 arrays of numpy."""
    normal = lambda *sizes: random.standard_normal(sizes, "float32")  # noqa: E731
    return {"x": normal(*shape), "weight": 1 + normal(shape.value_dim) / 10, "gate": normal(*shape)}


def ours(impl, x, weight, gate):
    from pallas_kernels.gated_norm import gated_norm

    return gated_norm(x, weight, gate, eps=EPS, impl=impl)


def _fla(inputs: dict[str, Any]) -> Loaded:
    from fla.modules.fused_norm_gate import rms_norm_gated

    return Loaded(lambda x, weight, gate: rms_norm_gated(x, gate, weight, None, activation="swish", eps=EPS))


PEERS = {"fla": Peer(peers.FLA, _fla)}


def cost(shape: Shape) -> dict[str, Cost]:
    """Bytes alone, per number of x, for there is no matrix product: 6 forward (x, gate, y), 10 backward (x, gate, dy,
    dx, dgate)."""
    count = shape.batch * shape.tokens * shape.heads * shape.value_dim
    return {"forward": Cost(0, 6 * count), "backward": Cost(0, 10 * count)}
