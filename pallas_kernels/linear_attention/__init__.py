"""Linear attention with decay: api.py has the equation, chunked.py the algorithm, reference.py the oracle."""

from pallas_kernels.linear_attention.api import IMPLS, linear_attention, linear_attention_step, resolve

__all__ = ["IMPLS", "linear_attention", "linear_attention_step", "resolve"]
