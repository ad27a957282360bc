"""RMS norm with a SiLU gate: api.py has the equation, chunked.py the two passes, reference.py the oracle."""

from pallas_kernels.gated_norm.api import IMPLS, gated_norm, resolve

__all__ = ["IMPLS", "gated_norm", "resolve"]
