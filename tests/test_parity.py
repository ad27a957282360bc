"""Ours against implementations in torch that are not ours, in fp32: ops, layers, and logits of whole models.

The arrays they computed are kept in parity/, beside the scripts that made them (torch 2.13.0, transformers 5.24.0,
flash-linear-attention 0.6.0): make_arrays.py for the naive ops and for transformers' models, make_fla_models.py for
flash-linear-attention's, which come in through `gdn convert import`, make_harness_scores.py for the scores that
lm-evaluation-harness's own class gives the transformer. Only numpy is needed here; `pytest -m parity`,
with the extra `parity` installed, makes the arrays of the first script again.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gdn_jax import checkpoint, tokenizer
from gdn_jax.config import Data, GatedDeltaNetConfig, Mamba2Config, MambaConfig, Model
from gdn_jax.convert.exchange import import_checkpoint
from gdn_jax.evaluate.answering import Answering
from gdn_jax.layers import Compute
from gdn_jax.mixers import GatedDeltaNet
from gdn_jax.mixers.retnet import log_decays
from gdn_jax.model import abstract_model
from gdn_jax.progress import SILENT
from gdn_jax.runs import open_run
from gdn_jax.tree import named_leaves, with_leaves
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention

FOLDER = Path(__file__).parent / "parity"
IMPLS = ("reference", "chunked")
FP32 = {impl: Compute(dtype=jnp.float32, impl=impl, chunk=16) for impl in IMPLS}  # 60 or 70 tokens: several chunks
FLA_MODELS = (
    "delta_net", "gated_deltanet", "gated_deltanet_hybrid", "gated_deltanet_values", "hgrn2", "mamba", "mamba2",
    "retnet", "samba", "transformer",
)  # fmt: skip


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("impl", IMPLS)
def test_ops(impl):
    a = arrays("naive_ops")
    q, k, v, g, gk, beta, state = (jnp.asarray(a[name]) for name in ("q", "k", "v", "g", "gk", "beta", "state"))
    retention = jnp.broadcast_to(log_decays(3), g.shape)
    found = {
        "gated_delta_rule": gated_delta_rule(q, k, v, g, beta, initial_state=state, impl=impl),
        "delta_rule": gated_delta_rule(q, k, v, 0 * g, beta, initial_state=state, impl=impl),
        "retention": linear_attention(q, k, v, retention, impl=impl),
        "simple_gla": linear_attention(q, k, v, g, initial_state=state, impl=impl),
        "gla": linear_attention(q, k, v, gk, initial_state=state, impl=impl),
    }
    for name, (o, final) in found.items():
        assert np.abs(a[name]).max() > 0.5
        np.testing.assert_allclose(o, a[name], atol=1e-5, err_msg=name)
        if name != "retention":
            np.testing.assert_allclose(final, a[f"{name}_state"], atol=1e-5, err_msg=name)


# --- transformers: parameters under our names ---


def model(pattern, norm_eps, **mixer):
    return Model(
        pattern=(pattern,), repeats=2, d_model=32, d_ff=0, vocab=64, tied=False, norm_eps=norm_eps, init="fla", **mixer
    )  # fmt: skip


TRANSFORMERS = {
    "mamba": model("mamba", 1e-5, mamba=MambaConfig(inner=64, dt_rank=2, state=16)),
    "mamba2": model("mamba2", 1e-5, mamba2=Mamba2Config(heads=4, head_dim=16, state=16, groups=2)),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_those_of_transformers(name):
    a, cfg = arrays(f"transformers_{name}"), TRANSFORMERS[name]
    tokens, logits = jnp.asarray(a.pop("tokens")), a.pop("logits")
    lm = with_leaves(abstract_model(cfg), {key: jnp.asarray(x) for key, x in a.items()})
    shapes = {key: leaf.shape for key, leaf in named_leaves(abstract_model(cfg)).items()}
    assert {key: x.shape for key, x in a.items()} == shapes
    assert logits.std() > 0.5
    ours = jax.jit(lambda lm, tokens: lm.logits(lm(tokens, compute=FP32["chunked"])[0]))(lm, tokens)
    np.testing.assert_allclose(ours, logits, atol=1e-4)


def test_a_layer_with_two_value_heads_for_each_key_head():
    """Qwen3-Next's Gated DeltaNet."""
    a = arrays("transformers_qwen3_next_layer")
    x, y = jnp.asarray(a.pop("x")), a.pop("y")
    settings = GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=12, value_heads=4, beta_bias=False)
    cfg = model("gated_deltanet", 1e-6, gated_deltanet=settings)
    mixer = with_leaves(
        jax.eval_shape(lambda: GatedDeltaNet(cfg, rngs=nnx.Rngs(0))), {key: jnp.asarray(w) for key, w in a.items()}
    )
    assert y.std() > 0.3
    np.testing.assert_allclose(mixer(x, compute=FP32["chunked"])[0], y, atol=2e-5)


