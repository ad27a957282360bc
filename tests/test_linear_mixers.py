"""RetNet, HGRN2, Mamba and Mamba2 against direct float64 layers; their initial values; HGRN2's bounds; Table 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import check_normal, check_uniform
from test_mixers import D, inputs, make, parameters, run, silu

from experiments.variants import model_config
from gdn_jax.config import HGRN2Config, Mamba2Config, MambaConfig, Model, RetNetConfig
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute, RMSNorm
from gdn_jax.loss import next_token_loss
from gdn_jax.mixers.hgrn2 import forget_gate, lower_bounds
from gdn_jax.mixers.retnet import log_decays
from gdn_jax.model import init_model as eager_init_model
from pallas_kernels.gated_delta_rule import gated_delta_rule_step
from pallas_kernels.linear_attention import linear_attention_step

init_model = jax.jit(eager_init_model, static_argnums=0)


def softplus(x):
    return np.log1p(np.exp(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(y, weight):
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * weight


def convolve(y, w, bias):
    padded = np.concatenate([np.zeros((len(y), len(w) - 1, y.shape[-1])), y], axis=1)
    return silu(sum(w[j] * padded[:, j : j + y.shape[1]] for j in range(len(w))) + bias)


def recurrence(q, k, v, decay):
    """o_t = S_t q_t, S_t = S_{t-1} diag(decay_t) + v_t k_t^T with S [V, K], one row and head at a time."""
    B, T, H, K = q.shape
    o = np.zeros_like(v)
    for b in range(B):
        for h in range(H):
            S = np.zeros((v.shape[-1], K))
            for t in range(T):
                S = S * decay[b, t, h] + np.outer(v[b, t, h], k[b, t, h])
                o[b, t, h] = S @ q[b, t, h]
    return o


def direct_retnet(mixer, x):
    p = parameters(mixer)
    B, T, _ = x.shape
    q, k, v, gate = (
        (x @ p[f"{n}_proj.kernel"]).reshape(B, T, 3, dim) for n, dim in (("q", 8), ("k", 8), ("v", 10), ("g", 10))
    )
    turn = np.exp(1j * np.arange(T)[:, None] * 10000.0 ** (-np.arange(4) / 4))[None, :, None]
    q, k = ((y[..., :4] + 1j * y[..., 4:]) * turn for y in (q, k))
    q, k = (np.concatenate([y.real, y.imag], axis=-1) for y in (q, k))
    gamma = np.broadcast_to(1 - 2.0 ** (-5 - np.arange(3)), (B, T, 3))[..., None]
    o = norm(recurrence(q / np.sqrt(8), k, v, gamma), p["o_norm.weight"]) * silu(gate)
    return o.reshape(B, T, -1) @ p["o_proj.kernel"]


def direct_hgrn2(mixer, x, bound=0.0):
    p = parameters(mixer)
    heads = (*x.shape[:2], 3, 8)
    f = bound + (1 - bound) * sigmoid(x @ p["f_proj.kernel"])
    q, i = silu(x @ p["q_proj.kernel"]), x @ p["i_proj.kernel"]
    o = recurrence(q.reshape(heads) / np.sqrt(8), (1 - f).reshape(heads), i.reshape(heads), f.reshape(heads))
    return norm(o.reshape(x.shape), p["o_norm.weight"]) @ p["o_proj.kernel"]


def direct_mamba(mixer, x):
    p = parameters(mixer)
    B, T, _ = x.shape
    u, z = np.split(x @ p["in_proj.kernel"], 2, axis=-1)
    u = convolve(u, p["conv.weight"], p["conv.bias"])
    low, key, query = np.split(u @ p["x_proj.kernel"], [3, 7], axis=-1)
    dt = softplus(low @ p["dt_proj.kernel"] + p["dt_proj.bias"])
    A, y = -np.exp(p["A_log"]), np.zeros_like(u)
    for b in range(B):
        h = np.zeros((20, 4))
        for t in range(T):
            h = np.exp(dt[b, t][:, None] * A) * h + np.outer(dt[b, t] * u[b, t], key[b, t])
            y[b, t] = h @ query[b, t] + p["D"] * u[b, t]
    return (y * silu(z)) @ p["out_proj.kernel"]


def direct_mamba2(mixer, x):
    p = parameters(mixer)
    B, T, _ = x.shape
    z, xBC, dt = np.split(x @ p["in_proj.kernel"], [24, 24 + 24 + 20], axis=-1)
    u, key, query = np.split(convolve(xBC, p["conv.weight"], p["conv.bias"]), [24, 34], axis=-1)
    u, dt = u.reshape(B, T, 4, 6), softplus(dt + p["dt_bias"])
    key, query = (np.repeat(y.reshape(B, T, 2, 5), 2, axis=2) for y in (key, query))
    decay = np.exp(-np.exp(p["A_log"]) * dt)[..., None]
    y = recurrence(query, key, dt[..., None] * u, decay) + p["D"][:, None] * u
    y = (y.reshape(B, T, 24) * silu(z)).reshape(B, T, 2, 12)  # the gate first, then the norm of each group
    return norm(y, p["norm.weight"].reshape(2, 12)).reshape(B, T, 24) @ p["out_proj.kernel"]


DIRECT = {"retnet": direct_retnet, "hgrn2": direct_hgrn2, "mamba": direct_mamba, "mamba2": direct_mamba2}


@pytest.mark.parametrize("name", DIRECT)
def test_against_a_direct_float64_layer(name):
    mixer, x = make(name), inputs(37)
    if name == "mamba2":  # what starts at 1 and 0 must matter
        mixer.D[...], mixer.norm.weight[...] = jnp.arange(1.0, 5.0), jnp.linspace(0.5, 2.0, 24)
    exact = DIRECT[name](mixer, np.asarray(x, np.float64))
    assert np.abs(exact).max() > 0.05
    for impl in ("reference", "chunked"):
        y, cache = run(mixer, x, Compute(dtype=jnp.float32, impl=impl, chunk=16))
        np.testing.assert_allclose(y, exact, atol=2e-5)
        assert cache is None


@pytest.mark.parametrize("name", DIRECT)
def test_dtype_policy(name):
    mixer, x = make(name), inputs(17)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixer)} == {jnp.dtype("float32")}
    exact, _ = run(mixer, x)
    y, cache = run(mixer, x.astype(jnp.bfloat16), Compute(impl="reference"), cache=mixer.init_cache(2, 8, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
    error = np.linalg.norm(y.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2
    if name in ("mamba", "mamba2"):
        assert cache.conv.dtype == jnp.bfloat16 and cache.conv.shape[1] == 3


# --- HGRN2's lower bounds ---


def test_lower_bounds_rise_from_zero():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    bounds = np.asarray(lower_bounds(logits))
    share = np.exp(np.asarray(logits, np.float64))
    share /= share.sum(0)
    np.testing.assert_allclose(bounds, np.cumsum(share, 0) - share[0], atol=1e-6)
    assert np.all(bounds[0] == 0) and np.all(np.diff(bounds, axis=0) > 0) and np.all(bounds < 1)
    np.testing.assert_allclose(lower_bounds(jnp.zeros((4, 3)))[:, 0], [0, 0.25, 0.5, 0.75], atol=1e-6)


def test_bounds_of_logits_far_apart_stay_below_1_and_have_gradients():
    for gap in (10.0, 15.0, 17.0, 40.0):
        logits = gap * jnp.arange(12.0)[:, None] / 11

        def log_f(logits):
            return sum(forget_gate(jnp.asarray([[[-3.0, 3.0]]]), bound)[0].sum() for bound in lower_bounds(logits))

        value, gradient = jax.value_and_grad(log_f)(logits)
        assert lower_bounds(logits).max() < 1 and np.isfinite(value) and np.all(np.isfinite(gradient))


def test_trained_bounds_have_the_same_gradients_scanned_and_written_out():
    """The first layer's bound is 0 and not rounding noise, which differed between two uses in one program."""
    lm = init_model(model_config("hgrn2", "tiny"), jax.random.key(0))
    lm.lower_bounds[...] = 0.1 * jax.random.normal(jax.random.key(99), lm.lower_bounds.shape)
    assert np.all(np.asarray(jax.jit(lambda lm: lm.bounds_by_layer()[0])(lm)) == 0)
    batch = {"tokens": jax.random.randint(jax.random.key(1), (2, 41), 0, 257)}

    def gradients(scan):
        compute = Compute(dtype=jnp.float32, impl="chunked", scan_layers=scan)
        return jax.jit(jax.grad(lambda lm: next_token_loss(lm, batch, compute)))(lm)

    for one, other in zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False)), strict=True):
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


