"""Every operator in vectorised torch operations, for devices that this build has no kernel for (mps, xpu, CUDA in a CPU-only build).

Slower than the kernels, with the same semantics; says so once per operator and device type. The recurrences take log2(T) steps.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ._overloads import by_name, scans_by_name
from .stats import NUM_MOMENTS

_warned: set[tuple[str, str]] = set()


def _warn_once(op: str, x: Tensor) -> None:
    key = (op, x.device.type)
    if x.device.type == "meta" or key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"fused_critic.{op}: this build has no kernel for device type '{x.device.type}'; a slower composite of torch operations runs instead",
        stacklevel=2,
    )


def _check(op: str, reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.shape != reference.shape:
            raise ValueError(
                f"fused_critic.{op}: {name}: expected shape {list(reference.shape)} (that of {reference_name}), got {list(x.shape)}; nothing is broadcast"
            )


class _Sequences:
    """Which sequence each token of a [B, T], [T, B], [T] or packed [N] tensor belongs to."""

    def __init__(self, reference: Tensor, cu_seqlens: Tensor | None, time_dim: int):
        self.shape = reference.shape
        device = reference.device
        if cu_seqlens is not None:
            self.count = cu_seqlens.shape[0] - 1
            positions = torch.arange(reference.shape[0], device=device, dtype=cu_seqlens.dtype)
            self.index = (torch.searchsorted(cu_seqlens, positions, right=True) - 1).clamp(0, max(self.count - 1, 0))
        elif reference.dim() == 1:
            self.count = 1
            self.index = torch.zeros(reference.shape, dtype=torch.long, device=device)
        else:
            seq_dim = 1 - time_dim % 2
            self.count = reference.shape[seq_dim]
            shape = [1, 1]
            shape[seq_dim] = self.count
            self.index = torch.arange(self.count, device=device).view(shape).expand(reference.shape)
        # Time runs along dim 1 of the rows view: one row per sequence, or a single row of segments.
        self.packed = cu_seqlens is not None
        self.time_first = reference.dim() == 2 and time_dim % 2 == 0
        self.seq_len = reference.shape[0] if reference.dim() == 1 else reference.shape[time_dim]

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a per-token tensor within each sequence."""
        return x.new_zeros(self.count).index_add(0, self.index.reshape(-1), x.reshape(-1))

    def rows(self, x: Tensor) -> Tensor:
        return x.view(1, -1) if x.dim() == 1 else (x.t() if self.time_first else x)

    def unrows(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape) if len(self.shape) == 1 else (x.t() if self.time_first else x)

    def last_of_each(self) -> Tensor:
        """True at the last position of every sequence, in the rows view."""
        index = self.rows(self.index)
        last = torch.ones_like(index, dtype=torch.bool)
        last[:, :-1] = index[:, :-1] != index[:, 1:]
        return last

    def first_of_each(self) -> Tensor:
        index = self.rows(self.index)
        first = torch.ones_like(index, dtype=torch.bool)
        first[:, 1:] = index[:, 1:] != index[:, :-1]
        return first


def _criterion(name: str, delta: float):
    """The criterion of a difference and its derivative."""
    if name not in ("mse", "huber", "smooth_l1", "l1"):
        raise ValueError(f"fused_critic.value_loss: criterion: expected one of mse, huber, smooth_l1, l1, got {name!r}")
    if name == "mse":
        return lambda d: 0.5 * d * d, lambda d: d
    if name == "l1":
        return torch.abs, torch.sgn
    if not 0 < delta < float("inf"):
        raise ValueError(f"fused_critic.value_loss: delta: expected a positive, finite number for {name}, got {delta}")
    scale = 1.0 if name == "huber" else 1 / delta

    def loss(d):
        near = d.clamp(-delta, delta)
        return scale * near * (d - 0.5 * near)

    return loss, lambda d: scale * d.clamp(-delta, delta)


