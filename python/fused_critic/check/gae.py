"""GAE and whitening beside the reference: problems drawn from one table of factors, and nasty ones by name."""

from __future__ import annotations

import itertools
import math
import random

import torch

import fused_critic

from .. import reference
from . import cases

# A problem takes one value of each.
FACTORS = {
    "kind": cases.LAYOUTS,
    "size": [(1, 1), (1, 37), (2, 8), (3, 129), (5, 17), (9, 4), (33, 3), (17, 65), (40, 1), (4, 260), (35, 130)],
    "dtypes": list(itertools.product(cases.DTYPES, repeat=3)),  # rewards, values, next or bootstrap values
    "strides": list(itertools.product(cases.STRIDES, repeat=4)),  # and the mask's
    "mask": cases.MASKS,
    "density": [0.0, 0.3, 0.9],
    "flags": [None, torch.bool, torch.float32],  # terminated
    "follow": ["nothing", "bootstrap", "next_values", "truncated"],  # the last: with next values
    "gamma": [0.0, 0.97, 1.0],
    "lam": [0.0, 0.9, 1.0],
    "returns_lam": [None, 0.0, 0.7, 1.0],
    "numbers": ["numbers", "0-d tensors", "one per sequence"],  # gamma and the lambdas
    "mask_mode": ["skip", "zero", "reset", "ignore"],
    "seed": range(2**20),
}

SHAPES = {
    "one": (1, 1),
    "one column": (7, 1),
    "odd T": (3, 7),
    "a warp's tile and one": (2, 129),
    "longer than a tile": (2, 1500),
    "many short rows": (3000, 5),
    "longer than a span": (1, 20000),
    "few long": (3, 9000),
}

WHITEN_OPTIONS = [{}, {"shift_mean": False}, {"unbiased": False}, {"eps": 0.1}]


def whiten_tolerance(dtype):
    return cases.FLOAT64_TOLERANCE if dtype == torch.float64 else cases.WHITEN_TOLERANCE


def _floats(rewards, values, options):
    return [x.dtype for x in (rewards, values, options.get("next_values"), options.get("bootstrap_values")) if x is not None]


def compare(rewards, values, mask=None, **options):
    """Advantages and returns against the reference's. Returns the largest share of a tolerance that was used."""
    got = fused_critic.gae(rewards, values, mask, **options)
    expected = reference.gae(rewards, values, mask, **options)
    dtype = torch.float64 if torch.float64 in _floats(rewards, values, options) else torch.float32
    used = 0.0
    for name in ("advantages", "returns"):
        assert getattr(got, name).dtype == dtype
        used = max(used, cases.assert_close(getattr(got, name), getattr(expected, name), cases.tolerance(dtype), name))
        if mask is not None and options.get("mask_mode") != "ignore":
            assert bool((getattr(got, name)[mask == 0] == 0).all()), f"{name} at a masked position"
    return used


def compare_gradients(rewards, values, mask=None, **options):
    """Gradients of every value-like input, through both outputs, against the reference's."""
    tol = cases.tolerance(*_floats(rewards, values, options))
    inputs = {"rewards": rewards, "values": values}
    inputs |= {name: options[name] for name in ("next_values", "bootstrap_values") if options.get(name) is not None}
    upstream = torch.randn(2, *rewards.shape, generator=torch.Generator().manual_seed(9))

    def gradients(function, convert):
        leaves = {name: convert(x.detach()).requires_grad_() for name, x in inputs.items()}
        outputs = function(mask=mask, **{**options, **leaves})
        outputs = (outputs.advantages, outputs.returns)
        if not outputs[0].requires_grad:  # the reference's, where nothing is valid
            return [torch.zeros_like(leaf) for leaf in leaves.values()]
        weights = [u.to(x.device, x.dtype) for u, x in zip(upstream, outputs)]
        found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), found)]

    got, expected = gradients(fused_critic.gae, torch.Tensor.detach), gradients(reference.gae, torch.Tensor.double)
    used = 0.0
    for (name, x), a, b in zip(inputs.items(), got, expected):
        assert a.dtype == x.dtype, f"gradient of {name}: {a.dtype} for {x.dtype}"
        used = max(used, cases.assert_close(a, b, cases.stored(tol, x.dtype), f"gradient of {name}"))
    return used


