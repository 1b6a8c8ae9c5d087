"""examples/trainers/verl_critic.py: verl's critic's update, with its own functions and with ours, on the same model from the same seed.

In a process of its own, since stand-ins for verl's dependencies stay in sys.modules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl_wheel
import wheel_source

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainers" / "verl_critic.py"
STEPS = 3
SAME = 1e-5  # of weights that Adam has moved by a few times 1e-3: rounding, divided by gradients that may be small
TIMEOUT_SECONDS = 300  # far above what it takes: only a hang fails

for package in ("tqdm", "matplotlib", "rich"):
    pytest.importorskip(package)

RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, verl_critic

def trained(installed, steps):
    trainer = verl_critic.Trainer(modules, installed, verl_critic.QUICK, seed=0)
    for _ in range(steps):
        trainer.step()
    return trainer

def operators(trainer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step()
    names = [event.name for event in profile.events()]
    return [names.count(f"fused_critic::{name}") for name in ("gae", "value_loss", "value_loss_backward")]

def furthest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))

def weights(trainer):
    return trainer.critic.parameters()

steps, modules = int(sys.argv[2]), verl_critic.verl_modules()
blocks = verl_critic.contextlib.nullcontext, verl_critic.fused_verl.install
theirs, ours = (trained(block, steps) for block in blocks)
trained_weights = [x.detach().clone() for x in weights(theirs)]
found = {
    "gradients": furthest(theirs.first_gradients, ours.first_gradients) / max(x.abs().max().item() for x in theirs.first_gradients),
    "weights": furthest(weights(theirs), weights(ours)),
    "moved": furthest(weights(theirs), weights(trained(blocks[0], 0))),
    "curves": [list(map(float, trainer.run.curve)) for trainer in (theirs, ours)],
    "metrics": [[float(x.aggregate() if hasattr(x, "aggregate") else x) for m in t.metrics for _, x in sorted(m.items())] for t in (theirs, ours)],
    "clipped": max(float(m["critic/vf_clipfrac"]) for m in theirs.metrics),
    "calls": [operators(trainer) for trainer in (theirs, ours)],
    "other weights": [],
}
for name, value in (("GAMMA", 0.94), ("LAM", 0.9)):
    before = getattr(verl_critic, name)
    setattr(verl_critic, name, value)
    found["other weights"].append(furthest(weights(trained(blocks[0], steps)), trained_weights))
    setattr(verl_critic, name, before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def verl_root():
    return wheel_source.or_skip(verl_wheel.unpacked)


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True,
                          timeout=TIMEOUT_SECONDS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losses_gradients_and_weights_agree(verl_root):
    """And the comparison tells another critic apart: verl's own functions with another constant end elsewhere."""
    found = json.loads(run("-c", RUN, EXAMPLE.parent, STEPS))
    updates = 4 * 2  # per step: epochs, micro-batches
    assert found["calls"] == [[0, 0, 0], [1, updates, updates]]
    assert found["clipped"] > 0
    assert found["gradients"] < 1e-6
    assert found["weights"] < SAME < 1e-3 * found["moved"]
    assert all(difference > 10 * SAME for difference in found["other weights"])
    theirs, ours = found["curves"]
    assert len(ours) == STEPS and ours == pytest.approx(theirs, rel=1e-5)
    theirs, ours = found["metrics"]
    assert len(ours) == 3 * updates * STEPS and ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_the_example_runs(verl_root, tmp_path):
    plot = tmp_path / "made" / "verl_critic.png"
    printed = run(EXAMPLE, "--quick", "--steps", 2, "--seed", 3, "--plot", plot)
    for line in ("verl", "fused_critic", "critic's side of it", "largest gap of the curves", "difference of the two critics' weights"):
        assert line in printed
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
