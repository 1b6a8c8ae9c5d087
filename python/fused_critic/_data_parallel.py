"""Counts of valid tokens and non-empty sequences over a process group, and the share of the value loss that they give each rank.

Both are made of one asynchronous all-reduce of ``torch.distributed``, which is waited for when its result is needed. Nothing between its
start and its end depends on what a rank holds, so that every rank enters it, also one with an empty shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._collectives import check_group

_LEAST = torch.finfo(torch.float32).tiny


class BatchCounts(NamedTuple):
    """The global counts of a batch, 0-d float64 tensors on the masks' device: what :func:`fused_critic.value_loss` takes by these names."""

    batch_num_tokens: Tensor
    global_batch_size: Tensor


class PendingCounts:
    """Counts that are on their way: :meth:`wait` once, where they are needed."""

    def __init__(self, pending: _PendingSum):
        self._pending = pending

    def wait(self) -> BatchCounts:
        """The counts. On CUDA the current stream waits, not the host."""
        return BatchCounts(*self._pending.wait().unbind())


# Without the overloads a caller's type checker would have both results from every call; an overload has to repeat all parameters.
@overload
def global_counts(
    masks: Tensor | Sequence[Tensor],
    *,
    group: torch.distributed.ProcessGroup | None = None,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    time_dim: int = -1,
    device: torch.device | str | None = None,
    async_op: Literal[False] = False,
) -> BatchCounts: ...


@overload
def global_counts(
    masks: Tensor | Sequence[Tensor],
    *,
    group: torch.distributed.ProcessGroup | None = None,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    time_dim: int = -1,
    device: torch.device | str | None = None,
    async_op: Literal[True],
) -> PendingCounts: ...


def global_counts(
    masks: Tensor | Sequence[Tensor],
    *,
    group: torch.distributed.ProcessGroup | None = None,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    time_dim: int = -1,
    device: torch.device | str | None = None,
    async_op: bool = False,
) -> BatchCounts | PendingCounts:
    """Counts of all micro-batches on all ranks, with one all-reduce of two numbers: what gradient accumulation needs before its first loss.

    Args:
        masks: the mask of this rank's batch, or of each of its micro-batches (any number of them, none included), as
            :func:`fused_critic.value_loss` takes it: bool, integer or floating (weights); [B, T], [T, B] (``time_dim=0``), [T], packed [N] with
            ``cu_seqlens``, or jagged. ``torch.ones`` where everything is valid.
        group: the ``torch.distributed`` process group to count over; every rank of it must make the call. None: no communication.
        cu_seqlens: of packed masks: one tensor, or one for each mask.
        time_dim: the time dimension of 2-d masks.
        device: where the counts lie, the same kind of device on every rank. None: that of the first mask, or without any mask the CPU, so that
            a rank that may have no mask has to name it where others have theirs on a GPU.
        async_op: return at once, with a handle whose ``wait()`` returns the counts: the all-reduce runs beside the model's forward pass.

    Returns:
        ``BatchCounts(batch_num_tokens, global_batch_size)``: the sum of the weights, and the number of sequences with a valid token. Passed to
        :func:`fused_critic.value_loss` by these names, with ``dp_size=group.size()``, the parts of all micro-batches and the average over the
        ranks make the gradient of one process that holds the whole batch.

    Raises:
        TypeError: ``group`` is not a process group of this rank.
        ValueError: another number of ``cu_seqlens`` than of masks, masks, ``cu_seqlens`` or a ``time_dim`` of no such layout.
    """
    if group is not None:
        check_group("global_counts", group)
    all_masks = [masks] if isinstance(masks, Tensor) else list(masks)
    all_cu_seqlens = [cu_seqlens] if isinstance(cu_seqlens, Tensor) else [None] * len(all_masks) if cu_seqlens is None else list(cu_seqlens)
    if len(all_masks) != len(all_cu_seqlens):
        raise ValueError(
            f"fused_critic.global_counts: cu_seqlens: expected one for each of the {len(all_masks)} masks, got {len(all_cu_seqlens)}"
        )
    _check_layouts(all_masks, all_cu_seqlens, time_dim)
    if device is None:
        device = all_masks[0].device if all_masks else "cpu"
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for mask, bounds in zip(all_masks, all_cu_seqlens):
        both = torch.stack([_num_tokens(mask, mask), _num_sequences(mask, mask, bounds, time_dim)])
        counts = counts + both.to(counts.device)
    pending = PendingCounts(_PendingSum(counts, group))
    return pending if async_op else pending.wait()


