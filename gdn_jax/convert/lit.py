"""The state dict of the authors' release (lit-gpt keys): Gated DeltaNet, attention, and both in one model."""

from gdn_jax.convert.tables import CONV, LINEAR, QKV, SAME, Entry, Layout

GATED_DELTANET = (
    *(
        Entry(f"attn.{theirs}.weight", (f"mixer/{ours}/kernel",), LINEAR)
        for theirs, ours in (
            ("q_proj", "q_proj"),
            ("k_proj", "k_proj"),
            ("v_proj", "v_proj"),
            ("gk_proj", "a_proj"),
            ("b_proj", "b_proj"),
            ("g_proj", "g_proj"),
            ("o_proj", "o_proj"),
        )
    ),
    Entry("attn.b_proj.bias", ("mixer/b_proj/bias",), SAME),
    *(Entry(f"attn.{name}_conv1d.weight", (f"mixer/{name}_conv/weight",), CONV) for name in "qkv"),
    Entry("attn.A_log", ("mixer/A_log",), SAME, keeps_fp32=True),
    Entry("attn.dt_bias", ("mixer/dt_bias",), SAME, keeps_fp32=True),
    Entry("attn.g_norm_swish_gate.weight", ("mixer/o_norm/weight",), SAME),
)
ATTENTION = (
    Entry("attn.attn.weight", ("mixer/q_proj/kernel", "mixer/k_proj/kernel", "mixer/v_proj/kernel"), QKV),
    Entry("attn.proj.weight", ("mixer/o_proj/kernel",), LINEAR),
)
LAYOUT = Layout(
    name="lit-gpt",
    layer="transformer.h.{layer}.",
    frame=(
        Entry("transformer.wte.weight", ("embed",), SAME),
        Entry("transformer.ln_f.weight", ("norm/weight",), SAME),
        Entry("lm_head.weight", ("head/kernel",), LINEAR),
    ),
    block=(
        Entry("norm_1.weight", ("mixer_norm/weight",), SAME),
        Entry("norm_2.weight", ("mlp_norm/weight",), SAME),
        Entry("mlp.swiglu.w1.weight", ("mlp/gate_proj/kernel",), LINEAR),
        Entry("mlp.swiglu.w2.weight", ("mlp/up_proj/kernel",), LINEAR),
        Entry("mlp.swiglu.w3.weight", ("mlp/down_proj/kernel",), LINEAR),
    ),
    mixers={"gated_deltanet": GATED_DELTANET, "attention": ATTENTION, "swa": ATTENTION},
    unused=("attn.D",),
)
