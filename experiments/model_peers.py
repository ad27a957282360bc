"""Other libraries' models beside ours, for the option --peers of `gdn bench figure3` and `gdn bench generate`: those of
ours that a library can build, at our sizes or the nearest that it has kernels for, which `words` name.

jla    jax-linear-attention (Python 3.12, jax 0.11.2): its own models, loss, AdamW, training step and generation. Of
       the ten it has the transformer, DeltaNet, Gated DeltaNet, Mamba2 and Mamba.
fla    flash-linear-attention (0.6, on torch): its own models at exactly our sizes, as `gdn convert export` describes
       them, its fused loss and torch's fused AdamW on fp32 copies of bf16 parameters; training steps alone. Of the ten,
       RetNet, HGRN2, DeltaNet and Gated DeltaNet; its other models want packages that PyPI has no build of.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gdn_jax.config import Experiment, Model
from gdn_jax.errors import UserError, nearest
from pallas_kernels.peers import FLA, JLA, Library

JLA_KEYS = (64, 128, 256)  # of the heads that its delta rule's kernels take; below, its plain form runs


class Step(NamedTuple):
    """A training step that a clock can call."""

    words: str  # where the sizes differ from ours; "" where they do not
    parameters: int
    state: Any  # parameters, optimizer state and what else a step hands on
    batch: Callable[[np.ndarray], Any]  # of tokens [B,1+T]
    compile: Callable[[Any, Any], Callable]  # (state, batch) -> a function of such: (state, batch) -> (state, loss)
    memory: Callable[[], tuple[int | None, int | None]]  # bytes: the most that was in use, and what there is; or None


class Peer(NamedTuple):
    """A library, and how it is asked.

    build     (experiment, one of `remat`) -> Step
    generate  experiment -> (a function of prompts and how many tokens to write after each, which waits; words), or
              None where its generation is not timed
    """

    library: Library
    models: tuple[str, ...]  # of the ten, that it has
    remat: tuple[str, ...]  # what it can keep of a layer for the backward, most first
    build: Callable[[Experiment, str], Step]
    generate: Callable[[Experiment], tuple[Callable[[list[list[int]], int], Any], str]] | None


def version(peer: str) -> str:
    """ "jla 0.1.0"; UserError where it is not installed."""
    library = PEERS[peer].library
    if importlib.util.find_spec(library.module) is None:
        raise UserError(f"peers names {peer!r}, which is not installed; pip install {library.distributions[0]}.")
    return f"{peer} {importlib.metadata.version(library.distributions[0])}"


def environment(peer: str) -> dict[str, str]:
    """What must be set where it runs: jax, which describes the machine, leaves the device's memory to torch."""
    library = PEERS[peer].library
    return library.environment | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if library.framework == "torch" else {})


def check(peer: str, id: str) -> None:
    """UserError where `peer` is unknown, not installed, or lacks the model of an ID."""
    if peer not in PEERS:
        raise UserError(f"peers names {peer!r}{nearest(peer, PEERS)}; it must be {' or '.join(PEERS)}.")
    version(peer)
    if PEERS[peer].generate is None:
        can = " or ".join(name for name, one in PEERS.items() if one.generate)
        raise UserError(f"{peer}'s generation is not timed; peers must be {can}.")
    model = id.split("/")[1] if "/" in id else id
    if model not in PEERS[peer].models:
        raise UserError(f"{peer} has no model {model}; it has {', '.join(PEERS[peer].models)}.")


