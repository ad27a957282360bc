"""What makes an implementation of the gated delta rule correct: cases, float64 oracle, errors and their limits.

Used by the tests, by `gdn doctor` on the machine at hand, and by tuning, which admits nothing that fails here.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels import placement
from pallas_kernels.conformance import Inputs, Suite, decay_floors, drawn_documents, of_rounding, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step, resolve


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    T: int
    B: int = 2
    H: int = 2
    Hv: int = 2
    K: int = 32
    V: int = 48
    dtype: str = "float32"
    chunk: int = 64
    residuals: str = "saved"
    log_decay: float = -0.05  # typical g; 0 is exactly DeltaNet
    spread: float = 0.5  # log-normal spread of g; 0: constant
    strong: float = 0.0  # fraction of tokens with g = `reset` strewn in
    reset: float = -20.0
    cosine: float = 0.0  # expected cosine of two keys; 1: identical
    beta: tuple[float, float] = (0.0, 1.0)
    documents: float = 0.0  # chance that a token starts a document
    carried: bool = True  # random initial state and gradient of the final one


# Cases that differ in content alone share T, and so one compilation.
CASES = (
    *(Case(name=f"T={T}", T=T) for T in (1, 63, 64, 65, 129, 500)),
    *(Case(name=f"chunk={C}", T=150, chunk=C, cosine=0.5) for C in (16, 32, 128)),
    Case(name="inputs kept", T=200, residuals="inputs", documents=0.03),
    Case(name="group value", T=150, Hv=6, documents=0.02),
    Case(name="odd sizes", T=70, K=20, V=40, H=3, Hv=3),
    Case(name="no state", T=200, carried=False),
    Case(name="decay 0.999", T=200, log_decay=-1e-3, cosine=0.9),
    Case(name="decay 0.3", T=200, log_decay=-1.2, cosine=0.9),
    Case(name="g=0", T=200, log_decay=0.0),
    Case(name="g=-20", T=200, log_decay=-20.0, spread=0.0),
    Case(name="resets strewn in", T=200, strong=0.2, cosine=0.5),
    Case(name="resets of -1e6", T=200, strong=0.15, reset=-1e6, documents=0.02),
    Case(name="resets of -inf", T=200, strong=0.15, reset=-np.inf),
    Case(name="g=-inf", T=200, log_decay=-np.inf, spread=0.0),
    Case(name="beta=0", T=200, beta=(0.0, 0.0)),
    Case(name="beta=1", T=200, beta=(1.0, 1.0), cosine=0.5),
    Case(name="beta=2", T=200, beta=(2.0, 2.0)),
    Case(name="beta in (1,2)", T=200, beta=(1.0, 2.0), cosine=0.5),
    Case(name="cosine 0.99", T=200, cosine=0.99),
    Case(name="identical keys", T=200, cosine=1.0, beta=(0.5, 1.0)),
    Case(name="identical keys, beta=1, g=0", T=200, cosine=1.0, beta=(1.0, 1.0), log_decay=0.0),
    Case(name="identical keys, beta=1.9", T=200, cosine=1.0, beta=(1.9, 1.9)),
    Case(name="identical keys, beta=1.9, g=0", T=200, cosine=1.0, beta=(1.9, 1.9), log_decay=0.0),
    Case(name="documents", T=200, documents=0.05),
    Case(name="every token a document", T=200, documents=1.0),
)
STEPS = (
    Case(name="one row", T=1, B=1),
    Case(name="g=0", T=1, log_decay=0.0),
    Case(name="g=-20", T=1, log_decay=-20.0, spread=0.0),
    Case(name="g=-inf in half", T=1, Hv=6, strong=0.5, reset=-np.inf),
    Case(name="beta=2", T=1, beta=(2.0, 2.0)),
    Case(name="odd sizes, three rows", T=1, B=3, H=3, Hv=9, K=20, V=40),
)
# for `gdn doctor`: two shapes, so seconds to compile, of the size that most devices have kernels for
QUICK = tuple(
    replace(case, K=128, V=128) for case in CASES if case.name in ("resets strewn in", "beta=1", "group value")
)


def choice(case: Case) -> Choice:
    """What "auto" takes here at these sizes."""
    return resolve("auto", key_dim=case.K, value_dim=case.V, dtype=jnp.dtype(case.dtype))


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(q, k, v, g, beta, initial state), segment ids and (do, d final state); float64 values that `dtype` holds."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    key = (case.B, case.T, case.H, case.K)
    value = (case.B, case.T, case.Hv, case.V)
    q = unit(normal(key))
    base = unit(normal((case.B, 1, case.H, case.K))) * case.K**0.5
    k = unit(case.cosine**0.5 * base + (1 - case.cosine) ** 0.5 * normal(key))
    g = case.log_decay * np.exp(case.spread * normal(value[:3]))
    g = np.where(random.uniform(size=g.shape) < case.strong, case.reset, g)
    beta = random.uniform(*case.beta, size=value[:3])
    state = normal((case.B, case.Hv, case.K, case.V)) * case.carried
    segments = drawn_documents(random, case.B, case.T, case.documents)
    do, d_state = normal(value), normal(state.shape) * case.carried
    q, k, v, do = (round_to(x, case.dtype) for x in (q, k, normal(value), do))
    g, beta, state, d_state = (round_to(x, jnp.float32) for x in (g, beta, state, d_state))
    return Inputs([q, k, v, g, beta, state], segments, [do, d_state])


def call(arrays, segments, impl, configuration, chunk, residuals):
    """The op as a case asks for it."""
    q, k, v, g, beta, state = arrays
    return gated_delta_rule(
        q, k, v, g, beta, initial_state=state, segment_ids=segments,
        impl=impl, chunk=chunk, residuals=residuals, configuration=configuration,
    )  # fmt: skip


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2).

    Identical keys: about twice what chunked and the interpreted kernels do over twelve seeds. At g = 0 and beta = 1.9
    rounded operands leave no digit (api.gated_delta_rule says why), only the size of the numbers.
    """
    hard = case.cosine >= 0.99 or max(case.beta) > 1
    rounded = impl.startswith("triton") or case.dtype == "bfloat16"
    if not rounded:
        exact = 1e-12 if case.dtype == "float64" else 1e-5
        return dict.fromkeys(SUITE.outputs, 20 * exact if hard else exact)
    if case.cosine == 1:
        if max(case.beta) <= 1:
            return dict.fromkeys(SUITE.outputs, 4e-2) | {"dg": 8e-2, "dbeta": 0.4}
        if case.log_decay:
            return dict.fromkeys(SUITE.outputs, 7e-2) | {"dg": 0.14, "dbeta": 0.12}
        return dict.fromkeys(SUITE.outputs, 1.5) | {"dv": 2.5, "dbeta": 8.0}
    if hard:
        return dict.fromkeys(SUITE.outputs, 5e-2)
    return dict.fromkeys(SUITE.outputs, 1e-2) | {"dg": 2.5e-2, "dbeta": 2.5e-2}


