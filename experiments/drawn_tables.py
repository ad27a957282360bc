"""A table of the paper as files: Markdown, JSON, LaTeX and a picture."""

from pathlib import Path

from experiments import tables
from experiments.tables import Row
from gdn_jax.files import write_json

LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "±": r"$\pm$", "†": r"\dag", "‡": r"\ddag", "#": r"\#"}


def write(name: str, scale: str, found: list[Row], directory: Path) -> list[Path]:
    """Write NAME-SCALE.md, .json, .tex and .png into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}-{scale}.{suffix}" for suffix in ("md", "json", "tex", "png")]
    paths[0].write_text(markdown(name, scale, found))
    write_json(paths[1], found)
    paths[2].write_text(latex(name, scale, found))
    draw(name, scale, found, paths[3])
    return paths


def markdown(name: str, scale: str, found: list[Row]) -> str:
    """The table in Markdown, the best of each group in bold."""
    header, lines, notes = tables.laid_out(name, found, best="**{}**")
    rule = ["---", "---", *["--:"] * (len(header) - 3), "---"]
    rows = [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]
    return f"**{name} at {scale}**: {tables.TABLES[name].title}\n\n" + "\n".join([*rows, "", *_items(notes)]) + "\n"


def _items(notes: list[str]) -> list[str]:
    return [f"- {note}" for note in notes]


def latex(name: str, scale: str, found: list[Row]) -> str:
    """A tabular with booktabs' rules, the best of each group in bold."""
    header, lines, notes = tables.laid_out(name, found, best="BEST{}TSEB")

    def cell(text: str) -> str:
        for plain, escaped in LATEX.items():
            text = text.replace(plain, escaped)
        return text.replace("BEST", r"\textbf{").replace("TSEB", "}")

    body = [" & ".join(map(cell, line)) + r" \\" for line in lines]
    return "\n".join([
        rf"% {name} at {scale}: {tables.TABLES[name].title}",
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 3)}l}}", r"\toprule",
        " & ".join(map(cell, header)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        *(f"% {note}" for note in notes), "",
    ])  # fmt: skip


def draw(name: str, scale: str, found: list[Row], path: Path) -> None:
    """A picture of the table."""
    from matplotlib.figure import Figure

    header, lines, notes = tables.laid_out(name, found)
    width, height = 0.95 * len(header) + 3.5, 0.27 * (len(lines) + 2) + 0.22 * len(notes)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    drawn = axes.table([list(line) for line in lines], colLabels=list(header), loc="center", cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7)
    drawn.auto_set_column_width(list(range(len(header))))
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("none")
        if row == 0:
            cell.set_text_props(weight="bold")
        elif lines[row - 1][1] == "paper":
            cell.set_facecolor("#eef1f6")
    axes.set_title(f"{name} at {scale}: {tables.TABLES[name].title}", fontsize=9)
    figure.supxlabel("\n".join(notes), fontsize=6, ha="left", x=0.01)
    figure.savefig(path, dpi=150, bbox_inches="tight")
