"""The chunked linear cross entropy against the float64 oracle, and what it must not allocate."""

from dataclasses import replace
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import IMPLS, conformance, linear_cross_entropy, reference, token_nll

B, T, D, VOCAB = 2, 37, 16, 53


def case(dtype=jnp.float32, T=T):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, D), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (D, VOCAB), jnp.float32)
    targets = jax.random.randint(keys[2], (B, T), 0, VOCAB)
    weights = jax.random.uniform(keys[3], (B, T), jnp.float32).at[0, 3].set(0.0)
    return x, kernel, targets, weights


def oracle(x, kernel, targets, weights):
    """Loss and gradients in float64 numpy."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    logits = x @ kernel
    logits -= logits.max(-1, keepdims=True)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    onehot = np.eye(kernel.shape[1])[np.asarray(targets)]
    nll = np.log(np.exp(logits).sum(-1)) - (logits * onehot).sum(-1)
    dlogits = (softmax - onehot) * weights[..., None]
    return (weights * nll).sum(), dlogits @ kernel.T, np.einsum("btd,btv->dv", x, dlogits), nll


def relative(a, b):
    a = np.asarray(a, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.name)
def test_loss_and_gradients_match_float64(case, dtype):
    assert conformance.failures(replace(case, dtype=dtype), "chunked") == []


def test_token_nll_and_the_loss_without_a_gradient_match_float64():
    args = case()
    loss, *_, nll = oracle(*args)
    assert relative(linear_cross_entropy(*args, chunk=8), loss) < 1e-6
    assert relative(token_nll(*args[:3], chunk=8), nll) < 1e-6


def test_gradient_matches_plain_log_softmax_in_fp32():
    x, kernel, targets, weights = case()

    def plain(x, kernel):
        log_p = jax.nn.log_softmax(jnp.matmul(x, kernel, precision="highest"))
        return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    ours = jax.grad(lambda x, kernel: linear_cross_entropy(x, kernel, targets, weights, chunk=8), (0, 1))
    for a, b in zip(ours(x, kernel), jax.grad(plain, (0, 1))(x, kernel), strict=True):
        assert relative(a, np.asarray(b, np.float64)) < 1e-5


def test_reference_implementation_is_the_oracle():
    args = case()
    loss, _, _, nll = oracle(*args)
    assert relative(linear_cross_entropy(*args, impl="reference"), loss) < 1e-6
    assert relative(reference.linear_cross_entropy(*args), loss) < 1e-6
    assert relative(reference.token_nll(*args[:3]), nll) < 1e-6


def test_bf16_keeps_fp32_statistics_and_kernel_gradient():
    x, kernel, targets, weights = case(jnp.bfloat16)
    loss, dx, dkernel, _ = oracle(x, kernel.astype(jnp.bfloat16), targets, weights)
    value, gradients = jax.value_and_grad(linear_cross_entropy, (0, 1))(x, kernel, targets, weights, chunk=8)
    assert value.dtype == gradients[1].dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    assert relative(value, loss) < 1e-6  # products of bf16 are exact, everything after them is fp32
    assert relative(gradients[0], dx) < 5e-3
    assert relative(gradients[1], dkernel) < 5e-3


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(
            equation.params,
            is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_no_array_holds_all_logits():
    gradient = jax.grad(linear_cross_entropy, (0, 1))
    args = case(T=40)
    full = {(B, 40, VOCAB), (B * 40, VOCAB)}
    chunked = set(shapes_in(jax.make_jaxpr(lambda *a: gradient(*a, chunk=8))(*args).jaxpr))
    assert (B, 8, VOCAB) in chunked and not chunked & full
    assert max(int(np.prod(shape)) for shape in chunked) <= max(B * 40 * D, D * VOCAB, B * 8 * VOCAB)
    # the walk does find them where they exist
    reference = jax.make_jaxpr(lambda *a: gradient(*a, impl="reference"))(*args)
    assert full & set(shapes_in(reference.jaxpr))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_of_minus_100_is_left_out(impl):
    """Loss, mean and every gradient are those of the other tokens alone."""
    x, kernel, targets, weights = case()
    kept = np.asarray(targets) % 3 > 0
    ignored = jnp.where(kept, targets, -100)
    rest, whole = weights * kept, jax.value_and_grad(partial(linear_cross_entropy, chunk=8, impl=impl), (0, 1, 3))
    loss, dx, dkernel, nll = oracle(x, kernel, targets, rest)
    value, gradients = whole(x, kernel, ignored, weights)
    assert relative(value, loss) < 1e-6 and relative(linear_cross_entropy(x, kernel, ignored, weights), loss) < 1e-6
    assert relative(gradients[0], dx) < 1e-5 and relative(gradients[1], dkernel) < 1e-5
    assert relative(gradients[2], nll * kept) < 1e-6 and not np.asarray(gradients[2])[~kept].any()
    assert not np.asarray(gradients[0])[~kept].any()
    assert relative(token_nll(x, kernel, ignored, chunk=8), nll * kept) < 1e-6
    value, _ = whole(x, kernel, jnp.full_like(targets, -100), weights)
    assert value == 0


@pytest.mark.parametrize("strange", [-1, -101, VOCAB])
def test_other_targets_outside_the_vocabulary_are_refused(strange):
    x, kernel, targets, weights = case()
    targets = targets.at[1, 2].set(strange)
    for call in (lambda: linear_cross_entropy(x, kernel, targets, weights), lambda: token_nll(x, kernel, targets)):
        with pytest.raises(ValueError, match=rf"targets holds {strange}; they must lie in \[0, 53\), or be -100"):
            call()


def test_a_bad_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_cross_entropy(*case(), chunk=0)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_targets_of_a_narrow_type_name_one_column_each(dtype):
    """More columns than the type counts: a column's number must not wrap around and be another's."""
    vocab = 300 if dtype != "int16" else 70_000
    x, kernel = jax.random.normal(jax.random.key(0), (1, 4, 2)), jax.random.normal(jax.random.key(1), (2, vocab))
    targets, ones = jnp.asarray([[3, 7, 120, 0]]), jnp.ones((1, 4))
    wanted = linear_cross_entropy(x, kernel, targets, ones)
    assert float(linear_cross_entropy(x, kernel, targets.astype(dtype), ones)) == float(wanted)
    np.testing.assert_array_equal(token_nll(x, kernel, targets.astype(dtype)), token_nll(x, kernel, targets))
