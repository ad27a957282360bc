"""Around Orbax: reads by one process, without the pages that damage brings forth, and writes that failed in one."""

import contextlib
import gc
import io
import logging
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


class FailedWrites(logging.Filter):
    """Keeps back what Orbax logs, every file it touches, and of it the error that ended a write in this process.

    Orbax raises that only when all processes have come to the end of their writes. They do not where one has failed: it
    waits for them there, and they for its part, 20 minutes.
    """

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.threadName == "async_save" and record.exc_info:
            self.error = record.exc_info[1]
        return record.levelno >= logging.CRITICAL


def failed_writes() -> FailedWrites:
    """Of Orbax in this process from now on."""
    logger = logging.getLogger("absl")
    logger.setLevel(logging.ERROR)
    for one in [one for one in logger.filters if isinstance(one, FailedWrites)]:
        logger.removeFilter(one)
    logger.addFilter(found := FailedWrites())
    return found
