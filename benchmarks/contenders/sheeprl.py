"""sheeprl's own functions, from its wheel: a NumPy loop over time, and a scan in log2(T) rounds of torch operations."""

from functools import cache

import numpy as np
import torch

from ..data import GAMMA, LAM
from .registry import contender, functions_of

VERSION = "0.8.4"
MASKS = ("none", "full")  # its done flag takes effect at the same step's bootstrap, but for the last step's: no padding


@cache
def functions():
    names = ["_to_numpy", "gae", "log_scan_gae"]
    return functions_of("sheeprl", VERSION, "sheeprl/utils/utils.py", names, torch=torch, np=np)


def _prepare(inputs, compute):
    """[T, B], sequences of full length; the value after the last step is 0."""
    rewards, values = (x.t() for x in inputs.rows(inputs.rewards, inputs.values))
    dones, next_value = torch.zeros_like(rewards, dtype=torch.bool), torch.zeros_like(values[:1])

    def run():
        returns, advantages = compute(rewards, values, dones, next_value, len(rewards), GAMMA, LAM)
        return [inputs.rows(x.t())[0] for x in (advantages, returns)]

    return torch.no_grad()(run)


@contender("sheeprl loop (NumPy)", "gae", longest=40_000, masks=MASKS, devices=("cpu",))
def loop(inputs):
    return _prepare(inputs, functions().gae)


@contender("sheeprl log-scan", "gae", masks=MASKS)
def log_scan(inputs):
    return _prepare(inputs, functions().log_scan_gae)
