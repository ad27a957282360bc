"""The notebooks as a page: their text, what they print, their pictures.

    python -m experiments.notebook_page docs

runs each notebook in the current directory, which needs the runs of `gdn run smoke/gated-deltanet` and
`gdn run smoke/gated-deltanet-fla`, and writes docs/notebooks.md and docs/notebooks/*.png. Below each picture stands
what it is from: run, device, date, commit, data.
"""

import contextlib
import io
import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import published
from gdn_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTEBOOKS = Path(__file__).parent / "notebooks"
ORDER = ("kernels", "evaluate", "huggingface", "tables")
TITLE = """# The notebooks

What `python -m experiments.notebook_page docs` made of [experiments/notebooks](../experiments/notebooks), files of
Python to read and to change. Smoke runs of a minute on a CPU: the pictures show what one can ask, not how good a model
is.
"""


@dataclass
class Cell:
    """A cell of a py:percent file; text or code, and what the code left behind."""

    text: str  # Markdown; empty for code
    code: str
    printed: str = ""
    pictures: "list[tuple[Figure, str]]" = field(default_factory=list)  # each with what its numbers are from


def cells_of(path: Path) -> list[Cell]:
    """The cells of a notebook; code keeps its line numbers."""
    cells, lines = [], path.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("# %%")] + [len(lines)]
    for start, stop in itertools.pairwise(starts):
        body = lines[start + 1 : stop]
        if lines[start].endswith("[markdown]"):
            cells.append(Cell("\n".join(re.sub("^# ?", "", line) for line in body).strip(), ""))
        else:
            cells.append(Cell("", "\n" * (start + 1) + "\n".join(body)))
    return cells


def run_notebook(path: Path) -> list[Cell]:
    """Run a notebook in the current directory; its cells keep what they print, and each picture at plt.show()."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, names = cells_of(path), {"__name__": path.stem}
    show = plt.show
    try:
        for cell in cells:
            plt.show = lambda cell=cell: cell.pictures.append((plt.gcf(), origin(names)))
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(cell.code, str(path), "exec"), names)
            cell.printed = printed.getvalue()
    finally:
        plt.show = show
        plt.close("all")
    return cells


def origin(names: dict[str, Any]) -> str:
    """What a picture's numbers are from: the notebook's `origin`, which says it in words, or else its `run`."""
    if "run" not in names:
        return names["origin"]
    run = names["run"]
    imported = run.trained_on.fingerprint is None
    facts = json.loads((run.directory / ("import.json" if imported else "env.json")).read_text())
    made = facts["environment"] if imported else facts
    data = "imported from another program's files" if imported else f"data {run.trained_on.fingerprint[:8]}"
    about = published.device(made), made["date"][:10], published.commit(made), data
    return ", ".join([run.experiment.id, f"step {run.step}", *about])


def write(directory: Path) -> Path:
    """Write notebooks.md and its pictures; returns the path of the page."""
    from gdn_jax.metrics import environment

    here, parts = environment(), [TITLE]
    drawn = f"drawn on {published.device(here)}, {here['date'][:10]}, {published.commit(here)}"
    folder = directory / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ORDER:
        count = 0
        for cell in run_notebook(NOTEBOOKS / f"{name}.py"):
            if cell.text:
                parts.append(re.sub("^#", "##", cell.text) + "\n")
            if cell.printed:
                parts.append(f"```text\n{cell.printed.strip()}\n```\n")
            for figure, source in cell.pictures:
                count += 1
                path = folder / f"{name}-{count}.png"
                figure.savefig(path, dpi=90)
                parts.append(f"![{name}, picture {count}](notebooks/{path.name})\n\n*From {source}; {drawn}.*\n")
        parts.append(f"The code: [{name}.py](../experiments/notebooks/{name}.py).\n")
    page = directory / "notebooks.md"
    page.write_text("\n".join(parts))
    return page


if __name__ == "__main__":
    try:
        print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")))
    except (UserError, OSError) as error:
        sys.exit(str(error))
