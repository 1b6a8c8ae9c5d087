"""TorchRL's advantage estimators and critic loss, executed from its wheel, beside fused_critic.integrations.torchrl.

The module GAE, which needs tensordict, is compared in tests/trainers/test_torchrl_ppo.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sys
import types
from types import SimpleNamespace

import fused_critic
import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import torchrl as fused_torchrl
from torch.nn import functional as F

LOOP, VECTORISED = "generalized_advantage_estimate", "vec_generalized_advantage_estimate"
FUNCTIONS = [LOOP, VECTORISED]
# Shapes with the time dimension; the last dimension is the features'.
SHAPES = [((3, 17, 1), -2), ((3, 17, 2), -2), ((4, 3, 17, 2), -2), ((17, 3), -2), ((1, 17, 3), -2), ((1, 1, 1), -2), ((3, 17, 2), 1)]
TIME_FIRST_OR_LAST = [((17, 3, 2), 0), ((17, 3, 1), 0), ((3, 2, 17), -1), ((3, 17, 2, 5), 1), ((3, 17, 2, 5), -3), ((17,), -1)]
# Exact in float32, as are their product and powers of it for a while: what TorchRL rounds to float32, it does not change.
GAMMA, LMBDA = 0.984375, 0.9375
# The vectorised function leaves out what is multiplied by less than 1e-7; the loop leaves nothing out.
SERIES = 2e-5
TOLERANCES = {torch.float32: (1e-6, 4e-6), torch.float64: (1e-13, 1e-13)}


@pytest.fixture(scope="module")
def torchrl():
    """TorchRL's own functions."""
    path = "torchrl/objectives/value"
    helpers = ["_custom_conv1d", "roll_by_gather", "_make_gammas_tensor", "_flatten_batch", "_get_num_per_traj", "_split_and_pad_sequence"]
    utils = peers.functions("torchrl", f"{path}/utils.py", helpers, torch=torch, TensorDictBase=dict, expand_right=expand_right)
    scope = dict(torch=torch, math=math, wraps=functools.wraps, is_dynamo_compiling=lambda: False, SHAPE_ERR="shapes", **vars(utils))
    own = ["_transpose_time", "_geom_series_like", "_fast_vec_gae", *FUNCTIONS]
    functional = peers.functions("torchrl", f"{path}/functional.py", own, **scope)
    decorated = {name: functional._transpose_time(getattr(functional, name)) for name in FUNCTIONS}

    losses = peers.functions("torchrl", "torchrl/objectives/utils.py", ["distance_loss", "_clip_value_loss", "_reduce"], torch=torch, F=F)
    loss_critic = peers.functions(
        "torchrl", "torchrl/objectives/ppo.py", ["PPOLoss.loss_critic"], torch=torch, contextlib=contextlib, **vars(losses)
    )
    common = peers.functions(
        "torchrl", "torchrl/objectives/common.py", ["LossModule._reduce_loss", "LossModule._expand_loss_mask"], torch=torch, **vars(losses)
    )
    return SimpleNamespace(**decorated, **vars(loss_critic), **vars(common))


def expand_right(x, shape):
    return x.reshape(*x.shape, *[1] * (len(shape) - x.ndim)).expand(shape)


