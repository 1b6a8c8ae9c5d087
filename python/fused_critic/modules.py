"""The operators as torch.nn modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import Number, ValueLossOutput, value_loss


class ClippedValueLoss(torch.nn.Module):
    """:func:`value_loss` with its options chosen once; it has neither parameters nor state.

    Args:
        clip_range, criterion, delta, clip_only, loss_clamp, reduction, dp_size, loss_scale_factor, time_dim: as :func:`value_loss` has them,
            with the same defaults, and kept as attributes of these names, which may be set between calls (a range that is annealed).
            Tensors among them stay where they are when the module moves to another device.

    The call takes what changes from batch to batch, all of it as :func:`value_loss` does, and raises the same errors:
    ``loss_function(values, old_values, returns, mask=None, *, batch_num_tokens=None, global_batch_size=None, cu_seqlens=None,
    group=None)``.

    Examples:
        >>> loss_function = fused_critic.ClippedValueLoss(clip_range=0.2, criterion="huber", delta=10.0)
        >>> loss, stats = loss_function(torch.tensor([[1.0]]), torch.tensor([[0.9]]), torch.tensor([[3.0]]))
        >>> loss
        tensor(2.)
    """

    def __init__(
        self,
        *,
        clip_range: Number | Tensor | tuple[Number, Number] | None = 0.2,
        criterion: str = "mse",
        delta: float = 1,
        clip_only: bool = False,
        loss_clamp: Number | None = None,
        reduction: str = "token-mean",
        dp_size: float = 1,
        loss_scale_factor: float | None = None,
        time_dim: int = -1,
    ):
        super().__init__()
        self.clip_range = clip_range
        self.criterion = criterion
        self.delta = delta
        self.clip_only = clip_only
        self.loss_clamp = loss_clamp
        self.reduction = reduction
        self.dp_size = dp_size
        self.loss_scale_factor = loss_scale_factor
        self.time_dim = time_dim

    def forward(
        self,
        values: Tensor,
        old_values: Tensor | None,
        returns: Tensor,
        mask: Tensor | None = None,
        *,
        batch_num_tokens: Number | None = None,
        global_batch_size: Number | None = None,
        cu_seqlens: Tensor | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> ValueLossOutput:
        return value_loss(
            values,
            old_values,
            returns,
            mask,
            clip_range=self.clip_range,
            criterion=self.criterion,
            delta=self.delta,
            clip_only=self.clip_only,
            loss_clamp=self.loss_clamp,
            reduction=self.reduction,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            dp_size=self.dp_size,
            loss_scale_factor=self.loss_scale_factor,
            cu_seqlens=cu_seqlens,
            time_dim=self.time_dim,
            group=group,
        )

    def extra_repr(self) -> str:
        return f"clip_range={self.clip_range}, criterion={self.criterion!r}, reduction={self.reduction!r}"
