"""ValueLossStats.all_reduce with real processes (gloo on the loopback interface)."""

import math

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 3
# Rows of each rank: uneven, a rank without any, a rank with nothing but masked tokens (row 6 is masked).
SHARDS = [(slice(0, 2), slice(2, 5), slice(5, 7)), (slice(0, 7), slice(7, 7), slice(7, 7)), (slice(0, 3), slice(3, 6), slice(6, 7))]
TOLERANCE = 1e-6  # relative and absolute


def data():
    """values, old values, returns, mask, of mean 1e4 and standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = (1e4 + torch.randn(7, 20, generator=generator) for _ in range(3))
    mask = torch.rand(7, 20, generator=generator) < 0.8
    mask[6] = False
    return values, old_values, returns, mask


def worker(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    reduce = torch.compile(lambda stats: stats.all_reduce(), backend="aot_eager", fullgraph=True)
    for i, shards in enumerate(SHARDS):
        stats = fused_critic.value_loss(*(x[shards[rank]] for x in data())).stats
        merged = stats.all_reduce()
        assert torch.equal(reduce(stats).moments, merged.moments)
        results[rank, i] = merged.moments.tolist()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_all_ranks_get_the_whole(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (str(tmp_path / "rendezvous"), results), nprocs=RANKS)
        results = dict(results)
    expected = fused_critic.value_loss(*data()).stats.to_dict()
    for i in range(len(SHARDS)):
        first = results[0, i]
        assert all(results[rank, i] == first for rank in range(RANKS))
        merged = fused_critic.ValueLossStats(torch.tensor(first, dtype=torch.float64)).to_dict()
        for name, value in expected.items():
            assert math.isclose(merged[name], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (name, SHARDS[i])
