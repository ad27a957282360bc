"""Experiment IDs: what they resolve to, that they survive JSON, and what their hashes depend on."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest

import experiments
from experiments import EXPERIMENTS, collect, find, get
from experiments.variants import MODELS, PAPER_MODELS, model_config, scales_of
from gdn_jax.config import Experiment, from_dict, to_dict
from gdn_jax.errors import UserError
from gdn_jax.model import count_parameters

NAMES = [
    "retnet", "hgrn2", "mamba", "mamba2", "deltanet", "gated-deltanet", "transformer", "samba", "gated-deltanet-h1",
    "gated-deltanet-h2",
]  # fmt: skip


@pytest.mark.parametrize("id", EXPERIMENTS)
def test_json_round_trip(id):
    experiment = get(id)
    assert experiment.id == id
    again = from_dict(Experiment, json.loads(json.dumps(to_dict(experiment))))
    assert again == experiment and again.hash8 == experiment.hash8


def test_which_ids_exist():
    expected = {f"smoke/{name}" for name in MODELS if "tiny" in scales_of(name)}
    expected |= {f"table3/{name}/{scale}" for name in MODELS for scale in scales_of(name)}
    assert expected <= set(EXPERIMENTS)
    assert list(MODELS)[:10] == NAMES == list(PAPER_MODELS)
    assert "table3/gated-deltanet-fla/400m-matched" not in EXPERIMENTS
    assert [e.id for e in find("table3/transformer/*")] == [
        f"table3/transformer/{scale}" for scale in ("tiny", "desk", "400m", "400m-matched", "1.3b")
    ]
    assert find("nothing/*") == [] and len(find()) == len(EXPERIMENTS)


def test_every_row_of_the_ablation_tables():
    base, h2 = get("table3/gated-deltanet/400m").model, get("table3/gated-deltanet-h2/400m").model
    assert len(find("ablations/*")) == 3 * (11 + 3)
    without = {
        "naive-delta-rule": 1536 * 9 + 18,  # a_proj, A_log, dt_bias
        "no-short-conv": 4 * (2 * 1152 + 2304),
        "no-output-gate": 1536 * 2304,
        "no-output-norm": 256,
        "l1-relu": 0, "l1-elu1": 0, "l1-silu": 0, "l2-relu": 0, "l2-elu1": 0,
    }  # fmt: skip
    for name, count in without.items():
        model = get(f"ablations/{name}/400m").model
        assert count_parameters(base) - count_parameters(model) == 11 * count, name
        assert replace(model, gated_deltanet=base.gated_deltanet) == base and model != base
    for dim, heads in ((64, 18), (256, 4)):
        mixer = get(f"ablations/head-dim-{dim}/400m").model.gated_deltanet
        assert (mixer.heads, mixer.key_dim, mixer.value_dim) == (heads, dim, 2 * dim)
    orders = {"gdn": "gated_deltanet", "swa": "swa", "mamba2": "mamba2"}
    for name in ("gdn-swa-mamba2", "gdn-mamba2-swa", "mamba2-swa-gdn"):
        model = get(f"ablations/{name}/400m").model
        assert model.pattern == tuple(orders[part] for part in name.split("-"))
        assert replace(model, pattern=h2.pattern) == h2
    for scale in ("tiny", "desk", "400m"):
        recipe = get(f"table3/gated-deltanet/{scale}")
        of_scale = find(f"ablations/*/{scale}")
        assert len(of_scale) == 14 and all((e.optim, e.data) == (recipe.optim, recipe.data) for e in of_scale)


@pytest.mark.parametrize("scale", ["tiny", "desk"])
def test_ablations_of_small_scales_halve_and_double_the_bases_head_dimension(scale):
    base = get(f"table3/gated-deltanet/{scale}").model.gated_deltanet
    half = get(f"ablations/head-dim-half/{scale}").model.gated_deltanet
    double = get(f"ablations/head-dim-double/{scale}").model.gated_deltanet
    assert (
        (2 * half.key_dim, 2 * half.value_dim) == (base.key_dim, base.value_dim) == (half.value_dim, 2 * base.key_dim)
    )
    assert (double.key_dim, double.value_dim) == (2 * base.key_dim, 2 * base.value_dim)


def test_a_repeated_id_is_an_error():
    experiment = get("smoke/transformer")
    with pytest.raises(UserError, match="'smoke/transformer' is used twice"):
        collect([experiment, experiment])


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'table3/gated-deltanet/1.3b'"):
        get("table3/gated-deltanet/1.3B")
    with pytest.raises(UserError, match=r"did you mean 'transformer'"):
        model_config("transfomer", "tiny")
    with pytest.raises(UserError, match=r"no scale '400' of transformer \(did you mean '400m'"):
        model_config("transformer", "400")


def test_hashes_depend_on_what_decides_a_number():
    experiment = get("table3/gated-deltanet/1.3b")
    elsewhere = replace(experiment, run=replace(experiment.run, remat="none", chunk=128, impl="chunked", log_every=1))
    assert (elsewhere.hash8, elsewhere.model_hash8) == (experiment.hash8, experiment.model_hash8)
    reseeded = replace(experiment, run=replace(experiment.run, seed=1))
    assert reseeded.hash8 != experiment.hash8 and reseeded.model_hash8 == experiment.model_hash8
    faster = replace(experiment, optim=replace(experiment.optim, lr=1e-3))
    assert faster.hash8 != experiment.hash8 and faster.model_hash8 == experiment.model_hash8
    wider = replace(experiment, model=replace(experiment.model, d_ff=6144))
    assert wider.model_hash8 != experiment.model_hash8
    hashes = [e.hash8 for e in EXPERIMENTS.values()]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("group", "field", "value", "says"),
    [
        ("optim", "precision", "fp16", "optim.precision is 'fp16'; it must be one of 'bf16', 'fp32'."),
        ("optim", "steps", 3.5, "optim.steps is 3.5; it must be of type int."),
        ("optim", "steps", True, "optim.steps is True; it must be of type int."),
        ("optim", "lr", "1e-3", "optim.lr is '1e-3'; it must be of type float."),
        ("optim", "decay_all", 1, "optim.decay_all is 1; it must be of type bool."),
        ("run", "impl", "fast", "run.impl is 'fast'; it must be one of 'auto', 'chunked', "),
        ("run", "chunk", 64.0, "run.chunk is 64.0; it must be one of 16, 32, 64, 128."),
        ("run", "dir", None, "run.dir is None; it must be of type str."),
        ("data", "seq_len", 8.0, "data.seq_len is 8.0; it must be of type int."),
        ("model", "init", "lot", "model.init is 'lot'; it must be one of 'lit', "),
        ("model", "pattern", "attention", "model.pattern is 'attention'; it must be a list."),
        ("model", "attention", {"heads": 2}, "model.attention is {'heads': 2}; it must be a config.AttentionConfig."),
    ],
)
def test_a_wrong_type_is_refused_at_construction(group, field, value, says):
    with pytest.raises(UserError) as error:
        replace(getattr(get("smoke/samba"), group), **{field: value})
    assert str(error.value).startswith(says)


def test_every_group_checks_its_types():
    for experiment in EXPERIMENTS.values():
        groups = [experiment, *(getattr(experiment, name) for name in ("model", "optim", "data", "run"))]
        groups += [mixer for mixer in vars(experiment.model).values() if is_dataclass(mixer)]
        for group in groups:
            for field in fields(group):
                with pytest.raises(UserError, match=rf"\.{field.name} is "):
                    replace(group, **{field.name: b"?"})


def test_a_number_and_a_list_become_what_json_makes_of_them():
    """An experiment and what its config.json gives back have one hash."""
    experiment = get("smoke/samba")
    same = replace(
        experiment,
        model=replace(experiment.model, pattern=list(experiment.model.pattern)),
        optim=replace(experiment.optim, clip=1),
    )
    assert same == experiment and same.hash8 == experiment.hash8


def test_a_scale_means_the_same_size_for_every_model():
    counts = {name: {scale: count_parameters(model_config(name, scale)) for scale in scales_of(name)} for name in NAMES}
    for name, count in counts.items():
        assert tuple(count) == ("tiny", "desk", "400m", "400m-matched", "1.3b"), name
        assert count["tiny"] < 1e6, name
        assert 30e6 < count["desk"] < 60e6, name
        assert 500e6 < count["400m"] < 545e6, name
        assert abs(count["400m-matched"] / 417e6 - 1) < 0.03, name
        assert 1.3e9 < count["1.3b"] < 1.39e9, name
    desk = [count["desk"] for count in counts.values()]
    assert max(desk) < 1.05 * min(desk)


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_recipe(name):
    for scale, tokens in (("400m", 15e9), ("1.3b", 100e9)):
        if scale not in scales_of(name):
            continue
        experiment = get(f"table3/{name}/{scale}")
        optim, data = experiment.optim, experiment.data
        assert optim.batch_size * data.seq_len == 524_288
        assert abs(optim.steps * 524_288 - tokens) <= 524_288 / 2
        assert (optim.lr, optim.min_lr_ratio, optim.warmup) == (4e-4, 0.1, 0.01)
        assert (optim.b1, optim.b2, optim.weight_decay, optim.clip, optim.decay_all) == (
            0.9,
            0.95,
            0.1,
            1.0,
            True,
        )
        assert (data.source, data.tokenizer, data.validation) == ("fineweb-edu", "data/llama-2.model", 0.001)
        assert experiment.model.vocab == 32000
        assert optim.steps == {"400m": 28_610, "1.3b": 190_735}[scale]


def test_small_scales_need_no_network():
    for experiment in [*find("smoke/*"), *find("*/tiny"), *find("*/desk")]:
        source = "python-stdlib" if experiment.id.endswith("/desk") else "english-novels"
        assert experiment.data.source == source and experiment.data.tokenizer == "byte"
        assert experiment.model.vocab == 320


def test_modules_say_how_to_run_them():
    tables = (experiments.table2, experiments.table3, experiments.table4, experiments.table5, experiments.figure2)
    for module in (experiments.smoke, *tables, experiments.ablations):
        assert "gdn run " in module.__doc__ and "Expect" in module.__doc__
    assert "gdn bench figure3 " in experiments.figure3.__doc__ and "Expect" in experiments.figure3.__doc__
