"""OpenRLHF's own functions, from its wheel."""

from functools import cache

import torch

from ..data import CLIP, GAMMA, LAM
from .registry import ENDING, contender, functions_of

VERSION = "0.11.2"
LIBRARY = "**/purelib/openrlhf/"


@cache
def value_loss_class():
    masked_mean = functions_of("openrlhf", VERSION, LIBRARY + "models/utils.py", ["masked_mean"], torch=torch).masked_mean
    names = ["aggregate_loss", "ValueLoss"]
    return functions_of("openrlhf", VERSION, LIBRARY + "models/loss.py", names, torch=torch, nn=torch.nn, masked_mean=masked_mean).ValueLoss


@contender("OpenRLHF", "value_loss", reductions=("token-mean", "seq-mean-token-mean"))
def value_loss(inputs):
    criterion = value_loss_class()(CLIP, token_level_loss=inputs.reduction == "token-mean")
    v, o, R = inputs.values, inputs.old_values, inputs.returns
    mask = torch.ones_like(v, dtype=torch.bool) if inputs.mask is None else inputs.mask

    def run():
        loss = criterion(v, o, R, mask)
        return loss, torch.autograd.grad(loss, v)[0]

    return run


@contender("OpenRLHF", "gae", longest=8192, masks=ENDING, layouts=("rows",))
def gae(inputs):
    path = LIBRARY + "trainer/ppo_utils/experience_maker.py"
    names = ["RemoteExperienceMaker.get_advantages_and_returns"]
    compute = functions_of("openrlhf", VERSION, path, names, torch=torch).get_advantages_and_returns
    mask = torch.ones_like(inputs.rewards) if inputs.mask is None else inputs.mask
    return torch.no_grad()(lambda: compute(None, inputs.values, inputs.rewards, mask, GAMMA, LAM))