def test_a_bound_holds_the_gate_up():
    mixer, x = make("hgrn2"), inputs(11)
    bound = jnp.linspace(0.0, 0.95, D)
    np.testing.assert_allclose(
        run(mixer, x, bound=bound)[0], direct_hgrn2(mixer, np.asarray(x, np.float64), np.asarray(bound)), atol=2e-5
    )


def test_forget_gate_at_its_ends():
    """log f and 1 - f keep their digits and finite gradients for logits of +-80, with and without a bound."""
    logits = jnp.asarray([[[-80.0, -3.0, 3.0, 80.0]]])
    for bound in (None, jnp.zeros(4), jnp.full(4, 0.3)):
        b = 0.0 if bound is None else np.asarray(bound, np.float64)
        f = b + (1 - b) * sigmoid(np.asarray(logits, np.float64))
        log_f, complement = forget_gate(logits, bound)
        np.testing.assert_allclose(log_f, np.log(f), rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(complement, (1 - b) * sigmoid(-np.asarray(logits, np.float64)), rtol=1e-5)
        if bound is not None:
            gradients = jax.grad(lambda x, b: forget_gate(x, b)[0].sum(), argnums=(0, 1))(logits, bound)
            assert all(np.all(np.isfinite(g)) for g in gradients)


def test_the_model_hands_every_layer_its_bound():
    lm = init_model(model_config("hgrn2", "tiny"), jax.random.key(0))
    tokens = jnp.arange(22).reshape(2, 11)
    lm.lower_bounds[...] = jnp.asarray([[0.0], [3.0]]) * jnp.ones((2, 128))
    compute = Compute(dtype=jnp.float32, impl="reference")
    x = lm.embed[tokens]
    for layer, bound in enumerate(lower_bounds(lm.lower_bounds[...])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], lm.groups).blocks[0]
        x = x + block.mixer(block.mixer_norm(x, compute), compute=compute, bound=bound)[0]
        x = x + block.mlp(block.mlp_norm(x, compute), compute)
    hidden, _ = lm(tokens, compute=compute)
    np.testing.assert_allclose(hidden, lm.norm(x, compute), atol=1e-5)
    gradient = jax.grad(lambda lm: lm(tokens, compute=compute)[0][:, -1].sum())(lm).lower_bounds[...]
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 1e-6


