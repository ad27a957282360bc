"""The plan for scale: a line of it by hand, its measured numbers as README has them, and the page as committed."""

from pathlib import Path

import pytest

from experiments import plan

ROOT = Path(__file__).resolve().parent.parent


def test_a_line_by_hand():
    """gated-deltanet on 64 GPUs with the paper's batch: two windows a GPU, eight hosts."""
    found = plan.plan("gated-deltanet", 64, 128)
    compute = 2 * 4096 / 56_791  # 144.25 ms
    exposed = 0.042 * 2 * 7 / 8  # 73.5 ms
    sent = 2 * 7 / 8 * 4 * 1_309_295_632 / 8  # 1.1456 GB
    assert compute == pytest.approx(0.14425, rel=1e-4) and sent == pytest.approx(1.14563e9, rel=1e-5)
    assert found.seconds == pytest.approx(0.14425 + 0.0735 + 0.022913, rel=1e-4)
    assert found.tokens_per_second == pytest.approx(524_288 / 0.240663, rel=1e-4)
    assert found.efficiency == pytest.approx(0.5994, rel=1e-3)
    assert found.network_bytes == pytest.approx(sent)
    assert found.host_bytes == pytest.approx((5.88466e9 + 5.55215e9) * 7 / 8, rel=1e-5)
    assert found.peak_gib == pytest.approx(57.2 - 12.8035, rel=1e-4)
    assert exposed == pytest.approx(0.0735)


def test_one_host_sends_nothing_and_two_micro_batches_take_twice():
    one = plan.plan("gated-deltanet", 8, 64)
    assert one.network_bytes == 0 and plan.plan("gated-deltanet", 8, 128).seconds == pytest.approx(2 * one.seconds)


def test_measured_numbers_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    for model, measured in plan.MEASURED.items():
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| `{model}` |")]
        h200, h100, origin = [cell.strip() for cell in line.split("|")][3:6]
        rate = f"{round(measured.tokens_per_second, -2):,.0f}"
        if measured.device == "H200":
            assert h200 == rate and measured.origin in ("2026-11-30, c36cfca", "2026-11-30, 26a543b")
        else:
            assert (h100, origin) == (rate, measured.origin)
    assert "on an H200 on 2026-11-30 with 26a543b or c36cfca" in readme


def test_the_page_is_current():
    assert (ROOT / "docs" / "plan-for-scale.md").read_text() == plan.page(), "run: python -m experiments.plan"
