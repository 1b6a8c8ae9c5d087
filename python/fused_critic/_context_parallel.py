"""GAE of sequences that are sharded along time over a process group: one small affine map per chunk and sequence goes over the wire."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _jagged
from ._collectives import check_group, gathered
from .functional import GAEOutput, Number, gae
from .recurrence import reverse_scan
from .whiten import masked_whiten

_OP = "fused_critic.context_parallel_gae"
_ORDERS = ("contiguous", "head-tail")
_MASK_MODES = ("skip", "zero", "reset", "ignore")


def context_parallel_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    group: torch.distributed.ProcessGroup,
    gamma: Number,
    lam: Number,
    order: str = "contiguous",
    mask_mode: str = "skip",
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    time_dim: int = -1,
    whiten: bool = False,
) -> GAEOutput:
    r""":func:`fused_critic.gae` of sequences that are sharded along time over the ranks of a process group, as context parallelism leaves them.

    Every rank passes its part of every sequence and gets the advantages and returns of that part, equal to the single process's. From a chunk
    to the one before it in time goes, for each sequence, a single number :math:`x = \gamma V_{first} + \gamma\lambda A_{first}`, an affine
    function :math:`a x' + b` of the one that enters from behind. So one all-gather of (a, b), 16 bytes for each sequence and chunk however long
    the chunks are, lets each rank compute what enters its own (docs/distributed.md). A group of one rank calls :func:`fused_critic.gae` and
    communicates nothing.

    Args:
        rewards, values, mask, terminated, truncated, next_values: this rank's part, as for :func:`fused_critic.gae`: [B, T_rank], [T_rank, B]
            (``time_dim=0``), [T_rank], packed [N_rank] with ``cu_seqlens``, or jagged. The number of sequences and their order, and which
            optional tensors there are, must be the same on all ranks; lengths may differ, and may be 0.
        group: the process group (``torch.distributed.group.WORLD``: all ranks); the ranks' order in it is that of the chunks. Every rank of it
            must make the call.
        gamma, lam: numbers, 0-d tensors or one per sequence, the same on all ranks.
        order: which part of a sequence a rank has:

            - ``"contiguous"``: rank i the i-th of n chunks, of any lengths.
            - ``"head-tail"``: of 2n chunks the i-th and the (2n-1-i)-th, one behind the other (load-balanced, as causal attention wants it). Both
              have half of the rank's length, which must be even, for each sequence; the lengths of different ranks may differ.
        mask_mode: all four of :func:`fused_critic.gae`.
        bootstrap_values: [B] ([S] when packed), the value behind the end of the whole sequence. Only those of the rank with the last chunk are
            read (the last rank; ``"head-tail"``: rank 0); others may pass them or None.
        cu_seqlens: of this rank's part: int32 or int64 [S + 1], the same S on all ranks; segments may be empty. Checked on the CPU.
        time_dim: the time dimension of a 2-d input.
        whiten: whiten the advantages over the valid positions of all ranks, by :func:`fused_critic.masked_whiten` with the same group: a second
            all-gather, of three numbers.

    Returns:
        Advantages and returns of this rank's part, in its layout; float32, or float64 if any of this rank's inputs is.

    No gradient: advantages are targets. An input that requires grad while grad mode is on is an error; call it under ``torch.no_grad()`` or
    detach. For a second lambda for the returns (``returns_lam``) call it twice; ``carry_masked_rewards`` and ``turn_ids`` are not supported.

    Raises:
        ValueError: what :func:`fused_critic.gae` raises it for, an unknown ``order``, an odd length beside ``"head-tail"``, an input that requires
            grad. An error on one rank alone leaves the others waiting in the collective.
        TypeError: a dtype that is not supported, ``group`` is not a process group of this rank.

    Examples:
        >>> lo, hi = rank * T // ranks, (rank + 1) * T // ranks  # any split will do
        >>> advantages, returns = context_parallel_gae(rewards[:, lo:hi], values[:, lo:hi], group=dist.group.WORLD, gamma=1.0, lam=0.95)
    """
    per_token = {
        "rewards": rewards, "values": values, "mask": mask, "terminated": terminated, "truncated": truncated, "next_values": next_values,
    }  # fmt: skip
    if rewards.is_nested:
        _jagged.check_no_other_layout("context_parallel_gae", cu_seqlens, time_dim)
        others: dict[str, Any] = {
            "group": group, "gamma": gamma, "lam": lam, "order": order, "mask_mode": mask_mode, "bootstrap_values": bootstrap_values,
            "whiten": whiten,
        }  # fmt: skip
        jagged: GAEOutput = _jagged.packed(
            "context_parallel_gae", per_token, lambda offsets, tokens: context_parallel_gae(**tokens, **others, cu_seqlens=offsets)
        )
        return jagged
    _check(per_token, bootstrap_values, gamma, lam, group, order, mask_mode, cu_seqlens, time_dim)
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if ranks == 1:
        return gae(
            rewards, values, mask, gamma=gamma, lam=lam, mask_mode=mask_mode, terminated=terminated, truncated=truncated,
            next_values=next_values, bootstrap_values=bootstrap_values, cu_seqlens=cu_seqlens, time_dim=time_dim, whiten=whiten,
        )  # fmt: skip
    # From here on everything is packed, a "row" being one chunk of one sequence; in "head-tail" row 2s is the head of sequence s, 2s + 1 its tail.
    time_major = rewards.dim() == 2 and time_dim in (0, -2)
    flat: dict[str, Any] = {name: None if x is None else (x.t() if time_major else x).detach().reshape(-1) for name, x in per_token.items()}
    bounds = _bounds(rewards, cu_seqlens, time_major)
    chunks = 1 if order == "contiguous" else 2  # of each sequence on this rank
    if chunks == 2:
        middles = bounds[:-1] + (bounds[1:] - bounds[:-1]) // 2
        bounds = torch.cat([torch.stack([bounds[:-1], middles], dim=1).flatten(), bounds[-1:]])
        gamma, lam = (x.repeat_interleave(2) if isinstance(x, Tensor) and x.dim() == 1 else x for x in (gamma, lam))
    floating = [x for x in (rewards, values, next_values, bootstrap_values) if x is not None]
    part = _Part(flat, bounds, gamma, lam, mask_mode, torch.float64 if any(x.dtype == torch.float64 for x in floating) else torch.float32)
    a, b = part.map()

    holds_end = rank == (ranks - 1 if chunks == 1 else 0)
    behind = None
    if holds_end and bootstrap_values is not None:
        behind = part.gamma[chunks - 1 :: chunks] * bootstrap_values.detach().double().reshape(-1)
        folded = b.view(-1, chunks).clone()
        folded[:, -1] += a.view(-1, chunks)[:, -1] * behind
        b = folded.flatten()
    everywhere = gathered(torch.stack([a, b]), group).view(ranks, 2, -1, chunks)
    in_time = everywhere[..., 0] if chunks == 1 else torch.cat([everywhere[..., 0], everywhere[..., 1].flip(0)])
    # What leaves each chunk is a linear recurrence over the chunks: [chunks of a sequence, sequences]; nothing comes after the last.
    left = reverse_scan(in_time[:, 1], in_time[:, 0], time_dim=0)
    left = torch.cat([left, torch.zeros_like(left[:1]) if behind is None else behind[None]])
    own = [rank] if chunks == 1 else [rank, 2 * ranks - 1 - rank]
    advantages, returns = part.finish(torch.stack([left[chunk + 1] for chunk in own], dim=1).flatten())

    if time_major:
        advantages, returns = (x.view(rewards.shape[::-1]).t() for x in (advantages, returns))
    else:
        advantages, returns = advantages.view(rewards.shape), returns.view(rewards.shape)
    if whiten:
        advantages = masked_whiten(advantages, mask, group=group)
    return GAEOutput(advantages, returns)


class _Part:
    """The rows of this rank. With V and A at the first step of a row and x the carry that enters it, the carry that leaves is
    gamma V + gamma lam A, or gamma lam A where ``next_values`` hold the next values, so that no value crosses a bound.

    Carries are as large as the values, advantages only as large as the errors. So the scans in the accumulation type count the carry from the
    row's own last value (``anchor``), as if that were the value behind it; what is left is small, and is done in float64, few numbers as
    there are of it.
    """

    def __init__(self, flat: dict[str, Any], bounds: Tensor, gamma: Number, lam: Number, mask_mode: str, dtype: torch.dtype):
        self.dtype, self.bounds = dtype, bounds
        self.numbers: dict[str, Any] = {"gamma": gamma, "lam": lam}
        self.gamma, wide_lam = (_as_row(x, bounds) for x in (gamma, lam))
        gamma_lam = self.gamma * wide_lam
        if dtype == torch.float32:  # what the operator multiplies by
            self.gamma, gamma_lam = self.gamma.float().double(), gamma_lam.float().double()
        self.gamma_lam = gamma_lam
        valid = None if flat["mask"] is None or mask_mode == "ignore" else flat["mask"] != 0
        self.hidden: Tensor | None = None  # positions that are steps and yet have no result
        if mask_mode == "zero" and valid is not None:
            self.hidden, valid = ~valid, None
            flat = {
                k: x.masked_fill(self.hidden, 0) if k in ("rewards", "values", "next_values") and x is not None else x
                for k, x in flat.items()
            }
        self.options: dict[str, Any] = {k: flat[k] for k in ("terminated", "truncated", "next_values")}
        self.rewards, self.values, self.steps, self.mask_mode = flat["rewards"], flat["values"], valid, mask_mode

        starts, ends = bounds[:-1], bounds[1:]
        self.first, self.last, self.count = starts, ends - 1, ends - starts
        open_ended = self.count > 0  # what enters reaches the last position
        self.leaves, passes = open_ended, torch.ones_like(open_ended)
        if valid is not None:
            through = _running(valid)
            before, length, self.count = through[starts], self.count, through[ends] - through[starts]
            if mask_mode == "skip":
                self.first = torch.searchsorted(through[1:], before + 1)
                self.last = torch.searchsorted(through[1:], before + self.count)
                self.leaves = open_ended = self.count > 0
            else:
                self.leaves, open_ended = open_ended & _at(valid, self.first), open_ended & _at(valid, self.last)
                passes = self.count == length
        flags = [flag != 0 for flag in (flat["terminated"], flat["truncated"]) if flag is not None]
        if flags:
            done = flags[0] if len(flags) == 1 else flags[0] | flags[1]
            open_ended = open_ended & ~_at(done, self.last)
            done = _running(done if valid is None else done & valid)
            passes = passes & (done[ends] == done[starts])
        self.enters, self.passes = open_ended, passes
        self.anchor: Tensor | None = None
        if flat["next_values"] is None:
            self.anchor = torch.where(open_ended, _at(self.values, self.last), 0).to(dtype)

    def _gae(self, rewards: Tensor) -> GAEOutput:
        mode = "skip" if self.steps is None else self.mask_mode
        return gae(
            rewards,
            self.values,
            self.steps,
            mask_mode=mode,
            bootstrap_values=self.anchor,
            cu_seqlens=self.bounds,
            **self.numbers,
            **self.options,
        )

    def map(self) -> tuple[Tensor, Tensor]:
        """a and b of each row, float64."""
        a = torch.where(self.passes, self.gamma_lam ** self.count.double(), 0.0)
        carry = self.gamma_lam * _at(self._gae(self.rewards).advantages, self.first).double()
        if self.anchor is None:
            return a, torch.where(self.leaves, carry, 0.0)
        carry = carry + self.gamma * _at(self.values, self.first).double()
        return a, torch.where(self.leaves, carry, 0.0) - a * self.gamma * self.anchor.double()

    def finish(self, entering: Tensor) -> GAEOutput:
        """The results, given what enters each row: the row's last reward takes it, less what the anchor brings."""
        if self.rewards.numel() == 0:
            return self._gae(self.rewards)
        rest = entering if self.anchor is None else entering - self.gamma * self.anchor.double()
        rest = torch.where(self.enters, rest, 0.0).to(self.dtype)
        rewards = self.rewards.to(self.dtype, copy=True).index_add_(0, self.last.clamp(0, self.rewards.numel() - 1), rest)
        advantages, returns = self._gae(rewards)
        if self.hidden is not None:
            advantages, returns = advantages.masked_fill(self.hidden, 0), returns.masked_fill(self.hidden, 0)
        return GAEOutput(advantages, returns)


