"""Runs the cases and prints a table for each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from . import cases, peers  # noqa: F401  (importing cases registers them)
from .harness import CASES, Result, Row, Settings, measure

FULL = dict(min_run_time=0.3, rounds=5, large_shape=(64, 4096))
QUICK = dict(min_run_time=0.05, rounds=2, large_shape=(16, 512))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", help=f"any of {', '.join(CASES)}; all, if none is named")
    parser.add_argument("--quick", action="store_true", help="small tensors and short runs: that everything works, not how fast it is")
    parser.add_argument("--fetch-verl", action="store_true", help="download verl's wheel if it is not there, to run its own functions")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    unknown = set(arguments.case) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}")

    settings = Settings(peers.verl(download=arguments.fetch_verl), **(QUICK if arguments.quick else FULL))
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "verl": settings.verl.origin,
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs",
        "quick": arguments.quick,
    }
    # Not cut to 80 columns where the output is a file.
    console = Console() if Console().is_terminal else Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in environment.items()), highlight=False)
    results = []
    for name in arguments.case or CASES:
        with console.status(name):
            results.append(measure(name, settings))
        console.print(_table(results[-1], goals=not arguments.quick))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": environment, "results": [dataclasses.asdict(result) for result in results]}, file, indent=2)


def _table(result: Result, goals: bool) -> Table:
    title = f"{result.title} · {result.threads} thread{'s' * (result.threads > 1)}"
    if result.bytes_moved:
        title += f" · {result.bytes_moved / 1e6:.2f} MB to move"
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for column in ("median", "best", "spread", "median / ours", "best / ours", "goal", "GB/s"):
        table.add_column(column, justify="right")
    for row in result.rows:
        if row.failure:
            table.add_row(row.name, "failed")
            table.caption = f"{row.name}: {row.failure}"
            continue
        table.add_row(
            row.name,
            _duration(row.seconds),
            _duration(row.best),
            f"{row.spread:.0%}",
            f"{row.ratio:.2f}",
            f"{row.best_ratio:.2f}",
            _goal(row) if goals else "",
            f"{row.gigabytes_per_second:.2f}" if row.gigabytes_per_second else "",
        )
    return table


def _goal(row: Row) -> str:
    """On a machine that others use as well, medians alone may mislead either way: a verdict needs the best times to agree with them."""
    if row.goal is None:
        return ""
    verdicts = {row.ratio >= row.goal, row.best_ratio >= row.goal}
    colour, verdict = ("yellow", "unsettled") if len(verdicts) > 1 else ("green", "met") if True in verdicts else ("red", "missed")
    return f"[{colour}]>= {row.goal:g} {verdict}[/{colour}]"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            break
    return f"{seconds / scale:.2f} {unit}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
