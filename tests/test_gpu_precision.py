"""On a CUDA device: bf16 or fp32, kernels or none, any remat policy, a training comes to the same loss.

    XLA_FLAGS=--xla_backend_optimization_level=3 pytest -m gpu tests/test_gpu_precision.py -k gated -rP
    XLA_FLAGS=--xla_backend_optimization_level=3 pytest -m gpu tests/test_gpu_precision.py -k "mamba2 or hgrn2" -rP

in one process each, since a model's seeds are trained once a process; CUDA_VISIBLE_DEVICES gives each its GPU, and the
flag takes back what spares the other tests compilation. 300 steps of table3/<model>/desk on the ten novels, by the ID's
own recipe. The reference is computed as the ID is, with three seeds of parameters and of the batches' order; each
variant takes the first seed, and may lie from its reference no further than two standard deviations over the seeds. Of
three seeds that deviation is itself known but roughly: what is printed says more. Trainings in plain JAX take most of
the time: 5 minutes for two of gated-deltanet and its seeds, the other models longer (an H200 that two processes share).
"""

import jax
import numpy as np
import pytest
from precision import RECURRENCES, SEEDS, VARIANTS, WITHOUT_KERNEL, described, differences, of_variant, outside, recipe
from precision import trained as train_each

pytestmark = pytest.mark.gpu

STEPS = 300
ASKED = [("gated-deltanet", variant) for variant in VARIANTS]
ASKED += [(model, variant) for model in ("mamba2", "hgrn2") for variant in ("fp32", "chunked")]


@pytest.fixture(autouse=True)
def on_the_device():
    assert jax.default_backend() == "gpu", "these tests need a CUDA device"


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """references(model): (its experiment, the runs of its seeds), trained when they are first asked for."""
    root, kept = tmp_path_factory.mktemp("data"), {}

    def of(model):
        if model not in kept:
            experiment = recipe(model, "desk", STEPS, root)
            kept[model] = experiment, train_each(experiment, SEEDS)
        return kept[model]

    return of


@pytest.mark.parametrize("model", RECURRENCES)
def test_the_reference_learns_on_its_kernels(references, model):
    experiment, found = references(model)
    assert experiment.optim.precision == "bf16" and experiment.run.remat == "none"
    for seed, run in found.items():
        print(f"{model}, seed {seed}: last steps {run.trained:.5f}, held out {run.held_out:.5f}, {run.impls}")
        assert RECURRENCES[model] in run.kernels
        assert model != "gated-deltanet" or run.kernels == {RECURRENCES[model], *WITHOUT_KERNEL}
        assert np.isfinite(run.steps).all() and run.trained < run.steps[0] / 2


@pytest.mark.parametrize(("model", "variant"), ASKED)
def test_a_variant_comes_to_the_same_loss(references, model, variant):
    experiment, seeds = references(model)
    found = of_variant(experiment, variant)
    print(f"{model}, {described(variant, found, seeds)}")
    kernels = seeds[SEEDS[0]].kernels
    left = {"fp32": kernels, "chunked": kernels} | {op: {op} for op in WITHOUT_KERNEL}
    assert found.kernels == kernels - left.get(variant, set())
    assert outside(differences(found, seeds)) == []
