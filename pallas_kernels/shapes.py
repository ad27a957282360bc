"""Named real-model shapes of each op, shared by tests, tuning and benchmarks."""

from typing import NamedTuple


class DeltaShape(NamedTuple):
    """Sizes of one gated delta rule call."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int


GATED_DELTA_RULE = {
    "fla-1.3b": DeltaShape(8, 4096, 6, 256, 512),
    "fla-1.3b-16k": DeltaShape(2, 16384, 6, 256, 512),
    "released-1.3b": DeltaShape(8, 4096, 9, 200, 400),
    "released-h1-1.3b": DeltaShape(8, 4096, 9, 192, 384),
    "released-0.4b": DeltaShape(8, 4096, 9, 128, 256),
    "head-128": DeltaShape(8, 4096, 16, 128, 128),
    "head-128-16k": DeltaShape(2, 16384, 16, 128, 128),
    "head-128-64k": DeltaShape(1, 65536, 8, 128, 128),
}
