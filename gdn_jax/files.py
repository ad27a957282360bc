"""Files that are whole or absent: a full disk or a crash midway leaves the old content."""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from gdn_jax.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def temporary(path: Path) -> Path:
    """Where this process writes what then becomes `path`; another process, even a dying one, has another name."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` at once."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace the content of `path` at once."""
    new = temporary(path)
    try:
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a failed write does not know it
        raise


def write_json(path: Path, tree: Any) -> None:
    """Replace `path` by `tree` as JSON; a number that is not finite is a ValueError."""
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: type[list] | type[dict], *fields: str) -> Any:
    """What a file of ours holds: an object with these fields, or a list of such. UserError where it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(path.read_bytes())
        rows = tree if isinstance(tree, list) else [tree]
        if isinstance(tree, kind) and all(isinstance(row, dict) and set(fields) <= set(row) for row in rows):
            return tree
    raise UserError(f"{path} is damaged; delete it, and make it again with the command that wrote it.")


def explained(error: OSError, where: object = "this run") -> str:
    """One sentence for an error of the operating system that nothing else has explained."""
    if error.errno in NO_SPACE:
        what = error.filename or where
        return f"No space left for {what}; free some and run the same command again: it goes on from what is saved."
    return f"{error.filename or where}: {error.strerror or error}; check the path and its permissions."
