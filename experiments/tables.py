"""A table of the paper, row by row: its numbers, and ours from the runs there are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import experiments
from experiments import report
from experiments.models import PAPER_MODELS
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest

NOT_RUN = "not run"
STAND_IN = "held_out_ppl"
# metric of paper.json and of a run's zero_shot numbers -> column
TABLE3 = {
    "wiki_ppl": "Wiki ppl", "lambada_ppl": "LMB ppl", "lambada_acc": "LMB acc", "piqa": "PIQA",
    "hellaswag_acc_norm": "Hella", "winogrande": "Wino", "arc_easy": "ARC-e", "arc_challenge_acc_norm": "ARC-c",
    "siqa": "SIQA", "boolq": "BoolQ", "average": "Avg",
}  # fmt: skip
TABLES = {"table3": TABLE3}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Print a table of the paper, such as table3, from the runs there are."""

    scale: Literal["tiny", "desk", "400m", "400m-matched", "1.3b"] = "1.3b"
    json: tyro.conf.FlagCreatePairsOff[bool] = False  # print an array of objects


def table(name: str, options: TableOptions) -> None:
    """`gdn table NAME`: one row for each of the ten models; the paper's rows too where the scale is the paper's."""
    if name not in TABLES:
        raise UserError(f"There is no table {name!r}{nearest(name, TABLES)}; there are {', '.join(TABLES)}.")
    found = rows(name, options.scale)
    print(json.dumps(found, indent=1) if options.json else described(name, options.scale, found))


def rows(name: str, scale: str) -> list[Row]:
    """For each model our numbers, each a value or "not run", the paper's or None, and what ours came from.

    A run counts when its configuration is the ID's own: first one below runs/ here, then a published result.
    """
    published = report.published()
    paper = json.loads(report.PAPER.read_text())
    out = []
    for model in PAPER_MODELS:
        experiment = experiments.get(f"{name}/{model}/{scale}")
        run = _run(experiment, published)
        zero_shot = {} if run is None else run.get("zero_shot", {})
        ours = {metric: zero_shot.get(metric, NOT_RUN) for metric in TABLES[name]}
        ours[STAND_IN] = NOT_RUN if run is None else run["validation"]["token_perplexity"]
        entry = paper.get(experiment.id)
        out.append({
            "id": experiment.id,
            "model": model,
            "ours": ours,
            "paper": None if entry is None else entry["numbers"],
            "source": None if entry is None else entry["source"],
            "tokenizer": experiment.data.tokenizer,
            "steps": None if run is None else run["steps"],
            "from": NOT_RUN if run is None else _origin(run["environment"]),
        })  # fmt: skip
    return out


def _run(experiment: Experiment, published: dict[str, Row]) -> Row | None:
    path = Path("runs") / experiment.id / experiment.hash8 / "result.json"
    row = json.loads(path.read_text()) if path.exists() else published.get(experiment.id)
    return row if row is not None and row["hash8"] == experiment.hash8 else None


def _origin(environment: Row) -> str:
    return f"{report.device(environment)}, {environment['date'][:10]}, {report.commit(environment)}"


def described(name: str, scale: str, found: list[Row]) -> str:
    """Rows for a reader."""
    columns = TABLES[name]
    lines = [("model", "whose", *columns.values(), "held-out ppl*", "from")]
    for row in found:
        if row["paper"] is not None:
            numbers = (_cell(row["paper"].get(metric, "-")) for metric in columns)
            lines.append((row["model"], "paper", *numbers, "-", "paper"))
        lines.append((row["model"], "ours", *map(_cell, row["ours"].values()), row["from"]))
    unit = "byte" if all(row["tokenizer"] == "byte" for row in found) else "token"
    return (
        f"{name} at {scale}\n{report.aligned(lines)}\n"
        f"* perplexity per {unit} of held-out text of the run's own data: a stand-in until the other columns are run; "
        f"it compares the rows of this table alone, never with the paper."
    )


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
