"""PPO on CartPole-v1: rollouts laid out [T, B], a clipped value loss, and the time limit treated as what it is, a truncation.

The critic's side of PPO is fused_critic.gae and fused_critic.value_loss; everything else is plain PyTorch.
Exits with status 1 unless the policy solves the task: a mean return of at least 475 over 100 evaluation episodes.

    python examples/ppo_cartpole.py [--steps N] [--seed N] [--device cpu|cuda] [--plot PATH]
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import fused_critic
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from tqdm import tqdm

ENVS, HORIZON = 16, 128  # B and T of a rollout
EPOCHS, MINIBATCHES = 6, 4
GAMMA, LAM = 0.99, 0.95
POLICY_CLIP, VALUE_CLIP = 0.2, 0.2
REWARD_SCALE = 1 - GAMMA  # brings values and returns into [0, 1], so that VALUE_CLIP means something
VALUE_COEF, ENTROPY_COEF = 0.5, 0.005
LEARNING_RATE = 1e-3  # annealed to 0
SOLVED, EVALUATION_EPISODES = 475.0, 100


def mlp(outputs: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def make_envs(n: int) -> gym.vector.VectorEnv:
    # SAME_STEP: when an episode ends, step() resets at once. It returns the new episode's first observation, and the one in which
    # the old episode ended comes in infos["final_obs"]. So every step of the rollout is a real transition; with the default,
    # NEXT_STEP, one step after each end would be the reset itself and had to be masked.
    return gym.make_vec("CartPole-v1", n, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})


class Rollout(NamedTuple):
    observations: Tensor  # [T, B, 4]; the others are [T, B]
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    terminated: Tensor  # the pole fell: nothing comes after, the value of the next state is 0
    truncated: Tensor  # the time limit: the episode was cut off, and the state in which that happened has a value
    next_values: Tensor  # V of the state that the action led to, before any reset


class Collector:
    """Steps the environments with the current policy and keeps their state between rollouts."""

    def __init__(self, seed: int, device: torch.device):
        self.envs, self.device = make_envs(ENVS), device
        self.observations, _ = self.envs.reset(seed=seed)
        self.running = np.zeros(ENVS)
        self.returns: list[float] = []  # of the episodes that ended, in order

    @torch.no_grad()
    def collect(self, actor: nn.Module, critic: nn.Module) -> Rollout:
        steps, next_observations = [], []
        for _ in range(HORIZON):
            observations = torch.as_tensor(self.observations, device=self.device)
            policy = torch.distributions.Categorical(logits=actor(observations))
            actions = policy.sample()
            self.observations, rewards, terminated, truncated, infos = self.envs.step(actions.cpu().numpy())

            reached = self.observations.copy()
            self.running += rewards
            for i in np.flatnonzero(terminated | truncated):
                reached[i] = infos["final_obs"][i]
                self.returns.append(float(self.running[i]))
                self.running[i] = 0.0
            next_observations.append(torch.as_tensor(reached, device=self.device))

            outcome = (torch.as_tensor(x, device=self.device) for x in (REWARD_SCALE * rewards.astype(np.float32), terminated, truncated))
            steps.append((observations, actions, policy.log_prob(actions), *outcome))
        observations, actions, log_probs, rewards, terminated, truncated = (torch.stack(x) for x in zip(*steps))
        values, next_values = (critic(x).squeeze(-1) for x in (observations, torch.stack(next_observations)))
        return Rollout(observations, actions, log_probs, values, rewards, terminated, truncated, next_values)


def update(actor: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer, rollout: Rollout) -> fused_critic.ValueLossStats:
    """One PPO step on a rollout. Returns the value loss's statistics over the first epoch."""
    # An episode can be cut off anywhere in the rollout, so `truncated` needs the value of the state in which that happened: the
    # next row of `values` belongs to the next episode. The last row's next_values bootstrap the episodes that go on.
    advantages, returns = fused_critic.gae(
        rollout.rewards,
        rollout.values,
        gamma=GAMMA,
        lam=LAM,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
        next_values=rollout.next_values,
        time_dim=0,
        whiten=True,
    )

    data = [x.flatten(0, 1) for x in (*rollout[:4], advantages, returns)]
    stats: fused_critic.ValueLossStats | None = None
    for epoch in range(EPOCHS):
        for rows in torch.randperm(ENVS * HORIZON, device=returns.device).chunk(MINIBATCHES):
            observations, actions, old_log_probs, old_values, advantage, target = (x[rows] for x in data)
            policy = torch.distributions.Categorical(logits=actor(observations))
            ratio = (policy.log_prob(actions) - old_log_probs).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - POLICY_CLIP, 1 + POLICY_CLIP) * advantage)
            values = critic(observations).squeeze(-1)
            value_loss, batch_stats = fused_critic.value_loss(values, old_values, target, clip_range=VALUE_CLIP)

            optimizer.zero_grad()
            (VALUE_COEF * value_loss - gain.mean() - ENTROPY_COEF * policy.entropy().mean()).backward()
            nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
            nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
            optimizer.step()
            if epoch == 0:  # later epochs see returns that the critic was already fitted to
                stats = batch_stats if stats is None else stats + batch_stats
    assert stats is not None
    return stats


