"""What a user's own code gets from the public functions under `mypy --strict`: `make lint` checks these types, nothing runs them."""

from __future__ import annotations

import fused_critic
import torch
from fused_critic.distributed import BatchCounts, PendingCounts, global_counts
from torch import Tensor
from typing_extensions import assert_type


def losses(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None) -> None:
    loss, stats = fused_critic.value_loss(values, old_values, returns, mask, clip_range=(0.1, torch.tensor(0.2)), reduction="token-mean")
    assert_type(loss, Tensor)
    assert_type(stats, fused_critic.ValueLossStats)
    assert_type(fused_critic.value_loss(values, None, returns, clip_range=None), fused_critic.ValueLossOutput)
    module = fused_critic.ClippedValueLoss(clip_range=0.2, criterion="huber", delta=10)
    assert_type(module.forward(values, old_values, returns, batch_num_tokens=torch.tensor(3)).loss, Tensor)


def statistics(one: fused_critic.ValueLossStats, other: fused_critic.ValueLossStats) -> None:
    assert_type(one + other, fused_critic.ValueLossStats)
    assert_type(fused_critic.ValueLossStats.merge([one, other]).explained_variance, Tensor)
    assert_type(one.all_reduce(torch.distributed.group.WORLD).to_dict(), dict[str, float])


def many_ranks(values: Tensor, returns: Tensor, mask: Tensor, group: torch.distributed.ProcessGroup) -> None:
    assert_type(fused_critic.value_loss(values, None, returns, clip_range=None, group=group).loss, Tensor)
    assert_type(global_counts([mask, mask], group=group), BatchCounts)
    assert_type(global_counts(mask, async_op=True), PendingCounts)
    tokens, sequences = global_counts(mask, group=group, async_op=True).wait()
    fused_critic.value_loss(values, values, returns, batch_num_tokens=tokens, global_batch_size=sequences, dp_size=group.size())


def advantages(rewards: Tensor, values: Tensor, lengths: Tensor) -> None:
    advantages, returns = fused_critic.gae(rewards, values, gamma=0.99, lam=torch.tensor(0.95), cu_seqlens=lengths, whiten=True)
    assert_type(advantages, Tensor)
    assert_type(fused_critic.gae(rewards, values, gamma=1, lam=1, mask_mode="reset"), fused_critic.GAEOutput)
    assert_type(fused_critic.reverse_scan(rewards, 0.99), Tensor)
    assert_type(fused_critic.vtrace(rewards, values, gamma=0.99, c_clip=None).pg_advantages, Tensor)
    assert_type(fused_critic.masked_whiten(returns, shift_mean=False), Tensor)


def misuse(values: Tensor) -> None:
    """What is wrong is an error: `warn_unused_ignores` reports each ignore that is not needed."""
    fused_critic.value_loss(values, values, values, clip_range="wide")  # type: ignore[arg-type]
    fused_critic.gae(values, values)  # type: ignore[call-arg]
    fused_critic.masked_whiten(values, eps=None)  # type: ignore[arg-type]


assert_type(fused_critic.__version__, str)
