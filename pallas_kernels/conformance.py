"""The suite that every op is checked by: outputs and gradients of its cases against the same in float64.

An op's conformance.py has what is its own: Case, CASES and their inputs, how the op is called, and the accuracy that is
asked of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.accuracy import outside, relative_errors

Errors = dict[str, float]  # or limits, by the name of an output or gradient


class Inputs(NamedTuple):
    """Of one call: float64 values that the call's own dtypes hold."""

    arrays: Sequence[np.ndarray | None]  # those with gradients; None: absent
    integers: np.ndarray | None  # segment ids or targets
    cotangents: Sequence[np.ndarray]  # of every result


def round_to(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x rounded to `dtype`, in float64."""
    return x.astype(jnp.dtype(dtype)).astype(np.float64)


def drawn_documents(random: np.random.Generator, rows: int, tokens: int, chance: float) -> np.ndarray | None:
    """Segment ids [rows, tokens] where each token starts a document with this chance; None for 0."""
    if not chance:
        return None
    return np.cumsum(random.uniform(size=(rows, tokens)) < chance, axis=1).astype(np.int32) % 3


def decay_floors(inputs: Inputs, want: dict[str, np.ndarray]) -> Errors:
    """dg is measured against max(|dg|, |do . o|): under strong decay dg itself is pure cancellation."""
    return {"dg": float(np.linalg.norm((inputs.cotangents[0] * want["o"]).sum(-1)))}


def of_rounding(names: Iterable[str], rounded: Iterable[str], case: Any) -> Errors:
    """Limits of an implementation that computes all of `names` in the case's dtype, at least fp32, and of which those
    in `rounded`, and their gradients, are rounded to that dtype."""
    exact = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6}[case.dtype]
    rounded = {*rounded, *(f"d{name}" for name in rounded)} if case.dtype == "bfloat16" else ()
    return {name: 4e-3 if name in rounded else exact for name in names}


def reached(step: Callable[[jax.Array], tuple[jax.Array, jax.Array]], state: np.ndarray) -> list[str]:
    """What inf and NaN in two value columns of a state [B, Hv, K, V] change elsewhere in the results of one token,
    o [B, Hv, V] and the next state; no value column needs another."""
    broken = np.array(state, np.float32)
    broken[0, 0, 0, 1], broken[-1, -1, -1, -1] = np.nan, np.inf
    columns = np.isfinite(broken).all(axis=2)
    (o, after), (clean_o, clean_after) = (map(np.asarray, step(jnp.asarray(x, jnp.float32))) for x in (broken, state))
    whole = np.broadcast_to(columns[:, :, None], after.shape)
    found = {"o": (o, clean_o, columns), "state": (after, clean_after, whole)}
    changed = [name for name, (x, clean, outside) in found.items() if not np.array_equal(x[outside], clean[outside])]
    hidden = [f"finite {name}" for name, (x, _, _) in found.items() if np.isfinite(x).all()]
    return changed + hidden


@partial(jax.jit, static_argnames=("call", "impl", "configuration", "options"))
def _run(call, inputs, impl, configuration, options):
    """(*results, *gradients of every array)."""

    def op(*arrays):
        return call(arrays, inputs.integers, impl, configuration, *options)

    results, vjp = jax.vjp(op, *inputs.arrays)
    return *results, *vjp(tuple(inputs.cotangents))


@dataclass(kw_only=True)
class Suite:
    """How the cases of one op are run and judged; what an op's conformance.py hands in."""

    arrays: tuple[str, ...]  # the inputs that have gradients
    results: tuple[str, ...]
    rounded: tuple[str, ...]  # those of both that have the dtype of the case; all others have fp32 at least
    inputs: Callable[[Any, int], Inputs]  # of a case and a seed
    call: Callable[..., tuple]  # (arrays, integers, impl, configuration, *options) -> results
    options: tuple[str, ...]  # fields of a case that `call` takes; cases that agree in them share a compilation
    limits: Callable[[Any, str], Errors]  # the accuracy asked of `impl` at a case
    floors: Callable[[Inputs, dict[str, np.ndarray]], Errors] | None = None  # relative_errors' of inputs and the oracle

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of results and gradients."""
        return self.results + tuple(f"d{name}" for name in self.arrays)

    def outputs_and_gradients(
        self, case: Any, arrays, integers, cotangents, *, impl: str, dtype: Any, configuration: Any = None
    ) -> dict[str, np.ndarray]:
        """Every output and gradient of one call at `dtype`, as float64 arrays; those of absent arrays are left out."""
        exact = jnp.promote_types(jnp.float32, dtype)

        def given(names, values):
            dtypes = [dtype if name in self.rounded else exact for name in names]
            return [None if x is None else jnp.asarray(x, kind) for x, kind in zip(values, dtypes, strict=True)]

        integers = None if integers is None else jnp.asarray(integers, jnp.int32)
        inputs = Inputs(given(self.arrays, arrays), integers, given(self.results, cotangents))
        options = tuple(getattr(case, name) for name in self.options)
        found = zip(self.outputs, _run(self.call, inputs, impl, configuration, options), strict=True)
        return {name: np.asarray(x).astype(np.float64) for name, x in found if x is not None}

    def oracle(self, case: Any, arrays, integers, cotangents) -> dict[str, np.ndarray]:
        """The same by the op's reference.py in float64."""
        with jax.enable_x64(True):
            given = arrays, integers, cotangents
            return self.outputs_and_gradients(case, *given, impl="reference", dtype=jnp.float64)

    def errors(self, case: Any, impl: str, seed: int = 0, configuration: Any = None) -> Errors:
        """Relative L2 error of every output and gradient of `impl` against float64."""
        inputs = Inputs(*self.inputs(case, seed))
        chosen = {"impl": impl, "dtype": jnp.dtype(case.dtype), "configuration": configuration}
        got, want = self.outputs_and_gradients(case, *inputs, **chosen), self.oracle(case, *inputs)
        return relative_errors(got, want, self.floors and self.floors(inputs, want))

    def failures(self, case: Any, impl: str, seed: int = 0, configuration: Any = None) -> list[str]:
        """`name error > limit` for everything of `impl` that is outside its limit or not finite."""
        return outside(self.errors(case, impl, seed, configuration), self.limits(case, impl))

    def missed(self, cases: Iterable[Any], configuration: Any = None) -> list[str]:
        """For admission: `case: name error > limit` for everything that the kernels miss on this device."""
        found = ((case.name, self.failures(case, "triton", 6, configuration)) for case in cases)
        return [f"{name}: {failure}" for name, failures in found for failure in failures]