def trajectories(shape, dtype=torch.float32, flags="time limits", seed=0):
    """state_value, next_state_value, reward, done, terminated."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    first, second = (torch.rand(shape, generator=generator) < 0.25 for _ in range(2))
    done, terminated = {
        "none": (torch.zeros_like(first), torch.zeros_like(first)),
        "done": (first, None),  # terminated is done
        "time limits": (first | second, first),  # done without terminated: truncated
        "only time limits": (first, torch.zeros_like(first)),
        "any": (first, second),  # terminated without done too: no next value, but the trace goes on
    }[flags]
    return *numbers, done, terminated


def results(torchrl, name, *arguments, **keywords):
    return [getattr(module, name)(*arguments, **keywords) for module in (fused_torchrl, torchrl)]


def compare(parity, name, ours, theirs, rtol, atol, what="values"):
    for got, expected in zip(ours, theirs):
        assert got.dtype == expected.dtype
        suffix = ", float64" if got.dtype == torch.float64 else ""
        parity.same("torchrl", name, what + suffix, got, expected, rtol=rtol, atol=atol)


# --- the same results: advantages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["none", "done", "time limits", "only time limits", "any"])
@pytest.mark.parametrize("shape, time_dim", SHAPES + TIME_FIRST_OR_LAST, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_and_flags(torchrl, parity, name, shape, time_dim, flags):
    for dtype, (rtol, atol) in TOLERANCES.items():
        ours, theirs = results(torchrl, name, GAMMA, LMBDA, *trajectories(shape, dtype, flags), time_dim=time_dim)
        compare(parity, name, ours, theirs, rtol, atol)


@pytest.mark.parametrize("dtypes", ["bbb", "hhh", "bbf", "bfb", "fbb", "ffd", "dff"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes(torchrl, parity, name, dtypes):
    """Of value, next value and reward. The loop returns the next value's, the vectorised function at least float32."""
    kinds = {"b": torch.bfloat16, "h": torch.float16, "f": torch.float32, "d": torch.float64}
    *numbers, done, terminated = trajectories((3, 17, 2), torch.float64)
    numbers = [x.to(kinds[kind]) for x, kind in zip(numbers, dtypes)]
    ours, theirs = results(torchrl, name, GAMMA, LMBDA, *numbers, done, terminated)
    # Half precision: one unit in the last place, since the loop's target is rounded twice by TorchRL and once here.
    half = next((x.dtype for x in theirs if x.dtype.itemsize == 2), None)
    tolerance = torch.finfo(half).eps if half else 1e-6
    compare(parity, name, ours, theirs, tolerance, 4 * tolerance, f"values, {half}" if half else "values, mixed dtypes")


SCALARS = [(0.99, 0.95), (1.0, 1.0), (1.0, 0.95), (1.05, 0.95), (1.05, 1.0)]
ZERO = (0.0, 0.5)  # an error of the vectorised function: test_difference_vectorised_lambda_0


@pytest.mark.parametrize("kind", ["number", "0-d", "[1]", "float64"])
@pytest.mark.parametrize("name, gamma, lmbda", [(name, *pair) for name in FUNCTIONS for pair in SCALARS] + [(LOOP, *ZERO)])
def test_scalars(torchrl, parity, name, kind, gamma, lmbda):
    make = {
        "number": float, "0-d": torch.tensor, "[1]": lambda x: torch.tensor([x]), "float64": lambda x: torch.tensor(x, dtype=torch.float64)
    }[kind]  # fmt: skip
    ours, theirs = results(torchrl, name, make(gamma), make(lmbda), *trajectories((3, 17, 2)))
    # With a float64 gamma the vectorised function's results are float64, the loop's are not.
    tolerance = TOLERANCES[torch.float64] if theirs[0].dtype == torch.float64 else (1e-6, 1e-5)
    compare(parity, name, ours, theirs, *tolerance, "values, gamma and lmbda as tensors" if kind != "number" else "values")


