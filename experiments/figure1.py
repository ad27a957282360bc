"""Figure 1: the layers of a model and the parts of its mixers, drawn from its configuration.

    gdn figure figure1 --id table3/gated-deltanet-h1/1.3b
    gdn figure figure1 --id ablations/no-short-conv/400m

The left column is one repeat of the pattern, read from the bottom; then each kind of mixer once. A box is a part that
has parameters or does arithmetic; a part that the configuration switches off is not there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from gdn_jax.config import Experiment, Model
from gdn_jax.errors import UserError

MLP = "SwiGLU MLP"
TITLES = {
    "gated_deltanet": "Gated DeltaNet", "deltanet": "DeltaNet", "retnet": "RetNet", "hgrn2": "HGRN2",
    "mamba": "Mamba", "mamba2": "Mamba2", "attention": "softmax attention", "swa": "sliding window attention",
}  # fmt: skip
COLOURS = {
    "gated_deltanet": "#f4b183", "deltanet": "#f8d7b8", "retnet": "#c9d7f0", "hgrn2": "#d9c9f0", "mamba": "#cfe8cf",
    "mamba2": "#a9d5a9", "attention": "#f0c9d2", "swa": "#f0c9d2", MLP: "#e8e8e8",
}  # fmt: skip


class Lane(NamedTuple):
    """One path from the block's input to the recurrence: the name of what arrives, and the parts from bottom to top."""

    name: str
    parts: tuple[str, ...]


class Parts(NamedTuple):
    """The parts of a mixer, from bottom to top."""

    lanes: tuple[Lane, ...]
    op: str
    sizes: str
    gate: Lane | None  # meets the op's output
    above: tuple[str, ...]


def _delta_rule(c: Any, *, decay: bool, gate: bool, norm: bool, features: str, qk_norm: str, beta: str) -> Parts:
    conv = (f"conv {c.conv_width}",) if c.conv_width else ()
    key = ("linear", *conv, features, f"{qk_norm} norm")
    lanes = [Lane("q", key), Lane("k", key), Lane("v", ("linear", *conv, "SiLU")), Lane("beta", ("linear", beta))]
    if decay:
        lanes.append(Lane("alpha", ("linear", "softplus", "exp(-A ·)")))
    value_heads = getattr(c, "num_value_heads", c.heads)
    heads = f"{c.heads} heads" if value_heads == c.heads else f"{c.heads} key, {value_heads} value heads"
    gate_lane = Lane("gate", ("linear", "SiLU")) if gate else None
    op = "gated delta rule" if decay else "delta rule"
    return Parts(tuple(lanes), op, f"{heads} of {c.key_dim} x {c.value_dim}", gate_lane, ("RMS norm",) if norm else ())


def _gated_deltanet(cfg: Model) -> Parts:
    c = cfg.gated_deltanet
    return _delta_rule(
        c, decay=c.decay, gate=c.output_gate, norm=c.output_norm,
        features={"silu": "SiLU", "relu": "ReLU", "elu1": "1 + ELU"}[c.feature_map], qk_norm=c.qk_norm.upper(),
        beta="2 sigmoid" if c.negative_eigenvalues else "sigmoid",
    )  # fmt: skip


def _deltanet(cfg: Model) -> Parts:
    return _delta_rule(cfg.deltanet, decay=False, gate=False, norm=True, features="SiLU", qk_norm="L2", beta="sigmoid")


def _retnet(cfg: Model) -> Parts:
    c, key = cfg.retnet, ("linear", "RoPE")
    lanes = (Lane("q", key), Lane("k", key), Lane("v", ("linear",)))
    sizes = f"{c.heads} heads of {c.key_dim} x {c.value_dim}, fixed decays"
    return Parts(lanes, "linear attention", sizes, Lane("gate", ("linear", "SiLU")), ("RMS norm",))


