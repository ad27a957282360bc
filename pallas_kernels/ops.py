"""Which ops there are: every folder of this package that has an api.py. What an op brings is found by file names.

    api.py          NAME and the op
    conformance.py  cases and their limits; QUICK, choice(case) and failures(case, impl) for `gdn doctor`
    benchmark.py    shapes, inputs, peers and cost for `gdn bench`; imports neither jax nor torch at its top
    tuning.py       kernels and candidates for `gdn tune`, where the op has kernels

Nothing here imports jax: the process that starts benchmarks does without.
"""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent


def names(having: str = "api") -> list[str]:
    """All ops whose folder has the module `having`, in alphabetical order."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{having}.py") if (path.parent / "api.py").exists())


@functools.cache
def benchmark(op: str) -> ModuleType:
    """benchmark.py of an op, executed by itself: its package imports jax. ValueError for an op that has none."""
    if op not in (known := names("benchmark")):
        raise ValueError(f"There is no op {op!r} to bench; it must be one of {', '.join(known)}.")
    spec = importlib.util.spec_from_file_location(f"pallas_kernels.{op}.benchmark", HERE / op / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