@pytest.mark.parametrize("varies", ["gamma", "lmbda", "both"])
@pytest.mark.parametrize("shape, time_dim", [((3, 17, 2), -2), ((3, 17, 1), 1), ((17, 3, 2), 0), ((3, 17, 2, 5), -3)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_discount_per_step(torchrl, parity, name, shape, time_dim, varies):
    """As GAE hands it on for multi-step transitions: gamma ** steps_to_next_obs."""
    steps = 0.5 + 0.5 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, (rtol, atol) in TOLERANCES.items():
        gamma, lmbda = (steps.to(dtype) if varies in (which, "both") else torch.tensor(LMBDA, dtype=dtype) for which in ("gamma", "lmbda"))
        ours, theirs = results(torchrl, name, gamma, lmbda, *trajectories(shape, dtype), time_dim=time_dim)
        compare(parity, name, ours, theirs, rtol, atol, "values, a discount per step")


@pytest.mark.parametrize("form", [(17, 2), (17, 1), (2,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_discounts_of_fewer_dimensions(torchrl, parity, name, form):
    gamma = 0.5 + 0.5 * torch.rand(form, generator=torch.Generator().manual_seed(1))
    ours, theirs = results(torchrl, name, gamma, torch.tensor(LMBDA), *trajectories((3, 17, 2)))
    compare(parity, name, ours, theirs, 1e-6, 4e-6, "values, a discount per step")


@pytest.mark.parametrize("gamma", ["number", "per step"])
@pytest.mark.parametrize("flags", ["done", "time limits", "any"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(torchrl, parity, name, flags, gamma):
    gradients = []
    for function in (getattr(fused_torchrl, name), getattr(torchrl, name)):
        *numbers, done, terminated = trajectories((3, 17, 2), torch.float64, flags)
        leaves = [x.requires_grad_() for x in numbers]
        discounts = [GAMMA, LMBDA]
        if gamma == "per step":
            discounts = [x * torch.rand_like(numbers[0]).clamp(0.9, 0.9) for x in discounts]
            leaves += [x.requires_grad_() for x in discounts]
        advantage, target = function(*discounts, *numbers, done, terminated)
        weights = torch.linspace(-1, 1, advantage.numel(), dtype=torch.float64).view_as(advantage)
        gradients.append(torch.autograd.grad((weights * advantage + weights.cos() * target).sum(), leaves))
    for got, expected in zip(*gradients):
        parity.same("torchrl", name, "gradients, float64", got, expected, rtol=1e-12, atol=1e-12)


def test_long_trajectories_of_the_loop(torchrl, parity):
    ours, theirs = results(torchrl, LOOP, 0.99, 0.95, *trajectories((2, 600, 1), flags="none"))
    compare(parity, LOOP, ours, theirs, 1e-6, 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_contiguous_and_inputs_are_left_alone(name):
    arguments = trajectories((3, 17, 2))
    before = [x.clone() for x in arguments]
    assert all(x.is_contiguous() for x in getattr(fused_torchrl, name)(GAMMA, LMBDA, *arguments, time_dim=0))
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_into_one_graph(name):
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    arguments = (torch.tensor(GAMMA), torch.tensor(LMBDA), *trajectories((3, 17, 1)))
    expected = getattr(fused_torchrl, name)(*arguments)
    compiled = torch.compile(getattr(fused_torchrl, name), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments), expected, rtol=0, atol=0)
    assert "fused_critic.gae.tensor" in targets


# --- the same results: critic loss ------------------------------------------------------------------------------------------------


def their_loss(torchrl, target, value, old, *, clip_value, loss_critic_type, critic_coeff, reduction, mask):
    """PPOLoss.loss_critic and the reduction that PPOLoss.forward applies to it; a tensordict is a dictionary here."""

    class Batch(dict):
        def get(self, key, default=None):
            return super().get(key, default)

    batch = Batch(value_target=target, state_value=old, shifted_valid=mask)
    module = SimpleNamespace(
        separate_losses=False, functional=False, log_explained_variance=True, _has_critic=True, reduction=reduction,
        tensor_keys=SimpleNamespace(value_target="value_target", value="state_value"), clip_value=clip_value,
        loss_critic_type=loss_critic_type, critic_coeff=critic_coeff, critic_network=lambda _: Batch(state_value=value),
        _critic_loss_inputs=lambda *tensors: tensors, _clear_weakrefs=lambda *_: None, _loss_mask_keys=lambda: ("shifted_valid",),
        _expand_loss_mask=torchrl._expand_loss_mask,
    )  # fmt: skip
    loss, fraction, explained = torchrl.loss_critic(module, batch)
    return torchrl._reduce_loss(module, loss, batch), fraction, explained


def critic(shape=(64, 1), dtype=torch.float32, seed=0):
    """target, value, old value."""
    generator = torch.Generator().manual_seed(seed)
    target, old, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return target.to(dtype), (old + 0.3 * noise).to(dtype).requires_grad_(), old.to(dtype)


OPTIONS = dict(clip_value=0.2, loss_critic_type="smooth_l1", critic_coeff=1.0, reduction="mean", mask=None)


def both_losses(torchrl, tensors, **options):
    options = OPTIONS | options
    found = []
    for loss in (fused_torchrl.critic_loss, functools.partial(their_loss, torchrl)):
        entries = loss(*tensors, **options)
        (gradient,) = torch.autograd.grad(entries[0].sum(), tensors[1])
        found.append((*entries, gradient))
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_critic_type", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("clip_value", [None, 0.2, torch.tensor(0.2)], ids=str)
@pytest.mark.parametrize("shape", [(64, 1), (4, 16, 1), (4, 16, 2)], ids=str)
def test_critic_loss(torchrl, parity, shape, clip_value, loss_critic_type, reduction):
    options = dict(clip_value=clip_value, loss_critic_type=loss_critic_type, reduction=reduction, critic_coeff=0.7)
    masks = {"": None, " under a mask": torch.rand(shape[:-1], generator=torch.Generator().manual_seed(3)) < 0.7}
    for dtype, (rtol, atol) in {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-12)}.items():
        if dtype == torch.float64 and isinstance(clip_value, torch.Tensor):
            continue  # TorchRL's 0-d float32 range is used as it is on both sides; nothing new
        suffix = ", float64" if dtype == torch.float64 else ""
        for label, mask in masks.items():
            ours, theirs = both_losses(torchrl, critic(shape, dtype), mask=mask, **options)
            assert ours[0].dtype == theirs[0].dtype
            parity.same("torchrl", "PPOLoss.loss_critic", "loss" + label + suffix, ours[0], theirs[0], rtol=rtol, atol=atol)
            parity.same("torchrl", "PPOLoss.loss_critic", "gradient" + label + suffix, ours[3], theirs[3], rtol=rtol, atol=atol)
            assert (ours[1] is None) == (theirs[1] is None) == (clip_value is None)
            if mask is None and clip_value is not None:
                assert ours[1].dtype == theirs[1].dtype
                parity.same("torchrl", "PPOLoss.loss_critic", "value_clip_fraction" + suffix, ours[1], theirs[1], rtol=rtol, atol=0)
            if mask is None and math.prod(shape[1:]) == 1:
                explained = theirs[2].squeeze()
                parity.same("torchrl", "PPOLoss.loss_critic", "explained_variance" + suffix, ours[2], explained, rtol=rtol, atol=atol)


def test_nothing_valid(torchrl):
    ours, theirs = both_losses(torchrl, critic(), mask=torch.zeros(64, 1, dtype=torch.bool))
    assert ours[0] == theirs[0] == 0 and not ours[3].any() and not theirs[3].any()


@pytest.mark.parametrize("option", [dict(loss_critic_type="huber"), dict(reduction="median")], ids=str)
def test_unknown_names(torchrl, option):
    for loss in (fused_torchrl.critic_loss, functools.partial(their_loss, torchrl)):
        with pytest.raises(NotImplementedError):
            loss(*critic(), **(OPTIONS | option))


# --- differences on purpose -------------------------------------------------------------------------------------------------------


def exact(gamma, lmbda, value, following, reward, done, terminated):
    """The loop of the definition in float64, over the second dimension from the end."""
    value, following, reward, proceeds, survives = (x.double() for x in (value, following, reward, ~done, ~terminated))
    advantage, carry = torch.zeros_like(value), 0.0
    for t in reversed(range(value.shape[-2])):
        delta = reward[..., t, :] + gamma * survives[..., t, :] * following[..., t, :] - value[..., t, :]
        carry = delta + gamma * lmbda * proceeds[..., t, :] * carry
        advantage[..., t, :] = carry
    return advantage


def test_difference_the_geometric_series_is_cut_off(torchrl, parity):
    """In float64, where rounding does not hide it: 261 steps at 0.99 * 0.95, of 600."""
    arguments = trajectories((2, 600, 1), torch.float64, "none")
    ours, theirs = results(torchrl, VECTORISED, *torch.tensor([0.99, 0.95], dtype=torch.float64), *arguments)
    expected = exact(0.99, 0.95, *arguments)
    torch.testing.assert_close(ours[0], expected, rtol=1e-13, atol=1e-13)
    error = (theirs[0] - expected).abs().max()
    assert 1e-7 < error < SERIES
    parity.differs("torchrl", VECTORISED, "gamma * lmbda < 1", theirs="series cut off below 1e-7", ours="the recursion itself")


def test_difference_no_discount(torchrl, parity):
    """gamma * lmbda = 1: TorchRL sums as many taps as there are steps, in float32 with float32 inputs; here the recursion."""
    arguments = trajectories((2, 600, 1), torch.float32, "none")
    expected = exact(1.0, 1.0, *arguments)
    ours, theirs = results(torchrl, VECTORISED, 1.0, 1.0, *arguments)
    for got in (ours[0], theirs[0]):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)

    def multiplications(gamma, steps):
        """How many taps the filter has that TorchRL convolves with."""
        found = []
        conv1d = torch.conv1d
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "conv1d", lambda x, weight: found.append(weight.shape[-1]) or conv1d(x, weight))
            getattr(torchrl, VECTORISED)(gamma, 1.0, *trajectories((1, steps, 1), flags="none"))
        return found

    assert [multiplications(1.0, steps) for steps in (500, 1000)] == [[500], [1000]]
    assert multiplications(0.9, 500) == multiplications(0.9, 1000) == [152]
    parity.differs("torchrl", VECTORISED, "gamma * lmbda >= 1", theirs="as many taps as steps: T squared", ours="the recursion itself")


def test_difference_vectorised_lambda_0(torchrl, parity):
    arguments = trajectories((3, 17, 2))
    with pytest.raises(IndexError):
        getattr(torchrl, VECTORISED)(0.9, 0.0, *arguments)
    ours = fused_torchrl.vec_generalized_advantage_estimate(0.9, 0.0, *arguments)
    torch.testing.assert_close(ours, getattr(torchrl, LOOP)(0.9, 0.0, *arguments))
    parity.differs("torchrl", VECTORISED, "gamma * lmbda = 0", theirs="IndexError", ours="one-step advantages")


@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 17, 2)], ids=str)
def test_difference_nothing_to_estimate(torchrl, parity, shape):
    arguments = trajectories(shape)
    with pytest.raises((IndexError, RuntimeError)):
        getattr(torchrl, VECTORISED)(0.9, 0.9, *arguments)
    for name in FUNCTIONS:
        assert [x.shape for x in getattr(fused_torchrl, name)(0.9, 0.9, *arguments)] == [torch.Size(shape)] * 2
    parity.differs("torchrl", VECTORISED, "no steps or no rows", theirs="IndexError or RuntimeError", ours="empty results")


def test_difference_gradient_of_scalar_discounts(torchrl, parity):
    """Theirs leaves out what gamma and lmbda do as powers; ours is the loop's, which is whole."""
    found = []
    for function in (getattr(torchrl, VECTORISED), fused_torchrl.vec_generalized_advantage_estimate, getattr(torchrl, LOOP)):
        discounts = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (GAMMA, LMBDA)]
        advantage, _ = function(*discounts, *trajectories((3, 17, 2), torch.float64))
        found.append(torch.autograd.grad(advantage.square().sum(), discounts, allow_unused=True))
    theirs, ours, loop = found
    assert theirs[1] is None and not torch.allclose(theirs[0], loop[0], rtol=0.01)
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    parity.differs("torchrl", VECTORISED, "gradient of 0-d gamma and lmbda", theirs="a part of it", ours="whole, as the loop's")


