"""What makes an implementation of the gated norm correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.conformance import Inputs, Suite, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_norm.api import gated_norm, resolve


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


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(x, weight, gate or None) and dy; float64 values that their dtypes hold. One vector of x is zero."""
    normal = np.random.default_rng(seed).standard_normal
    x, gate, dy = case.size * normal(case.shape), case.gate_size * normal(case.shape), normal(case.shape)
    if len(case.shape) > 1:
        x[(0,) * (x.ndim - 1)] = 0.0
    weight = round_to(1 + 0.5 * normal(case.shape[-1]), jnp.float32)
    gate = round_to(gate, case.gate_dtype or case.dtype) if case.gated else None
    return Inputs([round_to(x, case.dtype), weight, gate], None, [round_to(dy, case.dtype)])


def call(arrays, _, impl, __, eps, gate_first, groups, gate_dtype):
    """The op as a case asks for it; a gate of no dtype of its own has x's."""
    x, weight, gate = arrays
    gate = gate if gate is None or gate_dtype else gate.astype(x.dtype)
    return (gated_norm(x, weight, gate, eps=eps, gate_first=gate_first, groups=groups, impl=impl),)


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2): bf16 rounds y, dx and dgate once, and nothing inside."""
    if case.dtype == "bfloat16":
        return dict.fromkeys(SUITE.outputs, 4e-3) | {"dweight": 1e-5}
    return dict.fromkeys(SUITE.outputs, 1e-12 if case.dtype == "float64" else 1e-5)


SUITE = Suite(
    arrays=("x", "weight", "gate"), results=("y",), rounded=("x", "y"),
    options=("eps", "gate_first", "groups", "gate_dtype"), inputs=inputs, call=call, limits=limits,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures


def check(D: int, groups: int) -> list[str]:
    """For admission: what the kernels miss on vectors of this size."""
    sized = Case(name="gate after", shape=(2, 300, D), groups=groups, dtype="bfloat16")
    return SUITE.missed([sized, replace(sized, name="gate first", gate_first=True)])
