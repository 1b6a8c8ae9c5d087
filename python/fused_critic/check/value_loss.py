"""The value loss beside the reference: problems drawn from one table of factors, and nasty ones by name."""

from __future__ import annotations

import itertools
import math
import random

import torch

import fused_critic

from .. import reference
from . import cases

OPTIONS = {
    "no options": {},
    "huber": {"criterion": "huber", "delta": 0.3},
    "smooth_l1": {"criterion": "smooth_l1", "delta": 0.4},
    "l1": {"criterion": "l1"},
    "clip_only": {"clip_only": True},
    "loss_clamp": {"loss_clamp": 0.05},
    "clamped l1": {"criterion": "l1", "loss_clamp": 0.4},
    "clamped smooth_l1, clip_only": {"criterion": "smooth_l1", "delta": 2.0, "clip_only": True, "loss_clamp": 0.02},
}

# A problem takes one value of each.
FACTORS = {
    "kind": cases.LAYOUTS,
    "size": [(1, 1), (1, 37), (2, 8), (3, 129), (5, 17), (9, 4), (33, 3), (17, 65), (40, 1), (4, 260)],  # sequences, tokens of each
    "dtypes": list(itertools.product(cases.DTYPES, repeat=3)),  # values, old values, returns
    "strides": list(itertools.product(cases.STRIDES, repeat=4)),  # and the mask's
    "mask": cases.MASKS,
    "density": [0.0, 0.3, 0.9, 1.0],
    "clip_range": [0.2, (-0.1, 0.3), 0.0, None],
    "clip_kind": ["numbers", "0-d tensors", "tensors", "low tensor", "high tensor"],  # tensors: a number per token
    "clip_dtype": cases.DTYPES,  # of numbers per token
    "options": list(OPTIONS),
    "reduction": cases.REDUCTIONS,
    "count": [None, 11, "tensor"],  # batch_num_tokens and global_batch_size
    "dp_size": [1, 4],
    "seed": range(2**20),
}

SHAPES = {
    "one token": (1, 1),
    "one column": (5, 1),
    "odd T": (3, 7),
    "T of a warp and one": (4, 33),
    "longer than a tile": (2, 1500),
    "longer than a chunk": (2, 17000),
    "many short rows": (6000, 3),
    "one long row": (1, 40000),
}


def run(values, old_values, returns, mask=None, grad_loss=None, **options):
    """loss, gradient of `values` for the upstream gradient `grad_loss` (ones), statistics."""
    leaf = values.detach().requires_grad_()
    loss, stats = fused_critic.value_loss(leaf, old_values, returns, mask, **options)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss)
    assert leaf.grad.dtype == values.dtype and leaf.grad.shape == values.shape
    return loss.detach(), leaf.grad, stats


def compare(values, old_values, returns, mask=None, grad_loss=None, **options):
    """Loss, gradient and statistics against the reference's. Returns the largest share of a tolerance that was used."""
    loss, grad, stats = run(values, old_values, returns, mask, grad_loss, **options)
    expected = reference.value_loss(values, old_values, returns, mask, grad_loss=grad_loss, **options)
    inputs = _inputs(values, old_values, returns, options.get("clip_range", 0.2))
    tol = cases.tolerance(*inputs)
    assert loss.dtype == (torch.float64 if torch.float64 in inputs else torch.float32)
    used = cases.assert_close(loss, expected.loss, tol, "loss")
    used = max(used, cases.assert_close(grad, expected.grad, cases.stored(tol, values.dtype), "gradient"))
    got = stats.to_dict()
    assert got.keys() == expected.stats.keys()
    for name, value in expected.stats.items():
        allowed = cases.STATISTICS_TOLERANCE
        assert math.isclose(got[name], value, rel_tol=allowed, abs_tol=allowed), f"{name}: got {got[name]}, expected {value}"
    if mask is not None:
        assert bool((grad[mask == 0] == 0).all()), "a masked token has a gradient"
    return used


def _inputs(values, old_values, returns, clip_range):
    """The dtypes that decide in which one the loss is computed."""
    if clip_range is None:
        return [values.dtype, returns.dtype]
    bounds = clip_range if isinstance(clip_range, tuple) else (clip_range,)
    per_token = [x.dtype for x in bounds if isinstance(x, torch.Tensor) and x.dim() > 0]
    return [values.dtype, returns.dtype, old_values.dtype, *per_token]


def draw_range(clip_range, kind, mask, shape, generator, device, dtype=torch.float32, stride="contiguous"):
    """The numbers of `clip_range` as `kind` has it; per token they vary by a fifth, and are NaN where the mask is 0."""
    if clip_range is None or kind == "numbers":
        return clip_range
    if kind == "0-d tensors":
        low_and_high = torch.tensor(clip_range, dtype=torch.float64, device=device)
        return tuple(low_and_high.unbind()) if low_and_high.dim() else low_and_high

    def per_token(number):
        bounds = number * (0.9 + 0.2 * torch.rand(shape, generator=generator))
        bounds = bounds if mask is None else torch.where(mask.cpu() != 0, bounds, math.nan)
        return cases.restride(bounds.to(device, dtype), stride)

    if kind == "tensors" and not isinstance(clip_range, tuple):
        return per_token(clip_range)
    low, high = clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
    return (low if kind == "high tensor" else per_token(low), high if kind == "low tensor" else per_token(high))


def draw_inputs(shape, generator, device, dtypes, strides, spread=0.3):
    values = torch.randn(shape, generator=generator)
    old_values = values + spread * torch.randn(shape, generator=generator)
    returns = values + 0.5 * torch.randn(shape, generator=generator)
    return [cases.restride(x.to(device, d), s) for x, d, s in zip((values, old_values, returns), dtypes, strides)]