def _token_losses(values, old_values, returns, mask, low, high, clip, criterion, delta, clip_only, loss_clamp, dtype):
    """Weight, value, return, loss, gradient, clipped and outside flags per token; zeros at masked tokens."""
    weight = (
        torch.ones_like(values, dtype=dtype) if mask is None else (mask.to(dtype) if mask.is_floating_point() else (mask != 0).to(dtype))
    )
    valid = weight != 0
    v, ret = (torch.where(valid, x.to(dtype), 0) for x in (values, returns))
    criterion_of, derivative_of = _criterion(criterion, delta)
    error = v - ret
    loss, gradient = criterion_of(error), derivative_of(error)
    clipped = outside = torch.zeros_like(valid)
    if clip:
        old, low, high = (torch.where(valid, x.to(dtype), 0) for x in (old_values, low, high))
        lower, upper = old + low, old + high
        inside = torch.minimum(torch.maximum(v, lower), upper)
        clipped_loss = criterion_of(inside - ret)
        clipped = clipped_loss > loss
        outside = (v < lower) | (v > upper)
        poison = torch.where(inside.isnan(), inside, 0)
        loss = (clipped_loss if clip_only else torch.where(clipped, clipped_loss, loss)) + poison
        gradient = torch.where(outside if clip_only else clipped, 0, gradient) + poison
    if loss_clamp is not None:
        limit = loss_clamp.to(dtype)
        gradient = torch.where(loss > limit, 0, gradient)
        loss = torch.minimum(loss, limit)
    return weight, v, ret, loss, gradient, clipped & valid, outside & valid


def _value_loss(
    values, old_values, returns, mask=None, cu_seqlens=None, *, clip_low=-0.2, clip_high=0.2, clip=True, criterion="mse", delta=1.0,
    clip_only=False, loss_clamp=None, reduction="token-mean", batch_num_tokens=None, global_batch_size=None, dp_size=1.0,
    loss_scale_factor=None, time_dim=-1,
):  # fmt: skip
    _warn_once("value_loss", values)
    bounds = {"clip_low": clip_low, "clip_high": clip_high} if clip else {}
    bounds = {name: x for name, x in bounds.items() if isinstance(x, Tensor) and x.dim() > 0}
    _check("value_loss", "values", values, old_values=old_values if clip else None, returns=returns, mask=mask, **bounds)
    dtypes = (values.dtype, returns.dtype, old_values.dtype if clip else None, *(x.dtype for x in bounds.values()))
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    double = _moment_type(values)

    def scalar(x):
        return torch.as_tensor(0.0 if x is None else x, dtype=double, device=values.device)

    low, high = (scalar(0.0 if name in bounds else x) for name, x in (("clip_low", clip_low), ("clip_high", clip_high)))
    clamp = None if loss_clamp is None else scalar(loss_clamp)
    weight, v, ret, loss, _, clipped, outside = _token_losses(
        values, old_values, returns, mask, bounds.get("clip_low", low), bounds.get("clip_high", high), clip, criterion, delta, clip_only,
        clamp, wide,
    )  # fmt: skip
    seqs = _Sequences(values, cu_seqlens, time_dim)
    weight, v, ret, wide_loss = (x.to(double) for x in (weight, v, ret, loss))
    weighted = weight * wide_loss
    valid = weight != 0
    seq_tokens, seq_weight, seq_loss = seqs.sum(valid.to(double)), seqs.sum(weight), seqs.sum(weighted)
    non_empty = seq_tokens > 0
    error = ret - v
    infinity = float("inf")
    low_v = torch.where(valid, v, infinity).amin() if v.numel() else scalar(infinity)
    high_v = torch.where(valid, v, -infinity).amax() if v.numel() else scalar(-infinity)
    sums = [seq_tokens, seq_weight, seq_loss, weight * clipped, weight * outside]
    for x in (v, ret, error):
        sums += [weight * x, weight * x * x]
    stats = torch.stack([x.sum() for x in sums] + [non_empty.to(double).sum(), low_v, high_v])
    assert stats.numel() == NUM_MOMENTS

    total, denominator = seq_loss.sum(), scalar(1.0)
    factors = values.new_zeros(0, dtype=double)
    if reduction == "token-mean":
        denominator = seq_weight.sum() if batch_num_tokens is None else scalar(batch_num_tokens)
    elif reduction.startswith("seq-mean"):
        denominator = non_empty.to(double).sum() if global_batch_size is None else scalar(global_batch_size)
        if reduction == "seq-mean-token-mean":
            usable = non_empty & (seq_weight != 0)
            factors = torch.where(usable, 1 / torch.where(usable, seq_weight, 1.0), 0.0)
            total = (seq_loss * factors).sum()
        elif reduction == "seq-mean-token-sum-norm":
            dp_size = dp_size / (loss_scale_factor or seqs.seq_len or 1)
    scale = torch.where(denominator != 0, dp_size / torch.where(denominator != 0, denominator, 1.0), 0.0)
    if reduction == "none":
        scale, out = torch.ones_like(scale), (torch.where(valid, weighted, 0)).to(wide)
    else:
        out = torch.where(scale == 0, 0.0, total * scale).to(wide)
    return out, stats, torch.cat([torch.stack([scale, low, high]), factors, *([] if clamp is None else [clamp.reshape(1)])])


