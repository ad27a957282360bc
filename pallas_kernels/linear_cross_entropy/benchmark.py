"""What `gdn bench` times: real models' shapes, inputs, other libraries, FLOPs and bytes."""

from typing import Any, NamedTuple

from pallas_kernels import peers
from pallas_kernels.peers import Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    tokens: int
    model_dim: int
    vocab: int


WRITTEN = "BxT,D,vocab"  # how a Shape is written out
SHAPES = {
    "1.3b": Shape(8, 4096, 2048, 32000),
    "0.4b": Shape(8, 4096, 1024, 32000),
    "1.3b-128k": Shape(2, 4096, 2048, 128256),
}
BF16 = ("x",)  # the inputs that are rounded to bf16; the others stay as drawn
GRADIENTS = ("x", "kernel")


def inputs(shape: Shape, random: Any) -> dict[str, Any]:
    """Normal x and kernel / sqrt(D), uniform targets, the weights of a mean; fp32 and int32 arrays of numpy."""
    import numpy as np

    token, D = (shape.batch, shape.tokens), shape.model_dim
    normal = lambda *sizes: random.standard_normal(sizes, "float32")  # noqa: E731
    return {
        "x": normal(*token, D),
        "kernel": normal(D, shape.vocab) / np.float32(D**0.5),
        "targets": random.integers(0, shape.vocab, token, dtype="int32"),
        "weights": np.full(token, 1 / (shape.batch * shape.tokens), "float32"),
    }


def ours(impl, x, kernel, targets, weights):
    from pallas_kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, kernel, targets, weights, impl=impl)


def _fla(inputs: dict[str, Any]) -> Loaded:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def call(x, kernel, targets, weights):
        return fused_linear_cross_entropy_loss(x.flatten(0, 1), targets.flatten(), kernel.T.to(x.dtype))

    return Loaded(call)


def _jla(inputs: dict[str, Any]) -> Loaded:
    from jla.ops.cross_entropy import linear_cross_entropy

    def call(impl, x, kernel, targets, weights):
        impl = "xla" if impl == "auto" else impl
        return linear_cross_entropy(x.reshape(-1, x.shape[-1]), kernel.T, targets.ravel(), impl=impl).loss_sum

    return peers.with_kernels(call, inputs)


def _liger(inputs: dict[str, Any]) -> Loaded:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(x, kernel, targets, weights):
        return liger_fused_linear_cross_entropy(x.flatten(0, 1), kernel.T.to(x.dtype), targets.flatten())

    return Loaded(call)


PEERS = {"fla": Peer(peers.FLA, _fla), "jla": Peer(peers.JLA, _jla), "liger": Peer(peers.LIGER, _liger)}


def cost(shape: Shape) -> dict[str, Cost]:
    """Of N tokens: 2 N D vocab FLOPs forward, twice that backward; bytes of x in bf16 and of the kernel in fp32, read,
    and in the backward of their gradients too."""
    tokens, matrix = shape.batch * shape.tokens, shape.model_dim * shape.vocab
    x, kernel = 2 * tokens * shape.model_dim, 4 * matrix
    return {
        "forward": Cost(2 * tokens * matrix, x + kernel),
        "backward": Cost(4 * tokens * matrix, 2 * (x + kernel)),
    }
