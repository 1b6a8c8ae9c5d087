"""Everything that differs between devices: clocks, cache flushes, names.

torch.utils.benchmark.Timer knows neither device events nor a flush between two runs, hence a clock of our own.
"""

from __future__ import annotations

import platform
import resource
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import torch

Run = Callable[[], Any]

LEAST_FLUSH = 64 * 2**20  # bytes
MOST_FLUSH = 512 * 2**20
PAUSE_CYCLES = 1_000_000  # of a GPU, about 0.5 ms: the host queues meanwhile what is timed
TOLERATED_PREEMPTIONS = 10  # per second: what a long run loses on any machine, and little by it; in a short one a single one counts
SETTLE_RUNS = 2  # before a timed block: threads awake, caches and allocator warm


class Sample(NamedTuple):
    seconds: float  # per run
    disturbed: bool  # another process took a core from it


class Device:
    def __init__(self, name: str, flush_bytes: Optional[int] = None):
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        if self.is_cuda:
            torch.cuda.set_device(self.torch.index or 0)
        self._flush_buffer = torch.zeros(flush_bytes or self._enough_to_flush(), dtype=torch.uint8, device=self.torch)

    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else cpu_name()

    def clock(self) -> str:
        return "CUDA events, the host's part hidden behind a pause" if self.is_cuda else "perf_counter"

    @property
    def flush_bytes(self) -> int:
        """What is written before each run with a cold cache."""
        return self._flush_buffer.numel()

    def _enough_to_flush(self) -> int:
        """Twice the last-level cache, within limits."""
        return min(max(2 * self._last_level_cache(), LEAST_FLUSH), MOST_FLUSH)

    def warm(self, run: Run, repeats: int) -> Sample:
        """A block of runs, each of which finds in the cache what the one before left there."""
        if repeats > 1:  # a run that fills a block on its own is too long to profit
            self._settle(run)
        return self._on_device(run, repeats) if self.is_cuda else self._on_host(run, repeats)

    def cold(self, run: Run) -> Sample:
        """One run that finds none of its data in the last-level cache. The flush is not timed."""
        self._flush_buffer.add_(1)
        return self._on_device(run, 1) if self.is_cuda else self._on_host(run, 1)

    def host(self, run: Run, repeats: int) -> Sample:
        """The time that the host is busy, whatever the device does: what a call costs."""
        if self.is_cuda:
            torch.cuda.synchronize()
        self._settle(run)
        return self._on_host(run, repeats)

    @staticmethod
    def _settle(run: Run) -> None:
        for _ in range(SETTLE_RUNS):
            run()

    @staticmethod
    def _on_host(run: Run, repeats: int) -> Sample:
        preemptions, start = _preemptions(), time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = time.perf_counter() - start
        return Sample(seconds / repeats, _preemptions() - preemptions > seconds * TOLERATED_PREEMPTIONS)

    @staticmethod
    def _on_device(run: Run, repeats: int) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3 / repeats, disturbed=False)

    def _last_level_cache(self) -> int:
        if self.is_cuda:
            return getattr(torch.cuda.get_device_properties(self.torch), "L2_cache_size", 0)
        try:
            sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
            return max(int(size.removesuffix("K")) * 2**10 for size in sizes)
        except (OSError, ValueError):
            return 0


def _preemptions() -> int:
    """How often the scheduler has taken a core from a thread of this process that still had work."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
