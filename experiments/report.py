"""What a run measured: its result row, its loss curve, and experiments/README.md's table of IDs.

    python -m experiments.report experiments/README.md      rewrites the table between its two markers

Which results count, and how they are kept: published.py.
"""

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import EXPERIMENTS, published, suites
from gdn_jax.config import Experiment, Model, to_dict
from gdn_jax.errors import UserError
from gdn_jax.files import read_json, write_json
from gdn_jax.sources import BUILT_IN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# id -> {"numbers": {metric: value}, "source": where in the paper}
PAPER = Path(__file__).parent / "paper.json"
HEADLINE = ("wiki_ppl", "average_ppl", "average")  # what the table shows of the paper's row
BEGIN, END = "<!-- ids:begin -->", "<!-- ids:end -->"
TABLE = "experiments/README.md"
COMMAND = f"python -m experiments.report {TABLE}"
EVALUATION = "evaluation.json"

Row = dict[str, Any]


def save_evaluation(run_dir: Path, evaluation: Row) -> None:
    """Keep what `gdn eval` measured in evaluation.json, beside other protocols' numbers of the same checkpoint."""
    path = run_dir / EVALUATION
    before = read_json(path, list, "step") if path.exists() else []
    kept = [
        one
        for one in before
        if one["step"] == evaluation["step"] and published.protocol(one) != published.protocol(evaluation)
    ]
    write_json(path, [*kept, evaluation])


def result_row(run_dir: Path) -> Row:
    """Everything that identifies and summarises a run; also written to its result.json.

    Reads config.json, env.json, metrics.jsonl and evaluation.json, and raises a UserError that names the file
    which is missing and the command that writes it. Of several evaluations the one with the fewest marks stands for the
    run.
    """
    from gdn_jax.checkpoint import read_config
    from gdn_jax.metrics import read_rows

    experiment = read_config(run_dir)
    environment = _read(run_dir, "env.json", "train", dict, "devices", "impl")
    measured = _read(run_dir, EVALUATION, "eval", list, "step")
    evaluation = published.preferred([{"of_steps": experiment.optim.steps} | one for one in measured])
    rows = read_rows(run_dir)
    events = [row.get("event") for row in rows]
    row = {
        "id": experiment.id,
        "hash8": experiment.hash8,
        "recipe8": experiment.recipe8,
        "parameters": parameters(experiment.model),
        "steps": evaluation["step"],
        "tokens": evaluation["step"] * experiment.optim.batch_size * experiment.data.seq_len,
        "train_seconds": round(train_seconds(rows), 1),
        "spikes": {"skipped": events.count("skip"), "rewinds": events.count("rewind")},
        "seq_len": experiment.data.seq_len,
        "precision": experiment.optim.precision,
        "seed": experiment.run.seed,
        "impl": {op: choice["impl"] for op, choice in environment["impl"].items()},
        "validation": evaluation,
        "tasks": suites.of_step(run_dir, evaluation["step"]),
        "environment": environment,
    }
    if experiment.start:
        row["start"] = to_dict(experiment.start)
    write_json(run_dir / "result.json", row)
    return row


def train_seconds(rows: list[Row]) -> float:
    """Seconds from each start of the program to the last step it logged, compilation and validation included."""
    total = session = 0.0
    for row in rows:
        if row.get("event") == "start":
            total, session = total + session, 0.0
        session = row.get("time", session)
    return total + session


def draw_loss(run_dir: Path) -> Path:
    """Draw the run's loss.png."""
    path = run_dir / "loss.png"
    loss_figure(run_dir).savefig(path, dpi=150)
    return path


