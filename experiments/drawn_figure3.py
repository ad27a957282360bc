"""Figure 3 as JSON, Markdown and a picture: the points that were measured, the paper's claims, the paper's curves.

Points of other devices are other curves in another panel, points measured otherwise than their ID says bear a mark, and
the paper's curves, which were read from its figure, have a panel of their own.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import experiments
from experiments import published, step_profile
from experiments.figure3 import SETTINGS
from experiments.models import PAPER_MODELS
from experiments.report import PAPER, piped
from experiments.training_speed import KEPT, NOT_RUN, OWN, name
from gdn_jax.files import read_json, write_json

NEAR = 0.01  # two steps of one program differ by about as much
# what a point is compared with -> in what alone it differs from that
COMPARED = {"one device": ("devices", "fsdp"), "decay": ("decay",)}
NO_DEVICE_LINE = f"{NOT_RUN}: the profiler's trace has no line of a device, as on a CPU"
READ = "paper, read from the figure"
PEERS = {"jla": "jax-linear-attention (jla)", "fla": "flash-linear-attention (FLA)"}

Row = dict[str, Any]
Speeds = dict[str, dict[str, float]]  # model -> setting -> tokens/s


def kept_rows(scale: str) -> list[Row]:
    """The points at a scale below runs/ and of experiments/results/, of one measurement the newest; what another recipe
    measured is left out."""
    newest: dict[tuple, Row] = {}
    for root in (published.RESULTS, KEPT):
        for path in sorted(root.glob(f"figure3/*/{scale}/**/*.json")):
            row = read_json(path, dict, "id", "setting", "recipe8")
            timing = experiments.TIMINGS.get(row["id"])
            if timing is None or row["setting"] not in timing.settings:
                continue
            if row["recipe8"] != timing.experiment(row["setting"]).recipe8:
                continue
            key = (device(row), row["id"], name(row["setting"], row["changed"]))
            if key not in newest or newest[key]["environment"]["date"] <= row["environment"]["date"]:
                newest[key] = row
    order = {model: index for index, model in enumerate(PAPER_MODELS)}
    settings = list(SETTINGS[scale])
    return sorted(newest.values(), key=lambda row: (order[row["model"]], settings.index(row["setting"])))


def device(row: Row) -> str:
    """The kind of the device that a point was measured on; "unknown" for a point that did not run."""
    return row["environment"]["devices"][0] if "environment" in row else "unknown"


def collected(scale: str, rows: list[Row]) -> dict[str, Any]:
    """What is written and drawn: {"scale", "rows", "claims" and "compared": by device, "paper": the curves that it
    shows}."""
    paper = json.loads(PAPER.read_text())
    curves = {model: paper[id]["numbers"] for model in PAPER_MODELS if (id := f"figure3/{model}/{scale}") in paper}
    by_device = {kind: claims(scale, of) for kind, of in _by_device(rows).items()}
    beside = {kind: compared(of) for kind, of in _by_device(rows).items()}
    return {"scale": scale, "rows": rows, "claims": by_device, "compared": beside, "paper": curves}


def _by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(device(row), []).append(row)
    return found


def compared(rows: Iterable[Row]) -> list[Row]:
    """Every point beside the one that differs from it in one of COMPARED alone: both rows' names and speeds, and the
    ratio of their tokens/s."""
    ran = [row for row in rows if row["tokens_per_s"] is not None and not row["note"]]
    by_name = {(row["model"], name(row["setting"], row["changed"])): row for row in ran}
    found = []
    for row in ran:
        for against, fields in COMPARED.items():
            left = {field: value for field, value in row["changed"].items() if field not in fields}
            other = by_name.get((row["model"], name(row["setting"], left)))
            if other is not None and other is not row:
                speeds = {"point": _speeds(row), "other": _speeds(other)}
                ratio = row["tokens_per_s"] / other["tokens_per_s"]
                found.append({"model": row["model"], "against": against, **speeds, "ratio": ratio})
    return found


def _speeds(row: Row) -> Row:
    return {"name": name(row["setting"], row["changed"])} | {
        field: row[field] for field in ("tokens_per_s", "least", "most")
    }


# --- the paper's claims ---


def claims(scale: str, rows: Iterable[Row]) -> list[dict[str, str]]:
    """Each claim of the paper about the figure: {"claim", "verdict": holds, fails or not run, "numbers"}.

    Points measured otherwise than their ID says do not count. Speeds within 1 % are equal.
    """
    settings = list(SETTINGS[scale])
    speeds: Speeds = {}
    for row in rows:
        if row["tokens_per_s"] is not None and not row["note"] and not row["changed"]:
            speeds.setdefault(row["model"], {})[row["setting"]] = row["tokens_per_s"]
    first, last = settings[0], settings[-1]
    every, ends = tuple(PAPER_MODELS), (first, last)

    def against(ours: str, other: str, least: float) -> Callable[[], tuple[bool, str]]:
        """Whether `ours` reaches `least` of `other` everywhere."""

        def judge() -> tuple[bool, str]:
            ratios = [speeds[ours][setting] / speeds[other][setting] for setting in settings]
            return min(ratios) >= least, _listed(settings, (f"{ratio:.2f}" for ratio in ratios), f" times {other}")

        return judge

    def behind(ours: str) -> Callable[[], tuple[bool, str]]:
        def judge() -> tuple[bool, str]:
            gaps = [(speeds["mamba2"][setting] - speeds[ours][setting]) / 1e3 for setting in settings]
            text = _listed(settings, (f"{gap:+.1f}K" for gap in gaps), " behind mamba2")
            return all(1.5 <= gap < 3.5 for gap in gaps), text

        return judge

    def best() -> tuple[bool, str]:
        at = {model: speeds[model][first] for model in every}
        top = sorted(at, key=lambda model: -at[model])[:3]
        return (1 + NEAR) * at["transformer"] >= max(at.values()), ", ".join(f"{m} {_thousands(at[m])}" for m in top)

    def steepest() -> tuple[bool, str]:
        left = {model: speeds[model][last] / speeds[model][first] for model in every}
        low = sorted(left, key=left.__getitem__)[:2]
        return low[0] == "transformer", f"of {first}, at {last}: " + ", ".join(f"{m} {left[m]:.0%}" for m in low)

    asked = [
        ("Gated DeltaNet is as fast as DeltaNet (at least 0.95 times)", ("gated-deltanet", "deltanet"), settings,
         against("gated-deltanet", "deltanet", 0.95)),
        ("Gated DeltaNet is 2-3K tokens/s behind Mamba2", ("gated-deltanet", "mamba2"), settings,
         behind("gated-deltanet")),
        ("DeltaNet is 2-3K tokens/s behind Mamba2", ("deltanet", "mamba2"), settings, behind("deltanet")),
        (f"Transformer++ is fastest at {first}", every, (first,), best),
        (f"Transformer++ falls most from {first} to {last}", every, ends, steepest),
        ("Samba is ahead of Mamba", ("samba", "mamba"), settings, against("samba", "mamba", 1 + NEAR)),
        ("Gated DeltaNet-H1 is ahead of Gated DeltaNet", ("gated-deltanet-h1", "gated-deltanet"), settings,
         against("gated-deltanet-h1", "gated-deltanet", 1 + NEAR)),
        ("Gated DeltaNet-H2 is ahead of Gated DeltaNet", ("gated-deltanet-h2", "gated-deltanet"), settings,
         against("gated-deltanet-h2", "gated-deltanet", 1 + NEAR)),
    ]  # fmt: skip
    found = []
    for claim, models, at, judge in asked:
        missing = [f"{model} {setting}" for model in models for setting in at if setting not in speeds.get(model, {})]
        holds, numbers = (False, _missing(missing)) if missing else judge()
        verdict = NOT_RUN if missing else "holds" if holds else "fails"
        found.append({"claim": claim, "verdict": verdict, "numbers": numbers})
    return found


def _listed(settings: Iterable[str], words: Iterable[str], after: str) -> str:
    return ", ".join(f"{setting} {word}" for setting, word in zip(settings, words, strict=True)) + after


def _missing(points: list[str]) -> str:
    return f"without {', '.join(points[:3])}" + (f" and {len(points) - 3} more" if len(points) > 3 else "")


def _thousands(tokens_per_s: float) -> str:
    return f"{tokens_per_s / 1e3:.1f}K"


# --- for a reader ---

HEADER = (
    "model", "setting", "tokens/s (least to most)", "paper", "MFU", "step ms", "peak GiB", "compile s",
    "implementations", "computed with", "note",
)  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """A table for each device, below it what the numbers need, the profiles of steps, and the paper's claims."""
    scale, parts = found["scale"], [f"**figure3 at {found['scale']}**: training throughput, {_on(found['rows'])}"]
    for kind, rows in _by_device(found["rows"]).items():
        rule = ("---", "---", *["--:"] * 6, "---", "---", "---")
        parts.append(piped([HEADER, rule, *(_cells(row, found["paper"]) for row in rows)]))
        if found["compared"][kind]:
            pairs = "\n".join(f"- {_of_two(one)}" for one in found["compared"][kind])
            parts.append(f"Points that differ in one thing on {kind}\n\n{pairs}")
        parts.append("\n".join(f"- {fact}" for fact in _facts(kind, rows)))
        for row in rows:
            if "profile" in row:
                said = step_profile.markdown(row["profile"]) if row["profile"] else NO_DEVICE_LINE
                parts.append(f"A step of {row['model']} {name(row['setting'], row['changed'])} on {kind}\n\n{said}")
        parts.append(f"The paper's claims (1.3B, one H100) on {kind} at {scale}\n\n" + _claims(found["claims"][kind]))
    return "\n\n".join(parts)


