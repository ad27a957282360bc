"""What makes an implementation correct."""

from dataclasses import dataclass

import numpy as np
from pallas_kernels.toy.api import resolve, toy

from pallas_kernels.conformance import Inputs, Suite, round_to


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of random inputs."""

    name: str
    T: int
    dtype: str = "float32"


CASES = QUICK = (Case(name="T=6", T=6),)


def choice(case):
    return resolve("auto")


def inputs(case, seed):
    x, dy = (round_to(np.random.default_rng(i).standard_normal((2, case.T)), case.dtype) for i in (seed, seed + 1))
    return Inputs([x], None, [dy])


SUITE = Suite(
    arrays=("x",), results=("y",), rounded=("x", "y"), options=(), inputs=inputs,
    call=lambda arrays, _, impl, configuration: (toy(*arrays, 0.25, impl=impl, configuration=configuration),),
    limits=lambda case, impl: dict.fromkeys(("y", "dx"), 4e-3 if case.dtype == "bfloat16" else 1e-6),
)  # fmt: skip
failures = SUITE.failures
