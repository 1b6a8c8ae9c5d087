"""What gae composes of reverse scans: rewards that masked positions hand over, and turns as time steps. Differentiable, deterministic, no sync."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_scan: Callable[..., Tensor] = torch.ops.fused_critic.reverse_scan.tensor


def carried_rewards(rewards: Tensor, mask: Tensor, cu_seqlens: Tensor | None, time_dim: int) -> Tensor:
    """At every valid position its own reward and those of the masked positions up to the next valid one."""
    # Beyond the end of a sequence the scan is 0, so what is rolled there does not matter.
    return _scan(rewards, (mask == 0).roll(-1, time_dim), None, cu_seqlens, time_dim=time_dim)


class Turns:
    """The turns of each sequence: maximal runs of equal ids among its valid tokens in time order."""

    def __init__(self, turn_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, time_dim: int):
        self.cu_seqlens, self.time_dim = cu_seqlens, time_dim
        self.valid = torch.ones_like(turn_ids, dtype=torch.bool) if mask is None else mask != 0
        self.starts = self._starts(turn_ids)
        # Whether the token after it, if there is one, belongs to the same turn or to none.
        self.goes_on = ~self.starts.roll(-1, time_dim)

    def _starts(self, turn_ids: Tensor) -> Tensor:
        """Valid tokens whose previous valid token has another id, or is not there."""
        if turn_ids.numel() == 0:
            return self.valid
        dim, length = self.time_dim, turn_ids.shape[self.time_dim]
        shape = [1] * turn_ids.dim()
        shape[dim] = length
        positions = torch.arange(length, device=turn_ids.device)
        begins = torch.zeros_like(positions)
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.to(torch.int64)
            sequence = torch.searchsorted(bounds, positions, right=True) - 1
            begins = bounds[sequence.clamp(0, bounds.shape[0] - 1)]
        positions, begins = positions.view(shape), begins.view(shape)
        through = torch.where(self.valid, positions, -1).cummax(dim).values  # the last valid position up to here
        previous = torch.where(positions == 0, -1, through.roll(1, dim))
        same = turn_ids.gather(dim, previous.clamp(min=0)) == turn_ids
        return self.valid & ~(same & (previous >= begins))

    def sums(self, x: Tensor) -> Tensor:
        """Of the valid tokens of a turn from each of its positions on; at its start: of all."""
        return _scan(torch.where(self.valid, x, 0), self.goes_on, None, self.cu_seqlens, time_dim=self.time_dim)

    def any(self, flags: Tensor | None) -> Tensor | None:
        return None if flags is None else self.sums((flags != 0).float())

    def last(self, x: Tensor | None) -> Tensor | None:
        """What the last valid token of a turn has, at its start."""
        if x is None:
            return None
        is_last = self.sums(torch.ones_like(x, dtype=torch.float32).detach()) == 1
        return self.sums(torch.where(is_last, x, 0))

    def spread(self, x: Tensor) -> Tensor:
        """From the start of a turn, the others being 0, to all of its valid tokens: a scan in the direction of time."""
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = x.shape[0] - cu_seqlens.flip(0)
        keep = (~self.starts).flip(self.time_dim)
        spread = _scan(x.flip(self.time_dim), keep, None, cu_seqlens, time_dim=self.time_dim).flip(self.time_dim)
        return torch.where(self.valid, spread, 0)


def check_turn_ids(turn_ids: Tensor, rewards: Tensor, mask_mode: str) -> None:
    if mask_mode != "skip":
        raise ValueError(f"fused_critic.gae: turn_ids: expected mask_mode 'skip' beside them, got {mask_mode!r}")
    if turn_ids.dtype.is_floating_point or turn_ids.dtype.is_complex or turn_ids.dtype == torch.bool:
        raise TypeError(f"fused_critic.gae: turn_ids: expected an integer dtype, got {turn_ids.dtype}")
    if turn_ids.shape != rewards.shape:
        raise ValueError(
            f"fused_critic.gae: turn_ids: expected shape {list(rewards.shape)} (that of rewards), got {list(turn_ids.shape)}; nothing is broadcast"
        )
    if turn_ids.device != rewards.device:
        raise ValueError(f"fused_critic.gae: turn_ids: expected device {rewards.device} (that of rewards), got {turn_ids.device}")
