"""What every op makes of an empty batch, of no token and of a dtype that it does not have: the same, each."""

import importlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import arguments, dispatch, ops
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_norm import gated_norm
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import short_conv


class Op(NamedTuple):
    """A call, every size such that a kernel has it."""

    call: callable
    sizes: dict[str, tuple]  # of each array; "B" and "T" are filled in
    outputs: tuple[tuple, ...]
    parameters: tuple[str, ...] = ()  # without a batch axis
    documents: bool = True


OPS = {
    "gated_delta_rule": Op(
        gated_delta_rule,
        {"q": ("B", "T", 1, 64), "k": ("B", "T", 1, 64), "v": ("B", "T", 2, 64), "g": ("B", "T", 2),
         "beta": ("B", "T", 2), "initial_state": ("B", 2, 64, 64)},
        (("B", "T", 2, 64), ("B", 2, 64, 64)),
    ),
    "linear_attention": Op(
        linear_attention,
        {"q": ("B", "T", 1, 16), "k": ("B", "T", 1, 16), "v": ("B", "T", 2, 16), "g": ("B", "T", 2),
         "initial_state": ("B", 2, 16, 16)},
        (("B", "T", 2, 16), ("B", 2, 16, 16)),
    ),
    "selective_scan": Op(
        selective_scan,
        {"x": ("B", "T", 8), "dt": ("B", "T", 8), "A": (8, 4), "B": ("B", "T", 4), "C": ("B", "T", 4), "D": (8,),
         "initial_state": ("B", 8, 4)},
        (("B", "T", 8), ("B", 8, 4)), ("A", "D"),
    ),
    "short_conv": Op(
        partial(short_conv, activation="silu"),
        {"x": ("B", "T", 16), "weight": (4, 16), "bias": (16,), "initial_state": ("B", 3, 16)},
        (("B", "T", 16), ("B", 3, 16)), ("weight", "bias"),
    ),
    "gated_norm": Op(
        partial(gated_norm, eps=1e-5), {"x": ("B", "T", 8), "weight": (8,), "gate": ("B", "T", 8)},
        (("B", "T", 8),), ("weight",), documents=False,
    ),
    "linear_cross_entropy": Op(
        linear_cross_entropy,
        {"x": ("B", "T", 8), "kernel": (8, 16), "targets": ("B", "T"), "weights": ("B", "T")},
        ((),), ("kernel",), documents=False,
    ),
}  # fmt: skip
CASES = [
    (op, impl, documents)
    for op, facts in OPS.items()
    for impl in importlib.import_module(f"pallas_kernels.{op}").IMPLS
    if impl != "triton"
    for documents in (False, True)[: 1 + facts.documents]
]


def given(op, rows, tokens, dtype=jnp.float32):
    """(arrays by name, options) of a call with `rows` and `tokens`."""
    fill = {"B": rows, "T": tokens}
    arrays = {name: jnp.ones([fill.get(n, n) for n in size], dtype) / 2 for name, size in OPS[op].sizes.items()}
    options = {"targets": jnp.zeros((rows, tokens), jnp.int32)} if op == "linear_cross_entropy" else {}
    return {name: x for name, x in arrays.items() if name not in options}, options


def test_the_ops_are_all_here():
    assert sorted(OPS) == ops.names()


@pytest.mark.parametrize(("op", "impl", "documents"), CASES)
def test_an_empty_batch_has_an_empty_result_and_zero_gradients(op, impl, documents):
    arrays, options = given(op, 0, 20)
    if documents:
        options["segment_ids"] = jnp.zeros((0, 20), jnp.int32)
    outputs, pull = jax.vjp(lambda arrays: OPS[op].call(**arrays, **options, impl=impl), arrays)
    (gradients,) = pull(jax.tree.map(jnp.ones_like, outputs))
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    fill = {"B": 0, "T": 20}
    assert [x.shape for x in found] == [tuple(fill.get(n, n) for n in size) for size in OPS[op].outputs]
    assert all(x.dtype == jnp.float32 for x in found) and not any(float(x.sum()) for x in found)
    for name, x in arrays.items():
        assert gradients[name].shape == x.shape and gradients[name].dtype == x.dtype
        assert not np.asarray(gradients[name]).any()  # of a parameter: zeros, and not NaN
    assert {name for name, x in gradients.items() if x.size} == set(OPS[op].parameters)


@pytest.mark.parametrize("op", [op for op in OPS if op != "gated_norm"])  # its x has no axis of tokens
def test_no_token_and_other_dtypes_get_a_sentence(op):
    arrays, options = given(op, 2, 0)
    with pytest.raises(ValueError, match=r"^T is 0; .* needs at least one token\.$"):
        OPS[op].call(**arrays, **options)
    arrays, options = given(op, 2, 5, jnp.float16)
    first = next(iter(arrays))
    with pytest.raises(ValueError, match=rf"^{first} is float16; it must be bfloat16, float32 or float64\.$"):
        OPS[op].call(**arrays, **options)


@pytest.mark.parametrize("impl", dispatch.KERNELS)
@pytest.mark.parametrize("op", [op for op in OPS if "triton" in importlib.import_module(f"pallas_kernels.{op}").IMPLS])
def test_kernels_refuse_float64(op, impl):
    """Whatever the device; "auto" leaves it to chunked, whose results have its digits."""
    with jax.enable_x64(True):
        arrays, options = given(op, 1, 20, jnp.float64)
        with pytest.raises(dispatch.CannotRun, match=rf"^{op}: impl '{impl}' cannot run: it would round float64 to "):
            OPS[op].call(**arrays, **options, impl=impl)
        got, want = (jax.tree.leaves(OPS[op].call(**arrays, **options, impl=name)) for name in ("auto", "reference"))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.float64 and np.allclose(x, y, rtol=1e-12, atol=1e-14)


def test_rules_name_the_value_and_the_rule():
    with pytest.raises(ValueError, match="chunk is 48; it must be one of 16, 32, 64, 128"):
        arguments.check_chunk(48)
    for heads, value_heads in ((2, 3), (0, 4)):
        with pytest.raises(ValueError, match=f"v has {value_heads} heads, not a multiple of the {heads} heads of q"):
            arguments.check_heads(heads, value_heads)
    arguments.check_dtypes(x=jnp.ones(1, jnp.bfloat16), gate=None)


def test_float64_is_for_all_arrays_or_for_none():
    with jax.enable_x64(True):
        wide, narrow = jnp.ones(3, jnp.float64), jnp.ones(3, jnp.float32)
        arguments.check_dtypes(q=wide, k=None, v=wide)
        with pytest.raises(ValueError, match="q is float64 and v float32; pass all in float64, or none."):
            arguments.check_dtypes(q=wide, k=None, v=narrow)
