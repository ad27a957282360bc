"""Which implementation the recurrent ops of an experiment take on this machine."""

from gdn_jax.config import DeltaNetConfig, Experiment, GatedDeltaNetConfig
from gdn_jax.errors import UserError
from gdn_jax.layers import compute_for
from pallas_kernels import gated_delta_rule, linear_attention, selective_scan


def _delta_rule(experiment: Experiment, mixer: GatedDeltaNetConfig | DeltaNetConfig):
    dtype = compute_for(experiment).dtype
    return gated_delta_rule.resolve(
        experiment.run.impl, key_dim=mixer.key_dim, value_dim=mixer.value_dim, chunk=experiment.run.chunk, dtype=dtype
    )


# mixer -> its op and how impl resolves
OPS = {
    "gated_deltanet": ("gated_delta_rule", lambda run: _delta_rule(run, run.model.gated_deltanet)),
    "deltanet": ("gated_delta_rule", lambda run: _delta_rule(run, run.model.deltanet)),
    "mamba": ("selective_scan", lambda run: selective_scan.resolve(run.run.impl)),
    **dict.fromkeys(
        ("retnet", "hgrn2", "mamba2"), ("linear_attention", lambda run: linear_attention.resolve(run.run.impl))
    ),
}


def chosen_impls(experiment: Experiment) -> dict[str, dict[str, str]]:
    """{op: {"impl", "refused"}} for the ops of the pattern, or a UserError when run.impl cannot run here."""
    run, found = experiment.run, {}
    for mixer in dict.fromkeys(experiment.model.pattern):
        if mixer in OPS:
            op, resolve = OPS[mixer]
            try:
                found[op] = resolve(experiment)._asdict()
            except NotImplementedError as error:
                reason = str(error).rpartition("cannot run: ")[2].partition(";")[0].rstrip(".")
                raise UserError(
                    f"run.impl is {run.impl!r}, which cannot run {op} here ({reason}); use 'auto'."
                ) from None
    return found
