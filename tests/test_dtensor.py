"""DTensors as arguments, with real processes (gloo on the loopback interface), against one process on the whole tensors."""

import functools
import multiprocessing
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "none")
ROWS = 11  # uneven on 2, 4 and 8 ranks; on 8 ranks two of them have none
TIME = 13


class Collectives(TorchDispatchMode):
    """The collectives that are called, and how many elements the largest takes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes first; what that calls comes back here
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__ and "wrap" not in func.__name__:
            self.names.append(func.__name__)
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


def same(got, expected, **tolerance):
    from torch.distributed.tensor import DTensor

    if isinstance(got, DTensor):
        assert got.shape == expected.shape, (got.shape, expected.shape)
        got = got.full_tensor()
    torch.testing.assert_close(got, expected, **(tolerance or TOLERANCE))


def per_token(stats):
    """The moments, most of which are sums whose terms cancel, in the size of their terms."""
    return stats.moments / (ROWS * TIME)


def meshes(world):
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    flat = init_device_mesh("cpu", (world,))
    yield flat, lambda dim: [Shard(dim)]
    yield flat, lambda dim: [Replicate()]
    if world >= 4:
        grid = init_device_mesh("cpu", (2, world // 2))
        yield grid, lambda dim: [Replicate(), Shard(dim)]
        yield grid, lambda dim: [Shard(dim), Replicate()]
        yield grid, lambda dim: [Shard(dim), Shard(dim)]


def data(seed, rows=ROWS, **options):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(rows, TIME, generator=generator, **options) for name in ("values", "old_values", "returns", "x", "y")}
    mask = torch.rand(rows, TIME, generator=generator) < 0.7
    mask[:3] = False  # a whole rank without a valid token, on 4 ranks and more
    flags = torch.rand(rows, TIME, generator=generator) < 0.1
    return tensors | {"mask": mask, "weights": mask * torch.rand(rows, TIME, generator=generator), "flags": flags}


class Distribute:
    """Turns the tensors of [B, T] into those of a layout, whole or distributed."""

    def __init__(self, mesh, placements, time_dim):
        self.mesh, self.placements, self.time_dim = mesh, placements, time_dim

    def whole(self, x):
        return x.t().contiguous() if x.dim() == 2 and self.time_dim == 0 else x

    def distributed(self, x):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(self.whole(x), self.mesh, self.placements(1 if x.dim() == 2 and self.time_dim == 0 else 0))


def both(layout, call, tensors, differentiable):
    """Results of call and gradients, on whole and on distributed tensors, the latter as whole ones; and what was distributed."""
    outcomes = []
    for make in (layout.whole, layout.distributed):
        given = {name: make(x.detach()).requires_grad_(name in differentiable) for name, x in tensors.items()}
        results = [x for x in call(**given)]
        cotangents = [make_cotangent(x, i, make, layout) for i, x in enumerate(results) if x.requires_grad]
        gradients = (
            torch.autograd.grad([x for x in results if x.requires_grad], [given[n] for n in differentiable], cotangents)
            if differentiable
            else []
        )
        outcomes.append((results, list(gradients), given))
    (results, gradients, _), (got, got_gradients, given) = outcomes
    for a, b in zip(got, results):
        same(a, b.detach())
    for name, a, b in zip(differentiable, got_gradients, gradients):
        same(a, b)
        if a.dim() > 0:
            assert a.placements == given[name].placements, (name, a.placements)
    return got


def make_cotangent(x, seed, make, layout):
    full = torch.randn(tuple(x.shape), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    if x.dim() == 0 and make == layout.whole:
        return full
    return make(full.t() if full.dim() == 2 and layout.time_dim == 0 else full) if x.dim() else replicate(full, layout.mesh)


def replicate(x, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)


# --- checks, each run on every rank -------------------------------------------------------------------------------------------------


def loss_like_one_process(world):
    for seed, (mesh, placements) in enumerate(meshes(world)):
        layout = Distribute(mesh, placements, time_dim=-1 if seed % 2 else 0)
        d = data(seed)
        for i, reduction in enumerate(REDUCTIONS):
            mask = (d["mask"], d["weights"], torch.zeros_like(d["mask"]), torch.ones_like(d["mask"]))[(i + seed) % 4]
            options = [
                {"clip_range": 0.3},
                {"clip_range": (torch.tensor(-0.2), 0.4), "loss_clamp": 0.8},
                {"criterion": "huber", "loss_clamp": 0.5},
                {"clip_range": None, "global_batch_size": 7, "batch_num_tokens": torch.tensor(50), "dp_size": 2},
            ][(i + 2 * seed) % 4]

            def call(values, old_values, returns, mask, options=options, reduction=reduction):
                out = fused_critic.value_loss(values, old_values, returns, mask, **options, reduction=reduction, time_dim=layout.time_dim)
                return out.loss, per_token(out.stats)

            both(layout, call, {n: d[n] for n in ("values", "old_values", "returns")} | {"mask": mask}, ["values"])


def statistics_are_those_of_the_whole(world):
    mesh, placements = next(meshes(world))
    layout = Distribute(mesh, placements, -1)
    d = data(5)
    tensors = [d[name] for name in ("values", "old_values", "returns", "mask")]
    expected = fused_critic.value_loss(*tensors).stats
    distributed = [layout.distributed(x) for x in tensors]
    with Collectives() as collectives:
        stats = fused_critic.value_loss(*distributed).stats
        merged = stats.to_dict()
    assert collectives.names == ["all_gather_into_tensor.default"], collectives.names
    for name, value in expected.to_dict().items():
        assert abs(merged[name] - value) <= 1e-6 * max(1, abs(value)), (name, merged[name], value)
        same(getattr(stats, name), getattr(expected, name))
    same((stats + stats).moments, (expected + expected).moments)
    with pytest.raises(ValueError, match="all_reduce: expected the statistics of one rank, got those of a DTensor"):
        stats.all_reduce()
    bits = stats.moments.to_local()
    everywhere = [torch.empty_like(bits) for _ in range(world)]
    dist.all_gather(everywhere, bits)
    assert all(torch.equal(bits, other) for other in everywhere)


def one_small_collective(world):
    """Loss: one all-gather of 15 numbers per sharded mesh dimension; backward and everything else: none. Replicated: none at all."""
    from torch.distributed.tensor import Replicate

    d = data(6)
    for mesh, placements in meshes(world):
        layout = Distribute(mesh, placements, -1)
        sharded = sum(not isinstance(p, Replicate) for p in placements(0))
        values, old, returns, mask = (layout.distributed(d[n]) for n in ("values", "old_values", "returns", "mask"))
        values.requires_grad_()
        ratios = mask.float()
        for reduction in REDUCTIONS[:-1]:
            with Collectives() as collectives:
                loss = fused_critic.value_loss(values, old, returns, mask, reduction=reduction).loss
            assert len(collectives.names) == sharded, collectives.names
            assert collectives.largest <= 15 * world
            with Collectives() as collectives:
                loss.backward()
            assert not collectives.names, collectives.names
        with Collectives() as collectives:
            fused_critic.gae(returns, old, mask, gamma=0.9, lam=0.8)
            fused_critic.gae(returns, values, gamma=0.9, lam=0.8).advantages.backward(old)
            fused_critic.reverse_scan(returns, 0.9)
            fused_critic.vtrace(returns, old, ratios=ratios, gamma=0.9)
        assert not collectives.names, collectives.names


def ranges_per_token_and_raw_counts(world):
    for mesh, placements in meshes(world):
        layout = Distribute(mesh, placements, -1)
        d = data(7)

        def call(values, old_values, returns, low, mask):
            # A sum of a distributed mask is Partial: the count of the whole.
            out = fused_critic.value_loss(values, old_values, returns, mask, clip_range=(low - 1, low + 1), batch_num_tokens=mask.sum() * 2)
            return out.loss, per_token(out.stats)

        tensors = {n: d[n] for n in ("values", "old_values", "returns", "mask")}
        both(layout, call, tensors | {"low": d["x"]}, ["values"])


def gae_like_one_process(world):
    for seed, (mesh, placements) in enumerate(meshes(world)):
        d = data(seed)
        per_row = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
        base = {"rewards": d["x"], "values": d["values"]}
        for time_dim in (-1, 0):
            layout = Distribute(mesh, placements, time_dim)

            def plain(rewards, values, bootstrap_values, mask, terminated):
                return fused_critic.gae(
                    rewards, values, mask, gamma=0.9, lam=0.8, terminated=terminated, bootstrap_values=bootstrap_values, time_dim=time_dim
                )

            tensors = base | {"bootstrap_values": per_row, "mask": d["mask"], "terminated": d["flags"]}
            both(layout, plain, tensors, ["rewards", "values", "bootstrap_values"])

            def factors(rewards, values, next_values, truncated, mask, lam):
                return fused_critic.gae(
                    rewards, values, mask, gamma=torch.tensor(0.9), lam=lam, returns_lam=1.0, mask_mode="zero",
                    truncated=truncated, next_values=next_values, time_dim=time_dim,
                )  # fmt: skip

            tensors = base | {"next_values": d["y"], "truncated": d["flags"], "mask": d["mask"], "lam": per_row}
            both(layout, factors, tensors, ["rewards", "values", "next_values"])


def gae_of_sequences_cut_in_time(world):
    """On a flat mesh, and on one whose other dimension shards or replicates the rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    layouts = [(init_device_mesh("cpu", (world,)), lambda rows, time: [Shard(time)])]
    if world >= 4:
        grid = init_device_mesh("cpu", (2, world // 2))
        layouts += [(grid, lambda rows, time: [Shard(rows), Shard(time)]), (grid, lambda rows, time: [Shard(time), Replicate()])]
    for seed, (mesh, placements) in enumerate(layouts):
        d = data(seed)
        per_row = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
        for time_dim in (-1, 0):
            own = placements(*((1, 0) if time_dim == 0 else (0, 1)))
            per_sequence = [Shard(0) if p == Shard(1 if time_dim == 0 else 0) else Replicate() for p in own]

            def make(x, distribute):
                x = x.t().contiguous() if x.dim() == 2 and time_dim == 0 else x
                return distribute_tensor(x, mesh, own if x.dim() == 2 else per_sequence) if distribute else x

            def given(distribute, **options):
                tensors = {"rewards": d["x"], "values": d["values"], "mask": d["mask"], "terminated": d["flags"], **options}
                return {name: make(x, distribute) for name, x in tensors.items()}

            numbers = {"gamma": 0.9, "lam": 0.8, "time_dim": time_dim}
            for whiten, options in (
                (False, {"bootstrap_values": per_row}),
                (True, {}),
                (False, {"next_values": d["y"], "truncated": d["flags"]}),
            ):
                tensors = given(True, **options)
                with Collectives() as collectives:
                    got = fused_critic.gae(**tensors, **numbers, whiten=whiten)
                assert collectives.names and collectives.largest <= 2 * ROWS * world  # carries, never tokens
                for a, b in zip(got, fused_critic.gae(**given(False, **options), **numbers, whiten=whiten)):
                    assert tuple(a.placements) == tuple(own)
                    same(a, b)


def gae_of_several_operators(world):
    """What gae composes, and whitening over the whole."""
    for seed, (mesh, placements) in enumerate(meshes(world)):
        d = data(seed)
        turn_ids = torch.arange(TIME).div(3, rounding_mode="floor").expand(ROWS, TIME).contiguous()
        layout = Distribute(mesh, placements, -1 if seed % 2 else 0)

        def turns(rewards, values, mask, turn_ids):
            return fused_critic.gae(
                rewards, values, mask, gamma=0.9, lam=0.8, turn_ids=turn_ids, carry_masked_rewards=True, time_dim=layout.time_dim
            )

        def whitened(rewards, values, mask, turn_ids):
            return fused_critic.gae(rewards, values, mask, gamma=0.9, lam=0.8, turn_ids=turn_ids, whiten=True, time_dim=layout.time_dim)

        tensors = {"rewards": d["x"], "values": d["values"], "mask": d["mask"], "turn_ids": turn_ids}
        both(layout, turns, tensors, ["rewards", "values"])
        both(layout, whitened, tensors, [])


def reverse_scan_like_one_process(world):
    for seed, (mesh, placements) in enumerate(meshes(world)):
        d = data(seed)
        per_row = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
        for decay in (torch.rand(ROWS, TIME, generator=torch.Generator().manual_seed(3)), per_row, torch.tensor(0.8)):
            layout = Distribute(mesh, placements, -1 if seed % 2 else 0)

            def scan(x, decay, init):
                return [fused_critic.reverse_scan(x, decay, init, time_dim=layout.time_dim)]

            if decay.dim() > 0:
                both(layout, scan, {"x": d["x"], "decay": decay, "init": per_row}, ["x", "decay", "init"])
                continue
            whole, x = layout.whole(d["x"]), layout.distributed(d["x"])
            plain, plain_too, far = (decay.clone().requires_grad_() for _ in range(3))
            distributed = replicate(far.detach(), mesh).requires_grad_()
            cotangent = make_cotangent(whole, 0, layout.whole, layout)
            expected = fused_critic.reverse_scan(whole, plain, time_dim=layout.time_dim)
            expected.backward(cotangent)
            for number in (plain_too, distributed):
                got = fused_critic.reverse_scan(x, number, time_dim=layout.time_dim)
                same(got, expected.detach())
                got.backward(make_cotangent(whole, 0, layout.distributed, layout))
                same(number.grad, plain.grad, rtol=1e-5, atol=1e-5)
            same(fused_critic.reverse_scan(x, 0.8, time_dim=layout.time_dim), expected.detach())


def vtrace_like_one_process(world):
    for seed, (mesh, placements) in enumerate(meshes(world)):
        d = data(seed)
        layout = Distribute(mesh, placements, -1 if seed % 2 else 0)

        def call(rewards, values, log_rhos, mask, terminated, bootstrap_values):
            options = {"terminated": terminated, "bootstrap_values": bootstrap_values, "time_dim": layout.time_dim}
            first = fused_critic.vtrace(rewards, values, log_rhos, mask, gamma=0.9, rho_clip=None, **options)
            return [*first, *fused_critic.vtrace(rewards, values, log_rhos, mask, gamma=torch.tensor(0.9), c_clip=None, **options)]

        tensors = {"rewards": d["x"], "values": d["values"], "log_rhos": d["y"], "mask": d["mask"], "terminated": d["flags"]}
        both(layout, call, tensors | {"bootstrap_values": torch.arange(ROWS) / ROWS}, [])


def whitening_like_one_process(world):
    from torch.distributed.tensor import Shard

    for seed, (mesh, placements) in enumerate(meshes(world)):
        d = data(seed)
        for options in ({}, {"unbiased": False}, {"shift_mean": False}):
            layout = Distribute(mesh, placements, -1)
            both(layout, lambda x, mask: [fused_critic.masked_whiten(x, mask, **options)], {"x": d["x"] + 100, "mask": d["mask"]}, ["x"])  # noqa: B023
            both(layout, lambda x: [fused_critic.masked_whiten(x, **options)], {"x": d["x"]}, ["x"])  # noqa: B023
        both(layout, lambda x, mask: [fused_critic.masked_whiten(x, mask)], {"x": d["x"], "mask": torch.zeros_like(d["mask"])}, [])
        x, mask = layout.distributed(d["x"]), layout.distributed(d["mask"])
        with Collectives() as collectives:
            fused_critic.masked_whiten(x, mask)
        assert len(collectives.names) == sum(isinstance(p, Shard) for p in x.placements), collectives.names
        assert collectives.largest <= 3 * world, collectives.largest
        if mesh.ndim == 1:  # cut in time: no matter here
            both(
                Distribute(mesh, lambda dim: [Shard(1)], -1),
                lambda x, mask: [fused_critic.masked_whiten(x, mask)],
                {"x": d["x"], "mask": d["mask"]},
                ["x"],
            )


def replicated_beside_sharded(world):
    """Replicated arguments are cut, without communication; the results are sharded."""
    from torch.distributed.tensor import Shard

    mesh, placements = next(meshes(world))
    layout = Distribute(mesh, placements, -1)
    d = data(9)
    values, mask, rewards = layout.distributed(d["values"]), replicate(d["mask"], mesh), replicate(d["x"], mesh).requires_grad_()
    bootstrap = replicate(d["y"][:, 0].contiguous(), mesh)
    with Collectives() as collectives:
        advantages = fused_critic.gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap_values=bootstrap).advantages
    assert not collectives.names
    assert advantages.placements == (Shard(0),)
    whole = d["x"].clone().requires_grad_()
    expected = fused_critic.gae(whole, d["values"], d["mask"], gamma=0.9, lam=0.8, bootstrap_values=d["y"][:, 0]).advantages
    same(advantages, expected.detach())
    expected.square().sum().backward()
    advantages.square().sum().backward()
    # Nine rows are walked side by side, a rank's fewer ones are scanned; the gradient sums terms of up to 15, whose roundings are 1e-6.
    same(rewards.grad, whole.grad, rtol=1e-6, atol=4e-6)


def small_shapes(world):
    """Fewer rows than ranks, no row, no step, one sequence and packed ones (replicated)."""
    mesh, placements = next(meshes(world))
    layout = Distribute(mesh, placements, -1)
    for rows, steps in ((1, 5), (0, 5), (3, 0)):
        x = torch.randn(rows, steps, generator=torch.Generator().manual_seed(0))

        def loss(values, reduction):
            out = fused_critic.value_loss(values, values.detach(), values.detach() + 1, reduction=reduction)
            return out.loss, per_token(out.stats)

        for reduction in REDUCTIONS:
            both(layout, lambda values: loss(values, reduction), {"values": x}, ["values"])  # noqa: B023
        both(layout, lambda values: fused_critic.gae(values, values, gamma=0.9, lam=0.9), {"values": x}, ["values"])
    packed = torch.randn(9, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 4, 4, 9])
    layout = Distribute(mesh, lambda dim: list(meshes(world))[1][1](dim), -1)
    for reduction in ("seq-mean-token-mean", "token-mean"):

        def call(values, cu_seqlens, reduction=reduction):
            out = fused_critic.value_loss(values, values.detach(), values.detach() + 1, reduction=reduction, cu_seqlens=cu_seqlens)
            return out.loss, per_token(out.stats)

        both(layout, call, {"values": packed, "cu_seqlens": bounds}, ["values"])
    both(layout, lambda x: fused_critic.gae(x, x, gamma=0.9, lam=0.8, bootstrap_values=x[-1]), {"x": packed}, ["x"])


