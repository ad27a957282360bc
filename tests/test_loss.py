"""The training loss: which targets it counts, and how it averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import get
from gdn_jax.layers import Compute
from gdn_jax.loss import next_token_loss
from gdn_jax.model import init_model

FP32 = Compute(dtype=jnp.float32)
LOSS = jax.jit(next_token_loss, static_argnums=2)


@pytest.fixture(scope="module")
def model():
    return jax.jit(init_model, static_argnums=0)(get("smoke/transformer").model, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 18), 0, 257)


@pytest.fixture(scope="module")
def nll(model, tokens):
    """[B, T] of the unsegmented rows, from the logits."""
    hidden, _ = model(tokens[:, :-1], compute=FP32)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    return -np.asarray(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0])


def test_plain_mean_over_all_targets(model, tokens, nll):
    assert nll.shape == (3, 17)
    np.testing.assert_allclose(LOSS(model, {"tokens": tokens}, FP32), nll.mean(), rtol=1e-6)
    # an untrained model knows nothing: about log of the vocabulary
    np.testing.assert_allclose(nll.mean(), np.log(320), rtol=0.05)


def test_rows_are_weighted(model, tokens, nll):
    rows = np.array([0.0, 1.0, 3.0], np.float32)
    loss = LOSS(model, {"tokens": tokens, "weights": jnp.asarray(rows)}, FP32)
    np.testing.assert_allclose(loss, (rows * nll.mean(1)).sum() / 4, rtol=1e-6)
    assert LOSS(model, {"tokens": tokens, "weights": jnp.zeros(3)}, FP32) == 0


def test_packed_rows_are_the_documents_apart(model, tokens):
    """Documents of 8 and 10; the target across the border is the first one's prediction of the second."""
    ids = jnp.asarray([[2] * 8 + [9] * 10] * 3)
    packed = LOSS(model, {"tokens": tokens, "segment_ids": ids}, FP32)
    first = LOSS(model, {"tokens": tokens[:, :9]}, FP32)
    second = LOSS(model, {"tokens": tokens[:, 8:]}, FP32)
    np.testing.assert_allclose(packed, (8 * first + 9 * second) / 17, rtol=1e-6)
    assert abs(packed - LOSS(model, {"tokens": tokens}, FP32)) > 1e-6


def test_bf16_loss_is_fp32_and_close(model, tokens, nll):
    loss = LOSS(model, {"tokens": tokens}, Compute())
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, nll.mean(), rtol=2e-3)