def _hgrn2(cfg: Model) -> Parts:
    c = cfg.hgrn2
    lanes = (
        Lane("q", ("linear", "SiLU")), Lane("f, k = 1 - f", ("linear", "b + (1-b) sigmoid")), Lane("i", ("linear",)),
    )  # fmt: skip
    sizes = f"{c.heads} heads of {c.head_dim} x {c.head_dim}, a decay a channel"
    return Parts(lanes, "linear attention", sizes, None, ("RMS norm",))


def _mamba(cfg: Model) -> Parts:
    c = cfg.mamba
    lanes = (
        Lane("u", ("linear", f"conv {c.conv_width}", "SiLU")), Lane("B, C", ("linear of u",)),
        Lane("dt", (f"rank {c.dt_rank} of u", "linear", "softplus")),
    )  # fmt: skip
    return Parts(lanes, "selective scan", f"{c.inner} channels x {c.state}", Lane("gate", ("linear", "SiLU")), ())


def _mamba2(cfg: Model) -> Parts:
    c = cfg.mamba2
    conv = ("linear", f"conv {c.conv_width}", "SiLU")
    lanes = (Lane("x", conv), Lane("B, C", conv), Lane("dt", ("linear", "softplus")))
    sizes = f"{c.heads} heads of {c.state} x {c.head_dim}, {c.groups} group{'s' if c.groups > 1 else ''} of B, C"
    return Parts(lanes, "linear attention", sizes, Lane("gate", ("linear", "SiLU")), ("RMS norm",))


def _attention(cfg: Model, window: bool = False) -> Parts:
    c, key = cfg.attention, ("linear", "RoPE")
    sizes = f"{c.heads} heads of {c.head_dim}" + (f", the last {c.window} tokens" if window else "")
    return Parts((Lane("q", key), Lane("k", key), Lane("v", ("linear",))), "softmax attention", sizes, None, ())


PARTS: dict[str, Callable[[Model], Parts]] = {
    "gated_deltanet": _gated_deltanet, "deltanet": _deltanet, "retnet": _retnet, "hgrn2": _hgrn2, "mamba": _mamba,
    "mamba2": _mamba2, "attention": _attention, "swa": lambda cfg: _attention(cfg, window=True),
}  # fmt: skip


def layers(cfg: Model) -> list[str]:
    """One repeat from the bottom: mixers and MLPs."""
    return [part for mixer in cfg.pattern for part in ((mixer, MLP) if cfg.d_ff else (mixer,))]


def mixers_of(cfg: Model) -> dict[str, Parts]:
    """Each kind of mixer of a model once; a UserError for one from outside."""
    for mixer in cfg.pattern:
        if mixer not in PARTS:
            raise UserError(f"figure1 does not know the parts of the mixer {mixer!r}; it draws {', '.join(PARTS)}.")
    return {mixer: PARTS[mixer](cfg) for mixer in dict.fromkeys(cfg.pattern)}


def described(experiment: Experiment) -> dict[str, Any]:
    """The same as data: {"id", "layers" of a repeat, "repeats", "mixers": {name: its parts}}."""
    cfg, mixers = experiment.model, mixers_of(experiment.model)
    return {
        "id": experiment.id, "layers": layers(cfg), "repeats": cfg.repeats,
        "mixers": {
            mixer: {
                "lanes": {lane.name: list(lane.parts) for lane in parts.lanes},
                "op": parts.op, "sizes": parts.sizes, "gate": parts.gate is not None, "above": list(parts.above),
            }
            for mixer, parts in mixers.items()
        },
    }  # fmt: skip


def draw(experiment: Experiment) -> Any:
    """The picture of an experiment's model."""
    from matplotlib.figure import Figure

    cfg, mixers = experiment.model, mixers_of(experiment.model)
    widths = [2.4, *(0.95 * (len(parts.lanes) + (parts.gate is not None)) + 0.5 for parts in mixers.values())]
    picture = Figure(figsize=(1.15 * sum(widths), 5.8), layout="constrained")
    panels = picture.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _column(panels[0], cfg)
    for panel, (mixer, parts) in zip(panels[1:], mixers.items(), strict=True):
        _mixer(panel, mixer, parts)
    picture.suptitle(experiment.id, fontsize=11)
    return picture


