"""What is measured."""

from __future__ import annotations

from typing import NamedTuple

import fused_critic
import torch
from fused_critic.integrations import verl as fused_verl

from .harness import Case, Contender, Settings, case

CLIP = 0.2
GAMMA, LAM = 0.99, 0.95
SMALL_SHAPE = (1, 16)  # of no cost but the call's

# Bytes per token, float32 with a one-byte mask.
LOSS_FORWARD_BYTES = 4 + 4 + 4 + 1  # value, old value, return, mask
LOSS_BACKWARD_BYTES = LOSS_FORWARD_BYTES + 4  # and the gradient
GAE_BYTES = 4 + 4 + 1 + 4 + 4  # reward, value, mask; advantage, return


class Batch(NamedTuple):
    vpreds: torch.Tensor  # requires grad
    values: torch.Tensor
    returns: torch.Tensor
    rewards: torch.Tensor
    mask: torch.Tensor


def make_batch(shape: tuple[int, int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    vpreds, noise, returns, rewards = (torch.randn(shape, generator=generator) for _ in range(4))
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    return Batch(vpreds.clone().requires_grad_(), vpreds + 0.3 * noise, returns, rewards, torch.arange(shape[1]) < lengths)


def gradient(loss: torch.Tensor, vpreds: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, vpreds)[0]


@case
def call_value_loss_forward(settings: Settings) -> Case:
    v, o, R, _, m = make_batch(SMALL_SHAPE)
    op = torch.ops.fused_critic.value_loss
    return Case(
        f"value loss, forward with grad, {SMALL_SHAPE}",
        threads=1,
        contenders=[
            Contender("torch.ops.fused_critic.value_loss", lambda: op(v, o, R, m), lambda out: out[:1]),
            Contender("fused_critic.value_loss", lambda: fused_critic.value_loss(v, o, R, m), lambda out: out[:1]),
            Contender("integrations.verl.compute_value_loss", lambda: fused_verl.compute_value_loss(v, R, o, m, CLIP), lambda out: out[:1]),
            Contender("verl eager", lambda: settings.verl.compute_value_loss(v, R, o, m, CLIP), lambda out: out[:1], goal=5),
            Contender("torch.add with grad", lambda: torch.add(v, o)),
        ],
    )


@case
def call_value_loss_forward_backward(settings: Settings) -> Case:
    v, o, R, _, m = make_batch(SMALL_SHAPE)
    op, ones = torch.ops.fused_critic.value_loss, torch.ones(SMALL_SHAPE)
    return Case(
        f"value loss, forward and backward, {SMALL_SHAPE}",
        threads=1,
        contenders=[
            Contender("torch.ops.fused_critic.value_loss", lambda: gradient(op(v, o, R, m)[0], v), lambda out: [out]),
            Contender("fused_critic.value_loss", lambda: gradient(fused_critic.value_loss(v, o, R, m).loss, v), lambda out: [out]),
            Contender(
                "integrations.verl.compute_value_loss",
                lambda: gradient(fused_verl.compute_value_loss(v, R, o, m, CLIP)[0], v),
                lambda out: [out],
            ),
            Contender("verl eager", lambda: gradient(settings.verl.compute_value_loss(v, R, o, m, CLIP)[0], v), lambda out: [out], goal=3),
            Contender("torch.add and its gradient", lambda: torch.autograd.grad(torch.add(v, o), v, ones)),
        ],
    )


@case
def call_gae(settings: Settings) -> Case:
    _, V, _, r, m = make_batch(SMALL_SHAPE)
    op, verls_mask = torch.ops.fused_critic.gae, m.float()

    def valid(out):
        return [x[m] for x in out]

    return Case(
        f"GAE without whitening, {SMALL_SHAPE}",
        threads=1,
        contenders=[
            Contender("torch.ops.fused_critic.gae", lambda: op(r, V, m, gamma=GAMMA, lam=LAM), valid),
            Contender("fused_critic.gae", lambda: fused_critic.gae(r, V, m, gamma=GAMMA, lam=LAM), valid),
            Contender("verl eager", lambda: settings.verl.gae(r, V, verls_mask, GAMMA, LAM), valid),
            Contender("torch.add", lambda: torch.add(r, V)),
        ],
    )


@case
def value_loss(settings: Settings) -> Case:
    v, o, R, _, m = make_batch(settings.large_shape)
    op, verls = torch.ops.fused_critic.value_loss, settings.verl.compute_value_loss
    compiled = torch.compile(verls, fullgraph=True, dynamic=False)

    def run(loss_and_more):
        return loss_and_more[0], gradient(loss_and_more[0], v)

    return Case(
        f"value loss, forward and backward, {settings.large_shape} float32, bool mask",
        threads=2,
        contenders=[
            Contender("torch.ops.fused_critic.value_loss", lambda: run(op(v, o, R, m)), list),
            Contender("verl eager", lambda: run(verls(v, R, o, m, CLIP)), list, goal=15),
            Contender("verl under torch.compile", lambda: run(compiled(v, R, o, m, CLIP)), list, goal=4, may_fail=True),
        ],
        bytes_moved=v.numel() * (LOSS_FORWARD_BYTES + LOSS_BACKWARD_BYTES),
        atol=1e-9,  # a gradient is of the order of 1 / tokens
    )


@case
def gae(settings: Settings) -> Case:
    _, V, _, r, m = make_batch(settings.large_shape)
    op, verls_mask = torch.ops.fused_critic.gae, m.float()

    def valid(out):
        return [x[m] for x in out]

    return Case(
        f"GAE without whitening, {settings.large_shape} float32, bool mask",
        threads=2,
        contenders=[
            Contender("torch.ops.fused_critic.gae", lambda: op(r, V, m, gamma=GAMMA, lam=LAM), valid),
            Contender("verl's loop", lambda: settings.verl.gae(r, V, verls_mask, GAMMA, LAM), valid, goal=500),
        ],
        bytes_moved=V.numel() * GAE_BYTES,
    )


@case
def gae_whitened(settings: Settings) -> Case:
    _, V, _, r, m = make_batch(settings.large_shape)
    verls_mask = m.float()

    def valid(out):
        return [x[m] for x in out]

    return Case(
        f"GAE with whitening, {settings.large_shape} float32, float mask",
        threads=2,
        contenders=[
            Contender(
                "integrations.verl.compute_gae_advantage_return",
                lambda: fused_verl.compute_gae_advantage_return(r, V, verls_mask, GAMMA, LAM),
                valid,
            ),
            Contender("verl eager", lambda: settings.verl.compute_gae_advantage_return(r, V, verls_mask, GAMMA, LAM), valid),
        ],
    )
