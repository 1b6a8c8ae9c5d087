"""What torch itself makes of the plain formulas: torch.compile, and its higher-order associative scan."""

from functools import cache

import torch
from fused_critic.check import plain
from torch._higher_order_ops.associative_scan import associative_scan

from ..data import CLIP, GAMMA, LAM
from .registry import contender

LONGEST_UNROLLED = 32  # torch.compile unrolls a loop over time: compiling took 6 s at T = 64 and 40 s at T = 256
MOST_COMPILATIONS = 64  # of one function; torch stops at 8 otherwise

torch._dynamo.config.recompile_limit = MOST_COMPILATIONS


@cache
def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def _loss_and_gradient(function, inputs):
    v, o, R = inputs.values, inputs.old_values, inputs.returns
    mask = torch.ones_like(v, dtype=torch.bool) if inputs.mask is None else inputs.mask

    def run():
        loss = function(v, o, R, mask, CLIP)[0]
        return loss, torch.autograd.grad(loss, v)[0]

    return run


@contender("plain torch", "value_loss")
def plain_value_loss(inputs):
    return _loss_and_gradient(plain.value_loss, inputs)


@contender("torch.compile", "value_loss", starts_slowly=True)
def compiled_value_loss(inputs):
    return _loss_and_gradient(_compiled(plain.value_loss), inputs)


def _loop(function, inputs):
    r, V = inputs.rows(inputs.rewards, inputs.values)
    mask = None if inputs.mask is None else inputs.rows(inputs.mask)[0].float()
    return lambda: inputs.rows(*function(r, V, mask, GAMMA, LAM))


@contender(
    "torch.compile", "gae", longest=LONGEST_UNROLLED, too_long="take minutes to compile: torch.compile unrolls the loop", starts_slowly=True
)
def compiled_gae(inputs):
    return _loop(_compiled(plain.gae), inputs)


def _compose(later, earlier):
    """Affine maps (slope, offset); the scan runs from the end, so `later` is applied first."""
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]


def _scan_gae(rewards, values, mask, combine_mode):
    """A step is an affine map of x[t] = gamma lam A[t + 1] + gamma V[t + 1]; a masked step is the identity."""
    slope, offset = torch.full_like(rewards, GAMMA * LAM), GAMMA * LAM * (rewards - values) + GAMMA * values
    if mask is not None:
        slope, offset = torch.where(mask, slope, 1.0), torch.where(mask, offset, 0.0)
    _, x = associative_scan(_compose, (slope, offset), dim=-1, reverse=True, combine_mode=combine_mode)
    x = torch.nn.functional.pad(x[:, 1:], (0, 1))
    return rewards - values + x, rewards + x


def _scanned(function, inputs, combine_mode):
    r, V = inputs.rows(inputs.rewards, inputs.values)
    mask = None if inputs.mask is None else inputs.rows(inputs.mask)[0]
    return torch.no_grad()(lambda: inputs.rows(*function(r, V, mask, combine_mode)))


@contender("associative_scan", "gae", longest=8192)
def scanned(inputs):
    return _scanned(_scan_gae, inputs, "generic")


@contender("associative_scan (Triton)", "gae", devices=("cuda",), starts_slowly=True)
def scanned_by_triton(inputs):
    return _scanned(_compiled(_scan_gae), inputs, "pointwise")
