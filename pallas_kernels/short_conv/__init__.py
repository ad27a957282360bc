"""Short causal convolution: api.py has the equation, chunked.py the algorithm, reference.py the oracle."""

from pallas_kernels.short_conv.api import IMPLS, resolve, short_conv

__all__ = ["IMPLS", "resolve", "short_conv"]
