"""Runs flash-linear-attention's own small models in torch on a CPU, and keeps what they computed in .npz files.

    pip install -e '.[parity]' triton && python tests/parity/make_fla_models.py tests/parity

fla_<model>.npz   RetNet, HGRN2, DeltaNet and Gated DeltaNet language models, two layers of width 32 with random
                  parameters, as make_arrays.py has them

Its norms, convolutions and gates run in Triton's interpreter; its chunk kernels do not (they need a GPU), so each layer
gets the library's naive reference of the same recurrence instead. Triton must be absent for make_arrays.py and present
here: use two environments.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
import torch.nn.functional as F
import triton.runtime.autotuner as autotuner
from make_arrays import VOCAB, language_model, naive


def first_configuration(self, key, configs, bench):
    """The autotuner asks a driver for a clock, and there is none: take the configurations as they come."""
    bench()
    return False


autotuner.Autotuner._bench = lambda self, *args, config=None, **options: [1.0, 1.0, 1.0]
autotuner.Autotuner.check_disk_cache = first_configuration

import fla.layers.delta_net  # noqa: E402
import fla.layers.gated_deltanet  # noqa: E402
import fla.layers.hgrn2  # noqa: E402
import fla.layers.multiscale_retention  # noqa: E402
from fla import models  # noqa: E402


def unit(x):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def heads_first(*arrays):
    return (x.transpose(1, 2) for x in arrays)


def retention(q, k, v, **options):
    return naive("retention", "naive_retention")(*heads_first(q, k, v)).transpose(1, 2), None


def gla(q, k, v, g, **options):
    return naive("gla", "naive_recurrent_gla")(q, k, v, g)


def delta_rule(q, k, v, beta, **options):
    o, _ = naive("delta_rule", "delta_rule_recurrence")(*heads_first(unit(q), unit(k), v, beta))
    return o.transpose(1, 2), None


def gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, **options):
    g = -A_log.float().exp() * F.softplus(g.float() + dt_bias)
    rule = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    return rule(unit(q), unit(k), v, beta.float().sigmoid(), g)


fla.layers.multiscale_retention.chunk_retention = retention
fla.layers.hgrn2.chunk_gla = gla
fla.layers.delta_net.chunk_delta_rule = delta_rule
fla.layers.gated_deltanet.chunk_gated_delta_rule = gated_delta_rule

COMMON = dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, intermediate_size=48, use_cache=False)
KEYS = {"mixer_norm/weight": "attn_norm.weight", "mlp_norm/weight": "mlp_norm.weight"}
KEYS |= {f"mlp/{part}_proj/kernel": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def arrays(model, kernels, rest, lower_bounds=False):
    """One model's parameters under our names, its tokens and logits; `rest` maps our names to theirs."""
    keys = KEYS | {f"mixer/{part}_proj/kernel": f"attn.{part}_proj.weight" for part in kernels}
    keys |= {f"mixer/{ours}": f"attn.{theirs}" for ours, theirs in rest.items()}
    layer = {ours: f"model.layers.{{}}.{theirs}" for ours, theirs in keys.items()}
    whole = {"lower_bounds": "model.lower_bounds"} if lower_bounds else {}
    return language_model(model.float().eval(), layer, "model.embeddings.weight", "model.norm.weight", whole)


def retnet():
    model = models.RetNetForCausalLM(models.RetNetConfig(num_heads=2, **COMMON))
    return arrays(model, "qkvgo", {"o_norm/weight": "g_norm_swish_gate.weight"})


def hgrn2():
    model = models.HGRN2ForCausalLM(models.HGRN2Config(num_heads=2, expand_ratio=16, use_lower_bound=True, **COMMON))
    return arrays(model, "qfio", {"o_norm/weight": "g_norm.weight"}, lower_bounds=True)


CONVOLUTIONS = {f"{part}_conv/weight": f"{part}_conv1d.weight" for part in "qkv"}


def deltanet():
    model = models.DeltaNetForCausalLM(models.DeltaNetConfig(num_heads=2, **COMMON))
    return arrays(model, "qkvbo", CONVOLUTIONS | {"o_norm/weight": "o_norm.weight"})


def gated_deltanet():
    model = models.GatedDeltaNetForCausalLM(models.GatedDeltaNetConfig(num_heads=2, head_dim=16, **COMMON))
    rest = {"o_norm/weight": "o_norm.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    return arrays(model, "qkvgabo", CONVOLUTIONS | rest)


FILES = {
    "fla_retnet": retnet,
    "fla_hgrn2": hgrn2,
    "fla_deltanet": deltanet,
    "fla_gated_deltanet": gated_deltanet,
}

if __name__ == "__main__":
    for name, make in FILES.items():
        np.savez_compressed(Path(sys.argv[1]) / f"{name}.npz", **make())
        print(name, flush=True)
