"""How fast the operators are beside a copy of as many bytes and beside plain torch. Tells, and judges nothing but that all agree."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

import fused_critic

from . import cases, plain
from .runner import BANDWIDTH, Context, NotApplicable, check
from .torch_features import compiler_obstacle

CLIP, GAMMA, LAM = 0.2, 0.99, 0.95

# Bytes per token, float32 with a one-byte mask.
LOSS_FORWARD_BYTES = 4 + 4 + 4 + 1  # value, old value, return, mask
LOSS_BACKWARD_BYTES = LOSS_FORWARD_BYTES + 4  # and the gradient
GAE_BYTES = 4 + 4 + 4 + 4  # reward, value; advantage, return
MASK_BYTES = 1

# B x T, small to large.
SIZES = {
    "cpu": [(64, 1024), (1024, 1024)],
    "cuda": [(64, 1024), (256, 4096), (1024, 16384)],
}
TIME_MAJOR_SIZES = {  # many short sequences, as of parallel environments
    "cpu": [(1024, 64), (4096, 256)],
    "cuda": [(1024, 64), (16384, 64), (65536, 256)],
}
ROUNDS = 9
LEAST_ROUNDS = 3  # of a contender so slow that its runs have used up SECONDS_PER_CONTENDER
SECONDS_PER_CONTENDER = 0.3
LONGEST_LOOP = 20_000  # steps of a plain loop over time
MOST_COMPILATIONS = 64  # of one function: each size, with strides that differ in a loop's first step, and torch stops at 8 otherwise
LEAST_FLUSH = 64 * 2**20  # bytes
MOST_FLUSH = 512 * 2**20
PAUSE_CYCLES = 1_000_000  # of the GPU, about 0.5 ms: the host queues what is timed meanwhile

CONTENDERS = {
    "fused_critic": "fused_critic",
    "copy": "torch copy of as many bytes",
    "eager": "plain torch",
    "compiled": "torch.compile of it",
}


@dataclass
class Workload:
    bytes_moved: int
    ours: Callable[[], Any]
    eager: Callable[[], Any] | str  # the reason, where it is left out
    compiled: Callable[[], Any] | str


class Batch:
    """[B, T], or [T, B] where `time_dim` is 0; float32, a padding mask."""

    def __init__(self, shape, time_dim, device):
        generator = torch.Generator().manual_seed(0)
        arrange = (lambda x: x) if time_dim in (1, -1) else (lambda x: x.t().contiguous())
        self.values, noise, self.returns, self.rewards = (arrange(torch.randn(shape, generator=generator)).to(device) for _ in range(4))
        self.old_values = self.values + 0.3 * noise
        lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
        self.mask = arrange(torch.arange(shape[1]) < lengths).to(device)


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    return compiler_obstacle(device)


@functools.cache
def _compiled(function, device_type: str):
    """On the CPU once for all sizes, since a compilation takes seconds there; elsewhere for each size, for its speed."""
    return torch.compile(function, fullgraph=True, dynamic=device_type == "cpu")


def loss_workload(shape, backward: bool, device) -> Workload:
    batch = Batch(shape, -1, device)
    values = batch.values.requires_grad_(backward)
    tokens = values.numel()

    def runner(function, arguments):
        def run():
            loss = function(values, batch.old_values, batch.returns, batch.mask, **arguments)[0]
            return (loss.detach(), torch.autograd.grad(loss, values)[0]) if backward else (loss,)

        return run

    return Workload(
        tokens * (LOSS_FORWARD_BYTES + (LOSS_BACKWARD_BYTES if backward else 0)),
        runner(fused_critic.value_loss, {"clip_range": CLIP}),
        runner(plain.value_loss, {"clip_range": CLIP}),
        _obstacle(device) or runner(_compiled(plain.value_loss, device.type), {"clip_range": CLIP}),
    )


def gae_workload(shape, masked: bool, time_dim: int, device) -> Workload:
    batch = Batch(shape, time_dim, device)
    rewards, values, mask = batch.rewards, batch.values, batch.mask if masked else None
    weights = None if mask is None else mask.float()

    def looped(step):
        def run():
            outputs = plain.gae(rewards, values, weights, GAMMA, LAM, time_dim, step)
            return tuple(torch.where(mask, x, 0.0) for x in outputs) if masked else outputs

        return run

    step = plain.masked_gae_step if masked else plain.gae_step
    too_long = f"a loop of {shape[1]:,} steps" if shape[1] > LONGEST_LOOP else None
    return Workload(
        rewards.numel() * (GAE_BYTES + MASK_BYTES * masked),
        lambda: fused_critic.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, time_dim=time_dim),
        too_long or looped(step),
        too_long or _obstacle(device) or looped(_compiled(step, device.type)),
    )


def _last_level_cache(device: torch.device) -> int:
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.removesuffix("K")) * 2**10 for size in sizes)
    except (OSError, ValueError):
        return 0


def flush_bytes(device: torch.device) -> int:
    """What is written before each timed run, so that nothing of it starts in the last-level cache: twice its size, within limits."""
    return min(max(2 * _last_level_cache(device), LEAST_FLUSH), MOST_FLUSH)


class Stopwatch:
    """Seconds of one run with a cold cache: CUDA events, or perf_counter."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.buffer = torch.zeros(flush_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        self.buffer.add_(1)
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def measure(make: Callable[[], Workload], operator: str, shape, context: Context) -> dict[str, Any]:
    context.needs_real_device()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS))
            if context.device.type == "cuda":
                stack.enter_context(torch.cuda.device(context.device))
            return {"operator": operator, "shape": list(shape), **_measure(make(), context.device)}
    except torch.OutOfMemoryError:
        raise NotApplicable("not enough memory") from None


