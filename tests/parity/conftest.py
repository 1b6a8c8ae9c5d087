"""Comparisons with trainers' own code, recorded; docs/parity.md is the table of what was compared.

A test takes the fixture `parity` and calls

    parity.same("openrlhf", "ValueLoss", "gradient", ours, theirs, rtol=1e-6, atol=1e-7)
    parity.differs("openrlhf", "ValueLoss", "NaN at masked tokens", theirs="loss NaN", ours="never used")

The first compares and records, the second records a difference on purpose, which the test itself asserts on both sides.
Per label the table has the loosest tolerance. After a run of the whole suite it has to be the committed one;
``pytest tests/parity --write-parity`` writes it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- begin: parity -->", "<!-- end: parity -->"
FOLDER = Path(__file__).parent


RECORD, INCOMPLETE, VERDICT = pytest.StashKey[Any](), pytest.StashKey[bool](), pytest.StashKey[str]()


class Record:
    def __init__(self):
        self.same_rows = defaultdict(dict)  # (trainer, function) -> what -> (rtol, atol), the loosest of all comparisons
        self.difference_rows = set()  # (trainer, function, case, theirs, ours)

    def same(self, trainer, function, what, ours, theirs, *, rtol, atol, where=None):
        """Both are tensors or numbers; `where`: a mask of the positions that count. NaN equals nothing."""
        ours, theirs = (torch.as_tensor(x).detach().cpu().double() for x in (ours, theirs))
        assert ours.shape == theirs.shape, f"{trainer} {function} {what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
        if where is not None:
            ours, theirs = ours[where.bool()], theirs[where.bool()]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text: f"{trainer} {function} {what}: {text}")
        before = self.same_rows[trainer, function].get(what, (0, 0))
        self.same_rows[trainer, function][what] = (max(rtol, before[0]), max(atol, before[1]))

    def differs(self, trainer, function, case, *, theirs, ours):
        self.difference_rows.add((trainer, function, case, theirs, ours))

    def table(self) -> str:
        lines = ["| trainer | function | equal within (relative, absolute) |", "|---|---|---|"]
        for (trainer, function), rows in sorted(self.same_rows.items()):
            by_tolerance = defaultdict(list)
            for what, tolerance in sorted(rows.items()):
                by_tolerance[tolerance].append(what)
            cells = [f"{', '.join(what)}: {rtol:g}, {atol:g}" for (rtol, atol), what in sorted(by_tolerance.items())]
            lines.append(f"| {trainer} {peers.VERSIONS[trainer]} | `{function}` | {'; '.join(cells)} |")
        lines += ["", "Different on purpose:", "", "| trainer | function | case | theirs | ours |", "|---|---|---|---|---|"]
        lines += [f"| {trainer} | `{function}` | {' | '.join(rest)} |" for trainer, function, *rest in sorted(self.difference_rows)]
        return "\n".join(lines)


@pytest.fixture(scope="session")
def parity(request):
    return request.config.stash.setdefault(RECORD, Record())


def pytest_deselected(items):
    for item in items:
        item.config.stash[INCOMPLETE] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if not report.passed:
        item.config.stash[INCOMPLETE] = True
    return report


def pytest_sessionfinish(session):
    stash, write = session.config.stash, session.config.option.write_parity
    files = {item.path for item in session.items if item.path.is_relative_to(FOLDER)}
    chosen = any("::" in argument for argument in session.config.args)
    incomplete = RECORD not in stash or stash.get(INCOMPLETE, False)
    if chosen or files != set(FOLDER.glob("test_*.py")) or incomplete:
        stash[VERDICT] = f"docs/parity.md was not {'written' if write else 'compared'}: not all of tests/parity ran and passed"
        return
    committed = PAGE.read_text(encoding="utf-8")
    head, _, rest = committed.partition(BEGIN)
    page = f"{head}{BEGIN}\n{stash[RECORD].table()}\n{END}{rest.partition(END)[2]}"
    if write:
        PAGE.write_text(page, encoding="utf-8")
    elif page != committed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        stash[VERDICT] = "docs/parity.md has another table than this run: pytest tests/parity --write-parity writes it"


def pytest_terminal_summary(terminalreporter, config):
    if VERDICT in config.stash:
        terminalreporter.write_line(config.stash[VERDICT], yellow=True)