def build(problem, device):
    """rewards, values, mask, options."""
    generator = torch.Generator().manual_seed(problem["seed"])
    layout = cases.layout(problem["kind"], *problem["size"], generator, device)

    def random_(which):
        return cases.restride(
            torch.randn(layout.shape, generator=generator).to(device, problem["dtypes"][which]), problem["strides"][which]
        )

    def flags(dtype):
        return (torch.rand(layout.shape, generator=generator) < 0.1).to(device, dtype)

    rewards, values = random_(0), random_(1)
    mask = cases.mask(layout.shape, problem["mask"], generator, problem["density"])
    options = {**layout.options, "mask_mode": problem["mask_mode"]}
    for name in ("gamma", "lam", "returns_lam"):
        number = problem[name]
        if number is not None and problem["numbers"] == "0-d tensors":
            number = torch.tensor(number, dtype=torch.float64, device=device)
        if number is not None and problem["numbers"] == "one per sequence":
            number = (number * torch.rand(layout.num_seqs, generator=generator)).to(device, problem["dtypes"][0])
        options[name] = number
    if problem["flags"] is not None:
        options["terminated"] = flags(problem["flags"])
    if problem["follow"] in ("next_values", "truncated"):
        options["next_values"] = random_(2)
    if problem["follow"] == "truncated":
        options["truncated"] = flags(torch.bool)
    if problem["follow"] == "bootstrap":
        options["bootstrap_values"] = torch.randn(layout.num_seqs, generator=generator).to(device, problem["dtypes"][2])
    return rewards, values, mask if mask is None else cases.restride(mask.to(device), problem["strides"][3]), options


def compare_problem(problem, device, function=compare):
    rewards, values, mask, options = build(problem, device)
    return function(rewards, values, mask, **options)


def problems():
    """Every layout x way to go on x flags, every mixture of dtypes, every mask dtype x stride; what is left open is drawn."""
    draw = random.Random(0)

    def problem(**chosen):
        return {name: chosen.get(name, draw.choice(values)) for name, values in FACTORS.items()}

    for kind, follow, flags, lam in itertools.product(cases.LAYOUTS, FACTORS["follow"], FACTORS["flags"], FACTORS["lam"]):
        yield problem(kind=kind, follow=follow, flags=flags, lam=lam)
    for dtypes in FACTORS["dtypes"]:
        yield problem(dtypes=dtypes)
    for mask, stride in itertools.product(cases.MASKS, cases.STRIDES):
        yield problem(mask=mask, strides=(stride,) * 4)
    for kind, mode, follow in itertools.product(cases.LAYOUTS, FACTORS["mask_mode"], FACTORS["follow"]):
        yield problem(kind=kind, mask_mode=mode, follow=follow, mask=torch.bool, density=0.3, gamma=0.97, lam=0.9)
    for kind, numbers, returns_lam in itertools.product(cases.LAYOUTS, FACTORS["numbers"], FACTORS["returns_lam"]):
        yield problem(kind=kind, numbers=numbers, returns_lam=returns_lam, gamma=0.97, lam=0.9)


def compare_shape(shape, masked, time_dim, device, function=compare):
    generator = torch.Generator().manual_seed(0)
    shape = shape if time_dim == -1 else shape[::-1]
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    mask = cases.mask(shape, torch.bool, generator).to(device) if masked else None
    return function(rewards, values, mask, gamma=0.99, lam=0.95, time_dim=time_dim)


