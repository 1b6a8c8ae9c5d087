"""The command: arguments, what is printed as it proceeds, the report, the verdict."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .._info import collect_info
from . import bandwidth, cases, operators, torch_features  # noqa: F401  (importing registers their checks)
from .runner import BANDWIDTH, FAIL, NOT_APPLICABLE, PASS, Context, Outcome, Tally, run, select

DEFAULT_REPORT = "fused_critic_check.json"
FAILURES_SHOWN = 3  # of one check; the report has all
MESSAGE_LINES = 4  # of a failure; likewise
MOST_COLUMNS = 120
LABEL_COLUMNS = 24
REPORTED_VARIABLES = (
    "FUSED_CRITIC_",
    "FAKECUDA",
    "CUDA_",
    "PYTORCH_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "ATEN_",
    "OMP_",
    "MKL_",
)  # that start so

DESCRIPTION = """\
Checks every operator of this installation on one device, and ends with one
line: PASS or FAIL.

Results are compared with a float64 reference, for every dtype, layout and nasty
shape; they must be the same bits on every run; torch.compile, CUDA graphs,
streams and a second device must work. What cannot be had here (a compiler, a
second device, ...) is "n/a" with its reason: neither passed nor failed. A table
of times, which decides nothing, comes last."""

EPILOG = """\
Exit status: 0 PASS, 1 FAIL, 2 wrong arguments.

The report is one JSON file with everything, so that it can be attached to a bug
report, read (verdict and failures come first) and compared by a program.

  python -m fused_critic check                 everything
  python -m fused_critic check --quick         a sample of the cases, no times
  python -m fused_critic check --only gae      one check
  python -m fused_critic check --only gae/17   one case, as failures name it"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="every operator on this machine against the reference, and one verdict",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", type=torch.device, metavar="DEVICE", help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu"
    )
    parser.add_argument("--only", nargs="+", action="extend", metavar="NAME", help="these checks (gae) or single cases of them (gae/17)")
    parser.add_argument("--quick", action="store_true", help="every seventh case of the large checks, no benchmark")
    parser.add_argument("--no-benchmark", action="store_true", help="no table of times")
    parser.add_argument("--report", type=Path, default=DEFAULT_REPORT, metavar="PATH", help="where to write it; default: ./%(default)s")
    parser.add_argument("--list", action="store_true", help="name the checks (with --only: their cases) and stop")
    parser.set_defaults(run=lambda arguments: check(arguments, parser))


def check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    context = Context(_device(arguments.device, parser), arguments.quick)
    try:
        selection = select(arguments.only, context, benchmark=not (arguments.no_benchmark or arguments.quick))
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        _list(selection, context, with_cases=bool(arguments.only))
        return 0
    try:
        arguments.report.open("a").close()  # a path that cannot be written shows here, not at the end
    except OSError as error:
        parser.error(f"--report: {error}")

    screen = Screen()
    environment = _environment(context)
    screen.summary(environment)
    start = time.perf_counter()
    tallies, section = [], None
    for this, numbers in selection:
        if this.section != section:
            section = this.section
            screen.heading(section)
        if this.section == BANDWIDTH and not context.simulated:
            screen.text(bandwidth.explain(context.device))
            screen.line(bandwidth.HEADER)
        tally = Tally(this)
        for outcome in run(this, numbers, context):
            tally.outcomes.append(outcome)
            if outcome.measured:
                screen.line(bandwidth.row(outcome.measured))
            else:
                screen.progress(this.name, len(tally.outcomes))
        tallies.append(tally)
        screen.tally(tally)
    seconds = time.perf_counter() - start

    report = _report(tallies, environment, context, seconds)
    arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    screen.verdict(report, arguments.report)
    return 0 if report["verdict"] == PASS.upper() else 1


