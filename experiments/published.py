"""Published results: where they are kept, and which of them are averaged into one number.

    python -m experiments.published runs/ID/HASH ...      keep the results of these runs in experiments/results/
    python -m experiments.published runs/figure3/*/1.3b/*.json      keep points of Figure 3

A result lies at results/<id>/<recipe8>/<seed>-<data8>-<device>.json: recipe8 is the hash of model, optimizer and data
configuration without the seed, data8 the fingerprint of the tokens that it was trained on. Runs that differ in the seed
alone are one row, mean and spread; another recipe, other data or another kind of device is another row. A point of
Figure 3 lies at results/<id>/<recipe8>/<setting>-<device>.json.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.suites import unfinished
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError
from gdn_jax.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def marks(evaluation: Row) -> list[str]:
    """Why an evaluation is not the number of its ID, in words: unfinished, fewer windows, other stride, other data."""
    found = unfinished(evaluation["step"], evaluation["of_steps"], evaluation["trained_on"])
    if evaluation["windows"] < evaluation["of_windows"]:
        found.append(f"{evaluation['windows']:,} of {evaluation['of_windows']:,} windows")
    if evaluation["stride"] != evaluation["window"]:
        found.append(f"stride {evaluation['stride']}")
    if evaluation["window"] != evaluation["trained_window"]:
        found.append(f"windows of {evaluation['window']}, trained with {evaluation['trained_window']}")
    if evaluation["data"] != evaluation["trained_on"]:
        trained_on = "data of another program" if evaluation["trained_on"] is None else evaluation["trained_on"][:8]
        found.append(f"read on data {evaluation['data'][:8]}, trained on {trained_on}")
    return found


def protocol(evaluation: Row) -> tuple:
    """The part of an evaluation that says what was measured; of evaluations that agree in it the newest is kept."""
    return tuple(evaluation[key] for key in ("data", "window", "stride", "windows"))


def preferred(evaluations: list[Row]) -> Row:
    """The evaluation that stands for a run: of those with the fewest marks the newest."""
    return min(reversed(evaluations), key=lambda one: len(marks(one)))


@dataclass(frozen=True)
class Result:
    """The runs of one recipe on the same data and kind of device, one for each seed."""

    rows: tuple[Row, ...]

    @property
    def marks(self) -> list[str]:
        return marks(self.rows[0]["validation"])

    def value(self, metric: str, group: str = "validation") -> float | None:
        """Mean over the seeds of rows[group][metric]; None where a seed lacks it."""
        values = self._values(metric, group)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str, group: str = "validation") -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        values = self._values(metric, group)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, metric: str, group: str) -> list[float]:
        values = [row.get(group, {}).get(metric) for row in self.rows]
        return [] if None in values else values

    def origin(self) -> str:
        """Device, date, commit and data, and how many seeds where there is more than one."""
        newest = max(self.rows, key=lambda row: row["environment"]["date"])
        trained_on = newest["validation"]["trained_on"]
        commits = dict.fromkeys(commit(row["environment"]) for row in self.rows)
        parts = [device(newest["environment"]), newest["environment"]["date"][:10], " ".join(commits)]
        parts.append("imported" if trained_on is None else f"data {trained_on[:8]}")
        return ", ".join(parts + ([f"{len(self.rows)} seeds"] if len(self.rows) > 1 else []))


def results(found: Iterable[Row]) -> list[Result]:
    """Rows of one experiment put together by recipe, data, step, device and marks, one a seed.

    Of two with one seed the first counts; entries of the other's tasks stand behind its own, so that a fresh run hides
    none that was published: which of them counts says Suite.standing.
    """
    groups: dict[tuple, dict[int, Row]] = {}
    for row in found:
        evaluation, environment = row["validation"], row["environment"]
        same = (row["recipe8"], evaluation["trained_on"], row.get("steps"), device(environment), *marks(evaluation))
        seeds = groups.setdefault(same, {})
        first = seeds.setdefault(row["seed"], row)
        if first is not row:
            seeds[row["seed"]] = first | {"tasks": [*row.get("tasks", []), *first.get("tasks", [])]}
    together = [Result(tuple(seeds[seed] for seed in sorted(seeds))) for seeds in groups.values()]
    return sorted(together, key=lambda result: bool(result.marks))


def rows(id: str = "") -> list[Row]:
    """The rows of experiments/results/, of one ID or of all."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / id).glob("**/*.json"))]


def of_experiment(experiment: Experiment, *, runs: Path | None = None) -> list[Result]:
    """Results of an experiment's own recipe: those below `runs` first, then the published ones."""
    own = [] if runs is None else sorted((runs / experiment.id).glob("*/result.json"))
    found = [read_json(path, dict, "recipe8") for path in own] + rows(experiment.id)
    steps = experiment.optim.steps  # of the recipe
    return results(with_steps(row, steps) for row in found if row.get("recipe8") == experiment.recipe8)


