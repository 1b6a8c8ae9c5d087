"""ValueLossStats.all_reduce with real processes (gloo on the loopback interface)."""

import math

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, 20, generator=generator) for _ in range(3)]


def worker(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    rows = slice(0, 2) if rank == 0 else slice(2, 7)  # uneven shards
    stats = fused_critic.value_loss(*(x[rows] for x in data())).stats.all_reduce()
    results[rank] = stats.moments.tolist()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_all_ranks_get_the_whole(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (str(tmp_path / "rendezvous"), results), nprocs=RANKS)
        first, second = results[0], results[1]
    assert first == second
    merged = fused_critic.ValueLossStats(torch.tensor(first, dtype=torch.float64)).to_dict()
    for name, value in fused_critic.value_loss(*data()).stats.to_dict().items():
        assert math.isclose(merged[name], value, rel_tol=1e-6, abs_tol=1e-7), name
