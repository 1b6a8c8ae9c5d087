"""Cases, contenders, and their measurement."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
from torch.utils.benchmark import Timer

from .peers import Verl


@dataclass
class Contender:
    name: str
    run: Callable[[], Any]
    outputs: Optional[Callable[[Any], Any]] = None  # from run()'s result to what has to agree; None: a yardstick, nothing to compare
    goal: Optional[float] = None  # ours is to be at least this many times as fast
    may_fail: bool = False  # where the machine lacks something (a compiler, say): reported, not an error


@dataclass
class Case:
    title: str
    threads: int
    contenders: list[Contender]  # the first is ours
    bytes_moved: Optional[int] = None  # what the operator has to read and write; the yardstick is then a copy of as many bytes
    rtol: float = 1e-4
    atol: float = 1e-5


@dataclass
class Settings:
    verl: Verl
    min_run_time: float  # seconds per contender and round
    rounds: int
    large_shape: tuple[int, int]


@dataclass
class Row:
    name: str
    seconds: Optional[float] = None  # median
    best: Optional[float] = None  # least: what the machine does when nobody else uses it
    spread: Optional[float] = None  # interquartile range / median
    ratio: Optional[float] = None  # its median / ours
    best_ratio: Optional[float] = None  # its best / ours
    goal: Optional[float] = None
    gigabytes_per_second: Optional[float] = None
    failure: Optional[str] = None


@dataclass
class Result:
    name: str
    title: str
    threads: int
    bytes_moved: Optional[int]
    rows: list[Row] = field(default_factory=list)


CASES: dict[str, Callable[[Settings], Case]] = {}


def case(function: Callable[[Settings], Case]) -> Callable[[Settings], Case]:
    CASES[function.__name__] = function
    return function


def copy_of(bytes_moved: int) -> Contender:
    """A copy that reads half of the bytes and writes the other half."""
    source = torch.ones(bytes_moved // (2 * torch.float32.itemsize))
    target = torch.empty_like(source)
    return Contender("torch copy of the same bytes", lambda: target.copy_(source))


def measure(name: str, settings: Settings) -> Result:
    """Raises AssertionError, before anything is timed, if a contender's outputs are not those of the first."""
    this = CASES[name](settings)
    contenders = this.contenders + ([copy_of(this.bytes_moved)] if this.bytes_moved else [])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(this.threads)  # torch.compile generates code for this many
    try:
        failures = _verify(this, contenders)
        running = [contender for contender in contenders if contender.name not in failures]
        timers = [Timer("run()", globals={"run": contender.run}, num_threads=this.threads) for contender in running]
        times: list[list[float]] = [[] for _ in running]
        for _ in range(settings.rounds):
            for timer, seen in zip(timers, times):
                seen.extend(timer.blocked_autorange(min_run_time=settings.min_run_time).times)
    finally:
        torch.set_num_threads(threads_before)

    ours, ours_best = statistics.median(times[0]), min(times[0])
    result = Result(name, this.title, this.threads, this.bytes_moved)
    measured = {contender.name: seen for contender, seen in zip(running, times)}
    for contender in contenders:
        row = Row(contender.name, goal=contender.goal, failure=failures.get(contender.name))
        if not row.failure:
            seen = measured[contender.name]
            row.seconds, row.best, row.spread = statistics.median(seen), min(seen), _spread(seen)
            row.ratio, row.best_ratio = row.seconds / ours, row.best / ours_best
            row.gigabytes_per_second = this.bytes_moved and this.bytes_moved / row.seconds / 1e9
        result.rows.append(row)
    return result


def _verify(this: Case, contenders: list[Contender]) -> dict[str, str]:
    """Runs every contender once. Returns why some could not run."""
    expected, failures = None, {}
    for contender in contenders:
        try:
            got = contender.run()
        except Exception as error:
            if not contender.may_fail:
                raise
            failures[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if contender.outputs is None:
            continue
        got = [output.detach().to(torch.float64) for output in contender.outputs(got)]
        expected = got if expected is None else expected
        torch.testing.assert_close(
            got, expected, rtol=this.rtol, atol=this.atol, msg=lambda text: f"{this.title}: {contender.name} disagrees: {text}"
        )
    return failures


def _spread(seen: list[float]) -> float:
    if len(seen) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seen, n=4)
    return (third - first) / median
