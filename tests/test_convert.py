"""Checkpoints of other programs, in and out: every bit, every key of FLA's manifest, and what is refused."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_tokenizer import json_file  # noqa: F401  fixture

from experiments import get
from gdn_jax import checkpoint, tokenizer
from gdn_jax.config import Data, Experiment, Model, Optim
from gdn_jax.convert import fla, lit
from gdn_jax.convert.exchange import export_checkpoint, import_checkpoint, load_fla
from gdn_jax.convert.files import INDEX
from gdn_jax.convert.tables import places, unused_keys
from gdn_jax.errors import UserError
from gdn_jax.fingerprint import Identity
from gdn_jax.model import abstract_model
from gdn_jax.progress import SILENT
from gdn_jax.tokenizer import ByteTokenizer
from gdn_jax.tree import named_leaves, with_leaves

MANIFEST = json.loads((Path(__file__).parent / "parity" / "fla_manifest.json").read_text())
BYTES = Data(tokenizer="byte", seq_len=32)
BYTE_DATA = Identity("0" * 64, ByteTokenizer.hash8)


def small(id: str, **changes) -> Model:
    """A named model cut to unlike widths and two repeats of its pattern."""
    model = get(id).model
    if model.attention is not None:
        changes["attention"] = replace(model.attention, heads=3, head_dim=16)
    for name in ("gated_deltanet", "deltanet", "retnet"):
        if getattr(model, name) is not None:
            changes[name] = replace(getattr(model, name), heads=2, key_dim=8, value_dim=12)
    if model.hgrn2 is not None:
        changes["hgrn2"] = replace(model.hgrn2, heads=3, head_dim=16)
    if model.mamba is not None:
        changes["mamba"] = replace(model.mamba, inner=72, dt_rank=5, state=6)
    if model.mamba2 is not None:
        changes["mamba2"] = replace(model.mamba2, heads=9, head_dim=8, state=6, groups=3)
    return replace(model, **({"d_model": 48, "d_ff": 40, "vocab": 320, "repeats": 2} | changes))


def random_run(directory: Path, model: Model) -> dict[str, np.ndarray]:
    """A run whose every parameter is a different random number; returns the parameters."""
    random = np.random.default_rng(0)
    abstract = abstract_model(model)
    leaves = {name: random.standard_normal(leaf.shape, np.float32) for name, leaf in named_leaves(abstract).items()}
    experiment = Experiment(id="test/convert", model=model, optim=Optim(steps=1, batch_size=8), data=BYTES)
    checkpoint.write(directory, experiment, with_leaves(abstract, jax.tree.map(jnp.asarray, leaves)), 0, BYTE_DATA)
    return leaves


def parameters(run: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(checkpoint.load(run)[1]).items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


# --- the manifest ---


def full_config(config: dict) -> dict:
    """A config.json of the manifest, which names the sizes of samba in words of its own."""
    if config["model_type"] == "samba":
        attn = {"layers": list(range(1, 18, 2)), "num_heads": 18, "window_size": config["window_size"]}
        config = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers")} | {"attn": attn}
    return config | {"vocab_size": 32000}


@pytest.mark.parametrize("name", MANIFEST)
def test_keys_and_shapes_are_those_of_the_manifest(name):
    entry = MANIFEST[name]
    config = full_config(entry["config"])
    architecture, model = fla.read_config(config, "config.json")
    found = {key: list(place.shape) for key, place in places(architecture.layout, model).items()}
    every = list(range(config["num_hidden_layers"]))
    kinds = list(entry.get("layers", {"": {"idx": every, "keys": entry["layer"]}}).values())
    prefix = re.sub(r"\{.*", "", architecture.layout.layer)
    expected = entry["global_"] | {
        f"{prefix}{layer}.{key}": shape
        for kind in kinds
        for layer in kind["idx"]
        for key, shape in kind["keys"].items()
    }
    assert len(expected) == entry["n_tensors"]
    assert sum(int(np.prod(shape)) for shape in expected.values()) == entry["total_elements"]
    unused = unused_keys(architecture.layout, model)
    assert found == {key: shape for key, shape in expected.items() if key not in unused}
    dropped = config["num_hidden_layers"] if "legacy" in name else 0
    assert len(expected) - len(found) == dropped


def test_the_manifest_has_every_architecture_that_has_a_table():
    assert {entry["config"]["model_type"] for entry in MANIFEST.values()} == set(fla.ARCHITECTURES)


# --- round trips ---

FLA_MODELS = {
    "gated_deltanet": small("table3/gated-deltanet-fla/tiny"),
    "gated_deltanet switches": small("table3/gated-deltanet-fla/tiny"),
    "delta_net": small("table3/deltanet/tiny", tied=False, init="fla"),
    "retnet": small("table3/retnet/tiny", tied=False, init="fla"),
    "hgrn2": small("table3/hgrn2/tiny", tied=False, init="fla"),
    "mamba": small("table3/mamba/tiny", d_ff=0, init="fla"),
    "mamba2": small("table3/mamba2/tiny", d_ff=0, init="fla"),
    "samba": small("table3/samba/tiny", d_ff=256, tied=False, init="fla"),
    "transformer": small("table3/transformer/tiny", tied=False, init="fla"),
    "transformer tied": small("table3/transformer/tiny", init="fla", norm_eps=1e-6),
}
FLA_MODELS["gated_deltanet switches"] = replace(
    FLA_MODELS["gated_deltanet switches"],
    tied=True,
    gated_deltanet=replace(
        FLA_MODELS["gated_deltanet"].gated_deltanet,
        value_heads=4, conv_width=0, output_gate=False, negative_eigenvalues=True,
    ),
)  # fmt: skip
FLA_MODELS["hybrid"] = replace(
    FLA_MODELS["gated_deltanet"],
    pattern=("gated_deltanet", "gated_deltanet", "swa"),
    attention=replace(FLA_MODELS["transformer"].attention, window=9, rope_base=500.0),
)


@pytest.mark.parametrize("name", FLA_MODELS)
def test_ours_to_fla_to_ours_is_bitwise_equal(name, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WRITE_BYTES", 1)  # as with parameters larger than it
    model = FLA_MODELS[name]
    leaves = random_run(tmp_path / "run", model)
    wrote = export_checkpoint(tmp_path / "run", tmp_path / "fla", shard_bytes=20_000)
    index = json.loads((tmp_path / "fla" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "fla").glob("*.safetensors"))
    assert len(files) == wrote["files"] > 2 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == wrote["bytes"] == 4 * sum(leaf.size for leaf in leaves.values())
    stored = {key: value for file in files for key, value in load_file(tmp_path / "fla" / file).items()}
    assert len(stored) == wrote["tensors"] and {value.dtype for value in stored.values()} == {np.dtype(np.float32)}
    read = import_checkpoint(tmp_path / "fla", tmp_path / "again", data=BYTES)
    assert read["tensors"] == wrote["tensors"] and read["elements"] == wrote["elements"] and read["dropped"] == []
    assert checkpoint.read_config(tmp_path / "again").model == model
    assert_same(parameters(tmp_path / "again"), leaves)
    loaded = load_fla(str(tmp_path / "fla"), progress=SILENT)
    assert_same({name: np.asarray(leaf) for name, leaf in named_leaves(loaded.model).items()}, leaves)
    assert loaded.model.config == model and loaded.compute.dtype == jnp.float32 and loaded.tokenizer is None
    assert export_checkpoint(tmp_path / "again", tmp_path / "fla2")["files"] == 1
    assert_same(load_file(tmp_path / "fla2" / "model.safetensors"), stored)


@pytest.mark.parametrize("id", ["table3/gated-deltanet-h1/tiny", "table3/gated-deltanet/tiny"])
def test_ours_to_lit_to_ours_is_bitwise_equal(id, tmp_path):
    model = small(id)
    leaves = random_run(tmp_path / "run", model)
    export_checkpoint(tmp_path / "run", tmp_path / "lit", form="lit")
    stored = load_file(tmp_path / "lit" / "model.safetensors")
    mixers = model.pattern * model.repeats
    unused = [f"transformer.h.{i}.attn.D" for i, mixer in enumerate(mixers) if mixer == "gated_deltanet"]
    stored |= dict.fromkeys(unused, np.ones(2, np.float32))
    stored["lm_head.weight"] = stored["transformer.wte.weight"]
    save_file(stored, tmp_path / "release.safetensors")
    read = import_checkpoint(tmp_path / "release.safetensors", tmp_path / "again", data=BYTES, like=model)
    assert read["dropped"] == [*unused, "lm_head.weight"] and read["id"] == "imported/release"
    assert_same(parameters(tmp_path / "again"), leaves)


def test_attention_of_the_release_is_packed_head_by_head(tmp_path):
    """Rows [q_h | k_h | v_h] of head h, as the release's attention splits them."""
    model = small("table3/gated-deltanet-h1/tiny")
    leaves = random_run(tmp_path / "run", model)
    export_checkpoint(tmp_path / "run", tmp_path / "lit", form="lit")
    packed = load_file(tmp_path / "lit" / "model.safetensors")["transformer.h.3.attn.attn.weight"]
    assert packed.shape == (3 * 48, 48)
    for head in range(3):
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = packed[(3 * head + part) * 16 : (3 * head + part + 1) * 16]
            kernel = leaves[f"groups/blocks/1/mixer/{name}/kernel"][1]
            np.testing.assert_array_equal(rows, kernel[:, 16 * head : 16 * (head + 1)].T)


