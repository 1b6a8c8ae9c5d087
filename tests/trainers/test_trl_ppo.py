"""examples/trainers/trl_ppo.py: TRL's critic lines and ours train the same model, from the same seed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_wheel
import wheel_source

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainers" / "trl_ppo.py"
STEPS = 4
SAME = 1e-3  # Adam divides by gradients' sizes, so that rounding shows wherever a gradient is small; measured: 1e-4
TIMEOUT_SECONDS = 300  # far above what it takes: only a hang fails

for package in ("tqdm", "matplotlib", "rich"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def theirs():
    return wheel_source.or_skip(trl_wheel.Critic)


@pytest.fixture(scope="module")
def example(theirs):
    spec = importlib.util.spec_from_file_location("trl_ppo", EXAMPLE)
    module = sys.modules["trl_ppo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(example, critic, seed=0):
    """The trainer after a few steps, and its parameters before and after."""
    trainer = example.Trainer(critic, example.QUICK, seed)
    before = parameters(trainer)
    for _ in range(STEPS):
        trainer.step()
    return trainer, before, parameters(trainer)


def parameters(trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector([*trainer.policy.parameters(), *trainer.value_model.parameters()]).detach().clone()


def apart(a, b) -> float:
    """How far the two ended from each other, as a share of the way that training went."""
    assert torch.equal(a[1], b[1]), "the same start"
    return ((a[2] - b[2]).norm() / (a[2] - a[1]).norm()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_curves_agree(example, theirs, seed):
    with_theirs, with_ours = (trained(example, critic, seed) for critic in (theirs, example.FusedCritic()))
    assert len(with_ours[0].scores) == STEPS
    assert with_ours[0].scores == with_theirs[0].scores, "the scores count tokens: the same ones were sampled"
    assert apart(with_theirs, with_ours) < SAME


@pytest.mark.parametrize("constant, other", [("LAM", 0.9), ("VALUE_CLIP", 0.05)])
def test_another_critic_is_told_apart(example, theirs, monkeypatch, constant, other):
    """The agreement is no accident of a critic that does not matter: TRL's own lines with another constant end elsewhere."""
    expected = trained(example, theirs)
    monkeypatch.setattr(example, constant, other)
    assert apart(expected, trained(example, theirs)) > 10 * SAME


def test_the_example_runs(theirs, tmp_path):
    plot = tmp_path / "made" / "trl_ppo.png"
    command = [sys.executable, str(EXAMPLE), "--quick", "--steps", "2", "--seed", "3", "--plot", str(plot)]
    done = subprocess.run(command, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    for line in ("TRL's lines", "fused_critic", "critic's side of it", "the same tokens were sampled in the first 2 of 2 steps"):
        assert line in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