def errors_come_before_any_collective(world):
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

    mesh, _ = next(meshes(world))
    x = torch.randn(ROWS, TIME, generator=torch.Generator().manual_seed(0))
    rows, columns = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Shard(1)])
    flat, bounds = distribute_tensor(x[0].contiguous(), mesh, [Shard(0)]), replicate(torch.tensor([0, TIME]), mesh)
    partial = DTensor.from_local(x, mesh, [Partial()])
    fewer, fewer_numbers = distribute_tensor(x[1:].clone(), mesh, [Shard(0)]), distribute_tensor(x[1:, 0].clone(), mesh, [Shard(0)])
    whole_sequences = r"expected Shard\(0\) or Replicate\(\) on every mesh dimension \(whole sequences on every rank\), got "
    redistribute = r"sequences cut in time are for fused_critic.gae alone, or redistribute explicitly"
    cases = [
        (lambda: fused_critic.reverse_scan(columns, 0.9), rf"reverse_scan: x: {whole_sequences}S.*1.*; {redistribute}"),
        (lambda: torch.ops.fused_critic.gae(columns, columns, gamma=1, lam=1), rf"gae: rewards: {whole_sequences}S.*1"),
        (
            lambda: fused_critic.gae(columns, rows, gamma=1, lam=1),
            r"gae: values: expected .*S.*1.* on the mesh of rewards, which are cut in time",
        ),
        (
            lambda: fused_critic.gae(columns, columns, gamma=1, lam=1, returns_lam=0.9),
            r"gae: rewards: expected whole sequences on every rank",
        ),
        (lambda: fused_critic.gae(rows, rows, columns, gamma=1, lam=1), rf"gae: mask: {whole_sequences}S.*1"),
        (lambda: fused_critic.value_loss(rows, rows, partial), rf"value_loss: returns: {whole_sequences}P"),
        (lambda: fused_critic.vtrace(rows, rows, rows, gamma=1, time_dim=0), r"vtrace: rewards: expected Shard\(1\) or Replicate\(\)"),
        (lambda: fused_critic.reverse_scan(flat, 0.9), r"reverse_scan: x: expected Replicate\(\) on every mesh dimension"),
        (lambda: fused_critic.value_loss(flat, flat, flat, cu_seqlens=bounds), r"value_loss: values: expected Replicate\(\) on"),
        (lambda: fused_critic.gae(rows, rows, gamma=1, lam=1, cu_seqlens=bounds), r"gae: rewards: expected Replicate\(\) on"),
        (
            lambda: fused_critic.value_loss(rows, x, rows),
            r"value_loss: old_values: expected a DTensor beside other DTensors, got a torch.Tensor",
        ),
        (lambda: fused_critic.value_loss(x, x, rows), r"value_loss: values: expected a DTensor beside other DTensors"),
        (lambda: fused_critic.gae(rows, rows, gamma=1, lam=x[:, 0]), r"gae: lam: expected a DTensor beside other DTensors"),
        (lambda: fused_critic.value_loss(rows, rows, fewer), r"value_loss: returns: expected shape \[11, 13\]"),
        (
            lambda: fused_critic.gae(rows, rows, gamma=1, lam=1, bootstrap_values=fewer_numbers),
            r"gae: bootstrap_values: expected shape \[11\]",
        ),
        (lambda: fused_critic.value_loss(rows, rows, rows, dp_size=2), r"value_loss: dp_size: expected batch_num_tokens"),
        (lambda: fused_critic.value_loss(rows, rows, rows, clip_range=-1.0), r"value_loss: clip_range: expected"),
        (lambda: fused_critic.masked_whiten(rows, group=dist.group.WORLD), r"masked_whiten: group: expected None beside a DTensor"),
        *(
            (
                functools.partial(fused_critic.value_loss, *tensors, group=dist.group.WORLD),
                r"value_loss: group: expected None beside a DTensor",
            )
            for tensors in ((rows, rows, rows), (x, x, x, rows), (x, x, rows))
        ),
    ]
    if world >= 4:
        # Cut in time, and the rows in 6 and 5: one number too many is one on the ranks of the second part alone, 6 and 6.
        grid = init_device_mesh("cpu", (2, world // 2))
        cut, numbers = distribute_tensor(x, grid, [Shard(0), Shard(1)]), replicate(torch.full((ROWS + 1,), 0.5), grid)
        for name in ("bootstrap_values", "gamma", "lam"):
            options = {"gamma": 1, "lam": 1, "whiten": True, name: numbers}
            cases.append((functools.partial(fused_critic.gae, cut, cut, **options), rf"gae: {name}: expected shape \[11\].*got \[12\]"))
    for call, message in cases:
        with Collectives() as collectives, pytest.raises(ValueError, match=message):
            call()
        assert not collectives.names


def compile_whole(world):
    if world > 2:
        return  # tracing is the same, and costs seconds on each rank
    d = data(11)
    for mesh, placements in list(meshes(world))[:1]:
        layout = Distribute(mesh, placements, -1)
        for reduction in ("token-mean", "seq-mean-token-mean"):

            def call(values, old_values, returns, mask, reduction=reduction):
                advantages = fused_critic.gae(returns, old_values, mask, gamma=0.9, lam=0.8).advantages
                loss, stats = fused_critic.value_loss(values, old_values, advantages, mask, reduction=reduction)
                return loss * 2, per_token(stats)

            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            names = ("values", "old_values", "returns", "mask")
            expected = [d[n].clone() for n in names]
            got = [layout.distributed(d[n]) for n in names]
            expected[0].requires_grad_()
            got[0].requires_grad_()
            for a, b in zip(compiled(*got), compiled(*expected)):
                same(a.detach(), b.detach())
            compiled(*got)[0].backward()
            compiled(*expected)[0].backward()
            same(got[0].grad, expected[0].grad)


CHECKS = (
    loss_like_one_process,
    statistics_are_those_of_the_whole,
    one_small_collective,
    ranges_per_token_and_raw_counts,
    gae_like_one_process,
    gae_of_sequences_cut_in_time,
    gae_of_several_operators,
    reverse_scan_like_one_process,
    vtrace_like_one_process,
    whitening_like_one_process,
    replicated_beside_sharded,
    small_shapes,
    errors_come_before_any_collective,
    compile_whole,
)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for check in CHECKS:
        failure, everyone = None, [None] * world
        try:
            check(world)
        except Exception:
            failure = f"rank {rank} of {world}: {check.__name__}\n{traceback.format_exc()}"
        # A rank that failed may have left the others in the middle of a collective: then nothing after it means anything.
        try:
            dist.all_gather_object(everyone, failure)
        except Exception:
            failure = failure or f"rank {rank} of {world}: after {check.__name__}\n{traceback.format_exc()}"
        if failure:
            Path(folder, f"failure{rank}").write_text(failure)
        if failure or any(everyone):
            break
    else:
        Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("world", [2, 4, 8])
def test_dtensors_give_what_one_process_gives(world, tmp_path):
    # DTensor imports torch._dynamo when it is first used: seconds, here once for all processes.
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "fused_critic"])
    mp.start_processes(worker, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    failures = [path.read_text() for path in sorted(tmp_path.glob("failure*"))]
    assert not failures, "\n".join(failures)
    assert len(list(tmp_path.glob("done*"))) == world


# What a process may do before it imports torch.distributed.tensor.
PROBED = "import importlib.util, fused_critic; assert importlib.util.find_spec('torch.distributed.tensor') is not None"
FAILED = """
import sys, fused_critic
sys.modules["torch.distributed.tensor._ops"] = None
try:
    import torch.distributed.tensor
except ImportError:
    del sys.modules["torch.distributed.tensor._ops"]
"""


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    "before",
    ["import fused_critic", "import torch.distributed.tensor", PROBED, FAILED],
    ids=["fused_critic", "torch.distributed.tensor", "probed", "failed"],
)
def test_rules_are_there_in_any_order_of_imports(before):
    code = f"""{before}
import sys
assert "torch.distributed.tensor" not in sys.modules or {before!r} == "import torch.distributed.tensor"
import inspect, fused_critic, torch, torch.distributed.tensor
from torch._library.simple_registry import find_torch_dispatch_rule
assert find_torch_dispatch_rule(torch.ops.fused_critic.gae.default, torch.distributed.tensor.DTensor) is not None
assert not any(type(finder).__module__.startswith("fused_critic") for finder in sys.meta_path)
assert "DTensor" in inspect.getsource(torch.distributed.tensor)
assert "exec_module" not in vars(torch.distributed.tensor.__loader__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
