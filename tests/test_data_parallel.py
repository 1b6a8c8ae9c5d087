"""value_loss over a process group and global_counts, with real processes (gloo on the loopback interface), against one process."""

from datetime import timedelta
from unittest import mock

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_critic import functional, reference
from fused_critic.distributed import BatchCounts, global_counts
from torch.autograd.profiler import profile

WORLD_SIZES = (2, 4, 8)
ROWS, LENGTH = 13, 11
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative and absolute
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
OPTIONS = {name: {"reduction": name, **({"loss_scale_factor": LENGTH} if name.endswith("norm") else {})} for name in REDUCTIONS}


class Calls(profile):
    """The names of the operators of torch.distributed and of fused_critic that are called, in order."""

    def __init__(self):
        super().__init__(use_kineto=False)  # a dispatch mode would import the compiler, which costs every process seconds

    @property
    def names(self):
        return [event.name for event in self.function_events if event.name.startswith(("c10d::", "_c10d_functional::", "fused_critic::"))]

    @property
    def collectives(self):
        return [name for name in self.names if "c10d" in name]


def batch(dtype=torch.float32, kind="bool"):
    """values, old values, returns and mask of the whole batch: row 5 is masked, what lies under the mask is NaN."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    mask[5] = False
    if kind == "none":
        return *tensors, None
    for x in tensors:
        x[~mask] = float("nan")
    if kind == "weights":
        return *tensors, mask * torch.rand(ROWS, LENGTH, generator=generator)
    return *tensors, mask.to({"bool": torch.bool, "integer": torch.int64}[kind])


def row_splits(ranks):
    """Rows of each rank: uneven; all on one rank, the others without any; none but the masked row on the first rank."""
    uneven = [ROWS * i * (i + 1) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
    rest = [5] + [ROWS - 1 - (ROWS - 7) * i // (ranks - 1) for i in range(ranks - 1)]
    masked = [[5], *([r for r in range(ROWS) if r != 5][i :: ranks - 1] for i in range(ranks - 1))]
    assert len(rest) == ranks
    return {
        "uneven": [list(range(a, b)) for a, b in zip(uneven, uneven[1:])],
        "all on the last rank": [[]] * (ranks - 1) + [list(range(ROWS))],
        "one rank with nothing valid": masked,
    }


def loss_and_gradient(values, *others, **options):
    values = values.detach().requires_grad_()
    output = fused_critic.value_loss(values, *others, **options)
    (gradient,) = torch.autograd.grad(output.loss, values)
    return output.loss.detach(), gradient, output.stats


def averaged(loss):
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def close(got, expected, what, tolerance=None):
    tolerance = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def reductions_and_shards(rank, ranks):
    """Every reduction, dtype, kind of mask and split: the ranks' losses and gradients, averaged, are one process's."""
    for dtype, kind in ((torch.float64, "bool"), (torch.float32, "integer"), (torch.float32, "weights"), (torch.float32, "none")):
        whole = batch(dtype, kind)
        for reduction, options in OPTIONS.items():
            expected_loss, expected_gradient, expected_stats = loss_and_gradient(*whole, **options)
            for split, rows in row_splits(ranks).items():
                what = f"rank {rank} of {ranks}, {reduction}, {split}, {dtype}, mask {kind}"
                mine = [None if x is None else x[rows[rank]] for x in whole]
                with Calls() as calls:
                    loss, gradient, stats = loss_and_gradient(*mine, **options, group=dist.group.WORLD)
                assert calls.collectives == ([] if reduction == "token-sum" else ["c10d::allreduce_"]), (what, calls.names)
                assert loss.dtype == expected_loss.dtype and gradient.dtype == whole[0].dtype, what
                close(averaged(loss), expected_loss, what)
                close(gradient / ranks, expected_gradient[rows[rank]], what)
                local = fused_critic.value_loss(*mine, **options).stats
                assert torch.equal(stats.moments, local.moments), what
                close(stats.all_reduce(dist.group.WORLD).moments, expected_stats.moments, what, 1e-6)


def against_the_reference(rank, ranks):
    """The expected numbers are the specification's too, not only the same operator's."""
    values, old_values, returns, mask = batch(torch.float64)
    rows = row_splits(ranks)["uneven"][rank]
    for reduction, options in OPTIONS.items():
        expected = reference.value_loss(values, old_values, returns, mask, **options)
        loss, gradient, _ = loss_and_gradient(*(x[rows] for x in (values, old_values, returns, mask)), **options, group=dist.group.WORLD)
        close(averaged(loss), torch.tensor(expected.loss, dtype=torch.float64), reduction)
        close(gradient / ranks, expected.grad[rows], reduction)


def layouts(rank, ranks):
    """[T, B], packed, jagged and [T], with and without a mask; the other options of the loss; the module."""
    for kind in ("bool", "weights", "none"):
        whole = batch(kind=kind)
        rows = row_splits(ranks)["uneven"][rank]
        mine = [None if x is None else x[rows] for x in whole]
        lengths = torch.tensor([(3 * r) % LENGTH for r in rows], dtype=torch.int64)  # the first row's is 0
        keep = torch.arange(LENGTH) < lengths[:, None]
        keep_whole = torch.arange(LENGTH) < torch.tensor([(3 * r) % LENGTH for r in range(ROWS)])[:, None]
        packed = [None if x is None else x[keep] for x in mine]
        packed_whole = [None if x is None else x[keep_whole] for x in whole]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        whole_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), keep_whole.sum(1).cumsum(0)])
        others = {"clip_range": (-0.1, 0.3), "criterion": "huber", "delta": 0.7, "loss_clamp": 0.4}
        for reduction, options in OPTIONS.items():
            what = f"rank {rank} of {ranks}, {reduction}, mask {kind}"
            options = options | others
            expected_loss, expected_gradient, _ = loss_and_gradient(*whole, **options)
            transposed = [None if x is None else x.t() for x in mine]
            loss, gradient, _ = loss_and_gradient(*transposed, **options, time_dim=0, group=dist.group.WORLD)
            close(averaged(loss), expected_loss, f"[T, B], {what}")
            close(gradient.t() / ranks, expected_gradient[rows], f"[T, B], {what}")

            values = mine[0].detach().requires_grad_()
            module = fused_critic.ClippedValueLoss(**options)
            module(values, *mine[1:], group=dist.group.WORLD).loss.backward()
            close(values.grad / ranks, expected_gradient[rows], f"module, {what}")

            expected_loss, expected_gradient, _ = loss_and_gradient(*packed_whole, **options, cu_seqlens=whole_offsets)
            expected_gradient = expected_gradient.split([int(keep_whole[r].sum()) for r in range(ROWS)])
            expected_gradient = torch.cat([expected_gradient[r] for r in rows]) if rows else expected_gradient[0][:0]
            loss, gradient, _ = loss_and_gradient(*packed, **options, cu_seqlens=offsets.int(), group=dist.group.WORLD)
            close(averaged(loss), expected_loss, f"packed, {what}")
            close(gradient / ranks, expected_gradient, f"packed, {what}")
            jagged = [None if x is None else torch.nested.nested_tensor_from_jagged(x, offsets) for x in packed]
            loss, gradient, _ = loss_and_gradient(*jagged, **options, group=dist.group.WORLD)
            close(averaged(loss), expected_loss, f"jagged, {what}")
            close(gradient.values() / ranks, expected_gradient, f"jagged, {what}")

            firsts = [None if x is None else x[:ranks].flatten() for x in whole]
            expected_loss, expected_gradient, _ = loss_and_gradient(*firsts, **options, cu_seqlens=torch.arange(ranks + 1) * LENGTH)
            loss, gradient, _ = loss_and_gradient(*(None if x is None else x[rank] for x in whole), **options, group=dist.group.WORLD)
            close(averaged(loss), expected_loss, f"[T], {what}")
            close(gradient / ranks, expected_gradient.view(ranks, LENGTH)[rank], f"[T], {what}")


def nothing_valid_anywhere(rank, ranks):
    values, old_values, returns, _ = batch()
    for mask in (torch.zeros(ROWS, LENGTH, dtype=torch.bool), torch.zeros(ROWS, LENGTH)):
        for reduction, options in OPTIONS.items():
            for part in (slice(0, ROWS if rank else 0), slice(0, 3)):
                mine = (x[part] for x in (values, old_values, returns, mask))
                loss, gradient, _ = loss_and_gradient(*mine, **options, group=dist.group.WORLD)
                assert loss == 0 and not gradient.any(), reduction
                scaled = values[part].clone().requires_grad_()
                output = fused_critic.value_loss(scaled, old_values[part], returns[part], mask[part], **options, group=dist.group.WORLD)
                (output.loss * 2.0**16).backward()  # a gradient scaler's factor
                assert not scaled.grad.any(), reduction


def micro_batches(rank, ranks):
    """Counts of all micro-batches of all ranks, before the first backward; a rank may have more of them than another, or none."""
    whole = batch(kind="weights")
    counts = global_counts(whole[3])
    close(counts.batch_num_tokens, whole[3].sum(dtype=torch.float64), "tokens")
    assert counts.global_batch_size == ROWS - 1
    for split, rows in row_splits(ranks).items():
        parts = list(torch.tensor(rows[rank], dtype=torch.int64).split(2)) if rows[rank] else []
        with Calls() as calls:
            pending = global_counts([whole[3][part] for part in parts], group=dist.group.WORLD, async_op=True)
        assert calls.collectives == ["c10d::allreduce_"]
        got = pending.wait()
        assert isinstance(got, BatchCounts) and got == pending.wait()
        for x, expected in zip(got, counts):
            assert x.shape == () and x.dtype == torch.float64
            close(x, expected, split)
        for reduction, options in OPTIONS.items():
            what = f"rank {rank} of {ranks}, {reduction}, {split}"
            expected_loss, expected_gradient, _ = loss_and_gradient(*whole, **options)
            loss = torch.zeros(())
            for part in parts:
                mine = (x[part] for x in whole)
                with Calls() as calls:
                    part_loss, gradient, _ = loss_and_gradient(*mine, **options, **got._asdict(), dp_size=ranks)
                assert not calls.collectives
                close(gradient / ranks, expected_gradient[part], what)
                loss += part_loss
            close(averaged(loss), expected_loss, what)


def counts_of_every_layout(rank, ranks):
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(rank)) < 0.3
    mask[rank % 6] = False
    expected = [torch.tensor([x.sum(), x.any(1).sum()], dtype=torch.float64) for x in (mask, mask[:2], mask[:0])]
    packed, offsets = mask.flatten(), torch.arange(7) * 9
    kinds = {
        "[B, T]": ([mask, mask[:2], mask[:0]], {}),
        "[T, B]": ([mask.t(), mask[:2].t(), mask[:0].t()], {"time_dim": 0}),
        "packed": ([packed, packed[:18], packed[:0]], {"cu_seqlens": [offsets, offsets[:3].int(), offsets[:1]]}),
        "jagged": ([torch.nested.nested_tensor_from_jagged(packed, offsets), mask[:2], mask[:0]], {}),
    }
    total = sum(expected)
    dist.all_reduce(total)
    for name, (masks, options) in kinds.items():
        assert torch.equal(torch.stack(global_counts(masks, group=dist.group.WORLD, **options)), total), name
        assert torch.equal(torch.stack(global_counts(masks, **options)), sum(expected)), name
    assert not torch.stack(global_counts([])).any() and global_counts([], device="meta").batch_num_tokens.device.type == "meta"
    one = global_counts(packed, cu_seqlens=offsets, group=dist.group.WORLD)
    close(one.batch_num_tokens, averaged(expected[0][0]) * ranks, "a single mask")
    with pytest.raises(ValueError, match="global_counts: cu_seqlens: expected one for each of the 1 masks, got 2"):
        global_counts([packed], cu_seqlens=[offsets, offsets])


def groups(rank, ranks):
    """A group of this rank alone needs no collective; a smaller group counts its own ranks; no group, no collective."""
    whole = batch()
    alone = [dist.new_group([r]) for r in range(ranks)][rank]
    halves = [dist.new_group(list(range(ranks // 2))), dist.new_group(list(range(ranks // 2, ranks)))]
    upper = rank >= ranks // 2
    members = ranks - ranks // 2 if upper else ranks // 2
    for reduction, options in OPTIONS.items():
        expected_loss, expected_gradient, _ = loss_and_gradient(*whole, **options)
        with Calls() as calls:
            loss, gradient, _ = loss_and_gradient(*whole, **options, group=alone)
            loss_and_gradient(*whole, **options)
            global_counts(whole[3])
            global_counts(whole[3], group=alone)
        assert not calls.collectives, reduction
        close(loss, expected_loss, reduction)
        close(gradient, expected_gradient, reduction)
        rows = list(range(ROWS))[rank % members :: members]
        loss, gradient, _ = loss_and_gradient(*(x[rows] for x in whole), **options, group=halves[upper])
        close(gradient / members, expected_gradient[rows], reduction)
        loss, gradient, _ = loss_and_gradient(*(x[rows] for x in whole), **options, group=halves[upper], dp_size=3)
        close(gradient / 3, expected_gradient[rows], f"{reduction}, dp_size 3")
    with pytest.raises(TypeError, match="value_loss: group: expected a torch.distributed process group that this rank is in"):
        fused_critic.value_loss(*whole, group=halves[not upper])
    with pytest.raises(TypeError, match="global_counts: group: expected a torch.distributed process group that this rank is in, got str"):
        global_counts(whole[3], group="world")


def refused(rank, ranks):
    """What is the same on every rank is refused before the collective."""
    whole = batch()
    for message, options in {
        "group: expected None beside reduction 'none'": {"reduction": "none"},
        "batch_num_tokens: expected None beside a group": {"batch_num_tokens": 4},
        "global_batch_size: expected None beside a group": {"global_batch_size": torch.tensor(4)},
        "loss_scale_factor: expected a number for seq-mean-token-sum-norm beside a group": {"reduction": "seq-mean-token-sum-norm"},
        "reduction: ": {"reduction": "mean"},
        r"time_dim: expected a dimension of values \(shape \[13, 11\]\), got 2": {"reduction": "seq-mean-token-sum", "time_dim": 2},
        r"time_dim: expected a dimension of values \(shape \[13, 11\]\), got -3": {"time_dim": -3},
    }.items():
        with Calls() as calls, pytest.raises(ValueError, match=f"value_loss: {message}"):
            fused_critic.value_loss(*whole, group=dist.group.WORLD, **options)
        assert not calls.collectives, message
    for message, mask, options in (
        (r"time_dim: expected one of the dimensions of \[B, T\], got 2", whole[3], {"time_dim": 2}),
        (r"masks: expected 1 or 2 dimensions, got shape \[1, 13, 11\]", whole[3][None], {}),
        (
            r"cu_seqlens: expected \[S \+ 1\] beside a packed mask \[N\], got \[2\] beside \[13, 11\]",
            whole[3],
            {"cu_seqlens": torch.tensor([0, 3])},
        ),
        (r"cu_seqlens: expected \[S \+ 1\].*got \[\] beside \[11\]", whole[3][0], {"cu_seqlens": torch.tensor(3)}),
    ):
        with Calls() as calls, pytest.raises(ValueError, match=f"global_counts: {message}"):
            global_counts(mask, group=dist.group.WORLD, **options)
        assert not calls.collectives, message


def an_error_of_one_rank(rank, ranks):
    """A rank whose tensors do not fit together has entered the collective, so that the others get their result."""
    values, old_values, returns, mask = batch()
    flat, bounds = values.flatten(), torch.tensor([0, 3, values.numel()])
    misfits = {
        "returns: expected shape": ((values, old_values, returns[:3], mask), {}),
        "mask: expected shape": ((values, old_values, returns, mask.flatten()), {}),
        r"mask: expected shape \[143\]": ((flat, flat, flat, mask), {"cu_seqlens": bounds}),
        "values: expected 1 or 2 dimensions": ((values[None], old_values, returns, mask), {"time_dim": 2}),
        "values: expected the packed shape": ((values, old_values, returns, mask), {"cu_seqlens": bounds}),
        "cu_seqlens: expected": ((flat, flat, flat), {"cu_seqlens": bounds[None]}),
    }
    for reduction, options in OPTIONS.items():
        for message, (tensors, others) in misfits.items():
            if rank == 0:
                with pytest.raises(ValueError, match=message):
                    fused_critic.value_loss(*tensors, **options, **others, group=dist.group.WORLD)
            else:
                fused_critic.value_loss(values, old_values, returns, mask, **options, group=dist.group.WORLD)


def started_before_the_operator_finished_after(rank, ranks, store):
    """The last rank starts its collective after the others ran their operator: they could not if they waited in between."""
    whole = batch()
    for reduction, options in OPTIONS.items():
        if reduction == "token-sum":
            continue

        def operator(*args, key=f"{reduction} {rank}", call=functional._value_loss, **kwargs):
            result = call(*args, **kwargs)
            store.set(key, "")
            return result

        if rank == ranks - 1:
            store.wait([f"{reduction} {r}" for r in range(ranks - 1)])
        with mock.patch.object(functional, "_value_loss", operator), Calls() as calls:
            fused_critic.value_loss(*whole, **options, group=dist.group.WORLD)
        assert calls.names == ["c10d::allreduce_", "fused_critic::value_loss"], (reduction, calls.names)
    if rank == ranks - 1:
        store.wait([f"counts {r}" for r in range(ranks - 1)])
    pending = global_counts(whole[3], group=dist.group.WORLD, async_op=True)
    store.set(f"counts {rank}", "")
    pending.wait()


def compiled(rank, ranks):
    """One graph, with the collective before the operator and the wait after it; the same numbers, in any shape."""
    traced = []

    def backend(graph, inputs):
        traced.append([str(node.target) for node in graph.graph.nodes if "c10d" in str(node.target) or "fused_critic" in str(node.target)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for reduction, options in OPTIONS.items():
        torch._dynamo.reset()
        traced.clear()

        def loss(values, old_values, returns, mask, options=options):
            return fused_critic.value_loss(values, old_values, returns, mask, **options, group=dist.group.WORLD)

        function = torch.compile(loss, backend=backend, fullgraph=True)
        splits = list(row_splits(ranks).values())[: 2 if reduction == "token-mean" else 1]  # another shape is another trace
        for rows in splits:
            mine = [x[rows[rank]] for x in batch()]
            values = mine[0].clone().requires_grad_()
            output = function(values, *mine[1:])
            output.loss.backward()
            expected_loss, expected_gradient, expected_stats = loss_and_gradient(*mine, **options, group=dist.group.WORLD)
            close(output.loss.detach(), expected_loss, reduction)
            close(values.grad, expected_gradient, reduction)
            assert torch.equal(output.stats.moments, expected_stats.moments)
        operators = ["_c10d_functional.all_reduce", "fused_critic.value_loss.tensor", "_c10d_functional.wait_tensor"]
        expected = operators if reduction != "token-sum" else operators[1:2]
        assert all([name.replace(".default", "") for name in names] == expected for names in traced) and traced, traced
    torch._dynamo.reset()
    counted = torch.compile(lambda mask: global_counts([mask, mask[:2]], group=dist.group.WORLD), backend="aot_eager", fullgraph=True)
    mask = batch()[3]
    assert counted(mask) == global_counts([mask, mask[:2]], group=dist.group.WORLD)


CHECKS = (
    reductions_and_shards,
    against_the_reference,
    layouts,
    nothing_valid_anywhere,
    micro_batches,
    counts_of_every_layout,
    groups,
    refused,
    an_error_of_one_rank,
    started_before_the_operator_finished_after,
    compiled,
)


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    store = dist.FileStore(f"{folder}/store", ranks)
    for check in CHECKS:
        if check is compiled and ranks > 2:  # the graph is the same, and tracing it takes a process seconds
            continue
        check(rank, ranks, *((store,) if check is started_before_the_operator_finished_after else ()))
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_ranks_are_one_process(ranks, tmp_path):
    mp.spawn(worker, (ranks, str(tmp_path)), nprocs=ranks)
