"""The Triton kernels of the gated delta rule: in the interpreter against float64, and lowered to CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cuda_lowering import hopper

from pallas_kernels import triton_calls, tuned
from pallas_kernels.gated_delta_rule import (
    configurations,
    conformance,
    gated_delta_rule,
    resolve,
    triton_op,
    triton_pieces,
)
from pallas_kernels.gated_delta_rule.configurations import BLOCKS, Every64, Every128, Reverse, Scan
from pallas_kernels.gated_delta_rule.conformance import CASES
from pallas_kernels.tiles import Tiling

TABLE = tuned.read(tuned.of_package("gated_delta_rule"), BLOCKS)
OTHER_SIZES = [size for size in triton_op.SIZES if size != (64, 64)]


@pytest.mark.parametrize("case", [c for c in CASES if c.chunk == 64], ids=lambda case: case.name)
def test_interpreted_kernels_match_float64(case):
    case = dataclasses.replace(case, K=64, V=64, B=1)
    assert conformance.failures(case, "triton_interpret", seed=5) == []


@pytest.mark.parametrize("name", ["T=65", "documents"])
@pytest.mark.parametrize("K,V", OTHER_SIZES)
def test_interpreted_kernels_match_float64_at_every_size(K, V, name):
    case = next(c for c in CASES if c.name == name)
    case = dataclasses.replace(case, K=K, V=V, B=1, H=1, Hv=1, T=min(case.T, 130))
    assert conformance.failures(case, "triton_interpret", seed=6) == []


@pytest.mark.parametrize("configuration", [Every64(), Every128()], ids=["64", "128"])
def test_pairs_after_a_token_leave_nothing_in_its_dg(configuration):
    """Under strong decay dg is small beside what cancels in it, which must therefore be rounded alike."""
    case = dataclasses.replace(next(c for c in CASES if c.name == "decay 0.3"), K=64, V=64, dtype="bfloat16")
    errors = [conformance.errors(case, "triton_interpret", seed, configuration)["dg"] for seed in range(4)]
    assert np.mean(errors) < 6e-3, errors


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("decay 0.999", "no state")]


@pytest.mark.parametrize("name", ["documents", "group value", "inputs kept", *SLOW])
def test_rows_in_pieces_match_float64(name, monkeypatch):
    monkeypatch.setattr(triton_op, "SHORTEST_PIECE", 128)
    case = dataclasses.replace(next(c for c in CASES if c.name == name), K=64, V=64, B=1, T=500)
    assert triton_op.pieces(case.B, case.T, case.Hv, case.V) == 2
    assert conformance.failures(case, "triton_interpret", seed=7) == []


def test_pieces_are_cut_where_programs_are_few():
    assert triton_op.pieces(1, 65536, 8, 128) == 16 and triton_op.pieces(2, 65536, 8, 128) == 8
    assert triton_op.pieces(2, 16384, 16, 128) == triton_op.pieces(8, 4096, 6, 512) == 1
    assert triton_op.pieces(1, 4096, 8, 128) == 4 and triton_op.pieces(1, 2047, 8, 128) == 1


@pytest.mark.parametrize("reverse", [False, True], ids=["states", "gradients"])
@pytest.mark.parametrize("K,V", [(64, 64), (200, 400)])
def test_chained_pieces_match_float64(K, V, reverse):
    rows, count, heads = 2, 3, 2
    random = np.random.default_rng(0)
    maps = random.standard_normal((rows, count, heads, K, K)) / K**0.5
    local, outer = (random.standard_normal((rows, n, heads, K, V)) for n in (count, 1))
    state, want = outer[:, 0], np.zeros_like(local)
    for piece in reversed(range(count)) if reverse else range(count):
        want[:, piece] = state
        state = (np.swapaxes(maps[:, piece], -1, -2) if reverse else maps[:, piece]) @ state + local[:, piece]
    flat = lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:]), jnp.float32)  # noqa: E731
    got = triton_pieces.chain_pieces(flat(maps), flat(local), flat(outer), count=count, reverse=reverse, interpret=True)
    want = want.reshape(got.shape)
    error = np.linalg.norm(got - want, axis=(2, 3)) / np.linalg.norm(want, axis=(2, 3))
    assert error.max() < 3e-5, error


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind,entry", [(kind, e) for kind, sizes in TABLE.items() for e in sizes])
def test_every_entry_of_the_table_lowers_to_cuda(kind, entry, packed, monkeypatch):
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)  # lowering needs no device
    configuration = TABLE[kind][entry].configuration
    K, V = map(int, entry.removesuffix(" few").split("x"))
    array = jax.ShapeDtypeStruct
    key, value = array((2, 1024, 2, K), jnp.bfloat16), array((2, 1024, 4, V), jnp.bfloat16)
    gate, segments = array((2, 1024, 4), jnp.float32), array((2, 1024), jnp.int32)

    def run(q, k, v, g, beta, segments, do):
        def op(*tokens):
            given = {"segment_ids": segments if packed else None, "configuration": configuration}
            return gated_delta_rule(*tokens, **given, impl="triton")[0]

        o, vjp = jax.vjp(op, q, k, v, g, beta)
        return o, vjp(do)

    with hopper():
        lowered = jax.jit(run).trace(key, key, value, gate, gate, segments, value).lower(lowering_platforms=("cuda",))
    kernels = [line for line in lowered.as_text().splitlines() if "__gpu$xla.gpu.triton" in line]
    assert len(kernels) == len(tuned.kernels(configuration))
    # S and dS' feed products and a sum in one loop, which must wait for its products before it loads the next ones
    waiting = [line for line in kernels if "mov.b32 $0, $1;" in line]
    ahead = [line for line in waiting if "gdn_reverse" in line]
    assert bool(ahead) == configuration.reverse.ahead
    (gradients,) = set(waiting) - set(ahead)
    assert "gdn_tokens" in gradients or "gdn_chunks" in gradients
    # M1 and M2 go through memory, from all threads of the program to all
    assert [line for line in kernels if "gpu.barrier" in line] == [line for line in kernels if "gdn_chunks" in line]


def test_tiles_cover_every_column_once():
    for size in (64, 128, 192, 200, 256, 400):
        for widest in (64, 128, 256):
            owned = [c for start, width, fresh in Tiling(size, widest).tiles()
                     for c in range(start + width - fresh, start + width)]  # fmt: skip
            assert owned == list(range(size))
            assert all(start >= 0 and width >= 16 for start, width, _ in Tiling(size, widest).tiles())
            counts = Tiling(size, widest).over(owners, jnp.zeros(size, jnp.int32))
            assert counts.tolist() == [1] * size


def owners(counts, tile):
    start, width, fresh = tile
    column = jnp.arange(counts.size)
    return counts + ((start + width - fresh <= column) & (column < start + width))


def test_auto_leaves_wider_inputs_exact():
    choice = resolve("auto", key_dim=128, value_dim=128, dtype=jnp.float32)
    assert (choice.impl, choice.reason) == ("chunked", "triton: it would round float32 to bfloat16")


def test_the_lowering_is_still_there():
    assert triton_calls.AVAILABLE, "this jax has no Triton lowering of Pallas: gated_delta_rule falls back to chunked"


HELD = Scan(transposed=True)


@pytest.mark.parametrize(
    ("size", "configuration"),
    [
        ((64, 64), Every64(forward=HELD, reverse=Reverse(transposed=True))),
        ((64, 64), Every128(state=HELD, reverse=Reverse(transposed=True))),
        ((200, 400), Every128(state=HELD, reverse=Reverse(transposed=True))),
    ],
    ids=["64-64x64", "128-64x64", "128-200x400"],
)
def test_states_held_transposed_match_float64(size, configuration):
    case = dataclasses.replace(next(c for c in CASES if c.name == "T=65"), K=size[0], V=size[1], B=1, H=1, Hv=1)
    assert conformance.failures(case, "triton_interpret", seed=8, configuration=configuration) == []


@pytest.mark.parametrize(
    ("size", "block"),
    [((64, 64), 64), ((128, 64), 64), pytest.param((200, 400), 64, marks=pytest.mark.slow), ((64, 64), 128)],
)
@pytest.mark.parametrize("name", ["documents", "group value", "resets strewn in"])
def test_states_kept_every_block_match_float64(size, block, name):
    case = dataclasses.replace(next(c for c in CASES if c.name == name), K=size[0], V=size[1], B=1, T=150)
    configuration = configurations.BLOCKS[block]()
    assert conformance.failures(case, "triton_interpret", seed=9, configuration=configuration) == []


def test_the_kernels_work_with_x64_on():
    case = dataclasses.replace(next(c for c in CASES if c.name == "documents"), K=64, V=64, B=1, T=70)
    with jax.enable_x64(True):
        assert conformance.failures(case, "triton_interpret", seed=10) == []