@pytest.mark.parametrize("kind", ["number", "float32 tensor"])
def test_difference_float64(torchrl, parity, kind):
    arguments = trajectories((2, 100, 1), torch.float64)
    gamma, lmbda = (0.99, 0.95) if kind == "number" else (torch.tensor(0.99), torch.tensor(0.95))
    ours, theirs = results(torchrl, LOOP, gamma, lmbda, *arguments)
    expected = exact(float(gamma), float(lmbda), *arguments)
    torch.testing.assert_close(ours[0], expected, rtol=1e-13, atol=1e-13)
    assert 1e-9 < (theirs[0] - expected).abs().max() < 1e-5
    parity.differs(
        "torchrl", LOOP, "float64 values, gamma a number or float32", theirs="products with gamma in float32", ours="all in float64"
    )


def test_difference_half_precision(torchrl, parity):
    shape = (2, 100, 1)
    arguments = trajectories(shape, torch.bfloat16)
    ours, theirs = results(torchrl, LOOP, GAMMA, LMBDA, *arguments)
    expected = exact(GAMMA, LMBDA, *arguments) + arguments[0].double()
    rounded = expected.bfloat16()
    assert torch.equal(ours[1], rounded) and not torch.equal(theirs[1], rounded)
    torch.testing.assert_close(theirs[1].double(), expected, rtol=0.01, atol=0.05)
    parity.differs("torchrl", LOOP, "bfloat16 throughout", theirs="target rounded twice", ours="target rounded once")

    gamma = torch.full(shape, GAMMA, dtype=torch.bfloat16)
    ours, theirs = results(torchrl, VECTORISED, gamma, torch.tensor(LMBDA, dtype=torch.bfloat16), *arguments)
    assert [x.dtype for x in theirs] == [torch.bfloat16] * 2 and [x.dtype for x in ours] == [torch.float32] * 2
    torch.testing.assert_close(theirs[0].float(), ours[0], rtol=0.05, atol=0.1)
    parity.differs("torchrl", VECTORISED, "bfloat16 throughout, a discount per step", theirs="computed in bfloat16", ours="float32")


