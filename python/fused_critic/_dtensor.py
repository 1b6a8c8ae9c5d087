"""DTensor: every operator runs on the rows that a rank has, and its results are DTensors again.

Every operator has a dispatch rule for DTensor, below autograd, so that the public functions, the raw operators, autograd and torch.compile take
DTensors alike, and calls without them pass nothing of this. Sequences must be whole on every rank: a mesh dimension may shard the dimension of
the sequences (Shard(0) of [B, T], Shard(1) of [T, B], Shard(0) of what has one number per sequence) or replicate; where arguments differ in
that, the replicated ones are cut, which needs no communication. Anything else is an error before any communication, but for the public gae, which
takes sequences that are cut in time to context_parallel_gae. The one exception is gradients on their way back, which autograd brings in whatever placement it likes: they are redistributed as torch's own operators do it.

What communicates (a gather, or a sum, is one collective for each mesh dimension that shards):

- value_loss: a gather of each rank's 15 numbers (14 for the reduction "none"), after its pass over the tokens, gives loss and statistics of the
  whole, replicated, with the same bits on every rank. Its gradient: nothing.
- masked_whiten, and gae with whiten: a gather of each rank's 3 moments; the backward of masked_whiten sums their gradients.
- gae of sequences that are cut in time: context_parallel_gae.
- The backward of reverse_scan where the decay is a plain 0-d tensor: a sum of the decay's gradient, which is a plain tensor too.
- A number given as a Partial DTensor (a count of this rank's tokens): its sum.
- Gradients that arrive in another placement: their redistribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ._context_parallel import context_parallel_gae
from ._jagged import OPERATORS
from .stats import _SEQUENCES, _WEIGHT, NUM_MOMENTS, _merge

_GRADIENTS = ("grad_loss", "grad_advantages", "grad_returns", "grad")
_ELSEWHERE = "sequences cut in time are for fused_critic.gae alone, or redistribute explicitly"
_COUNTS = {
    "token-mean": ("batch_num_tokens", _WEIGHT),
    "seq-mean-token-sum": ("global_batch_size", _SEQUENCES),
    "seq-mean-token-sum-norm": ("global_batch_size", _SEQUENCES),
    "seq-mean-token-mean": ("global_batch_size", _SEQUENCES),
}


def _is_shard(placement: Placement) -> bool:
    return _dim(placement) is not None  # Shard, and torch's private strided one


def _dim(placement: Any) -> int | None:
    return getattr(placement, "dim", None)


def _moved(placement: Any, dim: int) -> Placement:
    """The same shards of another dimension."""
    moved: Placement = placement
    if placement.dim != dim:
        moved = Shard(dim) if isinstance(placement, Shard) else type(placement)(dim, split_factor=placement.split_factor)
    return moved


def _num_parts(mesh: DeviceMesh, placements: Sequence[Placement]) -> int:
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if _is_shard(placement))


def _gathered(numbers: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """The numbers [n] of all parts that placements cut a tensor into, [parts, n]: one all-gather for each mesh dimension that shards. Differentiable."""
    rows: list[Placement] = [Shard(0) if _is_shard(p) else p for p in placements]
    shape = (_num_parts(mesh, placements), numbers.shape[0])
    parts = DTensor.from_local(numbers.unsqueeze(0), mesh, rows, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))
    # Every part has a gradient of its own for what all of them read.
    gradients: list[Placement] = [Partial() if _is_shard(p) else p for p in placements]
    return parts.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=gradients)


class Layout:
    """How the sequences of one call lie on the mesh, from its DTensors."""

    def __init__(self, op: str, per_token: Sequence[str], tensors: dict[str, Tensor], cu_seqlens: Tensor | None, time_dim: int):
        """per_token: names of arguments that are per token whatever their shape. tensors: all tensor arguments but cu_seqlens and residuals."""
        self.op = op
        reference_name = next(name for name in per_token if name in tensors)
        reference = tensors[reference_name]
        self.shape = reference.shape
        packed = cu_seqlens is not None
        # 1 or 2 dimensions, and time_dim one of them, are the operator's own checks; these hold wherever they do.
        self.dim = None if packed or len(self.shape) != 2 else 1 - time_dim % 2
        mesh: DeviceMesh | None = None
        for name, x in tensors.items() if cu_seqlens is None else (*tensors.items(), ("cu_seqlens", cu_seqlens)):
            if not isinstance(x, DTensor):
                if x.dim() == 0:
                    continue  # a number
                raise ValueError(
                    f"fused_critic.{op}: {name}: expected a DTensor beside other DTensors, got a torch.Tensor; distribute all tensors but numbers"
                )
            mesh = mesh or x.device_mesh
            if x.device_mesh != mesh:
                raise ValueError(f"fused_critic.{op}: {name}: expected the device mesh {mesh} (that of the others), got {x.device_mesh}")
        assert mesh is not None
        self.mesh = mesh
        self.kinds = {name: self._kind(name, x, name in per_token, reference_name) for name, x in tensors.items()}
        self.tokens: list[Placement] = [Replicate() for _ in range(mesh.ndim)]
        for name, x in tensors.items():
            if isinstance(x, DTensor) and self.kinds[name] != "number":
                self._take(name, x)
        self.sequences: list[Placement] = [_moved(p, 0) if _is_shard(p) else p for p in self.tokens]
        self.whole: list[Placement] = [Replicate() for _ in range(mesh.ndim)]
        self.sum: list[Placement] = [Partial() if _is_shard(p) else p for p in self.tokens]
        if cu_seqlens is not None:
            self._whole("cu_seqlens", cu_seqlens)

    @property
    def num_sequences(self) -> int:
        """Of a 2-d layout."""
        return 1 if self.dim is None else self.shape[self.dim]

    @property
    def parts(self) -> int:
        """Ranks that have different rows."""
        return _num_parts(self.mesh, self.tokens)

    def _kind(self, name: str, x: Tensor, is_per_token: bool, reference_name: str) -> str:
        # Shapes are compared here, where they are those of the whole: a rank that found its part to differ would leave the others alone.
        if is_per_token and x.shape != self.shape:
            raise ValueError(
                f"fused_critic.{self.op}: {name}: expected shape {list(self.shape)} (that of {reference_name}), got {list(x.shape)}; nothing is broadcast"
            )
        if x.shape == self.shape:
            return "token"
        if x.dim() == 0:
            return "number"
        if self.dim is not None and tuple(x.shape) != (self.num_sequences,):
            raise ValueError(
                f"fused_critic.{self.op}: {name}: expected shape [{self.num_sequences}] (one value per sequence), a number or shape {list(self.shape)}, "
                f"got {list(x.shape)}"
            )
        return "sequence"

    def _take(self, name: str, x: DTensor) -> None:
        """The placements of all tokens follow any argument that is sharded in its sequences."""
        own = self.dim if self.kinds[name] == "token" else (0 if self.dim is not None else None)
        for i, placement in enumerate(x.placements):
            if isinstance(placement, Replicate) or (name in _GRADIENTS and not (_is_shard(placement) and _dim(placement) == own)):
                continue
            if not _is_shard(placement) or _dim(placement) != own:
                expected = "Replicate()" if own is None else f"Shard({own}) or Replicate()"
                raise ValueError(
                    f"fused_critic.{self.op}: {name}: expected {expected} on every mesh dimension (whole sequences on every rank), "
                    f"got {placement} on mesh dimension {i}; {_ELSEWHERE}"
                )
            assert self.dim is not None
            wanted = _moved(placement, self.dim)
            if _is_shard(self.tokens[i]) and self.tokens[i] != wanted:
                raise ValueError(
                    f"fused_critic.{self.op}: {name}: expected {self.tokens[i]} on mesh dimension {i} (as other arguments have), got {wanted}"
                )
            self.tokens[i] = wanted

    def _whole(self, name: str, x: Any) -> None:
        for i, placement in enumerate(x.placements):
            if not isinstance(placement, Replicate):
                raise ValueError(
                    f"fused_critic.{self.op}: {name}: expected Replicate() on every mesh dimension, got {placement} on mesh dimension {i}; {_ELSEWHERE}"
                )

    def local(self, name: str, x: Tensor) -> Tensor:
        """This rank's part of an argument."""
        if not isinstance(x, DTensor):
            return x
        kind = self.kinds.get(name, "number")
        placements = {"token": self.tokens, "sequence": self.sequences, "number": self.whole}[kind]
        if list(x.placements) != placements:
            x = x.redistribute(placements=placements)
        return x.to_local()

    def distributed(self, x: Tensor, placements: list[Placement], shape: Sequence[int]) -> DTensor:
        """A DTensor of this shape, x being this rank's part."""
        stride: tuple[int, ...]
        if len(shape) == 2:
            stride = (shape[1], 1) if x.is_contiguous() else (1, shape[0])
        else:
            stride = (1,) * len(shape)
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def result(self, x: Tensor, kind: str) -> DTensor:
        if kind == "token":
            return self.distributed(x, self.tokens, self.shape)
        if kind == "sequence" and self.dim is not None:
            return self.distributed(x, self.sequences, (self.num_sequences,))
        if kind == "number":
            return self.distributed(x, self.sum, ())
        return self.distributed(x, self.whole, x.shape)

    def merged(self, numbers: Tensor) -> Tensor:
        return _gathered(numbers, self.mesh, self.tokens)


