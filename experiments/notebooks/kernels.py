# %% [markdown]
# # The gated delta rule: decay, write strength and state
#
# `S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t` (paper, equation 10). The state S is a
# memory of values by key: the decay a forgets all of it, the write strength b replaces what one key holds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels.gated_delta_rule import gated_delta_rule, resolve

K, V, T = 16, 16, 48  # key and value channels, tokens
print("auto takes here:", *resolve("auto", key_dim=K, value_dim=V))


# %% [markdown]
# Two keys are written again and again, each with a value of its own; at token 24 the first key gets another value. Then
# we ask for what both keys hold after every token, with three settings of decay and write strength.

# %%
keys = jnp.eye(K)[jnp.arange(T) % 2]  # e_0, e_1, e_0, ...
first, second, third = jax.random.normal(jax.random.key(0), (3, V))
values = jnp.where((jnp.arange(T) % 2 == 0)[:, None], jnp.where((jnp.arange(T) < 24)[:, None], first, third), second)


def states(decay: float, strength: float) -> jax.Array:
    """The state after every token, [T, K, V]."""
    g = jnp.full((1, T, 1), jnp.log(decay))
    beta = jnp.full((1, T, 1), strength)
    q, k, v = (x[None, :, None].astype(jnp.float32) for x in (keys, keys, values))
    return jnp.stack(
        [
            gated_delta_rule(q[:, :t], k[:, :t], v[:, :t], g[:, :t], beta[:, :t], impl="chunked")[1][0, 0]
            for t in range(1, T + 1)
        ]
    )


def similarity(state: jax.Array, value: jax.Array) -> np.ndarray:
    """Cosine of what key e_0 holds and a value, by token."""
    held = state[:, 0]
    return np.asarray(held @ value / (jnp.linalg.norm(held, axis=-1) * jnp.linalg.norm(value) + 1e-9))


# %%
settings = {"a = 1, b = 1: replaced at once": (1.0, 1.0), "a = 1, b = 0.3: moved bit by bit": (1.0, 0.3),
            "a = 0.8, b = 0.3: and forgotten": (0.8, 0.3)}  # fmt: skip
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
found = {}
for label, (decay, strength) in settings.items():
    found[label] = states(decay, strength)
    left.plot(similarity(found[label], third), label=label)
    right.plot(np.linalg.norm(np.asarray(found[label]), axis=(1, 2)), label=label)
left.axvline(24, color="gray", linestyle="--", linewidth=1)
left.set(xlabel="token", ylabel="cosine with the new value", title="What the first key holds")
right.set(xlabel="token", ylabel="Frobenius norm", title="Size of the state")
left.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
# With b = 1 and no decay the delta rule is exact: a key holds the last value that was written to it, no more, no less.

# %%
exact = found["a = 1, b = 1: replaced at once"]
print("error of the last write:", float(jnp.abs(exact[-1, 0] - third).max()))
assert jnp.allclose(exact[-1, 0], third, atol=1e-5) and jnp.allclose(exact[-1, 1], second, atol=1e-5)
