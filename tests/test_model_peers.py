"""Other libraries' models beside ours: training steps in Figure 3, and generation."""

import importlib.metadata
import importlib.util
import math
import types
import weakref

import jax
import jax.numpy as jnp
import pytest

import experiments
from experiments import drawn_figure3, generation_speed, model_peers, timed_step, training_speed
from experiments.generation_speed import GenerationOptions
from experiments.training_speed import SpeedOptions, points
from gdn_jax.errors import UserError
from gdn_jax.model import count_parameters


@pytest.fixture
def installed(monkeypatch):
    """jla 0.1.0, as far as anybody asks before a process imports it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")


def test_a_peers_points_follow_ours_for_the_models_that_it_has(installed):
    options = SpeedOptions(models="retnet,gated-deltanet,mamba2", settings="4Kx8,16Kx2", peers="jla", step_profile=True)
    found = points(options)
    assert [point.peer for point in found] == [""] * 6 + ["jla"] * 4
    assert [(point.timing.model, point.setting) for point in found[6:]] == [
        ("gated-deltanet", "4Kx8"), ("gated-deltanet", "16Kx2"), ("mamba2", "4Kx8"), ("mamba2", "16Kx2"),
    ]  # fmt: skip
    last = found[-1]
    assert last.path.as_posix() == "runs/figure3/mamba2/1.3b/16Kx2-peer-jla.json" and not last.step_profile
    assert last.changed == {"peer": "jla"} and points(SpeedOptions(models="mamba2")) == points(
        SpeedOptions(models="mamba2", peers="")
    )


def test_a_peer_that_cannot_be_asked_is_one_sentence(installed, monkeypatch):
    with pytest.raises(UserError, match=r"^peers names 'jal' \(did you mean 'jla'\?\); it must be all or some of jla"):
        points(SpeedOptions(peers="jal"))
    with pytest.raises(UserError, match=r"^jla has none of the models retnet,hgrn2; it has transformer, deltanet, "):
        points(SpeedOptions(models="retnet,hgrn2", peers="jla"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^peers names 'jla', which is not installed; pip install jax-linear-attent"):
        points(SpeedOptions(peers="jla"))


def test_a_peers_row_is_named_and_counts_for_no_claim(installed):
    ours, theirs = points(SpeedOptions(models="gated-deltanet", settings="4Kx8", peers="jla"))
    here = {"devices": ["a GPU"], "versions": {"jax": "0.11.2"}, "date": "2026-11-30", "commit": "abc", "dirty": False}
    measured = {
        "least": 1.0,
        "most": 3.0,
        "step_ms": 4.0,
        "compile_seconds": 5.0,
        "limit_bytes": 1,
        "environment": here,
    }
    rows = [
        training_speed._row(ours) | measured | {"tokens_per_s": 2.0, "planned_bytes": 2**30},
        training_speed._row(theirs) | measured | {
            "tokens_per_s": 9.0,
            "peer": {"library": "jla 0.1.0", "words": "7 heads of 256 x 512 for 9 of 200 x 400", "remat": "dots"},
        },
    ]  # fmt: skip
    text = drawn_figure3.markdown(drawn_figure3.collected("1.3b", rows))
    assert "\n| gated-deltanet (jla) | 4Kx8 | 9 (1 to 3) | - | unknown | 4.0 | unknown | 5.0 |" in text
    assert "| jla 0.1.0; 7 heads of 256 x 512 for 9 of 200 x 400; remat dots | ok |" in text
    assert "jax-linear-attention (jla): jla 0.1.0, flash-linear-attention (FLA): not run (its own model" in text
    assert "- Points: 1 of 40 have a number as their IDs say" in text
    assert {one["verdict"] for one in drawn_figure3.claims("1.3b", rows)} == {"not run"}
    (panel,) = [axes for axes in drawn_figure3.draw(drawn_figure3.collected("1.3b", rows)).axes if axes.lines][:1]
    assert [line.get_label() for line in panel.lines] == ["gated-deltanet", "gated-deltanet-peer-jla"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [(jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED: Out of memory"), (RuntimeError, "CUDA out of memory.")],
)
def test_what_does_not_fit_is_tried_again_with_less_kept_and_frees_what_it_had(installed, monkeypatch, kind, said):
    """A library whose first form runs out of memory: at the second attempt nothing of the first is alive."""
    alive = weakref.WeakSet()

    class State:
        def __init__(self):
            assert not alive
            alive.add(self)

    def build(experiment, remat):
        def run(state, batch):
            if remat == "much":
                raise kind(said)
            return state, jnp.float32(2.0)

        return model_peers.Step("", 7, State(), lambda tokens: tokens, lambda state, batch: run, lambda: (5, 9))

    peer = model_peers.PEERS["jla"]._replace(remat=("much", "little"), build=build)
    monkeypatch.setitem(model_peers.PEERS, "jla", peer)
    small = experiments.TIMINGS["figure3/gated-deltanet/tiny"].experiment("64x8")
    row = timed_step.timed_peer("jla", small, warm_up=1, repetitions=2)
    assert row["peer"]["remat"] == "little" and row["losses"] == [2.0, 2.0]
    assert row["peak_bytes"] is None and row["limit_bytes"] == 9
    monkeypatch.setitem(model_peers.PEERS, "jla", peer._replace(remat=("much",)))
    with pytest.raises(kind, match=said):
        timed_step.timed_peer("jla", small, warm_up=1, repetitions=2)


def test_jla_has_our_sizes_or_the_nearest_and_runs():
    """With jax-linear-attention installed: parameters within 3 % of ours at 1.3b, three steps at tiny."""
    pytest.importorskip("jla")
    from jla.models.lm import build_model

    for model in model_peers.JLA_MODELS:
        experiment = experiments.get(f"table3/{model}/1.3b")
        config, words = model_peers._jla_model(experiment)
        built = jax.eval_shape(lambda config=config: build_model(config, key=jax.random.key(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(built) if hasattr(leaf, "size"))
        assert count == pytest.approx(count_parameters(experiment.model), rel=0.03), model
        assert words == ("7 heads of 256 x 512 for 9 of 200 x 400" if model == "gated-deltanet" else "")
        small = experiments.TIMINGS[f"figure3/{model}/tiny"].experiment("64x8")
        row = timed_step.timed_peer("jla", small, warm_up=1, repetitions=2)
        assert row["losses"] == pytest.approx([math.log(small.model.vocab)] * 2, abs=0.1), "random tokens"
        assert row["note"] == "" and row["peer"]["remat"] == "dots_kernels" and row["tokens_per_s"] > 0


def test_fla_has_our_sizes():
    """With flash-linear-attention and torch installed: as many parameters as ours, but for the bias of beta."""
    pytest.importorskip("fla.models")
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    for model in model_peers.FLA_MODELS:
        ours = experiments.get(f"table3/{model}/1.3b").model
        tree, words = model_peers._fla_config(ours)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))
        without = len(ours.pattern) * ours.repeats * ours.gated_deltanet.heads if words else 0
        assert sum(one.numel() for one in built.parameters()) == count_parameters(ours) - without, model
        assert words == ("beta without a bias" if model == "gated-deltanet" else "")


def test_fla_is_asked_for_steps_alone_and_runs_beside_a_jax_that_takes_no_memory(installed):
    options = SpeedOptions(models="hgrn2,transformer", settings="4Kx8", peers="fla")
    assert [(point.timing.model, point.peer) for point in points(options)][2:] == [("hgrn2", "fla")]
    assert model_peers.environment("fla") == {"FLA_FLASH_QLA": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert model_peers.environment("jla") == {}
    with pytest.raises(UserError, match=r"^fla's generation is not timed; peers must be jla\.$"):
        model_peers.check("fla", "table3/hgrn2/tiny")


def test_generation_beside_a_peer(installed, monkeypatch):
    """A library that reads a prompt in 1 ms a token and writes each token of all rows in 2 ms."""
    clock = [0.0]

    def write(prompts, count):
        assert [len(prompt) for prompt in prompts] == [10, 10]
        clock[0] += 0.010 + 0.002 * count

    peer = model_peers.PEERS["jla"]._replace(generate=lambda experiment: (write, ""))
    monkeypatch.setitem(model_peers.PEERS, "jla", peer)
    monkeypatch.setattr(generation_speed.time, "perf_counter", lambda: clock[0])
    options = GenerationOptions(peers="jla", tokens=5, repetitions=2)
    experiment = experiments.get("table3/gated-deltanet/tiny")
    found = generation_speed._peer(experiment, [(2, 10)], options)
    (row,) = found["rows"]
    assert found["library"] == "jla 0.1.0" and row["note"] == ""
    assert row["prefill"]["tokens_per_s"] == pytest.approx(20 / 0.012)
    assert row["decode"]["tokens_per_s"] == pytest.approx(2 / 0.002)
    with pytest.raises(UserError, match=r"^jla has no model retnet; it has transformer, deltanet, gated-deltanet, "):
        generation_speed.measure(experiments.get("table3/retnet/tiny"), options)


def test_jla_generates_at_tiny():
    pytest.importorskip("jla")
    options = GenerationOptions(peers="jla", tokens=200, repetitions=2)
    found = generation_speed._peer(experiments.get("table3/gated-deltanet/tiny"), [(2, 10)], options)
    assert found["rows"][0]["note"] == "" and found["rows"][0]["decode"]["tokens_per_s"] > 0