def build(problem, device):
    """Arguments and options of `compare`."""
    generator = torch.Generator().manual_seed(problem["seed"])
    layout = cases.layout(problem["kind"], *problem["size"], generator, device)
    tensors = draw_inputs(layout.shape, generator, device, problem["dtypes"], problem["strides"])
    mask = cases.mask(layout.shape, problem["mask"], generator, problem["density"])
    if mask is not None:
        mask = cases.restride(mask.to(device), problem["strides"][3])
    count = torch.tensor(11, device=device) if problem["count"] == "tensor" else problem["count"]
    clip_range = draw_range(
        problem["clip_range"], problem["clip_kind"], mask, layout.shape, generator, device, problem["clip_dtype"], problem["strides"][1]
    )
    options = {"clip_range": clip_range, "reduction": problem["reduction"], **OPTIONS[problem["options"]], **layout.options}
    if "loss_clamp" in options and problem["clip_kind"] == "0-d tensors":
        options["loss_clamp"] = torch.tensor(options["loss_clamp"], dtype=torch.float64, device=device)
    if count is not None:
        options |= {"batch_num_tokens": count, "global_batch_size": count, "dp_size": problem["dp_size"]}
    if problem["kind"] == "packed" or problem["seed"] % 2:
        options["loss_scale_factor"] = 7.0
    grad_loss = None
    if problem["reduction"] == "none":
        wide = torch.float64 in _inputs(*tensors, clip_range)
        grad_loss = torch.randn(layout.shape, generator=generator).to(device, torch.float64 if wide else torch.float32)
    return (*tensors, mask, grad_loss), options


def compare_problem(problem, device):
    arguments, options = build(problem, device)
    return compare(*arguments, **options)


def problems():
    """Every layout x reduction x clip range, every mixture of dtypes, every mask dtype x stride, every kind of range x set of options.

    What is left open is drawn.
    """
    draw = random.Random(0)

    def problem(**chosen):
        return {name: chosen.get(name, draw.choice(values)) for name, values in FACTORS.items()}

    for kind, reduction, clip_range in itertools.product(cases.LAYOUTS, cases.REDUCTIONS, FACTORS["clip_range"]):
        yield problem(kind=kind, reduction=reduction, clip_range=clip_range)
    for dtypes in FACTORS["dtypes"]:
        yield problem(dtypes=dtypes)
    for mask, stride in itertools.product(cases.MASKS, cases.STRIDES):
        yield problem(mask=mask, strides=(stride,) * 4)
    for kind, clip_range, options in itertools.product(*(FACTORS[name] for name in ("clip_kind", "clip_range", "options"))):
        yield problem(clip_kind=kind, clip_range=clip_range, options=options)


def compare_shape(shape, reduction, time_dim, clip_range, device):
    generator = torch.Generator().manual_seed(0)
    shape = shape if time_dim == -1 else shape[::-1]
    tensors = draw_inputs(shape, generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask(shape, torch.bool, generator).to(device)
    return compare(*tensors, mask, reduction=reduction, time_dim=time_dim, clip_range=clip_range)


def compare_options(options, clip_range, kind, shape, time_dim, dtype, device, reduction="seq-mean-token-mean"):
    """One set of options, in one precision, under a mask that has NaN behind it."""
    generator = torch.Generator().manual_seed(11)
    shape = shape if time_dim == -1 else shape[::-1]
    mask = cases.mask(shape, torch.bool, generator)
    tensors = draw_inputs(shape, generator, "cpu", [dtype] * 3, ["contiguous"] * 3)
    tensors = [torch.where(mask, x, math.nan).to(device) for x in tensors]
    bounds = draw_range(clip_range, kind, mask, shape, generator, device)
    return compare(*tensors, mask.to(device), clip_range=bounds, reduction=reduction, time_dim=time_dim, **options)


def compare_padding(reduction, time_dim, device):
    """Long stretches of valid and of masked tokens, with NaN in the latter: the kernels take them by shortcuts."""
    generator = torch.Generator().manual_seed(9)
    lengths = torch.tensor([3000, 0, 1024, 1025, 5])
    mask = torch.arange(3000) < lengths[:, None]
    tensors = [torch.where(mask, x, math.nan) for x in draw_inputs((5, 3000), generator, "cpu", [torch.float32] * 3, ["contiguous"] * 3)]
    arranged = [(x if time_dim == -1 else x.t().contiguous()).to(device) for x in (*tensors, mask)]
    return compare(*arranged, reduction=reduction, time_dim=time_dim)


def compare_empty(shape, reduction, device):
    empty = torch.empty(shape, device=device)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device) if shape == (0,) else None
    return compare(empty, empty, empty, mask, reduction=reduction, cu_seqlens=cu_seqlens, loss_scale_factor=7.0)


def compare_all_masked(reduction, device):
    x = torch.full((3, 10), math.nan, device=device)
    return compare(x, x, x, torch.zeros(3, 10, device=device), reduction=reduction)


def compare_expanded(device):
    """Stride 0 in every input but the values."""
    generator = torch.Generator().manual_seed(10)
    values, old, returns = (torch.randn(shape, generator=generator).to(device) for shape in ((4, 9), (4, 1), (9,)))
    return compare(values, old.expand(4, 9), returns.expand(4, 9), torch.tensor([[True]], device=device).expand(4, 9))


def compare_far(device):
    """Offsets beyond 2^31 elements."""
    zeros, ones = (torch.full((), number, device=device) for number in (0.0, 1.0))
    ranges = cases.compare_far(lambda x: compare(x, zeros.expand(x.shape), ones.expand(x.shape), clip_range=(-3.0, x)), device)
    return max(ranges, cases.compare_far(lambda x: compare(x, torch.zeros_like(x), torch.ones(x.shape, device=device)), device))