class Share:
    """This rank's share of a loss over ``group``: ``options`` are those of the rank's own call, whose loss ``of`` divides by the global count.

    What is the same on every rank is checked here, so that all of them raise, or none; what may be wrong on one alone is left to the operator, which
    that rank calls after it has given its count.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup,
        tensors: dict[str, Any],
        *,
        reduction: str,
        batch_num_tokens: object,
        global_batch_size: object,
        dp_size: float,
        loss_scale_factor: float | None,
        time_dim: int,
    ):
        check_group("value_loss", group)
        _check_options(group, tensors, reduction, batch_num_tokens, global_batch_size, loss_scale_factor, time_dim)
        values, mask, cu_seqlens = (tensors[name] for name in ("values", "mask", "cu_seqlens"))
        self._pending: _PendingSum | None = None
        if reduction == "token-mean":
            self._pending = _PendingSum(_num_tokens(values, mask), group)
        elif reduction.startswith("seq-mean-"):
            self._pending = _PendingSum(_num_sequences(values, mask, cu_seqlens, time_dim), group)
        self.options: dict[str, Any] = {
            "reduction": "token-sum" if reduction == "token-mean" else reduction,
            "global_batch_size": 1,
            "dp_size": group.size() if dp_size == 1 else dp_size,
        }

    def of(self, loss: Tensor) -> Tensor:
        if self._pending is None:
            return loss
        # Nothing valid anywhere: 0 by the smallest count, whose reciprocal is finite. In the loss's dtype, so that the gradient keeps it.
        return loss / self._pending.wait().clamp(min=_LEAST).to(loss.dtype)


def _check_options(
    group: torch.distributed.ProcessGroup,
    tensors: dict[str, Any],
    reduction: str,
    batch_num_tokens: object,
    global_batch_size: object,
    loss_scale_factor: float | None,
    time_dim: int,
) -> None:
    if reduction == "none":
        raise ValueError("fused_critic.value_loss: group: expected None beside reduction 'none' (its losses are not divided), got a group")
    for name, given in (("batch_num_tokens", batch_num_tokens), ("global_batch_size", global_batch_size)):
        if given is not None:
            raise ValueError(
                f"fused_critic.value_loss: {name}: expected None beside a group, which is there to count; "
                f"for a count that is known, leave the group out and pass dp_size={group.size()}"
            )
    if reduction == "seq-mean-token-sum-norm" and loss_scale_factor is None:
        raise ValueError(
            "fused_critic.value_loss: loss_scale_factor: expected a number for seq-mean-token-sum-norm beside a group (padded lengths may "
            "differ between ranks), got None"
        )
    for name, x in tensors.items():
        if getattr(x, "device_mesh", None) is not None:
            raise ValueError(
                f"fused_critic.value_loss: group: expected None beside a DTensor ({name}), which has its own mesh, got a group"
            )
    values = tensors["values"]
    if not values.is_nested and values.dim() in (1, 2) and not -values.dim() <= time_dim < values.dim():
        raise ValueError(f"fused_critic.value_loss: time_dim: expected a dimension of values (shape {list(values.shape)}), got {time_dim}")


def _check_layouts(masks: Sequence[Tensor], cu_seqlens: Sequence[Tensor | None], time_dim: int) -> None:
    if not -2 <= time_dim < 2:
        raise ValueError(f"fused_critic.global_counts: time_dim: expected one of the dimensions of [B, T], got {time_dim}")
    for mask, bounds in zip(masks, cu_seqlens):
        if not mask.is_nested and mask.dim() not in (1, 2):
            raise ValueError(f"fused_critic.global_counts: masks: expected 1 or 2 dimensions, got shape {list(mask.shape)}")
        if bounds is not None and not mask.dim() == bounds.dim() == 1:
            raise ValueError(
                f"fused_critic.global_counts: cu_seqlens: expected [S + 1] beside a packed mask [N], got {list(bounds.shape)} beside {list(mask.shape)}"
            )


class _PendingSum:
    """The sum of a tensor over the ranks of a group, started here and finished by wait(); without a group, or in a group of one, the tensor."""

    def __init__(self, x: Tensor, group: torch.distributed.ProcessGroup | None):
        self._x = x
        self._work: torch.distributed.Work | None = None
        self._traced = False
        if group is None or group.size() == 1:
            return
        if torch.compiler.is_compiling():
            # The wrapper of torch.distributed._functional_collectives would wait at once when it is traced.
            self._x, self._traced = torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name), True
        else:
            self._work = torch.distributed.all_reduce(x, group=group, async_op=True)

    def wait(self) -> Tensor:
        if self._traced:
            self._x, self._traced = torch.ops._c10d_functional.wait_tensor(self._x), False
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._x


def _packed(reference: Any, mask: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens, the mask and the offsets of jagged tensors; others as they are."""
    if mask is not None and mask.is_nested:
        return mask.values(), mask.values(), mask.offsets()
    if reference.is_nested:
        return reference.values(), mask, reference.offsets()
    return reference, mask, cu_seqlens


def _num_tokens(reference: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of the weights, 0-d float64. No mask: the number of elements of the reference."""
    reference, mask, _ = _packed(reference, mask, None)
    if mask is None:
        return torch.full((), reference.numel(), dtype=torch.float64, device=reference.device)
    if mask.dtype.is_floating_point:
        return mask.detach().sum(dtype=torch.float64)
    return mask.count_nonzero().to(torch.float64)


def _num_sequences(reference: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, time_dim: int) -> Tensor:
    """Number of sequences with a token of non-zero weight, 0-d float64; 0 for shapes that do not go together, which the operator refuses."""
    reference, mask, cu_seqlens = _packed(reference, mask, cu_seqlens)
    if (mask is not None and mask.shape != reference.shape) or (cu_seqlens is not None and not reference.dim() == cu_seqlens.dim() == 1):
        return torch.zeros((), dtype=torch.float64, device=reference.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        if mask is not None:
            before = torch.nn.functional.pad((mask != 0).cumsum(0), (1, 0))  # valid tokens before each position
            bounds = before[bounds.clamp(0, mask.shape[0])]
        return (bounds[1:] > bounds[:-1]).count_nonzero().to(torch.float64)
    if mask is None:
        length = reference.shape[time_dim] if reference.dim() == 2 else reference.numel()
        rows = reference.numel() // max(length, 1)
        return torch.full((), rows, dtype=torch.float64, device=reference.device)
    return (mask.any(time_dim) if mask.dim() == 2 else mask.any()).count_nonzero().to(torch.float64)
