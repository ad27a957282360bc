"""Ours against implementations in torch that are not ours: ops, layers and logits of whole models, in fp32.

The arrays were made by parity/make_arrays.py and parity/make_fla_models.py (torch 2.13.0, transformers 5.24.0,
flash-linear-attention 0.6.0). `pytest -m parity`, with the extra `parity` installed, makes those of the first again.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax.config import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HGRN2Config,
    Mamba2Config,
    MambaConfig,
    Model,
    RetNetConfig,
)
from gdn_jax.layers import Compute
from gdn_jax.mixers import GatedDeltaNet
from gdn_jax.mixers.retnet import log_decays
from gdn_jax.model import abstract_model
from gdn_jax.tree import named_leaves, with_leaves
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention

FOLDER = Path(__file__).parent / "parity"
FP32 = Compute(dtype=jnp.float32, impl="chunked", chunk=16)
IMPLS = ("reference", "chunked")


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("impl", IMPLS)
def test_ops(impl):
    a = arrays("ops")
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


def model(pattern, d_ff, norm_eps, **mixer):
    return Model(
        pattern=(pattern,), repeats=2, d_model=32, d_ff=d_ff, vocab=64, tied=False, norm_eps=norm_eps, init="fla",
        **mixer,
    )  # fmt: skip


MODELS = {
    "mamba": model("mamba", 0, 1e-5, mamba=MambaConfig(inner=64, dt_rank=2, state=16)),
    "mamba2": model("mamba2", 0, 1e-5, mamba2=Mamba2Config(heads=4, head_dim=16, state=16, groups=2)),
    "transformer": model("attention", 48, 1e-5, attention=AttentionConfig(heads=2, head_dim=16)),
    "fla_retnet": model("retnet", 48, 1e-6, retnet=RetNetConfig(heads=2, key_dim=16, value_dim=32)),
    "fla_hgrn2": model("hgrn2", 48, 1e-6, hgrn2=HGRN2Config(heads=2, head_dim=16)),
    "fla_deltanet": model("deltanet", 48, 1e-6, deltanet=DeltaNetConfig(heads=2, key_dim=16, value_dim=16)),
    "fla_gated_deltanet": model(
        "gated_deltanet", 48, 1e-6,
        gated_deltanet=GatedDeltaNetConfig(heads=2, key_dim=16, value_dim=32, beta_bias=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_whole_model(name):
    a = arrays(name)
    tokens, logits = jnp.asarray(a.pop("tokens")), a.pop("logits")
    lm = with_leaves(abstract_model(MODELS[name]), {key: jnp.asarray(x) for key, x in a.items()})
    shapes = {key: leaf.shape for key, leaf in named_leaves(abstract_model(MODELS[name])).items()}
    assert {key: x.shape for key, x in a.items()} == shapes
    assert logits.std() > 0.5
    ours = jax.jit(lambda lm, tokens: lm.logits(lm(tokens, compute=FP32)[0]))(lm, tokens)
    np.testing.assert_allclose(ours, logits, atol=1e-4)


def test_a_layer_with_two_value_heads_for_each_key_head():
    """Qwen3-Next's Gated DeltaNet."""
    a = arrays("gated_deltanet")
    x, y = jnp.asarray(a.pop("x")), a.pop("y")
    settings = GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=12, value_heads=4, beta_bias=False)
    cfg = model("gated_deltanet", 0, 1e-6, gated_deltanet=settings)
    mixer = with_leaves(
        jax.eval_shape(lambda: GatedDeltaNet(cfg, rngs=nnx.Rngs(0))), {key: jnp.asarray(w) for key, w in a.items()}
    )
    assert y.std() > 0.3
    np.testing.assert_allclose(mixer(x, compute=FP32)[0], y, atol=2e-5)


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
