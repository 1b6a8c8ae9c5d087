"""The public functions. They turn numbers into what the operators take; all checks of tensors are the operators' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _jagged
from ._data_parallel import Share
from ._turns import Turns, carried_rewards, check_turn_ids
from .stats import ValueLossStats
from .whiten import masked_whiten

Number = float | int | Tensor

_value_loss = torch.ops.fused_critic.value_loss.default
_value_loss_tensor = torch.ops.fused_critic.value_loss.tensor
_gae = torch.ops.fused_critic.gae.default
_gae_tensor = torch.ops.fused_critic.gae.tensor


def _keyword_defaults(operator: Any) -> dict[str, Any]:
    return {argument.name: argument.default_value for argument in operator._schema.arguments if argument.kwarg_only}


# Keywords at their default are not passed on: parsing them would cost more than the operator's whole call.
_VALUE_LOSS_DEFAULTS = _keyword_defaults(_value_loss)
_VALUE_LOSS_VALUES = tuple(_VALUE_LOSS_DEFAULTS.values())
_GAE_DEFAULTS = _keyword_defaults(_gae)


class ValueLossOutput(NamedTuple):
    """``loss``: 0-d (per token for ``reduction="none"``), float32, or float64 if any input is. ``stats``: see :class:`ValueLossStats`."""

    loss: Tensor
    stats: ValueLossStats


class GAEOutput(NamedTuple):
    """Both of the rewards' shape; float32, or float64 if any input is."""

    advantages: Tensor
    returns: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: Number | Tensor | tuple[Number, Number] | None = 0.2,
    criterion: str = "mse",
    delta: float = 1,
    clip_only: bool = False,
    loss_clamp: Number | None = None,
    reduction: str = "token-mean",
    batch_num_tokens: Number | None = None,
    global_batch_size: Number | None = None,
    dp_size: float = 1,
    loss_scale_factor: float | None = None,
    cu_seqlens: Tensor | None = None,
    time_dim: int = -1,
    group: torch.distributed.ProcessGroup | None = None,
) -> ValueLossOutput:
    r"""Masked clipped value loss of PPO, with its statistics, in one pass; differentiable in ``values``.

    Per token, with :math:`v` = ``values``, :math:`o` = ``old_values``, :math:`R` = ``returns``,
    :math:`v_c = \min(\max(v, o + low), o + high)` and the criterion :math:`c`, by default :math:`c(d) = \tfrac12 d^2`:

    .. math:: l = \max\big(c(v - R), c(v_c - R)\big)

    (Schulman et al., baselines' ppo2; verl, TRL, OpenRLHF). Its gradient is :math:`c'(v - R)`, and 0 where the clipped branch is strictly
    greater; at a tie the whole :math:`c'(v - R)`. Everything is computed in float32 (float64 if any input of the values' shape is, the mask
    aside), whatever the inputs' dtypes, and rounded once.

    Args:
        values: [B, T], [T, B] (``time_dim=0``), [T], or packed [N] with ``cu_seqlens``; float64, float32, bfloat16 or float16, any strides.
        old_values: the values at rollout time; the shape of ``values``, any floating dtype. May be None where ``clip_range`` is None.
        returns: the shape of ``values``, any floating dtype.
        mask: the shape of ``values``; bool or integer (non-zero: valid) or floating (a weight per token, 0: masked). None: all valid.
            Whatever lies at masked tokens, NaN included, changes nothing, and their gradient is exactly 0.
        clip_range: the range around ``old_values``: a number (both sides), a pair (low, high) with low <= high, or None (no clipping).
            Each may be a 0-d tensor (not checked on CUDA), or a tensor of the shape of ``values``, any floating dtype: a range for each
            token (its numbers are not checked; where low > high, :math:`v_c = o + high`).
        criterion: :math:`c(d)`, as torch's losses of these names have it:

            - ``"mse"``: d^2 / 2
            - ``"huber"``: d^2 / 2 where abs(d) <= ``delta``, else ``delta`` (abs(d) - ``delta`` / 2)
            - ``"smooth_l1"``: d^2 / (2 ``delta``) where abs(d) < ``delta``, else abs(d) - ``delta`` / 2
            - ``"l1"``: abs(d), with the gradient 0 at d = 0
        delta: where ``"huber"`` and ``"smooth_l1"`` (there: beta) become linear, a positive, finite number; no effect on the others.
        clip_only: :math:`l = c(v_c - R)` alone, without the maximum (Stable-Baselines3, skrl). The gradient is :math:`c'(v - R)` where v
            is inside of the range, bounds included, and 0 outside. No effect without a ``clip_range``.
        loss_clamp: :math:`l` is at most this positive number (or 0-d tensor, not checked on CUDA), and has no gradient where it was greater
            (RLlib's ``vf_clip_param``). None: no limit.
        reduction: with weights :math:`w` (the mask, or 1) and rows being sequences (rows of [B, T], columns of [T, B], segments):

            - ``"token-mean"``: sum(w l) / (``batch_num_tokens`` or sum(w)) * ``dp_size``
            - ``"token-sum"``: sum(w l) * ``dp_size``
            - ``"seq-mean-token-sum"``: sum over rows / (``global_batch_size`` or number of non-empty rows) * ``dp_size``
            - ``"seq-mean-token-sum-norm"``: the same / (``loss_scale_factor`` or T)
            - ``"seq-mean-token-mean"``: sum over rows of (row sum / row weight) / (``global_batch_size`` or non-empty rows) * ``dp_size``
            - ``"none"``: the per-token losses w l, 0 at masked tokens

            A denominator of 0 (nothing valid) gives a loss of 0 and gradients of 0.
        batch_num_tokens: global token count, for ``"token-mean"``; a number or 0-d tensor, at least 0.
        global_batch_size: global sequence count, for the ``"seq-mean-*"`` reductions; likewise. A count that the reduction has no use
            for is ignored.
        dp_size: data-parallel size, positive. Above 1 a mean needs its global count, or a ``group``. Beside a ``group`` 1 stands for its size.
        loss_scale_factor: positive; replaces T in ``"seq-mean-token-sum-norm"``.
        cu_seqlens: int32 or int64 [S + 1], from 0 to N without decrease: segment s is [cu_seqlens[s], cu_seqlens[s + 1]). Checked on the CPU; on CUDA
            only with the environment variable FUSED_CRITIC_CHECK=1, which synchronises.
        time_dim: the time dimension of a 2-d input.
        group: a ``torch.distributed`` process group (``torch.distributed.group.WORLD``: all ranks) over whose ranks the batch is spread: the
            denominator is counted over all of them. ``loss`` is this rank's share times ``dp_size``, so that the average of the ranks' losses
            is the loss of the whole batch, and gradients that DDP or FSDP averages are those of one process. ``stats`` stay this rank's
            (``stats.all_reduce(group)``). Costs one all-reduce of one number, beside which the loss is computed; ``"token-sum"`` none.
            Every rank of it must make the call, also one with nothing valid or without any row. One call is one batch: for micro-batches
            see :func:`fused_critic.distributed.global_counts`. Not for ``"none"``, nor beside a count; ``"seq-mean-token-sum-norm"`` needs its
            ``loss_scale_factor`` then. None: no communication.

    Instead of ``cu_seqlens`` and ``time_dim``, all per-token arguments may be jagged nested tensors [B, T*] (``torch.nested``,
    ``layout=torch.jagged``) that share one offsets tensor; they are read as they lie, and a per-token result is jagged with the same offsets.

    All tensors but 0-d numbers may be DTensors (``torch.distributed.tensor``) on one mesh whose dimensions shard the sequences (``Shard(0)`` of
    [B, T] and of one number per sequence, ``Shard(1)`` of [T, B], uneven or empty shards too) or replicate; replicated arguments beside sharded
    ones are cut. Loss, denominators and statistics are those of the whole, replicated, for one all-gather of 15 numbers per rank and sharded mesh
    dimension; the gradient needs no communication; a given count and ``dp_size`` mean what they mean without DTensors. Sequences cut in time,
    and packed ones that are not replicated, are a ValueError before any communication.

    Raises:
        ValueError: shapes that differ (nothing is broadcast), devices that differ, bad ``cu_seqlens``, numbers out of range, unknown names, a
            missing ``old_values`` or global count, an input other than ``values`` that requires grad, what does not go beside a ``group``.
        TypeError: a dtype that is not supported, a ``group`` that is not a process group of this rank.

    Examples:
        >>> values = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> old_values, returns = torch.zeros(1, 2), torch.ones(1, 2)
        >>> fused_critic.value_loss(values, old_values, returns, clip_range=0.5, criterion="huber", reduction="none").loss
        tensor([[0.1250, 1.5000]], grad_fn=<FusedCriticValueLossBackward>)
    """
    if group is not None:
        share = Share(
            group,
            {"values": values, "old_values": old_values, "returns": returns, "mask": mask, "cu_seqlens": cu_seqlens, "clip_range": clip_range},
            reduction=reduction, batch_num_tokens=batch_num_tokens, global_batch_size=global_batch_size, dp_size=dp_size,
            loss_scale_factor=loss_scale_factor, time_dim=time_dim,
        )  # fmt: skip
        loss, stats = value_loss(
            values, old_values, returns, mask, clip_range=clip_range, criterion=criterion, delta=delta, clip_only=clip_only,
            loss_clamp=loss_clamp, loss_scale_factor=loss_scale_factor, cu_seqlens=cu_seqlens, time_dim=time_dim, **share.options,
        )  # fmt: skip
        return ValueLossOutput(share.of(loss), stats)
    low: Number
    high: Number
    if clip_range is None:
        clip, low, high = False, 0.0, 0.0
    elif isinstance(clip_range, (tuple, list)):
        clip, (low, high) = True, _pair(clip_range)
    elif isinstance(clip_range, str):
        raise TypeError(f"fused_critic.value_loss: clip_range: expected a number, a pair, a 0-d tensor or None, got {clip_range!r}")
    else:
        clip, low, high = True, -clip_range, clip_range
    if torch.compiler.is_compiling() or _has_tensor(low, high, batch_num_tokens, global_batch_size, loss_clamp):
        loss, moments, _ = _value_loss_tensor(
            values, old_values, returns, mask, cu_seqlens,
            *(_as_tensor(x, values) for x in (low, high, batch_num_tokens, global_batch_size, loss_clamp)),
            clip=clip, criterion=criterion, delta=delta, clip_only=clip_only, reduction=reduction, dp_size=dp_size, loss_scale_factor=loss_scale_factor, time_dim=time_dim,
        )  # fmt: skip
    else:
        given = (
            low, high, clip, criterion, delta, clip_only, loss_clamp, reduction, batch_num_tokens, global_batch_size, dp_size,
            loss_scale_factor, time_dim,
        )  # fmt: skip
        options = (
            {} if given == _VALUE_LOSS_VALUES else {k: x for (k, default), x in zip(_VALUE_LOSS_DEFAULTS.items(), given) if x != default}
        )
        loss, moments, _ = _value_loss(values, old_values, returns, mask, cu_seqlens, **options)
    return ValueLossOutput(loss, ValueLossStats(moments))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number,
    lam: Number,
    returns_lam: Number | None = None,
    mask_mode: str = "skip",
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_dim: int = -1,
    carry_masked_rewards: bool = False,
    turn_ids: Tensor | None = None,
    whiten: bool = False,
) -> GAEOutput:
    r"""Generalised advantage estimation (Schulman et al., arXiv:1506.02438), differentiable in the four value-like inputs.

    From the last to the first position of each sequence ("next" is the next valid position; other ``mask_mode`` below):

    .. math::
        \delta_t &= r_t + \gamma\,(1 - terminated_t)\,V_{next} - V_t \\
        A_t &= \delta_t + \gamma\lambda\,(1 - done_t)\,A_{next}, \qquad done = terminated \lor truncated \\
        R_t &= A_t + V_t

    :math:`V_{next}` is ``next_values`` at t if given, else V at the next position, else (at the end) ``bootstrap_values`` of the sequence,
    else 0. With ``returns_lam`` the returns are those of the same recursion run with that lambda, in the same pass. Accumulated in float32
    (float64 if any input is).

    Args:
        rewards: [B, T], [T, B] (``time_dim=0``), [T], or packed [N] with ``cu_seqlens``; float64, float32, bfloat16 or float16, any strides.
        values: the shape of ``rewards``, any floating dtype.
        mask: the shape of ``rewards``; bool, integer or floating, non-zero: valid.
        gamma, lam: discount and trace decay in [0, 1], without gradient: numbers, 0-d tensors, or tensors with one number per sequence
            ([B], or [S] when packed; VAPO's length-adaptive lambda). Tensors are not checked on CUDA.
        returns_lam: a lambda for the returns alone, given as ``lam`` is (VAPO's decoupled GAE). None: ``lam``.
        mask_mode: what masked positions do to the recursion. Their outputs are 0 in every mode but ``"ignore"``, and so are the gradients of
            what they hold.

            - ``"skip"``: they are transparent: advantage and next value carry over them unchanged, their reward is dropped, and nothing of
              theirs is used (verl, NeMo-RL, AReaL).
            - ``"zero"``: value, reward and next value count as 0 there, and the recursion runs over every position; of what they hold only the
              flags are used (OpenRLHF, NeMo-Aligner).
            - ``"reset"``: they end the sequence: the next value and the next advantage before a gap are 0, a bootstrap behind it is not used,
              and nothing of theirs is used (AgileRL).
            - ``"ignore"``: the mask takes no part in the recursion; it only selects for ``whiten`` (TRL, SkyRL, DeepSpeed-Chat).
        terminated: the shape of ``rewards``, non-zero where the episode ended: no next value, and the trace stops.
        truncated: the shape of ``rewards``, non-zero where the episode was cut off: the trace stops, the next value stays. Needs ``next_values``.
        next_values: the shape of ``rewards``: the value of each step's own next state.
        bootstrap_values: one per sequence ([B], or [S] when packed): the value after the last position. Not beside ``next_values``.
        cu_seqlens, time_dim: as for :func:`value_loss`.
        carry_masked_rewards: add the rewards of masked positions to the nearest earlier valid position instead of dropping them; those before
            the first valid one are dropped. For ``mask_mode="skip"``. All rewards have to be finite then, those of masked positions too.
        turn_ids: the shape of ``rewards``, integer: turns instead of tokens are the time steps (AReaL's ``gae_timestep_unit="turn"``). A turn is a
            maximal run of equal ids among the valid tokens of one sequence, in time order. Its reward is the sum of its tokens', its value
            that at its first token, its next value that of the next turn (``next_values``: at its last token), and its flags are set
            where those of any of its tokens are. Its advantage, and as return that advantage and its value together, go to all of its tokens.
            For ``mask_mode="skip"``; rewards and results have to be finite. (AReaL has one turn per id, asks for ids that do not decrease, which
            makes that the same, and leaves the values as the returns of masked tokens, which are 0 here.)
        whiten: whiten the advantages over the valid positions as :func:`masked_whiten` does. The returns are not affected.

    Jagged nested tensors and DTensors: as for :func:`value_loss`; ``bootstrap_values`` stays [B]. DTensors need no communication, but for ``whiten``,
    and where one mesh dimension cuts the time of all per-token arguments alike: that is :func:`fused_critic.distributed.context_parallel_gae`,
    without a gradient.

    Raises:
        ValueError: shapes or devices that differ (nothing is broadcast), bad ``cu_seqlens``, ``gamma``, ``lam`` or ``returns_lam`` out of range or with
            a gradient, ``truncated`` without ``next_values``, ``bootstrap_values`` beside them, an unknown name.
        TypeError: a dtype that is not supported.
    """
    if rewards.is_nested and (carry_masked_rewards or turn_ids is not None):
        _jagged.check_no_other_layout("gae", cu_seqlens, time_dim)
        per_token = {
            "rewards": rewards, "values": values, "mask": mask, "terminated": terminated, "truncated": truncated,
            "next_values": next_values, "turn_ids": turn_ids,
        }  # fmt: skip
        others: dict[str, Any] = {
            "gamma": gamma, "lam": lam, "returns_lam": returns_lam, "mask_mode": mask_mode, "bootstrap_values": bootstrap_values,
            "carry_masked_rewards": carry_masked_rewards, "whiten": whiten,
        }  # fmt: skip
        jagged: GAEOutput = _jagged.packed("gae", per_token, lambda offsets, tokens: gae(**tokens, **others, cu_seqlens=offsets))
        return jagged
    if type(rewards) is not Tensor and hasattr(rewards, "device_mesh"):
        from . import _dtensor

        per_token = {
            "rewards": rewards, "values": values, "mask": mask, "terminated": terminated, "truncated": truncated, "next_values": next_values,
        }  # fmt: skip
        whole: GAEOutput | None = None
        if cu_seqlens is None and _dtensor.cuts_time(rewards, time_dim):
            if carry_masked_rewards or turn_ids is not None or returns_lam is not None:
                raise ValueError(
                    "fused_critic.gae: rewards: expected whole sequences on every rank beside carry_masked_rewards, turn_ids or returns_lam, got a "
                    "DTensor that is cut in time; redistribute explicitly"
                )
            whole = _dtensor.gae_in_time(per_token, bootstrap_values, time_dim, gamma=gamma, lam=lam, mask_mode=mask_mode)
        elif carry_masked_rewards or turn_ids is not None:
            others = {
                "gamma": gamma, "lam": lam, "returns_lam": returns_lam, "mask_mode": mask_mode, "bootstrap_values": bootstrap_values,
                "cu_seqlens": cu_seqlens, "time_dim": time_dim, "carry_masked_rewards": carry_masked_rewards,
            }  # fmt: skip
            whole = _dtensor.on_rows("gae", per_token | {"turn_ids": turn_ids}, others, gae)
        if whole is not None:
            return whole._replace(advantages=masked_whiten(whole.advantages, mask)) if whiten else whole
    if carry_masked_rewards and mask_mode != "skip":
        raise ValueError(f"fused_critic.gae: carry_masked_rewards: expected mask_mode 'skip' beside it, got {mask_mode!r}")
    if carry_masked_rewards and mask is not None:
        rewards = carried_rewards(rewards, mask, cu_seqlens, time_dim)
    steps, turns = mask, None
    if turn_ids is not None:
        check_turn_ids(turn_ids, rewards, mask_mode)
        turns = Turns(turn_ids, mask, cu_seqlens, time_dim)
        rewards, steps, terminated, truncated, next_values = (
            turns.sums(rewards), turns.starts, turns.any(terminated), turns.any(truncated), turns.last(next_values)
        )  # fmt: skip
    tensors = (steps, terminated, truncated, next_values, bootstrap_values, cu_seqlens)
    if torch.compiler.is_compiling() or _has_tensor(gamma, lam, returns_lam):
        numbers = [_as_tensor(x, rewards) for x in (gamma, lam, returns_lam)]
        advantages, returns = _gae_tensor(rewards, values, *numbers[:2], *tensors, numbers[2], mask_mode=mask_mode, time_dim=time_dim)
    else:
        options = {"gamma": gamma, "lam": lam, "mask_mode": mask_mode, "time_dim": time_dim, "returns_lam": returns_lam}
        options = {name: value for name, value in options.items() if value != _GAE_DEFAULTS[name]}
        advantages, returns = _gae(rewards, values, *tensors, **options)
    if turns is not None:
        advantages, returns = turns.spread(advantages), turns.spread(returns)
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return GAEOutput(advantages, returns)


def _pair(clip_range: Sequence[Number]) -> Sequence[Number]:
    if len(clip_range) != 2:
        raise ValueError(f"fused_critic.value_loss: clip_range: expected a pair (low, high), got {len(clip_range)} elements")
    return clip_range


def _has_tensor(*numbers: object) -> bool:
    for x in numbers:  # a generator inside of any() would cost as much as the rest of the wrapper
        if isinstance(x, Tensor):
            return True
    return False


def _as_tensor(x: Number | None, like: Tensor) -> Tensor | None:
    """A number as a 0-d tensor. Traced, a product keeps a symbolic number in the graph, so that its next value needs no recompilation."""
    if x is None or isinstance(x, Tensor):
        return x
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=like.device) * x
    return torch.tensor(x, dtype=torch.float64)  # on the CPU: the host reads it, without a copy to the device