def _on(rows: list[Row]) -> str:
    """On how many devices, in words."""
    counts = sorted({row["changed"].get("devices", 1) for row in rows})
    return "one device" if counts in ([], [1]) else f"{' or '.join(map(str, counts))} devices, tokens/s of all of them"


def _of_two(one: Row) -> str:
    """A comparison in one line."""
    point, other = (f"{row['name']} {_tokens_per_s(row)}" for row in (one["point"], one["other"]))
    as_percent = one["against"] == "decay"
    said = f"{one['ratio'] - 1:+.1%} against" if as_percent else f"{one['ratio']:.2f}x one device,"
    return f"{one['model']} {point}: {said} {other}"


def _tokens_per_s(row: Row) -> str:
    return f"{row['tokens_per_s']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f})"


def _cells(row: Row, paper: dict[str, dict[str, float]]) -> tuple[str, ...]:
    read = paper.get(row["model"], {}).get(row["setting"])
    speed, *rest = (NOT_RUN,) * 6 if row["tokens_per_s"] is None else _numbers(row)
    peer = row["changed"].get("peer")
    return (
        row["model"] + f" ({peer})" * bool(peer),
        row["setting"],
        speed,
        "-" if read is None else f"about {_thousands(read)}",
        *rest,
        _of_peer(row) if peer else _computed_with(row),
        row["note"] or "ok",
    )