def _jla_model(experiment: Experiment) -> tuple[Any, str]:
    """(jla's ModelConfig, where it differs from ours) for one of JLA_MODELS."""
    from jla.models.config import AttentionConfig, LinearAttentionConfig, ModelConfig, SSMConfig

    ours = experiment.model
    (kind,) = set(ours.pattern)
    layers = len(ours.pattern) * ours.repeats
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=64)  # of no layer where the model has none
    parts: dict[str, Any] = {}
    words, names = "", {"attention": "attention", "deltanet": "deltanet", "gated_deltanet": "gated_deltanet"}
    if kind == "attention":
        sizes = ours.attention
        attention = AttentionConfig(
            num_heads=sizes.heads, num_kv_heads=sizes.heads, head_dim=sizes.head_dim, rope_theta=sizes.rope_base
        )
    elif kind in ("deltanet", "gated_deltanet"):
        sizes = getattr(ours, kind)
        heads, key, value = sizes.heads, sizes.key_dim, sizes.value_dim
        if key >= JLA_KEYS[0] and key not in JLA_KEYS:
            key = JLA_KEYS[-1]
            heads, value = max(1, round(heads * sizes.key_dim / key)), 2 * key
            words = f"{heads} heads of {key} x {value} for {sizes.heads} of {sizes.key_dim} x {sizes.value_dim}"
        parts["linear_attention"] = LinearAttentionConfig(
            num_k_heads=heads, num_v_heads=heads, head_k_dim=key, head_v_dim=value,
            output_gate=kind == "gated_deltanet",
        )  # fmt: skip
    elif kind in ("mamba2", "mamba"):
        sizes, names = getattr(ours, kind), {"mamba2": "mamba2", "mamba": "mamba1"}
        inner = sizes.inner if kind == "mamba" else sizes.heads * sizes.head_dim
        ssm = {"d_state": sizes.state, "expand": inner // ours.d_model}
        if kind == "mamba2":
            ssm |= {"head_dim": sizes.head_dim, "n_groups": sizes.groups}
        parts["ssm"] = SSMConfig(**ssm)
    config = ModelConfig(
        vocab_size=ours.vocab, d_model=ours.d_model, n_layers=layers, d_ff=ours.d_ff or 1, attention=attention,
        layer_types=(names[kind],) * layers, mlp_types=("dense" if ours.d_ff else "none",) * layers,
        tie_embeddings=ours.tied, norm_eps=ours.norm_eps,
        compute_dtype="bfloat16" if experiment.optim.precision == "bf16" else "float32", **parts,
    )  # fmt: skip
    return config, words


def _jla_step(experiment: Experiment, remat: str) -> Step:
    import equinox as eqx
    import jax
    from jla.models.lm import build_model
    from jla.training.optimizers import create_optimizer
    from jla.training.step import LossConfig, build_train_step, lm_loss

    config, words = _jla_model(experiment)
    recipe = experiment.optim
    model = build_model(replace(config, remat=remat), key=jax.random.key(experiment.run.seed))
    optimizer = create_optimizer(
        lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(recipe.b1, recipe.b2), eps=recipe.eps,
        max_grad_norm=recipe.clip,
    )  # fmt: skip
    params = eqx.filter(model, eqx.is_inexact_array)
    opt_state = jax.jit(optimizer.init)(params)
    # "auto": its kernels where they run, and the gradient of the logits in the forward
    loss = LossConfig(impl="auto", grad_in_forward=jax.default_backend() == "gpu", compute_dtype=config.compute_dtype)
    step = build_train_step(optimizer, lm_loss(loss))

    def batch(tokens: np.ndarray) -> dict[str, jax.Array]:
        rows = jax.numpy.asarray(tokens[None])
        return {"input_ids": rows[..., :-1], "labels": rows[..., 1:]}

    state = model, opt_state, jax.random.key(0)

    def compile(state: Any, batch: Any) -> Callable:
        model, opt_state, key = state
        step.use_compiled(step.lower(model, opt_state, batch, key).compile())

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            model, opt_state, metrics, key = step(*state[:2], batch, state[2])
            return (model, opt_state, key), metrics["loss"]

        return run

    def memory() -> tuple[int | None, int | None]:
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use"), stats.get("bytes_limit")

    return Step(words, sum(leaf.size for leaf in jax.tree.leaves(params)), state, batch, compile, memory)


def _jla_generation(experiment: Experiment) -> tuple[Callable, str]:
    import jax
    from jla.inference.generate import generate
    from jla.models.lm import build_model

    config, words = _jla_model(experiment)
    model = build_model(replace(config, param_dtype=config.compute_dtype), key=jax.random.key(0))

    def write(prompts: list[list[int]], count: int) -> Any:
        return generate(model, prompts, max_new_tokens=count, bucket=1).tokens

    return write, words


def _fla_config(ours: Model) -> tuple[dict[str, Any], str]:
    """(config.json of fla's model, where it differs from ours)."""
    from gdn_jax.convert.fla import write_config

    words = ""
    if "gated_deltanet" in ours.pattern and ours.gated_deltanet.beta_bias:
        ours, words = replace(ours, gated_deltanet=replace(ours.gated_deltanet, beta_bias=False)), "beta without a bias"
    tree = write_config(ours, dtype="bfloat16", eos=0)[1]
    return tree | {"fuse_linear_cross_entropy": True, "fuse_cross_entropy": False, "use_cache": False}, words


def _fla_step(experiment: Experiment, remat: str) -> Step:
    import fla.models  # noqa: F401  transformers then knows its models
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, device = experiment.optim, "cuda" if torch.cuda.is_available() else "cpu"
    tree, words = _fla_config(experiment.model)
    torch.manual_seed(experiment.run.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))
    model.train()
    if remat == "full":
        model.gradient_checkpointing_enable()
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        masters, lr=recipe.lr, betas=(recipe.b1, recipe.b2), eps=recipe.eps, weight_decay=recipe.weight_decay,
        fused=True,
    )  # fmt: skip

    def run(state: None, batch: Any) -> tuple[None, float]:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        return None, loss.item()

    def compile(state: None, batch: Any) -> Callable:
        run(state, batch)  # its kernels are compiled and tuned when they first run
        return run

    def batch(tokens: np.ndarray) -> Any:
        return torch.from_numpy(tokens[:, :-1]).long().to(device)

    def memory() -> tuple[int | None, int | None]:
        return (torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]) if device == "cuda" else (None, None)

    return Step(words, sum(master.numel() for master in masters), None, batch, compile, memory)


JLA_MODELS = ("transformer", "deltanet", "gated-deltanet", "mamba2", "mamba")
FLA_MODELS = ("retnet", "hgrn2", "deltanet", "gated-deltanet")
PEERS = {
    "jla": Peer(JLA, JLA_MODELS, ("dots_kernels", "dots", "full"), _jla_step, _jla_generation),
    "fla": Peer(FLA, FLA_MODELS, ("none", "full"), _fla_step, None),
}