def loss_figure(run_dir: Path) -> "Figure":
    """Training loss, faint and smoothed, validation loss, and the unigram model's, in nats per token."""
    from matplotlib.figure import Figure

    from gdn_jax.checkpoint import read_config
    from gdn_jax.metrics import read_rows

    experiment = read_config(run_dir)
    environment = _read(run_dir, "env.json", "train", dict, "devices", "impl")
    rows = read_rows(run_dir)
    train = {row["step"]: row["loss"] for row in rows if "loss" in row}
    validation = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    if not train:
        raise UserError(f"{run_dir / 'metrics.jsonl'} holds no losses; `gdn train` writes them.")

    windows = _read(run_dir, "validation.json", "train", dict, "windows", "of_windows")
    unigram, many = (
        windows["unigram_nats_per_token"],
        f"{len(windows['windows']):,} of {windows['of_windows']:,} windows",
    )

    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted(train)
    losses = [train[step] for step in steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        steps = sorted(validation)
        axes.plot(steps, [validation[step] for step in steps], "o-", color="tab:orange", label=f"validation, {many}")
    axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram model, the same windows")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        f"{experiment.id}  {experiment.hash8}\n{published.device(environment)}, commit {published.commit(environment)}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def smoothed(losses: list[float]) -> list[float]:
    """Exponential mean over about a fortieth of the curve, unbiased at its start."""
    keep = 1 - 1 / (1 + len(losses) / 40)
    out, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def summary(row: Row) -> str:
    """A result row as a short table for a terminal."""
    facts = [
        ("experiment", f"{row['id']} {row['hash8']}"),
        ("parameters", f"{row['parameters']:,}"),
        ("training", f"{row['steps']:,} steps, {row['tokens']:,} tokens, {row['train_seconds']:,.0f} s"),
    ]
    return f"{aligned(facts)}\n{validation_table(row['validation'])}"


def validation_table(numbers: Row) -> str:
    """What `perplexity` returned, beside the unigram model's numbers."""
    word = numbers["word_perplexity"]
    rows = [
        ("", "model", "unigram"),
        ("nats per byte", f"{numbers['nats_per_byte']:.4f}", f"{numbers['unigram_nats_per_byte']:.4f}"),
        ("nats per token", f"{numbers['token_nll']:.4f}", f"{numbers['unigram_nats_per_token']:.4f}"),
        ("bits per byte", f"{numbers['bits_per_byte']:.4f}"),
        ("word perplexity", "too large" if word is None else f"{word:.4g}"),
    ]
    scored = f"{numbers['tokens']:,} tokens of data {numbers['data'][:8]}, window {numbers['window']}"
    why = ", ".join(published.marks(numbers))
    return f"held out, {scored}{f', NOT the whole measure: {why}' if why else ''}\n{aligned(rows)}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as lines with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in _columns(rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def piped(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as lines of a Markdown table."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _columns(rows: list[tuple[str, ...]]) -> list[list[str]]:
    longest = max(map(len, rows))
    return [[row[i] for row in rows if i < len(row)] for i in range(longest)]


# --- the table of IDs ---


def ids_table() -> str:
    """The table of experiments/README.md: every ID with its size, the paper's number, ours, and what ours came from."""
    paper = json.loads(PAPER.read_text()) if PAPER.exists() else {}
    lines = ["| ID | parameters | tokens | paper | ours | status |", "|---|--:|--:|---|---|---|"]
    for experiment in EXPERIMENTS.values():
        optim = experiment.optim
        what = (
            f"`{experiment.id}`",
            f"{parameters(experiment.model):,}",
            short(optim.steps * optim.batch_size * experiment.data.seq_len),
            _paper_cell(paper.get(experiment.id)),
        )
        for ours in _our_cells(experiment):
            lines.append(f"| {' | '.join([*what, *ours])} |")
    return "\n".join(lines)


def _paper_cell(entry: Row | None) -> str:
    if entry is None:
        return "-"
    numbers = entry["numbers"]
    shown = {metric: numbers[metric] for metric in HEADLINE if metric in numbers} or numbers
    return ", ".join(f"{metric} {value}" for metric, value in shown.items())


def _our_cells(experiment: Experiment) -> list[tuple[str, str]]:
    """Number and status of each result; one "not run" where there is none."""
    cells = []
    for result in published.of_experiment(experiment):
        ours, unigram = number(result, "nats_per_byte", 4), result.value("unigram_nats_per_byte")
        cells.append((f"{ours} nats/byte (unigram {unigram:.4f})", result.origin()))
    if cells:
        return cells
    source = experiment.data.source
    status = "ready" if source in BUILT_IN else f"needs `{source}`"
    if older := {row["recipe8"] for row in published.rows(experiment.id)}:
        status += f"; an older recipe was run ({', '.join(sorted(older))})"
    return [("not run", status)]


def number(result: published.Result, metric: str, digits: int, group: str = "validation") -> str:
    """A result's mean, with its spread over seeds, and a mark where it is not the ID's own number."""
    value, spread = result.value(metric, group), result.spread(metric, group)
    if value is None:
        return "not run"
    text = f"{value:.{digits}f}" if spread is None else f"{value:.{digits}f} ± {spread:.{digits}f}"
    return text + (f" ({', '.join(result.marks)})" if result.marks else "")


def readme_with_table(text: str) -> str:
    """A page's text with the table as it has to be now; UserError without the two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"The page lacks the line {BEGIN} or {END}; the table of IDs goes between them.")
    return f"{before}{BEGIN}\n{ids_table()}\n{END}{after}"


def update_readme(path: Path) -> bool:
    """Rewrite the table in place; True when it changed."""
    old = path.read_text()
    new = readme_with_table(old)
    if new != old:
        path.write_text(new)
    return new != old


def stale(path: Path) -> str | None:
    """A sentence that names the command when the table in `path` is not current."""
    old = path.read_text()
    return None if readme_with_table(old) == old else f"{path.name}'s table of IDs is not current; run: {COMMAND}"


# --- facts about a run ---


@functools.cache
def parameters(model: Model) -> int:
    """Number of parameters; the import waits until it is needed because JAX takes seconds to load."""
    from gdn_jax.model import count_parameters

    return count_parameters(model)


def short(count: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _read(run_dir: Path, name: str, command: str, kind: type, *fields: str) -> Any:
    """What a run's file holds, or a UserError that names the command that writes it."""
    if not (run_dir / name).exists():
        raise UserError(f"{run_dir} holds no {name}; `gdn {command}` writes it.")
    return read_json(run_dir / name, kind, *fields)


if __name__ == "__main__":
    try:
        changed = update_readme(Path(sys.argv[1] if len(sys.argv) > 1 else TABLE))
    except (UserError, OSError) as error:
        sys.exit(str(error))
    print("Rewrote the table of IDs." if changed else "The table of IDs is current.")
