"""Four simulated CPU devices for every test; an accelerator is used only by tests marked gpu."""

import os

# Tests compile many small programs once each: LLVM's optimizer would take more time than it saves.
# A loaded machine may take minutes until all four devices meet in a reduction; XLA would abort after 40 seconds.
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=900"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax  # noqa: E402  reads XLA_FLAGS when it is first used
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402


@pytest.fixture(autouse=True)
def no_cache_of_another_test():
    """Training turns the cache of compiled programs on for its process: what a later test compiles is not written there
    (jaxlib 0.10.2 was seen to crash while it wrote a program of four devices)."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
