"""`gdn tune`: what it times, what it admits, what "auto" then takes. Kernels run in interpret mode here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import main
from gdn_jax.metrics import environment
from pallas_kernels import triton_dialect, tune
from pallas_kernels.gated_delta_rule import conformance, resolve, triton_op, tuning
from pallas_kernels.shapes import DeltaShape

SHAPE = DeltaShape(1, 256, 1, 64, 64)


@pytest.fixture
def interpreted(monkeypatch):
    """A CPU that passes for a Hopper device: kernels are interpreted, and the check is one short case."""
    run, failures = tuning.run, conformance.failures
    monkeypatch.setattr(triton_dialect, "why_not_here", lambda: None)
    monkeypatch.setattr(tuning, "run", lambda *arguments, **options: run(*arguments, **options | {"interpret": True}))
    monkeypatch.setattr(conformance, "failures", lambda case, impl: failures(case, "triton_interpret"))
    monkeypatch.setattr(tune, "CHECKS", ("T=65",))


def test_the_table_holds_what_was_timed_and_passed(interpreted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(triton_op, "ONE_EACH", 0)  # one program counts as many
    path = tmp_path / "table.json"
    options = tune.Options(shapes="1x256,1,64,64", stages="prepare", repetitions=1, threads=2, out=str(path))
    table = tune.tune("gated_delta_rule", options, environment)
    assert json.loads(path.read_text()) == table and list(tmp_path.iterdir()) == [path]
    assert table["admitted"] == {"cpu": ["64x64"]}
    (chosen,) = table["devices"]["cpu"].values()
    assert set(chosen) == {"all", *triton_op.stages(chosen["all"]["block"])}  # the other stages as they were
    assert chosen["prepare"] in tune.candidates("prepare", 64)
    facts = table["measured"]["cpu"]["64x64"]["prepare"]
    assert facts["ms"] > 0 and facts["shape"] == "1x256,1,64,64" and facts["commit"] and facts["versions"]["jax"]
    assert "1x256,1,64,64: admitted: prepare " in capsys.readouterr().err
    assert f"| cpu | 64x64 | prepare | {facts['ms']} | key_tile=" in tune.markdown(table)


def test_configurations_that_fail_are_not_admitted(monkeypatch):
    def failures(case, impl):
        return ["dk 1.0e+00 > 1.0e-02"] if triton_op.config(64, 64, "cpu")["pairs"]["warps"] == 8 else []

    monkeypatch.setattr(conformance, "failures", failures)
    prepare, slow, fast, said = {"key_tile": 64}, {"warps": 4}, {"warps": 8}, []
    times = {"all": [(2.0, {"block": 128})], "prepare": [(1.0, prepare)], "pairs": [(1.0, slow), (2.0, fast)]}
    fastest = {"all": {"block": 128}, "prepare": prepare, "pairs": slow}
    assert tune.admitted(SHAPE, {}, times, "cpu", 1, said.append) == fastest and said == []
    old = {"state": {"block_v": 64}}  # of a stage that was not timed this time
    assert tune.admitted(SHAPE, old, times, "cpu", 1, said.append) == old | fastest
    times["pairs"].reverse()
    default = {stage: triton_op.DEFAULTS[stage] for stage in ("prepare", "pairs")}
    assert tune.admitted(SHAPE, old, times, "cpu", 1, said.append) == old | fastest | default
    assert said == ["the fastest configurations are not admitted: T=129: dk 1.0e+00 > 1.0e-02"]
    monkeypatch.setattr(conformance, "failures", lambda case, impl: ["o nan"])
    assert tune.admitted(SHAPE, old, times, "cpu", 1, said.append) == {}
    assert triton_op._trial == []


def test_what_does_not_agree_with_the_default_is_left_out(interpreted, monkeypatch):
    run, said = tuning.run, []

    def wrong_at_128(stage, work, configuration, **options):
        made = run(stage, work, configuration, **options)
        if stage == "prepare" and configuration["key_tile"] == 128:
            return made._replace(prepared=made.prepared._replace(total=1.01 * made.prepared.total))
        return made

    monkeypatch.setattr(tuning, "run", wrong_at_128)
    options = tune.Options(repetitions=1, threads=2)
    times = tune.measure(SHAPE, 64, ["prepare"], options, said.append)["prepare"]
    assert {c["key_tile"] for _, c in times} == {64}
    assert sum(line.endswith("is 1.0e-02 from the default: left out") for line in said) == 2
    assert np.isnan(tune.apart({"o": jnp.full(3, jnp.nan)}, {"o": jnp.ones(3)}))


def test_states_every_64_or_128_tokens_whichever_is_the_faster_whole(monkeypatch):
    ms = {64: {"chunks": 1.0}, 128: {"tokens": 1.0}}

    def measure(shape, block, stages, options, say):
        assert stages == list(triton_op.KERNELS)
        times = {stage: ms[block].get(stage, 1.0) for stage in triton_op.stages(block)}
        return {stage: [(time, {"block was": block})] for stage, time in times.items() if time}

    def fastest(key_dim=64):
        shape = DeltaShape(1, 256, 1, key_dim, 2 * key_dim)
        found = tune._fastest_block(shape, tune.Options(), lambda line: None)
        if found:
            block = found["all"][0][1]["block"]
            assert set(found) == {"all", *triton_op.stages(block)}
            assert found["reverse"] == [(1.0, {"block was": block})]
        return found.get("all")

    monkeypatch.setattr(tune, "measure", measure)
    assert fastest() == [(4.0, {"block": 64})]
    ms[64]["chunks"] = 3.5
    assert fastest() == [(6.0, {"block": 128})]
    assert fastest(200) == [(6.0, {"block": 128})]  # wide heads are tried at 128 alone
    ms[128]["tokens"] = 0  # did not run: a whole that lacks a stage is no faster
    assert fastest() == [(6.5, {"block": 64})] and fastest(200) is None


def test_some_stages_are_measured_under_the_block_of_the_table_that_is_written(interpreted, tmp_path, capsys):
    path = tmp_path / "table.json"
    entry = {stage: triton_op.DEFAULTS[stage] for stage in triton_op.stages(128)} | {"all": {"block": 128}}
    assert triton_op.config(64, 64, "cpu", rows=1)["all"] == {"block": 64}  # of the package's own table
    old = {"devices": {"cpu": {"64x64 few": entry}}, "admitted": {"cpu": []}, "measured": {"cpu": {}}}
    path.write_text(json.dumps(old))
    options = tune.Options(shapes="1x256,1,64,64", repetitions=1, threads=2, out=str(path))
    tune.tune("gated_delta_rule", dataclasses.replace(options, stages="chunks"), environment)
    assert json.loads(path.read_text()) == old
    assert "chunks: not among the stages that run here, prepare, state, output," in capsys.readouterr().err
    table = tune.tune("gated_delta_rule", dataclasses.replace(options, stages="pairs"), environment)
    assert set(table["devices"]["cpu"]["64x64 few"]) == {"all", *triton_op.stages(128)}
    assert set(table["measured"]["cpu"]["64x64 few"]) == {"pairs"}


def test_auto_takes_only_what_was_admitted_on_this_kind_of_device(monkeypatch):
    monkeypatch.setattr(triton_dialect, "why_not_here", lambda: None)
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(triton_op, "_tuned", lambda: {"admitted": {kind: ["128x128"]}})
    assert resolve("auto", key_dim=128, value_dim=128) == ("triton", "")
    refused = resolve("auto", key_dim=256, value_dim=512)
    assert refused.impl == "chunked"
    assert refused.refused == (
        f"triton: its configuration at 256x512 has not passed the float64 check on {kind}; "
        "`gdn tune gated_delta_rule --shapes 8x4096,24,256,512` checks and admits it"
    )
    assert resolve("triton", key_dim=256, value_dim=512).impl == "triton"  # named, it runs
    assert resolve("auto", key_dim=128, value_dim=128, dtype=jnp.float32).impl == "chunked"


def test_few_rows_have_an_entry_of_their_own(monkeypatch):
    monkeypatch.setattr(triton_op, "_trial", [{"cpu": {"128x128": {"all": 1}, "128x128 few": {"all": 2}}}])
    assert triton_op.config(128, 128, "cpu", rows=65)["all"] == 1 and triton_op.config(128, 128, "cpu")["all"] == 1
    assert triton_op.config(128, 128, "cpu", rows=64)["all"] == 2
    assert triton_op.config(256, 512, "cpu", rows=1) == triton_op.DEFAULTS
    assert tune.in_pieces(DeltaShape(1, 65536, 8, 128, 128)) == DeltaShape(16, 4096, 8, 128, 128)


def test_the_table_in_the_package_is_complete():
    table = json.loads(triton_op.TUNED.read_text())
    for kind, sizes in table["devices"].items():
        assert set(table["admitted"][kind]) == {size for size in sizes if not size.endswith(" few")}
        for size in sizes:
            configuration = table["devices"][kind][size]
            assert set(configuration) == {"all", *triton_op.stages(configuration["all"]["block"])}, size
            for stage, facts in table["measured"][kind][size].items():
                assert stage in configuration and facts["ms"] > 0
                committed = facts["commit"] != "unknown" and not facts["dirty"]
                assert committed or len(facts["source"]) == 8  # a tree without git has a hash


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("tune softmax", "There are no shapes of an op 'softmax'; it must be one of gated_delta_rule."),
        (
            "tune gated_delta_rule --stages warp",
            "stages names 'warp'; it must be all or some of prepare, forward, state, output,",
        ),
        ("tune gated_delta_rule --threads 0", "threads is 0; it must be positive."),
        ("tune gated_delta_rule --shapes 1x64,1,16,16", "Shape '1x64,1,16,16' cannot be tuned: there is no kernel for"),
        (
            "tune gated_delta_rule",
            "gated_delta_rule cannot be tuned here: the default device is cpu, not a CUDA device.",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err
