"""Import: a checkpoint of another program becomes a run. Export: a run's parameters become such a checkpoint.

Both go tensor by tensor. An import needs memory for our parameters and one stacked parameter more, an export for our
parameters and the tensors of one file.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import checkpoint, tokenizer
from gdn_jax.config import IMPORTED, Data, Experiment, Model, Optim
from gdn_jax.convert import fla, lit
from gdn_jax.convert.files import FLOATS, SHARD_BYTES, Shards, Tensors, whole
from gdn_jax.convert.tables import Layout, Place, places, unused_keys
from gdn_jax.disk import check_space
from gdn_jax.errors import UserError
from gdn_jax.files import write_json
from gdn_jax.fingerprint import Identity
from gdn_jax.layers import Compute
from gdn_jax.metrics import environment
from gdn_jax.model import LM, abstract_model
from gdn_jax.progress import Progress
from gdn_jax.runs import check_tokenizer
from gdn_jax.tree import named_leaves, with_leaves

HEAD = "lm_head.weight"  # of both formats; a tied model's file may hold it once more
NAMED = 8  # tensors named in a refusal
STEP = 0  # of an imported run's checkpoint: it was trained for no step here
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # what a directory's own tokenizer is called
DTYPES = {"fp32": (np.float32, "float32"), "bf16": (jnp.bfloat16, "bfloat16")}


@dataclass(frozen=True)
class Loaded:
    """A model loaded from another program's checkpoint, with its tokenizer and arithmetic."""

    directory: Path
    model: LM  # fp32 parameters, on the default device
    tokenizer: tokenizer.Tokenizer | None  # the directory's own; None where it holds none and none was named
    compute: Compute  # bf16 for files of half precision, fp32 for others


