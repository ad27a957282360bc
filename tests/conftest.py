"""Four simulated CPU devices for every test; an accelerator is used only by tests marked gpu."""

import os

# Tests compile many small programs once each: LLVM's optimizer would take more time than it saves.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
