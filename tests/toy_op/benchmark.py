"""What is timed."""

from typing import NamedTuple

from pallas_kernels.peers import Library, Loaded, Peer
from pallas_kernels.roofline import Cost


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    tokens: int


WRITTEN = "BxT"
SHAPES = {"small": Shape(2, 8)}
BF16 = ("x",)
GRADIENTS = ("x", "a")


def inputs(shape, random):
    return {"x": random.standard_normal(shape, "float32"), "a": random.standard_normal((), "float32").reshape(1)}


def ours(impl, x, a):
    from pallas_kernels.toy import toy

    return toy(x, a, impl=impl)


PEERS = {"numpy": Peer(Library("numpy", ("numpy",), "jax", {}), lambda inputs: Loaded(lambda x, a: x * a))}


def cost(shape):
    return {"forward": Cost(0, 4 * shape.batch * shape.tokens), "backward": Cost(0, 6 * shape.batch * shape.tokens)}
