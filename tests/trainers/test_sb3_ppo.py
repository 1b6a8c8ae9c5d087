"""Stable-Baselines3 as installed: PPO trains the same policy with fused_critic installed as without; every buffer is reached."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from fused_critic.integrations import sb3 as fused_sb3

sb3 = pytest.importorskip("stable_baselines3")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))
import sb3_ppo  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_fits_the_installed_version():
    assert all(finding.fits for finding in fused_sb3.ADAPTER.examine()), importlib.metadata.version("stable-baselines3")


@pytest.mark.parametrize("envs, horizon", [(4, 64), (1, 256)])
def test_training_is_the_same(envs, horizon):
    """Three rollouts with their updates. A last bit of an advantage is all that may differ, so actions, episodes and returns are equal."""
    ours, theirs = sb3_ppo.both(3, seed=0, envs=envs, horizon=horizon, epochs=4)
    assert ours.returns == theirs.returns and len(ours.returns) == 3
    torch.testing.assert_close(torch.tensor(ours.value_losses), torch.tensor(theirs.value_losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-4, atol=1e-5)
    earlier = sb3_ppo.train(1, seed=0, envs=envs, horizon=horizon, epochs=1).parameters
    assert not torch.allclose(ours.parameters, earlier, rtol=1e-2, atol=1e-3), "the tolerance is far below what training changes"


def test_a2c_and_dictionary_observations():
    """Both kinds of buffer, with learn() itself filling them."""
    import numpy as np
    from gymnasium import ObservationWrapper, make, spaces

    class InADictionary(ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Dict(state=env.observation_space)

        def observation(self, observation):
            return {"state": observation}

    found = {}
    for installed in (False, True):
        model = sb3.A2C("MultiInputPolicy", InADictionary(make("CartPole-v1")), n_steps=32, seed=0, device="cpu")
        if installed:
            with fused_sb3.install():
                model.learn(32)
        else:
            model.learn(32)
        assert type(model.rollout_buffer).__name__ == "DictRolloutBuffer"
        found[installed] = model.rollout_buffer.returns
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5, atol=1e-5)
