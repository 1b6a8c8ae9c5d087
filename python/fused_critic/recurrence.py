"""The public recurrences beside GAE: the reverse scan and V-trace. All checks of tensors are the operators' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import Number, _as_tensor, _has_tensor, _keyword_defaults

_reverse_scan: Callable[..., Tensor] = torch.ops.fused_critic.reverse_scan.default
_reverse_scan_tensor: Callable[..., Tensor] = torch.ops.fused_critic.reverse_scan.tensor
_vtrace = torch.ops.fused_critic.vtrace.default
_vtrace_tensor = torch.ops.fused_critic.vtrace.tensor
_VTRACE_DEFAULTS = _keyword_defaults(_vtrace)  # not passed on: parsing them would cost much of the call


class VTraceOutput(NamedTuple):
    """All of the rewards' shape; float32, or float64 if any input is. 0 at masked positions; without gradient.

    ``vs``: the value targets. ``pg_advantages``: the advantages of the policy gradient. ``advantages``: ``vs - values``.
    """

    vs: Tensor
    pg_advantages: Tensor
    advantages: Tensor


def reverse_scan(x: Tensor, decay: Number, init: Tensor | None = None, *, cu_seqlens: Tensor | None = None, time_dim: int = -1) -> Tensor:
    r"""First-order linear recurrence from the last position of each sequence to its first, parallel in time on CUDA:

    .. math:: y_t = x_t + decay_t\, y_{t+1}, \qquad y_{T+1} = init

    Differentiable in ``x``, ``decay`` and ``init``: with :math:`g` the gradient of :math:`y`, that of :math:`x_t` is
    :math:`p_t = g_t + decay_{t-1}\, p_{t-1}`, that of :math:`decay_t` is :math:`p_t\, y_{t+1}` (summed where several positions share a decay)
    and that of ``init`` is :math:`decay_T\, p_T`. Accumulated in float32 (float64 if any input is). Deterministic.

    Recipes, for rewards ``r``, values ``v`` and the value ``b`` after the end:

    - discounted returns: ``reverse_scan(r, gamma, b)``
    - TD(lambda) returns: ``reverse_scan(r + gamma * (1 - lam) * v_next, gamma * lam, b)``, ``v_next`` being ``v`` one position on and ``b`` last
    - GAE: ``reverse_scan(r + gamma * v_next - v, gamma * lam)`` (:func:`gae` has masks and flags, and reads and writes less)
    - eligibility traces, which run forward in time: ``reverse_scan(g.flip(-1), gamma * lam).flip(-1)``
    - sums up to the end: ``reverse_scan(x, 1)``

    Args:
        x: [B, T], [T, B] (``time_dim=0``), [T], or packed [N] with ``cu_seqlens``; float64, float32, bfloat16 or float16, any strides.
        decay: a number or 0-d tensor; one per sequence ([B], or [S] when packed), any floating dtype; or one per position (the shape of
            ``x``; any floating dtype, or bool for 0 and 1). A tensor of the shape of ``x`` is one per position, also where [S] would have
            that shape. The decay of the last position multiplies ``init``.
        init: one per sequence, any floating dtype. None: 0.
        cu_seqlens, time_dim: as for :func:`value_loss`.

    Returns:
        y, of the shape of ``x``; float32, or float64 if ``x``, ``init`` or a ``decay`` that is not 0-d is.

    Raises:
        ValueError: shapes or devices that differ (nothing is broadcast), bad ``cu_seqlens``.
        TypeError: a dtype that is not supported.
    """
    if isinstance(decay, Tensor):
        return _reverse_scan_tensor(x, decay, init, cu_seqlens, time_dim=time_dim)
    if torch.compiler.is_compiling():
        return _reverse_scan_tensor(x, _as_tensor(decay, x), init, cu_seqlens, time_dim=time_dim)
    return _reverse_scan(x, init, cu_seqlens, decay=decay, time_dim=time_dim)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_rhos: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ratios: Tensor | None = None,
    gamma: Number,
    lam: Number = 1.0,
    rho_clip: Number | None = 1.0,
    c_clip: Number | None = 1.0,
    pg_rho_clip: Number | None = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_dim: int = -1,
) -> VTraceOutput:
    r"""V-trace, the off-policy corrected value targets and advantages of IMPALA (Espeholt et al. 2018, arXiv:1802.01561, section 4).

    From the last to the first valid position of each sequence ("next" is the next valid position), with
    :math:`ratio_t = \pi(a_t|x_t) / \mu(a_t|x_t)`:

    .. math::
        \rho_t &= \min(\bar\rho, ratio_t), \qquad c_t = \lambda \min(\bar c, ratio_t) \\
        \delta_t &= \rho_t\,(r_t + \gamma\,(1 - terminated_t)\,V_{next} - V_t) \\
        a_t &= \delta_t + \gamma\, c_t\,(1 - done_t)\, a_{next}, \qquad done = terminated \lor truncated \\
        v_t &= V_t + a_t \\
        pg_t &= \min(\bar\rho_{pg}, ratio_t)\,(r_t + \gamma\,(1 - terminated_t)\,v_{next} - V_t)

    :math:`V_{next}` is ``next_values`` at t if given, else V at the next position, else (at the end) ``bootstrap_values`` of the sequence,
    else 0. :math:`v_{next} = V_{next} + (1 - done_t)\, a_{next}`: without ``next_values`` that is :math:`v` at the next position, and
    :math:`V_{next}` alone where the trace stops or at the end. On policy (all ratios 1) the advantages are :func:`gae`'s.
    Accumulated in float32 (float64 if any input is). Deterministic.

    The outputs carry no gradient: all inputs are constants, as IMPALA has them.

    Args:
        rewards: [B, T], [T, B] (``time_dim=0``), [T], or packed [N] with ``cu_seqlens``; float64, float32, bfloat16 or float16, any strides.
        values: the shape of ``rewards``, any floating dtype.
        log_rhos: the logarithms of the ratios; the shape of ``rewards``, any floating dtype.
        mask: the shape of ``rewards``; bool, integer or floating, non-zero: valid. Masked positions are transparent, nothing of theirs is
            used, and their outputs are 0.
        ratios: the ratios themselves, in place of ``log_rhos``; exactly one of the two.
        gamma, lam: discount and trace decay in [0, 1]; numbers or 0-d tensors (not checked on CUDA).
        rho_clip, c_clip, pg_rho_clip: :math:`\bar\rho`, :math:`\bar c` and :math:`\bar\rho_{pg}`, at least 0; numbers, 0-d tensors (not checked on
            CUDA) or None (no clipping).
        terminated: the shape of ``rewards``, non-zero where the episode ended: no next value, and the trace stops.
        truncated: the shape of ``rewards``, non-zero where the episode was cut off: the trace stops, the next value stays. Needs ``next_values``.
        next_values: the shape of ``rewards``: the value of each step's own next state.
        bootstrap_values: one per sequence ([B], or [S] when packed): the value after the last position. Not beside ``next_values``.
        cu_seqlens, time_dim: as for :func:`value_loss`.

    Raises:
        ValueError: shapes or devices that differ (nothing is broadcast), bad ``cu_seqlens``, numbers out of range, both or neither of ``log_rhos``
            and ``ratios``, ``truncated`` without ``next_values``, ``bootstrap_values`` beside them.
        TypeError: a dtype that is not supported.
    """
    tensors = (log_rhos, ratios, mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens)
    if torch.compiler.is_compiling() or _has_tensor(gamma, lam, rho_clip, c_clip, pg_rho_clip):
        numbers = (_as_tensor(x, rewards) for x in (gamma, lam, rho_clip, c_clip, pg_rho_clip))
        return VTraceOutput(*_vtrace_tensor(rewards, values, *numbers, *tensors, time_dim=time_dim))
    options: dict[str, Any] = {
        "gamma": gamma, "lam": lam, "rho_clip": rho_clip, "c_clip": c_clip, "pg_rho_clip": pg_rho_clip, "time_dim": time_dim
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value != _VTRACE_DEFAULTS[name]}
    return VTraceOutput(*_vtrace(rewards, values, *tensors, **options))
