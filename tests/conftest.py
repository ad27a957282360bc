"""Four simulated CPU devices for every test; an accelerator is used only by tests marked gpu."""

import gc
import os
from importlib.metadata import version

# Tests compile many small programs once each: LLVM's optimizer, MLIR's fusions (from 0.11 on always there) and cutting
# a program for several compiling threads would all take more time than they save.
# A loaded machine may take minutes until all four devices meet in a reduction; XLA would abort after 40 seconds.
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_collective_call_terminate_timeout_seconds=900"
)
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # the last one counts: yours

import jax  # noqa: E402  reads XLA_FLAGS when it is first used
import pytest  # noqa: E402


def pytest_collection_finish():
    """Modules and tests outlive the session, and jax makes many short-lived objects: looking for cycles among all of
    them after every 700 took a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def no_program_of_another_file():
    """Every compiled program holds a few memory maps of its process, of which Linux allows 65,530: past that, the whole
    suite in two processes ended in a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()  # what only cycles still hold
