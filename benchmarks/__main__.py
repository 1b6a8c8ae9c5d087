"""Measures fused_critic beside what trainers run today, and writes tables, JSON, CSV and plots.

Every contender's results are held against float64 formulas before anything is timed; a disagreement ends the run with exit status 1.
Goals that are missed are reported and do not change the exit status.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import sys
import time
from pathlib import Path

import torch

from . import accuracy, cases, goals, harness, plots, report
from .contenders import OURS, registry
from .device import Device, cpu_name

FULL = dict(rounds=40, block_seconds=4e-3, seconds_per_contender=0.4, patience_seconds=1.0, compilers=True)
QUICK = dict(rounds=5, block_seconds=5e-4, seconds_per_contender=0.1, patience_seconds=0.0, compilers=True)
SMOKE = dict(rounds=2, block_seconds=0.0, seconds_per_contender=0.0, patience_seconds=0.0, compilers=False)
SMOKE_FLUSH = 2**20  # bytes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases or patterns of names, as 'gae-*'; default: all (--list)")
    parser.add_argument("--list", action="store_true", help="name the cases and the contenders, and measure nothing")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="the same sizes in fewer rounds, for a first impression")
    effort.add_argument("--smoke", action="store_true", help="tiny tensors, no compilers: that everything works, not how fast it is")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", default=f"{min(2, os.cpu_count() or 1)},1", help="numbers of threads; default %(default)s")
    parser.add_argument("--fetch", action="store_true", help="download the contenders' pinned wheels that are not there yet")
    default = Path(__file__).parent / "out"
    parser.add_argument("--output", metavar="DIR", type=Path, default=default, help="where the results go; default: %(default)s")
    options = parser.parse_args(arguments)
    options.threads = sorted({int(number) for number in options.threads.split(",")}, reverse=True)
    return options


def chosen(names, patterns: list[str]) -> list[str]:
    unknown = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if unknown:
        sys.exit(f"no case is named {', '.join(unknown)}; --list names all")
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    registry.download_allowed = options.fetch
    device, console = Device(options.device, SMOKE_FLUSH if options.smoke else None), report.console()
    all_cases = cases.all_cases(cases.SMOKE if options.smoke else cases.FULL, device)
    if options.list:
        console.print("cases:", *all_cases, sep="\n  ", highlight=False)
        console.print("contenders:", *(f"{who.operator}: {who.name}" for who in registry.CONTENDERS), sep="\n  ", highlight=False)
        return
    names, started = chosen(all_cases, options.cases), time.perf_counter()
    effort = SMOKE if options.smoke else QUICK if options.quick else FULL
    settings = harness.Settings(threads=options.threads if options.device == "cpu" else [1], **effort)
    environment = describe(options, device, settings)
    console.print("\n".join(f"{key}: {value}" for key, value in environment.items()), highlight=False)

    results: list[harness.Result] = []
    try:
        errors = accuracy.measure(accuracy.SMOKE if options.smoke else accuracy.Sizes(), device)
        console.print(report.accuracy_table(errors))
        for name in names:
            with console.status(name):
                results.append(harness.measure(all_cases[name](), settings, device))
            console.print(report.result_table(results[-1], call_seconds(results, name)))
    except harness.Disagreement as disagreement:
        sys.exit(str(disagreement))
    verdicts = goals.judge(results)
    if not options.smoke:
        console.print(report.goals_table(verdicts))

    options.output.mkdir(parents=True, exist_ok=True)
    environment["seconds"] = round(time.perf_counter() - started)
    report.write_json(options.output / "results.json", environment, results, errors, verdicts)
    report.write_csv(options.output / "results.csv", results)
    plots.write(options.output, results, device.name())
    console.print(f"{environment['seconds']} s; results, tables and plots are in {options.output}", highlight=False)


def call_seconds(results: list[harness.Result], name: str) -> float | None:
    """What the call of this case's operator costs, where that was measured in the same run."""
    call = next((result for result in results if result.name == f"call-{name.split('-')[0]}"), None)
    row = call and not name.startswith("call") and call.find(cases.OPERATOR, 1, "warm")
    return row.median if row else None


def describe(options: argparse.Namespace, device: Device, settings: harness.Settings) -> dict:
    return {
        "device": device.name(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        OURS: sys.modules["fused_critic"].__version__,
        "threads": ", ".join(map(str, settings.threads)),
        "clock": device.clock(),
        "cold cache": f"{device.flush_bytes / 2**20:.0f} MiB are written before each run",
        "rounds": f"up to {settings.rounds}, interleaved; runs that another process took a core from are left out where enough others remain",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs",
        "effort": "smoke" if options.smoke else "quick" if options.quick else "full",
    }


if __name__ == "__main__":
    main()