# --- flash-linear-attention: its checkpoints, imported ---


def checkpoint_directory(kept, directory):
    """The kept arrays as the Hugging Face directory they came from."""
    directory.mkdir()
    (directory / "config.json").write_text(str(kept["config"]))
    state = {key.removeprefix("state/"): value for key, value in kept.items() if key.startswith("state/")}
    save_file(state, directory / "model.safetensors")


def test_every_kept_file_is_compared_and_those_of_fla_say_what_made_them():
    kept = {path.stem for path in FOLDER.glob("*.npz")}
    transformers = {f"transformers_{name}" for name in (*TRANSFORMERS, "qwen3_next_layer")}
    assert kept == {"naive_ops", *transformers, *(f"fla_{name}" for name in FLA_MODELS)}
    for name in FLA_MODELS:
        made = json.loads(str(arrays(f"fla_{name}")["made"]))
        assert made["fla"] and made["torch"] and made["date"] > "2026"


@pytest.mark.parametrize("name", FLA_MODELS)
def test_logits_are_those_of_fla(name, tmp_path, monkeypatch):
    """As measured: at most 1e-5, of logits of order 1 (the transformer's: 6)."""
    kept = arrays(f"fla_{name}")
    checkpoint_directory(kept, tmp_path / "fla")
    # 64 tokens are no tokenizer's vocabulary; logits need none
    monkeypatch.setattr("gdn_jax.convert.exchange._tokenizer", lambda *_: ("byte", tokenizer.load("byte")))
    import_checkpoint(tmp_path / "fla", tmp_path / "run", data=Data(tokenizer="byte", seq_len=32))
    experiment, imported, step, _ = checkpoint.load(tmp_path / "run")
    assert experiment.optim.precision == "fp32" and step == 0
    assert 0.5 < kept["logits"].std() < 10
    run = jax.jit(lambda model, tokens, compute: model(tokens, compute=compute)[0], static_argnums=2)
    for impl in IMPLS:
        hidden = run(imported, jnp.asarray(kept["tokens"]), FP32[impl])
        difference = np.abs(imported.logits(hidden) - kept["logits"]).max()
        print(f"{name}, {impl}: largest difference {difference:.1e}")
        assert difference < 2e-5


def test_scores_are_those_of_the_harnesss_own_class(tmp_path):
    """make_harness_scores.py: the imported transformer asked by us, and as transformers' Llama by lm-eval's HFLM."""
    kept = json.loads((FOLDER / "harness_scores.json").read_text())
    (tmp_path / "letters.json").write_text(json.dumps(kept["tokenizer"]))
    checkpoint_directory(arrays("fla_transformer"), tmp_path / "fla")
    data = Data(tokenizer=str(tmp_path / "letters.json"), seq_len=32)
    import_checkpoint(tmp_path / "fla", tmp_path / "run", data=data)
    answers = Answering(open_run(tmp_path / "run"), max_length=kept["max_length"], progress=SILENT)
    found = answers.loglikelihood([tuple(one["pair"]) for one in kept["loglikelihood"]])
    for one, (log_likelihood, greedy) in zip(kept["loglikelihood"], found, strict=True):
        assert log_likelihood == pytest.approx(one["log_likelihood"], abs=1e-3) and greedy == one["greedy"], one
    for one, log_likelihood in zip(
        kept["rolling"], answers.rolling([one["text"] for one in kept["rolling"]]), strict=True
    ):
        assert log_likelihood == pytest.approx(one["log_likelihood"], abs=1e-3), one


@pytest.mark.parity
def test_the_arrays_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import make_arrays

    make_arrays.make(tmp_path)
    for name in make_arrays.FILES:
        with np.load(tmp_path / f"{name}.npz") as again:
            kept = arrays(name)
            assert set(again) == set(kept)
            for key, value in kept.items():
                np.testing.assert_allclose(again[key], value, atol=1e-5, err_msg=f"{name} {key}")
    del sys.modules["make_arrays"]
