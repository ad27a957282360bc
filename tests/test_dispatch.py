"""Choosing an implementation, and running an op on each device's own part of batch and heads."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch, placement, triton_calls
from pallas_kernels.gated_delta_rule import conformance, gated_delta_rule, gated_delta_rule_step, triton_op
from pallas_kernels.gated_delta_rule.conformance import Case
from pallas_kernels.linear_attention import conformance as linear_attention_conformance
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import conformance as selective_scan_conformance
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import LEAST_TOKENS, short_conv


def test_auto_takes_the_first_that_can_run_and_says_why_once(capsys, monkeypatch):
    monkeypatch.setattr(placement, "on_gpu", lambda: True)
    choice = dispatch.choose("an_op", "auto", lambda interpret: None if interpret else "no CUDA device")
    assert choice == dispatch.Choice("an_op", "chunked", (dispatch.Refusal("an_op", "triton", "no CUDA device"),))
    with dispatch.record() as outer, dispatch.record() as inner:
        assert [dispatch.taken(choice) for _ in range(3)] == ["chunked"] * 3
    assert outer == inner == [choice] * 3
    assert capsys.readouterr() == ("", "an_op: auto takes chunked (triton: no CUDA device)\n")
    assert dispatch.taken(dispatch.Choice("an_op", "triton")) == "triton" and len(inner) == 3
    with dispatch.record(silent=True) as choices:
        assert dispatch.taken(choice._replace(op="another")) == "chunked"
    assert len(choices) == 1 and capsys.readouterr() == ("", "")
    monkeypatch.setattr(placement, "on_gpu", lambda: False)
    assert dispatch.taken(choice._replace(op="a third")) == "chunked" and capsys.readouterr() == ("", "")


def test_the_choice_follows_the_mesh_and_the_default_device(monkeypatch):
    """On a machine with a GPU, what runs on its CPU takes no kernels."""
    cpus, gpu = jax.devices("cpu"), SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda platform=None: cpus if platform == "cpu" else [gpu])
    no_gpu = f"the device is {cpus[0].device_kind}, not a CUDA device"
    assert placement.device() is gpu and triton_calls.why_not_here() is None
    for here in (jax.set_mesh(Mesh(cpus[:2], ("data",))), jax.default_device(cpus[1]), jax.default_device("cpu")):
        with here:
            assert placement.device() in cpus and triton_calls.why_not_here() == no_gpu
            assert jax.jit(lambda: triton_calls.why_not_here() == no_gpu)()
    assert placement.on_gpu()


@pytest.mark.parametrize(
    ("dtype", "rounds_to", "auto", "named"),
    [
        (jnp.bfloat16, jnp.bfloat16, True, True),
        (jnp.float32, jnp.bfloat16, False, True),
        (jnp.float64, jnp.bfloat16, False, False),
        (jnp.float32, jnp.float32, True, True),
        (jnp.float64, jnp.float32, False, False),
    ],
)
def test_rounding_is_for_the_caller_to_ask_for_and_float64_is_never_rounded(dtype, rounds_to, auto, named):
    choose = partial(dispatch.choose, "an_op", why_not=lambda interpret: None, dtype=dtype, rounds_to=rounds_to)
    choice, reason = choose("auto"), f"it would round {jnp.dtype(dtype)} to {jnp.dtype(rounds_to)}"
    refused = () if auto else (dispatch.Refusal("an_op", "triton", reason),)
    assert choice == dispatch.Choice("an_op", "triton" if auto else "chunked", refused)
    for impl in dispatch.KERNELS:
        if named:
            assert choose(impl) == dispatch.Choice("an_op", impl)
        else:
            with pytest.raises(dispatch.CannotRun, match=rf"^an_op: impl '{impl}' cannot run: {reason}\.$"):
                choose(impl)
    assert choose("reference").impl == "reference" and choose("chunked").impl == "chunked"


def test_a_named_implementation_never_falls_back():
    with pytest.raises(dispatch.CannotRun, match="an_op: impl 'triton' cannot run: no CUDA device") as caught:
        dispatch.choose("an_op", "triton", lambda interpret: "no CUDA device")
    assert caught.value.refused == (dispatch.Refusal("an_op", "triton", "no CUDA device"),)
    with pytest.raises(dispatch.CannotRun, match="impl 'triton' cannot run: this version has no Triton kernel for it"):
        dispatch.choose_plain("an_op", "triton")


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_a_fallback_is_one_line_on_stderr_of_a_process_that_has_a_gpu(backend):
    code = (
        f"from pallas_kernels import placement; placement.on_gpu = lambda: {backend == 'gpu'};"
        "import jax.numpy as jnp; from pallas_kernels.gated_delta_rule import gated_delta_rule as op;"
        "q, g = jnp.ones((1, 4, 1, 8), jnp.bfloat16), jnp.zeros((1, 4, 1));"
        "[op(q, q, q, g, g) for _ in range(2)]"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == ""
    said = [
        "gated_delta_rule: auto takes chunked (triton: there is no kernel for key x value dimensions 8x8 (there is for "
        + ", ".join(f"{k}x{v}" for k, v in triton_op.SIZES)
        + "))"
    ]
    assert process.stderr.splitlines() == (said if backend == "gpu" else [])


def test_the_choice_is_made_for_the_part_that_a_device_has():
    """As many tokens as the convolution's kernels need, split over two devices."""
    x, weight = (jax.ShapeDtypeStruct((*sizes, 64), jnp.float32) for sizes in ((1, LEAST_TOKENS), (4,)))
    op = partial(short_conv, impl="triton_interpret")
    with dispatch.record() as choices:
        jax.eval_shape(op, x, weight)
    assert choices == [dispatch.Choice("short_conv", "triton_interpret")]
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(dispatch.CannotRun, match=f"T is {LEAST_TOKENS // 2}; the kernels read"):
        jax.eval_shape(op, x, weight)


