"""Held-out perplexity: per token, and per byte and word, which compare models with different tokenizers."""

import functools
import itertools
import json
import math

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from gdn_jax import distributed, sharding
from gdn_jax.data import Prepared, check_held_out
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.model import LM
from gdn_jax.progress import SILENT, Progress
from gdn_jax.sharding import split_tokens
from gdn_jax.tokenizer import Tokenizer
from pallas_kernels.linear_cross_entropy import token_nll


def perplexity(
    model: LM,
    prepared: Prepared,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    stride: int | None = None,
    windows: int | None = None,
    batch_size: int,
    compute: Compute,
    with_segments: bool,
    context: int = 1,
    progress: Progress | None = None,
) -> dict[str, float | int | str | None]:
    """Cross entropy of the held-out tokens given at most seq_len tokens before each, in several units.

        token_nll = -1/N sum_i log p(x_i | x_{i-c_i} ... x_{i-1})         nats; N scored tokens
        nats_per_byte = N token_nll / bytes      word_perplexity = exp(N token_nll / words)

    seq_len     inputs of a window; window w reads tokens [w stride, w stride + seq_len]
    stride      1..seq_len. None or seq_len: windows side by side, contexts c of 1..seq_len; smaller: of each
                window but the first only the last `stride` targets are scored, c > seq_len - stride
    windows     how many, from the start of the split; None: all whole ones. The tail after them is not scored
    with_segments   documents packed in a window do not see each other
    context     local devices that share the tokens of each window; must divide seq_len
    progress    where the work shows itself; None: on stderr

    Several processes must all call it with the same arguments: batch_size windows after the other are read by one
    process after the other, and each returns the numbers of all windows, which are those of one process.

    Returns token_nll, token_perplexity, nats_per_byte, bits_per_byte, byte_perplexity, word_perplexity, tokens, bytes,
    words, a unigram model's unigram_nats_per_token and unigram_nats_per_byte on the same tokens, and what was measured:
    data (fingerprint), window, stride, windows of of_windows. bytes and words are those of the scored tokens' text: EOS
    is a token and no text, words lie between white space and never span documents. word_perplexity is None where it
    exceeds a float.
    Raises UserError for a stride or a number of windows out of range, too little text, too few devices, or a loss not
    finite.
    """
    check_scoring(seq_len, stride, windows)
    mesh = sharding.shared_rows(context, seq_len)
    if prepared.vocab > model.config.vocab:
        raise UserError(
            f"{prepared.directory} holds ids of {prepared.vocab} tokens but the model's vocabulary is "
            f"{model.config.vocab}; prepare the text with the tokenizer that it was trained with."
        )
    stride = seq_len if stride is None else stride
    held_out = prepared.tokens("validation")
    whole = (len(held_out) - 1 - seq_len) // stride + 1
    check_held_out(prepared, seq_len)
    count = whole if windows is None else min(windows, whole)
    ends = prepared.document_ends("validation") if with_segments else None

    model = sharding.copied(mesh, model)

    def own_nats() -> list[float]:
        """Of each window that this process reads."""
        own, every = [], batch_size * jax.process_count()
        with progress or (Progress() if distributed.first() else SILENT) as display, jax.set_mesh(mesh):
            for first in range(batch_size * jax.process_index(), count, every):
                batch = range(first, min(first + batch_size, count))
                # Rows that fill up the last batch repeat its first window, so that one program serves all batches.
                starts = np.array([*batch, *[first] * (batch_size - len(batch))]) * stride
                positions = starts[:, None] + np.arange(seq_len + 1)
                tokens = np.stack([held_out[start : start + seq_len + 1] for start in starts]).astype(np.int32)
                segments = None if ends is None else np.searchsorted(ends, positions, "right").astype(np.int32)
                nll = np.asarray(_nll(model, tokens, segments, compute), np.float64)
                for row, window in enumerate(batch):
                    own.append(float(nll[row, 0 if window == 0 else seq_len - stride :].sum()))
                    if not math.isfinite(own[-1]):
                        raise UserError(
                            f"The loss of held-out window {window} is {own[-1]}: the parameters have diverged; "
                            f"train again with a smaller optim.lr."
                        )
                display.show(f"Evaluated {batch.stop:,} of {count:,} windows.")
        return own

    nats = distributed.gathered(json.dumps(distributed.on_every(own_nats)))
    total = math.fsum(window for own in nats for window in json.loads(own))  # exact, and so the same in any order
    scored = seq_len + (count - 1) * stride
    text_bytes, words = _text_size(prepared, tokenizer, 1, 1 + scored)
    if text_bytes == 0:
        raise UserError(f"The {scored} scored tokens of {prepared.directory} hold no text; use more windows.")
    per_byte, unigram = total / text_bytes, prepared.unigram_nats([range(1, 1 + scored)])
    return {
        "token_nll": total / scored,
        "token_perplexity": _exp(total / scored),
        "nats_per_byte": per_byte,
        "bits_per_byte": per_byte / math.log(2),
        "byte_perplexity": _exp(per_byte),
        "word_perplexity": _exp(total / words) if words else None,
        "tokens": scored,
        "bytes": text_bytes,
        "words": words,
        "unigram_nats_per_token": unigram,
        "unigram_nats_per_byte": unigram * scored / text_bytes,
        "data": prepared.fingerprint,
        "window": seq_len,
        "stride": stride,
        "windows": count,
        "of_windows": whole,
    }


def check_scoring(seq_len: int, stride: int | None, windows: int | None) -> None:
    """Raises UserError unless the stride and the number of windows are in range."""
    if stride is not None and not 1 <= stride <= seq_len:
        raise UserError(f"stride is {stride}; it must be between 1 and data.seq_len {seq_len}.")
    if windows is not None and windows < 1:
        raise UserError(f"windows is {windows}; it must be positive, or left out for all.")


@functools.partial(jax.jit, static_argnames="compute")
def _nll(
    model: LM, tokens: Int[Array, "B T+1"], segments: Int[Array, "B T+1"] | None, compute: Compute
) -> Float[Array, "B T"]:
    segments = None if segments is None else split_tokens(segments[:, :-1])
    hidden, _ = model(split_tokens(tokens[:, :-1]), compute=compute, segment_ids=segments)
    return token_nll(hidden, model.head_kernel(), split_tokens(tokens[:, 1:]))


def _text_size(prepared: Prepared, tokenizer: Tokenizer, start: int, stop: int) -> tuple[int, int]:
    """Bytes and words of held-out tokens [start, stop), document by document."""
    tokens, ends = prepared.tokens("validation"), prepared.document_ends("validation")
    inner = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
    borders = [start, *(int(end) for end in inner), stop]
    size = words = 0
    for first, last in itertools.pairwise(borders):
        text = tokenizer.decode_bytes(tokens[first:last].tolist())
        size += len(text)
        words += len(text.decode("utf-8", "replace").split())  # a cut may split a character
    return size, words


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None  # e^709 is the largest float
