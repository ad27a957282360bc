"""What makes an implementation of the linear cross entropy correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.conformance import Inputs, Suite, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, resolve


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    T: int = 37
    B: int = 2
    D: int = 16
    vocab: int = 53
    chunk: int = 8
    size: float = 1.0  # of x, and so of the logits
    dtype: str = "float32"


CASES = (
    *(Case(name=f"chunk={chunk}", chunk=chunk) for chunk in (1, 8, 37, 512)),
    Case(name="logits of a thousand", size=300.0),
    Case(name="70 tokens", T=70, D=32, vocab=320, chunk=32),
)
QUICK = (CASES[-1],)  # for `gdn doctor`


def choice(case: Case) -> Choice:
    """What "auto" takes here."""
    return resolve("auto")


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(x, kernel, weights, one of them 0), targets and a cotangent other than 1; x, kernel as `dtype` holds them."""
    random = np.random.default_rng(seed)
    x = case.size * random.standard_normal((case.B, case.T, case.D))
    kernel = random.standard_normal((case.D, case.vocab)) / case.D**0.5
    targets = random.integers(0, case.vocab, (case.B, case.T), dtype=np.int32)
    weights = random.uniform(size=(case.B, case.T))
    weights[0, 0] = 0.0
    arrays = [round_to(x, case.dtype), round_to(kernel, case.dtype), round_to(weights, jnp.float32)]
    return Inputs(arrays, targets, [np.array(3.0)])


def call(arrays, targets, impl, _, chunk):
    """The op as a case asks for it."""
    x, kernel, weights = arrays
    return (linear_cross_entropy(x, kernel, targets, weights, chunk=chunk, impl=impl),)


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2): bf16 rounds dx and the logits' gradient, once each."""
    if case.dtype == "bfloat16":
        return dict.fromkeys(SUITE.outputs, 1e-5) | {"dx": 5e-3, "dkernel": 5e-3}
    return dict.fromkeys(SUITE.outputs, 1e-12 if case.dtype == "float64" else 1e-5)


SUITE = Suite(
    arrays=("x", "kernel", "weights"), results=("loss",), rounded=("x",),
    options=("chunk",), inputs=inputs, call=call, limits=limits,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures
