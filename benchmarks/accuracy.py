"""Errors against float64: ours and those of verl's float32 formulas on the same data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from fused_critic import reference

from .contenders import CONTENDERS, OURS, LeftOut
from .data import CLIP, GAMMA, LAM, gae_inputs, loss_inputs
from .device import Device

FORMULAS_AGREE = 1e-10  # the float64 formulas of data.py, relative to the specification
SEEDS = 5  # of the small cases: the largest error of all is reported


@dataclass
class Sizes:
    small: tuple[int, int] = (16, 512)
    large_sum: tuple[int, int] = (160, 65536)  # 10.5M tokens


SMOKE = Sizes(small=(2, 16), large_sum=(4, 64))


@dataclass
class Error:
    quantity: str
    ours: float
    verl: Optional[float]
    verdict: str  # "met": ours is at most verl's


def measure(sizes: Sizes, device: Device) -> list[Error]:
    errors = []
    for operator, make in (("value_loss", loss_inputs), ("gae", gae_inputs)):
        seen: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(SEEDS):
            inputs = make(sizes.small, device.torch, "random", seed=seed)
            exact = inputs.expected()
            _check_formulas(operator, inputs, exact)
            for name, measured in _errors(operator, inputs, exact).items():
                seen.setdefault(name, []).append(measured)
        errors += _table(operator, f"{list(sizes.small)}, mask: random, largest of {SEEDS} draws", seen)
    inputs = loss_inputs(sizes.large_sum, device.torch, "padding")
    seen = {name: [measured] for name, measured in _errors("value_loss", inputs, inputs.expected()).items()}
    errors += _table("value_loss", f"{inputs.values.numel():,} tokens, mask: padding", seen)
    return errors


def _errors(operator: str, inputs, exact) -> dict[str, tuple[float, ...]]:
    """By contender: per output, the largest error, relative to the output's largest element."""
    found = {}
    for who in CONTENDERS:
        if who.operator == operator and who.name in (OURS, "verl"):
            try:
                outputs = who.prepare(inputs)()
            except LeftOut:
                continue
            got = inputs.valid(outputs) if operator == "gae" else outputs
            found[who.name] = tuple(((x.detach().double() - y).abs().max() / y.abs().max()).item() for x, y in zip(got, exact, strict=True))
    return found


def _table(operator: str, where: str, seen: dict[str, list[tuple[float, ...]]]) -> list[Error]:
    names = ("value loss", "its gradient") if operator == "value_loss" else ("GAE: advantages", "GAE: returns")
    largest = {name: [max(errors) for errors in zip(*draws)] for name, draws in seen.items()}
    rows = []
    for index, name in enumerate(names):
        ours, verls = largest[OURS][index], largest["verl"][index] if "verl" in largest else None
        rows.append(Error(f"{name}, {where}", ours, verls, "not measured" if verls is None else "met" if ours <= verls else "missed"))
    return rows


def _check_formulas(operator: str, inputs, exact) -> None:
    """The fast float64 formulas against the specification, which is far too slow for large tensors."""
    if operator == "value_loss":
        found = reference.value_loss(inputs.values, inputs.old_values, inputs.returns, inputs.mask, clip_range=CLIP)
        slow = [torch.tensor(found.loss, dtype=torch.float64), found.grad]
    else:
        found = reference.gae(inputs.rewards, inputs.values, inputs.mask, gamma=GAMMA, lam=LAM)
        slow = [x[inputs.mask.cpu()] for x in (found.advantages, found.returns)]
    for fast, specified in zip(exact, slow, strict=True):
        torch.testing.assert_close(fast.cpu(), specified, rtol=FORMULAS_AGREE, atol=FORMULAS_AGREE)
