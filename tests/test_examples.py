"""Each example runs from end to end with tiny settings; that they learn is for the full runs to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

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


def run_distributed(processes: int, *args: str) -> list[float]:
    """The figures that ppo_distributed.py prints; without torchrun for one process."""
    loopback = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
    launcher = () if processes == 1 else ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), *loopback)
    result = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "ppo_distributed.py"), "--steps", "3", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^step (\d+): value loss (\S+), explained variance (\S+)$", result.stdout, re.MULTILINE)
    assert [step for step, _, _ in found] == ["1", "3"], result.stdout
    assert f"{processes} process" in result.stdout
    return [float(x) for _, *figures in found for x in figures]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_ppo_distributed():
    alone = run_distributed(1)
    assert alone[3] > alone[1], alone  # explains more after two rollouts
    assert run_distributed(2, "--order", "head-tail") == pytest.approx(alone, rel=1e-5, abs=1e-5)
