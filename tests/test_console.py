"""`gdn` as a process of its own: interrupts, devices that are not there, folders of the user's in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GDN = Path(sys.executable).with_name("gdn")
STOPPED = "Stopped; what was finished before is kept.\n"


def gdn(*words, code=None, **environment):
    command = [GDN, *words] if code is None else [sys.executable, "-c", code, *words]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["tyro", "jax"])
def test_an_interrupt_during_an_import_is_one_sentence(module, tmp_path):
    """The module interrupts its own import and hides what Python's handler would raise, as extension modules do."""
    text = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    1 / 0\n"
    (tmp_path / f"{module}.py").write_text(text)
    done = gdn("show", "smoke/mamba", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", STOPPED)


def test_an_interrupt_that_python_drops_comes_again():
    code = """
import os, signal, time
from gdn_jax.console import take_interrupts
take_interrupts()
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
try:
    Dropping()
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = gdn(code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_a_platform_that_is_not_here(name):
    done = gdn("show", "smoke/mamba", JAX_PLATFORMS=name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"JAX_PLATFORMS is {name!r}, and jax has none here; unset it, or set it to cpu.\n"


def test_folders_of_the_users_do_not_stand_in_the_way(tmp_path):
    """Named as our packages, as packages and as plain folders; beside a file that is run, too."""
    for name in ("experiments", "gdn_jax", "pallas_kernels", "jax"):
        (tmp_path / name).mkdir()
    (tmp_path / "experiments/__init__.py").write_text("1 / 0\n")
    (tmp_path / "my.py").write_text("import experiments\nA = experiments.get('smoke/mamba')\n")
    for words in (["list", "smoke/mamba"], ["show", "smoke/mamba"], ["show", "my.py:A"]):
        done = gdn(*words)
        assert done.returncode == 0 and "569,472" in done.stdout, done.stderr
