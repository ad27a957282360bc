"""What devices send each other in a training step: gathered parameters, summed gradients, no activations."""

import dataclasses
import os
import re
from collections import Counter

import jax
import pytest

import experiments
from experiments.run import main
from gdn_jax.collectives import Collective, collectives, in_words
from gdn_jax.errors import UserError
from gdn_jax.sharding import make_mesh
from gdn_jax.train import Trainer
from gdn_jax.tree import named_leaves

ID = "table3/gated-deltanet/tiny"


LAYOUTS = [  # (devices, of them over which parameters are split)
    pytest.param((2, 1), id="2x1", marks=pytest.mark.slow),
    pytest.param((4, 1), id="4x1"),
    pytest.param((4, 2), id="4x2"),
    pytest.param((4, 4), id="4x4", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def step(request):
    count, fsdp = request.param
    experiment = experiments.get(ID)
    experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, fsdp=fsdp))
    trainer = Trainer(experiment, make_mesh(fsdp, jax.devices()[:count]))
    return count, fsdp, trainer, trainer.traced_step().lower().compile().as_text()


def test_parameters_alone_are_gathered_and_every_gradient_is_summed_once(step):
    devices, fsdp, trainer, program = step
    leaves = named_leaves(trainer.abstract[0])
    one_layer = {name: leaf.shape[1:] if "groups/" in name else leaf.shape for name, leaf in leaves.items()}
    found = collectives(program)
    gathered = [one for one in found if one.kind == "all-gather"]
    assert bool(gathered) == (fsdp > 1)
    shapes = {tuple(sorted(shape)) for shape in one_layer.values()}
    for one in gathered:  # as it is stored or transposed, of one layer or of all
        without_ones = tuple(sorted(size for size in one.shape if size > 1))
        assert without_ones in shapes or without_ones[1:] in shapes, one
    parameters = sum(leaf.size for leaf in leaves.values())
    summed = sum(count * one.bytes / 4 for one, count in found.items() if one.kind in ("all-reduce", "reduce-scatter"))
    # whole, and where devices keep parts and there are copies of each part, the parts once more; beside them the norms
    again = 1 / fsdp if 1 < fsdp < devices else 0
    assert parameters <= summed < 1.1 * (1 + again) * parameters


def test_every_device_has_rows_of_its_own(step):
    count, _, trainer, program = step
    optim, group = trainer.experiment.optim, trainer.experiment.data
    entry = program[program.index("ENTRY ") :]
    rows = re.findall(rf"s32\[(\d+),{group.seq_len + 1}\]\S* parameter\(", entry)
    assert rows and set(map(int, rows)) == {optim.batch_size // count}


def test_a_loop_counts_as_often_as_it_turns():
    program = """HloModule a
%body (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %s = f32[9]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
  %t = f32[9]{0} all-reduce(%p), replica_groups=mesh['data'=2,'fsdp'=1] {'fsdp'}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[8,2]{1,0}, f32[2]{0}) all-gather(%w, %w), dimensions={0}
}
"""
    found = collectives(program)
    gathered = {Collective("all-gather", "bf16", (8, 2)): 1, Collective("all-gather", "f32", (2,)): 1}
    assert found == Counter({Collective("all-reduce", "f32", (4,)): 3} | gathered)
    assert in_words(found) == {
        "all-gather": "2 a step, 0.0 MB on each device, the largest bf16[8,2]",
        "all-reduce": "3 a step, 0.0 MB on each device, the largest f32[4]",
    }
    with pytest.raises(UserError, match="does not know how often it turns"):
        collectives(program.replace('"known_trip_count":{"n":"3"}', ""))


def test_show_prints_them(capsys, monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # which the command sets, and other tests' processes inherit
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert main(["show", ID, "--devices", "4", "--run.fsdp", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"step\.all-gather +\d+ a step, [\d.]+ MB on each device, the largest f32\[", out)
    assert main(["show", ID, "--devices", "64"]) == 2
    assert "devices is 64 and JAX began with 4; ask in a process of its own." in capsys.readouterr().err
