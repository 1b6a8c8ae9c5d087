"""The reverse scan and V-trace beside the reference: problems drawn from tables of factors, and sizes by name."""

from __future__ import annotations

import itertools
import random

import torch

import fused_critic

from .. import reference
from . import cases

SIZES = [(1, 1), (1, 37), (2, 8), (3, 129), (5, 17), (9, 4), (33, 3), (17, 65), (40, 1), (4, 260)]  # sequences, tokens of each
DECAYS = ("number", "0-d", "per sequence", "per position", "bool")

# A problem takes one value of each.
SCAN_FACTORS = {
    "kind": cases.LAYOUTS,
    "size": SIZES,
    "dtypes": list(itertools.product(cases.DTYPES, repeat=3)),  # x, decay, init
    "strides": list(itertools.product(cases.STRIDES, repeat=2)),  # x, decay
    "decay": DECAYS,
    "init": [False, True],
    "seed": range(2**20),
}
VTRACE_FACTORS = {
    "kind": cases.LAYOUTS,
    "size": SIZES,
    "dtypes": list(itertools.product(cases.DTYPES, repeat=3)),  # rewards, values, ratios
    "strides": list(itertools.product(cases.STRIDES, repeat=3)),  # and the mask's, as the ratios'
    "mask": cases.MASKS,
    "density": [0.0, 0.3, 0.9],
    "flags": [None, torch.bool, torch.float32],  # terminated
    "follow": ["nothing", "bootstrap", "next_values", "truncated"],  # the last: with next values
    "logs": [False, True],
    "lam": [0.0, 0.9, 1.0],
    "clips": [(1.0, 1.0, 1.0), (2.0, 0.5, None), (None, None, 1.5), (0.0, 1.0, 0.7)],  # of rho, c, the policy gradient's rho
    "tensors": [False, True],  # the numbers as 0-d tensors
    "seed": range(2**20),
}

# On both sides of every change of algorithm: several rows a warp, a warp a row, a block a row, a row over many blocks; aligned and not.
SHAPES = [(5, 8), (3, 132), (2, 512), (2, 1028), (2, 1031), (2, 5000), (1, 2601)]
SHAPE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _scan_dtype(x, decay, init):
    """Of the result."""
    per_token = [decay] if isinstance(decay, torch.Tensor) and decay.dim() > 0 else []
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in (x, init, *per_token)) else torch.float32


def compare_scan(x, decay, init=None, **options):
    """y against the reference's. Returns the largest share of a tolerance that was used."""
    got = fused_critic.reverse_scan(x, decay, init, **options)
    dtype = _scan_dtype(x, decay, init)
    assert got.dtype == dtype
    return cases.assert_close(got, reference.reverse_scan(x, decay, init, **options), cases.tolerance(dtype), "y")


def compare_scan_gradients(x, decay, init=None, **options):
    """Gradients of x, init and a floating tensor of decays against the reference's."""
    tol = cases.tolerance(_scan_dtype(x, decay, init))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    inputs = {"x": x} | ({} if init is None else {"init": init})
    if isinstance(decay, torch.Tensor) and decay.dtype.is_floating_point:
        inputs["decay"] = decay

    def gradients(function, convert):
        leaves = {name: convert(t.detach()).requires_grad_() for name, t in inputs.items()}
        y = function(**{"x": x, "decay": decay, "init": init, **leaves}, **options)
        found = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.device, y.dtype), allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), found)]

    used = 0.0
    got, expected = gradients(fused_critic.reverse_scan, torch.Tensor.detach), gradients(reference.reverse_scan, torch.Tensor.double)
    for (name, t), a, b in zip(inputs.items(), got, expected):
        assert a.dtype == t.dtype and a.shape == t.shape, f"gradient of {name}: {a.dtype} {tuple(a.shape)}"
        used = max(used, cases.assert_close(a, b, cases.stored(tol, t.dtype), f"gradient of {name}"))
    return used


def build_scan(problem, device):
    """x, decay, init, options."""
    generator = torch.Generator().manual_seed(problem["seed"])
    layout = cases.layout(problem["kind"], *problem["size"], generator, device)
    x_dtype, decay_dtype, init_dtype = problem["dtypes"]
    x_strides, decay_strides = problem["strides"]
    x = cases.restride(torch.randn(layout.shape, generator=generator).to(device, x_dtype), x_strides)
    shape = {"number": (), "0-d": (), "per sequence": (layout.num_seqs,)}.get(problem["decay"], layout.shape)
    decay = torch.rand(shape, generator=generator)
    if problem["decay"] == "number":
        decay = float(decay)
    elif problem["decay"] == "bool":
        decay = cases.restride((decay < 0.8).to(device), decay_strides)
    else:
        decay = decay.to(device, decay_dtype)
        decay = cases.restride(decay, decay_strides) if problem["decay"] == "per position" else decay
    init = torch.randn(layout.num_seqs, generator=generator).to(device, init_dtype) if problem["init"] else None
    return x, decay, init, layout.options


def compare_scan_problem(problem, device, function=compare_scan):
    *arguments, options = build_scan(problem, device)
    return function(*arguments, **options)


def _drawn(factors):
    draw = random.Random(0)
    return lambda **chosen: {name: chosen.get(name, draw.choice(values)) for name, values in factors.items()}


