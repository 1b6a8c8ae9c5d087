"""What all functions that take a process group have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def check_group(function: str, group: object) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"fused_critic.{function}: group: expected a torch.distributed process group that this rank is in, got {type(group).__name__}"
        )


def gathered(x: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """x of each rank, [ranks, *x.shape], the same bits on all of them: one all-gather, of which torch.compile makes a functional collective.

    group: None is the default group.
    """
    ranks = torch.distributed.get_world_size(group)
    everywhere = x.new_empty(ranks * x.numel())  # flat, as every backend takes it
    torch.distributed.all_gather_into_tensor(everywhere, x.flatten(), group=group)
    return everywhere.view(ranks, *x.shape)
