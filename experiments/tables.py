"""`gdn table NAME`: a table of the paper, its numbers and ours beside each other, as text and as files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import experiments
from experiments import ablations, published, report, table2, table3, table4, table5
from experiments.models import PAPER_MODELS
from experiments.options import Switch
from experiments.suites import Cell, Suite
from gdn_jax.errors import UserError, nearest

NOT_RUN = "not run"
DIFFERENCES = Path(__file__).parent / "paper_differences.json"  # id -> column -> the paper's cell, the document's
STAND_IN = "held_out_ppl"
HYBRID = ("transformer", "samba", "gated-deltanet-h1", "gated-deltanet-h2")  # the paper's second group of rows

Row = dict[str, Any]
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Which rows, which columns, and which suite measures them."""

    title: str
    suite: Suite
    columns: dict[str, str]  # keys as in paper.json -> title
    rows: Callable[[str], dict[str, str]]  # scale -> label of a row: the ID that trains it
    scales: tuple[str, ...]
    printed: Callable[[str], str] = str  # ID that trains -> key of the paper's row

    def lower(self, key: str) -> bool:
        """Whether less is better in this column."""
        return key in ("average_ppl", STAND_IN) or (key in self.suite.columns and self.suite.columns[key].lower)


def _titles(suite: Suite) -> dict[str, str]:
    return {key: column.title for key, column in suite.columns.items()} | ({"average": "Avg"} if suite.averaged else {})


def _models(scale: str) -> dict[str, str]:
    return {model: f"table3/{model}/{scale}" for model in PAPER_MODELS}


def _of_suite(title: str, suite: Suite) -> Table:
    return Table(
        title, suite, _titles(suite), _models, ("tiny", "desk", "400m", "400m-matched", "1.3b"),
        lambda id: id.replace("table3", suite.name, 1),
    )  # fmt: skip


