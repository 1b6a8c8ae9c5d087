"""Each example runs from end to end with tiny settings; that they learn is for the full runs to show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIMEOUT_SECONDS = 300  # far above what they take: only a hang fails


def run_example(name: str, plot: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--plot", str(plot), *args],
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def test_ppo_lm(tmp_path):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "made" / "on the way" / "plot.png"
    result = run_example("ppo_lm.py", plot, "--steps", "2")
    assert result.returncode == 0, result.stderr
    for line in ("fused_critic", "the formulas that verl uses, in eager PyTorch", "explained variance of the critic: ", "mean reward: "):
        assert line in result.stdout
    assert "explained variance" in result.stderr  # the progress bar
    assert plot.read_bytes().startswith(PNG_SIGNATURE)


def test_ppo_cartpole(tmp_path):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    pytest.importorskip("gymnasium")
    plot = tmp_path / "plot.png"
    result = run_example("ppo_cartpole.py", plot, "--steps", "2")
    assert result.returncode == 1, result.stderr  # two steps do not solve it, and the status says so
    assert "NOT SOLVED: mean return over 100 evaluation episodes" in result.stdout
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
