"""What `gdn bench` times: real models' shapes, inputs, other libraries and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call: channels, and taps of a channel's filter."""

    batch: int
    tokens: int
    channels: int
    width: int


WRITTEN = "BxT,C,W"  # how a Shape is written out
SHAPES = {
    "keys-1.3b": Shape(8, 4096, 1536, 4),
    "values-1.3b": Shape(8, 4096, 3072, 4),
    "keys-and-values-1.3b": Shape(8, 4096, 6144, 4),
    "mamba2-1.3b": Shape(8, 4096, 4352, 4),
}
BF16 = ("x",)  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("x", "weight")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """Normal x and weight / sqrt(W), followed by SiLU; fp32 arrays of numpy."""
    normal = lambda *sizes: random.standard_normal(sizes, "float32")  # noqa: E731
    weight = normal(shape.width, shape.channels) / shape.width**0.5
    return {"x": normal(shape.batch, shape.tokens, shape.channels), "weight": weight.astype("float32")}


def ours(impl, x, weight):
    from pallas_kernels.short_conv import short_conv

    return short_conv(x, weight, activation="silu", impl=impl)[0]


def _fla(inputs: dict[str, Any]) -> Loaded:
    from fla.modules.causal_conv1d import causal_conv1d

    return Loaded(lambda x, weight: causal_conv1d(x, weight.T.contiguous(), activation="silu")[0])


def _causal_conv1d(inputs: dict[str, Any]) -> Loaded:
    from causal_conv1d import causal_conv1d_fn

    def call(x, weight):  # channels before tokens in name, behind them in memory
        return causal_conv1d_fn(x.transpose(1, 2), weight.T.contiguous(), activation="silu").transpose(1, 2)

    return Loaded(call)


def _jla(inputs: dict[str, Any]) -> Loaded:
    from jla.ops.mosaic_gpu.short_conv import short_conv

    return Loaded(lambda x, weight: short_conv(x, weight.T, activation=True))


PEERS = {
    "fla": Peer(peers.FLA, _fla), "causal_conv1d": Peer(peers.CAUSAL_CONV1D, _causal_conv1d),
    "jla": Peer(peers.JLA, _jla),
}  # fmt: skip


def cost(shape: Shape) -> dict[str, Cost]:
    """Bytes alone, per token and channel, for there is no matrix product: 4 forward (x, y), 6 backward (x, dy, dx)."""
    count = shape.batch * shape.tokens * shape.channels
    return {"forward": Cost(0, 4 * count), "backward": Cost(0, 6 * count)}