def test_half_precision_files_come_back_bit_by_bit(tmp_path):
    leaves = random_run(tmp_path / "run", FLA_MODELS["gated_deltanet"])
    export_checkpoint(tmp_path / "run", tmp_path / "half", dtype="bf16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    fp32 = {key for key, value in stored.items() if value.dtype == np.float32}
    assert {key.rpartition(".")[2] for key in fp32} == {"A_log", "dt_bias"} and len(fp32) == 4
    name = "model.layers.1.attn.q_proj.weight"
    np.testing.assert_array_equal(stored[name], leaves["groups/blocks/0/mixer/q_proj/kernel"][1].T.astype(jnp.bfloat16))
    read = import_checkpoint(tmp_path / "half", tmp_path / "again", data=BYTES)
    assert read["dtypes"] == ["BF16", "F32"]
    assert load_fla(tmp_path / "half", progress=SILENT).compute.dtype == jnp.bfloat16
    assert checkpoint.read_config(tmp_path / "again").optim.precision == "bf16"
    export_checkpoint(tmp_path / "again", tmp_path / "half2", dtype="bf16")
    assert_same(load_file(tmp_path / "half2" / "model.safetensors"), stored)
    assert json.loads((tmp_path / "half2" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_directorys_own_tokenizer_goes_into_the_run_and_back(tmp_path, json_file):  # noqa: F811
    random_run(tmp_path / "run", FLA_MODELS["transformer"])
    export_checkpoint(tmp_path / "run", tmp_path / "fla")
    shutil.copyfile(json_file, tmp_path / "fla" / "tokenizer.json")
    import_checkpoint(tmp_path / "fla", tmp_path / "again", data=replace(BYTES, tokenizer=""))
    name = checkpoint.read_config(tmp_path / "again").data.tokenizer
    assert name == str(tmp_path / "again" / "tokenizer.json") and Path(name).read_bytes() == json_file.read_bytes()
    own, named = (load_fla(tmp_path / "fla", tokenizer=name, progress=SILENT).tokenizer for name in ("", "byte"))
    assert (own.hash8, own.eos, named.name) == (tokenizer.load(str(json_file)).hash8, 1, "byte")
    export_checkpoint(tmp_path / "again", tmp_path / "fla2")
    assert (tmp_path / "fla2" / "tokenizer.json").read_bytes() == json_file.read_bytes()
    assert json.loads((tmp_path / "fla2" / "config.json").read_text())["eos_token_id"] == 1


# --- what is refused ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An exported directory `fla`, the run it came from, and a lit-gpt file."""
    directory = tmp_path_factory.mktemp("convert")
    random_run(directory / "run", FLA_MODELS["gated_deltanet"])
    export_checkpoint(directory / "run", directory / "fla")
    return directory


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    place = tmp_path / "here"
    shutil.copytree(home, place)
    monkeypatch.chdir(place)
    return place


def tensors(**changes):
    """Changes tensors of fla/model.safetensors: a function of the old one, or None to leave it out."""

    def change():
        path = Path("fla/model.safetensors")
        stored = load_file(path)
        for key, new in changes.items():
            key = key.replace("__", ".")
            stored[key] = None if new is None else new(stored.get(key))
        save_file({key: value for key, value in stored.items() if value is not None}, path)

    return change


def config(**changes):
    def change():
        path = Path("fla/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut():
    path = Path("fla/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def pickled():
    Path("fla/model.safetensors").rename("fla/pytorch_model.bin")


def index_of_a_lost_file():
    Path("fla", INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def index_that_leaves_the_directory():
    Path("fla", INDEX).write_text(json.dumps({"weight_map": {"a": "../fla/model.safetensors"}}))


Q = "model__layers__1__attn__q_proj__weight"
REFUSED = [
    ("missing", tensors(**{Q: None}), ("missing: model.layers.1.attn.q_proj.weight.",)),
    ("unknown", tensors(model__extra=lambda _: np.ones(2, np.float32)), ("unknown: model.extra.",)),
    ("misshapen", tensors(**{Q: lambda x: x[:-1]}), ("misshapen", "q_proj.weight [15, 48] instead of [16, 48].")),
    ("transposed", tensors(**{Q: lambda x: np.ascontiguousarray(x.T)}), ("[48, 16] instead of [16, 48]",)),
    ("integers", tensors(**{Q: lambda x: x.astype(np.int8)}), ("no floats: ", "q_proj.weight I8.")),
    (
        "several",
        tensors(**{Q: None, "x": lambda _: np.ones(1), "model__norm__weight": lambda x: x[1:]}),
        ("missing: model.layers.1.attn.q_proj.weight; unknown: x; misshapen: model.norm.weight [47] instead of [48].",),
    ),
    ("more layers", config(num_hidden_layers=3), ("missing: model.layers.2.", "and 10 more")),
    ("fewer layers", config(num_hidden_layers=1), ("unknown: model.layers.1.", "and 10 more")),
    ("tied but not", config(tie_word_embeddings=True), ("lm_head.weight differs", "set tie_word_embeddings to false")),
    ("cut short", cut, ("model.safetensors is no whole safetensors file", "download it again")),
    ("a pickle", pickled, ("pytorch_model.bin is a pickle", "never loaded", "safetensors.torch.save_file(")),
    ("lost file", index_of_a_lost_file, ("model-00001-of-00002.safetensors is missing", "download it again")),
    ("index outside", index_that_leaves_the_directory, (f"{INDEX} is damaged", "outside the directory")),
    ("no tensors", lambda: Path("fla/model.safetensors").unlink(), ("fla holds no .safetensors file", "give the")),
    ("no JSON", lambda: Path("fla/config.json").write_text("{"), ("config.json is no JSON", "download it again")),
    ("no config", lambda: Path("fla/config.json").unlink(), ("has no config.json", "--like table3/")),
    ("unknown model", config(model_type="rwkv7"), ("model_type 'rwkv7'", "gated_deltanet, delta_net, retnet, hgrn2")),
    ("lacks a size", config(hidden_size=None), ("lacks 'hidden_size'", "restore the file")),
    ("wrong type", config(num_heads="6"), ("num_heads = '6'", "of type int")),
    ("unknown switch", config(use_magic=True), ("use_magic = True", "does not know", "delete such a key only if")),
    ("other activation", config(hidden_act="gelu"), ("hidden_act = 'gelu'", "only 'swish' or 'silu'")),
    ("no width", config(expand_v=1.51), ("expand_v = 1.51", "must be a whole number")),
    (
        "grouped queries",
        config(attn={"layers": [1], "num_heads": 3, "num_kv_heads": 1}),
        ("config.json, attn has num_kv_heads = 1", "only 3 can be imported"),
    ),
    ("out exists", lambda: Path("out").write_text("x"), ("out exists already", "choose another --out")),
    ("killed before", lambda: Path("out.partial").mkdir(), ("out.partial is left from", "delete it first")),
    ("out below a file", lambda: Path("out").symlink_to("run/config.json/x"), ("cannot be made", "another --out")),
]


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "arrange", "says"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_refused_import_says_why_and_leaves_nothing(here, name, arrange, says):
    arrange()
    out = Path("run/config.json/x") if name == "out below a file" else Path("out")
    before = contents()
    with pytest.raises(UserError) as error:
        import_checkpoint(Path("fla"), out, data=BYTES)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    for part in says:
        assert part in sentence
    assert contents() == before
    if not (name.startswith("out") or name == "killed before"):
        with pytest.raises(UserError) as error:
            load_fla("fla", progress=SILENT)
        assert str(error.value) == sentence


def test_refused_tokenizers_and_sources(here, monkeypatch):
    def says(source="fla", **changes):
        options = {"data": BYTES} | changes
        with pytest.raises(UserError) as error:
            import_checkpoint(Path(source), Path("out"), **options)
        assert not Path("out").exists() and not Path("out.partial").exists()
        return str(error.value)

    assert "holds no tokenizer.model or tokenizer.json; name its tokenizer" in says(data=replace(BYTES, tokenizer=""))
    assert "There is no file or directory 'nowhere'" in says("nowhere")
    assert "run is a run of ours already" in says("run")
    Path("weights.pth").write_bytes(b"\x80\x02")
    assert "weights.pth is a pickle" in says("weights.pth", like=FLA_MODELS["gated_deltanet"])
    tied = replace(FLA_MODELS["gated_deltanet"], tied=True)
    assert "not those of its model (lit-gpt): missing: transformer." in says(like=tied)  # lm_head, and no embedding
    other = says(like=FLA_MODELS["transformer"])
    assert "(lit-gpt): missing: transformer.h.0.attn.attn.weight, " in other and "and 30 more." in other
    tensors(lm_head__weight=lambda x: x[:200], model__embeddings__weight=lambda x: x[:200])()
    config(vocab_size=200)()
    assert "has 257 tokens but the checkpoint's vocabulary is 200" in says()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install 'gdn_jax[hf]'" in says()


def test_models_that_fla_has_no_words_for(tmp_path):
    base = FLA_MODELS["gated_deltanet"]
    mixer = base.gated_deltanet

    def says(model, form="fla"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        experiment = Experiment(id="test/x", model=model, optim=Optim(steps=1, batch_size=8), data=BYTES)
        checkpoint.write_config(tmp_path / "run", experiment)
        with pytest.raises(UserError) as error:
            export_checkpoint(tmp_path / "run", tmp_path / "out", form=form)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        return str(error.value)

    assert "beta_bias is True" in says(replace(base, gated_deltanet=replace(mixer, beta_bias=True)))
    assert "decay is False" in says(replace(base, gated_deltanet=replace(mixer, decay=False)))
    assert "feature_map is 'relu'" in says(replace(base, gated_deltanet=replace(mixer, feature_map="relu")))
    assert "model.d_ff is 0" in says(replace(base, d_ff=0))
    both = replace(FLA_MODELS["transformer"], pattern=("attention", "swa"))
    assert "one kind of layer" in says(both)
    assert "the FLA format has no such model" in says(get("table3/gated-deltanet-h2/tiny").model)
    assert "mamba2 has no MLPs" in says(replace(FLA_MODELS["mamba2"], d_ff=40))
    assert "two thirds of a whole multiple of model.d_model 48" in says(replace(FLA_MODELS["mamba"], d_ff=40))
    assert (
        "does not give value_dim back"
        in says(replace(base, gated_deltanet=replace(mixer, key_dim=49, value_dim=1, heads=1)))
        or int(49 * (1 / 49)) == 1
    )
    assert "holds no finished checkpoint" in says(base) and "holds no finished checkpoint" in says(base, "lit")


def test_lit_and_fla_cover_the_same_parameters_of_a_hybrid():
    h1 = small("table3/gated-deltanet-h1/tiny")
    covered = {name for place in places(lit.LAYOUT, h1).values() for name in place.ours}
    assert covered == named_leaves(abstract_model(h1)).keys()
