"""``python -m fused_critic check``: every operator on this machine, one verdict, and a report for a bug report."""