def _numbers(row: Row) -> tuple[str, ...]:
    """Tokens/s, MFU, step, peak memory, compilation and implementations of a point that was measured."""
    if row["peak_bytes"] is None:
        memory = "unknown" if row["planned_bytes"] is None else f"planned {row['planned_bytes'] / 2**30:.2f}"
    else:
        memory = f"{row['peak_bytes'] / 2**30:.1f} of {row['limit_bytes'] / 2**30:.1f}"
    return (
        _tokens_per_s(row),
        "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['step_ms']:,.1f}",
        memory,
        f"{row['compile_seconds']:.1f}",
        _implementations(row["impl"]),
    )


def _of_peer(row: Row) -> str:
    """Version and sizes of another library's model; "-" where it has no number."""
    found = row["peer"]
    if found is None:
        return "-"
    return "; ".join(word for word in (found["library"], found["words"], f"remat {found['remat']}") if word)


def _computed_with(row: Row) -> str:
    run = row["run"]
    layers, many = "scanned" if run["scan_layers"] else "written out", run["micro_batches"]
    said = f"remat {run['remat']}, layers {layers}, {many} micro-batch{'es' * (many > 1)}"
    said += "".join(f", {field} {row['changed'][field]}" for field in OWN if field in row["changed"])
    return said + (f" (not the ID's {', '.join(row['changed'])})" if row["changed"] else "")


def _implementations(impl: dict[str, dict[str, str]]) -> str:
    """ "triton: gated_delta_rule; chunked: short_conv, gated_norm"."""
    by_name: dict[str, list[str]] = {}
    for op, taken in impl.items():
        by_name.setdefault(taken["impl"], []).append(op)
    return "; ".join(f"{taken}: {', '.join(ops)}" for taken, ops in by_name.items())


