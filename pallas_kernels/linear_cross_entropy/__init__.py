"""Cross entropy of a linear head without the [B, T, vocab] array."""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, token_nll

__all__ = ["linear_cross_entropy", "token_nll"]
