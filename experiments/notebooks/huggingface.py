# %% [markdown]
# # Import a Hugging Face checkpoint, generate, evaluate
#
# flash-linear-attention's directories (`config.json` and `.safetensors`) become runs. `SOURCE` may be any of them, such
# as a download of `m-a-p/1.3B-100B-GatedDeltaNet-pure`, with its own tokenizer beside it. Here a run of ours is written
# in that format first, so that the notebook needs no network: `gdn run smoke/gated-deltanet-fla`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

import gdn_jax
from gdn_jax.config import Data
from gdn_jax.convert.exchange import export_checkpoint, import_checkpoint
from gdn_jax.evaluate.answering import Answering
from gdn_jax.generate import generate
from gdn_jax.layers import compute_for
from gdn_jax.runs import find_run

SOURCE, IMPORTED = Path("fla-checkpoint"), Path("runs/imported")
if not SOURCE.exists():
    export_checkpoint(find_run("smoke/gated-deltanet-fla"), SOURCE, form="fla", dtype="fp32", step=None)
print(json.loads((SOURCE / "config.json").read_text())["architectures"])

# %%
if not IMPORTED.exists():
    data = Data(source="english-novels", tokenizer="byte", seq_len=128, validation=0.05)
    print(import_checkpoint(SOURCE, IMPORTED, data=data, like=None, precision=None))
run = gdn_jax.open_run(IMPORTED)
print(generate(run.model, run.tokenizer, ["She "], max_tokens=40, compute=compute_for(run.experiment))[0].text)

# %% [markdown]
# An import answers like any run: here a choice of endings, and how sure the model is of each.

# %%
context, endings = "The lamp was ", ["lit", "bright", "xqz"]
scores = Answering(run).loglikelihood([(context, ending) for ending in endings])
per_byte = [score / len(ending) for (score, _), ending in zip(scores, endings, strict=True)]
figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
axes.barh(endings, per_byte)
axes.set(xlabel="log-likelihood (nats a byte)", title=f'after "{context}"')
plt.show()
