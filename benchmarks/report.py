"""Tables, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .accuracy import Error
from .contenders import OURS
from .goals import Verdict
from .harness import Result, Row

FILE_WIDTH = 160  # columns, where the output is no terminal
COLOURS = {"met": "green", "missed": "red", "unsettled": "yellow", "not measured": "dim"}
CSV_COLUMNS = (
    "case",
    "tokens",
    "contender",
    "threads",
    "cache",
    "median_s",
    "best_s",
    "iqr_over_median",
    "runs",
    "disturbed_runs",
    "busy",
    "bytes",
    "bytes_per_s",
)


def console() -> Console:
    """Not cut to 80 columns where the output is a file."""
    return Console() if Console().is_terminal else Console(width=FILE_WIDTH)


def result_table(result: Result, call_seconds: float | None) -> Table:
    """`call_seconds`: what a call of ours costs without data; the column "less call" is then a kernel's own time."""
    ours = result.rows[0].contender  # everyone is compared with the first
    title = f"{result.name} · {result.title} · {result.tokens:,} tokens"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("contender", no_wrap=True)
    for column in ("threads", "cache", "median", "best", "IQR", "runs", "x ours", "x ours, best", "less call", "ns/token", "GB/s"):
        table.add_column(column, justify="right")
    for row in sorted(result.rows, key=lambda row: (-row.threads, row.cache == "cold")):
        base = result.find(ours, row.threads, row.cache)
        less_call = row.median - call_seconds if call_seconds and row.contender == OURS else None
        table.add_row(
            row.contender,
            str(row.threads),
            row.cache,
            duration(row.median),
            duration(row.best),
            f"{row.spread:.0%}",
            _runs(row),
            f"{row.median / base.median:.2f}" if base else "",
            f"{row.best / base.best:.2f}" if base else "",
            duration(less_call) if less_call and less_call > 0 else "",
            "" if result.is_call else f"{row.median / result.tokens * 1e9:.3f}",
            f"{row.bytes_moved / row.median / 1e9:.2f}" if row.bytes_moved else "",
        )
    notes = [f"agree with float64 within {result.tolerance}"] if result.tolerance else []
    if any(row.busy for row in result.rows):
        notes.append("busy: other processes took a core during nearly every run, so these times tell little")
    reasons: dict[str, list[str]] = {}
    for name, reason in result.left_out.items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"{', '.join(names)}: left out, {reason}" for reason, names in reasons.items()]
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def accuracy_table(errors: list[Error]) -> Table:
    table = Table(
        title="Largest error against float64, relative to the largest element; ours is to be at most verl's", title_justify="left"
    )
    table.add_column("output")
    for column in ("fused_critic", "verl, float32", "verdict"):
        table.add_column(column, justify="right")
    for error in errors:
        table.add_row(error.quantity, f"{error.ours:.2e}", "" if error.verl is None else f"{error.verl:.2e}", _coloured(error.verdict))
    return table


def goals_table(verdicts: list[Verdict]) -> Table:
    table = Table(
        title="Goals, warm cache: medians and best times have to agree for a verdict, and most runs to have kept their cores",
        title_justify="left",
    )
    table.add_column("goal")
    for column in ("by medians", "by best times", "verdict"):
        table.add_column(column, justify="right")
    for verdict in verdicts:
        numbers = ["" if x is None else f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in (verdict.median, verdict.best)]
        table.add_row(verdict.goal, *numbers, _coloured(verdict.verdict))
    reasons = dict.fromkeys(f"{verdict.verdict}: {verdict.reason}" for verdict in verdicts if verdict.reason)
    table.caption, table.caption_justify = "\n".join(reasons), "left"
    return table


def write_json(path: Path, environment: dict, results: list[Result], errors: list[Error], verdicts: list[Verdict]) -> None:
    content = {"environment": environment}
    for name, items in (("results", results), ("accuracy", errors), ("goals", verdicts)):
        content[name] = [dataclasses.asdict(item) for item in items]
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, results: list[Result]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for result in results:
            for row in result.rows:
                writer.writerow([result.name, result.tokens, *_csv_fields(row)])


def _csv_fields(row: Row) -> list:
    rate = row.bytes_moved / row.median if row.bytes_moved else ""
    return [
        row.contender,
        row.threads,
        row.cache,
        row.median,
        row.best,
        row.spread,
        row.runs,
        row.disturbed,
        row.busy,
        row.bytes_moved or "",
        rate,
    ]


def _runs(row: Row) -> str:
    if row.busy:
        return f"[yellow]{row.runs}, busy[/]"
    return f"{row.runs} of {row.runs + row.disturbed}" if row.disturbed else str(row.runs)


def _coloured(verdict: str) -> str:
    return f"[{COLOURS[verdict]}]{verdict}[/]"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            break
    return f"{seconds / scale:.2f} {unit}"
