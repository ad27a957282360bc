"""`gdn figure NAME`: a figure of the paper, drawn from what was measured; figure1 from a configuration."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import experiments
from experiments import drawn_figure3, figure1, figure2, published
from experiments.commands import named
from experiments.figure3 import SETTINGS
from experiments.models import PAPER_MODELS
from experiments.options import Switch
from experiments.report import aligned
from gdn_jax.errors import UserError, nearest
from gdn_jax.files import write_json

FIGURES = ("figure1", "figure2", "figure3")


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Draw a figure of the paper: figure1 from an ID, figure2 and figure3 from what was measured."""

    id: str = "table3/gated-deltanet/1.3b"  # whose model figure1 draws
    scale: Literal["tiny", "desk", "400m", "400m-matched", "1.3b"] = "1.3b"
    json: Switch = False  # print an array of objects
    out: str = "."  # directory that gets NAME-SCALE.png and .json


def figure(name: str, options: FigureOptions) -> None:
    """`gdn figure NAME`: one curve a model, on each corpus that was read or each device that was timed."""
    if name not in FIGURES:
        raise UserError(f"There is no figure {name!r}{nearest(name, FIGURES)}; there is {', '.join(FIGURES)}.")
    if name == "figure1":
        return _figure1(options)
    if name == "figure3":
        return _figure3(options)
    found = rows(options.scale)
    if not found:
        raise UserError(
            f"No run at {options.scale} was evaluated for {name}; begin with: "
            f"gdn run {name}/gated-deltanet/{options.scale} --task_data DIR."
        )
    directory = Path(options.out)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"{name}-{options.scale}.png"
    write_json(picture.with_suffix(".json"), found)
    draw(options.scale, found).savefig(picture, dpi=150)
    print(json.dumps(found, indent=1) if options.json else described(found))
    if not options.json:
        print(f"Wrote {picture} and {picture.with_suffix('.json')}.")


def _figure1(options: FigureOptions) -> None:
    experiment = named(options.id)
    directory = Path(options.out)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"figure1-{experiment.id.replace('/', '-')}.png"
    figure1.draw(experiment).savefig(picture, dpi=150)
    found = figure1.described(experiment)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{experiment.id}: {found['repeats']} times {', '.join(found['layers'])}")
    for mixer, parts in found["mixers"].items():
        print(f"{mixer}: {parts['op']}, {parts['sizes']}")
    print(f"Wrote {picture}.")


def _figure3(options: FigureOptions) -> None:
    if options.scale not in SETTINGS:
        raise UserError(f"figure3 has no scale {options.scale!r}; it has {', '.join(SETTINGS)}.")
    found = drawn_figure3.collected(options.scale, drawn_figure3.kept_rows(options.scale))
    if not found["rows"]:
        raise UserError(
            f"No step at {options.scale} was timed for figure3; begin with: gdn bench figure3 --scale {options.scale}."
        )
    paths = drawn_figure3.write(found, Path(options.out))
    print(json.dumps(found, indent=1) if options.json else drawn_figure3.markdown(found))
    if not options.json:
        print(f"\nWrote {', '.join(map(str, paths))}.")


def rows(scale: str) -> list[dict[str, Any]]:
    """A row for each model and corpus that was read: perplexities by length and by bucket, and what they came from."""
    out, suite = [], figure2.SUITE
    for model in PAPER_MODELS:
        experiment = experiments.get(f"table3/{model}/{scale}")
        for result in published.of_experiment(experiment, runs=Path("runs")):
            for corpus, title in figure2.CORPORA.items():
                cell = suite.cell(f"{corpus}_{figure2.LENGTHS[0]}", result.rows)
                if cell.value is None:
                    continue
                # Whatever the row shows is of the entries that this cell was made of.
                numbers = {name: _over_seeds(name, cell.entries) for name in cell.entries[0]["metrics"]}
                prefix = {length: numbers.get(str(length), (None, None)) for length in figure2.LENGTHS}
                out.append({
                    "model": model, "corpus": corpus, "title": title,
                    "prefix": {length: value for length, (value, _) in prefix.items()},
                    "spread": {length: spread for length, (_, spread) in prefix.items()},
                    "buckets": {
                        int(name.removeprefix("bucket_")): value
                        for name, (value, _) in numbers.items() if name.startswith("bucket_")
                    },
                    "seeds": cell.seeds, "of_seeds": len(result.rows),
                    "marks": list(cell.marks), "documents": cell.entries[0]["n"],
                    "protocol": cell.entries[0]["protocol"], "from": result.origin(),
                })  # fmt: skip
    return out


def _over_seeds(name: str, entries: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """(mean, standard deviation) of a metric, (None, None) where an entry lacks it."""
    values = [one["metrics"].get(name) for one in entries]
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def described(found: list[dict[str, Any]]) -> str:
    header = ("model", "corpus", *(f"{length // 1024}K" for length in figure2.LENGTHS), "documents", "marks", "from")
    lines = [
        (row["model"], row["title"], *("-" if value is None else f"{value:.2f}" for value in row["prefix"].values()),
         str(row["documents"]), "; ".join(row["marks"]), _origin(row))
        for row in found
    ]  # fmt: skip
    return f"perplexity per token of a document's first tokens\n{aligned([header, *lines])}"


def _origin(row: dict[str, Any]) -> str:
    return row["from"] + (f"; of {row['seeds']}" if row["seeds"] != row["of_seeds"] else "")


def draw(scale: str, found: list[dict[str, Any]]) -> Any:
    """Perplexity by length, a panel a corpus; a model has one colour everywhere, and all panels share a legend."""
    from matplotlib.figure import Figure

    corpora = list(dict.fromkeys(row["corpus"] for row in found))
    columns = min(3, len(corpora))
    lines = -(-len(corpora) // columns)
    picture = Figure(figsize=(4.2 * columns, 3.2 * lines + 0.6), layout="constrained")
    panels = picture.subplots(lines, columns, squeeze=False).flatten()
    colours = {model: f"C{index}" for index, model in enumerate(PAPER_MODELS)}
    for panel, corpus in zip(panels, corpora, strict=False):
        of_corpus = [row for row in found if row["corpus"] == corpus]
        for row in of_corpus:
            lengths = [length / 1024 for length in row["prefix"]]
            style = "--" if row["marks"] else "-"
            label = row["model"] + (f" ({'; '.join(row['marks'])})" if row["marks"] else "")
            values = [math.nan if value is None else value for value in row["prefix"].values()]
            panel.plot(
                lengths, values, style, marker="o", markersize=3, color=colours[row["model"]],
                label=label,
            )  # fmt: skip
        panel.set_title(of_corpus[0]["title"], fontsize=10)
        panel.set_xlabel("tokens read (thousands)")
        panel.set_ylabel("perplexity per token")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(corpora) :]:
        panel.axis("off")
    legend = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    picture.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    picture.suptitle(f"Figure 2 at {scale}: length extrapolation", fontsize=11)
    return picture
