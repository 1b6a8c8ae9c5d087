"""Sequential loops in machine code, on one thread of the CPU: the fastest that trainers have there."""

import sys
from functools import cache

import numpy as np
import torch

from ..data import GAMMA, LAM
from .registry import ENDING, SKIPPING, WHEELS, LeftOut, contender, functions_of, wheel_folder

TIANSHOU, FAST_GAE = "2.0.1", "0.0.4"
CPU = ("cpu",)
LAYOUTS = ("rows", "time-major", "packed")


def _numba():
    try:
        import numba
    except ImportError:
        raise LeftOut("numba is not installed") from None
    return numba


@cache
def _scalar_loop():
    @_numba().njit
    def compute(rewards, values, mask, ends, gamma, lam, advantages, returns):
        """Flat arrays; a token with `mask` False is skipped; a token with `ends` True has nothing after it."""
        next_value = next_advantage = np.float32(0)
        for t in range(len(rewards) - 1, -1, -1):
            if ends[t]:
                next_value = next_advantage = np.float32(0)
            if mask[t]:
                next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
                next_value = values[t]
                advantages[t] = next_advantage
                returns[t] = next_advantage + next_value
            else:
                advantages[t] = returns[t] = np.float32(0)

    return compute


@cache
def _scalar_loop_unmasked():
    @_numba().njit
    def compute(rewards, values, columns, gamma, lam, advantages, returns):
        """Flat arrays: rows of `columns` tokens, all of them valid."""
        for row in range(len(rewards) // columns):
            next_value = next_advantage = np.float32(0)
            for t in range((row + 1) * columns - 1, row * columns - 1, -1):
                next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
                next_value = values[t]
                advantages[t] = next_advantage
                returns[t] = next_advantage + next_value

    return compute


@contender("scalar loop, 1 thread (numba)", "gae", masks=SKIPPING, layouts=("rows", "packed"), devices=CPU, starts_slowly=True)
def scalar_loop(inputs):
    """The recurrence as it reads, float32: a yardstick rather than somebody's code."""
    r, V = (x.flatten().numpy() for x in (inputs.rewards, inputs.values))
    ends = torch.zeros_like(inputs.rewards, dtype=torch.bool)
    ends[..., -1] = True
    if inputs.cu_seqlens is not None:
        ends = inputs.ends()
    gamma, lam = np.float32(GAMMA), np.float32(LAM)
    unmasked = inputs.mask is None and inputs.cu_seqlens is None
    if unmasked:
        compute, arguments = _scalar_loop_unmasked(), (r, V, inputs.rewards.shape[-1], gamma, lam)
    else:
        mask = torch.ones_like(ends) if inputs.mask is None else inputs.mask
        compute, arguments = _scalar_loop(), (r, V, mask.flatten().numpy(), ends.flatten().numpy(), gamma, lam)

    def run():
        advantages, returns = torch.empty_like(inputs.rewards), torch.empty_like(inputs.rewards)
        compute(*arguments, advantages.view(-1).numpy(), returns.view(-1).numpy())
        return advantages, returns

    return run


@contender("tianshou (numba)", "gae", masks=ENDING, layouts=LAYOUTS, devices=CPU, starts_slowly=True)
def tianshou(inputs):
    """Flat arrays, advantages in float64."""
    compute = _tianshou()
    next_values = inputs.next_values()
    r, V, ends = inputs.rows(inputs.rewards, inputs.values, inputs.ends())
    shape = r.shape
    r, V, following, ends = (x.contiguous().flatten().numpy() for x in (r, V, next_values, ends))

    def run():
        advantages = compute(V, following, r, ends, GAMMA, LAM)
        return inputs.rows(*(torch.from_numpy(x).view(shape) for x in (advantages, advantages + V)))

    return run


@cache
def _tianshou():
    njit = _numba().njit
    return njit(functions_of("tianshou", TIANSHOU, "tianshou/algorithm/algorithm_base.py", ["_gae"], np=np)._gae)


@contender("fast-gae (Cython)", "gae", masks=ENDING, layouts=LAYOUTS, devices=CPU, starts_slowly=True)
def fast_gae(inputs):
    """Flat float32 arrays. Its reward and done flag at t are those of the step before; the last value is only bootstrapped from."""
    compute_gae = _fast_gae()
    r, V, ends = inputs.rows(inputs.rewards, inputs.values, inputs.ends())
    shape = r.shape
    pad = torch.nn.functional.pad
    values = pad(V.flatten(), (0, 1)).numpy()
    rewards, done = (pad(x.float().flatten(), (1, 0)).numpy() for x in (r, ends))

    def run():
        advantages = compute_gae(done, values, rewards, GAMMA, LAM)[:-1]
        return inputs.rows(*(torch.from_numpy(x).view(shape) for x in (advantages, advantages + values[:-1])))

    return run


@cache
def _fast_gae():
    """Its wheel holds a library for macOS alone, and the Cython source, which is built here."""
    try:
        import pyximport
    except ImportError:
        raise LeftOut("Cython is not installed") from None
    root = wheel_folder("fast_gae", FAST_GAE)
    sys.path.insert(0, str(root))
    importers = pyximport.install(build_dir=str(WHEELS), language_level=3, setup_args={"include_dirs": np.get_include()})
    try:
        from fast_gae.fast_gae import compute_gae
    except ImportError as error:
        raise LeftOut(f"fast-gae cannot be built here: {error}".splitlines()[0]) from None
    finally:
        pyximport.uninstall(*importers)
        sys.path.remove(str(root))
    return compute_gae
