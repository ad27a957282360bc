"""What makes an implementation of the linear cross entropy correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.accuracy import outside, relative_errors
from pallas_kernels.dispatch import Choice
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, resolve

OUTPUTS = ("loss", "dx", "dkernel", "dweights")


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


def inputs(case: Case, seed: int = 0) -> list[np.ndarray]:
    """x, kernel, targets, weights (one of them 0); values that their dtypes hold, x and kernel those of `dtype`."""
    random = np.random.default_rng(seed)
    hold = lambda x, dtype: x.astype(jnp.dtype(dtype)).astype(np.float64)  # noqa: E731
    x = case.size * random.standard_normal((case.B, case.T, case.D))
    kernel = random.standard_normal((case.D, case.vocab)) / case.D**0.5
    targets = random.integers(0, case.vocab, (case.B, case.T), dtype=np.int32)
    weights = random.uniform(size=(case.B, case.T))
    weights[0, 0] = 0.0
    return [hold(x, case.dtype), hold(kernel, case.dtype), targets, hold(weights, jnp.float32)]


@partial(jax.jit, static_argnames=("chunk", "impl"))
def _run(x, kernel, targets, weights, *, chunk, impl):
    def loss(x, kernel, weights):  # a cotangent other than 1
        return 3.0 * linear_cross_entropy(x, kernel, targets, weights, chunk=chunk, impl=impl)

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(x, kernel, weights)
    return value, *gradients


def outputs_and_gradients(case: Case, arrays, *, impl: str, dtype) -> dict[str, np.ndarray]:
    """Three times the loss and its gradients at `dtype` of x (kernel and weights at least fp32), as float64 arrays."""
    exact = jnp.promote_types(jnp.float32, dtype)
    x, kernel, targets, weights = arrays
    x, kernel, weights = jnp.asarray(x, dtype), jnp.asarray(kernel, exact), jnp.asarray(weights, exact)
    results = _run(x, kernel, jnp.asarray(targets), weights, chunk=case.chunk, impl=impl)
    return {name: np.asarray(y).astype(np.float64) for name, y in zip(OUTPUTS, results, strict=True)}


def oracle(case: Case, arrays) -> dict[str, np.ndarray]:
    """All logits, and JAX's gradients, in float64."""
    with jax.enable_x64(True):
        return outputs_and_gradients(case, arrays, impl="reference", dtype=jnp.float64)


def limits(case: Case) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2): bf16 rounds dx and the logits' gradient, once each."""
    if case.dtype == "bfloat16":
        return dict.fromkeys(OUTPUTS, 1e-5) | {"dx": 5e-3, "dkernel": 5e-3}
    return dict.fromkeys(OUTPUTS, 1e-12 if case.dtype == "float64" else 1e-5)


def failures(case: Case, impl: str, seed: int = 0) -> list[str]:
    """`name error > limit` for everything of `impl` that is outside its limit or not finite."""
    arrays = inputs(case, seed)
    got = outputs_and_gradients(case, arrays, impl=impl, dtype=jnp.dtype(case.dtype))
    return outside(relative_errors(got, oracle(case, arrays)), limits(case))
