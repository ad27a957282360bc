"""The gated delta rule: api.py has the equation, chunked.py the algorithm, reference.py the oracle."""

from pallas_kernels.gated_delta_rule.api import IMPLS, gated_delta_rule, gated_delta_rule_step, resolve

__all__ = ["IMPLS", "gated_delta_rule", "gated_delta_rule_step", "resolve"]
