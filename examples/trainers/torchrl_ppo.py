"""PPO on CartPole-v1 by TorchRL's ClipPPOLoss: with TorchRL's GAE, and with fused_critic's GAE module in its place.

Same seed, one thread. Prints the returns and the times of both, and exits with status 1 unless the first steps have the same returns
(_report.same_returns).

    python examples/trainers/torchrl_ppo.py [--steps N] [--seed N] [--quick] [--plot PATH]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import _report
import gymnasium as gym
import torch
from fused_critic.integrations import torchrl as fused_torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import ExplorationType, GymWrapper, RewardSum, TransformedEnv, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

ENVS, HORIZON = 8, 128
EPOCHS, MINIBATCH = 6, 256


@dataclass
class Training:
    """What one run leaves; each list has an entry per rollout and its updates."""

    returns: list[float] = field(default_factory=list)  # mean of the last 100 episodes
    critic_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    estimate_seconds: list[float] = field(default_factory=list)  # the GAE module, a part of the above
    parameters: torch.Tensor | None = None

    def run(self) -> _report.Run:
        return _report.Run(self.returns, self.seconds, self.estimate_seconds)


def mlp(outputs: int) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5 if layer is not layers[-1] else 0.01)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_environment() -> TransformedEnv:
    mode = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}  # TorchRL resets where an episode has ended
    environments = gym.make_vec("CartPole-v1", ENVS, vectorization_mode="sync", vector_kwargs=mode)
    return TransformedEnv(GymWrapper(environments, categorical_action_encoding=False), RewardSum())


def train(
    gae_class: Callable[..., nn.Module], steps: int, seed: int, *, horizon: int = HORIZON, vectorized: bool | None = None
) -> Training:
    """`steps` rollouts with their updates."""
    torch.manual_seed(seed)
    environment = make_environment()
    environment.set_seed(seed)
    actor = ProbabilisticActor(
        TensorDictModule(mlp(2), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(mlp(1), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, clip_value=0.2, entropy_coeff=0.005, critic_coeff=0.5, normalize_advantage=True)
    gae = gae_class(
        gamma=0.98, lmbda=0.9, value_network=None, vectorized=vectorized
    )  # the critic is called apart, so that GAE is timed alone
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    training, ended = Training(), []
    state = environment.reset()
    for _ in range(steps):
        start = time.perf_counter()
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            rollout = environment.rollout(horizon, actor, auto_reset=False, tensordict=state, break_when_any_done=False)
        state = environment.maybe_reset(environment.step_mdp(rollout[:, -1]))
        with torch.no_grad():
            critic(rollout), critic(rollout["next"])
        before = time.perf_counter()
        gae(rollout)
        training.estimate_seconds.append(time.perf_counter() - before)
        ended += rollout["next", "episode_reward"][rollout["next", "done"]].tolist()
        training.critic_losses.append(update(loss, optimizer, rollout.reshape(-1)))
        training.seconds.append(time.perf_counter() - start)
        training.returns.append(statistics.fmean(ended[-100:]))
    training.parameters = nn.utils.parameters_to_vector(loss.parameters()).detach()
    return training


def update(loss: ClipPPOLoss, optimizer: torch.optim.Optimizer, transitions: TensorDict) -> float:
    """EPOCHS passes over the transitions; the mean of the critic's loss."""
    losses = []
    for _ in range(EPOCHS):
        for batch in transitions[torch.randperm(len(transitions))].split(MINIBATCH):
            entries = loss(batch)
            losses.append(entries["loss_critic"].item())
            optimizer.zero_grad()
            (entries["loss_objective"] + entries["loss_critic"] + entries["loss_entropy"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
    return statistics.fmean(losses)


def both(steps: int, seed: int, **options) -> tuple[Training, Training]:
    """Ours and theirs."""
    ours, theirs = (train(gae_class, steps, seed, **options) for gae_class in (fused_torchrl.GAE, GAE))
    return ours, theirs


def main() -> int:
    arguments = _report.arguments(__doc__, steps=30, quick_steps=3, plot="torchrl_ppo.png")
    torch.set_num_threads(1)
    ours, theirs = both(arguments.steps, arguments.seed)
    _report.compare(
        "TorchRL PPO on CartPole-v1", ours.run(), theirs.run(), trainer="TorchRL", quantity="episode return", path=arguments.plot
    )
    return 0 if _report.same_returns(ours.run(), theirs.run(), ours.critic_losses, theirs.critic_losses) else 1


if __name__ == "__main__":
    sys.exit(main())
