"""Gated Delta Networks in JAX. The names below load on first use, so that `import gdn_jax` costs nothing."""

import importlib
from typing import Any

_HOME = {
    "Experiment": "gdn_jax.config",
    "Model": "gdn_jax.config",
    "Optim": "gdn_jax.config",
    "Data": "gdn_jax.config",
    "Run": "gdn_jax.config",
    "UserError": "gdn_jax.errors",
    "add_mixer": "gdn_jax.own_mixer",
    "LM": "gdn_jax.model",
    "init_model": "gdn_jax.model",
    "count_parameters": "gdn_jax.model",
    "reorder_cache": "gdn_jax.model",
    "Compute": "gdn_jax.layers",
    "next_token_loss": "gdn_jax.loss",
    "open_prepared": "gdn_jax.data",
    "open_run": "gdn_jax.runs",
    "load_fla": "gdn_jax.convert.exchange",
    "perplexity": "gdn_jax.evaluate.perplexity",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gdn_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
