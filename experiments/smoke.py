"""Smoke: a two-block model learns English novels byte by byte, offline, in under 120 s on two CPU cores.

    gdn run smoke/gated-deltanet

Expect a held-out loss more than 0.7 nats per byte below that of a unigram model: the mixer then carries
information from earlier bytes, the optimizer works and the evaluation reads the same model. A failure here
means a broken installation.
"""

from experiments.variants import MODELS, model_config
from gdn_jax.config import Data, Experiment, Optim, Run

EXPERIMENTS = tuple(
    Experiment(
        id=f"smoke/{name}",
        model=model_config(name, "tiny"),
        optim=Optim(steps=150, batch_size=8, lr=3e-3, warmup=0.05, precision="fp32"),
        data=Data(source="english-novels", tokenizer="byte", seq_len=128, validation=0.05),
        run=Run(eval_every=30, save_every=150),
    )
    for name in MODELS
    if "tiny" in MODELS[name]
)
