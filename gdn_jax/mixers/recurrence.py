"""Runs a recurrence over a sequence, or by one token where a state is given."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Int

from gdn_jax.layers import Compute
from pallas_kernels import gated_delta_rule, linear_attention, selective_scan


class Recurrence(NamedTuple):
    """An op of pallas_kernels: its name, a sequence's form, one token's form, the names of its implementations, and
    whether one token has them too (else it has one, without a name)."""

    name: str
    sequence: Callable[..., tuple[Array, Array]]
    step: Callable[..., tuple[Array, Array]]
    impls: tuple[str, ...]
    step_has_impls: bool


DELTA_RULE = Recurrence(
    "gated_delta_rule",
    gated_delta_rule.gated_delta_rule,
    gated_delta_rule.gated_delta_rule_step,
    gated_delta_rule.IMPLS,
    True,
)
LINEAR_ATTENTION = Recurrence(
    "linear_attention",
    linear_attention.linear_attention,
    linear_attention.linear_attention_step,
    linear_attention.IMPLS,
    True,
)
SELECTIVE_SCAN = Recurrence(
    "selective_scan",
    selective_scan.selective_scan,
    selective_scan.selective_scan_step,
    selective_scan.IMPLS,
    False,
)
RECURRENCES = {op.name: op for op in (DELTA_RULE, LINEAR_ATTENTION, SELECTIVE_SCAN)}


def advance(
    op: Recurrence,
    inputs: tuple[Array, ...],
    cache: Any,
    *,
    compute: Compute,
    segment_ids: Int[Array, "B T"] | None,
    scale: float | None = None,
    l2norm: bool = False,
) -> tuple[Array, Array]:
    """(output [B, T, ...], state after the last token) of `op` on its inputs, whose first has T on axis 1.

    inputs  in the op's order; those of three axes and more have T on axis 1, others belong to no token
    cache   its `state` is what came before; None begins a sequence
    scale   of ops that have one, None: theirs
    l2norm  of a step of the delta rule: q and k are still to be brought to norm 1
    """
    state = None if cache is None else cache.state
    options, impl = {} if scale is None else {"scale": scale}, compute.impl_among(op.impls)
    if state is not None and inputs[0].shape[1] == 1:
        options |= ({"impl": impl} if op.step_has_impls else {}) | ({"l2norm": True} if l2norm else {})
        o, state = op.step(*(x[:, 0] if x.ndim > 2 else x for x in inputs), state, **options)
        return o[:, None], state
    return op.sequence(
        *inputs, initial_state=state, segment_ids=segment_ids, impl=impl, chunk=compute.chunk,
        residuals=compute.residuals, **options,
    )  # fmt: skip