def sharded_and_plain(axes, case, impl):
    """(gradients under a mesh of `axes`, without one, the compiled program under the mesh)."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    arrays, segments, (do, d_state) = conformance.inputs(case)
    dtypes = (case.dtype,) * 3 + ("float32",) * 3
    arrays = [jnp.asarray(x, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]

    def run(arrays, segments):
        def loss(arrays):
            *tokens, state = arrays
            o, state = gated_delta_rule(*tokens, initial_state=state, segment_ids=segments, impl=impl)
            return (o * do).sum() + (state * d_state).sum()

        return jax.grad(loss)(arrays)

    plain = jax.jit(run)(arrays, segments)
    batch = tuple(name for name in axes if name in dispatch.MESH_AXES["batch"])
    sharding = NamedSharding(mesh, PartitionSpec(batch))
    with jax.set_mesh(mesh):
        placed = jax.device_put((arrays, segments), sharding)
        compiled = jax.jit(run, out_shardings=sharding).lower(*placed).compile()
    return compiled(*placed), plain, compiled.as_text()


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_sharded_op_equals_the_plain_one_and_gathers_nothing(axes):
    sharded, plain, program = sharded_and_plain(axes, Case(name="sharded", T=70, B=4, documents=0.05), "chunked")
    if "tensor" not in axes:
        assert "all-gather" not in program
    for x, y in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_sharded_kernels_equal_the_plain_ones_and_gather_nothing():
    case = Case(name="sharded", T=70, K=64, V=64, documents=0.05, dtype="bfloat16")
    sharded, plain, program = sharded_and_plain({"data": 2}, case, "triton_interpret")
    assert "all-gather" not in program
    for x, y in zip(plain, sharded, strict=True):
        assert jnp.array_equal(x, y)


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_a_sharded_step_equals_the_plain_one_and_gathers_nothing(impl):
    arrays, _, _ = conformance.inputs(Case(name="sharded", T=1, B=4, Hv=4))
    *token, state = (jnp.asarray(x, jnp.float32) for x in arrays)
    given, step = (*(x[:, 0] for x in token), state), partial(gated_delta_rule_step, impl=impl)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, NamedSharding(mesh, PartitionSpec("data", "tensor")))
        compiled = jax.jit(step).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    for x, y in zip(jax.jit(step)(*given), compiled(*placed), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


SUITES = {
    "linear_attention": (linear_attention, linear_attention_conformance, {}),
    "linear_attention by channel": (linear_attention, linear_attention_conformance, {"channels": True}),
    "selective_scan": (selective_scan, selective_scan_conformance, {}),
}


@pytest.mark.parametrize("name", SUITES)
def test_other_sharded_ops_equal_the_plain_ones(name):
    """Gradients of what all shards share, A over the batch and B, C over the channels, are summed over the shards."""
    op, suite, changes = SUITES[name]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays, segments, cotangents = suite.inputs(suite.Case(name="sharded", T=40, B=4, documents=0.05, **changes))
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]

    def run(arrays, segments):
        def loss(arrays):
            *inputs, state = arrays
            outputs = op(*inputs, initial_state=state, segment_ids=segments, impl="chunked")
            return sum((x * d).sum() for x, d in zip(outputs, cotangents, strict=True))

        return jax.grad(loss)(arrays)

    plain = jax.jit(run)(arrays, segments)
    with jax.set_mesh(mesh):
        sharded = jax.jit(run)(arrays, segments)
        assert "shard_map" in str(jax.make_jaxpr(run)(arrays, segments))
    for x, y in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_a_batch_that_does_not_divide_stays_whole():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    layouts = (("batch", None),)
    seen = []

    def op(x):
        seen.append(x.shape)
        return (x,)

    with jax.set_mesh(mesh):
        for batch in (3, 8):
            jax.jit(lambda x: dispatch.shard(op, (x,), layouts, layouts))(jnp.ones((batch, 2)))
    assert seen == [(3, 2), (2, 2)]