TABLES = {
    "table2": _of_suite("S-NIAH, zero-shot accuracy", table2.SUITE),
    "table3": _of_suite("Language modelling and zero-shot common-sense reasoning", table3.SUITE),
    "table4": _of_suite("Recall-intensive tasks, input cut to 2K tokens", table4.SUITE),
    "table5": _of_suite("LongBench", table5.SUITE),
    "s1": Table(
        "Parts of Gated DeltaNet", table3.SUITE, {"average_ppl": "Avg-PPL", "average": "Avg-Acc"},
        lambda scale: ablations.rows("s1", scale), ablations.SCALES,
    ),
    "s2": Table(
        "Order of the hybrid's mixers", table3.SUITE, _titles(table3.SUITE),
        lambda scale: ablations.rows("s2", scale), ablations.SCALES,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Print a table of the paper (table2 to table5, s1, s2) from the runs there are, beside the paper's numbers."""

    scale: Literal["tiny", "desk", "400m", "400m-matched", "1.3b"] = "1.3b"
    json: Switch = False  # print an array of objects
    out: str = ""  # directory that gets NAME-SCALE.md, .json, .tex and .png; empty: none


def table_of(name: str) -> Table:
    """The table called `name`, or a UserError."""
    if name not in TABLES:
        raise UserError(f"There is no table {name!r}{nearest(name, TABLES)}; there are {', '.join(TABLES)}.")
    return TABLES[name]


def table(name: str, options: TableOptions) -> None:
    """`gdn table NAME`: one row for each model; the paper's rows too where the scale is the paper's."""
    spec = table_of(name)
    if options.scale not in spec.scales:
        raise UserError(f"{name} has no scale {options.scale}; --scale is one of {', '.join(spec.scales)}.")
    found = rows(name, options.scale)
    written = []
    if options.out:
        from experiments.drawn_tables import write

        written = write(name, options.scale, found, Path(options.out))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(described(name, options.scale, found))
    for path in written:
        print(f"Wrote {path}.")


def rows(name: str, scale: str) -> list[Row]:
    """Our numbers by row, each a value or "not run", beside the paper's or None, and what ours came from.

    A run counts when its recipe is the ID's own: those below runs/ here, then published results. A row is the mean over
    the seeds of one recipe, data and kind of device, `spread` its standard deviation; other data or another device is
    another row, and so is a held-out perplexity of less than the whole text, which `marks` names. `cell_marks` says of
    a column what keeps its number from being the paper's measure, `cell_seeds` of how many seeds it is, if not of all.
    """
    spec, paper = TABLES[name], json.loads(report.PAPER.read_text())
    differences = json.loads(DIFFERENCES.read_text())
    out = []
    for label, id in spec.rows(scale).items():
        experiment, entry = experiments.get(id), paper.get(spec.printed(id))
        for result in published.of_experiment(experiment, runs=Path("runs")) or [None]:
            cells = {key: _cell(spec, key, result) for key in spec.columns} | {STAND_IN: _held_out(result)}
            out.append({
                "id": id,
                "model": label,
                "group": "attention or hybrid" if label in HYBRID else "recurrent",
                "ours": {key: NOT_RUN if cell.value is None else cell.value for key, cell in cells.items()},
                "spread": {key: cell.spread for key, cell in cells.items()},
                "seeds": [] if result is None else [row["seed"] for row in result.rows],
                "marks": [] if result is None else result.marks,
                "cell_marks": {key: list(cell.marks) for key, cell in cells.items() if cell.marks},
                "cell_seeds": {} if result is None else _other_seeds(cells, result),
                "protocols": _protocols(cells),
                "data": None if result is None else result.rows[0]["validation"]["trained_on"],
                "paper": None if entry is None else {key: entry["numbers"].get(key) for key in spec.columns},
                "difference": _differences(cells, entry),
                "source": None if entry is None else entry["source"],
                "document_differs": sorted(differences.get(spec.printed(id), {})),
                "tokenizer": experiment.data.tokenizer,
                "steps": None if result is None else result.rows[0]["steps"],
                "from": NOT_RUN if result is None else result.origin(),
            })  # fmt: skip
    return out


def _cell(spec: Table, key: str, result: published.Result | None) -> Cell:
    if result is None:
        return Cell(None)
    if key == "average_ppl":
        return spec.suite.mean(("wiki_ppl", "lambada_ppl"), result.rows)
    return spec.suite.cell(key, result.rows)


def _held_out(result: published.Result | None) -> Cell:
    if result is None:
        return Cell(None)
    value, spread = result.value("token_perplexity"), result.spread("token_perplexity")
    return Cell(value, spread, (), len(result.rows))


def _differences(cells: dict[str, Cell], entry: Row | None) -> dict[str, float]:
    """Ours less the paper's, where there are both and ours bears no mark."""
    numbers = {} if entry is None else entry["numbers"]
    return {
        key: round(cell.value - numbers[key], 4)
        for key, cell in cells.items()
        if key in numbers and cell.value is not None and not cell.marks
    }


def _other_seeds(cells: dict[str, Cell], result: published.Result) -> dict[str, int]:
    """How many seeds a number is of, where not of all that its row has."""
    return {key: cell.seeds for key, cell in cells.items() if cell.seeds not in (0, len(result.rows))}


def _protocols(cells: dict[str, Cell]) -> Row:
    """What decided each task's numbers: options and versions, in which its seeds agree, devices and commits."""
    of_task: dict[str, list[Row]] = {}
    for entry in (one for cell in cells.values() for one in cell.entries):
        of_task.setdefault(entry["task"], []).append(entry)

    def joined(entries: list[Row], said: Callable[[Row], str]) -> str:
        return "; ".join(dict.fromkeys(said(one["environment"]) for one in entries))

    return {
        task: entries[0]["protocol"]
        | {"device": joined(entries, published.device), "commit": joined(entries, published.commit)}
        for task, entries in of_task.items()
    }


# --- for a reader ---


def described(name: str, scale: str, found: list[Row]) -> str:
    """Rows for a terminal; `*` after the best of a group, a letter where a number bears marks."""
    header, lines, notes = laid_out(name, found)
    return f"{name} at {scale}: {TABLES[name].title}\n{report.aligned([header, *lines])}\n" + "\n".join(notes)


def laid_out(name: str, found: list[Row], best: str = "{}*") -> tuple[Cells, list[Cells], list[str]]:
    """(header, lines of cells, notes below them); `best` is how the best cell of each group and column is written."""
    spec = TABLES[name]
    columns = spec.columns | {STAND_IN: "held-out ppl†"}
    letters: dict[str, str] = {}
    leaders = _leaders(spec, columns, found)
    lines = []
    for index, row in enumerate(found):
        if row["paper"] is not None:
            cells = [_paper_cell(row, key, leaders, index, best) for key in spec.columns]
            lines.append((row["model"], "paper", *cells, "-", "paper"))
        cells = [_our_cell(row, key, leaders, index, best, letters) for key in columns]
        whole = "".join(f"; MARKED: {mark}" for mark in row["marks"])
        lines.append((row["model"], "ours", *cells, row["from"] + whole))
        if row["difference"]:
            cells = [f"{row['difference'][key]:+.2f}" if key in row["difference"] else "-" for key in columns]
            lines.append((row["model"], "ours - paper", *cells, ""))
    unit = "byte" if all(row["tokenizer"] == "byte" for row in found) else "token"
    notes = [
        f"† perplexity per {unit} of held-out text of the run's own data: a stand-in that compares the rows of this "
        f"table alone, never with the paper. Rows of other data or devices and MARKED ones compare with nothing.",
        *(f"[{letter}] {marks}: compares with no number that lacks this mark" for marks, letter in letters.items()),
    ]
    if any(row["document_differs"] for row in found if row["paper"] is not None):
        notes.append(
            f"‡ the summary of the paper that this project began with has another number here; both are in "
            f"experiments/{DIFFERENCES.name}."
        )
    if name == "s1":
        notes.append("Avg-PPL is read as the mean of the Wiki and the LAMBADA perplexity; the paper does not say.")
    if best == "{}*" and any(cell.endswith("*") for line in lines for cell in line):
        notes.insert(0, "* the best of its column among the paper's or our rows without marks, hybrid models apart.")
    return ("model", "whose", *columns.values(), "from"), lines, notes


def _leaders(spec: Table, columns: dict[str, str], found: list[Row]) -> set[tuple[str, str, int]]:
    """(whose, column, index of the row) of the best number of each group; of ours only among numbers without marks."""
    best: dict[tuple[str, str, str], tuple[float, int]] = {}
    for index, row in enumerate(found):
        ours = {key: x for key, x in row["ours"].items() if x != NOT_RUN and key not in row["cell_marks"]}
        for whose, numbers in (("paper", row["paper"] or {}), ("ours", {} if row["marks"] else ours)):
            for key in columns:
                if (value := numbers.get(key)) is None:
                    continue
                place, rank = (whose, row["group"], key), -value if spec.lower(key) else value
                if place not in best or rank > best[place][0]:
                    best[place] = rank, index
    return {(whose, key, index) for (whose, _, key), (_, index) in best.items()}


def _paper_cell(row: Row, key: str, leaders: set, index: int, best: str) -> str:
    value = row["paper"][key]
    if value is None:
        return "-"
    text = f"{value:.2f}{'‡' if key in row['document_differs'] else ''}"
    return best.format(text) if ("paper", key, index) in leaders else text


def _our_cell(row: Row, key: str, leaders: set, index: int, best: str, letters: dict[str, str]) -> str:
    value, spread = row["ours"][key], row["spread"][key]
    if value == NOT_RUN:
        return NOT_RUN
    text = f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"
    if key in row["cell_seeds"]:
        text += f" ({row['cell_seeds'][key]} of {len(row['seeds'])} seeds)"
    if marks := ", ".join(row["cell_marks"].get(key, [])):
        return f"{text} [{letters.setdefault(marks, _letter(len(letters)))}]"
    return best.format(text) if ("ours", key, index) in leaders else text


def _letter(index: int) -> str:
    """0 -> "a", 25 -> "z", 26 -> "aa"."""
    return ("" if index < 26 else _letter(index // 26 - 1)) + chr(ord("a") + index % 26)