def _value_loss(layout: Layout, call: dict[str, Any], run: Any) -> tuple[DTensor, DTensor, DTensor]:
    reduction, clamp = call.get("reduction", "token-mean"), call.get("loss_clamp") is not None
    count_name, count_moment = _COUNTS.get(reduction, ("", 0))
    # Where no count is given, the parts' sums are divided by the whole's count afterwards: so one exchange serves loss, count and statistics.
    divide = reduction in _COUNTS and call.get(count_name) is None and call.get("dp_size", 1.0) == 1
    if divide:
        call = call | {count_name: torch.ones((), dtype=torch.float64) if run._overloadname == "tensor" else 1.0}
    loss, moments, residuals = run(**call)
    per_token = reduction == "none"
    row = moments if per_token else torch.cat([moments, loss.to(torch.float64).unsqueeze(0)])
    rows = layout.merged(row)
    total = _merge(rows[:, :NUM_MOMENTS])
    if not per_token:
        whole = rows[:, NUM_MOMENTS].sum()
        if divide:
            count = total[count_moment]
            scale = torch.where(count > 0, 1 / count, 0.0)
            whole = torch.where(count > 0, whole * scale, 0.0)
            residuals = torch.cat([residuals[:1] * scale, residuals[1:]])
        loss = whole.to(loss.dtype)
    if reduction == "seq-mean-token-mean":  # its own for each rank: factors of its rows, beside a few numbers
        kept: list[Placement] = [Shard(0) if _is_shard(p) else p for p in layout.tokens]
        numbers = 3 + clamp
        residuals = layout.distributed(
            residuals, kept, (layout.parts * numbers + layout.num_sequences if layout.dim is not None else residuals.shape[0],)
        )
    else:
        residuals = layout.distributed(residuals, layout.whole, residuals.shape)
    loss = layout.result(loss, "token") if per_token else layout.distributed(loss, layout.whole, ())
    return loss, layout.distributed(total, layout.whole, total.shape), residuals