def _facts(kind: str, rows: list[Row]) -> list[str]:
    ran = [row["environment"] for row in rows if "environment" in row]
    versions = {f"{name} {version}" for here in ran for name, version in here["versions"].items()}
    dates = sorted(here["date"][:10] for here in ran)
    commits = dict.fromkeys(published.commit(here) for here in ran)
    refused = {
        f"{op} ({taken['refused']})" for row in rows for op, taken in row["impl"].items() if taken["refused"]
    }  # fmt: skip
    counts = sorted({(row["warm_up"], row["repetitions"]) for row in rows})
    cpu = "; speeds of a CPU say nothing about a GPU" if kind == "cpu" else ""
    dirty = "; + is with uncommitted changes" if any(here["dirty"] for here in ran) else ""
    own = sum(1 for row in rows if not row["changed"] and not row["note"])
    return [
        f"Device: {kind}{cpu}",
        f"Points: {own} of {len(PAPER_MODELS) * len(SETTINGS[rows[0]['scale']])} have a number as their IDs say",
        "Random tokens; the jitted step of `gdn train` with AdamW and clipping, each waited for; median of "
        + " or ".join(f"{repetitions} steps after {warm_up}" for warm_up, repetitions in counts),
        f"Precision: {', '.join(dict.fromkeys(row['precision'] for row in rows))}; MFU: of one device, of its data "
        "sheet's bf16 peak; peak: the process's own on the device that took most, of what it may take, or what XLA "
        "plans for the step where the device does not say",
        f"Faster implementations refused: {'; '.join(sorted(refused)) or 'none'}",
        f"Paper: tokens/s read from its figure, approximate; {_peers(rows)}",
        f"Versions: {', '.join(sorted(versions)) or 'unknown'}",
        f"Date: {' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'unknown'}, "
        f"commit {', '.join(commits) or 'unknown'}{dirty}",
    ]


def _peers(rows: list[Row]) -> str:
    """Which other libraries ran."""
    ran = {row["peer"]["library"].split()[0]: row["peer"]["library"] for row in rows if row.get("peer")}
    said = [f"{full}: {ran.get(short, NOT_RUN)}" for short, full in PEERS.items()]
    return ", ".join(said) + (" (its own model, loss, optimizer and step, on the same tokens)" if ran else "")


def _claims(found: list[dict[str, str]]) -> str:
    return "\n".join(f"- {one['claim']}: {one['verdict']} ({one['numbers']})" for one in found)


def write(found: dict[str, Any], directory: Path) -> list[Path]:
    """Write figure3-SCALE.md, .json and .png into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"figure3-{found['scale']}.{suffix}" for suffix in ("md", "json", "png")]
    paths[0].write_text(markdown(found) + "\n")
    write_json(paths[1], found)
    draw(found).savefig(paths[2], dpi=150)
    return paths


def draw(found: dict[str, Any]) -> Any:
    """Tokens/s by setting, a panel a device and one for what the paper shows; a model has one colour everywhere."""
    from matplotlib.figure import Figure

    settings = list(SETTINGS[found["scale"]])
    panels = {kind: _curves(rows, settings) for kind, rows in _by_device(found["rows"]).items()}
    if found["paper"]:
        panels[READ] = {(model, f"{model} ({READ})"): curve for model, curve in found["paper"].items()}
    picture = Figure(figsize=(4.6 * len(panels) + 2.4, 4.2), layout="constrained")
    axes = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours = {model: f"C{index}" for index, model in enumerate(PAPER_MODELS)}
    handles: dict[str, Any] = {}
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        for (model, label), curve in curves.items():
            style = ":" if title == READ else "-" if label == model else "--"
            (line,) = panel.plot(
                [settings.index(setting) for setting in curve], [value / 1e3 for value in curve.values()], style,
                marker="o", markersize=3, color=colours[model], label=label,
            )  # fmt: skip
            handles.setdefault(model if title == READ else label, line)
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(len(settings)), settings)
        panel.set_xlabel("tokens of a row x rows of a step")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("thousand tokens per second")
    axes[0].set_ylim(bottom=0)
    picture.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7, frameon=False)
    picture.suptitle(f"Figure 3 at {found['scale']}: training throughput, {_on(found['rows'])}", fontsize=11)
    return picture


def _curves(rows: list[Row], settings: list[str]) -> dict[tuple[str, str], dict[str, float]]:
    """(model, label) -> setting -> tokens/s; what was changed against the ID is in the label."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: settings.index(row["setting"])):
        if row["tokens_per_s"] is not None and not row["note"]:
            key = (row["model"], name(row["model"], row["changed"]))
            found.setdefault(key, {})[row["setting"]] = row["tokens_per_s"]
    return found