def load_fla(directory: str | Path, *, tokenizer: str = "", progress: Progress | None = None) -> Loaded:
    """The model of a flash-linear-attention directory (config.json and .safetensors files), without making a run.

    tokenizer   "byte" or the path of a tokenizer's file; empty: tokenizer.model or tokenizer.json of the directory
    progress    where the work shows itself; None: on stderr
    Raises UserError as `import_checkpoint` does.
    """
    source = Path(directory)
    with contextlib.ExitStack() as stack, progress or Progress() as display:
        layout, cfg = _described(source, None)
        tensors = Tensors(source, stack)
        wanted = places(layout, cfg)
        _check(source, layout, cfg, tensors, wanted)
        own = _own_tokenizer(source)
        words = _fitting_tokenizer(tokenizer or str(own), cfg) if tokenizer or own else None
        model = _read_model(source, tensors, cfg, wanted, display)
        dtype = jnp.bfloat16 if _half_precision(tensors, wanted) else jnp.float32
    return Loaded(source, model, words, Compute(dtype=dtype))


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    data: Data,
    like: Model | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the run `out` of a checkpoint's parameters, in fp32, and returns what it read.

    source      a FLA directory (config.json and .safetensors files); with `like`, lit-gpt .safetensors of that model
    data        what `gdn eval` measures by default. Empty tokenizer: the directory's own, copied into the run
    precision   of activations; None: bf16 for files of half precision, fp32 for others
    progress    where the work shows itself; None: on stderr
    Raises UserError, and leaves nothing behind, where tensors are missing, unknown, of another shape, no floats or not
    finite.
    """
    with contextlib.ExitStack() as stack, whole(out) as directory, progress or Progress() as display:
        layout, cfg = _described(source, like)
        tensors = Tensors(source, stack)
        wanted = places(layout, cfg)
        dropped = _check(source, layout, cfg, tensors, wanted)
        name, words = _tokenizer(source, out, directory, data.tokenizer, cfg)
        half = _half_precision(tensors, wanted)
        experiment = Experiment(
            id=f"{IMPORTED}{source.resolve().name.removesuffix('.safetensors')}",
            model=cfg,
            optim=Optim(steps=1, batch_size=8, precision=precision or ("bf16" if half else "fp32")),
            data=Data(source=data.source, tokenizer=name, seq_len=data.seq_len, validation=data.validation),
        )
        model = _read_model(source, tensors, cfg, wanted, display)
        facts = {
            "id": experiment.id,
            "format": layout.name,
            "source": str(source),
            "tensors": len(wanted),
            "elements": sum(int(np.prod(place.shape)) for place in wanted.values()),
            "dtypes": sorted({tensors.dtypes[key] for key in wanted}),
            "dropped": dropped,
        }
        display.show("Writing the run.")
        checkpoint.write(directory, experiment, model, STEP, Identity(None, words.hash8))
        write_json(directory / "import.json", facts | {"environment": environment()})
    return {"directory": str(out)} | facts


def export_checkpoint(
    run_dir: Path,
    out: Path,
    *,
    form: Literal["fla", "lit"] = "fla",
    dtype: Literal["fp32", "bf16"] = "fp32",
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a run's newest checkpoint, or that of `step`, to the directory `out` and returns what it wrote.

    form    fla: config.json and .safetensors files as flash-linear-attention loads them; lit: the release's keys
    dtype   of the tensors; bf16 rounds, but for A_log and dt_bias, which stay fp32
    progress    where the work shows itself; None: on stderr
    Raises UserError where the format has no key for a parameter or no word for a switch of the model.
    """
    config = None
    experiment = checkpoint.read_config(run_dir)
    words = tokenizer.load(experiment.data.tokenizer)
    if form == "fla":
        architecture, config = fla.write_config(experiment.model, dtype=DTYPES[dtype][1], eos=words.eos)
        layout = architecture.layout
    else:
        layout = lit.LAYOUT
    wanted = places(layout, experiment.model)
    with whole(out) as directory, progress or Progress() as display:
        _, model, step, trained_on = checkpoint.load(run_dir, step)
        check_tokenizer(words, trained_on, run_dir)
        half = ", or write half of it with --dtype bf16" if dtype == "fp32" else ""
        check_space(directory, _written_bytes(wanted, dtype), "The tensors", f"free some, choose another --out{half}")
        leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
        shards = Shards(directory, shard_bytes)
        for i, (key, place) in enumerate(wanted.items()):
            parts = tuple(leaves[name] if place.repeat is None else leaves[name][place.repeat] for name in place.ours)
            tensor = place.transform.write(parts, experiment.model)
            shards.add(key, tensor if place.keeps_fp32 else tensor.astype(DTYPES[dtype][0], copy=False))
            display.show(f"Wrote {i + 1:,} of {len(wanted):,} tensors.")
        files = shards.close()
        if config is not None:
            write_json(directory / "config.json", config)
        path = Path(experiment.data.tokenizer)
        if path.is_file():
            shutil.copyfile(path, directory / f"tokenizer{path.suffix}")
    return {
        "directory": str(out),
        "id": experiment.id,
        "step": step,
        "format": layout.name,
        "tensors": len(wanted),
        "elements": sum(int(np.prod(place.shape)) for place in wanted.values()),
        "dtype": DTYPES[dtype][1],
        "files": files,
        "bytes": shards.total_bytes,
    }


def _written_bytes(wanted: dict[str, Place], dtype: Literal["fp32", "bf16"]) -> int:
    """Bytes of an export's tensors; the files' headers add little."""
    width = np.dtype(DTYPES[dtype][0]).itemsize
    return sum(int(np.prod(place.shape)) * (4 if place.keeps_fp32 else width) for place in wanted.values())


def _described(source: Path, like: Model | None) -> tuple[Layout, Model]:
    """The table and the model of a checkpoint."""
    path = source / "config.json"
    if like is not None:
        return lit.LAYOUT, like
    if not path.exists():
        with contextlib.ExitStack() as stack:
            Tensors(source, stack)  # a pickle, a damaged or an empty source has a sentence of its own
        raise UserError(
            f"{source} has no config.json; for the release's lit-gpt tensors name the experiment whose model they "
            "are: --like table3/gated-deltanet/1.3b."
        )
    try:
        tree = json.loads(path.read_text(), object_hook=_special_float)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no JSON or is damaged; download it again.") from None
    if isinstance(tree, dict) and {"model", "optim"} <= tree.keys():
        raise UserError(f"{source} is a run of ours already; `gdn eval` and `gdn generate` take it as it is.")
    architecture, cfg = fla.read_config(tree, str(path))
    return architecture.layout, cfg


