"""torch.func.vmap for every operator: one call per slice, the results stacked. An ensemble is small; each call is already parallel inside."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree


def _batching_rule(operator):
    def rule(info, in_dims, *args, **kwargs):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # torch describes keyword arguments as unbatched and positional ones by their dimension.
        dims = list(pytree.tree_flatten(in_dims, is_leaf=lambda d: d is None)[0]) + [None] * (len(leaves) - len(in_dims))

        def call(index):
            sliced = [x if d is None else x.select(d, index) for x, d in zip(leaves, dims)]
            call_args, call_kwargs = pytree.tree_unflatten(sliced, spec)
            return operator(*call_args, **call_kwargs)

        results = [call(index) for index in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results)), (0,) * len(results[0])

    return rule


for _name in ("value_loss", "gae", "reverse_scan", "vtrace"):
    for _overload in ("default", "tensor"):
        _operator = getattr(getattr(torch.ops.fused_critic, _name), _overload)
        torch.library.register_vmap(_operator, _batching_rule(_operator))
for _name in ("value_loss_backward", "gae_backward", "reverse_scan_backward"):
    _operator = getattr(torch.ops.fused_critic, _name).default
    torch.library.register_vmap(_operator, _batching_rule(_operator))
