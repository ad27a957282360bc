"""On a CUDA device: every op against float64, cuDNN attention against XLA's, a model and a training step.

    XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu tests/test_gpu.py -n 12 --dist load

Nearly all of its time is compilation, and by default one worker would take the whole file.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import experiment, losses, prepare_text
from test_train import first_steps

import experiments
from gdn_jax.layers import Compute
from gdn_jax.loss import next_token_loss
from gdn_jax.metrics import environment
from gdn_jax.mixers import attention
from gdn_jax.model import init_model
from gdn_jax.train import train
from gdn_jax.tree import named_leaves
from pallas_kernels.conformance import reached
from pallas_kernels.gated_delta_rule import (
    configurations,
    conformance,
    gated_delta_rule,
    gated_delta_rule_step,
    triton_op,
)
from pallas_kernels.gated_delta_rule.conformance import CASES, Case
from pallas_kernels.gated_norm import conformance as norm_conformance
from pallas_kernels.linear_attention import conformance as linear_conformance
from pallas_kernels.linear_attention import triton_head
from pallas_kernels.selective_scan import conformance as scan_conformance
from pallas_kernels.short_conv import conformance as conv_conformance

pytestmark = pytest.mark.gpu

# released and FLA head sizes, short enough for the float64 recurrence
SIZES = [(64, 64), (128, 128), (128, 256), (192, 384), (200, 400), (256, 512)]


@pytest.fixture(autouse=True)
def on_the_device():
    assert jax.default_backend() == "gpu", "these tests need a CUDA device"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunked_matches_float64(case, dtype):
    assert conformance.failures(dataclasses.replace(case, dtype=dtype), "chunked", seed=1) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("K,V", SIZES)
def test_chunked_matches_float64_at_model_head_sizes(K, V, dtype):
    case = Case(name="size", B=1, T=300, K=K, V=V, dtype=dtype, cosine=0.5, documents=0.01)
    assert conformance.failures(case, "chunked", seed=2) == []


@pytest.mark.parametrize("case", [c for c in CASES if c.chunk == 64], ids=lambda case: case.name)
def test_triton_matches_float64(case):
    case = dataclasses.replace(case, K=64, V=64, dtype="bfloat16")
    assert conformance.failures(case, "triton", seed=1) == []


@pytest.mark.parametrize("name", ["T=129", "documents", "decay 0.999", "decay 0.3", "group value", "inputs kept"])
@pytest.mark.parametrize("K,V", triton_op.SIZES)
def test_triton_matches_float64_at_every_size(K, V, name):
    case = dataclasses.replace(next(c for c in CASES if c.name == name), K=K, V=V, dtype="bfloat16")
    assert conformance.failures(case, "triton", seed=2) == []


@pytest.mark.parametrize("name", ["T=129", "documents"])
@pytest.mark.parametrize(
    "kind,entry", [(kind, entry) for kind, entries in configurations.table().items() for entry in entries]
)
def test_every_entry_of_the_table_matches_float64(kind, entry, name):
    K, V = map(int, entry.removesuffix(" few").split("x"))
    case = dataclasses.replace(next(c for c in CASES if c.name == name), K=K, V=V, dtype="bfloat16")
    configuration = configurations.table()[kind][entry].configuration
    assert conformance.failures(case, "triton", seed=4, configuration=configuration) == []


@pytest.mark.parametrize("name", ["decay 0.999", "documents", "inputs kept"])
def test_triton_matches_float64_in_pieces(name, monkeypatch):
    """Rows cut into pieces, as where a row is long and heads are few."""
    monkeypatch.setattr(triton_op, "SHORTEST_PIECE", 128)
    case = dataclasses.replace(next(c for c in CASES if c.name == name), K=128, V=128, T=700, dtype="bfloat16")
    assert triton_op.pieces(case.B, case.T, case.Hv, case.V) == 4
    assert conformance.failures(case, "triton", seed=3) == []


@pytest.mark.parametrize("K,V", [(128, 128), (200, 400), (256, 512)])
def test_triton_repeats_bit_for_bit_and_writes_everything(K, V):
    """Three runs on memory that held NaNs: equal, and finite."""
    case = Case(name="repeat", T=500, K=K, V=V, dtype="bfloat16", documents=0.01)
    inputs = conformance.inputs(case)
    runs = []
    for _ in range(3):
        for size in (1 << 20, 1 << 26, 1 << 28):
            jax.block_until_ready(jnp.full(size, jnp.nan, jnp.float32))
        runs.append(conformance.outputs_and_gradients(case, *inputs, impl="triton", dtype=jnp.bfloat16))
    for name, first in runs[0].items():
        assert np.isfinite(first).all(), name
        assert all(np.array_equal(first, other[name]) for other in runs[1:]), name


LINEAR = [case for case in linear_conformance.CASES if case.chunk == 64]
CONV = ["W=7", "documents", "heads to norm 1", "many small heads", "pieces of a row", "no activation", "plain"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONV)
def test_triton_convolution_matches_float64(name, dtype):
    case = next(c for c in conv_conformance.CASES if c.name == name)
    assert conv_conformance.failures(dataclasses.replace(case, dtype=dtype), "triton", seed=1) == []


@pytest.mark.parametrize("documents", [0.0, 0.01])
@pytest.mark.parametrize("C,head", [(1800, 200), (3600, None), (2048, 128), (1536, 192), (1536, 256), (4352, None)])
def test_triton_convolution_matches_float64_at_model_sizes(C, head, documents):
    case = conv_conformance.Case(
        name="size", T=700, C=C, l2norm=head, dtype="bfloat16", documents=documents, bias=C == 4352
    )
    assert conv_conformance.failures(case, "triton", seed=2) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", norm_conformance.CASES, ids=lambda case: case.name)
def test_triton_norm_matches_the_equation(case, dtype):
    assert norm_conformance.failures(dataclasses.replace(case, dtype=dtype), "triton", seed=1) == []


@pytest.mark.parametrize(
    "shape,first", [((2, 300, 9, 400), False), ((2, 300, 16, 128), False), ((2, 300, 4096), True), ((600, 2400), False)]
)
def test_triton_norm_matches_the_equation_at_model_sizes(shape, first):
    case = norm_conformance.Case(name="size", shape=shape, gate_first=first, dtype="bfloat16")
    assert norm_conformance.failures(case, "triton", seed=2) == []


@pytest.mark.parametrize("case", [c for c in LINEAR if c.T > 1], ids=lambda case: case.name)
def test_linear_attention_kernels_match_float64(case):
    case = dataclasses.replace(case, dtype="bfloat16")
    assert linear_conformance.failures(case, "triton", seed=1) == []


@pytest.mark.parametrize("chunk", [64, "its own", "channels"])
@pytest.mark.parametrize(
    "H,Hv,K,V",
    [
        (2, 2, 128, 128),
        (2, 4, 128, 256),
        (1, 1, 512, 512),
        (2, 2, 256, 512),
        (1, 4, 128, 64),
        (2, 2, 192, 384),
        (2, 2, 200, 400),
        (1, 3, 24, 40),
    ],
)
def test_linear_attention_kernels_match_float64_at_model_sizes(H, Hv, K, V, chunk):
    sizes = {"T": 500, "H": H, "Hv": Hv, "K": K, "V": V, "channels": chunk == "channels"}
    case = linear_conformance.Case(name="size", dtype="bfloat16", documents=0.01, **sizes)
    configuration = None
    if chunk == 64:
        configuration = dataclasses.replace(triton_head.configuration_for(K, V), chunk=chunk)
    assert linear_conformance.failures(case, "triton", seed=2, configuration=configuration) == []


@pytest.mark.parametrize("g", [-20.0, -60.0, -1e4, -float("inf")])
def test_linear_attention_kernels_per_channel_match_float64_at_strong_decay_before_weak(g):
    """A reset of every channel early in a chunk: later sums are large, what is between tokens is not."""
    case = linear_conformance.Case(name="reset", T=190, K=64, V=64, dtype="bfloat16", channels=True)
    arrays, segments, cotangents = linear_conformance.inputs(case, seed=3)
    arrays[3][:, 3::64] = g
    got = linear_conformance.outputs_and_gradients(
        case, arrays, segments, cotangents, impl="triton", dtype=jnp.bfloat16
    )
    want = linear_conformance.oracle(case, arrays, segments, cotangents)
    for name, limit in linear_conformance.limits(case, "triton").items():
        assert np.linalg.norm(got[name] - want[name]) <= limit * np.linalg.norm(want[name]), name


def test_linear_attention_kernels_per_channel_give_the_same_bits_each_time():
    """A race in the kernels would show here: 40 runs at sizes that fill the device."""
    case = linear_conformance.Case(name="again", T=1000, H=16, Hv=16, K=128, V=128, dtype="bfloat16", channels=True)
    arrays, segments, cotangents = linear_conformance.inputs(case, seed=4)
    run = partial(
        linear_conformance.outputs_and_gradients, case, arrays, segments, cotangents, impl="triton", dtype=jnp.bfloat16
    )
    first = run()
    for _ in range(40):
        for name, x in run().items():
            assert np.array_equal(first[name], x), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", scan_conformance.CASES, ids=lambda case: case.name)
def test_selective_scan_kernels_match_float64(case, dtype):
    assert scan_conformance.failures(dataclasses.replace(case, dtype=dtype), "triton", seed=1) == []


@pytest.mark.parametrize("D,N", [(2048, 16), (4608, 16), (200, 16), (96, 5)])
def test_selective_scan_kernels_match_float64_at_model_sizes_bit_for_bit(D, N):
    """Three runs on memory that held NaNs: right, and equal."""
    case = scan_conformance.Case(name="size", T=500, D=D, N=N, dtype="bfloat16", documents=0.01)
    assert scan_conformance.failures(case, "triton", seed=2) == []
    inputs, runs = scan_conformance.inputs(case), []
    for _ in range(3):
        for size in (1 << 20, 1 << 26, 1 << 28):
            jax.block_until_ready(jnp.full(size, jnp.nan, jnp.float32))
        runs.append(scan_conformance.outputs_and_gradients(case, *inputs, impl="triton", dtype=jnp.bfloat16))
    for name, first in runs[0].items():
        assert all(np.array_equal(first, other[name]) for other in runs[1:]), name


STEPS = [(conformance, case) for case in conformance.STEPS]
STEPS += [(linear_conformance, case) for case in linear_conformance.STEPS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suite,case", STEPS, ids=lambda x: getattr(x, "name", ""))
def test_the_kernel_of_one_token_matches_float64(suite, case, dtype):
    assert suite.STEP_SUITE.failures(dataclasses.replace(case, dtype=dtype), "triton", seed=1) == []


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize(
    "H,Hv,K,V,channels",
    [
        *((9, 9, *sizes, None) for sizes in ((128, 256), (192, 384), (200, 400))),
        *((16, 16, 128, 128, channels) for channels in (None, False, True)),
        (8, 8, 256, 512, False),
        (1, 72, 128, 64, False),
    ],
)
def test_the_kernel_of_one_token_matches_float64_at_model_sizes(H, Hv, K, V, channels, batch):
    """channels: None for the gated delta rule."""
    sizes = {"name": "size", "T": 1, "B": batch, "H": H, "Hv": Hv, "K": K, "V": V, "dtype": "bfloat16"}
    if channels is None:
        assert conformance.STEP_SUITE.failures(Case(**sizes), "triton", seed=2) == []
    else:
        case = linear_conformance.Case(**sizes, channels=channels)
        assert linear_conformance.STEP_SUITE.failures(case, "triton", seed=2) == []


@pytest.mark.parametrize("K,V", [(20, 40), (200, 400), (256, 512)])
def test_the_kernel_of_one_token_in_place_and_with_states_that_are_not_finite(K, V):
    """Twenty tokens in a loop that owns its state, whose q it brings to norm 1, give what the parallel form gives,
    and the same bits twice."""
    arrays, _, _ = conformance.inputs(Case(name="loop", T=20, B=3, H=3, Hv=6, K=K, V=V))
    *tokens, state = (jnp.asarray(x, jnp.float32) for x in arrays)
    o, last = gated_delta_rule(*tokens, initial_state=state, impl="chunked")

    @partial(jax.jit, donate_argnums=0)
    def loop(state, tokens):
        def write(state, token):
            q, *others = token
            o, state = gated_delta_rule_step(3 * q, *others, state, l2norm=True, impl="triton")
            return state, o

        return jax.lax.scan(write, state, [jnp.moveaxis(x, 1, 0) for x in tokens])

    first, again = (loop(jnp.array(state), tokens) for _ in range(2))
    assert all(jnp.array_equal(x, y) for x, y in zip(first, again, strict=True))
    np.testing.assert_allclose(first[0], last, atol=3e-5 * float(jnp.abs(last).max()))
    np.testing.assert_allclose(jnp.moveaxis(first[1], 0, 1), o, atol=3e-5 * float(jnp.abs(o).max()))
    token = [x[:, 0] for x in tokens]
    assert reached(lambda state: gated_delta_rule_step(*token, state, impl="triton"), arrays[5]) == []


def test_triton_under_transformations():
    """jit of vmap, remat and scan give what plain calls give."""
    case = Case(name="transformed", T=130, K=64, V=64, dtype="bfloat16")
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in conformance.inputs(case)[0][:3]]
    gates = [jnp.asarray(x, jnp.float32) for x in conformance.inputs(case)[0][3:5]]

    def op(q, k, v, g, beta):
        return gated_delta_rule(q, k, v, g, beta, impl="triton")[0]

    def loss(op, *tokens):
        return (op(*tokens).astype(jnp.float32) ** 2).sum()

    plain = jax.jit(jax.grad(partial(loss, op), argnums=(0, 1, 2, 3, 4)))(*arrays, *gates)
    remat = jax.jit(jax.grad(partial(loss, jax.checkpoint(op)), argnums=(0, 1, 2, 3, 4)))(*arrays, *gates)
    for one, other in zip(plain, remat, strict=True):
        assert jnp.array_equal(one, other)
    stacked = [jnp.stack([x, x[::-1]]) for x in (*arrays, *gates)]
    mapped = jax.jit(jax.vmap(op))(*stacked)
    assert jnp.array_equal(mapped[0], op(*arrays, *gates)) and jnp.array_equal(mapped[1], mapped[0][::-1])
    _, scanned = jax.lax.scan(lambda _, tokens: (None, op(*tokens)), None, stacked)
    assert jnp.array_equal(scanned, mapped)


@pytest.mark.parametrize("window", [None, 256])
def test_cudnn_attention_equals_xla(window, monkeypatch):
    """Outputs and gradients, bf16, full and sliding window; the compiled program holds cuDNN's call."""
    shape = (2, 1024, 4, 128)
    q, k, v, do = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    span = None if window is None else (window - 1, 0)

    def run(q, k, v):
        o, vjp = jax.vjp(
            lambda *x: attention._dot_product_attention(*x, mask=None, is_causal=True, local_window_size=span), q, k, v
        )
        return o, *vjp(do)

    compiled = jax.jit(run).lower(q, k, v).compile()
    assert "cudnn$fmha" in compiled.as_text()
    got = compiled(q, k, v)

    def exact(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        o, vjp = jax.vjp(
            lambda *x: attention._dot_product_attention(*x, mask=None, is_causal=True, local_window_size=span), q, k, v
        )
        return o, *vjp(do.astype(jnp.float32))

    for name, x, y in zip(("o", "dq", "dk", "dv"), got, jax.jit(exact)(q, k, v), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
        assert error < 1e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", ["gated-deltanet", "gated-deltanet-h1", "transformer"])
def test_desk_model_in_bf16_is_near_fp32(name):
    """Loss and gradient of a 30-60M model: bf16 on the device (cuDNN where there is attention) against fp32."""
    cfg = experiments.get(f"table3/{name}/desk").model
    model = jax.jit(lambda: init_model(cfg, jax.random.key(0)))()
    batch = {"tokens": jax.random.randint(jax.random.key(1), (2, 513), 0, 256)}
    run = jax.jit(jax.value_and_grad(next_token_loss), static_argnums=2)
    low, low_grads = run(model, batch, Compute(dtype=jnp.bfloat16))
    high, high_grads = run(model, batch, Compute(dtype=jnp.float32))
    np.testing.assert_allclose(low, high, rtol=5e-3)
    low_grads, high_grads = named_leaves(low_grads), named_leaves(high_grads)
    flat = lambda grads: np.concatenate([np.ravel(x) for x in grads.values()])  # noqa: E731
    cosine = flat(low_grads) @ flat(high_grads) / np.linalg.norm(flat(low_grads)) / np.linalg.norm(flat(high_grads))
    assert cosine > 0.99, cosine


def test_training_step_equals_the_cpu(tmp_path):
    on_gpu, _, _ = first_steps(experiment(tmp_path), jax.devices()[:1])
    on_cpu, _, _ = first_steps(experiment(tmp_path), jax.devices("cpu")[:1])
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)


def test_training_and_resume_on_the_device(tmp_path):
    prepare_text(tmp_path)
    whole = losses(train(experiment(tmp_path, dir=str(tmp_path / "whole"))))
    small = experiment(tmp_path, dir=str(tmp_path / "parts"))
    train(small)
    checkpoints = tmp_path / "parts" / "checkpoints"
    for path in checkpoints.iterdir():
        if int(path.name) > 15:
            path.rename(tmp_path / f"later-{path.name}")
    resumed = losses(train(small))
    np.testing.assert_allclose([resumed[s] for s in range(1, 25)], [whole[s] for s in range(1, 25)], rtol=1e-5)
    assert environment()["devices"][0].startswith("NVIDIA")
