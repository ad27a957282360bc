"""Tables S.1 and S.2: what each part of Gated DeltaNet and the order of H2 are worth, 15B tokens of FineWeb-Edu.

    gdn run ablations/no-short-conv/400m     15B tokens: 33 GPU-hours at 400 TFLOP/s, like every ID here

S.1 takes one part away from, or exchanges one part of, table3/gated-deltanet/400m (its first row); S.2 orders the three
mixers of table3/gated-deltanet-h2/400m (its last row) in the three other ways it lists. Expect, in the paper, the
largest losses from dropping the decay (naive-delta-rule), L1 normalisation and short convolutions, almost none from the
output norm or another feature map under L2; a key head dim of 256 helps a little, 64 hurts.
"""

from dataclasses import replace

from experiments.models import PAPER_MODELS, h2_model
from experiments.table3 import RECIPES
from gdn_jax.config import Experiment, GatedDeltaNetConfig, Model

BASE = PAPER_MODELS["gated-deltanet"]["400m"]


def _part(mixer: GatedDeltaNetConfig) -> Model:
    return replace(BASE, gated_deltanet=mixer)


PART = BASE.gated_deltanet
# Key dims of 256 do not divide the key width 1152: four heads make it 1024.
S1 = {
    "naive-delta-rule": _part(replace(PART, decay=False)),
    "no-short-conv": _part(replace(PART, conv_width=0)),
    "no-output-gate": _part(replace(PART, output_gate=False)),
    "no-output-norm": _part(replace(PART, output_norm=False)),
    "l1-relu": _part(replace(PART, qk_norm="l1", feature_map="relu")),
    "l1-elu1": _part(replace(PART, qk_norm="l1", feature_map="elu1")),
    "l1-silu": _part(replace(PART, qk_norm="l1")),
    "l2-relu": _part(replace(PART, feature_map="relu")),
    "l2-elu1": _part(replace(PART, feature_map="elu1")),
    "head-dim-64": _part(replace(PART, heads=18, key_dim=64, value_dim=128)),
    "head-dim-256": _part(replace(PART, heads=4, key_dim=256, value_dim=512)),
}
S2 = {
    "gdn-swa-mamba2": h2_model(4, 1536, 6144, 12, order=("gated_deltanet", "swa", "mamba2")),
    "gdn-mamba2-swa": h2_model(4, 1536, 6144, 12, order=("gated_deltanet", "mamba2", "swa")),
    "mamba2-swa-gdn": h2_model(4, 1536, 6144, 12, order=("mamba2", "swa", "gated_deltanet")),
}


def _experiment(name: str, model: Model) -> Experiment:
    optim, data, run = RECIPES["400m"]
    return Experiment(id=f"ablations/{name}/400m", model=model, optim=optim, data=data, run=run)


EXPERIMENTS = tuple(_experiment(name, model) for name, model in (S1 | S2).items())
