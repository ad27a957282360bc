"""Small models of flash-linear-attention, run by its own code: what test_parity.py imports and compares with.

    python -m venv /tmp/fla && /tmp/fla/bin/pip install torch==2.13.0
    /tmp/fla/bin/pip install flash-linear-attention==0.6.0 transformers==5.24.0 triton==3.9.0
    TRITON_INTERPRET=1 /tmp/fla/bin/python tests/parity/make_fla_models.py [NAME ...]

writes tests/parity/fla_<name>.npz. Triton's interpreter runs FLA's kernels on a CPU. Two things stand in for what
needs a GPU: the timing of configurations (all are said to take no time, so the first is taken), and flash-attn's
function, in whose place torch's attention runs in float32. The transformer's logits are compared with transformers'
Llama as well.
Mamba2 has one group: with more, FLA's torch path for whole sequences deals them to the heads in another order than its
own path for one token and than the CUDA kernels.
"""

import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch
import triton.runtime.autotuner

triton.runtime.autotuner.Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]

import fla.layers.attn  # noqa: E402  the kernels take the autotuner as it is when they are imported
import transformers  # noqa: E402
from fla import models  # noqa: E402

TOKENS = (2, 60)  # up to 64 in a row FLA takes its recurrent kernels; the chunkwise ones do not run in the interpreter


def attention(q, k, v, causal, window_size):
    """flash-attn's function: [B, T, H, K], query t sees keys t - window_size[0] to t."""
    assert causal
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


fla.layers.attn.flash_attn_func = attention

COMMON = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "fuse_cross_entropy": False}
FREE = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
DELTA = {"num_heads": 2, "head_dim": 16, "expand_v": 2.0}
SOFTMAX = {"layers": [1], "num_heads": 2, "window_size": 20}
MODELS = {
    "gated_deltanet": models.GatedDeltaNetConfig(**COMMON, **DELTA, num_hidden_layers=2),
    "gated_deltanet_values": models.GatedDeltaNetConfig(
        **COMMON, **DELTA, num_v_heads=4, allow_neg_eigval=True, use_gate=False, num_hidden_layers=1
    ),
    "gated_deltanet_hybrid": models.GatedDeltaNetConfig(**COMMON, **DELTA, num_hidden_layers=2, attn=SOFTMAX),
    "delta_net": models.DeltaNetConfig(**COMMON, num_heads=2, expand_v=2.0, num_hidden_layers=2),
    "retnet": models.RetNetConfig(**COMMON, num_heads=2, num_hidden_layers=2),
    "hgrn2": models.HGRN2Config(**COMMON, expand_ratio=16, num_hidden_layers=3),
    "mamba": models.MambaConfig(**FREE, state_size=8, num_hidden_layers=2),
    "mamba2": models.Mamba2Config(**FREE, state_size=16, head_dim=16, num_hidden_layers=2),
    "samba": models.SambaConfig(**FREE, state_size=8, num_hidden_layers=2, attn=SOFTMAX),
    "transformer": models.TransformerConfig(**COMMON, num_heads=2, num_hidden_layers=2, tie_word_embeddings=True),
}


def draw(model):
    """Parameters at which every part of the model matters: logits of order 1, norms that are not 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            fan_in = 1 if "embeddings" in name else parameter[0].numel()
            parameter.data = noise * fan_in**-0.5
        elif "norm" in name or name.endswith(".D"):
            parameter.data = 1 + 0.2 * noise
        else:  # gates: as FLA starts them, but not all alike
            parameter.data = parameter.data.float() + 0.2 * noise


def llama_logits(config, state, tokens):
    """The same parameters in transformers' Llama."""
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, vocab_size=config.vocab_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_heads,
            rms_norm_eps=config.norm_eps, tie_word_embeddings=True, attn_implementation="eager",
        )
    )  # fmt: skip
    names = {"embeddings": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attn": "self_attn"}
    renamed = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state.items()}
    other.load_state_dict(renamed, strict=True)
    return other.eval()(tokens).logits


@torch.no_grad()
def main(names):
    for name in names or MODELS:
        config = MODELS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        draw(model)
        tokens = torch.randint(0, config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(1))
        logits = model(tokens).logits
        state = model.state_dict()
        if name == "transformer":
            gap = (logits - llama_logits(config, state, tokens)).abs().max().item()
            assert gap < 1e-4, gap
            print(f"{name}: largest difference to transformers' Llama {gap:.1e}")
        made = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        made |= {"fla": "0.6.0", "transformers": transformers.__version__, "triton": triton.__version__}
        arrays = {f"state/{key}": value.numpy() for key, value in state.items()}
        path = Path(__file__).parent / f"fla_{name}.npz"
        np.savez_compressed(
            path, config=config.to_json_string(use_diff=True), made=json.dumps(made),
            tokens=tokens.numpy().astype(np.int32), logits=logits.numpy(), **arrays,
        )  # fmt: skip
        print(f"{path.name}: {path.stat().st_size:,} bytes, logits of size {logits.std():.2f}")


main(sys.argv[1:])
