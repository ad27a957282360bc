"""What makes an implementation of the short convolution correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.conformance import Inputs, Suite, drawn_documents, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.short_conv.api import resolve, short_conv


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    T: int = 90
    B: int = 2
    C: int = 12
    W: int = 4
    bias: bool = True
    activation: str | None = "silu"
    dtype: str = "float32"
    documents: float = 0.0  # chance that a token starts a document
    carried: bool = True  # random initial state and gradient of the final one
    size: float = 1.0  # of x: far out SiLU is linear or nothing
    l2norm: int | None = None  # channels of a head


CASES = (
    *(Case(name=f"W={W}", W=W, documents=0.1) for W in (1, 2, 3, 7)),
    *(Case(name=f"T={T}", T=T) for T in (1, 2, 3)),
    Case(name="T=2, documents", T=2, documents=0.5),
    Case(name="plain", carried=False),
    Case(name="large inputs", size=30.0),
    Case(name="no bias", bias=False),
    Case(name="no activation", activation=None, documents=0.1),
    Case(name="neither", bias=False, activation=None),
    Case(name="documents", documents=0.2),
    Case(name="every token a document", documents=1.0),
    Case(name="heads to norm 1", l2norm=4, documents=0.1),
    Case(name="one head, no activation", l2norm=12, activation=None, bias=False),
    Case(name="many channels", T=16, C=520),
    Case(name="many small heads", T=40, C=520, l2norm=4),
    Case(name="pieces of a row", T=300, documents=0.05),
)
QUICK = tuple(case for case in CASES if case.name == "documents")  # for `gdn doctor`


def choice(case: Case) -> Choice:
    """What "auto" takes here at these sizes."""
    shape = (case.B, case.T, case.C)
    return resolve("auto", shape=shape, width=case.W, l2norm=case.l2norm, dtype=jnp.dtype(case.dtype))


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(x, weight, bias or None, initial state), segment ids, (dy, d final state); float64 values that `dtype` holds."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal
    token, past = (case.B, case.T, case.C), (case.B, case.W - 1, case.C)
    x, state = case.size * normal(token), case.size * case.carried * normal(past)
    dy, d_state = normal(token), case.carried * normal(past)
    x, state, dy, d_state = (round_to(y, case.dtype) for y in (x, state, dy, d_state))
    weight, bias = (round_to(y, jnp.float32) for y in (normal((case.W, case.C)) / case.W**0.5, normal(case.C)))
    segments = drawn_documents(random, case.B, case.T, case.documents)
    return Inputs([x, weight, bias if case.bias else None, state], segments, [dy, d_state])


def call(arrays, segments, impl, _, activation, l2norm):
    """The op as a case asks for it."""
    *arrays, state = arrays
    options = {"activation": activation, "l2norm": l2norm, "impl": impl}
    return short_conv(*arrays, initial_state=state, segment_ids=segments, **options)


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2): bf16 rounds y, dx, dstate once, nothing inside."""
    if case.dtype == "bfloat16":
        return dict.fromkeys(SUITE.outputs, 4e-3) | {"state": 0.0, "dweight": 1e-5, "dbias": 1e-5}
    return dict.fromkeys(SUITE.outputs, 1e-12 if case.dtype == "float64" else 1e-5) | {"state": 0.0}


SUITE = Suite(
    arrays=("x", "weight", "bias", "state"), results=("y", "state"), rounded=("x", "y", "state"),
    options=("activation", "l2norm"), inputs=inputs, call=call, limits=limits,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures


def check(W: int, l2norm: int | None) -> list[str]:
    """For admission: what the kernels miss with this filter and these heads."""
    sized = Case(name="plain", T=300, C=3 * (l2norm or 100), W=W, l2norm=l2norm, dtype="bfloat16")
    return SUITE.missed([sized, replace(sized, name="documents", documents=0.05, bias=False, carried=False)])