def _value_loss_backward(
    grad_loss, values, old_values, returns, mask, cu_seqlens, residuals, clip_low=None, clip_high=None, *, clip, reduction, time_dim,
    criterion="mse", delta=1.0, clip_only=False, clamp=False,
):  # fmt: skip
    _warn_once("value_loss", values)
    low, high = (residuals[i] if x is None else x for i, x in ((1, clip_low), (2, clip_high)))
    weight, _, _, _, gradient, _, _ = _token_losses(
        values, old_values, returns, mask, low, high, clip, criterion, delta, clip_only, residuals[-1] if clamp else None, grad_loss.dtype
    )
    upstream = grad_loss.to(residuals.dtype) * residuals[0]
    if reduction == "seq-mean-token-mean":
        upstream = upstream * residuals[3:][_Sequences(values, cu_seqlens, time_dim).index]
    return torch.where(weight != 0, upstream.to(gradient.dtype) * (weight * gradient), 0).to(values.dtype)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """y_t = a_t y_{t+1} + b_t along dim 1 from the right, with y = 0 beyond the end; each round doubles the composed reach."""
    reach = 1
    while reach < a.shape[1]:
        b = b + a * torch.nn.functional.pad(b[:, reach:], (0, reach))
        a = a * torch.nn.functional.pad(a[:, reach:], (0, reach), value=1.0)
        reach *= 2
    return b


def _gae(
    rewards, values, mask=None, terminated=None, truncated=None, next_values=None, bootstrap_values=None, cu_seqlens=None, *,
    gamma, lam, mask_mode="skip", time_dim=-1, returns_lam=None,
):  # fmt: skip
    _warn_once("gae", rewards)
    _check("gae", "rewards", rewards, values=values, mask=mask, terminated=terminated, truncated=truncated, next_values=next_values)
    if truncated is not None and next_values is None:
        raise ValueError("fused_critic.gae: next_values: expected a tensor beside truncated, got None")
    dtype = (
        torch.float64
        if any(x is not None and x.dtype == torch.float64 for x in (rewards, values, next_values, bootstrap_values))
        else torch.float32
    )
    seqs = _Sequences(rewards, cu_seqlens, time_dim)
    gamma, lam, returns_lam = (_factor(seqs, x, dtype) for x in (gamma, lam, returns_lam))
    valid, ends, stops = _flags(seqs, rewards, mask if mask_mode != "ignore" else None, terminated, truncated)
    reward, value = (torch.where(valid, seqs.rows(x).to(dtype), 0) for x in (rewards, values))
    base = reward - value
    if next_values is not None:
        base = base + torch.where(valid & ~stops, gamma * seqs.rows(next_values).to(dtype), 0)
    keep = (~ends).to(dtype)
    # x_t enters position t from the right; the last position of a sequence takes the sequence's own start.
    start = torch.zeros_like(base)
    if next_values is None and bootstrap_values is not None:
        start = gamma * bootstrap_values.reshape(-1).to(dtype)[seqs.rows(seqs.index)]
    last = seqs.last_of_each()
    carried = gamma * value if next_values is None else torch.zeros_like(value)

    def recursion(lam):
        a = torch.where(_is_step(valid, mask_mode), gamma * lam * keep, _MASKED_FACTOR[mask_mode])
        b = torch.where(valid, gamma * lam * base + carried, 0)
        leaving = _scan(torch.where(last, 0, a), torch.where(last, a * start + b, b))
        entering = torch.where(last, start, torch.nn.functional.pad(leaving[:, 1:], (0, 1)))
        return torch.where(valid, base + keep * entering, 0)

    advantages = recursion(lam)
    returns = torch.where(valid, (advantages if returns_lam is None else recursion(returns_lam)) + value, 0)
    return tuple(torch.empty_like(rewards, dtype=dtype).copy_(seqs.unrows(x)) for x in (advantages, returns))


# What a masked position that is no step of the recursion makes of the carry.
_MASKED_FACTOR = {"skip": 1.0, "zero": 1.0, "reset": 0.0, "ignore": 1.0}


def _is_step(valid, mask_mode):
    return torch.ones_like(valid) if mask_mode == "zero" else valid


def _factor(seqs, x, dtype):
    """gamma or a lambda, as something that broadcasts against the rows view."""
    if x is None:
        return None
    x = torch.as_tensor(x, dtype=dtype, device=seqs.index.device)
    return x if x.dim() == 0 else x[seqs.rows(seqs.index)]


