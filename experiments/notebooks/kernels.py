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

from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, resolve

K, V, T = 16, 16, 48  # key and value channels, tokens
choice = resolve("auto", key_dim=K, value_dim=V)
print("auto takes here:", choice.impl, choice.reason)


# %% [markdown]
# Two keys are written again and again, each with a value of its own; at token 24 the first key gets another value. Then
# we ask for what both keys hold after every token, with three settings of decay and write strength.

# %%
keys = jnp.eye(K)[jnp.arange(T) % 2]  # e_0, e_1, e_0, ...
origin = "values drawn at random, no run"
first, second, third = jax.random.normal(jax.random.key(0), (3, V))
values = jnp.where((jnp.arange(T) % 2 == 0)[:, None], jnp.where((jnp.arange(T) < 24)[:, None], first, third), second)


def states(decay: float, strength: float) -> jax.Array:
    """The state after every token, [T, K, V], one token at a time."""
    g, beta = jnp.full((1, 1), jnp.log(decay)), jnp.full((1, 1), strength)

    def write(state: jax.Array, token: tuple) -> tuple:
        key, value = (x[None, None] for x in token)
        _, state = gated_delta_rule_step(key, key, value, g, beta, state)
        return state, state[0, 0]

    return jax.lax.scan(write, jnp.zeros((1, 1, K, V)), (keys, values))[1]


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

# %% [markdown]
# The chunkwise form reads all tokens at once and ends in the same state.

# %%
q = k = keys[None, :, None]
_, state = gated_delta_rule(q, k, values[None, :, None], jnp.zeros((1, T, 1)), jnp.ones((1, T, 1)))
print("chunks against steps:", float(jnp.abs(state[0, 0] - exact[-1]).max()))
assert jnp.allclose(state[0, 0], exact[-1], atol=1e-5)
