"""What tests/test_gpu_precision.py compares, at scale tiny: a form of the same passes, and a mistake does not."""

import dataclasses
import math

import pytest
from precision import (
    SEEDS,
    Difference,
    Losses,
    changed,
    described,
    differences,
    furthest,
    of_variant,
    outside,
    recipe,
    without_kernel,
)
from precision import trained as train_each

import experiments
from pallas_kernels import admission, gated_norm, short_conv
from pallas_kernels.gated_norm import chunked, triton_norm
from pallas_kernels.short_conv import triton_conv

SMALL = {"optim": {"batch_size": 4}, "data": {"seq_len": 64}, "run": {"eval_windows": 8}}
LAST, HELD_OUT = "mean of the last 50 steps", "held out"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return changed(recipe("gated-deltanet", "tiny", 30, tmp_path_factory.mktemp("data")), SMALL)


@pytest.fixture(scope="module")
def references(small):
    return train_each(small, SEEDS)


def in_bf16(small):
    return train_each(changed(small, {"optim": {"precision": "bf16"}}), SEEDS[:1])[0]


def test_a_desk_model_is_trained_by_its_own_recipe_on_the_novels(tmp_path):
    found, own = recipe("mamba2", "desk", 300, tmp_path), experiments.get("table3/mamba2/desk")
    assert found.model == own.model and found.optim == dataclasses.replace(own.optim, steps=300)
    assert (found.data.source, found.data.seq_len) == ("english-novels", own.data.seq_len)
    assert found.run == dataclasses.replace(own.run, data_root=str(tmp_path))


def test_a_run_is_the_step_of_training_once_for_each_seed(small, references):
    assert list(references) == [0, 1, 2] and {len(run.steps) for run in references.values()} == {30}
    for run in references.values():
        assert run.steps[0] == pytest.approx(math.log(320), abs=0.1) and 2 < run.held_out < run.steps[0] - 2
    unmoved = train_each(changed(small, {"optim": {"steps": 1, "warmup": 1.0}}), SEEDS[:2])
    assert unmoved[0].held_out != unmoved[1].held_out, "other parameters"
    again = of_variant(small, "remat full")
    assert again.steps == pytest.approx(references[0].steps, rel=1e-5), "the same parameters and batches"
    assert outside(differences(again, references)) == []


@pytest.mark.slow
def test_bf16_is_within_and_a_mistake_is_not(small, references, monkeypatch):
    bf16 = in_bf16(small)
    apart, _ = furthest(bf16, references[0])
    assert outside(differences(bf16, references)) == [] and 1e-4 < apart < 0.1
    rate = train_each(changed(small, {"optim": {"lr": 1.5 * small.optim.lr}}), SEEDS[:1])[0]
    assert LAST in outside(differences(rate, references)), "a learning rate half as high again"
    plain = chunked.gated_norm
    monkeypatch.setattr(chunked, "gated_norm", lambda *arguments: 2 * plain(*arguments))
    assert outside(differences(in_bf16(small), references)) == [LAST, HELD_OUT], "a norm of twice the size"


def losses(trained, held_out, **impls):
    """A run whose first step does not count among its last fifty."""
    return Losses((99.0, *[trained] * 50), held_out, impls)


def test_two_standard_deviations_of_the_seeds_by_hand():
    """Of 1.0, 1.1 and 1.2 the deviation is 0.1: a variant may be 0.2 from the first seed's 1.0, not from their mean."""
    seeds = {0: losses(1.0, 2.0), 1: losses(1.1, 2.4), 2: losses(1.2, 2.2)}
    for trained, held_out, expected in (
        (1.19, 2.39, []), (0.81, 1.61, []), (1.21, 2.39, [LAST]), (0.79, 2.0, [LAST]), (1.0, 2.41, [HELD_OUT]),
        (math.nan, 2.0, [LAST]), (1.0, math.inf, [HELD_OUT]),
    ):  # fmt: skip
        assert outside(differences(losses(trained, held_out), seeds)) == expected, (trained, held_out)
    found = differences(losses(1.15, 2.0), seeds)[LAST]
    assert found == pytest.approx(Difference(1.15, 1.0, 1.1, 0.1))
    assert str(found) == (
        "1.15000, +0.15000 from 1.00000 of its seed, 1.50 standard deviations of 0.10000 (0.50 from the seeds' mean "
        "1.10000)"
    )
    one = losses(1.0, 2.0, gated_delta_rule="triton", gated_norm="chunked; triton", short_conv="chunked")
    other = one._replace(steps=(99.0, *[1.0] * 9, 1.5, *[1.0] * 40))
    assert furthest(other, one) == (0.5, 11) and one.kernels == {"gated_delta_rule", "gated_norm"}
    text = described("remat full", other, seeds)
    assert text.startswith("remat full (gated_delta_rule triton, gated_norm chunked; triton, short_conv chunked)\n")
    assert text.endswith("\n    furthest at step 11: 0.50000") and f"\n    {HELD_OUT}: 2.00000, +0.00000 from" in text


def test_one_op_alone_is_left_without_its_kernel(monkeypatch):
    """On a device where "auto" takes all of them."""
    monkeypatch.setattr(admission, "is_listed", lambda table: True)
    for module in (triton_conv, triton_norm):
        monkeypatch.setattr(module, "why_not", lambda *sizes, **how: None)

    def taken():
        return [op.resolve().impl for op in (short_conv, gated_norm)]

    assert taken() == ["triton", "triton"]
    with without_kernel("short_conv"):
        assert taken() == ["chunked", "triton"]
        assert short_conv.resolve().reason == "triton: left out for this comparison"
    with without_kernel("gated_norm"):
        assert taken() == ["triton", "chunked"]
    assert taken() == ["triton", "triton"]
