"""Inputs of the operators: what every contender of a case gets, and what float64 makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from fused_critic.check import plain
from torch import Tensor

CLIP = 0.2
GAMMA, LAM = 0.99, 0.95
VALID_SHARE = 0.6  # of a random mask
TURNS = 8  # of a multi-turn mask: the even ones are the model's
KINK_MARGIN = 1e-3  # no token is nearer to where the loss has a kink, at which contenders may rightly differ
MASKS = ("none", "full", "padding", "random", "turns")

PACKED_LOG_MEAN, PACKED_LOG_SPREAD = 7.5, 1.0  # lengths of packed sequences, log-normal


def make_mask(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Optional[Tensor]:
    if kind == "none":
        return None
    rows, columns = shape
    if kind == "full":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "random":
        return torch.rand(shape, generator=generator) < VALID_SHARE
    padding = torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
    if kind == "padding":
        return padding
    # Turns of unequal lengths, the model's and the tools' by turns.
    cuts = torch.randint(columns, (rows, TURNS - 1), generator=generator)
    turn = (torch.arange(columns) >= cuts.unsqueeze(-1)).sum(1)
    return padding & (turn % 2 == 0)


@dataclass
class LossInputs:
    """[B, T] or, packed, [T]."""

    values: Tensor  # requires grad
    old_values: Tensor
    returns: Tensor
    mask: Optional[Tensor]
    reduction: str = "token-mean"

    @property
    def bytes_forward(self) -> int:
        return sum(x.nbytes for x in (self.values, self.old_values, self.returns, self.mask) if x is not None)

    @property
    def bytes_moved(self) -> int:
        """Read by the forward pass, read again by the backward pass, and the gradient written."""
        return 2 * self.bytes_forward + self.values.nbytes

    def expected(self) -> list[Tensor]:
        """Loss and gradient, in float64."""
        values, old_values, returns = (x.detach().double() for x in (self.values, self.old_values, self.returns))
        mask = torch.ones_like(values) if self.mask is None else self.mask.double()
        values.requires_grad_()
        if self.reduction == "token-mean":
            loss = plain.value_loss(values, old_values, returns, mask, CLIP)[0]
        elif self.reduction == "seq-mean-token-mean":
            rows = [plain.value_loss(*row, CLIP)[0] for row in zip(values, old_values, returns, mask)]
            loss = torch.stack(rows).mean()
        else:
            raise ValueError(f"no plain formula for reduction {self.reduction}")
        return [loss.detach(), torch.autograd.grad(loss, values)[0]]


@dataclass
class GaeInputs:
    """[B, T], [T, B] if `time_dim` is 0, or, packed, [T] with `cu_seqlens`."""

    rewards: Tensor
    values: Tensor
    mask: Optional[Tensor] = None
    mask_kind: str = "none"
    cu_seqlens: Optional[Tensor] = None
    time_dim: int = -1

    @property
    def layout(self) -> str:
        return "packed" if self.cu_seqlens is not None else "time-major" if self.time_dim == 0 else "rows"

    @property
    def bytes_moved(self) -> int:
        inputs = sum(x.nbytes for x in (self.rewards, self.values, self.mask) if x is not None)
        return inputs + 2 * self.rewards.nbytes

    @property
    def steps(self) -> int:
        """Of a loop over time."""
        return self.rewards.shape[self.time_dim]

    def rows(self, *tensors: Tensor) -> list[Tensor]:
        """Views with time last."""
        return [x.t() if self.time_dim == 0 else x for x in tensors]

    def next_values(self) -> Tensor:
        """Rows of V at the next step, 0 after the last. For masks "none", "full" and "padding"."""
        values, ends = self.rows(self.values, self.ends())
        following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
        return torch.where(ends, torch.zeros_like(following), following)

    def ends(self) -> Tensor:
        """Whether a sequence ends with this token. For masks "none", "full" and "padding"; in the layout of the inputs."""
        ends = torch.zeros_like(self.rewards, dtype=torch.bool)
        if self.cu_seqlens is not None:
            ends[self.cu_seqlens[1:].long() - 1] = True
            return ends
        last = self.rows(ends)[0]
        last[:, -1] = True
        if self.mask is not None:
            mask = self.rows(self.mask)[0]
            last[:, :-1] = mask[:, :-1] & ~mask[:, 1:]
            last[:, -1] = mask[:, -1]
        return ends

    def expected(self) -> list[Tensor]:
        """Advantages and returns at valid tokens, in float64.

        With x[t] = gamma lam A[t + 1] + gamma V[t + 1] a step is an affine map of x, which is the identity where the mask is 0; their
        compositions from the end are found by doubling.
        """
        rewards, values = (x.double() for x in self.rows(self.rewards, self.values))
        valid = torch.ones_like(rewards, dtype=torch.bool) if self.mask is None else self.rows(self.mask)[0]
        zero = torch.zeros_like(rewards)
        slope = torch.where(valid, zero + GAMMA * LAM, 1.0)
        offset = torch.where(valid, GAMMA * LAM * (rewards - values) + GAMMA * values, zero)
        # A sequence's last token composes with the constant 0.
        last = self.rows(self.ends())[0] if self.cu_seqlens is not None else torch.zeros_like(valid)
        slope = torch.where(last, zero, slope)
        shift = 1
        while shift < rewards.shape[-1]:
            offset = torch.cat([offset[..., :-shift] + slope[..., :-shift] * offset[..., shift:], offset[..., -shift:]], dim=-1)
            slope = torch.cat([slope[..., :-shift] * slope[..., shift:], slope[..., -shift:]], dim=-1)
            shift *= 2
        x = torch.cat([offset[..., 1:], zero[..., :1]], dim=-1)
        x = torch.where(last, zero, x)
        return [(rewards - values + x)[valid], (rewards + x)[valid]]

    def valid(self, outputs) -> list[Tensor]:
        """What of a contender's advantages and returns has to agree."""
        rows = self.rows(*outputs)
        return [x.flatten() for x in rows] if self.mask is None else [x[self.rows(self.mask)[0]] for x in rows]


