"""What makes an implementation correct."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from pallas_kernels.toy.api import resolve, toy

from pallas_kernels.accuracy import outside, relative_errors


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs."""

    name: str
    T: int
    dtype: str = "float32"


CASES = QUICK = (Case(name="T=6", T=6),)


def choice(case):
    return resolve("auto")


def failures(case, impl, configuration=None):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, case.T)), case.dtype)
    got = toy(x, jnp.float32(0.3), impl=impl, configuration=configuration)
    want = np.asarray(x, np.float64) * np.float64(np.float32(0.3))
    errors = relative_errors({"y": np.asarray(got, np.float64)}, {"y": want})
    return outside(errors, {"y": 4e-3 if case.dtype == "bfloat16" else 1e-6})
