"""Whitening over the valid positions, of one process or of a whole process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _jagged
from ._collectives import check_group, gathered


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """``(x - mean) * rsqrt(var + eps)`` over the valid positions, 0 at the others.

    Mean and variance are two-pass; fewer than two valid positions give zeros, without a synchronisation. Differentiable in ``x`` where no
    ``group`` is given.

    Args:
        x: any shape, floating; or a jagged nested tensor [B, T*]; or a DTensor, sharded in any dimension or replicated, whose mean and variance
            are those of the whole: one all-gather of three numbers, differentiable.
        mask: the shape of ``x`` (jagged beside a jagged ``x``), non-zero: valid. None: all valid.
        shift_mean: False adds the mean back.
        unbiased: divide the sum of squares by n - 1 rather than n.
        eps: added to the variance.
        group: a ``torch.distributed`` process group (``torch.distributed.group.WORLD``: all ranks) over whose ranks mean and variance are
            taken, as if their positions were one tensor's. Every rank of it must make the call, also one with nothing valid or with an empty
            ``x``; shapes and dtypes may differ. Costs one all-gather of three float64 numbers, whose merge (Chan, Golub and LeVeque, 1979)
            has the same bits on every rank. None: no communication. The moments depend on every rank's ``x``, so that a gradient would
            need a second collective: an ``x`` that requires grad is an error beside a group.

    Raises:
        ValueError: a mask of another shape or device, ``group`` beside an ``x`` that requires grad, jagged beside strided arguments.
        TypeError: ``x`` is not floating, ``group`` is not a process group of this rank.
    """
    if x.is_nested or (mask is not None and mask.is_nested):
        options: dict[str, Any] = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": eps, "group": group}
        jagged: Tensor = _jagged.packed("masked_whiten", {"x": x, "mask": mask}, lambda offsets, tokens: masked_whiten(**tokens, **options))
        return jagged
    if any(x is not None and type(x) is not Tensor and hasattr(x, "device_mesh") for x in (x, mask)):
        from . import _dtensor

        if group is not None:
            raise ValueError(
                "fused_critic.masked_whiten: group: expected None beside a DTensor, whose moments are those of its device mesh"
            )
        return _dtensor.whiten(x, mask, lambda x, mask, gather: _whiten(x, mask, shift_mean, unbiased, eps, gather))
    _check(x, mask, group)
    return _whiten(x, mask, shift_mean, unbiased, eps, None if group is None else lambda moments: gathered(moments, group))


def _whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float, gather: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """gather: from this rank's moments [3] those of all ranks, [ranks, 3]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(dtype)
    if mask is None:
        valid, filled, n = None, wide, x.new_full((), x.numel(), dtype=torch.float64)
    else:
        valid = mask if mask.dtype == torch.bool else mask != 0
        filled, n = torch.where(valid, wide, 0.0), valid.count_nonzero().to(torch.float64)
    count = n.clamp(min=1)
    # Near enough to the mean for the deviations from it to be small: they give the moments.
    centre = (_sum(filled) / count).to(dtype)
    centred = wide - centre
    if valid is not None:
        centred = torch.where(valid, centred, 0.0)
    offset = _sum(centred) / count  # of the mean from the centre
    squares = _sum(centred.square()) - count * offset * offset
    if gather is not None:
        n, mean, squares = _merge(gather(torch.stack([n, centre + offset, squares])))
        offset = mean - centre
    variance = squares / (n - 1 if unbiased else n).clamp(min=1)
    scale = torch.where(n > 1, torch.rsqrt(variance + eps), 0.0)
    shift = offset * scale
    if not shift_mean:
        shift = shift - torch.where(n > 1, centre + offset, 0.0)
    whitened = (centred * scale).sub_(shift)
    if valid is not None:
        whitened = torch.where(valid, whitened, 0.0)
    return whitened.to(x.dtype)


def _sum(x: Tensor) -> Tensor:
    """The sum as float64: within a row in the type of x, where torch sums pairwise, over the rows in float64. Makes no float64 copy of x."""
    return x.sum(-1).sum(dtype=torch.float64)


def _merge(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of all ranks' positions together, from [3] of each."""
    counts, means, squares = rows.unbind(1)
    n = counts.sum()
    mean = (counts * means).sum() / n.clamp(min=1)
    return n, mean, (squares + counts * (means - mean).square()).sum()


def _check(x: Tensor, mask: Tensor | None, group: object) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"fused_critic.masked_whiten: x: expected a floating dtype, got {x.dtype}")
    if mask is not None and mask.shape != x.shape:
        raise ValueError(
            f"fused_critic.masked_whiten: mask: expected shape {list(x.shape)} (that of x), got {list(mask.shape)}; nothing is broadcast"
        )
    if mask is not None and mask.device != x.device:
        raise ValueError(f"fused_critic.masked_whiten: mask: expected device {x.device} (that of x), got {mask.device}")
    if group is None:
        return
    check_group("masked_whiten", group)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "fused_critic.masked_whiten: x: expected a tensor without gradient beside a group (the moments depend on every rank's x), "
            "got one with requires_grad; detach() it"
        )