def loss_inputs(shape, device, mask_kind="padding", value_dtype=torch.float32, reduction="token-mean", seed=0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    old_values, step, returns = (torch.randn(shape, generator=generator) for _ in range(3))
    step *= 0.3
    values = (old_values + step).to(value_dtype)
    step = values.float() - old_values
    step[(step.abs() - CLIP).abs() < KINK_MARGIN] = 0.0
    values = (old_values + step).to(value_dtype)
    clipped = old_values + (values.float() - old_values).clamp(-CLIP, CLIP)
    returns[(returns - 0.5 * (values.float() + clipped)).abs() < KINK_MARGIN] += 1.0
    mask = make_mask(mask_kind, shape, generator)
    values, old_values, returns, mask = (x if x is None else x.to(device) for x in (values, old_values, returns, mask))
    return LossInputs(values.requires_grad_(), old_values, returns, mask, reduction)


def gae_inputs(shape, device, mask_kind="padding", value_dtype=torch.float32, time_major=False, seed=0) -> GaeInputs:
    """`shape`: B and T, whatever the layout."""
    generator = torch.Generator().manual_seed(seed)
    arrange = (lambda x: x.t().contiguous()) if time_major else (lambda x: x)
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = make_mask(mask_kind, shape, generator)
    rewards, values, mask = (x if x is None else arrange(x).to(device) for x in (rewards, values.to(value_dtype), mask))
    return GaeInputs(rewards, values, mask, mask_kind, time_dim=0 if time_major else -1)


def packed_gae_inputs(sequences: int, longest: int, device, seed=0) -> GaeInputs:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(PACKED_LOG_MEAN + PACKED_LOG_SPREAD * torch.randn(sequences, generator=generator)).clamp(1, longest).long()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    rewards, values = (torch.randn(int(lengths.sum()), generator=generator).to(device) for _ in range(2))
    return GaeInputs(rewards, values, cu_seqlens=cu_seqlens)
