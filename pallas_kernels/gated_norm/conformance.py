"""What makes an implementation of the gated norm correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.accuracy import outside, relative_errors
from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_norm.api import gated_norm, resolve

OUTPUTS = ("y", "dx", "dweight", "dgate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    shape: tuple[int, ...] = (2, 50, 3, 24)
    gated: bool = True
    gate_first: bool = False
    groups: int = 1
    eps: float = 1e-5
    size: float = 1.0  # of x
    gate_size: float = 1.0  # far out SiLU is linear or nothing
    dtype: str = "float32"
    gate_dtype: str | None = None  # dtype when absent


CASES = (
    Case(name="gate after"),
    Case(name="gate first", gate_first=True),
    Case(name="no gate", gated=False),
    Case(name="no gate, groups", gated=False, groups=3),
    Case(name="gate after, groups", groups=4),
    Case(name="gate first, groups", gate_first=True, groups=4),
    Case(name="groups of one", gate_first=True, groups=24),
    Case(name="large gates", gate_size=30.0),
    Case(name="large gates first", gate_first=True, gate_size=30.0),
    Case(name="large x", size=1e4),
    Case(name="eps rules", size=1e-4),
    Case(name="exact gate first", gate_first=True, groups=2, gate_dtype="float32"),
    Case(name="one vector", shape=(7,)),
    Case(name="many vectors", shape=(2, 700, 3, 24)),
    Case(name="wide", shape=(3, 5, 1100), gate_first=True),
)
QUICK = tuple(case for case in CASES if case.name in ("gate after", "gate first"))  # for `gdn doctor`


def choice(case: Case) -> Choice:
    """What "auto" takes here at these sizes."""
    widest = jnp.promote_types(case.dtype, case.gate_dtype or case.dtype)
    return resolve("auto", shape=case.shape, gated=case.gated, groups=case.groups, dtype=widest)


def inputs(case: Case, seed: int = 0) -> tuple[list[np.ndarray | None], np.ndarray]:
    """(x, weight, gate or None) and dy; float64 values that their dtypes hold. One vector of x is zero."""
    normal = np.random.default_rng(seed).standard_normal
    hold = lambda x, dtype: x.astype(jnp.dtype(dtype)).astype(np.float64)  # noqa: E731
    x, gate, dy = case.size * normal(case.shape), case.gate_size * normal(case.shape), normal(case.shape)
    if len(case.shape) > 1:
        x[(0,) * (x.ndim - 1)] = 0.0
    weight = hold(1 + 0.5 * normal(case.shape[-1]), jnp.float32)
    gate = hold(gate, case.gate_dtype or case.dtype) if case.gated else None
    return [hold(x, case.dtype), weight, gate], hold(dy, case.dtype)


@partial(jax.jit, static_argnames=("eps", "gate_first", "groups", "impl"))
def _run(arrays, dy, *, eps, gate_first, groups, impl):
    def op(x, weight, gate):
        return gated_norm(x, weight, gate, eps=eps, gate_first=gate_first, groups=groups, impl=impl)

    y, vjp = jax.vjp(op, *arrays)
    return y, *vjp(dy)


def outputs_and_gradients(case: Case, arrays, dy, *, impl: str, dtype) -> dict[str, np.ndarray]:
    """Output and every gradient of one call at `dtype` (weight at least fp32), as float64 arrays."""
    exact = jnp.promote_types(jnp.float32, dtype)
    gate_dtype = exact if case.gate_dtype else dtype
    arrays = [
        None if x is None else jnp.asarray(x, kind) for x, kind in zip(arrays, (dtype, exact, gate_dtype), strict=True)
    ]
    options = {"eps": case.eps, "gate_first": case.gate_first, "groups": case.groups}
    results = _run(arrays, jnp.asarray(dy, dtype), impl=impl, **options)
    return {n: np.asarray(x).astype(np.float64) for n, x in zip(OUTPUTS, results, strict=True) if x is not None}


def oracle(case: Case, arrays, dy) -> dict[str, np.ndarray]:
    """The equation and JAX's gradients of it in float64."""
    with jax.enable_x64(True):
        return outputs_and_gradients(case, arrays, dy, impl="reference", dtype=jnp.float64)


def limits(case: Case) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2): bf16 rounds y, dx and dgate once, and nothing inside."""
    if case.dtype == "bfloat16":
        return dict.fromkeys(OUTPUTS, 4e-3) | {"dweight": 1e-5}
    return dict.fromkeys(OUTPUTS, 1e-12 if case.dtype == "float64" else 1e-5)


def failures(case: Case, impl: str, seed: int = 0) -> list[str]:
    """`name error > limit` for everything of `impl` that is outside its limit or not finite."""
    arrays, dy = inputs(case, seed)
    got = outputs_and_gradients(case, arrays, dy, impl=impl, dtype=jnp.dtype(case.dtype))
    return outside(relative_errors(got, oracle(case, arrays, dy)), limits(case))


def check(D: int, groups: int) -> list[str]:
    """For admission: what the kernels miss on vectors of this size."""
    sized = Case(name="sized", shape=(2, 300, D), groups=groups, dtype="bfloat16")
    cases = [sized, replace(sized, gate_first=True)]
    return [failure for case in cases for failure in failures(case, "triton", seed=6)]