def _as_row(x: Number, bounds: Tensor) -> Tensor:
    rows = bounds.shape[0] - 1
    if isinstance(x, Tensor):
        return x.detach().to(bounds.device, torch.float64).expand(rows)
    return torch.ones(rows, dtype=torch.float64, device=bounds.device) * x


def _running(steps: Tensor) -> Tensor:
    """How many of them are before each position and before the end, [N + 1]."""
    return torch.nn.functional.pad(steps.cumsum(0), (1, 0))


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x at the indices; anything where there is none such, which the caller does not use."""
    return x[index.clamp(0, x.shape[0] - 1)] if x.shape[0] else x.new_zeros(index.shape)


def _bounds(rewards: Tensor, cu_seqlens: Tensor | None, time_major: bool) -> Tensor:
    """Where the sequences begin and end among the packed tokens, int64."""
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int64)
    if rewards.dim() == 1:
        rows, length = 1, rewards.shape[0]
    else:
        rows, length = rewards.shape[::-1] if time_major else rewards.shape
    return torch.arange(rows + 1, device=rewards.device) * length


def _check(
    per_token: dict[str, Tensor | None],
    bootstrap_values: Tensor | None,
    gamma: Number,
    lam: Number,
    group: object,
    order: str,
    mask_mode: str,
    cu_seqlens: Tensor | None,
    time_dim: int,
) -> None:
    """Everything that could go wrong on the way to the operator, whose own checks are those of the numbers and dtypes."""
    check_group("context_parallel_gae", group)
    for name, got, expected in (("order", order, _ORDERS), ("mask_mode", mask_mode, _MASK_MODES)):
        if got not in expected:
            raise ValueError(f"{_OP}: {name}: expected one of {', '.join(expected)}, got {got!r}")
    rewards = per_token["rewards"]
    assert rewards is not None
    if rewards.dim() not in (1, 2) or not -rewards.dim() <= time_dim < rewards.dim():
        raise ValueError(
            f"{_OP}: rewards: expected 1 or 2 dimensions, of which time_dim is one, got shape {list(rewards.shape)} and time_dim {time_dim}"
        )
    for name, x in per_token.items():
        if x is not None and x.shape != rewards.shape:
            raise ValueError(
                f"{_OP}: {name}: expected shape {list(rewards.shape)} (that of rewards), got {list(x.shape)}; nothing is broadcast"
            )
    floating = {**{name: per_token[name] for name in ("rewards", "values", "next_values")}, "bootstrap_values": bootstrap_values}
    for name, x in floating.items():
        if x is not None and not x.dtype.is_floating_point:
            raise TypeError(f"{_OP}: {name}: expected a floating dtype, got {x.dtype}")
    numbers = {name: x for name, x in (("gamma", gamma), ("lam", lam)) if isinstance(x, Tensor)}
    for name, x in {**per_token, "bootstrap_values": bootstrap_values, "cu_seqlens": cu_seqlens, **numbers}.items():
        if x is None:
            continue
        if x.device != rewards.device and not (name in numbers and x.dim() == 0):
            raise ValueError(f"{_OP}: {name}: expected device {rewards.device} (that of rewards), got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{_OP}: {name}: expected a tensor without gradient (it would need the other ranks' gradients), "
                "got one with requires_grad; detach() it"
            )
    if bootstrap_values is not None and per_token["next_values"] is not None:
        raise ValueError(
            f"{_OP}: bootstrap_values: expected None beside next_values (which hold the last position's next value too), got a tensor"
        )
    if per_token["truncated"] is not None and per_token["next_values"] is None:
        raise ValueError(f"{_OP}: next_values: expected a tensor beside truncated (the value of the state that was cut off), got None")
    single = rewards.dim() == 1 and cu_seqlens is None
    if cu_seqlens is None:
        sequences = 1 if single else rewards.shape[1 - time_dim % 2]
    else:
        _check_cu_seqlens(cu_seqlens, rewards)
        sequences = cu_seqlens.shape[0] - 1
    if bootstrap_values is not None and not (single and bootstrap_values.dim() == 0):
        numbers = {"bootstrap_values": bootstrap_values, **numbers}
    for name, x in numbers.items():
        if x.shape != (sequences,) and (name == "bootstrap_values" or x.dim() != 0):
            raise ValueError(f"{_OP}: {name}: expected shape [{sequences}] (one per sequence), got {list(x.shape)}")
    if order == "head-tail":
        if cu_seqlens is None:
            odd = rewards.shape[time_dim] % 2 != 0
        else:
            odd = _readable(cu_seqlens) and bool((cu_seqlens.diff() % 2).any())
        if odd:
            raise ValueError(
                f"{_OP}: order: expected an even length of every sequence on this rank for 'head-tail' (two chunks of one length), got an odd one"
            )


def _check_cu_seqlens(cu_seqlens: Tensor, rewards: Tensor) -> None:
    if rewards.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{_OP}: cu_seqlens: expected int32 or int64 [S + 1] beside packed [N], got {cu_seqlens.dtype} {list(cu_seqlens.shape)} beside {list(rewards.shape)}"
        )
    if _readable(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != rewards.shape[0] or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{_OP}: cu_seqlens: expected offsets from 0 to {rewards.shape[0]} without decrease, got {cu_seqlens.tolist()}")


def _readable(x: Tensor) -> bool:
    """Whether reading its contents takes neither a synchronisation nor a graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
