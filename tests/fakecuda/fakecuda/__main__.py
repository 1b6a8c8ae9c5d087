"""Command line: ``python -m fakecuda run [options] -- pytest tests ...``, ``merge``, ``build``, ``env``."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from . import build, report

FOUND_ISSUES = 3  # exit status


def environment(card, devices, ext, allow, aten, seed, reports):
    """Environment variables of a program that is to run on the shim, those of this process included."""
    here = Path(__file__).parent
    e = dict(os.environ)
    e.update(
        FAKECUDA="1",
        FAKECUDA_CARD=card,
        FAKECUDA_DEVICES=str(devices),
        FAKECUDA_EXT=os.pathsep.join(str(Path(p).resolve()) for p in ext),
        FAKECUDA_REPORT_DIR=reports,
        FAKECUDA_ALLOW=",".join(allow),
        FAKECUDA_ATEN="1" if aten else "0",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        CUDA_MODULE_LOADING="LAZY",
    )
    if seed is not None:
        e["FAKECUDA_SEED"] = str(seed)

    def prepend(name, separator, *values):
        e[name] = separator.join([*map(str, values), *filter(None, [e.get(name)])])

    prepend("LD_PRELOAD", ":", *build.libraries())
    prepend("PYTHONPATH", os.pathsep, here / "_site", here.parent)
    prepend("PYTEST_PLUGINS", ",", "fakecuda.plugin")
    return e


def run(a):
    for p in a.ext:
        if not Path(p).exists():
            raise SystemExit(f"fakecuda: no such file: {p}")
    command = a.command[1:] if a.command[:1] == ["--"] else a.command
    if not command:
        raise SystemExit("fakecuda: no command")
    if command[0] in ("pytest", "py.test"):
        command = [sys.executable, "-m", "pytest", *command[1:]]
    elif command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]
    with tempfile.TemporaryDirectory(prefix="fakecuda-") as reports:
        env = environment(a.card, a.devices, a.ext, a.allow, not a.no_aten, a.seed, reports)
        status = subprocess.run(command, env=env).returncode
        merged = report.merge(report.load(sorted(Path(reports).glob("*.json"))))
    report.show(merged, a.source)
    if status < 0:
        print(f"the program died of signal {-status}" + (" (host code that dereferences a device pointer?)" if status == -11 else ""))
        status = 128 - status
    if a.report:
        Path(a.report).write_text(json.dumps(merged, indent=1))
    return status or (FOUND_ISSUES if any(i["kind"] not in a.allow for i in merged["issues"]) else 0)


def merge(a):
    merged = report.merge(report.load(a.reports))
    report.show(merged, a.source)
    Path(a.out).write_text(json.dumps(merged, indent=1))
    return 0


def env(a):
    e = environment("H100", 1, [], [], True, None, "")
    shown = ("LD_PRELOAD", "PYTHONPATH", "PYTEST_PLUGINS", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_MODULE_LOADING")
    print("\n".join(f"export {k}={shlex.quote(e[k])}" for k in sorted(e) if k.startswith("FAKECUDA") or k in shown))
    return 0


def build_shim(a):
    print(*build.libraries(), sep="\n")
    return 0


def main(argv=None):
    description = "Run a program that uses a CUDA build of PyTorch and a CUDA extension on a machine without a GPU."
    ap = argparse.ArgumentParser(prog="fakecuda", description=description)
    sub = ap.add_subparsers(required=True)
    r = sub.add_parser("run", help="run a program; exit status: the program's, or 3 if it succeeds and there was an issue")
    r.set_defaults(do=run)
    r.add_argument("--ext", action="append", default=[], help="shared object whose kernels run (default: all outside torch/ and nvidia/)")
    r.add_argument("--card", default="H100", choices=["H100", "A100", "T4"])
    r.add_argument("--devices", type=int, default=1)
    r.add_argument("--seed", type=int, help="shuffle the order in which warps run")
    r.add_argument("--report", help="write the report as JSON")
    r.add_argument("--allow", action="append", default=[], metavar="KIND", help="report issues of this kind, but do not fail for them")
    r.add_argument("--no-aten", action="store_true", help="do not run PyTorch's own CUDA operators on the CPU")
    r.add_argument("command", nargs=argparse.REMAINDER)
    m = sub.add_parser("merge", help="make one report of several")
    m.set_defaults(do=merge)
    m.add_argument("out")
    m.add_argument("reports", nargs="+")
    for p in (r, m):
        p.add_argument("--source", action="append", metavar="DIR", help="folder whose source lines the summary counts (default: this one)")
    sub.add_parser("build", help="compile the shim and print its libraries").set_defaults(do=build_shim)
    sub.add_parser("env", help="print the environment as shell exports, for a debugger for instance").set_defaults(do=env)
    a = ap.parse_args(argv)
    if getattr(a, "source", "") is None:
        a.source = ["."]
    return a.do(a)


if __name__ == "__main__":
    sys.exit(main())
