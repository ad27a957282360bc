"""Cross entropy of a linear head without the [B, T, vocab] array."""

from pallas_kernels.linear_cross_entropy.api import IMPLS, linear_cross_entropy, resolve, token_nll

__all__ = ["IMPLS", "linear_cross_entropy", "resolve", "token_nll"]