def _kinds_of_results(name: str, call: dict[str, Any], layout: Layout) -> list[str]:
    if name == "gae_backward":
        rewards, values, next_values, bootstrap = call["wanted"]
        has_next = call["has_next_values"]
        tokens = (rewards, values, next_values and has_next)
        return ["token" if wanted else "none" for wanted in tokens] + ["sequence" if bootstrap and not has_next else "none"]
    if name == "reverse_scan_backward":
        kinds = ("token", layout.kinds["decay"], "sequence")
        return [kind if wanted else "none" for kind, wanted in zip(kinds, call["wanted"])]
    return ["token"] * len(OPERATORS[name].per_token_results(call))


def _rule(name: str) -> Callable[..., Any]:
    def rule(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        call = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        given = {key: x for key, x in call.items() if isinstance(x, Tensor)}
        tensors = {key: x for key, x in given.items() if key not in ("cu_seqlens", "residuals")}
        with torch.no_grad():
            layout = Layout(name, OPERATORS[name].per_token, tensors, given.get("cu_seqlens"), call.get("time_dim", -1))
            local = call | {key: layout.local(key, x) for key, x in tensors.items()}
            for key in ("cu_seqlens", "residuals"):
                if key in given:
                    local[key] = call[key].to_local()
            if name == "value_loss":
                return _value_loss(layout, local, func)
            results = func(**local)
            if isinstance(results, Tensor):
                return layout.result(results, "token")
            kinds = _kinds_of_results(name, call, layout)
            wrapped: list[Tensor] = [layout.result(x, kind) for x, kind in zip(results, kinds)]
            if name == "reverse_scan_backward" and kinds[1] == "number" and not isinstance(call["decay"], DTensor):
                wrapped[1] = layout.result(results[1], "number").full_tensor()  # the gradient of a plain number is one
            return tuple(wrapped)

    return rule


def on_rows(op: str, per_token: dict[str, Tensor | None], others: dict[str, Any], call: Callable[..., Any]) -> Any:
    """``call(**per_token, **others)`` on the rows of this rank, differentiable: for what is made of several operators. All results are per token."""
    tokens = {name: x for name, x in per_token.items() if x is not None}
    tensors = tokens | {name: x for name, x in others.items() if isinstance(x, Tensor) and name != "cu_seqlens"}
    cu_seqlens = others.get("cu_seqlens")
    layout = Layout(op, tuple(tokens), tensors, cu_seqlens, others.get("time_dim", -1))
    local = per_token | others | {name: layout.local(name, x) for name, x in tensors.items()}
    if cu_seqlens is not None:
        local["cu_seqlens"] = cu_seqlens.to_local()
    results = call(**local)
    return type(results)(*(layout.result(x, "token") for x in results))


def cuts_time(x: Tensor, time_dim: int) -> bool:
    """Whether a mesh dimension shards the time of a [B, T], [T, B] or [T]."""
    return isinstance(x, DTensor) and 1 <= x.dim() <= 2 and any(_dim(placement) == time_dim % x.dim() for placement in x.placements)


def gae_in_time(per_token: dict[str, Tensor | None], bootstrap_values: Tensor | None, time_dim: int, **options: Any) -> Any:
    """:func:`context_parallel_gae` of sequences that one mesh dimension cuts in time; the other mesh dimensions shard them or replicate."""
    rewards = per_token["rewards"]
    assert isinstance(rewards, DTensor)
    mesh, placements, time = rewards.device_mesh, rewards.placements, time_dim % rewards.dim()
    cuts = [i for i, placement in enumerate(placements) if _dim(placement) == time]
    if len(cuts) != 1 or type(placements[cuts[0]]) is not Shard:
        raise ValueError(
            f"fused_critic.gae: rewards: expected Shard({time}) on one mesh dimension at most, got {placements}; redistribute explicitly"
        )
    for name, x in per_token.items():
        if x is None:
            continue
        if not isinstance(x, DTensor) or x.shape != rewards.shape or x.device_mesh != mesh or x.placements != placements:
            found = f"{x.placements} of shape {list(x.shape)}" if isinstance(x, DTensor) else "a torch.Tensor"
            raise ValueError(
                f"fused_critic.gae: {name}: expected {placements} of shape {list(rewards.shape)} on the mesh of rewards, which are cut in time, got {found}"
            )
    # One number per sequence lies as the sequences do.
    rows: list[Placement] = [Shard(0) if _is_shard(p) and i != cuts[0] else Replicate() for i, p in enumerate(placements)]
    sequences = 1 if rewards.dim() == 1 else rewards.shape[1 - time]

    def local(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # The whole's length: a rank may find its part to fit where another one's does not.
        is_number = x.dim() == 0 and (name != "bootstrap_values" or rewards.dim() == 1)
        if not is_number and tuple(x.shape) != (sequences,):
            raise ValueError(f"fused_critic.gae: {name}: expected shape [{sequences}] (one value per sequence), got {list(x.shape)}")
        if x.dim() == 0 and not isinstance(x, DTensor):
            return x
        if (
            not isinstance(x, DTensor)
            or x.device_mesh != mesh
            or any(theirs not in (own, Replicate()) for theirs, own in zip(x.placements, rows))
        ):
            raise ValueError(
                f"fused_critic.gae: {name}: expected a number, or a DTensor of {rows} or Replicate() on the mesh of rewards, got {type(x)}"
            )
        return (x.redistribute(placements=rows) if x.dim() else x).to_local()

    call: dict[str, Any] = {name: x.to_local() for name, x in per_token.items() if isinstance(x, DTensor)}
    call |= {name: local(name, x) for name, x in (options | {"bootstrap_values": bootstrap_values}).items()}
    results = context_parallel_gae(**call, group=mesh.get_group(cuts[0]), time_dim=time_dim)
    return type(results)(
        *(
            DTensor.from_local(
                x.contiguous(),
                mesh,
                placements,
                run_check=False,
                shape=rewards.shape,
                stride=torch.empty(rewards.shape, device="meta").stride(),
            )
            for x in results
        )
    )


def whiten(x: Tensor, mask: Tensor | None, call: Callable[..., Tensor]) -> DTensor:
    """``call(x, mask, gather)`` on this rank's part, cut in any dimension; ``gather`` gives all parts' numbers."""
    op = "masked_whiten"
    for name, tensor in (("x", x), ("mask", mask)):
        if tensor is not None and not isinstance(tensor, DTensor):
            raise ValueError(f"fused_critic.{op}: {name}: expected a DTensor beside a DTensor, got a torch.Tensor")
    assert isinstance(x, DTensor)
    if any(isinstance(placement, Partial) for placement in x.placements):
        raise ValueError(
            f"fused_critic.{op}: x: expected Shard or Replicate on every mesh dimension, got {x.placements}; redistribute explicitly"
        )
    local_mask = None
    if isinstance(mask, DTensor):
        if mask.shape != x.shape:
            raise ValueError(
                f"fused_critic.{op}: mask: expected shape {list(x.shape)} (that of x), got {list(mask.shape)}; nothing is broadcast"
            )
        if mask.device_mesh != x.device_mesh or any(theirs not in (own, Replicate()) for theirs, own in zip(mask.placements, x.placements)):
            raise ValueError(
                f"fused_critic.{op}: mask: expected the device mesh and placements of x ({x.placements}), or Replicate(), got {mask.placements}; "
                "redistribute explicitly"
            )
        if mask.placements != x.placements:
            mask = mask.redistribute(placements=x.placements)
        local_mask = mask.to_local()
    if not x.dtype.is_floating_point:
        raise TypeError(f"fused_critic.{op}: x: expected a floating dtype, got {x.dtype}")
    whitened = call(x.to_local(), local_mask, lambda moments: _gathered(moments, x.device_mesh, x.placements))
    return DTensor.from_local(whitened, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


for _name in OPERATORS:
    _packet = getattr(torch.ops.fused_critic, _name)
    for _overload in _packet.overloads():
        torch.library.register_torch_dispatch(getattr(_packet, _overload), DTensor, _rule(_name))
