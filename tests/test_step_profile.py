"""A step by kernel family: a small trace read and classified, floors by hand, kernels known by the step's program."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import step_profile
from experiments.variants import model_config
from gdn_jax.flops import matmul_parameters
from gdn_jax.model import count_parameters
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.roofline import PEAKS, Peak

OURS = {"forward_states": "gated_delta_rule", "rows": "short_conv"}
NEEDS = {"products": {"flops": 3e9, "bytes": 0.0}, "short_conv": {"flops": 1.0, "bytes": 2e6}}
PEAK = Peak(flops=1e12, bandwidth=1e9)


def metadata(pid, name, tid=None):
    of = {"name": "process_name"} if tid is None else {"name": "thread_name", "tid": tid}
    return {"ph": "M", "pid": pid, "args": {"name": name}} | of


def events(*kernels):
    """A GPU's trace: (name, start, duration) on a stream, and once more on a derived line."""
    found = [
        metadata(1, "/device:GPU:0"), metadata(1, "Stream #14(Compute)", 14), metadata(1, "XLA Ops", 99),
        metadata(7, "/host:CPU"), metadata(7, "Stream of a host", 14),
        {"ph": "X", "pid": 7, "tid": 14, "ts": 0.0, "dur": 9e9, "name": "nvjet_of_the_host"},
    ]  # fmt: skip
    for name, start, duration in kernels:
        for tid in (14, 99):
            found.append({"ph": "X", "pid": 1, "tid": tid, "ts": start, "dur": duration, "name": name})
    return found


def test_a_recorded_trace_becomes_families(tmp_path):
    recorded = events(
        ("nvjet_hsh_256x128", 100.0, 6000.0),
        ("gemm_fusion_dot_7", 6100.0, 1000.0),
        ("forward_states", 7100.0, 500.0),
        ("forward_states_1", 7700.0, 500.0),  # 100 us later: idle
        ("loop_multiply_fusion_3", 8200.0, 800.0),
        ("MemcpyD2D", 8500.0, 200.0),  # beside the one before
        ("loop_dynamic_update_slice_fusion", 9000.0, 300.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 9300.0, 400.0),
        ("who_knows", 9700.0, 300.0),
    )
    folder = tmp_path / "plugins" / "profile" / "2026"
    folder.mkdir(parents=True)
    with gzip.open(folder / "vm.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": recorded}, file)
    read = step_profile.device_events(step_profile.read_trace(tmp_path))
    assert len(read) == 9 and read[0] == ("nvjet_hsh_256x128", 100.0, 6000.0)
    found = step_profile.profile(read, OURS, NEEDS, PEAK)
    assert {name: one["ms"] for name, one in found["families"].items()} == pytest.approx({
        "products": 7.0, "gated_delta_rule": 1.0, "elementwise": 0.8, "copies": 0.5, "softmax attention": 0.4,
        "other": 0.3, "short_conv": 0.0,
    })  # fmt: skip
    assert list(found["families"]) == [
        "products", "gated_delta_rule", "elementwise", "copies", "softmax attention", "other", "short_conv",
    ]  # fmt: skip
    assert found["busy_ms"] == pytest.approx(10.0) and found["idle_ms"] == pytest.approx(0.1)
    products = found["families"]["products"]
    assert products["share"] == pytest.approx(0.7) and products["floor_ms"] == pytest.approx(3.0)
    assert found["families"]["short_conv"]["floor_ms"] == pytest.approx(2.0), "by its bytes"
    assert [kernel["calls"] for kernel in found["families"]["gated_delta_rule"]["kernels"]] == [1, 1]
    lines = step_profile.markdown(found).splitlines()
    assert lines[2] == "| products | 7.0 | 70% | 3.0 | nvjet_hsh_256x128 x1 6.0, gemm_fusion_dot_7 x1 1.0 |"
    assert lines[-1] == "| busy | 10.0 | 100% |  | idle 0.1 |"
    without = step_profile.profile(read, OURS, NEEDS, None)
    assert without["families"]["products"]["floor_ms"] is None
    assert "| 70% | unknown |" in step_profile.markdown(without)


def test_a_cpus_trace_has_no_line_of_a_device(tmp_path):
    with jax.profiler.trace(str(tmp_path)):
        jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
    read = step_profile.read_trace(tmp_path)
    assert read and step_profile.device_events(read) == []
    assert step_profile.profile([], OURS, NEEDS, PEAK) is None


def test_the_kernels_of_a_program_are_known_by_their_op():
    """Scanned, differentiated and jitted: as in a training step."""
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    gates = jnp.full((1, 64, 1), -0.1), jnp.full((1, 64, 1), 0.5)

    def loss(q):
        def layer(x, _):
            o, _ = gated_delta_rule(x, q, q, *gates, impl="triton_interpret")
            return o, None

        return jax.lax.scan(layer, q, length=2)[0].sum().astype(jnp.float32)

    found = step_profile.kernels_of(jax.jit(jax.grad(loss)).trace(q).jaxpr)
    assert found == dict.fromkeys(("gdn_prepare", "gdn_state", "gdn_reverse", "gdn_chunks"), "gated_delta_rule")
    for suffix in ("", "_1", "__1", ".kernel"):
        assert all(step_profile.family(name + suffix, found) == "gated_delta_rule" for name in found)
    assert step_profile.kernels_of(jax.make_jaxpr(jnp.tanh)(1.0)) == {}


def test_floors_by_hand():
    """Gated DeltaNet at 1.3b, 32,768 tokens, on an H100: products 326 ms as counted from the parameters."""
    cfg, tokens = model_config("gated-deltanet", "1.3b"), 32768
    sizes = {"seq_len": 4096, "batch_size": 8}
    whole = step_profile.floors(cfg, **sizes, ours={})
    assert list(whole) == ["products", "elementwise"]
    each = {name: name for name in ("gated_delta_rule", "short_conv", "gated_norm")}
    apart = step_profile.floors(cfg, **sizes, ours=each)
    assert apart["products"]["flops"] == 6.0 * matmul_parameters(cfg) * tokens
    assert PEAKS["H100"].least_ms(*apart["products"].values()) == pytest.approx(325.7, abs=0.5)
    rule = apart["gated_delta_rule"]  # a token and head: q, k 200, v, o 400, two gates; 16 layers of 9 heads
    assert rule["bytes"] == 16 * 9 * tokens * (2 * (3 * 800 + 2 * 400) + 4 * 3 * 2)
    assert rule["flops"] == 3 * 16 * 9 * tokens * (6 * 200 * 400 + 256 * 600)
    assert apart["short_conv"]["bytes"] == 16 * tokens * 10 * 7200
    assert apart["gated_norm"]["bytes"] == tokens * 16 * 16 * 3600
    rest = count_parameters(cfg) * 38 + tokens * (65 * 10 * 2400 + 16 * 16 * 5888)
    assert apart["elementwise"]["bytes"] == rest
    for need in ("flops", "bytes"):  # an op without a kernel is in the two families
        assert sum(one[need] for one in whole.values()) == pytest.approx(sum(one[need] for one in apart.values()))


@pytest.mark.parametrize(
    ("model", "family", "least"),
    [
        ("transformer", "softmax attention", 1e13),
        ("mamba2", "linear_attention", 1e12),
        ("hgrn2", "linear_attention", 1e12),
    ],
)
def test_every_mixer_has_a_floor(model, family, least):
    cfg = model_config(model, "1.3b")
    found = step_profile.floors(cfg, seq_len=4096, batch_size=8, ours={"kernel": family})
    assert found[family]["flops"] > least and found[family]["bytes"] > 1e9
