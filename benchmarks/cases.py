"""What is measured: every operator over sizes, layouts, masks and dtypes, and the cost of a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import fused_critic
import torch
from fused_critic.integrations import verl as fused_verl

from .contenders import CONTENDERS, OURS, Contender
from .contenders import openrlhf as openrlhf_functions
from .contenders import verl as verl_functions
from .data import CLIP, GAMMA, LAM, GaeInputs, LossInputs, gae_inputs, loss_inputs, packed_gae_inputs
from .device import Device
from .harness import Case, Participant, copy_participant

CALL_SHAPE = (1, 16)  # of no cost but the call's

OPERATOR = "torch.ops.fused_critic"
PUBLIC = "public function"
ADD = "torch.add with grad"

# Ours, within the cases of variants: the first is the one that the others are compared with.
BASE, SEQ_MEAN, BF16 = "token-mean", "seq-mean-token-mean", "bf16 values"
BF16_TOLERANCE = 2**-8  # of a gradient in bf16


@dataclass(frozen=True)
class Grid:
    sizes: tuple[tuple[int, int], ...]  # of the plots over tokens
    masks: tuple[int, int]
    variants: tuple[int, int]
    one_row: int
    time_major: tuple[int, int]  # T, B
    short: tuple[int, int]  # B, T: short enough to unroll the loop over time
    packed: tuple[int, int]  # sequences, and the longest


FULL = Grid(
    sizes=((64, 512), (64, 4096), (64, 8192), (64, 32768)), masks=(64, 4096), variants=(64, 4096), one_row=2**20,
    time_major=(128, 4096), short=(4096, 16), packed=(256, 32768),
)  # fmt: skip
SMOKE = Grid(sizes=((4, 32), (4, 128)), masks=(4, 64), variants=(4, 64), one_row=512, time_major=(16, 32), short=(32, 8), packed=(4, 64))

GRID_MASKS = ("full", "random", "turns")  # beside padding, which the sizes have


def all_cases(grid: Grid, device: Device) -> dict[str, functools.partial]:
    """By name, what makes the case."""
    cases = {}

    def add(name, make, *arguments, **keywords):
        cases[name] = functools.partial(make, name, device, *arguments, **keywords)

    for name, make in (("call-loss-forward", _call_loss_forward), ("call-loss", _call_loss), ("call-gae", _call_gae)):
        add(name, make)
    for shape in grid.sizes:
        add(f"loss-{_by(shape)}", _loss, shape, series="value loss, forward and backward, padding mask")
    add(f"loss-1x{grid.one_row}", _loss, (1, grid.one_row))
    for mask in GRID_MASKS:
        add(f"loss-{mask}-{_by(grid.masks)}", _loss, grid.masks, mask_kind=mask)
    add(f"loss-variants-{_by(grid.variants)}", _loss_variants, grid.variants)
    for shape in grid.sizes:
        add(f"gae-{_by(shape)}", _gae_rows, shape, series="GAE, padding mask")
    add(f"gae-1x{grid.one_row}", _gae_rows, (1, grid.one_row), mask_kind="none")
    for mask in ("none", *GRID_MASKS):
        add(f"gae-{mask}-{_by(grid.masks)}", _gae_rows, grid.masks, mask_kind=mask)
    add(f"gae-bf16-{_by(grid.masks)}", _gae_rows, grid.masks, value_dtype=torch.bfloat16)
    add(f"gae-short-{_by(grid.short)}", _gae_rows, grid.short)
    time, batch = grid.time_major
    add(f"gae-time-major-{time}x{batch}", _gae_time_major, (batch, time))
    add("gae-packed", _gae_packed, *grid.packed)
    return cases


def _by(shape) -> str:
    return "x".join(map(str, shape))


def _participant(who: Contender, inputs) -> Participant:
    shared = dict(
        prepare=functools.partial(who.prepare, inputs), expected=inputs.expected, bytes_moved=inputs.bytes_moved,
        every_thread_count=who.name == OURS, starts_slowly=who.starts_slowly,
    )  # fmt: skip
    if isinstance(inputs, LossInputs):
        return Participant(who.name, outputs=list, rtol=_loss_tolerance(inputs), atol=1e-5, relative_to_largest=True, **shared)
    return Participant(who.name, outputs=inputs.valid, **shared)


def _loss_tolerance(inputs: LossInputs) -> float:
    return BF16_TOLERANCE if inputs.values.dtype == torch.bfloat16 else 1e-4


def _contenders(operator: str, inputs, device: Device) -> list[Participant]:
    """Ours first, then everyone else, then the copy."""
    others = [_participant(who, inputs) for who in CONTENDERS if who.operator == operator]
    return [*others, copy_participant(inputs.bytes_moved, device)]


# --- over sizes, layouts and masks ------------------------------------------------------------------------------------------------


def _loss(name: str, device: Device, shape, mask_kind="padding", series=None) -> Case:
    inputs = loss_inputs(shape, device.torch, mask_kind)
    title = f"value loss, forward and backward, {list(shape)} float32, mask: {mask_kind}"
    return Case(name, title, inputs.values.numel(), _contenders("value_loss", inputs, device), series)


def _gae(name: str, device: Device, inputs: GaeInputs, title: str, series=None) -> Case:
    return Case(name, title, inputs.rewards.numel(), _contenders("gae", inputs, device), series)


def _gae_rows(name: str, device: Device, shape, mask_kind="padding", value_dtype=torch.float32, series=None) -> Case:
    inputs = gae_inputs(shape, device.torch, mask_kind, value_dtype)
    dtype = "float32" if value_dtype == torch.float32 else "bf16 values"
    return _gae(name, device, inputs, f"GAE, {list(shape)} {dtype}, mask: {mask_kind}", series)


def _gae_time_major(name: str, device: Device, shape) -> Case:
    inputs = gae_inputs(shape, device.torch, "none", time_major=True)
    return _gae(name, device, inputs, f"GAE, time-major {list(reversed(shape))} float32, mask: none")


def _gae_packed(name: str, device: Device, sequences: int, longest: int) -> Case:
    inputs = packed_gae_inputs(sequences, longest, device.torch)
    tokens = inputs.rewards.numel()
    return _gae(
        name, device, inputs, f"GAE, packed: {sequences} sequences of log-normal lengths up to {longest:,}, {tokens:,} tokens float32"
    )


def _loss_variants(name: str, device: Device, shape) -> Case:
    """Ours alone, all in one interleaved run: what another reduction, dtype or mask costs."""
    variants = {BASE: {}, SEQ_MEAN: {"reduction": "seq-mean-token-mean"}, BF16: {"value_dtype": torch.bfloat16}}
    variants.update({f"mask: {kind}": {"mask_kind": kind} for kind in ("none", *GRID_MASKS)})
    ours = next(who for who in CONTENDERS if who.name == OURS and who.operator == "value_loss")
    participants = []
    for label, options in variants.items():
        participant = _participant(ours, loss_inputs(shape, device.torch, **options))
        participant.name = label
        participants.append(participant)
    base = loss_inputs(shape, device.torch)
    participants.append(copy_participant(base.bytes_moved, device))
    return Case(name, f"fused_critic's value loss, forward and backward, {list(shape)}", base.values.numel(), participants)


# --- the cost of a call -----------------------------------------------------------------------------------------------------------


def _call_loss_forward(name: str, device: Device) -> Case:
    """With grad, as the forward pass of a training step runs."""
    inputs = loss_inputs(CALL_SHAPE, device.torch)
    v, o, R, m = inputs.values, inputs.old_values, inputs.returns, inputs.mask
    operator = torch.ops.fused_critic.value_loss
    runs = {
        OPERATOR: lambda: lambda: operator(v, o, R, m)[:1],
        PUBLIC: lambda: lambda: fused_critic.value_loss(v, o, R, m)[:1],
        "verl integration": lambda: lambda: fused_verl.compute_value_loss(v, R, o, m, CLIP)[:1],
        "verl": lambda: lambda verls=verl_functions.functions().compute_value_loss: verls(v, R, o, m, CLIP)[:1],
        "OpenRLHF": lambda: lambda criterion=openrlhf_functions.value_loss_class()(CLIP): [criterion(v, o, R, m)],
    }
    participants = _call_participants(runs, list, lambda: inputs.expected()[:1])
    participants.append(Participant(ADD, lambda: lambda: torch.add(v, o)))
    return Case(name, f"call: value loss, forward with grad, {list(CALL_SHAPE)}", v.numel(), participants, is_call=True)


def _call_loss(name: str, device: Device) -> Case:
    inputs = loss_inputs(CALL_SHAPE, device.torch)
    v, o, R, m = inputs.values, inputs.old_values, inputs.returns, inputs.mask
    operator, ones = torch.ops.fused_critic.value_loss, torch.ones_like(v)

    def gradient(loss):
        return [loss, torch.autograd.grad(loss, v)[0]]

    runs = {
        OPERATOR: lambda: lambda: gradient(operator(v, o, R, m)[0]),
        PUBLIC: lambda: lambda: gradient(fused_critic.value_loss(v, o, R, m).loss),
        "verl integration": lambda: lambda: gradient(fused_verl.compute_value_loss(v, R, o, m, CLIP)[0]),
        "verl": lambda: lambda verls=verl_functions.functions().compute_value_loss: gradient(verls(v, R, o, m, CLIP)[0]),
        "OpenRLHF": lambda: lambda criterion=openrlhf_functions.value_loss_class()(CLIP): gradient(criterion(v, o, R, m)),
    }
    participants = _call_participants(runs, list, inputs.expected)
    participants.append(Participant("torch.add and its gradient", lambda: lambda: torch.autograd.grad(torch.add(v, o), v, ones)))
    return Case(name, f"call: value loss, forward and backward, {list(CALL_SHAPE)}", v.numel(), participants, is_call=True)


def _call_gae(name: str, device: Device) -> Case:
    inputs = gae_inputs(CALL_SHAPE, device.torch)
    r, V, m = inputs.rewards, inputs.values, inputs.mask
    operator, weights, leaf = torch.ops.fused_critic.gae, m.float(), V.clone().requires_grad_()
    runs = {
        OPERATOR: lambda: lambda: operator(r, V, m, gamma=GAMMA, lam=LAM),
        PUBLIC: lambda: lambda: fused_critic.gae(r, V, m, gamma=GAMMA, lam=LAM),
        "verl": lambda: lambda verls=verl_functions.functions().compute_gae_advantage_return: verls(r, V, weights, GAMMA, LAM),
    }
    participants = _call_participants(runs, inputs.valid, inputs.expected)
    participants.append(Participant(ADD, lambda: lambda: torch.add(leaf, r)))
    return Case(name, f"call: GAE, {list(CALL_SHAPE)}", r.numel(), participants, is_call=True)


def _call_participants(prepares: dict, outputs, expected) -> list[Participant]:
    return [Participant(name, prepare, outputs, expected) for name, prepare in prepares.items()]