def with_steps(row: Row, of_steps: int) -> Row:
    """A result row whose evaluation says of how many steps it is, also where that was not yet recorded."""
    return row | {"validation": {"step": row["steps"], "of_steps": of_steps} | row["validation"]}


def place(row: Row) -> Path:
    """Where a result row is kept."""
    trained_on = row["validation"]["trained_on"]
    return RESULTS / row["id"] / row["recipe8"] / f"{row['seed']}-{trained_on[:8]}-{_kind(row)}.json"


def _kind(row: Row) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device(row["environment"]).lower()).strip("-")


def publish(run_dir: Path) -> Path:
    """Keep a run's result; a UserError for one that is marked, or of files with uncommitted changes."""
    path = run_dir / "result.json"
    if not path.exists():
        raise UserError(f"{run_dir} holds no result.json; `gdn run` writes it.")
    row = read_json(path, dict, "recipe8")
    if "of_steps" not in row["validation"]:
        from gdn_jax.checkpoint import read_config

        row = with_steps(row, read_config(run_dir).optim.steps)
    if why := marks(row["validation"]):
        raise UserError(f"The result of {run_dir} is not its ID's number ({', '.join(why)}); run: gdn run {row['id']}.")
    return _keep(row, place(row), run_dir)


def publish_point(path: Path) -> Path:
    """Keep a point of Figure 3; a UserError for one that was not measured, or of files with uncommitted changes."""
    row = read_json(path, dict, "recipe8", "note")
    if row["note"]:
        raise UserError(f"{path} holds no number ({row['note']}); measure it again: gdn bench figure3.")
    return _keep(row, RESULTS / row["id"] / row["recipe8"] / f"{path.stem}-{_kind(row)}.json", path)


def _keep(row: Row, to: Path, made: Path) -> Path:
    row = row | {"environment": _committed(row["environment"], f"{made} was made")}
    if "tasks" in row:
        row["tasks"] = [
            one
            | {"environment": _committed(one["environment"], f"{one['suite']}/{one['task']} of {made} was measured")}
            for one in row["tasks"]
        ]
    to.parent.mkdir(parents=True, exist_ok=True)
    write_json(to, row)
    return to


def _committed(environment: Row, what: str) -> Row:
    """The environment with its commit, or a UserError for files with uncommitted changes."""
    found = committed(environment)
    if found["dirty"]:
        raise UserError(
            f"{what} with uncommitted changes; commit them and run it again, or publish it from a checkout "
            f"without changes whose files are those of its source {found['source']}."
        )
    return found


def committed(environment: Row) -> Row:
    """The environment with its commit filled in, found by the hash of the files: a copied tree does not know it."""
    if not environment["dirty"] and environment["commit"] != "unknown":
        return environment
    from gdn_jax import metrics

    here = metrics.environment()
    same = here["commit"] != "unknown" and not here["dirty"] and here["source"] == environment["source"]
    return environment | {"commit": here["commit"], "dirty": False} if same else environment


def device(environment: Row) -> str:
    """The devices of env.json in a few words: "NVIDIA H100 80GB HBM3", "2 x cpu"."""
    kinds = environment["devices"]
    count = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(kind if number == 1 else f"{number} x {kind}" for kind, number in count.items())


def commit(environment: Row) -> str:
    """Short commit of env.json, "+" when there were uncommitted changes; without git the hash of the source."""
    if environment["commit"] == "unknown":
        return f"source {environment['source']}"
    return f"{environment['commit'][:9]}{'+' if environment['dirty'] else ''}"


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            print(publish_point(Path(name)) if name.endswith(".json") else publish(Path(name)))
    except (UserError, OSError) as error:
        sys.exit(str(error))
