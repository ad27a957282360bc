"""What makes an implementation of linear attention correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.conformance import Inputs, Suite, decay_floors, drawn_documents, of_rounding, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.linear_attention.api import linear_attention, linear_attention_step, resolve


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    T: int
    channels: bool = False  # a decay for each key channel
    B: int = 2
    H: int = 2
    Hv: int = 2
    K: int = 32
    V: int = 48
    dtype: str = "float32"
    chunk: int = 64
    residuals: str = "saved"
    log_decay: float = -0.05  # typical g; 0: no decay
    spread: float = 0.5  # log-normal spread of g; 0: constant
    strong: float = 0.0  # fraction of decays that are `reset` instead
    reset: float = -20.0
    documents: float = 0.0  # chance that a token starts a document
    carried: bool = True  # random initial state and gradient of the final one


# Cases that differ in content alone share T, and so one compilation.
BOTH = (
    dict(name="T=1", T=1),
    dict(name="T=65", T=65),
    dict(name="chunk=16", T=150, chunk=16),
    dict(name="chunk=128", T=150, chunk=128),
    dict(name="inputs kept", T=200, residuals="inputs", documents=0.03),
    dict(name="group value", T=150, Hv=6, documents=0.02),
    dict(name="one group, odd sizes", T=70, K=20, V=40, H=1, Hv=3),
    dict(name="plain", T=200),
    dict(name="no state", T=200, carried=False),
    dict(name="decay 0.999", T=200, log_decay=-1e-3),
    dict(name="decay 0.3", T=200, log_decay=-1.2),
    dict(name="g=0", T=200, log_decay=0.0),
    dict(name="g=-20", T=200, log_decay=-20.0, spread=0.0),
    dict(name="g=-60", T=200, log_decay=-60.0, spread=0.0),
    dict(name="resets strewn in", T=200, strong=0.2),
    dict(name="decay 0 strewn in", T=200, strong=0.2, reset=-np.inf),
    dict(name="documents", T=200, documents=0.05),
    dict(name="every token a document", T=200, documents=1.0),
)
CASES = (
    *(Case(**case) for case in BOTH),
    *(Case(**case | {"name": f"channels, {case['name']}", "channels": True}) for case in BOTH),
)
BOTH_STEPS = (
    dict(name="one row", T=1, B=1),
    dict(name="g=0", T=1, log_decay=0.0),
    dict(name="g=-60", T=1, log_decay=-60.0, spread=0.0),
    dict(name="decay 0 in half", T=1, Hv=6, strong=0.5, reset=-np.inf),
    dict(name="odd sizes, three rows", T=1, B=3, H=1, Hv=3, K=20, V=40),
)
STEPS = (
    *(Case(**case) for case in BOTH_STEPS),
    *(Case(**case | {"name": f"channels, {case['name']}", "channels": True}) for case in BOTH_STEPS),
)
QUICK = tuple(case for case in CASES if case.name in ("group value", "channels, group value"))  # for `gdn doctor`


def choice(case: Case) -> Choice:
    """What "auto" takes here."""
    return resolve("auto")


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(q, k, v, g, initial state), segment ids and (do, d final state); float64 values that `dtype` holds."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal
    key, value = (case.B, case.T, case.H, case.K), (case.B, case.T, case.Hv, case.V)
    q, k = normal(key), normal(key) / case.K**0.5
    g = case.log_decay * np.exp(case.spread * normal((*value[:3], case.K) if case.channels else value[:3]))
    g = np.where(random.uniform(size=g.shape) < case.strong, case.reset, g)
    state = normal((case.B, case.Hv, case.K, case.V)) * case.carried
    segments = drawn_documents(random, case.B, case.T, case.documents)
    do, d_state = normal(value), normal(state.shape) * case.carried
    q, k, v, do = (round_to(x, case.dtype) for x in (q, k, normal(value), do))
    g, state, d_state = (round_to(x, jnp.float32) for x in (g, state, d_state))
    return Inputs([q, k, v, g, state], segments, [do, d_state])


def call(arrays, segments, impl, configuration, chunk, residuals):
    """The op as a case asks for it."""
    q, k, v, g, state = arrays
    return linear_attention(
        q, k, v, g, initial_state=state, segment_ids=segments,
        impl=impl, chunk=chunk, residuals=residuals, configuration=configuration,
    )  # fmt: skip


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2)."""
    if case.dtype == "bfloat16" or impl.startswith("triton"):
        return dict.fromkeys(SUITE.outputs, 1e-2) | {"dg": 2.5e-2}
    return dict.fromkeys(SUITE.outputs, 1e-12 if case.dtype == "float64" else 1e-5)


SUITE = Suite(
    arrays=("q", "k", "v", "g", "initial"), results=("o", "state"), rounded=("q", "k", "v", "o"),
    options=("chunk", "residuals"), inputs=inputs, call=call, limits=limits, floors=decay_floors,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures


def call_step(arrays, segments, impl, configuration):
    """One token by the op's step; as its reference the op itself, token by token."""
    *token, state = arrays
    if impl == "reference":
        return linear_attention(*token, initial_state=state, impl=impl)
    o, state = linear_attention_step(*(x[:, 0] for x in token), state, impl=impl)
    return o[:, None], state


STEP_SUITE = replace(
    SUITE, options=(), call=call_step,
    limits=lambda case, impl: of_rounding(SUITE.outputs, SUITE.rounded, case),
)  # fmt: skip
CHECKED = ("documents", "decay 0.3", "decay 0 strewn in")  # of one length, so one compilation


def check(K: int, V: int, channels: bool, step: bool = False) -> list[str]:
    """For admission: what the kernels miss at these sizes, with one value head a key head and with four; step: that of
    one token."""
    sizes = {"K": K, "V": V, "channels": channels, "dtype": "bfloat16"}
    if step:
        return STEP_SUITE.missed(Case(**case | sizes) for case in BOTH_STEPS)
    chosen = [case for case in BOTH if case["name"] in CHECKED]
    return SUITE.missed(Case(**case, Hv=members, H=1, **sizes) for members in (1, 4) for case in chosen)
