"""Imported models against flash-linear-attention's own code: logits it computed, kept with the script that made them.

tests/checkpoints/make.py says how; only numpy is needed here.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gdn_jax import checkpoint
from gdn_jax.config import Data
from gdn_jax.convert.exchange import import_checkpoint
from gdn_jax.layers import Compute

KEPT = sorted((Path(__file__).parent / "checkpoints").glob("fla_*.npz"))


def checkpoint_directory(path, directory):
    """The kept arrays as the Hugging Face directory they came from, and the arrays."""
    arrays = dict(np.load(path))
    directory.mkdir()
    (directory / "config.json").write_text(str(arrays["config"]))
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    save_file(state, directory / "model.safetensors")
    return arrays


def test_every_kept_file_says_what_made_it():
    assert len(KEPT) == 10
    for path in KEPT:
        made = json.loads(str(np.load(path)["made"]))
        assert made["fla"] and made["torch"] and made["date"] > "2026"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_logits_are_those_of_fla(path, tmp_path, monkeypatch):
    """As measured: at most 1e-5, of logits of order 1 (the transformer's: 6)."""
    arrays = checkpoint_directory(path, tmp_path / "fla")
    # 64 tokens are no tokenizer's vocabulary; logits need none
    monkeypatch.setattr("gdn_jax.convert.exchange._tokenizer", lambda *_: "byte")
    import_checkpoint(tmp_path / "fla", tmp_path / "run", data=Data(tokenizer="byte", seq_len=32))
    experiment, model, step = checkpoint.load(tmp_path / "run")
    assert experiment.optim.precision == "fp32" and step == 0
    assert 0.5 < arrays["logits"].std() < 10
    run = jax.jit(lambda model, tokens, compute: model(tokens, compute=compute)[0], static_argnums=2)
    for impl in ("reference", "chunked"):
        hidden = run(model, jnp.asarray(arrays["tokens"]), Compute(dtype=jnp.float32, impl=impl))
        difference = np.abs(model.logits(hidden) - arrays["logits"]).max()
        print(f"{path.stem}, {impl}: largest difference {difference:.1e}")
        assert difference < 2e-5
