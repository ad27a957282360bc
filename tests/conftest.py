"""Four simulated CPU devices for every test; an accelerator is used only by tests marked gpu."""

import os

# Tests compile many small programs once each: LLVM's optimizer would take more time than it saves.
# A loaded machine may take minutes until all four devices meet in a reduction; XLA would abort after 40 seconds.
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=900"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