def _column(panel: Any, cfg: Model) -> None:
    stack = layers(cfg)
    top = 1.2 * len(stack)
    _frame(panel, "layers", (-1.3, 1.3), (-1.9, top + 1.4))
    _box(panel, 0, -1.3, f"embedding, {cfg.vocab:,}", "white", 2.2)
    for level, part in enumerate(stack):
        at = 1.2 * level
        _arrow(panel, (0, at - 0.9 if level else -1.0), (0, at - 0.3))
        _box(panel, 0, at, f"norm, {TITLES.get(part, part)}, +", COLOURS[part], 2.2)
    panel.plot([-1.25, 1.25, 1.25, -1.25, -1.25], [-0.55, -0.55, top - 0.65, top - 0.65, -0.55], ":", color="grey")
    panel.text(1.2, top - 0.6, f"x {cfg.repeats}", ha="right", va="bottom", fontsize=9)
    _arrow(panel, (0, top - 0.9), (0, top + 0.05))
    head = "norm, embedding transposed" if cfg.tied else f"norm, linear, {cfg.vocab:,}"
    _box(panel, 0, top + 0.35, head, "white", 2.2)
    panel.text(0, top + 0.85, f"width {cfg.d_model:,}", ha="center", fontsize=8, color="grey")


def _mixer(panel: Any, mixer: str, parts: Parts) -> None:
    lanes = [*parts.lanes, *([parts.gate] if parts.gate else [])]
    height = max(len(lane.parts) for lane in lanes)
    level = 0.9 * height + 0.6  # of the op
    above = [*parts.above, *(["x gate"] if parts.gate else []), "linear"]
    if mixer == "mamba2":
        above = ["x gate", *parts.above, "linear"]
    _frame(panel, TITLES[mixer], (-0.7, len(lanes) - 0.3), (-1.2, level + 0.9 * len(above) + 1.3))
    panel.text((len(lanes) - 1) / 2, -1.05, "x", ha="center", fontsize=9)
    middle = (len(parts.lanes) - 1) / 2
    for place, lane in enumerate(lanes):
        panel.plot([(len(lanes) - 1) / 2, place], [-0.8, -0.4], color="black", linewidth=0.7)
        for step, part in enumerate(lane.parts):
            _box(panel, place, 0.9 * step, part, "white", 0.86)
            if step:
                _arrow(panel, (place, 0.9 * step - 0.6), (place, 0.9 * step - 0.3))
        end = 0.9 * (len(lane.parts) - 1) + 0.3
        if lane is parts.gate:
            continue
        _arrow(panel, (place, end), (place, level - 0.32))
        panel.text(place + 0.06, level - 0.46, lane.name, fontsize=7, va="center")
    _box(panel, middle, level, f"{parts.op}\n{parts.sizes}", COLOURS[mixer], len(parts.lanes) - 0.06, 7)
    for step, part in enumerate(above):
        at = level + 0.9 * (step + 1) + 0.1
        _arrow(panel, (middle, at - (0.6 if step else 0.68)), (middle, at - 0.3))
        _box(panel, middle, at, part, "white", 0.86)
        if part == "x gate":
            place = len(lanes) - 1
            end = 0.9 * (len(parts.gate.parts) - 1) + 0.3
            panel.plot([place, place], [end, at], color="black", linewidth=0.7)
            _arrow(panel, (place, at), (middle + 0.43, at))


def _frame(panel: Any, title: str, across: tuple[float, float], along: tuple[float, float]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlim(*across)
    panel.set_ylim(*along)
    panel.axis("off")


def _box(panel: Any, x: float, y: float, text: str, colour: str, width: float, size: float = 6.5) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - 0.3)
    style = "round,pad=0,rounding_size=0.08"
    panel.add_patch(FancyBboxPatch(corner, width, 0.6, boxstyle=style, facecolor=colour, edgecolor="black", lw=0.7))
    panel.text(x, y, text, ha="center", va="center", fontsize=size)


def _arrow(panel: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    panel.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "lw": 0.7, "shrinkA": 0, "shrinkB": 0})
