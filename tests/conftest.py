"""Four simulated CPU devices for every test; an accelerator is used only by tests marked gpu."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
