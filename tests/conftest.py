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


@pytest.fixture(autouse=True, scope="module")
def no_program_of_another_file():
    """Every compiled program holds a few memory maps of its process, of which Linux allows 65,530: past that, the whole
    suite in two processes ended in a segmentation fault."""
    yield
    jax.clear_caches()