@pytest.mark.parametrize("flags", ["done", "time limits"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_difference_nan_after_termination(torchrl, parity, name, flags):
    for gamma in (GAMMA, torch.full((3, 17, 2), GAMMA)):
        value, following, reward, done, terminated = trajectories((3, 17, 2), flags=flags)
        ended = done if terminated is None else terminated
        expected = getattr(fused_torchrl, name)(gamma, LMBDA, value, following, reward, done, terminated)
        following = following.masked_fill(ended, math.nan)
        ours, theirs = results(torchrl, name, gamma, LMBDA, value, following, reward, done, terminated)
        assert theirs[0][ended].isnan().all()
        assert all(torch.equal(x, y) for x, y in zip(ours, expected))
    parity.differs("torchrl", name, "NaN as next value of a terminated step", theirs="NaN", ours="not used")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_difference_flags_that_are_not_bool(torchrl, parity, name, dtype):
    *numbers, done, terminated = trajectories((3, 17, 2))
    expected = getattr(torchrl, name)(GAMMA, LMBDA, *numbers, done, terminated)
    try:
        ours, theirs = results(torchrl, name, GAMMA, LMBDA, *numbers, done.to(dtype), terminated.to(dtype))
    except RuntimeError:  # theirs; which of the functions gives numbers and which an error depends on the dtype
        theirs, ours = None, getattr(fused_torchrl, name)(GAMMA, LMBDA, *numbers, done.to(dtype), terminated.to(dtype))
    assert theirs is None or not torch.allclose(theirs[0], expected[0], rtol=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=4e-6)
    parity.differs("torchrl", name, "flags that are not bool", theirs="wrong numbers", ours="non-zero is set")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_difference_integer_rewards(torchrl, parity, name):
    value, following, reward, *flags = trajectories((3, 17, 2))
    assert getattr(torchrl, name)(GAMMA, LMBDA, value, following, reward.long(), *flags)[0].isfinite().all()
    with pytest.raises(TypeError, match="reward: expected a floating dtype"):
        getattr(fused_torchrl, name)(GAMMA, LMBDA, value, following, reward.long(), *flags)
    parity.differs("torchrl", name, "integer rewards", theirs="accepted", ours="TypeError")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_difference_one_dimension(torchrl, parity, name):
    arguments = trajectories((17,))
    ours, theirs = results(torchrl, name, GAMMA, LMBDA, *arguments, time_dim=0)
    assert [x.shape for x in theirs] == [(17, 1)] * 2 and [x.shape for x in ours] == [(17,)] * 2
    torch.testing.assert_close(ours[0], theirs[0].squeeze(-1), rtol=1e-6, atol=4e-6)
    parity.differs("torchrl", name, "[T] tensors, time_dim=0", theirs="results [T, 1]", ours="results [T]")


def test_difference_gamma_of_fewer_dimensions_and_a_positive_time_dim(torchrl, parity):
    arguments = trajectories((2, 3, 3))
    gamma = 0.5 + 0.5 * torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = results(torchrl, LOOP, gamma, LMBDA, *arguments, time_dim=1)
    transposed = fused_torchrl.generalized_advantage_estimate(gamma.T, LMBDA, *arguments, time_dim=1)
    torch.testing.assert_close(theirs, transposed)
    torch.testing.assert_close(ours, getattr(torchrl, LOOP)(gamma, LMBDA, *arguments))
    parity.differs(
        "torchrl",
        LOOP,
        "[T, F] gamma of [B, T, F] values, time_dim=1",
        theirs="transposed before it is combined",
        ours="expands as in torch",
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_broadcasting(torchrl, name):
    """Neither broadcasts the five tensors, nor a discount beyond their shape; ours says which shape it wanted."""
    value, following, reward, *flags = trajectories((3, 17, 2))
    for function, message in ((getattr(torchrl, name), "shapes"), (getattr(fused_torchrl, name), r"reward \[3, 17, 1\]")):
        with pytest.raises(RuntimeError, match=message):
            function(GAMMA, LMBDA, value, following, reward[..., :1], *flags)
        for discount in (torch.rand(5), torch.rand(2, 3, 17, 2)):
            with pytest.raises((RuntimeError, ValueError)):
                function(discount, LMBDA, value, following, reward, *flags)
    with pytest.raises(ValueError, match=r"gamma: expected a number, or a tensor that expands to \[3, 17, 2\], got \[5\]"):
        getattr(fused_torchrl, name)(torch.rand(5), LMBDA, value, following, reward, *flags)
    with pytest.raises(RuntimeError, match="time_dim=3"):
        getattr(fused_torchrl, name)(GAMMA, LMBDA, value, following, reward, *flags, time_dim=3)


@pytest.mark.parametrize("value, old, target", [(1.5, 0.5, 1.25), (0.5, 0.0, 3.0)], ids=["equal losses", "on the bound"])
def test_difference_gradient_at_ties(torchrl, parity, value, old, target):
    """Range 0.5: the target half way between the value and its clipped value, and the value on the bound of the range."""
    tensors = torch.tensor([target]), torch.tensor([value], requires_grad=True), torch.tensor([old])
    ours, theirs = both_losses(torchrl, tensors, clip_value=0.5, loss_critic_type="l2")
    whole = 2 * (value - target)
    assert ours[0] == theirs[0]
    assert ours[3] == whole and 0 < theirs[3] / whole <= 1
    if target == 1.25:
        assert theirs[3] == whole / 2
    parity.differs(
        "torchrl", "PPOLoss.loss_critic", "ties and bounds of the range", theirs="a part of the gradient", ours="the whole gradient"
    )


def test_difference_loss_in_half_precision(torchrl, parity):
    """In bfloat16 100 + 0.2 is 100: the clipped prediction is the old value."""
    target, value, old = (torch.full((8, 1), x, dtype=torch.bfloat16) for x in (104.0, 100.5, 100.0))
    ours, theirs = both_losses(torchrl, (target, value.requires_grad_(), old), loss_critic_type="l2")
    assert theirs[0] == 16
    assert ours[0].dtype == torch.bfloat16 and ours[0] == torch.tensor(3.8**2).bfloat16()
    parity.differs(
        "torchrl", "PPOLoss.loss_critic", "bfloat16 throughout", theirs="no range where values are large", ours="float32, rounded once"
    )


def test_difference_target_and_old_values_are_constants(torchrl, parity):
    for index in (0, 2):
        target, value, old = critic()
        tensors = [x.detach().requires_grad_(i in (1, index)) for i, x in enumerate((target, value, old))]
        assert torch.autograd.grad(their_loss(torchrl, *tensors, **OPTIONS)[0], tensors[index])[0].any()
        with pytest.raises(ValueError, match="requires_grad"):
            fused_torchrl.critic_loss(*tensors, **OPTIONS)
    parity.differs(
        "torchrl", "PPOLoss.loss_critic", "target or old value that requires grad", theirs="gradient passed on", ours="ValueError"
    )


def test_difference_nan_under_the_mask(torchrl, parity):
    target, value, old = critic()
    mask = torch.arange(64)[:, None] < 48
    ours, theirs = both_losses(torchrl, (target.masked_fill(~mask, math.nan), value, old), mask=mask)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[3][mask], theirs[3][mask])
    assert theirs[3][~mask].isnan().all() and not ours[3][~mask].any()
    parity.differs(
        "torchrl", "PPOLoss.loss_critic", "NaN as target of masked elements", theirs="gradient NaN there", ours="gradient 0 there"
    )


def test_difference_clip_fraction_under_a_mask(torchrl, parity):
    target, value, old = critic()
    mask = torch.arange(64)[:, None] < 48
    outside = ((value - old).abs() > 0.2).float()
    ours, theirs = both_losses(torchrl, (target, value, old), mask=mask)
    torch.testing.assert_close([theirs[1], ours[1]], [outside.mean(), outside[mask].mean()])
    assert ours[1] != theirs[1]
    parity.differs("torchrl", "PPOLoss.loss_critic", "value_clip_fraction under a mask", theirs="all elements", ours="valid elements")


def test_difference_explained_variance(torchrl, parity):
    target, value, old = critic((16, 2))
    ours, theirs = both_losses(torchrl, (target, value, old))
    assert theirs[2].shape == (2,) and ours[2].shape == ()
    torch.testing.assert_close(ours[2], 1 - (target - value).detach().var() / target.var())
    constant = torch.ones_like(target)
    ours, theirs = both_losses(torchrl, (constant, value, old))
    assert (theirs[2] < -1e5).all() and ours[2] == 0
    parity.differs(
        "torchrl",
        "PPOLoss.loss_critic",
        "explained_variance",
        theirs="one per position behind the first",
        ours="one; 0 where the target is constant",
    )


# --- install ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installable(torchrl, monkeypatch):
    """A TorchRL of empty packages around its own functions, and a GAE that finds them by the names of its module."""
    names = [
        "torchrl",
        "torchrl.objectives",
        "torchrl.objectives.value",
        "torchrl.objectives.value.functional",
        "torchrl.objectives.value.advantages",
    ]
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    functional, advantages = sys.modules[names[3]], sys.modules[names[4]]
    exec(STAND_IN, vars(advantages))
    for name in FUNCTIONS:
        for module in (functional, advantages):
            setattr(module, name, getattr(torchrl, name))
    fused_torchrl._gae_class.cache_clear()
    yield SimpleNamespace(functional=functional, advantages=advantages)
    fused_torchrl.uninstall()
    fused_torchrl._gae_class.cache_clear()


# TorchRL's own class needs tensordict. This one is like it in what matters here: decorators, and functions found by name.
STAND_IN = """
import functools

def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *arguments, **keywords):
        return function(self, *arguments, **keywords)
    return wrapper

class GAE:
    def __init__(self, *, gamma, lmbda, value_network=None, vectorized=None):
        self.gamma, self.lmbda, self.vectorized = gamma, lmbda, vectorized

    @decorated
    @decorated
    def forward(self, *tensors, time_dim=-2):
        if self.vectorized:
            return vec_generalized_advantage_estimate(self.gamma, self.lmbda, *tensors, time_dim=time_dim)
        return generalized_advantage_estimate(self.gamma, self.lmbda, *tensors, time_dim=time_dim)

    def value_estimate(self, *tensors):
        return vec_generalized_advantage_estimate(self.gamma, self.lmbda, *tensors)[1]
"""


def count_calls(monkeypatch):
    calls = []
    gae = fused_critic.gae
    monkeypatch.setattr(fused_critic, "gae", lambda *arguments, **keywords: calls.append(1) or gae(*arguments, **keywords))
    return calls


def test_signatures_are_theirs(torchrl):
    for name in FUNCTIONS:
        assert _adapter.signature_of(getattr(torchrl, name)) == _adapter.signature_of(getattr(fused_torchrl, name))


def test_install_reaches_the_module_that_imports_the_functions(installable, torchrl, monkeypatch):
    calls, gae = count_calls(monkeypatch), installable.advantages.GAE(gamma=GAMMA, lmbda=LMBDA)
    expected = gae.forward(*trajectories((3, 17, 1)))
    assert not calls
    with fused_torchrl.install():
        torch.testing.assert_close(gae.forward(*trajectories((3, 17, 1))), expected)
        assert len(calls) == 1
    for module in (installable.functional, installable.advantages):
        assert [getattr(module, name) for name in FUNCTIONS] == [getattr(torchrl, name) for name in FUNCTIONS]


@pytest.mark.parametrize("vectorized", [None, True])
def test_gae_runs_their_methods_with_our_functions(installable, torchrl, monkeypatch, vectorized):
    calls, theirs, ours = count_calls(monkeypatch), installable.advantages.GAE, fused_torchrl.GAE
    assert ours is fused_torchrl.GAE and issubclass(ours, theirs) and ours.__module__ == fused_torchrl.__name__
    expected = theirs(gamma=GAMMA, lmbda=LMBDA, vectorized=vectorized)
    module = ours(gamma=GAMMA, lmbda=LMBDA, vectorized=vectorized)
    arguments = trajectories((17, 3, 1))
    torch.testing.assert_close(module.forward(*arguments, time_dim=0), expected.forward(*arguments, time_dim=0), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(module.value_estimate(*arguments), expected.value_estimate(*arguments), rtol=1e-6, atol=4e-6)
    assert len(calls) == 2, "one for each method, and none for TorchRL's own module"
    assert [getattr(installable.advantages, name) for name in FUNCTIONS] == [getattr(torchrl, name) for name in FUNCTIONS]


def test_gae_refuses_other_versions(installable, monkeypatch):
    def other(gamma, lmbda, state_value, next_state_value, reward, done, mask):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(installable.functional, LOOP, other)
        for attempt in (fused_torchrl.install, lambda: fused_torchrl.GAE):
            with pytest.raises(RuntimeError, match="reward, done, mask"):
                attempt()
    monkeypatch.setattr(installable.advantages.GAE, "value_estimate", lambda self, *tensors: tensors[0])
    with pytest.raises(RuntimeError, match="calls none of"):
        fused_torchrl.GAE


def test_importing_the_integration_imports_no_torchrl(monkeypatch):
    for package in ("torchrl", "tensordict"):
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    spec = importlib.util.spec_from_file_location("fused_critic.integrations.torchrl_again", fused_torchrl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError):
        module.GAE
    with pytest.raises(AttributeError):
        module.nothing


def test_the_pages_snippets_run(installable):
    space = {"critic": None}
    for snippet in peers.snippets("torchrl"):
        exec(snippet, space)
