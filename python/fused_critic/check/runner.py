"""What a check is, and how one is run."""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator

import torch

PASS, FAIL, NOT_APPLICABLE = "pass", "FAIL", "n/a"
CORRECTNESS = "Correctness, against the float64 reference"
DETERMINISM = "Determinism, bit for bit"
TORCH_FEATURES = "Inside of torch"
BANDWIDTH = "Bandwidth"
SECTIONS = (CORRECTNESS, DETERMINISM, TORCH_FEATURES, BANDWIDTH)  # in the order in which they are run
QUICK_STEP = 7  # has no factor in common with the sizes of the grids, so that every value of every factor stays


class NotApplicable(Exception):
    """Raised by a case that cannot be run here, with the reason: neither passed nor failed."""


@dataclass(frozen=True)
class Context:
    device: torch.device
    quick: bool = False

    @property
    def simulated(self) -> bool:
        """Whether kernels are executed by the simulator of tests/fakecuda rather than by a GPU."""
        return self.device.type == "cuda" and ("fakecuda" in sys.modules or os.environ.get("FAKECUDA", "0") not in ("", "0"))

    def needs_cuda(self) -> None:
        if self.device.type != "cuda":
            raise NotApplicable("needs a CUDA device")

    def needs_real_device(self) -> None:
        if self.simulated:
            raise NotApplicable("simulated device")


# A case: what it is, in words, and a function that raises where the result is wrong. The function returns the largest share of a tolerance
# that was used, a dict of measurements, or None.
Case = tuple[str, Callable[[], "float | dict[str, Any] | None"]]


@dataclass(frozen=True)
class Check:
    """A named list of cases. The list, hence each case's number in it, is the same on every device."""

    name: str
    section: str
    about: str
    cases: Callable[[Context], Iterable[Case]]
    sampled: bool = False  # --quick takes every QUICK_STEP-th case


@dataclass
class Outcome:
    """Of one case."""

    name: str  # check/number
    title: str
    status: str
    seconds: float = 0.0
    share_of_tolerance: float | None = None
    measured: dict[str, Any] | None = None
    message: str | None = None  # of a failure; the reason where the case is not applicable
    traceback: str | None = None


@dataclass
class Tally:
    """Of all cases of one check."""

    check: Check
    outcomes: list[Outcome] = field(default_factory=list)

    def having(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def status(self) -> str:
        if self.having(FAIL):
            return FAIL
        return PASS if self.having(PASS) else NOT_APPLICABLE

    @property
    def seconds(self) -> float:
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def worst(self) -> Outcome | None:
        """The case closest to its tolerance."""
        measured = [outcome for outcome in self.outcomes if outcome.share_of_tolerance is not None]
        return max(measured, key=lambda outcome: outcome.share_of_tolerance or 0.0, default=None)


CHECKS: dict[str, Check] = {}


def check(section: str, name: str, about: str, sampled: bool = False):
    def register(cases):
        CHECKS[name] = Check(name, section, about, cases, sampled)
        return cases

    return register


def select(only: list[str] | None, context: Context, benchmark: bool) -> list[tuple[Check, set[int] | None]]:
    """The checks to run and, where not all of a check's cases are wanted, their numbers. ValueError: there is no such check or case."""
    if not only:
        chosen: dict[str, set[int] | None] = {name: None for name in CHECKS if benchmark or CHECKS[name].section != BANDWIDTH}
    else:
        chosen = {}
        for text in only:
            name, slash, number = text.partition("/")
            if name not in CHECKS or (slash and not number.isdecimal()):
                raise ValueError(f"no check is called {text}; --list names them")
            if not slash:
                chosen[name] = None
            elif (numbers := chosen.setdefault(name, set())) is not None:
                numbers.add(int(number))
    selection = []
    for name, numbers in chosen.items():
        size = len(list(CHECKS[name].cases(context)))
        if numbers and max(numbers) >= size:
            raise ValueError(f"{name} has cases 0 to {size - 1}, not {max(numbers)}")
        if numbers is None and context.quick and CHECKS[name].sampled:
            numbers = set(range(0, size, QUICK_STEP))
        selection.append((CHECKS[name], numbers))
    return sorted(selection, key=lambda chosen: SECTIONS.index(chosen[0].section))


def run(this: Check, numbers: set[int] | None, context: Context) -> Iterator[Outcome]:
    """Outcome by outcome. Whatever a case raises is its failure; the next one runs all the same."""
    for number, (title, function) in enumerate(this.cases(context)):
        if numbers is None or number in numbers:
            yield _run_case(Outcome(f"{this.name}/{number}", title, PASS), function)


def _run_case(outcome: Outcome, function: Callable[[], Any]) -> Outcome:
    start = time.perf_counter()
    try:
        result = function()
        if isinstance(result, dict):
            outcome.measured = result
        else:
            outcome.share_of_tolerance = result
    except NotApplicable as reason:
        outcome.status, outcome.message = NOT_APPLICABLE, str(reason)
    except Exception as error:
        outcome.status, outcome.traceback = FAIL, traceback.format_exc()
        outcome.message = str(error) if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - start
    return outcome
