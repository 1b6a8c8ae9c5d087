"""The critic's side of PPO on several processes: FSDP2, sequences sharded along time, advantages by context-parallel GAE.

A fixed policy walks at random on a ring of ten positions; a visit to position 0 pays 1, and an episode ends with a small chance at every step,
so that episodes differ in length and what lies behind their end is masked. The critic learns what the walk is worth from each position.

Every process holds a part of the time of every episode, as context parallelism leaves it, and a shard of the critic's parameters. Values are
computed where their tokens are; fused_critic.distributed.context_parallel_gae exchanges two numbers per episode and process; the value loss is
divided by the global number of tokens, so that the gradients which FSDP2 averages are those of one process; statistics merge over the
processes. Every number of processes computes the same up to the rounding of float32.

    torchrun --nproc-per-node 2 examples/ppo_distributed.py [--steps N] [--order contiguous|head-tail] [--seed N] [--device cpu|cuda]
    python examples/ppo_distributed.py
"""

import argparse
import os
import time
from typing import NamedTuple

import fused_critic
import torch
import torch.distributed as dist
from fused_critic.distributed import context_parallel_gae
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

POSITIONS = 10
EPISODES, LENGTH = 64, 256  # of a rollout; LENGTH is to be divisible by twice the number of processes
END_CHANCE = 0.01
EPOCHS, MINIBATCHES = 2, 2
GAMMA, LAM, VALUE_CLIP = 0.9, 0.95, 0.2
LEARNING_RATE = 3e-3


class Rollout(NamedTuple):
    """This process's part of the time of every episode."""

    positions: Tensor  # [EPISODES, LENGTH / processes, 2]: the one before and the one after the move; the others lack the last dimension
    rewards: Tensor
    terminated: Tensor
    mask: Tensor


def sample(generator: torch.Generator, part: Tensor, device: torch.device) -> Rollout:
    """One rollout, the same on every process, of which each keeps its part: here as cheap as sending it."""
    moves = torch.randint(-1, 2, (EPISODES, LENGTH + 1), generator=generator)
    positions = (torch.randint(POSITIONS, (EPISODES, 1), generator=generator) + moves.cumsum(1)) % POSITIONS
    terminated = torch.rand(EPISODES, LENGTH, generator=generator) < END_CHANCE
    mask = terminated.cumsum(1) - terminated.long() == 0  # up to and including the end
    whole = (positions.unfold(1, 2, 1), (positions[:, 1:] == 0).float(), terminated, mask)
    return Rollout(*(x[:, part].to(device) for x in whole))


class Critic(nn.Module):
    """The value of the last move's two positions."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(POSITIONS, dim)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.head = nn.Linear(dim, 1)

    def forward(self, positions: Tensor) -> Tensor:
        values: Tensor = self.head(self.mlp(self.embedding(positions).flatten(-2)))
        return values.squeeze(-1).clone()  # FSDP2 hooks the output, which therefore is not to be a view


def own_part(order: str) -> Tensor:
    """Which of the LENGTH time steps this process holds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if order == "contiguous":
        return torch.arange(LENGTH).chunk(ranks)[rank]
    chunks = torch.arange(LENGTH).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def update(critic: nn.Module, optimizer: torch.optim.Optimizer, rollout: Rollout, order: str) -> fused_critic.ValueLossStats:
    """The epochs of one rollout. Returns the statistics of the first, over all processes."""
    group = dist.group.WORLD
    assert group is not None
    with torch.no_grad():
        old_values = critic(rollout.positions)
        _, returns = context_parallel_gae(
            rollout.rewards, old_values, rollout.mask, group=group, order=order, gamma=GAMMA, lam=LAM, terminated=rollout.terminated
        )
    stats = []
    for epoch in range(EPOCHS):
        for rows in torch.arange(EPISODES).chunk(MINIBATCHES):
            values = critic(rollout.positions[rows])
            loss, batch = fused_critic.value_loss(
                values, old_values[rows], returns[rows], rollout.mask[rows], clip_range=VALUE_CLIP, group=group
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch == 0:
                stats.append(batch)
    return fused_critic.ValueLossStats.merge(stats).all_reduce()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--order", choices=("contiguous", "head-tail"), default="contiguous")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

    backend = "gloo" if args.device == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # without torchrun: a group of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    ranks = dist.get_world_size()
    if LENGTH % (2 * ranks):
        raise SystemExit(f"{LENGTH} steps of time cannot be cut into {2 * ranks} equal chunks")
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)

    torch.manual_seed(args.seed)  # every process begins with the same critic, of which it keeps a shard
    critic = Critic().to(device)
    mesh = init_device_mesh(args.device, (ranks,))
    fully_shard(critic.mlp, mesh=mesh)
    fully_shard(critic, mesh=mesh)
    optimizer = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE)
    generator, part = torch.Generator().manual_seed(args.seed), own_part(args.order)

    start = time.perf_counter()
    for step in range(args.steps):
        figures = update(critic, optimizer, sample(generator, part, device), args.order).to_dict()
        if dist.get_rank() == 0 and (step % 10 == 9 or step in (0, args.steps - 1)):
            print(
                f"step {step + 1}: value loss {figures['loss_mean']:.6f}, explained variance {figures['explained_variance']:.6f}",
                flush=True,
            )
    if dist.get_rank() == 0:
        print(f"{ranks} process{'es' if ranks > 1 else ''}, {args.order}: {args.steps} steps in {time.perf_counter() - start:.1f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
