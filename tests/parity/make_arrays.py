"""Runs implementations that are not ours, in torch on a CPU, and keeps what they computed in small .npz files.

    pip install -e '.[parity]' && python tests/parity/make_arrays.py tests/parity

naive_ops.npz                      flash-linear-attention's naive references: gated delta rule, delta rule, retention,
                                   simple GLA, GLA
transformers_<model>.npz           transformers' Mamba and Mamba2 (two groups) language models, two layers of width 32
transformers_qwen3_next_layer.npz  its Gated DeltaNet layer, two value heads for each key head

The last two hold random parameters under our names (kernels [in, out], convolutions [W, C], layers stacked), the input,
and the output. make_fla_models.py has flash-linear-attention's whole models, which need Triton; transformers takes
other code where Triton is, so it must be absent here.

test_parity.py compares ours with these files, without torch; with it (`pytest -m parity`) the files with a new run.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

D, LAYERS, VOCAB = 32, 2, 64


def naive(op, name):
    """A function of fla/ops/<op>/naive.py, loaded by its path: the package itself imports only beside Triton."""
    package = Path(importlib.util.find_spec("fla").origin).parent
    spec = importlib.util.spec_from_file_location(f"naive_{op}", package / "ops" / op / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def ops():
    """Inputs shared by all ops [B, T, H, ...] and, for each, o and the final state [B, H, K, V] where it gives one."""
    random = np.random.default_rng(0)
    B, T, H, K, V = 1, 70, 3, 16, 24
    arrays = {
        "q": random.standard_normal((B, T, H, K)),
        "k": random.standard_normal((B, T, H, K)),
        "v": random.standard_normal((B, T, H, V)),
        "g": -np.exp(random.uniform(-5, 1, (B, T, H))),
        "gk": -np.exp(random.uniform(-5, 1, (B, T, H, K))),
        "beta": random.uniform(size=(B, T, H)),
        "state": random.standard_normal((B, H, K, V)),
    }
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    q, k, v, g, gk, beta, state = (torch.from_numpy(x) for x in arrays.values())
    first = lambda *xs: (x.transpose(1, 2) for x in xs)  # noqa: E731  heads before tokens
    gated, gated_state = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(
        q, k, v, beta, g, initial_state=state, output_final_state=True
    )
    delta, delta_state = naive("delta_rule", "delta_rule_recurrence")(*first(q, k, v, beta), initial_state=state)
    retention = naive("retention", "naive_retention")(*first(q, k, v))
    simple, simple_state = naive("simple_gla", "naive_recurrent_simple_gla")(q, k, v, g, initial_state=state)
    channel, channel_state = naive("gla", "naive_recurrent_gla")(
        q, k, v, gk, initial_state=state, output_final_state=True
    )
    results = {
        "gated_delta_rule": gated, "gated_delta_rule_state": gated_state,
        "delta_rule": delta.transpose(1, 2), "delta_rule_state": delta_state,
        "retention": retention.transpose(1, 2),
        "simple_gla": simple, "simple_gla_state": simple_state,
        "gla": channel, "gla_state": channel_state,
    }  # fmt: skip
    return arrays | {name: x.numpy() for name, x in results.items()}


@torch.no_grad()
def randomise(module):
    """Parameters that leave nothing at 0 or 1: a term that is dropped or doubled must show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or name.endswith(".D"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            parameter.add_(0.3 * noise)
        elif parameter.ndim == 2:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(0.4 * noise)


def language_model(model, layer):
    """A model's parameters under our names, `layer` mapping theirs of one layer; tokens; logits."""
    randomise(model)
    weights = dict(model.named_parameters())
    around = {"embed": "backbone.embeddings.weight", "norm/weight": "backbone.norm_f.weight"}
    arrays = {ours: weights[theirs] for ours, theirs in around.items()}
    arrays["head/kernel"] = weights["lm_head.weight"].T
    for ours, theirs in layer.items():
        stacked = [weights[theirs.format(i)] for i in range(LAYERS)]
        if theirs.endswith("conv1d.weight"):
            stacked = [x[:, 0].T for x in stacked]
        elif ours.endswith("/kernel"):
            stacked = [x.T for x in stacked]
        arrays[f"groups/blocks/0/{ours}"] = torch.stack(stacked)
    used = {*around.values(), "lm_head.weight"} | {t.format(i) for t in layer.values() for i in range(LAYERS)}
    assert used == set(weights), used ^ set(weights)
    tokens = torch.randint(VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
    arrays = {name: x.detach().contiguous().numpy() for name, x in arrays.items()}
    return arrays | {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy()}


def mamba():
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=D, state_size=16, num_hidden_layers=LAYERS, time_step_rank=2,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    layer = {"mixer_norm/weight": "backbone.layers.{}.norm.weight"}
    for ours, theirs in {
        "in_proj/kernel": "in_proj.weight", "conv/weight": "conv1d.weight", "conv/bias": "conv1d.bias",
        "x_proj/kernel": "x_proj.weight", "dt_proj/kernel": "dt_proj.weight", "dt_proj/bias": "dt_proj.bias",
        "A_log": "A_log", "D": "D", "out_proj/kernel": "out_proj.weight",
    }.items():  # fmt: skip
        layer[f"mixer/{ours}"] = f"backbone.layers.{{}}.mixer.{theirs}"
    return language_model(transformers.MambaForCausalLM(config), layer)


def mamba2():
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=D, state_size=16, num_hidden_layers=LAYERS, head_dim=16, num_heads=4, n_groups=2,
        chunk_size=16, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    layer = {"mixer_norm/weight": "backbone.layers.{}.norm.weight"}
    for ours, theirs in {
        "in_proj/kernel": "in_proj.weight", "conv/weight": "conv1d.weight", "conv/bias": "conv1d.bias",
        "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm/weight": "norm.weight",
        "out_proj/kernel": "out_proj.weight",
    }.items():  # fmt: skip
        layer[f"mixer/{ours}"] = f"backbone.layers.{{}}.mixer.{theirs}"
    return language_model(transformers.Mamba2ForCausalLM(config), layer)


def qwen3_next_layer():
    """Qwen3-Next's layer: two key heads, four value heads; its fused projections hold q, k, v, gate by key head."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads, value_heads, K, V = 2, 4, 8, 12
    config = transformers.Qwen3NextConfig(
        hidden_size=D, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=heads,
        linear_num_value_heads=value_heads, linear_key_head_dim=K, linear_value_head_dim=V,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-6, hidden_act="silu",
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    randomise(layer)
    weights = {name: x.detach() for name, x in layer.named_parameters()}
    rows = weights["in_proj_qkvz.weight"].reshape(heads, -1, D)
    r = value_heads // heads
    q, k, v, gate = (x.reshape(-1, D) for x in torch.split(rows, [K, K, r * V, r * V], dim=1))
    b, a = (x.reshape(-1, D) for x in torch.split(weights["in_proj_ba.weight"].reshape(heads, -1, D), [r, r], dim=1))
    kernels = {"q": q, "k": k, "v": v, "g": gate, "b": b, "a": a, "o": weights["out_proj.weight"]}
    arrays = {f"{name}_proj/kernel": x.T for name, x in kernels.items()}
    filters = torch.split(weights["conv1d.weight"][:, 0].T, [heads * K, heads * K, value_heads * V], dim=1)
    arrays |= {f"{name}_conv/weight": x for name, x in zip("qkv", filters, strict=True)}
    arrays |= {"A_log": weights["A_log"], "dt_bias": weights["dt_bias"], "o_norm/weight": weights["norm.weight"]}
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = layer(x)
    return {name: x.contiguous().numpy() for name, x in (arrays | {"x": x, "y": y}).items()}


FILES = {
    "naive_ops": ops,
    "transformers_mamba": mamba,
    "transformers_mamba2": mamba2,
    "transformers_qwen3_next_layer": qwen3_next_layer,
}


def make(directory):
    """Write every file into `directory`."""
    for name, arrays in FILES.items():
        torch.manual_seed(0)  # gates keep the library's own random start as their middle
        np.savez_compressed(Path(directory) / f"{name}.npz", **arrays())


if __name__ == "__main__":
    make(sys.argv[1])
