"""Nested tensors of layout ``torch.jagged``: a [B, T*] tensor is its ``values()``, packed, and its ``offsets()``: nothing is padded or copied.

Every operator has a dispatch rule for them, below autograd: it calls the operator on the packed tokens and makes the results jagged
again, with the same offsets. So the public functions, the raw operators, autograd and torch.compile take jagged tensors alike, and calls
without them pass nothing of this. That tensors belong together is checked as torch's own operators do it: by their ragged size (one per
offsets tensor), never by the contents of the offsets, which would take a synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor  # torch gives the class no public name


class Operator(NamedTuple):
    """How an operator's arguments and results are laid out; arguments that an overload does not have are ignored."""

    per_token: tuple[str, ...]  # the first of them that is there is the reference
    per_token_results: Callable[[dict[str, Any]], tuple[bool, ...]]  # by the arguments of a call, by name
    either: tuple[str, ...] = ()  # per token, or a strided number: one for all (0-d) or one per sequence ([B])


_FLAGS = ("mask", "terminated", "truncated", "next_values")
OPERATORS = {
    "value_loss": Operator(
        ("values", "old_values", "returns", "mask"), lambda call: (call.get("reduction") == "none", False, False), ("clip_low", "clip_high")
    ),
    "value_loss_backward": Operator(
        ("values", "old_values", "returns", "mask"), lambda call: (True,), ("grad_loss", "clip_low", "clip_high")
    ),
    "gae": Operator(("rewards", "values", *_FLAGS), lambda call: (True, True)),
    "gae_backward": Operator(
        ("grad_advantages", "grad_returns", *_FLAGS),
        lambda call: (call["wanted"][0], call["wanted"][1], call["wanted"][2] and call["has_next_values"], False),
    ),
    "reverse_scan": Operator(("x",), lambda call: (True,), ("decay",)),
    "reverse_scan_backward": Operator(
        ("grad", "x"), lambda call: (call["wanted"][0], call["wanted"][1] and call["decay"].is_nested, False), ("decay",)
    ),
    "vtrace": Operator(("rewards", "values", "log_rhos", "ratios", *_FLAGS), lambda call: (True, True, True)),
}


def unwrap(op: str, tensors: dict[str, Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The offsets and the packed tokens of jagged per-token arguments, by name, that belong together."""
    given: dict[str, Any] = {name: x for name, x in tensors.items() if x is not None}
    reference_name, reference = next(iter(given.items()))
    for name, x in given.items():
        if x.is_nested != reference.is_nested:
            expected, got = ("a jagged tensor" if tensor.is_nested else "a strided tensor" for tensor in (reference, x))
            raise ValueError(f"fused_critic.{op}: {name}: expected {expected} (as {reference_name} is), got {got}")
    for name, x in given.items():
        if x.layout != torch.jagged:
            raise ValueError(f"fused_critic.{op}: {name}: expected a nested tensor of layout torch.jagged, got layout {x.layout}")
        if x.dim() != 2:
            raise ValueError(f"fused_critic.{op}: {name}: expected a jagged tensor of shape [B, T*], got {x.dim()} dimensions")
        if x.lengths() is not None:
            raise ValueError(
                f"fused_critic.{op}: {name}: expected a jagged tensor without holes, got one with lengths; contiguous() closes them"
            )
        if x.offsets() is not reference.offsets() and x.shape[1] != reference.shape[1]:
            raise ValueError(
                f"fused_critic.{op}: {name}: expected the offsets of {reference_name}, got another offsets tensor (contents are not compared); "
                f"torch.nested.nested_tensor_from_jagged({name}.values(), {reference_name}.offsets()) shares them"
            )
    return reference.offsets(), [None if name not in given else given[name].values() for name in tensors]


def packed(op: str, tensors: dict[str, Tensor | None], call: Callable[[Tensor, dict[str, Any]], Any]) -> Any:
    """For what is composed of several operators: ``call(offsets, packed tensors)``, its per-token results jagged again."""
    offsets, tokens = unwrap(op, tensors)
    results = call(offsets, dict(zip(tensors, tokens)))
    if isinstance(results, Tensor):
        return torch.nested.nested_tensor_from_jagged(results, offsets)
    return type(results)(*(torch.nested.nested_tensor_from_jagged(x, offsets) for x in results))


def check_no_other_layout(op: str, cu_seqlens: Tensor | None, time_dim: int) -> None:
    instead = "beside jagged tensors, which have offsets instead"
    if cu_seqlens is not None:
        raise ValueError(f"fused_critic.{op}: cu_seqlens: expected None {instead}, got a tensor")
    if time_dim != -1:
        raise ValueError(f"fused_critic.{op}: time_dim: expected -1 {instead}, got {time_dim}")


def _rule(operator: Operator) -> Callable[..., Any]:
    def rule(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        op = func._schema.name.replace("fused_critic::", "")
        call = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        for name, x in call.items():
            if isinstance(x, Tensor) and x.is_nested and name not in operator.per_token + operator.either:
                raise ValueError(f"fused_critic.{op}: {name}: expected a strided tensor, got a nested one")
        check_no_other_layout(op, call.get("cu_seqlens"), call.get("time_dim", -1))
        tensors = {name: call[name] for name in operator.per_token if call.get(name) is not None}
        tensors |= {name: call[name] for name in operator.either if isinstance(call.get(name), Tensor) and call[name].is_nested}
        offsets, tokens = unwrap(op, tensors)
        for name in operator.either:
            x = call.get(name)
            if isinstance(x, Tensor) and not x.is_nested and x.shape not in ((), (offsets.shape[0] - 1,)):
                raise ValueError(
                    f"fused_critic.{op}: {name}: expected a jagged tensor or a number, got a strided tensor of shape {list(x.shape)}"
                )
        results = func(**{**call, **dict(zip(tensors, tokens)), "cu_seqlens": offsets})
        if isinstance(results, Tensor):
            return cls(results, offsets)
        return tuple(cls(x, offsets) if per_token else x for x, per_token in zip(results, operator.per_token_results(call)))

    return rule


def register(name: str, operator: Operator) -> None:
    """The dispatch rule of all overloads of an operator."""
    packet = getattr(torch.ops.fused_critic, name)
    for overload in packet.overloads():
        torch.library.register_torch_dispatch(getattr(packet, overload), NestedTensor, _rule(operator))


for _name, _operator in OPERATORS.items():
    register(_name, _operator)
