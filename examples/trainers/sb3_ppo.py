"""PPO on CartPole-v1 by Stable-Baselines3: with its own rollout buffer, and with fused_critic installed.

Same seed, one thread. Prints the returns and the times of both, and exits with status 1 unless the first steps have the same returns
(_report.same_returns).

    python examples/trainers/sb3_ppo.py [--steps N] [--seed N] [--quick] [--plot PATH]
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass, field

import _report
import torch
from fused_critic.integrations import sb3 as fused_sb3
from stable_baselines3 import PPO

ENVS, HORIZON = 8, 256


@dataclass
class Training:
    """What one run leaves; each list has an entry per rollout and its updates."""

    returns: list[float] = field(default_factory=list)  # mean of the last 100 episodes
    value_losses: list[float] = field(default_factory=list)
    collect_seconds: list[float] = field(default_factory=list)
    estimate_seconds: list[float] = field(default_factory=list)  # compute_returns_and_advantage, a part of the above
    train_seconds: list[float] = field(default_factory=list)
    parameters: torch.Tensor | None = None

    def run(self) -> _report.Run:
        steps = [collect + train for collect, train in zip(self.collect_seconds, self.train_seconds)]
        return _report.Run(self.returns, steps, self.estimate_seconds)


def timed(owner: object, name: str, seconds: list[float]) -> None:
    """Replaces the method of this one object by itself with a clock."""
    method = getattr(owner, name)

    def with_clock(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, with_clock)


def train(steps: int, seed: int, *, envs: int = ENVS, horizon: int = HORIZON, epochs: int = 10) -> Training:
    """`steps` rollouts with their updates."""
    from stable_baselines3.common.env_util import make_vec_env

    training = Training()
    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", envs, seed=seed), n_steps=horizon, batch_size=256, n_epochs=epochs, learning_rate=1e-3,
        gamma=0.98, gae_lambda=0.9, seed=seed, device="cpu",
    )  # fmt: skip
    timed(model, "collect_rollouts", training.collect_seconds)
    timed(model, "train", training.train_seconds)
    timed(model.rollout_buffer, "compute_returns_and_advantage", training.estimate_seconds)
    update = model.train

    def update_and_record() -> None:
        update()
        training.returns.append(statistics.fmean(episode["r"] for episode in model.ep_info_buffer))
        training.value_losses.append(float(model.logger.name_to_value["train/value_loss"]))

    model.train = update_and_record
    model.learn(steps * envs * horizon)
    training.parameters = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    return training


def both(steps: int, seed: int, **options) -> tuple[Training, Training]:
    """Ours and theirs."""
    trainings = []
    for installed in (fused_sb3.install, contextlib.nullcontext):
        with installed():
            trainings.append(train(steps, seed, **options))
    return trainings[0], trainings[1]


def main() -> int:
    arguments = _report.arguments(__doc__, steps=30, quick_steps=3, plot="sb3_ppo.png")
    torch.set_num_threads(1)
    ours, theirs = both(arguments.steps, arguments.seed)
    _report.compare(
        "Stable-Baselines3 PPO on CartPole-v1",
        ours.run(),
        theirs.run(),
        trainer="Stable-Baselines3",
        quantity="episode return",
        path=arguments.plot,
    )
    medians = [statistics.median(training.train_seconds) for training in (theirs, ours)]
    print("train(), of each step: {:.0f} ms with SB3's own, {:.0f} ms with fused_critic".format(*(1e3 * x for x in medians)))
    return 0 if _report.same_returns(ours.run(), theirs.run(), ours.value_losses, theirs.value_losses) else 1


if __name__ == "__main__":
    sys.exit(main())
