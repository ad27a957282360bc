"""Runs the code blocks of a page of docs/, in order, in one directory.

A block ```python whose first line is `# NAME.py` is saved under that name; another one is run by Python, a block ```sh
line by line by bash. What fails raises AssertionError with the block and what it printed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILE = re.compile(r"# (\w+\.py)\n")
SECONDS = 500


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def saved(page: str, directory: Path) -> list[str]:
    """The names of the files that the page asks for, now in `directory`."""
    found = {FILE.match(text)[1]: text for language, text in blocks(page) if FILE.match(text)}
    for name, text in found.items():
        (directory / name).write_text(text)
    return list(found)


def run_page(page: str, directory: Path) -> str:
    """What all blocks printed."""
    files, printed = saved(page, directory), ""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for language, text in blocks(page):
        if FILE.match(text) and FILE.match(text)[1] in files:
            continue
        command = {"sh": ["bash", "-ec", text], "python": [sys.executable, "-c", text]}[language]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        printed += done.stdout + done.stderr
    return printed