def scan_problems():
    """Every layout x form of decay x init, every mixture of dtypes, every pair of strides; what is left open is drawn."""
    problem = _drawn(SCAN_FACTORS)
    for kind, decay, init in itertools.product(cases.LAYOUTS, DECAYS, (False, True)):
        yield problem(kind=kind, decay=decay, init=init)
    for dtypes in SCAN_FACTORS["dtypes"]:
        yield problem(dtypes=dtypes)
    for strides in SCAN_FACTORS["strides"]:
        yield problem(strides=strides)


def compare_scan_shape(shape, dtype, per_position, time_dim, device, function=compare_scan):
    generator = torch.Generator().manual_seed(0)
    shape = shape if time_dim == -1 else (shape[1] // 8, 8 * shape[0])
    x = torch.randn(shape, generator=generator).to(device, dtype)
    decay = torch.rand(shape, generator=generator).to(device, dtype) if per_position else 0.97
    init = torch.randn(shape[1 + time_dim], generator=generator).to(device)
    return function(x, decay, init, time_dim=time_dim)


def _vtrace_dtype(rewards, values, options):
    names = ("log_rhos", "ratios", "next_values", "bootstrap_values")
    tensors = (rewards, values, *(options.get(name) for name in names))
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def compare_vtrace(rewards, values, **options):
    """All three outputs against the reference's."""
    got, expected = fused_critic.vtrace(rewards, values, **options), reference.vtrace(rewards, values, **options)
    dtype, mask, used = _vtrace_dtype(rewards, values, options), options.get("mask"), 0.0
    for name, x in got._asdict().items():
        assert x.dtype == dtype and not x.requires_grad
        used = max(used, cases.assert_close(x, getattr(expected, name), cases.tolerance(dtype), name))
        if mask is not None:
            assert bool((x[mask == 0] == 0).all()), f"{name} at a masked position"
    return used


def build_vtrace(problem, device):
    """rewards, values, options."""
    generator = torch.Generator().manual_seed(problem["seed"])
    layout = cases.layout(problem["kind"], *problem["size"], generator, device)

    def flags(dtype):
        return (torch.rand(layout.shape, generator=generator) < 0.1).to(device, dtype)

    numbers = (torch.randn(layout.shape, generator=generator) for _ in range(3))
    rewards, values, logs = (cases.restride(x.to(device, d), s) for x, d, s in zip(numbers, problem["dtypes"], problem["strides"]))
    options = {**layout.options, **({"log_rhos": logs} if problem["logs"] else {"ratios": logs.exp()})}
    mask = cases.mask(layout.shape, problem["mask"], generator, problem["density"])
    options["mask"] = mask if mask is None else cases.restride(mask.to(device), problem["strides"][2])
    names = ("gamma", "lam", "rho_clip", "c_clip", "pg_rho_clip")
    for name, x in zip(names, (0.97, problem["lam"], *problem["clips"])):
        options[name] = torch.tensor(x, dtype=torch.float64, device=device) if problem["tensors"] and x is not None else x
    if problem["flags"] is not None:
        options["terminated"] = flags(problem["flags"])
    if problem["follow"] in ("next_values", "truncated"):
        options["next_values"] = torch.randn(layout.shape, generator=generator).to(device, problem["dtypes"][1])
    if problem["follow"] == "truncated":
        options["truncated"] = flags(torch.bool)
    if problem["follow"] == "bootstrap":
        options["bootstrap_values"] = torch.randn(layout.num_seqs, generator=generator).to(device, problem["dtypes"][1])
    return rewards, values, options


def compare_vtrace_problem(problem, device):
    rewards, values, options = build_vtrace(problem, device)
    return compare_vtrace(rewards, values, **options)


def vtrace_problems():
    """Every layout x way to go on x flags, every mixture of dtypes, every mask dtype x clips; what is left open is drawn."""
    problem = _drawn(VTRACE_FACTORS)
    for kind, follow, flags in itertools.product(cases.LAYOUTS, VTRACE_FACTORS["follow"], VTRACE_FACTORS["flags"]):
        yield problem(kind=kind, follow=follow, flags=flags)
    for dtypes in VTRACE_FACTORS["dtypes"]:
        yield problem(dtypes=dtypes)
    for mask, clips in itertools.product(cases.MASKS, VTRACE_FACTORS["clips"]):
        yield problem(mask=mask, clips=clips)


def compare_vtrace_shape(shape, dtype, masked, time_dim, device):
    generator = torch.Generator().manual_seed(0)
    shape = shape if time_dim == -1 else (shape[1] // 8, 8 * shape[0])
    rewards, values, logs = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    mask = cases.mask(shape, torch.bool, generator).to(device) if masked else None
    return compare_vtrace(rewards, values, log_rhos=logs, mask=mask, gamma=0.99, lam=0.95, time_dim=time_dim)


def compare_scan_far(device):
    """Offsets beyond 2^31 elements."""
    return cases.compare_far(lambda x: max(compare_scan(x, 0.9), compare_scan(torch.ones(x.shape, device=device), x)), device)


def compare_vtrace_far(device):
    def compare(x):
        return compare_vtrace(torch.ones(x.shape, device=device), x, log_rhos=x, gamma=0.9)

    return cases.compare_far(compare, device)
