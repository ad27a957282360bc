"""What a stranger gets: the wheel works outside the checkout, and the Python of README and docs runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parent.parent


PYTHONS = ("3.11", "3.12", "3.13")
SMOKE = "smoke/gated-deltanet"


def run(*words, **more):
    return subprocess.run(words, capture_output=True, text=True, **({"timeout": 300} | more))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree's files."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(source))
    assert build.returncode == 0, build.stderr[-2000:]
    (wheel,) = directory.glob("gdn_jax-*.whl")
    return wheel


def python(version):
    """An interpreter of this version, on the path or where pyenv keeps them; None where there is none."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    asks = "import sys; sys.exit('%d.%d' % sys.version_info[:2] != sys.argv[1])"
    for found in (*sorted(map(str, root.glob(f"{version}.*/bin/python"))), shutil.which(f"python{version}")):
        if found and run(found, "-c", asks, version).returncode == 0:
            return found
    return None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_alone_gives_the_readmes_numbers(wheel, tmp_path, version):
    """Installed with its dependencies by pip, run in an empty folder; the loss and the data are those README names."""
    if not (interpreter := python(version)):
        pytest.skip(f"no Python {version} here")
    place, environment = tmp_path / "empty", tmp_path / "venv"
    place.mkdir()
    assert run(interpreter, "-m", "venv", str(environment)).returncode == 0
    install = run(str(environment / "bin/pip"), "install", "-q", str(wheel), timeout=900)
    assert install.returncode == 0, install.stderr[-2000:]
    cleared = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    began = time.monotonic()
    ended = run(
        str(environment / "bin/gdn"), "run", SMOKE, cwd=place, env=cleared | {"JAX_PLATFORMS": "cpu"}, timeout=900
    )
    seconds = time.monotonic() - began
    assert ended.returncode == 0, ended.stderr[-2000:]
    loss, data = re.search(
        r"It ends at (\d\.\d+) nats a byte .* on data (\w{8}),", (ROOT / "README.md").read_text()
    ).groups()
    (result,) = place.glob(f"runs/{SMOKE}/*/result.json")
    row = json.loads(result.read_text())
    jax_version, loss_here = row["environment"]["versions"]["jax"], row["validation"]["nats_per_byte"]
    print(
        f"Python {version}, jax {jax_version}: {loss_here:.5f}, data {row['validation']['data'][:8]}, {seconds:.0f} s"
    )
    assert abs(loss_here - float(loss)) < 0.005
    assert row["validation"]["data"].startswith(data) and f"fingerprint {data}" in ended.stderr
    assert f"{loss_here:.4f}" in ended.stdout


def test_the_wheel_runs_gdn_list_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    install = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel))
    assert install.returncode == 0, install.stderr[-2000:]
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    code = "import sys, experiments.run as r; print(r.__file__); sys.exit(r.main(['list', 'smoke/*']))"
    listed = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.startswith(str(site)) and "smoke/gated-deltanet " in listed.stdout
    table = code.replace("['list', 'smoke/*']", "['table', 'table3', '--scale', 'tiny']")
    rows = run(sys.executable, "-c", table, cwd=tmp_path, env=environment).stdout
    assert rows.count("data b962150d") == 10  # the published rows, without a checkout
    assert (site / "gdn_jax/corpus/NOTICE.md").exists() and (site / "gdn_jax/corpus/english_novels.jsonl.gz").exists()
    readmes = sorted(str(path.relative_to(site)) for path in site.rglob("README.md"))
    others = ("linear_attention", "linear_cross_entropy", "selective_scan", "short_conv")
    ops = ("gated_delta_rule", "gated_norm", *others)
    assert readmes == ["experiments/README.md", *(f"pallas_kernels/{op}/README.md" for op in ops)]


@pytest.mark.parametrize(("path", "entries"), [("LOG.md", 15), ("pallas_kernels/LOG.md", 16)])
def test_lab_notes_are_newest_first_and_each_title_has_its_verdict(path, entries):
    titles = re.findall(r"^## (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
    dates = [re.match(r"(\d{4}-\d\d-\d\d): \w", title)[1] for title in titles]
    assert len(titles) >= entries and dates == sorted(dates, reverse=True)
    assert [title for title in titles if not re.search(r"\((kept|lost|wrong prediction)\b[^()]*\)$", title)] == []


def test_the_pages_python_runs():
    pages = "".join(
        (ROOT / page).read_text() for page in ("README.md", "docs/evaluate.md", "docs/generate-and-convert.md")
    )
    blocks = re.findall(r"```python\n(.*?)```", pages, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks[2:]:  # these open a run that smoke's and the tables' own tests make: here their names exist
        compile(block, "README.md", "exec")
        exec("\n".join(line for line in block.splitlines() if line.startswith(("from", "import"))), {})
    key, value, gate = jnp.ones((1, 5, 2, 4)) / 2, jnp.ones((1, 5, 2, 8)), jnp.zeros((1, 5, 2))
    names = dict(zip(("q", "k", "v", "g", "beta"), (key, key, value, gate, gate), strict=True))
    names |= {f"{name}2": x for name, x in names.items()} | {"tokens": jnp.zeros((1, 8), jnp.int32)}
    for block in blocks[:2]:
        exec(block, names)
    assert names["o"].shape == (1, 5, 2, 8) and names["state"].shape == (1, 2, 4, 8)
    assert names["hidden"].shape == (1, 8, 512) and names["hidden"].dtype == jnp.bfloat16
    assert names["model"].logits(names["hidden"]).shape == (1, 8, 320)
    assert jax.tree.leaves(names["model"])[0].dtype == jnp.float32
