"""Table 3: language modelling and zero-shot reasoning, 1.3B parameters after 100B tokens of FineWeb-Edu.

    gdn table table3 --scale tiny            all rows, from the runs there are
    gdn run table3/gated-deltanet/tiny       2-block model on ten English novels, two minutes on a CPU
    gdn run table3/gated-deltanet/desk       38M parameters on Python's standard library, minutes on one GPU
    gdn run table3/gated-deltanet/400m       15B tokens, the ablations' size: 33 GPU-hours at 400 TFLOP/s
    gdn run table3/gated-deltanet/1.3b       100B tokens, the published numbers: 570 GPU-hours

Expect, in the paper, perplexity Gated DeltaNet < Mamba2 < DeltaNet < Transformer++ and H1 below them all.
tiny and desk check the machinery and the trend; they read bytes, so no number of theirs compares with the
paper's. The novels are the same text everywhere; the standard library is that of the Python that runs. 400m and 1.3b
need FineWeb-Edu and the Llama-2 tokenizer (`gdn data prepare`).
"""

from experiments.variants import MODELS, model_config, scales_of
from gdn_jax.config import Data, Experiment, Optim, Run

WINDOW = 4096
BATCH = 128  # x 4096 tokens = 0.5M tokens a step, the paper's batch


def _novels() -> Data:
    return Data(source="english-novels", tokenizer="byte", seq_len=256, validation=0.05)


def _python() -> Data:
    return Data(source="python-stdlib", tokenizer="byte", seq_len=1024, validation=0.01)


def _fineweb_edu() -> Data:
    return Data(source="fineweb-edu", tokenizer="data/llama-2.model", seq_len=WINDOW, validation=0.001)


def _paper_recipe(tokens: float) -> Optim:
    """AdamW with Optim's defaults: lr 4e-4, 1% warm-up, cosine to a tenth, weight decay 0.1, clip 1."""
    return Optim(steps=round(tokens / (BATCH * WINDOW)), batch_size=BATCH, lr=4e-4)


RECIPES = {
    "tiny": (Optim(steps=200, batch_size=8, lr=3e-3, warmup=0.05, precision="fp32"), _novels(), Run()),
    "desk": (Optim(steps=1000, batch_size=32, lr=1e-3, warmup=0.05), _python(), Run()),
    "400m": (_paper_recipe(15e9), _fineweb_edu(), Run(micro_batches=8, remat="full")),
    "400m-matched": (_paper_recipe(15e9), _fineweb_edu(), Run(micro_batches=8, remat="full")),
    "1.3b": (_paper_recipe(100e9), _fineweb_edu(), Run(micro_batches=16, remat="full")),
}


def _experiment(name: str, scale: str) -> Experiment:
    optim, data, run = RECIPES[scale]
    return Experiment(id=f"table3/{name}/{scale}", model=model_config(name, scale), optim=optim, data=data, run=run)


EXPERIMENTS = tuple(_experiment(name, scale) for name in MODELS for scale in scales_of(name))