def test_retnet_decays():
    np.testing.assert_allclose(np.exp(log_decays(4)), [31 / 32, 63 / 64, 127 / 128, 255 / 256], rtol=1e-6)


def test_a_norm_of_the_gated_value_is_another():
    x, gate = jnp.asarray([[1.0, 2.0, 3.0, 4.0]]), jnp.asarray([[4.0, 3.0, 2.0, 1.0]])
    gated = np.asarray(x * jax.nn.silu(gate), np.float64)
    np.testing.assert_allclose(RMSNorm(4, 1e-5, gate_first=True)(x, Compute(), gate), norm(gated, 1.0), rtol=1e-5)
    halves = norm(gated.reshape(1, 2, 2), 1.0).reshape(1, 4)
    np.testing.assert_allclose(RMSNorm(4, 1e-5, gate_first=True, groups=2)(x, Compute(), gate), halves, rtol=1e-5)


# --- initial values ---


@functools.cache
def fresh(name, init="lit", d_ff=64):
    mixers = dict(
        retnet=RetNetConfig(heads=2, key_dim=64, value_dim=128),
        hgrn2=HGRN2Config(heads=2, head_dim=64),
        mamba=MambaConfig(inner=256, dt_rank=64),
        mamba2=Mamba2Config(heads=64, head_dim=4),
    )
    cfg = Model(pattern=(name,), repeats=3, d_model=128, d_ff=d_ff, vocab=64, init=init, **{name: mixers[name]})
    return init_model(cfg, jax.random.key(0))


def check_dt(bias):
    dt = softplus(np.asarray(bias, np.float64))
    assert 0.99e-3 < dt.min() < 2e-3 and 0.06 < dt.max() < 0.101


@pytest.mark.parametrize("d_ff, writes", [(64, 6), (0, 3)])
def test_initialisation_of_mamba_and_mamba2_in_the_lit_family(d_ff, writes):
    mixer = fresh("mamba", d_ff=d_ff).groups.blocks[0].mixer
    check_uniform(mixer.in_proj.kernel[...], 128**-0.5)
    check_uniform(mixer.x_proj.kernel[...], 256**-0.5)
    check_uniform(mixer.dt_proj.kernel[...], 64**-0.5)
    check_uniform(mixer.conv.weight[...], 0.5)
    check_uniform(mixer.conv.bias[...], 0.5)
    check_uniform(mixer.out_proj.kernel[...], 256**-0.5 / np.sqrt(writes))
    check_dt(mixer.dt_proj.bias[...])
    np.testing.assert_allclose(np.exp(mixer.A_log[...]), np.broadcast_to(np.arange(1, 17), (3, 256, 16)), rtol=1e-6)
    assert np.all(np.asarray(mixer.D[...]) == 1)

    mixer = fresh("mamba2", d_ff=d_ff).groups.blocks[0].mixer
    check_uniform(mixer.in_proj.kernel[...], 128**-0.5)
    check_uniform(mixer.conv.bias[...], 0.5)
    check_uniform(mixer.out_proj.kernel[...], 256**-0.5 / np.sqrt(writes))
    check_dt(mixer.dt_bias[...])
    A = np.exp(np.asarray(mixer.A_log[...]))
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8.5) < 1
    assert np.all(np.asarray(mixer.D[...]) == 1) and np.all(np.asarray(mixer.norm.weight[...]) == 1)