SUITE = Suite(
    arrays=("q", "k", "v", "g", "beta", "initial"), results=("o", "state"), rounded=("q", "k", "v", "o"),
    options=("chunk", "residuals"), inputs=inputs, call=call, limits=limits, floors=decay_floors,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures


def call_step(arrays, segments, impl, configuration):
    """One token by the op's step; as its reference the op itself, token by token."""
    *token, state = arrays
    if impl == "reference":
        return gated_delta_rule(*token, initial_state=state, impl=impl)
    o, state = gated_delta_rule_step(*(x[:, 0] for x in token), state, impl=impl)
    return o[:, None], state


STEP_SUITE = replace(
    SUITE, options=(), call=call_step,
    limits=lambda case, impl: of_rounding(SUITE.outputs, SUITE.rounded, case),
)  # fmt: skip
CHECKED = ("documents", "decay 0.3", "beta in (1,2)", "resets strewn in")  # of one length, so one compilation


def check(K: int, V: int, step: bool = False) -> list[str]:
    """For admission: what the kernels miss at these sizes, as configured for many rows and for few; step: that of one
    token."""
    if step:
        return STEP_SUITE.missed(replace(case, K=K, V=V, dtype="bfloat16") for case in STEPS)
    kind = placement.device().device_kind
    cases = [replace(case, K=K, V=V, dtype="bfloat16") for case in CASES if case.name in CHECKED]
    both = dict.fromkeys(configurations.choose(K, V, kind, rows) for rows in (configurations.MANY_ROWS, 1))
    return [failure for configuration in both for failure in SUITE.missed(cases, configuration)]
