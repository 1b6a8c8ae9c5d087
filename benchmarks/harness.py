"""Cases and their measurement: agreement first, then interleaved rounds."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from .contenders import COPY, LeftOut
from .device import Device, Run


@dataclass
class Participant:
    """A contender on a case's inputs."""

    name: str
    prepare: Callable[[], Run]  # raises LeftOut where it cannot take part
    outputs: Optional[Callable[[Any], list[Tensor]]] = None  # of a run: what has to agree; None: a yardstick, nothing to compare
    expected: Optional[Callable[[], list[Tensor]]] = None  # what with
    bytes_moved: Optional[int] = None
    every_thread_count: bool = False  # else with the most threads only
    rtol: float = 1e-4
    atol: float = 1e-4  # of GAE; a gradient, of the order of 1 / tokens, is compared relative to its largest element
    relative_to_largest: bool = False
    starts_slowly: bool = False


@dataclass
class Case:
    name: str
    title: str
    tokens: int
    participants: list[Participant]
    series: Optional[str] = None  # of a plot over sizes
    is_call: bool = False  # so few tokens that only the call costs: the host's time, one thread, warm


@dataclass
class Settings:
    threads: list[int]
    rounds: int
    block_seconds: float  # of a warm block
    seconds_per_contender: float  # a contender so slow that it used them up is left with LEAST_ROUNDS
    patience_seconds: float  # more, where runs that kept their cores are still wanting
    compilers: bool  # whether contenders that have to be compiled take part


LEAST_ROUNDS = 3
SIZING_RUNS = 3
LEAST_UNDISTURBED = 5  # runs without a preemption that are enough to leave those with one out


@dataclass
class Row:
    contender: str
    threads: int
    cache: str  # "warm" or "cold"
    median: float  # seconds
    best: float  # least: what the machine does when nobody else uses it
    spread: float  # interquartile range / median
    runs: int  # that the figures are of
    disturbed: int  # left out: another process took a core from them
    busy: bool  # nearly all runs were disturbed, so the figures are of disturbed ones and tell little
    bytes_moved: Optional[int]


@dataclass
class Result:
    name: str
    title: str
    tokens: int
    series: Optional[str]
    is_call: bool
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    tolerance: str = ""

    def find(self, contender: str, threads: int, cache: str) -> Optional[Row]:
        matching = (row for row in self.rows if (row.contender, row.threads, row.cache) == (contender, threads, cache))
        return next(matching, None)


class Disagreement(AssertionError):
    """A contender's results are not those of the float64 formulas."""


def copy_participant(bytes_moved: int, device: Device) -> Participant:
    """A copy that reads half of the bytes and writes the other half."""

    def prepare():
        source = torch.ones(bytes_moved // (2 * torch.float32.itemsize), device=device.torch)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Participant(COPY, prepare, bytes_moved=bytes_moved, every_thread_count=True)


def measure(case: Case, settings: Settings, device: Device) -> Result:
    """Raises Disagreement, before anything is timed."""
    result = Result(case.name, case.title, case.tokens, case.series, case.is_call)
    threads_before, most_threads = torch.get_num_threads(), max(settings.threads)
    torch.set_num_threads(most_threads)  # torch.compile generates code for this many
    try:
        running = _start(case, settings, result)
        timings = [("warm", 1)] if case.is_call else [(cache, n) for n in settings.threads for cache in ("warm", "cold")]
        jobs = [
            _Job(participant, run, cache, threads)
            for cache, threads in timings
            for participant, run in running
            if case.is_call or threads == most_threads or participant.every_thread_count
        ]
        for _ in range(settings.rounds):
            for job in jobs:
                if len(job.times) < LEAST_ROUNDS or job.spent <= settings.seconds_per_contender:
                    job.advance(case, settings, device)
        while wanting := [job for job in jobs if job.is_wanting(settings)]:
            for job in wanting:
                job.advance(case, settings, device)
    finally:
        torch.set_num_threads(threads_before)
    result.rows = [job.row() for job in jobs]
    return result


def _start(case: Case, settings: Settings, result: Result) -> list[tuple[Participant, Run]]:
    running, expectations = [], functools.cache(lambda expected: expected())
    for participant in case.participants:
        try:
            if participant.starts_slowly and not settings.compilers:
                raise LeftOut("compilers are left out of this run")
            run = participant.prepare()
            got = run()
        except LeftOut as reason:
            result.left_out[participant.name] = str(reason)
            continue
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no compiler on this machine
            result.left_out[participant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if participant.outputs is not None:
            _compare(case, participant, participant.outputs(got), expectations(participant.expected))
            result.tolerance = f"rtol {participant.rtol:g}, atol {participant.atol:g}" + " of the largest" * participant.relative_to_largest
        running.append((participant, run))
    return running


def _compare(case: Case, participant: Participant, got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        atol = participant.atol * (y.abs().max().item() if participant.relative_to_largest else 1.0)
        try:
            torch.testing.assert_close(x.detach().double(), y, rtol=participant.rtol, atol=atol)
        except AssertionError as difference:
            raise Disagreement(f"{case.name}: {participant.name} disagrees with the float64 formulas: {difference}") from None


class _Job:
    """One contender, timed one way."""

    def __init__(self, participant: Participant, run: Run, cache: str, threads: int):
        self.participant, self.run, self.cache, self.threads = participant, run, cache, threads
        self.times: list[float] = []
        self.undisturbed: list[float] = []
        self.spent, self.repeats = 0.0, 1

    def advance(self, case: Case, settings: Settings, device: Device) -> None:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        timed = device.host if case.is_call else device.warm
        if self.cache == "warm" and not self.times:  # how many runs fill a block; the first run ever tells nothing of that
            self.repeats = max(1, int(settings.block_seconds / max(min(timed(self.run, 1).seconds for _ in range(SIZING_RUNS)), 1e-7)))
        seconds, disturbed = device.cold(self.run) if self.cache == "cold" else timed(self.run, self.repeats)
        self.spent += seconds * self.repeats
        self.times.append(seconds)
        if not disturbed:
            self.undisturbed.append(seconds)

    def is_wanting(self, settings: Settings) -> bool:
        """Whether more runs may still find a machine that is not busy. With a cold cache only ours and the copy get them."""
        too_few = len(self.undisturbed) < min(LEAST_UNDISTURBED, len(self.times))
        patience = settings.patience_seconds if self.participant.every_thread_count or self.cache == "warm" else 0.0
        return too_few and self.spent < settings.seconds_per_contender + patience

    def row(self) -> Row:
        times = self.undisturbed if len(self.undisturbed) >= LEAST_UNDISTURBED else self.times
        median, spread = statistics.median(times), 0.0
        if len(times) > 1:
            first, _, third = statistics.quantiles(times, n=4)
            spread = (third - first) / median
        return Row(
            contender=self.participant.name,
            threads=self.threads,
            cache=self.cache,
            median=median,
            best=min(times),
            spread=spread,
            runs=len(times),
            disturbed=len(self.times) - len(times),
            busy=len(self.undisturbed) < min(LEAST_UNDISTURBED, len(self.times)),
            bytes_moved=self.participant.bytes_moved,
        )
