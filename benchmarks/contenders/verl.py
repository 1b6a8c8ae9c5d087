"""verl's own functions, from its wheel."""

from functools import cache

import torch
import verl_wheel  # found since registry.py, which the package imports first, has added the tests' folder

from ..data import CLIP, GAMMA, LAM
from . import registry
from .registry import LeftOut, contender


@cache
def functions():
    """compute_value_loss, and compute_gae_advantage_return without the whitening."""
    try:
        found = verl_wheel.functions(registry.download_allowed)
    except verl_wheel.VerlUnavailable as reason:
        raise LeftOut(str(reason)) from None
    found.compute_gae_advantage_return.__globals__["verl_F"].masked_whiten = lambda advantages, mask: advantages
    return found


@contender("verl", "value_loss", dtypes=("float32", "bfloat16"), reductions=("token-mean", "seq-mean-token-mean"))
def value_loss(inputs):
    compute, v, o, R = functions().compute_value_loss, inputs.values, inputs.old_values, inputs.returns
    mask = torch.ones_like(v, dtype=torch.bool) if inputs.mask is None else inputs.mask

    def run():
        loss = compute(v, R, o, mask, CLIP, inputs.reduction)[0]
        return loss, torch.autograd.grad(loss, v)[0]

    return run


@contender("verl", "gae", longest=8192, layouts=("rows",))
def gae(inputs):
    compute = functions().compute_gae_advantage_return
    mask = torch.ones_like(inputs.rewards) if inputs.mask is None else inputs.mask.float()
    return lambda: compute(inputs.rewards, inputs.values, mask, GAMMA, LAM)
