"""The test suite on device "cuda" without a GPU: every run of it on simulated cards, then the audit of the kernels.

`make test-cuda` builds what this needs and calls it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIMULATOR = ROOT / "tests" / "fakecuda"

# Cards differ in the PTX that they take. There are two (build_config.PTX_GENERATIONS): an H100 takes that of sm_80 as all later cards do, a T4 the
# other, here with every kind of access, layout and reduction once.
SUBSET = (
    "tests/test_value_loss.py",
    "tests/test_gae.py",
    "tests/test_reverse_scan.py",
    "tests/test_vtrace.py",
    "-k",
    "test_shapes or test_padding_mask or test_reference_vector or test_masked_contents_have_no_influence or test_same_bits_on_every_run",
)
# Shuffled schedules differ in the order of warps, which is slow to simulate: what hands over between warps, tiles and blocks.
SHUFFLED = (
    "tests/test_value_loss.py",
    "tests/test_gae.py",
    "tests/test_reverse_scan.py",
    "tests/test_vtrace.py",
    "-k",
    "test_same_bits_on_every_run or (test_shapes and long)",
)


@dataclass(frozen=True)
class Run:
    name: str
    arguments: tuple[str, ...]  # of pytest
    card: str = "H100"
    seed: int | None = None


RUNS = (
    Run("everything", ("tests",)),
    Run("T4", SUBSET, card="T4"),
    Run("shuffled 1", SHUFFLED, seed=1),
    Run("shuffled 2", SHUFFLED, seed=2),
)


def pytest(*arguments):
    # The trainers' own code runs on no device, and needs packages that are not there.
    return [
        "pytest",
        "-q",
        "--ignore=tests/parity",
        "-p",
        "no:cacheprovider",
        "-n",
        str(os.cpu_count()),
        "-rs",
        "--durations=5",
        *arguments,
    ]


def execute(run, library, report):
    """-> exit status."""
    command = [sys.executable, "-m", "fakecuda", "run", "--devices", "2", "--card", run.card, "--ext", str(library)]
    command += ["--report", str(report)]
    command += [] if run.seed is None else ["--seed", str(run.seed)]
    return subprocess.run([*command, "--", *pytest("--quick", "--devices", "cuda", *run.arguments)], cwd=ROOT, env=environment()).returncode


def environment():
    """One thread per process, because the processes share the cores."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PYTHONPATH": str(SIMULATOR), "PATH": path, "OMP_NUM_THREADS": "1"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", required=True, type=Path, help="output of the build, with what ptxas says about the kernels")
    parser.add_argument("--library", required=True, type=Path, help="the built extension")
    parser.add_argument("--reports", required=True, type=Path, help="folder for the simulator's reports")
    parser.add_argument("--write", action="store_true", help="renew the tables of docs/kernels.md")
    arguments = parser.parse_args()
    arguments.reports.mkdir(parents=True, exist_ok=True)

    failed, parts = [], []
    for run in RUNS:
        start = time.monotonic()
        print(f"=== {run.name}: {run.card}{'' if run.seed is None else f', seed {run.seed}'}", flush=True)
        parts.append(str(arguments.reports / f"{run.name.replace(' ', '-')}.json"))
        if execute(run, arguments.library, parts[-1]):
            failed.append(run.name)
        print(f"=== {run.name}: {time.monotonic() - start:.0f} s", flush=True)
    print("=== the simulator's own tests", flush=True)
    if subprocess.run([sys.executable, "-m", *pytest("tests/fakecuda/tests")], cwd=ROOT, env=environment()).returncode:
        failed.append("the simulator's own tests")

    merged = arguments.reports / "merged.json"
    subprocess.run(
        [sys.executable, "-m", "fakecuda", "merge", str(merged), *parts], check=True, env=environment(), stdout=subprocess.DEVNULL
    )
    audit = [sys.executable, "-m", "fakecuda", "run", "--", "python", "tests/kernel_audit.py"]
    audit += ["--log", str(arguments.log), "--library", str(arguments.library), "--report", str(merged)]
    audit += ["--write"] if arguments.write else []
    if subprocess.run(audit, cwd=ROOT, env=environment()).returncode:
        failed.append("audit of the kernels")
    print("FAILED: " + ", ".join(failed) if failed else "everything passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