def _measure(workload: Workload, device: torch.device) -> dict[str, Any]:
    source = torch.ones(workload.bytes_moved // (2 * torch.float32.itemsize), device=device)
    target = torch.empty_like(source)
    offered: dict[str, Callable[[], Any] | str] = {
        "fused_critic": workload.ours, "copy": lambda: target.copy_(source), "eager": workload.eager, "compiled": workload.compiled
    }  # fmt: skip
    left_out = {name: reason for name, reason in offered.items() if isinstance(reason, str)}
    running = {name: run for name, run in offered.items() if not isinstance(run, str)}

    ours = running["fused_critic"]()
    for name in ("eager", "compiled"):  # a first run compiles
        for got, expected in zip(running[name]() if name in running else (), ours):
            cases.assert_close(got, expected, cases.FLOAT32_TOLERANCE, CONTENDERS[name])
    del ours

    stopwatch = Stopwatch(device)
    seen: dict[str, list[float]] = {name: [] for name in running}
    for number in range(ROUNDS + 1):
        for name, run in running.items():
            if number <= LEAST_ROUNDS or sum(seen[name]) < SECONDS_PER_CONTENDER:
                seconds = stopwatch(run)
                if number > 0:  # the first round warms up
                    seen[name].append(seconds)
    medians = {name: statistics.median(times) for name, times in seen.items()}
    return {
        "bytes": workload.bytes_moved,
        "flush_bytes": stopwatch.buffer.numel(),
        "seconds": medians,
        "least_seconds": {name: min(times) for name, times in seen.items()},
        "runs": {name: len(times) for name, times in seen.items()},
        "gigabytes_per_second": workload.bytes_moved / medians["fused_critic"] / 1e9,
        "copy_gigabytes_per_second": workload.bytes_moved / medians["copy"] / 1e9,
        "percent_of_copy": 100 * medians["copy"] / medians["fused_critic"],
        "left_out": left_out,
    }


@check(BANDWIDTH, "bandwidth", "time and bytes per second beside a copy, plain torch and torch.compile")
def _(context: Context):
    device, sizes = context.device, SIZES[context.device.type]
    rows = []
    for operator, backward in (("loss forward", False), ("loss with backward", True)):
        rows += [(operator, shape, functools.partial(loss_workload, shape, backward, device)) for shape in sizes]
    for operator, shapes, masked, time_dim in (
        ("GAE", sizes, False, -1),
        ("GAE, masked", sizes, True, -1),
        ("GAE, [T, B]", TIME_MAJOR_SIZES[device.type], False, 0),
        ("GAE, one row", [(1, batch * length) for batch, length in sizes], False, -1),
    ):
        rows += [(operator, shape, functools.partial(gae_workload, shape, masked, time_dim, device)) for shape in shapes]
    for operator, shape, make in rows:
        yield f"{operator}, B x T = {shape[0]} x {shape[1]}", functools.partial(measure, make, operator, shape, context)


def explain(device: torch.device) -> str:
    clock = "CUDA events, the host's part hidden behind a pause" if device.type == "cuda" else "perf_counter"
    return (
        f"float32; medians of up to {ROUNDS} interleaved runs, {clock}; cold cache: {flush_bytes(device) / 2**20:.0f} MiB are written before each "
        "run. GB/s of the bytes that have to be moved, and that as a share of a torch copy of as many bytes; the other columns: how many times as "
        f"long plain torch and torch.compile of it take."
    )


def disturbed(measured: dict[str, Any]) -> bool:
    """Whether something else kept the machine busy: a median far above the least time."""
    return any(measured["seconds"][name] > 2 * measured["least_seconds"][name] for name in ("fused_critic", "copy"))


HEADER = f"{'':18} {'B x T':>12} {'MB':>6} {'time':>8} {'GB/s':>6} {'of copy':>7} {'eager':>7} {'compiled':>8}"


def row(measured: dict[str, Any]) -> str:
    """A line of the table under HEADER."""
    seconds = measured["seconds"]

    def times(name):
        return f"{seconds[name] / seconds['fused_critic']:.1f}x" if name in seconds else "-"

    shape = " x ".join(map(str, measured["shape"]))
    return (
        f"{measured['operator']:18} {shape:>12} {measured['bytes'] / 1e6:6.1f} {_duration(seconds['fused_critic']):>8} "
        f"{measured['gigabytes_per_second']:6.1f} {measured['percent_of_copy']:6.0f}% {times('eager'):>7} {times('compiled'):>8}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