def _flags(seqs, reference, mask, terminated, truncated):
    """valid, done and terminated as bool rows."""

    def flag(x):
        return torch.zeros_like(seqs.rows(reference), dtype=torch.bool) if x is None else seqs.rows(x) != 0

    valid = torch.ones_like(seqs.rows(reference), dtype=torch.bool) if mask is None else flag(mask)
    return valid, flag(terminated) | flag(truncated), flag(terminated)


def _gae_backward(
    grad_advantages, grad_returns, mask, terminated, truncated, cu_seqlens, gamma, lam, returns_lam=None, *,
    has_next_values, wanted, mask_mode, time_dim,
):  # fmt: skip
    reference = grad_advantages if grad_advantages is not None else grad_returns
    _warn_once("gae", reference)
    dtype = torch.float64 if torch.float64 in {x.dtype for x in (grad_advantages, grad_returns) if x is not None} else torch.float32
    seqs = _Sequences(reference, cu_seqlens, time_dim)
    gamma, lam, returns_lam = (_factor(seqs, x, dtype) for x in (gamma, lam, returns_lam))
    valid, ends, stops = _flags(seqs, reference, mask if mask_mode != "ignore" else None, terminated, truncated)

    def rows(x):
        return torch.zeros_like(valid, dtype=dtype) if x is None else torch.where(valid, seqs.rows(x).to(dtype), 0)

    first = seqs.first_of_each()

    def recursion(grad, lam):
        """p, and the q that enters and leaves each position."""
        # q leaves a position to the right: (1 - done) p, with p = grad + gamma lam q of the position before. Scanned on the mirrored rows.
        a = torch.where(_is_step(valid, mask_mode), torch.where(ends, 0, gamma * lam), _MASKED_FACTOR[mask_mode])
        b = torch.where(valid & ~ends, grad, 0)
        leaving = _scan(torch.where(first, 0, a).flip(1), b.flip(1)).flip(1)
        entering = torch.where(first, 0, torch.nn.functional.pad(leaving[:, :-1], (1, 0)))
        return torch.stack([grad + gamma * lam * entering, entering, leaving])

    to_returns = rows(grad_returns)
    if returns_lam is None:
        p, entering, leaving = recursion(rows(grad_advantages) + to_returns, lam)
    else:
        p, entering, leaving = recursion(rows(grad_advantages), lam) + recursion(to_returns, returns_lam)
    d_value = to_returns - p + (0 if has_next_values else gamma * entering)
    d_next = torch.where(stops, 0, gamma * p)

    def result(is_wanted, x):
        return seqs.unrows(torch.where(valid, x, 0)).contiguous() if is_wanted else reference.new_empty(0, dtype=dtype)

    d_bootstrap = reference.new_empty(0, dtype=dtype)
    if wanted[3] and not has_next_values:
        d_bootstrap = seqs.sum(seqs.unrows(torch.where(seqs.last_of_each(), gamma * leaving, 0)))
    return result(wanted[0], p), result(wanted[1], d_value), result(wanted[2] and has_next_values, d_next), d_bootstrap


def _moment_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64


