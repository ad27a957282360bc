"""An op's folder needs no line outside itself: a toy beside the real ones is benched, checked, tuned and recorded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CODE = """
import contextlib, io, json
import jax, jax.numpy as jnp
from experiments.doctor import checks_of
from experiments.run import main
from gdn_jax.implementations import traced
from pallas_kernels import ops, triton_calls

def said(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    return code, json.loads(out.getvalue())

def recorded():
    from pallas_kernels.toy import toy
    return traced("auto", lambda: jax.eval_shape(lambda x: toy(x, jnp.float32(1)), jnp.ones((2, 6))), silent=True)

found = {"names": ops.names(), "before": recorded()}
found["bench"] = said("bench", "toy", "--repetitions", "1", "--impls", "auto,chunked", "--json")
triton_calls.why_not_here = lambda: None  # a CPU that passes for a Hopper device
found["tune"] = said("tune", "toy", "--repetitions", "1", "--json")
found["doctor"], found["after"] = list(checks_of("toy")), recorded()
print(json.dumps(found))
"""


def test_an_op_is_its_folder(tmp_path):
    package = tmp_path / "pallas_kernels"
    package.mkdir()
    for path in (TESTS.parent / "pallas_kernels").iterdir():
        (package / path.name).symlink_to(path)
    shutil.copytree(TESTS / "toy_op", package / "toy")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TESTS.parent)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert "toy" in found["names"] and "gated_delta_rule" in found["names"]

    code, bench = found["bench"]
    rows = {row["contender"]: row for row in bench["rows"]}
    assert code == 0 and bench["problems"] == []  # on a device whose ceilings are known it would be one
    assert rows["auto"]["refused"] == "triton: nothing was tuned on cpu"
    assert [(name, row["sizes"], row["implementation"], row["note"]) for name, row in rows.items()] == [
        ("auto", "2x8", "chunked", ""),
        ("chunked", "2x8", "chunked", ""),
        ("numpy", "2x8", "numpy", ""),
    ]
    assert all(row["forward_backward"]["ms"] > 0 for row in rows.values())

    code, table = found["tune"]
    assert code == 0 and table == json.loads((package / "toy" / "tuned.json").read_text())
    assert table["cpu"]["all"]["scale"]["tile"] in (4, 8) and table["cpu"]["all"]["entry"]["admitted"] is True

    assert [(check["op"], check["impl"], check["case"], check["failures"]) for check in found["doctor"]] == [
        ("toy", "triton", "T=6, float32", []),
        ("toy", "triton", "T=6, bfloat16", []),
    ]
    assert found["before"] == {"toy": {"impl": "chunked", "refused": "triton: nothing was tuned on cpu"}}
    assert found["after"] == {"toy": {"impl": "triton", "refused": ""}}
