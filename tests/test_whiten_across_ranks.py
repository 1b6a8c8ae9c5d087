"""masked_whiten over a process group, with real processes (gloo on the loopback interface), against the reference on all ranks' data together."""

import random

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_critic import _collectives, reference, whiten
from fused_critic.check import cases
from fused_critic.check.gae import WHITEN_OPTIONS
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 3
DRAWS = 30


class CountCollectives(TorchDispatchMode):
    """How many operators of torch.distributed are called."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def check_against_reference(parts, masks, rank, tolerance, **options):
    """This rank's part of the whitened whole; returns the number of collectives."""
    flat = torch.cat([x.double().flatten() for x in parts])
    mask = None if masks is None else torch.cat([x.flatten() != 0 for x in masks])
    expected = reference.masked_whiten(flat, mask, **options).split([x.numel() for x in parts])[rank].view(parts[rank].shape)
    with CountCollectives() as collectives:
        got = fused_critic.masked_whiten(parts[rank], None if masks is None else masks[rank], group=dist.group.WORLD, **options)
    assert got.dtype == parts[rank].dtype
    cases.assert_close(got, expected, cases.stored(tolerance, got.dtype), f"rank {rank} of {[tuple(x.shape) for x in parts]}, {options}")
    return collectives.count


def drawn(seed):
    """Uneven parts with their masks, some without a valid or without any element, of some mean and spread."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice([torch.float64, torch.float32])
    mean, spread = choose.choice([(0, 1), (1e4, 1), (-3, 100)])
    densities = [choose.choice([0, 0, 0.5, 1]) for _ in range(RANKS)]
    shapes = [(choose.choice([0, 1, 3, 8]), choose.choice([1, 5, 40])) for _ in range(RANKS)]
    # The ranks' means lie apart, so that the spread between them counts.
    parts = [(mean + spread * (rank + torch.randn(shape, generator=generator).double())).to(dtype) for rank, shape in enumerate(shapes)]
    masks = [torch.rand(shape, generator=generator) < density for shape, density in zip(shapes, densities)]
    for x, mask in zip(parts, masks):
        x.masked_fill_(~mask, float("nan"))
    return parts, masks, choose.choice(WHITEN_OPTIONS)


def compare_drawn(rank):
    for seed in range(DRAWS):
        parts, masks, options = drawn(seed)
        wide = parts[0].dtype == torch.float64
        clean = [torch.where(mask, x, 0) for x, mask in zip(parts, masks)]
        assert check_against_reference(clean, masks, rank, 1e-9 if wide else cases.WHITEN_TOLERANCE, **options) == 1
        hidden = fused_critic.masked_whiten(parts[rank], masks[rank], group=dist.group.WORLD, **options)
        cases.assert_same_bits(hidden, fused_critic.masked_whiten(clean[rank], masks[rank], group=dist.group.WORLD, **options))


def compare_layouts(rank):
    """Ranks whose tensors differ in shape and dtype, without a mask, and jagged ones."""
    generator = torch.Generator().manual_seed(5)
    shapes, dtypes = [(4, 9), (17,), (2, 3, 5)], [torch.float32, torch.float64, torch.bfloat16]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes)]
    assert check_against_reference(parts, None, rank, cases.WHITEN_TOLERANCE) == 1
    packed = parts[0].flatten()[rank:]
    jagged = torch.nested.nested_tensor_from_jagged(packed, torch.tensor([0, 2, len(packed)]))
    expected = fused_critic.masked_whiten(packed, group=dist.group.WORLD)
    cases.assert_same_bits(fused_critic.masked_whiten(jagged, group=dist.group.WORLD).values(), expected)


def compare_one_valid_everywhere(rank):
    """One valid position among all ranks: zeros. Two, on different ranks: whitened."""
    x = torch.full((4,), 3.0 + rank)
    mask = torch.zeros(4, dtype=torch.bool)
    mask[0] = rank == 1
    assert not fused_critic.masked_whiten(x, mask, group=dist.group.WORLD).any()
    mask[0] = rank != 1
    got = fused_critic.masked_whiten(x, mask, group=dist.group.WORLD)
    expected = {0: -(0.5**0.5), 1: 0, 2: 0.5**0.5}[rank]
    cases.assert_close(got, torch.tensor([expected, 0, 0, 0]), cases.WHITEN_TOLERANCE)


def same_bits_on_every_rank(rank):
    generator = torch.Generator().manual_seed(rank)
    moments = torch.rand(3, dtype=torch.float64, generator=generator)
    merged = torch.stack(whiten._merge(_collectives.gathered(moments, dist.group.WORLD)))
    everywhere = [torch.empty_like(merged) for _ in range(RANKS)]
    dist.all_gather(everywhere, merged)
    for other in everywhere:
        cases.assert_same_bits(other, merged)


def use_subgroup(rank):
    pair = dist.new_group([0, 2])
    x = torch.arange(5.0) * (rank + 1)
    if rank == 1:
        with pytest.raises(TypeError, match="masked_whiten: group: expected a torch.distributed process group that this rank is in"):
            fused_critic.masked_whiten(x, group=pair)
        return
    expected = reference.masked_whiten(torch.cat([torch.arange(5.0), torch.arange(5.0) * 3])).view(2, 5)[rank // 2]
    cases.assert_close(fused_critic.masked_whiten(x, group=pair), expected, cases.WHITEN_TOLERANCE)


def compile_whole(rank):
    x = torch.randn(3, 5 + rank, generator=torch.Generator().manual_seed(rank))
    mask = x > -1
    compiled = torch.compile(
        lambda x, mask: fused_critic.masked_whiten(x, mask, group=dist.group.WORLD), backend="aot_eager", fullgraph=True
    )
    cases.assert_close(compiled(x, mask), fused_critic.masked_whiten(x, mask, group=dist.group.WORLD), 1e-6)


def refuse_gradient(rank):
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(ValueError, match=r"masked_whiten: x: expected a tensor without gradient beside a group.*detach\(\) it"):
        fused_critic.masked_whiten(x, group=dist.group.WORLD)
    with torch.no_grad():
        fused_critic.masked_whiten(x, group=dist.group.WORLD)
    with CountCollectives() as collectives:
        fused_critic.masked_whiten(x).sum().backward()
    assert collectives.count == 0


def worker(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    checks = (
        compare_drawn,
        compare_layouts,
        compare_one_valid_everywhere,
        same_bits_on_every_rank,
        use_subgroup,
        compile_whole,
        refuse_gradient,
    )
    for check in checks:
        check(rank)
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_moments_are_those_of_all_ranks(tmp_path):
    mp.spawn(worker, (str(tmp_path / "rendezvous"),), nprocs=RANKS)
