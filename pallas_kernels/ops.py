"""Which ops there are: every folder of this package that has an api.py. What an op brings is found by file names.

    api.py          NAME, the op, resolve(impl)
    conformance.py  CASES; QUICK, choice(case) and failures(case, impl) for `gdn doctor`; it takes a configuration too
                    for `gdn tune`; check(sizes) for admission.py, where the op has kernels; SUITE (conformance.Suite)
    benchmark.py    for `gdn bench`: Shape, WRITTEN, SHAPES, inputs(shape, random), BF16, GRADIENTS, ours(impl, ...),
                    PEERS, cost(shape); imports neither jax nor torch at its top
    tuning.py       for `gdn tune`, where the op has kernels: KERNELS, KINDS of configurations (tuned.py); of a shape
                    why_not, as_run, entry_name, in_force, wholes, checks, inputs; admits(name); run and candidates of
                    one kernel

tests/toy_op is a small one with all of them. Nothing here imports jax: the process that starts benchmarks does without.
"""

import functools
import importlib
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


def module(op: str, name: str) -> ModuleType:
    """The module `name` of an op."""
    return importlib.import_module(f"pallas_kernels.{op}.{name}")
