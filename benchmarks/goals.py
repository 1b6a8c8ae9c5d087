"""The project's goals for the CPU, and whether a run meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

from .cases import ADD, BASE, BF16, FULL, OPERATOR, PUBLIC, SEQ_MEAN
from .contenders import COPY, OURS
from .harness import Result

THREADS = 2  # the goals are for this many
FAST_LOOPS = ("tianshou (numba)", "fast-gae (Cython)", "scalar loop, 1 thread (numba)")
SCALAR_LOOP = "scalar loop, 1 thread (numba)"

LOSS, VARIANTS = "loss-64x4096", "loss-variants-64x4096"
GAE, ONE_ROW, TIME_MAJOR, PACKED = "gae-64x8192", f"gae-1x{FULL.one_row}", "gae-time-major-128x4096", "gae-packed"


class NotMeasured(LookupError):
    """The run does not have what a goal is about."""


@dataclass
class Verdict:
    goal: str
    median: Optional[float] = None
    best: Optional[float] = None
    verdict: str = "not measured"
    reason: str = ""


Time = Callable[..., float]


@dataclass
class Goal:
    text: str  # what `value` is
    at_most: Optional[float]
    at_least: Optional[float]
    value: Callable[[Time], float]

    def met(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= self.at_least

    def __str__(self) -> str:
        bound = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        return f"{self.text} {bound}"


def at_most(limit: float, text: str, value: Callable[[Time], float]) -> Goal:
    return Goal(text, limit, None, value)


def at_least(limit: float, text: str, value: Callable[[Time], float]) -> Goal:
    return Goal(text, None, limit, value)


def _over_copy(case: str, call: str) -> Callable[[Time], float]:
    """Without the call's own time, in the time of the copy."""
    return lambda time: (time(case, OURS) - time(call, OPERATOR)) / time(case, COPY)


def _times_as_fast(case: str, other: str) -> Callable[[Time], float]:
    return lambda time: time(case, other) / time(case, OURS)


def _single_thread_share(case: str, contender: str = OURS) -> Callable[[Time], float]:
    return lambda time: time(case, contender) / time(case, contender, threads=1)


GOALS = [
    at_most(2.0, "value loss [64, 4096], less the call, in copies of the same bytes", _over_copy(LOSS, "call-loss")),
    at_least(25, "value loss [64, 4096]: times as fast as verl", _times_as_fast(LOSS, "verl")),
    at_least(6, "value loss [64, 4096]: times as fast as torch.compile", _times_as_fast(LOSS, "torch.compile")),
    at_most(1.2, "value loss, seq-mean-token-mean over token-mean", lambda time: time(VARIANTS, SEQ_MEAN) / time(VARIANTS, BASE)),
    at_most(1.2, "value loss, bf16 values over float32", lambda time: time(VARIANTS, BF16) / time(VARIANTS, BASE)),
    at_most(2.0, "GAE [64, 8192], less the call, in copies of the same bytes", _over_copy(GAE, "call-gae")),
    at_least(3, "GAE [64, 8192]: times as fast as the fastest peer", lambda time: time(GAE, *FAST_LOOPS) / time(GAE, OURS)),
    at_least(1000, "GAE [64, 8192]: times as fast as verl", _times_as_fast(GAE, "verl")),
    at_least(1.7, "GAE, one row of 1M: times as fast as a scalar loop", _times_as_fast(ONE_ROW, SCALAR_LOOP)),
    at_most(2.0, "GAE time-major [128, 4096], less the call, in copies of the same bytes", _over_copy(TIME_MAJOR, "call-gae")),
    at_most(2.0, "GAE packed, less the call, in copies of the same bytes", _over_copy(PACKED, "call-gae")),
    at_most(
        5,
        "call: value loss operator, forward with grad, in torch.adds",
        lambda t: t("call-loss-forward", OPERATOR) / t("call-loss-forward", ADD),
    ),
    at_most(4, "call: GAE operator, in torch.adds with grad", lambda time: time("call-gae", OPERATOR) / time("call-gae", ADD)),
    at_most(3, "call: public value_loss beyond the operator, in torch.adds", lambda time: _beyond(time, "call-loss-forward")),
    at_most(3, "call: public gae beyond the operator, in torch.adds", lambda time: _beyond(time, "call-gae")),
    *(
        at_least(0.55, f"one thread's share of two threads' throughput: {text}", _single_thread_share(case, contender))
        for text, case, contender in (
            ("value loss [64, 4096]", LOSS, OURS),
            (f"value loss, {SEQ_MEAN}", VARIANTS, SEQ_MEAN),
            (f"value loss, {BF16}", VARIANTS, BF16),
            ("GAE [64, 8192]", GAE, OURS),
            ("GAE, one row of 1M", ONE_ROW, OURS),
            ("GAE time-major [128, 4096]", TIME_MAJOR, OURS),
            ("GAE packed", PACKED, OURS),
        )
    ),
]


def _beyond(time: Time, case: str) -> float:
    return (time(case, PUBLIC) - time(case, OPERATOR)) / time(case, ADD)


def judge(results: list[Result]) -> list[Verdict]:
    """With a warm cache. There is a verdict where medians and best times agree and the runs kept their cores."""
    by_name = {result.name: result for result in results}

    busy: set[str] = set()

    def time_by(statistic: str) -> Time:
        def time(case: str, *contenders: str, threads: int = THREADS) -> float:
            """The least of several contenders."""
            if case not in by_name:
                raise NotMeasured(f"{case} was not run")
            rows = [by_name[case].find(name, 1 if by_name[case].is_call else threads, "warm") for name in contenders]
            found = [getattr(row, statistic) for row in rows if row]
            busy.update(f"{row.contender} in {case}" for row in rows if row and row.busy)
            if not found:
                raise NotMeasured(f"{case} has no {' or '.join(contenders)} on {threads} thread{'s' * (threads > 1)}")
            return min(found)

        return time

    verdicts = []
    for goal in GOALS:
        busy.clear()
        try:
            median, best = goal.value(time_by("median")), goal.value(time_by("best"))
        except NotMeasured as reason:
            verdicts.append(Verdict(str(goal), reason=str(reason)))
            continue
        both = {goal.met(median), goal.met(best)}
        if busy:
            verdicts.append(Verdict(str(goal), median, best, "unsettled", f"the machine was busy: {', '.join(sorted(busy))}"))
        elif len(both) > 1:
            verdicts.append(Verdict(str(goal), median, best, "unsettled", "medians and best times disagree"))
        else:
            verdicts.append(Verdict(str(goal), median, best, "met" if True in both else "missed"))
    return verdicts
