"""TorchRL's own functions, from its wheel: the loop over time, and the convolution with a truncated geometric series."""

import math
from functools import cache

import torch

from ..data import GAMMA, LAM
from .registry import ENDING, contender, functions_of

VERSION = "0.14.1"
FOLDER = "torchrl/objectives/value/"


def _expand_right(tensor, shape):
    """What tensordict.utils.expand_right does: new dimensions at the end."""
    return tensor.reshape(tensor.shape + (1,) * (len(shape) - tensor.ndim)).expand(shape)


@cache
def functions():
    names = ["_custom_conv1d", "_flatten_batch", "_get_num_per_traj", "_split_and_pad_sequence", "_make_gammas_tensor"]
    utils = functions_of("torchrl", VERSION, FOLDER + "utils.py", names, torch=torch, expand_right=_expand_right, TensorDictBase=())
    names = ["_geom_series_like", "_fast_vec_gae", "generalized_advantage_estimate", "vec_generalized_advantage_estimate"]
    scope = dict(vars(utils), torch=torch, math=math, is_dynamo_compiling=lambda: False)
    return functions_of("torchrl", VERSION, FOLDER + "functional.py", names, **scope)


def _arguments(inputs):
    """[B, T, 1]."""
    rewards, values, done = inputs.rows(inputs.rewards, inputs.values, inputs.ends())
    return [x.unsqueeze(-1) for x in (values, inputs.next_values(), rewards, done)]


def _prepare(inputs, compute):
    arguments = _arguments(inputs)
    return torch.no_grad()(lambda: [inputs.rows(x.squeeze(-1))[0] for x in compute(GAMMA, LAM, *arguments)])


@contender("TorchRL loop", "gae", longest=8192, masks=ENDING)
def loop(inputs):
    return _prepare(inputs, functions().generalized_advantage_estimate)


@contender("TorchRL vectorised", "gae", longest=8192, masks=ENDING)
def vectorised(inputs):
    return _prepare(inputs, functions().vec_generalized_advantage_estimate)
