"""Calls on the CPU do not fault the pages of their outputs in again and again (host.h: keep_pages)."""

import platform
import subprocess
import sys
from pathlib import Path

import fused_critic
import pytest

PROGRAM = """
import resource, statistics, torch, fused_critic
torch.set_num_threads(1)
x = torch.ones(64, {length})
call = {call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): call()
counts = [faults()]
for _ in range(11):
    call()
    counts.append(faults())
print(statistics.median(after - before for before, after in zip(counts, counts[1:])))
"""
CALLS = {
    "gae": "lambda: torch.ops.fused_critic.gae(x, x, gamma=0.9, lam=0.9)",
    "vtrace": "lambda: torch.ops.fused_critic.vtrace(x, x, x, gamma=0.9)",
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
@pytest.mark.parametrize("length", [1024, 8192])
@pytest.mark.parametrize("operator", CALLS)
def test_repeated_calls_keep_their_pages(operator, length):
    """In a process of its own, since what other code allocated before changes malloc's thresholds."""
    program = PROGRAM.format(length=length, call=CALLS[operator])
    package = str(Path(fused_critic.__file__).parents[1])
    environment = {"PYTHONPATH": package, "PATH": ""}  # no MALLOC_* of the caller's
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    one_output = 64 * length * 4 / 4096  # pages
    assert float(done.stdout) < 0.1 * one_output  # of the median call: one alone may find malloc's heap grown
