"""What generating takes, by hand and by XLA's own account; requests that do not fit; `gdn bench generate`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import generation_speed
from experiments.run import main
from experiments.variants import PAPER_MODELS, model_config
from gdn_jax import generate as module
from gdn_jax import tokenizer
from gdn_jax.decode import decode, idle_rows, layers_of
from gdn_jax.errors import UserError
from gdn_jax.generate import generate
from gdn_jax.layers import Compute
from gdn_jax.memory import cache_bytes, check_fits, needed_bytes, step_bytes
from gdn_jax.model import abstract_model, count_parameters, for_inference, init_model
from gdn_jax.prefill import begin
from gdn_jax.sampling import Sampling

FP32, BF16 = Compute(dtype=jnp.float32), Compute()
ID = "table3/gated-deltanet/tiny"


# --- bytes ---


def test_bytes_of_a_step_by_hand():
    """1.3b in bf16: the bounds of 1,100, 11,700 and 22,500 tokens/s at 3 TB/s, batch 1, 16 and 64."""
    cfg = model_config("gated-deltanet", "1.3b")
    # A_log, dt_bias and beta's bias, the norms, the convolutions stay fp32: two bytes more each
    wide = 2 * (16 * (3 * 9 + 400 + 2 * 2400 + 4 * (1800 + 1800 + 3600)) + 2400)
    parameters = 2 * count_parameters(cfg) + wide
    row = 16 * (4 * 9 * 200 * 400 + 2 * 3 * (1800 + 1800 + 3600))  # states in fp32, three inputs of each convolution
    for batch in (1, 64):
        assert step_bytes(cfg, batch, 232, BF16) == parameters + 2 * batch * row
        assert step_bytes(cfg, batch, 9**9, BF16) == step_bytes(cfg, batch, 1, BF16)
    attention = model_config("transformer", "1.3b")
    key_and_value = 20 * 2 * 2 * 2304
    assert step_bytes(attention, 8, 300, BF16) - step_bytes(attention, 8, 299, BF16) == 8 * key_and_value
    untied = replace(cfg, tied=False)
    assert step_bytes(untied, 2, 1, BF16) == step_bytes(cfg, 2, 1, BF16) + 2 * 2 * 2400, "two rows of the embedding"


def test_memory_is_constant_in_length_for_states_and_bounded_by_the_window_for_hybrids():
    def needed(name, length):
        return needed_bytes(model_config(name, "1.3b"), [length], max_tokens=64, batch_size=4, compute=BF16)

    for name in PAPER_MODELS:
        if name == "transformer":
            assert needed(name, 65_536) > 10 * needed(name, 4096)
        elif "swa" in model_config(name, "1.3b").pattern:
            assert needed(name, 1024) < needed(name, 2048) == needed(name, 65_536)
        else:
            assert needed(name, 1024) == needed(name, 65_536)


@pytest.mark.parametrize("name", ["gated-deltanet", "hgrn2", "mamba", "transformer"])
def test_a_step_updates_its_caches_in_place(name):
    """XLA's own account: what a chunk needs beside its arguments and results is less than half of a batch's caches."""
    cfg = replace(model_config(name, "tiny"), repeats=8)
    lm = abstract_model(cfg)
    rows = jax.eval_shape(lambda: idle_rows(lm, batch_size=128, room=256, compute=FP32))
    program = decode.lower(
        lm, jax.eval_shape(layers_of, lm), rows, steps=4, compute=FP32, sampling=Sampling(), vocab=257
    ).compile()
    memory, caches = program.memory_analysis(), cache_bytes(cfg, 128, 256, FP32)
    assert memory.alias_size_in_bytes >= caches > 2 * memory.temp_size_in_bytes


def uses(jaxpr, variable):
    """The primitives that take a variable, in the order in which they run; what calls hand on is followed."""
    for equation in jaxpr.eqns:
        for place in (i for i, one in enumerate(equation.invars) if one is variable):
            inner = [getattr(one, "jaxpr", one) for name, one in equation.params.items() if name.endswith("jaxpr")]
            if inner:
                yield from uses(inner[0], inner[0].invars[place])
            else:
                yield equation.primitive.name


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_a_token_reads_each_weight_once_and_as_it_lies(name):
    """Whatever else took a weight (a cast, a slice, a pad, a second product) would read it again for every token; of
    several products of one input XLA may lay out the weights anew, to make them one."""
    cfg = model_config(name, "tiny")
    lm = jax.eval_shape(lambda lm: for_inference(lm, jnp.bfloat16), abstract_model(cfg))
    for batch in (1, 3):
        rows = jax.eval_shape(lambda batch=batch: idle_rows(lm, batch_size=batch, room=64, compute=BF16))
        layers = jax.eval_shape(layers_of, lm)
        jaxpr = decode.trace(lm, layers, rows, steps=4, compute=BF16, sampling=Sampling(), vocab=257).jaxpr.jaxpr
        begin = len(jax.tree.leaves(lm))
        leaves = jax.tree_util.tree_flatten_with_path(layers)[0]
        kernels = [begin + i for i, (path, _) in enumerate(leaves) if "kernel" in jax.tree_util.keystr(path)]
        assert {x.shape[0] % 64 + x.shape[1] % 128 for x in (leaves[i - begin][1] for i in kernels)} == {0}
        mixers = [4 if mixer == "mamba" else 2 for mixer in cfg.pattern]
        assert len(kernels) == cfg.repeats * sum(mixer + 2 for mixer in mixers)
        assert {tuple(uses(jaxpr, jaxpr.invars[i])) for i in kernels} == {("dot_general",)}


# --- requests that do not fit ---


def refusal(name, lengths, batch_size, free, max_tokens=100):
    cfg = model_config(name, "1.3b")
    with pytest.raises(UserError) as error:
        check_fits(cfg, lengths, max_tokens=max_tokens, batch_size=batch_size, compute=BF16, free=free)
    return str(error.value)


def fits(name, lengths, batch_size, free, max_tokens=100):
    cfg = model_config(name, "1.3b")
    check_fits(cfg, lengths, max_tokens=max_tokens, batch_size=batch_size, compute=BF16, free=free)
    return True


def test_a_request_larger_than_memory_is_refused_with_what_would_fit():
    free = 70 * 10**9
    says = refusal("transformer", [30_000, 5], 64, free)
    assert says.startswith("64 sequences at once, the longest of 30,100 tokens, need about ")
    assert "and the device has 70.0 GB free; a batch_size of " in says
    fewer = int(re.search(r"a batch_size of (\d+) would fit", says)[1])
    assert fits("transformer", [30_000, 5], fewer, free) and refusal("transformer", [30_000, 5], fewer + 1, free)
    says = refusal("transformer", [900_000], 1, free)
    longest = int(re.search(r"one sequence of at most ([\d,]+) tokens", says)[1].replace(",", ""))
    assert fits("transformer", [longest - 100], 1, free) and refusal("transformer", [longest - 99], 1, free)
    assert "not even one would fit; take a smaller model" in refusal("mamba2", [900_000], 1, 10**6)
    assert fits("mamba2", [900_000] * 64, 64, free) and fits("transformer", [900_000], 1, None)


def test_the_engine_asks_before_it_reads(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda: 1000)
    lm = jax.jit(init_model, static_argnums=0)(model_config("gated-deltanet", "tiny"), jax.random.key(0))
    begin.clear_cache()
    with pytest.raises(UserError, match="2 sequences at once, the longest of 5 tokens, need about 0.0 GB"):
        generate(lm, tokenizer.load("byte"), ["ab", "c"], max_tokens=3, compute=FP32)
    assert begin._cache_size() == 0


# --- speeds ---


def test_a_speed_is_the_median_beside_its_floor():
    found = generation_speed._speed([2.0, 5.0, 1.0], 20, 0.5)
    assert found == {"tokens_per_s": 10, "least": 4, "most": 20, "floor_tokens_per_s": 40, "of_floor": 0.25}
    assert generation_speed._speed([2.0], 20, None)["of_floor"] is None


def test_generation_is_timed_by_batch_and_length(capsys, tmp_path):
    words = [
        "--batches",
        "2,1",
        "--prompts",
        "20",
        "--tokens",
        "20",
        "--repetitions",
        "2",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(["bench", "generate", ID, *words, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert json.loads((tmp_path / "x" / "generate.json").read_text()) == found
    assert (found["id"], found["precision"], found["parameters"], found["device"]) == (ID, "fp32", 537_874, "cpu")
    assert found["impls"]["gated_delta_rule"]["impl"] == "chunked" and found["commit"] and found["date"]
    assert [(row["batch"], row["prompt"], row["note"]) for row in found["rows"]] == [(2, 20, ""), (1, 20, "")]
    cfg = model_config("gated-deltanet", "tiny")
    for row in found["rows"]:
        assert row["cache_bytes"] == cache_bytes(cfg, row["batch"], 1, FP32) and row["peak_bytes"] is None
        assert row["decode"]["bytes"] == step_bytes(cfg, row["batch"], 30, FP32)
        for speed in (row["prefill"], row["decode"]):
            assert 0 < speed["least"] <= speed["tokens_per_s"] <= speed["most"] and speed["of_floor"] is None
    said = err.splitlines()
    assert said[0].startswith("[1/2] batch 1, prompts of 20: prefill ") and len(said) == 2, "the smallest first"
    table = (tmp_path / "x" / "generate.md").read_text().splitlines()
    assert table[2].startswith("| 2 | 20 | ") and table[2].endswith(" | unknown | ok |")
    assert "- Device: cpu; speeds of a CPU say nothing about a GPU" in table and found["peer"] is None


def test_a_row_that_does_not_fit_says_so(capsys, monkeypatch):
    from gdn_jax import memory

    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    assert main(["bench", "generate", ID, "--batches", "1", "--prompts", "20"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| 1 | 20 | not run | not run | not run | not run | not run | 0.1 | not run | 1 sequences at")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "`gdn bench generate` needs ID as its first word; `gdn list` shows all IDs."),
        ("table3/gated-deltanet/tny", "There is no experiment 'table3/gated-deltanet/tny'"),
        (f"{ID} --batches 1,x", "batches is '1,x'; it must be positive whole numbers, separated by commas."),
        (f"{ID} --prompts 0", "prompts is '0'; it must be positive whole numbers, separated by commas."),
        (f"{ID} --tokens 0", "tokens is 0; it must be positive."),
        (f"{ID} --repetitions 0", "repetitions is 0; it must be positive."),
        (f"{ID} --impl triton", "run.impl is 'triton', which cannot run gated_norm here"),
    ],
)
def test_a_mistake_gets_one_sentence(capsys, words, sentence):
    before = sorted(Path().iterdir())
    assert main(["bench", "generate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1 and sorted(Path().iterdir()) == before
