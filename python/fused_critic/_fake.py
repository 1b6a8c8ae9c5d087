"""Shapes and dtypes of every operator's outputs, for tracing (torch.compile, torch.export, meta tensors). They read no data."""

from __future__ import annotations

import torch

from ._overloads import by_name, scans_by_name
from .stats import NUM_MOMENTS

_RESIDUALS = 3  # scale, clip_low, clip_high; then one factor per sequence for seq-mean-token-mean; then a loss_clamp that is given


def _num_sequences(reference, cu_seqlens, time_dim):
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return 1 if reference.dim() == 1 else reference.shape[1 - time_dim % 2]


def _check_shapes(op, reference_name, reference, **others):
    torch._check_value(
        reference.dim() in (1, 2),
        lambda: f"fused_critic.{op}: {reference_name}: expected 1 or 2 dimensions, got shape {list(reference.shape)}",
    )
    for name, x in others.items():
        if x is None:
            continue
        torch._check_value(
            x.dim() == reference.dim() and all(a == b for a, b in zip(x.shape, reference.shape)),
            lambda name=name, x=x: (
                f"fused_critic.{op}: {name}: expected shape {list(reference.shape)} (that of {reference_name}), "
                f"got {list(x.shape)}; nothing is broadcast"
            ),
        )


def _accumulation_type(*tensors):
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _value_loss(
    values, old_values, returns, mask=None, cu_seqlens=None, *, clip_low=None, clip_high=None, clip=True, criterion="mse", delta=1.0,
    clip_only=False, loss_clamp=None, reduction="token-mean", batch_num_tokens=None, global_batch_size=None, dp_size=1.0,
    loss_scale_factor=None, time_dim=-1,
):  # fmt: skip
    bounds = {"clip_low": clip_low, "clip_high": clip_high} if clip else {}
    bounds = {name: x for name, x in bounds.items() if isinstance(x, torch.Tensor) and x.dim() > 0}
    _check_shapes("value_loss", "values", values, old_values=old_values if clip else None, returns=returns, mask=mask, **bounds)
    dtype = _accumulation_type(values, old_values if clip else None, returns, *bounds.values())
    loss = torch.empty_like(values, dtype=dtype) if reduction == "none" else values.new_empty((), dtype=dtype)
    residuals = _RESIDUALS + (loss_clamp is not None)
    residuals += _num_sequences(values, cu_seqlens, time_dim) if reduction == "seq-mean-token-mean" else 0
    return loss, values.new_empty(NUM_MOMENTS, dtype=torch.float64), values.new_empty(residuals, dtype=torch.float64)


def _value_loss_backward(
    grad_loss, values, old_values, returns, mask, cu_seqlens, residuals, clip_low=None, clip_high=None, *, clip, reduction, time_dim,
    criterion="mse", delta=1.0, clip_only=False, clamp=False,
):  # fmt: skip
    return torch.empty_like(values)


def _gae(
    rewards, values, mask=None, terminated=None, truncated=None, next_values=None, bootstrap_values=None, cu_seqlens=None, *,
    gamma, lam, mask_mode="skip", time_dim=-1, returns_lam=None,
):  # fmt: skip
    _check_shapes("gae", "rewards", rewards, values=values, mask=mask, terminated=terminated, truncated=truncated, next_values=next_values)
    dtype = _accumulation_type(rewards, values, next_values, bootstrap_values)
    return torch.empty_like(rewards, dtype=dtype), torch.empty_like(rewards, dtype=dtype)


def _gae_backward(
    grad_advantages, grad_returns, mask, terminated, truncated, cu_seqlens, gamma, lam, returns_lam=None, *,
    has_next_values, wanted, mask_mode, time_dim,
):  # fmt: skip
    reference = grad_advantages if grad_advantages is not None else grad_returns
    dtype = _accumulation_type(grad_advantages, grad_returns)
    none = reference.new_empty(0, dtype=dtype)

    def per_token(is_wanted):
        return reference.new_empty(reference.shape, dtype=dtype) if is_wanted else none.clone()

    bootstrap = wanted[3] and not has_next_values
    return (
        per_token(wanted[0]),
        per_token(wanted[1]),
        per_token(wanted[2] and has_next_values),
        reference.new_empty(_num_sequences(reference, cu_seqlens, time_dim), dtype=dtype) if bootstrap else none,
    )


def _reverse_scan(x, init=None, cu_seqlens=None, *, decay, time_dim=-1):
    _check_shapes("reverse_scan", "x", x)
    wide = decay if isinstance(decay, torch.Tensor) and decay.dim() > 0 else None
    return torch.empty_like(x, dtype=_accumulation_type(x, init, wide))


def _reverse_scan_backward(grad, x, decay, init, cu_seqlens, *, wanted, time_dim):
    def result(is_wanted, shape):
        return grad.new_empty(shape if is_wanted else (0,), dtype=_accumulation_type(grad))

    return result(wanted[0], grad.shape), result(wanted[1], decay.shape), result(wanted[2], (_num_sequences(grad, cu_seqlens, time_dim),))


def _vtrace(
    rewards, values, log_rhos=None, ratios=None, mask=None, terminated=None, truncated=None, next_values=None, bootstrap_values=None,
    cu_seqlens=None, *, gamma, lam=1.0, rho_clip=1.0, c_clip=1.0, pg_rho_clip=1.0, time_dim=-1,
):  # fmt: skip
    _check_shapes(
        "vtrace", "rewards", rewards, values=values, log_rhos=log_rhos, ratios=ratios, mask=mask, terminated=terminated, truncated=truncated,
        next_values=next_values,
    )  # fmt: skip
    dtype = _accumulation_type(rewards, values, log_rhos, ratios, next_values, bootstrap_values)
    return tuple(torch.empty_like(rewards, dtype=dtype) for _ in range(3))


for _name, _function in scans_by_name(_reverse_scan, _reverse_scan_backward, _vtrace).items():
    torch.library.register_fake(f"fused_critic::{_name}", _function)
for _name, _function in by_name(_value_loss, _value_loss_backward, _gae, _gae_backward).items():
    torch.library.register_fake(f"fused_critic::{_name}", _function)