def compare_one_long_segment(device, function=compare):
    """Packed, with empty segments, a short one and a long one; every segment with a lambda of its own."""
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, 0, 3, 9003, 9003, 9100], device=device)
    rewards, values = (torch.randn(9100, generator=generator).to(device) for _ in range(2))
    bootstrap = torch.randn(5, generator=generator).to(device)
    lam = torch.tensor([0.0, 0.5, 0.95, 1.0, 0.9], device=device)
    return function(rewards, values, cu_seqlens=cu_seqlens, bootstrap_values=bootstrap, gamma=0.99, lam=lam)


def compare_padding(time_dim, device, function=compare, **options):
    """Sequences that end in masked positions with NaN; one wholly so."""
    generator = torch.Generator().manual_seed(9)
    mask = torch.arange(1500) < torch.tensor([1500, 0, 512, 513, 5])[:, None]
    tensors = [torch.where(mask, torch.randn(5, 1500, generator=generator), math.nan) for _ in range(2)]
    rewards, values, mask = ((x if time_dim == -1 else x.t().contiguous()).to(device) for x in (*tensors, mask))
    return function(rewards, values, mask, gamma=0.99, lam=0.95, time_dim=time_dim, **options)


def compare_empty(shape, device):
    empty = torch.empty(shape, device=device)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device) if shape == (0,) else None
    return compare(empty, empty, torch.empty(shape, dtype=torch.bool, device=device), gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens)


def compare_all_masked(device, function=compare):
    x = torch.full((3, 10), math.nan, device=device)
    return function(x, x, torch.zeros(3, 10, device=device), gamma=0.99, lam=0.95)


def compare_whitened(kind, mask_dtype, device):
    """gae(whiten=True)."""
    generator = torch.Generator().manual_seed(6)
    layout = cases.layout(kind, 5, 60, generator, device)
    rewards, values = (torch.randn(layout.shape, generator=generator).to(device) for _ in range(2))
    mask = cases.mask(layout.shape, mask_dtype, generator)
    mask = mask if mask is None else mask.to(device)
    return compare(rewards, values, mask, gamma=0.99, lam=0.95, whiten=True, **layout.options)


def compare_whiten(dtype, mask_dtype, options, device):
    """masked_whiten of numbers about 3."""
    generator = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(7, 45, generator=generator)).to(device, dtype)
    mask = cases.mask((7, 45), mask_dtype, generator)
    mask = mask if mask is None else mask.to(device)
    got = fused_critic.masked_whiten(x, mask, **options)
    assert got.dtype == dtype
    return cases.assert_close(got, reference.masked_whiten(x, mask, **options), cases.stored(whiten_tolerance(dtype), dtype), "whitened")


def compare_whiten_gradient(dtype, masked, device):
    generator = torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(4, 30, generator=generator).to(device, dtype) for _ in range(2))
    mask = cases.mask((4, 30), torch.bool, generator).to(device) if masked else None
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    (got,) = torch.autograd.grad(fused_critic.masked_whiten(leaf, mask), leaf, upstream)
    (expected,) = torch.autograd.grad(reference.masked_whiten(wide, mask), wide, upstream.double().cpu())
    return cases.assert_close(got, expected, cases.stored(whiten_tolerance(dtype), dtype), "gradient")


def compare_whiten_far_from_zero(device):
    """Mean 1e4 and standard deviation 1: a difference of float32 sums of squares would leave nothing of the variance."""
    x = (1e4 + torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).float()
    got = fused_critic.masked_whiten(x.to(device))
    return cases.assert_close(got, reference.masked_whiten(x), whiten_tolerance(torch.float32), "whitened")


def compare_whiten_few(valid, shift_mean, device):
    """Fewer than two valid positions give zeros."""
    mask = torch.zeros(6, device=device)
    mask[:valid] = 1
    got = fused_critic.masked_whiten(torch.full((6,), 7.0, device=device), mask, shift_mean=shift_mean)
    return cases.assert_close(got, torch.zeros(6), whiten_tolerance(torch.float32), "whitened")


def compare_far(device):
    """Offsets beyond 2^31 elements."""
    return cases.compare_far(lambda x: compare(x, torch.ones(x.shape, device=device), gamma=0.99, lam=0.95), device)