@torch.no_grad()
def evaluate(actor: nn.Module, seed: int, device: torch.device) -> float:
    """Mean return of the greedy policy over EVALUATION_EPISODES fresh episodes, one per environment."""
    envs = make_envs(EVALUATION_EPISODES)
    observations, _ = envs.reset(seed=seed)
    returns, running = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    while running.any():
        actions = actor(torch.as_tensor(observations, device=device)).argmax(dim=-1)
        observations, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        returns += rewards * running
        running &= ~(terminated | truncated)
    return float(returns.mean())


def plot(path: Path, episode_returns: list[float], stats: list[dict[str, float]], evaluation: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.scatter(range(len(episode_returns)), episode_returns, s=4, color="tab:blue", alpha=0.3, linewidths=0, label="one episode")
    window = min(50, len(episode_returns))
    if window:
        mean = np.convolve(episode_returns, np.ones(window) / window, mode="valid")
        left.plot(range(window - 1, len(episode_returns)), mean, color="tab:blue", label=f"mean of {window}")
    left.axhline(SOLVED, color="grey", linewidth=0.8, linestyle=":")
    left.axhline(evaluation, color="tab:red", linewidth=1, linestyle="--", label=f"evaluation: {evaluation:.0f}")
    left.set(title="Return of the training episodes", xlabel="episode", ylim=(0, 520))
    left.legend(loc="lower right")
    middle.plot([s["return_mean"] for s in stats], color="tab:green", label="returns")
    middle.plot([s["value_mean"] for s in stats], color="black", linestyle="--", linewidth=1, label="values")
    middle.set(title="Mean over a rollout", xlabel="PPO step", ylim=(-0.05, 1.05))
    middle.legend(loc="lower right")
    right.plot([s["loss_mean"] for s in stats], color="tab:orange")
    right.set(title="Value loss", xlabel="PPO step", yscale="log")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help=f"PPO steps, each on {ENVS * HORIZON} transitions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "out" / "ppo_cartpole.png")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    actor, critic = mlp(2, gain=0.01).to(device), mlp(1, gain=1.0).to(device)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=LEARNING_RATE, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    collector = Collector(args.seed, device)

    stats = []
    start = evaluate(actor, args.seed + 1, device)
    progress = tqdm(range(args.steps), unit="step", dynamic_ncols=True)
    for _ in progress:
        rollout = collector.collect(actor, critic)
        stats.append(update(actor, critic, optimizer, rollout).to_dict())
        schedule.step()
        recent = collector.returns[-EVALUATION_EPISODES:]
        # Explained variance means little at the end: once every episode succeeds, all returns are the same.
        progress.set_postfix_str(
            f"return {sum(recent) / max(len(recent), 1):.0f}, value loss {stats[-1]['loss_mean']:.5f}, "
            f"explained variance {stats[-1]['explained_variance']:.2f}"
        )
    end = evaluate(actor, args.seed + 1, device)

    plot(args.plot, collector.returns, stats, end)
    print(f"plot: {args.plot}")
    print(
        f"{'solved' if end >= SOLVED else 'NOT SOLVED'}: mean return over {EVALUATION_EPISODES} evaluation episodes "
        f"{start:.0f} -> {end:.0f} (solved from {SOLVED:.0f} on)"
    )
    return 0 if end >= SOLVED else 1


if __name__ == "__main__":
    sys.exit(main())
