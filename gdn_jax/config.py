"""What an experiment is: four frozen groups, strict JSON, and the hash that names a run's directory.

model   what is learned, never how it is computed
optim   the recipe: schedule, batch, precision
data    which tokens, in which windows
run     how it is computed and logged; of these fields only `seed` changes a result

A group's rules are checked when it is made, so an invalid experiment cannot exist.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from gdn_jax.errors import UserError, nearest
from gdn_jax.fields import coerce, hints, positive, require, typed, without_none
from gdn_jax.mixer_configs import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HGRN2Config,
    Mamba2Config,
    MambaConfig,
    RetNetConfig,
)
from gdn_jax.origin import File, Start

# mixer name in a pattern -> the field of Model that configures it
MIXER_FIELDS = {
    "gated_deltanet": "gated_deltanet",
    "deltanet": "deltanet",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "attention": "attention",
    "swa": "attention",
}
OWN_FIELD = "own"  # of Model, for all mixers from outside
OWN_CONFIGS: dict[str, type] = {}  # name of such a mixer -> what its configuration is; own_mixer.add_mixer alone writes

IMPORTED = "imported/"  # begins the ID of a run whose parameters came from another program's files


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pattern of mixers repeated; every mixer is followed by a SwiGLU MLP unless d_ff is 0."""

    pattern: tuple[str, ...]
    repeats: int
    d_model: int
    d_ff: int
    vocab: int = 32000
    tied: bool = True
    norm_eps: float = 1e-5
    init: Literal["lit", "fla", "lit-normal"] = "lit"  # which family's initialisation (released code or FLA)
    rescale_o_proj: bool = False  # lit: also divide the recurrent mixers' output projection by sqrt(2 layers)
    gated_deltanet: GatedDeltaNetConfig | None = None
    deltanet: DeltaNetConfig | None = None
    retnet: RetNetConfig | None = None
    hgrn2: HGRN2Config | None = None
    mamba: MambaConfig | None = None
    mamba2: Mamba2Config | None = None
    attention: AttentionConfig | None = None
    own: Any = None  # configuration of mixers from outside; its type is what own_mixer.add_mixer was given

    def __post_init__(self):
        typed(self, "model")
        require(len(self.pattern) > 0, "model.pattern is empty; name at least one mixer.")
        positive(self, "model", "repeats", "d_model", "vocab", "norm_eps")
        require(self.d_ff >= 0, f"model.d_ff is {self.d_ff}; use 0 for no MLP or a positive width.")
        for mixer in self.pattern:
            if mixer not in MIXER_FIELDS:
                raise UserError(
                    f"model.pattern names {mixer!r}, which is no mixer{nearest(mixer, MIXER_FIELDS)}; "
                    f"there are {', '.join(MIXER_FIELDS)}."
                )
            field = MIXER_FIELDS[mixer]
            require(
                getattr(self, field) is not None,
                f"model.pattern uses {mixer!r} but model.{field} is not set; set it: {_needed(mixer, field)}.",
            )
            kind = OWN_CONFIGS.get(mixer, object)
            require(
                isinstance(getattr(self, field), kind),
                f"model.own is {self.own!r}; the mixer {mixer!r} takes {kind.__name__}.",
            )
        _check_own(self)
        for name in ("attention", "hgrn2"):
            mixer = getattr(self, name)
            require(
                mixer is None or self.d_model == mixer.heads * mixer.head_dim,
                mixer
                and f"model.d_model is {self.d_model}; it must be model.{name}.heads {mixer.heads} x head_dim "
                f"{mixer.head_dim} = {mixer.heads * mixer.head_dim}.",
            )

    @property
    def layers(self) -> int:
        """Number of blocks (mixer + MLP)."""
        return self.repeats * len(self.pattern)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, linear warm-up from 0 and cosine to min_lr_ratio * lr at the last step."""

    steps: int
    batch_size: int  # windows of data.seq_len tokens per optimizer step
    lr: float = 4e-4
    min_lr_ratio: float = 0.1
    warmup: float = 0.01  # fraction of steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = True  # the released recipe; False spares norms, biases, A_log and dt_bias
    clip: float = 1.0  # global gradient norm
    precision: Literal["bf16", "fp32"] = "bf16"  # of activations; parameters, gates, norms and states are fp32

    def __post_init__(self):
        typed(self, "optim")
        positive(self, "optim", "steps", "batch_size", "lr", "eps", "clip")
        require(self.steps < 2**31, f"optim.steps is {self.steps}; it must be below 2^31.")
        for name in ("min_lr_ratio", "warmup"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name} is {value}; it must be in [0, 1].")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; it must be in [0, 1).")
        value = self.weight_decay
        require(0 <= value < math.inf, f"optim.weight_decay is {value}; it must be 0 or positive and finite.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which tokens. `source` names a directory made by `gdn data prepare`, or a built-in source, which makes itself."""

    source: str = "english-novels"
    tokenizer: str = "byte"  # or the path of a SentencePiece .model or tokenizers .json file
    seq_len: int = 4096
    validation: float = 0.05  # fraction of documents held out
    reset_at_documents: bool = False  # True: state, convolution and attention do not cross document borders

    def __post_init__(self):
        typed(self, "data")
        positive(self, "data", "seq_len")
        require(self.source, "data.source is ''; it must name a prepared directory, a text or a built-in source.")
        require(
            0 < self.validation < 1,
            f"data.validation is {self.validation}; it must be in (0, 1).",
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """How it is computed, stored and logged. Everything but `seed` may change when a run is resumed."""

    seed: int = 3407
    dir: str = ""  # where the run lives; empty: runs/<id>/<hash8>
    data_root: str = "data"  # where prepared data lives
    impl: Literal["auto", "chunked", "reference", "triton", "triton_interpret"] = "auto"
    chunk: Literal[16, 32, 64, 128] = 64
    residuals: Literal["saved", "inputs"] = "saved"
    # What the backward recomputes of each repeat of the pattern: none of it, all but its matrix products, all but what
    # kernels (the recurrences' and cuDNN's attention) gave, all but both, or the full repeat from its input.
    remat: Literal["none", "products", "kernels", "products+kernels", "full"] = "none"
    scan_layers: bool = True  # False: training compiles every repeat of the pattern by itself; faster steps (LOG.md)
    micro_batches: int = 1  # gradient accumulation: slices of a batch per device pass
    fsdp: int = 1  # devices that share the parameters; the rest of the mesh is data parallel
    context: int = 1  # devices that share the tokens of each row
    log_every: int = 10
    eval_every: int = 500
    eval_windows: int = 64  # held-out windows per evaluation during training
    save_every: int = 500
    keep: int = 3  # checkpoints kept
    # A step whose loss is far above those before it, or not finite (spikes.py has the numbers): stop the run, skip the
    # update, or rewind to the newest checkpoint and go on past the batches since then.
    on_spike: Literal["stop", "skip", "rewind"] = "stop"
    profile_at: int = -1  # first step of the profiler's window; -1: never
    profile_steps: int = 3
    tensorboard: bool = False
    wandb: str = ""  # Weights & Biases project; empty: off
    compile_cache: str = ".jax_cache"  # directory of compiled programs (runs.keep_compiled); empty: off

    def __post_init__(self):
        typed(self, "run")
        positive(
            self, "run", "micro_batches", "fsdp", "context", "log_every", "eval_every", "eval_windows", "save_every",
            "keep", "profile_steps",
        )  # fmt: skip
        require(0 <= self.seed < 2**31, f"run.seed is {self.seed}; it must be in [0, 2^31).")
        require(self.profile_at >= -1, f"run.profile_at is {self.profile_at}; use -1 for never, or a step from 0 on.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that an ID stands for, every field with its value."""

    id: str
    model: Model
    optim: Optim
    data: Data
    run: Run = Run()
    start: Start | None = None  # whose parameters a fine-tuning begins with; None: random ones
    file: File | None = None  # the user's own file that it was read from; decides no number

    def __post_init__(self):
        typed(self, "experiment")
        require(
            not {"", ".", ".."} & set(self.id.split("/")),
            f"The experiment's id is {self.id!r}; it must be words between single slashes, as in 'mine/small'.",
        )
        require(
            self.optim.batch_size % self.run.micro_batches == 0,
            f"run.micro_batches is {self.run.micro_batches}; it must divide optim.batch_size {self.optim.batch_size}.",
        )

    @property
    def hash8(self) -> str:
        """Eight hex digits of everything that decides a number: model, optim, data and the seed."""
        return hashlib.sha256(canonical(self).encode()).hexdigest()[:8]

    @property
    def recipe8(self) -> str:
        """The same without the seed: runs of one recipe differ by chance alone."""
        return hashlib.sha256(canonical(self, seed=False).encode()).hexdigest()[:8]

    @property
    def model_hash8(self) -> str:
        """Eight hex digits of the model group alone."""
        return hashlib.sha256(_dumps(_drop_none(to_dict(self.model))).encode()).hexdigest()[:8]


def mixer_config(mixer: str) -> type:
    """The dataclass that configures a mixer of model.pattern."""
    return OWN_CONFIGS.get(mixer) or without_none(hints(Model)[MIXER_FIELDS[mixer]])


def _needed(mixer: str, field: str) -> str:
    """The fields that the configuration of a mixer must be given."""
    fields = dataclasses.fields(mixer_config(mixer))
    needed = [one.name for one in fields if one.default is dataclasses.MISSING] or [one.name for one in fields[:1]]
    return ", ".join(f"model.{field}.{name}" for name in needed)


def _check_own(model: Model) -> None:
    """model.own belongs to a mixer, and a run's config.json can hold it."""
    if model.own is None:
        return
    require(
        any(mixer in OWN_CONFIGS for mixer in model.pattern),
        "model.own is set, but model.pattern names no mixer that takes it; name one, or leave model.own out.",
    )
    try:
        same = from_dict(type(model.own), to_dict(model.own), f"model.{OWN_FIELD}") == model.own
    except TypeError:
        same = False
    require(same, f"model.own is {model.own!r}; its fields must be numbers, words, True or False, or tuples of these.")


def to_dict(config: Any) -> dict:
    """Plain nested dict of a configuration; tuples become lists, as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def canonical(experiment: Experiment, *, seed: bool = True) -> str:
    """Canonical JSON of the fields that a result depends on; mixers that are not configured are left out."""
    groups = {name: to_dict(getattr(experiment, name)) for name in ("model", "optim", "data")}
    groups |= {"seed": experiment.run.seed if seed else None}
    groups |= {"start": experiment.start and experiment.start.sha256}
    return _dumps(_drop_none(groups))


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"optim.lr": 4e-4, ...}."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def from_dict(cls: type, tree: Any, where: str = "") -> Any:
    """Strict inverse of to_dict: an unknown or missing key or a wrong type is a UserError that names it."""
    where = where or cls.__name__.lower()
    require(isinstance(tree, dict), f"{where} is {tree!r}; it must be an object with named fields.")
    of = dict(hints(cls))
    if cls is Model:
        of[OWN_FIELD] = _own_hint(tree.get("pattern"))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise UserError(f"{where} has no field {key!r}{nearest(key, fields)}.")
    for name, field in fields.items():
        require(
            name in tree or field.default is not dataclasses.MISSING,
            f"{where} lacks the field {name!r}; add it.",
        )
    return cls(**{key: coerce(of[key], value, f"{where}.{key}", from_dict) for key, value in tree.items()})


def _own_hint(pattern: Any) -> Any:
    """What model.own is, by the mixers of a pattern; without one of them nothing."""
    names = pattern if isinstance(pattern, (list, tuple)) else ()
    kinds = [OWN_CONFIGS[name] for name in names if isinstance(name, str) and name in OWN_CONFIGS]
    return kinds[0] | None if kinds else type(None)


def _drop_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _drop_none(value) for key, value in tree.items() if value is not None}
    return tree


def _dumps(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))
