"""How much memory generation needs, and, where a request does not fit, what would."""

from collections.abc import Sequence
from pathlib import Path

import jax

from gdn_jax.config import Model
from gdn_jax.decode import layers_of
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.mixers.attention import KVCache
from gdn_jax.model import abstract_model, for_inference
from gdn_jax.prefill import ROOM_STEP, bucket, cache_room, rows_at_once
from gdn_jax.tree import named_leaves


def free_bytes() -> int | None:
    """Free memory of the default device; for a CPU, what Linux calls available; None where it is not known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    machine = Path("/proc/meminfo")
    if device.platform != "cpu" or not machine.exists():
        return None
    available = [line.split()[1] for line in machine.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 if available else None


def cache_bytes(cfg: Model, batch_size: int, room: int, compute: Compute) -> int:
    """Bytes of the caches of `batch_size` sequences."""
    return _bytes(jax.eval_shape(lambda lm: lm.init_cache(batch_size, room, compute), abstract_model(cfg)))


def needed_bytes(cfg: Model, lengths: Sequence[int], *, max_tokens: int, batch_size: int, compute: Compute) -> int:
    """About how many bytes continuing prompts of these lengths takes, beside the parameters.

    The sum of: the copy of the layers' parameters that `decode` reads; caches and logits of the rows, and of the
    largest group of prompts that waits for rows; the largest temporary arrays, which are the fp32 outputs of one
    block's matrix products while a piece of a prompt is read.
    """
    widths = {bucket(length) for length in lengths}
    waiting = max(rows_at_once(width, batch_size) for width in widths)
    read = max(rows_at_once(width, batch_size) * width for width in widths)
    outputs: dict[str, int] = {}
    for name, leaf in named_leaves(abstract_model(cfg).groups).items():
        if name.endswith("/kernel"):
            block = name.split("/")[1]
            outputs[block] = outputs.get(block, 0) + leaf.shape[-1]
    rows = batch_size + waiting
    caches = cache_bytes(cfg, rows, cache_room(cfg, max(lengths) + max_tokens), compute)
    model = jax.eval_shape(lambda lm: for_inference(lm, compute.dtype), abstract_model(cfg))
    return _bytes(jax.eval_shape(layers_of, model)) + caches + 4 * (rows * cfg.vocab + read * max(outputs.values()))


def step_bytes(cfg: Model, batch_size: int, tokens: int, compute: Compute) -> int:
    """The fewest bytes that writing one token of each sequence, `tokens` long by now, has to move.

    Every parameter is read once, in inference's dtype (of an untied embedding only the rows that are looked up); every
    recurrent state and convolution history is read and written once; every visible key and value is read once.
    """
    model = jax.eval_shape(lambda lm: for_inference(lm, compute.dtype), abstract_model(cfg))
    moved = _bytes(model)
    if not cfg.tied:
        moved -= (cfg.vocab - batch_size) * cfg.d_model * model.embed.dtype.itemsize
    for cache in jax.eval_shape(lambda lm: lm.init_cache(batch_size, tokens, compute), model):
        moved += _bytes((cache.keys, cache.values)) if isinstance(cache, KVCache) else 2 * _bytes(cache)
    return moved


def check_fits(
    cfg: Model, lengths: Sequence[int], *, max_tokens: int, batch_size: int, compute: Compute, free: int | None
) -> None:
    """Raises UserError, saying what would fit, where the request needs more than `free` bytes; None: no check."""

    def fits(batch_size: int, lengths: Sequence[int] = lengths, max_tokens: int = max_tokens) -> bool:
        return free >= needed_bytes(cfg, lengths, max_tokens=max_tokens, batch_size=batch_size, compute=compute)

    if free is None or fits(batch_size):
        return
    fewer = _largest(fits, batch_size)
    if fewer:
        advice = f"a batch_size of {fewer} would fit"
    else:
        longest = max(lengths) + max_tokens
        steps = _largest(lambda steps: fits(1, [steps * ROOM_STEP], 0), -(-longest // ROOM_STEP))
        advice = "not even one would fit; take a smaller model or a larger device"
        if steps:
            advice = f"one sequence of at most {steps * ROOM_STEP:,} tokens, prompt and text together, would fit"
    needed = needed_bytes(cfg, lengths, max_tokens=max_tokens, batch_size=batch_size, compute=compute)
    raise UserError(
        f"{batch_size} sequences at once, the longest of {max(lengths) + max_tokens:,} tokens, need about "
        f"{needed / 1e9:,.1f} GB of memory beside the model, and the device has {free / 1e9:,.1f} GB free; {advice}."
    )


def _largest(fits, limit: int) -> int:
    """The largest n below `limit` with fits(n), which holds for all smaller ones too; 0: none."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
