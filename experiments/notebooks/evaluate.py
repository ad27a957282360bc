# %% [markdown]
# # Open a run, evaluate your own text, plot the loss by position
#
# Needs a run: `gdn run smoke/gated-deltanet` takes a minute on two CPU cores.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gdn_jax
from gdn_jax.evaluate.answering import Answering
from gdn_jax.evaluate.scoring import token_scores
from gdn_jax.generate import generate
from gdn_jax.layers import compute_for

run = gdn_jax.open_run("smoke/gated-deltanet")
compute = compute_for(run.experiment)
print(f"{run.experiment.id} at step {run.step}, trained on data {str(run.trained_on.fingerprint)[:8]}")

# %% [markdown]
# What the model says of texts, and of one sentence after another.

# %%
answers = Answering(run)
texts = ["It was a fine morning, and she walked to the village.", "zqx kjj wvv qqz xxj"]
for text, log_likelihood in zip(texts, answers.rolling(texts), strict=True):
    print(f"{-log_likelihood / len(text.encode()):.3f} nats a byte: {text}")
print(answers.loglikelihood([("She looked at ", "him"), ("She looked at ", "qqq")]))
print(generate(run.model, run.tokenizer, ["She looked at "], max_tokens=40, compute=compute)[0].text)

# %% [markdown]
# Loss by position: the further into a window, the more the state knows.

# %%
window, rows = 128, 256
held_out = run.prepared.tokens("validation")[: rows * window + 1]
tokens = np.stack([held_out[i * window : (i + 1) * window + 1] for i in range(rows)]).astype(np.int32)
nll, likeliest = token_scores(run.model, jnp.asarray(tokens), compute)
by_position = np.asarray(nll).mean(0)
smooth = np.convolve(by_position, np.ones(8) / 8, mode="valid")

figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axes.plot(by_position, color="tab:blue", alpha=0.3, linewidth=1)
axes.plot(np.arange(len(smooth)) + 4, smooth, color="tab:blue", label="mean of 8 positions")
axes.set(
    xlabel="position in the window (bytes)", ylabel="loss (nats a byte)", title=f"{run.experiment.id}, {rows} windows"
)
axes.legend(frameon=False)
plt.show()
print(f"{float(np.asarray(nll).mean()):.4f} nats a byte, {float(np.asarray(likeliest).mean()):.1%} of bytes guessed")