def _device(device: torch.device | None, parser: argparse.ArgumentParser) -> torch.device:
    there = torch.cuda.device_count()
    if device is None:
        device = torch.device("cuda" if there else "cpu")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {device}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not there:
        why = "torch finds no GPU" if torch.version.cuda else "torch is built without CUDA"
        parser.error(f"--device {device}: {why} (torch {torch.__version__})")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= there:
        parser.error(f"--device {device}: there {'is' if there == 1 else 'are'} {there} CUDA device{'s' * (there > 1)} here")
    return torch.device("cuda", index)


def _environment(context: Context) -> dict[str, Any]:
    info = collect_info()
    info.pop("operators")
    if context.simulated:
        info["warnings"].append("the device is simulated: nothing is timed, and CUDA graphs and compiled kernels are not run")
    if hasattr(os, "getloadavg"):
        info["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(REPORTED_VARIABLES)}
    return {"checked_device": str(context.device), "simulated": context.simulated, **info, "environment_variables": variables}


def _list(selection, context: Context, with_cases: bool) -> None:
    for this, numbers in selection:
        all_cases = list(this.cases(context))
        print(f"{this.name:{LABEL_COLUMNS}} {len(all_cases):4} cases: {this.about}")
        for number, (title, _) in enumerate(all_cases if with_cases else ()):
            if numbers is None or number in numbers:
                print(f"  {this.name}/{number}: {title}")


def _report(tallies: list[Tally], environment: dict[str, Any], context: Context, seconds: float) -> dict[str, Any]:
    outcomes = [outcome for tally in tallies for outcome in tally.outcomes]
    by_status = {status: [outcome for outcome in outcomes if outcome.status == status] for status in (PASS, FAIL, NOT_APPLICABLE)}
    checked = len(by_status[PASS]) + len(by_status[FAIL])
    return {
        "verdict": FAIL if by_status[FAIL] or not checked else PASS.upper(),
        "checks": checked,
        "failed": len(by_status[FAIL]),
        "not_applicable": len(by_status[NOT_APPLICABLE]),
        "seconds": round(seconds, 1),
        "failures": [{**_told(outcome), "repeat": _repeat(outcome, context)} for outcome in by_status[FAIL]],
        "command": shlex.join(["python", "-m", "fused_critic", *sys.argv[1:]]),
        "environment": environment,
        "tolerances": {
            "meaning": "of the largest magnitude in a result, or of 1 where that is less; a dtype's rounding replaces a smaller tolerance",
            "float64": cases.FLOAT64_TOLERANCE,
            "float32": cases.FLOAT32_TOLERANCE,
            "masked_whiten_float32": cases.WHITEN_TOLERANCE,
            "statistics": cases.STATISTICS_TOLERANCE,
            "rounding": {str(dtype): rounding for dtype, rounding in cases.ROUNDING.items()},
        },
        "results": {
            tally.check.name: {
                "section": tally.check.section,
                "about": tally.check.about,
                "status": tally.status,
                "seconds": round(tally.seconds, 3),
                "largest_share_of_tolerance": tally.worst.share_of_tolerance if tally.worst else None,
                "cases": [_told(outcome) for outcome in tally.outcomes],
            }
            for tally in tallies
        },
    }


def _told(outcome: Outcome) -> dict[str, Any]:
    told = {name: value for name, value in asdict(outcome).items() if value is not None}
    return {**told, "seconds": round(outcome.seconds, 4)}


def _repeat(outcome: Outcome, context: Context) -> str:
    return f"python -m fused_critic check --device {context.device} --only {outcome.name}"


class Screen:
    """Plain text, as wide as the terminal up to MOST_COLUMNS; colours and progress on a terminal only."""

    def __init__(self):
        self.is_terminal = sys.stdout.isatty()
        self.colours = self.is_terminal and "NO_COLOR" not in os.environ
        self.columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)

    def line(self, text: str = "") -> None:
        erase = "\r\x1b[K" if self.is_terminal else ""
        print(erase + text, flush=True)

    def text(self, text: str, indent: str = "") -> None:
        for paragraph in text.splitlines():
            for line in textwrap.wrap(paragraph, self.columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False):
                self.line(line)

    def field(self, label: str, value: object) -> None:
        wrapped = textwrap.wrap(str(value), self.columns - LABEL_COLUMNS, break_long_words=False) or [""]
        for number, line in enumerate(wrapped):
            self.line(f"{'' if number else label:{LABEL_COLUMNS}}{line}")

    def heading(self, text: str) -> None:
        self.line()
        self.line(text)
        self.line("-" * len(text))

    def progress(self, name: str, done: int) -> None:
        if self.is_terminal:
            print(f"\r\x1b[K{name:{LABEL_COLUMNS}}{done:4}", end="", flush=True)

    def summary(self, environment: dict[str, Any]) -> None:
        self.heading(f"fused_critic {environment['fused_critic']} on {environment['checked_device']}")
        for name, value in environment.items():
            if name in ("fused_critic", "checked_device", "simulated", "environment_variables") or value in (None, []):
                continue
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                self.field("" if number else _label(name), item)

    def tally(self, tally: Tally) -> None:
        failed, left_out, worst = tally.having(FAIL), tally.having(NOT_APPLICABLE), tally.worst
        ran = len(tally.outcomes) - len(left_out)
        what = f"{ran} case{'s' * (ran != 1)}"
        if failed:
            what = f"{len(failed)} of {what}"
        elif worst and worst.share_of_tolerance is not None:
            what += f", at most {100 * worst.share_of_tolerance:.2g}% of the tolerance"
        if tally.status == NOT_APPLICABLE:
            what = left_out[0].message or ""
        self.line(
            f"{tally.check.name:{LABEL_COLUMNS}}{self._coloured(tally.status)}{'':{6 - len(tally.status)}}{what} ({tally.seconds:.1f} s)"
        )
        for outcome in failed[:FAILURES_SHOWN]:
            self.text(f"{outcome.name}: {outcome.title}", indent="    ")
            self.text("\n".join((outcome.message or "").splitlines()[:MESSAGE_LINES]), indent="        ")
        if len(failed) > FAILURES_SHOWN:
            self.line(f"    and {len(failed) - FAILURES_SHOWN} more")
        busy = sum(bandwidth.disturbed(outcome.measured) for outcome in tally.outcomes if outcome.measured)
        if busy:
            self.text(f"other work disturbed {busy} of these rows: their medians are more than twice their least times", indent="    ")
        if left_out and ran:
            for reason in dict.fromkeys(outcome.message for outcome in left_out):
                count = sum(outcome.message == reason for outcome in left_out)
                self.text(f"{count} n/a: {reason}", indent="    ")

    def verdict(self, report: dict[str, Any], path: Path) -> None:
        self.heading("Verdict")
        for warning in report["environment"]["warnings"]:
            self.field("warning", warning)
        for failure in report["failures"][:FAILURES_SHOWN]:
            self.line(f"{'failed':{LABEL_COLUMNS}}{failure['name']}, again with:")
            self.line(f"  {failure['repeat']}")  # never wrapped: to be copied
        if report["failed"] > FAILURES_SHOWN:
            self.field("", f"and {report['failed'] - FAILURES_SHOWN} more, all in the report")
        self.field("report", path)
        counts = (
            f"{report['failed']} of {report['checks']} checks failed"
            if report["failed"]
            else f"{report['checks']} check{'s' * (report['checks'] != 1)}"
        )
        if not report["checks"]:
            counts = "nothing could be checked"
        if report["environment"]["warnings"]:
            counts += f", {len(report['environment']['warnings'])} warning{'s' * (len(report['environment']['warnings']) > 1)}"
        if report["not_applicable"]:
            counts += f", {report['not_applicable']} not applicable"
        self.line(f"{self._coloured(report['verdict'])}: {counts}, {report['seconds']:.0f} s on {report['environment']['checked_device']}")

    def _coloured(self, status: str) -> str:
        if not self.colours:
            return status
        colour = {"PASS": 32, "pass": 32, "FAIL": 31}.get(status, 33)
        return f"\x1b[{colour}m{status}\x1b[0m"


def _label(name: str) -> str:
    return name.replace("_", " ")
