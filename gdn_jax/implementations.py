"""Which implementation each op of an experiment takes on this machine, found by tracing the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn_jax.config import Experiment
from gdn_jax.errors import UserError
from gdn_jax.layers import compute_for
from gdn_jax.loss import next_token_loss
from gdn_jax.model import abstract_model
from gdn_jax.progress import Progress
from pallas_kernels import admission, placement
from pallas_kernels.dispatch import CannotRun, record


def implementations(experiment: Experiment) -> dict[str, dict[str, str]]:
    """What `traced` finds for the gradient of one slice of a batch on one device; nothing is computed.

    Raises UserError where run.impl cannot run here.
    """
    return traced(experiment.run.impl, lambda: _trace(experiment), silent=True)


def _trace(experiment: Experiment) -> None:
    compute, optim = compute_for(experiment), experiment.optim  # one repeat of the layers has all ops
    rows = max(1, optim.batch_size // experiment.run.micro_batches // jax.device_count())
    batch = {"tokens": jax.ShapeDtypeStruct((rows, experiment.data.seq_len + 1), jnp.int32)}
    if experiment.data.reset_at_documents:
        batch["segment_ids"] = batch["tokens"]

    loss = jax.grad(lambda model, batch: next_token_loss(model, batch, compute))
    jax.eval_shape(loss, abstract_model(experiment.model), batch)


def _trace_token(experiment: Experiment) -> None:
    compute = compute_for(experiment)

    def write(model):
        cache = model.init_cache(1, 1, compute)
        return model(jnp.zeros((1, 1), jnp.int32), compute=compute, cache=cache)

    jax.eval_shape(write, abstract_model(experiment.model))


def check_impl(experiment: Experiment) -> None:
    """Raises UserError where a named run.impl cannot run here; "auto" always can, once `admit` has looked."""
    if experiment.run.impl == "auto":
        admit(experiment)
    else:
        implementations(experiment)


def admit(experiment: Experiment, progress: Progress | None = None) -> None:
    """Checks in float64 the kernels that run.impl "auto" would take, for training and for one token, and that nothing
    has checked on this kind of GPU under this jax: once, a minute at most, a line for each on stderr or `progress`."""
    if experiment.run.impl != "auto" or not placement.on_gpu():
        return
    with record(silent=True) as choices:
        _trace(experiment)
        _trace_token(experiment)
    todo = dict.fromkeys(one.check for choice in choices for one in choice.refused if one.check is not None)
    for number, check in enumerate(todo, 1):
        say = (progress or Progress()).say
        say(f"[{number}/{len(todo)}] Checking {check.name} in float64, once for {' with jax '.join(admission.here())}.")
        if missed := admission.check(check).failures:
            say(f"{check.name} failed ({', '.join(missed)}); the slower implementation runs.")


def in_words(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """op -> its implementation, and why a faster one was refused."""
    return {op: facts["impl"] + f" ({facts['refused']})" * bool(facts["refused"]) for op, facts in found.items()}


def traced(impl: str, trace: Callable[[], Any], *, silent: bool = False) -> dict[str, dict[str, str]]:
    """op -> {"impl", "refused"} of the op calls that `trace` traces for the first time: what they take, and which
    faster implementation was refused why ("" where none was). Several of one op are joined by "; ".

    impl    run.impl: UserError where a named one cannot run here, or no op has it
    silent  nothing runs: a refused kernel is not said on stderr
    """
    try:
        with record(silent=silent) as choices:
            trace()
    except CannotRun as error:
        (refusal,) = error.refused
        sentence = f"run.impl is {impl!r}, which cannot run {refusal.op} here ({refusal.reason}); use 'auto'."
        raise UserError(sentence) from None
    if impl != "auto" and choices and not any(choice.impl == impl for choice in choices):
        ops = ", ".join(dict.fromkeys(choice.op for choice in choices))
        raise UserError(f"run.impl is {impl!r}, which none of this model's ops has ({ops}); use 'auto'.")
    found: dict[str, dict[str, dict[str, None]]] = {}
    for choice in choices:
        op = found.setdefault(choice.op, {"impl": {}, "refused": {}})
        op["impl"][choice.impl] = None
        op["refused"] |= dict.fromkeys(map(str, choice.refused))
    return {op: {key: "; ".join(values) for key, values in facts.items()} for op, facts in found.items()}
