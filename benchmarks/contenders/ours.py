"""fused_critic: the operators as torch calls them."""

import fused_critic  # noqa: F401  (registers the operators)
import torch

from ..data import CLIP, GAMMA, LAM
from .registry import OURS, contender

DTYPES = ("float32", "bfloat16")
REDUCTIONS = ("token-mean", "seq-mean-token-mean")


@contender(OURS, "value_loss", dtypes=DTYPES, reductions=REDUCTIONS)
def value_loss(inputs):
    operator, v, o, R, m, reduction = (
        torch.ops.fused_critic.value_loss, inputs.values, inputs.old_values, inputs.returns, inputs.mask, inputs.reduction,
    )  # fmt: skip

    def run():
        loss = operator(v, o, R, m, clip_low=-CLIP, clip_high=CLIP, reduction=reduction)[0]
        return loss, torch.autograd.grad(loss, v)[0]

    return run


@contender(OURS, "gae", dtypes=DTYPES, layouts=("rows", "time-major", "packed"))
def gae(inputs):
    operator, r, V, m = torch.ops.fused_critic.gae, inputs.rewards, inputs.values, inputs.mask
    return lambda: operator(r, V, m, gamma=GAMMA, lam=LAM, cu_seqlens=inputs.cu_seqlens, time_dim=inputs.time_dim)