def _decay_rows(seqs: _Sequences, decay, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One per position, in the rows view."""
    if not isinstance(decay, Tensor) or decay.dim() == 0:
        return torch.as_tensor(decay, dtype=dtype, device=x.device).expand(seqs.rows(x).shape)
    if decay.shape == x.shape:
        return seqs.rows(decay).to(dtype)
    if decay.shape != (seqs.count,):
        raise ValueError(
            f"fused_critic.reverse_scan: decay: expected a number, a 0-d tensor, shape [{seqs.count}] (one value per sequence) or shape "
            f"{list(x.shape)} (one per position), got shape {list(decay.shape)}"
        )
    return decay.to(dtype)[seqs.rows(seqs.index)]


def _reverse_scan_rows(seqs: _Sequences, x: Tensor, init: Tensor | None, decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y_t and y_{t+1}."""
    b, last = seqs.rows(x).to(dtype), seqs.last_of_each()
    start = torch.zeros_like(b) if init is None else init.reshape(-1).to(dtype)[seqs.rows(seqs.index)]
    y = _scan(torch.where(last, 0, decay), torch.where(last, b + decay * start, b))
    return y, torch.where(last, start, torch.nn.functional.pad(y[:, 1:], (0, 1)))


def _reverse_scan(x, init=None, cu_seqlens=None, *, decay, time_dim=-1):
    _warn_once("reverse_scan", x)
    wide = [t for t in (x, init, decay) if isinstance(t, Tensor) and t.dtype == torch.float64 and (t is not decay or t.dim() > 0)]
    dtype = torch.float64 if wide else torch.float32
    seqs = _Sequences(x, cu_seqlens, time_dim)
    y, _ = _reverse_scan_rows(seqs, x, init, _decay_rows(seqs, decay, x, dtype), dtype)
    return torch.empty_like(x, dtype=dtype).copy_(seqs.unrows(y))


def _reverse_scan_backward(grad, x, decay, init, cu_seqlens, *, wanted, time_dim):
    _warn_once("reverse_scan", grad)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    seqs = _Sequences(grad, cu_seqlens, time_dim)
    factors, first = _decay_rows(seqs, decay, grad, dtype), seqs.first_of_each()
    # What leaves a position to the right is decay p. Scanned on the mirrored rows.
    g = seqs.rows(grad).to(dtype)
    leaving = _scan(torch.where(first, 0, factors).flip(1), (factors * g).flip(1)).flip(1)
    p = g + torch.where(first, 0, torch.nn.functional.pad(leaving[:, :-1], (1, 0)))
    grad_x, grad_decay, grad_init = (grad.new_empty(0, dtype=dtype) for _ in range(3))
    if wanted[0]:
        grad_x = seqs.unrows(p).contiguous()
    if wanted[1]:
        _, following = _reverse_scan_rows(seqs, x, init, factors, dtype)
        grad_decay = seqs.unrows(p * following).contiguous()
        if decay.shape != grad.shape:
            grad_decay = grad_decay.sum() if decay.dim() == 0 else seqs.sum(grad_decay)
    if wanted[2]:
        grad_init = seqs.sum(seqs.unrows(torch.where(seqs.last_of_each(), leaving, 0)))
    return grad_x, grad_decay, grad_init


def _vtrace(
    rewards, values, log_rhos=None, ratios=None, mask=None, terminated=None, truncated=None, next_values=None, bootstrap_values=None,
    cu_seqlens=None, *, gamma, lam=1.0, rho_clip=1.0, c_clip=1.0, pg_rho_clip=1.0, time_dim=-1,
):  # fmt: skip
    _warn_once("vtrace", rewards)
    if (log_rhos is None) == (ratios is None):
        got = "neither" if ratios is None else "both"
        raise ValueError(f"fused_critic.vtrace: log_rhos: expected exactly one of log_rhos and ratios, got {got}")
    if truncated is not None and next_values is None:
        raise ValueError("fused_critic.vtrace: next_values: expected a tensor beside truncated, got None")
    tensors = (values, log_rhos, ratios, next_values)
    _check("vtrace", "rewards", rewards, values=values, log_rhos=log_rhos, ratios=ratios, mask=mask, next_values=next_values)
    wide = any(x is not None and x.dtype == torch.float64 for x in (rewards, bootstrap_values, *tensors))
    dtype = torch.float64 if wide else torch.float32

    def number(x):
        return torch.as_tensor(float("inf") if x is None else x, dtype=dtype, device=rewards.device)

    seqs = _Sequences(rewards, cu_seqlens, time_dim)
    valid, ends, stops = _flags(seqs, rewards, mask, terminated, truncated)
    reward, value = (torch.where(valid, seqs.rows(x).to(dtype), 0) for x in (rewards, values))
    ratio = seqs.rows(ratios).to(dtype) if log_rhos is None else seqs.rows(log_rhos).to(dtype).exp()
    ratio = torch.where(valid, ratio, 0)
    masked = (~valid).to(dtype)  # what a masked position multiplies the carry by
    if next_values is None:
        _, next_value = _reverse_scan_rows(seqs, seqs.unrows(value), bootstrap_values, masked, dtype)
    else:
        next_value = torch.where(valid, seqs.rows(next_values).to(dtype), 0)
    gamma, continued = number(gamma), torch.where(ends, 0, number(gamma))
    difference = reward - value + torch.where(stops, 0, gamma * next_value)
    factor = torch.where(valid, continued * number(lam) * torch.minimum(ratio, number(c_clip)), masked)
    delta = torch.minimum(ratio, number(rho_clip)) * difference
    a, following = _reverse_scan_rows(seqs, seqs.unrows(delta * valid), None, factor, dtype)
    pg = torch.minimum(ratio, number(pg_rho_clip)) * (difference + continued * following)
    return tuple(torch.empty_like(rewards, dtype=dtype).copy_(seqs.unrows(torch.where(valid, x, 0))) for x in (a + value, pg, a))


_library = torch.library.Library("fused_critic", "IMPL")
for _name, _function in scans_by_name(_reverse_scan, _reverse_scan_backward, _vtrace).items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _function in by_name(_value_loss, _value_loss_backward, _gae, _gae_backward).items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
