"""A table of the paper, row by row: its numbers, and ours from the runs there are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import experiments
from experiments import published, report
from experiments.models import PAPER_MODELS
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
    """Our numbers by model, each a value or "not run", beside the paper's or None, and what ours came from.

    A run counts when its recipe is the ID's own: those below runs/ here, then published results. A row is the mean over
    the seeds of one recipe, data and kind of device, `spread` its standard deviation; other data or another device is
    another row, and so is what was measured on less than the whole of the held-out text, which `marks` names.
    """
    paper = json.loads(report.PAPER.read_text())
    out = []
    for model in PAPER_MODELS:
        experiment = experiments.get(f"{name}/{model}/{scale}")
        entry = paper.get(experiment.id)
        for result in published.of_experiment(experiment, runs=Path("runs")) or [None]:
            ours, spread = _numbers(name, result)
            out.append({
                "id": experiment.id,
                "model": model,
                "ours": ours,
                "spread": spread,
                "seeds": [] if result is None else [row["seed"] for row in result.rows],
                "marks": [] if result is None else result.marks,
                "data": None if result is None else result.rows[0]["validation"]["trained_on"],
                "paper": None if entry is None else entry["numbers"],
                "source": None if entry is None else entry["source"],
                "tokenizer": experiment.data.tokenizer,
                "steps": None if result is None else result.rows[0]["steps"],
                "from": NOT_RUN if result is None else result.origin(),
            })  # fmt: skip
    return out


def _numbers(name: str, result: published.Result | None) -> tuple[Row, Row]:
    """Mean and spread of every column."""
    places = {metric: ("zero_shot", metric) for metric in TABLES[name]} | {STAND_IN: ("validation", "token_perplexity")}
    ours, spread = {}, {}
    for column, (group, metric) in places.items():
        value = None if result is None else result.value(metric, group)
        ours[column] = NOT_RUN if value is None else value
        spread[column] = None if result is None else result.spread(metric, group)
    return ours, spread


def described(name: str, scale: str, found: list[Row]) -> str:
    """Rows for a reader."""
    columns = TABLES[name]
    lines = [("model", "whose", *columns.values(), "held-out ppl*", "from")]
    for row in found:
        if row["paper"] is not None:
            numbers = (_cell(row["paper"].get(metric, "-")) for metric in columns)
            lines.append((row["model"], "paper", *numbers, "-", "paper"))
        numbers = (_cell(value, row["spread"][column]) for column, value in row["ours"].items())
        whole = "".join(f"; MARKED: {mark}" for mark in row["marks"])
        lines.append((row["model"], "ours", *numbers, row["from"] + whole))
    unit = "byte" if all(row["tokenizer"] == "byte" for row in found) else "token"
    return (
        f"{name} at {scale}\n{report.aligned(lines)}\n"
        f"* perplexity per {unit} of held-out text of the run's own data: a stand-in until the other columns are run; "
        f"it compares the rows of this table alone, never with the paper. Rows of other data or devices and MARKED "
        f"ones compare with nothing."
    )


def _cell(value: float | str, spread: float | None = None) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"
