"""What makes an implementation of the selective scan correct: cases, float64 oracle, errors and their limits."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.conformance import Inputs, Suite, drawn_documents, round_to
from pallas_kernels.dispatch import Choice
from pallas_kernels.selective_scan.api import resolve, selective_scan


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs and how to run it."""

    name: str
    T: int
    B: int = 2
    D: int = 24
    N: int = 16
    dtype: str = "float32"
    chunk: int = 64
    residuals: str = "saved"
    dt: tuple[float, float] = (1e-3, 1e-1)  # log-uniform
    strong: float = 0.0  # fraction of step sizes that are 30 instead: decays down to exp(-480)
    documents: float = 0.0  # chance that a token starts a document
    carried: bool = True  # random initial state and gradient of the final one


# Cases that differ in content alone share T, and so one compilation.
CASES = (
    *(Case(name=f"T={T}", T=T) for T in (1, 63, 65)),
    *(Case(name=f"chunk={C}", T=150, chunk=C) for C in (16, 128)),
    Case(name="inputs kept", T=200, residuals="inputs", documents=0.03),
    Case(name="odd sizes", T=70, D=7, N=5),
    Case(name="plain", T=200),
    Case(name="no state", T=200, carried=False),
    Case(name="short memory", T=200, dt=(1.0, 5.0)),
    Case(name="long memory", T=200, dt=(1e-5, 1e-4)),
    Case(name="resets strewn in", T=200, strong=0.2),
    Case(name="dt=0 and resets", T=200, dt=(1e-30, 1e-29), strong=0.1),
    Case(name="documents", T=200, documents=0.05),
    Case(name="every token a document", T=200, documents=1.0),
)
QUICK = tuple(case for case in CASES if case.name == "documents")  # for `gdn doctor`


def choice(case: Case) -> Choice:
    """What "auto" takes here."""
    return resolve("auto")


def inputs(case: Case, seed: int = 0) -> Inputs:
    """(x, dt, A, B, C, D, initial state), segment ids and (dy, d final state); float64 values that `dtype` holds."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal
    token, of_all = (case.B, case.T, case.D), (case.B, case.T, case.N)
    dt = np.exp(random.uniform(*np.log(case.dt), size=token))
    dt = np.where(random.uniform(size=token) < case.strong, 30.0, dt)
    A = -np.arange(1.0, case.N + 1) * np.exp(0.1 * normal((case.D, case.N)))
    state = normal((case.B, case.D, case.N)) * case.carried
    segments = drawn_documents(random, case.B, case.T, case.documents)
    dy, d_state = normal(token), normal(state.shape) * case.carried
    x, B, C, dy = (round_to(y, case.dtype) for y in (normal(token), normal(of_all), normal(of_all), dy))
    dt, A, D, state, d_state = (round_to(y, jnp.float32) for y in (dt, A, normal(case.D), state, d_state))
    return Inputs([x, dt, A, B, C, D, state], segments, [dy, d_state])


def call(arrays, segments, impl, _, chunk, residuals):
    """The op as a case asks for it."""
    *arrays, state = arrays
    options = {"impl": impl, "chunk": chunk, "residuals": residuals}
    return selective_scan(*arrays, initial_state=state, segment_ids=segments, **options)


def limits(case: Case, impl: str) -> dict[str, float]:
    """The accuracy that is asked of each output (relative L2).

    bf16 rounds inputs and outputs. The kernels also keep the state of a run in it, and sums of each program's channels;
    chunked.py rounds no state.
    """
    if case.dtype == "bfloat16" and impl.startswith("triton"):
        return dict.fromkeys(SUITE.outputs, 1e-2) | dict.fromkeys(("state", "dD", "dinitial"), 1e-5)
    if case.dtype == "bfloat16":
        return dict.fromkeys(SUITE.outputs, 1e-5) | dict.fromkeys(("y", "dx", "dB", "dC"), 4e-3)
    return dict.fromkeys(SUITE.outputs, 1e-12 if case.dtype == "float64" else 1e-5)


SUITE = Suite(
    arrays=("x", "dt", "A", "B", "C", "D", "initial"), results=("y", "state"), rounded=("x", "B", "C", "y"),
    options=("chunk", "residuals"), inputs=inputs, call=call, limits=limits,
)  # fmt: skip
OUTPUTS, outputs_and_gradients, oracle = SUITE.outputs, SUITE.outputs_and_gradients, SUITE.oracle
errors, failures = SUITE.errors, SUITE.failures

CHECKED = ("documents", "resets strewn in", "long memory")  # of one length, so one compilation


def check(N: int) -> list[str]:
    """For admission: what the kernels miss at this size of a channel's state."""
    return SUITE.missed(replace(case, D=200, N=N, dtype="bfloat16") for case in CASES if case.name in CHECKED)
