"""`gdn tune`: what it times, what it admits, what "auto" then takes. Kernels run in interpret mode here."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import main
from gdn_jax.metrics import environment
from pallas_kernels import ops, triton_calls, tune, tuned
from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_delta_rule import configurations, conformance, resolve, tuning
from pallas_kernels.gated_delta_rule.benchmark import Shape
from pallas_kernels.gated_delta_rule.configurations import BLOCKS, Every64, Every128, Pairs
from pallas_kernels.tuned import Entry, Timing, kernels

OP = "gated_delta_rule"
SHAPE = Shape(1, 256, 1, 64, 64)


@pytest.fixture
def interpreted(monkeypatch):
    """A CPU that passes for a Hopper device: kernels are interpreted, and the check is one short case."""
    run, failures = tuning.run, conformance.failures
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    monkeypatch.setattr(tuning, "run", lambda *arguments, **options: run(*arguments, **options | {"interpret": True}))
    monkeypatch.setattr(
        conformance, "failures", lambda case, impl, **given: failures(case, "triton_interpret", **given)
    )
    monkeypatch.setattr(tuning, "CHECKS", ("T=65",))


def timing(ms=1.0):
    return Timing(ms=ms, shape="head-128", date="", commit="", dirty=False, source="", jax="0.12", jaxlib="0.12")


def test_the_table_holds_what_was_timed_and_passed(interpreted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(configurations, "ONE_EACH", 0)  # one program counts as many
    path = tmp_path / "table.json"
    options = tune.Options(shapes="1x256,1,64,64", kernels="prepare", repetitions=1, threads=2, out=str(path))
    table = tune.tune("gated_delta_rule", options, environment)
    assert tuned.read(path, BLOCKS) == table and list(tmp_path.iterdir()) == [path]
    entry = table["cpu"]["64x64"]
    assert entry.admitted and list(table["cpu"]) == ["64x64"]
    before = configurations.choose(64, 64, "cpu")  # the other kernels stay as they were
    assert dataclasses.replace(entry.configuration, prepare=before.prepare) == before
    assert entry.configuration.prepare in tuning.candidates(configurations.Prepare(), SHAPE)
    assert list(entry.timings) == ["prepare"]
    facts = entry.timings["prepare"]
    assert facts.ms > 0 and facts.shape == "1x256,1,64,64" and facts.commit and facts.jax == jax.__version__
    assert f"1x256,1,64,64: admitted in {path}: prepare " in capsys.readouterr().err
    assert f"| cpu | 64x64 | prepare | {facts.ms} | key_tile=" in tune.markdown(table)
    assert f"| cpu | 64x64 | all | not run | block={before.block} |" in tune.markdown(table)


def test_configurations_that_fail_are_not_admitted(monkeypatch):
    def failures(case, impl, configuration):
        return ["dk 1.0e+00 > 1.0e-02"] if configuration.pairs.warps == 8 else []

    monkeypatch.setattr(conformance, "failures", failures)
    prepare, slow, fast, said = configurations.Prepare(key_tile=128), Pairs(warps=4), Pairs(warps=8), []
    times = {"prepare": [(1.0, prepare)], "pairs": [(1.0, slow), (2.0, fast)]}
    old = Every128(state=configurations.Scan(value_tile=32))  # of a kernel that was not timed this time
    assert (
        tune.admitted(OP, SHAPE, old, times, 1, said.append) == dataclasses.replace(old, prepare=prepare) and said == []
    )
    times["pairs"].reverse()
    assert tune.admitted(OP, SHAPE, old, times, 1, said.append) == old
    assert said == ["the fastest configurations are not admitted: T=129: dk 1.0e+00 > 1.0e-02"]
    monkeypatch.setattr(conformance, "failures", lambda case, impl, configuration: ["o nan"])
    assert tune.admitted(OP, SHAPE, old, times, 1, said.append) is None


def test_what_does_not_agree_with_the_default_is_left_out(interpreted, monkeypatch):
    run, said = tuning.run, []

    def wrong_at_128(work, config, whole, interpret):
        made = run(work, config, whole, interpret=interpret)
        if made.prepared is not None and config.key_tile == 128:
            return made._replace(prepared=made.prepared._replace(total=1.01 * made.prepared.total))
        return made

    monkeypatch.setattr(tuning, "run", wrong_at_128)
    options = tune.Options(repetitions=1, threads=2)
    times = tune.measure(tuning, SHAPE, Every64(), ["prepare"], options, said.append)["prepare"]
    assert {config.key_tile for _, config in times} == {64}
    assert sum(line.endswith("is 1.0e-02 from the default: left out") for line in said) == 2
    assert np.isnan(tune.apart({"o": jnp.full(3, jnp.nan)}, {"o": jnp.ones(3)}))


def test_states_every_64_or_128_tokens_whichever_is_the_faster_whole(monkeypatch):
    ms = {64: {"chunks": 1.0}, 128: {"tokens": 1.0}}

    def measure(tuning, shape, default, names, options, say):
        assert list(names) == list(kernels(default))
        times = {name: (ms[default.block].get(name, 1.0), config) for name, config in kernels(default).items()}
        return {name: [row] for name, row in times.items() if row[0]}

    def fastest(key_dim=64):
        shape = Shape(1, 256, 1, key_dim, 2 * key_dim)
        found = tune._fastest_whole(tuning, shape, tune.Options(), lambda line: None)
        if found is None:
            return None
        default, times = found
        assert list(times) == list(kernels(default)) and times["reverse"] == [(1.0, default.reverse)]
        return default.block

    monkeypatch.setattr(tune, "measure", measure)
    assert fastest() == 64
    ms[64]["chunks"] = 3.5
    assert fastest() == 128
    assert fastest(200) == 128  # wide heads are tried at 128 alone
    ms[128]["tokens"] = 0  # did not run: a whole that lacks a kernel is no faster
    assert fastest() == 64 and fastest(200) is None


def test_some_kernels_are_measured_under_the_block_of_the_table_that_is_written(interpreted, tmp_path, capsys):
    path = tmp_path / "table.json"
    assert configurations.choose(64, 64, "cpu", rows=1).block == 64  # of the package's own table
    entry = Entry(configuration=Every128(), admitted=False, timings={"state": timing()})
    path.write_text(tuned.as_text({"cpu": {"64x64 few": entry}}))
    old, options = path.read_text(), tune.Options(shapes="1x256,1,64,64", repetitions=1, threads=2, out=str(path))
    tune.tune("gated_delta_rule", dataclasses.replace(options, kernels="chunks"), environment)
    assert path.read_text() == old
    assert "chunks: not among the kernels that run here, prepare, state, output," in capsys.readouterr().err
    table = tune.tune("gated_delta_rule", dataclasses.replace(options, kernels="pairs"), environment)
    found = table["cpu"]["64x64 few"]
    assert found.configuration.block == 128 and set(found.timings) == {"state", "pairs"}
    assert found.timings["state"] == timing() and tuned.read(path, BLOCKS) == table


def test_auto_takes_only_what_was_admitted_on_this_kind_of_device(monkeypatch):
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    kind = jax.devices()[0].device_kind
    measured = dataclasses.replace(timing(), jax=jax.__version__)
    entry = Entry(configuration=Every64(), admitted=True, timings={"chunks": measured})
    older = dataclasses.replace(entry, timings={"chunks": dataclasses.replace(measured, jax="0.9.1")})
    monkeypatch.setattr(configurations, "table", lambda: {kind: {"128x128": entry, "64x64": older}})
    assert resolve("auto", key_dim=128, value_dim=128) == Choice("gated_delta_rule", "triton")
    assert "has not checked gated_delta_rule at K 64, V 64" in resolve("auto", key_dim=64, value_dim=64).reason
    refused = resolve("auto", key_dim=256, value_dim=512)
    assert refused.impl == "chunked"
    assert refused.reason == (
        f"triton: float64 has not checked gated_delta_rule at K 256, V 512 on {kind} with jax "
        f"{'.'.join(jax.__version__.split('.')[:2])}; `gdn train`, `run`, `eval` and `generate` do at their start, "
        "`gdn doctor ID` for an ID, `pallas_kernels.admission.check` from Python"
    )
    assert resolve("triton", key_dim=256, value_dim=512).impl == "triton"  # named, it runs
    assert resolve("auto", key_dim=128, value_dim=128, dtype=jnp.float32).impl == "chunked"


def test_few_rows_have_an_entry_of_their_own(monkeypatch):
    many, few = (Entry(configuration=one, admitted=True, timings={}) for one in (Every64(), Every128()))
    monkeypatch.setattr(configurations, "table", lambda: {"cpu": {"128x128": many, "128x128 few": few}})
    assert configurations.choose(128, 128, "cpu", rows=65) == configurations.choose(128, 128, "cpu") == Every64()
    assert configurations.choose(128, 128, "cpu", rows=64) == Every128()
    assert configurations.choose(128, 128, "another card", rows=65) == Every64()  # the first kind there is
    assert configurations.choose(256, 512, "cpu", rows=1) == configurations.DEFAULT
    assert tuning.as_run(Shape(1, 65536, 8, 128, 128)) == Shape(16, 4096, 8, 128, 128)


def test_the_table_in_the_package_is_complete():
    path = tuned.of_package(OP)
    text, table = path.read_text(), tuned.read(path, BLOCKS)
    assert text == tuned.as_text(table) and text.count("\n") <= 300
    for entries in table.values():
        for size, entry in entries.items():
            assert entry.admitted != size.endswith(" few")
            assert set(entry.timings) == {tuned.WHOLE, *kernels(entry.configuration)}, size
            for facts in entry.timings.values():
                committed = facts.commit != "unknown" and not facts.dirty
                assert facts.ms > 0 and (committed or len(facts.source) == 8)  # a tree without git has a hash


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"warps": 4, ', "", "cpu 64x64: prepare has no field 'warps'; it must have key_tile, warps, num_stages,"),
        ('"warps"', '"wraps"', "cpu 64x64: prepare has an unknown field 'wraps'; it must have key_tile, warps,"),
        ('"warps": 4', '"warps": true', "cpu 64x64: prepare: warps is True; it must be of type int."),
        ('"block": 64', '"block": 32', "cpu 64x64: block is 32; it must be one of 64, 128."),
        ('"chunks"', '"pairs"', "cpu 64x64 has an unknown field 'pairs'; it must have entry, prepare, forward,"),
        ('"entry": {', '"entry": [{', "is not JSON (Expecting ',' delimiter"),
    ],
)
def test_a_table_is_read_strictly(tmp_path, old, new, sentence):
    entry = Entry(configuration=Every64(), admitted=True, timings={"chunks": timing(), "prepare": timing(2.0)})
    path, text = tmp_path / "table.json", tuned.as_text({"cpu": {"64x64": entry}})
    path.write_text(text)
    assert tuned.read(path, BLOCKS) == {"cpu": {"64x64": entry}}
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        tuned.read(path, BLOCKS)
    assert str(error.value).startswith(str(path)) and sentence in str(error.value)


def test_where_the_package_cannot_be_written_the_users_table_is_written_and_read(interpreted, monkeypatch, tmp_path):
    (tmp_path / "package").touch()  # no folder: not even root can write below it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = tmp_path / "cache/gdn_jax/tuned" / f"{OP}.json"
    assert tuned.to_write(OP) == tuned.of_package(OP) and tuned.of_user(OP) == own
    before = tuned.in_force(OP, BLOCKS)
    assert before == tuned.read(tuned.of_package(OP), BLOCKS) and "cpu" not in before
    ops.benchmark(OP)  # is kept; below its folder is not there
    with monkeypatch.context() as patch:
        patch.setattr(ops, "HERE", tmp_path / "package")
        assert tuned.to_write(OP) == own
        patch.setattr(ops, "names", lambda having: [OP])
        options = tune.Options(shapes="1x256,1,64,64", kernels="prepare", repetitions=1, threads=2)
        table = tune.tune(OP, options, environment)
    assert tuned.read(own, BLOCKS) == table and list(own.parent.iterdir()) == [own]
    (size,) = table["cpu"]
    changed = dataclasses.replace(table["cpu"][size], configuration=Every128(), admitted=True)
    kind, entries = next(iter(before.items()))
    own.write_text(tuned.as_text({"cpu": {"64x64": changed}, kind: {"64x64": changed}}))
    monkeypatch.setattr(configurations, "table", lambda: tuned.in_force(OP, BLOCKS))
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    both = configurations.table()
    assert both["cpu"] == {"64x64": changed} and both[kind] == entries | {"64x64": changed}
    assert resolve("auto", key_dim=64, value_dim=64).impl == "triton"  # the user's table admits it
    assert configurations.choose(64, 64, "cpu") == Every128()


def test_a_users_table_of_another_version_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = tuned.of_user(OP)
    own.parent.mkdir(parents=True)
    own.write_text('{"cpu": {"64x64": {"entry": {"block": 32}}}}')
    assert tuned.in_force(OP, BLOCKS) == tuned.read(tuned.of_package(OP), BLOCKS)
    said = capsys.readouterr().err
    assert said == (
        f"{own}: cpu 64x64: block is 32; it must be one of 64, 128. The file is left out; delete it, or tune again.\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # does not count
    assert tuned.of_user(OP) == Path.home() / ".cache/gdn_jax/tuned" / f"{OP}.json"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("tune softmax", "There is no op 'softmax' to tune; it must be one of gated_delta_rule."),
        ("tune short_conv", "There is no op 'short_conv' to tune; it must be one of gated_delta_rule."),
        (
            "tune gated_delta_rule --kernels warp",
            "kernels names 'warp'; it must be all or some of prepare, forward, state, output,",
        ),
        ("tune gated_delta_rule --threads 0", "threads is 0; it must be positive."),
        ("tune gated_delta_rule --shapes 1x64,1,16,16", "Shape '1x64,1,16,16' cannot be tuned: there is no kernel for"),
        (
            "tune gated_delta_rule",
            "gated_delta_rule cannot be tuned here: the device is cpu, not a CUDA device.",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err
