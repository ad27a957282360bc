"""Short causal convolution: api.py has the equation, chunked.py the algorithm, reference.py the oracle."""

from pallas_kernels.short_conv.api import IMPLS, LEAST_TOKENS, resolve, short_conv

__all__ = ["IMPLS", "LEAST_TOKENS", "resolve", "short_conv"]
