"""The critic side of PPO on many ranks (``torch.distributed``)."""

from ._data_parallel import BatchCounts, PendingCounts, global_counts

__all__ = ["BatchCounts", "PendingCounts", "global_counts"]