def test_initialisation_of_the_fla_family():
    for name in ("retnet", "hgrn2", "mamba", "mamba2"):
        mixer = fresh(name, "fla").groups.blocks[0].mixer
        for part in ("q_proj", "o_proj") if name in ("retnet", "hgrn2") else ("in_proj",):
            check_normal(getattr(mixer, part).kernel[...], 0.02)
    mamba, mamba2 = (fresh(name, "fla").groups.blocks[0].mixer for name in ("mamba", "mamba2"))
    check_normal(mamba.out_proj.kernel[...], 0.02)
    check_uniform(mamba.conv.bias[...], 0.5)
    check_uniform(mamba.dt_proj.kernel[...], 64**-0.5)
    check_dt(mamba.dt_proj.bias[...])
    check_uniform(mamba2.out_proj.kernel[...], 256**-0.5 / np.sqrt(3))
    check_normal(mamba2.conv.weight[...], 0.02)
    assert not np.any(mamba2.conv.bias[...])
    assert np.all(np.asarray(fresh("hgrn2", "fla").lower_bounds[...]) == 0)
    assert fresh("hgrn2", "fla").lower_bounds.shape == (3, 128) and fresh("retnet", "fla").lower_bounds is None


def test_wrong_mixer_sizes_are_refused():
    with pytest.raises(UserError, match="model.mamba2.groups is 3; it must divide model.mamba2.heads 4"):
        Mamba2Config(heads=4, groups=3)
    with pytest.raises(UserError, match="model.retnet.key_dim is 5; it must be even"):
        RetNetConfig(heads=1, key_dim=5, value_dim=4)
    with pytest.raises(UserError, match="d_model is 32; it must be model.hgrn2.heads 2 x head_dim 8 = 16"):
        Model(pattern=("hgrn2",), repeats=1, d_model=32, d_ff=0, hgrn2=HGRN2Config(heads=2, head_dim=8))
    with pytest.raises(UserError, match="model.mamba.dt_rank is 0; it must be positive"):
        MambaConfig(inner=8, dt_rank=0)


# --- Table 1 of the paper: every update is the stationary point of its objective ---


def table1_case():
    k1, k2, k3, k4 = jax.random.split(jax.random.key(7), 4)
    key = jax.random.normal(k1, (1, 1, 5))
    key = key / jnp.linalg.norm(key)
    return key, jax.random.normal(k2, (1, 1, 4)), jax.random.normal(k3, (1, 1, 5, 4)), k4


ALPHA, BETA = 0.7, 0.6
TABLE1 = {  # name: (log decay, write strength, target of the linear term); the state is [K, V], S^T k reads it
    "linear attention": (0.0, None, lambda S, k, v: v),
    "mamba2": (np.log(ALPHA), None, lambda S, k, v: v),
    "deltanet": (0.0, BETA, lambda S, k, v: BETA * (v - S.T @ k)),
    "gated deltanet": (np.log(ALPHA), BETA, lambda S, k, v: BETA * (v - ALPHA * S.T @ k)),
}


@pytest.mark.parametrize("name", TABLE1)
def test_each_update_of_table_1_is_the_stationary_point_of_its_objective(name):
    """L(S_t) = ||S_t - alpha S_{t-1}||^2 - 2 <S_t^T k, target>; its gradient at our ops' S_t is zero."""
    g, beta, target = TABLE1[name]
    k, v, S, other = table1_case()
    decay = jnp.full((1, 1), g)
    if beta is None:
        _, new = linear_attention_step(k, k, v, decay, S)
    else:
        _, new = gated_delta_rule_step(k, k, v, decay, jnp.full((1, 1), beta), S)

    def objective(state):
        wanted = target(S[0, 0], k[0, 0], v[0, 0])
        return jnp.sum((state - np.exp(g) * S[0, 0]) ** 2) - 2 * jnp.dot(state.T @ k[0, 0], wanted)

    assert np.abs(jax.grad(objective)(new[0, 0])).max() < 1e-5
    assert np.abs(jax.grad(objective)(S[0, 0])).max() > 0.1, "another state is not stationary"
    moved = new[0, 0] + 0.1 * jax.random.normal(other, (5, 4))
    assert objective(moved) > objective(new[0, 0])