def _special_float(tree: dict) -> Any:
    """Transformers writes infinity, which JSON has no word for, as {"__float__": "Infinity"}."""
    return float(tree["__float__"]) if tree.keys() == {"__float__"} else tree


def _check(source: Path, layout: Layout, cfg: Model, tensors: Tensors, wanted: dict[str, Place]) -> list[str]:
    """The keys that the model does not need; a UserError lists every other difference."""
    shapes, unused = tensors.shapes, unused_keys(layout, cfg)
    dropped = sorted(key for key in shapes if key in unused)
    embedding = next(key for key, place in wanted.items() if place.ours == ("embed",))
    if cfg.tied and HEAD in shapes and embedding in shapes:
        if not np.array_equal(tensors.read(HEAD), tensors.read(embedding)):
            raise UserError(
                f"{source} ties its embedding, yet {HEAD} differs from {embedding}; set tie_word_embeddings to false, "
                "or take a model that is not tied."
            )
        dropped.append(HEAD)
    problems = {
        "missing": [key for key in wanted if key not in shapes],
        "unknown": [key for key in shapes if key not in wanted and key not in dropped],
        "misshapen": [
            f"{key} {list(shapes[key])} instead of {list(place.shape)}"
            for key, place in wanted.items()
            if key in shapes and shapes[key] != place.shape
        ],
        "no floats": [
            f"{key} {tensors.dtypes[key]}" for key in wanted if key in shapes and tensors.dtypes[key] not in FLOATS
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(f"The tensors of {source} are not those of its model ({layout.name}): {listed}.")
    return dropped


def _listed(keys: list[str]) -> str:
    more = len(keys) - NAMED
    return ", ".join(sorted(keys)[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _tokenizer(source: Path, out: Path, directory: Path, name: str, cfg: Model) -> tuple[str, tokenizer.Tokenizer]:
    """What the run's data.tokenizer becomes, loaded; a directory's own tokenizer is copied into the run."""
    own = _own_tokenizer(source)
    if not name and own is None:
        raise UserError(f"{source} holds no {' or '.join(TOKENIZERS)}; name its tokenizer with --tokenizer.")
    words = _fitting_tokenizer(name or str(own), cfg)
    if name:
        return name, words
    shutil.copyfile(own, directory / own.name)
    return str(out / own.name), words


def _own_tokenizer(source: Path) -> Path | None:
    return next((source / file for file in TOKENIZERS if (source / file).is_file()), None)


def _fitting_tokenizer(name: str, cfg: Model) -> tokenizer.Tokenizer:
    words = tokenizer.load(name)
    if words.vocab > cfg.vocab:
        raise UserError(
            f"Tokenizer {words.name!r} has {words.vocab} tokens but the checkpoint's vocabulary is {cfg.vocab}; name "
            "the tokenizer that it was trained with."
        )
    return words


def _half_precision(tensors: Tensors, wanted: dict[str, Place]) -> bool:
    return bool({tensors.dtypes[key] for key in wanted} & {"BF16", "F16"})


def _read_model(source: Path, tensors: Tensors, cfg: Model, wanted: dict[str, Place], progress: Progress) -> LM:
    """Our parameters, each stacked over its repeats from the tensors that hold it; all finite, or a UserError."""
    abstract = abstract_model(cfg)
    holders: dict[str, list[tuple[str, Place]]] = {}
    for key, place in wanted.items():
        for name in place.ours:
            holders.setdefault(name, []).append((key, place))
    leaves, strange = {}, {}
    for name, leaf in named_leaves(abstract).items():
        array = np.empty(leaf.shape, np.float32)
        for key, place in holders[name]:
            part = place.transform.read(tensors.read(key), cfg)[place.ours.index(name)]
            array[... if place.repeat is None else place.repeat] = part
            if not np.isfinite(array[... if place.repeat is None else place.repeat]).all():
                strange[key] = None
        leaves[name] = jax.device_put(array)
        progress.show(f"Read {len(leaves):,} of {len(holders):,} parameters.")
    if strange:
        raise UserError(
            f"The tensors of {source} hold numbers that are not finite: {_listed(list(strange))}; take a checkpoint "
            "from before the training diverged, or download it again."
        )
    return with_leaves(abstract, leaves)
