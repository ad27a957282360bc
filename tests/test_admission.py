"""Kernels that "auto" may take: listed for a kind of device and a jax, or checked here once and remembered."""

import importlib
import json

import pytest

import experiments
from gdn_jax import implementations
from gdn_jax.progress import Progress
from pallas_kernels import admission, ops, placement, triton_calls
from pallas_kernels.gated_delta_rule import configurations

WITH_KERNELS = ("gated_delta_rule", "gated_norm", "linear_attention", "selective_scan", "short_conv")
SIZES = {
    "gated_delta_rule": {"K": 128, "V": 128},
    "gated_norm": {"D": 256, "groups": 1},
    "linear_attention": {"K": 128, "V": 128, "channels": False},
    "selective_scan": {"N": 16},
    "short_conv": {"W": 4, "l2norm": None},
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """A CPU that passes for a GPU of a kind and a jax that can be chosen, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    monkeypatch.setattr(placement, "on_gpu", lambda: True)
    admission._verdicts.cache_clear()
    configurations.table.cache_clear()

    def become(kind, version):
        monkeypatch.setattr(admission, "here", lambda: (kind, version))
        admission._verdicts.cache_clear()

    yield become
    admission._verdicts.cache_clear()


def resolved(op):
    return importlib.import_module(f"pallas_kernels.{op}.api").resolve()


def suite(op):
    return importlib.import_module(f"pallas_kernels.{op}.conformance")


@pytest.mark.parametrize("op", WITH_KERNELS)
@pytest.mark.parametrize("kind", admission.TESTED)
def test_what_was_tested_is_taken_and_nothing_else(hopper, op, kind):
    if op == "gated_delta_rule":
        assert set(configurations.table()) == set(admission.TESTED)
    hopper(kind, "0.11")
    choice = resolved(op) if op != "gated_delta_rule" else suite(op).resolve(key_dim=128, value_dim=128)
    assert (choice.impl, choice.refused) == ("triton", ())
    for other in (("NVIDIA H20", "0.11"), (kind, "0.12")):
        hopper(*other)
        choice = resolved(op) if op != "gated_delta_rule" else suite(op).resolve(key_dim=128, value_dim=128)
        (refused,) = choice.refused
        assert choice.impl == "chunked" and refused.check == admission.Check(op, tuple(SIZES[op].items()))
        assert refused.reason.startswith(f"float64 has not checked {op} at ")
        assert f"on {other[0]} with jax {other[1]}; `gdn train`, `run`, `eval`" in refused.reason


@pytest.mark.parametrize("op", ["gated_delta_rule", "linear_attention"])
def test_the_kernel_of_one_token_is_listed_and_checked_by_itself(hopper, monkeypatch, op):
    hopper("NVIDIA H20", "0.12")
    monkeypatch.setattr(suite(op), "check", lambda **sizes: [])
    resolve_step = importlib.import_module(f"pallas_kernels.{op}.api").resolve_step
    choice = resolve_step()
    (refused,) = choice.refused
    assert (choice.op, choice.impl) == (f"{op}_step", "chunked")
    assert refused.check == admission.Check(op, (*SIZES[op].items(), ("step", True)))
    monkeypatch.setattr(admission, "STEPS_TESTED", {"NVIDIA H20": ("0.12",)})
    assert resolve_step().impl == "triton"
    monkeypatch.setattr(admission, "STEPS_TESTED", {})
    admission.check(refused.check)
    assert resolve_step().impl == "triton"


def test_every_op_with_kernels_has_a_check():
    with_kernels = [op for op in ops.names() if list((ops.HERE / op).glob("triton_*.py"))]
    assert tuple(with_kernels) == WITH_KERNELS
    for op in with_kernels:
        assert callable(suite(op).check)


@pytest.mark.parametrize("found", [[], ["documents: dq 2.0e-02 > 1.0e-02"]])
def test_a_verdict_is_kept_for_its_device_its_jax_and_its_source(hopper, monkeypatch, tmp_path, found):
    asked = []
    monkeypatch.setattr(suite("selective_scan"), "check", lambda **sizes: asked.append(sizes) or found)
    hopper("NVIDIA H20", "0.12")
    (refused,) = resolved("selective_scan").refused
    assert admission.check(refused.check).failures == tuple(found) and asked == [{"N": 16}]
    admission._verdicts.cache_clear()  # as another process
    choice = resolved("selective_scan")
    assert choice.impl == ("chunked" if found else "triton")
    if found:
        assert "selective_scan at N 16 failed its float64 check on NVIDIA H20 with jax 0.12 (documents" in choice.reason
        assert choice.refused[0].check is None  # asking again would find the same
    (name,) = json.loads((tmp_path / "gdn_jax/tuned/checked.json").read_text())
    assert name == f"NVIDIA H20/0.12/{admission._source()}/selective_scan at N 16"
    hopper("NVIDIA H20", "0.11")
    assert resolved("selective_scan").refused[0].check is not None
    hopper("NVIDIA H20", "0.12")
    monkeypatch.setattr(admission, "_source", lambda: "another")
    assert resolved("selective_scan").refused[0].check is not None


def test_a_file_that_cannot_be_read_or_written_is_said(hopper, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite("selective_scan"), "check", lambda **sizes: [])
    hopper("NVIDIA H20", "0.12")
    path = tmp_path / "gdn_jax/tuned/checked.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"a": 1')
    (refused,) = resolved("selective_scan").refused
    assert capsys.readouterr().err == f"{path} is not a file of verdicts and is left out; delete it.\n"
    admission.check(refused.check)
    assert len(json.loads(path.read_text())) == 1  # written anew
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    hopper("NVIDIA H20", "0.13")
    admission.check(refused.check)
    assert "the verdict holds for this process alone" in capsys.readouterr().err
    assert resolved("selective_scan").impl == "triton"


@pytest.mark.parametrize(
    ("op", "sizes"), [("short_conv", {"W": 3, "l2norm": 8}), ("gated_norm", {"D": 48, "groups": 2})]
)
def test_a_check_finds_what_is_wrong(monkeypatch, op, sizes):
    """Interpreted; then with outputs that are 5 % off."""
    module = suite(op)
    failures, outputs = module.failures, module.outputs_and_gradients
    interpreted = lambda case, impl, *given: failures(case, "triton_interpret", *given)  # noqa: E731
    monkeypatch.setattr(module.SUITE, "failures", interpreted)
    assert module.check(**sizes) == []

    def off(*arguments, impl, **options):
        found = outputs(*arguments, impl=impl, **options)
        return {name: 1.05 * x for name, x in found.items()} if impl == "triton_interpret" else found

    monkeypatch.setattr(module.SUITE, "outputs_and_gradients", off)
    missed = module.check(**sizes)
    assert len(missed) >= 4 and " > " in missed[0]


def test_what_a_model_needs_is_checked_once_at_its_start(hopper, monkeypatch):
    found = {op: [] for op in WITH_KERNELS} | {"short_conv": ["y 1.0e+00 > 1.0e-02"]}
    asked = []
    for op in WITH_KERNELS:
        monkeypatch.setattr(suite(op), "check", lambda op=op, **sizes: asked.append((op, sizes)) or found[op])
    hopper("NVIDIA H20", "0.12")
    experiment = experiments.get("table3/gated-deltanet/desk")
    sizes, said = experiment.model.gated_deltanet, []
    implementations.admit(experiment, Progress(say=said.append))
    wanted = {"K": sizes.key_dim, "V": sizes.value_dim}
    assert ("gated_delta_rule", wanted) in asked and ("gated_delta_rule", wanted | {"step": True}) in asked
    assert len(asked) == len({str(one) for one in asked})
    assert said[0].startswith(f"[1/{len(asked)}] Checking ") and said[0].endswith("once for NVIDIA H20 with jax 0.12.")
    assert sum("failed (y 1.0e+00 > 1.0e-02); the slower implementation runs" in line for line in said) == len(
        [op for op, _ in asked if op == "short_conv"]
    )
    taken = implementations.implementations(experiment)
    assert taken["gated_delta_rule"]["impl"] == "triton" and taken["short_conv"]["impl"] == "chunked"
    said.clear()
    implementations.admit(experiment, Progress(say=said.append))
    assert said == []
