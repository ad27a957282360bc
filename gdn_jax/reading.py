"""Around Orbax while it reads: a process on its own, without the pages that a damaged checkpoint brings forth."""

import contextlib
import gc
import io
import time
from collections.abc import Iterator

import jax
from orbax.checkpoint import v1 as ocp

QUIET_SECONDS = 0.3  # without a word from threads whose reads failed: they have ended


def by_itself() -> ocp.Context:
    """Without Orbax's barriers: where a read fails, the other processes would stand at the next one for minutes."""
    here = jax.process_index()
    return ocp.Context(
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps back what Orbax's threads print of a damaged checkpoint: pages, some of them after the error is raised."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        failed = True
        try:
            yield
            failed = False
        finally:
            before = -1 if failed else 0
            while before < printed.tell():
                before = printed.tell()
                time.sleep(QUIET_SECONDS)
                gc.collect()
