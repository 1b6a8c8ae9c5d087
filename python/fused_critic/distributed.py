"""The critic side of PPO on the ranks of a ``torch.distributed`` process group: sequences sharded along time, counts of the whole batch."""

from ._context_parallel import context_parallel_gae
from ._data_parallel import BatchCounts, PendingCounts, global_counts

__all__ = ["BatchCounts", "PendingCounts", "context_parallel_gae", "global_counts"]
